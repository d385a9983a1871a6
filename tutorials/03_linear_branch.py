# %% [markdown]
# # 3. The linear branch
#
# Most blocks are marginal: too many to compute, together too heavy to skip. Afterwards you will know how one small
# matrix per query block summarises all of them, what the feature map does, why the result is normalised over the
# marginal blocks only and without an epsilon, what the learnable projection behind it is for, and why that starts at
# zero.
#
# Builds on: [1. What attention weights look like](01_attention_weights.md), [2. Mask
# classification](02_mask_classification.md).

# %% [markdown]
# ## The order of brackets
#
# Softmax attention weighs value $v_j$ for query $q$ by $\exp(q \cdot k_j / \sqrt{D})$. The exponential ties $q$ and
# $k_j$ together, so every pair has to be computed. Suppose the weight were a product $\phi(q) \cdot \phi(k_j)$ of
# *features* instead, each made from a single token. Then the sum over all keys can be taken before any query is known:
#
# $$\sum_j \big(\phi(q) \cdot \phi(k_j)\big) v_j = \phi(q) \underbrace{\sum_j \phi(k_j)^\top v_j}_{h, \; D \times D}.$$
#
# Both sides are the same product of three matrices, bracketed in two ways.
#
# ![The same product, bracketed in two ways](../docs/images/brackets.svg)
#
# *Both brackets give the same product, and only the left one makes a matrix that grows with the square of $N$.*

# %%
import matplotlib.pyplot as plt
import torch
from lesson import check_exercise, expect, show_source

import sla_ref
from sla_ref import SparseLinearAttention, analysis, feature_maps, reference, testing
from sla_ref.lab import evaluate, weights
from sla_ref.lab.model import with_attention

generator = torch.Generator().manual_seed(0)
N, D, BLOCK = 200, 16, 16  # twelve blocks of 16 tokens and one of 8
query, key, value = torch.randn(3, 1, 1, N, D, dtype=torch.float64, generator=generator)
phi_query, phi_key = query.softmax(dim=-1), key.softmax(dim=-1)

left_first = (phi_query @ phi_key.mT) @ value  # N x N in the middle
right_first = phi_query @ (phi_key.mT @ value)  # D x D in the middle
assert torch.allclose(left_first, right_first, rtol=0, atol=1e-12)

by_pairs = analysis.attention_flops(32760, 32760, 128)
by_states = analysis.attention_flops(32760, 32760, 128, critical_share=0, linear=True)
print(
    f"one head of Wan at 480p: {by_pairs / 1e9:.0f} GFLOP by pairs, {by_states / 1e9:.1f} by states"
)
assert by_pairs / by_states == 32760 / 128  # N / D times less

# %% [markdown]
# ## Feature maps
#
# $\phi$ should give positive features: then all weights are positive, as those of a softmax are, and their sum is not a
# difference of large numbers. The package has the maps that the paper tries: a softmax over the $D$ features of a token
# (the default), $\operatorname{elu}(x) + 1$, and Hedgehog, which learns its own; and $\max(x, 0)$ from the released
# code, which can be zero.

# %%
show_source(feature_maps.softmax, feature_maps.elu, feature_maps.relu, feature_maps.Hedgehog)

x = torch.linspace(-3, 3, 7)
for name in ("softmax", "elu", "relu"):
    features = feature_maps.resolve_feature_map(name)(x)
    print(f"{name:8}", " ".join(f"{feature:5.3f}" for feature in features))
    assert (features >= 0).all() and ((features > 0).all() or name == "relu")

# %% [markdown]
# ## States
#
# SLA needs not the sum over all keys but the sum over the *marginal* blocks of each query block. So each key block $j$
# gets a state of its own, once [Alg. 1 L4], and query block $i$ adds up those with label 0 [Alg. 1 L13]:
#
# $$h_j = \phi(K_j)^\top V_j, \quad z_j = \phi(K_j)^\top \mathbf{1}, \qquad
# H_i = \sum_{j : M_{ij} = 0} h_j, \quad Z_i = \sum_{j : M_{ij} = 0} z_j.$$
#
# The output divides by the sum of the weights, which makes each row an average of values [Eq. 5]:
#
# $$O^l_i = \frac{\phi(Q_i) H_i}{\phi(Q_i) Z_i}.$$
#
# ![States of the marginal blocks, summed](../docs/images/states.svg)
#
# *A state is made once for each key block, and each query block adds up those of its marginal blocks.*

