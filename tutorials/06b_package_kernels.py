# %% [markdown]
# # 6b. The package's Triton kernels
#
# The kernels of `sla_ref/backends/triton/` are the one of the last lesson, made complete: any head, any stride, any
# length, both branches, and gradients. Here each is read as a whole: who runs a program, what it is handed, along which
# list it walks, and what each stage reads and writes. Afterwards you will be able to find your way through that folder,
# and know why the backward walks down columns and what a run in the interpreter cannot show.
#
# Builds on: [6a. A first Triton kernel](06a_first_kernel.md), [5. Algorithm 2](05_algorithm_2.md)

# %%
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import inspect
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from unittest import mock

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl
from lesson import check_exercise, expect, show_source

from sla_ref import testing
from sla_ref.analysis import CLASS_COLOURS, CLASS_NAMES
from sla_ref.backends import pytorch
from sla_ref.backends import triton as backend
from sla_ref.backends.triton import linear, sparse, tokens

assert triton.knobs.runtime.interpret, (
    "the cells below look into running kernels: leave TRITON_INTERPRET unset, or 1"
)

# %% [markdown]
# The problem is that of the last lesson: one head, 120 tokens with 16 dimensions, eight blocks of 16, the last with 8
# tokens. The numbers in the map say critical (1), marginal (0) and negligible (-1).

# %%
problem = testing.make_problem(
    heads=1,
    query_length=120,
    head_dim=16,
    block_q=16,
    block_k=16,
    critical_ratio=0.375,
    negligible_ratio=0.25,
    seed=2,
)
# (120, 16) each
query, key, value, phi_query, phi_key = (tensor[0, 0] for tensor in problem.inputs[:5])
block_map, scale = problem.inputs.block_map, problem.inputs.scale
labels = block_map.labels[0, 0]  # (8, 8)
saved = pytorch.forward(problem.inputs)  # what the kernels have to give
print(labels.numpy())

# %% [markdown]
# ## The kernels at a glance
#
# One call of the operator starts a handful of kernels. In each, a program owns one block of one head, or some rows of
# it, and is the only one that writes that block's results. With $i$ a query block and $j$ a key block:
#
# | kernel | a program owns | it reads | it writes |
# |---|---|---|---|
# | `states_kernel` | $j$ | $K_j$ or $\phi(K_j)$, $V_j$ | the state $h_j$, $z_j$ |
# | one matrix product | | labels as weights, all states | all sums $H_i$, $Z_i$ |
# | `forward_kernel` | rows of $i$ | $Q_i$, $H_i$, $Z_i$; $K_j$, $V_j$ of critical $j$ | outputs, $L$ |
# | `grad_sums_kernel` | $i$ | $\phi(Q_i)$, $dO^l_i$, $H_i$, $Z_i$ | $dH_i$, $dZ_i$, a share of $dQ_i$ |
# | the product, transposed | | weights, all $dH_i$, $dZ_i$ | all $dh_j$, $dz_j$ |
# | `grad_keys_kernel` | $j$ | $\phi(K_j)$, $V_j$, $dh_j$, $dz_j$ | a share of $dK_j$, $dV_j$ |
# | `dq_kernel` | rows of $i$ | $Q_i$, $dO^s_i$, $L$; $K_j$, $V_j$ of critical $j$ | $dQ_i$, $D^s$ |
# | `dkdv_kernel` | keys of $j$ | $K_j$, $V_j$; $Q_i$, $dO^s_i$, $L$, $D^s$ of critical $i$ | $dK_j$, $dV_j$ |
#
# The sparse branch walks along lists and touches critical pairs only. The linear branch never looks at a pair: it makes
# one state per key block, and one matrix product adds the states up for all query blocks.
#
# ## Tokens as arguments
#
# Tensors of a user's model are rarely contiguous: a `transpose` from (B, N, H, D) to (B, H, N, D) moves nothing and
# only swaps strides. So a tensor of tokens arrives as a pointer with the strides of batch, head and token. One launch
# covers all heads, so a program first finds its block and its head from its number, and then where that head begins.
# `tokens.py` has the helpers for that, and for loading a tile, which are those of the last lesson with strides.

