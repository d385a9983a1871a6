"""Tokens as kernels see them: a (B, H, N, D) tensor as an argument, one head of it inside, then tiles in registers."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED, columns_of, reads_shared_memory

SHORT = 2**22  # elements of a tensor
LOG2_E = tl.constexpr(math.log2(math.e))
IN_INTERPRETER = tl.constexpr(INTERPRETED)


class Tokens(NamedTuple):
    """A (B, H, N, D) tensor as an argument, unless it is a descriptor by which the hardware reads tiles (TMA)."""

    data: Any  # the tensor; in a kernel a pointer to its first element
    batch: int  # strides of batch, head and token, in elements
    head: int
    token: int


class Head(NamedTuple):
    """One head of it, (N, D), inside a kernel."""

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


# --- outside ---------------------------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Tokens:
    """A tensor by pointer and strides.

    Triton compiles one kernel for strides that are multiples of 16 and another for those that are not, and these may
    add up in another order. A view that would get another kernel than its contiguous copy is copied, for equal bits.
    """
    strides, as_it_is = _outer_strides(tensor.shape, tensor.stride())
    if as_it_is and tensor.data_ptr() % 16 == 0:
        return Tokens(tensor, *strides)
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    return Tokens(tensor, *_outer_strides(tensor.shape, tensor.stride())[0])


@functools.lru_cache(4096)
def _outer_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The first three, 0 where they do not matter, and whether kernels can use them."""
    _, heads, length, head_dim = shape
    own, contiguous = (
        tuple(0 if size == 1 else stride for size, stride in zip(shape[:3], outer, strict=True))
        for outer in (strides[:3], (heads * length * head_dim, length * head_dim, head_dim))
    )
    alike = all((a % 16 == 0, a == 1) == (b % 16 == 0, b == 1) for a, b in zip(own, contiguous, strict=True))
    # Between tokens 2^24 at most: beyond that a tile of 128 tokens would overflow the int32 inside it.
    return own, alike and strides[3] == 1 and own[2] < 2**24


def tiled(*tensors_and_rows: tuple[Tensor, int]) -> list[Any]:
    """Tensors that are read in whole tiles of so many rows: by descriptor if all of them can be, else `strided`."""
    if not descriptors_fit(*(tensor for tensor, _ in tensors_and_rows)):
        return [strided(tensor) for tensor, _ in tensors_and_rows]
    return [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, columns_of(tensor.shape[-1])])
        for tensor, rows in tensors_and_rows
    ]


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether to let the hardware read tiles of these tensors by descriptor (TMA).

    It needs rows on 16 bytes. It pays where matrix instructions read shared memory themselves; where their operands
    come from registers, as on sm_120, it costs registers. Python needs longer for a descriptor than for a pointer,
    which short sequences do not win back.
    """
    if INTERPRETED or not reads_shared_memory() or tensors[0].element_size() != 2 or tensors[0].numel() < SHORT:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(3) == 1
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )
