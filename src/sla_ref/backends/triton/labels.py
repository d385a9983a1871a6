"""What the labels say: lists of critical blocks for the sparse branch, weights of marginal ones for the linear one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...block_map import CRITICAL, MARGINAL, NEGLIGIBLE, BlockMap
from .launch import start

IS_CRITICAL, IS_MARGINAL, IS_NEGLIGIBLE = map(tl.constexpr, (CRITICAL, MARGINAL, NEGLIGIBLE))
WEIGHTS_TILE = 32  # the weights are padded to multiples of this


class KeyLists(NamedTuple):
    """The critical key blocks of each query block: `BlockMap.kv_num_blocks` and `BlockMap.kv_indices`."""

    num_blocks: Any
    indices: Any


class QueryLists(NamedTuple):
    """The query blocks to which each key block is critical: `BlockMap.q_offsets` and `BlockMap.q_indices`."""

    offsets: Any
    indices: Any


@triton.jit(do_not_specialize=["num_out", "num_in", "out_stride", "in_stride", "capacity"])
def lists_kernel(
    labels, offsets, counts, indices, num_out, num_in, out_stride, in_stride, capacity,
    OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """The critical partners of OUT blocks, ascending: of query blocks along rows of the labels, of key blocks down it.

    A list begins where `offsets` says. Without them, one begins every `capacity` entries, and `counts` gets its length.
    """
    tiles = tl.cdiv(num_out, OUT)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    out = tl.program_id(0) % tiles * OUT + tl.arange(0, OUT)
    labels += head * num_out * num_in
    if offsets is not None:
        place = tl.load(offsets + head * (num_out + 1) + out, mask=out < num_out, other=0)  # [OUT]
    else:
        place = out * capacity
        capacity *= num_out  # of a head's lists together, as it is where they are packed
    start = place
    for first in range(0, num_in, IN):
        inner = first + tl.arange(0, IN)
        inside = (out < num_out)[:, None] & (inner < num_in)[None, :]
        label = tl.load(labels + (out[:, None] * out_stride + inner[None, :] * in_stride), mask=inside, other=0)
        critical = (label == IS_CRITICAL).to(tl.int32)  # [OUT, IN]
        slot = place[:, None] + tl.cumsum(critical, 1) - 1
        partner = tl.broadcast_to(inner[None, :], (OUT, IN))
        tl.store(indices + head * capacity + slot, partner, mask=critical == 1)
        place += tl.sum(critical, 1)
    if counts is not None:
        tl.store(counts + head * num_out + out, place - start, mask=out < num_out)


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "padded_rows", "padded_columns"])
def weights_kernel(
    labels, weights, num_query_blocks, num_key_blocks, padded_rows, padded_columns,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the matrix that adds up states: a power of two where the label is 0, else 0. [Alg. 1 L12]"""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS).to(tl.int64)  # counts the padded rows of all heads
    i = row % padded_rows
    label_row = labels + ((row // padded_rows) * num_query_blocks + i) * num_key_blocks
    weight_row = weights + row * padded_columns
    count = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_key_blocks, TILE):
        j = first + tl.arange(0, TILE)
        inside = (i < num_query_blocks)[:, None] & (j < num_key_blocks)[None, :]
        label = tl.load(label_row[:, None] + j[None, :], mask=inside, other=IS_NEGLIGIBLE)  # [ROWS, TILE]
        count += tl.sum((label == IS_MARGINAL).to(tl.int32), 1)
    weight = tl.exp2(-tl.floor(tl.log2(tl.maximum(count, 1).to(tl.float32))))  # [ROWS]
    for first in range(0, padded_columns, TILE):
        j = first + tl.arange(0, TILE)
        inside = (i < num_query_blocks)[:, None] & (j < num_key_blocks)[None, :]
        label = tl.load(label_row[:, None] + j[None, :], mask=inside, other=IS_NEGLIGIBLE)  # the padding weighs nothing
        tile = tl.where(label == IS_MARGINAL, weight[:, None], 0.0).to(weights.dtype.element_ty)  # [Alg. 1 L12]
        tl.store(weight_row[:, None] + j[None, :], tile, mask=(j < padded_columns)[None, :])


# --- outside ---------------------------------------------------------------------------------------------------------
# The lists are those that BlockMap makes, and the tests compare them; one kernel here takes the place of some ten of
# torch's, which would be a tenth of a forward.


def key_lists(block_map: BlockMap) -> KeyLists:
    """The lists along rows, in one pass over the labels."""
    labels = block_map.labels.contiguous()
    batch, heads, num_query_blocks, num_key_blocks = labels.shape
    counts = torch.empty(batch, heads, num_query_blocks, dtype=torch.int32, device=labels.device)
    indices = torch.empty(*counts.shape, block_map.max_critical, dtype=torch.int32, device=labels.device)
    programs = batch * heads * math.ceil(num_query_blocks / 8)
    sizes = (num_query_blocks, num_key_blocks, num_key_blocks, 1, block_map.max_critical)
    start(lists_kernel, programs, labels, None, counts, indices, *sizes, OUT=8, IN=128, num_warps=4)
    return KeyLists(counts, indices)


def query_lists(block_map: BlockMap) -> QueryLists:
    """The lists down columns, in one pass over the labels."""
    labels = block_map.labels.contiguous()
    batch, heads, num_query_blocks, num_key_blocks = labels.shape
    capacity = num_query_blocks * block_map.max_critical
    indices = torch.empty(batch, heads, capacity, dtype=torch.int32, device=labels.device)
    programs = batch * heads * math.ceil(num_key_blocks / 32)
    sizes = (num_key_blocks, num_query_blocks, 1, num_key_blocks, capacity)
    start(lists_kernel, programs, labels, block_map.q_offsets, None, indices, *sizes, OUT=32, IN=128, num_warps=4)
    return QueryLists(block_map.q_offsets, indices)


def marginal_weights(block_map: BlockMap, dtype: torch.dtype) -> Tensor:
    """The matrix that adds up states, (B * H, Tq, Tk) padded with zeros to whole tiles. [Alg. 1 L12]"""
    labels = block_map.labels.contiguous()
    batch, heads, *blocks = labels.shape
    padded = [math.ceil(n / WEIGHTS_TILE) * WEIGHTS_TILE for n in blocks]
    weights = torch.empty(batch * heads, *padded, dtype=dtype, device=labels.device)
    programs = batch * heads * padded[0] // 8
    start(weights_kernel, programs, labels, weights, *blocks, *padded, ROWS=8, TILE=128, num_warps=4)
    return weights