# %%
show_source(tokens.dot, tokens.own_rows, tokens.head_of, tokens.slab_pointers, tokens.load_slab)

# %% [markdown]
# Everything that shapes the machine code travels in one constexpr, the `plan`: D, the block sizes, how many rows and
# keys a tile has, whether the softmax of $\phi$ is computed inside. Another plan is another kernel.
#
# COLUMNS is D rounded up to a power of two, since a tile cannot be 96 wide; the columns that are too many are masked. A
# slab is a part of the features, `feature` to `feature + FEATURES`, for tiles too large for the registers as a whole.
# On GPUs that can, `load` lets the hardware fetch a tile by itself (a descriptor, TMA) and needs no addresses.
#
# ### Why int64
#
# Triton computes with int32 where it can, as a GPU does. A tensor of more than $2^{31}$ elements has addresses beyond
# that, and an int32 product does not complain. Here a head has $2^{27}$ elements, as 1,048,576 tokens of 128 have:


# %%
@triton.jit
def offset_kernel(narrow, wide, stride):
    head = tl.program_id(0)
    tl.store(narrow + head, (head * stride).to(tl.int64))
    tl.store(wide + head, head.to(tl.int64) * stride)


narrow, wide = torch.zeros(2, 20, dtype=torch.int64)
offset_kernel[(20,)](narrow, wide, 2**27)
print(f"head 16 begins at {wide[16]}, in int32 at {narrow[16]}")

assert wide.tolist() == [head * 2**27 for head in range(20)]
assert torch.equal(narrow[:16], wide[:16]) and narrow[16] == -(2**31)

# %% [markdown]
# Hence the `.to(tl.int64)` in `slab_pointers` before the products, not after. Offsets inside a tile are small and stay
# int32, which takes half the registers.
#
# ## The sparse branch
#
# ### One step
#
# `softmax_step` takes one more tile of keys into the softmax of some rows. It reads $K_j$ and $V_j$ and writes nothing:
# the running $m$, $l$ and $O$ stay in registers and are returned. Compared with the step of the last lesson, three
# things changed. It loads K and V itself. It works with powers of two, as in the second exercise of [tutorial
# 4](04_algorithm_1.md): `scale` holds a factor $\log_2 e$. And it compares with keys past the end only if `PARTIAL`
# says so, a constexpr: from one source the compiler makes a step with the comparison and one without.

# %%
show_source(sparse.softmax_step, sparse.scores)

# %% [markdown]
# The interpreter lets us put a function of our own in its place, which calls the original and looks at what it returns.
# We follow row 3 of query block 3. After each step, $l$ and the size of $O$ have to be those of a plain softmax over
# the keys so far. Both are the same in any base; $m$ is not, so we leave it out.


# %%
def values(tile):
    """What a tile holds at this moment, as a tensor; in the interpreter only."""
    return torch.from_numpy(tile.handle.data.copy())


def number(scalar):
    """The same of a single number, which may also be a plain int."""
    return int(values(scalar)) if isinstance(scalar, tl.tensor) else scalar


def replaced(**replacements):
    """A context in which functions of these names are replaced wherever the backend uses them."""
    context = ExitStack()
    modules = [module for name, module in sys.modules.items() if name.startswith(backend.__name__)]
    for name, replacement in replacements.items():
        for module in modules:
            if hasattr(module, name):
                context.enter_context(mock.patch.object(module, name, replacement))
    return context


trace, visited = [], defaultdict(list)  # of row 3 of query block 3; key blocks by program
softmax_step = sparse.softmax_step


def watched_step(run, Q, key, value, first_key, *rest):
    run = softmax_step(run, Q, key, value, first_key, *rest)
    i, j = number(tl.program_id(0)), number(first_key) // 16
    visited[i].append(j)
    if i == 3:
        trace.append((j, values(run.l)[3].item(), values(run.O)[3].norm().item()))
    return run


with replaced(softmax_step=watched_step):
    fused = backend.forward(problem.inputs)
