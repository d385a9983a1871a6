# %% [markdown]
# # 2. Mask classification
#
# SLA sorts pairs of blocks into critical, marginal and negligible before it has computed a single attention weight.
# Afterwards you will know how: pooling, scores, the largest and the smallest of each row. You will have written it
# yourself in ten lines, seen what it does at the end of a ragged sequence and at ties, and measured how often it is
# wrong.
#
# Builds on: [1. What attention weights look like](01_attention_weights.md).

# %% [markdown]
# ## Blocks
#
# A GPU works on tiles of numbers. Leaving out one weight in the middle of a tile saves nothing; leaving out the whole
# tile does. So the tokens are cut into blocks of $b$, and a decision is made for each pair of a query block $i$ and a
# key block $j$. The paper uses $b = 64$. The model here is small and has blocks of 16 tokens: two rows of patches of
# one frame.

# %%
import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, show_source
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import sla_ref
from sla_ref import analysis, block_map, reference
from sla_ref.lab import evaluate, weights

teacher, card = weights.load_weights(weights.TEACHER)
clips = evaluate.held_out(teacher, 4)
caught = evaluate.attention_inputs(teacher, clips.x, clips.time, clips.labels)
# of each layer: (clip, head, token, feature)
layers = [(query, key) for query, key, value in caught]

BLOCK = teacher.config.block
query, key = layers[2]  # the third layer
B, H, N, D = query.shape
T = N // BLOCK
print(f"{N} tokens in {T} blocks of {BLOCK}: {T * T} pairs per head")

# %% [markdown]
# ## Pool and score
#
# Each block is replaced by the mean of its tokens, and the means are compared [Eq. 2]:
#
# $$P_c = \operatorname{softmax}\left(\frac{\operatorname{pool}(Q) \operatorname{pool}(K)^\top}{\sqrt{D}}\right)
# \in \mathbb{R}^{T_q \times T_k}.$$
#
# That costs $b^2$ times less than all scores, and it is more than a random guess: dot products are linear, so the score
# of two means is the mean of all $b^2$ scores of the tile.

# %%
pooled_query = torch.stack(
    [tokens.mean(dim=2) for tokens in query.double().split(BLOCK, dim=2)], dim=2
)
pooled_key = torch.stack([tokens.mean(dim=2) for tokens in key.double().split(BLOCK, dim=2)], dim=2)
scores = pooled_query @ pooled_key.mT  # (clip, head, Tq, Tk)

every_score = query.double() @ key.double().mT
of_tiles = every_score.view(B, H, T, BLOCK, T, BLOCK)
assert torch.allclose(scores, of_tiles.mean(dim=(3, 5)), atol=1e-9)
assert torch.allclose(
    scores, sla_ref.block_scores(query, key, block_q=BLOCK, block_k=BLOCK), atol=1e-9
)

# %% [markdown]
# The package does the same. It leaves out the softmax and $1/\sqrt{D}$: only the order within a row matters, and
# neither changes it. Leaving them out is even safer. Where scores are far apart, a float32 softmax rounds all but the
# largest weights to zero, and what was ordered becomes a tie.

# %%
show_source(sla_ref.block_scores, block_map.pool_blocks)

order = scores.argsort(dim=-1)
assert torch.equal(order, (scores / D**0.5).argsort(dim=-1))
apart = torch.tensor([0.0, 150.0, 300.0])
assert apart.softmax(dim=-1).tolist() == [0, 0, 1]  # 0 and 150 are now a tie

# %% [markdown]
# ## Three classes
#
# Each row is ranked. The first few blocks become critical (label 1), the last few negligible (-1), the rest marginal
# (0) [Eq. 3]. How many are a few? `critical_ratio` and `negligible_ratio` times the number of key blocks, cut to an
# integer, and at least one critical block.

# %%


def classify(scores, critical_ratio, negligible_ratio):
    """Labels (..., Tq, Tk) from scores (..., Tq, Tk)."""
    num_blocks = scores.shape[-1]
    num_critical = max(1, int(critical_ratio * num_blocks))
    num_negligible = min(int(negligible_ratio * num_blocks), num_blocks - num_critical)
    # 0 is the best of its row
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    labels = torch.zeros_like(rank)
    labels[rank < num_critical] = 1
    labels[rank >= num_blocks - num_negligible] = -1
    return labels


classes = sla_ref.classify_blocks(query, key, 0.05, 0.10, block_q=BLOCK, block_k=BLOCK)
labels = classes.labels
assert torch.equal(classify(scores, 0.05, 0.10), labels.long())
assert torch.equal(reference.classify(query, key, 0.05, 0.10, BLOCK, BLOCK), labels)

