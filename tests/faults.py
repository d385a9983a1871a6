"""A fault planted in a kernel, to see the checks catch it."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType


def with_fault(backend: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """The backend with one place changed, as a module of its own: compilers read a kernel's source from its file."""
    source = inspect.getsource(backend)
    assert source.count(old) == 1, f"{source.count(old)} places to change: {old}"
    path = folder / "faulty.py"
    path.write_text(source.replace(old, new).replace("from ..", "from sla_ref."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
