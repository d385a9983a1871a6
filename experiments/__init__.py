"""The paper's questions, asked of the lab's small video transformer. They run from the root of a clone:

    python -m experiments run       # measures what is not measured yet: a line of JSON for each case and seed
    python -m experiments report    # makes the tables and figures of docs/experiments.md from these lines

Each file has one job:

- `setting`         what an experiment is, and the sizes at which it is measured
- `run`, `report`   from cases to lines, and from lines to the page
- `recipe`          what a student's attention is and how it is trained
- `fine_tuning`     trains and evaluates teachers and students
- `classifier`      recognises digits, to judge generated clips
- `comparisons`     SLA against its halves, one part varied at a time, and when the paper's order holds
- `curves`          what to fine-tune, and towards what
- `attention_maps`  whether few weights are large and the rest has a low rank
- `flatness`        whether the features are flat
- `block_choice`    whether the classification chooses well
"""

from . import attention_maps, block_choice, comparisons, curves, flatness
from .setting import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "motivation": attention_maps.EXPERIMENT,
    "choice": block_choice.EXPERIMENT,
    **comparisons.EXPERIMENTS,
    "recipes": curves.EXPERIMENT,
    "features": flatness.EXPERIMENT,
}