# %%
block_map = sla_ref.classify_blocks(query, key, 0.2, 0.3, block_q=BLOCK, block_k=BLOCK)
labels = block_map.labels[0, 0]

h, z = [], []
for phi_K, V in zip(phi_key[0, 0].split(BLOCK), value[0, 0].split(BLOCK), strict=True):
    h.append(phi_K.T @ V)  # (D, D)
    z.append(phi_K.sum(dim=0))  # (D)

outputs = []
for i, phi_Q in enumerate(phi_query[0, 0].split(BLOCK)):
    H, Z = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    for j in range(len(h)):
        if labels[i, j] == 0:
            H += h[j]
            Z += z[j]
    outputs.append(phi_Q @ H / (phi_Q @ Z)[:, None])
by_hand = torch.cat(outputs)  # (N, D)

_, dense, _ = reference.sparse_linear_attention(
    query, key, value, phi_query, phi_key, block_map.labels, BLOCK, BLOCK, D**-0.5
)
from_package = sla_ref.sparse_linear_attention(query, key, value, block_map=block_map).linear
assert torch.allclose(by_hand, dense[0, 0], rtol=0, atol=1e-12)
assert torch.allclose(by_hand, from_package[0, 0], rtol=0, atol=1e-12)

# %% [markdown]
# The specification writes the same with all weights in view, $N \times N$ and masked. What $H_i$ and $Z_i$ never do is
# know which key a number came from. That is why the sum is cheap, and why it is coarse.

# %%
show_source(reference.sparse_linear_attention)

# %% [markdown]
# ## Normalised over the marginal blocks
#
# The weights of a row add up to 1 over the marginal keys, and over these only. So each output is an average of the
# marginal values and lies between their smallest and their largest. Dividing by the sum over *all* keys, as one formula
# of the paper just before Equation 5 reads, gives something else: too small by the share of the marginal keys.

# %%
pair = block_map.to_dense()[0, 0]  # (N, N): the class of each pair of tokens
A = (phi_query @ phi_key.mT)[0, 0]
A_marginal = A.where(pair == 0, 0.0)
row_weights = A_marginal / A_marginal.sum(dim=1, keepdim=True)
assert torch.allclose(row_weights @ value[0, 0], by_hand, rtol=0, atol=1e-12)
for row in (0, 77, 199):
    marginal_values = value[0, 0, pair[row] == 0]
    assert (by_hand[row] >= marginal_values.amin(dim=0)).all() and (
        by_hand[row] <= marginal_values.amax(dim=0)
    ).all()

over_all = A_marginal @ value[0, 0] / A.sum(dim=1, keepdim=True)
share = A_marginal.sum(dim=1, keepdim=True) / A.sum(dim=1, keepdim=True)
assert torch.allclose(over_all, share * by_hand, rtol=0, atol=1e-12)
print(
    f"part of the features' weight that is on marginal keys: {share.min():.2f} to {share.max():.2f}"
)

# %% [markdown]
# ## Nothing to divide
#
# A query block may have no marginal block at all. Then $Z_i = 0$ and the formula says $0 / 0$. Adding a small epsilon
# to every denominator would hide that and change every other result a little. Here the answer is zero, and exactly
# zero: a sum over nothing adds nothing. The same holds for a query whose features are all zero, which `relu` can make.

# %%
all_critical = sla_ref.classify_blocks(query, key, 1.0, 0.0, block_q=BLOCK, block_k=BLOCK)
leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
empty = sla_ref.sparse_linear_attention(*leaves, block_map=all_critical).linear
assert (empty == 0).all()
gradients = torch.autograd.grad(empty.sum(), leaves)
assert all((gradient == 0).all() for gradient in gradients)

