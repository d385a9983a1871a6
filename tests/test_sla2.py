"""SLA2's layer: the equations behind each form of alpha, on every backend, and its manners as an nn.Module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import sla_ref
from sla_ref import reference_sla2
from sla_ref.sla2 import ALPHAS

BLOCKS = {"block_q": 16, "block_k": 16}
LENGTH = 60  # the last block is partial


def make_layer(alpha: str, **arguments) -> sla_ref.SLA2Attention:
    """A layer with alpha's parameters anywhere but at their start."""
    settings = {"critical_ratio": 0.3, "query_length": LENGTH if alpha == "block" else None} | BLOCKS | arguments
    layer = sla_ref.SLA2Attention(16, 2, alpha=alpha, **settings)
    for name, parameter in layer.named_parameters():
        if name.startswith("alpha"):
            torch.nn.init.normal_(parameter)
    return layer


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu", length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 1, 2, length, 16, generator=generator)
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def equations(layer: sla_ref.SLA2Attention, query, key, value, mask: torch.Tensor) -> torch.Tensor:
    """What the layer computes, in the dtype of its tokens; `mask` (B, H, Tq, Tk)."""
    scale = 16**-0.5
    mask = reference_sla2.expand(mask.to(query.dtype), query.shape[2], key.shape[2], 16, 16)
    sparse = reference_sla2.sparse_branch(query, key, value, mask, scale)
    linear = reference_sla2.linear_branch(layer.phi_query(query), layer.phi_key(key), value, mask)
    if layer.alpha == "ideal":
        alpha = reference_sla2.ideal_alpha(query, key, mask, scale)
    elif layer.alpha == "block_means":
        alpha = reference_sla2.block_means_alpha(query, key, mask, 16, scale)
    else:
        logit = layer.alpha_logit[:, None]
        if layer.alpha == "block":
            logit = layer.alpha_logit.repeat_interleave(16, dim=1)[:, : query.shape[2]]
        if layer.alpha == "token":
            logit = logit + torch.einsum("hd,bhnd->bhn", layer.alpha_weight, query)
        alpha = torch.sigmoid(logit)
    if layer.proj_l is not None:
        linear = layer.proj_l(linear)
    return reference_sla2.combine(sparse, linear, alpha)


def gradients(out: torch.Tensor, wanted) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), wanted))


def close(actual, expected, tolerance=1e-12):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * max(1, other.abs().max().item()), rtol=0)


