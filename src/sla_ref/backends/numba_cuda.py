r"""Algorithms 1 and 2 as CUDA kernels written in Python, with Numba: the backend `numba`.

The same steps in the same order as in `triton_fused.py`, one level lower: here each thread is programmed by itself, and
shared memory, barriers and registers are named. What one thread block of the forward does, with D = 64:

    global memory            shared memory, filled by all             registers of each of the 128 threads

    query, rows of  ------>  Q   64 x (64 + 1)   \
    block i                                       >-- S = Q K^T --->  S  4 rows x 4 of the 32 keys
    key, 32 tokens  ------>  KV  32 x (64 + 1)   /                    m, l  maximum and sum of the 4 rows
      barrier: nobody needs K any more                |
    value, the same ------>  KV                       v
    32 tokens                P   64 x (32 + 1)  <---- P = exp2(S - m)
      barrier: P and V are complete
                             P, KV  ----------------- O += P V ---->  O  4 rows x 8 of the 64 features
      and so on along the list of critical blocks

Eight threads, the lanes, share four rows; a thread holds every eighth column of them. So every product is one loop,
`_product`, in which a thread reads 4 + 4 numbers of shared memory for 16 multiplications, or 4 + 8 for 32. Rows of
tiles are one number longer than they need be: that puts the numbers which threads read at the same moment into
different banks of shared memory. The spare column is of use: the linear branch keeps z_j beside h_j in it,

    [h_j | z_j] = phi(K_j)^T [V_j | 1]                           `_states_kernel`       one state per key block
    [H_i | Z_i] = sum over the marginal j of [h_j | z_j]         `_add_up`              one matrix product, by torch

and the backward of this is the same two steps from queries to keys, with [dO | -D^l] / (phi(Q_i) Z_i) for [V_j | 1].

    with D = 64, blocks 64 x 64     one thread block for              barriers              threads  registers  shared
    `_states_kernel`                a state (64 of its features)      2 for 32 tokens, 1 more   128        128   16640
    `_forward_kernel`               64 rows of a query block          4 for 32 keys             128        168   35712
    `_backward_linear_query_kernel` 64 rows of a query block          2 for 32 features         128        112   27264
    `_backward_linear_key_kernel`   64 keys of a key block            2 for 32 features, twice  128        128   24960
    `_backward_dq_kernel`           32 rows of a query block          5 for 32 keys              64        168   30336
    `_backward_dkdv_kernel`         32 keys of a key block            3 for 32 rows              64        160   41728

Registers are those of a thread, shared memory is in bytes. `sla-ref kernels --backend numba --target sm_90` read both
from what NVVM 13.5 makes; no kernel has a stack.

Kernels compute in float32; other dtypes are converted on the way in and out, at the price of copies. Numba would see a
bfloat16 of torch as two bytes without a meaning. Indices are int64, as always in Numba. There are no atomics and every
sum has a fixed order, so results repeat bit for bit. One-letter names are those of the glossary in `sla_ref.reference`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numba import config, cuda, float32, int32, types  # the only import of Numba; its CUDA target is numba-cuda
from torch import Tensor

from ..block_map import MARGINAL, BlockMap
from ..protocol import Gradients, Saved

name = "numba"

SIMULATED = bool(config.ENABLE_CUDASIM)  # NUMBA_ENABLE_CUDASIM=1, read by Numba when it is imported

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
MAX_HEADS = 65535  # batch * heads is the second axis of the grids, which has no more
STATIC_SHARED_MEMORY = 48 * 1024
"""Bytes of shared memory that a thread block may declare on every CUDA GPU."""

HEIGHT = 4  # rows that a thread works on
LANES = 8  # threads that work on the same rows, each on every eighth column
LANE_STRIDE = LANES + 1

# A literal such as 0.0 is float64 to Numba, and draws all that it meets into float64.
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(math.inf)
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))


# --- device helpers --------------------------------------------------------------------------------------------------
# Called by all threads of a block. Loops over constant bounds are unrolled and small local arrays become registers.


@cuda.jit(device=True)
def _first_row():
    """The first of the HEIGHT rows of a tile that belong to this thread."""
    return cuda.threadIdx.x // LANES * HEIGHT


@cuda.jit(device=True)
def _lane():
    """The first column that belongs to this thread; the others follow at distances of LANES."""
    return cuda.threadIdx.x % LANES


@cuda.jit(device=True)
def _load(tile, array, head, first, column):
    """Rows from `first` and columns from `column` of one head into shared memory; what does not exist reads as zero.

    The spare column is left alone. A warp reads 4 runs of 8 neighbours, 32 bytes each: whole sectors of the memory.
    """
    n = cuda.threadIdx.x // LANES
    while n < tile.shape[0]:
        for c in range(tile.shape[1] // LANES):
            d = _lane() + LANES * c
            inside = first + n < array.shape[1] and column + d < array.shape[2]
            tile[n, d] = array[head, first + n, column + d] if inside else ZERO
        n += cuda.blockDim.x // LANES


@cuda.jit(device=True)
def _load_state(tile, states, head, block, feature):
    """The same for rows from `feature` of a state, with z in the spare column."""
    state, spare = states[head], tile.shape[1] - 1
    _load(tile, state, block, feature, 0)
    n = cuda.threadIdx.x
    if n < tile.shape[0]:
        tile[n, spare] = state[block, feature + n, spare] if feature + n < spare else ZERO


@cuda.jit(device=True)
def _fetch(acc, array, head, first):
    """What `_store` stores, back into registers."""
    for r in range(HEIGHT):
        for c in range(acc.shape[1]):
            n, d = first + _first_row() + r, _lane() + LANES * c
            inside = n < array.shape[1] and d < array.shape[2]
            acc[r, c] = array[head, n, d] if inside else ZERO


@cuda.jit(device=True)
def _store(array, head, first, column, acc):
    """The registers of all threads to the rows from `first` and columns from `column` of one head."""
    for r in range(HEIGHT):
        for c in range(acc.shape[1]):
            n, d = first + _first_row() + r, column + _lane() + LANES * c
            if n < array.shape[1] and d < array.shape[2]:
                array[head, n, d] = acc[r, c]


@cuda.jit(device=True)
def _clear(acc):
    for r in range(HEIGHT):
        for c in range(acc.shape[1]):
            acc[r, c] = ZERO


@cuda.jit(device=True)
def _product(acc, A, B, depth):
    """acc += A^T B, for A (depth, rows) and B (depth, columns) in shared memory; each number read is used 4 times."""
    row, lane = _first_row(), _lane()
    for k in range(depth):
        for r in range(HEIGHT):
            a = A[k, row + r]
            for c in range(acc.shape[1]):
                acc[r, c] += a * B[k, lane + LANES * c]


@cuda.jit(device=True)
def _product_spare(acc, A, B, depth):
    """The same for the spare column of B alone: acc (HEIGHT) += A^T B[:, -1]. Lanes repeat each other's work."""
    row, spare = _first_row(), B.shape[1] - 1
    for k in range(depth):
        for r in range(HEIGHT):
            acc[r] += A[k, row + r] * B[k, spare]


