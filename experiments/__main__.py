"""Command line of the experiments, for the root folder of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sla_ref.cli import Device, find_device, run_app

from . import EXPERIMENTS
from .report import report
from .run import RESULTS, run
from .setting import QUICK, SETTINGS, Context

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command("run")
def run_command(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments to run; all by default.")] = None,
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}; quick takes seconds.")] = "n1024",
    seed: Annotated[list[int] | None, typer.Option(help="Repeat the option for several. Default: 0, 1 and 2.")] = None,
    device: Device = "auto",
    work: Annotated[Path, typer.Option(help="Where trained teachers and classifiers are.")] = Path("runs/experiments"),
) -> None:
    """Measure what is not measured yet, into benchmarks/results/experiments (quick: into runs/experiments-quick)."""
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    out = Path("runs/experiments-quick") if setting == QUICK.name else RESULTS
    context = Context(find_device(device), work)
    added = run(names or list(EXPERIMENTS), SETTINGS[setting], seed or [0, 1, 2], out, context, Console())
    print(f"{added} measurements added in {out}")


@app.command("report")
def report_command() -> None:
    """Put the tables and pictures of all measured lines into docs/experiments.md and docs/experiments/."""
    report()


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. An error that the user can fix is printed as one line, without a traceback."""
    run_app(app, "experiments", arguments)


if __name__ == "__main__":
    main()
