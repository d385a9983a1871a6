"""What is particular to the Triton kernels; that they are right is checked with all backends in test_backends.py.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from faults import with_fault

from sla_ref import backends, testing
from sla_ref.block_map import BlockMap

pytestmark = pytest.mark.backend("triton")
triton = pytest.importorskip("triton")
if (reason := backends.list_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)
triton_fused = backends.load("triton")

SIZES = {"query_length": 70, "key_length": 150, "head_dim": 16, "heads": 1}
SMALL = {**SIZES, "block_q": 32, "block_k": 32, "labels": "random"}
"""A problem with a partial last block on both sides, and rows with every number of critical blocks from none to all."""


def run(problem: testing.Problem) -> testing.Results:
    return testing.run_backend(triton_fused, problem)


def run_softmax(problem: testing.Problem) -> testing.Results:
    return testing.run_softmax(triton_fused, problem)


def assert_right(problem: testing.Problem, results: testing.Results | None = None) -> None:
    exact = testing.oracle(problem)
    testing.assert_within(results or run(problem), exact, testing.error_budget(problem, exact))


# --- the checker is checked: a fault planted in each kernel is caught -------------------------------------------------

FAULTS = {  # what is wrong: the line, what it becomes, a result in which it must show
    "lists: a critical block is dropped": (
        "critical = (label == 1)",
        "critical = (label == 1) & (inner > 0)[None, :]",
        "sparse",
    ),
    "lists: negligible counts as critical": ("critical = (label == 1)", "critical = (label != 0)", "sparse"),
    "weights: negligible counts as marginal": ("tl.where(label == 0, weight", "tl.where(label <= 0, weight", "linear"),
    "states: Z is skipped": (
        "COLUMNS * COLUMNS + columns, z.to(",
        "COLUMNS * COLUMNS + columns, (0 * z).to(",
        "linear",
    ),
    "states: h counts twice, z once": ("_dot(tl.trans(phi), V), 0.0)", "2 * _dot(tl.trans(phi), V), 0.0)", "linear"),
    "sums: the weights of another block": (
        "tl.load(weights + (out[:, None] * out_stride + inner[None, :] * in_stride))",
        "tl.load(weights + (out[:, None] * out_stride + (inner ^ 1)[None, :] * in_stride))",
        "linear",
    ),
    "forward: the tail is not masked": ("    if PARTIAL:", "    if False:", "sparse"),
    "forward: O is not rescaled": ("O * shrink[:, None])  # [Alg. 1 L11]", "O)  # [Alg. 1 L11]", "sparse"),
    "forward: lse in base 2": ("(m + tl.log2(l)) * LN_2", "(m + tl.log2(l))", "lse"),
    "forward: phi(Q) H is not divided": ("O / denominator[:, None])\n", "O)\n", "linear"),
    "dq: D^s is forgotten": ("dS = P * (dP - delta[:, None])", "dS = P * dP", "grad_query"),
    "dkdv: scale is forgotten in dK": ("dK *= scale", "dK *= 1", "grad_key"),
    "dkdv: dV is overwritten": ("    dV += _load_slab(grad_value,", "    _ = _load_slab(grad_value,", "grad_value"),
    "dkdv: one query block too few": ("- start) * STEPS", "- start) * STEPS - 1", "grad_key"),
    "linear query: Z is skipped in dQ^phi": ("- delta[:, None] * Z[None, :]", "", "grad_phi_query"),
    "linear query: dZ has the wrong sign": ("dZ = -tl.sum(", "dZ = tl.sum(", "grad_phi_key"),
    "linear key: dz is skipped": ("+ dz[None, :]", "", "grad_phi_key"),
}
SOFTMAX_FAULTS = {  # the same, in the form that computes phi by itself
    "softmax: keys past the end have features": (
        "tl.where((first + tl.arange(0, ROWS) < length)[:, None], phi, 0.0)",
        "phi",
        "linear",
    ),
    "softmax: features that are padding count": (
        'tl.where((feature + tl.arange(0, FEATURES) < D)[None, :], tokens, float("-inf"))',
        "tokens",
        "linear",
    ),
    "linear query: the gradient of softmax is skipped": ("weight if SOFTMAX else", "", "grad_query"),
    "linear key: phi . dphi is forgotten": ("(dphi - along[:, None])", "dphi", "grad_key"),
    "dq: the linear branch's share is overwritten": (
        "dQ += _load_slab(grad_query",
        "_ = _load_slab(grad_query",
        "grad_query",
    ),
    "dkdv: the linear branch's share is overwritten": (
        "dK += _load_slab(grad_key",
        "_ = _load_slab(grad_key",
        "grad_key",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path, device: str) -> None:
    old, new, where = FAULTS[fault]
    problem = testing.make_problem(**SMALL, device=device)
    exact = testing.oracle(problem)
    budget = testing.error_budget(problem, exact)
    results = testing.run_backend(with_fault(triton_fused, tmp_path, old, new), problem)
    caught = [check.name for check in testing._compare(results, exact, budget) if not check.passed]
    assert where in caught, f"caught in {caught}"


@pytest.mark.parametrize("fault", SOFTMAX_FAULTS)
def test_planted_fault_in_the_form_with_softmax_is_caught(fault: str, tmp_path, device: str) -> None:
    old, new, where = SOFTMAX_FAULTS[fault]
    problem = testing.make_problem(**{**SMALL, "head_dim": 24}, device=device)
    results = testing.run_softmax(with_fault(triton_fused, tmp_path, old, new), problem)
    caught = [check.name for check in testing._compare(results, *testing._softmax_budget(problem)) if not check.passed]
    assert where in caught, f"caught in {caught}"


def test_without_a_fault_all_is_right(tmp_path, device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    assert_right(
        problem, testing.run_backend(with_fault(triton_fused, tmp_path, "import math", "import math"), problem)
    )


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["random", "critical", "negligible"])
def test_lists_are_those_of_the_map(labels: str, device: str) -> None:
    block_map = testing.make_problem(**{**SMALL, "heads": 2, "labels": labels}, device=device).block_map
    counts, kv_indices = triton_fused._kv_lists(block_map)
    offsets, q_indices = triton_fused._q_lists(block_map)
    assert torch.equal(counts, block_map.kv_num_blocks)
    assert torch.equal(offsets, block_map.q_offsets)
    listed = torch.arange(block_map.max_critical, device=device) < counts[..., None]
    assert torch.equal(kv_indices[listed], block_map.kv_indices[listed])
    listed = torch.arange(q_indices.shape[-1], device=device) < offsets[..., -1:]
    assert torch.equal(q_indices[listed], block_map.q_indices[listed])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_are_powers_of_two_near_one_over_the_number_of_marginal_blocks(dtype: torch.dtype, device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "key_length": 1500}, device=device, dtype=dtype)
    marginal = (problem.block_map.labels == 0).flatten(0, 1)
    weights = triton_fused._weights(problem.query, problem.block_map)
    rows, columns = marginal.shape[1:]
    assert not weights[:, rows:].any() and not weights[:, :, columns:].any()
    weights = weights[:, :rows, :columns]
    assert torch.equal(weights != 0, marginal)
    mantissa, _ = torch.frexp(weights[marginal].float())
    assert (mantissa == 0.5).all()
    mean = weights.float().sum(-1)
    assert ((mean >= 1) & (mean < 2) | ~marginal.any(-1)).all()


def test_tiles_read_by_descriptor_give_the_same_bits(monkeypatch) -> None:
    if not triton_fused._INTERPRETED and triton_fused._architecture() < 90:
        pytest.skip("this GPU has no tensor memory accelerator")
    for dtype in (torch.float16, torch.bfloat16):
        problem = testing.make_problem(**SMALL, dtype=dtype, device="cpu" if triton_fused._INTERPRETED else "cuda")
        runs = []
        for fit in (True, False):
            monkeypatch.setattr(triton_fused, "_descriptors_fit", lambda *tensors, fit=fit: fit)
            runs.append(run(problem))
        assert_right(problem, runs[0])
        assert testing._same_bits(*(results.values() for results in runs))


def test_heads_in_chunks(monkeypatch, device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "heads": 2}, device=device)
    whole = run(problem)
    monkeypatch.setattr(triton_fused, "_head_chunks", lambda *args: [(0, 1), (1, 1)])
    assert testing._same_bits(whole.values(), run(problem).values())


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (16, 16)])
@pytest.mark.parametrize(("per_query_block", "tensors"), [(1, 4), (2, 2)])
def test_chunks_cover_all_heads_within_bounds(blocks: tuple[int, int], per_query_block: int, tensors: int) -> None:
    query = torch.empty(2, 12, 32760, 128, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(2, 12, *(math.ceil(32760 / block) for block in blocks), dtype=torch.int8, device="meta")
    block_map = BlockMap(labels, *blocks, 32760, 32760, 25)
    chunks = triton_fused._head_chunks(query, block_map, per_query_block, tensors)
    assert [head for first, heads in chunks for head in range(first, first + heads)] == list(range(24))
    states = labels.shape[3] + per_query_block * labels.shape[2]
    assert chunks[0][1] * states * 130 * 128 <= tensors * query.numel()


# --- the contract's corners ------------------------------------------------------------------------------------------


def test_nan_goes_where_the_mathematics_puts_it(device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "heads": 1, "query_length": 96}, device=device)
    labels = torch.tensor([[1, 0, -1, 0, 0], [0, 1, 0, -1, 0], [-1, -1, 1, 1, -1]], dtype=torch.int8, device=device)
    block_map = replace(problem.block_map, labels=labels[None, None], _num_critical=None)
    key, phi_key = problem.key.clone(), problem.phi_key.clone()
    key[0, 0, 40] = math.nan  # in key block 1: marginal to query block 0, critical to 1, negligible to 2
    phi_key[0, 0, 40] = math.inf
    problem = problem._replace(key=key, phi_key=phi_key, block_map=block_map)
    saved = triton_fused.forward(*problem.inputs, problem.block_map, problem.scale)
    row = torch.arange(96, device=device) // 32
    assert torch.equal(saved.out_linear[0, 0].isnan(), (row == 0)[:, None].expand(96, 16))
    assert torch.equal(saved.out_sparse[0, 0].isnan(), (row == 1)[:, None].expand(96, 16))
    assert torch.equal(saved.lse[0, 0].isnan(), row == 1)


def test_float16_holds_sums_that_would_overflow(device: str) -> None:
    """Sums of 3000 tokens with features and values near 10 pass float16's 65504; their mean does not."""
    problem = testing.make_problem(
        **{**SMALL, "key_length": 3000, "labels": "marginal", "feature_map": "relu"}, dtype=torch.float16, device=device
    )
    problem = problem._replace(value=problem.value + 10, phi_key=10 * problem.phi_key)
    exact = testing.oracle(problem)
    linear = triton_fused.forward(*problem.inputs, problem.block_map, problem.scale).out_linear
    assert (linear.double() - exact["linear"]).abs().max() < 0.02


