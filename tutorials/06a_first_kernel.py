# %% [markdown]
# # 6a. A first Triton kernel
#
# A GPU kernel is a function that thousands of programs run at once, each on a tile of its own. Triton writes such
# functions in Python, and its interpreter runs them on a CPU, where they can be stopped and looked into. Here a kernel
# of three lines grows into the sparse branch, and its running $m$, $l$ and $O$ are printed between blocks. Afterwards
# you will be able to write a kernel that walks along a list of blocks, and know what a program, a tile and a mask are
# and what the compiler makes of them. [6b](06b_package_kernels.md) then reads the kernels of the package.
#
# Builds on: [4. Algorithm 1](04_algorithm_1.md), [5. Algorithm 2](05_algorithm_2.md)
#
# The interpreter is switched on by an environment variable. Every function marked with `@triton.jit` looks at it when
# it is declared, and Triton's own, such as `tl.sum`, are declared when `triton` is imported. So we set the variable
# first.

# %%
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import subprocess
import sys
import tempfile
from inspect import getsource
from pathlib import Path

import torch
import triton
import triton.language as tl
from lesson import check_exercise, expect

from sla_ref import testing
from sla_ref.backends import pytorch

assert triton.knobs.runtime.interpret, (
    "the cells below look into running kernels: leave TRITON_INTERPRET unset, or 1"
)

# %% [markdown]
# ## Three lines
#
# This kernel doubles the numbers in `source`.


