"""The public function: what it refuses, and that autograd, autocast and compilers treat it as one operator."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch.func import grad, jacfwd, jvp, linearize, vmap

import sla_ref
from sla_ref import backends, block_map, reference, testing
from sla_ref.protocol import Gradients, SavedLayer

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
        ({"key": Q.to_sparse()}, TypeError, "key must be a dense tensor .*, got layout torch.sparse_coo"),
        ({"query": Q.float().to_mkldnn()}, TypeError, "query must be a dense tensor .*, got layout torch._mkldnn"),
        (
            {"value": torch.nested.nested_tensor([Q[0], Q[0]], layout=torch.jagged)},
            TypeError,
            "value must be a dense tensor .*, got layout nested",
        ),
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
        ({"scale": 10**400}, ValueError, "scale must be a finite number > 0, got an int beyond 64 bits"),
        ({"block_q": 2**63}, ValueError, "block_q must be an int >= 1, got an int beyond 64 bits"),
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
        ({"feature_map": torch.Tensor.cfloat}, TypeError, "feature_map must return float16, .*, got torch.complex64"),
        ({"feature_map": lambda x: x > 0}, TypeError, "feature_map must return float16, .*, got torch.bool"),
        ({"feature_map": lambda x: x.to("meta")}, ValueError, "must stay on query's device cpu, it returned meta"),
        ({"feature_map": torch.Tensor.to_sparse}, TypeError, "feature_map's result must be a dense tensor"),
        ({"feature_map": torch.Tensor.relu_, "query": Q.clone()}, ValueError, "it changed query in place"),
        ({"block_map": "no"}, TypeError, "block_map must be a sla_ref.BlockMap, got str"),
        ({"block_map": MAP, "critical_ratio": 0.5}, ValueError, "critical_ratio must not be given with a block_map"),
        (
            {"block_map": MAP, "negligible_ratio": 0.5},
            ValueError,
            "negligible_ratio must not be given with a block_map",
        ),
        ({"block_map": MAP, "block_q": 8}, ValueError, "block_q must not be given with a block_map"),
        ({"block_map": MAP, "block_k": 8}, ValueError, "block_k must not be given with a block_map"),
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


# --- one operator ----------------------------------------------------------------------------------------------------


forward, backward, labels = (getattr(torch.ops.sla_ref, name).default for name in ("forward", "backward", "labels"))


def operator_arguments(*, inside: bool = False, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of `forward` for a map whose rows differ; `inside` leaves phi = softmax to the operator."""
    problem = testing.make_problem(query_length=20, head_dim=4, block_q=8, block_k=8, labels="random").to(dtype)
    *tensors, block_map, scale = problem.inputs
    tensors[3:] = (None, None) if inside else tensors[3:]
    leaves = [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors]
    options = (block_map.max_critical, block_map.is_uniform, block_map.has_marginal, 8, 8, scale, "torch")
    return (*leaves, block_map.labels, *options)


@pytest.mark.parametrize("inside", [False, True], ids=["phi outside", "softmax inside"])
def test_opcheck(inside):
    tensors, options = operator_arguments(inside=inside)[:6], operator_arguments(inside=inside)[6:]
    detached = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    torch.library.opcheck(labels, (*detached[:2], 1, 1, 8, 8))
    torch.library.opcheck(forward, (*detached, *options))
    saved = forward(*detached, *options)
    grads = [torch.randn_like(output) for output in saved]
    for grad_lse in (grads[2], None):
        torch.library.opcheck(backward, (*grads[:2], grad_lse, *detached[:5], *saved, detached[5], *options))


def test_compilers_are_told_the_dtypes_of_results():
    """lse is float32 for half precision, and gradients are not."""
    tensors, options = operator_arguments(dtype=torch.bfloat16)[:6], operator_arguments()[6:]
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(forward, (*detached, *options), test_utils="test_faketensor")
    saved = forward(*detached, *options)
    arguments = (*saved, *detached[:5], *saved, detached[5], *options)
    torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


