"""Is a kernel right? Problems, a float64 oracle, an error budget, and the checks that every backend has to pass.

Both sides of a comparison get the same block map: a near-tie in a ranking that falls the other way is not a numerical
error. The budget is not a constant. Inputs are rounded to the dtype first; then the equations themselves, run in that
dtype, say how much error the dtype costs. A kernel may have twice that (three times for gradients) plus the rounding of
its result.

    report = sla_ref.testing.check_backend("triton", device="cuda")
    assert report.ok, report
"""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import backends, reference
from .attention import run_backward, run_forward
from .block_map import CRITICAL, MARGINAL, NEGLIGIBLE, BlockMap, classify_blocks
from .checks import (
    check_block_size,
    check_bool,
    check_callable,
    check_choice,
    check_dtype,
    check_scale,
    check_seed,
    find_device,
    shown,
)
from .feature_maps import FEATURE_MAPS, softmax
from .protocol import Backend, Gradients, Inputs, Saved

OUTPUTS = ("sparse", "linear", "lse")
GRADIENTS = tuple(f"grad_{name}" for name in Gradients._fields)
CLASSES = {"critical": CRITICAL, "marginal": MARGINAL, "negligible": NEGLIGIBLE}

Results = dict[str, Tensor]
"""Tensors by their names, such as those in OUTPUTS and GRADIENTS."""


