# %% [markdown]
# # Paper and released code
#
# The paper and the [authors' repository](https://github.com/thu-ml/SLA) do not describe one and the same computation,
# and the repository has two branches that differ from each other. This page computes all three on one small problem.
# Afterwards you know which blocks go where in each of them, when that matters, why a fresh layer's linear branch adds
# nothing, and which parameters a fine-tune has to touch. The last section sets SLA2, the authors' second paper, next to
# the three.
#
# "SLA-1" is the branch of that name at commit 325cc75, "main" the branch main at d973e55. What is said about them was
# read in their code. The functions below follow that code but are our own, on top of the
# [specification](../api/operator.md#the-specification).

# %%
import matplotlib.pyplot as plt
import torch
from lesson import show_source
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import sla_ref
from sla_ref.analysis import CLASS_COLOURS, CLASS_NAMES
from sla_ref.feature_maps import softmax as phi

torch.manual_seed(0)
B, H, N, D, block = 1, 1, 640, 32, 32
# the tokens of a block resemble each other
centre = torch.randn(3, B, H, N // block, 1, D).double()
tokens = centre + 0.7 * torch.randn(3, B, H, N // block, block, D)
query, key, value = tokens.flatten(3, 4)  # (B, H, N, D)
scale = D**-0.5

# %% [markdown]
# ## Which blocks go where
#
# Issues [7](https://github.com/thu-ml/SLA/issues/7), [11](https://github.com/thu-ml/SLA/issues/11),
# [15](https://github.com/thu-ml/SLA/issues/15) and [18](https://github.com/thu-ml/SLA/issues/18) ask this. The paper
# gives each pair of blocks to one of three classes: exact attention (critical), the linear branch (marginal), or
# nothing (negligible). Equation 5 sums over the marginal blocks only: in the specification the two branches are two
# masks.

# %%
blocks = {"block_q": block, "block_k": block}
map_of_paper = sla_ref.classify_blocks(query, key, 0.10, 0.30, **blocks)
labels = map_of_paper.labels
show_source(sla_ref.reference.sparse_linear_attention)


def paper(query, key, value):
    inputs = (query, key, value, phi(query), phi(key))
    return sla_ref.reference.sparse_linear_attention(*inputs, labels, block, block, scale)


# %% [markdown]
# SLA-1 has no negligible class: whatever is not critical goes to the linear branch. In terms of the paper it is a
# map in which every $-1$ is a $0$, which is what `negligible_ratio=0` gives.


# %%
def sla_1(query, key, value):
    every_block = labels.where(labels == 1, 0)
    inputs = (query, key, value, phi(query), phi(key))
    return sla_ref.reference.sparse_linear_attention(*inputs, every_block, block, block, scale)


without_negligible = sla_ref.classify_blocks(query, key, 0.10, 0.0, **blocks)
assert torch.equal(without_negligible.labels, labels.where(labels == 1, 0))

# %% [markdown]
# On main the linear branch no longer looks at the classes. It runs over all keys, the critical ones included, and adds
# $10^{-5}$ to the denominator. Critical keys then count twice, once in each branch.


# %%
def main(query, key, value):
    sparse, _, lse = paper(query, key, value)
    state, weight = phi(key).mT @ value, phi(key).sum(2)[..., None]
    return sparse, phi(query) @ state / (phi(query) @ weight + 1e-5), lse


outputs = {
    "paper": paper(query, key, value),
    "SLA-1": sla_1(query, key, value),
    "main": main(query, key, value),
}
for name, (sparse, linear, _) in outputs.items():
    same = torch.equal(sparse, outputs["paper"][0])
    change = (linear - outputs["paper"][1]).norm() / outputs["paper"][1].norm()
    print(f"{name:6} same sparse branch: {same}   linear branch differs by {change:.1%}")

assert all(torch.equal(sparse, outputs["paper"][0]) for sparse, _, _ in outputs.values())
assert not torch.allclose(outputs["SLA-1"][1], outputs["paper"][1], rtol=0.01)
assert not torch.allclose(outputs["main"][1], outputs["SLA-1"][1], rtol=0.01)

# %% [markdown]
# The sparse branch is one and the same; the linear branch is three different things. Which keys reach it, pair by pair:

# %%
reach = {
    "paper": labels[0, 0],
    "SLA-1": without_negligible.labels[0, 0],
    "main, linear branch": torch.zeros_like(labels[0, 0]),
}
colours = ListedColormap([CLASS_COLOURS[label] for label in (-1, 0, 1)])
figure, panels = plt.subplots(1, 3, figsize=(7.2, 3.2), sharey=True)
for panel, (name, shown) in zip(panels, reach.items(), strict=True):
    panel.imshow(shown, cmap=colours, vmin=-1, vmax=1)
    for label, marker in {1: ".", -1: "x"}.items():
        rows, columns = (shown == label).nonzero(as_tuple=True)
        panel.scatter(columns, rows, s=6, marker=marker, color="black", linewidth=0.5)
    panel.set(title=name, xlabel="key block", xticks=[], yticks=[])
panels[0].set_ylabel("query block")
handles = [Patch(color=CLASS_COLOURS[label], label=name) for label, name in CLASS_NAMES.items()]
figure.legend(handles=handles, loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# Dots mark the critical blocks, crosses the negligible ones. The right panel shows the linear branch: all keys are
# marginal to it. The sparse branch of main has the critical blocks of the other two panels.
#
# So issue 18 is right: main does not compute what the paper describes. It is not the paper's ablation L+S either,
# which adds the two branches without Proj.
#
# Weights trained with one of the three need not fit another, since each Proj has learnt to correct another linear
# branch. In this package `negligible_ratio=0` gives the classes of SLA-1. The linear branch of main is not offered.

# %% [markdown]
# ## How many blocks are critical
#
# Both branches take `int(ratio * blocks)` critical blocks. Where that is 0 the softmax has nothing to normalise over,
# and the output is NaN. Here at least one block is critical.

# %%
for length in (320, 640, 1280, 2560):
    count = length // 64
    tensor = torch.zeros(1, 1, length, 8)
    here = int(sla_ref.classify_blocks(tensor, tensor, 0.05).kv_num_blocks[0, 0, 0])
    print(f"{length:5} tokens, {count:2} blocks of 64: {int(0.05 * count)} released, {here} here")
    assert here == max(1, int(0.05 * count))

nothing = torch.full((1, 4), -torch.inf)
assert torch.softmax(nothing, dim=-1).isnan().all()

# %% [markdown]
# ## The denominator
#
# Here a zero denominator gives zero and nothing is added to any other. An added $10^{-5}$ pulls each row towards
# zero, the more the smaller its denominator is. With softmax over $D$ features a denominator is about $n / D$ for $n$
# marginal tokens, and the effect is far below the rounding of bfloat16. With a feature map that can come close to
# zero it need not be.

# %%
small_relu = {"relu, features of size 0.001": lambda x: 0.001 * x.relu()}
for name, feature_map in {"softmax": phi, **small_relu}.items():
    denominator = feature_map(query) @ feature_map(key).sum(2)[..., None]
    shrink = 1e-5 / (denominator + 1e-5)
    print(f"{name}: rows become smaller by {shrink.median():.1e} (median)")
    if name == "softmax":
        assert shrink.max() < torch.finfo(torch.bfloat16).eps / 100

# %% [markdown]
# ## Smoothing the keys
#
# The released code subtracts the mean of all keys before it pools and scores, and ranks without the softmax and
# $1/\sqrt{d}$ of Equation 2. Neither changes the order within a row: the mean key $\bar{k}$ moves all scores of query
# block $i$ by the same $\operatorname{pool}(Q)_i \cdot \bar{k}$.

# %%
smoothed = sla_ref.classify_blocks(query, key - key.mean(2, keepdim=True), 0.10, 0.30, **blocks)
assert torch.equal(smoothed.labels, labels)

# %% [markdown]
# What does change the order is a softmax in float32: it underflows, and blocks of different score become ties.

# %%
scores = torch.tensor([200.0, 90.0, 80.0, 70.0])
print(torch.softmax(scores, dim=-1).tolist())
assert (torch.softmax(scores, dim=-1)[1:] == 0).sum() == 3 and len(scores.unique()) == 4

# %% [markdown]
# ## Why the linear branch is zero at the start
#
# Issue [19](https://github.com/thu-ml/SLA/issues/19) found that `proj_l` is all zero and the linear branch never shows
# in the output. That is how training starts, not a fault. A fresh layer is its sparse branch:

# %%
layer = sla_ref.SparseLinearAttention(D, 0.10, 0.30, **blocks).double()
output = layer(query, key, value)
assert torch.allclose(output, outputs["paper"][0], rtol=0, atol=1e-12)

# %% [markdown]
# It does not stay so, since the gradient with respect to Proj is not zero. With $O = O^s + O^l W^\top + b$ it is
# $\partial \ell / \partial W = (\partial \ell / \partial O)^\top O^l$, whatever $W$ is. What is zero at the first step
# is the gradient that goes through $W$ into the feature maps; one step later it flows, too.

# %%
target = torch.nn.functional.scaled_dot_product_attention(query, key, value)
optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
leaf = query.clone().requires_grad_()
for step in range(2):
    sparse, linear, _ = sla_ref.sparse_linear_attention(leaf, key, value, block_map=map_of_paper)
    linear.retain_grad()
    loss = (sparse + layer.proj_l(linear) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    to_proj, to_linear = layer.proj_l.weight.grad.norm(), linear.grad.norm()
    print(f"step {step}: gradient at Proj {to_proj:.1e}, at the linear branch {to_linear:.1e}")
    assert to_proj > 0 and (to_linear > 0) == (step > 0)
    optimizer.step()

# %% [markdown]
# A zero Proj in a model that has been trained is another matter: then the weights of Proj were not in the checkpoint,
# or their names did not match.
#
# ## What to fine-tune
#
# Issue [23](https://github.com/thu-ml/SLA/issues/23) lists three ways: each attention layer by itself against its old
# outputs, only `proj_l` from end to end, or the whole model from end to end. The authors answer a similar question in
# [TurboDiffusion 117](https://github.com/thu-ml/TurboDiffusion/issues/117): all parameters, because one projection per
# layer is not enough. The lab's fine-tune does the same; its optimiser gets everything:

# %%
from sla_ref.lab.model import with_attention
from sla_ref.lab.weights import TEACHER, load_weights

teacher, _ = load_weights(TEACHER)
student = with_attention(teacher, "sla")
counts = {"proj_l": 0, "the rest": 0}
for name, parameter in student.named_parameters():
    counts["proj_l" if "proj_l" in name else "the rest"] += parameter.numel()
print(counts)
assert counts["proj_l"] == 4 * (64 * 64 + 64) and counts["proj_l"] < 0.02 * counts["the rest"]

# %% [markdown]
# How much each way can repair is measured here on one layer's attention of the lab's model, on a held-out clip
# halfway to noise. Least squares gives the best Proj. It is the most that training only Proj could reach on these
# tokens:

# %%
from sla_ref.lab.data import MovingDigits
from sla_ref.lab.flow import noised

clip, digits = MovingDigits("held_out", seed=0).batch(1)
generator = torch.Generator().manual_seed(0)
noise = torch.randn(clip.shape, generator=generator)
time = torch.tensor([0.5])
caught = {}


def catch(number):
    return lambda core, inputs, output: caught.update({number: [*inputs, output]})


for number, part in enumerate(teacher.blocks, start=1):
    part.attention.core.register_forward_hook(catch(number))
with torch.no_grad():
    teacher(noised(clip, noise, time), time, digits)

errors = {}
for number, (q, k, v, full) in caught.items():
    sparse, linear, _ = sla_ref.sparse_linear_attention(q, k, v, block_q=16, block_k=16)
    missing = (full - sparse).flatten(0, 2).double()  # (H N, D)
    features = torch.cat([linear.flatten(0, 2), torch.ones(len(missing), 1)], 1).double()
    best = torch.linalg.lstsq(features, missing).solution  # Proj's weight and bias
    size = full.double().norm()
    errors[number] = (missing.norm() / size, (missing - features @ best).norm() / size)
    assert errors[number][1] < errors[number][0]

figure, axes = plt.subplots(figsize=(6.4, 3.0))
for shift, (name, hatch) in enumerate({"sparse branch": "", "with the best Proj": "//"}.items()):
    heights = [float(pair[shift]) for pair in errors.values()]
    places = [number + 0.36 * (shift - 0.5) for number in errors]
    axes.bar(places, heights, 0.34, label=name, hatch=hatch, color=("#E69F00", "#0072B2")[shift])
axes.set(xticks=list(errors), xlabel="layer", ylabel="relative error of the output")
axes.set(title="What Proj can repair by itself", ylim=(0, 0.75))
axes.legend(loc="upper center", ncols=2)
plt.show()

# %% [markdown]
# The best Proj takes away only a part of the error. It is fitted here to the clip that it is measured on; on other
# clips it repairs less, and in the last layer next to nothing ([3. The linear
# branch](03_linear_branch.md#it-compensates-it-does-not-approximate)). To reduce the rest, query, key and value have to
# change, and for that all parameters have to be trained. This also answers the last question of issue 23: nothing in an
# end-to-end fine-tune asks a layer to equal full attention. What the loss asks for is the prediction of the whole
# model. How far the lab's shipped student is from its teacher there is in its card:

# %%
import json

from safetensors import safe_open

from sla_ref.lab.weights import STUDENT

with safe_open(STUDENT, framework="pt") as file:
    card = json.loads(file.metadata()["card"])
print(f"mean squared distance to the teacher's prediction: {card['distance']:.3g}")

# %% [markdown]
# ## SLA2
#
# [SLA2](https://arxiv.org/abs/2602.12675) has no released code, so only its text can be compared. It is the same
# operator: its sparse branch is that of all three above, and its linear branch is that of SLA-1, over every block that
# is not critical, normalised over these.

# %%
layer_of_sla2 = sla_ref.SLA2Attention(D, H, 0.10, **blocks).double()
sparse, linear, alpha = layer_of_sla2.branches(query, key, value)
assert torch.allclose(sparse, outputs["SLA-1"][0], rtol=0, atol=1e-12)
assert torch.allclose(linear, outputs["SLA-1"][1], rtol=0, atol=1e-12)

# %% [markdown]
# The two methods differ in what they do with the branches. A weight $\alpha$ takes the place of Proj, $O = \alpha O^s +
# (1 - \alpha) O^l$, and the choice of blocks can be learned. So a fresh layer is not its sparse branch, and weights of
# one method do not fit the other. $\alpha$ starts at 0.9 in this package.

# %%
mixed = layer_of_sla2(query, key, value)
assert torch.allclose(mixed, 0.9 * sparse + 0.1 * linear, rtol=0, atol=1e-6)
assert (mixed - sparse).norm() > 0.01 * sparse.norm()

learned = sla_ref.SLA2Attention(D, H, 0.10, router="learned", **blocks)
for name, module in {"SLA": layer, "SLA2": layer_of_sla2, "SLA2, learned choice": learned}.items():
    print(f"{name}: {', '.join(module.state_dict())}")
assert not set(layer.state_dict()) & set(learned.state_dict())

# %% [markdown]
# | | paper (SLA) | SLA-1 | main | SLA2 |
# |---|---|---|---|---|
# | sparse branch | critical blocks | the same | the same | the same |
# | linear branch | marginal blocks | all that are not critical | all blocks | all that are not critical |
# | skipped | negligible blocks | nothing | nothing | nothing |
# | added to the denominator | nothing | nothing | $10^{-5}$ | nothing |
# | choice of blocks | means | means | means | learned maps of means |
# | output | $O^s + \operatorname{Proj}(O^l)$ | the same | the same | $\alpha \, O^s + (1 - \alpha) \, O^l$ |
# | here | the default | `negligible_ratio=0` | only in `thu_ml` | `SLA2Attention` |
#
# [SLA2 to code](../paper-sla2.md) has its equations, its slips and the choices that it leaves open; [12. How much each
# branch weighs](12_branch_weights.md) says what a weight can do that Proj cannot.

# %% [markdown]
# ## Recap
#
# The paper and the two branches of the code differ in the classes, in the denominator and in how the keys are smoothed.
# A fresh layer is its sparse branch, because Proj starts at zero. Training only Proj repairs a part of what is missing,
# so a fine-tune trains all parameters. SLA2 is the operator of SLA-1, with a weight in place of Proj.
#
# Next: [Numerics](../numerics.md)
