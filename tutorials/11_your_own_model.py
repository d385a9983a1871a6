# %% [markdown]
# # 11. SLA in your own model
#
# You have a transformer of your own that calls `F.scaled_dot_product_attention`, and its sequences are long. Here is
# the whole way from there: a small video model in plain PyTorch, the swap, the bill, a fine-tune of a few seconds, and
# a fair verdict. Afterwards you will be able to do the same with your model, and know which settings to start from,
# what they cost, and what quality to expect.
#
# Builds on: [3. The linear branch](03_linear_branch.md), [9. Fine-tuning a video transformer](09_fine_tuning.md)

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lesson import check_exercise, expect
from torch import nn

from sla_ref import SparseLinearAttention, sparse_linear_attention
from sla_ref.analysis import attention_flops
from sla_ref.lab.data import MovingDigits

FRAMES, SIZE, PATCH = 4, 16, 2
SIDE = SIZE // PATCH
TOKENS = FRAMES * SIDE * SIDE
WIDTH, HEADS = 32, 2
HEAD_DIM = WIDTH // HEADS

# %% [markdown]
# ## A model without SLA
#
# The task is to restore old film. A clip shows a moving digit, one of those that come with scikit-learn, in four frames
# of 16 x 16 pixels. The model gets a clip with noise and a wrong exposure: everything is brighter or darker by a random
# amount, which differs from clip to clip. It has to return the clean clip.
#
# The task needs both kinds of attention. A few places nearby, in this frame and the next, tell where the digit is. The
# exposure has to be found from all tokens together, since each knows it only through noise.


# %%
def batch(clips, count, generator):
    """Degraded and clean clips (count, FRAMES, SIZE, SIZE)."""
    clean, _ = clips.batch(count)
    exposure = 2 * torch.rand(count, 1, 1, 1, generator=generator) - 1
    return clean + exposure + 0.5 * torch.randn(clean.shape, generator=generator), clean


held_out = batch(
    MovingDigits("held_out", seed=1, size=SIZE, frames=FRAMES), 64, torch.Generator().manual_seed(1)
)

# %% [markdown]
# The model is a plain vision transformer: patches of 2 x 2 pixels, 256 tokens, a learned embedding of places, two
# blocks. One method matters here, `attend`. It gets query, key and value as (B, H, N, D): batch, heads, tokens,
# features of a head. `F.scaled_dot_product_attention` wants them so, and so does this package.


