"""docs/performance.md and the numbers of other pages are those of the files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
GPU = json.loads((ROOT / "benchmarks" / "results" / "h200.json").read_text(encoding="utf-8"))
WAN = json.loads((ROOT / "benchmarks" / "results" / "wan.json").read_text(encoding="utf-8"))["arms"]
BACKENDS = json.loads((ROOT / "benchmarks" / "results" / "backends.json").read_text(encoding="utf-8"))
CPU = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
EXPERIMENTS = ROOT / "benchmarks" / "results" / "experiments"


def gpu_row(name: str, row: dict) -> str:
    sdpa = GPU["sdpa_cudnn"]
    cells = [name]
    for key in ("forward", "forward_graph", "forward_backward", "forward_backward_graph"):
        base = sdpa[key.removesuffix("_graph")]
        cells.append(f"{row[key]:.2f} ({base / row[key]:.1f}x)" if key in row else "-")
    return f"| {' | '.join(cells)} | {row['peak_mib']:.0f} ({row['peak_mib'] / sdpa['peak_mib']:.2f}x) |"


def wan_row(name: str, row: dict) -> str:
    base = WAN["SDPA, cuDNN"]
    cells = [f"{row[key]:.1f} ({base[key] / row[key]:.2f}x)" for key in ("forward", "self_attention", "training_step")]
    return f"| {' | '.join([name, *cells])} |"


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


ROWS = [gpu_row("SDPA, cuDNN", GPU["sdpa_cudnn"])]
ROWS += [gpu_row(f"sla_ref {blocks}", row) for blocks, row in GPU["layer"].items()]
ROWS += [gpu_row(f"thu-ml/SLA {blocks}", row) for blocks, row in GPU["released_code"].items()]
ROWS += backend_rows()
ROWS += [wan_row(name, row) for name, row in WAN.items()]
ROWS += [cpu_row(row) for row in CPU["rows"]]
ROWS += [
    f"| {row['length']} | {row['ms']:.1f} | {1024 * row['ms'] / row['length']:.2f} |"
    for row in CPU["sparse_branch_forward"]
]
ROWS += [f"| {GPU['kernels_us'][name]} |" for name in ("dkdv_kernel", "forward_kernel", "states_kernel")]


@pytest.mark.parametrize("row", ROWS)
def test_the_page_has_the_row(row: str):
    assert row in PAGE


def test_the_page_on_wan_has_its_figures():
    page = (ROOT / "docs" / "wan.md").read_text(encoding="utf-8")
    dense, sla = WAN["SDPA, cuDNN"], WAN["SLA 128x64"]
    assert f"forward takes {sla['forward']:.0f} ms instead of {dense['forward']:.0f}" in page
    assert f"step {sla['training_step'] / 1000:.2f} s instead of {dense['training_step'] / 1000:.2f}" in page


def test_the_home_page_has_its_figures():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    dense, sla = GPU["sdpa_cudnn"], GPU["layer"]["128x64"]
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
