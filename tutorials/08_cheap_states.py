# %% [markdown]
# # 8. Cheap states
#
# Algorithm 1 adds a $D \times D$ matrix for every marginal block of every query block, and that is most of all pairs.
# Afterwards you will know four ways to make these sums cheaper, how many additions each takes, which of them loses
# digits, and why the one with the most arithmetic is the fastest over most of the range.
#
# Builds on: [3. The linear branch](03_linear_branch.md), [4. Algorithm 1](04_algorithm_1.md).

# %% [markdown]
# ## What has to be summed
#
# Each key block $j$ has a state $h_j = \phi(K_j)^\top V_j$. Query block $i$ needs the sum over its marginal blocks
# [Alg. 1 L13]:
#
# $$H_i = \sum_{j : M_{ij} = 0} h_j.$$
#
# ![States of the marginal blocks, summed](../docs/images/states.svg)
#
# *Every query block makes a sum of its own, over nearly all states.*
#
# Done pair by pair, this is $T_q T_k$ times the marginal share, at $D^2$ numbers each. It grows with $N^2$, as full
# attention does, if only with a small factor. At Wan's 480p the additions are 14 % on top of what the critical blocks
# cost.

# %%
from functools import partial

import block_states as states
import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, measured, show_source

import sla_ref
from sla_ref import analysis
from sla_ref.backends import pytorch
from sla_ref.lab import evaluate, weights

