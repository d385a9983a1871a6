"""What arguments must be. Each check raises an error that names the argument, what it got and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_block_size(name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= 1, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value}")


def check_ratio(name: str, value: object, *, zero_allowed: bool) -> None:
    """Raise unless `value` is a number in [0, 1], or in (0, 1] where zero is not allowed."""
    allowed = f"a number with 0 {'<=' if zero_allowed else '<'} {name} <= 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if not (0 <= value <= 1) or (value == 0 and not zero_allowed):  # a NaN fails the first comparison
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless all are non-empty float tensors (B, H, N, D) of one dtype and device that differ in N at most."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must have no empty dimension, got shape {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first_name}'s device {first.device}, got {tensor.device}")
        for axis, word in ((0, "batch size"), (1, "number of heads"), (3, "head_dim")):
            if tensor.shape[axis] != first.shape[axis]:
                raise ValueError(
                    f"{name} must have {first_name}'s {word} {first.shape[axis]}, got {tensor.shape[axis]} "
                    f"({first_name} {tuple(first.shape)}, {name} {tuple(tensor.shape)})"
                )
