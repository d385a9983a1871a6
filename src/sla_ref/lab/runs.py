"""The two long runs: training a teacher, and fine-tuning it with another attention.

Each leaves a folder with `checkpoint.pt`, `metrics.jsonl` and, at the end, the weights in float16 with
a card that holds the held-out loss of exactly these rounded weights. With several processes all of them train, and rank
0 does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import distributed, evaluate
from .config import TrainConfig
from .console import progress_bar
from .layers import each_layer, for_stage_1
from .machine import machine
from .model import ModelConfig, VideoTransformer, with_attention
from .train import Objective, distance_to, flow_loss, train
from .weights import checksum, load_weights, round_to_half, save_weights

DATA = "moving digits made from scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"


def named_objective(
    name: str, teacher: VideoTransformer, config: TrainConfig, student: VideoTransformer | None = None
) -> Objective:
    """The objective of that name; ValueError if there is none. Without a `student`, there is no "layers"."""
    made: dict[str, Callable[[], Objective]] = {
        "flow": lambda: flow_loss,
        "teacher": lambda: distance_to(torch.compile(teacher) if config.compile else teacher),
    }
    if student is not None:
        made["layers"] = lambda: each_layer(student, teacher)
    if name not in made:
        raise ValueError(f"objective must be one of {', '.join(made)}, got {name!r}")
    return made[name]()


def train_teacher(
    model: ModelConfig, config: TrainConfig, out: Path, device: torch.device, console: Console, *, clips: int
) -> Path:
    """Trains a model from scratch; returns the path of its weights file."""
    torch.manual_seed(config.seed)  # the initial weights
    return _run(VideoTransformer(model).to(device), None, "flow", config, out, console, clips)


def finetune(
    source: Path,
    changes: dict[str, Any],
    objective: str,
    config: TrainConfig,
    out: Path,
    device: torch.device,
    console: Console,
    *,
    clips: int,
) -> Path:
    """Loads the weights `source`, swaps the attention, trains; returns the new weights file.

    `changes` are those of `with_attention`: attention, critical_ratio, negligible_ratio, block, alpha, router.

    A learned router of SLA2 takes two runs. The first starts from full attention, has the objective "layers", and
    trains only router and alpha. The second starts from the file of the first, and trains all but the router.
    """
    teacher, _ = load_weights(source, device)
    student = with_attention(teacher, **changes)
    if objective == "layers":
        _check_stage_1(teacher.config, student.config)
        for_stage_1(student)
    elif student.config.router == "learned":
        _check_stage_2(teacher.config, student.config, objective)
    return _run(student, teacher, objective, config, out, console, clips)


def _check_stage_1(source: ModelConfig, student: ModelConfig) -> None:
    if student.router != "learned":
        got = f"router {student.router!r} and attention {student.attention!r}"
        raise ValueError(f"objective layers is stage 1 of sla2's router 'learned', got {got}")
    if source.attention != "full":
        raise ValueError(f"objective layers needs a teacher with attention 'full' to match, got {source.attention!r}")
    if distributed.count() > 1:  # it calls layers, around what averages the gradients of a whole model
        raise ValueError(f"objective layers needs one process, got {distributed.count()}")


def _check_stage_2(source: ModelConfig, student: ModelConfig, objective: str) -> None:
    if source.router != "learned":
        raise ValueError(
            "router 'learned' needs the weights of stage 1 as teacher, which the objective layers makes, got some with "
            f"attention {source.attention!r} and router {source.router!r}"
        )
    for name in ("alpha", "block"):
        there, here = getattr(source, name), getattr(student, name)
        if there != here:
            raise ValueError(f"{name} must be that of stage 1, {there!r}, got {here!r}")
    if objective == "teacher":
        raise ValueError(
            "objective must be flow from the weights of stage 1, which are no teacher to match, got 'teacher'"
        )


def _run(
    model: VideoTransformer,
    teacher: VideoTransformer | None,
    objective: str,
    config: TrainConfig,
    out: Path,
    console: Console,
    clips: int,
) -> Path:
    attention = model.config.attention
    path = out / f"{attention}.safetensors"
    if path.exists():
        raise FileExistsError(f"{path} is there already: the run in this folder is finished")
    device = next(model.parameters()).device
    loss = flow_loss if teacher is None else named_objective(objective, teacher, config, model)
    about = {"objective": objective}
    if teacher is not None:
        about["teacher"] = f"weights with sha256 {checksum(teacher.state_dict())}"
    data = evaluate.held_out(model, clips)
    with progress_bar(console, f"training, {attention} attention", config.steps) as tick:
        train(model, config, out, objective=loss, about=about, tick=tick)
    weights = distributed.whole_weights(model)
    first = distributed.rank() == 0
    distributed.leave()
    if not first:
        return path
    model = VideoTransformer(model.config).to(device)
    model.load_state_dict(weights)
    round_to_half(model)
    with progress_bar(console, "evaluating the stored weights", clips) as tick:
        prediction = evaluate.predict(model, data, tick=tick)
    card: dict[str, Any] = {
        "data": DATA,
        "objective": objective,
        "training": config.recipe(),
        "machine": machine(device),
        "held_out_loss": evaluate.held_out_loss(prediction, data),
        "held_out_clips": clips,
    }
    if teacher is not None:
        with progress_bar(console, "asking the teacher", clips) as tick:
            card["distance"] = evaluate.distance(prediction, evaluate.predict(teacher, data, tick=tick))
    save_weights(path, model, card)
    console.print_json(data=card)
    console.print(f"weights: {path}", soft_wrap=True)
    return path
