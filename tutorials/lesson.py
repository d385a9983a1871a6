"""What the tutorials show: functions from their source, figures from result files. No lesson holds a copy that ages.

A tutorial imports it as the module that lies in the same folder.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sla_ref

PACKAGE = Path(sla_ref.__file__).parent


@dataclass(frozen=True)
class Source:
    """The text of a function, class or module, and where it stands."""

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
    for wrapped in ("fn", "py_func"):  # what Triton's and Numba's compilers call the function that they were given
        function = getattr(function, wrapped, function)
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
        code = textwrap.dedent(inspect.getsource(function))
    except TypeError as error:
        raise TypeError(f"objects must be functions or classes written in Python, got {thing!r}") from error
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
        f"name must be a file in benchmarks/results of a clone of the repository, found no {name}.json"
    )
