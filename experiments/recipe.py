"""A student: the teacher's weights with another attention, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import sla_ref
from sla_ref.feature_maps import Softmax
from sla_ref.lab.arms import LinearOnly, SparseOnly
from sla_ref.lab.model import PATCH, ModelConfig, VideoTransformer, with_attention

from .setting import Setting

Proj = Literal["zero", "identity", "absent"]
Objective = Literal["flow", "teacher", "layers"]


@dataclass(frozen=True)
class Recipe:
    """A student and its training; the defaults are SLA as the paper has it."""

    attention: str = "sla"  # an arm of `lab.arms`, or "released": linear over all keys, as in the authors' branch main
    critical_ratio: float = 0.05
    negligible_ratio: float = 0.10
    block_factor: int = 1  # tokens of a block, in units of the setting's
    feature_map: str = "softmax"
    temperature: float = 1.0  # t in softmax(t x); other feature maps have none
    proj: Proj = "zero"  # how Proj starts; "absent" is an identity that stays one
    tiles: bool = False  # whether tokens are cut into blocks in the order of the setting's tiles; else in raster order
    backdrop: float = 0.0  # of the clips (`lab.data`); the teacher has learnt them too
    length: float = 1.0  # fine-tuning steps, in units of the setting's; 0: swapped in, not trained
    trained: str = ""  # part of the names of the parameters that are trained; "" is in all of them
    objective: Objective = "flow"
    rate: float = 1.0  # learning rate, in units of the setting's
    proj_rate: float = 1.0  # learning rate of Proj, in units of the others'

    def steps(self, setting: Setting) -> int:
        """Of the fine-tune."""
        return round(self.length * setting.steps)


class ReleasedSLA(nn.Module):
    """`integrations.thu_ml`'s variant "main" in the dtype of its input: O^s + Proj(linear attention over all keys)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sparse, self.linear = SparseOnly(config), LinearOnly()
        self.proj_l = nn.Linear(config.head_dim, config.head_dim)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sparse: Tensor = self.sparse(query, key, value)
        projected: Tensor = self.proj_l(self.linear(query, key, value))
        return sparse + projected.to(sparse.dtype)


class Reordered(nn.Module):
    """Attention over tokens in another order, and its output in the old one.

    Full attention does not depend on the order of tokens; which of them make a block does.
    """

    order: Tensor

    def __init__(self, core: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("order", order, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.core(*(each.index_select(2, self.order) for each in (query, key, value)))
        return torch.empty_like(out).index_copy(2, self.order, out)


def tile_order(frames: int, side: int, tile: tuple[int, int, int]) -> Tensor:
    """The tokens (frames * side^2) in raster order, sorted by tiles of so many frames, rows and columns."""
    time, rows, columns = tile
    grid = torch.arange(frames * side * side)
    grid = grid.view(frames // time, time, side // rows, rows, side // columns, columns)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten()


def _sla(recipe: Recipe, config: ModelConfig) -> nn.Module:
    if recipe.attention == "released":
        return ReleasedSLA(config)
    sla = sla_ref.SparseLinearAttention(
        config.head_dim,
        config.critical_ratio,
        config.negligible_ratio,
        block_q=config.block,
        block_k=config.block,
        feature_map=recipe.feature_map if recipe.temperature == 1 else Softmax(recipe.temperature),
        proj_init="zero" if recipe.proj == "zero" else "identity",
    )
    sla.proj_l.requires_grad_(recipe.proj != "absent")
    return sla


def build(recipe: Recipe, teacher: VideoTransformer, setting: Setting, seed: int) -> VideoTransformer:
    """The teacher's weights with the recipe's attention; only what the recipe trains wants a gradient.

    The seed decides the weights of a learnable feature map.
    """
    torch.manual_seed(seed)
    student = with_attention(
        teacher,
        "sla" if recipe.attention == "released" else recipe.attention,
        critical_ratio=recipe.critical_ratio,
        negligible_ratio=recipe.negligible_ratio,
        block=recipe.block_factor * setting.block,
    ).requires_grad_(True)
    for block in student.blocks:
        attention = block.get_submodule("attention")
        if student.config.attention == "sla":
            attention.core = _sla(recipe, student.config)
        if recipe.tiles:
            order = tile_order(setting.frames, setting.size // PATCH, setting.tile)
            attention.core = Reordered(attention.get_submodule("core"), order)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and recipe.trained in name)
    return student.to(next(teacher.parameters()).device)
