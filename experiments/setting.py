"""What an experiment is, the sizes at which it is measured, and what the measurements of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sla_ref.lab.model import ModelConfig


@dataclass(frozen=True)
class Setting:
    """The sizes of a measurement. A token is a patch of 4 x 4 pixels of one frame, and a block has `block` tokens."""

    name: str
    size: int
    frames: int
    block: int
    tile: tuple[int, int, int]  # frames, rows and columns of tokens in a block, if tokens are ordered by tiles
    width: int = 128
    depth: int = 4
    heads: int = 2
    steps: int = 400  # of a fine-tune, unless a case says otherwise
    batch: int = 32
    learning_rate: float = 1e-3  # peak of the one-cycle schedule, the same for all: that of `sla-ref finetune`
    teacher_steps: int = 1000  # of a teacher for other data, more tokens or a larger model
    clips: int = 256  # held-out clips for losses and distances
    samples: int = 256  # generated clips
    sample_steps: int = 16

    @property
    def model(self) -> ModelConfig:
        """The teacher's configuration."""
        return ModelConfig(
            frames=self.frames, size=self.size, width=self.width, depth=self.depth, heads=self.heads, block=self.block
        )


_TINY = {"width": 32, "depth": 2, "steps": 8, "batch": 4, "teacher_steps": 60}
QUICK = Setting("quick", 16, 4, block=4, tile=(1, 2, 2), clips=8, samples=20, sample_steps=3, **_TINY)
_LARGE = {"width": 256, "depth": 6, "heads": 4, "teacher_steps": 6000}
SETTINGS = {
    "n1024": Setting("n1024", 32, 16, block=16, tile=(4, 2, 2)),
    "n4096": Setting("n4096", 64, 16, block=64, tile=(4, 4, 4), batch=16),
    "wide": Setting("wide", 32, 16, block=16, tile=(4, 2, 2), **_LARGE),
    "quick": QUICK,
}


@dataclass(frozen=True)
class Context:
    """What all measurements of a run share: a device, and the folder that keeps trained teachers and classifiers."""

    device: torch.device
    work: Path


@dataclass(frozen=True)
class Experiment:
    """`cases(setting)` names the cases, and `measure(case, seed, setting, context)` returns quantities by name."""

    cases: Callable[[Setting], list[str]]
    measure: Callable[[str, int, Setting, Context], dict[str, float]]