def test_features_of_another_dtype_are_cast():
    inputs = qkv(torch.float32)
    expected, found = (
        sla_ref.sparse_linear_attention(*inputs, feature_map=phi, **SMALL)
        for phi in (lambda x: x.double().softmax(-1).float(), lambda x: x.double().softmax(-1))
    )
    assert torch.equal(found.linear, expected.linear)
    assert all(map(torch.equal, gradients(found, inputs), gradients(expected, inputs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_backend_gets_the_default_features_in_single_precision(dtype, monkeypatch):
    """Features of half precision are worth a rounding error more."""
    backend, seen = backends.load("torch"), []
    original = backend.forward
    monkeypatch.setattr(backend, "forward", lambda inputs: seen.append(inputs) or original(inputs))
    sla_ref.sparse_linear_attention(Q.to(dtype), 2 * Q.to(dtype), Q.to(dtype), **SMALL, backend="torch")
    assert torch.equal(seen[0].phi_query, Q.to(dtype).float().softmax(-1))
    assert torch.equal(seen[0].phi_key, (2 * Q.to(dtype)).float().softmax(-1))


def test_gradients_through_the_operators_softmax_have_the_inputs_dtype():
    problem = testing.make_problem(query_length=20, head_dim=4, block_q=8, block_k=8, dtype=torch.bfloat16)
    found = testing.run_backend(backends.load("torch"), problem.default_phi())
    assert {found[f"grad_{name}"].dtype for name in ("query", "key", "value")} == {torch.bfloat16}


@pytest.mark.parametrize("result", ["an argument", "one tensor twice"])
def test_results_that_share_memory_are_refused(result, monkeypatch):
    """Compilers take the results of an operator for tensors of their own."""
    backend = backends.load("torch")
    original = backend.forward

    def forward(inputs):
        saved = original(inputs)
        return saved._replace(out_linear=inputs.query if result == "an argument" else saved.out_sparse)

    monkeypatch.setattr(backend, "forward", forward)
    with pytest.raises(RuntimeError, match="sla_ref::forward must return new tensors"):
        sla_ref.sparse_linear_attention(Q, Q, Q, backend="torch")


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_gradcheck_through_all_three_outputs(feature_map):
    def function(*inputs):
        return sla_ref.sparse_linear_attention(*inputs, feature_map=feature_map, **SMALL)

    inputs = tuple(tokens(20, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lse_of_a_row_without_critical_key_has_no_gradient(bad):
    """There lse is the constant -inf. Whatever a loss computes from it must not reach any gradient."""
    labels = torch.ones(1, 2, 4, 4, dtype=torch.int8)
    labels[:, :, 1] = 0
    inputs = qkv()
    out = sla_ref.sparse_linear_attention(*inputs, block_map=sla_ref.BlockMap(labels, 8, 8, 30, 30))
    assert (out.lse[:, :, 8:16] == -math.inf).all()
    incoming = torch.ones_like(out.lse)
    incoming[:, :, 8:16] = bad
    (dq, dk, _) = torch.autograd.grad(out.lse, inputs, incoming, allow_unused=True)
    assert not dq[:, :, 8:16].any() and dq.any()
    assert dq.isfinite().all() and dk.isfinite().all()


def test_second_derivative_is_refused_in_words():
    query, key, value = qkv()
    out = sla_ref.sparse_linear_attention(query, key, value, **SMALL)
    (first,) = torch.autograd.grad(out.sparse.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), query)


@pytest.mark.parametrize("name", ["sparse", "linear", "lse"])
def test_one_output_alone_can_be_differentiated(name):
    inputs = qkv()
    out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    alone = torch.autograd.grad(getattr(out, name).sum(), inputs)
    out = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    everything = getattr(out, name).sum() + 0 * sum(output.sum() for output in out)
    for one, other in zip(alone, torch.autograd.grad(everything, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_tensors_that_do_not_fit_each_other_or_the_map_are_refused():
    with pytest.raises(TypeError, match=r"key must have query's dtype torch\.float64, got torch\.float32"):
        sla_ref.sparse_linear_attention(Q, Q.float(), Q, block_map=MAP)
    with pytest.raises(ValueError, match="block_map must be on query's device cpu, got meta"):
        sla_ref.sparse_linear_attention(Q, Q, Q, block_map=MAP.to("meta"))


def test_in_inference_mode_a_feature_map_that_works_in_place_changes_nothing():
    """There torch does not count the changes of a tensor, so this one could not be refused."""
    with torch.inference_mode():
        query, key, value = (tokens(seed=seed) for seed in range(3))
        before = query.clone(), key.clone()
        blocks = {"block_q": 8, "block_k": 8}
        out = sla_ref.sparse_linear_attention(query, key, value, feature_map=torch.nn.ReLU(inplace=True), **blocks)
        expected = sla_ref.sparse_linear_attention(query, key, value, feature_map="relu", **blocks)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])
    assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_bits_are_the_same(context):
    inputs = qkv()
    layer = sla_ref.SparseLinearAttention(4, 0.3, 0.3, block_q=8, block_k=8, proj_init="identity").double()
    for run in (layer, lambda *qkv: torch.cat(sla_ref.sparse_linear_attention(*qkv, **SMALL)[:2])):
        with context():
            found = run(*inputs)
        assert not found.requires_grad and torch.equal(found, run(*inputs))


def test_scale_default_and_given():
    inputs = qkv()
    default = sla_ref.sparse_linear_attention(*inputs, **SMALL)
    assert torch.equal(default.sparse, sla_ref.sparse_linear_attention(*inputs, scale=0.5, **SMALL).sparse)
    other = sla_ref.sparse_linear_attention(*inputs, scale=1.0, **SMALL)
    assert not torch.allclose(default.sparse, other.sparse)
    assert torch.equal(default.linear, other.linear)


def test_nothing_quadratic_is_kept_for_the_backward():
    """The five inputs, both outputs, lse and the labels are kept."""
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
    """The bits are the same whether or not forward and backward are called inside autocast."""
    tensors, rest = operator_arguments()[:5], operator_arguments()[5:]
    arguments = [tensor.detach() for tensor in tensors], rest

    def both() -> list[torch.Tensor]:
        saved = forward(*arguments[0], *arguments[1])
        return [*saved, *backward(saved[0], saved[1], saved[2], *arguments[0], *saved, *arguments[1])]

    outside = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = both()
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sla_ref.sparse_linear_attention(*qkv(), **SMALL).sparse.dtype == torch.float64


# --- torch.func ------------------------------------------------------------------------------------------------------


def loss(query, key, value):
    out = sla_ref.sparse_linear_attention(query, key, value, **SMALL)
    return out.sparse.square().sum() + out.linear.sum() + out.lse.sum()


def samples(seed: int) -> torch.Tensor:
    """Three samples of a batch of two: the sizes differ to tell the two axes apart."""
    return torch.stack([torch.cat([tokens(seed=seed + 2 * i), tokens(seed=seed + 2 * i + 1)]) for i in range(3)])


def test_vmap_and_gradients_of_samples():
    """Each sample is computed as if it were the only one; a key that all share gets the gradients of all."""
    queries, values = samples(0), samples(10)
    key = samples(20)[0]
    got = vmap(lambda q, v: sla_ref.sparse_linear_attention(q, key, v, **SMALL))(queries, values)
    each = [sla_ref.sparse_linear_attention(q, key, v, **SMALL) for q, v in zip(queries, values, strict=True)]
    for name in sla_ref.SLAOutput._fields:
        torch.testing.assert_close(getattr(got, name), torch.stack([getattr(out, name) for out in each]))

    leaves = [
        (q.requires_grad_(), key.clone().requires_grad_(), v) for q, v in zip(queries.clone(), values, strict=True)
    ]
    wanted = [torch.autograd.grad(loss(*leaf), leaf[:2]) for leaf in leaves]
    torch.testing.assert_close(grad(loss)(queries[0], key, values[0]), wanted[0][0])
    dq, dk = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))(queries, key, values)
    torch.testing.assert_close(dq, torch.stack([each[0] for each in wanted]))
    torch.testing.assert_close(dk, torch.stack([each[1] for each in wanted]))
    total = grad(lambda k: vmap(loss, in_dims=(0, None, 0))(queries, k, values).sum())(key)
    torch.testing.assert_close(total, dk.sum(0))


def test_vmap_of_a_classification_and_of_its_map():
    queries, key = samples(0), samples(10)[0]
    maps = vmap(lambda q: sla_ref.classify_blocks(q, key, 0.3, 0.3, block_q=8, block_k=8))(queries)
    got = vmap(lambda q, m: sla_ref.sparse_linear_attention(q, key, key, block_map=m).sparse)(queries, maps)
    for query, labels_, out in zip(queries, maps.labels, got, strict=True):
        block_map = sla_ref.classify_blocks(query, key, 0.3, 0.3, block_q=8, block_k=8)
        assert torch.equal(block_map.labels, labels_)
        torch.testing.assert_close(out, sla_ref.sparse_linear_attention(query, key, key, block_map=block_map).sparse)


def test_under_vmap_samples_join_the_batch(spy, monkeypatch):
    """One call for all of them. Without a rule, torch would make one for each."""
    scored, original = [], block_map.block_scores
    monkeypatch.setattr(block_map, "block_scores", lambda *q_k, **sizes: scored.append(1) or original(*q_k, **sizes))
    with sla_ref.use_backend("spy"):
        vmap(grad(loss))(samples(0), samples(10), samples(20))
    assert (scored, spy.calls) == ([1], ["forward", "backward"])


# torch's own, when its forward mode is first used
no_jit_warning = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def dual(function, query, tangent):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(query, tangent))


@no_jit_warning
@pytest.mark.parametrize(
    "run",
    [
        lambda f, q: jvp(f, (q,), (q,)),
        lambda f, q: jacfwd(lambda s: f(s * q))(torch.tensor(1.0, dtype=q.dtype)),
        lambda f, q: linearize(f, q),
        lambda f, q: dual(f, q, q),
        lambda f, q: dual(f, q.clone().requires_grad_(), q),
        lambda f, q: dual(torch.no_grad()(f), q, q),
    ],
    ids=["jvp", "jacfwd", "linearize", "forward_ad", "forward_ad, requires_grad", "forward_ad, no_grad"],
)
def test_forward_mode_is_refused_in_words(run):
    """A backend cannot carry tangents, and a tangent of zero would be silently wrong."""
    with pytest.raises(RuntimeError, match="sparse_linear_attention has no forward-mode derivative"):
        run(lambda q: sla_ref.sparse_linear_attention(q, Q, Q, **SMALL).sparse, Q)


@no_jit_warning
def test_the_second_derivative_of_torch_func_is_refused_in_words():
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda q: grad(loss)(q, Q, Q).square().sum())(Q)


