"""The classification as kernels: in float64, as the specification has it, for what torch's own kernels take in float32.

One kernel pools tokens. Their product is left to torch. The other kernel finds the last score that is still critical by
fixing its bits one after the other, which takes less time than sorting a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .labels import IS_CRITICAL, IS_MARGINAL, IS_NEGLIGIBLE
from .launch import columns_of, layout, start, strided

LOWEST = tl.constexpr(-(2**63))  # int64's smallest number, which is also the value of its first bit


@triton.jit
def pool_block(tokens, pooled, program, num_heads, length, block, D, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The mean of the tokens of one block, D numbers of float64. [Eq. 2]"""
    num_blocks = tl.cdiv(length, block)
    head = program // num_blocks
    first = program % num_blocks * block
    end = tl.minimum(first + block, length)
    data = tokens.data + (head // num_heads).to(tl.int64) * tokens.batch + (head % num_heads).to(tl.int64) * tokens.head
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for step in range(first, end, ROWS):
        row = step + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < D)[None, :]
        tile = tl.load(data + row.to(tl.int64)[:, None] * tokens.token + column[None, :], mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float64), 0)
    mean = total / (end - first).to(tl.float64)  # [Eq. 2]
    tl.store(pooled + program.to(tl.int64) * D + column, mean, mask=column < D)


@triton.jit(do_not_specialize=["heads", "num_heads", "query_length", "key_length", "block_q", "block_k"])
def pool_kernel(
    query, key, pooled_query, pooled_key, heads, num_heads, query_length, key_length, block_q, block_k,
    D, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program pools one block, those of query first."""
    program = tl.program_id(0)
    query_blocks = heads * tl.cdiv(query_length, block_q)
    if program < query_blocks:
        pool_block(query, pooled_query, program, num_heads, query_length, block_q, D, COLUMNS, ROWS)
    else:
        pool_block(key, pooled_key, program - query_blocks, num_heads, key_length, block_k, D, COLUMNS, ROWS)


@triton.jit
def among_largest(order, count):
    """Which entries of a row are its `count` largest; of equal ones the earlier come first. # bool [WIDTH]"""
    # Bit by bit, `last` becomes the largest number that at least `count` entries reach. Once exactly `count` entries
    # reach it, they are the ones, and the other bits do not matter.
    last = tl.full([], LOWEST, tl.int64)
    bit = last
    reached = count + 1
    while (bit != 0) & (reached != count):
        reach = tl.sum((order >= last + bit).to(tl.int32), 0)
        reached = tl.where(reach >= count, reach, reached)
        last = tl.where(reach >= count, last + bit, last)
        bit = (bit >> 1) & 0x7FFFFFFFFFFFFFFF
    above = order > last
    equal = (order == last).to(tl.int32)
    first_equals = tl.cumsum(equal, 0) <= count - tl.sum(above.to(tl.int32), 0)
    return tl.where(reached == count, order >= last, above | ((equal == 1) & first_equals))


@triton.jit(do_not_specialize=["num_key_blocks", "num_critical", "num_negligible"])
def labels_kernel(scores, labels, num_key_blocks, num_critical, num_negligible, WIDTH: tl.constexpr):
    """The classes of the key blocks of one query block. [Eq. 3] [Alg. 1 L6]"""
    j = tl.arange(0, WIDTH)
    row = tl.program_id(0).to(tl.int64) * num_key_blocks
    score = tl.load(scores + row + j, mask=j < num_key_blocks, other=0.0) + 0.0  # 0.0 and -0.0 become the same bits
    bits = score.to(tl.int64, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)  # integers in the order of the scores
    order = tl.where(j < num_key_blocks, order, LOWEST)
    critical = among_largest(order, num_critical)
    kept = among_largest(order, num_key_blocks - num_negligible)
    label = tl.where(critical, IS_CRITICAL, tl.where(kept, IS_MARGINAL, IS_NEGLIGIBLE))  # [Eq. 3] [Alg. 1 L6]
    tl.store(labels + row + j, label.to(tl.int8), mask=j < num_key_blocks)


def classify(query: Tensor, key: Tensor, num_critical: int, num_negligible: int, block_q: int, block_k: int) -> Tensor:
    """The labels (B, H, Tq, Tk) int8 that `sla_ref.classify_blocks` defines."""
    with torch.cuda.device_of(query):
        pooled_query, pooled_key = pool(query, key, block_q, block_k)
        scores = torch.bmm(pooled_query, pooled_key.mT)  # (B * H, Tq, Tk) [Eq. 2] [Alg. 1 L5]
        (batch, heads, _, _), (_, num_query_blocks, num_key_blocks) = query.shape, scores.shape
        shape = (batch, heads, num_query_blocks, num_key_blocks)
        labels = torch.empty(*shape, dtype=torch.int8, device=query.device)
        width = 1 << (num_key_blocks - 1).bit_length()
        args = (scores, labels, num_key_blocks, num_critical, num_negligible, width)
        warps = min(max(width // 512, 1), 16)
        start(labels_kernel, batch * heads * num_query_blocks, *args, case=width, num_warps=warps)
    return labels


def pool(query: Tensor, key: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """The mean of each block of both, (B * H, T, D) float64; the last block may be partial."""
    batch, heads, query_length, head_dim = query.shape
    lengths, blocks = (query_length, key.shape[2]), (min(block_q, query_length), min(block_k, key.shape[2]))
    numbers = [math.ceil(length / block) for length, block in zip(lengths, blocks, strict=True)]
    kind: dict[str, Any] = {"dtype": torch.float64, "device": query.device}
    pooled_query, pooled_key = (torch.empty(batch * heads, number, head_dim, **kind) for number in numbers)
    tokens = (strided(query), strided(key))
    args = (*tokens, pooled_query, pooled_key, batch * heads, heads, *lengths, *blocks, head_dim)
    cut = (columns_of(head_dim), max(1, 8192 // columns_of(head_dim)))
    programs, case = batch * heads * sum(numbers), (head_dim, *map(layout, tokens))
    start(pool_kernel, programs, *args, *cut, case=case, num_warps=4)
    return pooled_query, pooled_key
