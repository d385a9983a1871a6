# %% [markdown]
# # 5. Algorithm 2: the backward, by hand
#
# A kernel has no autograd: its backward is a second program that somebody has to derive. Afterwards you will know where
# each line of Algorithm 2 comes from, why the softmax's Jacobian never has to be built, what travels back through the
# block states, and which lines of the printed algorithm do not survive a comparison with autograd.
#
# Builds on: [3. The linear branch](03_linear_branch.md), [4. Algorithm 1](04_algorithm_1.md)

# %%
import math

import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, show_source

import sla_ref
from sla_ref import reference, testing
from sla_ref.backends import pytorch

# %% [markdown]
# ## What is asked for
#
# The forward made two outputs, $O^s$ and $O^l$. From them a loss is computed, a single number. We are handed its
# gradients with respect to the outputs, $dO^s$ and $dO^l$, and have to return those for the five inputs: $dQ$, $dK$,
# $dV$, $d\phi(Q)$ and $d\phi(K)$. Throughout, $dX$ has the shape of $X$ and means "gradient of the loss with respect to
# $X$".
#
# The problem is one head of 44 tokens with 8 dimensions in blocks of 8, in float64. Autograd through the equations,
# `exact`, gives the answers that we have to meet.

# %%
problem = testing.make_problem(
    heads=1,
    query_length=44,
    head_dim=8,
    block_q=8,
    block_k=8,
    critical_ratio=0.4,
    negligible_ratio=0.2,
    dtype=torch.float64,
)._replace(grad_lse=None)  # the loss uses both outputs, and not lse
Q, K, V, phi_Q, phi_K, dO_s, dO_l = (tensor[0, 0] for tensor in problem.tensors)  # (44, 8) each
block_map, scale = problem.inputs.block_map, problem.inputs.scale
labels = block_map.labels[0, 0]  # (6, 6): 1 critical, 0 marginal, -1 negligible
per_pair = block_map.to_dense()[0, 0]  # (44, 44): the same for every pair of tokens

exact = {name: tensor[0, 0] for name, tensor in testing.oracle(problem).items()}
print(", ".join(exact))


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(1, theirs.abs().max().item()))


# %% [markdown]
# Autograd is a program, too. A check that needs no calculus at all: push one input a little way along a random
# direction, and see how much the loss $\sum dO^s \odot O^s + \sum dO^l \odot O^l$ changes. It must be the gradient
# times the direction.

# %%
generator = torch.Generator().manual_seed(0)


def loss(*inputs):
    sparse, linear, _ = reference.sparse_linear_attention(*inputs, block_map.labels, 8, 8, scale)
    return ((problem.grad_sparse * sparse).sum() + (problem.grad_linear * linear).sum()).item()


def finite_difference(position, direction, step=1e-5):
    ahead, behind = list(problem.inputs[:5]), list(problem.inputs[:5])
    ahead[position] = ahead[position] + step * direction
    behind[position] = behind[position] - step * direction
    return (loss(*ahead) - loss(*behind)) / (2 * step)


for position, name in enumerate(testing.GRADIENTS):
    direction = torch.randn(1, 1, 44, 8, generator=generator, dtype=torch.float64)
    predicted = (exact[name] * direction[0, 0]).sum().item()
    assert math.isclose(
        finite_difference(position, direction), predicted, rel_tol=1e-6, abs_tol=1e-6
    )

# %% [markdown]
# ## Three rules
#
# Everything below is made of three rules.
#
# **Product.** If $Y = AB$, then $dA = dY\, B^\top$ and $dB = A^\top dY$. The shapes leave no other way.
#
# **Sum.** What is used in several places collects the gradients of all of them.
#
# **Softmax.** If $P$ is the softmax of a row $S$, then $\partial P_a / \partial S_b = P_a (\delta_{ab} - P_b)$, so the
# Jacobian is $\mathrm{diag}(P) - P P^\top$, and
#
# $$dS = (\mathrm{diag}(P) - P P^\top)\, dP = P \odot \Big(dP - \sum_a P_a\, dP_a\Big).$$
#
# The right-hand side never builds the matrix: it takes one number from each weight's gradient, the same for the whole
# row.

