"""The paper's experiments, small: its questions, asked of the lab's video transformer. They run from a clone:

    python -m experiments run       # measures what is not measured yet, a line of JSON per case and seed
    python -m experiments report    # makes docs/experiments.md and its figures of the lines

One file, one job:

- `setting`         what an experiment is, and the sizes at which it is measured
- `run`, `report`   from cases to lines, from lines to the page
- `recipe`          a student: what its attention is and how it is trained
- `fine_tuning`     teachers and students are trained and evaluated
- `classifier`      of digits, to judge generated clips
- `comparisons`     SLA beside its halves, one part varied at a time, and when the paper's order holds
- `curves`          what to fine-tune, and towards what
- `attention_maps`  whether few weights are large and the rest has a low rank
- `flatness`        whether the features are flat
- `block_choice`    whether the classification chooses well
"""

from . import attention_maps, block_choice, comparisons, curves, flatness
from .setting import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        attention_maps.EXPERIMENT,
        block_choice.EXPERIMENT,
        *comparisons.EXPERIMENTS,
        curves.EXPERIMENT,
        flatness.EXPERIMENT,
    )
}
