# %% [markdown]
# # 1. What attention weights look like
#
# Softmax attention over $N$ tokens has $N^2$ weights, and most of them are tiny. Afterwards you will know how many are
# large in a video model, what it costs to drop the small ones, what it costs to keep only the large ones, and why the
# small ones together are still simple: as a matrix they have a low rank. SLA, the attention of this package, is built
# on these observations. The paper makes them on one map of Wan2.1, a video model of 1.3 billion parameters. Here you
# make them again on the 32 maps of a model of 0.9 million.
#
# Builds on: nothing here. You should know softmax attention and PyTorch.

# %% [markdown]
# ## Real maps
#
# The model comes with this package. It is a video diffusion transformer: given a noisy clip it predicts where the noise
# has to go. Its clips are 16 frames of 32 x 32 pixels, in which a handwritten digit drifts and bounces. Patches of 4 x
# 4 pixels become tokens, so $N = 16 \cdot 8 \cdot 8 = 1024$. There are 4 layers with 2 heads of $D = 64$ features.
#
# We take four clips that it never saw in training, each with its own amount of noise: at time $t = 0$ a clip is clean,
# at $t = 1$ it is pure noise. We catch the query, key and value that every layer's attention receives.

# %%
import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, show_source
from torch.nn.functional import scaled_dot_product_attention

from sla_ref import analysis
from sla_ref.lab import evaluate, weights

teacher, card = weights.load_weights(weights.TEACHER)
clips = evaluate.held_out(teacher, 4)
caught = evaluate.attention_inputs(teacher, clips.x, clips.time, clips.labels)
query, key, value = (torch.stack(tensors, dim=1) for tensors in zip(*caught, strict=True))

B, L, H, N, D = query.shape
print(f"{B} clips, {L} layers, {H} heads, {N} tokens of {D} features")
print("times:", clips.time.tolist())
assert (B, L, H, N, D) == (4, 4, 2, 1024, 64)

# %% [markdown]
# Attention computes a map of weights and multiplies the values with it:
#
# $$P = \operatorname{softmax}\left(\frac{Q K^\top}{\sqrt{D}}\right), \qquad O = P V.$$
#
# Fast attention never stores $P$. To look at it, we do.

# %%
show_source(analysis.attention_weights)

P = analysis.attention_weights(query, key)  # (clip, layer, head, query, key)
assert P.shape == (B, L, H, N, N)
assert torch.allclose(P.sum(dim=-1), torch.ones(B, L, H, N), atol=1e-5)  # each row adds up to 1
assert torch.allclose(P @ value, scaled_dot_product_attention(query, key, value), atol=1e-4)

# %% [markdown]
# ## One row
#
# A row of $P$ says how one token spends its attention. Tokens have a place in the clip, so a row is a little video
# itself. Below is the row of one token, marked by a ring, in two heads. One looks near the token, in all frames. The
# other spreads its attention. Colours are logarithmic: from $1/(100 N)$ or less, dark, to 100 times the mean, bright.

# %%
CLIP, TOKEN = 1, 8 * 64 + 3 * 8 + 4  # frame 8, row 3, column 4
HEADS = {"layer 2, head 2": P[CLIP, 1, 1], "layer 1, head 2": P[CLIP, 0, 1]}

figure, axes = plt.subplots(3, 8, figsize=(9, 3.8), layout="constrained")
for column, frame in enumerate(range(0, 16, 2)):
    axes[0, column].imshow(clips.x[CLIP, frame].numpy(), cmap="gray")
    axes[0, column].set_title(f"frame {frame}", fontsize=9)
    for panel, row in zip(axes[1:, column], HEADS.values(), strict=True):
        times_mean = N * row[TOKEN].view(16, 8, 8)[frame]
        image = panel.imshow(
            times_mean.clamp(min=0.01).log10().numpy(), vmin=-2, vmax=2, cmap="cividis"
        )
        if frame == 8:
            panel.plot(
                4,
                3,
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor="#D55E00",
                markeredgewidth=2,
            )
for panel in axes.flat:
    panel.set(xticks=[], yticks=[])
for panel, name in zip(axes[:, 0], ["noisy clip", *HEADS], strict=True):
    panel.set_ylabel(name.replace(", ", "\n"), fontsize=9)
figure.colorbar(image, ax=axes[1:], label="log10(weight x N)")
figure.suptitle("Where one token looks", fontsize=11)
plt.show()

