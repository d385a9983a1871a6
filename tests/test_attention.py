"""The public function: what it refuses, and that autograd, autocast and compilers treat it as one operator."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from needs import need_program

import sla_ref
from sla_ref import backends, testing
from sla_ref.attention import _backward, _forward

SMALL = {"critical_ratio": 0.3, "negligible_ratio": 0.3, "block_q": 8, "block_k": 8}


def tokens(length: int = 30, dim: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, length, dim, generator=generator, dtype=torch.float64).to(dtype)


def qkv(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(tokens(dtype=dtype, seed=seed).requires_grad_() for seed in range(3))


def gradients(out: sla_ref.SLAOutput, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((out.sparse.double() * out.linear.double()).sum(), inputs)


# --- bad input -------------------------------------------------------------------------------------------------------

Q = tokens()
MAP = sla_ref.classify_blocks(Q, Q, block_q=8, block_k=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": Q[0]}, ValueError, r"query must have shape \(batch, heads, tokens, head_dim\), got \(2, 30, 4\)"),
        ({"key": Q[:, :1]}, ValueError, r"key must have query's number of heads 2, got 1"),
        ({"key": Q.repeat(2, 1, 1, 1)}, ValueError, "key must have query's batch size 1, got 2"),
        ({"key": Q[..., :2]}, ValueError, "key must have query's head_dim 4, got 2"),
        ({"value": Q[..., :2]}, ValueError, "value must have query's head_dim 4, got 2"),
        ({"value": Q[:, :, :9]}, ValueError, "value must have key's number of tokens 30, got 9"),
        ({"key": Q.float()}, TypeError, "key must have query's dtype torch.float64, got torch.float32"),
        ({"query": Q.long()}, TypeError, "query must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"value": Q.to("meta")}, ValueError, "value must be on query's device cpu, got meta"),
        ({"query": Q[:, :, :0]}, ValueError, r"query must have no empty dimension, got shape \(1, 2, 0, 4\)"),
        ({"critical_ratio": 0}, ValueError, "critical_ratio must be a number with 0 < critical_ratio <= 1, got 0"),
        ({"critical_ratio": 1.1}, ValueError, "critical_ratio must be .* got 1.1"),
        ({"critical_ratio": math.nan}, ValueError, "critical_ratio must be .* got nan"),
        ({"critical_ratio": "5%"}, TypeError, "critical_ratio must be .* got '5%' of type str"),
        ({"negligible_ratio": -0.1}, ValueError, "negligible_ratio must be a number with 0 <= negligible_ratio <= 1"),
        ({"negligible_ratio": math.nan}, ValueError, "negligible_ratio must be .* got nan"),
        ({"block_q": 0}, ValueError, "block_q must be an int >= 1, got 0"),
        ({"block_k": -3}, ValueError, "block_k must be an int >= 1, got -3"),
        ({"block_k": 8.0}, TypeError, "block_k must be an int >= 1, got 8.0 of type float"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number > 0, got inf"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number > 0, got nan"),
        ({"scale": "1"}, TypeError, "scale must be a finite number > 0, got '1' of type str"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be one of 'softmax', 'elu', 'relu' or a callable"),
        ({"feature_map": "hedgehog"}, ValueError, "'hedgehog' has weights, so SparseLinearAttention owns it"),
        ({"feature_map": 3}, TypeError, "feature_map must be a name or a callable, got int"),
        (
            {"feature_map": lambda x: x[..., :2]},
            ValueError,
            r"feature_map must keep the shape of query \(1, 2, 30, 4\)",
        ),
        ({"feature_map": lambda x: 1}, TypeError, "feature_map must return a torch.Tensor, got int for query"),
        ({"block_map": "no"}, TypeError, "block_map must be a sla_ref.BlockMap, got str"),
        ({"block_map": MAP, "critical_ratio": 0.5}, ValueError, "critical_ratio must not be given beside a block_map"),
        (
            {"block_map": MAP, "negligible_ratio": 0.5},
            ValueError,
            "negligible_ratio must not be given beside a block_map",
        ),
        ({"block_map": MAP, "block_q": 8}, ValueError, "block_q must not be given beside a block_map"),
        ({"block_map": MAP, "block_k": 8}, ValueError, "block_k must not be given beside a block_map"),
        (
            {"block_map": sla_ref.classify_blocks(Q[:, :, :9], Q, block_q=8, block_k=8)},
            ValueError,
            r"block_map must be for \(batch, heads, Nq, Nk\) = \(1, 2, 30, 30\), got one for \(1, 2, 9, 30\)",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'triton', 'numba', got 'cuda'"),
        ({"backend": 1}, TypeError, "backend must be a string, got int"),
    ],
)
def test_bad_input(changes, error, message, monkeypatch):
    def no_kernel_may_start(*args):
        raise AssertionError("a kernel was started on bad input")

    monkeypatch.setattr(backends.load("torch"), "forward", no_kernel_may_start)
    with pytest.raises(error, match=message):
        sla_ref.sparse_linear_attention(**{"query": Q, "key": Q, "value": Q} | changes)


def test_bad_input_of_classify_blocks():
    with pytest.raises(ValueError, match="critical_ratio must be"):
        sla_ref.classify_blocks(Q, Q, 0.0)
    with pytest.raises(ValueError, match="block_q must be"):
        sla_ref.block_scores(Q, Q, block_q=0)
    with pytest.raises(ValueError, match="key must have query's head_dim"):
        sla_ref.block_scores(Q, Q[..., :1])


# --- one operator ----------------------------------------------------------------------------------------------------


def operator_arguments(dtype: torch.dtype = torch.float64):
    problem = testing.make_problem(query_length=20, head_dim=4, block_q=8, block_k=8, dtype=torch.float32).to(dtype)
    inputs = tuple(tensor.requires_grad_() for tensor in problem.inputs)
    return (*inputs, problem.block_map.labels, problem.block_map._num_critical, 8, 8, problem.scale, "torch")


def test_opcheck():
    arguments = operator_arguments(torch.float32)
    torch.library.opcheck(_forward, arguments)
    with torch.no_grad():
        saved = _forward(*arguments)
    grads = tuple(torch.randn_like(saved[0]) for _ in range(2))
    torch.library.opcheck(_backward, (*grads, *(t.detach() for t in arguments[:5]), *saved, *arguments[5:]))


def test_gradcheck():
    arguments = operator_arguments()
    assert torch.autograd.gradcheck(lambda *inputs: _forward(*inputs, *arguments[5:])[:2], arguments[:5])


def test_gradcheck_through_classification_and_feature_map():
    def function(*inputs):
        return sla_ref.sparse_linear_attention(*inputs, feature_map="elu", **SMALL)[:2]

    assert torch.autograd.gradcheck(function, qkv())


def test_second_derivative_is_refused_in_words():
    query, key, value = qkv()
    out = sla_ref.sparse_linear_attention(query, key, value, **SMALL)
    (first,) = torch.autograd.grad(out.sparse.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), query)


def test_lse_is_not_differentiable():
    out = sla_ref.sparse_linear_attention(*qkv(), **SMALL)
    assert not out.lse.requires_grad
    assert out.sparse.requires_grad


def test_one_output_alone_can_be_differentiated():
    inputs = qkv()
    out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    alone = torch.autograd.grad(out.linear.sum(), inputs)
    out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    both = torch.autograd.grad(out.linear.sum() + 0 * out.sparse.sum(), inputs)
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other)


def test_scale_default_and_given():
    inputs = qkv()
    default = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    assert torch.equal(default.sparse, sla_ref.sparse_linear_attention(*inputs, scale=0.5, **SMALL).sparse)
    other = sla_ref.sparse_linear_attention(*inputs, scale=1.0, **SMALL)
    assert not torch.allclose(default.sparse, other.sparse)
    assert torch.equal(default.linear, other.linear)


def test_nothing_quadratic_is_kept_for_the_backward():
    """Kept: the five inputs, both outputs, lse and the labels."""
    inputs = tuple(torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sla_ref.sparse_linear_attention(*inputs, **SMALL)
    assert max(sizes) == 64 * 64, "the labels, one per pair of blocks"
    assert sum(size >= 512 * 4 for size in sizes) <= 5 + 2 + 1 + 2, "plus the feature map's own two"


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_if_the_inputs_had_its_dtype(dtype):
    inputs = qkv(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
        inside = gradients(out, inputs)
    outside = gradients(out_again := sla_ref.sparse_linear_attention(*(t.to(dtype) for t in inputs), **SMALL), inputs)
    assert out.sparse.dtype == out.linear.dtype == dtype
    assert out.lse.dtype == torch.float32
    assert torch.equal(out.sparse, out_again.sparse)
    assert torch.equal(out.linear, out_again.linear)
    assert torch.equal(out.lse, out_again.lse), "a product inside must not become half precision unseen"
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_backward_runs_with_autocast_off():
    """Same bits whether or not the backward is called inside autocast."""
    problem = testing.make_problem(query_length=40, head_dim=8, block_q=8, block_k=8)
    leaves = [tensor.requires_grad_() for tensor in problem.inputs]
    tail = (problem.block_map.labels, None, 8, 8, problem.scale, "torch")
    outside = torch.autograd.grad(_forward(*leaves, *tail)[0].sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(_forward(*leaves, *tail)[0].sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sla_ref.sparse_linear_attention(*qkv(), **SMALL).sparse.dtype == torch.float64


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_compile_fullgraph_forward_and_backward_with_dynamic_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: sla_ref.sparse_linear_attention(q, k, v, **SMALL),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for length in (30, 64, 47):
        inputs = tuple(tokens(length, seed=seed).requires_grad_() for seed in range(3))
        expected = sla_ref.sparse_linear_attention(*inputs, **SMALL)
        out = compiled(*inputs)
        torch.testing.assert_close(out.sparse, expected.sparse)
        torch.testing.assert_close(out.linear, expected.linear)
        for one, other in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_compile_takes_a_map_built_by_hand():
    torch._dynamo.reset()
    block_map = sla_ref.BlockMap(torch.randint(-1, 2, (1, 2, 4, 4), dtype=torch.int8), 8, 8, 30, 30)
    compiled = torch.compile(sla_ref.sparse_linear_attention, fullgraph=True, backend="aot_eager")
    inputs = qkv()
    expected = sla_ref.sparse_linear_attention(*inputs, block_map=block_map)
    torch.testing.assert_close(compiled(*inputs, block_map=block_map).sparse, expected.sparse)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compile_with_inductor():
    need_program("inductor", "g++")
    torch._dynamo.reset()
    layer = sla_ref.SparseLinearAttention(16, 0.3, 0.3, block_q=8, block_k=8)
    torch.nn.init.normal_(layer.proj_l.weight)
    inputs = tuple(torch.randn(1, 2, 50, 16, requires_grad=True) for _ in range(3))
    expected, out = layer(*inputs), torch.compile(layer, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


class Spy:
    """The torch backend under another name, counting its calls and the threads they came from."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.torch = backends.load("torch")

    def unavailable(self):
        return None

    def unsupported(self, query, block_map):
        return None

    def forward(self, *args):
        self.calls.append("forward")
        return self.torch.forward(*args)

    def backward(self, *args):
        self.calls.append("backward")
        return self.torch.backward(*args)


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    spy = Spy()
    sla_ref.register_backend("spy", spy)
    return spy


