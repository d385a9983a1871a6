"""A student: the teacher's weights with another attention, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import sla_ref
from sla_ref.analysis import attention_flops
from sla_ref.feature_maps import Softmax
from sla_ref.lab.arms import LinearOnly, SparseOnly, sla, sla2
from sla_ref.lab.evaluate import attention_cost
from sla_ref.lab.model import PATCH, ModelConfig, VideoTransformer, with_attention

from .centroids import Centroids
from .setting import Setting

Proj = Literal["zero", "identity", "absent"]
Objective = Literal["flow", "teacher", "layers"]


@dataclass(frozen=True)
class Recipe:
    """A student and its training. The defaults are SLA as in the paper."""

    # An arm of `lab.arms`, "centroids", or "released": linear over all keys, as in the authors' branch main.
    attention: str = "sla"
    critical_ratio: float = 0.05
    negligible_ratio: float = 0.10
    block_factor: int = 1  # tokens per block, in units of the setting's
    feature_map: str = "softmax"
    temperature: float = 1.0  # t in softmax(t x), for the feature map softmax
    # How Proj starts; "absent" is an identity that is not trained. SLA2 has a Proj only with "identity".
    proj: Proj = "zero"
    alpha: str | None = None  # SLA2's, and its router
    router: str | None = None
    tiles: bool = False  # whether blocks are the setting's tiles, instead of tokens in raster order
    backdrop: float = 0.0  # of the clips (`lab.data`); the teacher is trained on such clips too
    length: float = 1.0  # fine-tuning steps, in units of the setting's; 0 means swapped in, not trained
    trained: str = ""  # trains the parameters whose names contain it; "" trains all
    objective: Objective = "flow"
    rate: float = 1.0  # learning rate, in units of the setting's
    proj_rate: float = 1.0  # learning rate of Proj, in units of the others'

    def steps(self, setting: Setting) -> int:
        """Number of fine-tuning steps."""
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
    """Attention over tokens in another order, with its output in the old order.

    Full attention does not depend on the order of the tokens, but the order decides which tokens form a block.
    """

    order: Tensor

    def __init__(self, core: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("order", order, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.core(*(each.index_select(2, self.order) for each in (query, key, value)))
        return torch.empty_like(out).index_copy(2, self.order, out)


def _sla(recipe: Recipe, config: ModelConfig) -> nn.Module:
    start = "zero" if recipe.proj == "zero" else "identity"
    layer = sla(config, feature_map=_feature_map(recipe), proj_init=start)
    layer.get_submodule("proj_l").requires_grad_(recipe.proj != "absent")
    return layer


def _sla2(recipe: Recipe, config: ModelConfig) -> nn.Module:
    return sla2(config, feature_map=_feature_map(recipe), proj=recipe.proj == "identity")


def _feature_map(recipe: Recipe) -> str | Softmax:
    return recipe.feature_map if recipe.temperature == 1 else Softmax(recipe.temperature)


# What is built here, because it has options that the lab's arms lack; and the lab's arm that it takes the place of.
CORES: dict[str, Callable[[Recipe, ModelConfig], nn.Module]] = {
    "sla": _sla,
    "sla2": _sla2,
    "released": lambda recipe, config: ReleasedSLA(config),
    "centroids": lambda recipe, config: Centroids(config),
}
IN_PLACE_OF = {"released": "sla", "centroids": "sparse"}


def build(recipe: Recipe, teacher: VideoTransformer, setting: Setting, seed: int) -> VideoTransformer:
    """A student with the teacher's weights and the recipe's attention. Only what the recipe trains requires a gradient.

    The seed sets the weights of a learnable feature map.
    """
    torch.manual_seed(seed)
    student = with_attention(
        teacher,
        IN_PLACE_OF.get(recipe.attention, recipe.attention),
        critical_ratio=recipe.critical_ratio,
        negligible_ratio=recipe.negligible_ratio,
        block=recipe.block_factor * setting.block,
        alpha=recipe.alpha,
        router=recipe.router,
    ).requires_grad_(True)
    for block in student.blocks:
        attention = block.get_submodule("attention")
        if recipe.attention in CORES:
            attention.core = CORES[recipe.attention](recipe, student.config)
        if recipe.tiles:
            side = setting.size // PATCH
            order = sla_ref.cube_order(setting.frames, side, side, setting.tile)
            attention.core = Reordered(attention.get_submodule("core"), order)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and recipe.trained in name)
    return student.to(next(teacher.parameters()).device)


def cost(recipe: Recipe, config: ModelConfig) -> tuple[float, float]:
    """FLOPs and sparsity of the student's attention, as `lab.evaluate.attention_cost` counts them."""
    flops, sparsity = attention_cost(config)
    if recipe.attention == "centroids":  # one more key for each block
        flops += (
            config.depth * config.heads * attention_flops(config.tokens, config.tokens // config.block, config.head_dim)
        )
    return flops, sparsity
