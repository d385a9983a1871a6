"""The layer: its Proj, its feature maps, its manners as an nn.Module."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import sla_ref
from sla_ref.feature_maps import Softmax

BLOCKS = {"block_q": 8, "block_k": 8}


def inputs(dtype: torch.dtype = torch.float32, **kwargs) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 60, 16, generator=generator).to(dtype).requires_grad_(**kwargs) for _ in range(3))


def test_a_fresh_layer_is_its_sparse_branch():
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS)
    out = sla_ref.sparse_linear_attention(*inputs(), critical_ratio=0.3, negligible_ratio=0.3, **BLOCKS)
    assert torch.equal(layer(*inputs()), out.sparse)
    assert layer.proj_l.weight.dtype == torch.float32
    assert not layer.proj_l.weight.any()
    assert not layer.proj_l.bias.any()


def test_from_the_identity_a_fresh_layer_is_the_sum_of_both_branches():
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, proj_init="identity", **BLOCKS)
    out = sla_ref.sparse_linear_attention(*inputs(), critical_ratio=0.3, negligible_ratio=0.3, **BLOCKS)
    torch.testing.assert_close(layer(*inputs()), out.sparse + out.linear)
    torch.nn.init.normal_(layer.proj_l.weight)
    torch.nn.init.normal_(layer.proj_l.bias)
    layer.reset_parameters()
    assert torch.equal(layer.proj_l.weight, torch.eye(16)) and not layer.proj_l.bias.any()


def test_proj_is_made_in_single_precision():
    """Whatever the dtype in which a model around it is made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert sla_ref.SparseLinearAttention(16).proj_l.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_critical_ratio_one_is_exact_attention():
    layer = sla_ref.SparseLinearAttention(16, 1.0, **BLOCKS)
    torch.testing.assert_close(layer(*inputs()), F.scaled_dot_product_attention(*inputs()))


def test_gradient_reaches_proj_at_zero_and_phi_one_step_later():
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, feature_map="hedgehog", **BLOCKS)
    x = inputs()
    layer(*x).square().sum().backward()
    assert layer.proj_l.weight.grad.any()
    assert not layer.phi_query.weight.grad.any()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.zero_grad()
    layer(*x).square().sum().backward()
    assert layer.phi_query.weight.grad.any()
    assert layer.phi_key.weight.grad.any()