# %% [markdown]
# ## Three bands
#
# The weights of a row add up to 1, so their mean is $1/N$. That gives a natural scale. Call a weight *large* above
# $1/N$, *small* below $1/(100 N)$, and *middle* in between.

# %%
show_source(analysis.weight_bands)

large, small = analysis.weight_bands(P)  # (clip, layer, head)
# what part of all attention the large weights hold
held = P.where(P > 1 / N, 0.0).sum(dim=-1).mean(dim=-1)

print("mean of 4 clips   large   middle    small   held by the large")
for layer in range(L):
    for head in range(H):
        share = [
            tensor[:, layer, head].mean().item()
            for tensor in (large, 1 - large - small, small, held)
        ]
        print(f"layer {layer + 1}, head {head + 1}" + "".join(f"{each:8.1%} " for each in share))
of_all = [each.mean().item() for each in (large, 1 - large - small, small, held)]
print(f"{'all maps':15}" + "".join(f"{each:8.1%} " for each in of_all))

# %% [markdown]
# In every map fewer than half of the weights are large, and yet they hold most of the attention.

# %%
assert large.max() < 0.5
assert held.min() > 0.6

# %% [markdown]
# The paper's map has 8.1 % of its weights above $1/N$ and about 45 % below $1/(100 N)$. Our heads lie on both sides of
# that. One has under 5 % large and over 80 % small weights. Another has hardly any small ones: its rows are nearly
# flat. An average over heads hides this.

# %%
per_head_large, per_head_small = large.mean(dim=0), small.mean(dim=0)
assert per_head_large.min() < 0.081 < per_head_large.max()
assert per_head_small.min() < 0.45 < per_head_small.max()
assert per_head_large[1, 1] < 0.05 and per_head_small[1, 1] > 0.80
assert per_head_small[0, 1] < 0.01

# %%
STYLES = {"layer 2, head 2": "-", "layer 3, head 2": "--", "layer 1, head 2": ":"}
figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
for left, right, label, name in [(-6, -2, -1, "small"), (-2, 0, 0, "middle"), (0, 3, 1, "large")]:
    panel.axvspan(left, right, color=analysis.CLASS_COLOURS[label], alpha=0.25, linewidth=0)
    panel.text((left + right) / 2, 1.04, name, ha="center", fontsize=9)
for (name, style), (layer, head) in zip(STYLES.items(), [(1, 1), (2, 1), (0, 1)], strict=True):
    ordered = (N * P[CLIP, layer, head]).flatten().sort().values[::1000]
    panel.plot(
        ordered.log10(),
        torch.linspace(0, 1, len(ordered)),
        style,
        linewidth=2,
        color="#0072B2",
        label=name,
    )
