"""docs/performance.md and the numbers of other pages are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import figures

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
GPU = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text(encoding="utf-8"))
WAN = json.loads((ROOT / "benchmarks" / "results" / "wan.json").read_text(encoding="utf-8"))["arms"]
BACKENDS = json.loads((ROOT / "benchmarks" / "results" / "backends.json").read_text(encoding="utf-8"))
CPU = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
TRAINING = {
    "training": "all weights",
    "lora": "LoRA",
    "training_whole_graph": "all weights, no checkpointing",
    "lora_whole_graph": "LoRA, no checkpointing",
}
EXPERIMENTS = ROOT / "benchmarks" / "results" / "experiments"


def digits(value: float) -> str:
    """Two or three of them."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times_faster(row: dict, key: str, base: dict) -> str:
    """Milliseconds, and how many times as fast as `base`."""
    ratio = base[key.removesuffix("_graph")] / row[key]
    return f"{digits(row[key])} ({ratio:.1f}x)" if ratio >= 0.95 else f"{digits(row[key])} ({ratio:.2f}x)"


def gpu_row(name: str, row: dict) -> str:
    sdpa = GPU["wan"]["sdpa_cudnn"]
    cells = [name]
    for key in ("forward", "forward_graph", "forward_backward", "forward_backward_graph"):
        cells.append(times_faster(row, key, sdpa) if key in row else "-")
    return f"| {' | '.join(cells)} | {row['peak_mib']:.0f} ({row['peak_mib'] / sdpa['peak_mib']:.2f}x) |"


def length_row(row: dict) -> str:
    sdpa, layer = row["sdpa_cudnn"], row["layer"]
    _, heads, length, _ = row["shape"]
    cells = [f"{length:,}" + (f", {heads} heads" if heads != 12 else "")]
    for key in ("forward", "forward_backward"):
        graph = times_faster(layer, f"{key}_graph", sdpa)
        cells += [digits(sdpa[key]), times_faster(layer, key, sdpa), graph]
    return f"| {' | '.join(cells)} |"


def ratio_row(row: dict) -> str:
    sdpa = GPU["wan"]["sdpa_cudnn"]
    share = f"{100 * row['critical_ratio']:g} %"
    return f"| {share} | {times_faster(row, 'forward', sdpa)} | {times_faster(row, 'forward_backward', sdpa)} |"


