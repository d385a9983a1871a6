"""What is particular to the Triton kernels; that they are right is checked with all backends in test_backends.py.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import math
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from faults import Fault, assert_caught, with_fault
from test_kernel_backends import IN_CHUNKS, assert_right, assert_same_bits, make, needs_gpu, run

from sla_ref import backends, reference, testing
from sla_ref.block_map import CRITICAL, MARGINAL, NEGLIGIBLE, BlockMap
from sla_ref.protocol import Inputs

pytestmark = pytest.mark.backend("triton")
if (reason := backends.list_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)
triton = backends.load("triton")
classify = importlib.import_module(f"{triton.__name__}.classify")
labels, launch, linear = triton.labels, triton.launch, triton.linear


# --- the checker is checked: a fault planted in each kernel is caught -------------------------------------------------

in_labels, in_linear, in_sparse = (partial(Fault, f"{name}.py") for name in ("labels", "linear", "sparse"))
in_tokens, in_forward = (partial(Fault, f"{name}.py") for name in ("tokens", "__init__"))
FAULTS = {
    "a critical block is dropped": in_labels("load_labels", "mask=inside", "mask=inside & (partner > 0)", "sparse"),
    "negligible counts as critical": in_labels(
        "load_labels",
        "return tl.load(side.labels + place, mask=inside, other=IS_NEGLIGIBLE)",
        "label = tl.load(side.labels + place, mask=inside, other=IS_MARGINAL)\n    return label * label",
        "sparse",
    ),
    "lists of a strip begin as if it were the first": in_labels(
        "read_columns", "tl.sum(start, 0) + tl", "tl", "grad_key", key_length=531
    ),
    "negligible counts as marginal": in_labels(
        "write_weights", "load_labels(rows, i, j) == IS_MARGINAL", "load_labels(rows, i, j) <= IS_MARGINAL", "linear"
    ),
    "batch and head are swapped": in_tokens(
        "head_of", "b.to(tl.int64) * tokens.batch + h", "h * tokens.batch + b", "linear", batch=2, heads=2
    ),
    "a chunk takes the lists of the first heads": in_forward(
        "forward_kernel", "listed = (first_head *", "listed = (0 *", "sparse", **IN_CHUNKS
    ),
    "a chunk takes the weights of the first heads": in_linear(
        "__iter__", "part(self.weights, first, heads)", "part(self.weights, 0, heads)", "linear", **IN_CHUNKS
    ),
    "Z is skipped": in_linear("states_kernel", "+ columns, z, plan)", "+ columns, 0 * z, plan)", "linear"),
    "h counts twice, z once": in_linear("states_kernel", "dot(tl.trans(phi)", "2 * dot(tl.trans(phi)", "linear"),
    "the weights of another block": in_linear("sums_kernel", "inner[None, :] *", "(inner ^ 1)[None, :] *", "linear"),
    "phi(Q) H is not divided": in_linear("linear_rows", ", O) * inverse[:, None]", ", O)", "linear"),
    "the tail is not masked": in_sparse("scores", "    if PARTIAL:", "    if False:", "sparse"),
    "O is not rescaled": in_sparse("softmax_step", "run.O * shrink[:, None]", "run.O", "sparse"),
    "the largest score is not subtracted": in_sparse(
        "softmax_step", "tl.maximum(run.m, tl.max(S, 1) * scale)", "tl.zeros_like(run.m)", "sparse", spread=100.0
    ),
    "lse in base 2": in_sparse("sparse_rows", "tl.log2(l)) * LN_2", "tl.log2(l))", "lse"),
    "Ds is forgotten": in_sparse("dq_step", "(dP - rows.Ds[:, None])", "dP", "grad_query"),
    "the gradient of lse is forgotten": in_sparse(
        "dq_kernel", "Ds -= tl.load(grad_lse", "_ = tl.load(grad_lse", "grad_query"
    ),
    "scale is forgotten in dK": in_sparse("dkdv_kernel", "dK *= scale", "dK *= 1", "grad_key"),
    "dV is overwritten": in_sparse("dkdv_kernel", "dV += load_slab(", "_ = load_slab(", "grad_value"),
    "one query block too few": in_sparse("dkdv_kernel", "- start) * STEPS", "- start) * STEPS - 1", "grad_key"),
    "Z is skipped in dQ^phi": in_linear("grad_sums_kernel", "- Dl[:, None] * Z[None, :]", "", "grad_phi_query"),
    "dZ has the wrong sign": in_linear("grad_sums_kernel", "dZ = -tl.sum(", "dZ = tl.sum(", "grad_phi_key"),
    "dz is skipped": in_linear("grad_keys_kernel", "+ dz[None, :]", "", "grad_phi_key"),
}
LARGE_FEATURES = {"head_dim": 2, "spread": 1000.0, "labels": "marginal", "query_length": 17, "key_length": 20}
"""Of all signs: some tokens have both of their two features far below zero."""
DEFAULT_PHI_FAULTS = {  # where the kernels compute phi by themselves
    "keys past the end have features": in_tokens("phi_of", "< head.length", "< 2 * head.length", "linear"),
    "features that are padding count": in_tokens("exponentials", "< head.D", "< 2 * head.D", "linear"),
    "the linear branch has float16's range": in_tokens(
        "for_linear",
        "to_tf32(tile.to(tl.float32))",
        "tile.to(tl.float16).to(tl.float32)",
        "grad_key",
        spread=20.0,
        dtype=torch.float16,
        head_dim=24,
    ),
    "features that are padding count in the maximum": in_tokens(
        "phi_of", 'plan.D)[None, :], x, float("-inf")', "plan.D)[None, :], x, x", "linear", **LARGE_FEATURES
    ),
    "the gradient of softmax is skipped": in_linear(
        "grad_sums_kernel", "weight if plan.SOFTMAX else", "", "grad_query"
    ),
    "phi . dphi is forgotten": in_linear("grad_keys_kernel", "(dphi - along[:, None])", "dphi", "grad_key"),
    "the linear share of dQ is overwritten": in_sparse("dq_kernel", "dQ += load_slab(", "_ = load_slab(", "grad_query"),
    "the linear share of dK is overwritten": in_sparse("dkdv_kernel", "dK += load_slab(", "_ = load_slab(", "grad_key"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, of numbers that overflow
@pytest.mark.parametrize("name", FAULTS | DEFAULT_PHI_FAULTS)
def test_planted_fault_is_caught(name: str, tmp_path, device: str) -> None:
    fault = (FAULTS | DEFAULT_PHI_FAULTS)[name]
    if "chunk" in name and not launch.INTERPRETED:
        pytest.skip("on a GPU so few states are not worked through in chunks")
    problem = make(device, **fault.problem)
    if name in DEFAULT_PHI_FAULTS:
        problem = problem.default_phi()
    assert_caught(triton, fault, tmp_path, problem)


# --- classification --------------------------------------------------------------------------------------------------


def assert_classes_are_right(
    module: ModuleType,
    device: str,
    lengths: tuple[int, int] = (17, 85),
    blocks: tuple[int, int] = (16, 16),
    ratios: tuple[float, float] = (0.2, 0.6),
    head_dim: int = 7,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    bad: float | None = None,
) -> None:
    """They are the specification's; rows that `bad` reaches have as many labels of each class.

    The tokens have few digits to make sums in float64 exact, and ties real ties.
    """
    query, key = (torch.randn(2, length, 2, head_dim).mul(2).round().mul(size).transpose(1, 2) for length in lengths)
    query, key = query.to(device, dtype), key.to(device, dtype)
    if bad is not None:
        query[0, 0, 3, 0] = key[0, 1, 3, 0] = bad
    expected = reference.classify(query, key, *ratios, *blocks)
    counts = [int((expected[1, 1, 0] == label).sum()) for label in (CRITICAL, NEGLIGIBLE)]
    found = module.classify(query, key, *counts, *blocks)
    assert torch.equal(found.sort().values, expected.sort().values)
    sound = torch.ones(expected.shape[:3], dtype=torch.bool, device=device)
    if bad is not None:
        sound[0, 0, 0] = sound[0, 1] = False
    assert torch.equal(found[sound], expected[sound])


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"lengths": (1, 150), "blocks": (16, 1), "head_dim": 1, "dtype": torch.float16},
        {"lengths": (1, 150), "head_dim": 128, "blocks": (16, 80), "dtype": torch.bfloat16},
        {"blocks": (10**6, 10**6)},
        {"ratios": (0.01, 0.0)},
        {"ratios": (1.0, 1.0)},
        {"size": 0.0},
        {"size": 1e-24},
        {"size": 1e18},
        {"size": 1e-170, "dtype": torch.float64},
        {"bad": math.nan},
        {"bad": math.inf},
    ],
    ids=str,
)
def test_classes_are_those_of_the_specification(case: dict, device: str) -> None:
    assert_classes_are_right(classify, device, **case)


in_classify = partial(Fault, "classify.py", where="classes")
CLASSIFICATION_FAULTS = {
    "of equal scores the last come first": in_classify(
        "among_largest", "tl.cumsum(equal, 0) <=", "tl.sum(equal, 0) - tl.cumsum(equal, 0) <", size=0.0
    ),
    "a block goes on into the next": in_classify("pool_block", "(row < end)", "(row < length)"),
    "the last block is divided as if it were full": in_classify("pool_block", "(end - first)", "block"),
    "heads are those of the first sample": in_classify("pool_block", "* tokens.batch", "* 0"),
    "the two counts are swapped": in_classify(
        "classify", "num_critical, num_negligible, width", "num_negligible, num_critical, width"
    ),
}


@pytest.mark.parametrize("name", CLASSIFICATION_FAULTS)
def test_planted_fault_in_the_classification_is_caught(name: str, tmp_path, device: str) -> None:
    fault = CLASSIFICATION_FAULTS[name]
    faulty = importlib.import_module(f"{with_fault(triton, tmp_path, fault).__name__}.classify")
    with pytest.raises(AssertionError):
        assert_classes_are_right(faulty, device, **fault.problem)


def test_minus_zero_and_zero_are_a_tie(tmp_path, device: str) -> None:
    """A product may give either; without the sum that makes them equal, the order would differ."""
    fault = in_classify("labels_kernel", " + 0.0  #", "  #")
    faulty = importlib.import_module(f"{with_fault(triton, tmp_path, fault).__name__}.classify")
    scores = torch.tensor([-0.0, 0.0, -1.0], dtype=torch.float64, device=device)
    for module, expected in ((classify, [1, 0, -1]), (faulty, [0, 1, -1])):
        found = torch.empty(3, dtype=torch.int8, device=device)
        launch.start(module.labels_kernel, 1, scores, found, 3, 1, 1, 4)
        assert found.tolist() == expected


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(2, 3, 5, 7), (1, 2, 9, 300), (1, 2, 300, 9)], ids=str)
def block_map(request: pytest.FixtureRequest, device: str) -> BlockMap:
    """Labels that are not contiguous; the first and last rows lack critical or marginal blocks."""
    batch, heads, rows, columns = request.param
    labels = torch.randint(-1, 2, (batch, heads, columns, rows), dtype=torch.int8, device=device).mT
    labels[:, :, 0] = NEGLIGIBLE
    labels[:, :, -1] = CRITICAL
    return BlockMap(labels, 1, 1, rows, columns)


def test_lists_are_those_of_the_map(block_map: BlockMap) -> None:
    """What the kernels walk is what `BlockMap` shows."""
    (counts, kv_indices), (offsets, q_indices), _ = labels.read_labels(block_map, torch.float32, backward=True)
    assert torch.equal(counts, block_map.kv_num_blocks)
    assert torch.equal(offsets, block_map.q_offsets)
    for found, expected, length in (
        (kv_indices, block_map.kv_indices, counts[..., None]),
        (q_indices, block_map.q_indices, offsets[..., -1:]),
    ):
        assert found.shape == expected.shape
        listed = torch.arange(found.shape[-1], device=found.device) < length
        assert torch.equal(found[listed], expected[listed])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_are_powers_of_two_near_one_over_the_number_of_marginal_blocks(
    block_map: BlockMap, dtype: torch.dtype
) -> None:
    marginal = (block_map.labels == MARGINAL).flatten(0, 1)
    weight = 0.5 ** marginal.sum(-1, keepdim=True).clamp(min=1).log2().floor()
    padding = [-size % labels.WEIGHTS_TILE for size in marginal.shape[1:]]
    expected = torch.nn.functional.pad(marginal * weight, (0, padding[1], 0, padding[0])).to(dtype)
    assert torch.equal(labels.read_labels(block_map, dtype, backward=False).weights, expected)


def test_states_of_many_blocks_are_added_up(device: str) -> None:
    """Of more than one tile of the weights, with the weights as they are and transposed, as the backward needs them."""
    call = SimpleNamespace(tf32=False)
    weights = torch.nn.functional.pad(torch.randn(2, 9, 300, device=device), (0, 20, 0, 23))
    for of_pairs, num_out, num_in in ((weights, 9, 300), (weights.mT, 300, 9)):
        states = torch.randn(2, num_in, 18 * 16, device=device)
        sums = states.new_empty(2, num_out, 18 * 16)
        linear.add_up(call, of_pairs, states, sums)
        torch.testing.assert_close(sums, of_pairs[:, :num_out, :num_in] @ states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles_read_by_descriptor_give_the_same_bits(dtype: torch.dtype, device: str, monkeypatch) -> None:
    if not launch.INTERPRETED and not launch.reads_shared_memory():
        pytest.skip("on this GPU the kernels use no tensor memory accelerator")
    problem = make(device, **IN_CHUNKS, batch=2, dtype=dtype)
    runs = []
    for fit in (True, False):
        monkeypatch.setattr(launch, "descriptors_fit", lambda *tensors, fit=fit: fit)
        runs.append(run(triton, problem))
    assert_same_bits(*runs)


@needs_gpu
def test_kernels_found_by_their_case_give_the_same_bits() -> None:
    class Plain(launch.Launcher):
        def start(self, kernel, programs, *args, case=None, **options) -> None:
            super().start(kernel, programs, *args, **options)

    problem = make("cuda")
    runs = [run(triton, problem) for _ in range(2)]
    with launch.launch_with(Plain()):
        runs.append(run(triton, problem))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[1], runs[2])


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


def test_softmax_inside_of_large_features(device: str) -> None:
    assert_right(triton, make(device, **LARGE_FEATURES).default_phi())


def test_float16_holds_sums_that_would_overflow(device: str) -> None:
    """Sums of 3000 tokens with features and values near 10 pass float16's 65504; their mean does not."""
    sizes = {"query_length": 16, "key_length": 3000, "block_k": 128, "labels": "marginal", "feature_map": "relu"}
    problem = make(device, **sizes, dtype=torch.float16)
    inputs = problem.inputs._replace(value=problem.inputs.value + 10, phi_key=10 * problem.inputs.phi_key)
    exact = testing.oracle(problem._replace(inputs=inputs))
    assert (triton.forward(inputs).out_linear.double() - exact["linear"]).abs().max() < 0.02


def test_huge_strides_between_tokens() -> None:
    view = torch.empty(1, device="meta").as_strided((1, 1, 4, 16), (1, 1, 2**24, 1))
    assert launch.strided(view)[1:] == (0, 0, 16)


@needs_gpu  # with 10 GB
@pytest.mark.parametrize("shape", [(3, 1), (1, 3)], ids=["samples far apart", "heads far apart"])
def test_strides_whose_multiples_pass_two_to_the_31(shape: tuple[int, int]) -> None:
    """Each stride fits int32, but twice a stride does not."""
    near = make("cuda", batch=shape[0], heads=shape[1], head_dim=16)._replace(grad_lse=None)
    stride, buffer = 2**30 + 16, torch.empty(2**31 + 2**16, device="cuda")
    starts = iter(range(0, 2**16, 2**12))

    def far(tensor: torch.Tensor) -> torch.Tensor:
        view = buffer.as_strided(tensor.shape, (stride, stride, 16, 1), next(starts))
        assert launch.strided(view).data is view, "it is read where it lies, and not copied before"
        return view.copy_(tensor)

    assert_same_bits(run(triton, near), run(triton, near._map_tensors(far)))
