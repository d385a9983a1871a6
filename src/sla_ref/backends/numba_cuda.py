r"""Algorithms 1 and 2 as CUDA kernels written in Python, with Numba: the backend `numba`.

The steps, their order and the names of the kernels are those of the backend `triton`. Numba is one level lower: each
thread is programmed by itself, and shared memory, barriers and registers have names. With D = 64, one thread block of
the forward does this:

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

Eight threads, the lanes, share four rows, and each of them holds every eighth column. So every product is one loop,
`product`, in which a thread reads 4 + 4 numbers from shared memory for 16 multiplications, or 4 + 8 for 32. The rows of
a tile have one column to spare. It puts the numbers that threads read at the same moment into different banks of shared
memory. The linear branch also keeps z_j there, next to h_j:

    [h_j | z_j] = phi(K_j)^T [V_j | 1]                           `states_kernel`        one state per key block
    [H_i | Z_i] = sum over the marginal j of [h_j | z_j]         `add_up`               one matrix product, by torch

The way back is the same two steps from queries to keys, with [dO | -D^l] / (phi(Q_i) Z_i) for [V_j | 1].

    with D = 64, blocks 64 x 64     one thread block for              barriers              threads  registers  shared
    `states_kernel`                 a state (64 of its features)      2 for 32 tokens, 1 more   128        128   16640
    `forward_kernel`                64 rows of a query block          4 for 32 keys             128        168   35712
    `dq_kernel`                     32 rows of a query block          5 for 32 keys              64        168   30336
    `dkdv_kernel`                   32 keys of a key block            3 for 32 rows              64        160   41728
    `grad_sums_kernel`              64 rows of a query block          2 for 32 features         128        112   27264
    `grad_keys_kernel`              64 keys of a key block            2 for 32 features, twice  128        128   24960

Registers are those of a thread; shared memory is in bytes. `sla-ref kernels --backend numba --target sm_90` reads both
from what NVVM 13.5 makes. No kernel has a stack.

Kernels compute in float32. Other dtypes are converted on the way in and out, at the price of copies, because Numba sees
torch's bfloat16 as two bytes without a meaning. Indices are int64, as always in Numba. There are no atomics and every
sum has a fixed order, so results repeat bit for bit. One-letter names are those of the glossary in `sla_ref.reference`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, cuda, float32, int32  # the only import of Numba; its CUDA target is numba-cuda
from torch import Tensor

from ..block_map import MARGINAL, BlockMap
from ..protocol import Gradients, Inputs, Saved

name = "numba"
softmax_inside = False

SIMULATED = bool(config.ENABLE_CUDASIM)  # NUMBA_ENABLE_CUDASIM=1, read by Numba when it is imported

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
MAX_HEADS = 65535  # batch * heads is the second axis of the grids, which has no more
STATIC_SHARED_MEMORY = 48 * 1024
"""Bytes of shared memory that a thread block may declare on every CUDA GPU."""

HEIGHT = 4  # rows that a thread works on
LANES = 8  # threads that work on the same rows, each on every eighth column
LANE_STRIDE = LANES + 1

# A literal such as 0.0 is float64 to Numba, and makes what it is combined with float64, too.
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(math.inf)
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
SMALLEST_DENOMINATOR = np.float32(2.0**-96)  # a smaller one counts as zero, as in the specification


# --- starting a kernel -----------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel, compiled for the sizes of its shared and local arrays, and what its grid follows from."""

    function: Any
    parts: int
    """thread blocks that share a query block, a key block or a state"""
    rows: int
    """rows of it that each of them works on"""

    @property
    def name(self) -> str:
        """What it makes."""
        return self.function.py_func.__name__

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return self.rows // HEIGHT * LANES


class Launcher:
    """Starts kernels on torch's current stream. Another one, set by `launch_with`, may watch or only compile them."""

    def __init__(self) -> None:
        self.specialized: dict[tuple[Any, int], Any] = {}
        """Kernels compiled for their types of arguments, by kernel and device. A kernel has the same types in every
        call; not looking at them again saves a third of the time that Python needs to start one.
        """

    def start(self, kernel: Kernel, grid: tuple[int, int], *args: Tensor | np.float32) -> None:
        """Numba reads torch's tensors in place, by the CUDA array interface; in the simulator as NumPy arrays."""
        if SIMULATED:
            arrays = [arg.numpy() if isinstance(arg, Tensor) else arg for arg in args]
            kernel.function[grid, kernel.threads](*arrays)
            return
        key = kernel.function, torch.cuda.current_device()
        if key not in self.specialized:
            self.specialized[key] = kernel.function.specialize(
                *(cuda.as_cuda_array(arg, sync=False) if isinstance(arg, Tensor) else arg for arg in args)
            )
        stream = torch.cuda.current_stream().cuda_stream
        self.specialized[key][grid, kernel.threads, cuda.external_stream(stream) if stream else 0](*args)