# %%
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def attend(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, x):
        """x (B, N, H*D) -> (B, N, H*D)."""
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
            for each in self.qkv(x).chunk(3, dim=-1)
        )
        return self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Restorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, clips):
        """(B, FRAMES, SIZE, SIZE) -> (B, FRAMES, SIZE, SIZE)."""
        patches = clips.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH)).transpose(3, 4)
        x = self.embed(patches.flatten(4).flatten(1, 3)) + self.place  # (B, N, WIDTH)
        for block in self.blocks:
            x = block(x)
        grid = self.out(self.norm(x)).unflatten(1, (FRAMES, SIDE, SIDE))
        return grid.unflatten(-1, (PATCH, PATCH)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


# %% [markdown]
# It is trained with full attention, as your model has been. Training and fine-tuning share one function: AdamW, a
# one-cycle schedule, batches of eight clips. The seed decides clips, exposures and noise: two runs with the same seed
# see the same data.


# %%
def train(model, steps, learning_rate, seed):
    clips = MovingDigits("train", seed, size=SIZE, frames=FRAMES)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        degraded, clean = batch(clips, 8, generator)
        loss = F.mse_loss(model(degraded), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def restored(model):
    """The held-out clips, as the model restores them."""
    return torch.cat([model(part) for part in held_out[0].split(16)])


def held_out_loss(model):
    """Mean squared error on digits that no training has seen; pixels are in [-1, 1]."""
    return F.mse_loss(restored(model), held_out[1]).item()


torch.manual_seed(0)
teacher = train(Restorer(), steps=300, learning_rate=5e-3, seed=0)
teacher_loss = held_out_loss(teacher)
print(f"held-out loss {F.mse_loss(*held_out).item():.3f} as degraded, {teacher_loss:.4f} restored")

assert teacher_loss < 0.06

# %% [markdown]
# ## The swap
#
# The layer takes the place of one call, and the layout is already right. If yours is (B, N, H, D), as FlashAttention
# has it, `transpose(1, 2)` on the way in and out is all it needs; strides do not matter.
#
# `load_state_dict` with `strict=False` carries the trained weights over. It ignores what does not fit, so we look at
# what it says: nothing may be left over, and only the weights of the new layer may be missing. A swap that silently
# starts from fresh weights looks exactly like a method that does not work.


# %%
class SLAAttention(Attention):
    def __init__(self, width, heads, **settings):
        super().__init__(width, heads)
        self.sla = SparseLinearAttention(width // heads, **settings)

    def attend(self, query, key, value):
        return self.sla(query, key, value)


class SparseAttention(Attention):
    """Only the sparse branch, as a yardstick."""

    def __init__(self, width, heads, **settings):
        super().__init__(width, heads)
        self.settings = settings

    def attend(self, query, key, value):
        out = sparse_linear_attention(query, key, value, negligible_ratio=1.0, **self.settings)
        return out.sparse


def swapped(model, kind, **settings):
    """A copy of the model with another attention and the same weights."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        weights = block.attention.state_dict()
        block.attention = kind(WIDTH, HEADS, **settings)
        missing, unexpected = block.attention.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith("sla.") for name in missing)
    return model


# %% [markdown]
# **Block size and ratio.** Blocks are runs of consecutive tokens. Ours are numbered frame by frame and row by row, so a
# block of 16 is a strip of two rows. There are 16 blocks, and a row's critical blocks are `int(critical_ratio * 16)` of
# them, but at least one. A ratio of 0.07 is one block, 6.25 %, and one of 0.13 is two.
#
# The arms: SLA with one critical block, with Proj from zero and from the identity. Sparse-only attention with the same
# block, and with two. And the *control*: full attention, which gets the same extra training as the others.

# %%
BLOCKS = {"block_q": 16, "block_k": 16}
one, two = {"critical_ratio": 0.07, **BLOCKS}, {"critical_ratio": 0.13, **BLOCKS}
arms = {
    "full attention": copy.deepcopy(teacher),
    "sparse, 1 block": swapped(teacher, SparseAttention, **one),
    "sparse, 2 blocks": swapped(teacher, SparseAttention, **two),
    "SLA, 1 block": swapped(teacher, SLAAttention, **one),
    "SLA from identity": swapped(teacher, SLAAttention, proj_init="identity", **one),
}
before = {name: held_out_loss(model) for name, model in arms.items()}
for name, loss in before.items():
    print(f"{name:18} {loss:.4f}")

assert before["SLA, 1 block"] == before["sparse, 1 block"]
assert min(before["sparse, 1 block"], before["SLA from identity"]) > 1.1 * teacher_loss

# %% [markdown]
# Untrained, every swap is worse than the teacher. SLA with Proj from zero is the sparse branch, to the last bit. From
# the identity it begins further away, since the linear branch is added at full strength before anybody has learned to
# expect it. That is not a reason to discard it, as will be seen.
#
# ## The bill
#
# Count before you train. `attention_flops` counts as the paper does, one head, forward: the critical share of full
# attention, and the linear branch's $2 (N_q + N_k) D^2$. Relative to full attention's $4 N_q N_k D$ that is $D / N$ for
# self-attention, whatever the ratio.


# %%
def cost(tokens, head_dim, share, linear):
    """Of one head's forward, as a share of full attention."""
    flops = attention_flops(tokens, tokens, head_dim, critical_share=share, linear=linear)
    return flops / attention_flops(tokens, tokens, head_dim)


costs = {
    "full attention": 1.0,
    "sparse, 1 block": cost(TOKENS, HEAD_DIM, 1 / 16, False),
    "sparse, 2 blocks": cost(TOKENS, HEAD_DIM, 2 / 16, False),
    "SLA, 1 block": cost(TOKENS, HEAD_DIM, 1 / 16, True),
    "SLA from identity": cost(TOKENS, HEAD_DIM, 1 / 16, True),
}
for name, share in costs.items():
    print(f"{name:18} {share:7.2%} of full attention's operations")
print(f"SLA at 5 % in Wan at 480p: {cost(32760, 128, 0.05, True):.2%}")

assert costs["SLA, 1 block"] == costs["sparse, 2 blocks"]

# %% [markdown]
# With 256 tokens and heads of 16 the linear branch costs as much as a whole critical block: here SLA with one block and
# sparse attention with two have the same price, and have to be compared. With Wan's 32,760 tokens it costs 0.4 %,
# almost nothing. Short sequences are not what SLA is for. Nor do operations promise seconds; for those see
# [Performance](../performance.md), and measure.
#
# ## The fine-tune
#
# All parameters are trained, on the task's own loss, at a fifth of the learning rate that the teacher had, for 60
# steps. All arms see the same clips.

# %%
for model in arms.values():
    train(model, steps=60, learning_rate=1e-3, seed=5)
after = {name: held_out_loss(model) for name, model in arms.items()}
print("                   before    after   operations")
for name in arms:
    print(f"{name:18} {before[name]:.4f}   {after[name]:.4f}   {costs[name]:8.2%}")

assert all(after[name] < before[name] for name in arms if name != "full attention")
assert max(after.values()) < 1.25 * teacher_loss

# %%
colours = ["#009E73", "#D55E00", "#E69F00", "#56B4E9", "#0072B2"]
markers = ["o", "s", "^", "D", "P"]
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for place, (name, colour, marker) in enumerate(zip(arms, colours, markers, strict=True)):
    axes.plot([before[name], after[name]], [place, place], color=colour, lw=1.5)
    axes.plot(before[name], place, color=colour, marker=marker, mfc="none", ls="none")
    axes.plot(after[name], place, color=colour, marker=marker, ls="none")
axes.axvline(after["full attention"], color="#8A8F98", ls="--")
axes.set_yticks(range(len(arms)), arms)
axes.invert_yaxis()
axes.set(xlabel="held-out loss; open: swapped in, filled: fine-tuned")
axes.set_title("Sixty steps win most of it back")
plt.show()

# %% [markdown]
# A loss hides where a model fails; pictures show it. Here is one frame from each of six clips.

# %%
rows = {
    "degraded": held_out[0],
    "full attention": restored(arms["full attention"]),
    "sparse, 1 block": restored(arms["sparse, 1 block"]),
    "SLA from identity": restored(arms["SLA from identity"]),
    "clean": held_out[1],
}
figure, panels = plt.subplots(len(rows), 6, figsize=(6.4, 5), layout="constrained")
for row, (name, clips) in zip(panels, rows.items(), strict=True):
    for clip, panel in zip(clips, row, strict=False):
        panel.imshow(clip[1], cmap="gray", vmin=-1, vmax=1)
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
figure.suptitle("The second frame of six held-out clips", fontsize=11)
plt.show()

# %% [markdown]
# ## The verdict
#
# Four questions make it fair. Ask them of your own model too.
#
# **Against what?** Not against the untouched teacher. The control shows what sixty more steps do to full attention;
# only the distance to it is the price of the swap.
#
# **At what cost?** Sparse-only attention with the same critical blocks does half the operations here, so a lead over it
# has been paid for. Sparse-only attention with the same operations is the harder yardstick.


# %%
def against(name, other):
    """How the loss of one arm compares with that of another."""
    change = after[name] / after[other] - 1
    return f"{name} is {abs(change):.1%} {'above' if change > 0 else 'below'} {other}"


print(against("SLA from identity", "full attention"))
print(against("SLA from identity", "sparse, 1 block"), "with the same critical blocks")
print(against("SLA from identity", "sparse, 2 blocks"), "with the same operations")
print(against("SLA from identity", "SLA, 1 block"), "with another start of Proj")

# %% [markdown]
# **With which spread?** One seed and sixty steps are an anecdote. Differences of a few per cent, like some of these,
# may turn around with another seed. Run three seeds, print the range, and believe what holds in all of them.
#
# **On what?** Held-out data, and the measure that you care about. In
# [Experiments](../experiments.md#sla-against-its-halves), held-out loss and the quality of generated clips do not rank
# the arms alike. A task like this one does not say much about another, either: it has the exposure because SLA needs
# something that all tokens share. In the lab's larger model, a grey backdrop of that kind [did not widen SLA's
# lead](../experiments.md#when-does-the-papers-order-hold).
#
# ## Settings to start from
#
# This lesson's model is a toy. [Fine-tune your model](../fine-tune.md) has settings to start from, and next to each of
# them what was measured with the lab's video transformer and what the paper did. Two settings matter most: train all
# parameters, and start Proj at the identity. The page also says what a training step of Wan costs, and what quality to
# expect.
#
# **What the layer does not do.** It supports no mask, causal or other, and no dropout on attention weights. Query, key
# and value must have the same head dimension. [Numerics](../numerics.md#what-is-not-supported) lists the rest.
# Cross-attention to a short text has nothing to save; leave it as it is.
#
# ## Exercises
#
# **1. The layout.** Your tensors are (B, N, H\*D), with the features of a head next to each other. Call a layer that
# wants (B, H, N, D), and give the result back as (B, N, H\*D). Beware of `view` and `reshape` between the two: the
# shape comes out right and the numbers do not.


# %% tags=["exercise"]
def attend_flat(layer, query, key, value, heads):
    """layer(query, key, value) for tensors (B, N, heads * D) -> (B, N, heads * D)."""
    ...


# %% tags=["solution"] mistake=[".transpose(1, 2).flatten(2)", ".reshape(query.shape)"]
def attend_flat(layer, query, key, value, heads):
    """layer(query, key, value) for tensors (B, N, heads * D) -> (B, N, heads * D)."""
    split = (
        each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value)
    )  # (B, H, N, D)
    return layer(*split).transpose(1, 2).flatten(2)


# %% tags=["check"]
generator = torch.Generator().manual_seed(0)
flat = torch.randn(3, 2, 40, 24, generator=generator)  # query, key, value of 3 heads
exact = SparseLinearAttention(8, critical_ratio=1.0, block_q=8, block_k=8)

with check_exercise(1, attend_flat):
    got = attend_flat(exact, *flat, 3)
    for head in range(3):
        own = slice(8 * head, 8 * head + 8)
        wanted = F.scaled_dot_product_attention(*flat[..., own])
        expect(f"head {head}", got[..., own], wanted, rtol=1e-4, atol=1e-5)

# %% [markdown]
# **2. A budget.** SLA may cost at most a given share of full attention's operations, its linear branch included. How
# many critical blocks can each query block have? Zero, if the linear branch costs more than that.


# %% tags=["exercise"]
def affordable_blocks(budget, tokens, head_dim, block):
    """The largest number of critical key blocks per row; `budget` is a share of full attention."""
    ...


# %% tags=["solution"] mistake=["budget - linear", "budget"]
def affordable_blocks(budget, tokens, head_dim, block):
    """The largest number of critical key blocks per row; `budget` is a share of full attention."""
    linear = head_dim / tokens  # 4 N D^2 relative to 4 N^2 D
    return max(0, math.floor((budget - linear) * math.ceil(tokens / block)))


# %% tags=["check"]
with check_exercise(2, affordable_blocks):
    for budget, *sizes in (
        (0.13, 256, 16, 16),
        (0.05, 256, 16, 16),
        (0.1, 32760, 128, 64),
        (0.6, 1024, 64, 16),
    ):
        tokens, head_dim, block = sizes
        total = math.ceil(tokens / block)
        fitting = [n for n in range(total) if cost(tokens, head_dim, n / total, True) <= budget]
        expect(
            f"{budget:.0%} of {sizes}", affordable_blocks(budget, *sizes), max(fitting, default=0)
        )

# %% [markdown]
# ## Recap
#
# SLA takes the place of one call and of nothing else: (B, H, N, D) in and out, and every trained weight stays. In a
# model whose code you cannot change, [`replace_sdpa`](../own-model.md#keep-the-code) puts the layer there. Count
# the operations before, fine-tune everything after, and judge against a control and against sparse-only attention, with
# the same blocks and with the same cost. Longer sequences make the linear branch cheap, and longer fine-tunes make it
# useful.
#
# Next: [12. How much each branch weighs](12_branch_weights.md)
