"""Algorithms 1 and 2 as GPU kernels, in Triton: the backend `triton`.

What one query block i needs, picture of one head (Tq x Tk blocks; `#` critical, `.` marginal, blank negligible):

              key block j ->                    sparse branch: walk along the list of the #, kv_indices[i],
            +---------------------+             with an online softmax               `_forward_kernel`
          i | # . .   . # . . . . |   ------>
    query   | . # .   . . .   . # |             linear branch: all the . at once. Their states h_j, z_j are
    block   | . . # . .   # . .   |             made once per key block              `_states_kernel`
      |     | . . . #   . .   . # |             and added up for every query block by one matrix product,
      v     +---------------------+             (Tq x Tk) weights @ (Tk x D D) states
                  ^                                                                  `_weights_kernel`, `_sums_kernel`
                  |
    The backward of K and V walks down the #     dQ along rows, as the forward      `_backward_dq_kernel`
    of a column: q_indices[q_offsets[j] ...].    dK, dV down columns                `_backward_dkdv_kernel`
    Its linear branch is the mirror image:       dH_i, dZ_i, dQ^phi per query block `_backward_linear_query_kernel`
    weights^T @ (dH_i, dZ_i) gives the dh_j.     dK^phi, dV per key block           `_backward_linear_key_kernel`

No kernel reads a pair of blocks that is not critical. Every output element is written by one program, sums have a fixed
order and there are no atomics, so results repeat bit for bit. One-letter names are those of the glossary in
`sla_ref.reference`. A state is one row of memory of (COLUMNS + 2) * COLUMNS elements in the input's dtype, COLUMNS being D
rounded up to a power of two:

    +--------------------+
    | h_j  COLUMNS rows  |   phi(K_j)^T V_j
    | z_j  1 row         |   column sums of phi(K_j)
    | 1, bad, 0, 0, ...  |   how many blocks were added up, and how many of those hold a NaN or Inf
    +--------------------+

The weight of a marginal pair is not 1 but a power of two near 1 / (marginal blocks of the row): H_i and Z_i then stay in
float16's range at any length, and the factor cancels in phi H / (phi Z) without a rounding error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_map import BlockMap
from ..protocol import Gradients, Saved

name = "triton"

_INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read by triton when a kernel is declared
INTERPRETED = tl.constexpr(_INTERPRETED)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128


# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc=None):
    """a @ b (+ acc), summed in float32; float32 operands are multiplied as such, never as tf32."""
    if INTERPRETED:  # NumPy has no bfloat16, and the interpreter would multiply its bits as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _head(tensor, strides, batch_head, num_heads):
    """Where one head of a (B, H, N, D) tensor begins. In int64: a tensor may have more than 2^31 elements."""
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)
    return tensor + batch * strides[0] + head * strides[1]


@triton.jit
def _offsets(strides, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of ROWS tokens from the `first`, and COLUMNS features, within one head. The tile is the same for every
    `first`, so that a loop only adds a number to it."""
    rows = tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    return first.to(tl.int64) * strides[2] + (rows[:, None] * strides[2] + columns[None, :] * strides[3])


