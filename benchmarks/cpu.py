"""Time the torch backend against `F.scaled_dot_product_attention` on this CPU.

    python benchmarks/cpu.py                    # the table, about five minutes on two cores
    python benchmarks/cpu.py --json results/cpu.json

Both run in turn, and a busy moment slows down both; each time is the minimum of all turns. SLA is the whole operator:
classification at 5 % critical and 10 % negligible, feature map, both branches and their sum. The second table holds the
number of critical blocks fixed, where the sparse branch must grow linearly with N.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

import sla_ref
from sla_ref.backends import pytorch
from sla_ref.files import whole
from sla_ref.lab.machine import machine
from sla_ref.protocol import Inputs

LENGTHS = (1024, 2048, 4096, 8192, 16384)
HEADS = 2


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def fastest(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds of each: the minimum over `turns` in which every function runs once, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns + 1):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: 1000 * min(measured[1:]) for name, measured in times.items()}


def compare(length: int, head_dim: int, turns: int) -> dict[str, float]:
    """SDPA and SLA, forward and forward + backward, in milliseconds."""
    generator = torch.Generator().manual_seed(length)
    query, key, value, grad = (torch.randn(1, HEADS, length, head_dim, generator=generator) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def sla() -> torch.Tensor:
        out = sla_ref.sparse_linear_attention(query, key, value, backend="torch")
        return out.sparse + out.linear

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def forward(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(function)

    def both(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), leaves, grad)

    return fastest(
        {
            "sdpa_forward": forward(sdpa),
            "sla_forward": forward(sla),
            "sdpa_forward_backward": both(sdpa),
            "sla_forward_backward": both(sla),
        },
        turns,
    )


def sparse_branch(length: int, critical_blocks: int, turns: int) -> float:
    """Milliseconds of the sparse branch's forward, with a given number of critical blocks for each query block."""
    query, key, value = (torch.randn(1, HEADS, length, 64) for _ in range(3))
    # Half a block more keeps the truncation of ratio * blocks at the number that is meant.
    ratio = (critical_blocks + 0.5) / (length // 64)
    block_map = sla_ref.classify_blocks(query, key, ratio, 1.0)
    assert block_map.max_critical == critical_blocks
    inputs = Inputs(query, key, value, None, None, block_map, 0.125)
    return fastest({"sparse": lambda: pytorch._sparse_forward(inputs)}, turns)["sparse"]


def main(
    turns: Annotated[int, typer.Option(min=1, help="timed turns; the fastest counts")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for torch")] = 2,
    longest: Annotated[int, typer.Option(min=1024, help="largest N")] = LENGTHS[-1],
    out: Annotated[Path | None, typer.Option("--json", help="also write the figures here; must not exist")] = None,
) -> None:
    if out is not None and out.exists():
        raise typer.BadParameter(f"--json must name a new file, {out} exists")
    torch.set_num_threads(threads)
    console = Console()
    lengths = [length for length in LENGTHS if length <= longest]
    load_before = os.getloadavg()
    rows = []
    table = Table(title="float32, B 1, H 2, 5 % critical, 10 % negligible, blocks of 64; milliseconds")
    for column in ("D", "N", "SDPA fwd", "SLA fwd", "ratio", "SDPA fwd + bwd", "SLA fwd + bwd", "ratio"):
        table.add_column(column, justify="right")
    with console.status("timing") as status:
        for head_dim in (64, 128):
            for length in lengths:
                status.update(f"D {head_dim}, N {length}")
                row = {"head_dim": head_dim, "length": length, **compare(length, head_dim, turns)}
                row["forward_ratio"] = row["sdpa_forward"] / row["sla_forward"]
                row["forward_backward_ratio"] = row["sdpa_forward_backward"] / row["sla_forward_backward"]
                rows.append(row)
                table.add_row(
                    str(head_dim),
                    str(length),
                    f"{row['sdpa_forward']:.1f}",
                    f"{row['sla_forward']:.1f}",
                    f"{row['forward_ratio']:.1f}x",
                    f"{row['sdpa_forward_backward']:.1f}",
                    f"{row['sla_forward_backward']:.1f}",
                    f"{row['forward_backward_ratio']:.1f}x",
                )
        growth = Table(title="sparse branch, forward, 12 critical blocks")
        for column in ("N", "ms", "ms per 1024 tokens"):
            growth.add_column(column, justify="right")
        sparse = {}
        for length in lengths:
            sparse[length] = sparse_branch(length, 12, turns)
            growth.add_row(str(length), f"{sparse[length]:.1f}", f"{1024 * sparse[length] / length:.2f}")
    console.print(table)
    console.print(growth)
    about = machine(torch.device("cpu"))
    load_after = os.getloadavg()
    console.print(f"{about['cpu']}, {threads} threads, torch {torch.__version__}; minimum of {turns} turns")
    console.print(f"load average before {load_before[0]:.2f}, after {load_after[0]:.2f} (1 minute)")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": about | {"torch_threads": threads},
            "turns": turns,
            "load_average": {"before": load_before, "after": load_after},
            "rows": rows,
            "sparse_branch_forward": [{"length": n, "critical_blocks": 12, "ms": ms} for n, ms in sparse.items()],
        }
        with whole(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
