"""Draw what was measured on a GPU: docs/performance/*.svg, from the file that benchmarks/gpu.py wrote.

    python -m benchmarks.figures                        # from benchmarks/results/gpu.json
    python -m benchmarks.figures --results other.json

The floor of a kernel is the time below which no kernel for the same step can come on this GPU: the larger of its
multiplications at the peak rate of the matrix units, and of the bytes that it must move at the peak rate of the memory.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import typer
from matplotlib.figure import Figure

from experiments.figures import COLOURS, INK, MARKERS, STYLE
from sla_ref.files import whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
FOLDER = ROOT / "docs" / "performance"
Shape = tuple[int, int, int, int]

# --- work that is counted --------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """What a GPU can do at most, from its data sheet."""

    tflops: float  # bfloat16 without sparsity
    terabytes: float  # of memory, per second


PEAKS = {"NVIDIA H100 80GB HBM3": Peak(989.4, 3.35), "NVIDIA H200": Peak(989.4, 4.8)}


class Work(NamedTuple):
    """What a step must do: floating-point operations of matrix products, and bytes to and from memory."""

    flop: float
    bytes: float

    def floor_us(self, peak: Peak) -> float:
        """Microseconds."""
        return max(self.flop / peak.tflops, self.bytes / peak.terabytes) / 1e6


def critical_share(shape: Shape, block_k: int, critical_ratio: float) -> float:
    """What part of the key blocks is critical, after rounding to whole blocks."""
    key_blocks = math.ceil(shape[2] / block_k)
    return max(1, int(critical_ratio * key_blocks)) / key_blocks


def work(shape: Shape, blocks: tuple[int, int], critical_ratio: float) -> dict[str, Work]:
    """What each kernel must do in one forward and backward of the layer.

    A product that a kernel computes twice to save memory counts once, and so does a tensor that it reads repeatedly.
    """
    batch, heads, length, dim = shape
    query_blocks, key_blocks = (math.ceil(length / block) for block in blocks)
    pairs = batch * heads * length**2 * critical_share(shape, blocks[1], critical_ratio)  # of query and critical key
    product = 2.0 * batch * heads * length * dim**2  # of all tokens with a D x D matrix
    tokens = 2.0 * batch * heads * length * dim  # bytes of one tensor
    state = 2.0 * (dim + 2) * dim * batch * heads  # bytes of the states of one block in all heads
    sums = 2.0 * batch * heads * query_blocks * key_blocks * (dim + 2) * dim
    of_keys, of_queries = key_blocks * state, query_blocks * state
    return {
        "forward_kernel": Work(4 * pairs * dim + product, 4 * tokens + of_queries),
        "dq_kernel": Work(6 * pairs * dim, 7 * tokens),
        "dkdv_kernel": Work(8 * pairs * dim + product, 8 * tokens),
        "states_kernel": Work(4 * product, 5 * tokens + 2 * of_keys),  # in both passes, with V W^T
        "sums of states": Work(3 * sums, 3 * (of_keys + of_queries)),  # in both passes, and the way back
        "grad_sums_kernel": Work(2 * product, 3 * tokens + 2 * of_queries),
        "grad_keys_kernel": Work(2 * product, 4 * tokens + of_keys),
        "grad_weight_kernel": Work(product, 2 * tokens),
        "pool_kernel": Work(0, 2 * tokens),
    }


PARTS = {
    "sparse branch": ("forward_kernel", "dq_kernel", "dkdv_kernel"),
    "linear branch and Proj": (
        "states_kernel", "sums of states", "grad_sums_kernel", "grad_keys_kernel", "grad_weight_kernel",
    ),
    "classes and lists": ("pool_kernel", "labels_kernel", "lists_kernel", "other"),
}  # fmt: skip
"""Kernels by what they are for. The forward kernel computes both branches, most of it the sparse one."""


def by_kernel(result: dict[str, Any]) -> dict[str, float]:
    """Microseconds of each of our kernels in one forward and backward, of the sums of states, and of all others."""
    names = [name for part in PARTS.values() for name in part]
    found = dict.fromkeys(names, 0.0)
    for kernel, microseconds in result["wan"]["kernels_us"].items():
        name = "sums of states" if kernel.startswith("nvjet") else kernel  # cuBLAS, in bfloat16
        found[name if name in found else "other"] += microseconds
    return found


def of_main_problem(result: dict[str, Any]) -> tuple[dict[str, Work], Peak]:
    """The work of the main problem with blocks of 128 x 64, and what its GPU can do."""
    problem = result["problem"]
    return work(tuple(problem["shape"]), (128, 64), problem["critical_ratio"]), PEAKS[result["about"]["device"]]


def break_even(result: dict[str, Any], name: str, head_dim: int = 128) -> float:
    """The length at which the layer is as fast as cuDNN, between two measured ones, on logarithmic scales."""
    base = name.removesuffix("_graph")
    points = [
        (math.log(row["shape"][2]), math.log(row["sdpa_cudnn"][base] / row["layer"][name]))
        for row in rows(result, head_dim)
    ]
    for (x, y), (next_x, next_y) in pairwise(points):
        if y < 0 <= next_y:
            return math.exp(x - y * (next_x - x) / (next_y - y))
    return math.exp(points[0][0])


def rows(result: dict[str, Any], head_dim: int = 128) -> list[dict[str, Any]]:
    """Those of `lengths` with 12 heads."""
    return [row for row in result["lengths"] if row["shape"][1] == 12 and row["shape"][3] == head_dim]


# --- figures ---------------------------------------------------------------------------------------------------------


def speed(result: dict[str, Any]) -> Figure:
    """How many times as fast as cuDNN, by length."""
    figure, axes = plt.subplots(figsize=(7.2, 3.9))
    found = rows(result)
    lengths = [row["shape"][2] for row in found]
    sides = {"forward": "forward", "forward_backward": "forward + backward"}
    for number, (name, words) in enumerate(sides.items()):
        for style, key, how in (("-", f"{name}_graph", "as a graph"), ("--", name, "eager")):
            ratios = [row["sdpa_cudnn"][name] / row["layer"][key] for row in found]
            axes.plot(lengths, ratios, style, color=COLOURS[number], marker=MARKERS[number], label=f"{words}, {how}")
    axes.axhline(1, color=INK, linewidth=1)
    axes.annotate("cuDNN", (1.01, 1), xycoords=("axes fraction", "data"), va="center")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times as fast as cuDNN")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ticks = (0.125, 0.25, 0.5, 1, 2, 4, 8)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def budget(result: dict[str, Any]) -> Figure:
    """Where the time of a forward and backward goes, next to what it would be without any loss."""
    problem, (floors, peak) = result["problem"], of_main_problem(result)
    share = critical_share(tuple(problem["shape"]), 64, problem["critical_ratio"])
    dense = result["wan"]["sdpa_cudnn"]["forward_backward"]
    measured = {kernel: time / 1000 for kernel, time in by_kernel(result).items()}
    bars = {
        f"{share:.1%} of cuDNN's time": {"sparse branch": dense * share},
        "SLA, its floor": {
            part: sum(floors[kernel].floor_us(peak) / 1000 for kernel in kernels if kernel in floors)
            for part, kernels in PARTS.items()
        },
        "SLA, measured": {part: sum(measured[kernel] for kernel in kernels) for part, kernels in PARTS.items()},
    }
    figure, axes = plt.subplots(figsize=(7.2, 2.6))
    for number, part in enumerate(PARTS):
        left = [sum(list(bar.values())[:number]) for bar in bars.values()]
        width = [bar.get(part, 0.0) for bar in bars.values()]
        axes.barh(list(bars), width, left=left, color=COLOURS[number], label=part, height=0.6)
    for height, bar in enumerate(bars.values()):
        axes.annotate(
            f"{sum(bar.values()):.1f} ms", (sum(bar.values()), height), (6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="milliseconds of one forward and backward")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def roofline(result: dict[str, Any]) -> Figure:
    """The rate that each kernel reaches, under what memory and matrix units allow."""
    floors, peak = of_main_problem(result)
    measured = by_kernel(result)
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    intensity = [2.0**power for power in range(4, 12)]
    corner = peak.tflops / peak.terabytes
    axes.plot(
        [intensity[0], corner, intensity[-1]], [peak.terabytes * intensity[0], peak.tflops, peak.tflops], color=INK
    )
    axes.annotate("matrix units", (intensity[-1], peak.tflops), (0, 5), textcoords="offset points", ha="right")
    axes.annotate("memory", (2**5, peak.terabytes * 2**5), (-6, 4), textcoords="offset points", ha="right")
    for number, kernels in enumerate(PARTS.values()):
        for kernel in kernels:
            if kernel in floors and floors[kernel].flop:
                point = floors[kernel].flop / floors[kernel].bytes, floors[kernel].flop / measured[kernel] / 1e6
                axes.plot(*point, MARKERS[number], color=COLOURS[number], markersize=7)
                places = {"dq_kernel": ((-8, 0), "right"), "grad_keys_kernel": ((0, -12), "center")}
                away, side = places.get(kernel, ((8, 0), "left"))
                name = kernel.removesuffix("_kernel")
                axes.annotate(name, point, away, textcoords="offset points", ha=side, va="center")
    axes.set(
        xscale="log", yscale="log", xlabel="operations for each byte that must move", ylabel="TFLOP/s", ylim=(50, 1300)
    )
    axes.set_xticks(intensity, [f"{each:g}" for each in intensity])
    ticks = (50, 100, 200, 400, 800)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {"speed": speed, "budget": budget, "roofline": roofline}


def draw(name: str, result: dict[str, Any]) -> str:
    """A figure as SVG, the same bytes every time."""
    svg = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = FIGURES[name](result)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        plt.close(figure)
    return svg.getvalue()


def main(
    results: Annotated[Path, typer.Option(help="a file that benchmarks/gpu.py wrote", exists=True)] = RESULTS,
    folder: Annotated[Path, typer.Option(help="where the figures go")] = FOLDER,
) -> None:
    """Draw the figures, and print each kernel's share of its floor."""
    result = json.loads(results.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        with whole(folder / f"{name}.svg") as part:
            part.write_text(draw(name, result), encoding="utf-8")
    print("\n".join(floor_table(result)))


def floor_table(result: dict[str, Any]) -> list[str]:
    """Rows of Markdown: each kernel, its time, its floor, and how much of the time the floor is."""
    floors, peak = of_main_problem(result)
    lines = []
    for kernel, time in by_kernel(result).items():
        cells = [f"`{kernel}`" if kernel.endswith("_kernel") else kernel, f"{time:.0f}", "-", "-"]
        if kernel in floors:
            floor = floors[kernel].floor_us(peak)
            cells[2:] = f"{floor:.0f}", f"{floor / time:.0%}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