@cuda.jit(device=True)
def _sum_lanes(partial, values):
    """values (HEIGHT), added up over the lanes. `partial` may be used again after another barrier, not before."""
    row, lane = _first_row(), _lane()
    for r in range(HEIGHT):
        partial[row + r, lane] = values[r]
    cuda.syncthreads()
    for r in range(HEIGHT):
        values[r] = partial[row + r, 0]
        for other in range(1, LANES):
            values[r] += partial[row + r, other]


@cuda.jit(device=True)
def _max_lanes(partial, values):
    """The same with the maximum; a NaN is passed over."""
    row, lane = _first_row(), _lane()
    for r in range(HEIGHT):
        partial[row + r, lane] = values[r]
    cuda.syncthreads()
    for r in range(HEIGHT):
        for other in range(LANES):
            values[r] = max(values[r], partial[row + r, other])


# --- the states of the linear branch ---------------------------------------------------------------------------------
# A kernel needs the sizes of its shared and local arrays when it is compiled: each is made by a function of them.
# Arguments are (heads, N, D) for tokens, (heads, N) for a number each, (heads, T, COLUMNS, COLUMNS + 1) for states.


@functools.cache
def _states_kernel(COLUMNS: int, ROWS: int, TOKENS: int, BLOCK: int) -> Any:
    """[h_j | z_j] = phi(K_j)^T [V_j | 1] for ROWS features of one key block. [Alg. 1 L4]

    With [dO | -D^l] / (phi(Q_i) Z_i) for [V_j | 1], and queries for keys, [dH_i | dZ_i]. [Alg. 2 L3] [Alg. 2 L4]

    The product that adds states up cannot leave a block out: 0 * NaN is NaN. So a part of a state with a NaN or Inf
    is written as zeros, and counts in `broken`, (heads, T, SLABS).
    """
    SLABS = math.ceil(COLUMNS / ROWS)
    WIDTH, STRIDE, ROW_STRIDE = COLUMNS // LANES, COLUMNS + 1, ROWS + 1

    @cuda.jit
    def states(features, values, spare, out, broken):
        phi = cuda.shared.array((TOKENS, ROW_STRIDE), float32)
        V = cuda.shared.array((TOKENS, STRIDE), float32)
        h = cuda.local.array((HEIGHT, WIDTH), float32)
        z = cuda.local.array(HEIGHT, float32)
        feature = cuda.blockIdx.x % SLABS * ROWS
        head, j = cuda.blockIdx.y, cuda.blockIdx.x // SLABS
        thread = cuda.threadIdx.x

        _clear(h)
        for r in range(HEIGHT):
            z[r] = ZERO
        for first in range(j * BLOCK, min((j + 1) * BLOCK, features.shape[1]), TOKENS):
            cuda.syncthreads()  # nobody reads the last tiles any more
            _load(phi, features, head, first, feature)
            _load(V, values, head, first, 0)
            if thread < TOKENS:
                V[thread, COLUMNS] = spare[head, first + thread] if first + thread < spare.shape[1] else ZERO
            cuda.syncthreads()
            _product(h, phi, V, TOKENS)
            _product_spare(z, phi, V, TOKENS)
        finite = True
        for r in range(HEIGHT):
            finite = finite and math.isfinite(z[r])
            for c in range(WIDTH):
                finite = finite and math.isfinite(h[r, c])
        some = cuda.syncthreads_or(int32(not finite))  # a barrier that tells every thread whether one said yes
        if some:
            _clear(h)
            for r in range(HEIGHT):
                z[r] = ZERO
        if thread == 0:
            broken[head, j, cuda.blockIdx.x % SLABS] = ONE if some else ZERO
        _store(out[head], j, feature, 0, h)
        for r in range(HEIGHT):
            row = feature + _first_row() + r
            if row < COLUMNS and _lane() == 0:
                out[head, j, row, COLUMNS] = z[r]

    return states


