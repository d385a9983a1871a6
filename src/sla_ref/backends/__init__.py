"""The registry of backends: which there are, which can be used here, and which one is chosen.

Precedence: the call's `backend` > the module's > `use_backend` (this thread) > `set_backend` > the environment variable
SLA_REF_BACKEND (read once, at import) > "auto". Nothing falls back: a backend that was named and cannot be used raises.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import torch.utils.checkpoint

from ..checks import check_bool, shown

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
    "triton": "sla_ref.backends.triton",
    "numba": "sla_ref.backends.numba_cuda",
}
_registered: dict[str, Backend] = {}  # plug-ins join when they are first loaded: a call does not look for them

_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
_from_set_backend: str | None = None
_told: set[str] = set()  # why "auto" did not take Triton; each reason is worth one warning


class _Scopes:
    """The `with use_backend(...)` that are open in one thread."""

    def __init__(self) -> None:
        self.names: dict[object, str] = {}  # one key for each `with`, the newest last
        self.name: str | None = None  # the newest one's; torch.compile can follow an attribute


class _ThreadState(threading.local):  # not a ContextVar, which torch.compile(fullgraph=True) cannot read
    def __init__(self) -> None:  # runs once in each thread; a class attribute would escape torch.compile's guards
        self.scopes = _Scopes()


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
    _teach_checkpointing()
    _from_set_backend = name


def reset_backend() -> None:
    """Undo `set_backend`: back to the environment variable, or "auto"."""
    global _from_set_backend
    _from_set_backend = None


def get_backend() -> str:
    """The name in force in this thread, possibly "auto": Triton for CUDA tensors that it can take, else torch."""
    return _thread.scopes.name or _from_set_backend or _from_environment


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend inside the `with`, in this thread. It nests. Same errors as `set_backend`.

    What was computed inside keeps its backend for the backward pass, wherever that runs, and for the second forward of
    `torch.utils.checkpoint`. The tasks of one asyncio loop share a thread: where a `with` would span an `await`, the
    newest holds for all of them, and the call's or the layer's `backend` is the better choice.
    """
    require_usable(name)
    if not torch.compiler.is_compiling():
        _teach_checkpointing()
    scopes, this = _thread.scopes, object()
    scopes.names[this] = scopes.name = name
    try:
        yield
    finally:
        del scopes.names[this]  # perhaps not the newest, since tasks end in any order
        scopes.name = next(reversed(scopes.names.values()), None)


def which_backend(query: Tensor, block_map: BlockMap) -> tuple[str, str | None]:
    """What `get_backend()` comes to with this input: the backend's name, and why "auto" passes Triton over, if it does.

    Args:
        query: (B, H, Nq, D).
        block_map: query's; `classify_blocks` makes one.

    Raises:
        TypeError: query is not a tensor of floats, or block_map not a map.
        ValueError, RuntimeError: the two do not fit each other, or a backend that was named cannot take this input or
            cannot be used on this machine.
    """
    from ..block_map import check_block_map  # which imports this module
    from ..checks import check_tensors

    check_tensors(query=query)
    check_block_map(block_map)
    if (got := (*block_map.labels.shape[:2], block_map.query_length)) != tuple(query.shape[:3]):
        expected = tuple(query.shape[:3])
        raise ValueError(f"block_map must be for (batch, heads, Nq) = {expected}, got one for {tuple(got)}")
    if (name := get_backend()) == AUTO:
        return _auto(query, block_map)
    choose(name, query, block_map)
    return name, None


def choose(name: str, query: Tensor, block_map: BlockMap) -> Backend:
    """The backend that `name` means for this input. Warns, once a reason, where "auto" cannot be Triton on CUDA.

    Raises:
        ValueError: unknown name, or the backend cannot take this input; the text says why.
        RuntimeError: the backend cannot be used on this machine; the text says why.
    """
    if name == AUTO:
        name, reason = _auto(query, block_map)
        if query.is_cuda and reason is not None and reason not in _told:
            warnings.warn(f"backend 'auto' takes 'torch' for a CUDA tensor, since {reason}", stacklevel=2)
            _told.add(reason)
        return load(name)
    require_usable(name)
    backend = load(name)
    if (reason := backend.unsupported(query, block_map)) is not None:
        raise ValueError(f"backend {name!r} cannot take this input: {reason}")
    return backend