@triton.jit
def _inside(first, length, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile exist: tokens before the end of the sequence, features that are no padding."""
    inside = (first + tl.arange(0, ROWS) < length)[:, None]
    if D < COLUMNS:
        inside = inside & (tl.arange(0, COLUMNS) < D)[None, :]
    return inside


@triton.jit
def _load(head, strides, first, length, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tokens first ... first + ROWS of one head; what lies outside reads as zero. # [ROWS, COLUMNS]"""
    mask = _inside(first, length, D, ROWS, COLUMNS)
    return tl.load(head + _offsets(strides, first, ROWS, COLUMNS), mask=mask, other=0.0)


@triton.jit
def _store(head, strides, first, length, tile, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    mask = _inside(first, length, D, ROWS, COLUMNS)
    tl.store(head + _offsets(strides, first, ROWS, COLUMNS), tile.to(head.dtype.element_ty), mask=mask)


@triton.jit
def _load_features(
    head, strides, first, length, feature, D: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr
):
    """The features feature ... feature + FEATURES of some tokens. # [ROWS, FEATURES]"""
    rows = tl.arange(0, ROWS)
    columns = feature + tl.arange(0, FEATURES)
    mask = (first + rows < length)[:, None] & (columns < D)[None, :]
    offsets = first.to(tl.int64) * strides[2] + (rows.to(tl.int64)[:, None] * strides[2] + columns[None, :] * strides[3])
    return tl.load(head + offsets, mask=mask, other=0.0)


@triton.jit
def _state(states, index, COLUMNS: tl.constexpr):
    """Where the state of block `index` begins (see the picture above)."""
    return states + index.to(tl.int64) * ((COLUMNS + 2) * COLUMNS)


@triton.jit
def _slab(feature, FEATURES: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of FEATURES rows of a state: states are worked through in slabs that fit the registers."""
    rows = feature + tl.arange(0, FEATURES)
    return rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _scores(Q, K, scale, first_key, key_length, KEYS: tl.constexpr):
    """scale Q K^T in units of log 2, -inf for keys past the end. # [rows, KEYS]"""
    S = _dot(Q, tl.trans(K)) * (scale * LOG2_E)
    return tl.where((first_key + tl.arange(0, KEYS) < key_length)[None, :], S, float("-inf"))


@triton.jit
def _denominator(head, strides, first, length, sums, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """phi(Q_i) Z_i for the rows of a query block; 0 where it has no marginal block, NaN where one of them has. # [ROWS]"""
    phi = _load(head, strides, first, length, D, ROWS, COLUMNS).to(tl.float32)
    Z = tl.load(sums + COLUMNS * COLUMNS + tl.arange(0, COLUMNS)).to(tl.float32)
    blocks = tl.load(sums + (COLUMNS + 1) * COLUMNS).to(tl.float32)
    bad = tl.load(sums + (COLUMNS + 1) * COLUMNS + 1).to(tl.float32)
    denominator = tl.sum(phi * Z[None, :], 1)
    denominator = tl.where(blocks == 0, 0.0, denominator)
    return tl.where(bad == 0, denominator, float("nan"))


# --- the states of the linear branch and their sums ------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_head", "num_heads", "key_length", "num_key_blocks"])
def _states_kernel(
    phi_key,
    value,
    states,
    phi_key_strides,
    value_strides,
    first_head,
    num_heads,
    key_length,
    num_key_blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """h_j = phi(K_j)^T V_j and z_j, for one key block. [Alg. 1 L4]"""
    program = tl.program_id(0)
    j = program % num_key_blocks
    batch_head = first_head + program // num_key_blocks
    first = j * BLOCK_K
    phi_key = _head(phi_key, phi_key_strides, batch_head, num_heads)
    value = _head(value, value_strides, batch_head, num_heads)
    state = _state(states, program, COLUMNS)

    V = _load(value, value_strides, first, key_length, D, BLOCK_K, COLUMNS)  # [BLOCK_K, COLUMNS]
    phi = _load(phi_key, phi_key_strides, first, key_length, D, BLOCK_K, COLUMNS)  # [BLOCK_K, COLUMNS]
    # The product that adds states up cannot leave a block out: 0 * NaN is NaN. So a block with a NaN or Inf counts as
    # zeros, and as bad; the query blocks that it is marginal to turn their rows into NaN.
    finite = (tl.abs(phi.to(tl.float32)) < float("inf")) & (tl.abs(V.to(tl.float32)) < float("inf"))
    good = tl.min(tl.min(finite.to(tl.int32), 1), 0)
    V = tl.where(good == 1, V, 0.0).to(V.dtype)
    z = tl.sum(tl.where(good == 1, phi.to(tl.float32), 0.0), 0)  # [COLUMNS]
    for feature in range(0, COLUMNS, FEATURES):
        phi = _load_features(phi_key, phi_key_strides, first, key_length, feature, D, BLOCK_K, FEATURES)
        phi = tl.where(good == 1, phi, 0.0).to(V.dtype)
        h = _dot(tl.trans(phi), V)  # [FEATURES, COLUMNS]
        tl.store(state + _slab(feature, FEATURES, COLUMNS), h.to(states.dtype.element_ty))
    columns = tl.arange(0, COLUMNS)
    counts = tl.where(columns == 0, 1, tl.where(columns == 1, 1 - good, 0))
    tl.store(state + COLUMNS * COLUMNS + columns, z.to(states.dtype.element_ty))
    tl.store(state + (COLUMNS + 1) * COLUMNS + columns, counts.to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "padded_rows", "padded_columns"])
def _weights_kernel(
    labels, weights, num_query_blocks, num_key_blocks, padded_rows, padded_columns, TILE: tl.constexpr
):
    """One row of the matrix that adds up states: a power of two where the label is 0, else 0. [Alg. 1 L12]"""
    program = tl.program_id(0)
    i = program % padded_rows
    batch_head = program // padded_rows
    labels += (batch_head.to(tl.int64) * num_query_blocks + i) * num_key_blocks
    weights += program.to(tl.int64) * padded_columns
    in_row = tl.where(i < num_query_blocks, num_key_blocks, 0)  # rows and columns of the padding are all zero
    tile = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, in_row, TILE):
        label = tl.load(labels + first + tile, mask=first + tile < in_row, other=-1)
        count += (label == 0).to(tl.int32)
    blocks = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    weight = tl.exp2(-tl.floor(tl.log2(blocks)))
    for first in range(0, padded_columns, TILE):
        label = tl.load(labels + first + tile, mask=first + tile < in_row, other=-1)
        row = tl.where(label == 0, weight, 0.0).to(weights.dtype.element_ty)
        tl.store(weights + first + tile, row, mask=first + tile < padded_columns)


@triton.jit(do_not_specialize=["num_out", "num_in", "padded_out", "head_stride"])
def _sums_kernel(
    weights,
    states,
    sums,
    num_out,
    num_in,
    padded_out,
    head_stride,
    out_stride,
    in_stride,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TILE: tl.constexpr,
):
    """States added up over their marginal partners, a matrix product: H_i, Z_i from h_j, z_j. [Alg. 1 L13] [Eq. 5]

    With the strides of `weights` exchanged it is the transposed product, dh_j, dz_j from dH_i, dZ_i. [Alg. 2 L14]
    """
    program = tl.program_id(0)
    tiles_out = padded_out // OUT
    tiles = tl.cdiv(SIZE, TILE)
    # Neighbouring programs share a tile of the states, the big operand.
    out = program % tiles_out * OUT + tl.arange(0, OUT)
    column = program // tiles_out % tiles * TILE + tl.arange(0, TILE)
    head = (program // (tiles_out * tiles)).to(tl.int64)
    weights += head * head_stride
    states += head * num_in * SIZE
    sums += head * num_out * SIZE
    acc = tl.zeros([OUT, TILE], tl.float32)
    for first in range(0, num_in, IN):
        inner = first + tl.arange(0, IN)
        # The weights are padded with zeros to whole tiles, the states are not.
        W = tl.load(weights + (out[:, None] * out_stride + inner[None, :] * in_stride))  # [OUT, IN]
        mask = (inner < num_in)[:, None] & (column < SIZE)[None, :]
        h = tl.load(states + (inner.to(tl.int64)[:, None] * SIZE + column[None, :]), mask=mask, other=0.0)  # [IN, TILE]
        acc = _dot(W, h, acc)
    mask = (out < num_out)[:, None] & (column < SIZE)[None, :]
    tl.store(sums + (out.to(tl.int64)[:, None] * SIZE + column[None, :]), acc.to(sums.dtype.element_ty), mask=mask)


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_head", "num_heads", "query_length", "key_length", "num_query_blocks", "capacity"])
def _forward_kernel(
    query,
    key,
    value,
    phi_query,
    query_strides,
    key_strides,
    value_strides,
    phi_query_strides,
    kv_num_blocks,
    kv_indices,
    sums,
    out_sparse,
    out_linear,
    out_strides,
    lse,
    scale,
    first_head,
    num_heads,
    query_length,
    key_length,
    num_query_blocks,
    capacity,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Both branches for ROWS rows of query block i. [Alg. 1 L7-L16]"""
    program = tl.program_id(0)
    block = program // (BLOCK_Q // ROWS)  # counts the query blocks of this launch, head by head
    i = block % num_query_blocks
    batch_head = first_head + block // num_query_blocks
    first = i * BLOCK_Q + program % (BLOCK_Q // ROWS) * ROWS
    query = _head(query, query_strides, batch_head, num_heads)
    key = _head(key, key_strides, batch_head, num_heads)
    value = _head(value, value_strides, batch_head, num_heads)
    phi_query = _head(phi_query, phi_query_strides, batch_head, num_heads)
    out_sparse = _head(out_sparse, out_strides, batch_head, num_heads)
    out_linear = _head(out_linear, out_strides, batch_head, num_heads)
    row = first + tl.arange(0, ROWS)

    # Sparse branch: online softmax over the critical blocks. [Eq. 4]
    listed = (batch_head * num_query_blocks + i).to(tl.int64)
    num_steps = tl.load(kv_num_blocks + listed) * (BLOCK_K // KEYS)
    Q = _load(query, query_strides, first, query_length, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    O = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(num_steps):
        j = tl.load(kv_indices + listed * capacity + step // (BLOCK_K // KEYS))
        first_key = j * BLOCK_K + step % (BLOCK_K // KEYS) * KEYS
        K = _load(key, key_strides, first_key, key_length, D, KEYS, COLUMNS)  # [KEYS, COLUMNS]
        S = _scores(Q, K, scale, first_key, key_length, KEYS)  # [ROWS, KEYS] [Alg. 1 L9]
        m_new = tl.maximum(m, tl.max(S, 1))
        P = tl.exp2(S - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(P, 1)  # [Alg. 1 L10]
        V = _load(value, value_strides, first_key, key_length, D, KEYS, COLUMNS)  # [KEYS, COLUMNS]
        O = _dot(P.to(V.dtype), V, O * shrink[:, None])  # [Alg. 1 L11]
        m = m_new
    empty = num_steps == 0
    l = tl.where(empty, 1.0, l)
    _store(out_sparse, out_strides, first, query_length, O / l[:, None], D, ROWS, COLUMNS)  # [Alg. 1 L16]
    lse += batch_head.to(tl.int64) * query_length
    tl.store(lse + row, (m + tl.log2(l)) * LN_2, mask=row < query_length)

    # Linear branch: phi(Q_i) H_i / (phi(Q_i) Z_i). [Eq. 5] [Alg. 1 L16]
    sums = _state(sums, block, COLUMNS)
    O = tl.zeros([ROWS, COLUMNS], tl.float32)
    for feature in range(0, COLUMNS, FEATURES):
        phi = _load_features(phi_query, phi_query_strides, first, query_length, feature, D, ROWS, FEATURES)
        H = tl.load(sums + _slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        O = _dot(phi, H, O)
    denominator = _denominator(phi_query, phi_query_strides, first, query_length, sums, D, ROWS, COLUMNS)
    O = tl.where((denominator == 0)[:, None], 0.0, O / denominator[:, None])
    _store(out_linear, out_strides, first, query_length, O, D, ROWS, COLUMNS)


# --- backward of the sparse branch -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_heads", "query_length", "key_length", "num_query_blocks", "capacity"])
def _backward_dq_kernel(
    query,
    key,
    value,
    grad_sparse,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    kv_num_blocks,
    kv_indices,
    out_sparse,
    out_strides,
    lse,
    row_lse,
    row_delta,
    grad_query,
    scale,
    num_heads,
    query_length,
    key_length,
    num_query_blocks,
    capacity,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dQ for ROWS rows of query block i, along its list of critical key blocks. [Alg. 2 L12]

    On the way it leaves lse and D^s in scratch that is padded to whole blocks, where `_backward_dkdv_kernel` reads them
    without a mask.
    """
    program = tl.program_id(0)
    block = program // (BLOCK_Q // ROWS)
    i = block % num_query_blocks
    batch_head = block // num_query_blocks
    first = i * BLOCK_Q + program % (BLOCK_Q // ROWS) * ROWS
    query = _head(query, query_strides, batch_head, num_heads)
    key = _head(key, key_strides, batch_head, num_heads)
    value = _head(value, value_strides, batch_head, num_heads)
    grad_sparse = _head(grad_sparse, grad_strides, batch_head, num_heads)
    out_sparse = _head(out_sparse, out_strides, batch_head, num_heads)
    grad_query = _head(grad_query, out_strides, batch_head, num_heads)
    row = first + tl.arange(0, ROWS)

    dO = _load(grad_sparse, grad_strides, first, query_length, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
    O = _load(out_sparse, out_strides, first, query_length, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
    delta = tl.sum(dO.to(tl.float32) * O.to(tl.float32), 1)  # D^s, [ROWS] [Alg. 2 L2]
    lse += batch_head.to(tl.int64) * query_length
    L = tl.load(lse + row, mask=row < query_length, other=float("inf")) * LOG2_E  # exp2(S - inf): no weight past the end
    scratch = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(row_lse + scratch, L)
    tl.store(row_delta + scratch, delta)

    listed = block.to(tl.int64)
    num_steps = tl.load(kv_num_blocks + listed) * (BLOCK_K // KEYS)
    Q = _load(query, query_strides, first, query_length, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
    dQ = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(num_steps):
        j = tl.load(kv_indices + listed * capacity + step // (BLOCK_K // KEYS))
        first_key = j * BLOCK_K + step % (BLOCK_K // KEYS) * KEYS
        K = _load(key, key_strides, first_key, key_length, D, KEYS, COLUMNS)  # [KEYS, COLUMNS]
        S = _scores(Q, K, scale, first_key, key_length, KEYS)  # [ROWS, KEYS]
        P = tl.exp2(S - L[:, None])  # [Alg. 2 L9]
        V = _load(value, value_strides, first_key, key_length, D, KEYS, COLUMNS)  # [KEYS, COLUMNS]
        dP = _dot(dO, tl.trans(V))  # [ROWS, KEYS] [Alg. 2 L11]
        dS = P * (dP - delta[:, None])  # [Alg. 2 L11]
        dQ = _dot(dS.to(K.dtype), K, dQ)  # [Alg. 2 L12]
    _store(grad_query, out_strides, first, query_length, dQ * scale, D, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["num_heads", "query_length", "key_length", "num_query_blocks", "num_key_blocks", "capacity"])
def _backward_dkdv_kernel(
    query,
    key,
    value,
    grad_sparse,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    q_offsets,
    q_indices,
    row_lse,
    row_delta,
    grad_key,
    grad_value,
    out_strides,
    scale,
    num_heads,
    query_length,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dK and the sparse branch's share of dV for KEYS keys of block j, down its list of query blocks. [Alg. 2 L10-L12]

    Scores are held transposed, [KEYS, ROWS], so that each product reads its operands as they lie in memory.
    `grad_value` holds the linear branch's share already; it is added to.
    """
    program = tl.program_id(0)
    block = program // (BLOCK_K // KEYS)
    j = block % num_key_blocks
    batch_head = block // num_key_blocks
    first_key = j * BLOCK_K + program % (BLOCK_K // KEYS) * KEYS
    query = _head(query, query_strides, batch_head, num_heads)
    key = _head(key, key_strides, batch_head, num_heads)
    value = _head(value, value_strides, batch_head, num_heads)
    grad_sparse = _head(grad_sparse, grad_strides, batch_head, num_heads)
    grad_key = _head(grad_key, out_strides, batch_head, num_heads)
    grad_value = _head(grad_value, out_strides, batch_head, num_heads)
    row_lse += batch_head.to(tl.int64) * num_query_blocks * BLOCK_Q
    row_delta += batch_head.to(tl.int64) * num_query_blocks * BLOCK_Q

    offsets = q_offsets + batch_head.to(tl.int64) * (num_key_blocks + 1) + j
    start = tl.load(offsets)
    num_steps = (tl.load(offsets + 1) - start) * (BLOCK_Q // ROWS)
    q_indices += batch_head.to(tl.int64) * num_query_blocks * capacity + start
    K = _load(key, key_strides, first_key, key_length, D, KEYS, COLUMNS)  # [KEYS, COLUMNS]
    V = _load(value, value_strides, first_key, key_length, D, KEYS, COLUMNS)  # [KEYS, COLUMNS]
    dK = tl.zeros([KEYS, COLUMNS], tl.float32)
    dV = tl.zeros([KEYS, COLUMNS], tl.float32)
    for step in range(num_steps):
        i = tl.load(q_indices + step // (BLOCK_Q // ROWS))
        first = i * BLOCK_Q + step % (BLOCK_Q // ROWS) * ROWS
        row = first + tl.arange(0, ROWS)
        # Keys past the end need no mask here: their rows of K and V are zero and their gradients are not stored.
        Q = _load(query, query_strides, first, query_length, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
        S = _dot(K, tl.trans(Q)) * (scale * LOG2_E)  # [KEYS, ROWS]
        P = tl.exp2(S - tl.load(row_lse + row)[None, :])  # [Alg. 2 L9]
        dO = _load(grad_sparse, grad_strides, first, query_length, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
        dV = _dot(P.to(dO.dtype), dO, dV)  # [Alg. 2 L10]
        dP = _dot(V, tl.trans(dO))  # [KEYS, ROWS] [Alg. 2 L11]
        dS = P * (dP - tl.load(row_delta + row)[None, :])  # [Alg. 2 L11]
        dK = _dot(dS.to(Q.dtype), Q, dK)  # [Alg. 2 L12]
    _store(grad_key, out_strides, first_key, key_length, dK * scale, D, KEYS, COLUMNS)
    dV += _load(grad_value, out_strides, first_key, key_length, D, KEYS, COLUMNS).to(tl.float32)
    _store(grad_value, out_strides, first_key, key_length, dV, D, KEYS, COLUMNS)


# --- backward of the linear branch -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_head", "num_heads", "query_length", "num_query_blocks"])
def _backward_linear_query_kernel(
    phi_query,
    grad_linear,
    phi_query_strides,
    grad_strides,
    out_linear,
    grad_phi_query,
    out_strides,
    sums,
    grad_sums,
    first_head,
    num_heads,
    query_length,
    num_query_blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """dQ^phi, dH_i and dZ_i for query block i. [Alg. 2 L3-L5]"""
    block = tl.program_id(0)
    i = block % num_query_blocks
    batch_head = first_head + block // num_query_blocks
    first = i * BLOCK_Q
    phi_query = _head(phi_query, phi_query_strides, batch_head, num_heads)
    grad_linear = _head(grad_linear, grad_strides, batch_head, num_heads)
    out_linear = _head(out_linear, out_strides, batch_head, num_heads)
    grad_phi_query = _head(grad_phi_query, out_strides, batch_head, num_heads)
    sums = _state(sums, block, COLUMNS)
    grad_sums = _state(grad_sums, block, COLUMNS)

    denominator = _denominator(phi_query, phi_query_strides, first, query_length, sums, D, BLOCK_Q, COLUMNS)
    inverse = tl.where(denominator == 0, 0.0, 1 / denominator)  # no gradient through a row that is zero by definition
    dO = _load(grad_linear, grad_strides, first, query_length, D, BLOCK_Q, COLUMNS)  # [BLOCK_Q, COLUMNS]
    O = _load(out_linear, out_strides, first, query_length, D, BLOCK_Q, COLUMNS)  # [BLOCK_Q, COLUMNS]
    delta = tl.sum(dO.to(tl.float32) * O.to(tl.float32), 1)  # D^l, [BLOCK_Q] [Alg. 2 L2]
    for feature in range(0, COLUMNS, FEATURES):
        columns = feature + tl.arange(0, FEATURES)
        H = tl.load(sums + _slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        Z = tl.load(sums + COLUMNS * COLUMNS + columns).to(tl.float32)  # [FEATURES]
        dphi = (_dot(dO, tl.trans(H)) - delta[:, None] * Z[None, :]) * inverse[:, None]  # [Alg. 2 L5]
        mask = (first + tl.arange(0, BLOCK_Q) < query_length)[:, None] & (columns < D)[None, :]
        offsets = _offsets(out_strides, first, BLOCK_Q, FEATURES) + feature * out_strides[3]
        tl.store(grad_phi_query + offsets, dphi.to(grad_phi_query.dtype.element_ty), mask=mask)

        phi = _load_features(phi_query, phi_query_strides, first, query_length, feature, D, BLOCK_Q, FEATURES)
        share = phi.to(tl.float32) * inverse[:, None]  # phi(Q_i) / (phi(Q_i) Z_i), [BLOCK_Q, FEATURES]
        dH = _dot(tl.trans(share.to(dO.dtype)), dO)  # [FEATURES, COLUMNS] [Alg. 2 L3]
        dZ = -tl.sum(share * delta[:, None], 0)  # [FEATURES] [Alg. 2 L4]
        tl.store(grad_sums + _slab(feature, FEATURES, COLUMNS), dH.to(grad_sums.dtype.element_ty))
        tl.store(grad_sums + COLUMNS * COLUMNS + columns, dZ.to(grad_sums.dtype.element_ty))
    columns = tl.arange(0, COLUMNS)
    zeros = tl.zeros([COLUMNS], grad_sums.dtype.element_ty)
    tl.store(grad_sums + (COLUMNS + 1) * COLUMNS + columns, zeros)  # the row of counts has no gradient


@triton.jit(do_not_specialize=["first_head", "num_heads", "key_length", "num_key_blocks"])
def _backward_linear_key_kernel(
    phi_key,
    value,
    phi_key_strides,
    value_strides,
    grad_phi_key,
    grad_value,
    out_strides,
    grad_states,
    first_head,
    num_heads,
    key_length,
    num_key_blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """dK^phi, and the linear branch's share of dV, for key block j. [Alg. 2 L16] [Alg. 2 L17]"""
    block = tl.program_id(0)
    j = block % num_key_blocks
    batch_head = first_head + block // num_key_blocks
    first = j * BLOCK_K
    phi_key = _head(phi_key, phi_key_strides, batch_head, num_heads)
    value = _head(value, value_strides, batch_head, num_heads)
    grad_phi_key = _head(grad_phi_key, out_strides, batch_head, num_heads)
    grad_value = _head(grad_value, out_strides, batch_head, num_heads)
    grad_state = _state(grad_states, block, COLUMNS)

    V = _load(value, value_strides, first, key_length, D, BLOCK_K, COLUMNS)  # [BLOCK_K, COLUMNS]
    dV = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    for feature in range(0, COLUMNS, FEATURES):
        columns = feature + tl.arange(0, FEATURES)
        dh = tl.load(grad_state + _slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        dz = tl.load(grad_state + COLUMNS * COLUMNS + columns).to(tl.float32)  # [FEATURES]
        dphi = _dot(V, tl.trans(dh)) + dz[None, :]  # [BLOCK_K, FEATURES] [Alg. 2 L16]
        mask = (first + tl.arange(0, BLOCK_K) < key_length)[:, None] & (columns < D)[None, :]
        offsets = _offsets(out_strides, first, BLOCK_K, FEATURES) + feature * out_strides[3]
        tl.store(grad_phi_key + offsets, dphi.to(grad_phi_key.dtype.element_ty), mask=mask)
        phi = _load_features(phi_key, phi_key_strides, first, key_length, feature, D, BLOCK_K, FEATURES)
        dV = _dot(phi, dh, dV)  # [Alg. 2 L17]
    _store(grad_value, out_strides, first, key_length, dV, D, BLOCK_K, COLUMNS)


# --- launchers -------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How one kernel is cut and started."""

    rows: int
    """Query rows at a time; a smaller block is taken whole."""
    keys: int
    warps: int
    stages: int


def _launch(kernel, programs: int, *args, **options) -> None:
    """Start a kernel on a grid of one axis: the others are limited to 65535 programs."""
    kernel[(programs,)](*args, **options)


def _columns(head_dim: int) -> int:
    """D as the kernels see it: a power of two, and at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))


def _features(query: Tensor) -> int:
    """Rows of a state worked on at a time."""
    return min(_columns(query.shape[-1]), 64 if query.element_size() == 2 else 16)


def _tiles(kernel: str, query: Tensor, block_map: BlockMap) -> _Tiles:
    """The table of launch parameters."""
    if query.element_size() == 4:
        rows, keys, warps, stages = 32, 32, 4, 1
    else:
        rows, keys, warps, stages = 128, 64, 8, 2
        if kernel == "dkdv":
            rows, keys, warps, stages = 64, 64, 4, 2
        if min(rows, block_map.block_q) == 64:
            warps = 4
    return _Tiles(min(rows, block_map.block_q), min(keys, block_map.block_k), warps, stages)


def _head_chunks(query: Tensor, block_map: BlockMap, buffers: int):
    """Cut the B * H heads so that the states of a chunk take no more memory than two tensors like `query`."""
    heads = query.shape[0] * query.shape[1]
    columns = _columns(query.shape[-1])
    num_blocks = block_map.labels.shape[2] + block_map.labels.shape[3]
    per_head = buffers * num_blocks // 2 * (columns + 2) * columns
    size = min(heads, max(1, 2 * query.numel() // per_head))
    size = math.ceil(heads / math.ceil(heads / size))  # chunks of about one size
    return [(first, min(size, heads - first)) for first in range(0, heads, size)]


def _empty_states(query: Tensor, heads: int, blocks: int) -> Tensor:
    columns = _columns(query.shape[-1])
    return torch.empty(heads, blocks, (columns + 2) * columns, dtype=query.dtype, device=query.device)


_WEIGHT_TILE = 128  # the weights are padded to multiples of this


def _weights(query: Tensor, block_map: BlockMap) -> Tensor:
    """The matrix that adds up states, (B * H, Tq, Tk) padded with zeros to whole tiles. [Alg. 1 L12]"""
    batch, heads, num_query_blocks, num_key_blocks = block_map.labels.shape
    rows, columns = (math.ceil(n / _WEIGHT_TILE) * _WEIGHT_TILE for n in (num_query_blocks, num_key_blocks))
    weights = torch.empty(batch * heads, rows, columns, dtype=query.dtype, device=query.device)
    _launch(
        _weights_kernel,
        batch * heads * rows,
        block_map.labels.contiguous(),
        weights,
        num_query_blocks,
        num_key_blocks,
        rows,
        columns,
        TILE=_WEIGHT_TILE,
        num_warps=1,
    )
    return weights


def _add_up(weights: Tensor, states: Tensor, sums: Tensor) -> None:
    """sums = weights @ states, for the heads of a chunk."""
    heads, num_in, size = states.shape
    num_out = sums.shape[1]
    if states.element_size() == 2:
        tiles = {"OUT": 128, "IN": 64, "TILE": 128, "num_warps": 8, "num_stages": 3}
    else:
        tiles = {"OUT": 32, "IN": 32, "TILE": 64, "num_warps": 4, "num_stages": 1}
    padded_out = weights.shape[1]
    _launch(
        _sums_kernel,
        heads * (padded_out // tiles["OUT"]) * math.ceil(size / tiles["TILE"]),
        weights,
        states,
        sums,
        num_out,
        num_in,
        padded_out,
        *weights.stride(),
        SIZE=size,
        **tiles,
    )


def _marginal_sums(query: Tensor, phi_key: Tensor, value: Tensor, weights: Tensor, states, sums, first_head, block_map):
    """h_j, z_j of all key blocks, H_i, Z_i of all query blocks, for the heads of a chunk. [Alg. 1 L4] [Alg. 1 L13]"""
    heads, num_key_blocks, _ = states.shape
    _launch(
        _states_kernel,
        heads * num_key_blocks,
        phi_key,
        value,
        states,
        phi_key.stride(),
        value.stride(),
        first_head,
        query.shape[1],
        value.shape[2],
        num_key_blocks,
        D=query.shape[-1],
        COLUMNS=_columns(query.shape[-1]),
        BLOCK_K=block_map.block_k,
        FEATURES=_features(query),
        num_warps=4,
    )
    _add_up(weights[first_head : first_head + heads], states, sums)


# --- the protocol's functions ----------------------------------------------------------------------------------------


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None if it can."""
    if _INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "no CUDA GPU is usable here; to run the kernels slowly on the CPU, in Triton's interpreter, "
        "set TRITON_INTERPRET=1 in the environment before Python starts"
    )


def unsupported(query: Tensor, block_map: BlockMap) -> str | None:
    """Why this backend cannot take this input; None if it can."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    for word, size in (("block_q", block_map.block_q), ("block_k", block_map.block_k)):
        if size not in BLOCK_SIZES:
            return f"takes {word} in {BLOCK_SIZES}, got {size}"
    if _INTERPRETED and query.device.type != "cpu":
        return f"runs in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors, got {query.device}"
    if not _INTERPRETED and query.device.type != "cuda":
        return f"takes CUDA tensors, got {query.device} (TRITON_INTERPRET=1, set before Python starts, runs it on a CPU)"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    block_map: BlockMap,
    scale: float,
) -> Saved:
    """Algorithm 1, lines 4 and 7 to 16."""
    batch, num_heads, query_length, head_dim = query.shape
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    out_sparse = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    out_linear = torch.empty_like(out_sparse)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tiles = _tiles("forward", query, block_map)
    with torch.cuda.device_of(query):
        weights = _weights(query, block_map)
        chunks = _head_chunks(query, block_map, 2)
        states = _empty_states(query, chunks[0][1], num_key_blocks)
        sums = _empty_states(query, chunks[0][1], num_query_blocks)
        for first_head, heads in chunks:
            _marginal_sums(query, phi_key, value, weights, states[:heads], sums[:heads], first_head, block_map)
            _launch(
                _forward_kernel,
                heads * num_query_blocks * (block_map.block_q // tiles.rows),
                query,
                key,
                value,
                phi_query,
                query.stride(),
                key.stride(),
                value.stride(),
                phi_query.stride(),
                block_map.kv_num_blocks,
                block_map.kv_indices,
                sums,
                out_sparse,
                out_linear,
                out_sparse.stride(),
                lse,
                scale,
                first_head,
                num_heads,
                query_length,
                key.shape[2],
                num_query_blocks,
                block_map.max_critical,
                D=head_dim,
                COLUMNS=_columns(head_dim),
                BLOCK_Q=block_map.block_q,
                BLOCK_K=block_map.block_k,
                ROWS=tiles.rows,
                KEYS=tiles.keys,
                FEATURES=_features(query),
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return Saved(out_sparse, out_linear, lse)


def backward(
    grad_sparse: Tensor,
    grad_linear: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    saved: Saved,
    block_map: BlockMap,
    scale: float,
) -> Gradients:
    """Algorithm 2."""
    batch, num_heads, query_length, head_dim = query.shape
    key_length = key.shape[2]
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    columns, features = _columns(head_dim), _features(query)
    grad_phi_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_phi_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty_like(grad_phi_key)
    out_linear, out_sparse = saved.out_linear.contiguous(), saved.out_sparse.contiguous()
    with torch.cuda.device_of(query):
        # The linear branch, in chunks of heads; its states are gone before dQ and dK are allocated.
        weights = _weights(query, block_map)
        chunks = _head_chunks(query, block_map, 3)
        states = _empty_states(query, chunks[0][1], num_key_blocks)
        sums = _empty_states(query, chunks[0][1], num_query_blocks)
        grad_sums = torch.empty_like(sums)
        for first_head, heads in chunks:
            _marginal_sums(query, phi_key, value, weights, states[:heads], sums[:heads], first_head, block_map)
            _launch(
                _backward_linear_query_kernel,
                heads * num_query_blocks,
                phi_query,
                grad_linear,
                phi_query.stride(),
                grad_linear.stride(),
                out_linear,
                grad_phi_query,
                out_linear.stride(),
                sums,
                grad_sums,
                first_head,
                num_heads,
                query_length,
                num_query_blocks,
                D=head_dim,
                COLUMNS=columns,
                BLOCK_Q=block_map.block_q,
                FEATURES=features,
                num_warps=8 if block_map.block_q == 128 else 4,
            )
            grad_states = states[:heads]  # h_j, z_j are no longer needed: their gradients take their place
            _add_up(weights[first_head : first_head + heads].mT, grad_sums[:heads], grad_states)
            _launch(
                _backward_linear_key_kernel,
                heads * num_key_blocks,
                phi_key,
                value,
                phi_key.stride(),
                value.stride(),
                grad_phi_key,
                grad_value,
                grad_value.stride(),
                grad_states,
                first_head,
                num_heads,
                key_length,
                num_key_blocks,
                D=head_dim,
                COLUMNS=columns,
                BLOCK_K=block_map.block_k,
                FEATURES=features,
                num_warps=8 if block_map.block_k == 128 else 4,
            )
        del weights, states, sums, grad_sums, grad_states

        grad_query = torch.empty_like(grad_phi_query)
        grad_key = torch.empty_like(grad_phi_key)
        rows = (batch * num_heads, num_query_blocks * block_map.block_q)
        row_lse = torch.empty(rows, dtype=torch.float32, device=query.device)
        row_delta = torch.empty_like(row_lse)
        tiles = _tiles("dq", query, block_map)
        _launch(
            _backward_dq_kernel,
            batch * num_heads * num_query_blocks * (block_map.block_q // tiles.rows),
            query,
            key,
            value,
            grad_sparse,
            query.stride(),
            key.stride(),
            value.stride(),
            grad_sparse.stride(),
            block_map.kv_num_blocks,
            block_map.kv_indices,
            out_sparse,
            out_sparse.stride(),
            saved.lse.contiguous(),
            row_lse,
            row_delta,
            grad_query,
            scale,
            num_heads,
            query_length,
            key_length,
            num_query_blocks,
            block_map.max_critical,
            D=head_dim,
            COLUMNS=columns,
            BLOCK_Q=block_map.block_q,
            BLOCK_K=block_map.block_k,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = _tiles("dkdv", query, block_map)
        _launch(
            _backward_dkdv_kernel,
            batch * num_heads * num_key_blocks * (block_map.block_k // tiles.keys),
            query,
            key,
            value,
            grad_sparse,
            query.stride(),
            key.stride(),
            value.stride(),
            grad_sparse.stride(),
            block_map.q_offsets,
            block_map.q_indices,
            row_lse,
            row_delta,
            grad_key,
            grad_value,
            grad_value.stride(),
            scale,
            num_heads,
            query_length,
            key_length,
            num_query_blocks,
            num_key_blocks,
            block_map.max_critical,
            D=head_dim,
            COLUMNS=columns,
            BLOCK_Q=block_map.block_q,
            BLOCK_K=block_map.block_k,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return Gradients(grad_query, grad_key, grad_value, grad_phi_query, grad_phi_key)
