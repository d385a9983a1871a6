# %% [markdown]
# # 4. Algorithm 1: the forward, block by block
#
# The equations of SLA need a map of $N \times N$ numbers. Algorithm 1 computes the same outputs from tiles, one pair of
# blocks at a time, and never holds more than one tile. Afterwards you will know how a softmax can be computed without
# seeing its whole row, what the five running quantities $m$, $l$, $O^s$, $H$ and $Z$ are at every moment, why one
# number per row is kept for the backward, and what happens to a query block that lacks a class.
#
# Builds on: [2. Mask classification](02_mask_classification.md), [3. The linear branch](03_linear_branch.md)

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, show_source

from sla_ref import reference, testing
from sla_ref.analysis import CLASS_COLOURS, CLASS_NAMES
from sla_ref.backends import pytorch

# %% [markdown]
# ## One head to work on
#
# One head of 44 tokens with 8 dimensions, in blocks of 8: six blocks, the last with 4 tokens only. Of the six key
# blocks of each query block, three are critical, one is negligible and the other two are marginal. Everything is in
# float64, so equal means equal to twelve digits. The names are those of the glossary at the top of
# `sla_ref/reference.py`.

# %%
problem = testing.make_problem(
    heads=1,
    query_length=44,
    head_dim=8,
    block_q=8,
    block_k=8,
    critical_ratio=0.5,
    negligible_ratio=0.2,
    dtype=torch.float64,
)
# (44, 8) each
query, key, value, phi_query, phi_key = (tensor[0, 0] for tensor in problem.inputs[:5])
block_map, scale = problem.inputs.block_map, problem.inputs.scale
labels = block_map.labels[0, 0]  # (6, 6): 1 critical, 0 marginal, -1 negligible
block_q, block_k = block_map.block_q, block_map.block_k
# the key blocks, K[j] and so on
K, V, phi_K = (tokens.split(block_k) for tokens in (key, value, phi_key))
print(labels.numpy())

assert math.isclose(scale, 1 / math.sqrt(8))
assert ((labels == 1).sum(1) == 3).all() and ((labels == -1).sum(1) == 1).all()

# %% [markdown]
# ## A softmax that cannot overflow
#
# Softmax attention of one row of scores $S$ is
#
# $$O = \frac{\sum_k e^{S_k} V_k}{\sum_k e^{S_k}}.$$
#
# Taken literally it fails as soon as a score is large: $e^{1000}$ is infinite, and infinity over infinity is not a
# number. A factor $e^{-m}$ on numerator and denominator changes nothing, and with $m$ the largest score no exponent is
# above 0.

# %%
large = torch.tensor([1000.0, 999.0, 990.0], dtype=torch.float64)
literal = large.exp() / large.exp().sum()
shifted = (large - large.max()).exp() / (large - large.max()).exp().sum()
print(literal.tolist(), [round(weight, 3) for weight in shifted.tolist()])

assert literal.isnan().any()
torch.testing.assert_close(shifted, torch.softmax(large, dim=0))

# %% [markdown]
# ## A softmax that sees its row in pieces
#
# The maximum $m$ is known only once the whole row has been seen. A kernel does not want to wait: it loads one block of
# keys, uses it and forgets it. So it works with the largest score *so far*, and keeps three things per row of queries:
#
# $$m = \max_k S_k, \qquad l = \sum_k e^{S_k - m}, \qquad O = \sum_k e^{S_k - m}\, V_k,$$
#
# each over the keys seen so far. When a new block brings a larger score, $m$ grows to $m'$, and the old sums were made
# with the wrong shift. They need not be made again, because the shift is a common factor:
#
# $$e^{S_k - m'} = e^{m - m'} \, e^{S_k - m}.$$
#
# One multiplication of $l$ and $O$ by $e^{m - m'}$ puts all old terms right. This is the online softmax, lines 9 to 11
# of Algorithm 1.