# --- the equations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proj", [False, True], ids=["", "proj"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_layer_and_its_gradients_are_the_equations(alpha, proj):
    layer = make_layer(alpha, proj=proj).double()
    if proj:
        torch.nn.init.normal_(layer.proj_l.weight)
    x = inputs(torch.float64)
    mask = sla_ref.classify_blocks(x[0], x[1], 0.3, 0.0, **BLOCKS).labels
    out, expected = layer(*x), equations(layer, *x, mask)
    close([out], [expected])
    wanted = [*x, *layer.parameters()]
    close(gradients(out, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_soft_layer_and_its_gradients_are_the_equations(alpha):
    """Stage 1: the gradient reaches the router too."""
    layer = make_layer(alpha, router="learned").double()
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    x = inputs(torch.float64)
    projections = layer.router.scores.proj_q.weight, layer.router.scores.proj_k.weight
    soft = reference_sla2.soft_top_k(reference_sla2.router_scores(*x[:2], *projections, 16, 16), 1, 0.5)
    out, expected = layer(*x, tau=0.5), equations(layer, *x, soft)
    close([out], [expected])
    wanted = [*x, *layer.parameters()]
    found = gradients(out, wanted)
    close(found, gradients(expected, wanted))
    assert all(grad.any() for grad in found)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_by_finite_differences(alpha):
    settings = {"block_q": 4, "block_k": 4, "query_length": 11 if alpha == "block" else None}
    layer = sla_ref.SLA2Attention(3, 2, 0.4, alpha=alpha, **settings).double()
    x = [torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    block_map = sla_ref.classify_blocks(x[0], x[1], 0.4, 0.0, block_q=4, block_k=4)
    names = [name for name, _ in layer.named_parameters()]
    values = [torch.randn_like(parameter, requires_grad=True) for parameter in layer.parameters()]

    def run(*tensors):
        parameters = dict(zip(names, tensors[3:], strict=True))
        return torch.func.functional_call(layer, parameters, tensors[:3], {"block_map": block_map})

    assert torch.autograd.gradcheck(run, [*x, *values])


@pytest.mark.parametrize("alpha", ["token", "ideal"])  # the latter needs lse and its gradient, twice
def test_backends_agree(alpha, backend_name, device):
    layer = make_layer(alpha, backend=backend_name, proj=True)
    exact_layer, x = copy.deepcopy(layer).double(), inputs(length=40)
    exact_x = [tensor.detach().double().requires_grad_() for tensor in x]
    mask = sla_ref.classify_blocks(*x[:2], 0.3, 0.0, **BLOCKS).labels
    expected = equations(exact_layer, *exact_x, mask)
    expected_grads = gradients(expected, [*exact_x, *exact_layer.parameters()])
    layer, x = layer.to(device), [tensor.detach().to(device).requires_grad_() for tensor in x]
    out = layer(*x)
    close([out.double().cpu()], [expected], 1e-5)
    close([grad.double().cpu() for grad in gradients(out, [*x, *layer.parameters()])], expected_grads, 1e-4)


@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_critical_ratio_one_is_exact_attention(alpha, tau):
    layer, x = make_layer(alpha, critical_ratio=1.0), inputs()
    out, expected = layer(*x, tau=tau), F.scaled_dot_product_attention(*x)
    close([out], [expected], 1e-5)
    close(gradients(out, x), gradients(expected, x), 1e-4)


@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize("alpha", ["head", "block", "token"])  # those with parameters of a head
def test_some_heads_are_those_of_the_whole(alpha, tau):
    layer, x = make_layer(alpha), inputs()
    one, other = (layer(*(each[:, part] for each in x), tau=tau, heads=part) for part in (slice(0, 1), slice(1, 2)))
    close([torch.cat([one, other], dim=1)], [layer(*x, tau=tau)], 1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_of_one_branch_have_weight_zero_or_one_and_finite_gradients(alpha):
    """In turn: nothing critical, nothing marginal, neither, both."""
    labels = torch.tensor([[0, 0, 0, -1], [1, 1, -1, -1], [-1, -1, -1, -1], [1, 0, 0, 0]], dtype=torch.int8)
    block_map = sla_ref.BlockMap(labels.expand(1, 2, 4, 4), 16, 16, LENGTH, LENGTH)
    layer, x = make_layer(alpha), inputs()
    sparse, linear, weight = layer.branches(*x, block_map=block_map)
    assert (weight[:, :, :16] == 0).all()
    assert (weight[:, :, 16:32] == 1).all()
    assert ((weight[:, :, 48:] > 0) & (weight[:, :, 48:] < 1)).all()
    out = layer(*x, block_map=block_map)
    assert torch.equal(out[:, :, :16], linear[:, :, :16])
    assert torch.equal(out[:, :, 16:32], sparse[:, :, 16:32])
    assert not out[:, :, 32:48].any()
    found = gradients(out, [*x, *layer.parameters()])
    assert all(grad.isfinite().all() and grad.any() for grad in found)
    alone = layer(*x, block_map=block_map)[:, :, :48].square().sum()
    of_alpha = torch.autograd.grad(alone, [x[0], *layer.parameters()])[1:]
    assert not any(grad.any() for grad in of_alpha), "alpha's parameters have no part in such rows"


def test_ideal_alpha_is_the_critical_share_of_the_softmax():
    layer, (query, key, value) = make_layer("ideal").double(), inputs(torch.float64)
    weights = torch.softmax(query @ key.mT / 4, dim=-1)
    critical = sla_ref.classify_blocks(query, key, 0.3, 0.0, **BLOCKS).to_dense() == 1
    *_, alpha = layer.branches(query, key, value)
    torch.testing.assert_close(alpha, weights.where(critical, 0.0).sum(-1), atol=1e-12, rtol=0)


def test_longer_sequences_lower_an_alpha_that_counts_keys():
    """Twice the same keys: twice as much is marginal. A learned alpha cannot know."""
    for alpha in ALPHAS:
        if alpha == "block":
            continue
        layer, (query, key, value) = make_layer(alpha), inputs(length=64)
        critical_once = sla_ref.BlockMap(
            torch.tensor([[1, 0, 0, 0]] * 4).to(torch.int8).expand(1, 2, 4, 4), 16, 16, 64, 64
        )
        labels = F.pad(critical_once.labels, (0, 4))
        doubled = sla_ref.BlockMap(labels, 16, 16, 64, 128)
        *_, one = layer.branches(query, key, value, block_map=critical_once)
        twice = (torch.cat([tensor, tensor], 2) for tensor in (key, value))
        *_, other = layer.branches(query, *twice, block_map=doubled)
        assert torch.equal(one, other) == (alpha in ("head", "token")), alpha
        assert (other <= one).all()


# --- where it starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["head", "block", "token"])
def test_a_fresh_alpha_is_nine_tenths(alpha):
    layer = make_layer(alpha)
    layer.reset_parameters()
    *_, weight = layer.branches(*inputs())
    torch.testing.assert_close(weight, torch.full((1, 2, LENGTH), 0.9))


def test_a_fresh_proj_and_a_fresh_learned_router_change_nothing():
    x = inputs()
    expected = make_layer("ideal")(*x)
    torch.testing.assert_close(make_layer("ideal", proj=True)(*x), expected)
    with torch.no_grad():
        assert torch.equal(make_layer("ideal", router="learned")(*x), expected)
    layer = make_layer("ideal", proj=True, router="learned", feature_map="hedgehog")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.reset_parameters()
    for weight in (layer.proj_l.weight, layer.router.scores.proj_q.weight, layer.router.scores.proj_k.weight):
        assert torch.equal(weight, torch.eye(16))
    assert not layer.proj_l.bias.any()


def test_stage_1_trains_a_router():
    """A router that starts wrong, the keys' sign turned, ends with better blocks than the pooled choice."""
    query, key, value = (tensor.detach() for tensor in inputs(torch.float64))
    x = 2 * query, 2 * key, value
    full = F.scaled_dot_product_attention(*x)
    pooled = F.mse_loss(make_layer("ideal")(*x), full)
    layer = make_layer("ideal", router="learned").double()
    with torch.no_grad():
        layer.router.scores.proj_k.weight.neg_()
        assert F.mse_loss(layer(*x), full) > 1.2 * pooled
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        F.mse_loss(layer(*x, tau=1.0), full).backward()
        optimizer.step()
    layer.router.requires_grad_(False)
    assert F.mse_loss(layer(*x), full) < 0.95 * pooled


# --- as a module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [None, 0.1], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_result_has_the_dtype_of_query_whatever_that_of_the_parameters(alpha, dtype, tau):
    for of_parameters in (torch.float32, torch.bfloat16):
        layer = make_layer(alpha, proj=True, feature_map="hedgehog").to(of_parameters)
        out = layer(*inputs(dtype), tau=tau)
        assert out.dtype == dtype
        exact = copy.deepcopy(layer).double()(*(tensor.double() for tensor in inputs(dtype)), tau=tau)
        torch.testing.assert_close(out.double(), exact, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("tau", [None, 0.1], ids=["hard", "soft"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_autocast_leaves_alpha_alone(alpha, tau, device):
    """The tokens are rounded to bfloat16, and alpha is computed from them in float32."""
    layer = make_layer(alpha, proj=True).to(device)
    x = [tensor.detach().to(device).requires_grad_() for tensor in inputs()]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(*x, tau=tau)
        *_, weight = layer.branches(*x, tau=tau)
    assert out.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    *_, expected = layer.branches(*(tensor.bfloat16() for tensor in x), tau=tau)
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
    assert all(grad.dtype == torch.float32 for grad in gradients(out.float(), [*x, *layer.parameters()]))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_deepcopy_pickle_and_state_dict(alpha):
    layer = make_layer(alpha, router="learned", proj=True, feature_map="hedgehog")
    layer.router.requires_grad_(False)
    expected = layer(*inputs())
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(*inputs()), expected)
    names = {name for name in layer.state_dict() if not name.startswith(("proj_l", "phi", "router"))}
    assert names == {
        "head": {"alpha_logit"},
        "block": {"alpha_logit"},
        "token": {"alpha_logit", "alpha_weight"},
    }.get(alpha, set())
    fresh = make_layer(alpha, router="learned", proj=True, feature_map="hedgehog")
    fresh.load_state_dict(layer.state_dict())
    fresh.router.requires_grad_(False)
    assert torch.equal(fresh(*inputs()), expected)


@pytest.mark.parametrize(
    "alpha", ["block_means", *(pytest.param(each, marks=pytest.mark.long) for each in ("block", "token", "ideal"))]
)
def test_compiled_layer(alpha):
    """Forward and backward in one graph each; with lengths that change, where the form of alpha takes them."""
    torch._dynamo.reset()
    layer = make_layer(alpha, router="learned", proj=True)
    layer.router.requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=alpha != "block")
    for length in (LENGTH,) if alpha == "block" else (LENGTH, 47):
        x = inputs(length=length)
        wanted = [*x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        out, expected = compiled(*x), layer(*x)
        torch.testing.assert_close(out, expected)
        close(gradients(out, wanted), gradients(expected, wanted), 1e-5)


def test_compiled_soft_layer():
    torch._dynamo.reset()
    layer, x = make_layer("block_means", router="learned"), inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = [*x, *layer.parameters()]
    close(gradients(compiled(*x, tau=0.1), wanted), gradients(layer(*x, tau=0.1), wanted), 1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    layer, x = make_layer("block_means"), inputs()
    again = gradients(checkpoint(layer, *x, use_reentrant=False), x)
    assert all(map(torch.equal, gradients(layer(*x), x), again))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_meta_tensors_give_shapes(alpha):
    layer = make_layer(alpha, proj=True).to("meta")
    x = [tensor.detach().to("meta").requires_grad_() for tensor in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(*x)
    assert out.shape == x[0].shape
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), x)] == [tensor.shape for tensor in x]


def test_printing_says_how_it_mixes():
    assert "16, 2, critical_ratio=0.3, alpha='block', query_length=60, block_q=16" in repr(make_layer("block"))
    assert "alpha='head', block_q=16" in repr(make_layer("head"))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": "oracle"}, ValueError, "alpha must be one of 'head', 'block', 'token', 'block_means', 'ideal', got"),
        ({"alpha": None}, ValueError, "alpha must be one of .*, got None"),
        ({"alpha": "block"}, TypeError, "query_length must be an int >= 1, got None"),
        ({"query_length": 60}, ValueError, "query_length must be None for alpha='head', which accepts any, got 60"),
        ({"heads": 0}, ValueError, "heads must be an int >= 1, got 0"),
        ({"block_q": 0}, ValueError, "block_q must be an int >= 1, got 0"),
        ({"block_k": 0}, ValueError, "block_k must be an int >= 1, got 0"),
        ({"head_dim": 16.0}, TypeError, "head_dim must be an int >= 1"),
        ({"critical_ratio": 0.0}, ValueError, "critical_ratio must be a number with 0 < critical_ratio <= 1, got 0"),
        ({"proj": "identity"}, TypeError, "proj must be a bool, got 'identity' of type str"),
        ({"feature_map": "tanh"}, ValueError, "feature_map must be one of"),
        ({"backend": "nope"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        sla_ref.SLA2Attention(**{"head_dim": 16, "heads": 2} | arguments)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_parameters_are_float32_whatever_the_default(alpha):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = make_layer(alpha, router="learned", proj=True)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


def test_bad_calls():
    x = inputs()
    with pytest.raises(TypeError, match="heads must be a slice or None, got int"):
        sla_ref.SLA2Attention(16, 2)(*x, heads=1)
    with pytest.raises(ValueError, match=r"query must have heads 1, got shape \(1, 2, 60, 16\)"):
        sla_ref.SLA2Attention(16, 2)(*x, heads=slice(1, 2))
    with pytest.raises(ValueError, match=r"query must have heads 3, got shape \(1, 2, 60, 16\)"):
        sla_ref.SLA2Attention(16, 3)(*x)
    with pytest.raises(ValueError, match=r"query must have head_dim 8, got shape \(1, 2, 60, 16\)"):
        sla_ref.SLA2Attention(8, 2)(*x)
    with pytest.raises(ValueError, match="query must have shape"):
        sla_ref.SLA2Attention(8, 2)(torch.ones(3, 8), torch.ones(3, 8), torch.ones(3, 8))
    with pytest.raises(ValueError, match="query must have query_length 64, to which alpha='block' is bound"):
        make_layer("block", query_length=64)(*x)
    block_map = sla_ref.classify_blocks(*x[:2], **BLOCKS)
    with pytest.raises(ValueError, match="tau must be None with a block_map"):
        make_layer("head")(*x, block_map=block_map, tau=0.1)
    with pytest.raises(ValueError, match="tau must be a finite number > 0, got -1"):
        make_layer("head")(*x, tau=-1)
    with pytest.raises(ValueError, match=r"tau must be None for a router that is not a sla_ref\.Router, got 0\.1"):
        make_layer("head", router=sla_ref.classify_blocks)(*x, tau=0.1)


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", "token"), ("feature_map", "elu"), ("heads", 4), ("query_length", 30), ("block_q", 8)]
)
def test_what_the_layer_is_made_of_cannot_be_changed(name, value):
    layer = make_layer("block")
    with pytest.raises(AttributeError, match=f"{name} cannot be changed"):
        setattr(layer, name, value)