@pytest.mark.parametrize("proj", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_result_has_the_dtype_of_query_whatever_that_of_proj(dtype, proj):
    layer = sla_ref.SparseLinearAttention(16, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight, std=0.1)
    layer = layer.to(proj)
    out = layer(*inputs(dtype))
    assert out.dtype == dtype
    exact = copy.deepcopy(layer).double()(*(tensor.double() for tensor in inputs(dtype)))
    torch.testing.assert_close(out.double(), exact, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("proj", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(proj, device):
    """On a GPU the backend is triton, which supports these blocks."""
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, block_q=16, block_k=16).to(device, proj)
    torch.nn.init.normal_(layer.proj_l.weight)
    x = tuple(tensor.detach().to(device).requires_grad_() for tensor in inputs())
    expected = layer(*x)
    expected_grads = torch.autograd.grad(expected.square().sum(), x)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(*x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=5e-2)
    for grad, wanted in zip(torch.autograd.grad(out.float().square().sum(), x), expected_grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted, atol=0.1 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu", "hedgehog", torch.exp, Softmax(4.0)])
def test_feature_maps(feature_map):
    layer = sla_ref.SparseLinearAttention(16, feature_map=feature_map, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight)
    x = inputs()
    grads = torch.autograd.grad(layer(*x).sum(), x)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def test_feature_map_formulas():
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(sla_ref.feature_maps.elu(x), torch.where(x > 0, x + 1, x.exp()))
    torch.testing.assert_close(sla_ref.feature_maps.relu(x), x.clamp(min=0))
    torch.testing.assert_close(sla_ref.feature_maps.softmax(x), x.exp() / x.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(Softmax(4)(x), (4 * x).exp() / (4 * x).exp().sum(-1, keepdim=True))
    hedgehog = sla_ref.Hedgehog(6)
    wx = x @ hedgehog.weight.T
    torch.testing.assert_close(hedgehog(x), torch.cat([wx.softmax(-1), (-wx).softmax(-1)], -1))
    assert torch.equal(hedgehog(x.bfloat16()), hedgehog(x.bfloat16().float())), "its weight is float32"
    assert hedgehog.weight.shape == (3, 6)
    torch.testing.assert_close(hedgehog.weight @ hedgehog.weight.T, torch.eye(3))
    assert sla_ref.Hedgehog(2).weight.shape == (1, 2), "the smallest"


@pytest.mark.parametrize("which", ["phi_query", "phi_key"])
def test_query_and_key_may_have_different_feature_maps(which):
    """The operator computes softmax by itself only where both have it."""
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, proj_init="identity", **BLOCKS)
    setattr(layer, which, sla_ref.feature_maps.elu)
    found, other = layer(*inputs()), {"phi_query": "phi_key", "phi_key": "phi_query"}[which]
    setattr(layer, other, lambda tokens: tokens.softmax(-1))
    torch.testing.assert_close(found, layer(*inputs()))


def test_hedgehog_starts_with_orthonormal_rows_and_a_reset_draws_others():
    layer = sla_ref.SparseLinearAttention(16, feature_map="hedgehog", **BLOCKS)
    before = [phi.weight.clone() for phi in (layer.phi_query, layer.phi_key)]
    layer.reset_parameters()
    for phi, start in zip((layer.phi_query, layer.phi_key), before, strict=True):
        assert not torch.allclose(phi.weight, start)
        for weight in (phi.weight, start):
            torch.testing.assert_close(weight @ weight.T, torch.eye(8))


def test_classify_gives_the_map_of_a_forward():
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0, block_q=8, block_k=4)
    query, key, value = inputs()
    block_map = layer.classify(query, key[:, :, :30])
    expected = sla_ref.classify_blocks(query, key[:, :, :30], 0.3, 0, block_q=8, block_k=4)
    assert torch.equal(block_map.labels, expected.labels)
    key, value = key[:, :, :30], value[:, :, :30]
    assert torch.equal(layer(query, key, value, block_map=block_map), layer(query, key, value))


def test_a_given_map_overrides_the_ratios():
    layer = sla_ref.SparseLinearAttention(16, 0.01, **BLOCKS)
    x = inputs()
    everything = sla_ref.classify_blocks(x[0], x[1], 1.0, block_q=16, block_k=4)
    torch.testing.assert_close(layer(*x, block_map=everything), F.scaled_dot_product_attention(*x))


@pytest.mark.parametrize(
    ("feature_map", "of_phi"),
    [("hedgehog", {"phi_query.weight", "phi_key.weight"}), (Softmax(4.0), set())],
    ids=["hedgehog", "temperature"],
)
def test_deepcopy_pickle_and_state_dict(feature_map, of_phi):
    layer = sla_ref.SparseLinearAttention(16, feature_map=feature_map, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight)
    expected = layer(*inputs())
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(*inputs()), expected)
        assert clone.feature_map == feature_map and str(feature_map) in repr(clone)
    assert set(layer.state_dict()) == {"proj_l.weight", "proj_l.bias"} | of_phi
    layer.reset_parameters()
    assert not layer.proj_l.weight.any()


def test_activation_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight)
    x = inputs()
    plain = torch.autograd.grad(layer(*x).square().sum(), x)
    again = torch.autograd.grad(checkpoint(layer, *x, use_reentrant=False).square().sum(), x)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("feature_map", ["hedgehog", Softmax(4.0)], ids=["hedgehog", "temperature"])