_launcher = Launcher()


@contextmanager
def launch_with(launcher: Launcher) -> Iterator[None]:
    """Inside the `with`, this launcher starts all kernels of the process."""
    global _launcher
    outer, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = outer


def start(kernel: Kernel, num_blocks: int, *args: Tensor | np.float32) -> None:
    """Start a kernel for `num_blocks` blocks of all heads of the first argument, (heads, N, ...)."""
    heads = len(args[0])  # type: ignore[arg-type]
    _launcher.start(kernel, (num_blocks * kernel.parts, heads), *args)


def columns_of(tokens: Tensor) -> int:
    """D as the kernels see it: a multiple of LANES."""
    return math.ceil(tokens.shape[-1] / LANES) * LANES


def flat(tensor: Tensor | None) -> Tensor:
    """(B, H, N, ...) of any dtype and strides -> (B * H, N, ...), float32 and contiguous."""
    assert tensor is not None  # phi is given, as softmax_inside is False
    return tensor.detach().to(torch.float32).contiguous().flatten(0, 1)


# --- device helpers --------------------------------------------------------------------------------------------------
# All threads of a thread block call them. Loops over constant bounds are unrolled, and small local arrays become
# registers.


@cuda.jit(device=True)
def row_of_thread():
    """The first of the HEIGHT rows of a tile that belong to this thread."""
    return cuda.threadIdx.x // LANES * HEIGHT


@cuda.jit(device=True)
def lane_of_thread():
    """The first column that belongs to this thread; the others follow at distances of LANES."""
    return cuda.threadIdx.x % LANES


