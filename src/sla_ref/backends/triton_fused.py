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
`sla_ref.reference`. A state is one row of memory of (COLUMNS + 2) * COLUMNS elements in the input's dtype, COLUMNS
being D rounded up to a power of two:

    +--------------------+
    | h_j  COLUMNS rows  |   phi(K_j)^T V_j
    | z_j  1 row         |   column sums of phi(K_j)
    | 1, bad, 0, 0, ...  |   how many blocks were added up, and how many of those hold a NaN or Inf
    +--------------------+

The weight of a marginal pair is not 1 but a power of two near 1 / (marginal blocks of the row): H_i and Z_i then stay
in float16's range at any length, and the factor cancels in phi H / (phi Z) without a rounding error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_map import BlockMap
from ..protocol import Gradients, Saved

name = "triton"

_INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read by triton when a kernel is declared
INTERPRETED = tl.constexpr(_INTERPRETED)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128

# Where matrix instructions read shared memory, of which there is 227 KB. 0 is the interpreter.
_LARGE_ARCHITECTURES = (0, 90, 100, 103)


# --- device helpers --------------------------------------------------------------------------------------------------
# Tensors of tokens arrive as views: a descriptor, with which the hardware reads tiles by itself (`_descriptor`), or the
# pointer and the strides of batch, head and token (`_view`).


@triton.jit
def _dot(a, b, acc=None):
    """a @ b (+ acc), summed in float32; float32 operands are multiplied as such, never as tf32."""
    if INTERPRETED:  # NumPy has no bfloat16, and the interpreter would multiply its bits as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _pointers(view, batch_head, num_heads, first, feature, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Pointers to ROWS tokens from `first` and FEATURES features from `feature`. # [ROWS, FEATURES]

    What selects the tile is int64, for tensors of more than 2^31 elements; offsets inside it, int32, save registers.
    """
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)
    start = view[0] + batch * view[1] + head * view[2] + first.to(tl.int64) * view[3]
    return start + (tl.arange(0, ROWS)[:, None] * view[3] + (feature + tl.arange(0, FEATURES))[None, :])


@triton.jit
def _inside(first, length, feature, D: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Which elements of such a tile exist: tokens before the end of the sequence, features that are no padding."""
    return (first + tl.arange(0, ROWS) < length)[:, None] & (feature + tl.arange(0, FEATURES) < D)[None, :]


@triton.jit
def _load_slab(
    view, batch_head, num_heads, first, length, feature, D: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr
):
    """Some features of some tokens; what does not exist reads as zero. # [ROWS, FEATURES]"""
    pointers = _pointers(view, batch_head, num_heads, first, feature, ROWS, FEATURES)
    return tl.load(pointers, mask=_inside(first, length, feature, D, ROWS, FEATURES), other=0.0)


