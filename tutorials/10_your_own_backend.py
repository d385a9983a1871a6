# %% [markdown]
# # 10. Your own backend
#
# A backend is four functions. This tutorial writes one in NumPy, which knows nothing of PyTorch, of GPUs or of
# autograd, and plugs it into `sla_ref`, where it then trains a layer. Afterwards you will know what the package asks of
# a backend, how to build one half at a time with the other half borrowed, how `check_backend` finds what is wrong with
# it, and how an installed package makes its backend known.
#
# Builds on: [4. Algorithm 1](04_algorithm_1.md), [5. Algorithm 2](05_algorithm_2.md)

# %%
import sys
import tempfile
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from lesson import check_exercise, expect, show_source

import sla_ref
from sla_ref import protocol, testing
from sla_ref.backends import pytorch
from sla_ref.block_map import CRITICAL, MARGINAL

# %% [markdown]
# ## What is asked for
#
# A forward, a backward, and two questions: can this backend be used on this machine, and does it support this input?
# Both are answered with `None` for yes, or with the reason why not as text. Besides these four functions, a backend has
# a name, and says whether it computes the default feature map, softmax, by itself.

# %%
show_source(protocol.Backend)

# %% [markdown]
# Both passes read the same inputs. What goes between forward and backward is fixed, and so is what comes out. Because
# of that, the forward of one backend can be followed by the backward of another. We use it below: the forward comes
# first, with a backward from the `torch` backend.

# %%
show_source(protocol.Inputs, protocol.Saved, protocol.Gradients)

# %% [markdown]
# The rest has been done by the time a backend is called: input is checked, blocks are classified, autocast is off. Proj
# and the sum come afterwards. We say `softmax_inside = False`, and so the feature map is applied before, too, and the
# gradient through it is taken care of.
#
# ## Between PyTorch and NumPy
#
# NumPy has no bfloat16, and sums in float16 would be poor. So everything is computed in float32, float64 for float64
# inputs. At the end, all but `lse` and the gradients of the features are rounded to the input's dtype. Tensors may come
# with any strides: `ascontiguousarray` puts them in order.


# %%
def to_numpy(tensor):
    return np.ascontiguousarray(
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
    )


def unavailable():
    return None  # NumPy is always there: the package needs it


def unsupported(query, block_map):
    return (
        None
        if query.device.type == "cpu"
        else f"NumPy computes on the CPU, query is on {query.device}"
    )


# %% [markdown]
# ## The forward
#
# One query block at a time, as in Algorithm 1. It needs the tokens of its critical key blocks and those of its marginal
# ones. The partial last block needs no care, because tokens that do not exist are in no list.


# %%
def query_blocks(block_map):
    """For every query block the indices (b, h, tokens) of its rows, critical and marginal keys."""
    key_block = np.arange(block_map.key_length) // block_map.block_k  # of every key
    labels = block_map.labels.numpy()
    for b, h, i in np.ndindex(labels.shape[:3]):
        rows = slice(
            i * block_map.block_q, min((i + 1) * block_map.block_q, block_map.query_length)
        )
        label = labels[b, h, i][key_block]
        yield (
            (b, h, rows),
            (b, h, np.flatnonzero(label == CRITICAL)),
            (b, h, np.flatnonzero(label == MARGINAL)),
        )


def divide(numerator, denominator):
    """Row by row; 0 where the denominator counts as 0, too small for the dtype, as specified."""
    large = abs(denominator) >= np.finfo(denominator.dtype).tiny * 2.0**30
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=large)


def sparse_rows(Q, K, V, scale):
    """Q (rows, D), critical K, V (keys, D), at least one -> O^s (rows, D), L (rows, 1). [Eq. 4]"""
    S = scale * Q @ K.T
    m = S.max(axis=1, keepdims=True)
    P = np.exp(S - m)
    l = P.sum(axis=1, keepdims=True)
    return P @ V / l, m + np.log(l)


