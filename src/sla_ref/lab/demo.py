"""The demo: what SLA does to a small video diffusion transformer, on real digits, in a few minutes.

Look at the teacher's attention maps; swap SLA in and evaluate; fine-tune SLA and sparse-only attention
for the same few steps on the same clips; evaluate again; sample from the same noise; write pictures
and a report. The shipped long fine-tune shows where more steps lead.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sla_ref

from .. import analysis
from ..files import new_folder, whole
from . import evaluate, figures, flow
from .config import TrainConfig
from .console import progress_bar
from .machine import machine
from .model import VideoTransformer, with_attention
from .runs import named_objective
from .train import Objective, train
from .weights import load_weights

RATIOS = {"critical_ratio": 0.05, "negligible_ratio": 0.10}
TOP_SHARE = 0.08  # of all weights of a map; in the paper's map 8.1 % were above the mean


def run(
    out: Path,
    teacher_path: Path,
    student_path: Path,
    config: TrainConfig,
    device: torch.device,
    console: Console,
    *,
    objective: str,
    clips: int,
    samples: int,
    sample_steps: int,
) -> dict[str, Any]:
    """Runs everything and returns what it wrote to `out`/report.json.

    Raises ValueError where the teacher's attention is not full, or the student is not of its size.
    """
    started = time.perf_counter()
    teacher, teacher_card = load_weights(teacher_path, device)
    shipped, shipped_card = load_weights(student_path, device)
    loss = named_objective(objective, teacher, config)
    if teacher.config.attention != "full":
        raise ValueError(f"teacher must have full attention, but {teacher_path} has {teacher.config.attention}")
    sizes = [(model.config.frames, model.config.size) for model in (teacher, shipped)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"student must be for the teacher's frames and size, {sizes[0]}, got {sizes[1]}")
    long_steps = shipped_card["training"]["steps"]
    data = evaluate.held_out(teacher, clips)
    new_folder(out)
    console.print(
        f"A video model of {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f} M parameters, "
        f"{teacher.config.tokens} tokens a clip, on {machine(device)['device']}.\n",
        soft_wrap=True,
    )

    layers = _look(teacher, data, console)
    _print_table(console, _maps_table(layers))
    console.print("Shares of weights; stable rank of the map, of its largest weights, of the rest.\n", soft_wrap=True)

    swapped = with_attention(teacher, "sla", **RATIOS)
    classes, title = _classes(swapped, teacher, data)
    figures.class_maps(out / "block_classes.png", classes, title)

    target = _predict(teacher, data, "evaluating: full attention", console)
    rows = [_row("full attention", teacher, target, target, data)]

    def add(name: str, model: VideoTransformer) -> None:
        prediction = _predict(model, data, f"evaluating: {name}", console)
        rows.append(_row(name, model, prediction, target, data))

    add("SLA, swapped in, untrained", swapped)
    losses: dict[str, list[float]] = {}
    tuned: dict[str, VideoTransformer] = {}
    for arm, name in (("sparse", "sparse only"), ("sla", "SLA")):
        tuned[arm] = with_attention(teacher, arm, **RATIOS)
        losses[arm] = _finetune(tuned[arm], loss, config, f"fine-tuning: {name}", console)
        add(f"{name}, {config.steps} steps", tuned[arm])
    add(f"SLA, shipped, {long_steps} steps", shipped)

    models = {
        "full attention": teacher,
        f"SLA, {config.steps} steps": tuned["sla"],
        f"SLA, {long_steps} steps": shipped,
    }
    videos = _sample(models, samples, config.seed, sample_steps, device, console)
    captions = [f"asked for {digit}" for digit in range(samples)]
    figures.clip_strip(out / "clips.png", videos, captions)
    figures.clip_gif(out / "clips.gif", videos)
    few = {name: clip[:2] for name, clip in videos.items()}
    figures.overview(out / "overview.png", few, captions[:2], classes, title)

    console.print()
    _print_table(console, _result_table(rows, clips))
    console.print(
        "Loss and distance to the teacher: mean squares over the predicted velocity.\n"
        "GFLOPs: all attention, one forward of one clip. Sparsity: 1 - critical share.",
        soft_wrap=True,
    )
    report = {
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(device),
        "backend": sla_ref.get_backend(),
        "seed": config.seed,
        "fine_tuning": {"objective": objective, **config.recipe()},
        **RATIOS,
        "held_out_clips": clips,
        "attention_maps": layers,
        "results": rows,
        "fine_tuning_losses": losses,
        "weights": {"teacher": teacher_card, "shipped": shipped_card},
    }
    with whole(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"\n{report['seconds']:.0f} s. In {out}: {', '.join(sorted(path.name for path in out.iterdir()))}",
        soft_wrap=True,
    )
    return report


def _one_clip(teacher: VideoTransformer, data: evaluate.HeldOut) -> tuple[Tensor, Tensor, Tensor]:
    """x, time and labels of the held-out clip whose time is nearest to 1/2."""
    middle = len(data.x) // 2
    device = next(teacher.parameters()).device
    x, moment, labels = (each[middle : middle + 1].to(device) for each in (data.x, data.time, data.labels))
    return x, moment, labels


def _look(teacher: VideoTransformer, data: evaluate.HeldOut, console: Console) -> list[dict[str, float]]:
    """What the paper saw in one map, for every layer of the teacher on one clip, mean over heads."""
    inputs = evaluate.attention_inputs(teacher, *_one_clip(teacher, data))
    layers = []
    with progress_bar(console, "looking at the attention maps", len(inputs)) as tick:
        for done, (query, key, _) in enumerate(inputs, start=1):
            weights = analysis.attention_weights(query, key)
            above, below = analysis.weight_bands(weights)
            top, rest = analysis.split_top(weights, TOP_SHARE)
            measured = {
                "above_mean": above,
                "below_hundredth": below,
                "stable_rank": analysis.stable_rank(weights),
                "stable_rank_top": analysis.stable_rank(top),
                "stable_rank_rest": analysis.stable_rank(rest),
            }
            layers.append({name: value.mean().item() for name, value in measured.items()})
            tick(done)
    return layers


def _classes(swapped: VideoTransformer, teacher: VideoTransformer, data: evaluate.HeldOut) -> tuple[list[Tensor], str]:
    """The classes (H, Tq, Tk) that SLA gives to every layer of the untouched teacher, and a title."""
    config = swapped.config
    ratios = config.critical_ratio, config.negligible_ratio
    maps = [
        sla_ref.classify_blocks(query, key, *ratios, block_q=config.block, block_k=config.block).labels[0]
        for query, key, _ in evaluate.attention_inputs(teacher, *_one_clip(teacher, data))
    ]
    return maps, f"classes at {ratios[0]:.0%} critical, {ratios[1]:.0%} negligible; blocks of {config.block} tokens"


def _predict(model: VideoTransformer, data: evaluate.HeldOut, title: str, console: Console) -> Tensor:
    with progress_bar(console, title, len(data.x)) as tick:
        return evaluate.predict(model, data, tick=tick)


def _row(
    name: str,
    model: VideoTransformer,
    prediction: Tensor,
    target: Tensor,
    data: evaluate.HeldOut,
) -> dict[str, Any]:
    flops, sparsity = evaluate.attention_cost(model.config)
    return {
        "name": name,
        "held_out_loss": evaluate.held_out_loss(prediction, data),
        "distance": evaluate.distance(prediction, target),
        "attention_flops": flops,
        "sparsity": sparsity,
    }


def _finetune(
    model: VideoTransformer, objective: Objective, config: TrainConfig, title: str, console: Console
) -> list[float]:
    """Trains in place; returns the mean losses of every ten steps."""
    losses: list[float] = []
    with progress_bar(console, title, config.steps) as tick:

        def follow(step: int, loss: float | None) -> None:
            if loss is not None:
                losses.append(loss)
            tick(step, loss)

        train(model, config, objective=objective, log_every=10, tick=follow)
    return losses


def _sample(
    models: dict[str, VideoTransformer],
    samples: int,
    seed: int,
    steps: int,
    device: torch.device,
    console: Console,
) -> dict[str, Tensor]:
    """Clips of the digits 0, 1, ... from every model, from the same noise."""
    labels = torch.arange(samples, device=device)
    shape = next(iter(models.values())).config
    noise = torch.randn(
        samples,
        shape.frames,
        shape.size,
        shape.size,
        generator=torch.Generator().manual_seed(seed),
    ).to(device)
    videos = {}
    for name, model in models.items():
        with progress_bar(console, f"sampling: {name}", steps) as tick:
            videos[name] = flow.sample(model.eval(), noise, labels, steps, tick).cpu()
    return videos


def _print_table(console: Console, table: Table) -> None:
    """Whole, where rich would cut figures off: a narrow terminal wraps its lines."""
    Console(width=max(console.width, 80), file=console.file, quiet=console.quiet).print(table)


def _maps_table(layers: list[dict[str, float]]) -> Table:
    table = Table(title="The teacher's attention maps on one held-out clip", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("layer", "above 1/N", "below 1/(100 N)", "stable rank", f"top {TOP_SHARE:.0%}", "rest"):
        table.add_column(column, justify="right")
    for number, layer in enumerate(layers, start=1):
        table.add_row(
            str(number),
            f"{layer['above_mean']:.1%}",
            f"{layer['below_hundredth']:.1%}",
            *(f"{layer[key]:.1f}" for key in ("stable_rank", "stable_rank_top", "stable_rank_rest")),
        )
    return table


def _result_table(rows: list[dict[str, Any]], clips: int) -> Table:
    table = Table(title=f"Measured on {clips} held-out clips", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("attention")
    for column in ("loss", "distance", "GFLOPs", "sparsity"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['held_out_loss']:.4f}",
            f"{row['distance']:.4f}",
            f"{row['attention_flops'] / 1e9:.2f}",
            f"{row['sparsity']:.1%}",
        )
    return table