# --- blocks longer than the sequence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [31, 2**63 - 1])
def test_a_block_takes_no_more_room_than_its_tokens(block):
    inputs = qkv()
    wide = sla_ref.sparse_linear_attention(*inputs, block_q=block, block_k=block)
    fitting = sla_ref.sparse_linear_attention(*inputs, block_q=30, block_k=30)
    features = [tensor.softmax(-1) for tensor in inputs[:2]]
    block_map = sla_ref.classify_blocks(*inputs[:2], block_q=block, block_k=block)
    specified = reference.sparse_linear_attention(*inputs, *features, block_map.labels, block, block, 0.5)
    for one, other, third in zip(wide, fitting, specified, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third)
    assert all(map(torch.equal, gradients(wide, inputs), gradients(fitting, inputs)))
    assert block_map.to_dense().shape == (1, 2, 30, 30)


# --- choosing a backend ----------------------------------------------------------------------------------------------


class Spy:
    """The torch backend under another name, counting its calls and the threads they came from."""

    name = "spy"  # without softmax_inside and proj_inside: False if missing

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


@pytest.mark.parametrize("whole", [False, True], ids=["function", "layer"])
def test_one_tensor_as_query_key_and_value_compiles(whole):
    """A compiler does not follow an autograd.Function that gets one tensor twice."""
    torch._dynamo.reset()
    layer = sla_ref.SparseLinearAttention(4, 0.3, 0.3, block_q=8, block_k=8, proj_init="identity").double()
    x = tokens().requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer(x, x, x) if whole else sum(sla_ref.sparse_linear_attention(x, x, x, **SMALL)[:2])

    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), x) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


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