def sentences() -> list[str]:
    """What the page says of the GPU in words."""
    sdpa, layer = GPU["wan"]["sdpa_cudnn"], GPU["wan"]["layer"]["128x64"]
    python = {side: GPU["python"][side] for side in ("layer", "sdpa_cudnn", "released_code")}

    def rounded(name: str, head_dim: int) -> str:
        return f"{100 * round(figures.break_even(GPU, name, head_dim) / 100):,}"

    def microseconds(name: str) -> list[str]:
        return [f"{side[name]['python_us']:.0f}" for side in python.values()]

    def started(name: str) -> list[int]:
        return [python[side][name]["launches"] for side in ("layer", "released_code")]

    ours, cudnn, theirs = microseconds("forward")
    both, cudnn_both, theirs_both = microseconds("forward_backward")
    kernels, their_kernels = started("forward")
    all_kernels, all_their_kernels = started("forward_backward")
    shape, times = tuple(GPU["problem"]["shape"]), figures.by_kernel(GPU)
    floors = figures.of_main_problem(GPU)[0]
    rates = [floors[f"{kernel}_kernel"].flop / times[f"{kernel}_kernel"] / 1e6 for kernel in ("forward", "dq", "dkdv")]
    dense_rate = 4 * shape[1] * shape[2] ** 2 * shape[3] / sdpa["forward"] / 1e9
    backward_rate = 2.5 * dense_rate * sdpa["forward"] / (sdpa["forward_backward"] - sdpa["forward"])
    forward, backward = rounded("forward", 128), rounded("forward_backward", 128)
    sparse = GPU["sparse_only"]
    lora, whole = (
        sum(WAN["SLA 128x64"][f"{kind}_{part}_mib"] for part in ("peak", "held")) / 1024
        for kind in ("lora", "training")
    )
    return [
        f"compiled blocks the forward takes cuDNN {WAN['SDPA, cuDNN']['forward_compiled']:.0f} ms",
        f"needs {lora:.1f} GiB in all instead of {whole:.1f}",
        f"the layer is {sdpa['forward'] / layer['forward']:.1f} times as fast as cuDNN's attention in the forward pass",
        f"and {sdpa['forward_backward'] / layer['forward_backward']:.1f} times in forward and backward, on an H200",
        f"breaks even with cuDNN at {forward} tokens forward and {backward} in both passes",
        f"(D 128; {rounded('forward', 64)} and {rounded('forward_backward', 64)} with D 64)",
        f"a forward takes Python {ours} µs (cuDNN {cudnn}, thu-ml/SLA {theirs})",
        f"starts {kernels} kernels (thu-ml/SLA {their_kernels})",
        f"both passes take {both} µs (cuDNN {cudnn_both}, thu-ml/SLA {theirs_both}) and {all_kernels} kernels "
        f"({all_their_kernels})",
        f"empty cache takes {layer['cold_start_s']:.0f} s",
        f"At commit {GPU['parity']['commit'][:7]}, {GPU['parity']['cases']} cases of `sla_ref.testing` "
        f"({GPU['parity']['checks']:,} checks",
        f"reaches {sparse['128x64']['tflops']:.0f} TFLOP/s with blocks of 128 x 64, and "
        f"{sparse['64x64']['tflops']:.0f} with 64 x 64",
        f"cuDNN reaches {dense_rate:.0f} TFLOP/s in the forward and {backward_rate:.0f} in the backward",
        f"reach {min(rates):.0f} to {max(rates):.0f}",
    ]


def wan_row(name: str, row: dict) -> str:
    base = WAN["SDPA, cuDNN"]
    cells = [f"{row[key]:.1f} ({base[key] / row[key]:.2f}x)" for key in ("forward", "self_attention", "training_step")]
    return f"| {' | '.join([name, *cells])} |"


def training_row(kind: str, words: str) -> str:
    """A training step in seconds, and the memory it takes in GiB."""
    dense, sla = WAN["SDPA, cuDNN"], WAN["SLA 128x64"]
    one, other = (arm[f"{kind}_step"] / 1000 for arm in (dense, sla))
    memory = [f"{arm[f'{kind}_{part}'] / 1024:.1f}" for part in ("peak_mib", "held_mib") for arm in (dense, sla)]
    return f"| {words} | {one:.2f} | {other:.2f} ({one / other:.2f}x) | {memory[0]} | {memory[1]} | {memory[3]} |"


def backend_rows() -> list[str]:
    lengths, kernels = BACKENDS["lengths"], BACKENDS["kernels_us"]
    dense, rows = lengths["8192"]["dense equations"], []
    columns = ("forward", "forward_graph", "forward_backward", "forward_backward_graph")
    for name, row in lengths["8192"].items():
        cells = [
            f"{row[key]:.2f} ({dense[key.removesuffix('_graph')] / row[key]:.1f}x)" if key in row else "-"
            for key in columns
        ]
        rows.append(f"| {' | '.join([name, *cells])} | {row['peak_mib']:.0f} |")
    for name in ("triton", "numba"):
        for key, words in (("forward_graph", "forward"), ("forward_backward_graph", "forward + backward")):
            one, two, four = (lengths[length][name][key] for length in ("4096", "8192", "16384"))
            times = f"{one:.2f} | {two:.2f} | {four:.2f}"
            rows.append(f"| {name}, {words} | {times} | {two / one:.2f}x | {four / two:.2f}x |")
    for name in ("dkdv_kernel", "dq_kernel", "forward_kernel", "states_kernel"):
        numba = next(value for key, value in kernels["numba"].items() if f"::{name}::" in key)
        rows.append(f"| `{name}` | {kernels['triton'][name]:.1f} | {numba:.1f} |")
    return rows


