"""What is particular to the Triton kernels; that they are right is checked with all backends in test_backends.py.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from faults import Fault, with_fault

from sla_ref import backends, testing
from sla_ref.block_map import BlockMap
from sla_ref.protocol import Inputs

pytestmark = pytest.mark.backend("triton")
pytest.importorskip("triton")
if (reason := backends.list_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)
triton = backends.load("triton")
labels, launch, linear, tokens = triton.labels, triton.launch, triton.linear, triton.tokens

SIZES = {"query_length": 70, "key_length": 150, "head_dim": 16, "heads": 1}
SMALL = {**SIZES, "block_q": 32, "block_k": 32, "labels": "random"}
"""A problem with a partial last block on both sides, and rows with every number of critical blocks from none to all."""


def run(problem: testing.Problem) -> testing.Results:
    return testing.run_backend(triton, problem)


def run_default_phi(problem: testing.Problem) -> testing.Results:
    return run(problem.default_phi())


def assert_right(problem: testing.Problem, results: testing.Results | None = None) -> None:
    exact = testing.oracle(problem)
    testing.assert_within(results or run(problem), exact, testing.error_budget(problem, exact))


def same_bits(one: testing.Results, other: testing.Results) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the checker is checked: a fault planted in each kernel is caught -------------------------------------------------

FAULTS = {
    "lists: a critical block is dropped": Fault(
        "labels.py",
        "lists_kernel",
        "critical = (label == IS_CRITICAL)",
        "critical = (label == IS_CRITICAL) & (inner > 0)[None, :]",
        "sparse",
    ),
    "lists: negligible counts as critical": Fault(
        "labels.py",
        "lists_kernel",
        "critical = (label == IS_CRITICAL)",
        "critical = (label != IS_MARGINAL)",
        "sparse",
    ),
    "weights: negligible counts as marginal": Fault(
        "labels.py",
        "weights_kernel",
        "tl.where(label == IS_MARGINAL, weight",
        "tl.where(label <= IS_MARGINAL, weight",
        "linear",
    ),
    "states: Z is skipped": Fault(
        "linear.py",
        "states_kernel",
        "COLUMNS * COLUMNS + columns, z, plan)",
        "COLUMNS * COLUMNS + columns, 0 * z, plan)",
        "linear",
    ),
    "states: h counts twice, z once": Fault(
        "linear.py", "states_kernel", "tl.where(good == 1, dot(", "tl.where(good == 1, 2 * dot(", "linear"
    ),
    "sums: the weights of another block": Fault(
        "linear.py", "sums_kernel", "inner[None, :] * in_stride", "(inner ^ 1)[None, :] * in_stride", "linear"
    ),
    "softmax: the tail is not masked": Fault("sparse.py", "scores", "    if PARTIAL:", "    if False:", "sparse"),
    "softmax: O is not rescaled": Fault("sparse.py", "softmax_step", "run.O * shrink[:, None]", "run.O", "sparse"),
    "softmax: the largest score is not taken off": Fault(
        "sparse.py",
        "softmax_step",
        "tl.maximum(run.m, tl.max(S, 1))",
        "tl.zeros_like(run.m)",
        "sparse",
        {"spread": 100.0, "critical_ratio": 0.6},
    ),
    "softmax: lse in base 2": Fault(
        "sparse.py", "sparse_rows", "(run.m * scale + tl.log2(l)) * LN_2", "run.m * scale + tl.log2(l)", "lse"
    ),
    "linear rows: phi(Q) H is not divided": Fault(
        "linear.py", "linear_rows", "O / denominator[:, None]", "O", "linear"
    ),
    "dq: Ds is forgotten": Fault("sparse.py", "dq_step", "(dP - rows.Ds[:, None])", "dP", "grad_query"),
    "dq: the gradient of lse is forgotten": Fault(
        "sparse.py", "dq_kernel", "Ds -= tl.load(grad_lse", "_ = tl.load(grad_lse", "grad_query"
    ),
    "dkdv: scale is forgotten in dK": Fault("sparse.py", "dkdv_kernel", "dK *= scale", "dK *= 1", "grad_key"),
    "dkdv: dV is overwritten": Fault(
        "sparse.py", "dkdv_kernel", "dV += load_slab(grad_value,", "_ = load_slab(grad_value,", "grad_value"
    ),
    "dkdv: one query block too few": Fault(
        "sparse.py", "dkdv_kernel", "- start) * STEPS", "- start) * STEPS - 1", "grad_key"
    ),
    "grad sums: Z is skipped in dQ^phi": Fault(
        "linear.py", "grad_sums_kernel", "- Dl[:, None] * Z[None, :]", "", "grad_phi_query"
    ),
    "grad sums: dZ has the wrong sign": Fault(
        "linear.py", "grad_sums_kernel", "dZ = -tl.sum(", "dZ = tl.sum(", "grad_phi_key"
    ),
    "grad keys: dz is skipped": Fault("linear.py", "grad_keys_kernel", "+ dz[None, :]", "", "grad_phi_key"),
}
DEFAULT_PHI_FAULTS = {  # the same, where the kernels compute phi by themselves
    "phi: keys past the end have features": Fault(
        "tokens.py",
        "load_phi",
        "tl.where((phi.first + tl.arange(0, ROWS) < phi.tokens.length)[:, None], tile, 0.0)",
        "tile",
        "linear",
    ),
    "phi: features that are padding count": Fault(
        "tokens.py",
        "exponentials",
        'tl.where((feature + tl.arange(0, FEATURES) < head.D)[None, :], x, float("-inf"))',
        "x",
        "linear",
    ),
    "grad sums: the gradient of softmax is skipped": Fault(
        "linear.py", "grad_sums_kernel", "weight if plan.SOFTMAX else", "", "grad_query"
    ),
    "grad keys: phi . dphi is forgotten": Fault(
        "linear.py", "grad_keys_kernel", "(dphi - along[:, None])", "dphi", "grad_key"
    ),
    "float16: the states have its range": Fault(
        "launch.py",
        "__init__",
        "torch.float32 if self.tf32 else query.dtype",
        "query.dtype",
        "linear",
        {"spread": 20.0, "dtype": torch.float16},
    ),
    "dq: the linear branch's share is overwritten": Fault(
        "sparse.py", "dq_kernel", "dQ += load_slab(grad_query", "_ = load_slab(grad_query", "grad_query"
    ),
    "dkdv: the linear branch's share is overwritten": Fault(
        "sparse.py", "dkdv_kernel", "dK += load_slab(grad_key", "_ = load_slab(grad_key", "grad_key"
    ),
}


def assert_caught(problem: testing.Problem, fault: Fault, tmp_path) -> None:
    results = testing.run_backend(with_fault(triton, tmp_path, fault), problem)
    with pytest.raises(AssertionError, match=rf"FAIL {fault.where} "):
        assert_right(problem, results)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path, device: str) -> None:
    assert_caught(testing.make_problem(**SMALL, device=device), FAULTS[fault], tmp_path)


@pytest.mark.parametrize("fault", DEFAULT_PHI_FAULTS)
def test_planted_fault_in_the_form_with_softmax_is_caught(fault: str, tmp_path, device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "head_dim": 24}, device=device).default_phi()
    assert_caught(problem, DEFAULT_PHI_FAULTS[fault], tmp_path)


def test_without_a_fault_all_is_right(tmp_path, device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    assert_right(problem, testing.run_backend(with_fault(triton, tmp_path, None), problem))


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_lists_are_those_of_the_map(case: testing.Case, device: str) -> None:
    """What the kernels walk is what `BlockMap` shows."""
    block_map = testing.make_problem(**case.arguments, device=device).inputs.block_map
    counts, kv_indices = labels.key_lists(block_map)
    offsets, q_indices = labels.query_lists(block_map)
    assert torch.equal(counts, block_map.kv_num_blocks)
    assert torch.equal(offsets, block_map.q_offsets)
    assert kv_indices.shape == block_map.kv_indices.shape and q_indices.shape == block_map.q_indices.shape
    listed = torch.arange(block_map.max_critical, device=device) < counts[..., None]
    assert torch.equal(kv_indices[listed], block_map.kv_indices[listed])
    listed = torch.arange(q_indices.shape[-1], device=device) < offsets[..., -1:]
    assert torch.equal(q_indices[listed], block_map.q_indices[listed])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_are_powers_of_two_near_one_over_the_number_of_marginal_blocks(dtype: torch.dtype, device: str) -> None:
    block_map = testing.make_problem(**{**SMALL, "key_length": 1500}, device=device).inputs.block_map
    marginal = (block_map.labels == 0).flatten(0, 1)
    weights = labels.marginal_weights(block_map, dtype)
    rows, columns = marginal.shape[1:]
    assert not weights[:, rows:].any() and not weights[:, :, columns:].any()
    weights = weights[:, :rows, :columns]
    assert torch.equal(weights != 0, marginal)
    mantissa, _ = torch.frexp(weights[marginal].float())
    assert (mantissa == 0.5).all()
    mean = weights.float().sum(-1)
    assert ((mean >= 1) & (mean < 2) | ~marginal.any(-1)).all()


def test_tiles_read_by_descriptor_give_the_same_bits(monkeypatch) -> None:
    if not launch.INTERPRETED and not launch.reads_shared_memory():
        pytest.skip("on this GPU the kernels use no tensor memory accelerator")
    for dtype in (torch.float16, torch.bfloat16):
        problem = testing.make_problem(**SMALL, dtype=dtype, device="cpu" if launch.INTERPRETED else "cuda")
        runs = []
        for fit in (True, False):
            monkeypatch.setattr(tokens, "descriptors_fit", lambda *tensors, fit=fit: fit)
            runs.append(run(problem))
        assert_right(problem, runs[0])
        assert same_bits(*runs)


def test_heads_in_chunks(monkeypatch, device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "heads": 2}, device=device)
    whole = run(problem)
    monkeypatch.setattr(linear, "chunks_of_heads", lambda *args: [(0, 1), (1, 1)])
    assert same_bits(whole, run(problem))


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (16, 16)])
@pytest.mark.parametrize(("per_query_block", "tensors"), [(1, 4), (2, 2)])
def test_chunks_cover_all_heads_within_bounds(blocks: tuple[int, int], per_query_block: int, tensors: int) -> None:
    query = torch.empty(2, 12, 32760, 128, dtype=torch.bfloat16, device="meta")
    shape = (2, 12, *(math.ceil(32760 / block) for block in blocks))
    block_map = BlockMap(torch.empty(shape, dtype=torch.int8, device="meta"), *blocks, 32760, 32760, 25)
    call = launch.Call(Inputs(query, query, query, None, None, block_map, 1.0))
    chunks = linear.chunks_of_heads(call, per_query_block, tensors)
    assert [head for first, heads in chunks for head in range(first, first + heads)] == list(range(24))
    states = shape[3] + per_query_block * shape[2]
    assert chunks[0][1] * states * 130 * 128 <= tensors * query.numel()


# --- the contract's corners ------------------------------------------------------------------------------------------


def test_nan_goes_where_the_mathematics_puts_it(device: str) -> None:
    inputs = testing.make_problem(**{**SMALL, "heads": 1, "query_length": 96}, device=device).inputs
    labels = torch.tensor([[1, 0, -1, 0, 0], [0, 1, 0, -1, 0], [-1, -1, 1, 1, -1]], dtype=torch.int8, device=device)
    block_map = replace(inputs.block_map, labels=labels[None, None], num_critical=None)
    key, phi_key = inputs.key.clone(), inputs.phi_key.clone()
    key[0, 0, 40] = math.nan  # in key block 1: marginal to query block 0, critical to 1, negligible to 2
    phi_key[0, 0, 40] = math.inf
    saved = triton.forward(inputs._replace(key=key, phi_key=phi_key, block_map=block_map))
    row = torch.arange(96, device=device) // 32
    assert torch.equal(saved.out_linear[0, 0].isnan(), (row == 0)[:, None].expand(96, 16))
    assert torch.equal(saved.out_sparse[0, 0].isnan(), (row == 1)[:, None].expand(96, 16))
    assert torch.equal(saved.lse[0, 0].isnan(), row == 1)


def test_float16_holds_sums_that_would_overflow(device: str) -> None:
    """Sums of 3000 tokens with features and values near 10 pass float16's 65504; their mean does not."""
    problem = testing.make_problem(
        **{**SMALL, "key_length": 3000, "labels": "marginal", "feature_map": "relu"}, dtype=torch.float16, device=device
    )
    inputs = problem.inputs._replace(value=problem.inputs.value + 10, phi_key=10 * problem.inputs.phi_key)
    exact = testing.oracle(problem._replace(inputs=inputs))
    assert (triton.forward(inputs).out_linear.double() - exact["linear"]).abs().max() < 0.02