per_row = {name: (labels == label).sum(dim=-1) for label, name in analysis.CLASS_NAMES.items()}
print("blocks per row:", {name: count.unique().tolist() for name, count in per_row.items()})
assert per_row["critical"].unique().tolist() == [int(0.05 * 64)] == [3]
assert per_row["negligible"].unique().tolist() == [int(0.10 * 64)] == [6]
assert int(0.29 * 100) == 28  # cut as float arithmetic gives it, as the authors' code does

# %%
show_source(sla_ref.classify_blocks)

# %% [markdown]
# Every row has the same number of critical blocks. That makes the work even on a GPU, and it is a choice: a head that
# needs two blocks gets three, one that needs thirty gets three. Below are the classes of all eight heads of one clip.

# %%
CLIP = 1
COLOURS = ListedColormap([analysis.CLASS_COLOURS[label] for label in (-1, 0, 1)])
all_labels = [
    sla_ref.classify_blocks(q, k, 0.05, 0.10, block_q=BLOCK, block_k=BLOCK).labels
    for q, k in layers
]


def draw_classes(panel, labels):
    """The labels (Tq, Tk) as a picture; critical blocks get a dot, to show without colour."""
    panel.imshow(labels.numpy(), cmap=COLOURS, vmin=-1, vmax=1, interpolation="nearest")
    rows, columns = (labels == 1).nonzero(as_tuple=True)
    panel.plot(columns, rows, ".", markersize=0.8, color="black")
    panel.set(xticks=[], yticks=[])


figure, axes = plt.subplots(H, len(layers), figsize=(8.4, 4.9), layout="constrained")
for layer, of_layer in enumerate(all_labels):
    axes[0, layer].set_title(f"layer {layer + 1}", fontsize=10)
    axes[-1, layer].set_xlabel("key blocks", fontsize=9)
    for head in range(H):
        draw_classes(axes[head, layer], of_layer[CLIP, head])
for head, row in enumerate(axes, start=1):
    row[0].set_ylabel(f"head {head}\nquery blocks", fontsize=9)
handles = [
    Patch(color=analysis.CLASS_COLOURS[label], label=name)
    for label, name in analysis.CLASS_NAMES.items()
]
figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
figure.suptitle(
    f"Classes at 5 % critical, 10 % negligible, t = {clips.time[CLIP]:.3f}", fontsize=11
)
plt.show()

# %% [markdown]
# Four blocks make a frame. The stripes parallel to the diagonal are tokens that look at the same place in the frames
# before and after.

# %%
rows, columns = (all_labels[2][CLIP, 0] == 1).nonzero(as_tuple=True)  # layer 3, head 1
assert ((columns - rows).abs() % 4 == 0).double().mean() > 0.9

# %% [markdown]
# ## The ragged tail
#
# Wan's clip at 480p has 32,760 tokens, which is not a multiple of 64. The last block then has fewer tokens and is
# pooled over those it has. Filling it up with zeros would be simpler and wrong: it would shrink the mean, and with it
# every score of the block, towards zero.

# %%
LENGTH = 1000  # 62 blocks of 16 and one of 8
short_query, short_key = query[:, :, :LENGTH], key[:, :, :LENGTH]
ragged = sla_ref.block_scores(short_query, short_key, block_q=BLOCK, block_k=BLOCK)
assert ragged.shape == (B, H, 63, 63)

filled_key = torch.nn.functional.pad(short_key, (0, 0, 0, 8))
filled = sla_ref.block_scores(short_query, filled_key, block_q=BLOCK, block_k=BLOCK)
assert torch.allclose(filled[..., :62], ragged[..., :62], atol=1e-4)  # whole blocks do not notice
# the last one is halved
assert torch.allclose(filled[..., 62], ragged[..., 62] * 8 / 16, atol=1e-4)

ragged_labels, filled_labels = classify(ragged, 0.05, 0.10), classify(filled, 0.05, 0.10)
changed = (ragged_labels != filled_labels)[..., 62].double().mean()
print(f"last key block: {changed:.0%} of the query blocks would give it another class")
assert changed > 0

# %% [markdown]
# ## Ties
#
# If scores are equal, the earlier block ranks higher. Any rule would do, as long as it is one: results must not depend
# on the device or on the sorting algorithm. Torch's sort promises an order for ties only with `stable=True`.

# %%
same = torch.ones(1, 1, 64, 8)
tied = sla_ref.classify_blocks(same, same, 0.25, 0.5, block_q=8, block_k=8).labels
assert tied[0, 0, 0].tolist() == [1, 1, 0, 0, -1, -1, -1, -1]

