"""The checker is checked: every planted fault must be caught, by the check that is there for it."""

from __future__ import annotations

import functools
import math
import types

import pytest
import torch

import sla_ref
from sla_ref import backends, testing
from sla_ref.block_map import BlockMap
from sla_ref.protocol import Inputs

TORCH = backends.load("torch")
CASE = next(case for case in testing.CASES if case.name == "cross attention, unequal blocks")
RANDOM = next(case for case in testing.CASES if case.name == "random map")


def faulty(forward=None, backward=None):
    """The torch backend with a fault around its forward or backward."""
    return types.SimpleNamespace(
        name="faulty",
        softmax_inside=False,
        unavailable=lambda: None,
        unsupported=lambda q, m: None,
        forward=functools.partial(forward, TORCH.forward) if forward else TORCH.forward,
        backward=functools.partial(backward, TORCH.backward) if backward else TORCH.backward,
    )


def relabel(inputs: Inputs, change) -> Inputs:
    labels, block_map = inputs.block_map.labels.clone(), inputs.block_map
    change(labels)
    sizes = (block_map.block_q, block_map.block_k, block_map.query_length, block_map.key_length)
    return inputs._replace(block_map=BlockMap(labels, *sizes))


def drop_a_critical_block(run, inputs):
    def change(labels):
        labels[0, 0, 0, inputs.block_map.kv_indices[0, 0, 0, 0]] = -1

    return run(relabel(inputs, change))


def count_negligible_as_marginal(run, inputs):
    return run(relabel(inputs, lambda labels: labels.clamp_(min=0)))


def take_all_keys_for_the_linear_branch(run, inputs):
    right, wrong = run(inputs), run(relabel(inputs, lambda labels: labels.zero_()))
    return right._replace(out_linear=wrong.out_linear)


def unmasked_tail(run, inputs):
    _, k, v, _, pk, block_map, _ = inputs
    pad = -k.shape[2] % block_map.block_k
    k, v, pk = (torch.nn.functional.pad(t, (0, 0, 0, pad)) for t in (k, v, pk))
    sizes = (block_map.block_q, block_map.block_k, block_map.query_length, k.shape[2])
    return run(inputs._replace(key=k, value=v, phi_key=pk, block_map=BlockMap(block_map.labels, *sizes)))


def log2_lse(run, inputs):
    saved = run(inputs)
    return saved._replace(lse=saved.lse / math.log(2))


def skip_the_denominator(run, inputs):
    saved = run(inputs)
    ones = run(inputs._replace(value=torch.ones_like(inputs.value))).out_linear
    return saved._replace(out_linear=saved.out_linear * ones * 3)


def forget_scale(run, inputs):
    return run(inputs._replace(scale=1.0))


def epsilon_in_the_denominator(run, inputs):
    saved = run(inputs)
    marginal = (inputs.block_map.to_dense() == 0).to(inputs.query.dtype)
    denominator = ((inputs.phi_query @ inputs.phi_key.mT) * marginal).sum(-1, keepdim=True)
    return saved._replace(out_linear=saved.out_linear * denominator / (denominator + 1e-5))


def nan_for_rows_without_keys(run, inputs):
    saved = run(inputs)
    empty = saved.lse == -math.inf
    return saved._replace(out_sparse=saved.out_sparse.masked_fill(empty[..., None], math.nan))


def leave_rows_unwritten(run, inputs):
    saved = run(inputs)
    out = torch.empty_like(saved.out_sparse)
    out[:, :, :-1] = saved.out_sparse[:, :, :-1]
    return saved._replace(out_sparse=out)


def read_beside_the_tokens(run, inputs):
    v = inputs.value
    if v.stride(-2) > v.shape[-1] * v.shape[1]:  # a view with room around it: sum what lies there
        v = v + 0 * v.as_strided(v.shape, v.stride(), v.storage_offset() + v.shape[-1])
    return run(inputs._replace(value=v))


def tf32(run, inputs):
    def round_mantissa(t):
        return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    return run(inputs._replace(query=round_mantissa(inputs.query), key=round_mantissa(inputs.key)))