panel.set(xlim=(-6, 3), ylim=(0, 1.14), xlabel="log10(weight x N)", ylabel="share of weights below")
panel.set_title(f"The weights of three heads, t = {clips.time[CLIP]:.3f}", fontsize=11)
panel.legend(loc=(0.02, 0.12), frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# Noise matters too. From the cleanest clip to the noisiest, the maps become flatter: fewer weights are small. Where a
# token cannot make out its surroundings, it looks everywhere.

# %%
by_time = small.mean(dim=(1, 2))
for time, share in zip(clips.time, by_time, strict=True):
    print(f"t = {time:.3f}: {share:.1%} of the weights are small")
assert (by_time.diff() < 0).all()

# %% [markdown]
# ## What dropping costs
#
# We set some weights to zero, divide each row by what is left of its sum, and compare the output with the true one:
#
# $$\text{error} = \frac{\lVert \tilde P V - P V \rVert_1}{\lVert P V \rVert_1}.$$

# %%
show_source(analysis.relative_l1)


def error_of_keeping(kept, weights, value):
    """Error of attention with the weights where `kept` is True, each row normalised again."""
    sparse = weights.where(kept, 0.0)
    sparse = sparse / sparse.sum(dim=-1, keepdim=True)
    return analysis.relative_l1(sparse @ value, weights @ value)


without_small = error_of_keeping(P >= 1 / (100 * N), P, value)
only_large = error_of_keeping(P > 1 / N, P, value)

for name, share, error in [
    ("without the small", 1 - small, without_small),
    ("only the large", large, only_large),
]:
    print(
        f"{name:18} {share.mean():4.0%} kept, "
        f"error {error.mean():6.2%} ({error.min():.2%} to {error.max():.2%})"
    )

# %% [markdown]
# The small weights can go: their loss costs less than 3 % in every map, the limit that the paper gives for its 45 %.
# But the middle cannot simply go with them. Keeping only what is above $1/N$ costs far more, in some heads about as
# much as the paper's 33 % or more. In others it costs little: their large weights hold nearly everything.

# %%
assert without_small.max() < 0.03
assert (only_large > without_small).all()
assert only_large.max() > 0.33 and only_large.min() < 0.02

# %%
PAPER = {
    "weights above 1/N": "8.1 %",
    "weights below 1/(100 N)": "45 %",
    "error without the small": "< 3 %",
}
PAPER |= {"error with only the large": "33 %"}
print(f"{'':28}{'paper, one map':>15}{'here, mean of 32':>18}{'lowest':>8}{'highest':>9}")
for (name, figure), here in zip(
    PAPER.items(), [large, small, without_small, only_large], strict=True
):
    print(f"{name:28}{figure:>15}{here.mean():>18.1%}{here.min():>8.1%}{here.max():>9.1%}")

# %% [markdown]
# These are two measurements of the same kind, not one repeated. The models differ by a factor of a thousand in
# parameters and of thirty in tokens. And we assume that the paper, too, normalises the rows again before it measures
# the error.

# %% [markdown]
# Between the two lies a curve: keep the largest share of each row, whatever the size of its weights. Sparse attention
# moves along it. Far to the left it is cheap and wrong.

# %%
SHARES = [0.01, 0.02, 0.05, 0.08, 0.2, 0.55]
curves = []
for weights_of_head, value_of_head in zip(
    P[CLIP].flatten(0, 1), value[CLIP].flatten(0, 1), strict=True
):
    ordered = weights_of_head.sort(dim=-1, descending=True).values
    thresholds = [ordered[:, round(share * N) - 1, None] for share in SHARES]
    errors = [
        error_of_keeping(weights_of_head >= least, weights_of_head, value_of_head)
        for least in thresholds
    ]
    curves.append(torch.stack(errors))
curves = torch.stack(curves)  # (head, share)
assert (curves[:, -1] < 0.5 * curves[:, 0]).all()

figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
for number, curve in enumerate(curves):
    panel.plot(
        SHARES,
        curve,
        color="#56B4E9",
        linewidth=1,
        label="the eight heads" if number == 0 else None,
    )
panel.plot(SHARES, curves.mean(dim=0), "o-", color="#0072B2", linewidth=2, label="their mean")
panel.plot(
    [0.081, 0.55], [0.33, 0.03], "D", color="#D55E00", markersize=8, label="the paper's numbers"
)
panel.set(
    xscale="log",
    xlabel="share of weights kept (the largest)",
    ylabel="relative L1 error of the output",
)
panel.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"])
panel.minorticks_off()
panel.set_title(
    f"What keeping only the largest weights costs, t = {clips.time[CLIP]:.3f}", fontsize=11
)
panel.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## Stable rank
#
# If the middle cannot be dropped, can it be had cheaply? A matrix of low rank can: $N \times N$ numbers that are a
# product of $N \times r$ and $r \times N$ cost $O(N r)$. The rank itself is not a good measure, because the smallest
# noise makes every matrix full rank. The *stable rank* asks how many directions carry the weight:
#
# $$\operatorname{sr}(A) = \frac{\lVert A \rVert_F^2}{\lVert A \rVert_2^2} = \frac{\sum_i \sigma_i^2}{\sigma_1^2}
# \le \operatorname{rank}(A).$$
#
# A map in which each token looks only at itself has stable rank $N$. A map with equal rows has 1.

# %%
show_source(analysis.stable_rank)

assert torch.isclose(analysis.stable_rank(torch.eye(N)), torch.tensor(float(N)))
assert torch.isclose(analysis.stable_rank(torch.full((N, N), 1 / N)), torch.tensor(1.0))

# %% [markdown]
# Now split each map in two, as the paper does: its largest 8 % of weights, and the rest.

# %%
ranks = []
for weights_of_head in P[CLIP].flatten(0, 1):
    top, rest = analysis.split_top(weights_of_head, 0.08)
    ranks.append(torch.stack([analysis.stable_rank(each) for each in (weights_of_head, top, rest)]))
ranks = torch.stack(ranks)  # (head, whole / top / rest)

print("stable rank       whole  top 8 %   rest")
for number, (whole, top_rank, rest_rank) in enumerate(ranks):
    print(
        f"layer {number // H + 1}, head {number % H + 1}  {whole:7.3g}  {top_rank:7.3g}  "
        f"{rest_rank:5.3g}"
    )

# %% [markdown]
# In the paper the whole map has 6226, its largest 8 % have 6230, the rest has 9. Our maps are smaller, with 1024 rows
# instead of some 33 thousand, and so are the numbers. The picture is the same: the largest 8 % keep at least the stable
# rank of the whole, up to a few per cent, and the rest has less. In the head with the highest stable rank the rest has
# less than a tenth of it.

# %%
whole, top_rank, rest_rank = ranks.unbind(dim=1)
assert (top_rank > 0.95 * whole).all()
assert (rest_rank < whole).all()
sharpest = whole.argmax()
assert rest_rank[sharpest] < 0.1 * whole[sharpest]

# %% [markdown]
# ## Why two branches
#
# *Linear attention* replaces $\exp(q \cdot k)$ by a product of features $\phi(q) \cdot \phi(k)$. With $D$ features its
# map $\phi(Q) \phi(K)^\top$ has a rank of at most $D$, so a stable rank of at most 64 here. It cannot be the map of the
# sharpest head. But it does not have to be, if something else takes care of the largest weights.

# %%
phi_query, phi_key = (tokens[CLIP, 1, 1].double().softmax(dim=-1) for tokens in (query, key))
assert torch.linalg.matrix_rank(phi_query @ phi_key.mT) <= D
assert whole[sharpest] > D

# %% [markdown]
# Compare two ways to spend a rank of $r$. One spends it on the whole map: on its best approximation of rank $r$, from
# its first $r$ singular vectors. The other keeps the largest 5 % of the weights exact and spends the rank on the rest.
# We compare the outputs for one sharp head and one flatter one.

# %%
RANKS = [0, 1, 2, 4, 8, 16, 32, 64]
SPENT = {"layer 3, head 1": (2, 0), "layer 4, head 2": (3, 1)}


def errors_by_rank(exactly, approximated, value):
    """Errors of `exactly` + the best approximation of `approximated`, for each rank of RANKS."""
    left, sizes, right = torch.linalg.svd(approximated)
    true = (exactly + approximated) @ value
    outputs = [exactly @ value + left[:, :r] * sizes[:r] @ (right[:r] @ value) for r in RANKS]
    return torch.stack([analysis.relative_l1(output, true) for output in outputs])


on_whole, on_rest = {}, {}
for name, (layer, head) in SPENT.items():
    top, rest = analysis.split_top(P[CLIP, layer, head], 0.05)
    on_whole[name] = errors_by_rank(torch.zeros_like(top), top + rest, value[CLIP, layer, head])
    on_rest[name] = errors_by_rank(top, rest, value[CLIP, layer, head])
    print(f"{name}:  rank 64 for the whole map {on_whole[name][-1]:6.1%}")
    print(f"                  only the largest 5 %     {on_rest[name][0]:6.1%}")
    print(f"                  largest 5 % and rank 1   {on_rest[name][1]:6.1%}")

# %% [markdown]
# In the sharp head, keeping only the largest 5 % beats rank 64. In the flatter one it does not. In both, a rank of one
# for the rest takes away more than half of what the largest 5 % leave, in the flatter head nine tenths.

# %%
sharp_name, flat_name = SPENT
assert on_rest[sharp_name][0] < on_whole[sharp_name][-1]
assert on_rest[flat_name][0] > on_whole[flat_name][-1]
assert on_rest[sharp_name][1] < on_rest[sharp_name][0] / 2
assert on_rest[flat_name][1] < on_rest[flat_name][0] / 8

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
for panel, name in zip(panels, SPENT, strict=True):
    panel.plot(
        RANKS, on_whole[name], "o--", color="#0072B2", linewidth=2, label="rank r for the whole map"
    )
    panel.plot(
        RANKS,
        on_rest[name],
        "s-",
        color="#D55E00",
        linewidth=2,
        label="largest 5 % exactly, rank r for the rest",
    )
    panel.set_xscale("symlog", base=2, linthresh=1)
    panel.set_xticks(RANKS, [str(rank) for rank in RANKS])
    panel.set(yscale="log", xlabel="rank r")
    panel.set_title(name, fontsize=11)
panels[0].set_ylabel("relative L1 error of the output")
figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=2,
    frameon=False,
    fontsize=9,
)
plt.show()