# %%
A, B, dY = (
    torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    for _ in range(3)
)
dA, dB = torch.autograd.grad(A @ B, (A, B), dY)
assert_equal(dY @ B.T, dA)
assert_equal(A.T @ dY, dB)

S = torch.tensor([2.0, 0.5, 0.0, -1.0, 1.0], dtype=torch.float64)
P = torch.softmax(S, 0)
jacobian = torch.diag(P) - torch.outer(P, P)
assert_equal(jacobian, torch.autograd.functional.jacobian(lambda s: torch.softmax(s, 0), S))
dP = torch.randn(5, generator=generator, dtype=torch.float64)
assert_equal(P * (dP - (P * dP).sum()), jacobian @ dP)
assert_equal(jacobian.sum(0), torch.zeros(5, dtype=torch.float64))

# %% [markdown]
# Its columns add up to zero, as the last line says: weights that sum to 1 can only be moved about, not made. Raising
# one score takes from all others.

# %%
figure, axes = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
image = axes.imshow(jacobian, cmap="PuOr_r", vmin=-0.5, vmax=0.5)
for a in range(5):
    for b in range(5):
        axes.text(b, a, f"{jacobian[a, b]:+.2f}", ha="center", va="center", color="#222222")
axes.set(
    xlabel="score S_b that is raised",
    ylabel="weight P_a that answers",
    title="Jacobian of a softmax over five keys",
)
figure.colorbar(image, label="change of P_a per unit of S_b")
plt.show()

# %% [markdown]
# ## The sparse branch
#
# Backwards through $O^s = P V$, $P = \mathrm{softmax}(S)$ and $S = \mathrm{scale} \cdot Q K^\top$. Here with the whole
# map at once; the blocks come later. The weights are made again from the log-sum-exp $L$ that the forward kept. Outside
# the critical blocks they are 0.

# %%
S = (scale * Q @ K.T).masked_fill(per_pair != 1, -math.inf)
P = (S - exact["lse"][:, None]).exp()  # [Alg. 2 L9]
assert_equal(P @ V, exact["sparse"])

# %% [markdown]
# The product rule gives the first two:
#
# $$dV = P^\top dO^s, \qquad dP = dO^s\, V^\top.$$
#
# The softmax rule wants $\sum_a P_a\, dP_a$ for each row. A kernel sees one block of keys at a time and would have to
# pass over the row twice, once for this sum and once to use it. But the sum is known before it starts:
#
# $$\sum_a P_a\, dP_a = \sum_a P_a \, (dO^s \cdot V_a) = dO^s \cdot \sum_a P_a V_a = dO^s \cdot O^s = D^s.$$
#
# That is line 2 of Algorithm 2, and the reason why the forward's output is kept.

# %%
dV_sparse = P.T @ dO_s  # [Alg. 2 L10]
dP = dO_s @ V.T  # [Alg. 2 L11]
D_s = (dO_s * exact["sparse"]).sum(1, keepdim=True)  # [Alg. 2 L2]
assert_equal(D_s, (P * dP).sum(1, keepdim=True))

dS = P * (dP - D_s)  # [Alg. 2 L11]
dQ = scale * dS @ K  # [Alg. 2 L12]
dK = scale * dS.T @ Q  # [Alg. 2 L12]
assert_equal(dQ, exact["grad_query"])
assert_equal(dK, exact["grad_key"])

