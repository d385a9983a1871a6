"""The feature map phi of the linear branch: phi(Q), phi(K) take the place of exp(Q K^T).

Positive maps keep weights positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_block_size, check_dense, check_scale, shown

FeatureMap = Callable[[Tensor], Tensor]


def softmax(tokens: Tensor) -> Tensor:
    """Softmax over the head dimension, the paper's default; (..., D) -> (..., D)."""
    return torch.softmax(tokens, dim=-1)


def elu(tokens: Tensor) -> Tensor:
    """elu(x) + 1; (..., D) -> (..., D)."""
    return F.elu(tokens) + 1


def relu(tokens: Tensor) -> Tensor:
    """max(x, 0); (..., D) -> (..., D). A token whose features are all zero gets a zero denominator, so linear = 0."""
    return F.relu(tokens)


@dataclass(frozen=True)
class Softmax:
    """softmax(temperature * x) over the head dimension: `feature_map=Softmax(4.0)`; (..., D) -> (..., D).

    A temperature above 1 makes the features sharper, one below 1 makes them flatter.

    It runs outside the fused kernels, which know only the plain softmax. phi(Q) and phi(K) are therefore written to
    memory, in the dtype of query, and kept for the backward: two more tensors of the size of query and key. The softmax
    and its gradient are operations of their own, which `torch.compile` can fuse with what is around the layer.

    Args:
        temperature: factor on x, a finite number > 0.

    Raises:
        TypeError, ValueError: temperature has the wrong type or value.
    """

    temperature: float

    def __post_init__(self) -> None:
        check_scale(self.temperature, "temperature")

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.softmax(float(self.temperature) * tokens, dim=-1)


class Hedgehog(nn.Module):
    """The learnable map concat(softmax(W x), softmax(-W x)) with W of shape (D / 2, D); (..., D) -> (..., D).

    Zhang et al., "The Hedgehog & the Porcupine", arXiv 2402.04347, in the form that keeps D features.

    Args:
        head_dim: D, even.

    Raises:
        TypeError, ValueError: head_dim is not an even int of at least 2.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        if isinstance(head_dim, bool) or not isinstance(head_dim, int):
            raise TypeError(f"head_dim must be an even int >= 2, got {shown(head_dim)}")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be an even int >= 2 for the hedgehog feature map, got {shown(head_dim)}")
        check_block_size("head_dim", head_dim)
        self.weight = nn.Parameter(torch.empty(head_dim // 2, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal rows: the projections start out distinct and keep the scale of x."""
        nn.init.orthogonal_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        check_dense("tokens", tokens)
        if tokens.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"tokens must have head_dim {self.weight.shape[1]}, got shape {tuple(tokens.shape)}")
        projected = F.linear(tokens.to(self.weight.dtype), self.weight)
        return torch.cat([torch.softmax(projected, dim=-1), torch.softmax(-projected, dim=-1)], dim=-1)


FEATURE_MAPS: dict[str, FeatureMap] = {"softmax": softmax, "elu": elu, "relu": relu}


def resolve_feature_map(feature_map: str | FeatureMap) -> FeatureMap:
    """The callable behind a name; a callable is returned as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            names = ", ".join(repr(name) for name in FEATURE_MAPS)
            hint = "; 'hedgehog' has weights, so SparseLinearAttention owns it" if feature_map == "hedgehog" else ""
            raise ValueError(f"feature_map must be one of {names} or a callable, got {shown(feature_map)}{hint}")
        return FEATURE_MAPS[feature_map]
    if not callable(feature_map):
        raise TypeError(f"feature_map must be a name or a callable, got {type(feature_map).__name__}")
    return feature_map