# %% [markdown]
# ## No gradient
#
# A rank does not change when a score changes a little, so its gradient is zero wherever it exists. The classification
# is not trained. What trains is everything that moves the queries and keys it sees, through the two branches.

# %%
leaf = query.clone().requires_grad_()
assert not sla_ref.block_scores(leaf, key, block_q=BLOCK, block_k=BLOCK).requires_grad

# %% [markdown]
# ## What pooling gets wrong
#
# The mean of the scores is not what counts. Attention spends $\sum \exp(s)$ on a tile, and the exponential looks at the
# largest scores. A block in which one key matches well and the others badly has a poor mean. An extreme case: two keys
# that are opposite, of which one takes nearly all attention, pool to nothing.

# %%
opposite = torch.zeros(1, 1, 4, 8)
opposite[0, 0, 0, 0], opposite[0, 0, 1, 0] = 30.0, -30.0  # the first block: two opposite keys
opposite[0, 0, 2:, 0] = 1.0  # the second: two that match a little
one_query = torch.zeros(1, 1, 1, 8)
one_query[..., 0] = 1.0
spent = analysis.block_mass(analysis.attention_weights(one_query, opposite), 1, 2)[0, 0, 0]
chosen = sla_ref.classify_blocks(one_query, opposite, 0.5, 0.5, block_q=1, block_k=2).labels[
    0, 0, 0
]
print(
    "attention spent on the two blocks:",
    [round(part, 3) for part in spent.tolist()],
    "labels:",
    chosen.tolist(),
)
assert spent[0] > 0.99 and chosen.tolist() == [-1, 1]

# %% [markdown]
# How often does that happen in a real model? The maps here are small enough to know the truth. The *mass* of a tile is
# the part of its attention that a query block spends on a key block. An *oracle* ranks by mass and hands out the same
# number of each class. Two numbers compare pooling with it:
#
# - *recall*: the share of the oracle's critical blocks that pooling finds;
# - *kept mass*: the part of all attention that falls on the critical blocks.

# %%
show_source(
    analysis.block_mass, analysis.oracle_labels, analysis.critical_recall, analysis.class_mass
)

# %%
masses = [analysis.block_mass(analysis.attention_weights(q, k), BLOCK, BLOCK) for q, k in layers]
recalls, kept = [], {"pooled": [], "oracle": []}
print("mean of 4 clips     recall   kept by pooling   by the oracle   lost with the negligible")
for layer, (mass, of_layer) in enumerate(zip(masses, all_labels, strict=True)):
    oracle = analysis.oracle_labels(mass, of_layer)
    recalls.append(analysis.critical_recall(of_layer, oracle).mean(dim=0))  # per head
    pooled_mass = {
        label: part.mean(dim=0) for label, part in analysis.class_mass(mass, of_layer).items()
    }
    kept["pooled"].append(pooled_mass[1])
    kept["oracle"].append(analysis.class_mass(mass, oracle)[1].mean(dim=0))
    for head in range(H):
        figures = (
            recalls[-1][head],
            kept["pooled"][-1][head],
            kept["oracle"][-1][head],
            pooled_mass[-1][head],
        )
        columns = "".join(
            f"{figure:{width}.1%}" for figure, width in zip(figures, (8, 18, 16, 16), strict=True)
        )
        print(f"layer {layer + 1}, head {head + 1}  {columns}")

recall = torch.stack(recalls)  # (layer, head)
by_pooling, by_oracle = (torch.stack(kept[name]) for name in ("pooled", "oracle"))

# %% [markdown]
# Pooling finds nearly all of the right blocks in some heads, and misses about half in others. The misses cost less than
# it seems. Where much depends on the choice, in the heads with a high kept mass, pooling is right. Where it is wrong,
# the attention is spread so evenly that no choice of 3 blocks in 64 keeps much: there pooling loses little against the
# oracle.
#
# That is a statement about mass. Before any fine-tuning, the loss of a whole model is much higher with pooling than
# with the oracle. A fine-tuned student has learnt to do without the oracle
# ([Experiments](../experiments.md#which-blocks-are-chosen)).

# %%
assert recall.max() > 0.95 and recall.min() < 0.6
assert (by_pooling > 0.95 * by_oracle)[by_oracle > 0.3].all()
assert ((by_oracle - by_pooling) < 0.05).all()
assert (by_oracle[recall < 0.6] < 0.2).all()

# %% [markdown]
# The kept mass also grows with the ratio. Random blocks would keep just their share.

