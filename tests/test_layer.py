"""The whole layer as one operator: the same as its branches, Proj and the sum, whoever adds them."""

from __future__ import annotations

from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from faults import Fault, with_fault
from torch import nn

import sla_ref
from sla_ref import backends, testing
from sla_ref.attention import run_backward_layer, run_forward_layer
from sla_ref.module import _weight_and_bias
from sla_ref.protocol import Proj

BLOCKS = {"block_q": 16, "block_k": 16}
SMALL = {"heads": 1, "query_length": 20, "key_length": 37, "head_dim": 24, **BLOCKS}
NAMES = ("out", "grad_query", "grad_key", "grad_value", "grad_phi_query", "grad_phi_key", "grad_weight", "grad_bias")


@pytest.fixture
def triton() -> ModuleType:
    if (reason := backends.list_backends()["triton"]) is not None:
        pytest.skip(reason)
    return backends.load("triton")


def proj_for(problem: testing.Problem) -> Proj:
    query, generator = problem.inputs.query, torch.Generator().manual_seed(1)
    dim = query.shape[-1]
    return Proj(*(torch.randn(size, generator=generator).mul(dim**-0.5).to(query) for size in ((dim, dim), (dim,))))


def run(backend, problem: testing.Problem, proj: Proj) -> dict[str, torch.Tensor]:
    """The output and all gradients of the layer."""
    saved = run_forward_layer(backend, problem.inputs, proj)
    gradients, grad_proj = run_backward_layer(backend, problem.grad_sparse, problem.inputs, proj, saved)
    results = zip(NAMES, (saved[0], *gradients, *grad_proj), strict=True)
    return {name: tensor for name, tensor in results if tensor is not None}


def plain(backend: ModuleType) -> SimpleNamespace:
    """The same backend without the layer: its branches are added outside."""
    parts = ("name", "softmax_inside", "unavailable", "unsupported", "forward", "backward")
    return SimpleNamespace(**{name: getattr(backend, name) for name in parts})


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def assert_as_good_as_plain(backend: ModuleType, problem: testing.Problem) -> None:
    """Within three times the error of the plain composition, and a few roundings.

    Bits differ in 16 bits: Proj multiplies the values here, and the average of the values there; and D^s, which is made
    of O instead of O^s, has the rounding of the sum.
    """
    proj = proj_for(problem)
    wide = problem.to(torch.float64)
    exact = run(backends.load("torch"), wide, Proj(*(part.double() for part in proj)))
    twin = run(plain(backend), problem, proj)
    unit = torch.finfo(problem.inputs.query.dtype).eps
    for name, values in run(backend, problem, proj).items():
        assert values.shape == exact[name].shape
        allowed = 3 * rms(twin[name].double() - exact[name]) + 2 * unit * rms(exact[name])
        assert rms(values.double() - exact[name]) <= allowed, name


CASES = [  # phi is given where a feature map is named
    {"dtype": torch.float32, "feature_map": "softmax"},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "feature_map": "elu"},
    {"key_length": 70, "block_k": 64, "head_dim": 64},
    {"block_q": 32, "query_length": 33, "key_length": 20, "head_dim": 40},
    {"labels": "random", "heads": 2, "head_dim": 16},
    {"critical_ratio": 1.0},
    {"negligible_ratio": 1.0},
    {"labels": "marginal"},
    {"labels": "negligible", "feature_map": "softmax"},
    {"feature_map": "relu", "head_dim": 16},
]


