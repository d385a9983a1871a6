"""The paper's questions, asked of the lab's small video transformer. Run them in the root folder of the repository:

    python -m experiments run       # measures what is not measured yet: a line of JSON for each case and seed
    python -m experiments report    # makes the tables and pictures of docs/experiments.md from these lines

Each file has one job:

- `setting`         what an experiment is, and the sizes at which it is measured
- `run`             measures the cases and writes the lines
- `values`          reads the lines: means and ranges
- `report`          puts tables of the lines into the page
- `figures`         draws the page's pictures
- `recipe`          what a student's attention is and how it is trained
- `fine_tuning`     trains and evaluates teachers and students
- `classifier`      recognises digits, to judge generated clips
- `comparisons`     SLA against its halves, one part varied at a time, and when the paper's order holds
- `curves`          what to fine-tune, and towards what
- `attention_maps`  whether few weights are large and the others have a low rank
- `flatness`        whether the features are nearly flat
- `block_choice`    whether the classification chooses well
- `mixing`          how much each branch weighs
- `centroids`       the layer without a linear branch that it compares
"""

from . import attention_maps, block_choice, comparisons, curves, flatness, mixing
from .setting import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "motivation": attention_maps.EXPERIMENT,
    "choice": block_choice.EXPERIMENT,
    **comparisons.EXPERIMENTS,
    "recipes": curves.EXPERIMENT,
    "features": flatness.EXPERIMENT,
    "mixing": mixing.EXPERIMENT,
}
