# %% [markdown]
# # 12. How much each branch weighs
#
# SLA adds its linear branch to its sparse branch, through Proj. SLA2 ([arXiv
# 2602.12675](https://arxiv.org/abs/2602.12675)) mixes the two with a weight $\alpha$ instead. Afterwards you will know
# what Proj cannot repair, why $\alpha$ can, what is lost when $\alpha$ is one number per head or per block, how it can
# be estimated for each row without any training, and what is still wrong when it is right.
#
# Builds on: [3. The linear branch](03_linear_branch.md).

# %% [markdown]
# ## Two rows that Proj treats alike
#
# The lab's teacher is a small video model with full attention. We take its queries, keys and values on 8 held-out
# clips, and let 5 % of the blocks be critical. SLA2 has no negligible class, so all other blocks are marginal.

# %%
import math
import textwrap

import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, show_source

import sla_ref
from sla_ref import SLA2Attention, analysis, reference_sla2
from sla_ref.lab import evaluate, weights

teacher, card = weights.load_weights(weights.TEACHER)
clips = evaluate.held_out(teacher, 8)
# of each layer: (clip, head, token, D)
caught = evaluate.attention_inputs(teacher, clips.x, clips.time, clips.labels)
_, H, N, D = caught[0][0].shape
BLOCK = 16
BLOCKS = {"block_q": BLOCK, "block_k": BLOCK}


def choose(q, k):
    """SLA's choice of blocks, without a negligible class."""
    return sla_ref.classify_blocks(q, k, 0.05, 0.0, **BLOCKS)


# %% [markdown]
# Here are two tokens of one clip in the first layer. They are 8 places apart in the same query block, and so they have
# the same critical blocks and the same state of marginal blocks.

# %%
CLIP, HEAD, ROW, OTHER = 1, 0, 809, 801
assert ROW // BLOCK == OTHER // BLOCK

q, k, v = (tensor.double() for tensor in caught[0])
block_map = choose(q, k)
out = sla_ref.sparse_linear_attention(q, k, v, block_map=block_map)
full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
missing = full - out.sparse  # what has to be added to the sparse branch

P = analysis.attention_weights(q[CLIP, HEAD], k[CLIP, HEAD])  # (N, N)
critical = block_map.to_dense()[CLIP, HEAD] == 1
share = P.where(critical, 0.0).sum(dim=-1)

two_linear, two_missing = (x[CLIP, HEAD, [ROW, OTHER]] for x in (out.linear, missing))
for row, linear, wanted in zip((ROW, OTHER), two_linear, two_missing, strict=True):
    print(
        f"token {row}: {1 - share[row]:.0%} of its attention is on marginal keys; "
        f"size of O^l {linear.norm():.2f}, of what is missing {wanted.norm():.2f}"
    )
apart, needed = ((rows[0] - rows[1]).norm() for rows in (two_linear, two_missing))
print(f"their O^l differ by {apart:.3f}, what they are missing differs by {needed:.2f}")
assert 0.59 < 1 - share[ROW] < 0.61 and 1 - share[OTHER] < 0.11
assert apart < 0.01 * needed

# %% [markdown]
# The first token spends 60 % of its attention on marginal keys, the second 10 %. Their $O^l$ are almost the same: the
# linear branch is normalised, so it says *what* the marginal keys have to say, and not *how much of the row* they are.
# But the two rows need very different corrections.
#
# Proj is one matrix and one bias, and sees only $O^l$. We give it the best values that it can have for all tokens of
# this layer, by least squares, and look at these two.

# %%


def with_proj(sparse, other, full):
    """The sparse branch plus the linear map of the other one that comes closest to `full`."""
    x = torch.cat([other, torch.ones_like(other[..., :1])], dim=-1).double()  # 1: for the bias
    wanted = (full - sparse).double()
    solution = torch.linalg.lstsq(x.flatten(0, 2), wanted.flatten(0, 2)).solution
    return sparse + (x @ solution).to(sparse.dtype)