def half_precision_sums(run, inputs):
    saved = run(inputs)
    return saved._replace(lse=saved.lse.bfloat16().float())


def wrong_dtype(run, inputs):
    saved = run(inputs)
    return saved._replace(lse=saved.lse.double())


def strided_output(run, inputs):
    saved = run(inputs)
    return saved._replace(out_sparse=saved.out_sparse.transpose(1, 2).contiguous().transpose(1, 2))


def crash(run, inputs):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def noise(run, inputs):
    saved = run(inputs)
    return saved._replace(out_sparse=saved.out_sparse * (1 + 1e-7 * torch.rand_like(saved.out_sparse)))


def scribble_on_inputs(run, inputs):
    saved = run(inputs)
    inputs.query[0, 0, 0, 0] += 1
    return saved


def round_phi(run, inputs):
    """Features as float16 holds them: the smallest are lost."""
    phi_query, phi_key = inputs.phi_query.half().float(), inputs.phi_key.half().float()
    return run(inputs._replace(phi_query=phi_query, phi_key=phi_key))


def forget_scale_in_dk(run, *args):
    gradients = run(*args)
    return gradients._replace(key=gradients.key / args[3].scale)


def overwrite_dv(run, grad_sparse, *rest):
    whole, linear = run(grad_sparse, *rest), run(grad_sparse * 0, *rest)
    return whole._replace(value=linear.value)


def forget_delta_sparse(run, *args):
    *rest, saved = args
    return run(*rest, saved._replace(out_sparse=torch.zeros_like(saved.out_sparse)))


def forget_delta_linear(run, *args):
    *rest, saved = args
    return run(*rest, saved._replace(out_linear=torch.zeros_like(saved.out_linear)))


def forget_the_gradient_of_lse(run, grad_sparse, grad_linear, grad_lse, *rest):
    return run(grad_sparse, grad_linear, None, *rest)


def drop_the_last_query_block(run, grad_sparse, *rest):
    grad_sparse = grad_sparse.clone()
    grad_sparse[:, :, -1:] = 0
    return run(grad_sparse, *rest)


def round_the_gradient_of_phi(run, *args):
    """Round it to float16, whose range softmax's gradient leaves at large activations."""
    gradients = run(*args)
    return gradients._replace(phi_query=gradients.phi_query.half().float(), phi_key=gradients.phi_key.half().float())


FORWARD_FAULTS = {
    drop_a_critical_block: {"sparse", "lse"},
    count_negligible_as_marginal: {"linear"},
    take_all_keys_for_the_linear_branch: {"linear"},
    log2_lse: {"lse"},
    skip_the_denominator: {"linear"},
    epsilon_in_the_denominator: {"linear"},
    forget_scale: {"sparse", "lse"},
    tf32: {"sparse"},
    half_precision_sums: {"lse"},
    leave_rows_unwritten: {"sparse"},
    read_beside_the_tokens: {"sparse"},
    wrong_dtype: {"runs"},
    strided_output: {"runs"},
    crash: {"runs"},
    noise: {"repeats bit for bit, contiguous"},
    scribble_on_inputs: {"inputs are left as they were"},
}
BACKWARD_FAULTS = {
    forget_scale_in_dk: {"grad_key"},
    overwrite_dv: {"grad_value"},
    forget_delta_sparse: {"grad_query", "grad_key"},
    forget_delta_linear: {"grad_phi_query", "grad_phi_key"},
    forget_the_gradient_of_lse: {"grad_query", "grad_key"},
    drop_the_last_query_block: {"grad_query", "grad_value"},
}


def failures(backend, case=CASE, dtype=torch.float32) -> set[str]:
    checks = testing.check_case(backend, case, device="cpu", dtype=dtype)
    return {check.name for check in checks if not check.passed}


def test_nothing_fails_without_a_fault():
    assert failures(faulty()) == set()