for j, l, O in trace:
    print(f"key block {j}:  l {l:5.2f}  |O| {O:5.2f}")

plain, seen = [], torch.zeros(0, dtype=torch.long)
for j in block_map.kv_indices[0, 0, 3].tolist():
    seen = torch.cat([seen, torch.arange(16 * j, min(16 * j + 16, 120))])
    s = scale * key[seen] @ query[51]  # row 3 of query block 3
    weights = torch.exp(s - s.max())
    plain.append((j, weights.sum().item(), (weights @ value[seen]).norm().item()))
torch.testing.assert_close(torch.tensor(trace), torch.tensor(plain))
assert visited == {i: block_map.kv_indices[0, 0, i].tolist() for i in range(8)}

# %% [markdown]
# ### The walk along a row
#
# `sparse_rows` is the loop around that step, for some rows of query block $i$. It is handed the tile of queries, the
# keys and values of its head, and a list: where it begins and how long it is. In each turn it reads one number of the
# list and takes in the keys of that block, in as many steps as the plan cuts a block into.
#
# Two details are worth a look. Lists ascend, so only a list's last block can be the partial one: the loop over all
# others does without the comparison, and a second loop, with it, handles the last block. And a query block may have no
# critical block. Then no step runs, $l$ is 0, and the last lines turn that into `sparse = 0` and `lse = -inf` rather
# than $0 / 0$.

# %%
show_source(sparse.sparse_rows)

# %% [markdown]
# ## The linear branch
#
# ### A state per key block
#
# A state $h_j$, $z_j$ does not depend on a query, so it is made once. A program of `states_kernel` owns one key block:
# it reads the block's keys and values and writes a state as one row of memory, first the rows of $h_j$, then $z_j$,
# then two counters. `SOFTMAX` in the plan chooses between two forms: either `phi_key` holds $\phi(K)$, or it holds $K$
# and `load_phi` computes the softmax on the way, and $\phi(K)$ is never in memory.
#
# The kernel works slab by slab: $\phi(K_j)$ stays, a few columns of $V_j$ come, and as many columns of $h_j$ go.

# %%
show_source(linear.states_kernel)

# %% [markdown]
# ### All sums at once
#
# Every query block needs $H_i = \sum_j [M_{ij} = 0]\, h_j$. All of these sums together are one matrix product,
#
# $$\underset{T_m \times T_n}{W} \;\cdot\; \underset{T_n \times (D^2 + D)}{(h, z)},$$
#
# and that is what GPUs are best at. A product cannot skip a block: $0 \cdot \mathrm{NaN}$ is NaN, so a single bad key
# block would ruin all rows. Therefore `states_kernel` writes zeros for such a block and counts it, and the rows that
# do include it become NaN at the end.
#
# In float16 a sum over many blocks could pass 65,504, its largest number, and be infinite: 32,760 tokens with features
# of 2.5 are enough. So $W_{ij}$ is not 1 but about one over the number of marginal blocks of the row. The factor
# cancels in $\phi H / (\phi Z)$. That it is a power of two makes this exact: such a factor changes the exponent of a
# float and not its digits.

# %%
phi_K, V = (
    torch.nn.functional.pad(tensor, (0, 0, 0, 8)).view(8, 16, 16) for tensor in (phi_key, value)
)
# (8, 16 * 16 + 16)
states = torch.cat([phi_K.mT @ V, phi_K.sum(1, keepdim=True)], dim=1).flatten(1)
marginal = (labels == 0).float()
count = marginal.sum(1, keepdim=True)
matrices, add_up = [], linear.add_up


def watched_sums(call, weights, *rest):
    matrices.append(weights.float())
    add_up(call, weights, *rest)


with replaced(add_up=watched_sums):
    backend.forward(problem.inputs)
W = matrices[0][0, :8, :8]  # padded with zeros to whole tiles
print(f"marginal blocks in a row: {int(count[0])}, weight: {W.max():.3f}")

assert torch.equal(W, marginal * 2.0 ** -count.log2().floor())