dark = query.clone()
dark[:, :, 5] = -1.0  # relu makes this token's features zero
out = sla_ref.sparse_linear_attention(
    dark, key, value, block_map=block_map, feature_map="relu"
).linear
assert (out[0, 0, 5] == 0).all() and out.isfinite().all()

# %% [markdown]
# !!! note "Why the specification masks twice"
#
#     Replacing the bad result afterwards is not enough. The gradient of $0 / 0$ is NaN, and so is NaN times the zero
#     that `where` sends back. So the denominator is made harmless before the division, and the result cleared after it.

# %%
zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
once = torch.where(zero == 0, 0.0, zero / zero)
assert once.item() == 0 and torch.autograd.grad(once, zero)[0].isnan()

twice = torch.where(zero == 0, 0.0, zero / zero.masked_fill(zero == 0, 1.0))
assert twice.item() == 0 and torch.autograd.grad(twice, zero)[0].item() == 0

# %% [markdown]
# ## It compensates, it does not approximate
#
# Are these weights close to those of softmax attention on the same keys? We compare on the real maps of the lab's video
# model: softmax weights over the marginal keys, normalised there, with the linear branch's, and with weights that are
# all equal.

# %%
teacher, card = weights.load_weights(weights.TEACHER)
clips = evaluate.held_out(teacher, 16)
# of each layer: (clip, head, token, D)
caught = evaluate.attention_inputs(teacher, clips.x, clips.time, clips.labels)
BLOCKS = {"block_q": 16, "block_k": 16}
CLIP = 6  # t = 0.41

print("distance to softmax weights on the marginal keys (0: the same, 2: nothing in common)")
for layer, (q, k, _) in enumerate(caught, start=1):
    q, k = q[CLIP : CLIP + 1].double(), k[CLIP : CLIP + 1].double()
    marginal = sla_ref.classify_blocks(q, k, **BLOCKS).to_dense() == 0
    candidates = (
        analysis.attention_weights(q, k),
        q.softmax(dim=-1) @ k.softmax(dim=-1).mT,
        torch.ones(1024, 1024),
    )
    maps = [each.where(marginal, 0.0) for each in candidates]
    true, from_features, equal = (each / each.sum(dim=-1, keepdim=True) for each in maps)
    of_features, of_equal = (
        (each - true).abs().sum(dim=-1).mean() for each in (from_features, equal)
    )
    print(f"layer {layer}:  linear branch {of_features:.2f}   equal weights {of_equal:.2f}")
    assert of_features > 0.5
    assert of_features > 0.75 * of_equal

# %% [markdown]
# They are not close, and hardly closer than equal weights. A product of 64 positive features is too smooth to follow an
# exponential. If it were close, one could add the branches in the right proportion and be done. The right proportion is
# known, too. With $\alpha$ the part of a row's attention that falls on its critical keys, and $O^r$ softmax attention
# over all other keys,
#
# $$O = \alpha O^s + (1 - \alpha) O^r, \qquad \text{so} \qquad O - O^s = (1 - \alpha) (O^r - O^s).$$
#
# The sparse branch normalises over the critical keys only, so it is not just a part of the output: it is already as
# large as the whole. What is missing is a *difference* of two averages, not an average.

# %%
q, k, v = (tensor[CLIP : CLIP + 1].double() for tensor in caught[3])
of_layer_4 = sla_ref.classify_blocks(q, k, **BLOCKS)
O_sparse = sla_ref.sparse_linear_attention(q, k, v, block_map=of_layer_4).sparse
P, critical = analysis.attention_weights(q, k), of_layer_4.to_dense() == 1
alpha = P.where(critical, 0.0).sum(dim=-1, keepdim=True)
O_rest = P.where(~critical, 0.0) @ v / (1 - alpha)
assert torch.allclose(P @ v - O_sparse, (1 - alpha) * (O_rest - O_sparse), rtol=0, atol=1e-10)

