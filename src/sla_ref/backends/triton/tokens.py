"""Tokens inside kernels: one head of a (B, H, N, D) tensor, then tiles of it in registers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import INTERPRETED

LOG2_E = tl.constexpr(math.log2(math.e))
IN_INTERPRETER = tl.constexpr(INTERPRETED)


class Head(NamedTuple):
    """One head of `launch.Tokens`, (N, D)."""

    data: Any  # a pointer to its first element, or the descriptor of all heads
    batch: Any  # of a descriptor: which batch and head
    head: Any
    token: Any  # of a pointer: the stride from token to token
    length: Any  # N
    D: Any


# --- in kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc=None, TF32: tl.constexpr = False):
    """a @ b (+ acc), summed in float32; float32 operands are multiplied as such, unless TF32 says as tf32."""
    if IN_INTERPRETER:  # NumPy has no bfloat16, and the interpreter would multiply its bits as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def to_tf32(x):
    """float32 rounded to the 10 bits of tf32, which the matrix unit would cut off."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def own_rows(first_head, length, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The block of this program, counted over the heads of its launch, its head, and the first of its ROWS tokens."""
    PARTS: tl.constexpr = BLOCK // ROWS
    program = tl.program_id(0)
    block = program // PARTS
    num_blocks = tl.cdiv(length, BLOCK)
    return block, first_head + block // num_blocks, block % num_blocks * BLOCK + program % PARTS * ROWS


@triton.jit
def head_of(tokens, head, num_heads, length, plan: tl.constexpr):
    """Head number `head` of all B * H. Its offset is int64, for tensors of more than 2^31 elements."""
    b = head // num_heads
    h = head % num_heads
    D: tl.constexpr = plan.D
    if isinstance(tokens, tl.tensor_descriptor):
        result = Head(tokens, b, h, 0, length, D)
    else:
        data = tokens.data + b.to(tl.int64) * tokens.batch + h.to(tl.int64) * tokens.head
        result = Head(data, b, h, tokens.token, length, D)
    return result


@triton.jit
def slab_pointers(head, first, feature, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Where ROWS tokens from `first` have their FEATURES features from `feature`. # [ROWS, FEATURES]

    The tile begins at an int64 offset; offsets inside it are int32, which saves registers.
    """
    start = head.data + first.to(tl.int64) * head.token
    return start + (tl.arange(0, ROWS)[:, None] * head.token + (feature + tl.arange(0, FEATURES))[None, :])


@triton.jit
def slab_mask(head, first, feature, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Which of them exist: tokens before the end of the sequence, features that are not padding."""
    return (first + tl.arange(0, ROWS) < head.length)[:, None] & (feature + tl.arange(0, FEATURES) < head.D)[None, :]


@triton.jit
def load_slab(head, first, feature, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Some features of some tokens; what does not exist reads as zero. # [ROWS, FEATURES]"""
    pointers = slab_pointers(head, first, feature, ROWS, FEATURES)
    return tl.load(pointers, mask=slab_mask(head, first, feature, ROWS, FEATURES), other=0.0)


@triton.jit
def load(head, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """All features of some tokens; what does not exist reads as zero. # [ROWS, COLUMNS]"""
    if isinstance(head.data, tl.tensor_descriptor):
        tile = head.data.load([head.batch, head.head, first, 0]).reshape(ROWS, COLUMNS)
    else:
        tile = load_slab(head, first, 0, ROWS, COLUMNS)
    return tile


@triton.jit
def store(head, first, feature, tile):
    """Write a tile, as far as its tokens and features exist."""
    ROWS: tl.constexpr = tile.shape[0]
    FEATURES: tl.constexpr = tile.shape[1]
    pointers = slab_pointers(head, first, feature, ROWS, FEATURES)
    tl.store(pointers, tile.to(head.data.dtype.element_ty), mask=slab_mask(head, first, feature, ROWS, FEATURES))


@triton.jit
def weight_slab(weight, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, plan: tl.constexpr):
    """A part of Proj's weight, (D, D) from input to output features; zero beyond D. # [ROWS, WIDTH]"""
    row = row + tl.arange(0, ROWS)
    column = column + tl.arange(0, WIDTH)
    mask = (row < plan.D)[:, None] & (column < plan.D)[None, :]
    return tl.load(weight + (row[:, None] * plan.D + column[None, :]), mask=mask, other=0.0)


# --- phi -------------------------------------------------------------------------------------------------------------


class Phi(NamedTuple):
    """phi of ROWS tokens, to be read slab by slab. A softmax needs two numbers of its whole row for that."""

    tokens: Any
    first: Any
    top: Any  # the row's maximum, [ROWS]
    share: Any  # 1 / the row's sum of exponentials, 0 for a token that does not exist, [ROWS]


@triton.jit
def exponentials(head, first, feature, top, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """exp(x - top) of some features of some tokens, 0 for a feature that is padding. # [ROWS, FEATURES]"""
    x = load_slab(head, first, feature, ROWS, FEATURES).to(tl.float32) * LOG2_E - (top * LOG2_E)[:, None]
    return tl.exp2(tl.where((feature + tl.arange(0, FEATURES) < head.D)[None, :], x, float("-inf")))


@triton.jit
def phi_of(head, first, ROWS: tl.constexpr, plan: tl.constexpr):
    """phi of ROWS tokens from `first`."""
    top = tl.zeros([ROWS], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    if plan.SOFTMAX:
        COLUMNS: tl.constexpr = plan.COLUMNS
        x = load_slab(head, first, 0, ROWS, COLUMNS).to(tl.float32)
        top = tl.max(tl.where((tl.arange(0, COLUMNS) < plan.D)[None, :], x, float("-inf")), 1)
        share = 1 / tl.sum(exponentials(head, first, 0, top, ROWS, COLUMNS), 1)
        share = tl.where(first + tl.arange(0, ROWS) < head.length, share, 0.0)
    return Phi(head, first, top, share)


@triton.jit
def load_phi(phi, feature, ROWS: tl.constexpr, FEATURES: tl.constexpr, plan: tl.constexpr):
    """Some features of phi, 0 for tokens that do not exist. # [ROWS, FEATURES]"""
    if plan.SOFTMAX:
        tile = exponentials(phi.tokens, phi.first, feature, phi.top, ROWS, FEATURES) * phi.share[:, None]
    else:
        tile = load_slab(phi.tokens, phi.first, feature, ROWS, FEATURES)
    return for_linear(tile, phi.tokens, plan)


@triton.jit
def for_linear(tile, tokens, plan: tl.constexpr):
    """A tile as the products of the linear branch take it: in the dtype of the tokens, or as tf32 for float16."""
    if plan.TF32:
        tile = to_tf32(tile.to(tl.float32))
    else:
        tile = tile.to(tokens.data.dtype.element_ty)
    return tile
