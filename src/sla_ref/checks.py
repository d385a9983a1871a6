"""What arguments must be. Each check raises an error that names the argument, what it got and what is allowed."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_block_size(name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1 that fits into 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= 1, got {value!r} of type {type(value).__name__}")
    if value < 1 or _beyond_64_bits(value):
        raise ValueError(f"{name} must be an int >= 1, got {_shown(value)}")


def check_scale(value: object, name: str = "scale") -> None:
    """Raise unless `value` is a finite number above 0, in the range of float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a finite number > 0, got {value!r} of type {type(value).__name__}")
    if not 0 < value <= sys.float_info.max:  # a NaN fails both comparisons
        raise ValueError(f"{name} must be a finite number > 0, got {_shown(value)}")


def _beyond_64_bits(value: object) -> bool:
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _shown(value: object) -> str:
    """The number as text; Python refuses to print an int of thousands of digits."""
    return "an int beyond 64 bits" if _beyond_64_bits(value) else str(value)


def check_ratio(name: str, value: object, *, zero_allowed: bool) -> None:
    """Raise unless `value` is a number in [0, 1], or in (0, 1] where zero is not allowed."""
    allowed = f"a number with 0 {'<=' if zero_allowed else '<'} {name} <= 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if not (0 <= value <= 1) or (value == 0 and not zero_allowed):  # a NaN fails the first comparison
        raise ValueError(f"{name} must be {allowed}, got {_shown(value)}")


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is dense: not sparse, not nested, not in a layout of a library's own."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got layout {layout}")


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
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
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