def make_forward(sparse_rows):
    def forward(inputs):
        Q, K, V, phi_Q, phi_K = map(to_numpy, inputs[:5])
        sparse, linear = np.zeros_like(Q), np.zeros_like(Q)
        # what it is for a row without a critical key
        lse = np.full((*Q.shape[:3], 1), -np.inf, Q.dtype)
        for q, c, m in query_blocks(inputs.block_map):
            if len(c[2]):
                sparse[q], lse[q] = sparse_rows(Q[q], K[c], V[c], inputs.scale)
            H = phi_K[m].T @ V[m]  # (D, D)
            Z = phi_K[m].sum(axis=0)[:, None]  # (D, 1)
            linear[q] = divide(phi_Q[q] @ H, phi_Q[q] @ Z)
        outputs = (torch.from_numpy(output).to(inputs.query.dtype) for output in (sparse, linear))
        return protocol.Saved(*outputs, torch.from_numpy(lse[..., 0]))

    return forward


forward = make_forward(sparse_rows)

# %% [markdown]
# A first backend: this forward, with the backward of `torch`. Any object that has the attributes will do, a module, a
# class, or a namespace as here. `check_backend` runs it on problems of all kinds and compares with the equations in
# float64. The error that it accepts is not a fixed number: it is what the dtype costs the equations themselves, times
# two, or three for gradients, plus the rounding of the result. `quick` keeps to three of the problems.


# %%
def backend(name, forward, backward):
    parts = {
        "unavailable": unavailable,
        "unsupported": unsupported,
        "forward": forward,
        "backward": backward,
    }
    return types.SimpleNamespace(name=name, softmax_inside=False, **parts)


sla_ref.register_backend("numpy-forward", backend("numpy-forward", forward, pytorch.backward))
report = testing.check_backend("numpy-forward", device="cpu", dtypes=[torch.float32], quick=True)
print(report)
assert report.ok

# %% [markdown]
# ## Would it have noticed?
#
# A check that passes says little until it has been seen to fail. Plant a fault: let the linear branch run over
# negligible blocks, too, as if everything that is not critical were marginal.


# %%
def failures(report):
    """How many checks failed, by what they looked at."""
    return Counter(check.name.split(",")[0] for check in report.failures)


def careless_forward(inputs):
    labels, block_map = inputs.block_map.labels.clamp(min=MARGINAL), inputs.block_map
    sizes = (block_map.block_q, block_map.block_k, block_map.query_length, block_map.key_length)
    return forward(inputs._replace(block_map=sla_ref.BlockMap(labels, *sizes)))


sla_ref.register_backend(
    "numpy-careless", backend("numpy-careless", careless_forward, pytorch.backward)
)
report = testing.check_backend("numpy-careless", device="cpu", dtypes=[torch.float32], quick=True)
print(report)

assert set(failures(report)) == {
    "linear",
    "grad_phi_query",
    "grad_phi_key",
    "grad_query",
    "grad_key",
}

# %% [markdown]
# Read such a report from the top. It counts the cases in which each tensor is wrong, says which tensors are right in
# all of them, and from that concludes where to look: `linear` is wrong, `sparse` and `lse` are right, so the fault is
# in the linear branch. The gradients of both features fail with it, because the backward takes $D^l$ from the wrong
# output. So do those of query and key, where softmax is left to the operator, because they include the gradient
# through the features. None of these is the fault of the backward, which is right when it is given the right forward.
#
# Below, each wrong tensor has one entry, from the first case that shows it. The FAIL line names the case, the dtype
# and the tensor. The error is compared with its bound: a ratio near 1 would be a matter of rounding, one in the
# thousands is a wrong formula. Then come the worst element, by its batch `b`, head `h` and row, and the classes that
# its block meets. For `linear` there are negligible blocks among them, as there must be for this fault; with no
# critical or no marginal block, an empty sum would be the suspect. The last line says which rows are wrong. Here they
# are all rows; one head would point at a stride, the last rows at a partial block. `report.failures` has every check
# that failed.
#
# One of the three problems lets the fault pass: its few key blocks leave none that is negligible. That is why there
# are many problems.
#
# ## The backward
#
# Algorithm 2, with one loop where the paper has two. A query block knows its critical and marginal keys and adds its
# share to their gradients. That would be a race on a GPU, where query blocks run at the same time; here they run one
# after another. The paper's loss does not depend on $L$. Where one does, its gradient $dL$ is subtracted from $D^s$.


