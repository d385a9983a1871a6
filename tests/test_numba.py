"""What is particular to the Numba kernels; that they are right is checked with all backends in test_backends.py.

Without a GPU they run in Numba's simulator, one Python thread for each thread of the GPU: problems are tiny.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from faults import with_fault

from sla_ref import backends, testing
from sla_ref.block_map import BlockMap

pytestmark = pytest.mark.backend("numba")
pytest.importorskip("numba")
if (reason := backends.list_backends()["numba"]) is not None:
    pytest.skip(reason, allow_module_level=True)
numba_cuda = backends.load("numba")

SMALL = {
    "query_length": 35,
    "key_length": 37,
    "head_dim": 8,
    "heads": 1,
    "block_q": 16,
    "block_k": 16,
    "labels": "random",
    "seed": 1,
}
"""Labels [[-1, 0, 0], [0, 1, 1], [1, 1, 1]]; the last blocks of both sides are partial."""


def run(problem: testing.Problem) -> testing.Results:
    return testing.run_backend(numba_cuda, problem)


def assert_right(problem: testing.Problem, results: testing.Results | None = None) -> None:
    exact = testing.oracle(problem)
    testing.assert_within(results or run(problem), exact, testing.error_budget(problem, exact))


# --- the checker is checked: a fault planted in each kernel is caught -------------------------------------------------

FAULTS = {  # what is wrong: the line, what it becomes, a result in which it must show
    "load: the tail is read as if it were there": (
        "tile[n, d] = array[head, first + n, column + d] if inside else ZERO",
        "tile[n, d] = array[head, min(first + n, array.shape[1] - 1), min(column + d, array.shape[2] - 1)]",
        "linear",
    ),
    "marginal: negligible counts as marginal": (
        "block_map.labels == MARGINAL",
        "block_map.labels <= MARGINAL",
        "linear",
    ),
    "states: Z is skipped": ("_product_spare(z, phi, V, TOKENS)", "pass", "linear"),
    "states: the spare column is not filled": ("V[thread, COLUMNS] = spare[", "V[thread, 0] = spare[", "linear"),
    "forward: no barrier after K is loaded": ("cuda.syncthreads()  # all of K is there", "pass", "sparse"),
    "forward: no barrier after P is stored": ("cuda.syncthreads()  # all of V and P is there", "pass", "sparse"),
    "forward: the keys of the neighbour": (
        "* KEYS\n            cuda.syncthreads()  # nobody needs the last V",
        "* KEYS ^ 16\n            cuda.syncthreads()  # nobody needs the last V",
        "sparse",
    ),
    "forward: the tail is not masked": (
        "S[r, c] = S[r, c] * log2_scale if inside",
        "S[r, c] = S[r, c] * log2_scale if True",
        "sparse",
    ),
    "forward: the wrong scale": (
        "log2_scale = scale * LOG2_E\n        _load(Q",
        "log2_scale = LOG2_E\n        _load(Q",
        "sparse",
    ),
    "forward: O is not rescaled": ("O[r, c] *= shrink", "O[r, c] *= ONE", "sparse"),
    "forward: lanes are not added up": ("_sum_lanes(partial, l)", "pass", "sparse"),
    "forward: lse in base 2": ("(m[r] + math.log2(l[r])) * LN_2", "(m[r] + math.log2(l[r]))", "lse"),
    "forward: phi(Q) H is not divided": (
        "inverse = ONE / denominator[r] if defined else ZERO\n            for c in range(WIDTH)",
        "inverse = ONE\n            for c in range(WIDTH)",
        "linear",
    ),
    "dq: D^s is forgotten": ("P * (dP[r, c] - Ds[r])", "P * dP[r, c]", "grad_query"),
    "dq: scale is forgotten": ("dQ[r, c] *= scale", "dQ[r, c] *= ONE", "grad_query"),
    "dkdv: scale is forgotten in dK": ("dK[r, c] *= scale", "dK[r, c] *= ONE", "grad_key"),
    "dkdv: dV is overwritten": ("_fetch(dV, grad_value, head, first_key)", "_clear(dV)", "grad_value"),
    "dkdv: one query block too few": ("- start) * STEPS", "- start - 1) * STEPS", "grad_key"),
    "dkdv: no barrier before the next Q": (
        "cuda.syncthreads()  # nobody needs the last Q, dO, P and dS any more",
        "pass",
        "grad_key",
    ),
    "linear query: Z is skipped in dQ^phi": (
        "_product(dphi, dO.T, H.T, COLUMNS + 1)",
        "_product(dphi, dO.T, H.T, COLUMNS)",
        "grad_phi_query",
    ),
    "linear query: dZ has the wrong sign": (
        "share_spare[head, n] = -Dl[r]",
        "share_spare[head, n] = Dl[r]",
        "grad_phi_key",
    ),
    "linear key: dz is skipped": (
        "_product(dphi, tokens.T, dh.T, COLUMNS + 1)",
        "_product(dphi, tokens.T, dh.T, COLUMNS)",
        "grad_phi_key",
    ),
    "linear key: phi is not loaded": ("_load(tokens, phi_key, head, first, 0)", "pass", "grad_value"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path, device: str) -> None:
    old, new, where = FAULTS[fault]
    if "barrier" in fault and device == "cuda":
        pytest.skip("a race: on a GPU the few threads of this problem may happen to win it")
    problem = testing.make_problem(**SMALL, device=device)
    exact = testing.oracle(problem)
    budget = testing.error_budget(problem, exact)
    results = testing.run_backend(with_fault(numba_cuda, tmp_path, old, new), problem)
    caught = [check.name for check in testing._compare(results, exact, budget) if not check.passed]
    assert where in caught, f"caught in {caught}"


def test_without_a_fault_all_is_right(tmp_path, device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    assert_right(
        problem, testing.run_backend(with_fault(numba_cuda, tmp_path, "import functools", "import functools"), problem)
    )


# --- the parts -------------------------------------------------------------------------------------------------------


def test_states_are_products_of_their_block(device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    phi, V = problem.phi_key.flatten(0, 1), problem.value.flatten(0, 1)
    spare = torch.arange(37.0, device=device)[None]
    states, broken = numba_cuda._block_states(phi, V, spare, 16)
    assert states.shape == (1, 3, 8, 9)
    assert not broken.any()
    tail = slice(32, 37)
    torch.testing.assert_close(states[0, 2, :, :8], phi[0, tail].T @ V[0, tail])
    torch.testing.assert_close(states[0, 2, :, 8], phi[0, tail].T @ spare[0, tail])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_state_reaches_its_members_alone(bad: float, device: str) -> None:
    """Whether it is one of h or of z that is no number."""
    features, values, spare = torch.ones(2, 48, 8), torch.ones(2, 48, 8), torch.ones(2, 48)
    values[0, 10, 3] = spare[1, 10] = bad
    states = numba_cuda._block_states(*(tensor.to(device) for tensor in (features, values, spare)), 16)
    member = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], device=device).expand(2, 2, 3)
    sums = numba_cuda._add_up(member, *states)
    assert sums[:, 0].isnan().all()
    assert (sums[:, 1] == 16).all()


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_users_tf32_switch_is_put_back(setting: str, monkeypatch) -> None:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = setting
    try:
        with numba_cuda._float32_products():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == setting
    finally:
        switch.fp32_precision = before


def test_heads_in_chunks(monkeypatch, device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "heads": 2, "query_length": 17, "key_length": 20}, device=device)
    whole = run(problem)
    monkeypatch.setattr(numba_cuda, "_head_chunks", lambda *args: [slice(0, 1), slice(1, 2)])
    assert testing._same_bits(whole.values(), run(problem).values())


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (16, 16)])
def test_chunks_cover_all_heads_within_bounds(blocks: tuple[int, int]) -> None:
    query = torch.empty(2, 12, 32760, 128, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(2, 12, *(math.ceil(32760 / block) for block in blocks), dtype=torch.int8, device="meta")
    block_map = BlockMap(labels, *blocks, 32760, 32760, 25)
    chunks = numba_cuda._head_chunks(query, block_map, 1, 4)
    assert [head for heads in chunks for head in range(heads.start, heads.stop)] == list(range(24))
    states = labels.shape[3] + labels.shape[2]
    assert (chunks[0].stop - chunks[0].start) * states * 128 * 129 <= 4 * query.numel()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", numba_cuda.BLOCK_SIZES)
def test_tiles_fit_blocks_and_threads(head_dim: int, block: int) -> None:
    """A thread for every row of a tile whose spare column is filled, and whole tiles; test_compiled.py sees the rest."""
    for kernel in numba_cuda._TILES:
        rows, others = numba_cuda._tile(kernel, head_dim, block, block)
        threads = rows // numba_cuda.HEIGHT * numba_cuda.LANES
        assert block % rows == 0 and block % others == 0
        assert others <= threads and rows <= threads


# --- the contract's corners ------------------------------------------------------------------------------------------


def test_a_head_dim_that_is_no_multiple_of_the_lanes(device: str) -> None:
    assert_right(testing.make_problem(**{**SMALL, "head_dim": 75, "query_length": 5, "key_length": 17}, device=device))


def test_forward_and_backward_go_with_those_of_torch(device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    other = backends.load("torch")
    assert_right(problem, testing.run_backend(numba_cuda, problem, other))
    assert_right(problem, testing.run_backend(other, problem, numba_cuda))


def test_nan_goes_where_the_mathematics_puts_it(device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "query_length": 48, "key_length": 70}, device=device)
    labels = torch.tensor([[1, 0, -1, 0, 0], [0, 1, 0, -1, 0], [-1, -1, 1, 1, -1]], dtype=torch.int8, device=device)
    block_map = replace(problem.block_map, labels=labels[None, None], _num_critical=None)
    key, phi_key, phi_query = problem.key.clone(), problem.phi_key.clone(), problem.phi_query.clone()
    key[0, 0, 20] = math.nan  # in key block 1: marginal to query block 0, critical to 1, negligible to 2
    phi_key[0, 0, 20] = math.inf
    phi_query[0, 0, 40] = math.nan  # query block 2 has no marginal block: linear = 0 whatever its features are
    problem = problem._replace(key=key, phi_key=phi_key, phi_query=phi_query, block_map=block_map)
    saved = numba_cuda.forward(*problem.inputs, problem.block_map, problem.scale)
    row = torch.arange(48, device=device) // 16
    assert torch.equal(saved.out_linear[0, 0].isnan(), (row == 0)[:, None].expand(48, 8))
    assert torch.equal(saved.out_sparse[0, 0].isnan(), (row == 1)[:, None].expand(48, 8))
    assert torch.equal(saved.lse[0, 0].isnan(), row == 1)
    assert not saved.out_linear[0, 0, 32:].any()


def test_scores_of_minus_infinity_in_the_first_tile(device: str) -> None:
    """The running maximum is still -inf after a tile of such scores; the next tile decides."""
    problem = testing.make_problem(
        **{**SMALL, "labels": "critical", "query_length": 16, "key_length": 32}, device=device
    )
    query, key = problem.query.abs() + 1, problem.key.clone()
    key[:, :, :16] = -3e38
    problem = problem._replace(query=query, key=key)
    saved = numba_cuda.forward(*problem.inputs, problem.block_map, problem.scale)
    weights = torch.softmax(problem.scale * query @ key[:, :, 16:].mT, dim=-1)
    torch.testing.assert_close(saved.out_sparse, weights @ problem.value[:, :, 16:])


def test_any_strides(device: str) -> None:
    problem = testing.make_problem(**{**SMALL, "query_length": 17, "key_length": 20}, device=device)
    tokens_last = [tensor.mT.contiguous().mT for tensor in problem[:7]]  # the last dimension is not the dense one
    assert tokens_last[0].stride(3) != 1
    assert testing._same_bits(run(problem).values(), run(type(problem)(*tokens_last, *problem[7:])).values())
    assert_right(problem._replace(key=problem.key[:, :, :1].expand_as(problem.key)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 136}, "head_dim"),
        ({"block_q": 48}, "block_q"),
        ({"block_k": 256}, "block_k"),
    ],
)
def test_says_what_it_cannot_take(change: dict, word: str, device: str) -> None:
    problem = testing.make_problem(**{**SMALL, **change}, device=device)
    assert word in numba_cuda.unsupported(problem.query, problem.block_map)
    with pytest.raises(ValueError, match=word):
        backends.choose("numba", problem.query, problem.block_map)


def test_takes_only_tensors_of_its_device() -> None:
    problem = testing.make_problem(**SMALL)
    assert "meta" in numba_cuda.unsupported(problem.query.to("meta"), problem.block_map)


def test_takes_as_many_heads_as_a_grid_has() -> None:
    labels = torch.zeros(1, 65536, 1, 1, dtype=torch.int8)
    query = torch.empty(1, 65536, 1, 8)
    assert "65535" in numba_cuda.unsupported(query, BlockMap(labels, 16, 16, 1, 1))


def test_never_chosen_unless_named(device: str) -> None:
    problem = testing.make_problem(**SMALL, device=device)
    assert backends.choose("auto", problem.query, problem.block_map).name != "numba"
    assert backends.choose("numba", problem.query, problem.block_map) is numba_cuda


def test_without_gpu_and_simulator_it_says_how_to_get_either() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    code = "import sla_ref; print(sla_ref.list_backends()['numba'])"
    seen = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    assert "NUMBA_ENABLE_CUDASIM=1" in seen.stdout
    assert "pip install 'sla-ref[numba]'" in seen.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_on_torchs_current_stream() -> None:
    """On another stream, work that the stream has still to do is waited for, and not overtaken."""
    problem = testing.make_problem(device="cuda")
    expected = run(problem)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(tensor) for tensor in problem[:7]]
        torch.cuda._sleep(50_000_000)
        for tensor, values in zip(late, problem[:7], strict=True):
            tensor.copy_(values)
        results = run(type(problem)(*late, *problem[7:]))
    stream.synchronize()
    assert testing._same_bits(expected.values(), results.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 12 GB")
def test_more_than_two_to_the_31_elements() -> None:
    length = 270_000_000 // 128 * 128  # times 8 features: 2.2e9 elements; only the last block attends
    small = torch.randn(1, 1, 128, 8, device="cuda")
    key = torch.zeros(1, 1, length, 8, device="cuda")
    key[:, :, -128:] = small
    labels = torch.full((1, 1, 1, length // 128), -1, dtype=torch.int8, device="cuda")
    labels[..., -1] = 1
    far = numba_cuda.forward(small, key, key, small, key, BlockMap(labels, 128, 128, 128, length), 0.25)
    near = numba_cuda.forward(
        small, small, small, small, small, BlockMap(labels[..., -1:].contiguous(), 128, 128, 128, 128), 0.25
    )
    assert torch.equal(far.out_sparse, near.out_sparse)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sequences_are_right_and_repeat(head_dim: int) -> None:
    """Thousands of thread blocks share the GPU: a race that small cases never lose shows here.

    The oracle would be N x N; the torch backend, in float64, stands in for it.
    """
    problem = testing.make_problem(
        heads=4, query_length=16380, head_dim=head_dim, critical_ratio=0.05, negligible_ratio=0.1, device="cuda"
    )
    first = run(problem)
    for _ in range(5):
        assert testing._same_bits(first.values(), run(problem).values())
    expected = testing.run_backend(backends.load("torch"), problem.to(torch.float64))
    for name, values in first.items():
        error = (values.double() - expected[name]).square().mean().sqrt()
        assert error <= 1e-5 * expected[name].square().mean().sqrt(), name