def _auto(query: Tensor, block_map: BlockMap) -> tuple[str, str | None]:
    if not query.is_cuda:
        return "torch", f"query is on {query.device}, and 'auto' takes 'triton' only for CUDA tensors"
    try:
        choose("triton", query, block_map)
    except (RuntimeError, ValueError) as error:
        return "torch", str(error)
    return "triton", None


# --- the second forward of activation checkpointing ------------------------------------------------------------------
# `torch.utils.checkpoint` runs a function again in the backward pass: outside of the `with` around the first run, and
# with CUDA in a thread of autograd's. It restores autocast and the random numbers, and offers no way to add to them
# that holds for use_reentrant=True and False alike. So the first `use_backend` or `set_backend` patches the two classes
# that keep the function.


def _again(name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    if get_backend() == name:
        return function(*args, **kwargs)
    with use_backend(name):
        return function(*args, **kwargs)


def _remember_the_backend(keeper: str, method: str) -> None:
    """Make `keeper.method(self, function, ...)` keep a function that runs with the backend of this moment."""
    owner = getattr(torch.utils.checkpoint, keeper, None)
    if owner is None:  # neither class is public
        return warnings.warn(
            f"torch {torch.__version__} has no torch.utils.checkpoint.{keeper}: under activation checkpointing, give "
            "the layer its backend, since use_backend and set_backend may not hold when the forward runs again",
            stacklevel=4,
        )
    original = getattr(owner, method)

    @functools.wraps(original)
    def remembering(self: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return original(self, functools.partial(_again, get_backend(), function), *args, **kwargs)

    setattr(owner, method, remembering)


@functools.cache
def _teach_checkpointing() -> None:
    _remember_the_backend("CheckpointFunction", "forward")  # use_reentrant=True
    _remember_the_backend("_CheckpointFrame", "__init__")  # use_reentrant=False


# --- what there is ---------------------------------------------------------------------------------------------------


def register_backend(name: str, module: Backend, *, replace: bool = False) -> None:
    """Make a backend of your own known under `name`; see `sla_ref.protocol.Backend` for what it must offer.

    An installed package can do the same with an entry point in the group "sla_ref.backends". Entry points are read by
    `list_backends` and when a name is not known yet; the module is imported once.

    Args:
        name: any string but "auto" and the names of the built-in backends.
        module: a module, or any object with its functions.
        replace: whether to take the name over from another module, such as an older state of this one.

    Raises:
        TypeError: name is not a string, or module lacks a part of the protocol.
        ValueError: the name is empty, reserved or, without replace, taken by another module.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    check_bool("replace", replace)
    if not name or name == AUTO or name in _BUILT_IN:
        reserved = ", ".join(repr(taken) for taken in (AUTO, *_BUILT_IN))
        raise ValueError(f"name must not be empty and none of {reserved}, got {name!r}")
    require_parts(module)
    if not replace and (name in _plug_ins() or _registered.get(name, module) is not module):
        taken_by = _registered.get(name, "an installed package")
        raise ValueError(f"name {name!r} is taken by {taken_by}; replace=True takes it over")
    _registered[name] = module


def require_parts(module: object) -> None:
    """Raise TypeError unless `module` has the functions of a backend."""
    for part in ("unavailable", "unsupported", "forward", "backward"):
        if not callable(getattr(module, part, None)):
            got = shown(module)
            raise TypeError(f"a backend must have a function {part!r} (see sla_ref.protocol.Backend), got {got}")


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
        raise ValueError(f"backend must be one of {names}, got {shown(name)}{source}")


def is_usable(name: str) -> bool:
    """Whether the backend of this name can be used on this machine."""
    return _reason(name) is None


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
    backend = _plug_ins()[name].load()
    require_parts(backend)
    _registered[name] = backend
    return backend


def _reason(name: str) -> str | None:
    try:
        backend = load(name)
    except (Exception, SystemExit) as error:  # a module can raise anything, and must not break the others
        help_line = f": pip install 'sla-ref[{name}]'" if name in _BUILT_IN else ""
        return f"it cannot be imported ({type(error).__name__}: {error}){help_line}"
    try:
        reason = backend.unavailable()
    except (Exception, SystemExit) as error:
        return f"its unavailable() raised {type(error).__name__}: {error}"
    if not (reason is None or isinstance(reason, str)):
        return f"its unavailable() must return None or a reason, it returned {reason!r}"
    return reason
