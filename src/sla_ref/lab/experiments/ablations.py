"""One part of SLA varied at a time. The paper ablates the critical share and the feature map alone."""

from __future__ import annotations

from dataclasses import replace

from . import Setting
from .students import PROJ, Recipe, of_recipes


def _critical(setting: Setting) -> dict[str, Recipe]:
    return {f"{ratio:.1%} critical": Recipe(critical_ratio=ratio) for ratio in (0.025, 0.05, 0.10, 0.20)}


def _negligible(setting: Setting) -> dict[str, Recipe]:
    return {f"{ratio:.0%} negligible": Recipe(negligible_ratio=ratio) for ratio in (0.0, 0.10, 0.30, 0.50)}


def _feature_map(setting: Setting) -> dict[str, Recipe]:
    return {name: Recipe(feature_map=name) for name in ("softmax", "elu", "relu", "hedgehog")}


def _block(setting: Setting) -> dict[str, Recipe]:
    # From the setting's size upwards: the smallest one has blocks of 16, and the Triton kernels take none smaller.
    return {f"blocks of {factor * setting.block}": Recipe(block_factor=factor) for factor in (1, 2, 4)}


def _proj(setting: Setting) -> dict[str, Recipe]:
    long = Recipe(length=4)
    return {f"Proj: {proj}": Recipe(proj=proj) for proj in PROJ} | {
        f"Proj: {proj}, {long.steps(setting)} steps": replace(long, proj=proj) for proj in PROJ
    }


def _steps(setting: Setting) -> dict[str, Recipe]:
    made = (Recipe(length=length) for length in (0, 1 / 8, 1 / 4, 1 / 2, 1))
    return {f"{recipe.steps(setting)} steps": recipe for recipe in made}


CRITICAL = of_recipes("ablation-critical", "How many critical blocks does SLA need?", _critical)
NEGLIGIBLE = of_recipes("ablation-negligible", "How many blocks may be left out?", _negligible)
FEATURE_MAP = of_recipes("ablation-feature-map", "Which feature map is best?", _feature_map)
BLOCK = of_recipes("ablation-block", "How large may a block be?", _block)
PROJ_START = of_recipes("ablation-proj", "How should Proj start, and is it needed?", _proj)
STEPS = of_recipes("ablation-steps", "How long must SLA be fine-tuned?", _steps)
