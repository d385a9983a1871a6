"""Which key blocks a query block attends to, and how: pooling, scores, the three classes, and `BlockMap`.

Nothing here is differentiated. The classification is a discrete choice, and the paper trains through the two branches
only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_block_size, check_ratio, check_tensors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1

DEFAULT_CRITICAL_RATIO = 0.05
DEFAULT_NEGLIGIBLE_RATIO = 0.10
DEFAULT_BLOCK = 64


# --- pooling, scores, classes ----------------------------------------------------------------------------------------


def pool_blocks(tokens: Tensor, block: int) -> Tensor:
    """Mean over the tokens of each block; the last block may be partial and is averaged over its real tokens.

    `tokens` (B, H, N, D) -> (B, H, T, D) with T = ceil(N / block), float32 (float64 for float64 inputs). [Eq. 2]
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    whole = tokens.shape[2] // block * block
    pooled = tokens[:, :, :whole].unflatten(2, (whole // block, block)).mean(dim=3, dtype=dtype)
    if whole < tokens.shape[2]:
        tail = tokens[:, :, whole:].mean(dim=2, keepdim=True, dtype=dtype)
        pooled = torch.cat([pooled, tail], dim=2)
    return pooled


@torch.no_grad()
def block_scores(query: Tensor, key: Tensor, *, block_q: int = DEFAULT_BLOCK, block_k: int = DEFAULT_BLOCK) -> Tensor:
    """The raw scores that blocks are ranked by, `pool(Q) pool(K)^T`. [Eq. 2] without its softmax and 1/sqrt(d).

    Neither changes the order within a row, but a float32 softmax underflows: scores that differ would become ties.

    Args:
        query: (B, H, Nq, D), any float dtype.
        key: (B, H, Nk, D), same dtype and device.
        block_q, block_k: tokens per query block and per key block.

    Returns:
        (B, H, Tq, Tk) float32 (float64 for float64 inputs), without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or size.
    """
    check_tensors(query=query, key=key)
    check_block_size("block_q", block_q)
    check_block_size("block_k", block_k)
    pooled_query, pooled_key = pool_blocks(query, block_q), pool_blocks(key, block_k)
    dtype = pooled_query.dtype
    if query.device.type != "mps":  # which has no float64, and no tf32 either
        # A float32 product would follow the user's tf32 and autocast settings, and near-ties would turn with them.
        pooled_query, pooled_key = pooled_query.double(), pooled_key.double()
    return (pooled_query @ pooled_key.mT).to(dtype)


@torch.no_grad()
def classify_blocks(
    query: Tensor,
    key: Tensor,
    critical_ratio: float = DEFAULT_CRITICAL_RATIO,
    negligible_ratio: float = DEFAULT_NEGLIGIBLE_RATIO,
    *,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
) -> BlockMap:
    """Sort the key blocks of every query block into critical, marginal and negligible. [Eq. 3] [Alg. 1 L5] [Alg. 1 L6]

    Each row of `block_scores` is ranked in stable descending order. Its first `max(1, int(critical_ratio * Tk))` blocks
    are critical; its last `int(negligible_ratio * Tk)`, or what is left of the row, are negligible; the rest is
    marginal.

    Args:
        query: (B, H, Nq, D), any float dtype.
        key: (B, H, Nk, D), same dtype and device.
        critical_ratio: share of critical key blocks, 0 < critical_ratio <= 1; the paper's k_h / 100.
        negligible_ratio: share of negligible key blocks, 0 <= negligible_ratio <= 1; the paper's k_l / 100.
        block_q, block_k: tokens per query block and per key block.

    Returns:
        The block map, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or size.
    """
    check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
    check_ratio("negligible_ratio", negligible_ratio, zero_allowed=True)
    scores = block_scores(query, key, block_q=block_q, block_k=block_k)
    num_blocks = scores.shape[-1]
    num_critical = max(1, int(critical_ratio * num_blocks))
    num_negligible = min(int(negligible_ratio * num_blocks), num_blocks - num_critical)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    labels = torch.full(scores.shape, MARGINAL, dtype=torch.int8, device=scores.device)
    labels.scatter_(-1, order[..., :num_critical], CRITICAL)
    labels.scatter_(-1, order[..., num_blocks - num_negligible :], NEGLIGIBLE)
    return BlockMap(labels, block_q, block_k, query.shape[2], key.shape[2], num_critical)


# --- the map ---------------------------------------------------------------------------------------------------------


def _positions(member: Tensor, capacity: int) -> Tensor:
    """For each row of a boolean (..., T), the indices of its members in ascending order, (..., capacity) int32.

    Rows with fewer members are filled up with zeros, which are never read.
    """
    # Every member knows its place by counting; non-members write to one slot too many, which is cut off.
    slot = torch.where(member, member.cumsum(-1) - 1, capacity)
    index = torch.arange(member.shape[-1], dtype=torch.int32, device=member.device).expand(member.shape)
    out = torch.zeros(*member.shape[:-1], capacity + 1, dtype=torch.int32, device=member.device)
    return out.scatter_(-1, slot, index)[..., :capacity].contiguous()


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The class of every pair of a query block and a key block, and the index lists that kernels walk along.

    Args:
        labels: (B, H, Tq, Tk) int8; 1 critical, 0 marginal, -1 negligible. The paper's M_c.
        block_q, block_k: tokens per query block and per key block.
        query_length, key_length: Nq and Nk; the last block of each may be partial.

    Raises:
        TypeError: labels is no int8 tensor, or a size is no int.
        ValueError: a size is below 1, labels does not fit the lengths, or holds another value. Values are read in eager
            code only: under torch.compile they cannot be.
    """

    labels: Tensor
    block_q: int
    block_k: int
    query_length: int
    key_length: int
    _num_critical: int | None = field(default=None, repr=False)
    """Critical blocks per row where all rows have as many, as `classify_blocks` makes them: saves reading the data."""

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int8:
            got = self.labels.dtype if isinstance(self.labels, Tensor) else type(self.labels).__name__
            raise TypeError(f"labels must be an int8 tensor, got {got}")
        for name in ("block_q", "block_k", "query_length", "key_length"):
            check_block_size(name, getattr(self, name))
        expected = (math.ceil(self.query_length / self.block_q), math.ceil(self.key_length / self.block_k))
        if self.labels.dim() != 4 or tuple(self.labels.shape[2:]) != expected:
            raise ValueError(
                f"labels must have shape (batch, heads, {expected[0]}, {expected[1]}) for query_length "
                f"{self.query_length} in blocks of {self.block_q} and key_length {self.key_length} in blocks of "
                f"{self.block_k}, got {tuple(self.labels.shape)}"
            )
        if self._num_critical is None and not torch.compiler.is_compiling() and self.labels.numel():
            low, high = (int(bound) for bound in self.labels.aminmax())
            if low < NEGLIGIBLE or high > CRITICAL:
                raise ValueError(f"labels must hold only 1, 0 and -1, got values from {low} to {high}")

    @cached_property
    def max_critical(self) -> int:
        """C, the largest number of critical blocks in a row, at least 1.

        A classified map knows it without reading data.
        """
        if self._num_critical is not None:
            return self._num_critical
        return max(1, int(self.kv_num_blocks.max()))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every query block has exactly C critical blocks. Known without reading data for a classified map."""
        return self._num_critical is not None or int(self.kv_num_blocks.min()) == self.max_critical

    @cached_property
    def kv_num_blocks(self) -> Tensor:
        """Number of critical key blocks of each query block, (B, H, Tq) int32."""
        return (self.labels == CRITICAL).sum(-1, dtype=torch.int32)

    @cached_property
    def kv_indices(self) -> Tensor:
        """Critical key blocks of each query block, ascending, (B, H, Tq, C) int32; read the first `kv_num_blocks`."""
        return _positions(self.labels == CRITICAL, self.max_critical)

    @cached_property
    def q_offsets(self) -> Tensor:
        """Where each key block's list starts in `q_indices`, (B, H, Tk + 1) int32; entry j + 1 is where it ends."""
        counts = (self.labels == CRITICAL).sum(-2, dtype=torch.int32)  # (B, H, Tk)
        return torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))

    @cached_property
    def q_indices(self) -> Tensor:
        """Query blocks to which a key block is critical, ascending, one list after the other, (B, H, Tq * C) int32."""
        num_query_blocks = self.labels.shape[2]
        member = (self.labels == CRITICAL).mT.flatten(2)  # (B, H, Tk * Tq): key block by key block
        return _positions(member, num_query_blocks * self.max_critical) % num_query_blocks

    @property
    def sparsity(self) -> float:
        """1 - share of critical blocks, the paper's "sparsity". Reads the data of a map that was made by hand."""
        if self._num_critical is not None:
            return 1 - self._num_critical / self.labels.shape[-1]
        return 1 - int(self.kv_num_blocks.sum()) / self.labels.numel()

    def to_dense(self) -> Tensor:
        """The class of every token pair, (B, H, Nq, Nk) int8. For checks and pictures: it is N x N."""
        dense = self.labels.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        return dense[:, :, : self.query_length, : self.key_length]

    def to_flex(self) -> BlockMask:
        """The critical blocks as a FlexAttention `BlockMask`; its eager form ignores blocks, so `mask_mod` is set."""
        from torch.nn.attention.flex_attention import BlockMask

        labels, block_q, block_k = self.labels, self.block_q, self.block_k

        def is_critical(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return labels[b, h, q // block_q, k // block_k] == CRITICAL

        return BlockMask.from_kv_blocks(
            self.kv_num_blocks,
            _positions(labels == CRITICAL, labels.shape[-1]),  # flex wants the full width
            BLOCK_SIZE=(block_q, block_k),
            mask_mod=is_critical,
            seq_lengths=(self.query_length, self.key_length),
        )
