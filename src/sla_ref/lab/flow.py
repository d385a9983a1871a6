"""Rectified flow: a straight line from a clip to noise, and the velocity along it.

    x_t = (1 - t) clip + t noise,    velocity = noise - clip,    t in [0, 1]

The model sees x_t, t and the labels and predicts the velocity; the loss is the mean squared error.
Sampling walks from noise (t = 1) back to a clip (t = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_block_size, check_dense, check_layout, check_type


class Batch(NamedTuple):
    """Noisy clips x (B, F, S, S), time (B,), labels (B,), and the velocity to find, shaped as x."""

    x: Tensor
    time: Tensor
    labels: Tensor
    velocity: Tensor


def noised(clip: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t for clip, noise (B, F, S, S) and time (B,)."""
    time = time[:, None, None, None]
    return (1 - time) * clip + time * noise


def velocity(clip: Tensor, noise: Tensor) -> Tensor:
    """What the model has to predict, the same at every time."""
    return noise - clip


_MOST_STEPS = 1_000_000  # far more than it needs, for a number that is another one's by mistake


@torch.no_grad()
def sample(
    model: nn.Module, noise: Tensor, labels: Tensor, steps: int, tick: Callable[[int], object] = lambda done: None
) -> Tensor:
    """Clips (B, F, S, S) from noise by `steps` equal Euler steps; `tick(done)` after each."""
    check_type("model", model, nn.Module)
    check_dense("noise", noise, dims=4)
    check_type("labels", labels, Tensor)
    check_layout("labels", labels)
    check_block_size("steps", steps)
    if steps > _MOST_STEPS:
        raise ValueError(f"steps must be at most {_MOST_STEPS:,}, got {steps}")
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    x = noise
    for step in range(steps):
        predicted = model(x, times[step].expand(len(x)), labels)
        x = x + (times[step + 1] - times[step]) * predicted
        tick(step + 1)
    return x.clamp(-1, 1)