# %% [markdown]
# This is the plan of SLA. A few *critical* weights get exact softmax attention. The *marginal* ones in the middle share
# one linear attention. The *negligible* ones are skipped. Two things separate the plan from a fast layer. A GPU cannot
# pick single weights, so the choice is made [for whole blocks](02_mask_classification.md), before any weight is known.
# And a cheap map of low rank has to be found without decomposing anything, which is the [linear
# branch](03_linear_branch.md).

# %% [markdown]
# ## Exercises
#
# **1. How many weights hold most of the attention?** Write `share_holding(weights, mass)`: the smallest share of a
# map's weights that holds at least the part `mass` of its sum. For a map in which all weights are equal, 90 % of the
# attention needs 90 % of the weights.


# %% tags=["exercise"]
def share_holding(weights, mass):
    """Smallest share of the weights of a map (Nq, Nk) that holds at least `mass` of their sum."""
    ...


# %% tags=["solution"] mistake=["sum() + 1", "sum()"]
def share_holding(weights, mass):
    """Smallest share of the weights of a map (Nq, Nk) that holds at least `mass` of their sum."""
    sums = weights.double().flatten().sort(descending=True).values.cumsum(0)
    needed = (sums < mass * sums[-1]).sum() + 1
    return needed.item() / weights.numel()