# %%
RATIOS = [1 / 64, 0.05, 0.10, 0.20, 0.40, 0.70, 1.0]
HEADS = {"layer 3, head 1": (2, 0), "layer 4, head 1": (3, 0)}
figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
for panel, (name, (layer, head)) in zip(panels, HEADS.items(), strict=True):
    mass = masses[layer][:, head]
    head_scores = sla_ref.block_scores(*layers[layer], block_q=BLOCK, block_k=BLOCK)[:, head]
    by_ratio = {"oracle": [], "pooled": []}
    for ratio in RATIOS:
        of_ratio = classify(head_scores, ratio, 0.0)
        by_ratio["pooled"].append(analysis.class_mass(mass, of_ratio)[1].mean().item())
        by_ratio["oracle"].append(
            analysis.class_mass(mass, analysis.oracle_labels(mass, of_ratio))[1].mean().item()
        )
    assert all(
        best >= found - 1e-6
        for best, found in zip(by_ratio["oracle"], by_ratio["pooled"], strict=True)
    )
    assert all(
        found >= ratio - 0.02 for found, ratio in zip(by_ratio["pooled"], RATIOS, strict=True)
    )
    panel.plot(RATIOS, by_ratio["oracle"], "s--", color="#009E73", label="oracle")
    panel.plot(RATIOS, by_ratio["pooled"], "o-", color="#D55E00", label="pooled scores")
    panel.plot([0, 1], [0, 1], ":", color="#8A8F98", label="random blocks, on average")
    panel.set(xlabel="critical ratio")
    panel.set_title(name, fontsize=11)
panels[0].set_ylabel("part of all attention that is kept")
panels[1].legend(frameon=False, fontsize=9, loc="lower right")
plt.show()

# %% [markdown]
# In the left head 5 % of the blocks hold most of the attention, and sparse attention would do. In the right head it
# takes far more, and the other blocks cannot be ignored. The [linear branch](03_linear_branch.md) is for them. The
# negligible tenth, on the other hand, holds between nothing and a few per cent, always less than its share.

# %%
lost = torch.stack(
    [
        analysis.class_mass(mass, of_layer)[-1]
        for mass, of_layer in zip(masses, all_labels, strict=True)
    ]
)
print(
    f"negligible blocks, {6 / 64:.1%} of all, hold {lost.mean():.1%} of the attention, "
    f"{lost.max():.1%} at most"
)
assert lost.max() < 6 / 64
assert by_pooling[2, 0] > 0.6 and by_pooling[3, 0] < 0.15

# %%
layer, head = HEADS["layer 4, head 1"]
figure, panels = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained")
image = panels[0].imshow(
    masses[layer][CLIP, head].log10().numpy(), cmap="cividis", vmin=-3, vmax=-1
)
panels[0].set(xlabel="key blocks", ylabel="query blocks", title="log10(mass)")
figure.colorbar(image, ax=panels[0], shrink=0.8)
wanted = analysis.oracle_labels(masses[layer], all_labels[layer])[CLIP, head] == 1
found = all_labels[layer][CLIP, head] == 1
panels[1].imshow(torch.zeros(T, T).numpy(), cmap="Greys", alpha=0.15)
for picked, marker, colour, name in [
    (wanted & found, ".", "#009E73", "found"),
    (wanted & ~found, "x", "#D55E00", "missed"),
    (found & ~wanted, "+", "#0072B2", "taken instead"),
]:
    rows, columns = picked.nonzero(as_tuple=True)
    panels[1].plot(
        columns,
        rows,
        marker,
        linestyle="none",
        markersize=5,
        color=colour,
        label=f"{name}: {len(rows)}",
    )
panels[1].set(xlabel="key blocks", title="critical blocks, against the oracle")
figure.suptitle(
    f"Layer {layer + 1}, head {head + 1}: what pooling had to find, and what it found", fontsize=11
)
figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## Exercises
#
# **1. How many of each?** Write `class_counts(num_blocks, critical_ratio, negligible_ratio)`. It returns how many
# critical, marginal and negligible blocks a row has. There is always a critical one, and critical goes before
# negligible where the two ratios do not fit into one row.


# %% tags=["exercise"]
def class_counts(num_blocks, critical_ratio, negligible_ratio):
    """(critical, marginal, negligible) blocks in a row of `num_blocks`."""
    ...


# %% tags=["solution"] mistake=["max(1, int(critical_ratio * num_blocks))", "int(critical_ratio * num_blocks)"]
def class_counts(num_blocks, critical_ratio, negligible_ratio):
    """(critical, marginal, negligible) blocks in a row of `num_blocks`."""
    critical = max(1, int(critical_ratio * num_blocks))
    negligible = min(int(negligible_ratio * num_blocks), num_blocks - critical)
    return critical, num_blocks - critical - negligible, negligible


