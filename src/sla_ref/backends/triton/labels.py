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
ROWS, COLUMNS = 8, 32  # query blocks and key blocks of a program


class KeyLists(NamedTuple):
    """The critical key blocks of each query block: `BlockMap.kv_num_blocks` and `BlockMap.kv_indices`."""

    num_blocks: Any
    indices: Any


class QueryLists(NamedTuple):
    """The query blocks to which each key block is critical: `BlockMap.q_offsets` and `BlockMap.q_indices`."""

    offsets: Any
    indices: Any


class Lists(NamedTuple):
    """All that a pass needs to know of the labels."""

    keys: KeyLists
    queries: QueryLists | None  # for the backward
    weights: Any  # the matrix that adds up states, (B * H, Tq, Tk) padded with zeros to whole tiles [Alg. 1 L12]


class Side(NamedTuple):
    """The labels of one head as query blocks see them, along rows, or as key blocks do, down columns."""

    labels: Any
    num_blocks: Any
    num_partners: Any
    block_stride: Any
    partner_stride: Any


# --- in kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def load_labels(side, block, partner):
    """The labels of some blocks with some of their partners. # [BLOCKS, PARTNERS]"""
    inside = (block < side.num_blocks)[:, None] & (partner < side.num_partners)[None, :]
    place = block[:, None] * side.block_stride + partner[None, :] * side.partner_stride
    return tl.load(side.labels + place, mask=inside, other=IS_NEGLIGIBLE)


@triton.jit
def count(side, block, CLASS: tl.constexpr, TILE: tl.constexpr):
    """How many partners of a class each block has. # [BLOCKS]"""
    number = tl.zeros(block.shape, tl.int32)
    for first in range(0, side.num_partners, TILE):
        label = load_labels(side, block, first + tl.arange(0, TILE))
        number += tl.sum((label == CLASS).to(tl.int32), 1)
    return number


@triton.jit
def write_lists(side, block, indices, place, TILE: tl.constexpr):
    """The critical partners of each block, ascending, from its `place` on."""
    for first in range(0, side.num_partners, TILE):
        partner = first + tl.arange(0, TILE)
        critical = (load_labels(side, block, partner) == IS_CRITICAL).to(tl.int32)  # [BLOCKS, TILE]
        slot = place[:, None] + tl.cumsum(critical, 1) - 1
        tl.store(indices + slot, tl.broadcast_to(partner[None, :], critical.shape), mask=critical == 1)
        place += tl.sum(critical, 1)


@triton.jit
def write_weights(rows, i, weights, padded_columns, TILE: tl.constexpr):
    """Rows of the matrix that adds up states: a power of two where the label is 0, else 0. [Alg. 1 L12]"""
    marginal = tl.maximum(count(rows, i, IS_MARGINAL, TILE), 1).to(tl.float32)
    weight = tl.exp2(-tl.floor(tl.log2(marginal)))  # [ROWS]
    for first in range(0, padded_columns, TILE):
        j = first + tl.arange(0, TILE)
        tile = tl.where(load_labels(rows, i, j) == IS_MARGINAL, weight[:, None], 0.0)  # the padding weighs nothing
        place = weights + (i[:, None] * padded_columns + j[None, :])
        tl.store(place, tile.to(weights.dtype.element_ty), mask=(j < padded_columns)[None, :])


@triton.jit
def read_columns(labels, lists, head, first, Tq, Tk, capacity, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """The query lists of COLUMNS key blocks. They are packed, so what the key blocks before have is counted too."""
    before = Side(labels, Tq, first, Tk, 1)
    start = tl.zeros([TILE], tl.int32)
    for i in range(0, Tq, TILE):
        start += count(before, i + tl.arange(0, TILE), IS_CRITICAL, COLUMNS)
    columns = Side(labels, Tk, Tq, 1, Tk)
    j = first + tl.arange(0, COLUMNS)
    number = count(columns, j, IS_CRITICAL, TILE)
    end = tl.sum(start, 0) + tl.cumsum(number, 0)
    offsets = lists.offsets + head * (Tk + 1) + j
    tl.store(offsets, end - number, mask=j < Tk)
    tl.store(offsets + 1, end, mask=j == Tk - 1)
    write_lists(columns, j, lists.indices + head * Tq * capacity, end - number, TILE)


@triton.jit(do_not_specialize=["heads", "Tq", "Tk", "capacity", "padded_rows", "padded_columns"])
def lists_kernel(
    labels, lists, heads, Tq, Tk, capacity, padded_rows, padded_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program reads the labels of ROWS query blocks; further ones, in the backward, those of COLUMNS key blocks."""
    program = tl.program_id(0)
    row_strips = padded_rows // ROWS  # of a head
    is_row = program < heads * row_strips
    program = program if is_row else program - heads * row_strips
    strips = row_strips if is_row else tl.cdiv(Tk, COLUMNS)
    head = (program // strips).to(tl.int64)
    strip = program % strips
    labels += head * Tq * Tk
    if is_row:
        rows = Side(labels, Tq, Tk, Tk, 1)
        i = strip * ROWS + tl.arange(0, ROWS)
        tl.store(lists.keys.num_blocks + head * Tq + i, count(rows, i, IS_CRITICAL, TILE), mask=i < Tq)
        write_lists(rows, i, lists.keys.indices + head * Tq * capacity, i * capacity, TILE)
        write_weights(rows, i, lists.weights + head * padded_rows * padded_columns, padded_columns, TILE)
    elif lists.queries is not None:
        read_columns(labels, lists.queries, head, strip * COLUMNS, Tq, Tk, capacity, COLUMNS, TILE)


# --- outside ---------------------------------------------------------------------------------------------------------


def read_labels(block_map: BlockMap, dtype: torch.dtype, *, backward: bool) -> Lists:
    """The lists, which are those that BlockMap makes with many kernels of torch's, and weights of this dtype."""
    labels = block_map.labels.contiguous()
    (batch, heads, rows, columns), device = labels.shape, labels.device
    capacity, padded = block_map.max_critical, [math.ceil(n / WEIGHTS_TILE) * WEIGHTS_TILE for n in (rows, columns)]

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    keys = KeyLists(empty(batch, heads, rows), empty(batch, heads, rows, capacity))
    queries, programs = None, batch * heads * (padded[0] // ROWS)
    if backward:
        queries = QueryLists(empty(batch, heads, columns + 1), empty(batch, heads, rows * capacity))
        programs += batch * heads * math.ceil(columns / COLUMNS)
    lists = Lists(keys, queries, empty(batch * heads, *padded, dtype=dtype))
    sizes = (batch * heads, rows, columns, capacity, *padded)
    case = (labels.data_ptr() % 16, dtype, backward)
    start(lists_kernel, programs, labels, lists, *sizes, ROWS, COLUMNS, 128, case=case, num_warps=4)
    return lists