# %%
def online_step(m, l, O, S, V):
    """Take in a tile, S (rows, keys) and V (keys, D): m, l (rows, 1), O (rows, D) -> the same."""
    m_new = torch.maximum(m, S.amax(1, keepdim=True))  # [Alg. 1 L9]
    P = (S - m_new).exp()  # [Alg. 1 L9]
    correction = (m - m_new).exp()
    l = correction * l + P.sum(1, keepdim=True)  # [Alg. 1 L10]
    O = correction * O + P @ V  # [Alg. 1 L11]
    return m_new, l, O


# %% [markdown]
# It starts from $m = -\infty$, $l = 0$, $O = 0$. The first correction is $e^{-\infty} = 0$, and a zero of the past is
# cleared with a zero: no special case for the first block. After every block the three sums are those of the keys seen
# so far, whatever the order was. Here for query block 0 over all six key blocks, forwards and backwards:

# %%
Q = query[:block_q]
for order in (range(6), reversed(range(6))):
    m, l, O = Q.new_full((8, 1), -math.inf), Q.new_zeros(8, 1), Q.new_zeros(8, 8)
    seen = []
    for j in order:
        seen.append(j)
        m, l, O = online_step(m, l, O, scale * Q @ K[j].T, V[j])
        S_seen = scale * Q @ torch.cat([K[j] for j in seen]).T
        V_seen = torch.cat([V[j] for j in seen])
        torch.testing.assert_close(m, S_seen.amax(1, keepdim=True))
        torch.testing.assert_close(l, (S_seen - m).exp().sum(1, keepdim=True))
        torch.testing.assert_close(O / l, torch.softmax(S_seen, 1) @ V_seen)

# %% [markdown]
# ## The linear branch needs no correction
#
# Marginal blocks go another way. Their weights are $\phi(q) \cdot \phi(k)$, without an exponential, so nothing has to
# be shifted. What a key block contributes does not depend on the query at all and is made once, line 4 of Algorithm 1:
#
# $$h_j = \phi(K_j)^\top V_j \quad (D \times D), \qquad z_j = \sum_{k \in j} \phi(k) \quad (D).$$
#
# A query block adds up the states of its marginal blocks, $H_i = \sum_j h_j$ and $Z_i = \sum_j z_j$, line 13.

# %%
h = [phi.T @ v for phi, v in zip(phi_K, V, strict=True)]  # [Alg. 1 L4]
z = [phi.sum(0) for phi in phi_K]  # [Alg. 1 L4]

# %% [markdown]
# Together: a query block walks along its row of the map and at each key block does one of three things. The function
# below yields its five quantities after each block, for us to watch. Because of the slices, the partial last block is
# not a special case.
#
# ![The walk of a query block along its row](../docs/images/row.svg)
#
# *Each key block changes one of the two groups of running quantities, or none.*


# %%
def walk(Q, labels):
    """Lines 7 to 15, for a query block (rows, D) and its labels (Tk); yields m, l, O, H, Z."""
    D = Q.shape[1]
    m, l, O = Q.new_full((len(Q), 1), -math.inf), Q.new_zeros(len(Q), 1), Q.new_zeros(len(Q), D)
    H, Z = Q.new_zeros(D, D), Q.new_zeros(D)
    for j, label in enumerate(labels):
        if label == 1:
            m, l, O = online_step(m, l, O, scale * Q @ K[j].T, V[j])  # [Alg. 1 L9] to [Alg. 1 L11]
        elif label == 0:  # [Alg. 1 L12]
            H, Z = H + h[j], Z + z[j]  # [Alg. 1 L13]
        yield m, l, O, H, Z


# %% [markdown]
# Query block 3, seen through one of its rows. $|\cdot|$ is the Euclidean norm.

# %%
i, row = 3, 3
trace = list(walk(query.split(block_q)[i], labels[i]))
print("key block  class           m      l    |O|    |H|    |Z|")
for j, (m, l, O, H, Z) in enumerate(trace):
    print(
        f"{j:9}  {CLASS_NAMES[int(labels[i, j])]:10} {m[row].item():6.2f} {l[row].item():6.2f} "
        f"{O[row].norm():6.2f}"
        f" {H.norm():6.2f} {Z.norm():6.2f}"
    )

# %% [markdown]
# Each line of the table can be read off the class: a critical block changes only $m$, $l$ and $O$, a marginal block
# only $H$ and $Z$, and a negligible block nothing.