# %%
@triton.jit
def double_kernel(source, target, length, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tile = tl.load(source + place, mask=place < length, other=0.0)
    tl.store(target + place, 2 * tile, mask=place < length)


numbers = torch.arange(10.0)
doubled = torch.full((10,), float("nan"))
double_kernel[(3,)](numbers, doubled, 10, TILE=4)
print(doubled)

assert torch.equal(doubled, 2 * numbers)

# %% [markdown]
# Word by word:
#
# - `double_kernel[(3,)]` starts the kernel on a **grid** of three. Each of the three runs is a **program**. All run the
#   same code, in no promised order, and `tl.program_id(0)` tells a program which one it is: 0, 1 or 2.
# - `tl.arange(0, TILE)` is the numbers 0 to 3. So `place` is not one number but a **tile**, here `[4, 5, 6, 7]` in
#   program 1, and all that follows works on whole tiles. On the GPU a program is a group of threads that share the
#   elements of its tiles among them.
# - A tensor arrives as a pointer, the address of its first element. `source + place` is a tile of addresses. Shape and
#   strides do not come along; a kernel that needs them takes them as arguments of their own.
# - `tl.load` reads all addresses of a tile. Three programs of four cover twelve places, and there are ten. The **mask**
#   says which exist. Where it is false nothing is read or written, and a read gives `other`.
# - `TILE` is a `tl.constexpr`, a number that the compiler knows. Shapes of tiles have to be such numbers, and powers of
#   two. For another value another kernel is compiled. `length` is known only when the kernel runs.
#
# In the interpreter, programs run one after another and a tile is a NumPy array. A kernel may then call any Python
# function, and that is how we look inside. On a GPU this is not possible; there `tl.device_print` prints from a kernel.


# %%
def values(tile):
    """What a tile holds at this moment, as a tensor; in the interpreter only."""
    return torch.from_numpy(tile.handle.data.copy())


def number(scalar):
    """The same of a single number, which may also be a plain int."""
    return int(values(scalar)) if isinstance(scalar, tl.tensor) else scalar


def look(program, place, tile):
    print(
        f"program {number(program)}: places {values(place).tolist()}, tile {values(tile).tolist()}"
    )


@triton.jit
def double_and_look_kernel(source, target, length, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tile = tl.load(source + place, mask=place < length, other=0.0)
    look(tl.program_id(0), place, tile)
    tl.store(target + place, 2 * tile, mask=place < length)


double_and_look_kernel[(3,)](numbers, doubled, 10, TILE=4)

# %% [markdown]
# `other` is part of the result wherever a tile is summed up. For a sum 0 is right; for a maximum it is not. Here are
# ten negative numbers, in a buffer that goes on with NaN to reveal any read past the end.


# %%
@triton.jit
def largest_kernel(source, target, length, other, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tile = tl.load(source + place, mask=place < length, other=other)
    tl.store(target + tl.program_id(0), tl.max(tile, 0))


def in_nan(tensor):
    """The same tokens (N, D) in a buffer whose memory goes on with NaN."""
    buffer = torch.cat([tensor, torch.full((16, *tensor.shape[1:]), float("nan"))])
    return buffer[: len(tensor)]


negative = in_nan(-1 - numbers)
with_zero, with_infinity = torch.zeros(3), torch.zeros(3)
largest_kernel[(3,)](negative, with_zero, 10, 0.0, TILE=4)
largest_kernel[(3,)](negative, with_infinity, 10, float("-inf"), TILE=4)
print(with_zero.tolist(), with_infinity.tolist())

assert with_infinity.tolist() == [-1, -5, -9]
assert with_zero.tolist() == [-1, -5, 0]  # a number that is nowhere in the data

# %% [markdown]
# Left out, `other` is 0 in the interpreter and undefined on a GPU. In the package every masked load names it.
#
# ## A product of tiles
#
# Attention needs tiles with two axes. Below, `tile_of` gives the addresses of some tokens: a column of row numbers
# times the length of a row, plus a row of column numbers. A function marked `@triton.jit` can be called from kernels.
#
# The second new thing is `tl.dot`, the product of two tiles, which is what a GPU's matrix units do. The package asks
# for `input_precision="ieee"`: by default a GPU may round float32 to tf32 first, which has 10 bits behind the point
# instead of 23. The interpreter computes in full precision whatever is asked for.
#
# One head of 120 tokens with 16 dimensions, in blocks of 16, the smallest that the package's kernels take: eight
# blocks, the last with 8 tokens. Of the eight key blocks of each query block three are critical, three marginal and two
# negligible. The grid has two axes, one program for each pair of blocks.


# %%
@triton.jit
def tile_of(tokens, first, ROWS: tl.constexpr, D: tl.constexpr):
    """Addresses of ROWS tokens from `first`. # [ROWS, D]"""
    return tokens + (first + tl.arange(0, ROWS))[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def load_tokens(tokens, first, length, ROWS: tl.constexpr, D: tl.constexpr):
    """ROWS tokens from `first`; those past the end are zeros. # [ROWS, D]"""
    inside = (first + tl.arange(0, ROWS) < length)[:, None]
    return tl.load(tile_of(tokens, first, ROWS, D), mask=inside, other=0.0)


@triton.jit
def scores_kernel(query, key, scores, length, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    first_row, first_key = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    Q = load_tokens(query, first_row, length, BLOCK, D)  # [BLOCK, D]
    K = load_tokens(key, first_key, length, BLOCK, D)  # [BLOCK, D]
    S = tl.dot(Q, tl.trans(K), input_precision="ieee") * scale  # [BLOCK, BLOCK]
    row, column = first_row + tl.arange(0, BLOCK), first_key + tl.arange(0, BLOCK)
    inside = (row < length)[:, None] & (column < length)[None, :]
    tl.store(scores + row[:, None] * length + column[None, :], S, mask=inside)


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
query, key, value, phi_query, phi_key = (in_nan(tensor[0, 0]) for tensor in problem.inputs[:5])
block_map, scale = problem.inputs.block_map, problem.inputs.scale
labels = block_map.labels[0, 0]  # (8, 8): 1 critical, 0 marginal, -1 negligible
print(labels.numpy())

scores = torch.full((120, 120), float("nan"))
scores_kernel[(8, 8)](query, key, scores, 120, scale, D=16, BLOCK=16)
torch.testing.assert_close(scores, scale * query @ key.T)

# %% [markdown]
# ## First step: attention over all blocks
#
# This kernel wrote the whole $N \times N$ scores to memory, which is what SLA wants to avoid. The next one keeps each
# tile to itself. One program per query block: it walks along the key blocks with the online softmax of [tutorial
# 4](04_algorithm_1.md) and holds $m$, $l$ and $O$ all the while. Tiles of one axis, `[BLOCK]`, are one number per row.
# `watch` is Python and notes what row 3 of query block 3 holds after each key block.


# %%
trace = []


def watch(i, j, m, l, O):
    """Notes row 3 of query block 3 after key block j."""
    if number(i) == 3:
        trace.append(
            (number(j), values(m)[3].item(), values(l)[3].item(), values(O)[3].norm().item())
        )


def print_trace():
    for j, m, l, O in trace:
        print(f"key block {j}:  m {m:5.2f}  l {l:5.2f}  |O| {O:5.2f}")


@triton.jit
def softmax_step(m, l, O, S, V):
    """Takes in a tile of scores [BLOCK, BLOCK] and its values [BLOCK, D]."""
    m_new = tl.maximum(m, tl.max(S, 1))  # [Alg. 1 L9]
    P = tl.exp(S - m_new[:, None])  # [Alg. 1 L9]
    correction = tl.exp(m - m_new)
    l = l * correction + tl.sum(P, 1)  # [Alg. 1 L10]
    # P V, added to the third argument [Alg. 1 L11]
    O = tl.dot(P, V, O * correction[:, None], input_precision="ieee")
    return m_new, l, O


@triton.jit
def attention_kernel(query, key, value, out, length, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    Q = load_tokens(query, i * BLOCK, length, BLOCK, D)  # [BLOCK, D]
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    O = tl.zeros([BLOCK, D], tl.float32)
    for j in range(tl.cdiv(length, BLOCK)):
        K = load_tokens(key, j * BLOCK, length, BLOCK, D)
        V = load_tokens(value, j * BLOCK, length, BLOCK, D)
        S = tl.dot(Q, tl.trans(K), input_precision="ieee") * scale
        m, l, O = softmax_step(m, l, O, S, V)
        watch(i, j, m, l, O)
    inside = (i * BLOCK + tl.arange(0, BLOCK) < length)[:, None]
    tl.store(tile_of(out, i * BLOCK, BLOCK, D), O / l[:, None], mask=inside)


# %% [markdown]
# With 112 tokens, seven whole blocks, it is softmax attention:


# %%
def run_attention(length):
    """Through the kernel and through torch. # (length, 16) each"""
    trace.clear()
    q, k, v = (in_nan(tensor[:length]) for tensor in (query, key, value))
    out = torch.full((length, 16), float("nan"))
    attention_kernel[(triton.cdiv(length, 16),)](q, k, v, out, length, scale, D=16, BLOCK=16)
    return out, torch.softmax(scale * q @ k.T, dim=1) @ v


torch.testing.assert_close(*run_attention(112))
print_trace()

# %% [markdown]
# With all 120 it is wrong, though every load is masked. The eight keys past the end read as zeros, so their scores are
# 0. A score of 0 is not a weight of 0: it is $e^{0 - m}$, and ends up in $l$.

# %%
wrong, right = run_attention(120)
excess = right.norm(dim=1) / wrong.norm(dim=1)  # l with the eight keys too many, over l without
print(f"l is too large by a factor of {excess.min():.3f} to {excess.max():.3f}")

assert (excess > 1).all()
torch.testing.assert_close(wrong * excess[:, None], right)

# %% [markdown]
# ## Second step: the sparse branch
#
# What is missing is a score of $-\infty$ for keys past the end, and a walk that visits only the critical blocks. The
# kernel does not look at the labels. It gets, for each query block, the list of its critical key blocks. `kv_indices`
# of a block map holds these lists, ascending, and `kv_num_blocks` their lengths.

# %%
capacity = block_map.kv_indices.shape[-1]
for i in range(8):
    print(f"query block {i}: key blocks {block_map.kv_indices[0, 0, i].tolist()}")
    assert block_map.kv_indices[0, 0, i].tolist() == (labels[i] == 1).nonzero().flatten().tolist()
assert (block_map.kv_num_blocks == capacity).all()

# %% [markdown]
# The number of steps is now read from memory, and so is the place of each tile. That is all that sparse means here:
# what is not on the list is never touched. At the end come the two outputs of the sparse branch, $O^s = O / l$ and $L =
# m + \log l$. The package's kernel, compiled for an H100, keeps its tiles in these places:
#
# ![The way of the tiles through a GPU's memory](../docs/images/memory.svg)
#
# *Only tiles move: $Q_i$ comes once, a pair $K_j$, $V_j$ in each step, and all that goes back is one tile of $O$ and
# its $L$.*


# %%
@triton.jit
def sparse_kernel(
    query,
    key,
    value,
    kv_num_blocks,
    kv_indices,
    out,
    lse,
    length,
    scale,
    capacity,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = i * BLOCK + tl.arange(0, BLOCK)
    Q = load_tokens(query, i * BLOCK, length, BLOCK, D)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    O = tl.zeros([BLOCK, D], tl.float32)
    for step in range(tl.load(kv_num_blocks + i)):
        j = tl.load(kv_indices + i * capacity + step)
        K = load_tokens(key, j * BLOCK, length, BLOCK, D)
        V = load_tokens(value, j * BLOCK, length, BLOCK, D)
        S = tl.dot(Q, tl.trans(K), input_precision="ieee") * scale
        S = tl.where((j * BLOCK + tl.arange(0, BLOCK) < length)[None, :], S, float("-inf"))
        m, l, O = softmax_step(m, l, O, S, V)
        watch(i, j, m, l, O)
    # [Alg. 1 L16]
    tl.store(tile_of(out, i * BLOCK, BLOCK, D), O / l[:, None], mask=(row < length)[:, None])
    tl.store(lse + row, m + tl.log(l), mask=row < length)  # [Alg. 1 L16]


trace.clear()
out, lse = torch.full((120, 16), float("nan")), torch.full((120,), float("nan"))
lists = block_map.kv_num_blocks, block_map.kv_indices
sparse_kernel[(8,)](query, key, value, *lists, out, lse, 120, scale, capacity, D=16, BLOCK=16)
print_trace()

# a larger score came, and shrank what was there
assert trace[1][1] > trace[0][1] and trace[1][2] < trace[0][2]
assert [j for j, *_ in trace] == block_map.kv_indices[0, 0, 3].tolist()

# %% [markdown]
# Not a number of the NaN around the inputs got in, and both outputs are those of the `torch` backend:

# %%
saved = pytorch.forward(problem.inputs)
torch.testing.assert_close(out, saved.out_sparse[0, 0])
torch.testing.assert_close(lse, saved.lse[0, 0])

# %% [markdown]
# ## What the compiler makes of it
#
# Compiling needs no GPU. It does need a Python without the interpreter, so here is one that gets `double_kernel` with
# 128 elements a tile, and prints what came out for an H100 or H200 (sm_90), in PTX, the assembly language of NVIDIA's
# GPUs.

# %%
program = f"""
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

{getsource(double_kernel.fn)}
signature = {{"source": "*fp32", "target": "*fp32", "length": "i32"}}
source = ASTSource(double_kernel, signature, constexprs={{"TILE": 128}})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""
with tempfile.TemporaryDirectory() as folder:
    script = Path(folder, "compile_it.py")
    script.write_text(program, encoding="utf-8")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, encoding="utf-8"
    )
assert done.returncode == 0, done.stderr
wanted = ("%ctaid.x;", "%tid.x;", "setp.", "ld.global", "add.f32", "st.global", ".reqntid")
ptx = [
    " ".join(line.split())
    for line in done.stdout.splitlines()
    if any(word in line for word in wanted)
]
print(*ptx, sep="\n")

assert [line for line in ptx if line.startswith("@%p") and "ld.global" in line], (
    "the load has a condition"
)
assert [line for line in ptx if line.startswith("@%p") and "st.global" in line], (
    "and so has the store"
)

# %% [markdown]
# The program id is `%ctaid.x`. Of the tile each of the 128 threads (`.reqntid`) has one element, found from its own
# number `%tid.x`. The mask has become a comparison, `setp.lt`, and `@%p1` in front of an instruction means: only where
# it holds. A program of our three lines is 128 threads that do the same thing in step.
#
# ## Exercises
#
# **1. States.** Write the kernel that makes $h_j = \phi(K_j)^\top V_j$ and $z_j$, one key block per program. $h$ is
# (Tk, D, D) and $z$ (Tk, D), both contiguous. Memory behind the tokens holds NaN, so the last block needs care. Use
# `load_tokens`; `tile_of` can also address the rows of $h_j$.


# %% tags=["exercise"]
@triton.jit
def states_kernel(phi_key, value, h, z, length, D: tl.constexpr, BLOCK: tl.constexpr):
    """Key block j = program: writes h[j] (D, D) and z[j] (D). [Alg. 1 L4]"""
    ...


# %% tags=["solution"] mistake=["tl.dot(tl.trans(phi), V", "tl.dot(phi, V"]
@triton.jit
def states_kernel(phi_key, value, h, z, length, D: tl.constexpr, BLOCK: tl.constexpr):
    """Key block j = program: writes h[j] (D, D) and z[j] (D). [Alg. 1 L4]"""
    j = tl.program_id(0)
    phi = load_tokens(phi_key, j * BLOCK, length, BLOCK, D)  # [BLOCK, D]
    V = load_tokens(value, j * BLOCK, length, BLOCK, D)  # [BLOCK, D]
    tl.store(tile_of(h, j * D, D, D), tl.dot(tl.trans(phi), V, input_precision="ieee"))
    tl.store(z + j * D + tl.arange(0, D), tl.sum(phi, 0))


# %% tags=["check"]
h, z = torch.full((8, 16, 16), float("nan")), torch.full((8, 16), float("nan"))
phi_K, V = (
    torch.nn.functional.pad(tensor, (0, 0, 0, 8)).view(8, 16, 16) for tensor in (phi_key, value)
)

with check_exercise(1, states_kernel):
    states_kernel[(8,)](phi_key, value, h, z, 120, D=16, BLOCK=16)
    expect("h[j, d, e]", h, phi_K.mT @ V, rtol=1.3e-6, atol=1e-5)
    expect("z[j, d]", z, phi_K.sum(1), rtol=1.3e-6, atol=1e-5)

# %% [markdown]
# **2. Down a column.** Key block $j$ owns $dV_j$, to which every query block with $j$ on its list adds a share. Write
# the kernel for the sparse branch's share: one program per key block, which walks down these query blocks, makes
# $P = e^{S - L}$ again and adds up $P^\top dO^s$, lines 9 and 10 of Algorithm 2. The query blocks of $j$ are
# `q_indices[q_offsets[j] : q_offsets[j + 1]]`. Memory behind `lse` holds NaN as well: which `other` gives rows past the
# end no weight?


# %% tags=["exercise"]
@triton.jit
def dv_kernel(
    query,
    key,
    grad_sparse,
    lse,
    q_offsets,
    q_indices,
    grad_value,
    length,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Key block j = program: writes dV_j, rows j * BLOCK ... of grad_value (N, D)."""
    ...


# %% tags=["solution"] mistake=["tl.trans(P), dO", "P, dO"]
@triton.jit
def dv_kernel(
    query,
    key,
    grad_sparse,
    lse,
    q_offsets,
    q_indices,
    grad_value,
    length,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Key block j = program: writes dV_j, rows j * BLOCK ... of grad_value (N, D)."""
    j = tl.program_id(0)
    K = load_tokens(key, j * BLOCK, length, BLOCK, D)
    dV = tl.zeros([BLOCK, D], tl.float32)
    for step in range(tl.load(q_offsets + j), tl.load(q_offsets + j + 1)):
        first = tl.load(q_indices + step) * BLOCK
        row = first + tl.arange(0, BLOCK)
        Q = load_tokens(query, first, length, BLOCK, D)
        S = tl.dot(Q, tl.trans(K), input_precision="ieee") * scale
        L = tl.load(lse + row, mask=row < length, other=float("inf"))
        P = tl.exp(S - L[:, None])  # [Alg. 2 L9]
        dO = load_tokens(grad_sparse, first, length, BLOCK, D)
        dV = tl.dot(tl.trans(P), dO, dV, input_precision="ieee")  # [Alg. 2 L10]
    inside = (j * BLOCK + tl.arange(0, BLOCK) < length)[:, None]
    tl.store(tile_of(grad_value, j * BLOCK, BLOCK, D), dV, mask=inside)


# %% tags=["check"]
q_offsets, q_indices = block_map.q_offsets[0, 0], block_map.q_indices[0, 0]
grad_value = in_nan(torch.full((120, 16), float("nan")))
dO = in_nan(problem.grad_sparse[0, 0])
no_linear = torch.zeros_like(problem.grad_linear)
sparse_share = pytorch.backward(problem.grad_sparse, no_linear, None, problem.inputs, saved).value

with check_exercise(2, dv_kernel):
    dv_kernel[(8,)](
        query, key, dO, in_nan(lse), q_offsets, q_indices, grad_value, 120, scale, D=16, BLOCK=16
    )
    expect("dV", grad_value, sparse_share[0, 0], rtol=1.3e-6, atol=1e-5)

# %% [markdown]
# ## Recap
#
# A Triton kernel is written for one tile, and many programs run it at once. A mask says which places of a tile exist,
# and what the others read as has to suit what is computed from them. A list of critical blocks turns attention into the
# sparse branch: what is not on the list is never touched.
#
# Next: [6b. The package's Triton kernels](06b_package_kernels.md)
