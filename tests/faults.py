"""A fault planted in a backend, to see the checks catch it."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sla_ref import testing

COPY = "sla_ref.backends.faulty"  # in the backends' package, where relative imports work


class Fault:
    """One place of a backend's source, what it becomes, and a result in which the fault must show.

    `problem` says what the small problem of the tests needs to be like to show it, as `make` takes it.
    """

    def __init__(self, file: str, function: str, old: str, new: str, where: str, **problem: Any) -> None:
        self.file, self.function, self.old, self.new = file, function, old, new
        self.where, self.problem = where, problem

    def plant(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        named = [node for node in ast.walk(ast.parse(text)) if getattr(node, "name", None) == self.function]
        source = ast.get_source_segment(text, named[0]) if named else ""
        assert source.count(self.old) == 1, (
            f"mend this row of FAULTS: {self.old!r} occurs {source.count(self.old)} times in "
            f"{self.function} of {self.file}, and not once"
        )
        path.write_text(text.replace(source, source.replace(self.old, self.new)), encoding="utf-8")


def with_fault(backend: ModuleType, folder: Path, fault: Fault | None) -> ModuleType:
    """The backend as another module, which compilers read from files of its own; with a fault, if there is one."""
    source = Path(backend.__file__)
    if source.name == "__init__.py":
        shutil.copytree(source.parent, folder / "faulty")
        path = folder / "faulty" / "__init__.py"
    else:
        path = Path(shutil.copy(source, folder))
    if fault is not None:
        fault.plant(path.with_name(fault.file))
    for name in [name for name in sys.modules if name == COPY or name.startswith(f"{COPY}.")]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(COPY, path)
    sys.modules[COPY] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_caught(backend: ModuleType, fault: Fault, folder: Path, problem: testing.Problem) -> None:
    """With the fault, the result that the fault names is over its budget."""
    exact = testing.oracle(problem)
    budget = testing.error_budget(problem, exact)
    faulty = with_fault(backend, folder, fault)
    with testing._PoisonedMemory():  # rows that nobody writes might hold what a right run left there
        results = testing.run_backend(faulty, problem)
    with pytest.raises(AssertionError, match="over the error budget"):
        testing.assert_within({fault.where: results[fault.where]}, exact, budget)