# %%
def backward(grad_sparse, grad_linear, grad_lse, inputs, saved):
    Q, K, V, phi_Q, phi_K, dO_s, dO_l = map(to_numpy, (*inputs[:5], grad_sparse, grad_linear))
    out_sparse, out_linear, lse = map(to_numpy, saved)
    scale = inputs.scale
    D_s = (dO_s * out_sparse).sum(axis=-1, keepdims=True)  # [Alg. 2 L2]
    if grad_lse is not None:
        D_s -= to_numpy(grad_lse)[..., None]
    D_l = (dO_l * out_linear).sum(axis=-1, keepdims=True)  # [Alg. 2 L2]
    dQ, dK, dV, dphi_Q, dphi_K = map(np.zeros_like, (Q, K, V, phi_Q, phi_K))
    for q, c, m in query_blocks(inputs.block_map):
        if len(c[2]):
            P = np.exp(scale * Q[q] @ K[c].T - lse[q][:, None])  # [Alg. 2 L9]
            dV[c] += P.T @ dO_s[q]  # [Alg. 2 L10]
            dS = P * (dO_s[q] @ V[c].T - D_s[q])  # [Alg. 2 L11]
            dQ[q] = scale * dS @ K[c]  # [Alg. 2 L12]
            dK[c] += scale * dS.T @ Q[q]  # [Alg. 2 L12]
        H = phi_K[m].T @ V[m]
        Z = phi_K[m].sum(axis=0)[:, None]
        d = np.broadcast_to(phi_Q[q] @ Z, phi_Q[q].shape)  # (rows, D), the same in every column
        dH = divide(phi_Q[q], d).T @ dO_l[q]  # [Alg. 2 L3]
        dZ = -divide(phi_Q[q], d).T @ D_l[q]  # [Alg. 2 L4]
        dphi_Q[q] = divide(dO_l[q] @ H.T - D_l[q] @ Z.T, d)  # [Alg. 2 L5]
        dphi_K[m] += V[m] @ dH.T + dZ.T  # [Alg. 2 L14] and [Alg. 2 L16]
        dV[m] += phi_K[m] @ dH  # [Alg. 2 L14] and [Alg. 2 L17]
    rounded = (torch.from_numpy(each).to(inputs.query.dtype) for each in (dQ, dK, dV))
    return protocol.Gradients(*rounded, torch.from_numpy(dphi_Q), torch.from_numpy(dphi_K))


# %% [markdown]
# Again we plant a fault first, the one of the printed algorithm: no scale in $dK$.


# %%
def unscaled_backward(grad_sparse, grad_linear, grad_lse, inputs, saved):
    gradients = backward(grad_sparse, grad_linear, grad_lse, inputs, saved)
    return gradients._replace(key=gradients.key / inputs.scale)


sla_ref.register_backend("numpy-unscaled", backend("numpy-unscaled", forward, unscaled_backward))
report = testing.check_backend("numpy-unscaled", device="cpu", dtypes=[torch.float32], quick=True)
print(dict(failures(report)), "in", sorted({check.case for check in report.failures}))
assert set(failures(report)) == {"grad_key"}

# %% [markdown]
# Now the real one, on all problems and in three dtypes: ragged lengths, empty classes, equal keys, scores of 10,000,
# zero denominators. Inputs are strided views into buffers that are NaN elsewhere, fresh memory is NaN as well, each run
# is repeated and its bits compared, and both halves are paired with those of `torch`.

# %%
sla_ref.register_backend("numpy", backend("numpy", forward, backward))
report = testing.check_backend("numpy", device="cpu")
print(report)
assert report.ok and not report.refused

# %% [markdown]
# ## Using it
#
# By its name it is as good as any other: for a call, for a layer, for a `with`, for the process (`set_backend`), or
# from outside (`SLA_REF_BACKEND=numpy`). Autograd finds the backward by itself, and that of the backend which ran the
# forward.

