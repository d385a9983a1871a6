"""One training loop, for the teacher and for fine-tuning; an interrupted run resumes without loss.

All parameters are trained with AdamW on a one-cycle schedule, on clips made as they are needed. What is minimised is an
objective: the flow loss, the distance to a teacher's prediction (the "white box" recipe), or that of each layer to
full attention (`layers`).

A run lives in one folder: `checkpoint.pt` (all that is needed to go on) and `metrics.jsonl` (one line per `log_every`
steps: step, mean loss since the last line, learning rate, seconds). On one CPU an interrupted and resumed run ends with
the same bits as an uninterrupted one.

Under torchrun each process trains on its share of the same batches; rank 0 writes. A checkpoint is that of one
process, so a run may go on with another number of them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_block_size, check_callable, check_path, check_type, shown
from ..files import append_line, run_folder
from . import distributed, flow
from .checkpoint import keep_lines, read_checkpoint, write_checkpoint
from .config import TrainConfig
from .flow import Batch
from .graph import RecordedStep
from .model import VideoTransformer

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


# The loss of a model, which is called with x, time and labels, on a batch.
Objective = Callable[[Callable[..., Any], Batch], Tensor]


def flow_loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Mean squared error of the velocity."""
    predicted = model(batch.x, batch.time, batch.labels)
    return F.mse_loss(predicted.float(), batch.velocity.float())


def distance_to(teacher: Callable[..., Any]) -> Objective:
    """The objective "white box": the mean squared difference to the teacher's prediction."""

    def loss(model: Callable[..., Any], batch: Batch) -> Tensor:
        with torch.no_grad():
            target = teacher(batch.x, batch.time, batch.labels)
        return flow_loss(model, batch._replace(velocity=target))

    return loss


def train(
    model: VideoTransformer,
    config: TrainConfig,
    out: Path | None = None,
    *,
    objective: Objective = flow_loss,
    about: Mapping[str, str] | None = None,
    rates: Mapping[str, float] | None = None,
    log_every: int = 50,
    save_every: int = 500,
    tick: Callable[[int, float | None], object] = lambda step, loss: None,
) -> None:
    """Trains `model` in place on its device and leaves a checkpoint in `out`; without `out` nothing is written.

    `tick(step, loss)` is called after each step; loss is None except where a metrics line is written.
    Without `config.resume`, `out` must be new or empty. With it, `out` must hold a checkpoint of the same recipe, model
    and `about`, which names what else decides the outcome, for example the objective.

    SIGINT (Ctrl-C) and SIGTERM, however often they come, let the step end and save a checkpoint; then KeyboardInterrupt
    is raised, on every rank. This works only in the main thread, because Python handles signals nowhere else.

    Parameters that do not require a gradient stay as they are. `rates` gives those with a certain part in their names a
    learning rate of their own, in units of the others'.

    With several processes `config.batch` is the sum of their shares. With `config.fsdp` they share out parameters and
    optimizer states too (FSDP2), else only the batch (DDP).

    Raises:
        TypeError: an argument has the wrong type.
        FileNotFoundError, FileExistsError: there is no checkpoint to resume from, or something is in `out`.
        FloatingPointError: the loss is infinite or NaN.
        RuntimeError: another run is using `out`.
        ValueError: the processes cannot share out the batch evenly, `fsdp` without torchrun, `graph` without a GPU or
            with several, or a checkpoint that is damaged or of another run.
    """
    check_type("model", model, VideoTransformer)
    check_type("config", config, TrainConfig)
    out = None if out is None else check_path("out", out)
    check_callable("objective", objective)
    check_callable("tick", tick)
    for name, mapping in (("about", about), ("rates", rates)):
        if mapping is not None:
            check_type(name, mapping, Mapping)
            if not all(isinstance(key, str) for key in mapping):
                raise TypeError(f"{name} must have strings for keys, got {shown([*mapping])}")
    check_block_size("log_every", log_every)
    check_block_size("save_every", save_every)
    if config.batch % (ranks := distributed.count()):
        raise ValueError(f"batch must be divisible by the number of processes {ranks}, got {config.batch}")
    if config.resume and (out is None or not (out / CHECKPOINT).is_file()):
        raise FileNotFoundError(f"resume needs a checkpoint, but there is no {(out or Path()) / CHECKPOINT}")
    run = Run(model, config, objective, about, rates)
    folder = out if distributed.rank() == 0 else None
    stop = False
    with nullcontext() if folder is None else run_folder(folder, config.resume), _noted_signals() as noted:
        if out is not None and config.resume:
            run.load(out / CHECKPOINT)
            if folder is not None:
                keep_lines(folder / METRICS, run.step)
        model.train()
        while run.step < config.steps and not stop:
            run.advance()
            loss = None
            if run.step % log_every == 0 or run.step == config.steps:
                line = run.log_line()
                loss = line["loss"]
                if folder is not None:
                    append_line(folder / METRICS, line)
            tick(run.step, loss)
            stop = distributed.any_rank(bool(noted))
            if out is not None and (stop or run.step % save_every == 0 or run.step == config.steps):
                run.save(out / CHECKPOINT)
    if stop or noted:
        raise KeyboardInterrupt