def test_any_strides(device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    inputs = problem.inputs
    features_first = [tensor.mT.contiguous().mT for tensor in inputs[:5]]  # the last dimension is not the dense one
    assert features_first[0].stride(3) != 1
    assert same_bits(run(problem), run(problem._replace(inputs=Inputs(*features_first, *inputs[5:]))))
    assert_right(problem._replace(inputs=inputs._replace(key=inputs.key[:, :, :1].expand_as(inputs.key))))


def test_huge_strides_between_tokens() -> None:
    view = torch.empty(1, device="meta").as_strided((1, 1, 4, 16), (1, 1, 2**24, 1))
    assert tokens.strided(view)[1:] == (0, 0, 16)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 160}, "head_dim"),
        ({"block_q": 48}, "block_q"),
        ({"block_k": 256}, "block_k"),
    ],
)
def test_says_what_it_cannot_take(change: dict, word: str, device: str) -> None:
    inputs = testing.make_problem(**{**SMALL, **change}, device=device).inputs
    assert word in triton.unsupported(inputs.query, inputs.block_map)
    with pytest.raises(ValueError, match=word):
        backends.choose("triton", inputs.query, inputs.block_map)


def test_takes_only_tensors_of_its_device() -> None:
    inputs = testing.make_problem(**SMALL).inputs
    assert "meta" in triton.unsupported(inputs.query.to("meta"), inputs.block_map)


