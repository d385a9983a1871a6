"""The two long runs: training a teacher, and fine-tuning it with another attention.

Each leaves a folder with `checkpoint.pt`, `metrics.jsonl` and, at the end, the weights in float16 with
a card that holds the held-out loss of exactly these rounded weights. With several processes all of them train, and rank
0 does the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import distributed, evaluate
from .config import TrainConfig
from .console import progress_bar
from .machine import machine
from .model import ModelConfig, VideoTransformer, with_attention
from .train import Objective, distance_to, flow_loss, train
from .weights import checksum, load_weights, round_to_half, save_weights

OBJECTIVES = ("flow", "teacher")
DATA = "moving digits made from scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"


def named_objective(name: str, teacher: VideoTransformer, config: TrainConfig) -> Objective:
    """The objective of that name; ValueError if there is none."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    if name == "flow":
        return flow_loss
    return distance_to(torch.compile(teacher) if config.compile else teacher)


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

    `changes` are those of `with_attention`: attention, critical_ratio, negligible_ratio, block.
    """
    teacher, _ = load_weights(source, device)
    return _run(with_attention(teacher, **changes), teacher, objective, config, out, console, clips)


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
    loss = flow_loss if teacher is None else named_objective(objective, teacher, config)
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