@pytest.mark.parametrize("function", ["forward", "backward", "forward_layer", "backward_layer"])
def test_what_a_backend_returns_is_checked(function, spy):
    layer = sla_ref.SparseLinearAttention(4, block_q=8, block_k=8, backend="spy")
    if function.endswith("layer"):
        spy.proj_inside = True
        spy.forward_layer = lambda inputs, proj: SavedLayer(torch.zeros_like(inputs.query), torch.zeros(1, 2, 30))
    setattr(spy, function, lambda *_: (None, None))
    with pytest.raises(TypeError, match=r"backend 'spy': (for|back)ward(_layer)? must return a sla_ref\.protocol\."):
        layer(*qkv(torch.float32)).sum().backward()


def test_a_backend_gets_proj_in_contiguous_memory(spy):
    layer = sla_ref.SparseLinearAttention(4, block_q=8, block_k=8, backend="spy")
    layer.proj_l.weight = torch.nn.Parameter(torch.randn(4, 4).mT)
    layer.proj_l.bias = torch.nn.Parameter(torch.randn(8)[::2])
    seen, spy.proj_inside = [], True

    def forward_layer(inputs, proj):
        seen.append(proj)
        return SavedLayer(torch.zeros_like(inputs.query), torch.zeros(1, 2, 30))

    def backward_layer(grad_out, inputs, proj, saved):
        seen.append(proj)
        tensors = (inputs.query, inputs.key, inputs.value, inputs.phi_query, inputs.phi_key)
        return Gradients(*map(torch.zeros_like, tensors)), proj

    spy.forward_layer, spy.backward_layer = forward_layer, backward_layer
    layer(*qkv(torch.float32)).sum().backward()
    assert len(seen) == 2
    for proj in seen:
        assert proj.weight.is_contiguous() and proj.bias.is_contiguous()
        assert torch.equal(proj.weight, layer.proj_l.weight) and torch.equal(proj.bias, layer.proj_l.bias)