# %%
query, key, value = testing.make_problem(query_length=300, head_dim=32).inputs[:3]
layer = sla_ref.SparseLinearAttention(head_dim=32, critical_ratio=0.3, negligible_ratio=0.2)
torch.manual_seed(0)
# a new layer's Proj is zero, and the linear branch does not show
torch.nn.init.normal_(layer.proj_l.weight, std=0.1)

gradients = {}
for name in ("numpy", "torch"):
    with sla_ref.use_backend(name):
        out = layer(query, key, value)
    gradients[name] = torch.autograd.grad(out.square().mean(), layer.proj_l.weight)[0]
torch.testing.assert_close(gradients["numpy"], gradients["torch"])
print("usable:", [name for name in ("torch", "numpy") if sla_ref.list_backends()[name] is None])

# %% [markdown]
# It refuses an input that it does not support, and says why. Nothing falls back to another backend. Here a tensor on
# the device "meta", which has a shape and no numbers, acts as one on a GPU:

# %%
print(unsupported(query.to("meta"), None))
assert "CPU" in unsupported(query.to("meta"), None)

# %% [markdown]
# ## As a package
#
# `register_backend` lasts as long as the process. An installed package says it once, in its `pyproject.toml`:
#
# ```toml
# [project.entry-points."sla_ref.backends"]
# my-numpy = "sla_numpy"
# ```
#
# `sla_numpy` is the module with the four functions, `name` and `softmax_inside`. On installation that line ends up in a
# small text file next to the module. Here both are written by hand into a folder, which then plays the part of
# `site-packages`; the plug-in borrows the functions of the `torch` backend. `sla_ref` has not been told, and still
# finds it:

# %%
with tempfile.TemporaryDirectory() as folder:
    functions = "backward, forward, softmax_inside, unavailable, unsupported"
    plug_in = f"from sla_ref.backends.pytorch import {functions}\nname = 'borrowed'\n"
    Path(folder, "sla_borrowed.py").write_text(plug_in, encoding="utf-8")
    about = Path(folder, "sla_borrowed-1.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sla-borrowed\nVersion: 1.0\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text(
        "[sla_ref.backends]\nborrowed = sla_borrowed\n", encoding="utf-8"
    )

    assert "borrowed" not in sla_ref.list_backends()
    sys.path.insert(0, folder)
    assert sla_ref.list_backends()["borrowed"] is None
    with sla_ref.use_backend("borrowed"):
        by_plug_in = layer(query, key, value)
    sys.path.remove(folder)
assert torch.equal(by_plug_in, layer(query, key, value))

# %% [markdown]
# ## Coda: FlexAttention for the sparse branch
#
# PyTorch has a block-sparse attention of its own. `BlockMap.to_flex()` gives the critical blocks as FlexAttention's
# mask, and its output is then the sparse branch.
#
# On a GPU it has to be compiled, which makes one fused kernel of it; that is what the code below does where there is
# one, gradients included. On a CPU it uses the plain form, which holds the whole $N \times N$ map and has no backward:
# good enough to see that both agree.

# %%
from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # slow to import

device = "cuda" if torch.cuda.is_available() else "cpu"
problem = testing.make_problem(
    query_length=512, head_dim=64, block_q=128, block_k=128, critical_ratio=0.5, device=device
)
query, key, value = (tensor.requires_grad_(device == "cuda") for tensor in problem.inputs[:3])
flex = torch.compile(flex_attention) if device == "cuda" else flex_attention
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    sparse, extra = flex(
        query,
        key,
        value,
        block_mask=problem.inputs.block_map.to_flex(),
        return_aux=AuxRequest(lse=True),
    )
ours = sla_ref.sparse_linear_attention(query, key, value, block_map=problem.inputs.block_map)
torch.testing.assert_close(sparse, ours.sparse, rtol=0, atol=1e-4)
torch.testing.assert_close(extra.lse, ours.lse, rtol=0, atol=1e-4)

if device == "cuda":
    both = [
        torch.autograd.grad(out, (query, key, value), problem.grad_sparse)
        for out in (sparse, ours.sparse)
    ]
    for theirs, mine in zip(*both, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-3)