# %% [markdown]
# So SLA does not add $O^l$ as it is. It learns what to do with it [Eq. 6]:
#
# $$O = O^s + \operatorname{Proj}(O^l), \qquad \operatorname{Proj}(x) = W x + b,$$
#
# one linear map from $D$ to $D$ features per layer, shared by its heads. To see what that can do without training a
# model, we fit only $W$ and $b$, by slightly regularised least squares towards the output of full attention on 8 clips.
# Then we measure on 8 other clips how much of the squared error of the sparse branch is left.

# %%
TRAIN, TEST = slice(0, None, 2), slice(1, None, 2)


def fit_proj(linear, missing, penalty=0.1):
    """W (D, D) and b (D) such that linear @ W.T + b is near `missing`, by ridge regression."""
    x = torch.cat([linear, torch.ones_like(linear[..., :1])], dim=-1).flatten(0, -2)
    gram = x.mT @ x / len(x)
    ridge = penalty * gram.trace() / len(gram) * torch.eye(len(gram), dtype=x.dtype)
    solution = torch.linalg.solve(gram + ridge, x.mT @ missing.flatten(0, -2) / len(x))
    return solution[:-1].mT, solution[-1]


left = {"sparse only": [], "plain sum": [], "Proj fitted": []}
for q, k, v in caught:
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = sla_ref.sparse_linear_attention(q, k, v, **BLOCKS)
    missing, linear = (full - out.sparse).double(), out.linear.double()
    W, b = fit_proj(linear[TRAIN], missing[TRAIN])
    added = {
        "sparse only": torch.zeros_like(linear),
        "plain sum": linear,
        "Proj fitted": linear @ W.mT + b,
    }
    for name, tensor in added.items():
        error = (missing - tensor)[TEST].square().mean() / missing[TEST].square().mean()
        left[name].append(error.item())

print("squared error on other clips, relative to that of the sparse branch")
for name, errors in left.items():
    print(
        f"{name:12}",
        "  ".join(f"layer {layer}: {error:.2f}" for layer, error in enumerate(errors, start=1)),
    )
assert min(left["plain sum"]) > 1.5
assert max(left["Proj fitted"][:3]) < 0.9
assert left["Proj fitted"][3] > 0.9

# %% [markdown]
# The plain sum makes everything worse: it adds an average to what is already an average. A fitted Proj takes away a
# good part of the error in the first three layers, and next to nothing in the last. This is the least it can do. In
# fine-tuning, queries, keys and values move too, and the branch gets something worth adding ([9.
# Fine-tuning](09_fine_tuning.md)).
#
# ![Two rows that Proj treats alike](../docs/images/proj.svg)
#
# *Proj sees $O^l$ and not $\alpha$, so two rows that differ only in $\alpha$ get the same correction, which cannot be
# right for both.*
#
# [12. How much each branch weighs](12_branch_weights.md) shows two such rows of this model, and what SLA2 does about
# them. The fit of [Paper and released code](paper_vs_code.md#what-to-fine-tune) is measured on the very clip that it is
# made on, and there Proj repairs something in the last layer too.

# %%
figure, panel = plt.subplots(figsize=(7, 3.3), layout="constrained")
STYLES = {
    "sparse only": ("#8A8F98", ""),
    "plain sum": ("#E69F00", "//"),
    "Proj fitted": ("#0072B2", ".."),
}
for place, (name, errors) in enumerate(left.items()):
    colour, hatch = STYLES[name]
    bars = [layer + 0.27 * (place - 1) for layer in range(1, 5)]
    panel.bar(bars, errors, width=0.25, color=colour, hatch=hatch, edgecolor="white", label=name)
panel.set_xticks([1, 2, 3, 4], [f"layer {layer}" for layer in range(1, 5)])
panel.set_ylabel("squared error / that of sparse only")
panel.set_title("What is left of the error, on clips that Proj was not fitted to", fontsize=11)
panel.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## Why Proj starts at zero
#
# The layer replaces attention in a trained model. What it computes at first should be near the old output, and nobody
# knows a good $W$ yet. With $W = 0$ and $b = 0$ the layer starts as exactly the sparse branch. Of the three starts
# below it is the nearest. The nearest start need not lead to the best end: in the fine-tunes of
# [Experiments](../experiments.md#start-of-proj), Proj ends better from the identity, and even the plain sum ends ahead
# of Proj from zero. `SparseLinearAttention(..., proj_init="identity")` starts it there, and [Use it in
# Wan](../wan.md#two-changes-that-helped) says when to use which.

