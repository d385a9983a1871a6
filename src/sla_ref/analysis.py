"""What the paper measures on attention maps, and what attention costs.

Dense and for small sizes: an N x N map is what is being looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASS_NAMES = {1: "critical", 0: "marginal", -1: "negligible"}
CLASS_COLOURS = {1: "#D55E00", 0: "#56B4E9", -1: "#8A8F98"}  # told apart by colour-blind readers, too


def attention_weights(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """The map P = softmax(scale Q K^T), (..., Nq, Nk), for query (..., Nq, D) and key (..., Nk, D).

    `scale` is 1 / sqrt(D) by default. At least float32, whatever the input has.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax(scale * query.to(dtype) @ key.to(dtype).mT, dim=-1)


def weight_bands(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of a map's weights (..., Nq, Nk) that are above 1/Nk, the mean, and below 1/(100 Nk)."""
    keys = weights.shape[-1]
    above = (weights > 1 / keys).double().mean(dim=(-2, -1))
    below = (weights < 1 / (100 * keys)).double().mean(dim=(-2, -1))
    return above, below


def split_top(weights: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A map (..., Nq, Nk) as a sum of two: its largest `share` of weights, and the rest."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    flat = weights.flatten(-2)
    largest = flat.topk(round(share * flat.shape[-1]), dim=-1).indices
    top = torch.zeros_like(flat).scatter(-1, largest, flat.gather(-1, largest)).view_as(weights)
    return top, weights - top


def stable_rank(matrix: Tensor) -> Tensor:
    """||A||_F^2 / ||A||_2^2 of each matrix (..., M, N): how many directions carry its weight.

    Between 1 and the rank; 0 for a matrix of zeros.
    """
    squares = torch.linalg.svdvals(matrix).square()
    largest = squares[..., 0]
    return torch.where(largest > 0, squares.sum(dim=-1) / largest.where(largest > 0, 1.0), 0.0)


def attention_flops(
    query_length: int,
    key_length: int,
    head_dim: int,
    *,
    critical_share: float = 1.0,
    linear: bool = False,
) -> float:
    """Floating-point operations of one head's forward; a multiplication and an addition are two.

    Counted as in the paper: the critical share of full attention, plus linear attention over all
    tokens if there is such a branch. Full attention is Q K^T and P V, 4 Nq Nk D; linear attention is
    phi(K)^T V and phi(Q) H, 2 (Nq + Nk) D^2. Softmax, feature map, classification, the sums of the
    block states and Proj are not counted. (1.0, False) is full attention, (0.0, True) linear only.
    """
    if not 0 <= critical_share <= 1:
        raise ValueError(f"critical_share must be between 0 and 1, got {critical_share}")
    full = 4 * query_length * key_length * head_dim
    return critical_share * full + (2 * (query_length + key_length) * head_dim**2 if linear else 0)
