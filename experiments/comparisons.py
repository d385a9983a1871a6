"""Comparisons of fine-tunes: SLA against its halves, one part varied at a time, and when the paper's order holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from .fine_tuning import of_recipes
from .recipe import Proj, Recipe
from .setting import Setting

Recipes = dict[str, Recipe]

# The paper's Tables 1 and 2. All arms are fine-tuned equally long; the first two rows are not trained at all.
MAIN = {
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

# One part varied at a time. The paper varies only the critical share and the feature map.
CRITICAL = {f"{ratio:.1%} critical": Recipe(critical_ratio=ratio) for ratio in (0.025, 0.05, 0.10, 0.20)}
NEGLIGIBLE = {f"{ratio:.0%} negligible": Recipe(negligible_ratio=ratio) for ratio in (0.0, 0.10, 0.30, 0.50)}
FEATURE_MAP = {name: Recipe(feature_map=name) for name in ("softmax", "elu", "relu", "hedgehog")}


def _block(setting: Setting) -> Recipes:
    # From the setting's size upwards: the smallest setting has blocks of 16, the smallest that Triton supports.
    return {f"blocks of {factor * setting.block}": Recipe(block_factor=factor) for factor in (1, 2, 4)}


def _proj(setting: Setting) -> Recipes:
    starts = {f"Proj: {proj}": Recipe(proj=proj) for proj in get_args(Proj)}
    return starts | {f"{name}, {4 * setting.steps} steps": replace(each, length=4) for name, each in starts.items()}


def _steps(setting: Setting) -> Recipes:
    made = (Recipe(length=length) for length in (0, 1 / 8, 1 / 4, 1 / 2, 1))
    return {f"{recipe.steps(setting)} steps": recipe for recipe in made}


# When does the paper's order hold, with SLA at 5 % better than sparse-only attention at 15 %?
SLA = "SLA, 5 %"
ARMS = {SLA: Recipe(), "sparse only, 5 %": Recipe("sparse"), "sparse only, 15 %": Recipe("sparse", critical_ratio=0.15)}
TEACHER = {"teacher": Recipe("full", length=0)}
CHANGES_OF_SLA: dict[str, dict[str, Any]] = {
    "Proj from the identity": {"proj": "identity"},
    "Proj from the identity, temperature 4": {"proj": "identity", "temperature": 4.0},
    "Proj at ten times the rate": {"proj_rate": 10.0},
    "temperature 4": {"temperature": 4.0},
    "temperature 16": {"temperature": 16.0},
}
IMPROVED = "Proj from the identity, temperature 4"
AS_IN_MAIN = "as in main"


def when(setting: Setting) -> Recipes:
    """All arms in each condition. A condition changes one thing about the comparison, or a few that belong together.

    The large settings have fewer conditions. A condition that changes only SLA is measured only for SLA.
    """
    recipes: Recipes = {}

    def add(condition: str, arms: Recipes = ARMS, **changes: Any) -> None:
        recipes.update({f"{condition}: {arm}": replace(recipe, **changes) for arm, recipe in arms.items()})

    add(AS_IN_MAIN, ARMS | TEACHER)
    if setting.name != "wide":
        for condition, changes in CHANGES_OF_SLA.items():
            add(condition, {SLA: Recipe()}, **changes)
    add(f"{setting.steps // 4} steps", length=1 / 4)
    if setting.name == "wide":
        return recipes
    add("tokens in tiles", tiles=True)
    if setting.name == "n4096":
        return recipes
    # The last one tests whether the shared learning rate decides the order of the longest runs.
    for length, suffix, rate in ((4, "", 1.0), (8, "", 1.0), (8, ", a third of the rate", 1 / 3)):
        condition = f"{length * setting.steps} steps{suffix}"
        add(condition, length=length, rate=rate)
        improved = {SLA: Recipe(**CHANGES_OF_SLA[IMPROVED])}
        add(f"{condition}, {IMPROVED}", improved, length=length, rate=rate)
    for factor in (2, 4):
        add(f"blocks of {factor * setting.block}", block_factor=factor)
    add("a third of the rate", rate=1 / 3)
    add("three times the rate", rate=3.0)
    add("a backdrop", ARMS | TEACHER, backdrop=0.5)
    return recipes


def same_sparse_arms(condition: str) -> str:
    """The condition with the same sparse-only arms: changes of SLA do not affect these and are left out."""
    for change in sorted(CHANGES_OF_SLA, key=len, reverse=True):
        condition = condition.removesuffix(change).removesuffix(", ")
    return condition or AS_IN_MAIN


EXPERIMENTS = {
    "main": of_recipes(lambda setting: MAIN, generate=True),
    "ablation-critical": of_recipes(lambda setting: CRITICAL),
    "ablation-negligible": of_recipes(lambda setting: NEGLIGIBLE),
    "ablation-feature-map": of_recipes(lambda setting: FEATURE_MAP),
    "ablation-block": of_recipes(_block),
    "ablation-proj": of_recipes(_proj),
    "ablation-steps": of_recipes(_steps),
    "when": of_recipes(when),
}