class Run:
    """The state of a run: all that a checkpoint holds, and the one step that changes it."""

    def __init__(
        self,
        model: VideoTransformer,
        config: TrainConfig,
        objective: Objective = flow_loss,
        about: Mapping[str, str] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.config, self.objective, self.about = model, config, objective, about or {}
        self.device = next(model.parameters()).device
        if config.graph and (self.device.type != "cuda" or distributed.count() > 1):
            raise ValueError(f"graph needs one process on a GPU, got {distributed.count()} on {self.device}")
        self.forward: Callable[..., Any] = distributed.wrap(model, config.fsdp)
        if config.compile:
            self.forward = torch.compile(self.forward)
        self.step = 0
        self.data = model.config.clips("train", config.seed)
        self.noise = torch.Generator(self.device).manual_seed(config.seed)
        groups: dict[float, list[nn.Parameter]] = {}  # by peak of the learning rate
        for name, parameter in model.named_parameters():
            factor = next((rate for part, rate in (rates or {}).items() if part in name), 1.0)
            groups.setdefault(config.learning_rate * factor, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            # A recorded step reads its rate from the device; a number would be recorded with it.
            [
                {"params": members, "lr": torch.tensor(peak, device=self.device) if config.graph else peak}
                for peak, members in groups.items()
            ],
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
            capturable=config.graph,
        )
        self.recorded: RecordedStep | None = None
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=list(groups),
            total_steps=config.steps + 1,  # it counts the rate before the first step, too
            pct_start=config.warmup,
            cycle_momentum=False,
        )
        # Since the last line of metrics: the sum of losses, the step, and when it was.
        self.loss_sum = torch.zeros((), device=self.device)  # on the device: reading it each step would stall a GPU
        self.logged, self.started = 0, time.perf_counter()

    def advance(self) -> Tensor:
        """One step; returns its loss, on this process's share of the batch, as a tensor on the device."""
        batch = self.next_batch()
        if self.config.graph and self.recorded is None:
            self.recorded = RecordedStep(self.learn, batch, self.model, self.optimizer)
        loss = (self.recorded or self.learn)(*batch)
        self.scheduler.step()
        self.loss_sum += loss
        self.step += 1
        return loss

    def learn(self, *batch: Tensor) -> Tensor:
        """One step of the optimizer on a `Batch`; returns the loss. It may be recorded: nothing in it reads data."""
        # The cache of cast weights would outlive the recording of a graph.
        half, cache = self.config.precision == "bfloat16", not self.config.graph
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half, cache_enabled=cache):
            loss = self.objective(self.forward, Batch(*batch))
        check_type("objective's result", loss, Tensor)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def next_batch(self) -> Batch:
        """This process's share of the next clips, with noise."""
        clip, labels = self.data.batch(self.config.batch, self.device)
        noise = torch.randn(clip.shape, generator=self.noise, device=self.device)
        moment = torch.rand(len(clip), generator=self.noise, device=self.device)
        clip, labels, noise, moment = (distributed.share(each) for each in (clip, labels, noise, moment))
        return Batch(flow.noised(clip, noise, moment), moment, labels, flow.velocity(clip, noise))

    def log_line(self) -> dict[str, Any]:
        """What to note of the steps since the last line, which are forgotten then."""
        mean, now = distributed.mean(self.loss_sum).item() / (self.step - self.logged), time.perf_counter()
        if not mean < float("inf"):
            raise FloatingPointError(f"the loss at step {self.step} is {mean}")
        rate, seconds = float(self.optimizer.param_groups[0]["lr"]), round(now - self.started, 3)
        self.loss_sum.zero_()
        self.logged, self.started = self.step, now
        return {"step": self.step, "loss": mean, "learning_rate": rate, "seconds": seconds}

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as one process has it, on rank 0; every rank takes part."""
        model, optimizer = distributed.whole_state(self.model, self.optimizer)
        return {
            # What must be the same for a checkpoint to continue this run.
            "identity": {
                **{f"model.{key}": value for key, value in asdict(self.model.config).items() if value is not None},
                **self.config.recipe(),
                **self.about,
                "device": self.device.type,
            },
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "clips": self.data.generator.get_state(),
            "noise": self.noise.get_state(),
            "loss_sum": distributed.mean(self.loss_sum),
            "logged": self.logged,
            "seconds": time.perf_counter() - self.started,
        }

    def save(self, path: Path) -> None:
        """Rank 0 writes the checkpoint; every rank takes part."""
        state = self.state()
        if distributed.rank() == 0:
            write_checkpoint(path, state)
        distributed.any_rank(False)  # no rank goes on, to resume from it perhaps, before the file is there

    def load(self, path: Path) -> None:
        """Goes back to where a run of the same identity was saved; ValueError if the file does not belong to one."""
        state = read_checkpoint(path, self.state(), whole=distributed.rank() == 0)
        self.step, self.logged = state["step"], state["logged"]
        if not 0 <= self.logged <= self.step <= self.config.steps or self.step != state["scheduler"]["last_epoch"]:
            raise ValueError(f"checkpoint {path} is damaged: its step {self.step} cannot be")
        for name, generator in (("clips", self.data.generator), ("noise", self.noise)):
            try:
                generator.set_state(state[name])
            except RuntimeError as error:
                raise ValueError(f"checkpoint {path} is damaged: {name} is not the state of a generator") from error
        distributed.load_whole_state(self.model, self.optimizer, state["model"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.loss_sum.copy_(state["loss_sum"])
        self.started = time.perf_counter() - state["seconds"]


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are added when they come, instead of what they do otherwise.

    One that is ignored stays ignored, as for a job in the background.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if not noted:
            os.write(2, b"\nstopping after this step\n")  # printing is not safe here
        noted.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