# %%
show_source(SparseLinearAttention.forward)

q, k, v = (tensor[:2] for tensor in caught[1])
full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
torch.manual_seed(0)
STARTS = {
    "zero": torch.nn.init.zeros_,
    "the identity": torch.nn.init.eye_,
    "torch's default": lambda weight: torch.nn.init.kaiming_uniform_(weight, a=5**0.5),
}
start_errors = {}
with torch.no_grad():
    for name, start in STARTS.items():
        layer = SparseLinearAttention(64, **BLOCKS)
        start(layer.proj_l.weight)
        output = layer(q, k, v)
        start_errors[name] = (output - full).square().mean().item()
        print(f"Proj starts as {name:16} squared error {start_errors[name]:.3f}")
        if name == "zero":
            assert torch.equal(output, sla_ref.sparse_linear_attention(q, k, v, **BLOCKS).sparse)
assert min(start_errors, key=start_errors.get) == "zero"

# %% [markdown]
# Does a layer that starts at zero ever learn? Let $G$ be the gradient of the loss with respect to the output. Then
#
# $$\frac{\partial \mathcal L}{\partial W} = \sum_n G_n^\top O^l_n, \qquad
# \frac{\partial \mathcal L}{\partial b} = \sum_n G_n, \qquad \frac{\partial \mathcal L}{\partial O^l} = G W.$$
#
# The first two do not contain $W$, so Proj learns from the first step. The third is zero while $W$ is zero. At step 0
# the linear branch passes no gradient on to feature maps, queries, keys and values. From step 1 on it does. A Hedgehog
# layer shows this, because its feature maps have weights that only the linear branch uses.

# %%
torch.manual_seed(0)
layer = SparseLinearAttention(64, feature_map="hedgehog", **BLOCKS)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
seen = {}
layer.proj_l.register_forward_hook(
    lambda proj, inputs, output: seen.update(O_linear=inputs[0].detach())
)
history = []
for step in range(4):
    output = layer(q, k, v)
    output.retain_grad()
    loss = (output - full).square().mean()
    optimizer.zero_grad()
    loss.backward()
    of_proj, of_phi = (
        weight.grad.norm().item() for weight in (layer.proj_l.weight, layer.phi_query.weight)
    )
    print(
        f"step {step}: loss {loss.item():.5f}, gradient of Proj {of_proj:.3g}, "
        f"of the feature map {of_phi:.3g}"
    )
    assert of_proj > 0
    assert of_phi == 0 if step == 0 else of_phi > 0
    G, O_linear = output.grad.flatten(0, 2), seen["O_linear"].flatten(0, 2)
    assert torch.allclose(layer.proj_l.weight.grad, G.mT @ O_linear, rtol=1e-3, atol=1e-6)
    assert torch.allclose(layer.proj_l.bias.grad, G.sum(dim=0), rtol=1e-3, atol=1e-6)
    history.append(loss.item())
    optimizer.step()
assert history == sorted(history, reverse=True)

# %% [markdown]
# If both $W$ and the linear branch started at zero, each would wait for the other for ever. One zero is enough to start
# gently, and only one is allowed.
#
# The same holds in a whole model: untrained SLA gives exactly what sparse attention gives.

# %%
swapped = {arm: with_attention(teacher, arm).eval() for arm in ("sla", "sparse")}
with torch.no_grad():
    of_sla, of_sparse = (
        model(clips.x[:1], clips.time[:1], clips.labels[:1]) for model in swapped.values()
    )
assert torch.equal(of_sla, of_sparse)

# %% [markdown]
# ## Exercises
#
# **1. No loop.** Write the linear branch for all query blocks at once. The sums $H_i$ over the marginal blocks are a
# product of a 0/1 matrix with the states; `torch.einsum` is one way. Whole blocks only; one of the query blocks has no
# marginal block.


