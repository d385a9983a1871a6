"""The lab's pictures: clips side by side, and the three classes of every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..analysis import CLASS_COLOURS, CLASS_NAMES
from ..files import whole

INK = "#222222"
SHOWN = 8  # frames of a clip in a strip


class Panel(NamedTuple):
    """A part of a picture: its width and height in inches, and what draws it."""

    width: float
    height: float
    draw: Callable[[FigureBase], None]


def save(path: Path, *panels: Panel) -> None:
    """A PNG of the panels, one below the other."""
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(max(panel.width for panel in panels), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, panel in zip(parts, panels, strict=True):
        panel.draw(part)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")


def class_maps(labels: list[Tensor], title: str) -> Panel:
    """The labels (H, Tq, Tk) of every layer: a column per layer, a row per head."""
    heads = labels[0].shape[0]

    def draw(figure: FigureBase) -> None:
        figure.suptitle(title, color=INK, fontsize=11)
        colours = ListedColormap([CLASS_COLOURS[label] for label in (-1, 0, 1)])
        axes = figure.subplots(heads, len(labels), squeeze=False)
        for layer, maps in enumerate(labels):
            axes[0, layer].set_title(f"layer {layer + 1}", color=INK, fontsize=10)
            axes[-1, layer].set_xlabel("key blocks", color=INK, fontsize=9)
            for head, classes in enumerate(maps):
                panel = axes[head, layer]
                panel.imshow(classes.cpu().numpy(), cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(False)
        for head, row in enumerate(axes, start=1):
            row[0].set_ylabel(f"head {head}\nquery blocks", color=INK, fontsize=9)
        handles = [Patch(color=CLASS_COLOURS[label], label=name) for label, name in CLASS_NAMES.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)

    return Panel(2.3 * len(labels) + 0.5, 2.3 * heads + 1.0, draw)


def clip_strip(clips: dict[str, Tensor], captions: list[str]) -> Panel:
    """Clips (n, F, S, S) of several models: an image per clip, with a row of frames per model; a frame is an inch."""
    count, frames, size = next(iter(clips.values())).shape[:3]

    def draw(figure: FigureBase) -> None:
        picked = torch.linspace(0, frames - 1, min(SHOWN, frames)).round().long()
        step = size + 2  # two white pixels between the frames
        panels = figure.subplots(count, 1, squeeze=False)[:, 0]
        for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
            rows = torch.stack([videos[index].cpu()[picked] for videos in clips.values()])
            tiles = F.pad(rows, (0, 2, 0, 2), value=1.0)  # (models, frames, S + 2, S + 2)
            picture = tiles.transpose(1, 2).flatten(2).flatten(0, 1).numpy()
            panel.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            panel.set_title(caption, color=INK, fontsize=10, loc="left")
            panel.set_yticks([size / 2 + step * row for row in range(len(clips))], list(clips))
            panel.tick_params(length=0, labelsize=9, labelcolor=INK)
            panel.set_xticks([])
            panel.spines[:].set_visible(False)

    return Panel(SHOWN + 1.7, count * (len(clips) + 0.35), draw)


def clip_gif(path: Path, clips: dict[str, Tensor], zoom: int = 4) -> None:
    """A looping GIF: a column per model, a row per clip (n, F, S, S), the models' names above."""
    gap, header = 6, 22
    count, frames, size = next(iter(clips.values())).shape[:3]
    cell = size * zoom
    column = max(cell, 132)
    width = len(clips) * (column + gap) + gap
    height = header + count * (cell + gap) + gap
    font = ImageFont.load_default(12)
    pages = []
    for frame in range(frames):
        page = Image.new("L", (width, height), 255)
        pen = ImageDraw.Draw(page)
        for place, (name, videos) in enumerate(clips.items()):
            left = gap + place * (column + gap)
            pen.text((left + column / 2, header / 2 + 2), name, fill=34, font=font, anchor="mm")
            for row in range(count):
                pixels = ((videos[row, frame].cpu() + 1) * 127.5).round().to(torch.uint8)
                tile = Image.fromarray(pixels.numpy()).resize((cell, cell), Image.Resampling.NEAREST)
                page.paste(tile, (left + (column - cell) // 2, header + gap + row * (cell + gap)))
        pages.append(page)
    with whole(path) as temporary:
        pages[0].save(temporary, format="GIF", save_all=True, append_images=pages[1:], duration=110, loop=0)
