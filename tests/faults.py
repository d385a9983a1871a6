"""A fault planted in a kernel, to see the checks catch it."""

import ast
import importlib.util
import itertools
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_numbers = itertools.count()


class Fault(NamedTuple):
    """What is changed: in this file of the backend, inside this function, `old` becomes `new`."""

    file: str
    function: str
    old: str
    new: str
    where: str
    """a result in which it must show"""


def with_fault(backend: ModuleType, folder: Path, fault: Fault | None) -> ModuleType:
    """The backend with one place changed, or none, as a module of its own: compilers read kernels from their files."""
    name = f"faulty_{next(_numbers)}"
    home = folder / name
    original = Path(backend.__file__)
    package = original.name == "__init__.py"
    if package:
        shutil.copytree(original.parent, home, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        home.mkdir()
        shutil.copy(original, home)
    for path in home.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if fault is not None and path.name == fault.file:
            source = _changed(source, fault)
        path.write_text(re.sub(r"^from \.\.+(?=\w)", "from sla_ref.", source, flags=re.MULTILINE), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        name, home / original.name, submodule_search_locations=[str(home)] if package else None
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _changed(source: str, fault: Fault) -> str:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == fault.function:
            first, last = node.lineno - 1, node.end_lineno
            body = "".join(lines[first:last])
            if (count := body.count(fault.old)) == 1:
                return "".join([*lines[:first], body.replace(fault.old, fault.new), *lines[last:]])
            raise AssertionError(
                f"mend the row of this fault: {fault.old!r} is {count} times in {fault.file}, {fault.function}"
            )
    raise AssertionError(f"mend the row of this fault: {fault.file} has no function {fault.function}")