@pytest.mark.parametrize("fault", FORWARD_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_forward_is_caught(fault):
    assert failures(faulty(forward=fault)) >= FORWARD_FAULTS[fault]


@pytest.mark.parametrize("fault", BACKWARD_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_backward_is_caught(fault):
    assert failures(faulty(backward=fault)) >= BACKWARD_FAULTS[fault]


def test_a_nan_where_there_is_no_key_is_caught():
    assert failures(faulty(forward=nan_for_rows_without_keys), RANDOM) >= {"sparse"}


def test_an_unmasked_tail_is_caught():
    tail = next(case for case in testing.CASES if case.name == "tail of 32760")
    assert failures(faulty(forward=unmasked_tail), tail) >= {"sparse", "lse"}


def test_half_precision_inside_softmax_is_caught():
    large = next(case for case in testing.CASES if case.name == "spread 20.0")
    assert failures(faulty(forward=round_phi), large, torch.float32) >= {"linear, phi = softmax"}
    found = failures(faulty(backward=round_the_gradient_of_phi), large, torch.float16)
    assert found >= {"grad_query, phi = softmax", "grad_key, phi = softmax"}


def test_swapped_ratios_are_caught():
    """Classification is compared with the specification's own, label by label."""
    problem = testing.make_problem(critical_ratio=0.2, negligible_ratio=0.6, block_k=8)
    arguments = (problem.inputs.query.double(), problem.inputs.key.double())
    swapped = sla_ref.classify_blocks(*arguments, 0.6, 0.2, block_q=64, block_k=8)
    right = sla_ref.reference.classify(*arguments, 0.2, 0.6, 64, 8)
    assert torch.equal(problem.inputs.block_map.labels, right)
    assert not torch.equal(swapped.labels, right)


def test_check_backend_names_what_failed(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    sla_ref.register_backend("faulty", faulty(backward=forget_scale_in_dk))
    report = testing.check_backend("faulty", device="cpu", dtypes=(torch.float32,), quick=True)
    assert not report.ok
    assert "FAIL" in str(report)
    assert "grad_key error" in str(report)
    with pytest.raises(ValueError, match="backend must be one of"):
        testing.check_backend("nope")


def test_check_backend_lists_what_is_not_taken(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    backend = faulty()
    backend.unsupported = lambda query, block_map: "only batch 2" if query.shape[0] != 2 else None
    sla_ref.register_backend("picky", backend)
    report = testing.check_backend("picky", device="cpu", dtypes=(torch.float32,), quick=True)
    assert not report.ok, "a report of no checks at all is not good news"
    assert len(report.refused) == 3
    assert "only batch 2" in str(report)


def test_check_function():
    assert testing.check_function(sla_ref.reference.sparse_linear_attention, quick=True).ok

    def without_lse(*args):
        return sla_ref.reference.sparse_linear_attention(*args)[:2]

    assert testing.check_function(without_lse, quick=True).ok

    def with_epsilon(*args):
        sparse, linear, lse = sla_ref.reference.sparse_linear_attention(*args)
        return sparse, linear * (1 - 1e-4), lse

    report = testing.check_function(with_epsilon, quick=True)
    assert {check.name for check in report.failures} >= {"linear", "grad_phi_query"}


def test_assert_within():
    problem = testing.make_problem()
    exact = testing.oracle(problem)
    budget = testing.error_budget(problem, exact)
    results = testing.run_backend(TORCH, problem)
    testing.assert_within(results, exact, budget)
    results["linear"][0, 0, 0, 0] += 1e-3
    with pytest.raises(AssertionError, match=r"over the error budget: FAIL linear error 1\.00e-03"):
        testing.assert_within(results, exact, budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_budget_is_as_tight_as_the_dtype(dtype):
    """A budget of some hundred rounding units of the result's size would hide faults."""
    problem = testing.make_problem(dtype=dtype)
    exact = testing.oracle(problem)
    for name, bound in testing.error_budget(problem, exact).items():
        size = exact[name].masked_fill(exact[name].isinf(), 0).square().mean().sqrt().item()
        unit = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        assert bound.rms <= 20 * unit * max(size, 1e-3), name


def test_make_problem_is_the_same_everywhere():
    one, other = testing.make_problem(seed=3), testing.make_problem(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))
    half = testing.make_problem(seed=3, dtype=torch.float16)
    torch.testing.assert_close(half.inputs.query.float(), one.inputs.query, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="labels must be 'classified'"):
        testing.make_problem(labels="nothing")
