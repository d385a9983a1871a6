"""The checker is checked: every planted fault must be caught, by the check that is there for it."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
import types
from pathlib import Path

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


def write_past_the_end(run, inputs):
    saved = run(inputs)
    out = torch.empty_like(saved.out_sparse).copy_(saved.out_sparse)
    if out.untyped_storage().nbytes() > out.nbytes:  # a view with room around it
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
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


def forget_to_rescale(run, inputs):
    """O^s as it was summed up, although the maximum has grown since."""
    saved = run(inputs)
    query, key, value, _, _, block_map, scale = inputs
    S = (scale * query @ key.mT).masked_fill(block_map.to_dense() != 1, -math.inf)
    maximum = S.cummax(-1).values  # up to each key, where the right one is of all keys
    weights = (S - maximum).exp().nan_to_num() / (saved.lse[..., None] - S.amax(-1, keepdim=True)).exp()
    return saved._replace(out_sparse=(weights.nan_to_num() @ value))


def use_the_states_of_head_0(run, inputs):
    saved, (value, phi_key) = run(inputs), (each[:, :1].expand_as(each) for each in (inputs.value, inputs.phi_key))
    return saved._replace(out_linear=run(inputs._replace(value=value, phi_key=phi_key)).out_linear)


def swap_the_outputs(run, inputs):
    saved = run(inputs)
    return saved._replace(out_sparse=saved.out_linear, out_linear=saved.out_sparse)


def leave_the_last_block_unwritten(run, inputs):
    saved, rows = run(inputs), inputs.query.shape[2] // inputs.block_map.block_q * inputs.block_map.block_q
    written = [torch.empty_like(each) for each in saved]
    for out, each in zip(written, saved, strict=True):
        out[:, :, :rows] = each[:, :, :rows]
    return saved._make(written)


def crash_on_half(run, *args):
    if args[0].dtype == torch.float16 and args[0].shape[2] == 65:
        raise RuntimeError("no half with 65 rows")
    return run(*args)


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


def forget_scale_in_dq(run, *args):
    gradients = run(*args)
    return gradients._replace(query=gradients.query / args[3].scale)


def take_lse_for_base_2(run, *args):
    *rest, saved = args
    return run(*rest, saved._replace(lse=saved.lse * math.log(2)))


def without_delta_linear(run, *args):
    *rest, saved = args
    return run(*rest, saved._replace(out_linear=torch.zeros_like(saved.out_linear)))


def flip_the_sign_of_dz(run, *args):
    right, without = run(*args), without_delta_linear(run, *args)
    return right._replace(phi_key=2 * without.phi_key - right.phi_key)


def forget_delta_in_dphi_query(run, *args):
    return run(*args)._replace(phi_query=without_delta_linear(run, *args).phi_query)


def drop_a_query_block_from_dh(run, grad_sparse, grad_linear, *rest):
    cut = grad_linear.clone()
    cut[:, :, -1:] = 0
    right, wrong = run(grad_sparse, grad_linear, *rest), run(grad_sparse, cut, *rest)
    return right._replace(value=wrong.value, phi_key=wrong.phi_key)


def count_negligible_as_marginal_again(run, *args):
    *grads, inputs, saved = args
    return run(*grads, relabel(inputs, lambda labels: labels.clamp_(min=0)), saved)


def overwrite_dv(run, grad_sparse, *rest):
    whole, linear = run(grad_sparse, *rest), run(grad_sparse * 0, *rest)
    return whole._replace(value=linear.value)


def forget_delta_sparse(run, *args):
    *rest, saved = args
    return run(*rest, saved._replace(out_sparse=torch.zeros_like(saved.out_sparse)))


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
    write_past_the_end: {"writes only inside its tensors"},
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
    without_delta_linear: {"grad_phi_query", "grad_phi_key"},
    forget_the_gradient_of_lse: {"grad_query", "grad_key"},
    drop_the_last_query_block: {"grad_query", "grad_value"},
}


SUSPECTED = {
    "sparse": forget_to_rescale,
    "linear": use_the_states_of_head_0,
    "lse": log2_lse,
    "sparse lse": forget_scale,
    "sparse linear": swap_the_outputs,
    "sparse linear lse": leave_the_last_block_unwritten,
    "grad_query": forget_scale_in_dq,
    "grad_key": forget_scale_in_dk,
    "grad_value": overwrite_dv,
    "grad_query grad_key": forget_delta_sparse,
    "grad_query grad_key grad_value": take_lse_for_base_2,
    "grad_phi_query": forget_delta_in_dphi_query,
    "grad_phi_key": flip_the_sign_of_dz,
    "grad_phi_query grad_phi_key": without_delta_linear,
    "grad_value grad_phi_key": drop_a_query_block_from_dh,
    "grad_value grad_phi_query grad_phi_key": count_negligible_as_marginal_again,
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


def report_of(backend, case=CASE, dtype=torch.float32) -> str:
    """The text of a report on one case, with its line breaks as single spaces."""
    checks = testing.check_case(backend, case, device="cpu", dtype=dtype)
    return " ".join(str(testing.Report("faulty", checks)).split())


@pytest.mark.parametrize("wrong", testing._LOOK_AT)
def test_a_report_says_where_to_look(wrong):
    """Each fault is one that the place which the report names could have."""
    is_forward = wrong.split()[0] in testing.OUTPUTS
    text = report_of(faulty(**{"forward" if is_forward else "backward": SUSPECTED[wrong]}))
    places = [place for place in testing._LOOK_AT.values() if f"look at {place}" in text]
    assert places == [testing._LOOK_AT[wrong]]
    assert ("the backward is right where it is given the forward of torch" in text) == is_forward
    right = [
        name for name in (*testing.OUTPUTS, *testing.GRADIENTS) if f"FAIL {CASE.at(torch.float32)}: {name}" not in text
    ]
    assert f"right everywhere: {', '.join(right)} " in text or not right


def test_a_report_says_where_softmax_is_wrong():
    large = next(case for case in testing.CASES if case.name == "spread 20.0")
    text = report_of(faulty(backward=round_the_gradient_of_phi), large, torch.float16)
    assert "look at the features of phi = softmax and the gradient through them" in text


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_report_shows_the_worst_element(half):
    def spoil(run, *args):
        result = run(*args)
        (result.out_sparse if half == "forward" else result.key)[0, 1, 40, 3] += 1
        return result

    def spoil_a_neighbour(run, *args):
        result = spoil(run, *args)
        (result.out_sparse if half == "forward" else result.key)[0, 0, 33, 3] += 0.1
        return result

    text = report_of(faulty(**{half: spoil_a_neighbour}))
    labels = testing.make_problem(**CASE.arguments).inputs.block_map.labels[0, 1]
    side, other, block, of_block = (
        ("query", "key", 1, labels[1]) if half == "forward" else ("key", "query", 2, labels[:, 2])
    )
    counts = [of_block.tolist().count(label) for label in (1, 0, -1)]
    assert re.search(
        rf"worst at b 0, h 1, row 40: (\S+), expected (\S+) in {side} block {block}, with "
        rf"{counts[0]} critical, {counts[1]} marginal, {counts[2]} negligible {other} blocks "
        r"over the bound: b 0, h 0 to 1, row 33 to 40; 2 rows in all",
        text,
    )
    assert float(re.search("error ([^,]+), ", text)[1]) == pytest.approx(1, rel=1e-3)


def test_a_report_names_what_it_saw():
    text = report_of(faulty(forward=nan_for_rows_without_keys), RANDOM)
    assert "sparse: NaN in 2048 of 6400 elements worst at b 0, h 0, row 0: nan, expected 0" in text
    assert "with 0 critical, " in text and "NaN is 0 / 0" in text
    assert "look at the sum of O^s, since lse and so the scores are right" in text
    assert "lse as float32 of shape (1, 2, 65), got float64 of shape (1, 2, 65)" in report_of(
        faulty(forward=wrong_dtype)
    )
    strides = "contiguous on cpu, got strides (4160, 32, 64, 1) for shape (1, 2, 65, 32)"
    assert strides in report_of(faulty(forward=strided_output))
    scribbled = report_of(faulty(forward=scribble_on_inputs))
    assert "inputs are left as they were: other bits in query" in scribbled
    assert "look at" not in scribbled, "each run gets inputs that nobody has changed"
    assert "repeats bit for bit, contiguous: other bits in sparse, grad_query" in report_of(faulty(forward=noise))
    ragged = next(case for case in testing.CASES if case.name == "ragged")  # with one critical block for some queries
    infinite = report_of(faulty(forward=drop_a_critical_block), ragged)
    assert "lse: infinite in other places than the equations are worst at b 0, h 0, row 0: -inf, expected" in infinite


def test_a_report_is_short_and_counts(monkeypatch):
    monkeypatch.setattr(testing, "CASES", (CASE, RANDOM))
    report = testing.check_backend(
        faulty(backward=forget_scale_in_dk), device="cpu", dtypes=(torch.float32, torch.half)
    )
    lines = str(report).splitlines()
    assert lines[0].startswith("backend 'faulty' on cpu: ")
    assert lines[1] == "failed, of 4 cases: grad_key in 4"
    assert "failing in float32: all" in lines and "failing in float16: all" in lines
    assert len(report.failures) > 8 and str(report).count("FAIL") == 1

    crashed = testing.check_backend(faulty(backward=crash_on_half), device="cpu", dtypes=(torch.float32, torch.half))
    assert "failed, of 4 cases: runs in 1" in str(crashed)
    assert f"failing in float16: {CASE.name}" in str(crashed) and "failing in float32" not in str(crashed)
    assert f"FAIL {CASE.name}, float16: runs: RuntimeError: no half with 65 rows" in str(crashed)


def test_a_crash_in_any_run_is_one_failure():
    def own_forward_only(run, *args):
        if args[-1].lse.data_ptr() not in seen:
            raise KeyError("not mine")
        return run(*args)

    def remember(run, inputs):
        saved = run(inputs)
        seen.add(saved.lse.data_ptr())
        kept.append(saved)
        return saved

    seen, kept = set(), []  # what is kept stays at its address
    assert failures(faulty(remember, own_forward_only)) == {"runs", "runs, phi = softmax"}


def test_check_backend_takes_the_backend_itself(monkeypatch):
    monkeypatch.setattr(testing, "CASES", (CASE,))
    report = testing.check_backend(faulty(), device="cpu", dtypes=(torch.float32,))
    assert report.ok and str(report).startswith("backend 'faulty' on cpu: ")
    assert "faulty" not in sla_ref.list_backends()
    with pytest.raises(TypeError, match="a backend must have a function 'unavailable'"):
        testing.check_backend(3)
    broken = faulty()
    broken.unavailable = lambda: "it needs a screwdriver"
    with pytest.raises(RuntimeError, match="backend 'faulty' cannot be used here: it needs a screwdriver"):
        testing.check_backend(broken)


def test_testing_is_there_when_it_is_asked_for():
    """As a reader types it; then what docs/backends.md says runs too."""
    page = (Path(__file__).parents[1] / "docs" / "backends.md").read_text(encoding="utf-8")
    (snippet,) = [
        code for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if "mine" in code
    ]
    lines = [
        "import sys, sla_ref",
        "assert 'testing' in dir(sla_ref) and 'sla_ref.testing' not in sys.modules",
        "sla_ref.testing.CASES = sla_ref.testing.CASES[1:2]",
        "from sla_ref.backends import pytorch as my_module",
        snippet,
        "assert len(report.checks) > 20",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
    with pytest.raises(AttributeError, match="module 'sla_ref' has no attribute 'tasting'"):
        _ = sla_ref.tasting


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
    assert "grad_key:\n     error" in str(report)
    with pytest.raises(ValueError, match="backend must be one of"):
        testing.check_backend("nope")
    with pytest.raises(ValueError, match="backend must name one backend to check, got 'auto'"):
        testing.check_backend("auto")


def test_check_backend_lists_what_is_not_taken(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    backend = faulty()
    backend.unsupported = lambda query, block_map: "only batch 2" if query.shape[0] != 2 else None
    sla_ref.register_backend("picky", backend)
    report = testing.check_backend("picky", device="cpu", dtypes=(torch.float32,), quick=True)
    assert not report.ok, "a report of no checks at all is not good news"
    assert str(report).startswith("backend 'picky' on cpu: nothing was checked, since it supports none of the cases")
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
    assert "look at the linear branch" in str(report) and "the backward is right" not in str(report)

    def wrong_without_lse(*args):
        return [output * 2 for output in without_lse(*args)]

    assert "look at" not in str(testing.check_function(wrong_without_lse, quick=True)), "lse may be wrong or right"


def test_assert_within():
    problem = testing.make_problem()
    exact = testing.oracle(problem)
    budget = testing.error_budget(problem, exact)
    results = testing.run_backend(TORCH, problem)
    testing.assert_within(results, exact, budget)
    results["linear"][0, 0, 0, 0] += 1e-3
    with pytest.raises(AssertionError, match=r"over the error budget: FAIL linear:\s+error 1\.00e-03"):
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
    with pytest.raises(ValueError, match="labels must be one of 'classified'"):
        testing.make_problem(labels="nothing")