@triton.jit
def _store_slab(
    view,
    batch_head,
    num_heads,
    first,
    length,
    feature,
    tile,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    pointers = _pointers(view, batch_head, num_heads, first, feature, ROWS, FEATURES)
    tl.store(pointers, tile.to(view[0].dtype.element_ty), mask=_inside(first, length, feature, D, ROWS, FEATURES))


@triton.jit
def _load(
    view,
    batch_head,
    num_heads,
    first,
    length,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """All features of some tokens; what does not exist reads as zero. # [ROWS, COLUMNS]"""
    if DESCRIPTORS:
        tile = view.load([batch_head // num_heads, batch_head % num_heads, first, 0]).reshape(ROWS, COLUMNS)
    else:
        tile = _load_slab(view, batch_head, num_heads, first, length, 0, D, ROWS, COLUMNS)
    return tile


@triton.jit
def _exponentials(
    view, bh, num_heads, first, length, feature, top, D: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr
):
    """exp(x - top) of some features of some tokens, 0 for a feature that is padding. # [ROWS, FEATURES]"""
    tokens = _load_slab(view, bh, num_heads, first, length, feature, D, ROWS, FEATURES).to(tl.float32)
    tokens = tl.where((feature + tl.arange(0, FEATURES) < D)[None, :], tokens, float("-inf"))
    return tl.exp2((tokens - top[:, None]) * LOG2_E)


@triton.jit
def _softmax_of_rows(
    view,
    bh,
    num_heads,
    first,
    length,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """What `_load_phi` needs of whole rows where phi is softmax: maximum, 1 / sum of exponentials. # [ROWS], [ROWS]"""
    top = tl.zeros([ROWS], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    if SOFTMAX:
        tokens = _load_slab(view, bh, num_heads, first, length, 0, D, ROWS, COLUMNS).to(tl.float32)
        top = tl.max(tl.where((tl.arange(0, COLUMNS) < D)[None, :], tokens, float("-inf")), 1)
        share = 1 / tl.sum(_exponentials(view, bh, num_heads, first, length, 0, top, D, ROWS, COLUMNS), 1)
    return top, share


@triton.jit
def _load_phi(
    view,
    bh,
    num_heads,
    first,
    length,
    feature,
    top,
    share,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Some features of phi of some tokens: the softmax of what is read, or what is read. # [ROWS, FEATURES]"""
    if SOFTMAX:
        phi = _exponentials(view, bh, num_heads, first, length, feature, top, D, ROWS, FEATURES) * share[:, None]
        phi = tl.where((first + tl.arange(0, ROWS) < length)[:, None], phi, 0.0).to(view[0].dtype.element_ty)
    else:
        phi = _load_slab(view, bh, num_heads, first, length, feature, D, ROWS, FEATURES)
    return phi


@triton.jit
def _state(states, index, COLUMNS: tl.constexpr):
    """Where the state of block `index` begins (see the picture above)."""
    return states + index.to(tl.int64) * ((COLUMNS + 2) * COLUMNS)


@triton.jit
def _state_slab(feature, FEATURES: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of FEATURES rows of a state: states are worked through in slabs that fit the registers."""
    return (feature + tl.arange(0, FEATURES))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _scores(Q, K, first_key, key_length, KEYS: tl.constexpr, PARTIAL: tl.constexpr):
    """Q K^T, not scaled yet; -inf for keys past the end, which only a partial block has. # [ROWS, KEYS]"""
    S = _dot(Q, tl.trans(K))
    if PARTIAL:
        S = tl.where((first_key + tl.arange(0, KEYS) < key_length)[None, :], S, float("-inf"))
    return S


@triton.jit
def _finite(x):
    """1 where x is a number, 0 where it is NaN or infinite."""
    return (tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32)


@triton.jit
def _sound(denominator, sums, COLUMNS: tl.constexpr):
    """The denominators phi(Q_i) Z_i: 0 in a query block without marginal block, NaN if one of them is bad. # [ROWS]"""
    blocks = tl.load(sums + (COLUMNS + 1) * COLUMNS).to(tl.float32)
    bad = tl.load(sums + (COLUMNS + 1) * COLUMNS + 1).to(tl.float32)
    return tl.where(bad > 0, float("nan"), tl.where(blocks > 0, denominator, 0.0))


# --- what the labels say: lists for the sparse branch, weights for the linear branch ----------------------------------


@triton.jit(do_not_specialize=["num_out", "num_in", "out_stride", "in_stride", "capacity"])
def _lists_kernel(
    labels,
    offsets,
    counts,
    indices,
    num_out,
    num_in,
    out_stride,
    in_stride,
    capacity,
    PACKED: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """The critical partners of OUT blocks, ascending: of query blocks along rows of the labels, of key blocks down it.

    A list begins where `offsets` says (PACKED), or every `capacity` entries; then its length goes to `counts`.
    """
    tiles = tl.cdiv(num_out, OUT)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    out = tl.program_id(0) % tiles * OUT + tl.arange(0, OUT)
    labels += head * num_out * num_in
    if PACKED:
        place = tl.load(offsets + head * (num_out + 1) + out, mask=out < num_out, other=0)  # [OUT]
    else:
        place = out * capacity
        capacity *= num_out  # of a head's lists together, as it is where they are packed
    start = place
    for first in range(0, num_in, IN):
        inner = first + tl.arange(0, IN)
        inside = (out < num_out)[:, None] & (inner < num_in)[None, :]
        label = tl.load(labels + (out[:, None] * out_stride + inner[None, :] * in_stride), mask=inside, other=0)
        critical = (label == 1).to(tl.int32)  # [OUT, IN]
        slot = place[:, None] + tl.cumsum(critical, 1) - 1
        partner = tl.broadcast_to(inner[None, :], (OUT, IN))
        tl.store(indices + head * capacity + slot, partner, mask=critical == 1)
        place += tl.sum(critical, 1)
    if not PACKED:
        tl.store(counts + head * num_out + out, place - start, mask=out < num_out)


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "padded_rows", "padded_columns"])
def _weights_kernel(
    labels,
    weights,
    num_query_blocks,
    num_key_blocks,
    padded_rows,
    padded_columns,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
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
        label = tl.load(label_row[:, None] + j[None, :], mask=inside, other=-1)  # [ROWS, TILE]
        count += tl.sum((label == 0).to(tl.int32), 1)
    weight = tl.exp2(-tl.floor(tl.log2(tl.maximum(count, 1).to(tl.float32))))  # [ROWS]
    for first in range(0, padded_columns, TILE):
        j = first + tl.arange(0, TILE)
        inside = (i < num_query_blocks)[:, None] & (j < num_key_blocks)[None, :]
        label = tl.load(label_row[:, None] + j[None, :], mask=inside, other=-1)  # the padding is all zero weights
        tile = tl.where(label == 0, weight[:, None], 0.0)
        tile = tile.to(weights.dtype.element_ty)
        tl.store(weight_row[:, None] + j[None, :], tile, mask=(j < padded_columns)[None, :])


# --- the states of the linear branch and their sums ------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_head", "num_heads", "key_length", "num_key_blocks"])
def _states_kernel(
    phi_key,
    value,
    states,
    first_head,
    num_heads,
    key_length,
    num_key_blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEATURES: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """h_j = phi(K_j)^T V_j and z_j, for one key block. [Alg. 1 L4]"""
    program = tl.program_id(0)
    j = program % num_key_blocks
    bh = first_head + program // num_key_blocks
    first = j * BLOCK_K
    state = _state(states, program, COLUMNS)
    top, share = _softmax_of_rows(phi_key, bh, num_heads, first, key_length, D, BLOCK_K, COLUMNS, SOFTMAX)
    phi = _load_phi(phi_key, bh, num_heads, first, key_length, 0, top, share, D, BLOCK_K, COLUMNS, SOFTMAX)
    columns = tl.arange(0, COLUMNS)
    z = tl.sum(phi.to(tl.float32), 0)  # [COLUMNS]
    # The product that adds states up cannot leave a block out: 0 * NaN is NaN. So what a NaN or Inf has spoilt counts
    # as zero, and the block as bad; the query blocks that it is marginal to turn their rows into NaN.
    good = tl.min(_finite(z), 0)
    z = tl.where(good == 1, z, 0.0)
    tl.store(state + COLUMNS * COLUMNS + columns, z.to(states.dtype.element_ty))
    for column in range(0, COLUMNS, FEATURES):
        V = _load_slab(value, bh, num_heads, first, key_length, column, D, BLOCK_K, FEATURES)  # [BLOCK_K, FEATURES]
        good = tl.minimum(good, tl.min(tl.min(_finite(V), 1), 0))
        h = tl.where(good == 1, _dot(tl.trans(phi), V), 0.0)  # [COLUMNS, FEATURES]
        place = columns[:, None] * COLUMNS + (column + tl.arange(0, FEATURES))[None, :]
        tl.store(state + place, h.to(states.dtype.element_ty))
    counts = tl.where(columns == 0, 1, tl.where(columns == 1, 1 - good, 0)).to(tl.float32)
    tl.store(state + (COLUMNS + 1) * COLUMNS + columns, counts.to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["num_out", "num_in", "head_stride"])
def _sums_kernel(
    weights,
    states,
    sums,
    num_out,
    num_in,
    head_stride,
    out_stride,
    in_stride,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TILE: tl.constexpr,
):
    """weights @ states in exact float32: H_i, Z_i from h_j, z_j [Alg. 1 L13], or back, their gradients [Alg. 2 L14]."""
    program = tl.program_id(0)
    tiles_out = tl.cdiv(num_out, OUT)
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


@triton.jit
def _softmax_step(
    O,
    l,
    m,
    Q,
    key,
    value,
    bh,
    num_heads,
    first_key,
    key_length,
    scale,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """KEYS more keys of a critical block, online: m and l are the maximum and the sum of each row so far. [Eq. 4]"""
    K = _load(key, bh, num_heads, first_key, key_length, D, KEYS, COLUMNS, DESCRIPTORS)  # [KEYS, COLUMNS]
    S = _scores(Q, K, first_key, key_length, KEYS, PARTIAL)  # [ROWS, KEYS] [Alg. 1 L9]
    m_new = tl.maximum(m, tl.max(S, 1) * scale)
    P = tl.exp2(S * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(P, 1)  # [Alg. 1 L10]
    V = _load(value, bh, num_heads, first_key, key_length, D, KEYS, COLUMNS, DESCRIPTORS)  # [KEYS, COLUMNS]
    O = _dot(P.to(V.dtype), V, O * shrink[:, None])  # [Alg. 1 L11]
    return O, l, m_new


@triton.jit(do_not_specialize=["first_head", "num_heads", "query_length", "key_length", "num_query_blocks", "capacity"])
def _forward_kernel(
    query,
    key,
    value,
    phi_query,
    kv_num_blocks,
    kv_indices,
    sums,
    out_sparse,
    out_linear,
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
    DESCRIPTORS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Both branches for ROWS rows of query block i. [Alg. 1 L7-L16]"""
    program = tl.program_id(0)
    block = program // (BLOCK_Q // ROWS)  # counts the query blocks of this launch, head by head
    i = block % num_query_blocks
    bh = first_head + block // num_query_blocks
    first = i * BLOCK_Q + program % (BLOCK_Q // ROWS) * ROWS
    row = first + tl.arange(0, ROWS)

    # Sparse branch: online softmax over the critical blocks. [Eq. 4]
    listed = (bh * num_query_blocks + i).to(tl.int64)
    kv_indices += listed * capacity
    STEPS: tl.constexpr = BLOCK_K // KEYS  # per key block
    num_steps = tl.load(kv_num_blocks + listed) * STEPS
    scale = scale * LOG2_E
    Q = _load(query, bh, num_heads, first, query_length, D, ROWS, COLUMNS, DESCRIPTORS)  # [ROWS, COLUMNS]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    O = tl.zeros([ROWS, COLUMNS], tl.float32)
    # The list ascends, so that only its last block can be the partial one: the others go without a mask.
    for step in range(num_steps - STEPS):
        first_key = tl.load(kv_indices + step // STEPS) * BLOCK_K + step % STEPS * KEYS
        O, l, m = _softmax_step(
            O, l, m, Q, key, value, bh, num_heads, first_key, key_length, scale, D, KEYS, COLUMNS, DESCRIPTORS, False
        )
    for step in range(tl.maximum(num_steps - STEPS, 0), num_steps):
        first_key = tl.load(kv_indices + step // STEPS) * BLOCK_K + step % STEPS * KEYS
        O, l, m = _softmax_step(
            O, l, m, Q, key, value, bh, num_heads, first_key, key_length, scale, D, KEYS, COLUMNS, DESCRIPTORS, True
        )
    l = tl.where(num_steps == 0, 1.0, l)  # no critical block: sparse = 0, lse = -inf
    _store_slab(out_sparse, bh, num_heads, first, query_length, 0, O / l[:, None], D, ROWS, COLUMNS)  # [Alg. 1 L16]
    lse += bh.to(tl.int64) * query_length
    tl.store(lse + row, (m + tl.log2(l)) * LN_2, mask=row < query_length)

    # Linear branch: phi(Q_i) H_i / (phi(Q_i) Z_i). [Eq. 5] [Alg. 1 L16]
    sums = _state(sums, block, COLUMNS)
    O = tl.zeros([ROWS, COLUMNS], tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    top, share = _softmax_of_rows(phi_query, bh, num_heads, first, query_length, D, ROWS, COLUMNS, SOFTMAX)
    # Not pipelined: phi is read by the matrix unit and for the denominator. For such a tile Triton's pipeline (3.6 and
    # 3.7, on sm_90) has one buffer, and fetches the next tile into it while the product of this one is under way.
    for feature in tl.range(0, COLUMNS, FEATURES, num_stages=1):
        phi = _load_phi(phi_query, bh, num_heads, first, query_length, feature, top, share, D, ROWS, FEATURES, SOFTMAX)
        H = tl.load(sums + _state_slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        Z = tl.load(sums + COLUMNS * COLUMNS + feature + tl.arange(0, FEATURES)).to(tl.float32)  # [FEATURES]
        denominator += tl.sum(phi.to(tl.float32) * Z[None, :], 1)
        O = _dot(phi, H, O)
    denominator = _sound(denominator, sums, COLUMNS)
    O = tl.where((denominator == 0)[:, None], 0.0, O / denominator[:, None])
    _store_slab(out_linear, bh, num_heads, first, query_length, 0, O, D, ROWS, COLUMNS)


# --- backward of the sparse branch -----------------------------------------------------------------------------------


@triton.jit
def _dq_step(
    dQ,
    Q,
    dO,
    L,
    delta,
    key,
    value,
    bh,
    num_heads,
    first_key,
    key_length,
    scale,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """What KEYS keys of a critical block add to dQ."""
    K = _load(key, bh, num_heads, first_key, key_length, D, KEYS, COLUMNS, DESCRIPTORS)  # [KEYS, COLUMNS]
    S = _scores(Q, K, first_key, key_length, KEYS, PARTIAL)  # [ROWS, KEYS]
    P = tl.exp2(S * scale - L[:, None])  # [Alg. 2 L9]
    V = _load(value, bh, num_heads, first_key, key_length, D, KEYS, COLUMNS, DESCRIPTORS)  # [KEYS, COLUMNS]
    dP = _dot(dO, tl.trans(V))  # [ROWS, KEYS] [Alg. 2 L11]
    dS = P * (dP - delta[:, None])  # [Alg. 2 L11]
    return _dot(dS.to(K.dtype), K, dQ)  # [Alg. 2 L12]


@triton.jit(do_not_specialize=["num_heads", "query_length", "key_length", "num_query_blocks", "capacity"])
def _backward_dq_kernel(
    query,
    key,
    value,
    grad_sparse,
    kv_num_blocks,
    kv_indices,
    out_sparse,
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
    DESCRIPTORS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """dQ for ROWS rows of query block i, along its list of critical key blocks. [Alg. 2 L12]

    Where phi is softmax, `grad_query` holds the linear branch's share already; it is added to.

    On the way it leaves lse and D^s in scratch that is padded to whole blocks, where `_backward_dkdv_kernel` reads them
    without a mask.
    """
    program = tl.program_id(0)
    block = program // (BLOCK_Q // ROWS)
    i = block % num_query_blocks
    bh = block // num_query_blocks
    first = i * BLOCK_Q + program % (BLOCK_Q // ROWS) * ROWS
    row = first + tl.arange(0, ROWS)

    dO = _load(grad_sparse, bh, num_heads, first, query_length, D, ROWS, COLUMNS, DESCRIPTORS)  # [ROWS, COLUMNS]
    O = _load_slab(out_sparse, bh, num_heads, first, query_length, 0, D, ROWS, COLUMNS)  # [ROWS, COLUMNS]
    delta = tl.sum(dO.to(tl.float32) * O.to(tl.float32), 1)  # D^s, [ROWS] [Alg. 2 L2]
    lse += bh.to(tl.int64) * query_length
    # Past the end lse reads as inf: exp2(S - inf) is no weight.
    L = tl.load(lse + row, mask=row < query_length, other=float("inf")) * LOG2_E  # [ROWS]
    scratch = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(row_lse + scratch, L)
    tl.store(row_delta + scratch, delta)

    kv_indices += block.to(tl.int64) * capacity
    STEPS: tl.constexpr = BLOCK_K // KEYS  # per key block
    num_steps = tl.load(kv_num_blocks + block) * STEPS
    log2_scale = scale * LOG2_E
    Q = _load(query, bh, num_heads, first, query_length, D, ROWS, COLUMNS, DESCRIPTORS)  # [ROWS, COLUMNS]
    dQ = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(num_steps - STEPS):  # all but the last block, as in the forward
        first_key = tl.load(kv_indices + step // STEPS) * BLOCK_K + step % STEPS * KEYS
        dQ = _dq_step(
            dQ, Q, dO, L, delta, key, value, bh, num_heads, first_key, key_length, log2_scale,
            D, KEYS, COLUMNS, DESCRIPTORS, False,
        )  # fmt: skip
    for step in range(tl.maximum(num_steps - STEPS, 0), num_steps):
        first_key = tl.load(kv_indices + step // STEPS) * BLOCK_K + step % STEPS * KEYS
        dQ = _dq_step(
            dQ, Q, dO, L, delta, key, value, bh, num_heads, first_key, key_length, log2_scale,
            D, KEYS, COLUMNS, DESCRIPTORS, True,
        )  # fmt: skip
    dQ *= scale
    if SOFTMAX:
        dQ += _load_slab(grad_query, bh, num_heads, first, query_length, 0, D, ROWS, COLUMNS).to(tl.float32)
    _store_slab(grad_query, bh, num_heads, first, query_length, 0, dQ, D, ROWS, COLUMNS)


@triton.jit(
    do_not_specialize=["num_heads", "query_length", "key_length", "num_query_blocks", "num_key_blocks", "capacity"]
)
def _backward_dkdv_kernel(
    query,
    key,
    value,
    grad_sparse,
    q_offsets,
    q_indices,
    row_lse,
    row_delta,
    grad_key,
    grad_value,
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
    DESCRIPTORS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """dK and the sparse branch's share of dV for KEYS keys of block j, down its list of query blocks. [Alg. 2 L10-L12]

    Scores are held transposed, [KEYS, ROWS], so that each product reads its operands as they lie in memory.
    `grad_value` holds the linear branch's share already, where phi is softmax `grad_key` too; they are added to.
    """
    program = tl.program_id(0)
    block = program // (BLOCK_K // KEYS)
    j = block % num_key_blocks
    bh = block // num_key_blocks
    first_key = j * BLOCK_K + program % (BLOCK_K // KEYS) * KEYS
    row_lse += bh.to(tl.int64) * num_query_blocks * BLOCK_Q
    row_delta += bh.to(tl.int64) * num_query_blocks * BLOCK_Q

    offsets = q_offsets + bh.to(tl.int64) * (num_key_blocks + 1) + j
    start = tl.load(offsets)
    STEPS: tl.constexpr = BLOCK_Q // ROWS  # per query block
    num_steps = (tl.load(offsets + 1) - start) * STEPS
    q_indices += bh.to(tl.int64) * capacity + start
    log2_scale = scale * LOG2_E
    K = _load(key, bh, num_heads, first_key, key_length, D, KEYS, COLUMNS, DESCRIPTORS)  # [KEYS, COLUMNS]
    V = _load(value, bh, num_heads, first_key, key_length, D, KEYS, COLUMNS, DESCRIPTORS)  # [KEYS, COLUMNS]
    dK = tl.zeros([KEYS, COLUMNS], tl.float32)
    dV = tl.zeros([KEYS, COLUMNS], tl.float32)
    for step in range(num_steps):
        first = tl.load(q_indices + step // STEPS) * BLOCK_Q + step % STEPS * ROWS
        row = first + tl.arange(0, ROWS)
        # Keys past the end need no mask here: their rows of K and V are zero and their gradients are not stored.
        Q = _load(query, bh, num_heads, first, query_length, D, ROWS, COLUMNS, DESCRIPTORS)  # [ROWS, COLUMNS]
        S = _dot(K, tl.trans(Q))  # [KEYS, ROWS]
        P = tl.exp2(S * log2_scale - tl.load(row_lse + row)[None, :])  # [Alg. 2 L9]
        dO = _load(grad_sparse, bh, num_heads, first, query_length, D, ROWS, COLUMNS, DESCRIPTORS)  # [ROWS, COLUMNS]
        dV = _dot(P.to(dO.dtype), dO, dV)  # [Alg. 2 L10]
        dP = _dot(V, tl.trans(dO))  # [KEYS, ROWS] [Alg. 2 L11]
        dS = P * (dP - tl.load(row_delta + row)[None, :])  # [Alg. 2 L11]
        dK = _dot(dS.to(Q.dtype), Q, dK)  # [Alg. 2 L12]
    dK *= scale
    if SOFTMAX:
        dK += _load_slab(grad_key, bh, num_heads, first_key, key_length, 0, D, KEYS, COLUMNS).to(tl.float32)
    _store_slab(grad_key, bh, num_heads, first_key, key_length, 0, dK, D, KEYS, COLUMNS)
    dV += _load_slab(grad_value, bh, num_heads, first_key, key_length, 0, D, KEYS, COLUMNS).to(tl.float32)
    _store_slab(grad_value, bh, num_heads, first_key, key_length, 0, dV, D, KEYS, COLUMNS)


# --- backward of the linear branch -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_head", "num_heads", "query_length", "num_query_blocks"])
def _backward_linear_query_kernel(
    phi_query,
    grad_linear,
    out_linear,
    grad_phi_query,
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
    SOFTMAX: tl.constexpr,
):
    """dQ^phi, or its share of dQ where phi is softmax, dH_i and dZ_i for query block i. [Alg. 2 L3-L5]"""
    block = tl.program_id(0)
    i = block % num_query_blocks
    bh = first_head + block // num_query_blocks
    first = i * BLOCK_Q
    sums = _state(sums, block, COLUMNS)
    grad_sums = _state(grad_sums, block, COLUMNS)

    top, share = _softmax_of_rows(phi_query, bh, num_heads, first, query_length, D, BLOCK_Q, COLUMNS, SOFTMAX)
    denominator = tl.zeros([BLOCK_Q], tl.float32)
    for feature in range(0, COLUMNS, FEATURES):
        Z = tl.load(sums + COLUMNS * COLUMNS + feature + tl.arange(0, FEATURES)).to(tl.float32)  # [FEATURES]
        phi = _load_phi(
            phi_query, bh, num_heads, first, query_length, feature, top, share, D, BLOCK_Q, FEATURES, SOFTMAX
        )  # [BLOCK_Q, FEATURES]
        denominator += tl.sum(phi.to(tl.float32) * Z[None, :], 1)
    denominator = _sound(denominator, sums, COLUMNS)
    inverse = tl.where(denominator == 0, 0.0, 1 / denominator)  # no gradient through a row that is zero by definition
    dO = _load_slab(grad_linear, bh, num_heads, first, query_length, 0, D, BLOCK_Q, COLUMNS)  # [BLOCK_Q, COLUMNS]
    O = _load_slab(out_linear, bh, num_heads, first, query_length, 0, D, BLOCK_Q, COLUMNS)  # [BLOCK_Q, COLUMNS]
    delta = tl.sum(dO.to(tl.float32) * O.to(tl.float32), 1)  # D^l, [BLOCK_Q] [Alg. 2 L2]
    for feature in range(0, COLUMNS, FEATURES):
        H = tl.load(sums + _state_slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        row_of_z = COLUMNS * COLUMNS + feature + tl.arange(0, FEATURES)
        Z = tl.load(sums + row_of_z).to(tl.float32)  # [FEATURES]
        dphi = _dot(dO, tl.trans(H)) - delta[:, None] * Z[None, :]  # [Alg. 2 L5], but for the division
        phi = _load_phi(
            phi_query, bh, num_heads, first, query_length, feature, top, share, D, BLOCK_Q, FEATURES, SOFTMAX
        )
        weight = phi.to(tl.float32) * inverse[:, None]  # phi(Q_i) / (phi(Q_i) Z_i), [BLOCK_Q, FEATURES]
        # dx = phi (dphi - phi . dphi), and phi . dphi = 0: O^l is the same for a longer phi(Q).
        dphi *= weight if SOFTMAX else inverse[:, None]
        _store_slab(grad_phi_query, bh, num_heads, first, query_length, feature, dphi, D, BLOCK_Q, FEATURES)

        dH = _dot(tl.trans(weight.to(dO.dtype)), dO)  # [FEATURES, COLUMNS] [Alg. 2 L3]
        dZ = -tl.sum(weight * delta[:, None], 0)  # [FEATURES] [Alg. 2 L4]
        tl.store(grad_sums + _state_slab(feature, FEATURES, COLUMNS), dH.to(grad_sums.dtype.element_ty))
        tl.store(grad_sums + row_of_z, dZ.to(grad_sums.dtype.element_ty))
    counts = (COLUMNS + 1) * COLUMNS + tl.arange(0, COLUMNS)  # they have no gradient
    tl.store(grad_sums + counts, tl.zeros([COLUMNS], grad_sums.dtype.element_ty))


@triton.jit(do_not_specialize=["first_head", "num_heads", "key_length", "num_key_blocks"])
def _backward_linear_key_kernel(
    phi_key,
    value,
    grad_phi_key,
    grad_value,
    grad_states,
    first_head,
    num_heads,
    key_length,
    num_key_blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEATURES: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """dK^phi (its share of dK where phi is softmax) and the share of dV for key block j. [Alg. 2 L16] [Alg. 2 L17]"""
    block = tl.program_id(0)
    j = block % num_key_blocks
    bh = first_head + block // num_key_blocks
    first = j * BLOCK_K
    grad_state = _state(grad_states, block, COLUMNS)
    V = _load_slab(value, bh, num_heads, first, key_length, 0, D, BLOCK_K, COLUMNS)  # [BLOCK_K, COLUMNS]
    top, share = _softmax_of_rows(phi_key, bh, num_heads, first, key_length, D, BLOCK_K, COLUMNS, SOFTMAX)
    dV = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    along = tl.zeros([BLOCK_K], tl.float32)
    for feature in range(0, COLUMNS, FEATURES):
        dh = tl.load(grad_state + _state_slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        dz = tl.load(grad_state + COLUMNS * COLUMNS + feature + tl.arange(0, FEATURES)).to(tl.float32)  # [FEATURES]
        phi = _load_phi(phi_key, bh, num_heads, first, key_length, feature, top, share, D, BLOCK_K, FEATURES, SOFTMAX)
        dV = _dot(phi, dh, dV)  # [Alg. 2 L17]
        along += tl.sum(phi.to(tl.float32) * dz[None, :], 1)
    along += tl.sum(V.to(tl.float32) * dV, 1)  # phi . dphi, [BLOCK_K]
    for feature in range(0, COLUMNS, FEATURES):
        dh = tl.load(grad_state + _state_slab(feature, FEATURES, COLUMNS))  # [FEATURES, COLUMNS]
        dz = tl.load(grad_state + COLUMNS * COLUMNS + feature + tl.arange(0, FEATURES)).to(tl.float32)  # [FEATURES]
        dphi = _dot(V, tl.trans(dh)) + dz[None, :]  # [BLOCK_K, FEATURES] [Alg. 2 L16]
        if SOFTMAX:  # dx = phi (dphi - phi . dphi)
            phi = _load_phi(
                phi_key, bh, num_heads, first, key_length, feature, top, share, D, BLOCK_K, FEATURES, SOFTMAX
            )
            dphi = phi.to(tl.float32) * (dphi - along[:, None])
        _store_slab(grad_phi_key, bh, num_heads, first, key_length, feature, dphi, D, BLOCK_K, FEATURES)
    _store_slab(grad_value, bh, num_heads, first, key_length, 0, dV, D, BLOCK_K, COLUMNS)


# --- launchers -------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How a kernel is cut and started."""

    rows: int = 64
    """query rows at a time"""
    keys: int = 64
    """keys at a time"""
    features: int = 64
    """rows of a state at a time; its columns, in `_states_kernel`"""
    warps: int = 4
    stages: int = 2
    """of the software pipeline: tiles that are on their way from memory"""
    registers: int | None = None
    """per thread at most, where fewer than the compiler would take let two programs share a multiprocessor"""

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


_EXACT = _Tiles(rows=32, keys=32, features=16, stages=1)  # float32: no matrix instruction, every product in registers
_TILES = {
    "states": _Tiles(),
    "forward": _Tiles(),
    "linear_query": _Tiles(),
    "linear_key": _Tiles(),
    "dq": _Tiles(),
    "dkdv": _Tiles(),
    # matrix instructions that read their operands from shared memory: sm_90, sm_100
    "linear_query 64 x 128": _Tiles(warps=8),
    # the same, D over 64: whole rows at a time, so that softmax computes its exponentials once
    "states 128": _Tiles(registers=128),
    "forward 128": _Tiles(features=128),
    "linear_query 128": _Tiles(features=128, warps=8),
    "linear_key 128": _Tiles(features=128, warps=8),
    # the same, query blocks of 128; with all of its rows at once the forward reads K and V half as often
    "forward 128 x 128 sm_90": _Tiles(rows=128, features=128, warps=8, registers=128),
    "linear_query 128 x 128": _Tiles(warps=8),
    "linear_query 128 x 128 sm_90": _Tiles(features=128, warps=16),
    # operands from registers, less shared memory: sm_80, sm_120
    "dkdv small": _Tiles(warps=8),
    "dq small": _Tiles(keys=32),
    "linear_query small": _Tiles(features=32),
    "states 128 small": _Tiles(stages=3),
    "forward 128 small": _Tiles(keys=32, warps=8),
    "linear_key 128 small": _Tiles(warps=8),
    "linear_query 128 small": _Tiles(features=32, warps=8),
}
"""Launch parameters for 16 bits, by kernel, D if over 64, x block_q, architecture: the most special entry counts."""


def _architecture() -> int:
    """90 for sm_90 and so on; 0 in the interpreter."""
    return 0 if _INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def _launch(kernel, programs: int, *args, **options) -> None:
    """Start a kernel on a grid of one axis: the others are limited to 65535 programs."""
    kernel[(programs,)](*args, **options)


def _columns(head_dim: int) -> int:
    """D as the kernels see it: a power of two, and at least what a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _tiles(kernel: str, query: Tensor, block_map: BlockMap) -> _Tiles:
    """The launch parameters of a kernel."""
    architecture, columns = _architecture(), _columns(query.shape[-1])
    if architecture in _LARGE_ARCHITECTURES:
        case = f"{kernel} {columns} x {block_map.block_q}"
        names = [f"{case} sm_{architecture}", case, f"{kernel} {columns}"]
    else:
        names = [f"{kernel} {columns} small", f"{kernel} small"]
    tiles = next(_TILES[name] for name in (*names, kernel) if name in _TILES)
    if query.element_size() == 4 and not _INTERPRETED:
        tiles = _EXACT
    return tiles._replace(
        rows=min(tiles.rows, block_map.block_q),
        keys=min(tiles.keys, block_map.block_k),
        features=min(tiles.features, columns),
    )


def _view(tensor: Tensor) -> tuple:
    """A (B, H, N, D) tensor as kernels take it: pointer, and the strides of batch, head and token.

    Triton compiles one kernel for strides that are multiples of 16 and another for those that are not, and these may
    add up in another order. A view that would get another kernel than its contiguous copy is copied, for equal bits.
    """
    _, heads, length, head_dim = tensor.shape
    strides = _outer_strides(tensor.shape, tensor.stride())
    contiguous = _outer_strides(tensor.shape, (heads * length * head_dim, length * head_dim, head_dim))
    alike = all((a % 16 == 0, a == 1) == (b % 16 == 0, b == 1) for a, b in zip(strides, contiguous, strict=True))
    dense = tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
    if alike and dense and strides[2] < 2**24:  # beyond that a tile of 128 tokens would overflow the int32 inside it
        return (tensor, *strides)
    return (tensor.clone(memory_format=torch.contiguous_format), *contiguous)


def _outer_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(shape[:3], strides[:3], strict=True))


def _descriptors_fit(*tensors: Tensor) -> bool:
    """Whether to let the hardware read tiles of these tensors by descriptor (TMA).

    It wants rows on 16 bytes. It pays where matrix instructions read shared memory themselves; where their operands
    come from registers, as on sm_120, it costs registers.
    """
    if _INTERPRETED or _architecture() not in _LARGE_ARCHITECTURES or tensors[0].element_size() != 2:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(3) == 1
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    block = [1, 1, rows, _columns(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _sparse_views(*tensors_and_rows: tuple[Tensor, int]) -> tuple:
    """What the sparse branch reads its tiles from, given tensors and tokens a tile; last, whether by descriptor."""
    if _descriptors_fit(*(tensor for tensor, _ in tensors_and_rows)):
        return (*(_descriptor(tensor, rows) for tensor, rows in tensors_and_rows), True)
    return (*(_view(tensor) for tensor, _ in tensors_and_rows), False)


def _head_chunks(query: Tensor, block_map: BlockMap, per_query_block: int, tensors: int) -> list[tuple[int, int]]:
    """Cut the B * H heads, as (first, number), so that a chunk's states take the memory of `tensors` queries at most.

    A chunk has one state for each key block, and `per_query_block` for each query block.
    """
    heads = query.shape[0] * query.shape[1]
    num_states = block_map.labels.shape[3] + per_query_block * block_map.labels.shape[2]
    columns = _columns(query.shape[-1])
    size = min(heads, max(1, tensors * query.numel() // (num_states * (columns + 2) * columns)))
    size = math.ceil(heads / math.ceil(heads / size))  # chunks of about one size
    return [(first, min(size, heads - first)) for first in range(0, heads, size)]


def _empty_states(query: Tensor, heads: int, blocks: int) -> Tensor:
    columns = _columns(query.shape[-1])
    return torch.empty(heads, blocks, (columns + 2) * columns, dtype=query.dtype, device=query.device)


def _kv_lists(block_map: BlockMap) -> tuple[Tensor, Tensor]:
    """`kv_num_blocks` and `kv_indices` of the map, in one pass over its labels."""
    labels = block_map.labels.contiguous()
    batch, heads, num_query_blocks, num_key_blocks = labels.shape
    capacity = block_map.max_critical
    counts = torch.empty(batch, heads, num_query_blocks, dtype=torch.int32, device=labels.device)
    indices = torch.empty(batch, heads, num_query_blocks, capacity, dtype=torch.int32, device=labels.device)
    _launch(
        _lists_kernel,
        batch * heads * math.ceil(num_query_blocks / 8),
        labels,
        counts,  # stands in for the offsets, which are not read
        counts,
        indices,
        num_query_blocks,
        num_key_blocks,
        num_key_blocks,
        1,
        capacity,
        PACKED=False,
        OUT=8,
        IN=128,
        num_warps=4,
    )
    return counts, indices


def _q_lists(block_map: BlockMap) -> tuple[Tensor, Tensor]:
    """`q_offsets` and `q_indices` of the map, in one pass over its labels."""
    labels = block_map.labels.contiguous()
    batch, heads, num_query_blocks, num_key_blocks = labels.shape
    offsets = block_map.q_offsets
    capacity = num_query_blocks * block_map.max_critical
    indices = torch.empty(batch, heads, capacity, dtype=torch.int32, device=labels.device)
    _launch(
        _lists_kernel,
        batch * heads * math.ceil(num_key_blocks / 32),
        labels,
        offsets,
        offsets,  # stands in for the counts, which are not written
        indices,
        num_key_blocks,
        num_query_blocks,
        1,
        num_key_blocks,
        capacity,
        PACKED=True,
        OUT=32,
        IN=128,
        num_warps=4,
    )
    return offsets, indices


_SUMS_TILE = 32  # the weights are padded to multiples of this


def _weights(query: Tensor, block_map: BlockMap) -> Tensor:
    """The matrix that adds up states, (B * H, Tq, Tk) padded with zeros to whole tiles. [Alg. 1 L12]"""
    batch, heads, num_query_blocks, num_key_blocks = block_map.labels.shape
    rows, columns = (math.ceil(n / _SUMS_TILE) * _SUMS_TILE for n in (num_query_blocks, num_key_blocks))
    weights = torch.empty(batch * heads, rows, columns, dtype=query.dtype, device=query.device)
    _launch(
        _weights_kernel,
        batch * heads * rows // 8,
        block_map.labels.contiguous(),
        weights,
        num_query_blocks,
        num_key_blocks,
        rows,
        columns,
        ROWS=8,
        TILE=128,
        num_warps=4,
    )
    return weights


def _add_up(weights: Tensor, states: Tensor, sums: Tensor) -> None:
    """sums = weights @ states for the heads of a chunk, by the vendor's product where its float32 sums are certain.

    In float32 torch would follow the user's tf32 setting, so there a kernel of our own does it.
    """
    heads, num_in, size = states.shape
    num_out = sums.shape[1]
    if states.element_size() == 2:
        torch.bmm(weights[:, :num_out, :num_in], states, out=sums)
        return
    tile = 4096 if _INTERPRETED else 128  # in the interpreter a program costs more than an element
    _launch(
        _sums_kernel,
        heads * math.ceil(num_out / _SUMS_TILE) * math.ceil(size / tile),
        weights,
        states,
        sums,
        num_out,
        num_in,
        *weights.stride(),
        SIZE=size,
        OUT=_SUMS_TILE,
        IN=_SUMS_TILE,
        TILE=tile,
        num_warps=4,
    )


def _marginal_sums(
    phi_keys: tuple,
    values: tuple,
    weights: Tensor,
    states: Tensor,
    sums: Tensor,
    first_head: int,
    block_map: BlockMap,
    softmax: bool,
) -> None:
    """h_j, z_j of all key blocks, H_i, Z_i of all query blocks, for the heads of a chunk. [Alg. 1 L4] [Alg. 1 L13]"""
    heads, num_key_blocks, _ = states.shape
    value = values[0]
    tiles = _tiles("states", value, block_map)
    _launch(
        _states_kernel,
        heads * num_key_blocks,
        phi_keys,
        values,
        states,
        first_head,
        value.shape[1],
        value.shape[2],
        num_key_blocks,
        D=value.shape[-1],
        COLUMNS=_columns(value.shape[-1]),
        BLOCK_K=block_map.block_k,
        FEATURES=tiles.features,
        SOFTMAX=softmax,
        **tiles.options,
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
    if (reason := refuses(query, block_map)) is not None:
        return reason
    if _INTERPRETED and query.device.type != "cpu":
        return f"runs in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors, got {query.device}"
    if not _INTERPRETED and query.device.type != "cuda":
        return (
            f"takes CUDA tensors, got {query.device} (TRITON_INTERPRET=1, set before Python starts, runs it on a CPU)"
        )
    return None


def refuses(query: Tensor, block_map: BlockMap) -> str | None:
    """Which dtype or size, if any, the kernels do not take on any device."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    for word, size in (("block_q", block_map.block_q), ("block_k", block_map.block_k)):
        if size not in BLOCK_SIZES:
            return f"takes {word} in {BLOCK_SIZES}, got {size}"
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
    return _forward(query, key, value, phi_query, phi_key, block_map, scale, softmax=False)


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
    inputs = (query, key, value, phi_query, phi_key)
    return _backward(grad_sparse, grad_linear, *inputs, saved, block_map, scale, softmax=False)


def forward_softmax(query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float) -> Saved:
    """`forward` with phi = softmax, made where it is read: phi(Q) and phi(K) are never in memory."""
    return _forward(query, key, value, query, key, block_map, scale, softmax=True)


def backward_softmax(
    grad_sparse: Tensor,
    grad_linear: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    block_map: BlockMap,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that belong to `forward_softmax`, those through phi included."""
    inputs = (query, key, value, query, key)
    return _backward(grad_sparse, grad_linear, *inputs, saved, block_map, scale, softmax=True)[:3]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    block_map: BlockMap,
    scale: float,
    softmax: bool,
) -> Saved:
    num_heads, query_length, head_dim = query.shape[1:]
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    out_sparse = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    out_linear = torch.empty_like(out_sparse)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tiles = _tiles("forward", query, block_map)
    with torch.cuda.device_of(query):
        kv_num_blocks, kv_indices = _kv_lists(block_map)
        weights = _weights(query, block_map)
        chunks = _head_chunks(query, block_map, 1, 4)  # the backward needs more memory than this
        states = _empty_states(query, chunks[0][1], num_key_blocks)
        sums = _empty_states(query, chunks[0][1], num_query_blocks)
        *views, descriptors = _sparse_views((query, tiles.rows), (key, tiles.keys), (value, tiles.keys))
        phi_queries, phi_keys, values, *outputs = map(_view, (phi_query, phi_key, value, out_sparse, out_linear))
        for first_head, heads in chunks:
            _marginal_sums(phi_keys, values, weights, states[:heads], sums[:heads], first_head, block_map, softmax)
            _launch(
                _forward_kernel,
                heads * num_query_blocks * (block_map.block_q // tiles.rows),
                *views,
                phi_queries,
                kv_num_blocks,
                kv_indices,
                sums,
                *outputs,
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
                FEATURES=tiles.features,
                DESCRIPTORS=descriptors,
                SOFTMAX=softmax,
                **tiles.options,
            )
    return Saved(out_sparse, out_linear, lse)


def _backward(
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
    softmax: bool,
) -> Gradients:
    grad_phi_query, grad_phi_key, grad_value = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)
    )
    # Where phi is softmax, its gradients end up in those of query and key: the same tensors.
    grad_query, grad_key = grad_phi_query, grad_phi_key
    with torch.cuda.device_of(query):
        _backward_linear(
            grad_linear,
            phi_query,
            phi_key,
            value,
            saved.out_linear,
            grad_phi_query,
            grad_phi_key,
            grad_value,
            block_map,
            softmax,
        )
        if not softmax:  # the states of the linear branch are gone by now
            grad_query, grad_key = torch.empty_like(grad_phi_query), torch.empty_like(grad_phi_key)
        _backward_sparse(
            grad_sparse, query, key, value, saved, grad_query, grad_key, grad_value, block_map, scale, softmax
        )
    return Gradients(grad_query, grad_key, grad_value, grad_phi_query, grad_phi_key)


def _backward_linear(
    grad_linear: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    value: Tensor,
    out_linear: Tensor,
    grad_phi_query: Tensor,
    grad_phi_key: Tensor,
    grad_value: Tensor,
    block_map: BlockMap,
    softmax: bool,
) -> None:
    """Fills grad_phi_query, grad_phi_key, and grad_value with the linear branch's share."""
    num_heads, query_length, head_dim = phi_query.shape[1:]
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    shape = {"D": head_dim, "COLUMNS": _columns(head_dim)}
    query_tiles, key_tiles = (_tiles(kernel, phi_query, block_map) for kernel in ("linear_query", "linear_key"))
    weights = _weights(phi_query, block_map)
    chunks = _head_chunks(phi_query, block_map, 2, 2)
    states = _empty_states(phi_query, chunks[0][1], num_key_blocks)
    sums = _empty_states(phi_query, chunks[0][1], num_query_blocks)
    grad_sums = torch.empty_like(sums)
    phi_keys, values, *key_outputs = map(_view, (phi_key, value, grad_phi_key, grad_value))
    query_views = tuple(map(_view, (phi_query, grad_linear, out_linear, grad_phi_query)))
    for first_head, heads in chunks:
        _marginal_sums(phi_keys, values, weights, states[:heads], sums[:heads], first_head, block_map, softmax)
        _launch(
            _backward_linear_query_kernel,
            heads * num_query_blocks,
            *query_views,
            sums,
            grad_sums,
            first_head,
            num_heads,
            query_length,
            num_query_blocks,
            BLOCK_Q=block_map.block_q,
            FEATURES=query_tiles.features,
            SOFTMAX=softmax,
            **query_tiles.options,
            **shape,
        )
        grad_states = states[:heads]  # h_j, z_j are no longer needed: their gradients take their place
        _add_up(weights[first_head : first_head + heads].mT, grad_sums[:heads], grad_states)
        _launch(
            _backward_linear_key_kernel,
            heads * num_key_blocks,
            phi_keys,
            values,
            *key_outputs,
            grad_states,
            first_head,
            num_heads,
            value.shape[2],
            num_key_blocks,
            BLOCK_K=block_map.block_k,
            FEATURES=key_tiles.features,
            SOFTMAX=softmax,
            **key_tiles.options,
            **shape,
        )


def _backward_sparse(
    grad_sparse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    block_map: BlockMap,
    scale: float,
    softmax: bool,
) -> None:
    """Fills grad_query and grad_key, or adds to them where phi is softmax, and adds to grad_value."""
    batch, num_heads, query_length, head_dim = query.shape
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    shape = {"D": head_dim, "COLUMNS": _columns(head_dim), "BLOCK_Q": block_map.block_q, "BLOCK_K": block_map.block_k}
    row_lse = torch.empty(
        batch * num_heads, num_query_blocks * block_map.block_q, dtype=torch.float32, device=query.device
    )
    row_delta = torch.empty_like(row_lse)
    tiles = _tiles("dq", query, block_map)
    *views, descriptors = _sparse_views(
        (query, tiles.rows), (key, tiles.keys), (value, tiles.keys), (grad_sparse, tiles.rows)
    )
    _launch(
        _backward_dq_kernel,
        batch * num_heads * num_query_blocks * (block_map.block_q // tiles.rows),
        *views,
        *_kv_lists(block_map),
        _view(saved.out_sparse),
        saved.lse.contiguous(),
        row_lse,
        row_delta,
        _view(grad_query),
        scale,
        num_heads,
        query_length,
        key.shape[2],
        num_query_blocks,
        block_map.max_critical,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        DESCRIPTORS=descriptors,
        SOFTMAX=softmax,
        **tiles.options,
        **shape,
    )
    tiles = _tiles("dkdv", query, block_map)
    *views, descriptors = _sparse_views(
        (query, tiles.rows), (key, tiles.keys), (value, tiles.keys), (grad_sparse, tiles.rows)
    )
    _launch(
        _backward_dkdv_kernel,
        batch * num_heads * num_key_blocks * (block_map.block_k // tiles.keys),
        *views,
        *_q_lists(block_map),
        row_lse,
        row_delta,
        _view(grad_key),
        _view(grad_value),
        scale,
        num_heads,
        query_length,
        key.shape[2],
        num_query_blocks,
        num_key_blocks,
        num_query_blocks * block_map.max_critical,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        DESCRIPTORS=descriptors,
        SOFTMAX=softmax,
        **tiles.options,
        **shape,
    )