# %% [markdown]
# FlexAttention has no linear branch. As a backend of `sla_ref` it would be one half of a forward, combined with a
# linear half as above.
#
# ## Exercises
#
# **1. Say no in time.** A kernel of yours supports head dimensions that are multiples of 16, and only blocks of 64 by
# 64. Write its `unsupported`. The reason has to name the argument, what it got and what is allowed, and somebody will
# read it in an error message.


# %% tags=["exercise"]
def picky(query, block_map):
    """None for a head_dim that is a multiple of 16 and blocks of 64 x 64, else why not."""
    ...


# %% tags=["solution"] mistake=["query.shape[-1] % 16", "query.shape[-1] % 8"]
def picky(query, block_map):
    """None for a head_dim that is a multiple of 16 and blocks of 64 x 64, else why not."""
    if query.shape[-1] % 16:
        return f"head_dim must be a multiple of 16, got {query.shape[-1]}"
    if (block_map.block_q, block_map.block_k) != (64, 64):
        return f"blocks must be 64 x 64, got {block_map.block_q} x {block_map.block_k}"
    return None


# %% tags=["check"]
x = torch.randn(1, 1, 200, 24)
namespace = backend("picky", forward, backward)
namespace.unsupported = picky
sla_ref.register_backend("picky", namespace)

with check_exercise(1, picky):
    for head_dim, block_q in ((16, 64), (24, 64), (16, 32)):
        reason = picky(x[..., :head_dim], sla_ref.classify_blocks(x, x, block_q=block_q))
        case = f"head_dim {head_dim}, blocks {block_q} x 64: got {reason!r}"
        if (head_dim, block_q) == (16, 64):
            assert reason is None, f"{case}, and this can be taken"
        else:
            named = str(head_dim if head_dim != 16 else block_q)
            assert named in str(reason), f"{case}, expected a reason that names {named}"
    try:
        sla_ref.sparse_linear_attention(x, x, x, backend="picky")
    except ValueError as error:
        print(error)
    else:
        raise AssertionError("head_dim 24 was taken")

# %% [markdown]
# **2. Keys in chunks.** `sparse_rows` looks at all critical keys at once. Write it as [4. Algorithm
# 1](04_algorithm_1.md) does, with a running maximum and sum, over 16 keys at a time. The check is the package's own.


# %% tags=["exercise"]
def sparse_rows_online(Q, K, V, scale):
    """As `sparse_rows`, with no more than 16 keys at a time."""
    ...


# %% tags=["solution"] mistake=["correction * O + P @", "O + P @"]
def sparse_rows_online(Q, K, V, scale):
    """As `sparse_rows`, with no more than 16 keys at a time."""
    m, l, O = (
        np.full((len(Q), 1), -np.inf, Q.dtype),
        np.zeros((len(Q), 1), Q.dtype),
        np.zeros_like(Q),
    )
    for start in range(0, len(K), 16):
        chunk = slice(start, start + 16)
        S = scale * Q @ K[chunk].T
        m_new = np.maximum(m, S.max(axis=1, keepdims=True))
        P, correction = np.exp(S - m_new), np.exp(m - m_new)
        m, l, O = (
            m_new,
            correction * l + P.sum(axis=1, keepdims=True),
            correction * O + P @ V[chunk],
        )
    return O / l, m + np.log(l)


# %% tags=["check"]
Q, K, V = np.random.default_rng(0).normal(size=(3, 40, 16))

with check_exercise(2, sparse_rows_online):
    got, expected = sparse_rows_online(Q, K, V, 0.25), sparse_rows(Q, K, V, 0.25)
    expect("(O^s, L)", got, expected, rtol=1e-12, atol=1e-12)
    online = backend("numpy-online", make_forward(sparse_rows_online), backward)
    sla_ref.register_backend("numpy-online", online)
    report = testing.check_backend("numpy-online", device="cpu", dtypes=[torch.float32], quick=True)
    print(report)
    assert report.ok, report

# %% [markdown]
# ## Recap
#
# A backend is four functions and can be built half by half. `check_backend` compares it with the specification on
# problems that are meant to break it, and names what is wrong. Registered or installed, it serves every call, and
# refuses what it does not support.
#
# Next: [11. SLA in your own model](11_your_own_model.md)
