"""The arms of the lab's comparisons: what a model's attention can be.

Each arm is a module that takes query, key, value (B, H, N, D) and returns (B, H, N, D). `full` and
`sla` are what the project is about; the others are the paper's baselines and live only here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import sla_ref


@dataclass(frozen=True)
class ArmOptions:
    """What the arms may need to know; `full` and `linear` need none of it."""

    head_dim: int
    critical_ratio: float
    negligible_ratio: float
    block: int


class FullAttention(nn.Module):
    """Softmax attention over all keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class SparseOnly(nn.Module):
    """The critical blocks alone: SLA with everything else negligible, and no Proj."""

    def __init__(self, options: ArmOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sla_ref.sparse_linear_attention(
            query,
            key,
            value,
            critical_ratio=self.options.critical_ratio,
            negligible_ratio=1.0,
            block_q=self.options.block,
            block_k=self.options.block,
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

    def __init__(self, options: ArmOptions) -> None:
        super().__init__()
        self.sparse, self.linear = SparseOnly(options), LinearOnly()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.sparse(query, key, value) + self.linear(query, key, value)


def _sla(options: ArmOptions) -> nn.Module:
    return sla_ref.SparseLinearAttention(
        options.head_dim,
        options.critical_ratio,
        options.negligible_ratio,
        block_q=options.block,
        block_k=options.block,
    )


ARMS: dict[str, Callable[[ArmOptions], nn.Module]] = {
    "full": lambda options: FullAttention(),
    "sla": _sla,
    "sparse": SparseOnly,
    "linear": lambda options: LinearOnly(),
    "l+s": LinearPlusSparse,
}


def make_arm(name: str, options: ArmOptions) -> nn.Module:
    """The arm of that name; ValueError if there is none."""
    if name not in ARMS:
        raise ValueError(f"attention must be one of {', '.join(ARMS)}, got {name!r}")
    return ARMS[name](options)
