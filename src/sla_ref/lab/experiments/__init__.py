"""The paper's experiments, small: the same questions, asked of the lab's video transformer.

An `Experiment` has cases (what is varied) and one function that measures one case with one seed. `runner` runs them and
writes a line of JSON per measurement; `report` makes tables and figures of the lines. Sizes are a `Setting`, what the
cases share (device, teachers, classifier) is the `Context`. `students` holds what most experiments do: build a student
from the teacher, fine-tune it, evaluate it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model import ModelConfig

if TYPE_CHECKING:
    from ..classifier import DigitClassifier
    from ..model import VideoTransformer


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

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "teacher_steps", "clips", "samples", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

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


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("n1024", size=32, frames=16, block=16, tile=(4, 2, 2)),
        Setting("n4096", size=64, frames=16, block=64, tile=(4, 4, 4), batch=16),
        Setting("wide", size=32, frames=16, block=16, tile=(4, 2, 2), width=256, depth=6, heads=4, teacher_steps=6000),
        Setting(
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
        ),
    )
}


def find_setting(name: str) -> Setting:
    """The setting of that name; ValueError if there is none."""
    if name not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {name!r}")
    return SETTINGS[name]


@dataclass
class Context:
    """What the cases of a run share: the device, and what is trained once and kept in the folder `work`."""

    device: torch.device
    work: Path
    graph: bool = True
    """Whether a GPU records a training step once and replays it (CUDA graph); needs the backend `triton`."""
    tick: Callable[[int, float | None], object] = lambda step, loss: None
    """Called after each step of a long job with the steps done so far, and the loss where one is known."""
    _teachers: dict[tuple[str, float], VideoTransformer] = field(default_factory=dict, repr=False)
    _classifiers: dict[tuple[int, bool], DigitClassifier] = field(default_factory=dict, repr=False)

    def teacher(self, setting: Setting, *, backdrop: float = 0.0) -> VideoTransformer:
        """The full-attention model that students start from, without gradients; not to be changed.

        The shipped one, or one that is trained now and kept in `work`. `backdrop` is an option of the clips.
        """
        from .students import load_or_train_teacher

        key = (setting.name, backdrop)
        if key not in self._teachers:
            self._teachers[key] = load_or_train_teacher(setting, backdrop, self)
        return self._teachers[key]

    def classifier(self, setting: Setting) -> DigitClassifier:
        """The classifier of digits for frames of the setting's size; trained now if `work` has none."""
        from ..classifier import load_or_train_classifier

        quick = setting.name == "quick"
        key = (setting.size, quick)
        if key not in self._classifiers:
            self._classifiers[key] = load_or_train_classifier(self.work, self.device, size=setting.size, quick=quick)
        return self._classifiers[key]


def _nothing(setting: Setting, context: Context) -> None:
    pass


@dataclass(frozen=True)
class Experiment:
    """One question, its cases, and how one case is measured.

    `cases(setting)` names them, cheap ones first. `measure(case, seed, setting, context)` gives figures by name.
    `prepare(setting, context)` trains what all cases need, once, before any of them runs. `shown` is the figure that
    the picture shows and `paired` says that cases are named "condition: arm", to be compared within a condition.
    `fine_tunes` says that the setting's steps, batch and learning rate matter.
    """

    name: str
    question: str
    cases: Callable[[Setting], list[str]]
    measure: Callable[[str, int, Setting, Context], dict[str, float]]
    prepare: Callable[[Setting, Context], None] = _nothing
    shown: str = ""
    paired: bool = False
    fine_tunes: bool = False


class _Registry(Mapping[str, Experiment]):
    """Experiments by name; a module is imported when one of its experiments is asked for."""

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Experiment:
        return pkgutil.resolve_name(f"{__name__}.{self.places[name]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


EXPERIMENTS: Mapping[str, Experiment] = _Registry(
    {
        "motivation": "motivation:EXPERIMENT",
        "choice": "choice:EXPERIMENT",
        "main": "main:EXPERIMENT",
        "ablation-critical": "ablations:CRITICAL",
        "ablation-negligible": "ablations:NEGLIGIBLE",
        "ablation-feature-map": "ablations:FEATURE_MAP",
        "ablation-block": "ablations:BLOCK",
        "ablation-proj": "ablations:PROJ_START",
        "ablation-steps": "ablations:STEPS",
        "recipes": "recipes:EXPERIMENT",
        "when": "when:EXPERIMENT",
        "features": "features:EXPERIMENT",
    }
)


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; ValueError if there is none."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return EXPERIMENTS[name]