def test_a_compiled_function_follows_a_later_change_of_backend(spy):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: sla_ref.sparse_linear_attention(q, k, v, **SMALL), fullgraph=True, backend="aot_eager"
    )
    inputs = tuple(t.detach() for t in qkv())
    compiled(*inputs)
    assert spy.calls == []
    with sla_ref.use_backend("spy"):
        compiled(*inputs)
    assert spy.calls == ["forward"]
    sla_ref.set_backend("spy")
    compiled(*inputs)
    assert spy.calls == ["forward", "forward"]
    sla_ref.reset_backend()
    compiled(*inputs)
    assert spy.calls == ["forward", "forward"]


def test_the_backward_runs_on_the_backend_of_its_forward(spy):
    inputs = qkv()
    with sla_ref.use_backend("spy"):
        out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    gradients(out, inputs)
    assert spy.calls == ["forward", "backward"]
    out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    with sla_ref.use_backend("spy"):
        gradients(out, inputs)
    assert spy.calls == ["forward", "backward"]


def test_precedence_call_module_with_set(spy, monkeypatch):
    names = []
    monkeypatch.setattr(backends, "choose", lambda name, *rest: names.append(name) or backends.load("torch"))
    q = Q.detach()
    layer = sla_ref.SparseLinearAttention(4, block_q=8, block_k=8, backend="spy").double()
    plain = sla_ref.SparseLinearAttention(4, block_q=8, block_k=8).double()
    monkeypatch.setattr(backends, "_from_environment", "environment")
    sla_ref_calls = [
        lambda: plain(q, q, q),
        lambda: sla_ref.set_backend("torch"),
        lambda: plain(q, q, q),
        lambda: sla_ref.reset_backend(),
        lambda: layer(q, q, q),
        lambda: sla_ref.sparse_linear_attention(q, q, q, backend="torch"),
    ]
    monkeypatch.setattr(backends, "require_known", lambda name: None)
    for call in sla_ref_calls:
        call()
    assert names == ["environment", "torch", "spy", "torch"]
    names.clear()
    sla_ref.set_backend("torch")
    with sla_ref.use_backend("spy"):
        plain(q, q, q)
        with sla_ref.use_backend("torch"):
            plain(q, q, q)
        plain(q, q, q)
    assert names == ["spy", "torch", "spy"]


def test_use_backend_holds_for_its_thread_only(spy):
    seen = []
    with sla_ref.use_backend("spy"):
        thread = threading.Thread(target=lambda: seen.append(sla_ref.get_backend()))
        thread.start()
        thread.join()
        assert sla_ref.get_backend() == "spy"
    assert seen == ["auto"]
    assert sla_ref.get_backend() == "auto"