def test_a_backend_is_asked_about_the_same_map_without_data(spy):
    """Under a compiler, too, which has to know what the layer's operator returns."""
    seen, spy.unsupported = set(), lambda query, block_map: seen.add((block_map.query_length, block_map.key_length))
    layer = sla_ref.SparseLinearAttention(4, block_q=8, block_k=8, backend="spy")
    for device in ("cpu", "meta"):
        query, key = torch.randn(1, 2, 30, 4, device=device), torch.randn(1, 2, 20, 4, device=device)
        assert layer.to(device)(query, key, key).shape == (1, 2, 30, 4)
    assert seen == {(30, 20)}


def test_a_backend_is_told_that_nothing_was_made_of_lse(spy):
    """It need not read a gradient of zeros then."""
    seen, original = [], spy.backward
    spy.backward = lambda *args: seen.append(args[2]) or original(*args)
    inputs = qkv()
    out = sla_ref.sparse_linear_attention(*inputs, backend="spy", **SMALL)
    gradients(out, inputs)
    sla_ref.sparse_linear_attention(*inputs, backend="spy", **SMALL).lse.sum().backward()
    assert seen[0] is None and seen[1] is not None


class Dropped(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_comes_of_none(spy):
    layer = sla_ref.SparseLinearAttention(4, block_q=8, block_k=8, backend="spy").double()
    wanted = (*(inputs := qkv()), *layer.parameters())
    assert torch.autograd.grad(Dropped.apply(layer(*inputs)).sum(), wanted, allow_unused=True) == (None,) * 5
    assert spy.calls == ["forward"]


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