@pytest.mark.backend("triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_proj_inside_is_as_good_as_outside(triton: ModuleType, case: dict, device: str) -> None:
    problem = testing.make_problem(**SMALL | case, device=device)
    assert_as_good_as_plain(triton, problem if "feature_map" in case else problem.default_phi())


@pytest.mark.backend("triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_same_bits_again_and_for_any_strides(triton: ModuleType, device: str) -> None:
    problem = testing.make_problem(**SMALL, dtype=torch.bfloat16, device=device).default_phi()
    proj = proj_for(problem)
    scattered = problem._map_tensors(lambda tensor: torch.stack([tensor, tensor], -1)[..., 0])
    first = run(triton, problem, proj)
    with testing._PoisonedMemory():
        again = run(triton, scattered, proj)
    for name, values in first.items():
        assert torch.equal(values, again[name]), name


@pytest.fixture(scope="module")
def sound() -> dict[str, torch.Tensor]:
    """The layer without a fault, by the torch backend."""
    problem = testing.make_problem(**SMALL)
    return run(backends.load("torch"), problem, proj_for(problem))


in_linear, in_sparse, in_forward = (partial(Fault, f"{name}.py") for name in ("linear", "sparse", "__init__"))
FAULTS = {
    "W is not transposed": in_linear("projected", "tl.trans(W)", "W", "out"),
    "V W^T is not kept": in_linear("states_kernel", "first, column, V)", "first, column, 0 * V)", "grad_phi_key"),
    "D^l is forgotten": in_sparse("dq_kernel", "Ds -= tl.load(row_Dl", "_ = tl.load(row_Dl", "grad_query"),
    "D^s has the bias in it": in_sparse("dq_kernel", "O -= tl.load(bias", "_ = tl.load(bias", "grad_query"),
    "dV misses W": in_sparse("dkdv_kernel", "dV = dot(share, ", "dV = dot(0 * share, ", "grad_value"),
    "each part of dW has the same keys": in_linear("grad_weight_kernel", "% PARTS * plan.KEYS", "* 0", "grad_weight"),
    "the bias is forgotten": in_forward("forward_kernel", "O += tl.load(bias", "_ = tl.load(bias", "out"),
    "O^s is overwritten": in_forward("forward_kernel", "O + load_slab(", "O + 0 * load_slab(", "out"),
}  # fmt: skip


@pytest.mark.backend("triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_shows(name: str, triton: ModuleType, sound: dict, tmp_path, device: str) -> None:
    """By far more than the error that the first test allows."""
    fault = FAULTS[name]
    faulty = with_fault(triton, tmp_path, fault)
    problem = testing.make_problem(**SMALL, device=device)
    proj = proj_for(problem)
    error, size = rms(run(faulty, problem, proj)[fault.where].cpu() - sound[fault.where]), rms(sound[fault.where])
    assert error > 0.01 * size


@pytest.mark.backend("triton")
@pytest.mark.parametrize("ratios", [(1.0, 0.0), (0.3, 1.0)])
def test_nothing_runs_for_a_class_without_blocks(triton: ModuleType, ratios: tuple[float, float], device: str) -> None:
    """Without a marginal block there are no states, no sums, and no way back through them."""
    started = []

    class Spy(triton.launch.Launcher):
        def start(self, kernel, programs, *args, **options):
            started.append(kernel.__name__)
            super().start(kernel, programs, *args, **options)

    problem = testing.make_problem(**SMALL, critical_ratio=ratios[0], negligible_ratio=ratios[1], device=device)
    assert not problem.inputs.block_map.has_marginal
    with triton.launch.launch_with(Spy()):
        results = testing.run_backend(triton, problem)
        run(triton, problem.default_phi(), proj_for(problem))
    assert set(started) == {"lists_kernel", "forward_kernel", "dq_kernel", "dkdv_kernel"}
    assert not any(results[name].any() for name in ("linear", "grad_phi_query", "grad_phi_key"))


def test_has_marginal_is_what_the_labels_say() -> None:
    query = torch.randn(1, 2, 60, 8)
    for ratios in ((1.0, 0.0), (0.5, 0.5), (0.3, 0.7), (0.3, 1.0), (0.3, 0.3), (0.01, 0.99)):
        made = sla_ref.classify_blocks(query, query, *ratios, block_q=8, block_k=8)
        by_hand = sla_ref.BlockMap(made.labels, 8, 8, 60, 60)
        assert made.has_marginal == by_hand.has_marginal == bool((made.labels == 0).any())


# --- which Proj the operator takes -----------------------------------------------------------------------------------


def layer_and_tokens(dtype: torch.dtype = torch.float32):
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, **BLOCKS)
    nn.init.normal_(layer.proj_l.weight)
    generator = torch.Generator().manual_seed(0)
    return layer, [torch.randn(1, 2, 60, 16, generator=generator).to(dtype) for _ in range(3)]


def test_a_plain_linear_is_taken() -> None:
    layer, x = layer_and_tokens()
    assert _weight_and_bias(layer.proj_l, x[0]) == (layer.proj_l.weight, layer.proj_l.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight, _ = _weight_and_bias(layer.proj_l, x[0].bfloat16())
        assert weight.dtype == torch.bfloat16
        out, composed = (
            layer(*x),
            sla_ref.sparse_linear_attention(*x, critical_ratio=0.3, negligible_ratio=0.3, **BLOCKS),
        )
        torch.testing.assert_close(out, composed.sparse + layer.proj_l(composed.linear), atol=2e-2, rtol=2e-2)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def in_place_of(proj: nn.Linear) -> Doubled:
    doubled = Doubled(16, 16)
    doubled.load_state_dict(proj.state_dict())
    return doubled


def forward_replaced(proj: nn.Linear) -> nn.Linear:
    proj.forward = lambda x: 2 * F.linear(x, proj.weight, proj.bias)
    return proj


def hooked(proj: nn.Linear) -> nn.Linear:
    proj.register_forward_hook(lambda module, args, out: 2 * out)
    return proj


def pre_hooked(proj: nn.Linear) -> nn.Linear:
    proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return proj


def parametrized(proj: nn.Linear) -> nn.Linear:
    nn.utils.parametrize.register_parametrization(proj, "weight", Doubling())
    return proj


@pytest.mark.parametrize("change", [in_place_of, forward_replaced, hooked, pre_hooked, parametrized])
def test_what_only_a_call_of_proj_does_is_honoured(change) -> None:
    layer, x = layer_and_tokens()
    nn.init.zeros_(layer.proj_l.bias)
    sparse = sla_ref.sparse_linear_attention(*x, critical_ratio=0.3, negligible_ratio=0.3, **BLOCKS).sparse
    expected = layer(*x) + (layer(*x) - sparse)
    layer.proj_l = change(layer.proj_l)
    assert _weight_and_bias(layer.proj_l, x[0]) is None
    torch.testing.assert_close(layer(*x), expected)


def test_backward_hooks_and_hooks_of_all_modules_are_honoured() -> None:
    layer, x = layer_and_tokens()
    x = [tensor.requires_grad_() for tensor in x]
    seen = []
    for register in (layer.proj_l.register_full_backward_hook, layer.proj_l.register_full_backward_pre_hook):
        handle = register(lambda *args: seen.append("backward"))
        layer(*x).sum().backward()
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module)))
    layer(*x)
    handle.remove()
    assert seen[:2] == ["backward", "backward"]
    assert nn.Linear in seen