repaired = with_proj(out.sparse, out.linear, full)
given = (repaired - out.sparse)[CLIP, HEAD, [ROW, OTHER]]
print(f"Proj's corrections of the two differ by {(given[0] - given[1]).norm():.2f}")
for row, correction, wanted in zip((ROW, OTHER), given, two_missing, strict=True):
    print(
        f"token {row}: error is {(wanted - correction).norm() / wanted.norm():.0%} of what it was"
    )
assert (given[0] - given[1]).norm() < 0.1 * needed
assert (two_missing[1] - given[1]).norm() > two_missing[1].norm()  # made worse

# %% [markdown]
# It gives both nearly the same correction, which is too small for the first token and harms the second.
#
# What Proj would have to learn can be written down. Let $P = P_1 + P_2$ be the attention map, split into its critical
# and its marginal weights, and $\alpha = P_1 \mathbf 1$ the critical share of each row [SLA2 Eq. 7]. The sparse branch
# divides by that share, $P_1 V = \alpha \, O^s$. So full attention differs from it by [SLA2 Eq. 10]
#
# $$O - O^s = P_2 V + (\alpha - 1) \, O^s.$$
#
# The second term takes back a part of the *sparse* branch, in each row another part. Proj sees neither that branch nor
# the part.

# %%
P2, alpha = P.where(~critical, 0.0), share[:, None]
by_equation = P2 @ v[CLIP, HEAD] + (alpha - 1) * out.sparse[CLIP, HEAD]
assert torch.allclose(missing[CLIP, HEAD], by_equation, rtol=0, atol=1e-10)

# %% [markdown]
# ## The weight
#
# SLA2 leaves Proj out and mixes two averages [SLA2 Eq. 13]:
#
# $$O = \alpha \, O^s + (1 - \alpha) \, O^l.$$
#
# If $\alpha$ is each row's critical share, and $O^l$ the exact average over the marginal keys, $P_2 V / (1 - \alpha)$,
# this is full attention, up to rounding. The share needs no map: it is $\exp(L - L_\text{all})$, with $L$ the
# log-sum-exp of the row's critical scores, which the operator returns anyway, and $L_\text{all}$ that of all its
# scores. With $L_m$ for the marginal scores, it is also $\operatorname{sigmoid}(L - L_m)$, which cannot overflow.

# %%
show_source(reference_sla2.ideal_alpha, reference_sla2.combine)


def exact_average(q, k, v, block_map):
    """Softmax attention over the marginal keys: the sparse branch, with the classes swapped."""
    swapped = sla_ref.BlockMap(1 - block_map.labels, BLOCK, BLOCK, N, N)
    return sla_ref.sparse_linear_attention(q, k, v, block_map=swapped)


marginal = exact_average(q, k, v, block_map)
ideal = torch.sigmoid(out.lse - marginal.lse)
assert torch.allclose(ideal[CLIP, HEAD], share, rtol=0, atol=1e-10)
mixed = reference_sla2.combine(out.sparse, marginal.sparse, ideal)
print(f"largest difference from full attention: {(mixed - full).abs().max():.0e}")
assert torch.allclose(mixed, full, rtol=0, atol=1e-10)

# %% [markdown]
# ## What a number cannot say
#
# This ideal $\alpha$ costs as much as full attention, so a layer needs another one. The paper makes it a parameter, and
# is of two minds about its size: Equation 13 has one number for each token, Algorithm 2 one for each query block.
# Neither depends on what the clip shows. How much does that lose? The picture shows the ideal $\alpha$ of one head of
# the second layer in two clips, and the number for the head, and the number for each query block, that fit best.

# %%


