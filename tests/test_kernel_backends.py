"""What all backends with GPU kernels have in common; that their values are right is checked in test_backends.py.

Without a GPU the kernels run in Triton's interpreter and in Numba's simulator, so problems are tiny. What is particular
to one backend, and the faults planted in it, are in test_triton.py and test_numba.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from faults import with_fault

from sla_ref import backends, testing
from sla_ref.block_map import CRITICAL, MARGINAL, NEGLIGIBLE, BlockMap
from sla_ref.protocol import Inputs

SIMULATOR = {"triton": "TRITON_INTERPRET", "numba": "NUMBA_ENABLE_CUDASIM"}
SIZES = {"query_length": 35, "key_length": 37, "head_dim": 8, "heads": 1, "block_q": 16, "block_k": 16}
SMALL = SIZES | {"labels": "random", "seed": 1}
"""Labels [[-1, 0, 0], [0, 1, 1], [1, 1, 1]]; the last blocks of both sides are partial."""
SMALLER = SMALL | {"query_length": 17, "key_length": 20}
IN_CHUNKS = {"heads": 2, "query_length": 3, "key_length": 20, "head_dim": 24, "labels": "classified", "seed": 0}
"""So few tokens that states are worked through one head at a time. Labels [[0, 1]] and [[1, 0]]."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.backend(name)) for name in SIMULATOR])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    if (reason := backends.list_backends()[request.param]) is not None:
        pytest.skip(reason)
    return backends.load(request.param)


def make(device: str, **arguments) -> testing.Problem:
    return testing.make_problem(**SMALL | arguments, device=device)


def run(backend: ModuleType, problem: testing.Problem) -> list[torch.Tensor]:
    return list(testing.run_backend(backend, problem).values())


def assert_right(backend: ModuleType, problem: testing.Problem) -> None:
    exact = testing.oracle(problem)
    testing.assert_within(testing.run_backend(backend, problem), exact, testing.error_budget(problem, exact))


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_copy_without_a_fault_is_right(backend: ModuleType, tmp_path, device: str) -> None:
    """Otherwise an error would not have to come from a planted fault."""
    assert_right(with_fault(backend, tmp_path, None), make(device))


def test_heads_are_independent(backend: ModuleType, device: str) -> None:
    problem = make(device, **IN_CHUNKS)
    block_map = problem.inputs.block_map
    assert block_map.labels.tolist() == [[[[0, 1]], [[1, 0]]]]
    alone = []
    for h in range(2):
        head = problem._map_tensors(lambda tensor, h=h: tensor[:, h : h + 1])
        own = BlockMap(block_map.labels[:, h : h + 1], 16, 16, 3, 20)
        alone.append(run(backend, head._replace(inputs=head.inputs._replace(block_map=own))))
    assert_same_bits(run(backend, problem), [torch.cat(pair, dim=1) for pair in zip(*alone, strict=True)])


def test_any_strides(backend: ModuleType, device: str) -> None:
    problem = make(device, **SMALLER | {"head_dim": 16})
    scattered = problem._map_tensors(lambda tensor: torch.stack([tensor, tensor], -1)[..., 0])  # no dimension is dense
    assert scattered.inputs.query.stride(3) != 1
    block_map = problem.inputs.block_map
    transposed = replace(block_map, labels=block_map.labels.mT.contiguous().mT)
    assert transposed.labels.stride() != block_map.labels.stride()
    scattered = scattered._replace(inputs=scattered.inputs._replace(block_map=transposed))
    assert_same_bits(run(backend, problem), run(backend, scattered))
    expanded = problem.inputs.key[:, :, :1].expand_as(problem.inputs.key)
    assert_right(backend, problem._replace(inputs=problem.inputs._replace(key=expanded)))


def test_scores_of_minus_infinity_in_the_first_tile(backend: ModuleType, device: str) -> None:
    """After a tile of such scores there is no finite maximum yet; the next tile decides."""
    inputs = make(device, labels="critical", query_length=16, key_length=32, block_k=16).inputs
    query, key = inputs.query.abs() + 1, inputs.key.clone()
    key[:, :, :16] = -3e38
    saved = backend.forward(inputs._replace(query=query, key=key))
    weights = torch.softmax(inputs.scale * query @ key[:, :, 16:].mT, dim=-1)
    torch.testing.assert_close(saved.out_sparse, weights @ inputs.value[:, :, 16:])


def test_the_largest_score_may_be_in_any_tile(backend: ModuleType, device: str) -> None:
    """Scores differ by hundreds: what is rescaled to any but the largest score so far overflows."""
    assert_right(backend, make(device, **SMALLER | {"labels": "critical", "spread": 20.0}))


def test_scores_far_below_zero(backend: ModuleType, device: str) -> None:
    """There exp(0 - lse) overflows: a key past the end, whose score would be 0, must not be counted in any gradient."""
    problem = make(device, **SMALLER | {"labels": "critical"})
    query, key = problem.inputs.query.abs() + 6, -problem.inputs.key.abs() - 6
    problem = problem._replace(inputs=problem.inputs._replace(query=query, key=key))
    assert (testing.oracle(problem)["lse"] < -89).all()
    assert_right(backend, problem)


