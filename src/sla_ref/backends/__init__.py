"""The registry of backends: which there are, which can be used here, and which one is chosen.

Precedence: the call's `backend` > the module's > `use_backend` (this thread) > `set_backend` > the environment variable
SLA_REF_BACKEND (read once, at import) > "auto". Nothing falls back: a backend that was named and cannot be used raises.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..block_map import BlockMap
    from ..protocol import Backend

AUTO = "auto"
ENTRY_POINT_GROUP = "sla_ref.backends"
ENVIRONMENT_VARIABLE = "SLA_REF_BACKEND"

# Imported on first use: `import sla_ref` loads neither triton nor numba.
_BUILT_IN = {
    "torch": "sla_ref.backends.pytorch",
    "triton": "sla_ref.backends.triton_fused",
    "numba": "sla_ref.backends.numba_cuda",
}
_registered: dict[str, Backend] = {}

_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
_from_set_backend: str | None = None


class _ThreadState(threading.local):  # not a ContextVar, which torch.compile(fullgraph=True) cannot read
    def __init__(self) -> None:  # runs once in each thread; a class attribute would escape torch.compile's guards
        self.name: str | None = None


_thread = _ThreadState()


# --- choosing --------------------------------------------------------------------------------------------------------


def set_backend(name: str) -> None:
    """Use this backend in the whole process, where nothing nearer to the call names another.

    Args:
        name: "torch", "triton", "numba", the name of a plug-in, or "auto".

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot be used on this machine; the text says why.
    """
    global _from_set_backend
    require_usable(name)
    _from_set_backend = name


def reset_backend() -> None:
    """Undo `set_backend`: back to the environment variable, or "auto"."""
    global _from_set_backend
    _from_set_backend = None


def get_backend() -> str:
    """The name in force in this thread, possibly "auto": Triton for CUDA tensors that it can take, else torch."""
    return _thread.name or _from_set_backend or _from_environment


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend inside the `with`, in this thread. It nests. Same errors as `set_backend`.

    What was computed inside keeps its backend for the backward pass, wherever that runs.
    """
    require_usable(name)
    outer, _thread.name = _thread.name, name
    try:
        yield
    finally:
        _thread.name = outer


def choose(name: str, query: Tensor, block_map: BlockMap) -> Backend:
    """The backend that `name` stands for with this input.

    Raises:
        ValueError: unknown name, or the backend cannot take this input; the text says why.
        RuntimeError: the backend cannot be used on this machine; the text says why.
    """
    if name == AUTO:
        takes_it = query.is_cuda and _reason("triton") is None and load("triton").unsupported(query, block_map) is None
        return load("triton" if takes_it else "torch")
    require_usable(name)
    backend = load(name)
    if (reason := backend.unsupported(query, block_map)) is not None:
        raise ValueError(f"backend {name!r} cannot take this input: {reason}")
    return backend


# --- what there is ---------------------------------------------------------------------------------------------------


def register_backend(name: str, module: Backend) -> None:
    """Make a backend of your own known under `name`; see `sla_ref.protocol.Backend` for what it must offer.

    An installed package can do the same with an entry point in the group "sla_ref.backends".

    Raises:
        TypeError: name is no string, or module lacks a part of the protocol.
        ValueError: the name is empty, reserved or taken by another module.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if not name or name == AUTO or name in _BUILT_IN:
        reserved = ", ".join(repr(taken) for taken in (AUTO, *_BUILT_IN))
        raise ValueError(f"name must not be empty and none of {reserved}, got {name!r}")
    for part in ("unavailable", "unsupported", "forward", "backward"):
        if not callable(getattr(module, part, None)):
            raise TypeError(f"module must have a function {part!r} (see sla_ref.protocol.Backend), got {module!r}")
    if _registered.get(name, module) is not module:
        raise ValueError(f"name {name!r} is taken by {_registered[name]!r}")
    _registered[name] = module


def list_backends() -> dict[str, str | None]:
    """Each backend's name with None if it can be used here, else the reason and the command that would help."""
    return {name: _reason(name) for name in (*_BUILT_IN, *_registered, *_plug_ins())}


def require_known(name: str) -> None:
    """Raise TypeError or ValueError unless `name` is "auto" or the name of a backend."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name == AUTO or name in _BUILT_IN or name in _registered:
        return
    plug_ins = _plug_ins()
    if name not in plug_ins:
        names = ", ".join(repr(known) for known in (AUTO, *_BUILT_IN, *_registered, *plug_ins))
        source = f" (from {ENVIRONMENT_VARIABLE})" if name == _from_environment else ""
        raise ValueError(f"backend must be one of {names}, got {name!r}{source}")


def require_usable(name: str) -> None:
    """Raise ValueError for an unknown name, RuntimeError with the reason for a backend that cannot be used here."""
    require_known(name)
    if name != AUTO and (reason := _reason(name)) is not None:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")


def _plug_ins() -> dict[str, EntryPoint]:
    taken = (AUTO, *_BUILT_IN, *_registered)
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in taken}


def load(name: str) -> Backend:
    """The backend of this name, imported if need be; call `require_known` or `require_usable` first."""
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        return importlib.import_module(_BUILT_IN[name])
    return _plug_ins()[name].load()


def _reason(name: str) -> str | None:
    try:
        backend = load(name)
    except Exception as error:  # a package that is too old or too new for another raises more than ImportError
        help_line = f": pip install 'sla-ref[{name}]'" if name in _BUILT_IN else ""
        return f"it cannot be imported ({error}){help_line}"
    return backend.unavailable()
