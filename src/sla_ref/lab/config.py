"""The options of a training run. This is the only place that lists them: the command line makes its flags of them."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, get_type_hints

from ..checks import check_choice, shown

PRECISIONS = ("float32", "bfloat16")


def option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, decides: bool = True
) -> Any:
    """A field of a dataclass that is a flag, too: `help` is its line in `--help`, `least` and `most` its limits.

    With `decides=False` it has no influence on what comes out of a run.
    """
    return dataclasses.field(default=default, compare=decides, metadata={"help": help, "least": least, "most": most})


def check_limits(config: Any) -> None:
    """TypeError or ValueError where a field of a dataclass has another type, or is outside its `option`'s limits."""
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value, kind = field.name, getattr(config, field.name), kinds[field.name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {shown(value)}")
        if kind is float and not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite, got {shown(value)}")
        least, most = field.metadata.get("least"), field.metadata.get("most")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
        if most is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {shown(value)}")


@dataclass(frozen=True)
class TrainConfig:
    """How to train a model."""

    steps: int = option(12_000, "Training steps.", least=1, most=10**9)
    batch: int = option(64, "Clips per step, of all processes together.", least=1, most=10**6)
    learning_rate: float = option(2e-3, "Peak of the one-cycle schedule.")
    weight_decay: float = option(0.01, "Of AdamW.", least=0)
    warmup: float = option(0.05, "Share of the steps in which the learning rate grows.", least=0, most=1)
    clip_norm: float = option(1.0, "Largest norm of a step's gradient.", least=0)
    seed: int = option(0, "Decides clips, noise and initial weights.", least=0, most=2**64 - 1)
    precision: str = option("float32", "float32, or bfloat16 for autocast.")
    compile: bool = option(False, "Run the model through torch.compile.", decides=False)
    fsdp: bool = option(False, "Under torchrun: split the parameters too (FSDP2), not only the clips.", decides=False)
    graph: bool = option(False, "On a GPU, record a step once and replay it (CUDA graph).", decides=False)
    resume: bool = option(False, "Go on from the checkpoint in --out.", decides=False)

    def __post_init__(self) -> None:
        check_limits(self)
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        check_choice("precision", self.precision, PRECISIONS)
        if self.graph and (self.compile or self.fsdp):
            raise ValueError("graph, compile and fsdp must not go together, got graph and another one")

    def recipe(self) -> dict[str, Any]:
        """What decides the outcome of a run, next to the model that it starts from: all but how it is computed."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}