# %% [markdown]
# `scale` comes back because it is a factor of $S$. Query and key get nothing else: $\phi(Q)$ and $\phi(K)$ are inputs
# of their own, and what comes from them travels through the feature map by autograd, outside.
#
# ## The linear branch
#
# One row $o$ of $O^l$ is a quotient, with a vector above and a number below:
#
# $$o = \frac{n}{d}, \qquad n = \phi(q) H, \qquad d = \phi(q) \cdot Z.$$
#
# The quotient rule gives
#
# $$dn = \frac{do}{d}, \qquad dd = -\frac{do \cdot n}{d^2} = -\frac{do \cdot o}{d} = -\frac{D^l}{d},$$
#
# where $D^l$ is the row's $do \cdot o$.
#
# Again one number per row, gradient times output, replaces a second pass. The product rule does the rest:
#
# $$d\phi(q) = dn\, H^\top + dd\, Z^\top = \frac{do\, H^\top - D^l\, Z^\top}{d},$$
#
# $$dH = \phi(q)^\top dn = \Big(\frac{\phi(q)}{d}\Big)^\top do,$$
#
# $$dZ = \phi(q)^\top dd = -\Big(\frac{\phi(q)}{d}\Big)^\top D^l.$$
#
# For a whole query block the last two sum over its rows, which the matrix products do. Each query block has an $H_i$
# and a $Z_i$ of its own, so there is a $dH_i$ and a $dZ_i$ for each.

# %%
h = torch.stack([phi.T @ v for phi, v in zip(phi_K.split(8), V.split(8), strict=True)])  # (6, 8, 8)
z = torch.stack([phi.sum(0) for phi in phi_K.split(8)])  # (6, 8)
marginal = (labels == 0).double()  # (6, 6)
H = torch.einsum("ij,jab->iab", marginal, h)  # H_i: the sum of h_j over the marginal blocks j of i
Z = marginal @ z

D_l = (dO_l * exact["linear"]).sum(1, keepdim=True)  # [Alg. 2 L2]
dH, dZ, dphi_Q = [], [], []
for i, (phi, do, delta) in enumerate(zip(phi_Q.split(8), dO_l.split(8), D_l.split(8), strict=True)):
    d = phi @ Z[i][:, None]  # (rows, 1)
    dH.append((phi / d).T @ do)  # [Alg. 2 L3]
    dZ.append(-((phi / d).T @ delta))  # [Alg. 2 L4]
    dphi_Q.append((do @ H[i].T - delta @ Z[i][None]) / d)  # [Alg. 2 L5]
dH, dZ = torch.stack(dH), torch.stack(dZ)  # (6, 8, 8), (6, 8, 1)
assert_equal(torch.cat(dphi_Q), exact["grad_phi_query"])

# %% [markdown]
# From the states of query blocks back to those of key blocks: $H_i = \sum_j [M_{ij} = 0]\, h_j$ is a product with a 0/1
# matrix, so the way back is the product with its transpose. A key block collects $dH_i$ from all query blocks to which
# it is marginal, the sum rule:
#
# $$dh_j = \sum_i [M_{ij} = 0]\, dH_i, \qquad dz_j = \sum_i [M_{ij} = 0]\, dZ_i.$$
#
# Then $h_j = \phi(K_j)^\top V_j$ is a product once more, and $z_j$ gives its gradient to every one of its rows:
#
# $$d\phi(K_j) = V_j\, dh_j^\top + \mathbf{1}\, dz_j^\top, \qquad dV_j = \phi(K_j)\, dh_j.$$
#
# The value block has now been used twice, once by each branch. Its gradient is the sum.

# %%
dh = torch.einsum("ij,iab->jab", marginal, dH)  # [Alg. 2 L14]
dz = torch.einsum("ij,iab->jab", marginal, dZ)  # [Alg. 2 L14]
dphi_K = torch.cat([v @ dh[j].T + dz[j].T for j, v in enumerate(V.split(8))])  # [Alg. 2 L16]
dV_linear = torch.cat([phi @ dh[j] for j, phi in enumerate(phi_K.split(8))])  # [Alg. 2 L17]
assert_equal(dphi_K, exact["grad_phi_key"])
assert_equal(dV_sparse + dV_linear, exact["grad_value"])

