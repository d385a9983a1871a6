"""One training loop, for the teacher and for fine-tuning; an interrupted run resumes without loss.

All parameters are trained with AdamW on a one-cycle schedule, on clips made as they are needed. The
loss is the flow loss, or with a teacher (the "white box" recipe) the distance to its prediction.

A run lives in one folder: `checkpoint.pt` (all that is needed to go on) and `metrics.jsonl` (one line
per `log_every` steps: step, mean loss since the last line, learning rate, seconds). On one CPU an
interrupted and resumed run ends with the same bits as an uninterrupted one.

Under torchrun each process trains on its share of the same batches; rank 0 writes. A checkpoint is that of one
process, so a run may go on with another number of them.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..files import new_folder, whole
from . import distributed, flow
from .model import VideoTransformer

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """What decides the outcome of a run, next to the model it starts from."""

    steps: int = 12_000
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float = 1.0
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


def train(
    model: VideoTransformer,
    config: TrainConfig,
    out: Path,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    compiled: bool = False,
    fsdp: bool = False,
    log_every: int = 50,
    save_every: int = 500,
    tick: Callable[[int, float | None], object] = lambda step, loss: None,
) -> None:
    """Trains `model` in place on its device and leaves a checkpoint in `out`.

    `tick(step, loss)` is called after each step; loss is None except where a metrics line is written.
    Without `resume`, `out` must be new or empty. With it, `out` must hold a checkpoint of the same
    configuration. A KeyboardInterrupt saves a checkpoint before it goes on its way; not with several processes, which
    it reaches at different steps.

    With several processes `config.batch` is the sum of their shares. With `fsdp` they share out parameters and
    optimizer states too (FSDP2), else only the batch (DDP).

    Raises:
        ValueError: the processes cannot share out the batch evenly, or `fsdp` without torchrun.
    """
    distributed.check_batch(config.batch)
    device, first = next(model.parameters()).device, distributed.rank() == 0
    forward: Callable[..., Any] = distributed.wrap(model, fsdp)
    target: Callable[..., Any] | None = teacher
    run = _Run(model, config, device)
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"
    if resume:
        run.load(checkpoint)
    if first:
        if resume:
            _keep_lines(metrics, run.step)
        else:
            new_folder(out)
    if compiled:
        forward, target = torch.compile(forward), teacher and torch.compile(teacher)
    model.train()

    loss_sum, since, started = torch.zeros((), device=device), run.step, time.perf_counter()
    try:
        while run.step < config.steps:
            loss = run.advance(forward, target)
            loss_sum += loss  # stays on the device: reading it each step would stall a GPU
            mean = None
            if run.step % log_every == 0 or run.step == config.steps:
                mean = distributed.mean(loss_sum).item() / (run.step - since)
                if not mean < float("inf"):
                    raise FloatingPointError(f"the loss at step {run.step} is {mean}")
                now = time.perf_counter()
                line = {
                    "step": run.step,
                    "loss": mean,
                    "learning_rate": run.optimizer.param_groups[0]["lr"],
                    "seconds": round(now - started, 3),
                }
                if first:
                    with metrics.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                loss_sum.zero_()
                since, started = run.step, now
            tick(run.step, mean)
            if run.step % save_every == 0 or run.step == config.steps:
                run.save(checkpoint)
    except KeyboardInterrupt:
        if distributed.count() == 1:
            run.save(checkpoint)
        raise


class _Run:
    """The state of a run: all that a checkpoint holds, and the one step that changes it."""

    def __init__(self, model: VideoTransformer, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.step = 0
        self.data = model.config.clips("train", config.seed)
        self.noise = torch.Generator(device).manual_seed(config.seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=config.learning_rate,
            total_steps=config.steps + 1,  # it counts the rate before the first step, too
            pct_start=config.warmup,
            cycle_momentum=False,
        )

    def advance(self, forward: Callable[..., Any], teacher: Callable[..., Any] | None) -> Any:
        """One step; returns its loss, on this process's share of the batch, as a tensor on the device."""
        clip, labels = self.data.batch(self.config.batch, self.device)
        noise = torch.randn(clip.shape, generator=self.noise, device=self.device)
        moment = torch.rand(len(clip), generator=self.noise, device=self.device)
        clip, labels, noise, moment = (distributed.share(each) for each in (clip, labels, noise, moment))
        x = flow.noised(clip, noise, moment)
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            if teacher is None:
                target = flow.velocity(clip, noise)
            else:
                with torch.no_grad():
                    target = teacher(x, moment, labels)
            predicted = forward(x, moment, labels)
        loss = F.mse_loss(predicted.float(), target.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.detach()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue this run."""
        return {
            **{f"model.{key}": value for key, value in asdict(self.model.config).items()},
            **asdict(self.config),
            "device": self.device.type,
        }

    def save(self, path: Path) -> None:
        model, optimizer = distributed.whole_state(self.model, self.optimizer)
        if distributed.rank() > 0:
            return
        state = {
            "identity": self._identity(),
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "clips": self.data.generator.get_state(),
            "noise": self.noise.get_state(),
        }
        with whole(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"resume needs a checkpoint, but there is no {path}")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            identity = state["identity"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"checkpoint {path} is damaged: {error}") from error
        for key, value in self._identity().items():
            if identity.get(key) != value:
                raise ValueError(
                    f"checkpoint {path} was made with {key} = {identity.get(key)}, got {value}; "
                    "a resumed run must keep it"
                )
        self.step = state["step"]
        distributed.load_whole_state(self.model, self.optimizer, state["model"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.data.generator.set_state(state["clips"].cpu())
        self.noise.set_state(state["noise"].cpu())


def _keep_lines(path: Path, step: int) -> None:
    """Drops the metrics of steps that a resumed run will take again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    with whole(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