# %% tags=["exercise"]
def linear_branch(phi_query, phi_key, value, labels, block):
    """O^l (N, D) of one head, from phi_query, phi_key, value (N, D) and labels (T, T)."""
    ...


# %% tags=["solution"] mistake=["nothing = denominator == 0", "nothing = denominator < 0"]
def linear_branch(phi_query, phi_key, value, labels, block):
    """O^l (N, D) of one head, from phi_query, phi_key, value (N, D) and labels (T, T)."""
    # (T, block, D)
    phi_Q, phi_K, V = (tokens.unflatten(0, (-1, block)) for tokens in (phi_query, phi_key, value))
    marginal = (labels == 0).to(value.dtype)
    H = torch.einsum("ij,jde->ide", marginal, phi_K.mT @ V)
    Z = marginal @ phi_K.sum(dim=1)
    denominator = (phi_Q @ Z[:, :, None]).flatten(0, 1)  # (N, 1)
    nothing = denominator == 0
    return ((phi_Q @ H).flatten(0, 1) / denominator.masked_fill(nothing, 1.0)).masked_fill(
        nothing, 0.0
    )


# %% tags=["check"]
problem = testing.make_problem(
    heads=1,
    query_length=128,
    head_dim=16,
    block_q=16,
    block_k=16,
    labels="random",
    dtype=torch.float64,
)
random_labels = problem.inputs.block_map.labels[0, 0].clone()
random_labels[2] = 1  # rows 32 to 47 have no marginal block
inputs = problem.inputs
tensors = (inputs.phi_query[0, 0], inputs.phi_key[0, 0], inputs.value[0, 0])
_, expected, _ = reference.sparse_linear_attention(
    *inputs[:5], random_labels[None, None], 16, 16, inputs.scale
)

with check_exercise(1, linear_branch):
    expect("O^l", linear_branch(*tensors, random_labels, 16), expected[0, 0], atol=1e-12)

# %% [markdown]
# **2. Two halves.** Keys may live in two places, on two GPUs for example. Each computes the linear branch over its own
# marginal keys: an output and its denominators $\phi(Q_i) Z_i$. Write `merge`, which makes from these the output over
# all of them. A half in which a row has no marginal key has denominator 0 there.


# %% tags=["exercise"]
def merge(output_1, denominator_1, output_2, denominator_2):
    """Output (N, D) over both halves from outputs (N, D) and denominators (N, 1) of each."""
    ...


# %% tags=["solution"] mistake=["+ denominator_2 * output_2", "+ output_2"]
def merge(output_1, denominator_1, output_2, denominator_2):
    """Output (N, D) over both halves from outputs (N, D) and denominators (N, 1) of each."""
    total = denominator_1 + denominator_2
    nothing = total == 0
    numerator = denominator_1 * output_1 + denominator_2 * output_2
    return (numerator / total.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


# %% tags=["check"]
halves = []
for first, last in ((0, 96), (96, 200)):
    part = A_marginal[:, first:last]
    denominator = part.sum(dim=1, keepdim=True)
    part_output = part @ value[0, 0, first:last] / denominator.masked_fill(denominator == 0, 1.0)
    halves += [part_output, denominator]
nothing = [torch.zeros(200, 16, dtype=torch.float64), torch.zeros(200, 1, dtype=torch.float64)]

with check_exercise(2, merge):
    expect("two halves", merge(*halves), by_hand, atol=1e-12)
    expect("no key in the second half", merge(*halves[:2], *nothing), halves[0], atol=1e-12)
    expect("no key in either half", merge(*nothing, *nothing), nothing[0])

# %% [markdown]
# ## Recap
#
# The states of the marginal blocks add up to one small matrix for each query block, which summarises all their keys.
# The result is an average over the marginal blocks only, and Proj, which starts at zero, learns how to add it to the
# sparse branch. **You now know SLA, and this is a good place to stop.** The next two tutorials derive its algorithms.
#
# Next: [4. Algorithm 1: the forward, block by block](04_algorithm_1.md)
