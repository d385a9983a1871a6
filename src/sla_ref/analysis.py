"""What the paper measures on attention maps, and what attention costs.

All of it is dense and for small sizes, since it looks at whole N x N maps. Maps are floats, labels are
integers. An argument of another type, shape or device raises a TypeError or ValueError that names it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_block_size, check_bool, check_dense, check_layout, check_ratio, check_scale

CLASS_NAMES = {1: "critical", 0: "marginal", -1: "negligible"}
CLASS_COLOURS = {1: "#D55E00", 0: "#56B4E9", -1: "#8A8F98"}  # told apart by colour-blind readers, too


# --- what arguments must be ------------------------------------------------------------------------------------------


def _check_matrices(**matrices: Tensor) -> None:
    """TypeError or ValueError unless all are dense float tensors (..., M, N) on one device."""
    for name, matrix in matrices.items():
        check_dense(name, matrix, dims=2)
    _check_device(**matrices)


def _check_device(**tensors: Tensor) -> None:
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first_name}'s device {first.device}, got {tensor.device}")


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)  # of labels; those of a `BlockMap` are int8


def _check_shape(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], of: str, like: Tensor) -> None:
    """TypeError or ValueError unless it has one of the dtypes, and the shape and device of another one."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, dtypes))}, got {got}")
    check_layout(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {of} {tuple(like.shape)}, got {tuple(tensor.shape)}")
    _check_device(**{of: like, name: tensor})


# --- attention maps --------------------------------------------------------------------------------------------------


def attention_weights(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """The map P = softmax(scale Q K^T), (..., Nq, Nk), for query (..., Nq, D) and key (..., Nk, D).

    `scale` is 1 / sqrt(D) by default. The map is at least float32, whatever the input is.
    """
    _check_matrices(query=query, key=key)
    if key.shape[-1] != query.shape[-1] or key.shape[:-2] != query.shape[:-2]:
        raise ValueError(f"key must be as query {tuple(query.shape)} but for its tokens, got {tuple(key.shape)}")
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    check_scale(scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax(float(scale) * query.to(dtype) @ key.to(dtype).mT, dim=-1)


def weight_bands(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of a map's weights (..., Nq, Nk) that are above 1/Nk, the mean, and below 1/(100 Nk)."""
    _check_matrices(weights=weights)
    keys = weights.shape[-1]
    above = (weights > 1 / keys).double().mean(dim=(-2, -1))
    below = (weights < 1 / (100 * keys)).double().mean(dim=(-2, -1))
    return above, below


def split_top(weights: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A map (..., Nq, Nk) as a sum of two: its largest `share` of weights, and the rest."""
    _check_matrices(weights=weights)
    check_ratio("share", share, zero_allowed=True)
    flat = weights.flatten(-2)
    largest = flat.topk(round(share * flat.shape[-1]), dim=-1).indices
    top = torch.zeros_like(flat).scatter(-1, largest, flat.gather(-1, largest)).view_as(weights)
    return top, weights - top


_MOST_ITERATIONS = 100_000  # far more than it needs, for a number that is another one's by mistake


def stable_rank(matrix: Tensor, iterations: int | None = None) -> Tensor:
    """||A||_F^2 / ||A||_2^2 of each matrix (..., M, N): how many directions carry its weight.

    Between 1 and the rank; 0 for a matrix of zeros. With `iterations`, for large matrices, ||A||_2 comes from so many
    steps of subspace iteration instead of all eigenvalues. It is never too large, so the result is never too small.
    """
    _check_matrices(matrix=matrix)
    if iterations is not None:
        check_block_size("iterations", iterations)
        if iterations > _MOST_ITERATIONS:
            raise ValueError(f"iterations must be at most {_MOST_ITERATIONS:,}, got {iterations}")
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # eigenvalues are not made of less
    if not matrix.is_meta and not matrix.isfinite().all():
        raise ValueError("matrix must be finite, got an infinity or a NaN")
    if iterations is None:
        # The largest eigenvalue of A A^T is ||A||_2^2, in half the time that the singular values of A take.
        largest = torch.linalg.eigvalsh(matrix @ matrix.mT)[..., -1]
    else:
        largest = _largest_singular_value(matrix, iterations).square()
    squares = matrix.square().sum(dim=(-2, -1))
    return torch.where(largest > 0, squares / largest.where(largest > 0, 1.0), 0.0)


def _largest_singular_value(matrix: Tensor, iterations: int, width: int = 16) -> Tensor:
    """||A||_2 of each matrix (..., M, N), found in a subspace of `width` directions that A A^T is applied to."""
    start = torch.randn(matrix.shape[-2], min(width, *matrix.shape[-2:]), generator=torch.Generator().manual_seed(0))
    basis = start.to(matrix).expand(*matrix.shape[:-2], *start.shape)
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
    return torch.linalg.svdvals(matrix.mT @ basis)[..., 0]


def relative_l1(approximation: Tensor, exact: Tensor) -> Tensor:
    """||A - B||_1 / ||B||_1 of each pair of matrices (..., M, N): the error relative to the size of the exact one."""
    _check_matrices(exact=exact)
    check_dense("approximation", approximation)
    _check_shape("approximation", approximation, (exact.dtype,), "exact", exact)
    return (approximation - exact).abs().sum(dim=(-2, -1)) / exact.abs().sum(dim=(-2, -1))


def error_of_keeping(kept: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """Relative L1 error of the output P V if P keeps the weights where `kept` is True, each row normalised again.

    `kept` and `weights` (..., Nq, Nk), `value` (..., Nk, D) -> (...). A row that keeps nothing gives zeros.
    """
    _check_matrices(weights=weights, value=value)
    _check_shape("kept", kept, (torch.bool,), "weights", weights)
    if value.shape[:-1] != (*weights.shape[:-2], weights.shape[-1]) or value.dtype != weights.dtype:
        expected = f"{weights.dtype} {(*weights.shape[:-2], weights.shape[-1], 'D')}"
        raise ValueError(f"value must be {expected}, one row for each key, got {value.dtype} {tuple(value.shape)}")
    sparse = weights.where(kept, 0.0)
    total = sparse.sum(dim=-1, keepdim=True)
    sparse = sparse / total.where(total > 0, 1.0)
    return relative_l1(sparse @ value, weights @ value)


def block_mass(weights: Tensor, block_q: int, block_k: int) -> Tensor:
    """What part of its attention a query block spends on each key block: (..., Nq, Nk) -> (..., Tq, Tk).

    Weights are summed over the keys of a block and averaged over its queries, so each row adds up to 1 if those of the
    map do. The last block of either may be partial.
    """
    _check_matrices(weights=weights)
    check_block_size("block_q", block_q)
    check_block_size("block_k", block_k)
    rows = torch.stack([block.mean(dim=-2) for block in weights.split(block_q, dim=-2)], dim=-2)
    return torch.stack([block.sum(dim=-1) for block in rows.split(block_k, dim=-1)], dim=-1)


def oracle_labels(mass: Tensor, labels: Tensor) -> Tensor:
    """The classes that a perfect ranking would give: as many of each per row as in `labels`, by true mass.

    `mass` and `labels` (..., Tq, Tk) -> (..., Tq, Tk) int8; among equal masses the earlier block ranks higher.
    """
    _check_matrices(mass=mass)
    _check_shape("labels", labels, INTEGERS, "mass", mass)
    rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    critical = (labels == 1).sum(dim=-1, keepdim=True)
    negligible = (labels == -1).sum(dim=-1, keepdim=True)
    return (rank < critical).to(torch.int8) - (rank >= labels.shape[-1] - negligible).to(torch.int8)


def critical_recall(labels: Tensor, oracle: Tensor) -> Tensor:
    """Share of the oracle's critical blocks that `labels` (..., Tq, Tk) makes critical too."""
    _check_shape("labels", labels, INTEGERS, "labels", labels)
    _check_shape("oracle", oracle, INTEGERS, "labels", labels)
    wanted = oracle == 1
    return ((labels == 1) & wanted).sum(dim=(-2, -1)) / wanted.sum(dim=(-2, -1))


def class_mass(mass: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """What part of all attention each class holds, per map: {1: critical, 0: marginal, -1: negligible}."""
    _check_matrices(mass=mass)
    _check_shape("labels", labels, INTEGERS, "mass", mass)
    return {label: mass.where(labels == label, 0.0).sum(dim=-1).mean(dim=-1) for label in CLASS_NAMES}


def attention_flops(
    query_length: int, key_length: int, head_dim: int, *, critical_share: float = 1.0, linear: bool = False
) -> float:
    """Floating-point operations of one head's forward; a multiplication and an addition are two.

    Counted as in the paper: the critical share of full attention, plus linear attention over all
    tokens if there is such a branch. Full attention is Q K^T and P V, 4 Nq Nk D; linear attention is
    phi(K)^T V and phi(Q) H, 2 (Nq + Nk) D^2. Softmax, feature map, classification, the sums of the
    block states and Proj are not counted. (1.0, False) is full attention, (0.0, True) linear only.
    """
    for name, size in (("query_length", query_length), ("key_length", key_length), ("head_dim", head_dim)):
        check_block_size(name, size)
    check_ratio("critical_share", critical_share, zero_allowed=True)
    check_bool("linear", linear)
    full = 4 * query_length * key_length * head_dim
    return critical_share * full + (2 * (query_length + key_length) * head_dim**2 if linear else 0)
