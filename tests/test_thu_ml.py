"""thu-ml/SLA's layer: their mathematics, written here once more from their description, dense and in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import sla_ref
from sla_ref.integrations.thu_ml import SparseLinearAttention

B, H, N, D, BLOCK = 2, 2, 92, 16, 8  # 12 blocks, the last one partial
BLOCKS = {"BLKQ": BLOCK, "BLKK": BLOCK}
FEATURES = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: torch.nn.functional.elu(x) + 1, "relu": torch.relu}


def theirs(q, k, v, topk, feature_map, variant, weight, bias) -> torch.Tensor:
    """O^s + Proj(O^l) as their branches compute it, without their rounding. NaN where theirs is."""
    q, k, v, weight, bias = (tensor.double() for tensor in (q, k, v, weight, bias))
    tiles = -(-N // BLOCK)

    def pooled(x):
        return torch.stack([x[:, :, i * BLOCK : (i + 1) * BLOCK].mean(2) for i in range(tiles)], 2)

    scores = pooled(q) @ pooled(k - k.mean(2, keepdim=True)).mT
    chosen = scores.topk(min(tiles, int(topk * tiles)), dim=-1).indices
    critical = torch.zeros_like(scores).scatter(-1, chosen, 1.0).bool()
    critical = critical.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :N, :N]
    sparse = (D**-0.5 * q @ k.mT).masked_fill(~critical, -torch.inf).softmax(-1) @ v
    weights = FEATURES[feature_map](q) @ FEATURES[feature_map](k).mT
    if variant == "main":
        linear = weights @ v / (weights.sum(-1, keepdim=True) + 1e-5)
    else:
        weights = weights * ~critical
        linear = weights @ v / weights.sum(-1, keepdim=True)
    return sparse + linear @ weight.T + bias


def inputs(size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator) for _ in range(3))
    return (size * q).to(dtype), (size * k).to(dtype), v.to(dtype)


def layer(topk: float = 0.3, feature_map: str = "softmax", **options) -> SparseLinearAttention:
    made = SparseLinearAttention(D, topk, feature_map, **BLOCKS, **options)
    torch.manual_seed(1)
    torch.nn.init.normal_(made.proj_l.weight, std=D**-0.5)
    torch.nn.init.normal_(made.proj_l.bias, std=0.1)
    return made


def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(out.double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize("variant", ["main", "SLA-1"])
def test_gives_what_their_code_gives(variant, feature_map):
    made = layer(feature_map=feature_map, variant=variant)
    proj = made.proj_l.weight, made.proj_l.bias
    out = made(*inputs())
    assert close(out, theirs(*inputs(), 0.3, feature_map, variant, *proj))
    other = {"main": "SLA-1", "SLA-1": "main"}[variant]
    assert not close(out, theirs(*inputs(), 0.3, feature_map, other, *proj)), "the variants differ"


@pytest.mark.parametrize("variant", ["main", "SLA-1"])
def test_gradients_are_those_of_their_mathematics(variant):
    made, leaves = layer(variant=variant), [tensor.requires_grad_() for tensor in inputs()]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs()]
    proj = [parameter.detach().double().requires_grad_() for parameter in made.parameters()]
    up = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(made(*leaves), [*leaves, *made.parameters()], up.bfloat16())
    out = theirs(*exact, 0.3, "softmax", variant, *proj)
    expected = torch.autograd.grad(out, [*exact, *proj], up.bfloat16().double())
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other).norm() < 2e-2 * other.norm()


def test_main_adds_1e_5_to_the_denominator_and_the_others_nothing():
    q, k, v = inputs(size=3e-4)  # relu features whose products add up to 1e-5 or so
    made = layer(feature_map="relu", variant="main")
    proj = made.proj_l.weight, made.proj_l.bias
    expected = theirs(q, k, v, 0.3, "relu", "main", *proj)
    assert close(made(q, k, v), expected)
    weights = torch.relu(q.double()) @ torch.relu(k.double()).mT
    assert (weights.sum(-1) < 5e-5).all(), "so small that 1e-5 counts"
    released = layer(feature_map="relu", variant="SLA-1")
    assert close(released(q, k, v), theirs(q, k, v, 0.3, "relu", "SLA-1", *proj))


def test_default_is_main():
    assert layer().variant == "main"
    assert torch.equal(layer()(*inputs()), layer(variant="main")(*inputs()))


def test_paper_is_the_layer_of_this_package():
    made, ours = layer(variant="paper"), sla_ref.SparseLinearAttention(D, 0.3, 0.1, block_q=BLOCK, block_k=BLOCK)
    ours.load_state_dict(made.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = ours(*inputs())
    torch.testing.assert_close(made(*inputs()), expected)
    assert not torch.equal(made(*inputs()), layer(variant="SLA-1")(*inputs()))


# --- where theirs gives NaN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["main", "SLA-1"])
def test_short_sequences(variant):
    """To them, 5 % of 12 blocks are 0 blocks."""
    made = layer(0.05, variant=variant)
    proj = made.proj_l.weight, made.proj_l.bias
    assert theirs(*inputs(), 0.05, "softmax", variant, *proj).isnan().all()
    out, share = made(*inputs(), return_sparsity=True)
    assert share == 1 / 12
    assert close(out, theirs(*inputs(), 1 / 12, "softmax", variant, *proj)), "as if one block had been asked for"


def test_a_zero_denominator():
    q, k, v = inputs()
    q = -q.abs()  # relu leaves nothing
    made = layer(feature_map="relu", variant="SLA-1")
    assert theirs(q, k, v, 0.3, "relu", "SLA-1", made.proj_l.weight, made.proj_l.bias).isnan().all()
    assert made(q, k, v).isfinite().all()


def test_every_block_critical():
    q, k, v = inputs()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    made = layer(1.0, variant="SLA-1")
    torch.testing.assert_close(made(q, k, v), exact + made.proj_l.bias.bfloat16(), atol=2e-2, rtol=2e-2)


# --- their manners ---------------------------------------------------------------------------------------------------


def test_arguments_in_their_order():
    plain = SparseLinearAttention(D, 0.2)
    assert (plain.feature_map, plain.BLKQ, plain.BLKK, plain.dtype) == ("softmax", 64, 64, torch.bfloat16)
    made = SparseLinearAttention(D, 0.2, "elu", 16, 8, False, False)
    assert (made.topk, made.feature_map, made.BLKQ, made.BLKK, made.dtype) == (0.2, "elu", 16, 8, torch.float16)
    assert made.proj_l.weight.dtype == torch.float32
    assert not made.proj_l.weight.any() and not made.proj_l.bias.any()
    assert set(made.state_dict()) == {"proj_l.weight", "proj_l.bias"}
    assert "topk=0.2" in repr(made)


def test_sparsity_is_the_share_of_critical_blocks():
    out, share = layer(0.3)(*inputs(), return_sparsity=True)
    assert out.shape == (B, H, N, D)
    assert share == 3 / 12
    made = SparseLinearAttention(D, 0.3, BLKQ=2 * BLOCK, BLKK=BLOCK)
    assert made(*inputs(), return_sparsity=True)[1] == 3 / 12, "of the key blocks"


def test_the_backend_is_the_layers_own():
    made = layer(backend="torch")
    made.backend = "nope"
    with pytest.raises(ValueError, match="backend must be one of"):
        made(*inputs())


def test_a_feature_map_of_another_dtype():
    made, same = layer(feature_map=lambda x: x.float().softmax(-1)), layer()
    torch.testing.assert_close(made(*inputs()), same(*inputs()))


@pytest.mark.parametrize("use_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, use_bf16):
    made = layer(use_bf16=use_bf16)
    seen = []
    made.proj_l.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    out = made(*inputs(dtype=dtype))
    assert out.dtype == dtype
    assert seen == [torch.bfloat16 if use_bf16 else torch.float16]
    expected = theirs(*inputs(dtype=dtype), 0.3, "softmax", "main", made.proj_l.weight, made.proj_l.bias)
    assert close(out, expected)


class Int8Linear(torch.nn.Module):
    """Like 8-bit layers: the input is float, the weight is not."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.step = linear.weight.detach().abs().max() / 127
        self.weight = torch.nn.Parameter(
            (linear.weight.detach() / self.step).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.is_floating_point()
        return torch.nn.functional.linear(tokens, self.weight.to(tokens.dtype) * self.step, self.bias)


def test_proj_is_made_in_single_precision():
    """Whatever the dtype in which a model around it is made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert SparseLinearAttention(D, 0.2).proj_l.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("variant", ["main", "SLA-1"])
def test_proj_gets_half_precision(variant):
    """A quantised one computes in the dtype of what it gets."""
    made, seen = layer(variant=variant, use_bf16=False), []
    made.proj_l.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    made(*inputs(dtype=torch.float32))
    assert seen == [torch.float16]


def test_a_quantised_projection_is_called_as_it_is():
    made = layer()
    expected = theirs(*inputs(), 0.3, "softmax", "main", made.proj_l.weight, made.proj_l.bias)
    made.proj_l = Int8Linear(made.proj_l)
    assert close(made(*inputs()), expected)


@pytest.mark.parametrize("variant", ["main", "SLA-1"])
def test_sums_that_leave_float16s_range(variant):
    """As in a whole video, 92 keys with features of 50 add up to millions in the denominator."""
    made, (q, k, v) = layer(feature_map="elu", use_bf16=False, variant=variant), inputs(dtype=torch.float16)
    q, k = (50 + q).requires_grad_(), 50 + k
    out = made(q, k, v)
    assert close(out, theirs(q, k, v, 0.3, "elu", variant, made.proj_l.weight, made.proj_l.bias))
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_autocast_around_it_changes_nothing():
    made = layer(use_bf16=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made(*inputs(dtype=torch.float32))
    assert torch.equal(inside, made(*inputs(dtype=torch.float32)))


def test_deepcopy_pickle_and_compile():
    made = layer()
    expected = made(*inputs())
    for clone in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(clone(*inputs()), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(*inputs()), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_dim": 0}, ValueError, "head_dim must be an int >= 1, got 0"),
        ({"topk": 0}, ValueError, "topk must be a number with 0 < topk <= 1, got 0"),
        ({"topk": 1.5}, ValueError, "topk must be a number with 0 < topk <= 1, got 1.5"),
        ({"BLKQ": 0}, ValueError, "BLKQ must be an int >= 1, got 0"),
        ({"BLKK": 64.0}, TypeError, "BLKK must be an int >= 1, got 64.0"),
        ({"feature_map": "hedgehog"}, ValueError, "feature_map must be one of 'softmax', 'elu', 'relu' or a callable"),
        ({"variant": "v2"}, ValueError, "variant must be one of 'main', 'SLA-1', 'paper', got 'v2'"),
        ({"backend": "nope"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_construction(changes, error, message):
    with pytest.raises(error, match=message):
        SparseLinearAttention(**{"head_dim": D, "topk": 0.2} | changes)


def test_bad_inputs():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="q must have head_dim 8, got shape"):
        SparseLinearAttention(8, 0.2)(q, k, v)
    with pytest.raises(ValueError, match=r"q must have shape \(batch, heads, tokens, head_dim\), got \(2, 92, 16\)"):
        layer()(q[0], k, v)
    with pytest.raises(ValueError, match="k must have q's number of heads 2, got 1"):
        layer()(q, k[:, :1], v)
    with pytest.raises(TypeError, match="v must have q's dtype"):
        layer()(q, k, v.double())