def test_compiled_layer_with_dynamic_lengths(feature_map):
    """Forward and backward in one graph each, for the tokens and for the layer's own weights, Hedgehog's among them."""
    torch._dynamo.reset()
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, feature_map=feature_map, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (30, 47):
        x = tuple(torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
        wanted, out, expected = (*x, *layer.parameters()), compiled(*x), layer(*x)
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad(out.square().sum(), wanted)
        for one, other in zip(got, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
            torch.testing.assert_close(one, other)


def test_compiled_and_checkpointed_under_autocast(device):
    """The three work together, as a training script has them."""
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS).to(device)
    torch.nn.init.normal_(layer.proj_l.weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = tuple(tensor.detach().to(device).requires_grad_() for tensor in inputs())
    wanted = (*x, *layer.parameters())
    with torch.autocast(device, dtype=torch.bfloat16):
        plain = layer(*x)
        together = checkpoint(compiled, *x, use_reentrant=False)
    assert together.dtype == torch.bfloat16
    torch.testing.assert_close(together, plain)
    got = torch.autograd.grad(together.float().square().sum(), wanted)
    for one, other in zip(got, torch.autograd.grad(plain.float().square().sum(), wanted), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


def test_second_derivative_of_the_layer_is_refused_in_words():
    layer, x = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS), inputs()
    (first,) = torch.autograd.grad(layer(*x).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.square().sum().backward()


def test_hooks_and_adapters_on_proj_are_honoured():
    layer = sla_ref.SparseLinearAttention(16, **BLOCKS)
    layer.proj_l.register_forward_hook(lambda module, args, out: out + 1)
    fresh = sla_ref.SparseLinearAttention(16, **BLOCKS)
    torch.testing.assert_close(layer(*inputs()), fresh(*inputs()) + 1)


class Int8Linear(torch.nn.Module):
    """Like 8-bit and 4-bit layers: an integer weight, and float tokens in and out."""

    def __init__(self, linear: torch.nn.Linear, packed: bool) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = linear.bias.detach()
        if packed:
            self.weight = torch.nn.Parameter(self.packed, requires_grad=False)
        else:  # torch's dynamically quantised Linear has a method of this name
            self.weight = lambda: self.packed

    def forward(self, x):
        return F.linear(x, (self.packed * self.scale).to(x.dtype), self.bias.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["int8 weight", "weight is a method"])
def test_a_quantised_proj_is_called_as_it_is(packed, dtype):
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight)
    x = inputs(dtype)
    expected = layer(*x)
    layer.proj_l = Int8Linear(layer.proj_l, packed)
    torch.testing.assert_close(layer(*x), expected, atol=0.1, rtol=0.05)


def test_a_float8_proj_gets_the_tokens_as_they_are():
    """Weights that are stored in 8 bits and cast by the module itself."""
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS)
    torch.nn.init.normal_(layer.proj_l.weight)
    seen = []
    layer.proj_l.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    layer.proj_l.register_forward_pre_hook(lambda module, args: module.float() and None)
    layer.proj_l.to(torch.float8_e4m3fn)
    layer(*inputs())
    assert seen == [torch.float32]


def test_meta_tensors_give_shapes():
    layer = sla_ref.SparseLinearAttention(16, feature_map="hedgehog", **BLOCKS).to("meta")
    x = tuple(tensor.detach().to("meta").requires_grad_() for tensor in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(*x)
    assert out.shape == x[0].shape and out.is_meta
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), x)] == [tensor.shape for tensor in x]


def test_a_map_made_in_inference_mode_trains():
    layer, x = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS), inputs()
    with torch.inference_mode():
        block_map = sla_ref.classify_blocks(x[0], x[1], 0.3, 0.3, **BLOCKS)
        hand_made = sla_ref.BlockMap(block_map.labels.clone(), 8, 8, 60, 60)
    expected = torch.autograd.grad(layer(*x).sum(), x)
    for each in (block_map, hand_made):
        assert all(map(torch.equal, torch.autograd.grad(layer(*x, block_map=each).sum(), x), expected))