# %% [markdown]
# All five are found. Apart from the inputs they needed both outputs and $L$. No map was kept, and the states can be
# made again.
#
# ## Algorithm 2, tile by tile
#
# Here is the same in the paper's order. The first loop makes the states' gradients per query block. The second goes
# over the key blocks: each holds its own $dK_j$, $dV_j$, $dH$ and $dZ$ while it walks along the query blocks. The rows
# $dQ_i$ are visited by many key blocks, so they add up in memory.
#
# The last two arguments are for the next section. They mark two places where the printed algorithm says something else.


# %%
def algorithm_2(line_12_factor=scale, line_17_adds=True):
    """Algorithm 2 for one head: the five gradients, each (44, 8)."""
    query, key, value, features_q, features_k = (
        tensor.split(8) for tensor in (Q, K, V, phi_Q, phi_K)
    )
    do_s, do_l, lse = dO_s.split(8), dO_l.split(8), exact["lse"][:, None].split(8)
    delta_s = (dO_s * exact["sparse"]).sum(1, keepdim=True).split(8)  # [Alg. 2 L2]
    delta_l = (dO_l * exact["linear"]).sum(1, keepdim=True).split(8)  # [Alg. 2 L2]
    dH, dZ, dphi_Q = [], [], []
    for i, phi in enumerate(features_q):
        d = phi @ Z[i][:, None]
        dH.append((phi / d).T @ do_l[i])  # [Alg. 2 L3]
        dZ.append(-((phi / d).T @ delta_l[i]))  # [Alg. 2 L4]
        dphi_Q.append((do_l[i] @ H[i].T - delta_l[i] @ Z[i][None]) / d)  # [Alg. 2 L5]

    dQ, dK, dV, dphi_K = (
        [torch.zeros_like(block) for block in blocks] for blocks in (query, key, value, features_k)
    )
    for j in range(6):
        dh, dz = torch.zeros_like(dH[0]), torch.zeros_like(dZ[0])
        for i in range(6):
            if labels[i, j] == 1:
                P = (scale * query[i] @ key[j].T - lse[i]).exp()  # [Alg. 2 L9]
                dV[j] += P.T @ do_s[i]  # [Alg. 2 L10]
                dS = P * (do_s[i] @ value[j].T - delta_s[i])  # [Alg. 2 L11]
                dQ[i] += line_12_factor * dS @ key[j]  # [Alg. 2 L12]
                dK[j] += line_12_factor * dS.T @ query[i]  # [Alg. 2 L12]
            elif labels[i, j] == 0:
                dh += dH[i]  # [Alg. 2 L14]
                dz += dZ[i]  # [Alg. 2 L14]
        dphi_K[j] = value[j] @ dh.T + dz.T  # [Alg. 2 L16]
        from_states = features_k[j] @ dh
        dV[j] = dV[j] + from_states if line_17_adds else from_states  # [Alg. 2 L17]
    return dict(zip(testing.GRADIENTS, map(torch.cat, (dQ, dK, dV, dphi_Q, dphi_K)), strict=True))


right = algorithm_2()
for name, gradient in right.items():
    assert_equal(gradient, exact[name])

# %% [markdown]
# ## Where the printed algorithm slips
#
# Three of the slips that [Paper to code](../paper.md) lists are about the mathematics of Algorithms 1 and 2. Each can
# be run as printed.
#
# **Line 12 of Algorithm 2 lacks the scale.** As printed, $dQ$ and $dK$ are too large by exactly $\sqrt{D}$.

# %%
printed_12 = algorithm_2(line_12_factor=1.0)
for name in ("grad_query", "grad_key"):
    assert not torch.allclose(printed_12[name], exact[name])
    assert_equal(printed_12[name], math.sqrt(8) * exact[name])

# %% [markdown]
# **Line 17 assigns where it has to add.** As printed, $dV_j = \phi(K_j)\, dH$ overwrites what line 10 has collected.
# The sparse branch's share is lost, all of it, and the linear share remains.