def test_any_strides(device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    tokens_last = [tensor.mT.contiguous().mT for tensor in problem[:7]]  # the last dimension is not the dense one
    assert tokens_last[0].stride(3) != 1
    assert testing._same_bits(run(problem).values(), run(type(problem)(*tokens_last, *problem[7:])).values())
    expanded = problem._replace(key=problem.key[:, :, :1].expand_as(problem.key))
    assert_right(expanded)


def test_huge_strides_between_tokens() -> None:
    view = torch.empty(1, device="meta").as_strided((1, 1, 4, 16), (1, 1, 2**24, 1))
    assert triton_fused._view(view)[1:] == (0, 0, 16)


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
    problem = testing.make_problem(**{**SMALL, **change}, device=device)
    assert word in triton_fused.unsupported(problem.query, problem.block_map)
    with pytest.raises(ValueError, match=word):
        backends.choose("triton", problem.query, problem.block_map)


def test_takes_only_tensors_of_its_device() -> None:
    problem = testing.make_problem(**SMALL)
    elsewhere = problem.query.to("meta")
    assert "meta" in triton_fused.unsupported(elsewhere, problem.block_map)


def test_usable_without_gpu_only_in_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(triton_fused, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in triton_fused.unavailable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 6 GB")
def test_more_than_two_to_the_31_elements() -> None:
    shape = (1, 2, 1_060_000, 1024)  # 2.2e9 elements; the 16 features in front of each row are used
    buffer = torch.zeros(shape, dtype=torch.float16, device="cuda")[..., :16]
    small = torch.randn(1, 2, 2000, 16, dtype=torch.float16, device="cuda")
    buffer[:, :, -2000:] = small
    labels = torch.randint(-1, 2, (1, 2, 16, 16), dtype=torch.int8, device="cuda")
    query = buffer[:, :, -2000:]
    block_map = BlockMap(labels, 128, 128, 2000, 2000)
    far = triton_fused.forward(query, query, query, query, query, block_map, 0.25)
    near = triton_fused.forward(small, small, small, small, small, block_map, 0.25)
    assert torch.equal(far.out_sparse, near.out_sparse)
    assert torch.equal(far.out_linear, near.out_linear)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("run", [run, run_softmax], ids=["phi given", "softmax inside"])
def test_long_sequences_are_right_and_repeat(run, head_dim: int, block_q: int) -> None:
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
    first = run(problem)
    for _ in range(5):
        assert testing._same_bits(first.values(), run(problem).values())
    form = testing.run_softmax if run is run_softmax else testing.run_backend
    expected = form(backends.load("torch"), problem.to(torch.float32))
    for name, values in first.items():
        error = (values.float() - expected[name]).square().mean().sqrt()
        assert error <= 0.02 * expected[name].square().mean().sqrt(), name