def test_nan_goes_where_the_mathematics_puts_it(backend: ModuleType, device: str) -> None:
    inputs = make(device, query_length=64, key_length=70).inputs
    labels = [[1, 0, -1, 0, 0], [0, 1, 0, -1, 0], [-1, -1, 1, 1, -1], [0, -1, -1, 0, 1]]
    labels = torch.tensor(labels, dtype=torch.int8, device=device)
    inputs = inputs._replace(block_map=BlockMap(labels[None, None], 16, 16, 64, 70))
    inputs.key[0, 0, 20] = math.nan  # in key block 1: marginal to query block 0, critical to 1, negligible to 2
    inputs.phi_key[0, 0, 20] = math.inf
    inputs.value[0, 0, 40] = math.nan  # in key block 2: marginal to query block 1, critical to 2, negligible to others
    inputs.phi_query[0, 0, 40] = math.nan  # query block 2 has no marginal block: linear = 0 whatever its features are
    saved = backend.forward(inputs)
    block = torch.arange(64, device=device) // 16
    assert torch.equal(saved.out_linear[0, 0].isnan(), (block <= 1)[:, None].expand(64, 8))
    assert torch.equal(saved.out_sparse[0, 0].isnan(), ((block == 1) | (block == 2))[:, None].expand(64, 8))
    assert torch.equal(saved.lse[0, 0].isnan(), block == 1)
    assert not saved.out_linear[0, 0, 32:48].any()


@pytest.mark.parametrize(("power", "zero"), [(-45, False), (-51, True)])
def test_denominators_below_the_specifications_smallest_count_as_zero(
    backend: ModuleType, power: int, zero: bool, device: str
) -> None:
    problem = make(device, **SMALLER | {"labels": "marginal"})
    inputs = problem.inputs
    small = inputs._replace(phi_query=inputs.phi_query * 2.0**power, phi_key=inputs.phi_key * 2.0**power)
    results = testing.run_backend(backend, problem._replace(inputs=small))
    if zero:
        assert not any(results[name].any() for name in ("linear", "grad_phi_query", "grad_phi_key", "grad_value"))
    else:  # the powers of two cancel
        assert torch.equal(results["linear"], backend.forward(inputs).out_linear)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 136}, "head_dim"),
        ({"block_q": 48}, "block_q"),
        ({"block_k": 256}, "block_k"),
    ],
)
def test_says_what_it_cannot_take(backend: ModuleType, change: dict, word: str, device: str) -> None:
    inputs = make(device, **change).inputs
    assert word in backend.unsupported(inputs.query, inputs.block_map)
    with pytest.raises(ValueError, match=word):
        backends.choose(backend.name, inputs.query, inputs.block_map)


def test_takes_only_tensors_of_its_device(backend: ModuleType) -> None:
    inputs = make("cpu").inputs
    assert "meta" in backend.unsupported(inputs.query.to("meta"), inputs.block_map)


@pytest.mark.backend("triton")
@pytest.mark.backend("numba")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_and_simulator_a_backend_says_how_to_get_either() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SIMULATOR.values()}
    code = "import json, sla_ref; print(json.dumps(sla_ref.list_backends()))"
    seen = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    for name, reason in json.loads(seen.stdout).items():
        if name in SIMULATOR and backends.list_backends()[name] is None:
            assert f"{SIMULATOR[name]}=1" in reason


@needs_gpu
def test_runs_on_torchs_current_stream(backend: ModuleType) -> None:
    """On another stream, kernels wait for the work that the stream still has to do."""
    problem = testing.make_problem(device="cuda")
    expected = run(backend, problem)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = problem._map_tensors(torch.zeros_like)
        torch.cuda._sleep(50_000_000)
        for tensor, values in zip(late.tensors, problem.tensors, strict=True):
            tensor.copy_(values)
        results = run(backend, late)
    stream.synchronize()
    assert_same_bits(expected, results)


@needs_gpu  # with 24 GB
def test_more_than_two_to_the_31_elements(backend: ModuleType) -> None:
    """All but the last two of the key blocks are negligible: what counts lies at offsets that int32 does not hold."""
    length = 270_000_000 // 128 * 128  # times 8 features: 2.2e9 elements
    query, last = (torch.rand(1, 1, tokens, 8, device="cuda") for tokens in (128, 256))
    key = torch.zeros(1, 1, length, 8, device="cuda")
    key[:, :, -256:] = last
    labels = torch.full((1, 1, 1, length // 128), NEGLIGIBLE, dtype=torch.int8, device="cuda")
    labels[..., -2], labels[..., -1] = MARGINAL, CRITICAL
    far = backend.forward(Inputs(query, key, key, query, key, BlockMap(labels, 128, 128, 128, length), 0.25))
    labels = labels[..., -2:].contiguous()
    near = backend.forward(Inputs(query, last, last, query, last, BlockMap(labels, 128, 128, 128, 256), 0.25))
    torch.testing.assert_close(far, near)


LONG = {"triton": (torch.bfloat16, 32760, 0.02), "numba": (torch.float32, 16380, 1e-5)}


@needs_gpu
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("default_phi", [False, True], ids=["phi given", "phi = softmax"])
def test_long_sequences_are_right_and_repeat(
    backend: ModuleType, default_phi: bool, head_dim: int, block_q: int
) -> None:
    """Thousands of thread blocks share the GPU: a race that small cases never lose shows here.

    The oracle would be N x N; the torch backend, on the same numbers in a wider dtype, replaces it.
    """
    dtype, length, allowed = LONG[backend.name]
    sizes = {"heads": 4, "query_length": length, "head_dim": head_dim, "block_q": block_q}
    problem = testing.make_problem(**sizes, critical_ratio=0.05, negligible_ratio=0.1, dtype=dtype, device="cuda")
    problem = problem.default_phi() if default_phi else problem
    first = testing.run_backend(backend, problem)
    for _ in range(5):
        assert_same_bits(list(first.values()), run(backend, problem))
    wider = torch.float32 if dtype.itemsize == 2 else torch.float64
    expected = testing.run_backend(backends.load("torch"), problem.to(wider))
    for name, values in first.items():
        error = (values.to(wider) - expected[name]).square().mean().sqrt()
        assert error <= allowed * expected[name].square().mean().sqrt(), name