# %%
printed_17 = algorithm_2(line_17_adds=False)
assert not torch.allclose(printed_17["grad_value"], exact["grad_value"])
assert_equal(printed_17["grad_value"], dV_linear)
assert_equal(exact["grad_value"] - printed_17["grad_value"], dV_sparse)

# %% [markdown]
# **Line 6 of Algorithm 1 gives the lowest blocks the label 0.** Its mask starts as all 0, so writing a 0 changes
# nothing: no block would be negligible, and the linear branch would run over blocks that Equation 3 skips.

# %%
printed_labels = torch.where(labels == 1, 1, 0).to(labels)
assert (labels == -1).sum() == 6 and (printed_labels == -1).sum() == 0
printed_6 = reference.sparse_linear_attention(
    *problem.inputs[:5], printed_labels[None, None], 8, 8, scale
)
assert_equal(printed_6[0][0, 0], exact["sparse"])  # the critical blocks are the same
assert (printed_6[1][0, 0] - exact["linear"]).abs().max() > 0.01

# %% [markdown]
# A fourth is about the linear branch itself. **The formula before Equation 5 divides by a sum over all keys**, Equation
# 5 by a sum over the marginal ones. Only the second makes the marginal weights of a row add up to 1.

# %%
A = phi_Q @ phi_K.T
marginal_weights = A.masked_fill(per_pair != 0, 0.0)
over_all = marginal_weights / A.sum(1, keepdim=True)
over_marginal = marginal_weights / marginal_weights.sum(1, keepdim=True)
assert_equal(over_marginal @ V, exact["linear"])
assert_equal(over_marginal.sum(1), torch.ones(44, dtype=torch.float64))
assert over_all.sum(1).max() < 0.7

# %% [markdown]
# The figure shows what the first two do to each gradient: the root mean square of the error, relative to that of the
# gradient. An error of 0 has no place on a logarithmic axis and is drawn at its lower edge, where float64's rounding
# is.


# %%
def relative_error(ours):
    return [
        max(
            1e-16,
            ((ours[name] - exact[name]).square().mean() / exact[name].square().mean())
            .sqrt()
            .item(),
        )
        for name in testing.GRADIENTS
    ]


errors = {
    "as derived": (relative_error(right), "#009E73", "//"),
    "line 12 as printed": (relative_error(printed_12), "#E69F00", ""),
    "line 17 as printed": (relative_error(printed_17), "#0072B2", "xx"),
}
assert max(errors["as derived"][0]) < 1e-14
assert math.isclose(errors["line 12 as printed"][0][0], math.sqrt(8) - 1)

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for place, (name, (heights, colour, hatch)) in enumerate(errors.items()):
    where = [position + 0.27 * (place - 1) for position in range(5)]
    axes.bar(where, heights, 0.25, color=colour, hatch=hatch, label=name)
axes.set_yscale("log")
axes.set_ylim(1e-16, 1e4)
axes.set_xticks(range(5), ["dQ", "dK", "dV", "dφ(Q)", "dφ(K)"])
axes.set(ylabel="relative error (no unit)", title="Algorithm 2 against autograd")
axes.legend(loc="upper center", ncols=3)
plt.show()

# %% [markdown]
# ## The same in the package
#
# The `torch` backend's backward, with the tags of its lines. Many query blocks make one step; `Q` is scaled before the
# scores are made, so the factor of line 12 comes with it for $dK$ and is multiplied in at the end for $dQ$.
# `_add_blocks` is the `+=` into the key blocks.

# %%
show_source(pytorch.backward, pytorch._sparse_backward, pytorch._linear_backward)

# %% [markdown]
# It agrees with `algorithm_2`, and so does the public function, through which autograd finds that backward:

# %%
saved = pytorch.forward(problem.inputs)
gradients = pytorch.backward(problem.grad_sparse, problem.grad_linear, None, problem.inputs, saved)
for name, gradient in zip(testing.GRADIENTS, gradients, strict=True):
    assert_equal(gradient[0, 0], right[name])

