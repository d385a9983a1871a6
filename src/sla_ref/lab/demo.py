"""The demo: what SLA does to a small video diffusion transformer, on real digits, in a few minutes.

Look at the teacher's attention maps; swap SLA in and evaluate; fine-tune SLA and sparse-only attention
for the same few steps on the same clips; evaluate again; sample from the same noise; write pictures
and a report. The shipped long fine-tune shows where more steps lead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
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
from .flow import Batch
from .machine import machine
from .model import ModelConfig, VideoTransformer, with_attention
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
    try:
        long_steps = shipped_card["training"]["steps"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"student must have a card with its training steps, {student_path} has none") from error
    data = evaluate.held_out(teacher, clips)
    new_folder(out)
    console.print(
        f"A video model of {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f} M parameters, "
        f"{teacher.config.tokens} tokens a clip, on {machine(device)['device']}.\n",
        soft_wrap=True,
    )

    middle = len(data.x) // 2  # the clip whose time is nearest to 1/2
    inputs = evaluate.attention_inputs(teacher, *(each[middle : middle + 1].to(device) for each in data[:3]))
    layers = _look(inputs, console)
    _print_maps(console, layers)
    console.print("Shares of weights; stable rank of the map, of its largest weights, of the rest.\n", soft_wrap=True)

    swapped = with_attention(teacher, "sla", **RATIOS)
    classes = _classes(swapped.config, inputs)
    figures.save(out / "block_classes.png", classes)

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
    noise = torch.randn(samples, *data.x.shape[1:], generator=torch.Generator().manual_seed(config.seed))
    videos = _sample(models, noise.to(device), sample_steps, console)
    captions = [f"asked for {digit}" for digit in range(samples)]
    figures.save(out / "clips.png", figures.clip_strip(videos, captions))
    figures.clip_gif(out / "clips.gif", videos)
    few = {name: clip[:2] for name, clip in videos.items()}
    figures.save(out / "overview.png", figures.clip_strip(few, captions[:2]), classes)

    console.print()
    _print_results(console, rows, clips)
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


def _look(inputs: list[tuple[Tensor, Tensor, Tensor]], console: Console) -> list[dict[str, float]]:
    """What the paper saw in one map, for the query, key and value of every layer, mean over heads."""
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


def _classes(config: ModelConfig, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> figures.Panel:
    """The classes that SLA gives to every layer, from its query and key."""
    ratios = config.critical_ratio, config.negligible_ratio
    maps = [
        sla_ref.classify_blocks(query, key, *ratios, block_q=config.block, block_k=config.block).labels[0]
        for query, key, _ in inputs
    ]
    title = f"classes at {ratios[0]:.0%} critical, {ratios[1]:.0%} negligible; blocks of {config.block} tokens"
    return figures.class_maps(maps, title)


def _predict(model: VideoTransformer, data: Batch, title: str, console: Console) -> Tensor:
    with progress_bar(console, title, len(data.x)) as tick:
        return evaluate.predict(model, data, tick=tick)


def _row(name: str, model: VideoTransformer, prediction: Tensor, target: Tensor, data: Batch) -> dict[str, Any]:
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


def _sample(models: dict[str, VideoTransformer], noise: Tensor, steps: int, console: Console) -> dict[str, Tensor]:
    """Clips of the digits 0, 1, ... from every model, from the same noise."""
    labels = torch.arange(len(noise), device=noise.device)
    videos = {}
    for name, model in models.items():
        with progress_bar(console, f"sampling: {name}", steps) as tick:
            videos[name] = flow.sample(model.eval(), noise, labels, steps, tick).cpu()
    return videos


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Names on the left, numbers on the right; whole, where rich would cut numbers off in a narrow terminal."""
    table = Table(columns[0], title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(console.width, 80), file=console.file, quiet=console.quiet).print(table)


def _print_maps(console: Console, layers: list[dict[str, float]]) -> None:
    columns = ("layer", "above 1/N", "below 1/(100 N)", "stable rank", f"top {TOP_SHARE:.0%}", "rest")
    rows = []
    for number, layer in enumerate(layers, start=1):
        above, below, *ranks = layer.values()
        rows.append((str(number), f"{above:.1%}", f"{below:.1%}", *(f"{rank:.1f}" for rank in ranks)))
    _print_table(console, "The teacher's attention maps on one held-out clip", columns, rows)


def _print_results(console: Console, results: list[dict[str, Any]], clips: int) -> None:
    rows = []
    for result in results:
        name, loss, distance, flops, sparsity = result.values()
        rows.append((name, f"{loss:.4f}", f"{distance:.4f}", f"{flops / 1e9:.2f}", f"{sparsity:.1%}"))
    columns = ("attention", "loss", "distance", "GFLOPs", "sparsity")
    _print_table(console, f"Measured on {clips} held-out clips", columns, rows)
