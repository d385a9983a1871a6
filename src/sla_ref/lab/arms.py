"""The arms of the lab's comparisons: what a model's attention can be.

Each arm is a module that takes query, key, value (B, H, N, D) and returns (B, H, N, D). `full`, `sla` and
`sla2` are what the project is about; the others are the paper's baselines and live only here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

import sla_ref

from ..checks import check_choice

if TYPE_CHECKING:
    from .model import ModelConfig


class FullAttention(nn.Module):
    """Softmax attention over all keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class SparseOnly(nn.Module):
    """Only the critical blocks: SLA with everything else negligible, and no Proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        share, block = self.config.critical_ratio, self.config.block
        return sla_ref.sparse_linear_attention(
            query, key, value, critical_ratio=share, negligible_ratio=1.0, block_q=block, block_k=block
        ).sparse


class LinearOnly(nn.Module):
    """Linear attention over all keys, with SLA's default feature map (softmax over D)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        phi_query, phi_key = query.softmax(dim=-1), key.softmax(dim=-1)
        state = phi_key.mT @ value  # (B, H, D, D)
        weight = phi_query @ phi_key.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
        return (phi_query @ state / weight).to(value.dtype)


class LinearPlusSparse(nn.Module):
    """The plain sum of `sparse` and `linear`, without Proj (the paper's L+S)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sparse, self.linear = SparseOnly(config), LinearOnly()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.sparse(query, key, value) + self.linear(query, key, value)


def sla(config: ModelConfig, **options: Any) -> nn.Module:
    """The layer; `options` are those of `sla_ref.SparseLinearAttention` that a configuration lacks."""
    ratios = config.critical_ratio, config.negligible_ratio
    return sla_ref.SparseLinearAttention(
        config.head_dim, *ratios, block_q=config.block, block_k=config.block, **options
    )


def sla2(config: ModelConfig, **options: Any) -> nn.Module:
    """SLA2's layer. Its router is frozen, as all but stage 1 of its training wants it (`layers.for_stage_1`)."""
    assert config.alpha is not None and config.router is not None
    layer = sla_ref.SLA2Attention(
        config.head_dim,
        config.heads,
        config.critical_ratio,
        alpha=config.alpha,
        router=config.router,
        query_length=config.tokens if config.alpha == "block" else None,
        block_q=config.block,
        block_k=config.block,
        **options,
    )
    layer.get_submodule("router").requires_grad_(False)
    return layer


ARMS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "full": lambda config: FullAttention(),
    "sla": sla,
    "sla2": sla2,
    "sparse": SparseOnly,
    "linear": lambda config: LinearOnly(),
    "l+s": LinearPlusSparse,
}


def make_arm(config: ModelConfig) -> nn.Module:
    """The arm that a configuration names; ValueError if there is none."""
    check_choice("attention", config.attention, ARMS)
    return ARMS[config.attention](config)
