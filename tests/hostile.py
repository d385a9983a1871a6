"""Values that come by mistake or on purpose, and calls that have to take them or refuse them by name."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sla_ref import checks
from sla_ref.checks import FLOATS

REFUSALS = (ValueError, TypeError, RuntimeError, OSError)  # NotImplementedError is a RuntimeError
TOO_LARGE = "allocate memory|Storage size calculation overflowed"  # torch's words for a tensor that no machine can hold


class Argument(NamedTuple):
    """A right value of an argument, whether another one may be right as well, and what else errors may call it."""

    right: Any
    may_be: Callable[[Any], bool]
    called: str = ""


@dataclass(frozen=True)
class Call:
    """A function with its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Argument]

    def __str__(self) -> str:
        return self.name

    def check(self, changes: dict[str, Any]) -> None:
        """Makes the call with these values in place of right ones: it must return, or refuse one of them by name.

        A value that may be right need not go with the other arguments, and the error may then name one of those.
        """
        wrong = {name: value for name, value in changes.items() if not self.arguments[name].may_be(value)}
        try:
            self.function(**{name: argument.right for name, argument in self.arguments.items()} | changes)
        except Exception as error:
            names = list(wrong if len(wrong) == len(changes) else self.arguments)
            names += [self.arguments[name].called for name in names if self.arguments[name].called]
            told = re.search(rf"(?<![a-z])({'|'.join(names)})(?![a-z])|{TOO_LARGE}", str(error))
            if isinstance(error, RecursionError) or not isinstance(error, REFUSALS) or not told:
                raise AssertionError(f"{self.name} must take {shown(changes)}, or refuse it by name") from error
        else:
            assert not wrong, f"{self.name} took {shown(wrong)}"


def shown(changes: dict[str, Any]) -> str:
    """The values in short; not every tensor has a text."""

    def of(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.layout} {value.dtype} {'nested' if value.is_nested else tuple(value.shape)} {value.device}"
        return checks.shown(value)

    return ", ".join(f"{name}={of(value)}" for name, value in changes.items())


# --- kinds of arguments ----------------------------------------------------------------------------------------------


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


def size(right: int, *, least: int = 1, most: int = 2**63 - 1, called: str = "") -> Argument:
    return Argument(right, lambda value: is_int(value) and least <= value <= most, called)


def ratio(right: float, *, zero: bool = False) -> Argument:
    return Argument(right, lambda value: is_number(value) and (0 < value <= 1 or (zero and value == 0)))


def scale(right: float, *, zero: bool = False) -> Argument:
    """A finite number above 0."""
    return Argument(right, lambda value: is_number(value) and (0 < value <= 2e308 or (zero and value == 0)))


def flag(right: bool) -> Argument:
    return Argument(right, lambda value: isinstance(value, bool))


def text(right: str) -> Argument:
    return Argument(right, lambda value: isinstance(value, str))


def one_of(right: str, *others: str, called: str = "") -> Argument:
    return Argument(right, lambda value: isinstance(value, str) and value in (right, *others), called)


def function_or(right: Any, *names: str) -> Argument:
    return Argument(right, lambda value: callable(value) or (isinstance(value, str) and value in (right, *names)))


def tensor(
    right: Tensor, dtypes: Iterable[torch.dtype] = FLOATS, dims: int | None = None, called: str = ""
) -> Argument:
    """A dense tensor without an empty dimension."""

    def may_be(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
            return False
        return value.dtype in dtypes and value.numel() > 0 and dims in (None, value.dim())

    return Argument(right, may_be, called)


def tokens(right: Tensor) -> Argument:
    return tensor(right, dims=4)


def of_type(right: Any, *kinds: type) -> Argument:
    return Argument(right, lambda value: isinstance(value, kinds or type(right)))


def path(right: Any) -> Argument:
    """The system's own error of a file begins with its number, and that of a file of another kind names the kind."""
    return Argument(right, lambda value: isinstance(value, (str, Path)), r"\[Errno|weights file")


def device(right: str = "cpu") -> Argument:
    return Argument(right, lambda value: isinstance(value, (str, torch.device)))


def optional(argument: Argument) -> Argument:
    return argument._replace(may_be=lambda value: value is None or argument.may_be(value))


# --- values ----------------------------------------------------------------------------------------------------------


class Unhelpful:
    """Has a length that cannot be asked for, is neither true nor false, and equals nothing."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __len__(self) -> int:
        raise RecursionError("no length")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def _tensors() -> list[Tensor]:
    base = torch.arange(2.0 * 2 * 20 * 8).view(2, 2, 20, 8) / 100
    one = base[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these layouts are in beta
        rare = [base.to_sparse(), base[0, 0].to_sparse_csr(), base.to_mkldnn()]
        rare += [torch.nested.nested_tensor([*base], layout=layout) for layout in (torch.strided, torch.jagged)]
        rare.append(torch.quantize_per_tensor(base, 0.1, 0, torch.quint8))
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)
    dtypes += (torch.int64, torch.int8, torch.bool)
    rare += [one.to(dtype) for dtype in dtypes]
    shapes = [
        base,
        one,
        one[:, :, :7],
        one[..., :3],
        one[:, :, :0],
        one[:, :0],
        base[:0],
        base[0],
        base[0, 0],
        base[0, 0, 0],
    ]
    rare += [torch.tensor(0.5), torch.tensor(3), torch.tensor(True), torch.empty(0), one.to("meta")]
    rare += [torch.full_like(one, math.nan), torch.full_like(one, math.inf), one.clone().requires_grad_()]
    rare += [one[:, :1].expand(1, 2, 20, 8), one.transpose(1, 2).contiguous().transpose(1, 2)]
    rare += [torch.zeros(1, 2, 3, 3, dtype=torch.int8), torch.zeros(2, 3, 3, dtype=torch.int8)]
    return [*shapes, *rare, torch.zeros(20, dtype=torch.bool)]


def _values() -> list[Any]:
    """No size is among them that one machine has the memory for and another has not."""
    huge = [2**62, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, 10**5000, -(10**5000)]
    found: list[Any] = [None, True, False, 0, 1, 2, 3, 7, -1, -(2**31), *huge]
    found += [0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -0.1, 5e-324, 1e308, math.nan, math.inf, -math.inf, 1j]
    found += [
        "",
        "1",
        "0.5",
        "8",
        "none",
        "cuda",
        "cuda:99",
        "meta",
        "cpu",
        "torch",
        "softmax",
        "\0",
        "é\n",
        "x" * 5000,
    ]
    found += [b"", b"torch", (), (1,), (1, 2, 3), (0, 0, 0), (1.0, 2.0, 3.0), [], [1], [None], {}, {"a": 1}, {1: 2}]
    found += [set(), range(3), slice(None), slice(5), slice("a", "b"), slice(None, None, -1), slice(None, None, 0)]
    found += [slice(0, 10**400), ..., NotImplemented, object(), Unhelpful(), iter(()), ValueError("x")]
    found += [lambda *_, **__: None, np.float32(0.5), np.float64(0.5), np.int64(3), np.nan, np.array("a")]
    found += [np.zeros(3), np.zeros((1, 2, 20, 8), np.float32), torch.float32, torch.int8, torch.strided, torch]
    found += [torch.device("cpu"), torch.device("meta"), torch.Size([1, 2])]
    return [*found, *_tensors()]


VALUES = _values()