def test_usable_without_gpu_only_in_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in triton.unavailable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 6 GB")
def test_more_than_two_to_the_31_elements() -> None:
    shape = (1, 2, 1_060_000, 1024)  # 2.2e9 elements; the 16 features in front of each row are used
    buffer = torch.zeros(shape, dtype=torch.float16, device="cuda")[..., :16]
    small = torch.randn(1, 2, 2000, 16, dtype=torch.float16, device="cuda")
    buffer[:, :, -2000:] = small
    labels = torch.randint(-1, 2, (1, 2, 16, 16), dtype=torch.int8, device="cuda")
    block_map = BlockMap(labels, 128, 128, 2000, 2000)
    far = triton.forward(Inputs(*[buffer[:, :, -2000:]] * 5, block_map, 0.25))
    near = triton.forward(Inputs(*[small] * 5, block_map, 0.25))
    assert torch.equal(far.out_sparse, near.out_sparse)
    assert torch.equal(far.out_linear, near.out_linear)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("default_phi", [False, True], ids=["phi given", "phi = softmax"])
def test_long_sequences_are_right_and_repeat(default_phi: bool, head_dim: int, block_q: int) -> None:
    """At Wan's length thousands of programs share the GPU: a race that small cases never lose shows here.

    The oracle would be N x N; the torch backend, on the same numbers in float32, stands in for it.
    """
    problem = testing.make_problem(
        heads=4,
        query_length=32760,
        head_dim=head_dim,
        block_q=block_q,
        critical_ratio=0.05,
        negligible_ratio=0.1,
        dtype=torch.bfloat16,
        device="cuda",
    )
    if default_phi:
        problem = problem.default_phi()
    first = run(problem)
    for _ in range(5):
        assert same_bits(first, run(problem))
    expected = testing.run_backend(backends.load("torch"), problem.to(torch.float32))
    for name, values in first.items():
        error = (values.float() - expected[name]).square().mean().sqrt()
        assert error <= 0.02 * expected[name].square().mean().sqrt(), name