# %% tags=["check"]
with check_exercise(1, class_counts):
    expect("64 blocks, 5 % and 10 %", class_counts(64, 0.05, 0.10), (3, 55, 6))
    expect("Wan at 480p", class_counts(512, 0.05, 0.10), (25, 436, 51))
    expect("5 blocks, 5 % and 100 %", class_counts(5, 0.05, 1.0), (1, 0, 4))
    expect("1 block, 50 % and 50 %", class_counts(1, 0.5, 0.5), (1, 0, 0))
    for num_blocks in range(1, 40):
        tokens = torch.randn(
            1, 1, num_blocks, 4, generator=torch.Generator().manual_seed(num_blocks)
        )
        row = sla_ref.classify_blocks(tokens, tokens, 0.3, 0.8, block_q=1, block_k=1).labels[
            0, 0, 0
        ]
        counted = tuple(int((row == label).sum()) for label in (1, 0, -1))
        expect(f"{num_blocks} blocks, 30 % and 80 %", class_counts(num_blocks, 0.3, 0.8), counted)

# %% [markdown]
# **2. Another score.** The mass of a tile grows with the spread of its scores, not only with their mean. If the scores
# $s$ of a tile were normally distributed, then $\log \operatorname{mean} e^s$ would be $\operatorname{mean}(s) +
# \operatorname{var}(s) / 2$. The mean of the squares needs no $N \times N$ matrix either:
#
# $$\operatorname{mean}_{q, k} (q \cdot k)^2 = \Big\langle \tfrac{1}{b} Q_i^\top Q_i, \; \tfrac{1}{b} K_j^\top K_j
# \Big\rangle,$$
#
# a dot product of two $D \times D$ matrices. Write `normal_scores`, with $s = q \cdot k / \sqrt{D}$ and whole blocks
# only. The check compares it with all scores of each tile, and its recall with that of pooling: the worst head gains,
# others lose, where their scores are far from normal.


# %% tags=["exercise"]
def normal_scores(query, key, block):
    """mean(s) + var(s) / 2 of each tile, (B, H, Tq, Tk), for query, key (B, H, N, D)."""
    ...


# %% tags=["solution"] mistake=["(mean_square - mean**2) / 2", "mean_square / 2"]
def normal_scores(query, key, block):
    """mean(s) + var(s) / 2 of each tile, (B, H, Tq, Tk), for query, key (B, H, N, D)."""
    scale = query.shape[-1] ** -0.5
    query_blocks, key_blocks = (tokens.unflatten(2, (-1, block)) for tokens in (query * scale, key))
    mean = query_blocks.mean(dim=3) @ key_blocks.mean(dim=3).mT
    query_moments, key_moments = (
        tokens.mT @ tokens / block for tokens in (query_blocks, key_blocks)
    )
    mean_square = query_moments.flatten(3) @ key_moments.flatten(3).mT
    return mean + (mean_square - mean**2) / 2


# %% tags=["check"]
s = of_tiles / D**0.5
expected = s.mean(dim=(3, 5)) + s.var(dim=(3, 5), correction=0) / 2

with check_exercise(2, normal_scores):
    got = normal_scores(query.double(), key.double(), BLOCK)
    expect("scores (B, H, Tq, Tk)", got, expected, rtol=1e-5, atol=1e-9)

    new_recalls = []
    for (q, k), mass, of_layer in zip(layers, masses, all_labels, strict=True):
        oracle = analysis.oracle_labels(mass, of_layer)
        guess = classify(normal_scores(q.double(), k.double(), BLOCK), 0.05, 0.10)
        new_recalls.append(analysis.critical_recall(guess, oracle).mean(dim=0))
    new_recall = torch.stack(new_recalls)
    print(f"recall: pooling {recall.mean():.1%}, with the variance {new_recall.mean():.1%}")
    print(f"worst head: pooling {recall.min():.1%}, with the variance {new_recall.min():.1%}")
    assert new_recall.min() > recall.min()  # better where pooling is worst ...
    assert (new_recall < recall).any()  # ... and worse elsewhere

# %% [markdown]
# ## Recap
#
# The mean query and the mean key of two blocks give the pair a score. In each row the highest scores are critical, the
# lowest negligible, and the others marginal, and no attention weight has to be known for that. The guess is good where
# much depends on it, and the marginal blocks hold too much to be ignored.
#
# Next: [3. The linear branch](03_linear_branch.md)
