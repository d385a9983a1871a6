"""What arguments must be. Each check raises an error that names the argument, what it got and what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shown(value: object) -> str:
    """A value in one line, as an error prints it. Some have no text: ints of thousands of digits, a few tensors."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an int beyond 64 bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # it is somebody else's
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _with_type(value: object) -> str:
    return f"{shown(value)} of type {type(value).__name__}"


def check_block_size(name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1 that fits into 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= 1, got {_with_type(value)}")
    if value < 1 or _beyond_64_bits(value):
        got = "an int beyond 64 bits" if _beyond_64_bits(value) else shown(value)
        raise ValueError(f"{name} must be an int >= 1, got {got}")


def check_scale(value: object, name: str = "scale") -> None:
    """Raise unless `value` is a finite number above 0, in the range of float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a finite number > 0, got {_with_type(value)}")
    if not 0 < value <= sys.float_info.max:  # a NaN fails both comparisons
        raise ValueError(f"{name} must be a finite number > 0, got {shown(value)}")


def _beyond_64_bits(value: object) -> bool:
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def check_ratio(name: str, value: object, *, zero_allowed: bool) -> None:
    """Raise unless `value` is a number in [0, 1], or in (0, 1] where zero is not allowed."""
    allowed = f"a number with 0 {'<=' if zero_allowed else '<'} {name} <= 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {_with_type(value)}")
    if not (0 <= value <= 1) or (value == 0 and not zero_allowed):  # a NaN fails the first comparison
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")


def check_bool(name: str, value: object) -> None:
    """Raise unless `value` is True or False: "no" would count as yes."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_with_type(value)}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of these names."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_slice(name: str, value: slice) -> None:
    """Raise unless a tensor can be cut by `value`: its bounds are ints or None, and it does not go backwards."""
    bounds = (value.start, value.stop, value.step)
    if not all(bound is None or isinstance(bound, (int, torch.SymInt)) for bound in bounds):
        raise TypeError(f"{name} must be a slice of ints, got {shown(value)}")
    if value.step is not None and value.step < 1:
        raise ValueError(f"{name} must be a slice that goes forwards, got {shown(value)}")


def check_seed(value: object) -> None:
    """Raise unless `value` is an int that torch's generators take as a seed."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an int, got {_with_type(value)}")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be an int from 0 to {2**64 - 1}, got {shown(value)}")


def check_type(name: str, value: object, *kinds: type) -> None:
    """Raise unless `value` is of one of these types."""
    if not isinstance(value, kinds):
        raise TypeError(
            f"{name} must be a {' or a '.join(kind.__name__ for kind in kinds)}, got {type(value).__name__}"
        )


def check_callable(name: str, value: object) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable, got {type(value).__name__}")


def check_dtype(name: str, value: object) -> None:
    """Raise unless `value` is a dtype that the operator has."""
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {shown(value)}")


def find_device(name: str, value: object) -> torch.device:
    """The device that `value` names; raise unless it is one on which this torch can have tensors."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} must be the name of a device or a torch.device, got {_with_type(value)}")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises a different kind for each device that it lacks
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} must be a device that torch can use here, got {shown(value)}: {reason}") from error
    return device


def check_path(name: str, value: object) -> Path:
    """The path; raise unless `value` is the name of a file or folder."""
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a str or a pathlib.Path, got {_with_type(value)}")
    if not str(value) or "\0" in str(value):
        raise ValueError(f"{name} must be the name of a file or folder, got {shown(value)}")
    return Path(value)


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is dense: not sparse, not nested, not in a layout of a library's own."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got layout {layout}")


def check_dense(name: str, tensor: object, dims: int = 1) -> None:
    """Raise unless it is a dense float tensor of at least `dims` dimensions, none of them empty."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_layout(name, tensor)
    check_dtype(name, tensor.dtype)
    if tensor.dim() < dims or 0 in tensor.shape:
        raise ValueError(
            f"{name} must have at least {dims} dimension{'s' * (dims > 1)}, none empty, got shape {tuple(tensor.shape)}"
        )


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless all are non-empty float tensors (B, H, N, D) of one dtype and device that differ in N at most."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_layout(name, tensor)
        shape = tensor.shape
        if len(shape) != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head_dim), got {tuple(shape)}")
        check_dtype(name, tensor.dtype)
        if 0 in shape:
            raise ValueError(f"{name} must have no empty dimension, got shape {tuple(shape)}")
        if tensor is first:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first_name}'s device {first.device}, got {tensor.device}")
        for axis, word in ((0, "batch size"), (1, "number of heads"), (3, "head_dim")):
            if shape[axis] != first.shape[axis]:
                raise ValueError(
                    f"{name} must have {first_name}'s {word} {first.shape[axis]}, got {shape[axis]} "
                    f"({first_name} {tuple(first.shape)}, {name} {tuple(shape)})"
                )
