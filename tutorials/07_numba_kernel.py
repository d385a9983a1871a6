# %% [markdown]
# # 7. The Numba kernel
#
# Numba programs a GPU one level lower than Triton: not a tile at a time but a thread at a time, with shared memory,
# barriers and registers named. Its simulator runs each of these threads as a Python thread, which lets us watch kernels
# on a CPU. Afterwards you will be able to read `sla_ref/backends/numba_cuda.py`: know what a thread, a block and a
# barrier are, why the threads of a kernel load other numbers than they compute with, why the rows of its tiles are one
# number too long, and what limits how many threads a GPU can hold.
#
# Builds on: [4. Algorithm 1](04_algorithm_1.md), [5. Algorithm 2](05_algorithm_2.md),
# [6b. The package's Triton kernels](06b_package_kernels.md)
#
# The simulator is switched on by an environment variable, and Numba looks at it only once, when it is imported: it
# decides whether `@cuda.jit` compiles a kernel or simulates it. So we set it before the import.

# %%
import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import inspect
import math
import re
import threading
from collections import Counter, defaultdict
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import check_exercise, expect, show_source
from numba import cuda, float32

from sla_ref import testing
from sla_ref.backends import numba_cuda, pytorch
from sla_ref.backends.triton.sparse import softmax_step as triton_step

assert numba_cuda.SIMULATED, (
    "Numba was imported before the variable was set: start again in a fresh Python"
)

# %% [markdown]
# ## Thread, block, grid
#
# A kernel is a function that very many threads run at once. This one doubles ten numbers.


# %%
@cuda.jit
def double_kernel(source, target):
    n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if n < source.shape[0]:
        target[n] = 2 * source[n]


numbers = np.arange(10, dtype=np.float32)
doubled = np.full(10, np.nan, dtype=np.float32)
double_kernel[3, 4](numbers, doubled)
print(doubled)

assert (doubled == 2 * numbers).all()

# %% [markdown]
# `double_kernel[3, 4]` starts a **grid** of 3 **thread blocks** with 4 **threads** each. All twelve run the same three
# lines. They differ in what they find in `cuda.threadIdx` and `cuda.blockIdx`, and a thread computes from that which
# number is its own. Ten numbers need only ten threads, hence the `if`.
#
# A thread block of a GPU is more than a bundle of threads. All of its threads run on the same multiprocessor, can wait
# for each other, and share a piece of fast memory. Threads of different blocks have none of this: blocks run in any
# order, and may run one after the other.
#
# *Block* is also SLA's word for 64 neighbouring tokens. Below, "thread block" is the GPU's word, "query block" and "key
# block" are SLA's.
#
# ## Shared memory and the barrier
#
# A GPU has three kinds of memory that matter here. **Registers** belong to one thread. **Shared memory** belongs to one
# thread block, and all of its threads can read and write it. **Global memory** holds the tensors, is seen by all, and
# is far away.
#
# The next kernel adds up 8 numbers with 8 threads. Each puts a number into shared memory. Then 4 threads add a
# neighbour's number to their own, then 2, then 1. Between two of these steps comes `cuda.syncthreads()`, the
# **barrier**: no thread of the block goes on until all have come to it.
#
# Sizes of shared arrays have to be known when a kernel is compiled. Therefore such kernels are made by a function that
# takes the sizes. Here it also takes away the barriers, if asked to, and holds up all threads but the first, for at
# most `patience` seconds. On a GPU any thread may be late, and nothing promises which.


# %%
def make_block_sum(barriers, patience):
    first_has_finished = threading.Event()

    @cuda.jit
    def block_sum(source, total):
        partial = cuda.shared.array(8, float32)
        thread = cuda.threadIdx.x
        if thread > 0:
            first_has_finished.wait(patience)  # Python, in the simulator only
        partial[thread] = source[thread]
        if barriers:
            cuda.syncthreads()
        step = 4
        while step > 0:
            if thread < step:
                partial[thread] += partial[thread + step]
            if barriers:
                cuda.syncthreads()
            step //= 2
        if thread == 0:
            total[0] = partial[0]
            first_has_finished.set()

    return block_sum


