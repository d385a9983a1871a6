"""When does the paper's order hold, SLA at 5 % before sparse-only attention at 15 %?

Each condition changes one thing about the comparison, or a few that go together. Where another arm does not know
what is changed, its figures are those of the nearest condition above that has it, and it is not measured again. N and
the size of the model are varied by the setting.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import Setting
from .students import Recipe, of_recipes

SLA = "SLA, 5 %"
ARMS = {
    SLA: Recipe(),
    "sparse only, 5 %": Recipe("sparse"),
    "sparse only, 15 %": Recipe("sparse", critical_ratio=0.15),
}
TEACHER = {"teacher": Recipe("full", length=0)}
BASE = "as in main"
IMPROVED = "Proj from the identity, temperature 4"
BACKDROP = 0.5


def recipes(setting: Setting) -> dict[str, Recipe]:
    """The large settings are a condition themselves, more tokens or a larger model: fewer there."""
    made = _arms(BASE, ARMS | TEACHER)
    if setting.name != "wide":
        made |= {f"{name}: {SLA}": recipe for name, recipe in _only_sla().items()}
    made |= _of_length(setting, 1 / 4)
    if setting.name == "wide":
        return made
    made |= _arms("tokens in tiles", order="tiles")
    if setting.name == "n4096":
        return made
    # The last one asks whether the order of the longest runs is one of the shared learning rate.
    for length, besides, rate in ((4, "", 1.0), (8, "", 1.0), (8, ", a third of the rate", 1 / 3)):
        made |= _of_length(setting, length, besides, rate=rate)
        made |= _of_length(setting, length, f"{besides}, {IMPROVED}", {SLA: _only_sla()[IMPROVED]}, rate=rate)
    for factor in (2, 4):
        made |= _arms(f"blocks of {factor * setting.block}", block_factor=factor)
    made |= _arms("a third of the rate", rate=1 / 3)
    made |= _arms("three times the rate", rate=3.0)
    return made | _arms("a backdrop", ARMS | TEACHER, backdrop=BACKDROP)


def _arms(condition: str, arms: dict[str, Recipe] = ARMS, **changes: Any) -> dict[str, Recipe]:
    return {f"{condition}: {arm}": replace(recipe, **changes) for arm, recipe in arms.items()}


def _of_length(
    setting: Setting, length: float, besides: str = "", arms: dict[str, Recipe] = ARMS, **changes: Any
) -> dict[str, Recipe]:
    return _arms(f"{round(length * setting.steps)} steps{besides}", arms, length=length, **changes)


def _only_sla() -> dict[str, Recipe]:
    return {
        "Proj from the identity": Recipe(proj="identity"),
        IMPROVED: Recipe(proj="identity", temperature=4.0),
        "Proj at ten times the rate": Recipe(proj_rate=10.0),
        "temperature 4": Recipe(temperature=4.0),
        "temperature 16": Recipe(temperature=16.0),
    }


EXPERIMENT = of_recipes("when", "When is SLA at 5 % better than sparse-only attention at 15 %?", recipes, paired=True)
