"""Time the four ways to add up block states of tutorial 8 on this CPU.

    python -m benchmarks.states                       # the table; from the root of a clone
    python -m benchmarks.states --json benchmarks/results/states.json

One head of a long video: 512 x 512 blocks, or 32,768 tokens in blocks of 64. As in `benchmarks/cpu.py`, all run in
turn and each time is the minimum of all turns. Finding the marginal blocks in the labels is part of every way.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cpu import fastest
from sla_ref.files import whole
from sla_ref.lab.machine import machine
from tutorials import block_states as states

SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.85, 0.95, 0.98, 1.0)
GROUPS = (2, 4, 7)
WAYS = {
    "lookup_table": states.lookup_table,
    "pre_aggregate": states.pre_aggregate,
    **{f"four_russians_{group}": partial(states.four_russians, group=group) for group in GROUPS},
    "matrix_product": states.matrix_product,
}


def compare(blocks: int, head_dim: int, turns: int) -> list[dict[str, object]]:
    """Milliseconds and additions of each way at each share; every query block has the same number of marginal blocks.

    A turn goes through all shares and ways, and a busy minute slows down all of them.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(blocks, head_dim**2, generator=generator)
    rank = torch.rand(blocks, blocks, generator=generator).argsort(dim=1)
    members = {share: rank < round(share * blocks) for share in SHARES}
    cells = {f"{name} {share}": partial(WAYS[name], members[share], h) for share in SHARES for name in WAYS}
    times = fastest(cells, turns)
    return [
        {
            "marginal_share": share,
            "ways": {
                name: {"ms": times[f"{name} {share}"], "additions": cells[f"{name} {share}"]()[1]} for name in WAYS
            },
        }
        for share in SHARES
    ]


def main(
    turns: Annotated[int, typer.Option(min=1, help="timed turns; the fastest counts")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for torch")] = 2,
    blocks: Annotated[int, typer.Option(min=1, help="query blocks, and key blocks")] = 512,
    head_dim: Annotated[int, typer.Option(min=1, help="D; a state has D x D numbers")] = 64,
    out: Annotated[Path | None, typer.Option("--json", help="also write the figures here; must not exist")] = None,
) -> None:
    if out is not None and out.exists():
        raise typer.BadParameter(f"--json must name a new file, {out} exists")
    torch.set_num_threads(threads)
    console = Console()
    load_before = os.getloadavg()
    table = Table(title=f"float32, one head, {blocks} x {blocks} blocks, D {head_dim}; milliseconds")
    for column in ("marginal", *WAYS):
        table.add_column(column.replace("_", " "), justify="right", overflow="fold")
    with console.status("timing"):
        rows = compare(blocks, head_dim, turns)
    for row in rows:
        table.add_row(f"{row['marginal_share']:.0%}", *(f"{way['ms']:.1f}" for way in row["ways"].values()))
    load_after = os.getloadavg()
    about = machine(torch.device("cpu"))
    console.print(table)
    console.print(f"{about['cpu']}, {threads} threads, torch {torch.__version__}; minimum of {turns} turns")
    console.print(f"load average before {load_before[0]:.2f}, after {load_after[0]:.2f} (1 minute)")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": about | {"torch_threads": threads},
            "turns": turns,
            "load_average": {"before": load_before, "after": load_after},
            "blocks": blocks,
            "head_dim": head_dim,
            "rows": rows,
        }
        with whole(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