def test_no_bias_another_dtype_and_no_plain_tensor_are_left_to_a_call() -> None:
    layer, x = layer_and_tokens()
    assert _weight_and_bias(layer.proj_l, x[0].bfloat16()) is None
    assert _weight_and_bias(nn.Linear(16, 16, bias=False), x[0]) is None
    for part in ("weight", "bias"):
        mixed = nn.Linear(16, 16)
        setattr(mixed, part, nn.Parameter(getattr(mixed, part).detach().bfloat16()))
        assert _weight_and_bias(mixed, x[0]) is None
    layer.proj_l.weight = nn.Parameter(torch.randn(16, 16).as_subclass(type("Packed", (torch.Tensor,), {})))
    assert _weight_and_bias(layer.proj_l, x[0]) is None


# --- one operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", ["given", "inside"])
def test_opcheck(phi: str) -> None:
    problem = testing.make_problem(query_length=20, head_dim=4, block_q=8, block_k=8, labels="random")
    problem = problem.default_phi() if phi == "inside" else problem
    *tensors, block_map, scale = problem.inputs
    tensors += proj_for(problem)
    options = (block_map.max_critical, block_map.is_uniform, block_map.has_marginal, 8, 8, scale, "torch")
    layer, backward = (getattr(torch.ops.sla_ref, name).default for name in ("layer", "layer_backward"))
    torch.library.opcheck(layer, (*tensors, block_map.labels, *options))
    saved = layer(*tensors, block_map.labels, *options)
    torch.library.opcheck(backward, (problem.grad_sparse, *tensors, *saved, block_map.labels, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_runs_with_autocast_off(dtype: torch.dtype) -> None:
    """The bits are the same whether or not forward and backward are called inside autocast. lse stays float32."""
    problem = testing.make_problem(**SMALL, dtype=dtype)
    *tensors, block_map, scale = problem.inputs
    tensors += proj_for(problem)
    options = (block_map.max_critical, block_map.is_uniform, block_map.has_marginal, 16, 16, scale, "torch")
    layer, backward = (getattr(torch.ops.sla_ref, name).default for name in ("layer", "layer_backward"))

    def both() -> list[torch.Tensor]:
        saved = layer(*tensors, block_map.labels, *options)
        return [*saved, *backward(problem.grad_sparse, *tensors, *saved, block_map.labels, *options)]

    outside = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = both()
    assert all(map(torch.equal, inside, outside))
    torch.library.opcheck(layer, (*tensors, block_map.labels, *options), test_utils="test_faketensor")
    of_backward = (problem.grad_sparse, *tensors, *outside[:4], block_map.labels, *options)
    torch.library.opcheck(backward, of_backward, test_utils="test_faketensor")


def test_gradcheck() -> None:
    layer, x = layer_and_tokens(torch.float64)
    leaves = [tensor[:, :1, :20].clone().requires_grad_() for tensor in x]
    layer.double()

    def function(weight, bias, *tensors):
        return torch.func.functional_call(layer, {"proj_l.weight": weight, "proj_l.bias": bias}, tensors)

    assert torch.autograd.gradcheck(function, (*layer.proj_l.parameters(), *leaves), fast_mode=True)


def test_a_second_derivative_is_refused_in_words() -> None:
    layer, x = layer_and_tokens()
    (first,) = torch.autograd.grad(layer(*x).sum(), layer.proj_l.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_vmap_over_samples_and_over_weights() -> None:
    layer, _ = layer_and_tokens()
    tokens = torch.randn(3, 1, 2, 60, 16)
    weights = torch.randn(3, 16, 16)

    def function(weight, x):
        return torch.func.functional_call(layer, {"proj_l.weight": weight}, (x, x, x))

    expected = [function(weight, x) for weight, x in zip(weights, tokens, strict=True)]
    torch.testing.assert_close(torch.func.vmap(function)(weights, tokens), torch.stack(expected))

    def gradient(weight, x):
        return torch.func.grad(lambda w: function(w, x).square().sum())(weight)

    each = [gradient(weights[0], x) for x in tokens]
    got = torch.func.vmap(gradient, in_dims=(None, 0))(weights[0], tokens)
    torch.testing.assert_close(got, torch.stack(each))