N, D, BLOCK = 32760, 128, 64
T = -(-N // BLOCK)
marginal_blocks = T - int(0.05 * T) - int(0.10 * T)
additions = T * marginal_blocks * D**2
critical_work = analysis.attention_flops(N, N, D, critical_share=int(0.05 * T) / T)
print(
    f"{T} x {marginal_blocks} states of {D} x {D}: {additions / 1e9:.1f} G additions for one head"
)
print(
    f"critical blocks: {critical_work / 1e9:.1f} GFLOP, so {additions / critical_work:.0%} on top"
)
assert T == 512 and round(additions / critical_work, 2) == 0.14

# %% [markdown]
# We take labels and states from the lab's video model, flatten each state to a row of $D^2$ numbers, and write the
# plain loop. Everything is in float64, so a difference is a mistake, not rounding.

# %%
teacher, card = weights.load_weights(weights.TEACHER)
clips = evaluate.held_out(teacher, 2)
query, key, value = (
    each.double()
    for each in evaluate.attention_inputs(teacher, clips.x, clips.time, clips.labels)[2]
)
block_map = sla_ref.classify_blocks(query, key, block_q=16, block_k=16)

member = block_map.labels[0, 0] == 0  # (Tq, Tk): is key block j marginal for query block i?
phi_K, V = (tokens[0, 0].unflatten(0, (-1, 16)) for tokens in (key.softmax(dim=-1), value))
h = (phi_K.mT @ V).flatten(1)  # (Tk, D * D)

H, count = torch.zeros_like(h), 0
for i in range(64):
    for j in range(64):
        if member[i, j]:
            H[i] += h[j]
            count += 1
print(f"plain loop: {count} additions of {h.shape[1]} numbers")
assert count == 64 * (64 - 3 - 6)


def check(way):
    """Compare a way with the plain loop; how many additions it took."""
    sums, additions = way(member, h)
    assert torch.allclose(sums, H, rtol=0, atol=1e-12 * H.abs().max().item())
    print(f"{additions} additions, {additions / count:.2f} of the plain loop")
    return additions


# %% [markdown]
# ## 1. A lookup table
#
# The loop asks about every pair, also about those that are not marginal. If few are, write their positions down once
# and walk along the list. The additions stay the same, the asking goes. The paper uses such tables where the mask is
# very sparse, above 90 %. `embedding_bag` is torch's name for adding up the rows that a list names.

# %%
show_source(states.lookup_table)
assert check(states.lookup_table) == count

# %% [markdown]
# ## 2. Pre-aggregation
#
# With the default ratios it is the other way round: 85 % are marginal. Then add up all states once, and subtract from
# this total the few that do not belong to row $i$.

# %%
show_source(states.pre_aggregate)
assert check(states.pre_aggregate) == 64 + 64 * (3 + 6)

# %% [markdown]
# ## 3. Four Russians
#
# Near one half both lists are long. The method of the Four Russians (Arlazarov, Dinic, Kronrod and Faradzhev, 1970)
# takes $g$ neighbouring states together. They have only $2^g$ subsets. All subset sums are computed once: each state
# doubles the table, at one addition per new entry. After that every row does a single addition per group, of the entry
# that its $g$ labels, read as a binary number, point to:
#
# $$\frac{T_k}{g} \left(2^g - 1\right) + T_q \frac{T_k}{g} \quad \text{instead of up to} \quad T_q T_k.$$

# %%
show_source(states.four_russians)
for group in (2, 4, 8):
    print(f"g = {group}: ", end="")
    assert check(partial(states.four_russians, group=group)) == 64 // group * (2**group - 1 + 64)

# %% [markdown]
# ## 4. One matrix product
#
# Write the labels as a matrix of 0 and 1. Then all sums are one product, $H = [M = 0] \, h$, a $T_q \times T_k$ matrix
# times a $T_k \times D^2$ one. It multiplies by every 0 and by every 1. It is not in the paper, and it counts the most
# operations.

# %%
show_source(states.matrix_product)
assert check(states.matrix_product) == 64 * 64

# %% [markdown]
# ## Counted
#
# How the counts depend on the marginal share, for 512 x 512 blocks. The sums themselves do not matter here, so the
# states are single numbers.

# %%
SHARES = [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0]
WAYS = {
    "lookup table": states.lookup_table,
    "pre-aggregation": states.pre_aggregate,
    "Four Russians, g = 7": partial(states.four_russians, group=7),
    "matrix product": states.matrix_product,
}
LINES = dict(
    zip(
        WAYS,
        [("#0072B2", "o-"), ("#E69F00", "s--"), ("#009E73", "^-."), ("#CC79A7", "x:")],
        strict=True,
    )
)

generator = torch.Generator().manual_seed(0)
# a random order of the key blocks in each row
rank = torch.rand(512, 512, generator=generator).argsort(dim=1)
numbers = torch.randn(512, 1, generator=generator)
counts = {name: [] for name in WAYS}
for share in SHARES:
    some = rank < round(share * 512)
    for name, way in WAYS.items():
        counts[name].append(way(some, numbers)[1])

# %% [markdown]
# The lookup table wins below 18 % marginal, pre-aggregation above 82 %, Four Russians in between, where it stays below
# a fifth of all pairs. A group of 7 is the best for 512 rows: a larger one spends more on its tables than the rows
# save.

# %%
for share, *of_ways in zip(SHARES, *counts.values(), strict=True):
    fewest = list(WAYS)[of_ways.index(min(of_ways))]
    assert fewest == (
        "lookup table"
        if share < 0.18
        else "pre-aggregation"
        if share > 0.82
        else "Four Russians, g = 7"
    )
assert max(counts["Four Russians, g = 7"]) < 0.2 * 512**2


def russian_additions(group, rows=512, blocks=512):
    """Additions of Four Russians; a group that is not full counts as one."""
    return -(-blocks // group) * (2**group - 1 + rows)


assert min(range(1, 13), key=russian_additions) == 7
assert russian_additions(7) == counts["Four Russians, g = 7"][0]

# %%
figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, (colour, style) in LINES.items():
    panel.plot(
        SHARES,
        [each / 1000 for each in counts[name]],
        style,
        color=colour,
        markersize=4,
        label=name,
    )
panel.axvline(0.85, color="#8A8F98", linewidth=1)
panel.text(0.86, 140, "defaults", fontsize=9)
panel.set(xlabel="marginal share of the key blocks", ylabel="thousand row additions")
panel.set_title("Counted: 512 x 512 blocks", fontsize=11)
panel.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## Timed
#
# A count is not a time. `benchmarks/states.py` timed the same four functions on a CPU with states of 64 x 64 numbers.
# The numbers below are read from the file that it wrote.

# %%
timed = measured("states")
machine = timed["machine"]
print(f"{machine['cpu']}, {machine['torch_threads']} threads, torch {machine['versions']['torch']}")
print(
    f"{timed['blocks']} x {timed['blocks']} blocks, D {timed['head_dim']}; milliseconds, "
    f"fastest of {timed['turns']}"
)
print(
    f"load average during the run: {timed['load_average']['before'][0]:.0f} (an idle machine has 0)"
)

NAMES = list(timed["rows"][0]["ways"])
print("marginal  " + "  ".join(name.replace("_", " ") for name in NAMES))
for row in timed["rows"]:
    figures = (f"{row['ways'][name]['ms']:{len(name)}.1f}" for name in NAMES)
    print(f"{row['marginal_share']:8.0%}  " + "  ".join(figures))

# %%
shares_timed = [row["marginal_share"] for row in timed["rows"]]
FILE_NAMES = ["lookup_table", "pre_aggregate", "four_russians_7", "matrix_product"]
figure, panel = plt.subplots(figsize=(7, 4.0), layout="constrained")
for name, file_name in zip(WAYS, FILE_NAMES, strict=True):
    colour, style = LINES[name]
    panel.plot(
        shares_timed,
        [row["ways"][file_name]["ms"] for row in timed["rows"]],
        style,
        color=colour,
        markersize=5,
        label=name,
    )
russians_4 = [row["ways"]["four_russians_4"]["ms"] for row in timed["rows"]]
style = {"color": "#009E73", "markersize": 5, "alpha": 0.6, "label": "Four Russians, g = 4"}
panel.plot(shares_timed, russians_4, "v-.", **style)
panel.axvline(0.85, color="#8A8F98", linewidth=1)
panel.set(xlabel="marginal share of the key blocks", ylabel="milliseconds", ylim=(0, None))
panel.set_title("Timed on a CPU: 512 x 512 blocks, D 64", fontsize=11)
figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# The machine was busy with other work, so trust the order and not the digits. With few marginal blocks, up to 5 %, the
# lookup table is the fastest; with nearly all, from 95 %, pre-aggregation. In between it is the matrix product, though
# it counts the most: at one half it does twice the additions of the lookup table in less than half of its time. Its
# speed does not depend on the labels at all, and matrix products are what processors are built for. At 10 % and at 85
# %, the default, two ways are too close to call.
#
# Four Russians saves the most additions and wins nowhere. Its tables hold $2^g / g$ times as many numbers as the
# states, 18 times for $g = 7$. They have to be written, and then read from all over the memory. An addition is cheap;
# fetching a number is not.

# %%
fastest = {
    row["marginal_share"]: min(NAMES, key=lambda name: row["ways"][name]["ms"])
    for row in timed["rows"]
}
for share, name in fastest.items():
    print(f"{share:4.0%}  {name.replace('_', ' ')}")
assert all(fastest[share] == "lookup_table" for share in (0.02, 0.05))
assert all(fastest[share] == "matrix_product" for share in (0.25, 0.5, 0.75))
assert all(fastest[share] == "pre_aggregate" for share in (0.95, 0.98, 1.0))
assert not any(name.startswith("four_russians") for name in fastest.values())
half = next(row["ways"] for row in timed["rows"] if row["marginal_share"] == 0.5)
assert half["matrix_product"]["additions"] == 2 * half["lookup_table"]["additions"]
assert half["matrix_product"]["ms"] < half["lookup_table"]["ms"] / 2

# %% [markdown]
# ## What subtraction loses
#
# Sums of floating-point numbers are rounded at the size of what is summed. Pre-aggregation rounds at the size of the
# *total*, even if little is left of it after the subtraction. We compare both in float32 with the sum in float64.

# %%
wide = torch.randn(512, 64, generator=generator, dtype=torch.float64)
errors = {"pre-aggregation": [], "matrix product": []}
for share in SHARES[1:]:
    some = rank < round(share * 512)
    exact = some.double() @ wide
    for name, each in errors.items():
        sums = WAYS[name](some, wide.float())[0].double()
        each.append(((sums - exact).norm() / exact.norm()).item())

figure, panel = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, each in errors.items():
    colour, style = LINES[name]
    panel.semilogy(SHARES[1:], each, style, color=colour, markersize=5, label=name)
panel.set(xlabel="marginal share of the key blocks", ylabel="relative error of H")
panel.set_title("Rounding in float32", fontsize=11)
panel.legend(frameon=False, fontsize=9)
plt.show()

assert errors["pre-aggregation"][0] > 5 * errors["matrix product"][0]  # 2 % marginal
assert max(errors["pre-aggregation"]) < 1e-5

# %% [markdown]
# This loss would be bearable. Two others are not. A block of large states that is *not* marginal should have no
# influence on a row at all. It does: whatever it pushes out of the total's digits is lost.

# %%
loud = wide.clone()
loud[0] *= 1e6
without_loud = rank < 256
without_loud[:, 0] = False
exact = without_loud.double() @ loud
loss = {}
for name in errors:
    sums = WAYS[name](without_loud, loud.float())[0].double()
    loss[name] = ((sums - exact).norm() / exact.norm()).item()
    print(f"{name:16} relative error {loss[name]:.1e}")
assert loss["matrix product"] < 1e-6 < 1e-3 < loss["pre-aggregation"]

# %% [markdown]
# And where a row has no marginal block at all, the subtraction leaves noise instead of zero. The same noise is left in
# $Z$. The output divides one by the other, and what should be exactly zero becomes anything.

# %%
phi = torch.rand(512, 8, generator=generator)
values = torch.randn(512, 1, generator=generator)
pairs = torch.cat([phi * values, phi], dim=1)  # rows of H and of Z for a single value feature
nobody = torch.zeros(1, 512, dtype=torch.bool)
some_query = torch.rand(8, generator=generator)
for name, way in WAYS.items():
    left_in_H, left_in_Z = way(nobody, pairs)[0][0].chunk(2)
    largest = max(left_in_H.abs().max().item(), left_in_Z.abs().max().item())
    print(f"{name:21} largest entry of H and Z where nothing belongs: {largest:.0e}")
    assert largest > 0 if name == "pre-aggregation" else largest == 0

left_in_H, left_in_Z = states.pre_aggregate(nobody, pairs)[0][0].chunk(2)
made_up = (some_query @ left_in_H) / (some_query @ left_in_Z)
assert made_up != 0

# %% [markdown]
# ## What the package does
#
# The `torch` backend and the Triton kernels use the matrix product, for $H$ and $Z$ in the forward, and for $dH$ and
# $dZ$ in the backward with the labels transposed. There is one trap in it: $0 \cdot \infty$ is NaN. A block whose state
# is not finite would reach rows that do not contain it. So the backend looks at the result, and only if that is not
# finite it adds up again with care.

# %%
show_source(pytorch._sum_over)

broken = h.clone()
broken[5] = torch.inf
careless, _ = states.matrix_product(member, broken)
careful = pytorch._sum_over(member.to(h.dtype)[None], broken.view(1, 64, 64, 64))[0].flatten(1)
assert careless.isnan().any(dim=1)[~member[:, 5]].all()
assert torch.allclose(careful[~member[:, 5]], H[~member[:, 5]])
assert not careful[member[:, 5]].isfinite().any()

# %% [markdown]
# On a GPU the product runs on the units for matrix products, which the other three cannot use. We have not timed them
# there.

# %% [markdown]
# ## Exercises
#
# **1. The best group.** Write `best_group(rows, blocks)`: the group size from 1 to 16 for which Four Russians takes the
# fewest additions. How does it grow with the number of rows?


# %% tags=["exercise"]
def best_group(rows, blocks):
    """The g from 1 to 16 with the fewest additions; the smaller one of equals."""
    ...


# %% tags=["solution"] mistake=["2**group - 1 + rows", "2**group - 1"]
def best_group(rows, blocks):
    """The g from 1 to 16 with the fewest additions; the smaller one of equals."""
    return min(range(1, 17), key=lambda group: -(-blocks // group) * (2**group - 1 + rows))


# %% tags=["check"]
with check_exercise(1, best_group):
    expect("512 rows, 512 blocks", best_group(512, 512), 7)
    expect("1 row, 512 blocks", best_group(1, 512), 1)  # tables never pay for a single row
    for rows in (16, 64, 256):
        took = {
            g: states.four_russians(torch.ones(rows, 96, dtype=torch.bool), numbers[:96], g)[1]
            for g in range(1, 17)
        }
        expect(f"{rows} rows, 96 blocks", best_group(rows, 96), min(took, key=took.get))
    growth = [best_group(4**power, 4096) for power in range(1, 9)]
    print("rows 4, 16, 64, ...: best group", growth)
    assert growth == sorted(growth)

# %% [markdown]
# **2. The shorter list.** Rows differ: in a map made by hand, one may have few marginal blocks and the next nearly all.
# Write `shorter_list(member, states)`, which takes for every row whichever is shorter: the list of its marginal blocks,
# or the total and the list of the others. Return the sums and the additions, counted as in `block_states.py`. A row
# that is exactly half marginal takes its own list.


# %% tags=["exercise"]
def shorter_list(member, states):
    """(sums (Tq, M), additions) for member (Tq, Tk) bool and states (Tk, M)."""
    ...


# %% tags=["solution"] mistake=["2 * int(row.sum()) <= len(states)", "True"]
def shorter_list(member, states):
    """(sums (Tq, M), additions) for member (Tq, Tk) bool and states (Tk, M)."""
    total, additions = states.sum(dim=0), len(states)
    sums = torch.zeros(len(member), states.shape[1], dtype=states.dtype)
    for i, row in enumerate(member):
        if 2 * int(row.sum()) <= len(states):
            sums[i] = states[row].sum(dim=0)
            additions += int(row.sum())
        else:
            sums[i] = total - states[~row].sum(dim=0)
            additions += int((~row).sum())
    return sums, additions


# %% tags=["check"]
mixed = torch.rand(40, 64, generator=generator) < torch.linspace(0, 1, 40)[:, None]
expected, own_lists = states.lookup_table(mixed, h)
of_others = states.pre_aggregate(mixed, h)[1]
fewest = 64 + sum(min(int(row.sum()), int((~row).sum())) for row in mixed)

with check_exercise(2, shorter_list):
    noise = 1e-12 * expected.abs().max().item()
    expect("(sums, additions)", shorter_list(mixed, h), (expected, fewest), atol=noise)
    assert fewest < own_lists and fewest < of_others
    print(f"{fewest} additions; only the lists {own_lists}, the total and the others {of_others}")

# %% [markdown]
# ## Recap
#
# The sums of states are a product of a 0/1 matrix with all states. Lists, a total with the others subtracted, and
# tables need fewer additions, but over most of the range the plain matrix product is the fastest, because processors
# are built for it. Subtraction also loses digits.
#
# Next: [6a. A first Triton kernel](06a_first_kernel.md)