# %%
moved = {1: set(), 0: set(), -1: set()}
start = (
    torch.full((8, 1), -math.inf),
    torch.zeros(8, 1),
    torch.zeros(8, 8),
    torch.zeros(8, 8),
    torch.zeros(8),
)
for j, after in enumerate(trace):
    before = trace[j - 1] if j else start
    for name, old, new in zip("mlOHZ", before, after, strict=True):
        if not torch.equal(old.double(), new):
            moved[int(labels[i, j])].add(name)
assert moved == {1: {"m", "l", "O"}, 0: {"H", "Z"}, -1: set()}

# %% [markdown]
# In the picture, $m$ only ever climbs. $l$ may fall, when a larger score turns up and shrinks all that was there
# before. What does climb steadily with every critical block is $m + \log l$, the logarithm of $\sum_k e^{S_k}$ over the
# keys so far: it no longer contains the shift. In this row, key block 2 brings a new maximum and $l$ falls.

# %%
blocks = range(len(trace))
m = [state[0][row].item() for state in trace]
l = [state[1][row].item() for state in trace]
lse = [a + math.log(b) if b else -math.inf for a, b in zip(m, l, strict=True)]
assert m[2] > m[1] and l[2] < l[1]
assert all(lse[j] > lse[j - 1] for j in blocks if labels[i, j] == 1)

figure, (top, middle, bottom) = plt.subplots(
    3, 1, figsize=(7, 6), sharex=True, layout="constrained"
)
top.step(blocks, m, "o-", where="post", color="#0072B2", label="m, largest score so far")
top.step(blocks, lse, "s--", where="post", color="#E69F00", label="m + log l")
top.set(
    ylabel="score (natural log)",
    title=f"Row {row} of query block {i} on its way along the key blocks",
)
top.legend(loc="upper left")
middle.step(blocks, l, "o-", where="post", color="#009E73")
middle.set(ylabel="l (sum of exp(S - m))")
bottom.step(
    blocks, [state[3].norm() for state in trace], "o-", where="post", color="#CC79A7", label="|H|"
)
bottom.step(
    blocks, [state[4].norm() for state in trace], "s--", where="post", color="#0072B2", label="|Z|"
)
bottom.set(ylabel="norm of the states", xlabel="key block and its class")
bottom.set_xticks(blocks, [f"{j}\n{CLASS_NAMES[int(labels[i, j])]}" for j in blocks])
bottom.legend(loc="upper left")
for panel in (top, middle, bottom):
    for j in blocks:
        panel.axvspan(j - 0.5, j + 0.5, color=CLASS_COLOURS[int(labels[i, j])], alpha=0.15, lw=0)
plt.show()

# %% [markdown]
# ## The last line
#
# When the row has been walked, line 16 finishes it:
#
# $$O^s_i = \frac{O}{l}, \qquad O^l_i = \frac{\phi(Q_i) H_i}{\phi(Q_i) Z_i}, \qquad L_i = m + \log l.$$
#
# How to divide is a parameter here, for a reason that comes below.


# %%
def algorithm_1(labels, divide=torch.divide):
    """Algorithm 1 from line 7 on, for one head: O^s (N, D), O^l (N, D), L (N)."""
    sparse, linear, lse = [], [], []
    for Q, phi_Q, row in zip(query.split(block_q), phi_query.split(block_q), labels, strict=True):
        *_, (m, l, O, H, Z) = walk(Q, row)
        sparse.append(divide(O, l))  # [Alg. 1 L16]
        linear.append(divide(phi_Q @ H, phi_Q @ Z[:, None]))  # [Alg. 1 L16]
        lse.append((m + l.log()).squeeze(1))  # [Alg. 1 L16]
    return torch.cat(sparse), torch.cat(linear), torch.cat(lse)


# %% [markdown]
# The outcome is that of the equations, which hold the whole $44 \times 44$ map. Only the order of the sums differs, so
# the last digits may.