source = np.random.default_rng(7).normal(size=8).astype(np.float32)
totals = {}
for barriers, patience in ((False, 60), (True, 0.05)):
    total = np.full(1, np.nan, dtype=np.float32)
    make_block_sum(barriers, patience)[1, 8](source, total)
    totals[barriers] = total[0]
    print(f"barriers: {barriers!s:5}  right: {np.isclose(total[0], source.sum())}")

assert np.isclose(totals[True], source.sum())
assert not np.isclose(totals[False], source.sum())

# %% [markdown]
# Without barriers, thread 0 added up what the others had not written yet: whatever lay in that memory before. With
# them, late threads cost time and nothing else.
#
# We had to hold up threads to make this happen for certain. Otherwise a kernel that lacks a barrier may be right ten
# times and wrong the eleventh, in the simulator and on a GPU. So a right result says little about barriers, a wrong one
# a lot. `tests/test_numba.py` takes three barriers of the package's kernels out, one at a time, and requires that the
# simulator gives a wrong result without it.
#
# A barrier must be reached by all threads of a block. That is why the `if thread < step` above ends before it.
#
# ## Where the threads of a warp read
#
# A GPU does not run threads one by one either. 32 neighbouring threads form a **warp**, which executes one instruction
# for all 32 at a time. When this instruction reads memory, 32 addresses come together, and how they lie to each other
# decides how much work it is. The simulator has no warps, but it can tell us the addresses.
#
# `Recorded` is an array that notes, for each thread, the places that it reads or writes. A place is counted in numbers
# from the start of the array. `record` runs one of the package's device helpers, which kernels call, as a kernel of its
# own with the 32 threads of one warp.


# %%
class Recorded:
    """An array; notes the place of every number that a thread reads or writes."""

    def __init__(self, data, places=None, log=None):
        self.data = data
        self.places = np.arange(data.size).reshape(data.shape) if places is None else places
        self.log = defaultdict(list) if log is None else log

    @property
    def shape(self):
        return self.data.shape

    @property
    def T(self):
        return Recorded(self.data.T, self.places.T, self.log)

    def note(self, at):
        self.log[threading.current_thread().threadIdx.x].append(self.places[at])

    def __getitem__(self, at):
        self.note(at)
        return self.data[at]

    def __setitem__(self, at, number):
        self.note(at)
        self.data[at] = number

    def instructions(self):
        """Places, (accesses of a thread, threads): a row is what all threads ask for at once."""
        return np.array([places for _, places in sorted(self.log.items())]).T


def record(helper, *arguments, threads=32):
    """Runs a device helper of the package as a kernel with a single thread block."""
    cuda.jit(helper.py_func)[1, threads](*arguments)


def zeros(*shape):
    return Recorded(np.zeros(shape, dtype=np.float32))


# %% [markdown]
# ### Global memory: whole sectors
#
# Global memory is read in **sectors** of 32 bytes, 8 numbers of float32. Whoever wants one number gets eight. If the 32
# threads of a warp want 32 numbers, that is 4 sectors at best and 32 at worst. Reads that fill their sectors are called
# **coalesced**.
#
# The package loads a tile like this:

# %%
show_source(numba_cuda.load)

# %% [markdown]
# Eight neighbouring threads read eight neighbouring numbers of a row, and the next eight threads read the next row.
# Compare that with what may seem more natural, a row for each thread. It asks for 32 sectors and uses one number of
# each; the other seven are of use later only if a cache still has them then.