def linear_branch(W):
    """(120, 16), from the weights that add up the states."""
    H, Z = (W @ states).view(8, 17, 16).split([16, 1], dim=1)
    phi_Q = torch.nn.functional.pad(phi_query, (0, 0, 0, 8)).view(8, 16, 16)
    return ((phi_Q @ H) / (phi_Q @ Z.mT)).flatten(0, 1)[:120]


torch.testing.assert_close(linear_branch(W), saved.out_linear[0, 0])
assert torch.equal(linear_branch(W), linear_branch(marginal)), (
    "a factor of a power of two costs no bit"
)
assert not torch.equal(linear_branch(marginal / 3), linear_branch(marginal)), "another factor does"
Z = torch.tensor(32760 * 2.5)
assert Z.half().isinf() and (Z / 256).half().isfinite()

# %% [markdown]
# The matrix $W$ comes from a kernel that reads the labels (`labels.py`). For each row it counts the zeros, and then
# writes.
#
# ### A query block and its sum
#
# Now $\phi(Q_i)$ meets $H_i$ and $Z_i$. `linear_rows` does that for some rows of query block $i$: it reads slabs of
# $\phi(Q_i)$ and the same slabs of the sum, adds up numerator and denominator, and divides at the end. A denominator of
# zero belongs to a row without marginal block, or to one whose features are all zero, and gives zero.

# %%
show_source(linear.linear_rows)

# %% [markdown]
# ## The whole forward
#
# All pieces are there, and the kernel itself is short. Its parameters come in four groups: tensors of tokens, each with
# its strides; what `BlockMap` and the linear branch have prepared, which are the lists and the sums; the outputs; and
# sizes, with the plan as the last. Where our grid had a program for each query block, here a block may be cut into
# several programs of ROWS rows, for GPUs with less room.
#
# A program finds its head and rows, loads its tile of $Q$ once, and runs one branch after the other: `sparse_rows`
# along the list, then `linear_rows` with the sum of its block. The registers of the first branch are free when the
# second begins. No other program writes what it stores.

# %%
show_source(backend.forward_kernel)

# %% [markdown]
# `do_not_specialize` above the kernel needs a word. Triton compiles a kernel once for each combination of constexpr
# values, and by default also once for integers that are divisible by 16 and once for those that are not, since the
# former may allow wider loads. The 32,760 tokens of a video at 480p are not divisible by 16, and 32,768 are. Named in
# `do_not_specialize`, lengths are just numbers, and all sequences run the same binary. So what was tested at one length
# is what runs at another, and a new length does not have to be compiled. `tests/test_compiled.py` compares binaries.
#
# Its outputs are those of the `torch` backend, also with the softmax inside. NumPy may warn of a division by zero here:
# rows past the end have a denominator of 0, and are not stored.

# %%
inside = backend.forward(problem.inputs._replace(phi_query=None, phi_key=None))
torch.testing.assert_close(tuple(fused), tuple(saved))
torch.testing.assert_close(tuple(inside), tuple(saved))

# %% [markdown]
# ## The backward along rows
#
# $dQ_i$ belongs to a query block and is a sum over its critical key blocks. So `dq_kernel` walks as the forward does:
# the same list, the same two loops. It keeps $Q_i$, $dO^s_i$ and one tile of $dQ_i$, and each step reads $K_j$ and
# $V_j$. Before the walk it makes $D^s$, a row's sum of $dO^s \cdot O^s$, and leaves it in memory together with $L$: the
# next kernel needs these two numbers of every row, padded to be read without a mask.

# %%
show_source(sparse.dq_kernel, sparse.dq_step)

# %% [markdown]
# ## The backward, down the columns
#
# $dK_j$ and $dV_j$ belong to a key block, and get a share from every query block that has $j$ on its list. Two ways to
# do this:
#
# - Walk along rows and let each program add its share to $dK_j$ in memory. Several programs then add to the same place
#   at the same time, which needs atomic additions, and their order changes from run to run.
# - Walk down columns. One program owns $dK_j$ and $dV_j$, gathers all shares and writes once.
#
# The order matters because float addition is not associative:

# %%
large = torch.tensor(1e8)
assert (large + 1) - large == 0 and (large - large) + 1 == 1

