"""Fine-tunes of equal length, compared: SLA beside its halves, one part varied at a time, and when the order holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from .fine_tuning import of_recipes
from .recipe import Proj, Recipe
from .setting import Setting

Recipes = dict[str, Recipe]

# --- the paper's Tables 1 and 2 --------------------------------------------------------------------------------------


def _main(setting: Setting) -> Recipes:
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


# --- one part varied at a time; the paper does so with the critical share and the feature map alone ------------------


def _critical(setting: Setting) -> Recipes:
    return {f"{ratio:.1%} critical": Recipe(critical_ratio=ratio) for ratio in (0.025, 0.05, 0.10, 0.20)}


def _negligible(setting: Setting) -> Recipes:
    return {f"{ratio:.0%} negligible": Recipe(negligible_ratio=ratio) for ratio in (0.0, 0.10, 0.30, 0.50)}


def _feature_map(setting: Setting) -> Recipes:
    return {name: Recipe(feature_map=name) for name in ("softmax", "elu", "relu", "hedgehog")}


def _block(setting: Setting) -> Recipes:
    # From the setting's size upwards: the smallest one has blocks of 16, and the Triton kernels take none smaller.
    return {f"blocks of {factor * setting.block}": Recipe(block_factor=factor) for factor in (1, 2, 4)}


def _proj(setting: Setting) -> Recipes:
    starts = {f"Proj: {proj}": Recipe(proj=proj) for proj in get_args(Proj)}
    long = {name: replace(recipe, length=4) for name, recipe in starts.items()}
    return starts | {f"{name}, {recipe.steps(setting)} steps": recipe for name, recipe in long.items()}


def _steps(setting: Setting) -> Recipes:
    made = (Recipe(length=length) for length in (0, 1 / 8, 1 / 4, 1 / 2, 1))
    return {f"{recipe.steps(setting)} steps": recipe for recipe in made}


# --- when does the paper's order hold, SLA at 5 % before sparse-only attention at 15 %? ------------------------------

SLA = "SLA, 5 %"
ARMS = {SLA: Recipe(), "sparse only, 5 %": Recipe("sparse"), "sparse only, 15 %": Recipe("sparse", critical_ratio=0.15)}
TEACHER = {"teacher": Recipe("full", length=0)}
CHANGED = {
    "Proj from the identity": {SLA: Recipe(proj="identity")},
    "Proj from the identity, temperature 4": {SLA: Recipe(proj="identity", temperature=4.0)},
    "Proj at ten times the rate": {SLA: Recipe(proj_rate=10.0)},
    "temperature 4": {SLA: Recipe(temperature=4.0)},
    "temperature 16": {SLA: Recipe(temperature=16.0)},
}
IMPROVED = "Proj from the identity, temperature 4"


def when(setting: Setting) -> Recipes:
    """Each condition changes one thing about the comparison, or a few that go together; N and the model, the setting.

    The large settings are a condition themselves: fewer there. Where the change is one of SLA, SLA alone is measured.
    """
    recipes: Recipes = {}

    def add(condition: str, arms: Recipes = ARMS, **changes: Any) -> None:
        recipes.update({f"{condition}: {arm}": replace(recipe, **changes) for arm, recipe in arms.items()})

    def add_length(length: float, besides: str = "", arms: Recipes = ARMS, **changes: Any) -> None:
        add(f"{round(length * setting.steps)} steps{besides}", arms, length=length, **changes)

    add("as in main", ARMS | TEACHER)
    if setting.name != "wide":
        for condition, arms in CHANGED.items():
            add(condition, arms)
    add_length(1 / 4)
    if setting.name == "wide":
        return recipes
    add("tokens in tiles", tiles=True)
    if setting.name == "n4096":
        return recipes
    # The last one asks whether the order of the longest runs is one of the shared learning rate.
    for length, besides, rate in ((4, "", 1.0), (8, "", 1.0), (8, ", a third of the rate", 1 / 3)):
        add_length(length, besides, rate=rate)
        add_length(length, f"{besides}, {IMPROVED}", CHANGED[IMPROVED], rate=rate)
    for factor in (2, 4):
        add(f"blocks of {factor * setting.block}", block_factor=factor)
    add("a third of the rate", rate=1 / 3)
    add("three times the rate", rate=3.0)
    add("a backdrop", ARMS | TEACHER, backdrop=0.5)
    return recipes


EXPERIMENTS = (
    of_recipes("main", "Is SLA better than its halves and than their sum?", _main, generate=True),
    of_recipes("ablation-critical", "How many critical blocks does SLA need?", _critical),
    of_recipes("ablation-negligible", "How many blocks may be left out?", _negligible),
    of_recipes("ablation-feature-map", "Which feature map is best?", _feature_map),
    of_recipes("ablation-block", "How large may a block be?", _block),
    of_recipes("ablation-proj", "How should Proj start, and is it needed?", _proj),
    of_recipes("ablation-steps", "How long must SLA be fine-tuned?", _steps),
    of_recipes("when", "When is SLA at 5 % better than sparse-only attention at 15 %?", when, paired=True),
)
