"""What the tutorials need: sources to show, numbers from result files, and the checks of the exercises.

No lesson holds a copy of a source or of a result: a copy ages. A tutorial imports this module,
which lies in the same folder.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sla_ref

PACKAGE = Path(sla_ref.__file__).parent


@dataclass(frozen=True)
class Source:
    """The text of a function, class or module, and where it is."""

    caption: str
    code: str

    def __str__(self) -> str:
        return f"# {self.caption}\n{self.code}"

    def _repr_markdown_(self) -> str:
        return f'```python title="{self.caption}"\n{self.code}```\n'


def show(source: Source) -> None:
    """Displays one source: highlighted in a notebook, as plain text elsewhere. The site's builder puts its own here."""
    ipython = sys.modules.get("IPython")
    if ipython and ipython.get_ipython():
        ipython.display.display(source)
    else:
        print(source)


def show_source(*objects: Callable[..., object] | type) -> None:
    """Shows the source of each of `objects`: functions, methods, classes, kernels of Triton or Numba.

    Raises:
        TypeError: an object has no Python source.
    """
    for source in [source_of(thing) for thing in objects]:  # all are read before the first is shown
        show(source)


def source_of(thing: Callable[..., object] | type) -> Source:
    """The source of one object, with its file and name; same errors as `show_source`."""
    function = thing
    # what Triton's and Numba's compilers call the function that they were given
    for wrapped in ("fn", "py_func"):
        function = getattr(function, wrapped, function)
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
        code = textwrap.dedent(inspect.getsource(function))
    except TypeError as error:
        raise TypeError(
            f"objects must be functions or classes written in Python, got {thing!r}"
        ) from error
    place = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else Path(file.name)
    return Source(f"{place.as_posix()}, {function.__qualname__}", code)


def measured(name: str) -> dict[str, Any]:
    """What a benchmark wrote: `benchmarks/results/{name}.json` of the clone that this file or the working folder is in.

    Raises:
        FileNotFoundError: there is no such clone, or no such file in it.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).parents):
        file = folder / "benchmarks" / "results" / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"name must be a file in benchmarks/results of a clone of the repository, "
        f"found no {name}.json"
    )


# --- exercises -------------------------------------------------------------------------------------------------------


class WrongAnswer(AssertionError):
    """An answer that the check of its exercise does not accept."""


@contextmanager
def check_exercise(number: int, answer: Callable[..., object]) -> Iterator[None]:
    """Around a check of the function that the reader wrote; says how the check went: `with check_exercise(1, double):`.

    A check that passes prints "exercise 1: correct". If `answer` is still the stub, "not filled in yet" is printed
    instead, and the lesson goes on.

    Raises:
        WrongAnswer: the check failed, and this is what failed.
        AssertionError: the check passes on the stub and so checks nothing.
    """
    source = source_of(answer)
    name = source.caption.rpartition(", ")[2]
    try:
        yield
    except Exception as error:
        if not is_stub(source):
            raise WrongAnswer(f"exercise {number}, {name}: {what_failed(error)}") from error
        print(f"exercise {number}: {name} is not filled in yet")
    else:
        assert not is_stub(source), f"the check of exercise {number} passes on the stub"
        print(f"exercise {number}: correct")


def is_stub(source: Source) -> bool:
    """True for a function with nothing in its body but a docstring and `...`."""
    (definition,) = ast.parse(source.code).body
    return isinstance(definition, ast.FunctionDef) and all(
        isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
        for line in definition.body
    )


def what_failed(error: Exception) -> str:
    """The message of an error; of an assert that has none, the assert itself."""
    if isinstance(error, AssertionError):
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        return str(error) or f"this does not hold: {failed}"
    return f"{type(error).__name__}: {error}"


def expect(what: str, got: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Compares a number, a tensor, an array, or a tuple of these with what is expected.

    Raises:
        AssertionError: they differ by more than `atol + rtol * |expected|`. The message begins with `what`, and says
            where they differ first and what was expected there.
    """
    if got is None:
        raise AssertionError(f"{what}: got None; does the function return its result?")
    if isinstance(expected, tuple):
        if not isinstance(got, tuple | list) or len(got) != len(expected):
            raise AssertionError(f"{what}: expected a tuple of {len(expected)}, got {got!r}")
        for place, pair in enumerate(zip(got, expected, strict=True)):
            expect(f"{what}[{place}]", *pair, rtol=rtol, atol=atol)
        return
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    if got.shape != expected.shape:
        shapes = f"expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        raise AssertionError(f"{what}: {shapes}")
    wrong = ~torch.isclose(got, expected, rtol=rtol, atol=atol)
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist())
    message = f"expected {expected[first].item()}, got {got[first].item()}"
    if wrong.ndim:
        rows = sorted({row for row, *_ in wrong.nonzero().tolist()})
        message += (
            f" at {list(first)}; wrong in {len(rows)} of {len(wrong)} rows, {rows[0]} to {rows[-1]}"
        )
    raise AssertionError(f"{what}: {message}")