# --- forward ---------------------------------------------------------------------------------------------------------


@functools.cache
def _forward_kernel(COLUMNS: int, ROWS: int, KEYS: int, BLOCK_Q: int, BLOCK_K: int) -> Any:
    """Both branches for ROWS rows of query block i. [Alg. 1 L7-L16]"""
    PARTS = BLOCK_Q // ROWS  # thread blocks that share a query block
    STEPS = BLOCK_K // KEYS  # tiles of a key block
    WIDTH, KEY_WIDTH = COLUMNS // LANES, KEYS // LANES
    STRIDE, KEY_STRIDE = COLUMNS + 1, KEYS + 1

    @cuda.jit
    def forward(
        query, key, value, phi_query, kv_num_blocks, kv_indices, num_marginal, sums, out_sparse, out_linear, lse, scale
    ):
        Q = cuda.shared.array((ROWS, STRIDE), float32)
        KV = cuda.shared.array((KEYS, STRIDE), float32)
        P = cuda.shared.array((ROWS, KEY_STRIDE), float32)
        partial = cuda.shared.array((ROWS, LANE_STRIDE), float32)
        O = cuda.local.array((HEIGHT, WIDTH), float32)
        S = cuda.local.array((HEIGHT, KEY_WIDTH), float32)
        m = cuda.local.array(HEIGHT, float32)
        l = cuda.local.array(HEIGHT, float32)  # of this thread's keys alone, until the end
        highest = cuda.local.array(HEIGHT, float32)
        denominator = cuda.local.array(HEIGHT, float32)
        head, i = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = i * BLOCK_Q + cuda.blockIdx.x % PARTS * ROWS
        row, lane = _first_row(), _lane()

        # Sparse branch: online softmax over the critical blocks. [Eq. 4]
        num_steps = kv_num_blocks[head, i] * STEPS
        log2_scale = scale * LOG2_E
        _load(Q, query, head, first, 0)
        _clear(O)
        for r in range(HEIGHT):
            m[r] = -INFINITY
            l[r] = ZERO
        for step in range(num_steps):
            first_key = kv_indices[head, i, step // STEPS] * BLOCK_K + step % STEPS * KEYS
            cuda.syncthreads()  # nobody needs the last V and P any more
            _load(KV, key, head, first_key, 0)
            cuda.syncthreads()  # all of K is there
            _clear(S)
            _product(S, Q.T, KV.T, COLUMNS)  # [Alg. 1 L9]
            for r in range(HEIGHT):
                highest[r] = -INFINITY
                for c in range(KEY_WIDTH):
                    inside = first_key + lane + LANES * c < key.shape[1]
                    S[r, c] = S[r, c] * log2_scale if inside else -INFINITY
                    highest[r] = max(highest[r], S[r, c])
            _max_lanes(partial, highest)  # its barrier is also the one after which K may go
            _load(KV, value, head, first_key, 0)
            for r in range(HEIGHT):
                highest[r] = max(highest[r], m[r])
                base = highest[r] if highest[r] > -INFINITY else ZERO  # -inf - -inf would be NaN
                shrink = math.exp2(m[r] - base)
                m[r] = highest[r]
                l[r] *= shrink  # [Alg. 1 L10]
                for c in range(KEY_WIDTH):
                    S[r, c] = math.exp2(S[r, c] - base)  # P from here on
                    l[r] += S[r, c]
                    P[row + r, lane + LANES * c] = S[r, c]
                for c in range(WIDTH):
                    O[r, c] *= shrink  # [Alg. 1 L11]
            cuda.syncthreads()  # all of V and P is there
            _product(O, P.T, KV, KEYS)  # [Alg. 1 L11]
        _sum_lanes(partial, l)
        for r in range(HEIGHT):
            inverse = ONE / l[r]
            for c in range(WIDTH):
                O[r, c] = O[r, c] * inverse if num_steps > 0 else ZERO  # [Alg. 1 L16]
            if lane == 0 and first + row + r < query.shape[1]:
                lse[head, first + row + r] = -INFINITY if l[r] == ZERO else (m[r] + math.log2(l[r])) * LN_2
        _store(out_sparse, head, first, 0, O)

        # Linear branch: phi(Q_i) H_i / (phi(Q_i) Z_i), KEYS rows of [H_i | Z_i] at a time. [Eq. 5] [Alg. 1 L16]
        cuda.syncthreads()  # nobody needs Q any more
        _load(Q, phi_query, head, first, 0)
        _clear(O)
        for r in range(HEIGHT):
            denominator[r] = ZERO
        for feature in range(0, COLUMNS, KEYS):
            cuda.syncthreads()  # nobody needs the last of V or H any more
            _load_state(KV, sums, head, i, feature)
            cuda.syncthreads()
            depth = min(KEYS, COLUMNS - feature)
            _product(O, Q.T[feature:], KV, depth)
            _product_spare(denominator, Q.T[feature:], KV, depth)
        for r in range(HEIGHT):
            defined = num_marginal[head, i] > 0 and denominator[r] != ZERO  # a NaN is unequal, and goes on
            inverse = ONE / denominator[r] if defined else ZERO
            for c in range(WIDTH):
                O[r, c] = O[r, c] * inverse if defined else ZERO
        _store(out_linear, head, first, 0, O)

    return forward


# --- backward of the sparse branch -----------------------------------------------------------------------------------


@functools.cache
def _backward_dq_kernel(COLUMNS: int, ROWS: int, KEYS: int, BLOCK_Q: int, BLOCK_K: int) -> Any:
    """dQ for ROWS rows of query block i, along its list of critical key blocks. [Alg. 2 L12]

    On the way it leaves D^s in `delta`, where `_backward_dkdv_kernel` reads it.
    """
    PARTS = BLOCK_Q // ROWS
    STEPS = BLOCK_K // KEYS
    WIDTH, KEY_WIDTH = COLUMNS // LANES, KEYS // LANES
    STRIDE, KEY_STRIDE = COLUMNS + 1, KEYS + 1

    @cuda.jit
    def backward_dq(
        query, key, value, grad_sparse, out_sparse, lse, kv_num_blocks, kv_indices, delta, grad_query, scale
    ):
        Q = cuda.shared.array((ROWS, STRIDE), float32)
        dO = cuda.shared.array((ROWS, STRIDE), float32)
        KV = cuda.shared.array((KEYS, STRIDE), float32)
        dS = cuda.shared.array((ROWS, KEY_STRIDE), float32)
        partial = cuda.shared.array((ROWS, LANE_STRIDE), float32)
        dQ = cuda.local.array((HEIGHT, WIDTH), float32)
        S = cuda.local.array((HEIGHT, KEY_WIDTH), float32)
        dP = cuda.local.array((HEIGHT, KEY_WIDTH), float32)
        L = cuda.local.array(HEIGHT, float32)
        Ds = cuda.local.array(HEIGHT, float32)
        head, i = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = i * BLOCK_Q + cuda.blockIdx.x % PARTS * ROWS
        row, lane = _first_row(), _lane()

        _load(Q, query, head, first, 0)
        _load(dO, grad_sparse, head, first, 0)
        for r in range(HEIGHT):
            n = first + row + r
            Ds[r] = ZERO
            L[r] = INFINITY  # past the end: exp2(S - inf) is no weight
            if n < query.shape[1]:
                L[r] = lse[head, n] * LOG2_E
                for d in range(lane, query.shape[2], LANES):
                    Ds[r] += grad_sparse[head, n, d] * out_sparse[head, n, d]
        _sum_lanes(partial, Ds)  # [Alg. 2 L2]
        for r in range(HEIGHT):
            if lane == 0 and first + row + r < query.shape[1]:
                delta[head, first + row + r] = Ds[r]

        log2_scale = scale * LOG2_E
        _clear(dQ)
        for step in range(kv_num_blocks[head, i] * STEPS):
            first_key = kv_indices[head, i, step // STEPS] * BLOCK_K + step % STEPS * KEYS
            cuda.syncthreads()  # nobody needs the last K and dS any more
            _load(KV, value, head, first_key, 0)
            cuda.syncthreads()
            _clear(dP)
            _product(dP, dO.T, KV.T, COLUMNS)  # [Alg. 2 L11]
            cuda.syncthreads()  # nobody needs V any more
            _load(KV, key, head, first_key, 0)
            cuda.syncthreads()
            _clear(S)
            _product(S, Q.T, KV.T, COLUMNS)
            for r in range(HEIGHT):
                for c in range(KEY_WIDTH):
                    inside = first_key + lane + LANES * c < key.shape[1]
                    P = math.exp2(S[r, c] * log2_scale - L[r]) if inside else ZERO  # [Alg. 2 L9]
                    dS[row + r, lane + LANES * c] = P * (dP[r, c] - Ds[r])  # [Alg. 2 L11]
            cuda.syncthreads()  # all of dS is there
            _product(dQ, dS.T, KV, KEYS)  # [Alg. 2 L12]
        for r in range(HEIGHT):
            for c in range(WIDTH):
                dQ[r, c] *= scale
        _store(grad_query, head, first, 0, dQ)

    return backward_dq


@functools.cache
def _backward_dkdv_kernel(COLUMNS: int, ROWS: int, KEYS: int, BLOCK_Q: int, BLOCK_K: int) -> Any:
    """dK and the sparse branch's share of dV for KEYS keys of block j, down its list of query blocks. [Alg. 2 L10-L12]

    Keys are the rows here: scores are held transposed, (KEYS, ROWS). `grad_value` holds the linear branch's share
    already; it is added to.
    """
    PARTS = BLOCK_K // KEYS
    STEPS = BLOCK_Q // ROWS
    WIDTH, QUERY_WIDTH = COLUMNS // LANES, ROWS // LANES
    STRIDE, ROW_STRIDE = COLUMNS + 1, ROWS + 1

    @cuda.jit
    def backward_dkdv(query, key, value, grad_sparse, lse, delta, q_offsets, q_indices, grad_key, grad_value, scale):
        K = cuda.shared.array((KEYS, STRIDE), float32)
        V = cuda.shared.array((KEYS, STRIDE), float32)
        Q = cuda.shared.array((ROWS, STRIDE), float32)
        dO = cuda.shared.array((ROWS, STRIDE), float32)
        P = cuda.shared.array((KEYS, ROW_STRIDE), float32)
        dS = cuda.shared.array((KEYS, ROW_STRIDE), float32)
        dK = cuda.local.array((HEIGHT, WIDTH), float32)
        dV = cuda.local.array((HEIGHT, WIDTH), float32)
        S = cuda.local.array((HEIGHT, QUERY_WIDTH), float32)
        dP = cuda.local.array((HEIGHT, QUERY_WIDTH), float32)
        head, j = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first_key = j * BLOCK_K + cuda.blockIdx.x % PARTS * KEYS
        row, lane = _first_row(), _lane()

        log2_scale = scale * LOG2_E
        start = q_offsets[head, j]
        _load(K, key, head, first_key, 0)
        _load(V, value, head, first_key, 0)
        _clear(dK)
        _fetch(dV, grad_value, head, first_key)
        for step in range((q_offsets[head, j + 1] - start) * STEPS):
            first = q_indices[head, start + step // STEPS] * BLOCK_Q + step % STEPS * ROWS
            cuda.syncthreads()  # nobody needs the last Q, dO, P and dS any more
            _load(Q, query, head, first, 0)
            _load(dO, grad_sparse, head, first, 0)
            cuda.syncthreads()
            _clear(S)
            _product(S, K.T, Q.T, COLUMNS)
            _clear(dP)
            _product(dP, V.T, dO.T, COLUMNS)  # [Alg. 2 L11]
            for c in range(QUERY_WIDTH):
                n = first + lane + LANES * c
                L = lse[head, n] * LOG2_E if n < query.shape[1] else INFINITY
                Ds = delta[head, n] if n < query.shape[1] else ZERO
                for r in range(HEIGHT):
                    # Keys past the end are zeros, and exp2(0 - L) may overflow; their gradients are not stored.
                    inside = first_key + row + r < key.shape[1]
                    weight = math.exp2(S[r, c] * log2_scale - L) if inside else ZERO  # [Alg. 2 L9]
                    P[row + r, lane + LANES * c] = weight
                    dS[row + r, lane + LANES * c] = weight * (dP[r, c] - Ds)  # [Alg. 2 L11]
            cuda.syncthreads()  # all of P and dS is there
            _product(dV, P.T, dO, ROWS)  # [Alg. 2 L10]
            _product(dK, dS.T, Q, ROWS)  # [Alg. 2 L12]
        for r in range(HEIGHT):
            for c in range(WIDTH):
                dK[r, c] *= scale
        _store(grad_key, head, first_key, 0, dK)
        _store(grad_value, head, first_key, 0, dV)

    return backward_dkdv


# --- backward of the linear branch -----------------------------------------------------------------------------------


@functools.cache
def _backward_linear_query_kernel(COLUMNS: int, ROWS: int, FEATURES: int, BLOCK_Q: int) -> Any:
    """dQ^phi = [dO | -D^l] [H_i | Z_i]^T / (phi(Q_i) Z_i) for ROWS rows of query block i. [Alg. 2 L5]

    It leaves [dO | -D^l] / (phi(Q_i) Z_i) in `share` and `share_spare`; `_states_kernel` makes dH_i and dZ_i from it.
    """
    PARTS = BLOCK_Q // ROWS
    WIDTH, STRIDE = FEATURES // LANES, COLUMNS + 1

    @cuda.jit
    def backward_linear_query(
        phi_query, grad_linear, out_linear, num_marginal, sums, share, share_spare, grad_phi_query
    ):
        dO = cuda.shared.array((ROWS, STRIDE), float32)
        H = cuda.shared.array((FEATURES, STRIDE), float32)
        partial = cuda.shared.array((ROWS, LANE_STRIDE), float32)
        dphi = cuda.local.array((HEIGHT, WIDTH), float32)
        denominator = cuda.local.array(HEIGHT, float32)
        Dl = cuda.local.array(HEIGHT, float32)
        head, i = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = i * BLOCK_Q + cuda.blockIdx.x % PARTS * ROWS
        row, lane = _first_row(), _lane()

        _load(dO, grad_linear, head, first, 0)
        for r in range(HEIGHT):
            n = first + row + r
            denominator[r] = ZERO
            Dl[r] = ZERO
            if n < phi_query.shape[1]:
                for d in range(lane, phi_query.shape[2], LANES):
                    denominator[r] += phi_query[head, n, d] * sums[head, i, d, COLUMNS]
                    Dl[r] += grad_linear[head, n, d] * out_linear[head, n, d]
        _sum_lanes(partial, denominator)
        cuda.syncthreads()
        _sum_lanes(partial, Dl)  # [Alg. 2 L2]
        for r in range(HEIGHT):
            n = first + row + r
            # No gradient through a row that is zero by definition.
            defined = num_marginal[head, i] > 0 and denominator[r] != ZERO
            inverse = ONE / denominator[r] if defined else ZERO
            for d in range(lane, COLUMNS, LANES):
                dO[row + r, d] *= inverse
                if n < share.shape[1] and d < share.shape[2]:
                    share[head, n, d] = dO[row + r, d]
            if lane == 0:
                dO[row + r, COLUMNS] = -Dl[r] * inverse
                if n < share.shape[1]:
                    share_spare[head, n] = -Dl[r] * inverse
        for feature in range(0, COLUMNS, FEATURES):
            cuda.syncthreads()  # nobody needs the last of H any more; dO is complete
            _load_state(H, sums, head, i, feature)
            cuda.syncthreads()
            _clear(dphi)
            _product(dphi, dO.T, H.T, COLUMNS + 1)  # [Alg. 2 L5]
            _store(grad_phi_query, head, first, feature, dphi)

    return backward_linear_query


@functools.cache
def _backward_linear_key_kernel(COLUMNS: int, ROWS: int, FEATURES: int, BLOCK_K: int) -> Any:
    """dK^phi, and the linear branch's share of dV, for ROWS keys of block j. [Alg. 2 L16] [Alg. 2 L17]"""
    PARTS = BLOCK_K // ROWS
    WIDTH, FEATURE_WIDTH, STRIDE = COLUMNS // LANES, FEATURES // LANES, COLUMNS + 1

    @cuda.jit
    def backward_linear_key(phi_key, value, grad_states, grad_phi_key, grad_value):
        tokens = cuda.shared.array((ROWS, STRIDE), float32)  # of V, then of phi(K)
        dh = cuda.shared.array((FEATURES, STRIDE), float32)  # and dz
        dphi = cuda.local.array((HEIGHT, FEATURE_WIDTH), float32)
        dV = cuda.local.array((HEIGHT, WIDTH), float32)
        head, j = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = j * BLOCK_K + cuda.blockIdx.x % PARTS * ROWS
        thread = cuda.threadIdx.x

        _load(tokens, value, head, first, 0)
        if thread < ROWS:
            tokens[thread, COLUMNS] = ONE
        for feature in range(0, COLUMNS, FEATURES):
            cuda.syncthreads()  # nobody needs the last of dh any more; V is complete
            _load_state(dh, grad_states, head, j, feature)
            cuda.syncthreads()
            _clear(dphi)
            _product(dphi, tokens.T, dh.T, COLUMNS + 1)  # [V | 1] [dh | dz]^T [Alg. 2 L16]
            _store(grad_phi_key, head, first, feature, dphi)
        cuda.syncthreads()  # nobody needs V any more
        _load(tokens, phi_key, head, first, 0)
        _clear(dV)
        for feature in range(0, COLUMNS, FEATURES):
            cuda.syncthreads()
            _load_state(dh, grad_states, head, j, feature)
            cuda.syncthreads()
            _product(dV, tokens.T[feature:], dh, min(FEATURES, COLUMNS - feature))  # [Alg. 2 L17]
        _store(grad_value, head, first, 0, dV)

    return backward_linear_key


# --- launchers -------------------------------------------------------------------------------------------------------

_TILES = {
    "states": ((64, 32), (64, 32)),
    "forward": ((64, 32), (32, 32)),
    "linear": ((64, 32), (32, 32)),
    "dq": ((32, 32), (32, 16)),
    "dkdv": ((32, 32), (16, 16)),
}
"""Rows of a thread block, and the rows of the tiles that it walks over, for D up to 64 and for more.

Rows give the threads, LANES / HEIGHT for each; both together give the shared memory, which must not pass 48 KB.
"""


def _columns(head_dim: int) -> int:
    """D as the kernels see it: a multiple of LANES."""
    return math.ceil(head_dim / LANES) * LANES


def _tile(kernel: str, columns: int, rows_at_most: int, others_at_most: int) -> tuple[int, int]:
    rows, others = _TILES[kernel][columns > 64]
    return min(rows, rows_at_most), min(others, others_at_most)


def _launch(kernel: Any, grid: tuple[int, int], rows: int, *args: Tensor | np.float32) -> None:
    """Start a kernel on a grid of (thread blocks of a head, heads), on torch's current stream.

    Numba reads torch's tensors in place, by the CUDA array interface; in the simulator they are NumPy arrays.
    """
    if SIMULATED:
        arrays = [arg.numpy() if isinstance(arg, Tensor) else arg for arg in args]
        kernel[grid, threads(rows)](*arrays)
        return
    key = kernel, torch.cuda.current_device()
    if key not in _specialized:
        _specialized[key] = kernel.specialize(
            *(cuda.as_cuda_array(arg, sync=False) if isinstance(arg, Tensor) else arg for arg in args)
        )
    stream = torch.cuda.current_stream().cuda_stream
    _specialized[key][grid, threads(rows), cuda.external_stream(stream) if stream else 0](*args)


_specialized: dict[tuple[Any, int], Any] = {}
"""Kernels compiled for their types of arguments, by kernel and device. A kernel has the same types in every call; not
to look at them again saves a third of the time that Python takes to start one.
"""


def threads(rows: int) -> int:
    """Threads of a thread block that works on this many rows."""
    return rows // HEIGHT * LANES


def signature(args: tuple[Tensor | np.float32, ...]) -> tuple:
    """Numba's types of a kernel's arguments, as it finds them itself when it starts one."""
    elements = {torch.float32: float32, torch.int32: int32}
    return tuple(types.Array(elements[a.dtype], a.dim(), "C") if isinstance(a, Tensor) else float32 for a in args)


def _flat(tensor: Tensor) -> Tensor:
    """(B, H, N, ...) of any dtype and strides -> (B * H, N, ...), float32 and contiguous."""
    return tensor.detach().to(torch.float32).contiguous().flatten(0, 1)


def _head_chunks(query: Tensor, block_map: BlockMap, per_query_block: int, tensors: int) -> list[slice]:
    """Cut the B * H heads so that a chunk's states take the memory of `tensors` float32 queries at most.

    A chunk has one state for each key block, and `per_query_block` for each query block.
    """
    heads = query.shape[0] * query.shape[1]
    num_states = block_map.labels.shape[3] + per_query_block * block_map.labels.shape[2]
    columns = _columns(query.shape[-1])
    size = min(heads, max(1, tensors * query.numel() // (num_states * (columns + 1) * columns)))
    size = math.ceil(heads / math.ceil(heads / size))  # chunks of about one size
    return [slice(first, min(first + size, heads)) for first in range(0, heads, size)]


_precision_lock = threading.Lock()


@contextmanager
def _float32_products() -> Iterator[None]:
    """Inside, torch multiplies float32 as such, whatever the user's tf32 switch says: states are no tf32 numbers.

    The switch is one for all threads; the lock keeps two of ours from restoring each other's setting.
    """
    settings = torch.backends.cuda.matmul
    with _precision_lock:
        before, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


def _block_states(features: Tensor, values: Tensor, spare: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(G, N, D), (G, N, D), (G, N) -> features^T [values | spare] of each block, (G, T, COLUMNS, COLUMNS + 1).

    And where there were NaN or Inf instead, (G, T, parts of a state).
    """
    heads, length, head_dim = features.shape
    columns, num_blocks = _columns(head_dim), math.ceil(length / block)
    rows, tokens = _tile("states", columns, 16 if columns <= 16 else 32 if columns % 64 else 64, block)
    parts = math.ceil(columns / rows)
    states = torch.empty(heads, num_blocks, columns, columns + 1, dtype=torch.float32, device=features.device)
    broken = torch.empty(heads, num_blocks, parts, dtype=torch.float32, device=features.device)
    kernel = _states_kernel(columns, rows, tokens, block)
    _launch(kernel, (num_blocks * parts, heads), rows, features, values, spare, states, broken)
    return states, broken


def _add_up(member: Tensor, states: Tensor, broken: Tensor) -> Tensor:
    """For each row of the 0/1 `member` (G, Ti, Tj), the sum of the states with a 1; NaN if one of them is broken.

    [Alg. 1 L13] [Alg. 2 L14]
    """
    with _float32_products():
        sums = torch.bmm(member, states.flatten(2)).unflatten(2, states.shape[2:])
        spoilt = torch.bmm(member, broken).sum(-1) > 0  # (G, Ti)
    return sums.masked_fill_(spoilt[..., None, None], math.nan)


def _marginal(block_map: BlockMap) -> tuple[Tensor, Tensor]:
    """1 where a block is marginal, else 0, (B * H, Tq, Tk) float32; how many are in a row, int32. [Alg. 1 L12]"""
    member = (block_map.labels == MARGINAL).flatten(0, 1)
    return member.float(), member.sum(-1, dtype=torch.int32)


# --- the protocol's functions ----------------------------------------------------------------------------------------


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None if it can."""
    if SIMULATED:
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA GPU is usable here; to run the kernels very slowly on the CPU, in Numba's simulator, "
            "set NUMBA_ENABLE_CUDASIM=1 in the environment before Python starts; on a machine with one: "
            "pip install 'sla-ref[numba]'"
        )
    if (error := _compiler_error()) is not None:
        return f"Numba cannot compile for CUDA here ({error}): pip install 'sla-ref[numba]'"
    return None


@functools.cache
def _compiler_error() -> str | None:
    """What keeps Numba from its driver or from NVIDIA's compiler library, which the wheels of torch do not bring."""
    try:
        cuda.current_context()
        cuda.cudadrv.nvvm.NVVM()
    except Exception as error:  # Numba raises errors of many classes here
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def unsupported(query: Tensor, block_map: BlockMap) -> str | None:
    """Why this backend cannot take this input; None if it can."""
    if (reason := refuses(query, block_map)) is not None:
        return reason
    if SIMULATED and query.device.type != "cpu":
        return f"runs in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), which takes CPU tensors, got {query.device}"
    if not SIMULATED and query.device.type != "cuda":
        return (
            f"takes CUDA tensors, got {query.device} "
            "(NUMBA_ENABLE_CUDASIM=1, set before Python starts, runs it on a CPU)"
        )
    return None


def refuses(query: Tensor, block_map: BlockMap) -> str | None:
    """Which dtype or size, if any, the kernels do not take on any device."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if query.shape[0] * query.shape[1] > MAX_HEADS:
        return f"takes batch * heads up to {MAX_HEADS}, got {query.shape[0] * query.shape[1]}"
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
    columns, num_query_blocks = _columns(query.shape[-1]), block_map.labels.shape[2]
    rows, keys = _tile("forward", columns, block_map.block_q, block_map.block_k)
    kernel = _forward_kernel(columns, rows, keys, block_map.block_q, block_map.block_k)
    with torch.cuda.device_of(query):
        Q, K, V, phi_Q, phi_K = map(_flat, (query, key, value, phi_query, phi_key))
        num_blocks, indices = block_map.kv_num_blocks.flatten(0, 1), block_map.kv_indices.flatten(0, 1)
        member, num_marginal = _marginal(block_map)
        out_sparse, out_linear = torch.empty_like(Q), torch.empty_like(Q)
        lse = torch.empty(Q.shape[:2], dtype=torch.float32, device=query.device)
        ones = torch.ones(K.shape[:2], dtype=torch.float32, device=query.device)
        for heads in _head_chunks(query, block_map, 1, 4):
            states = _block_states(phi_K[heads], V[heads], ones[heads], block_map.block_k)
            sums = _add_up(member[heads], *states)
            lists = (num_blocks[heads], indices[heads], num_marginal[heads])
            outputs = (out_sparse[heads], out_linear[heads], lse[heads])
            _launch(
                kernel,
                (num_query_blocks * (block_map.block_q // rows), len(sums)),
                rows,
                *(tokens[heads] for tokens in (Q, K, V, phi_Q)),
                *lists,
                sums,
                *outputs,
                np.float32(scale),
            )
    out_sparse, out_linear = (out.view(query.shape).to(query.dtype) for out in (out_sparse, out_linear))
    return Saved(out_sparse, out_linear, lse.view(query.shape[:3]))


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
    with torch.cuda.device_of(query):
        V = _flat(value)
        dphi_Q, dphi_K, dV = _backward_linear(
            _flat(grad_linear), _flat(phi_query), _flat(phi_key), V, _flat(saved.out_linear), query, block_map
        )
        dQ, dK = _backward_sparse(
            _flat(grad_sparse),
            _flat(query),
            _flat(key),
            V,
            _flat(saved.out_sparse),
            _flat(saved.lse),
            dV,
            block_map,
            scale,
        )
    results = zip((dQ, dK, dV, dphi_Q, dphi_K), (query, key, value, phi_query, phi_key), strict=True)
    return Gradients(*(result.view(tensor.shape).to(tensor.dtype) for result, tensor in results))


def _backward_linear(
    dO: Tensor, phi_Q: Tensor, phi_K: Tensor, V: Tensor, O: Tensor, query: Tensor, block_map: BlockMap
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ^phi, dK^phi and the linear branch's share of dV; arguments and results as `_flat` makes them."""
    columns, (num_query_blocks, num_key_blocks) = _columns(V.shape[-1]), block_map.labels.shape[2:]
    query_rows, query_features = _tile("linear", columns, block_map.block_q, columns)
    query_kernel = _backward_linear_query_kernel(columns, query_rows, query_features, block_map.block_q)
    key_rows, key_features = _tile("linear", columns, block_map.block_k, columns)
    key_kernel = _backward_linear_key_kernel(columns, key_rows, key_features, block_map.block_k)
    member, num_marginal = _marginal(block_map)
    ones = torch.ones(V.shape[:2], dtype=torch.float32, device=V.device)
    dphi_Q, dphi_K, dV = torch.empty_like(phi_Q), torch.empty_like(phi_K), torch.empty_like(V)
    for heads in _head_chunks(query, block_map, 2, 4):
        states = _block_states(phi_K[heads], V[heads], ones[heads], block_map.block_k)
        sums = _add_up(member[heads], *states)
        share = torch.empty_like(dO[heads])
        share_spare = torch.empty(share.shape[:2], dtype=torch.float32, device=share.device)
        _launch(
            query_kernel,
            (num_query_blocks * (block_map.block_q // query_rows), len(sums)),
            query_rows,
            *(tokens[heads] for tokens in (phi_Q, dO, O)),
            num_marginal[heads],
            sums,
            share,
            share_spare,
            dphi_Q[heads],
        )
        grad_sums = _block_states(phi_Q[heads], share, share_spare, block_map.block_q)
        grad_states = _add_up(member[heads].mT, *grad_sums)
        _launch(
            key_kernel,
            (num_key_blocks * (block_map.block_k // key_rows), len(sums)),
            key_rows,
            *(tokens[heads] for tokens in (phi_K, V)),
            grad_states,
            *(tokens[heads] for tokens in (dphi_K, dV)),
        )
    return dphi_Q, dphi_K, dV


def _backward_sparse(
    dO: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,
    lse: Tensor,
    dV: Tensor,
    block_map: BlockMap,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dQ and dK; adds the sparse branch's share to dV. Arguments and results as `_flat` makes them."""
    columns, (num_query_blocks, num_key_blocks) = _columns(Q.shape[-1]), block_map.labels.shape[2:]
    blocks = (block_map.block_q, block_map.block_k)
    dQ, dK, delta = torch.empty_like(Q), torch.empty_like(K), torch.empty_like(lse)
    rows, keys = _tile("dq", columns, *blocks)
    _launch(
        _backward_dq_kernel(columns, rows, keys, *blocks),
        (num_query_blocks * (block_map.block_q // rows), len(Q)),
        rows,
        *(Q, K, V, dO, O, lse),
        block_map.kv_num_blocks.flatten(0, 1),
        block_map.kv_indices.flatten(0, 1),
        delta,
        dQ,
        np.float32(scale),
    )
    keys, rows = _tile("dkdv", columns, block_map.block_k, block_map.block_q)
    _launch(
        _backward_dkdv_kernel(columns, rows, keys, *blocks),
        (num_key_blocks * (block_map.block_k // keys), len(K)),
        keys,
        *(Q, K, V, dO, lse, delta),
        block_map.q_offsets.flatten(0, 1),
        block_map.q_indices.flatten(0, 1),
        dK,
        dV,
        np.float32(scale),
    )
    return dQ, dK