# %% [markdown]
# So the package does the second, and results repeat bit for bit. A column needs a list of its own, the transpose of
# `kv_indices`. Columns differ in length, and one long column would make a table of equal rows large, so all lists are
# stored one after the other: the list of key block $j$ is `q_indices[q_offsets[j] : q_offsets[j + 1]]`.
#
# ![The walks of the kernels over the critical blocks](../docs/images/walks.svg)
#
# *Whoever owns a row or a column reads the critical blocks on its list and is the only one that writes its result.*

# %%
q_offsets, q_indices = block_map.q_offsets[0, 0], block_map.q_indices[0, 0]
columns = [q_indices[start:end].tolist() for start, end in q_offsets.unfold(0, 2, 1)]
for j, column in enumerate(columns):
    print(f"key block {j}: query blocks {column}")
    assert column == (labels[:, j] == 1).nonzero().flatten().tolist()

# %% [markdown]
# `dkdv_kernel` is the mirror image of `dq_kernel`. A program owns some keys of key block $j$: $K_j$ and $V_j$ are
# loaded once and stay, with one tile each of $dK_j$ and $dV_j$. $Q_i$ and $dO^s_i$ come and go, block after block down
# the list, and with them the two numbers of each row that `dq_kernel` left behind. Each step makes $P$ again from $L$,
# which is cheaper than keeping it, and the rest is lines 9 to 12 of Algorithm 2. At the end the linear branch's share,
# which is in memory already, is added.

# %%
show_source(sparse.dkdv_kernel)

# %% [markdown]
# Do the walks visit the critical pairs and no other? The forward was watched above. For the second kernel we replace
# `load`, with which the sparse branch reads tiles, and `store`, which writes tiles of outputs. In the interpreter a
# kernel is a Python function, and Python can say which one is running.


# %%
def running():
    """Name of the kernel from which this is called."""
    frame = inspect.currentframe()
    while not frame.f_code.co_name.endswith("_kernel"):
        frame = frame.f_back
    return frame.f_code.co_name


reads, writes = defaultdict(lambda: defaultdict(list)), Counter()
load, store = tokens.load, tokens.store


def recorded_load(head, first, *rest):
    reads[running()][number(tl.program_id(0))].append(number(first) // 16)
    return load(head, first, *rest)


def recorded_store(head, first, feature, tile):
    writes[running(), *map(number, (head.data, first, feature))] += 1
    store(head, first, feature, tile)


grads = (problem.grad_sparse, problem.grad_linear, problem.grad_lse)
with replaced(load=recorded_load, store=recorded_store):
    gradients = backend.backward(*grads, problem.inputs, fused)
kernels = {kernel for kernel, *_ in writes}
print(f"{len(kernels)} kernels write {len(writes)} tiles, each {max(writes.values())} time")

expected = pytorch.backward(*grads, problem.inputs, saved)
torch.testing.assert_close(tuple(gradients), tuple(expected))
assert set(writes.values()) == {1}

# %% [markdown]
# A program of `dkdv_kernel` reads K and V, then Q and dO for each step. The number in a cell below says in which step
# of its program it was visited. Both kernels visit the critical pairs and no other: the left one has a program for each
# row, the right one for each column.

# %%
along_rows = dict(visited)
down_columns = {j: tiles[2::2] for j, tiles in reads["dkdv_kernel"].items()}
assert down_columns == dict(enumerate(columns))

style = {label: {"facecolor": CLASS_COLOURS[label], "alpha": 0.45, "lw": 0} for label in (1, 0, -1)}
style[-1]["hatch"] = "///"
figure, panels = plt.subplots(1, 2, figsize=(7, 3.9), sharey=True, layout="constrained")
for panel, title in zip(panels, ("forward_kernel", "dkdv_kernel"), strict=True):
    for i in range(8):
        for j in range(8):
            panel.add_patch(
                plt.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, **style[int(labels[i, j])])
            )
    panel.set(xlim=(-0.5, 7.5), ylim=(7.5, -0.5), aspect="equal", xlabel="key block j", title=title)
    panel.set(xticks=range(8), yticks=range(8))