def cpu_row(row: dict) -> str:
    forward = f"{row['sdpa_forward']:.1f} | {row['sla_forward']:.1f} | {row['forward_ratio']:.1f}x"
    both = f"{row['sdpa_forward_backward']:.1f} | {row['sla_forward_backward']:.1f}"
    return f"| {row['head_dim']} | {row['length']} | {forward} | {both} | {row['forward_backward_ratio']:.1f}x |"


ROWS = [gpu_row("SDPA, cuDNN", GPU["wan"]["sdpa_cudnn"])]
ROWS += [gpu_row(f"sla_ref {blocks}", row) for blocks, row in GPU["wan"]["layer"].items()]
ROWS += [gpu_row(f"thu-ml/SLA {blocks}", row) for blocks, row in GPU["wan"]["released_code"].items()]
ROWS += [gpu_row("FlexAttention", GPU["wan"]["flex"])]
ROWS += [length_row(row) for row in GPU["lengths"]]
ROWS += [ratio_row(row) for row in GPU["ratios"]]
ROWS += figures.floor_table(GPU)
ROWS += backend_rows()
ROWS += [wan_row(name, row) for name, row in WAN.items()]
ROWS += [training_row(kind, words) for kind, words in TRAINING.items()]
ROWS += [cpu_row(row) for row in CPU["rows"]]
ROWS += [
    f"| {row['length']} | {row['ms']:.1f} | {1024 * row['ms'] / row['length']:.2f} |"
    for row in CPU["sparse_branch_forward"]
]


@pytest.mark.parametrize("row", ROWS)
def test_the_page_has_the_row(row: str):
    assert row in PAGE


@pytest.mark.parametrize("sentence", sentences())
def test_the_page_says_what_was_measured(sentence: str):
    assert sentence in " ".join(PAGE.split())


def test_nothing_failed_on_the_gpu():
    assert GPU["parity"]["failures"] == GPU["parity"]["unfinished"] == []
    assert all(row["repeats_that_differ"] == 0 for row in GPU["wan"]["layer"].values())
    assert set(GPU["sanitizer"].values()) == {"clean"}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_what_the_script_draws(name: str):
    """Its words and numbers are. The lines may differ in the last digit from machine to machine."""
    drawn = re.findall(r">([^<>]+)</text>", figures.draw(name, GPU))
    committed = re.findall(r">([^<>]+)</text>", (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8"))
    assert drawn == committed, "run python -m benchmarks.figures"


def test_the_page_on_wan_has_its_figures():
    page = (ROOT / "docs" / "wan.md").read_text(encoding="utf-8")
    dense, sla = WAN["SDPA, cuDNN"], WAN["SLA 128x64"]
    assert f"forward takes {sla['forward']:.0f} ms instead of {dense['forward']:.0f}" in page
    assert f"step {sla['training_step'] / 1000:.2f} s instead of {dense['training_step'] / 1000:.2f}" in page


def test_the_home_page_has_its_figures():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    dense, sla = GPU["wan"]["sdpa_cudnn"], GPU["wan"]["layer"]["128x64"]
    assert f"{dense['forward'] / sla['forward']:.1f} times as fast as cuDNN's attention forward" in page
    assert f"{dense['forward_backward'] / sla['forward_backward']:.1f} times forward and backward" in page
    lines = [
        line
        for path in sorted(EXPERIMENTS.glob("main.n1024.*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    sla, same, more, full = (
        fmean(row["values"]["held_out_loss"] for row in map(json.loads, lines) if row["case"] == case)
        for case in ("SLA (paper)", "sparse only, 5 %", "sparse only, 15 %", "full attention")
    )
    words = f"held-out loss {sla:.4f}, against {same:.4f} for sparse attention at the same 5 %, {more:.4f} at 15 %"
    assert f"{words}, and {full:.4f} for full attention" in " ".join(page.split())
