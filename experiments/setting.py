"""What an experiment is, the sizes at which it is measured, and what the measurements of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sla_ref.lab.model import ModelConfig


@dataclass(frozen=True)
class Setting:
    """Sizes of a measurement. Tokens are patches of 4 x 4 pixels of one frame; a block has `block` of them."""

    name: str
    size: int
    frames: int
    block: int
    tile: tuple[int, int, int]
    """Frames, rows and columns of tokens of a block, where tokens are put in the order of such tiles."""
    width: int = 128
    depth: int = 4
    heads: int = 2
    steps: int = 400
    """Of a fine-tune, where a case does not say otherwise."""
    batch: int = 32
    learning_rate: float = 1e-3
    """Peak of the one-cycle schedule, the same for all: what `sla-ref finetune` has."""
    teacher_steps: int = 1000
    """Of a teacher that is trained for the experiments: for other data, more tokens or another size of model."""
    clips: int = 256
    """Held-out clips for losses and distances."""
    samples: int = 256
    """Generated clips."""
    sample_steps: int = 16

    @property
    def model(self) -> ModelConfig:
        """The teacher's configuration."""
        return ModelConfig(
            frames=self.frames,
            size=self.size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            block=self.block,
        )


QUICK = Setting(
    "quick",
    size=16,
    frames=4,
    block=4,
    tile=(1, 2, 2),
    width=32,
    depth=2,
    steps=8,
    batch=4,
    teacher_steps=60,
    clips=8,
    samples=20,
    sample_steps=3,
)
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("n1024", size=32, frames=16, block=16, tile=(4, 2, 2)),
        Setting("n4096", size=64, frames=16, block=64, tile=(4, 4, 4), batch=16),
        Setting("wide", size=32, frames=16, block=16, tile=(4, 2, 2), width=256, depth=6, heads=4, teacher_steps=6000),
        QUICK,
    )
}


@dataclass(frozen=True)
class Context:
    """What all measurements of a run share."""

    device: torch.device
    work: Path
    """The folder that keeps trained teachers and classifiers."""
    graph: bool = True
    """Whether a GPU records a training step once and replays it (CUDA graph); needs the backend `triton`."""


@dataclass(frozen=True)
class Experiment:
    """One question, its cases, and how one case is measured.

    `cases(setting)` names them, cheap ones first. `measure(case, seed, setting, context)` gives figures by name.
    `shown` is the figure that the picture shows. `paired` says that cases are named "condition: arm", to be compared
    within a condition, and `fine_tunes` that the setting's steps, batch and learning rate matter.
    """

    name: str
    question: str
    cases: Callable[[Setting], list[str]]
    measure: Callable[[str, int, Setting, Context], dict[str, float]]
    shown: str
    paired: bool = False
    fine_tunes: bool = False
