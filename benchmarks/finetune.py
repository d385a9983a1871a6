"""Fine-tune the lab's video model with each kind of attention, for several lengths and seeds, and compare.

    python benchmarks/finetune.py --json benchmarks/results/finetune.json    # minutes on a CPU

and for a GPU, say, --device cuda --precision bfloat16 --batch 64 --clips 1024 --steps 250 --steps 1000 --steps 4000.

Every run starts from the shipped teacher, swaps the attention, and sees the clips and the noise that its seed decides:
for one seed and length the arms differ in nothing but the attention. Each length is a run of its own, with a whole
one-cycle schedule. "full" is the control: the same training without a swap. "sla, Proj only" trains the one layer that
SLA adds, and leaves the teacher's weights as they are. Losses are on held-out clips with fixed noise and times.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from sla_ref.files import whole
from sla_ref.lab import evaluate
from sla_ref.lab.config import PRECISIONS, TrainConfig
from sla_ref.lab.console import progress_bar
from sla_ref.lab.flow import Batch
from sla_ref.lab.machine import machine
from sla_ref.lab.model import VideoTransformer, with_attention
from sla_ref.lab.train import train
from sla_ref.lab.weights import TEACHER, load_weights

# Name in the tables: the attention, and what is trained (part of a parameter's name).
ARMS = {
    "full": ("full", ""),
    "sparse": ("sparse", ""),
    "linear": ("linear", ""),
    "l+s": ("l+s", ""),
    "sla": ("sla", ""),
    "sla, Proj only": ("sla", "proj_l"),
}
POINTS = 10  # of a training curve


def student(teacher: VideoTransformer, arm: str) -> VideoTransformer:
    """The teacher with the arm's attention; only the parameters that the arm trains want a gradient."""
    attention, trained = ARMS[arm]
    model = with_attention(teacher, attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return model


def measure(model: VideoTransformer, data: Batch, target: torch.Tensor) -> dict[str, float]:
    prediction = evaluate.predict(model, data)
    return {
        "held_out_loss": evaluate.held_out_loss(prediction, data),
        "distance": evaluate.distance(prediction, target),
    }


def run(
    teacher: VideoTransformer, arm: str, config: TrainConfig, data: Batch, target: torch.Tensor, tick: Any
) -> dict[str, Any]:
    """One fine-tune: what came out, and the mean training loss of each stretch of steps."""
    model = student(teacher, arm)
    curve: dict[str, list[float]] = {"step": [], "loss": []}

    def follow(step: int, loss: float | None) -> None:
        if loss is not None:
            curve["step"].append(step)
            curve["loss"].append(loss)
        tick(step, loss)

    train(model, config, log_every=max(1, config.steps // POINTS), tick=follow)
    about = {"arm": arm, "steps": config.steps, "seed": config.seed}
    return about | measure(model, data, target) | {"training": curve}


def main(
    out: Annotated[Path | None, typer.Option("--json", help="also write the figures here; must not exist")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="length of a run; repeat it for several")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each arm and length")] = 2,
    arms: Annotated[list[str] | None, typer.Option("--arm", help=f"of {', '.join(ARMS)}; all if left out")] = None,
    batch: Annotated[int, typer.Option(min=1, help="clips per step")] = 4,
    learning_rate: Annotated[float, typer.Option(help="peak of the one-cycle schedule")] = 1e-3,
    precision: Annotated[str, typer.Option(help=" or ".join(PRECISIONS))] = "float32",
    clips: Annotated[int, typer.Option(min=1, help="held-out clips to evaluate on")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    if out is not None and out.exists():
        raise typer.BadParameter(f"--json must name a new file, {out} exists")
    chosen, lengths = arms or list(ARMS), steps or [20, 60]
    if unknown := [arm for arm in chosen if arm not in ARMS]:
        raise typer.BadParameter(f"--arm must be one of {', '.join(ARMS)}, got {unknown[0]!r}")
    configs = [
        TrainConfig(steps=length, batch=batch, learning_rate=learning_rate, seed=seed, precision=precision)
        for length in lengths
        for seed in range(seeds)
    ]
    where = torch.device(device)
    console = Console()
    teacher, card = load_weights(TEACHER, where)
    data = evaluate.held_out(teacher, clips)
    target = evaluate.predict(teacher, data)
    untrained = {arm: measure(student(teacher, arm), data, target) for arm in chosen}
    runs = []
    for config in configs:
        for arm in chosen:
            with progress_bar(console, f"{arm}, seed {config.seed}", config.steps) as tick:
                runs.append(run(teacher, arm, config, data, target, tick))

    table = Table(title=f"held-out loss on {clips} clips; mean and range of {seeds} seeds")
    for column in ("arm", "untrained", *(f"{length} steps" for length in lengths)):
        table.add_column(column)
    for arm in chosen:
        cells = [f"{untrained[arm]['held_out_loss']:.4f}"]
        for length in lengths:
            losses = [each["held_out_loss"] for each in runs if (each["arm"], each["steps"]) == (arm, length)]
            cells.append(f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})")
        table.add_row(arm, *cells)
    console.print(table)
    if out is not None:
        settings = configs[0].recipe()
        del settings["steps"], settings["seed"]
        result = {
            "machine": machine(where),
            "teacher": {"steps": card["training"]["steps"], "held_out_loss": evaluate.held_out_loss(target, data)},
            "training": settings,
            "steps": lengths,
            "seeds": seeds,
            "held_out_clips": clips,
            "model": asdict(teacher.config),
            "untrained": untrained,
            "runs": runs,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