# --- problems --------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """The input of one forward and one backward."""

    inputs: Inputs
    grad_sparse: Tensor
    grad_linear: Tensor
    grad_lse: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; the gradient of lse is float32 or better, as lse is."""
        problem = self._map_tensors(lambda tensor: tensor.to(dtype))
        if self.grad_lse is None:
            return problem
        return problem._replace(grad_lse=self.grad_lse.to(torch.promote_types(dtype, torch.float32)))

    def default_phi(self) -> Problem:
        """The same problem as most users have it: phi = softmax is left to the operator, and nothing is made of lse."""
        return self._replace(inputs=self.inputs._replace(phi_query=None, phi_key=None), grad_lse=None)

    @property
    def named(self) -> Results:
        """All tensors but the block map's by their names: inputs, then gradients of the outputs."""
        named = zip((*Inputs._fields[:5], *self._fields[1:]), (*self.inputs[:5], *self[1:]), strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}

    @property
    def tensors(self) -> list[Tensor]:
        """The values of `named`."""
        return list(self.named.values())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Problem:
        def changed(tensors: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
            return (tensor if tensor is None else change(tensor) for tensor in tensors)

        inputs = Inputs._make([*changed(self.inputs[:5]), self.inputs.block_map, self.inputs.scale])
        return Problem._make([inputs, *changed(self[1:])])


def make_problem(
    *,
    batch: int = 1,
    heads: int = 2,
    query_length: int = 200,
    key_length: int | None = None,
    head_dim: int = 64,
    block_q: int = 64,
    block_k: int = 64,
    critical_ratio: float = 0.3,
    negligible_ratio: float = 0.3,
    labels: str = "classified",
    feature_map: str = "softmax",
    spread: float = 1.0,
    equal_keys: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Problem:
    """Random inputs of an operator, the same for every device and, up to rounding, for every dtype.

    Args:
        batch, heads, query_length, key_length, head_dim: the sizes B, H, Nq, Nk, D; Nk is Nq if None.
        block_q, block_k, critical_ratio, negligible_ratio: as in `sla_ref.classify_blocks`.
        labels: "classified"; "random", a map with every number of critical blocks from none to all; or "critical",
            "marginal", "negligible", a map of only that class.
        feature_map: a name that `sla_ref.sparse_linear_attention` accepts.
        spread: standard deviation of query and key; the scores have spread squared. The features are those of spread 1.
        equal_keys: whether all keys are the same, which makes all scores of a row ties.
        dtype, device, seed: of the tensors.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    sizes = {"batch": batch, "heads": heads, "query_length": query_length, "head_dim": head_dim}
    sizes |= {"block_q": block_q, "block_k": block_k} | ({} if key_length is None else {"key_length": key_length})
    for name, size in sizes.items():
        check_block_size(name, size)
    check_choice("labels", labels, ("classified", "random", *CLASSES))
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_scale(spread, "spread")
    check_bool("equal_keys", equal_keys)
    check_dtype("dtype", dtype)
    check_seed(seed)
    device = find_device("device", device)
    key_length = query_length if key_length is None else key_length
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64)

    query, key, value = (normal(length, head_dim) for length in (query_length, key_length, key_length))
    if equal_keys:
        key = key[:, :, :1].expand_as(key)
    phi = FEATURE_MAPS[feature_map]
    exact = [query * float(spread), key * float(spread), value, phi(query), phi(key)]
    exact += [normal(query_length, head_dim), normal(query_length, head_dim), normal(query_length)]
    *tensors, grad_lse = (tensor.to(dtype).to(device).contiguous() for tensor in exact)
    query, key = tensors[:2]
    block_map = classify_blocks(query, key, critical_ratio, negligible_ratio, block_q=block_q, block_k=block_k)
    if labels != "classified":
        lengths = (block_q, block_k, query_length, key_length)
        block_map = BlockMap(_labels(labels, block_map.labels, generator), *lengths)
    inputs = Inputs._make([*tensors[:5], block_map, head_dim**-0.5])
    return Problem(inputs, tensors[5], tensors[6], grad_lse.to(torch.promote_types(dtype, torch.float32)))


def _labels(kind: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if kind in CLASSES:
        return torch.full_like(like, CLASSES[kind])
    share = torch.linspace(0, 1, like.shape[2])[:, None]  # of critical blocks: none in the first row, all in the last
    critical = torch.rand(like.shape, generator=generator) < share
    rest = torch.randint(-1, 1, like.shape, generator=generator)
    return torch.where(critical, CRITICAL, rest).to(like)


# --- the oracle and its budget ---------------------------------------------------------------------------------------


def run_function(
    function: Callable[..., Sequence[Tensor]], problem: Problem, phi: Callable[[Tensor], Tensor] = softmax
) -> Results:
    """Outputs and autograd's gradients of a function that is called as `reference.sparse_linear_attention` is.

    It may leave out lse if the problem has no gradient for it. `phi` makes the features where the problem has none.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in problem.inputs[:5] if tensor is not None]
    query, key, value, *features = leaves
    features = features or [phi(query), phi(key)]
    *_, block_map, scale = problem.inputs
    blocks = (block_map.block_q, block_map.block_k)
    outputs = function(query, key, value, *features, block_map.labels, *blocks, scale)
    given = [grad for grad in problem[1:] if grad is not None]
    grads = torch.autograd.grad(outputs[: len(given)], leaves, given)
    results = dict(zip(OUTPUTS, (output.detach() for output in outputs), strict=False))
    return results | dict(zip(GRADIENTS, grads, strict=False))


def run_backend(backend: Backend, problem: Problem, saved: Saved | None = None) -> Results:
    """Outputs and gradients of a backend; only its backward runs where `saved` holds the forward of another."""
    if saved is None:
        saved = Saved(*run_forward(backend, problem.inputs))
    gradients = run_backward(backend, *problem[1:], problem.inputs, saved)
    named = zip((*OUTPUTS, *GRADIENTS), (*saved, *gradients), strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def oracle(problem: Problem) -> Results:
    """The equations in float64, on the problem's rounded inputs. N x N memory."""
    return run_function(reference.sparse_linear_attention, problem.to(torch.float64))


@dataclass(frozen=True)
class Bound:
    """What an error may be at most: its largest entry, and its root mean square, both in the unit of the tensor.

    `plain` is the root mean square of the equations' own error in the dtype, or NaN where the budget does not use it.
    """

    largest: float
    rms: float
    plain: float = math.nan


def error_budget(problem: Problem, exact: Results) -> dict[str, Bound]:
    """The error that each result may have, by name.

    float64: 1e-12, scaled by the largest value where that is above 1. Else: twice the error of the equations run in the
    dtype, three times for gradients, and the rounding noise: four times as the largest entry, twice as root mean
    square. lse is always computed in float32 or better. Where the equations overflow in the dtype, as the gradient of
    softmax does in float16, they are run in float32 on features that are rounded to the dtype.
    """
    dtype = problem.inputs.query.dtype
    if dtype == torch.float64:
        return {name: Bound(*[1e-12 * max(1.0, _largest(values))] * 2) for name, values in exact.items()}

    def rounded_softmax(tokens: Tensor) -> Tensor:
        features = softmax(tokens)
        return features + (features.to(dtype).to(features) - features).detach()  # the gradient is softmax's own

    plain = run_function(reference.sparse_linear_attention, problem)
    wide = run_function(reference.sparse_linear_attention, problem.to(torch.float32), rounded_softmax)
    plain["lse"] = wide["lse"]
    noise = _rounding_noise(problem, exact)
    budget = {}
    for name, values in exact.items():
        error = _difference(plain[name], values)
        if not error.isfinite().all():
            error = _difference(wide[name], values)
        factor = 3 if name in GRADIENTS else 2
        budget[name] = Bound(
            largest=factor * _largest(error) + 4 * _largest(noise[name]),
            rms=factor * _rms(error) + 2 * _rms(noise[name]),
            plain=_rms(error),
        )
    return budget


def _rounding_noise(problem: Problem, exact: Results) -> Results:
    """The effect of rounding on each result: one rounding unit of the dtype on every term of its sums.

    Roundings add up as independent errors do, by their squares, and do not cancel where terms do: with one key, dQ is
    exactly 0, but as the difference of two numbers that both were rounded. Rounding the scores, in float32, moves P by
    |S| units. Where phi is softmax, its gradient goes on into query and key as dx = phi (dphi - phi . dphi).
    """
    unit, unit_scores = torch.finfo(problem.inputs.query.dtype).eps, torch.finfo(torch.float32).eps
    wide = problem.to(torch.float64)
    query, key, value, phi_query, phi_key, block_map, scale = wide.inputs
    if phi_query is None or phi_key is None:
        phi_query, phi_key = softmax(query), softmax(key)
    Q2, K2, V2, phi_Q2, phi_K2 = (tensor.square() for tensor in (query, key, value, phi_query, phi_key))
    dO2, dOl2 = wide.grad_sparse.square(), wide.grad_linear.square()
    dL2 = 0.0 if wide.grad_lse is None else wide.grad_lse.square()[..., None]
    label = block_map.to_dense()

    S = (scale * query @ key.mT).masked_fill(label != CRITICAL, -math.inf)
    size_S = (scale * (Q2 @ K2.mT).sqrt()).masked_fill(label != CRITICAL, 0.0).amax(-1, keepdim=True)
    P = (S - exact["lse"].double()[..., None]).exp().nan_to_num() * (unit + unit_scores * (1 + size_S))
    P2 = P.square()
    dS2 = P2 * (dO2 @ V2.mT + (dO2 * exact["sparse"].square()).sum(-1, keepdim=True) + dL2) * scale**2

    A = (phi_query @ phi_key.mT).masked_fill(label != MARGINAL, 0.0)
    inverse = 1 / A.sum(-1, keepdim=True)
    inverse = inverse.masked_fill(inverse.isinf(), 0.0)
    W2 = (unit * A * inverse).square()
    dA2 = (dOl2 @ V2.mT + (dOl2 * exact["linear"].square()).sum(-1, keepdim=True)) * (unit * inverse).square()
    dA2 = dA2.masked_fill(label != MARGINAL, 0.0)
    squares = {
        "sparse": P2 @ V2,
        "linear": W2 @ V2,
        "lse": (unit_scores * (1 + size_S.squeeze(-1))).square(),
        "grad_query": dS2 @ K2,
        "grad_key": dS2.mT @ Q2,
        "grad_value": P2.mT @ dO2 + W2.mT @ dOl2,
    }
    of_phi = {"grad_phi_query": dA2 @ phi_K2, "grad_phi_key": dA2.mT @ phi_Q2}
    if "grad_phi_query" in exact:
        squares |= of_phi
    else:
        Ol = exact["linear"]
        dA = (wide.grad_linear @ value.mT - (wide.grad_linear * Ol).sum(-1, keepdim=True)) * inverse
        dA = dA.masked_fill(label != MARGINAL, 0.0)
        for name, phi2, dphi in (("query", phi_Q2, dA @ phi_key), ("key", phi_K2, dA.mT @ phi_query)):
            square = of_phi[f"grad_phi_{name}"] + (unit * dphi).square()
            squares[f"grad_{name}"] += phi2 * (square + (phi2 * square).sum(-1, keepdim=True))
    return {name: values.sqrt() for name, values in squares.items()}


def assert_within(results: Results, exact: Results, budget: dict[str, Bound]) -> None:
    """Raise AssertionError naming every result that is over its budget."""
    over = [check for check in _compare(results, exact, budget) if not check.passed]
    if over:
        raise AssertionError("over the error budget: " + "\n".join(map(str, over)))


def _difference(values: Tensor, exact: Tensor) -> Tensor:
    """values - exact in float64, with 0 where both are the same infinity, which subtraction would make a NaN."""
    values, exact = values.double(), exact.double()
    return torch.where(values == exact, 0.0, values - exact)


def _largest(values: Tensor) -> float:
    """Largest finite magnitude; infinite if there is a NaN."""
    values = values.double().abs()
    if values.isnan().any():
        return math.inf
    return values.masked_fill(values.isinf(), 0.0).amax().item()


def _rms(values: Tensor) -> float:
    values = values.double()
    return values.masked_fill(values.isinf(), 0.0).square().mean().sqrt().item()


# --- checks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """How far a result is from the oracle, in numbers without a unit."""

    largest: float
    """The largest entry of the error, over that of the exact result."""
    rms: float
    """The root mean square of the error, over that of the exact result."""
    plain: float
    """The root mean square of the error, over that of the equations' own error in the dtype; NaN in float64."""
    budget: float
    """The share of its bound that the error uses, by largest entry or by root mean square, whichever is more."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was seen; `error` is there where a result was compared with the oracle."""

    name: str
    passed: bool
    seen: str = ""
    case: str = ""
    error: Error | None = None

    def __str__(self) -> str:
        what = ": ".join(part for part in (self.case, self.name) if part)
        lines = self.seen.splitlines()
        text = ("\n     " if len(lines) > 1 else " ").join([f"{what}:", *lines])
        return f"{'ok  ' if self.passed else 'FAIL'} {text}"

    @property
    def topic(self) -> str:
        """What was looked at, such as a tensor, whatever the run it comes from."""
        return self.name.split(",")[0]


BACKWARD_ONLY = "forward by torch, backward here"
DEFAULT_PHI = "phi = softmax"

# Where a fault is, by what is wrong: outputs, or the gradients of a backward that is given the torch backend's forward.
_LOOK_AT = {
    "sparse": "the sum of O^s, since lse and so the scores are right: rescaled when the maximum grows, divided by l in "
    "the end, 0 in rows without a critical block [Alg. 1 L11, L16]",
    "linear": "the linear branch: which blocks are marginal, the sums H and Z, the division by phi(Q) Z, 0 in rows "
    "without a marginal block [Alg. 1 L12, L13, L16]",
    "lse": "L = m + log l: a natural logarithm, in float32 or better [Alg. 1 L16]",
    "sparse lse": "what O^s and L share: which blocks are critical, the scores and their scale, the end of the last "
    "key block [Alg. 1 L9, L10]",
    "sparse linear": "what both outputs share and lse does not: value, and the order of out_sparse and out_linear",
    "sparse linear lse": "what all outputs share: how block_q and block_k cut the tokens into blocks, the last block",
    "grad_query": "the sum dQ and its scale [Alg. 2 L12]",
    "grad_key": "the sum dK and its scale [Alg. 2 L12]",
    "grad_value": "the sum dV, to which both branches add [Alg. 2 L10, L17]",
    "grad_query grad_key": "dS: the product of dO^s and V, D^s, the gradient of lse [Alg. 2 L2, L11]",
    "grad_query grad_key grad_value": "what they share: which blocks are critical, P = exp(S - L), dO^s [Alg. 2 L9]",
    "grad_phi_query": "dphi(Q), and the sums H and Z in it [Alg. 2 L5]",
    "grad_phi_key": "dZ and dphi(K) [Alg. 2 L4, L14, L16]",
    "grad_phi_query grad_phi_key": "D^l [Alg. 2 L2]",
    "grad_value grad_phi_key": "dH, and the sum of dH and dZ over query blocks [Alg. 2 L3, L14]",
    "grad_value grad_phi_query grad_phi_key": "what they share: which blocks are marginal, the division by phi(Q) Z",
}


@dataclass
class Report:
    """All checks of a backend or function. Its text sums them up, and shows of each tensor the first failure."""

    subject: str
    checks: list[Check] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Cases that the backend does not support, with its reason."""

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def ok(self) -> bool:
        """Whether anything was checked and all of it passed."""
        return bool(self.checks) and not self.failures

    def __str__(self) -> str:
        passed = f"{len(self.checks) - len(self.failures)} of {len(self.checks)} checks passed"
        lines = [
            f"{self.subject}: {passed if self.checks else 'nothing was checked, since it supports none of the cases'}"
        ]
        lines += [f"not supported: {refusal}" for refusal in self.refused]
        if self.failures:
            summary = (*self._summary(), *self._suspects())
            lines += [textwrap.fill(line, 100, subsequent_indent="     ") for line in summary]
        first: dict[str, Check] = {}
        for check in self.failures:
            first.setdefault(check.seen if check.topic == "runs" else check.topic, check)
        return "\n".join([*lines, *map(str, first.values())])

    def _summary(self) -> Iterator[str]:
        """What failed in how many cases, what never did, and which cases they are."""
        tried, failing = (_by_dtype(check.case for check in checks) for checks in (self.checks, self.failures))
        cases_of: dict[str, set[str]] = {check.topic: set() for check in self.failures}
        for check in self.failures:
            cases_of[check.topic].add(check.case)
        counts = ", ".join(f"{topic} in {len(cases)}" for topic, cases in cases_of.items())
        yield f"failed, of {sum(map(len, tried.values()))} cases: {counts}"
        tensors = dict.fromkeys(check.topic for check in self.checks if check.topic in (*OUTPUTS, *GRADIENTS))
        if right := [name for name in tensors if name not in cases_of]:
            yield f"right everywhere: {', '.join(right)}"
        for dtype, names in failing.items():
            yield f"failing in {dtype}: {'all' if names == tried[dtype] else '; '.join(names)}"

    def _suspects(self) -> Iterator[str]:
        """Where to look, by the first case that fails."""
        failures = [check for check in self.failures if check.case == self.failures[0].case]
        tried, wrong = {check.name for check in self.checks}, {check.name for check in failures}
        outputs = [name for name in OUTPUTS if name in wrong and "lse" in tried]  # a function may leave out lse
        gradients = [name for name in GRADIENTS if f"{name}, {BACKWARD_ONLY}" in wrong]
        for names in (outputs, gradients):
            if (place := _LOOK_AT.get(" ".join(names))) is not None:
                yield f"look at {place}"
        if not gradients and not wrong.isdisjoint(GRADIENTS) and f"lse, {BACKWARD_ONLY}" in tried:
            yield "the backward is right where it is given the forward of torch"
        if all(name.endswith(DEFAULT_PHI) for name in wrong):
            yield "look at the features of phi = softmax and the gradient through them: all is right where phi is given"
        if any("NaN" in check.seen for check in failures):
            yield "NaN is 0 / 0 or inf - inf, or was read from memory that nobody wrote or that lies between the tokens"


def _by_dtype(cases: Iterable[str]) -> dict[str, list[str]]:
    """The names of the cases that were tried in each dtype; `Case.at` joins the two."""
    named: dict[str, list[str]] = {}
    for case in dict.fromkeys(cases):
        name, _, dtype = case.rpartition(", ")
        named.setdefault(dtype, []).append(name)
    return named


@dataclass(frozen=True)
class Case:
    """A named problem, as arguments of `make_problem`."""

    name: str
    arguments: dict[str, Any]
    quick: bool = False

    def at(self, dtype: torch.dtype) -> str:
        """What a report calls this problem in a dtype."""
        return f"{self.name}, {str(dtype).removeprefix('torch.')}"

    def __str__(self) -> str:
        return self.name


def _case(name: str, *, quick: bool = False, **arguments: Any) -> Case:
    return Case(name, arguments, quick)


_BLOCKS: dict[str, Any] = {"block_q": 32, "block_k": 32, "head_dim": 32}
_SMALL = {"query_length": 100, **_BLOCKS}

CASES: tuple[Case, ...] = (
    _case("ragged", quick=True, query_length=150),
    _case("batch 2, heads 3", batch=2, heads=3, query_length=40, block_q=16, block_k=16, head_dim=16),
    _case("cross attention, unequal blocks", quick=True, query_length=65, key_length=100, **_BLOCKS | {"block_k": 16}),
    _case("random map", quick=True, labels="random", **_SMALL),
    *(_case(f"N {n}", query_length=n) for n in (1, 63, 64, 65, 127)),
    _case("tail of 32760", query_length=32760 % 64 + 2 * 64, critical_ratio=0.6),
    *(_case(f"D {d}", query_length=70, **_BLOCKS | {"head_dim": d}) for d in (16, 40, 72, 80, 96)),
    *(_case(f"D 128, blocks {q} x 64", head_dim=128, block_q=q) for q in (64, 128)),
    *(
        _case(f"blocks {q} x {k}", block_q=q, block_k=k, query_length=150, key_length=140, head_dim=32)
        for q, k in ((16, 16), (128, 64), (64, 128), (128, 128))
    ),
    *(_case(f"all {kind}", labels=kind, **_SMALL) for kind in ("critical", "marginal", "negligible")),
    _case("sparse only", negligible_ratio=1.0, **_SMALL),
    _case("no negligible", negligible_ratio=0.0, **_SMALL),
    _case("equal keys", equal_keys=True, **_SMALL),
    _case("scores of 1e4", spread=100.0, **_SMALL),
    *(
        _case(f"spread {spread}", spread=spread, critical_ratio=0.6, **_SMALL | {"block_k": 16})
        for spread in (4.0, 20.0, 100.0)
    ),
    _case("relu, zero denominators", feature_map="relu", **_SMALL | {"head_dim": 16}),
    _case("elu", feature_map="elu", **_SMALL),
)
"""The problems that a backend is tried on; only the `quick` ones where time is short."""


def check_case(
    backend: Backend, case: Case, *, device: str | torch.device, dtype: torch.dtype, thorough: bool = True
) -> list[Check]:
    """The checks of a backend on one problem; `[]` if it does not support the problem.

    The problem is tried with phi given, and with phi = softmax left to the operator. The tensors are strided views into
    NaN, and uninitialised memory is NaN too, between bands of NaN: what is read outside the tokens, or never written,
    shows in the values, and what is written outside a tensor shows in the bands.
    `thorough` runs again to see that bits repeat and are those of contiguous inputs, that inputs are not changed, and
    that forward and backward go with those of the torch backend.
    """
    problem = make_problem(**case.arguments, dtype=dtype, device=device)
    if backend.unsupported(problem.inputs.query, problem.inputs.block_map) is not None:
        return []
    checks = _check_problem(backend, problem, thorough)
    if "feature_map" not in case.arguments and (thorough or case.quick):  # the default is softmax
        found = _check_problem(backend, problem.default_phi(), thorough)
        checks += [replace(check, name=f"{check.name}, {DEFAULT_PHI}") for check in found]
    return [replace(check, case=case.at(dtype)) for check in checks]


def _check_problem(backend: Backend, problem: Problem, thorough: bool) -> list[Check]:
    exact = oracle(problem)
    compare = functools.partial(_compare, exact=exact, budget=error_budget(problem, exact), problem=problem)
    checks: list[Check] = []
    try:
        framed = _framed(problem)
        with _PoisonedMemory() as memory:
            results = run_backend(backend, framed)
        checks += [*compare(results), Check("writes only inside its tensors", memory.is_intact_outside())]
        if thorough:
            checks.append(_same_bits("inputs are left as they were", problem.named, framed.named))
            again = run_backend(backend, problem._map_tensors(torch.clone))
            checks.append(_same_bits("repeats bit for bit, contiguous", results, again))
            other = backends.load("torch")
            ours, theirs = Saved(*(again[name] for name in OUTPUTS)), Saved(*run_forward(other, problem.inputs))
            mixed = {
                "forward here, backward by torch": run_backend(other, problem, ours),
                BACKWARD_ONLY: run_backend(backend, problem, theirs),
            }
            for run, found in mixed.items():
                checks += [replace(check, name=f"{check.name}, {run}") for check in compare(found)]
    except Exception as error:  # a backend may fail in any way, and the other problems are tried all the same
        return [*checks, Check("runs", False, f"{type(error).__name__}: {error}")]
    return [Check("runs", True), *checks]


def check_backend(
    backend: str | Backend,
    *,
    device: str | torch.device | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    quick: bool = False,
) -> Report:
    """Try a backend on all cases: values, gradients, form, repeatability, and that padding is never read into a result.

    Args:
        backend: a name that `sla_ref.list_backends` knows, or the backend itself, which need not be registered.
        device: where the tensors live; "cuda" where there is a GPU, else "cpu", if None.
        dtypes: of the inputs.
        quick: only three cases.

    Returns:
        A report; `report.ok` says whether all is well, `str(report)` what is not.

    Raises:
        ValueError, TypeError: the name is unknown, the backend lacks a part of the protocol, or another argument has
            the wrong type or value.
        RuntimeError: the backend cannot be used on this machine.
    """
    name = backend if isinstance(backend, str) else getattr(backend, "name", backend)
    if isinstance(backend, str):
        if backend == backends.AUTO:
            raise ValueError(f"backend must name one backend to check, got {backend!r}, which chooses among them")
        backends.require_usable(backend)
        backend = backends.load(backend)
    else:
        backends.require_parts(backend)
        if (reason := backend.unavailable()) is not None:
            raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = _check_how(device, dtypes, quick)
    report = Report(f"backend {name!r} on {device}")
    for case, dtype in _tries(dtypes, quick):
        if checks := check_case(backend, case, device=device, dtype=dtype):
            report.checks += checks
        else:
            inputs = make_problem(**case.arguments, dtype=dtype, device=device).inputs
            report.refused.append(f"{case.at(dtype)}: {backend.unsupported(inputs.query, inputs.block_map)}")
    return report


def check_function(
    function: Callable[..., Sequence[Tensor]],
    *,
    device: str | torch.device = "cpu",
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    quick: bool = False,
) -> Report:
    """Try a kernel of your own that is not a backend: values and autograd's gradients on all cases.

    Args:
        function: called as `sla_ref.reference.sparse_linear_attention` is; returns sparse and linear, and maybe lse.
        device, dtypes, quick: as for `check_backend`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    check_callable("function", function)
    dtypes = _check_how(device, dtypes, quick)
    report = Report(f"function {getattr(function, '__name__', function)!r} on {device}")
    for case, dtype in _tries(dtypes, quick):
        problem = make_problem(**case.arguments, dtype=dtype, device=device)._replace(grad_lse=None)
        exact = oracle(problem)
        try:
            results = run_function(function, problem)
            checks = [Check("runs", True), *_compare(results, exact, error_budget(problem, exact), problem)]
        except Exception as error:  # as of a backend
            checks = [Check("runs", False, f"{type(error).__name__}: {error}")]
        report.checks += [replace(check, case=case.at(dtype)) for check in checks]
    return report


def _check_how(device: object, dtypes: Iterable[torch.dtype], quick: object) -> tuple[torch.dtype, ...]:
    """The dtypes; TypeError or ValueError unless all three can be what a check is made with."""
    if find_device("device", device).type == "meta":
        raise ValueError("device must be one whose tensors hold values, got meta")
    try:
        dtypes = tuple(dtypes)
    except Exception as error:  # what is not iterable says so in many ways
        raise TypeError(f"dtypes must be several of torch's, got {shown(dtypes)}") from error
    for dtype in dtypes:
        check_dtype("dtypes", dtype)
    if not dtypes:
        raise ValueError("dtypes must hold at least one, got none")
    check_bool("quick", quick)
    return dtypes


def _tries(dtypes: Iterable[torch.dtype], quick: bool) -> Iterable[tuple[Case, torch.dtype]]:
    return itertools.product((case for case in CASES if case.quick or not quick), dtypes)


def _compare(results: Results, exact: Results, budget: dict[str, Bound], problem: Problem | None = None) -> list[Check]:
    """A check of each result; where it fails, `problem` serves to say more about the place."""
    checks = []
    for name, values in results.items():
        bound, error = budget[name], _difference(values, exact[name])
        largest, rms = _largest(error), _rms(error)
        same_infinities = torch.equal(values.isinf(), exact[name].to(values.dtype).isinf())
        passed = largest <= bound.largest and rms <= bound.rms and same_infinities
        seen = f"error {_against(largest, bound.largest)}\nroot mean square {_against(rms, bound.rms)}"
        if values.isnan().any():
            seen = f"NaN in {values.isnan().sum()} of {values.numel()} elements"
        elif not same_infinities:
            seen = "infinite in other places than the equations are"
        if not passed:
            seen += _place(name, values, exact[name], bound, problem)
        size, size_rms = _largest(exact[name]), _rms(exact[name])
        shares = _share(largest, size), _share(rms, size_rms), _share(rms, bound.plain)
        used = max(_share(largest, bound.largest), _share(rms, bound.rms))
        checks.append(Check(name, passed, seen, error=Error(*shares, used)))
    return checks


def _share(part: float, whole: float) -> float:
    """part / whole, and 0 / 0 = 0: no error where the exact result is 0, or where none is allowed."""
    return part / whole if whole else math.inf if part else 0.0


def _against(error: float, bound: float) -> str:
    return f"{error:.2e}" + (f", {error / bound:.2g} times" if bound else ",") + f" the bound of {bound:.2e}"


def _place(name: str, values: Tensor, exact: Tensor, bound: Bound, problem: Problem | None) -> str:
    """Lines that say where a result (B, H, N, D), or lse (B, H, N), is wrong, and what is at its worst element."""
    size = _difference(values, exact).abs().nan_to_num(nan=math.inf)
    worst = torch.unravel_index(size.argmax(), size.shape)
    b, h, row = map(int, worst[:3])
    seen = f"\nworst at b {b}, h {h}, row {row}: {values[worst]:.4g}, expected {exact[worst]:.4g}"
    if problem is not None:
        block_map, of_keys = problem.inputs.block_map, name.endswith(("key", "value"))
        labels = block_map.labels[b, h].T if of_keys else block_map.labels[b, h]
        side, other = ("key", "query") if of_keys else ("query", "key")
        block = row // (block_map.block_k if of_keys else block_map.block_q)
        counts = ", ".join(f"{(labels[block] == label).sum()} {kind}" for kind, label in CLASSES.items())
        seen += f"\nin {side} block {block}, with {counts} {other} blocks"
    over = size.flatten(3).amax(-1) if size.dim() == 4 else size
    places = (over > bound.largest).nonzero().T  # of rows: b, h, row
    if places.numel():
        spans = [f"{at.min()} to {at.max()}" if at.min() < at.max() else f"{at[0]}" for at in places]
        seen += f"\nover the bound: b {spans[0]}, h {spans[1]}, row {spans[2]}; {places.shape[1]} rows in all"
    return seen


def _same_bits(name: str, expected: Results, found: Results) -> Check:
    other = [each for each in expected if not torch.equal(expected[each].nan_to_num(), found[each].nan_to_num())]
    return Check(name, not other, f"other bits in {', '.join(other)}" if other else "")


def _framed(problem: Problem) -> Problem:
    """The same problem with every tensor a strided view into a larger one that is NaN elsewhere."""

    def frame(tensor: Tensor) -> Tensor:
        B, H, N, *D = tensor.shape
        # Tokens come before heads, as many models hold them.
        buffer = tensor.new_full((B, N + 7, H + 1, *(d + 8 for d in D)), math.nan)
        view = buffer[:, 3 : N + 3, :H, *(slice(d) for d in D)].transpose(1, 2)
        return view.copy_(tensor)

    return problem._map_tensors(frame)


class _PoisonedMemory(TorchFunctionMode):
    """Inside, memory that torch hands out uninitialised is full of NaN: an element that nobody wrote shows.

    The memory around each tensor is NaN too, which shows what was written there.
    """

    makers = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
    band = 1024  # elements before a tensor and after it, which keep its alignment

    def __init__(self) -> None:
        self.bands: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.makers and result.is_floating_point():
            size = result.untyped_storage().nbytes() // result.itemsize
            buffer = result.new_full((self.band + size + self.band,), math.nan)
            self.bands += buffer[: self.band], buffer[-self.band :]
            result = buffer.as_strided(result.shape, result.stride(), self.band)
        return result

    def is_intact_outside(self) -> bool:
        """Whether all memory around the tensors is still NaN."""
        return all(bool(band.isnan().all()) for band in self.bands)