leaves = [tensor.clone().requires_grad_() for tensor in problem.inputs[:3]]
out = sla_ref.sparse_linear_attention(*leaves, block_map=block_map)
dV_public = torch.autograd.grad(
    (out.sparse, out.linear), leaves[2], (problem.grad_sparse, problem.grad_linear)
)[0]
assert_equal(dV_public[0, 0], right["grad_value"])

# %% [markdown]
# ## Exercises
#
# **1. Through the feature map.** With $\phi(q) = \mathrm{softmax}(q)$ over the $D$ dimensions, $Q$ is used twice: by
# the scores and by the feature map. Autograd adds both up in the public function. Write the second part: from
# $d\phi(Q)$ to its share of $dQ$. It takes one line, and you have seen it.


# %% tags=["exercise"]
def through_softmax_map(phi, dphi):
    """For phi = softmax(x) over the last dimension: phi, dphi -> dx, all (N, D)."""
    ...


# %% tags=["solution"] mistake=["(phi * dphi).sum(1, keepdim=True)", "dphi.sum(1, keepdim=True)"]
def through_softmax_map(phi, dphi):
    """For phi = softmax(x) over the last dimension: phi, dphi -> dx, all (N, D)."""
    return phi * (dphi - (phi * dphi).sum(1, keepdim=True))


# %% tags=["check"]
dQ_public = torch.autograd.grad(
    sla_ref.sparse_linear_attention(*leaves, block_map=block_map)[:2],
    leaves[0],
    (problem.grad_sparse, problem.grad_linear),
)[0][0, 0]

with check_exercise(1, through_softmax_map):
    second_part = through_softmax_map(phi_Q, right["grad_phi_query"])
    expect("the share of dQ", second_part, dQ_public - right["grad_query"], atol=1e-11)

# %% [markdown]
# **2. Proj.** The layer's output is $O = O^s + O^l W^\top + b$, Equation 6. From the gradient $dO$ with respect to it,
# compute those with respect to $O^s$, $O^l$, $W$ and $b$. Then look at what they say about a new layer, whose $W$ is
# zero: which parameters learn in the first step?


# %% tags=["exercise"]
def backward_of_proj(dO, O_l, W):
    """dO, O_l (N, D), W (D, D) -> dO_s (N, D), dO_l (N, D), dW (D, D), db (D)."""
    ...


# %% tags=["solution"] mistake=["dO @ W,", "dO @ W.T,"]
def backward_of_proj(dO, O_l, W):
    """dO, O_l (N, D), W (D, D) -> dO_s (N, D), dO_l (N, D), dW (D, D), db (D)."""
    return dO, dO @ W, dO.T @ O_l, dO.sum(0)


# %% tags=["check"]
W, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((8, 8), (8,)))
parts = [tensor.clone().requires_grad_() for tensor in (exact["sparse"], exact["linear"], W, b)]
expected = torch.autograd.grad(reference.combine(*parts), parts, dO_s)

with check_exercise(2, backward_of_proj):
    got = backward_of_proj(dO_s, exact["linear"], W)
    expect("(dO_s, dO_l, dW, db)", got, expected, rtol=1e-12, atol=1e-12)

    # A new layer: the gradient reaches W and b at once, the linear branch behind W one step later.
    _, dO_linear, dW, _ = backward_of_proj(dO_s, exact["linear"], torch.zeros_like(W))
    assert (dO_linear == 0).all() and dW.abs().max() > 0

# %% [markdown]
# ## Recap
#
# Three rules give the whole backward. The Jacobian of the softmax shrinks to one number per row, and the linear branch
# sends its gradient back through the same sums of states. **You can now derive SLA, and this is the second place to
# stop.** What follows makes it fast, on paper and on a GPU, and then puts it to use.
#
# Next: [8. Cheap states](08_cheap_states.md)
