"""The paper's Tables 1 and 2: SLA beside its two halves, their plain sum, and full attention."""

from __future__ import annotations

from . import Setting
from .students import Recipe, of_recipes


def recipes(setting: Setting) -> dict[str, Recipe]:
    """All arms are fine-tuned equally long; the two first rows are not trained at all."""
    return {
        "teacher": Recipe("full", length=0),
        "SLA, swapped in, not trained": Recipe(length=0),
        "full attention": Recipe("full"),
        "linear only": Recipe("linear"),
        "sparse only, 5 %": Recipe("sparse"),
        "sparse only, 15 %": Recipe("sparse", critical_ratio=0.15),
        "L+S": Recipe("l+s"),
        "SLA (paper)": Recipe(),
        "SLA-1": Recipe(negligible_ratio=0.0),
        "SLA, released code": Recipe("released"),
    }


EXPERIMENT = of_recipes("main", "Is SLA better than its halves and than their sum?", recipes, generate=True)
