"""Griffe extension: the API pages show 0.05 where a signature names a constant, as in `= DEFAULT_CRITICAL_RATIO`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from griffe import Class, ExprName, Extension, Function, GriffeLoader, Module


class ConstantDefaults(Extension):
    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        for function in _functions(pkg):
            for parameter in function.parameters:
                default = parameter.default
                if isinstance(default, ExprName) and default.name.isupper():
                    parameter.default = loader.modules_collection[default.canonical_path].value


def _functions(owner: Module | Class) -> Iterator[Function]:
    for member in owner.members.values():
        if isinstance(member, Function):
            yield member
        elif isinstance(member, Module | Class):
            yield from _functions(member)
