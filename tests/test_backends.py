"""Every backend against the float64 oracle, on every case of `sla_ref.testing`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from evidence import worst
from hypothesis import given, settings
from hypothesis import strategies as st

from sla_ref import BlockMap, backends, reference, sparse_linear_attention, testing
from sla_ref.backends import pytorch

HALF = (torch.float16, torch.bfloat16)
REPEATED = {"heads": 1, "head_dim": 16, "block_q": 16, "block_k": 16, "labels": "random"}


@pytest.fixture
def assert_passed(record_property) -> Callable[[list[testing.Check]], None]:
    """Asserts that all checks of one case passed, and hands their numbers to `pytest --evidence`."""

    def look_at(checks: list[testing.Check]) -> None:
        assert checks, "the contract asks for every one of these cases"
        failures = [check for check in checks if not check.passed]
        assert not failures, "\n".join(map(str, failures))
        record_property("errors", worst(checks))

    return look_at


def thorough(backend_name: str, case: testing.Case, device: str) -> bool:
    """Triton's interpreter and Numba's simulator take seconds for a run that a GPU does in a millisecond."""
    return backend_name == "torch" or device == "cuda" or case.name.startswith("cross attention")


def fitting(backend_name: str, case: testing.Case, device: str) -> testing.Case:
    """The case, at a quarter of its size for Numba's simulator, which runs every thread of a GPU as a Python thread."""
    if backend_name != "numba" or device == "cuda":
        return case
    full = {"query_length": 200, "head_dim": 64, "block_q": 64, "block_k": 64} | case.arguments
    smallest = {"query_length": 1, "key_length": 1, "head_dim": 1, "block_q": 16, "block_k": 16}
    quarter = {word: max(least, -(-full[word] // 4)) for word, least in smallest.items() if word in full}
    return replace(case, arguments={"heads": 1} | case.arguments | quarter)


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_float32(backend_name: str, case: testing.Case, device: str, assert_passed) -> None:
    backend = backends.load(backend_name)
    case = fitting(backend_name, case, device)
    checks = testing.check_case(
        backend, case, device=device, dtype=torch.float32, thorough=thorough(backend_name, case, device)
    )
    assert_passed(checks)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_half_precision(backend_name: str, case: testing.Case, dtype: torch.dtype, device: str, assert_passed) -> None:
    if backend_name == "numba" and device == "cpu" and not thorough(backend_name, case, device):
        pytest.skip("inside, it computes in float32 whatever comes: in the simulator one case will do; a GPU tries all")
    if not (case.quick or backend_name == "torch" or device == "cuda"):
        pytest.skip("in the interpreter, half precision is tried on the quick cases; a GPU tries all")
    case = fitting(backend_name, case, device)
    checks = testing.check_case(
        backends.load(backend_name), case, device=device, dtype=dtype, thorough=device == "cuda"
    )
    assert_passed(checks)


@pytest.mark.parametrize("case", testing.CASES, ids=str)
@pytest.mark.backend("torch")
def test_torch_backend_is_the_equations_in_float64(case: testing.Case, assert_passed) -> None:
    assert_passed(testing.check_case(backends.load("torch"), case, device="cpu", dtype=torch.float64))


def test_check_backend_reports(backend_name: str, device: str) -> None:
    if backend_name != "torch" and device == "cpu":
        pytest.skip("the same cases run above, and an interpreter is slow")
    report = testing.check_backend(backend_name, device=device, dtypes=(torch.float32,), quick=True)
    assert report.ok, report
    assert len(report.checks) > 50
    assert "checks passed" in str(report)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_number_goes_where_the_maths_puts_it(backend_name: str, bad: float, device: str) -> None:
    """It spoils `sparse` where its block is critical, `linear` where it is marginal, and nothing else.

    Head 0 has a bad key, head 1 a bad value. With more features than keys in a block, the torch backend adds up the
    states of one head at a time.
    """
    problem = testing.make_problem(query_length=64, head_dim=24, block_q=16, block_k=16, device=device)
    labels = problem.inputs.block_map.labels
    classes = [[set(column.tolist()) for column in labels[0, h].T] for h in range(2)]
    block = [of_head.index({-1, 0, 1}) for of_head in classes]  # a key block that is of each class to some query block
    clean = backends.load(backend_name).forward(problem.inputs)
    problem.inputs.key[0, 0, 16 * block[0] + 3] = bad
    problem.inputs.phi_key[0, 0, 16 * block[0] + 3] = float("nan")
    problem.inputs.value[0, 1, 16 * block[1] + 3] = bad
    saved = backends.load(backend_name).forward(problem.inputs)
    for name, label in (("out_sparse", 1), ("out_linear", 0)):
        out, other = getattr(saved, name), getattr(clean, name)
        spoilt = ~out.isfinite().all(-1)  # (B, H, Nq)
        expected = [(labels[0, h, :, block[h]] == label).repeat_interleave(16) for h in range(2)]
        assert torch.equal(spoilt[0], torch.stack(expected))
        torch.testing.assert_close(out[~spoilt], other[~spoilt])


@pytest.mark.parametrize("has_marginal", [True, False])
def test_a_bad_query_spoils_its_own_row(backend_name: str, has_marginal: bool, device: str) -> None:
    """Where its block has no marginal block, `linear` is zero whatever its features are."""
    problem = testing.make_problem(query_length=48, head_dim=16, block_q=16, block_k=16, device=device)
    inputs = problem.inputs
    inputs.query[0, 1, 40], inputs.phi_query[0, 1, 40] = float("nan"), float("nan")
    if not has_marginal:
        labels = inputs.block_map.labels.clone()
        labels[0, 1, 2] = 1
        inputs = inputs._replace(block_map=BlockMap(labels, 16, 16, 48, 48))
    saved = backends.load(backend_name).forward(inputs)
    for out, spoilt in ((saved.out_sparse, True), (saved.out_linear, has_marginal)):
        assert out[0, 1, 40].isnan().all() == spoilt
        assert out.isnan().any(-1).sum() == spoilt


@pytest.mark.backend("torch")
@settings(max_examples=40)
@given(
    query_length=st.integers(1, 90),
    key_length=st.integers(1, 90),
    head_dim=st.sampled_from([1, 3, 8, 24]),
    block_q=st.sampled_from([1, 5, 16, 64]),
    block_k=st.sampled_from([1, 5, 16, 64]),
    labels=st.sampled_from(["classified", "random", "critical", "marginal", "negligible"]),
    feature_map=st.sampled_from(["softmax", "elu", "relu"]),
    seed=st.integers(0, 99),
)
def test_torch_backend_on_any_problem(**arguments) -> None:
    problem = testing.make_problem(**arguments, dtype=torch.float64)
    exact = testing.oracle(problem)
    results = testing.run_backend(backends.load("torch"), problem)
    testing.assert_within(results, exact, testing.error_budget(problem, exact))


@pytest.mark.backend("torch")
def test_torch_backend_makes_no_states_without_a_marginal_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it for a head without one among others."""
    problem = testing.make_problem(heads=3, labels="random", dtype=torch.float64)
    block_map = problem.inputs.block_map
    labels = block_map.labels.clone()
    labels[:, 1][labels[:, 1] == 0] = -1
    sizes = block_map.block_q, block_map.block_k, block_map.query_length, block_map.key_length
    mixed = problem._replace(inputs=problem.inputs._replace(block_map=BlockMap(labels, *sizes)))
    found = testing.run_backend(pytorch, mixed)
    for name, expected in testing.oracle(mixed).items():
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=1e-12)

    labels = labels.masked_fill(labels == 0, -1)
    without = problem._replace(inputs=problem.inputs._replace(block_map=BlockMap(labels, *sizes)))
    monkeypatch.setattr(pytorch, "_sum_over", lambda *_: pytest.fail("there is nothing to add up"))
    found = testing.run_backend(pytorch, without)
    assert not any(found[name].any() for name in ("linear", "grad_phi_query", "grad_phi_key"))


@pytest.mark.backend("torch")
@pytest.mark.parametrize(("head_dim", "heads_at_a_time"), [(16, 2), (64, 1), (8, 4)])
def test_torch_backend_holds_no_more_states_than_tokens(head_dim: int, heads_at_a_time: int) -> None:
    """A state has as many numbers as head_dim tokens, a key block as block_k tokens."""
    inputs = testing.make_problem(
        heads=8, query_length=24, key_length=36, head_dim=head_dim, block_q=6, block_k=4, labels="marginal"
    ).inputs
    lengths = [len(at.HZ) for _, at in pytorch._linear_states(inputs)]
    assert lengths == [heads_at_a_time] * (8 // heads_at_a_time)


@pytest.mark.backend("torch")
def test_torch_backend_makes_steps_as_long_as_their_scores_allow() -> None:
    """On a CPU the scores of a thread fit its cache; elsewhere a step is worth a call of a kernel."""
    index = torch.empty(20_000, 3)
    for device, limit in (("cpu", 2**18 * torch.get_num_threads()), ("meta", 2**26)):
        queries, keys = torch.empty(1, 64, 16, device=device), torch.empty(1, 32, 16, device=device)
        steps = pytorch._steps(index, queries, keys)
        assert torch.equal(torch.cat([torch.arange(20_000)[step] for step in steps]), torch.arange(20_000))
        assert {step.stop - step.start for step in steps[:-1]} == {limit // (64 * 3 * 32)}
    wide = torch.empty(1, 1, 1).expand(1, 2**40, 16)
    assert len(pytorch._steps(index, wide, keys)) == 20_000, "at least one query block"


def test_torch_backend_repeats_on_two_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        problem = testing.make_problem(query_length=2048, block_q=64, block_k=64)
        first, second = (testing.run_backend(backends.load("torch"), problem) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


def repeats_give_the_same_bits(backend_name: str, repeats: int, problem: testing.Problem) -> None:
    for each in (problem, problem.default_phi()):
        first, *others = (testing.run_backend(backends.load(backend_name), each) for _ in range(repeats))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.backend("torch")
def test_a_hundred_runs_of_the_torch_backend_give_the_same_bits() -> None:
    repeats_give_the_same_bits("torch", 100, testing.make_problem(**REPEATED))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_250_runs_on_a_gpu_give_the_same_bits(backend_name: str, device: str) -> None:
    repeats_give_the_same_bits(backend_name, 250, testing.make_problem(**REPEATED, query_length=2000, device=device))


@pytest.mark.long
def test_a_hundred_runs_of_each_backend_give_the_same_bits(backend_name: str, device: str) -> None:
    """A simulator takes half a second for one."""
    repeats_give_the_same_bits(backend_name, 100, testing.make_problem(**REPEATED, query_length=40, device=device))


def losses(attend: Callable[..., tuple[torch.Tensor, ...]], steps: int, dtype: torch.dtype, device: str) -> list[float]:
    """Gradient descent on the projections of one layer, Proj among them, towards random values."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    tokens, target = normal(1, 1, 20, 8), normal(1, 1, 20, 8)
    weights = [normal(8, 8).requires_grad_() for _ in range(4)]
    found = []
    for _ in range(steps):
        query, key, value = (tokens @ weight / 3 for weight in weights[:3])
        sparse, linear, *_ = attend(query, key, value)
        loss = (sparse + linear @ weights[3] - target).square().mean()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= gradient
        found.append(loss.item())
    return found


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.long)])
def test_fine_tuning_gives_the_losses_of_the_equations(backend_name: str, steps: int, device: str) -> None:
    labels = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int8, device=device)
    block_map = BlockMap(labels, 16, 16, 20, 20)
    attend = partial(sparse_linear_attention, block_map=block_map, backend=backend_name)

    def equations(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = query.softmax(-1), key.softmax(-1)
        return reference.sparse_linear_attention(query, key, value, *features, labels, 16, 16, 8**-0.5)

    expected = losses(equations, steps, torch.float64, device)
    assert expected[-1] < 0.8 * expected[0]
    assert losses(attend, steps, torch.float32, device) == pytest.approx(expected, rel=1e-5)