def fitted(sparse, other, full, places):
    """The best alpha (H, N), by least squares: numbers per head and place, for all clips."""
    apart, wanted = sparse - other, full - other
    over, under = (
        (x * apart).unflatten(2, (places, -1)).sum(dim=(0, 3, 4)) for x in (wanted, apart)
    )
    return (over / under).clamp(0, 1).repeat_interleave(N // places, dim=1)


layers = []  # of each layer: full attention, both branches, the exact average, and alphas
with torch.no_grad():
    for q, k, v in caught:
        sparse, linear, ideal = SLA2Attention(D, H, alpha="ideal", **BLOCKS).branches(q, k, v)
        estimate = SLA2Attention(D, H, alpha="block_means", **BLOCKS).branches(q, k, v)[2]
        full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        exact = exact_average(q, k, v, choose(q, k)).sparse
        layers.append((full, sparse, linear, exact, ideal, estimate))

full, sparse, linear, exact, ideal, estimate = layers[1]  # the second layer
per_head, per_block = fitted(sparse, exact, full, 1), fitted(sparse, exact, full, N // BLOCK)

figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained", sharey=True)
shown = slice(256, 512)  # four frames
for panel, clip in zip(panels, (0, 5), strict=True):
    tokens = torch.arange(N)[shown]
    panel.plot(tokens, ideal[clip, 0, shown], color="#56B4E9", linewidth=0.9, label="ideal")
    panel.step(
        tokens, per_block[0, shown], color="#D55E00", linewidth=1.6, label="a number per block"
    )
    panel.axhline(
        per_head[0, 0], color="#8A8F98", linestyle="--", linewidth=1.6, label="a number per head"
    )
    panel.set(xlabel="token", ylim=(0, 1))
    panel.set_title(f"clip {clip + 1}, t = {clips.time[clip]:.2f}", fontsize=11)
panels[0].set_ylabel("alpha")
figure.suptitle("The weight of the sparse branch, layer 2, head 1", fontsize=11)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The ideal $\alpha$ jumps from token to token, and from clip to clip. A number per block says the same in both panels.
#
# To see what that costs, and nothing else, we give every form of $\alpha$ the exact average in place of $O^l$, and Proj
# too. The table says how much of the sparse branch's squared error is left. Proj and the numbers are fitted to the very
# clips on which they are measured. So this is the best that each of them can do here.

# %%


def left(output, full, sparse):
    """Squared error of an output, relative to that of the sparse branch."""
    return ((output - full).square().mean() / (sparse - full).square().mean()).item()


def compare(with_exact):
    """Error left in each layer, by form; the other branch is the exact average, or O^l."""
    rows = {}
    for full, sparse, linear, exact, ideal, estimate in layers:
        other = exact if with_exact else linear
        alphas = {
            "a number per head": fitted(sparse, other, full, 1),
            "a number per block": fitted(sparse, other, full, N // BLOCK),
            "block means": estimate,
            "ideal": ideal,
        }
        rows.setdefault("Proj", []).append(left(with_proj(sparse, other, full), full, sparse))
        for name, alpha in alphas.items():
            mixed = reference_sla2.combine(sparse, other, alpha)
            rows.setdefault(name, []).append(left(mixed, full, sparse))
    return rows


def print_table(rows):
    print("left of the squared error     " + "".join(f"{f'layer {n}':>9}" for n in range(1, 5)))
    for name, errors in rows.items():
        print(f"{name:30}" + "".join(f"{error:9.1%}" for error in errors))


with_exact = compare(with_exact=True)
print_table({name: with_exact[name] for name in list(with_exact)[:3]})
numbers = with_exact["a number per head"]
assert min(with_exact["Proj"]) > 0.3 and max(numbers) < min(with_exact["Proj"])
assert numbers[1] > 0.2 and max(numbers[0], numbers[3]) < 0.05
assert all(
    block > 0.7 * head
    for block, head in zip(with_exact["a number per block"], numbers, strict=True)
)

# %% [markdown]
# Even with the exact average, Proj leaves from four to eight tenths of the error: a better second branch does not help
# it. One number per head, in contrast, is nearly enough in the first and the last layer, whose error comes mostly from
# heads with a small critical share in every row. In the second layer it leaves about a third. A number per block, with
# 64 times as many parameters, gains little over that: in one place the ideal $\alpha$ changes from clip to clip, and in
# one block from token to token.
#
# Those numbers also belong to one resolution. A layer with a number for each query block is made for one length, and
# refuses another:

# %%
bound = SLA2Attention(D, H, alpha="block", query_length=N, **BLOCKS)
try:
    bound(*(tensor[:, :, :512] for tensor in caught[0]))
except ValueError as error:
    print(textwrap.fill(str(error), 90))
else:
    raise AssertionError("a layer that is bound to one length ran at another")

# %% [markdown]
# ## An estimate from block means
#
# $\alpha = \operatorname{sigmoid}(L - L_m)$, and $L$ is known. What is missing is one number per row: how much the
# marginal keys weigh together. The router has the means of all key blocks already. So let each marginal block $j$, of
# $n_j$ keys, be $n_j$ copies of its mean key:
#
# $$\hat L_m = \log \sum_{j : M_{ij} = 0} n_j \exp\!\Big(\frac{q \cdot \bar k_j}{\sqrt D}\Big).$$
#
# That takes $1/b$ of the work of all scores, no parameter and no training, and follows every row and every length. It
# is this package's addition, and not in the paper.
#
# The estimate errs to one side. The exponential is convex, so by Jensen's inequality the mean of exponentials is at
# least the exponential of the mean. A block never weighs less than its mean says, so $\hat L_m \le L_m$, and the
# estimated $\alpha$ is never too small. How much too large it is depends on how far the scores within a block spread:

# %%
show_source(reference_sla2.block_means_alpha)

table = []
for inputs in caught:
    q, k = (tensor[CLIP : CLIP + 1].double() for tensor in inputs[:2])
    marginal = (choose(q, k).labels[0] == 0).repeat_interleave(BLOCK, dim=1)  # (H, N, Tk)
    scores = (q @ k.mT / D**0.5)[0].unflatten(2, (-1, BLOCK))  # (H, N, Tk, BLOCK)
    of_keys = scores.logsumexp(dim=-1)
    of_means = scores.mean(dim=-1) + math.log(BLOCK)  # the mean of the scores is the mean key's
    assert (of_keys > of_means - 1e-9)[marginal].all()
    true, estimated = (x.where(marginal, -torch.inf).logsumexp(-1) for x in (of_keys, of_means))
    spread = scores.std(dim=-1, correction=0)
    table += [
        (spread[h][marginal[h]].median(), (true - estimated)[h].median().exp()) for h in range(H)
    ]

print("                 spread in a   marginal mass /   alpha,   alpha,        share of the")
print("                 block         its estimate      ideal    block means   layer's error")
for place, (spread, factor) in enumerate(table):
    layer, head = divmod(place, H)
    full, sparse, *_, ideal, estimate = (x[CLIP] for x in layers[layer])
    error = (sparse - full).square().sum(dim=(1, 2))
    part = error[head] / error.sum()
    print(
        f"layer {layer + 1}, head {head + 1}  {spread:11.2f}  {factor:16.2f}"
        f"  {ideal[head].mean():7.2f}  {estimate[head].mean():12.2f}  {part:14.0%}"
    )
factors = torch.stack([factor for _, factor in table])
assert factors[[1, 2, 5]].max() < 1.5 and factors[3] > 500

# %% [markdown]
# In some heads the scores within a block are nearly the same, and the estimate is close. In others they spread by
# several units, a few keys of a block outweigh all others, and the mean knows nothing of them. In the second head of
# layer 2 the marginal keys weigh over a thousand times what their means say. There the estimated $\alpha$ is 1 in
# nearly every row, and the linear branch is ignored. But the error of the sparse branch comes from rows with much
# marginal mass, and in each of the first three layers about nine tenths of it or more is in the head for which the
# estimate is good.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained", sharey=True)
for panel, layer in zip(panels, (2, 4), strict=True):
    *_, ideal, estimate = layers[layer - 1]
    for head, (colour, marker) in enumerate((("#0072B2", "o"), ("#E69F00", "^"))):
        some = ideal[::2, head, ::17].flatten(), estimate[::2, head, ::17].flatten()
        panel.scatter(
            *some,
            s=9,
            marker=marker,
            color=colour,
            alpha=0.6,
            linewidth=0,
            label=f"head {head + 1}",
        )
    panel.plot([0, 1], [0, 1], ":", color="#8A8F98")
    panel.set(xlabel="ideal alpha", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set_title(f"layer {layer}", fontsize=11)
panels[0].set_ylabel("alpha from block means")
panels[0].legend(fontsize=9, loc="lower right", frameon=False)
figure.suptitle("No row lies below the diagonal: the estimate is never too small", fontsize=11)
plt.show()

# %%
print_table(with_exact)
assert all((estimate >= ideal - 1e-5).all() for *_, ideal, estimate in layers)
estimated = with_exact["block means"]
assert estimated[1] < 0.5 * numbers[1]
assert estimated[0] > numbers[0] and estimated[3] > numbers[3]
assert max(with_exact["ideal"]) < 1e-9

# %% [markdown]
# In the second layer the estimate beats the best numbers by far, though nothing was fitted. In the first and the last
# layer it is worse than a number, which knows the answer on average. In the last layer both heads have much marginal
# mass *and* scores that spread. In exercise 2 you will find out how much finer the means have to be there.

# %% [markdown]
# ## What remains
#
# So far the second branch was exact. Now it is the linear branch, as the layer has it:

# %%
with_linear = compare(with_exact=False)
print_table(with_linear)
assert with_linear["ideal"][2] > 0.8 and max(with_linear["a number per head"]) < 0.6
assert with_linear["Proj"][2] < min(
    errors[2] for name, errors in with_linear.items() if name != "Proj"
)

# %% [markdown]
# Much of the error is back, and the ideal $\alpha$ is no longer the best. In the third layer even a fitted Proj does
# better than any weight here. The ideal $\alpha$ is ideal for an exact average. With it,
# what is left of the error of a row is $(1 - \alpha)(O^r - O^l)$, where $O^r$ is that exact average. The sparse branch
# has the error $(1 - \alpha)(O^r - O^s)$. So mixing helps a row where $O^l$ is nearer to $O^r$ than $O^s$ is, and harms
# it elsewhere:

# %%
for number, (full, sparse, linear, exact, ideal, _) in enumerate(layers, start=1):
    rest = (1 - ideal)[..., None]
    mixed = reference_sla2.combine(sparse, linear, ideal)
    assert torch.allclose(full - mixed, rest * (exact - linear), rtol=0, atol=1e-4)
    assert torch.allclose(full - sparse, rest * (exact - sparse), rtol=0, atol=1e-4)
    nearer = (linear - exact).norm(dim=-1) < (sparse - exact).norm(dim=-1)
    heads = "  ".join(f"head {h}: {x:.0%}" for h, x in enumerate(nearer.double().mean((0, 2)), 1))
    print(f"layer {number}: rows in which O^l is nearer to the exact average than O^s   {heads}")
    of_exact, of_linear = (fitted(sparse, other, full, 1) for other in (exact, linear))
    assert (of_linear > of_exact).all()
assert all(
    means < best
    for means, best in zip(with_linear["block means"], with_linear["ideal"], strict=True)
)

# %% [markdown]
# Where the linear branch is poor, it is safer to have too large an $\alpha$ than too small a one. The numbers that fit
# best are indeed larger with $O^l$ than with the exact average, in every head. The estimate errs to the same side, and
# so it beats the ideal $\alpha$ in all four layers. The other way out is a better $O^l$. In a model it comes from
# training: queries, keys and values move until the linear branch has something to say, as they do for SLA ([9.
# Fine-tuning](09_fine_tuning.md)). This lesson trains nothing, and its tables say where such a training starts. After
# a fine-tune the order reverses: the ideal $\alpha$ has a loss of 0.0571, and the block means have 0.0587
# ([Experiments](../experiments.md#how-much-each-branch-weighs)).
#
# `SLA2Attention` has all these forms, `alpha="head"`, `"block"`, `"block_means"` and `"ideal"`, and one more:
# `"token"` learns $\operatorname{sigmoid}(w_h \cdot q + b_h)$, which follows the query but cannot see the keys. The
# [layer's page](../api/layer.md#sla2s-layer) says what each costs. The other half of SLA2, a learned choice of the
# critical blocks, is a `router` there.

# %% [markdown]
# ## Exercises
#
# **1. The gradient of a weight.** In a layer with `alpha="head"`, $\alpha_h = \operatorname{sigmoid}(a_h)$ is one
# number for all rows of a head. Write the gradient of the loss with respect to $a$, from the gradient with respect to
# the output, both branches, and $\alpha$. The check compares it with autograd's.


# %% tags=["exercise"]
def gradient_of_logit(grad, sparse, linear, alpha):
    """dL/da (H,) from grad = dL/dO, sparse, linear (B, H, N, D) and alpha (H,)."""
    ...


# %% tags=["solution"] mistake=["* alpha * (1 - alpha)", "* alpha"]
def gradient_of_logit(grad, sparse, linear, alpha):
    """dL/da (H,) from grad = dL/dO, sparse, linear (B, H, N, D) and alpha (H,)."""
    of_alpha = (grad * (sparse - linear)).sum(dim=(0, 2, 3))  # all rows share one number
    return of_alpha * alpha * (1 - alpha)


# %% tags=["check"]
layer = SLA2Attention(D, H, alpha="head", **BLOCKS)
with torch.no_grad():
    layer.alpha_logit.copy_(torch.tensor([0.3, -1.2]))
output = layer(*caught[1])
grad = output.detach() - layers[1][0]  # of half the squared distance to full attention
output.backward(grad)

with check_exercise(1, gradient_of_logit):
    got = gradient_of_logit(grad, *layers[1][1:3], torch.sigmoid(layer.alpha_logit.detach()))
    expect("gradient (H,)", got, layer.alpha_logit.grad, rtol=1e-3)

# %% [markdown]
# **2. Means of parts.** Cut each key block into `parts` equal parts, and replace each key by the mean of its part. The
# estimate then lies between that of the whole blocks and the ideal $\alpha$, and costs `parts` times as much. Write it
# for one head and whole blocks only; `lse` is that of the critical keys.


# %% tags=["exercise"]
def alpha_from_parts(query, key, lse, labels, block, parts):
    """Alpha (N,) from query, key (N, D), lse (N,) and labels (T, T) with 1 for critical blocks."""
    ...


# %% tags=["solution"] mistake=["+ math.log(size)", "+ math.log(block)"]
def alpha_from_parts(query, key, lse, labels, block, parts):
    """Alpha (N,) from query, key (N, D), lse (N,) and labels (T, T) with 1 for critical blocks."""
    size = block // parts
    means = key.unflatten(0, (-1, size)).mean(dim=1)  # (T * parts, D)
    scores = query @ means.mT / query.shape[-1] ** 0.5 + math.log(size)
    marginal = (labels == 0).repeat_interleave(block, 0).repeat_interleave(parts, 1)
    return torch.sigmoid(lse - scores.masked_fill(~marginal, -torch.inf).logsumexp(dim=-1))


# %% tags=["check"]
q, k, v = (tensor[CLIP : CLIP + 1].double() for tensor in caught[3])  # the last layer
of_layer = choose(q, k)
lse = sla_ref.sparse_linear_attention(q, k, v, block_map=of_layer).lse
critical = (of_layer.to_dense() == 1).double()
whole = reference_sla2.block_means_alpha(q, k, critical, BLOCK, D**-0.5)
best = reference_sla2.ideal_alpha(q, k, critical, D**-0.5)

heads = [(q[0, h], k[0, h], lse[0, h], of_layer.labels[0, h]) for h in range(H)]

with check_exercise(2, alpha_from_parts):
    found = {}
    for parts in (1, 2, 4, 8, 16):
        found[parts] = [alpha_from_parts(*head, BLOCK, parts) for head in heads]
    for h in range(H):
        expect("one part: the block means", found[1][h], whole[0, h], atol=1e-9)
        expect("a part for each key: the ideal alpha", found[16][h], best[0, h], atol=1e-9)
        assert all((found[2 * n][h] <= found[n][h] + 1e-9).all() for n in (1, 2, 4, 8))
    for parts, alphas in found.items():
        too_large = (torch.stack(alphas) - best[0]).mean()
        print(f"parts: {parts:2}   alpha is too large by {too_large:.3f} on average")

# %% [markdown]
# ## Recap
#
# The linear branch is normalised, and so it does not know how much of a row is marginal. Proj cannot add that; a weight
# can, and with the ideal weight and an exact second branch the mix is full attention. A number per head or block cannot
# follow the rows. The means of the key blocks can, with an error to one side only. What remains is the error of $O^l$
# itself, times the share of the row that it speaks for.
#
# Next: [Experiments](../experiments.md)