@cuda.jit(device=True)
def load(tile, array, head, first, column):
    """Rows from `first` and columns from `column` of one head go into shared memory. What does not exist reads as zero.

    The spare column stays as it is. A warp reads 4 runs of 8 neighbours, 32 bytes each: whole sectors of the memory.
    """
    n = cuda.threadIdx.x // LANES
    while n < tile.shape[0]:
        for c in range(tile.shape[1] // LANES):
            d = lane_of_thread() + LANES * c
            inside = first + n < array.shape[1] and column + d < array.shape[2]
            tile[n, d] = array[head, first + n, column + d] if inside else ZERO
        n += cuda.blockDim.x // LANES


@cuda.jit(device=True)
def load_state(tile, states, head, block, feature):
    """The same for rows from `feature` of a block's state, with z in the spare column.

    Such a tile has at most 32 rows, and a thread block at least as many threads.
    """
    state, spare = states[head], tile.shape[1] - 1
    load(tile, state, block, feature, 0)
    n = cuda.threadIdx.x
    if n < tile.shape[0]:
        tile[n, spare] = state[block, feature + n, spare] if feature + n < spare else ZERO


@cuda.jit(device=True)
def fetch(acc, array, head, first):
    """Read back into registers what `store` has written."""
    for r in range(HEIGHT):
        for c in range(acc.shape[1]):
            n, d = first + row_of_thread() + r, lane_of_thread() + LANES * c
            inside = n < array.shape[1] and d < array.shape[2]
            acc[r, c] = array[head, n, d] if inside else ZERO


@cuda.jit(device=True)
def store(array, head, first, column, acc):
    """Write the registers of all threads to the rows from `first` and columns from `column` of one head."""
    for r in range(HEIGHT):
        for c in range(acc.shape[1]):
            n, d = first + row_of_thread() + r, column + lane_of_thread() + LANES * c
            if n < array.shape[1] and d < array.shape[2]:
                array[head, n, d] = acc[r, c]


@cuda.jit(device=True)
def clear(acc):
    """Set registers to zero."""
    for r in range(HEIGHT):
        for c in range(acc.shape[1]):
            acc[r, c] = ZERO


@cuda.jit(device=True)
def product(acc, A, B, depth):
    """acc += A^T B, for A (depth, rows) and B (depth, columns) in shared memory; each number read is used 4 times."""
    row, lane = row_of_thread(), lane_of_thread()
    for k in range(depth):
        for r in range(HEIGHT):
            a = A[k, row + r]
            for c in range(acc.shape[1]):
                acc[r, c] += a * B[k, lane + LANES * c]


@cuda.jit(device=True)
def product_spare(acc, A, B, depth):
    """The same for the spare column of B: acc (HEIGHT) += A^T B[:, -1]. Each lane does the work of all."""
    row, spare = row_of_thread(), B.shape[1] - 1
    for k in range(depth):
        for r in range(HEIGHT):
            acc[r] += A[k, row + r] * B[k, spare]


@cuda.jit(device=True)
def sum_lanes(partial, values):
    """Add up `values` (HEIGHT) over the lanes. `partial` may be used again only after another barrier."""
    row, lane = row_of_thread(), lane_of_thread()
    for r in range(HEIGHT):
        partial[row + r, lane] = values[r]
    cuda.syncthreads()
    for r in range(HEIGHT):
        values[r] = partial[row + r, 0]
        for other in range(1, LANES):
            values[r] += partial[row + r, other]


@cuda.jit(device=True)
def max_lanes(partial, values):
    """The same with the maximum, which passes over a NaN."""
    row, lane = row_of_thread(), lane_of_thread()
    for r in range(HEIGHT):
        partial[row + r, lane] = values[r]
    cuda.syncthreads()
    for r in range(HEIGHT):
        for other in range(LANES):
            values[r] = max(values[r], partial[row + r, other])


# --- both branches: the forward --------------------------------------------------------------------------------------
# A kernel needs the sizes of its shared and local arrays when it is compiled, so each kernel is made by a function of
# them. Its arguments are tokens (heads, N, D), a number for each token (heads, N), index lists as in `BlockMap` but for
# (heads, ...), and states (heads, T, COLUMNS, COLUMNS + 1). Rows and tiles are as large as shared memory allows.


@functools.cache
def forward_kernel(COLUMNS: int, BLOCK_Q: int, BLOCK_K: int) -> Kernel:
    """Both branches for ROWS rows of query block i. [Alg. 1 L7-L16]"""
    ROWS, KEYS = min(64 if COLUMNS <= 64 else 32, BLOCK_Q), min(32, BLOCK_K)
    PARTS, STEPS = BLOCK_Q // ROWS, BLOCK_K // KEYS  # thread blocks of a query block, tiles of a key block
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
        l = cuda.local.array(HEIGHT, float32)  # over this thread's keys, until the end
        highest = cuda.local.array(HEIGHT, float32)
        denominator = cuda.local.array(HEIGHT, float32)
        head, i = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = i * BLOCK_Q + cuda.blockIdx.x % PARTS * ROWS
        row, lane = row_of_thread(), lane_of_thread()

        # Sparse branch: online softmax over the critical blocks.
        num_steps = kv_num_blocks[head, i] * STEPS
        log2_scale = scale * LOG2_E
        load(Q, query, head, first, 0)
        clear(O)
        for r in range(HEIGHT):
            m[r] = -INFINITY
            l[r] = ZERO
        for step in range(num_steps):
            first_key = kv_indices[head, i, step // STEPS] * BLOCK_K + step % STEPS * KEYS
            cuda.syncthreads()  # nobody needs the last V and P any more
            load(KV, key, head, first_key, 0)
            cuda.syncthreads()  # all of K is there
            clear(S)
            product(S, Q.T, KV.T, COLUMNS)  # [Eq. 4] [Alg. 1 L9]
            for r in range(HEIGHT):
                highest[r] = -INFINITY
                for c in range(KEY_WIDTH):
                    inside = first_key + lane + LANES * c < key.shape[1]
                    S[r, c] = S[r, c] * log2_scale if inside else -INFINITY
                    highest[r] = max(highest[r], S[r, c])
            max_lanes(partial, highest)  # its barrier is also the one after which K may go
            load(KV, value, head, first_key, 0)
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
            product(O, P.T, KV, KEYS)  # [Eq. 4] [Alg. 1 L11]
        sum_lanes(partial, l)
        for r in range(HEIGHT):
            inverse = ONE / l[r] if num_steps > 0 else ZERO  # without a critical block O^s is zero, and so is O
            for c in range(WIDTH):
                O[r, c] *= inverse  # [Alg. 1 L16]
            if lane == 0 and first + row + r < query.shape[1]:
                lse[head, first + row + r] = -INFINITY if l[r] == ZERO else (m[r] + math.log2(l[r])) * LN_2
        store(out_sparse, head, first, 0, O)

        # Linear branch: phi(Q_i) H_i / (phi(Q_i) Z_i), KEYS rows of [H_i | Z_i] at a time.
        cuda.syncthreads()  # nobody needs Q any more
        load(Q, phi_query, head, first, 0)
        clear(O)
        for r in range(HEIGHT):
            denominator[r] = ZERO
        for feature in range(0, COLUMNS, KEYS):
            cuda.syncthreads()  # nobody needs the last of V or H any more
            load_state(KV, sums, head, i, feature)
            cuda.syncthreads()
            depth = min(KEYS, COLUMNS - feature)
            product(O, Q.T[feature:], KV, depth)  # [Eq. 5]
            product_spare(denominator, Q.T[feature:], KV, depth)
        for r in range(HEIGHT):
            # A NaN is not smaller than anything, and goes on.
            defined = num_marginal[head, i] > 0 and not abs(denominator[r]) < SMALLEST_DENOMINATOR
            inverse = ONE / denominator[r] if defined else ZERO
            for c in range(WIDTH):
                O[r, c] = O[r, c] * inverse if defined else ZERO  # [Alg. 1 L16]
        store(out_linear, head, first, 0, O)

    return Kernel(forward, PARTS, ROWS)


# --- sparse branch: its gradients ------------------------------------------------------------------------------------


@functools.cache
def dq_kernel(COLUMNS: int, BLOCK_Q: int, BLOCK_K: int) -> Kernel:
    """dQ for ROWS rows of query block i, along its list of critical key blocks. [Alg. 2 L12]

    It leaves D^s - dL in `row_Ds`, where `dkdv_kernel` reads it. With a gradient dL of lse, dS = P (dP - (D^s - dL)).
    """
    ROWS, KEYS = min(32, BLOCK_Q), min(32 if COLUMNS <= 64 else 16, BLOCK_K)
    PARTS, STEPS = BLOCK_Q // ROWS, BLOCK_K // KEYS
    WIDTH, KEY_WIDTH = COLUMNS // LANES, KEYS // LANES
    STRIDE, KEY_STRIDE = COLUMNS + 1, KEYS + 1

    @cuda.jit
    def dq(
        query, key, value, grad_sparse, out_sparse, lse, grad_lse, kv_num_blocks, kv_indices, row_Ds, grad_query, scale
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
        row, lane = row_of_thread(), lane_of_thread()

        load(Q, query, head, first, 0)
        load(dO, grad_sparse, head, first, 0)
        for r in range(HEIGHT):
            n = first + row + r
            Ds[r] = ZERO
            L[r] = INFINITY  # past the end: exp2(S - inf) is 0
            if n < query.shape[1]:
                L[r] = lse[head, n] * LOG2_E
                for d in range(lane, query.shape[2], LANES):
                    Ds[r] += grad_sparse[head, n, d] * out_sparse[head, n, d]
        sum_lanes(partial, Ds)  # [Alg. 2 L2]
        for r in range(HEIGHT):
            n = first + row + r
            if n < query.shape[1]:
                Ds[r] -= grad_lse[head, n]
                if lane == 0:
                    row_Ds[head, n] = Ds[r]

        log2_scale = scale * LOG2_E
        clear(dQ)
        for step in range(kv_num_blocks[head, i] * STEPS):
            first_key = kv_indices[head, i, step // STEPS] * BLOCK_K + step % STEPS * KEYS
            cuda.syncthreads()  # nobody needs the last K and dS any more
            load(KV, value, head, first_key, 0)
            cuda.syncthreads()
            clear(dP)
            product(dP, dO.T, KV.T, COLUMNS)  # [Alg. 2 L11]
            cuda.syncthreads()  # nobody needs V any more
            load(KV, key, head, first_key, 0)
            cuda.syncthreads()
            clear(S)
            product(S, Q.T, KV.T, COLUMNS)
            for r in range(HEIGHT):
                for c in range(KEY_WIDTH):
                    inside = first_key + lane + LANES * c < key.shape[1]
                    P = math.exp2(S[r, c] * log2_scale - L[r]) if inside else ZERO  # [Alg. 2 L9]
                    dS[row + r, lane + LANES * c] = P * (dP[r, c] - Ds[r])  # [Alg. 2 L11]
            cuda.syncthreads()  # all of dS is there
            product(dQ, dS.T, KV, KEYS)  # [Alg. 2 L12]
        for r in range(HEIGHT):
            for c in range(WIDTH):
                dQ[r, c] *= scale
        store(grad_query, head, first, 0, dQ)

    return Kernel(dq, PARTS, ROWS)


@functools.cache
def dkdv_kernel(COLUMNS: int, BLOCK_Q: int, BLOCK_K: int) -> Kernel:
    """dK and the sparse branch's share of dV for KEYS keys of block j, down its list of query blocks. [Alg. 2 L10-L12]

    A thread's rows are keys here, so scores are held transposed, (KEYS, ROWS). `grad_value` already holds the linear
    branch's share, and this kernel adds to it.
    """
    ROWS, KEYS = (min(32 if COLUMNS <= 64 else 16, block) for block in (BLOCK_Q, BLOCK_K))
    PARTS, STEPS = BLOCK_K // KEYS, BLOCK_Q // ROWS
    WIDTH, QUERY_WIDTH = COLUMNS // LANES, ROWS // LANES
    STRIDE, ROW_STRIDE = COLUMNS + 1, ROWS + 1

    @cuda.jit
    def dkdv(query, key, value, grad_sparse, lse, row_Ds, q_offsets, q_indices, grad_key, grad_value, scale):
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
        row, lane = row_of_thread(), lane_of_thread()

        log2_scale = scale * LOG2_E
        start = q_offsets[head, j]
        load(K, key, head, first_key, 0)
        load(V, value, head, first_key, 0)
        clear(dK)
        fetch(dV, grad_value, head, first_key)
        for step in range((q_offsets[head, j + 1] - start) * STEPS):
            first = q_indices[head, start + step // STEPS] * BLOCK_Q + step % STEPS * ROWS
            cuda.syncthreads()  # nobody needs the last Q, dO, P and dS any more
            load(Q, query, head, first, 0)
            load(dO, grad_sparse, head, first, 0)
            cuda.syncthreads()
            clear(S)
            product(S, K.T, Q.T, COLUMNS)
            clear(dP)
            product(dP, V.T, dO.T, COLUMNS)  # [Alg. 2 L11]
            for c in range(QUERY_WIDTH):
                n = first + lane + LANES * c
                L = lse[head, n] * LOG2_E if n < query.shape[1] else INFINITY
                Ds = row_Ds[head, n] if n < query.shape[1] else ZERO
                for r in range(HEIGHT):
                    # Keys past the end are zeros, and exp2(0 - L) may overflow.
                    inside = first_key + row + r < key.shape[1]
                    weight = math.exp2(S[r, c] * log2_scale - L) if inside else ZERO  # [Alg. 2 L9]
                    P[row + r, lane + LANES * c] = weight
                    dS[row + r, lane + LANES * c] = weight * (dP[r, c] - Ds)  # [Alg. 2 L11]
            cuda.syncthreads()  # all of P and dS is there
            product(dV, P.T, dO, ROWS)  # [Alg. 2 L10]
            product(dK, dS.T, Q, ROWS)  # [Alg. 2 L12]
        for r in range(HEIGHT):
            for c in range(WIDTH):
                dK[r, c] *= scale
        store(grad_key, head, first_key, 0, dK)
        store(grad_value, head, first_key, 0, dV)

    return Kernel(dkdv, PARTS, KEYS)


def sparse_backward(
    grad_sparse: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved, dV: Tensor
) -> tuple[Tensor, Tensor]:
    """dQ and dK, as `flat` makes them; adds the sparse branch's share to dV."""
    block_map, scale = inputs.block_map, np.float32(inputs.scale)
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    sizes = (columns_of(inputs.query), block_map.block_q, block_map.block_k)
    lists = (block_map.kv_num_blocks, block_map.kv_indices, block_map.q_offsets, block_map.q_indices)
    kv_num_blocks, kv_indices, q_offsets, q_indices = (each.flatten(0, 1) for each in lists)
    Q, K, V, dO, O, L = map(flat, (*inputs[:3], grad_sparse, saved.out_sparse, saved.lse))
    dL = torch.zeros_like(L) if grad_lse is None else flat(grad_lse)
    dQ, dK, Ds = map(torch.empty_like, (Q, K, L))
    start(dq_kernel(*sizes), num_query_blocks, Q, K, V, dO, O, L, dL, kv_num_blocks, kv_indices, Ds, dQ, scale)
    start(dkdv_kernel(*sizes), num_key_blocks, Q, K, V, dO, L, Ds, q_offsets, q_indices, dK, dV, scale)
    return dQ, dK


# --- linear branch: states, their sums, and the gradients of both ----------------------------------------------------


@functools.cache
def states_kernel(COLUMNS: int, BLOCK: int) -> Kernel:
    """[h_j | z_j] = phi(K_j)^T [V_j | 1] for FEATURES rows of the state of one key block. [Alg. 1 L4]

    With queries for keys and [dO | -D^l] / (phi(Q_i) Z_i) for [V_j | 1] it is [dH_i | dZ_i]. [Alg. 2 L3] [Alg. 2 L4]

    The product that adds up states cannot leave a block out: 0 * NaN is NaN. So a part of a state with a NaN or Inf is
    written as zeros, and marked in `broken` (heads, T, PARTS).
    """
    FEATURES = 16 if COLUMNS <= 16 else 32 if COLUMNS % 64 else 64
    TOKENS, PARTS = min(32, BLOCK), math.ceil(COLUMNS / FEATURES)
    WIDTH, STRIDE, FEATURE_STRIDE = COLUMNS // LANES, COLUMNS + 1, FEATURES + 1

    @cuda.jit
    def states(features, values, spare, out, broken):
        phi = cuda.shared.array((TOKENS, FEATURE_STRIDE), float32)
        V = cuda.shared.array((TOKENS, STRIDE), float32)
        h = cuda.local.array((HEIGHT, WIDTH), float32)
        z = cuda.local.array(HEIGHT, float32)
        head, j = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        feature = cuda.blockIdx.x % PARTS * FEATURES
        thread = cuda.threadIdx.x

        clear(h)
        for r in range(HEIGHT):
            z[r] = ZERO
        for first in range(j * BLOCK, min((j + 1) * BLOCK, features.shape[1]), TOKENS):
            cuda.syncthreads()  # nobody reads the last tiles any more
            load(phi, features, head, first, feature)
            load(V, values, head, first, 0)
            if thread < TOKENS:
                V[thread, COLUMNS] = spare[head, first + thread] if first + thread < spare.shape[1] else ZERO
            cuda.syncthreads()
            product(h, phi, V, TOKENS)  # [Alg. 1 L4] [Alg. 2 L3]
            product_spare(z, phi, V, TOKENS)  # [Alg. 1 L4] [Alg. 2 L4]
        finite = True
        for r in range(HEIGHT):
            finite = finite and math.isfinite(z[r])
            for c in range(WIDTH):
                finite = finite and math.isfinite(h[r, c])
        bad = cuda.syncthreads_or(int32(not finite))  # a barrier that tells every thread whether one said yes
        if bad:
            clear(h)
            for r in range(HEIGHT):
                z[r] = ZERO
        if thread == 0:
            broken[head, j, cuda.blockIdx.x % PARTS] = ONE if bad else ZERO
        store(out[head], j, feature, 0, h)
        for r in range(HEIGHT):
            row = feature + row_of_thread() + r
            if row < COLUMNS and lane_of_thread() == 0:
                out[head, j, row, COLUMNS] = z[r]

    return Kernel(states, PARTS, FEATURES)


_precision_lock = threading.Lock()


@contextmanager
def float32_products() -> Iterator[None]:
    """Inside, torch multiplies float32 as such, whatever the user's tf32 switch says: states need all of their bits.

    The switch is one for all threads. The lock keeps two of ours from restoring each other's setting.
    """
    settings = torch.backends.cuda.matmul
    with _precision_lock:
        before, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


def block_states(features: Tensor, values: Tensor, spare: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(G, N, D), (G, N, D), (G, N) -> features^T [values | spare] of each block, (G, T, COLUMNS, COLUMNS + 1).

    The second result, (G, T, parts of a state), is 1 where there were NaN or Inf instead.
    """
    heads, length, _ = features.shape
    columns, num_blocks = columns_of(features), math.ceil(length / block)
    kernel = states_kernel(columns, block)
    states = features.new_empty(heads, num_blocks, columns, columns + 1)
    broken = features.new_empty(heads, num_blocks, kernel.parts)
    start(kernel, num_blocks, features, values, spare, states, broken)
    return states, broken


def add_up(member: Tensor, states: Tensor, broken: Tensor) -> Tensor:
    """For each row of the 0/1 `member` (G, Ti, Tj), the sum of the states with a 1; NaN if one of them is broken.

    [Alg. 1 L13] [Alg. 2 L14]
    """
    with float32_products():
        sums = torch.bmm(member, states.flatten(2)).unflatten(2, states.shape[2:])
        spoilt = torch.bmm(member, broken).sum(-1) > 0  # (G, Ti)
    return sums.masked_fill_(spoilt[..., None, None], math.nan)


def sums_by_chunk(
    phi_K: Tensor, V: Tensor, block_map: BlockMap, states_per_query_block: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """[H_i | Z_i] of all query blocks, a few heads at a time: (heads, which blocks are marginal, sums).

    A chunk's states take the memory of four float32 queries at most. It has one for each key block, and
    `states_per_query_block` for each query block.
    """
    heads, _, head_dim = V.shape
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    member = (block_map.labels == MARGINAL).flatten(0, 1).float()  # (B * H, Tq, Tk) [Alg. 1 L12]
    ones = V.new_ones(V.shape[:2])
    columns, num_states = columns_of(V), num_key_blocks + states_per_query_block * num_query_blocks
    fit = 4 * heads * block_map.query_length * head_dim // (num_states * (columns + 1) * columns)
    chunks = math.ceil(heads / max(1, min(fit, heads)))
    size = math.ceil(heads / chunks)  # all of about one size
    for first in range(0, heads, size):
        chunk = slice(first, first + size)
        sums = add_up(member[chunk], *block_states(phi_K[chunk], V[chunk], ones[chunk], block_map.block_k))
        yield chunk, member[chunk], sums


@functools.cache
def grad_sums_kernel(COLUMNS: int, BLOCK_Q: int) -> Kernel:
    """dQ^phi = [dO | -D^l] [H_i | Z_i]^T / (phi(Q_i) Z_i) for ROWS rows of query block i. [Alg. 2 L5]

    It leaves [dO | -D^l] / (phi(Q_i) Z_i) in `share` and `share_spare`, from which `states_kernel` makes dH_i and dZ_i.
    """
    ROWS, FEATURES = min(64 if COLUMNS <= 64 else 32, BLOCK_Q), min(32, COLUMNS)
    PARTS = BLOCK_Q // ROWS
    WIDTH, STRIDE = FEATURES // LANES, COLUMNS + 1

    @cuda.jit
    def grad_sums(phi_query, grad_linear, out_linear, num_marginal, sums, share, share_spare, grad_phi_query):
        dO = cuda.shared.array((ROWS, STRIDE), float32)
        H = cuda.shared.array((FEATURES, STRIDE), float32)
        partial = cuda.shared.array((ROWS, LANE_STRIDE), float32)
        dphi = cuda.local.array((HEIGHT, WIDTH), float32)
        denominator = cuda.local.array(HEIGHT, float32)
        Dl = cuda.local.array(HEIGHT, float32)
        head, i = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = i * BLOCK_Q + cuda.blockIdx.x % PARTS * ROWS
        row, lane = row_of_thread(), lane_of_thread()

        load(dO, grad_linear, head, first, 0)
        for r in range(HEIGHT):
            n = first + row + r
            denominator[r] = ZERO
            Dl[r] = ZERO
            if n < phi_query.shape[1]:
                for d in range(lane, phi_query.shape[2], LANES):
                    denominator[r] += phi_query[head, n, d] * sums[head, i, d, COLUMNS]
                    Dl[r] += grad_linear[head, n, d] * out_linear[head, n, d]
        sum_lanes(partial, denominator)
        cuda.syncthreads()
        sum_lanes(partial, Dl)  # [Alg. 2 L2]
        for r in range(HEIGHT):
            n = first + row + r
            # No gradient through a row that is zero by definition.
            defined = num_marginal[head, i] > 0 and not abs(denominator[r]) < SMALLEST_DENOMINATOR
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
            load_state(H, sums, head, i, feature)
            cuda.syncthreads()
            clear(dphi)
            product(dphi, dO.T, H.T, COLUMNS + 1)  # [Alg. 2 L5]
            store(grad_phi_query, head, first, feature, dphi)

    return Kernel(grad_sums, PARTS, ROWS)


@functools.cache
def grad_keys_kernel(COLUMNS: int, BLOCK_K: int) -> Kernel:
    """dK^phi, and the linear branch's share of dV, for KEYS keys of block j. [Alg. 2 L16] [Alg. 2 L17]"""
    KEYS, FEATURES = min(64 if COLUMNS <= 64 else 32, BLOCK_K), min(32, COLUMNS)
    PARTS = BLOCK_K // KEYS
    WIDTH, FEATURE_WIDTH, STRIDE = COLUMNS // LANES, FEATURES // LANES, COLUMNS + 1

    @cuda.jit
    def grad_keys(phi_key, value, grad_states, grad_phi_key, grad_value):
        tokens = cuda.shared.array((KEYS, STRIDE), float32)  # of V, then of phi(K)
        dh = cuda.shared.array((FEATURES, STRIDE), float32)  # and dz
        dphi = cuda.local.array((HEIGHT, FEATURE_WIDTH), float32)
        dV = cuda.local.array((HEIGHT, WIDTH), float32)
        head, j = cuda.blockIdx.y, cuda.blockIdx.x // PARTS
        first = j * BLOCK_K + cuda.blockIdx.x % PARTS * KEYS
        thread = cuda.threadIdx.x

        load(tokens, value, head, first, 0)
        if thread < KEYS:
            tokens[thread, COLUMNS] = ONE
        for feature in range(0, COLUMNS, FEATURES):
            cuda.syncthreads()  # nobody needs the last of dh any more; V is complete
            load_state(dh, grad_states, head, j, feature)
            cuda.syncthreads()
            clear(dphi)
            product(dphi, tokens.T, dh.T, COLUMNS + 1)  # [V | 1] [dh | dz]^T [Alg. 2 L16]
            store(grad_phi_key, head, first, feature, dphi)
        cuda.syncthreads()  # nobody needs V any more
        load(tokens, phi_key, head, first, 0)
        clear(dV)
        for feature in range(0, COLUMNS, FEATURES):
            cuda.syncthreads()
            load_state(dh, grad_states, head, j, feature)
            cuda.syncthreads()
            product(dV, tokens.T[feature:], dh, min(FEATURES, COLUMNS - feature))  # [Alg. 2 L17]
        store(grad_value, head, first, 0, dV)

    return Kernel(grad_keys, PARTS, KEYS)


def linear_backward(grad_linear: Tensor, inputs: Inputs, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """dQ^phi, dK^phi and the linear branch's share of dV, as `flat` makes them."""
    block_map = inputs.block_map
    num_query_blocks, num_key_blocks = block_map.labels.shape[2:]
    sums_kernel = grad_sums_kernel(columns_of(inputs.query), block_map.block_q)
    keys_kernel = grad_keys_kernel(columns_of(inputs.query), block_map.block_k)
    V, phi_Q, phi_K, dO, O = map(flat, (*inputs[2:5], grad_linear, saved.out_linear))
    dphi_Q, dphi_K, dV = map(torch.empty_like, (phi_Q, phi_K, V))
    for heads, member, sums in sums_by_chunk(phi_K, V, block_map, states_per_query_block=2):
        share = torch.empty_like(dO[heads])
        share_spare = share.new_empty(share.shape[:2])
        queries = (phi_Q[heads], dO[heads], O[heads], member.sum(-1, dtype=torch.int32))
        start(sums_kernel, num_query_blocks, *queries, sums, share, share_spare, dphi_Q[heads])
        grad_sums = block_states(phi_Q[heads], share, share_spare, block_map.block_q)
        grad_states = add_up(member.mT, *grad_sums)
        start(keys_kernel, num_key_blocks, phi_K[heads], V[heads], grad_states, dphi_K[heads], dV[heads])
    return dphi_Q, dphi_K, dV


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


def forward(inputs: Inputs) -> Saved:
    """Algorithm 1, lines 4 and 7 to 16; arguments and result as in `sla_ref.protocol.Backend`."""
    query, block_map = inputs.query, inputs.block_map
    kernel = forward_kernel(columns_of(query), block_map.block_q, block_map.block_k)
    with torch.cuda.device_of(query):
        Q, K, V, phi_Q, phi_K = map(flat, inputs[:5])
        num_blocks, indices = block_map.kv_num_blocks.flatten(0, 1), block_map.kv_indices.flatten(0, 1)
        O_sparse, O_linear, lse = torch.empty_like(Q), torch.empty_like(Q), Q.new_empty(Q.shape[:2])
        for heads, member, sums in sums_by_chunk(phi_K, V, block_map, states_per_query_block=1):
            tokens = (Q[heads], K[heads], V[heads], phi_Q[heads])
            lists = (num_blocks[heads], indices[heads], member.sum(-1, dtype=torch.int32))
            outputs = (O_sparse[heads], O_linear[heads], lse[heads])
            start(kernel, member.shape[1], *tokens, *lists, sums, *outputs, np.float32(inputs.scale))
    out_sparse, out_linear = (O.view(query.shape).to(query.dtype) for O in (O_sparse, O_linear))
    return Saved(out_sparse, out_linear, lse.view(query.shape[:3]))


def backward(
    grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
) -> Gradients:
    """Algorithm 2; arguments and result as in `sla_ref.protocol.Backend`."""
    with torch.cuda.device_of(inputs.query):
        dphi_Q, dphi_K, dV = linear_backward(grad_linear, inputs, saved)
        dQ, dK = sparse_backward(grad_sparse, grad_lse, inputs, saved, dV)
    (query, key), dtype = inputs[:2], inputs.query.dtype
    dQ, dphi_Q = dQ.view(query.shape), dphi_Q.view(query.shape)
    dK, dV, dphi_K = dK.view(key.shape), dV.view(key.shape), dphi_K.view(key.shape)
    return Gradients(dQ.to(dtype), dK.to(dtype), dV.to(dtype), dphi_Q, dphi_K)