# %% tags=["check"]
with check_exercise(1, share_holding):
    equal, row = torch.full((10, 10), 0.1), torch.tensor([[0.5, 0.3, 0.2]])
    expect("100 equal weights", share_holding(equal, 0.895), 0.9, rtol=1e-6)
    expect("the identity matrix", share_holding(torch.eye(10), 1.0), 0.1, rtol=1e-6)
    expect("a row of 0.5, 0.3, 0.2", share_holding(row, 0.7), 2 / 3, rtol=1e-6)
    sharp, flat = share_holding(P[CLIP, 1, 1], 0.9), share_holding(P[CLIP, 0, 1], 0.9)
    assert sharp < 0.02 and flat > 0.5, f"expected under 2 % and over 50 %, got {sharp} and {flat}"
    print(
        f"90 % of the attention: {sharp:.1%} of the weights in the sharpest head, "
        f"{flat:.0%} in a flat one"
    )

# %% [markdown]
# **2. The stable rank without a decomposition.** $\lVert A \rVert_2$ is the largest factor by which $A$ stretches a
# vector. Multiply a random vector by $A^\top A$ again and again, and normalise: it turns to the direction that is
# stretched most. Write `spectral_norm(matrix, steps)` this way. It needs no decomposition and scales to maps of many
# thousand rows.


# %% tags=["exercise"]
def spectral_norm(matrix, steps=50):
    """The largest singular value of a matrix (M, N), by power iteration."""
    ...


# %% tags=["solution"] mistake=["return (matrix @ vector).norm()", "return vector.norm()"]
def spectral_norm(matrix, steps=50):
    """The largest singular value of a matrix (M, N), by power iteration."""
    vector = torch.randn(
        matrix.shape[1], dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)
    )
    for _ in range(steps):
        vector = matrix.mT @ (matrix @ vector)
        vector = vector / vector.norm()
    return (matrix @ vector).norm()


# %% tags=["check"]
with check_exercise(2, spectral_norm):
    diagonal = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    expect("the diagonal matrix of 3, 1, 2", spectral_norm(diagonal), 3.0, rtol=1e-3)
    for number, weights_of_head in enumerate(P[CLIP].flatten(0, 1)):
        estimate = weights_of_head.square().sum() / spectral_norm(weights_of_head) ** 2
        expect(f"stable rank of map {number}", estimate, whole[number], rtol=0.02)
    print("stable ranks of all eight maps within 2 %")

# %% [markdown]
# ## Recap
#
# In every map a minority of weights holds most of the attention. The smallest can be dropped at an error below 3 %;
# those in the middle cannot, but without the largest they come close to a matrix of low rank. So SLA computes the
# largest exactly, gives the middle to a linear attention, and skips the rest.
#
# Next: [2. Mask classification](02_mask_classification.md)