panels[0].set_ylabel("query block i")
for i, steps in along_rows.items():
    for step, j in enumerate(steps):
        panels[0].text(j, i, step, ha="center", va="center")
for j, steps in down_columns.items():
    for step, i in enumerate(steps):
        panels[1].text(j, i, step, ha="center", va="center")
keys = [plt.Rectangle((0, 0), 1, 1, **style[label]) for label in style]
figure.legend(keys, [CLASS_NAMES[label] for label in style], loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# ## The backward of the linear branch
#
# The linear branch goes back the way it came: from the outputs to the sums, through one matrix product to the states,
# and from the states to keys and values. `grad_sums_kernel` is the first part. A program owns query block $i$; it reads
# $\phi(Q_i)$, the gradient of its output, and $H_i$ and $Z_i$, which have been made again rather than kept. It goes
# over the slabs twice. The first time it adds up the denominator and $D^l$, two numbers per row. The second time it
# writes, slab by slab, the gradient of $\phi(Q_i)$, and $dH_i$ and $dZ_i$ in the layout of a state.

# %%
show_source(linear.grad_sums_kernel)

# %% [markdown]
# Then the product: $W^\top$ with all $dH_i$, $dZ_i$ gives all $dh_j$, $dz_j$ at once, by the same code as in the
# forward. `grad_keys_kernel` turns these into the linear shares of $dK_j$ and $dV_j$, one key block per program.
#
# ## What the interpreter cannot show
#
# Here is a kernel that is wrong. A hundred programs each read the same number, add 1 and write it back. On a GPU they
# run at once; two that read before either has written count as one. This is a **race**.


# %%
@triton.jit
def racing_kernel(total):
    tl.store(total, tl.load(total) + 1)


total = torch.zeros(1)
racing_kernel[(100,)](total)
print(total.item())

assert total.item() == 100

# %% [markdown]
# In the interpreter the result is right, because programs run one after the other. No run in it can find a race,
# however often it is repeated.
#
# This package had one, and not even in its source. Look at the loop in `linear_rows`. Its
# $\phi(Q)$ tile goes two ways: into the sum for the denominator and into the product with $H$. In the first version
# the compiler pipelined that loop. It fetched the tile of the next turn into shared memory while the matrix unit was at
# work on this one, which is what pipelining is for. But this tile had one buffer only, and the fetch overwrote what the
# matrix unit was still reading. The interpreter has no pipeline, and nothing to see. On an H200, with long sequences
# and blocks of 64, the same forward gave other bits when it was repeated. `num_stages=1` in the `tl.range` of that loop
# turns the pipeline off there. [Performance](../performance.md) says what has been run on which GPU.
#
# What this teaches:
#
# - What the interpreter confirms is the mathematics. What a GPU runs is the compiler's version of it.
# - Repeating a run and comparing bits is a sharp test, for kernels that promise to repeat. An error bound may not see a
#   few stale numbers. Where atomics add floats, bits may differ anyway and the test says nothing.
# - A small case may never lose a race. The test for this one needs a GPU and 32,760 tokens
#   (`tests/test_kernel_backends.py`).
# - The flaw could be read in the compiled code, as a wait for all products *but one* before the fetch.
#   `tests/test_compiled.py` reads it there, without a GPU.
#
# The interpreter is also blind to tf32, to memory that is undefined instead of 0, and to everything
# about speed: registers, shared memory, whether loads are wide.
#
# ## What the compiler says
#
# For the package's kernels there is a command. It compiles each of them for one of four architectures, without a GPU,
# prints registers, stack, shared memory and the kind of matrix instruction, and fails where a kernel spills registers
# to memory or needs more shared memory than there is:
#
# ```sh
# sla-ref kernels --target sm_90
# ```
#
# ## Exercises
#
# **1. The other list.** The forward and `dq_kernel` walk along rows, `dkdv_kernel` down columns. Make the second kind
# of list from the first: `q_offsets` and `q_indices` of one head, with the query blocks of each column ascending. The
# lists of rows have different lengths here, so only the first `kv_num_blocks[i]` entries of row $i$ count.


# %% tags=["exercise"]
def column_lists(kv_num_blocks, kv_indices, key_blocks):
    """(q_offsets (Tk + 1), q_indices) from kv_num_blocks (Tq) and kv_indices (Tq, capacity)."""
    ...


# %% tags=["solution"] mistake=["[:length]", ""]
def column_lists(kv_num_blocks, kv_indices, key_blocks):
    """(q_offsets (Tk + 1), q_indices) from kv_num_blocks (Tq) and kv_indices (Tq, capacity)."""
    columns = [[] for _ in range(key_blocks)]
    for i, (length, row) in enumerate(zip(kv_num_blocks.tolist(), kv_indices, strict=True)):
        for j in row[:length].tolist():
            columns[j].append(i)
    offsets = [0]
    for column in columns:
        offsets.append(offsets[-1] + len(column))
    return torch.tensor(offsets), torch.tensor([i for column in columns for i in column])


# %% tags=["check"]
uneven = testing.make_problem(
    heads=1, query_length=120, head_dim=16, block_q=16, block_k=16, labels="random", seed=1
).inputs.block_map
lists = uneven.kv_num_blocks[0, 0], uneven.kv_indices[0, 0]
assert len(lists[0].unique()) > 1

with check_exercise(1, column_lists):
    wanted = uneven.q_offsets[0, 0], uneven.q_indices[0, 0, : int(lists[0].sum())]
    expect("(q_offsets, q_indices)", column_lists(*lists, 8), wanted)

# %% [markdown]
# **2. Work per byte.** A kernel waits for memory if it computes too little with what it reads. Count for the sparse
# branch of the forward, one head, whole blocks: the operations of its two products (a multiplication and an addition
# are two) for each byte of Q, K and V that its programs read. A program owns one query block.


# %% tags=["exercise"]
def work_per_byte(critical, query_blocks, block_q, block_k, head_dim, bytes_per_number):
    """Operations per byte, with `critical` key blocks on the list of each query block."""
    ...


# %% tags=["solution"] mistake=["2 * critical * block_k", "critical * block_k"]
def work_per_byte(critical, query_blocks, block_q, block_k, head_dim, bytes_per_number):
    """Operations per byte, with `critical` key blocks on the list of each query block."""
    operations = query_blocks * critical * 4 * block_q * block_k * head_dim
    numbers = query_blocks * (block_q + 2 * critical * block_k) * head_dim
    return operations / (numbers * bytes_per_number)


# %% tags=["check"]
with check_exercise(2, work_per_byte):
    # 4 * 16 * 16 * 16 operations on 3 tiles of 16 * 16 float32
    expect("one pair", work_per_byte(1, 1, 16, 16, 16, 4), 16 / 3, rtol=1e-6)
    expect("more rows", work_per_byte(1, 9, 16, 16, 16, 4), 16 / 3, rtol=1e-6)
    # Wan at 480p in bfloat16: 5 % of 512 key blocks, in query blocks of 64 and of 128
    small = work_per_byte(25, 512, 64, 64, 128, 2)
    large = work_per_byte(25, 256, 128, 64, 128, 2)
    expect("blocks of 64", small, 62.745, rtol=1e-4)
    expect("query blocks of 128", large, 123.077, rtol=1e-4)
    print(f"{small:.0f} operations per byte with block_q=64, {large:.0f} with block_q=128")

# %% [markdown]
# Every query block loads the keys and values on its list once more. Larger query blocks share each load among more
# rows, which is why [Use it in Wan](../wan.md#put-sla-in) starts with `block_q=128`.

# %% [markdown]
# ## Recap
#
# A program owns a block and is the only one that writes its results. The sparse branch walks along the rows of the map
# for $O$ and $dQ$, and down its columns for $dK$ and $dV$; the linear branch makes states, adds them up with one matrix
# product, and goes back the same way. The interpreter proves the arithmetic; races, precision and speed need a compiler
# or a GPU.
#
# Next: [7. The Numba kernel](07_numba_kernel.md)