@pytest.mark.parametrize("feature_map", ["elu", torch.nn.ReLU()], ids=["name", "module"])
def test_a_new_feature_map_is_refused(feature_map):
    """It would show in the printout and nowhere else."""
    layer = sla_ref.SparseLinearAttention(16, feature_map=torch.nn.ReLU())
    with pytest.raises(AttributeError, match="feature_map cannot be changed: make a new layer"):
        layer.feature_map = feature_map


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("critical_ratio", 0.0, ValueError),
        ("critical_ratio", None, TypeError),
        ("negligible_ratio", "1", TypeError),
        ("block_q", 0, ValueError),
        ("block_k", None, TypeError),
        ("backend", "nope", ValueError),
    ],
)
def test_a_setting_that_becomes_nonsense_is_named_at_the_next_forward(setting, value, error):
    layer = sla_ref.SparseLinearAttention(16, **BLOCKS)
    setattr(layer, setting, value)
    with pytest.raises(error, match=f"{setting} must be"):
        layer(*inputs())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 0}, ValueError, "head_dim must be an int >= 1, got 0"),
        ({"head_dim": "64"}, TypeError, "head_dim must be an int >= 1, got '64'"),
        ({"critical_ratio": 0.0}, ValueError, "critical_ratio must be a number with 0 < critical_ratio <= 1, got 0.0"),
        (
            {"negligible_ratio": 2},
            ValueError,
            "negligible_ratio must be a number with 0 <= negligible_ratio <= 1, got 2",
        ),
        ({"block_q": 0}, ValueError, "block_q must be an int >= 1, got 0"),
        ({"block_k": 0}, ValueError, "block_k must be an int >= 1, got 0"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        sla_ref.SparseLinearAttention(**{"head_dim": 16} | arguments)


@pytest.mark.parametrize(
    ("head_dim", "error"),
    [("16", TypeError), (16.0, TypeError), (True, TypeError), (0, ValueError), (-2, ValueError), (3, ValueError)],
)
def test_bad_size_of_hedgehog(head_dim, error):
    with pytest.raises(error, match=f"head_dim must be an even int >= 2.*, got {head_dim!r}"):
        sla_ref.Hedgehog(head_dim)


def test_hedgehog_refuses_another_head_dim():
    with pytest.raises(ValueError, match=r"tokens must have head_dim 16, got shape \(1, 2, 30, 8\)"):
        sla_ref.Hedgehog(16)(torch.zeros(1, 2, 30, 8))


def test_bad_names_and_shapes():
    with pytest.raises(ValueError, match="feature_map must be one of"):
        sla_ref.SparseLinearAttention(16, feature_map="tanh")
    with pytest.raises(ValueError, match="head_dim must be an even int >= 2 for the hedgehog feature map, got 15"):
        sla_ref.SparseLinearAttention(15, feature_map="hedgehog")
    with pytest.raises(ValueError, match="backend must be one of"):
        sla_ref.SparseLinearAttention(16, backend="nope")
    with pytest.raises(ValueError, match="proj_init must be one of 'zero', 'identity', got 'eye'"):
        sla_ref.SparseLinearAttention(16, proj_init="eye")
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be a finite number > 0, got {temperature}"):
            Softmax(temperature)
    with pytest.raises(TypeError, match="temperature must be a finite number > 0, got '4' of type str"):
        Softmax("4")
    with pytest.raises(ValueError, match="query must have head_dim 8, got shape"):
        sla_ref.SparseLinearAttention(8)(*inputs())
    with pytest.raises(ValueError, match="query must have shape"):
        sla_ref.SparseLinearAttention(8)(torch.ones(3, 8), torch.ones(3, 8), torch.ones(3, 8))