# %%
ours = algorithm_1(labels)
dense = reference.sparse_linear_attention(
    *problem.inputs[:5], block_map.labels, block_q, block_k, scale
)
for name, here, there in zip(("O^s", "O^l", "L"), ours, dense, strict=True):
    difference = (here - there[0, 0]).abs().max().item()
    print(f"{name:3} differs by less than 1e-12: {difference < 1e-12}")
    assert difference < 1e-12

# %% [markdown]
# ## One number per row for the backward
#
# The backward needs the softmax weights again. They are as many as the scores, too many to keep. With the log-sum-exp
# $L_i$ of a row they come back from the scores in one step, without maximum and sum:
#
# $$P = e^{S - m} / l = e^{S - (m + \log l)} = e^{S - L_i}.$$
#
# So the forward keeps $L$, one number per row, and the backward makes each tile again. $L$ is also all that it takes to
# join two attentions over different keys, which is the first exercise.

# %%
critical_tokens = torch.cat(
    [torch.arange(44).split(block_k)[j] for j in range(6) if labels[i, j] == 1]
)
S = scale * query.split(block_q)[i] @ key[critical_tokens].T
P = (S - ours[2].split(block_q)[i][:, None]).exp()
torch.testing.assert_close(P, torch.softmax(S, dim=1))
torch.testing.assert_close(P.sum(1), torch.ones(8, dtype=torch.float64))
torch.testing.assert_close(P @ value[critical_tokens], ours[0].split(block_q)[i])

# %% [markdown]
# ## When a class is empty
#
# Classification always makes at least one block critical. A map made by hand need not, and the marginal class is often
# empty: with `negligible_ratio=1` nothing is left for it. Take a map in which query block 0 has no critical block and
# query block 1 no marginal one. Line 16 as printed then divides 0 by 0:

# %%
by_hand = labels.clone()
by_hand[0] = torch.tensor([0, 0, 0, -1, -1, 0])
by_hand[1] = torch.tensor([1, -1, 1, 1, -1, -1])
sparse, linear, lse = algorithm_1(by_hand)

assert sparse[:8].isnan().all() and sparse[8:].isfinite().all()
assert linear[8:16].isnan().all() and linear[:8].isfinite().all()
assert (lse[:8] == -math.inf).all()

# %% [markdown]
# A sum over nothing is nothing, so the package defines both outputs as 0 there. $L = -\infty$, the logarithm of an
# empty sum, is right already: $m + \log l$ gave it by itself. The denominator decides, and no small number is added to
# it, which would change all other rows too.


# %%
def divide(numerator, denominator):
    return torch.where(denominator == 0, 0.0, numerator / denominator)


ours = algorithm_1(by_hand, divide)
hand_map = replace(block_map, labels=by_hand[None, None], num_critical=None)
dense = reference.sparse_linear_attention(
    *problem.inputs[:5], hand_map.labels, block_q, block_k, scale
)
for here, there in zip(ours, dense, strict=True):
    torch.testing.assert_close(here, there[0, 0], rtol=0, atol=1e-12)
assert (ours[0][:8] == 0).all() and (ours[1][8:16] == 0).all()

# %% [markdown]
# ## The same in the package
#
# The `torch` backend is Algorithm 1 for all heads at once. It differs in two ways from the code above. A query block
# gathers all of its critical keys side by side and sees them at once, so $m$ and $l$ need no correction. The GPU
# kernels, which see one block at a time, work as `online_step` does. And $H$ of all query blocks is one matrix product,
# of the 0/1 matrix "is marginal" with the states $h_j$.
#
# Each step carries the tag of its line. `_cut` and `_join` cut tokens into blocks and back; `_steps` decides how many
# query blocks make a batch; `_inverse` is the guarded $1 / (\phi(Q_i) Z_i)$ from above. A column of ones appended to
# $V$ makes $z_j$ the last column of $h_j$: $\phi(K_j)^\top [V_j\ 1] = [h_j\ z_j]$. What is done to one is done to both.

# %%
show_source(pytorch._sparse_forward, pytorch._scores)

# %%
show_source(pytorch._linear_states, pytorch._linear_forward)

# %% [markdown]
# It gives the same, with the ordinary map and with the one made by hand:

# %%
for one_map in (block_map, hand_map):
    saved = pytorch.forward(problem.inputs._replace(block_map=one_map))
    for here, there in zip(algorithm_1(one_map.labels[0, 0], divide), saved, strict=True):
        torch.testing.assert_close(here, there[0, 0], rtol=0, atol=1e-12)

# %% [markdown]
# What a query block holds while it walks: $m$, $l$ and $O$ are $b_q (D + 2)$ numbers, $H$ and $Z$ are $D (D + 1)$, the
# tile $b_q b_k$. None of them grows with $N$.

# %% [markdown]
# ## Exercises
#
# **1. Join two halves.** One processor has walked over some critical blocks, another one over the others. Each hands
# over its $m$, $l$ and $O$. Write the function that joins them to what a single walk over all of them gives. A half
# that saw nothing ($m = -\infty$) must do no harm; that both saw nothing need not be handled.


# %% tags=["exercise"]
def join(m_a, l_a, O_a, m_b, l_b, O_b):
    """m, l (rows, 1), O (rows, D) of two walks over different keys -> of one walk over all."""
    ...


# %% tags=["solution"] mistake=["a * l_a + b * l_b", "l_a + l_b"]
def join(m_a, l_a, O_a, m_b, l_b, O_b):
    """m, l (rows, 1), O (rows, D) of two walks over different keys -> of one walk over all."""
    m = torch.maximum(m_a, m_b)
    a, b = (m_a - m).exp(), (m_b - m).exp()
    return m, a * l_a + b * l_b, a * O_a + b * O_b


# %% tags=["check"]
def walk_over(keys):
    state = Q.new_full((8, 1), -math.inf), Q.new_zeros(8, 1), Q.new_zeros(8, 8)
    for j in keys:
        state = online_step(*state, scale * Q @ K[j].T, V[j])
    return state


with check_exercise(1, join):
    for half, other in (([0, 1, 2], [3, 4, 5]), ([4], [0, 5]), ([], [2, 3]), ([1], [])):
        joined, single = join(*walk_over(half), *walk_over(other)), walk_over(half + other)
        expect(f"(m, l, O) of key blocks {half} and {other}", joined, single, rtol=1e-7, atol=1e-7)

# %% [markdown]
# **2. Powers of two.** GPUs compute $2^x$ faster than $e^x$. Because $e^x = 2^{x \log_2 e}$, a kernel multiplies the
# scores by $\log_2 e$, once, as a part of the scale, and uses $2^x$ from there on. Write one row block of the sparse
# branch that way, over all keys at once, and return $O^s$ and the log-sum-exp. Use `torch.exp2` and `torch.log2` only,
# and mind that $L$ is a natural logarithm.


# %% tags=["exercise"]
def sparse_base_2(Q, K, V, scale):
    """Q (rows, D), K, V (keys, D) -> O^s (rows, D), L (rows, 1)."""
    ...


# %% tags=["solution"] mistake=["(m + torch.log2(l)) / math.log2(math.e)", "m + torch.log2(l)"]
def sparse_base_2(Q, K, V, scale):
    """Q (rows, D), K, V (keys, D) -> O^s (rows, D), L (rows, 1)."""
    S = (scale * math.log2(math.e)) * Q @ K.T
    m = S.amax(1, keepdim=True)
    P = torch.exp2(S - m)
    l = P.sum(1, keepdim=True)
    return P @ V / l, (m + torch.log2(l)) / math.log2(math.e)


# %% tags=["check"]
S = scale * Q @ key.T
expected = torch.softmax(S, 1) @ value, torch.logsumexp(S, 1, keepdim=True)

with check_exercise(2, sparse_base_2):
    expect("(O^s, L)", sparse_base_2(Q, key, value, scale), expected, rtol=1e-7, atol=1e-7)

# %% [markdown]
# ## Recap
#
# One walk along the key blocks gives both outputs: $m$ and $l$ correct $O^s$ whenever a larger score comes, and $H$ and
# $Z$ add up the marginal blocks. Nothing larger than a tile is ever held. Each row keeps one number, the log-sum-exp
# $L$, from which the backward makes the weights again.
#
# Next: [5. Algorithm 2: the backward, by hand](05_algorithm_2.md)