# %%
def sectors(places):
    """How many sectors of 32 bytes these numbers of 4 bytes lie in; an array begins a sector."""
    return len({place * 4 // 32 for place in places})


query = zeros(1, 128, 64)  # (heads, N, D)
record(numba_cuda.load, zeros(64, 65), query, 0, 0, 0)
of_load = {sectors(places) for places in query.instructions()}
row_each = {sectors([64 * thread + d for thread in range(32)]) for d in range(64)}
print(f"sectors for 32 numbers: {of_load} in load, {row_each} with a row for each thread")

assert of_load == {4} and row_each == {32}

# %% [markdown]
# ### Shared memory: banks
#
# Shared memory has no sectors. It consists of 32 **banks**, which work at the same time. A number at place $p$ lies in
# bank $p \bmod 32$, and a bank gives out one number at a time. So 32 threads that read from 32 banks are served at
# once; eight different places in the same bank take eight passes, a **bank conflict**. Threads that want the very same
# number can have it together.
#
# Take a tile with 64 numbers to a row, D = 64, and let eight threads read column $k$ of eight rows. The places are $k$,
# $64 + k$, $128 + k$ and so on, and 64 is a multiple of 32: all in one bank. With rows of 65 they are in eight.
#
# This is how the kernels read in a product. `S = Q K^T` is `product(S, Q.T, KV.T, COLUMNS)`, and `O += P V` is
# `product(O, P.T, KV, KEYS)`. Here are both, with and without the spare column:


# %%
def passes(places):
    """How many numbers the busiest bank gives out; one that several threads want counts once."""
    return max(Counter(place % 32 for place in set(places)).values())


def passes_of_product(acc_width, A, B, depth):
    """The most passes that any instruction takes in reading A and B."""
    record(numba_cuda.product, np.zeros((4, acc_width), dtype=np.float32), A, B, depth)
    return tuple(max(passes(places) for places in tile.instructions()) for tile in (A, B))


taken = {}
for spare in (0, 1):
    taken["Q", spare], taken["K", spare] = passes_of_product(
        4, zeros(64, 64 + spare).T, zeros(32, 64 + spare).T, 4
    )
    taken["P", spare], taken["V", spare] = passes_of_product(
        8, zeros(64, 32 + spare).T, zeros(32, 64 + spare), 4
    )
for tile in "QKPV":
    print(
        f"passes to read {tile}: {taken[tile, 0]} without the spare column, "
        f"{taken[tile, 1]} with it"
    )

assert [taken[tile, 0] for tile in "QKPV"] == [4, 8, 4, 1]
assert [taken[tile, 1] for tile in "QKPV"] == [1, 1, 1, 1]

# %% [markdown]
# V is read along its rows and would not need the spare column. K does, and both use the same shared array, `KV`, one
# after the other.
#
# The layout is not free of conflicts everywhere. Writing is worse than reading: `load` writes four rows at once, and
# the spare column does not help it. But a number is written once and then read by every row of the tile.

# %%
for columns in (64, 65):
    tile = zeros(64, columns)
    record(numba_cuda.load, tile, zeros(1, 128, 64), 0, 0, 0)
    assert max(passes(places) for places in tile.instructions()) == 4

# %% [markdown]
# The figure shows the instruction that reads K, in which each of the eight lanes wants its own row: how many numbers
# each bank has to give out.

# %%
figure, panels = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True, layout="constrained")
for panel, columns in zip(panels, (64, 65), strict=True):
    K = zeros(32, columns)
    record(numba_cuda.product, np.zeros((4, 4), dtype=np.float32), zeros(64, 65).T, K.T, 1)
    asked = Counter(place % 32 for place in set(K.instructions()[0]))
    panel.bar(range(32), [asked[bank] for bank in range(32)], color="#0072B2")
    panel.set(xlabel="bank", title=f"Rows of {columns} numbers", yticks=range(0, 9, 2))
panels[0].set_ylabel("different numbers asked for")
plt.show()

# %% [markdown]
# ## The micro-tile
#
# Shared memory is close, but registers are closer. A thread that computes one number of $S$ reads two numbers for each
# multiplication. A thread that computes a tile of $4 \times 4$, a **micro-tile**, reads 4 numbers of Q and 4 of K and
# has 16 products to make of them. This is all that `product` does:

# %%
show_source(numba_cuda.row_of_thread, numba_cuda.lane_of_thread, numba_cuda.product)

# %% [markdown]
# Loops over constant bounds are unrolled when the kernel is compiled, and `acc` becomes registers. The source names
# `B[k, ...]` once for each `r`, but they are the same numbers, which a compiler can keep. So we count different places.
# `acc` is read and written once for each multiplication.


# %%
def count(width):
    """Numbers of A and B that thread 0 reads in a product of depth 1, and its multiplications."""
    A, B, acc = zeros(1, 64), zeros(1, 64), zeros(4, width)
    record(numba_cuda.product, acc, A, B, 1, threads=1)
    return len(set(A.log[0])), len(set(B.log[0])), len(acc.log[0]) // 2


for width, product in (
    (1, "4 x 1, for comparison"),
    (4, "S = Q K^T, 4 x 4"),
    (8, "O += P V, 4 x 8"),
):
    a, b, products = count(width)
    print(
        f"{product:22} {a} + {b} numbers for {products:2} multiplications: "
        f"{products / (a + b):.2f} for each"
    )

assert count(4) == (4, 4, 16)
assert count(8) == (4, 8, 32)

# %% [markdown]
# Larger tiles would read less, and need more registers. With D = 64 a thread of the forward holds $4 \times 8$ numbers
# of O, $4 \times 4$ of S and a few per row.
#
# Now the picture of the work. On the left, which thread loads each number of Q into shared memory. On the right, which
# thread computes each number of S. Both are recorded from the package's helpers, with the 128 threads of the forward;
# the cells of thread 10 are marked. It computes with numbers that others have loaded, and others with what it has
# loaded. So there must be a barrier in between.

# %%
loaded, computed = zeros(64, 65), zeros(1, 64, 32)
record(numba_cuda.load, loaded, zeros(1, 64, 64), 0, 0, 0, threads=128)
record(numba_cuda.store, computed, 0, 0, 0, np.zeros((4, 4), dtype=np.float32), threads=128)

figure, panels = plt.subplots(1, 2, figsize=(7.4, 4.1), sharey=True, layout="constrained")
titles = ("Who loads Q", "Who computes S")
for panel, tile, title, across in zip(
    panels, (loaded, computed), titles, ("feature d", "key"), strict=True
):
    owner = np.full(tile.data.size, -1)
    for thread, places in tile.log.items():
        owner[places] = thread
    owner = owner.reshape(tile.shape[-2:])[:12, :16]
    for n, row in enumerate(owner):
        for d, thread in enumerate(row):
            if thread == 10:
                panel.add_patch(
                    plt.Rectangle((d - 0.5, n - 0.5), 1, 1, color="#E69F00", alpha=0.7, lw=0)
                )
            panel.text(
                d,
                n,
                thread,
                ha="center",
                va="center",
                fontsize=6.5,
                weight="bold" if thread == 10 else None,
            )
    panel.set(
        xlim=(-0.5, 15.5), ylim=(11.5, -0.5), xlabel=across, title=f"{title}: thread of each number"
    )
panels[0].set_ylabel("row of the query block")
plt.show()

everything = sorted(place for places in computed.log.values() for place in places)
assert everything == list(range(64 * 32)), "each number of S belongs to one thread"

# %% [markdown]
# ## The forward kernel
#
# Here is the whole of it. `forward_kernel` is a function that makes the kernel for its sizes, and keeps it
# (`functools.cache`). A thread block works on ROWS rows of a query block and walks along the list of critical key
# blocks, KEYS keys at a time. Line by line it is Algorithm 1; what is new are the lines in between, which move tiles.

# %%
show_source(numba_cuda.forward_kernel)

# %% [markdown]
# Some things to find in it:
#
# - A turn of the sparse loop has four barriers. The first keeps the new K from overwriting a V that others still
#   multiply with. The second says that all of K is there. The third is inside `max_lanes`, and with it everybody has
#   finished with K, and V may take its place. The fourth says that V and P are complete.
# - $P$ has to go through shared memory. A thread holds every eighth column of $S$, and for `O += P V` needs whole rows.
# - `m` and `l` are registers, four of each, one for each row of the thread. Eight lanes share a row. They have to agree
#   on `m` in every turn, which costs a barrier. But `l` needs no agreement until the end: each lane adds up its own
#   keys, and `sum_lanes` joins them once.
# - `exp2` and `log2_scale`: powers of two, as in the second exercise of [tutorial 4](04_algorithm_1.md).
#
# ## Watching the registers
#
# One head with 20 queries, 76 keys and D = 8, in blocks of 16: two query blocks and five key blocks, the last ones
# partial. Blocks this small make thread blocks of 32 threads. With 64 tokens there would be 128, and in the simulator
# each of them is a Python thread.
#
# There a kernel is a Python function, too, and can be watched like one. The function below takes the place of
# `product`. When it is called for `O += P V`, it reads `m` and `l` among the variables of the kernel that called it.
# Then it calls the real one.

# %%
problem = testing.make_problem(
    heads=1,
    query_length=20,
    key_length=76,
    head_dim=8,
    block_q=16,
    block_k=16,
    critical_ratio=0.6,
    negligible_ratio=0.2,
    seed=3,
)
block_map, scale = problem.inputs.block_map, problem.inputs.scale
critical = block_map.kv_indices[0, 0, 0].tolist()
print(block_map.labels[0, 0].numpy())

watched = defaultdict(dict)  # [key block][lane] -> m, l of row 5 of query block 0
real_product, LOG2_E = numba_cuda.product, math.log2(math.e)


def watched_product(acc, A, B, depth):
    kernel = inspect.currentframe().f_back.f_locals
    if (
        acc is kernel.get("O")
        and "feature" not in kernel
        and kernel["i"] == 0
        and kernel["row"] == 4
    ):
        watched[kernel["first_key"] // 16][kernel["lane"]] = (
            float(kernel["m"][1]),
            float(kernel["l"][1]),
        )
    real_product(acc, A, B, depth)


with mock.patch.object(numba_cuda, "product", watched_product):
    saved = numba_cuda.forward(problem.inputs)

# %%
q, k = problem.inputs.query[0, 0], problem.inputs.key[0, 0]
seen = []
for j in critical:
    m, l = (
        np.array(values) for values in zip(*(watched[j][lane] for lane in range(8)), strict=True)
    )
    lanes = " ".join(f"{part:.2f}" for part in l)
    print(f"key block {j}: m {m[0]:.2f}, l of the lanes {lanes}, together {l.sum():.2f}")
    seen += range(16 * j, min(16 * (j + 1), 76))
    scores = scale * k[seen] @ q[5]
    assert (m == m[0]).all(), "the lanes agree on m"
    assert np.isclose(m[0], scores.max() * LOG2_E, rtol=1e-5)
    assert np.isclose((m[0] + np.log2(l.sum())) / LOG2_E, scores.logsumexp(0), rtol=1e-5)

assert list(watched) == critical, "no other key block was touched"

# %% [markdown]
# Nothing is left out and nothing is there twice: after each key block, $m$ and the sum of the eight $l$ are the maximum
# and the sum of all keys so far. Both outputs and $L$ are those of the `torch` backend:

# %%
expected = pytorch.forward(problem.inputs)
torch.testing.assert_close(tuple(saved), tuple(expected))

# %% [markdown]
# ## All the kernels
#
# - `states_kernel` makes $[h_j\,|\,z_j] = \phi(K_j)^\top [V_j\,|\,1]$, and from other arguments the gradients of the
#   states.
# - `forward_kernel` is both branches for some rows of a query block.
# - `grad_sums_kernel` gives $d\phi(Q)$, and what the gradients of the sums $H_i$ and $Z_i$ are made from.
# - `grad_keys_kernel` gives $d\phi(K)$ and the linear branch's share of $dV$.
# - `dq_kernel` walks along rows, as the forward does, and gives $dQ$.
# - `dkdv_kernel` walks down columns, owns its $dK$ and $dV$, and adds to what is there of $dV$.
#
# The sums $H_i = \sum_j h_j$ do not have a kernel here; torch makes them with one matrix product (`add_up`).
#
# A forward and a backward start these, in this order. To spare the simulator, the problem is smaller: 16 queries and 20
# keys.

# %%
smaller = testing.make_problem(
    heads=1,
    query_length=16,
    key_length=20,
    head_dim=8,
    block_q=16,
    block_k=16,
    critical_ratio=0.5,
    negligible_ratio=0.0,
)
# one key block is critical, one marginal
assert sorted(smaller.inputs.block_map.labels.flatten().tolist()) == [0, 1]


class WatchedLauncher(numba_cuda.Launcher):
    """Starts kernels as usual, and says which."""

    def start(self, kernel, grid, *args):
        print(f"{kernel.name:9} thread blocks: {grid[0]}, threads of each: {kernel.threads}")
        super().start(kernel, grid, *args)


with numba_cuda.launch_with(WatchedLauncher()):
    results = testing.run_backend(numba_cuda, smaller)

expected = testing.run_backend(pytorch, smaller)
torch.testing.assert_close(results, expected)

# %% [markdown]
# All five gradients agree, too. The smallest of the kernels is the one for the states. In it the spare column, which is
# there for the banks, carries $z_j$ along:

# %%
show_source(numba_cuda.states_kernel)

# %% [markdown]
# ## How many threads fit
#
# A GPU hides the time that memory takes by having other warps to run meanwhile. How many warps a multiprocessor can
# hold at once, its **occupancy**, depends on what each takes of its stores. A multiprocessor of an H100 or H200 has
# 65,536 registers, room for 2,048 threads, and 228 KB of shared memory, of which a thread block takes 1 KB more than it
# asks for. What a kernel needs is in the table at the top of the file, for D = 64 and blocks of 64; `sla-ref kernels`
# read it from compiled kernels, which needs no GPU. The store that runs out first decides:

# %%
LIMITS = {"registers": 65536, "shared memory": 228 * 1024, "threads": 2048}
rows = re.findall(r"`(\w+_kernel)` .* (\d+) +(\d+) +(\d+)$", numba_cuda.__doc__, flags=re.MULTILINE)
needs = {kernel: tuple(map(int, numbers)) for kernel, *numbers in rows}
assert len(needs) == 6
assert all(registers % 8 == 0 for _, registers, _ in needs.values())  # else a GPU would round up

decided_by = {}
for kernel, (threads, registers, shared) in needs.items():
    demand = {"registers": threads * registers, "shared memory": shared + 1024, "threads": threads}
    fit = {store: LIMITS[store] // demand[store] for store in LIMITS}
    decided_by[kernel] = min(fit, key=fit.get)
    share = min(fit.values()) * threads / LIMITS["threads"]
    print(
        f"{kernel:16} {min(fit.values())} thread blocks, {share:4.0%} of the threads: "
        f"{decided_by[kernel]}"
    )

# Shared memory of the forward: Q, KV, P and the lanes' partial results, with spare columns.
assert needs["forward_kernel"][2] == 4 * (64 * 65 + 32 * 65 + 64 * 33 + 64 * 9)
assert decided_by.pop("dkdv_kernel") == "shared memory"
assert set(decided_by.values()) == {"registers"}

# %% [markdown]
# Registers go to the micro-tiles. So the choice is between few threads that reuse what they read and many threads that
# wait for memory in turns. Which of them is faster only a measurement on a GPU can say;
# [Performance](../performance.md#the-backends-side-by-side) has what these tiles reach.
#
# ## What Triton hides
#
# The Triton kernels take the same steps. Three things that were written out above have no line there:
#
# | | Numba | Triton |
# |---|---|---|
# | threads | each finds its own: `row_of_thread`, `lane_of_thread` | a program has tiles, the compiler deals them out |
# | shared memory | `cuda.shared.array`, `load`, the spare column | `tl.load`; where a tile lives is not said |
# | barriers | `cuda.syncthreads`, four in a turn | set by the compiler, where a thread needs what another made |
#
# The same turn of the loop in Triton:

# %%
show_source(triton_step)

turn = inspect.getsource(inspect.unwrap(numba_cuda.forward_kernel))
turn = turn[turn.index("for step in") : turn.index("sum_lanes")]
assert turn.count("cuda.syncthreads()") + turn.count("max_lanes") == 4
assert not re.search("barrier|shared|thread", inspect.getsource(triton_step.fn))

# %% [markdown]
# `tl.max(S, 1)` is `max_lanes`. `dot` is `product`, and more: with 16-bit numbers it goes to the GPU's matrix units,
# of which `product` knows nothing. It multiplies and adds in float32.
#
# ## What the simulator cannot show
#
# - Speed, in any form. It has no warps, sectors, banks or registers; what we said of them came from addresses and from
#   compiled kernels.
# - Types. Numba gives every variable of a kernel a type when it compiles. A literal such as `0.0` is float64 there and
#   draws float32 with it, hence `ZERO` and `ONE` in the file. In the simulator both give the same.
# - Some races. It runs Python threads, in an order that a GPU need not take.
#
# ## Exercises
#
# **1. Transpose.** Write a kernel that transposes a $16 \times 16$ matrix with 256 threads in one thread block. Reads
# and writes both have to be coalesced, so the way leads through shared memory. How long should the rows of the shared
# tile be? The check does not ask, but a GPU would.


# %% tags=["exercise"]
@cuda.jit
def transpose_kernel(source, target):
    """target = source^T, both (16, 16); 256 threads, and a warp touches 4 sectors at a time."""
    ...


# %% tags=["solution"] mistake=["tile[d, n]", "tile[n, d]"]
@cuda.jit
def transpose_kernel(source, target):
    """target = source^T, both (16, 16); 256 threads, and a warp touches 4 sectors at a time."""
    tile = cuda.shared.array((16, 17), float32)
    n, d = cuda.threadIdx.x // 16, cuda.threadIdx.x % 16
    tile[n, d] = source[n, d]
    cuda.syncthreads()
    target[n, d] = tile[d, n]  # a column of the tile: 16 banks, as its rows have 17 numbers


# %% tags=["check"]
source, target = Recorded(np.arange(256.0).reshape(16, 16)), Recorded(np.full((16, 16), np.nan))

with check_exercise(1, transpose_kernel):
    transpose_kernel[1, 256](source, target)
    expect("target", target.data, source.data.T)
    for name, array in (("source", source), ("target", target)):
        for places in array.instructions():
            touched = [sectors(warp) for warp in places.reshape(8, 32)]
            assert set(touched) == {4}, f"{name}: the warps touch {touched} sectors, not 4 each"

# %% [markdown]
# **2. Join the lanes.** Compute the log-sum-exp $L$ of a row with eight threads and one thread block per row. Thread
# `lane` reads every eighth score, from `scores[row, lane]` on. It keeps a running maximum and sum of its own, which it
# shows to the others only at the end, when all are joined. A lane may get no score at all; a row has at least one that
# is finite.


# %% tags=["exercise"]
@cuda.jit
def lse_kernel(scores, lse):
    """lse[row] = log of the sum of exp(scores[row, :]), for row = thread block; 8 threads."""
    ...


# %% tags=["solution"] mistake=["math.exp(highest[other] - m) * total[other]", "total[other]"]
@cuda.jit
def lse_kernel(scores, lse):
    """lse[row] = log of the sum of exp(scores[row, :]), for row = thread block; 8 threads."""
    highest = cuda.shared.array(8, float32)
    total = cuda.shared.array(8, float32)
    row, lane = cuda.blockIdx.x, cuda.threadIdx.x
    m, l = float32(-math.inf), float32(0)  # a plain literal would be float64
    for n in range(lane, scores.shape[1], 8):
        score = scores[row, n]
        if score > m:
            l *= math.exp(m - score)
            m = score
        if score > -math.inf:
            l += math.exp(score - m)
    highest[lane] = m
    total[lane] = l
    cuda.syncthreads()
    if lane == 0:
        for other in range(1, 8):
            m = max(m, highest[other])
        l = float32(0)
        for other in range(8):
            l += math.exp(highest[other] - m) * total[other]
        lse[row] = m + math.log(l)


# %% tags=["check"]
generator = np.random.default_rng(1)

with check_exercise(2, lse_kernel):
    for length in (3, 21):
        scores = (100 * generator.normal(size=(4, length))).astype(np.float32)
        scores[1] += 1000  # exp overflows
        scores[2, :2] = -math.inf  # a lane begins with a score that weighs nothing
        lse = np.full(4, np.nan, dtype=np.float32)
        lse_kernel[4, 8](scores, lse)
        expected = torch.from_numpy(scores).logsumexp(1)
        expect(f"lse of rows of {length} scores", lse, expected, rtol=1.3e-6, atol=1e-5)

# %% [markdown]
# ## Recap
#
# A tile is the work of many threads, which load what is contiguous and compute what they can keep in registers. Shared
# memory passes numbers from the one to the other, with a barrier after each change of hands and a spare column against
# bank conflicts. Triton decides all of this for you.
#
# Next: [9. Fine-tuning a video transformer](09_fine_tuning.md)
