"""The command line: `python -m experiments run` and `python -m experiments report`, from the root of a clone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sla_ref.cli import Backend, Device, find_device, using

from . import EXPERIMENTS
from .report import report
from .run import RESULTS, run
from .setting import QUICK, SETTINGS, Context

app = typer.Typer(
    help="The paper's experiments on the lab's model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Results = Annotated[Path | None, typer.Option(help="Folder of the measured lines; benchmarks/results/experiments.")]


@app.command("run")
def run_command(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; all if left out.")] = None,
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "n1024",
    quick: Annotated[bool, typer.Option("--quick", help="Seconds on a CPU: --setting quick, one seed.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Default: 0,1,2; with --quick 0.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeat it for several.")] = None,
    device: Device = "auto",
    backend: Backend = None,
    graph: Annotated[bool, typer.Option(help="On a GPU, record a training step once and replay it.")] = True,
    out: Results = None,
    work: Annotated[Path, typer.Option(help="Folder of trained teachers and classifiers.")] = Path("runs/experiments"),
) -> None:
    """Measure what is not measured yet: a line of JSON for every case and seed. The same command goes on."""
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    chosen = QUICK if quick else SETTINGS[setting]
    numbers = seeds or ("0" if quick else "0,1,2")
    if not all(part.strip().isdecimal() for part in numbers.split(",")):
        raise ValueError(f"seeds must be numbers with commas between them, got {numbers!r}")
    with using(backend):
        run(
            names or list(EXPERIMENTS),
            chosen,
            [int(part) for part in numbers.split(",")],
            out or (Path("runs/experiments-quick") if chosen == QUICK else RESULTS),
            Context(find_device(device), work, graph),
            console,
            case,
        )


@app.command("report")
def report_command(
    results: Results = None,
    docs: Annotated[Path, typer.Option(help="Folder of experiments.md; figures go to experiments/.")] = Path("docs"),
) -> None:
    """Put tables and figures of all measured lines into the documentation."""
    for path in report(results or RESULTS, docs):
        console.print(str(path), highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; an error the user can mend is one line, not a traceback."""
    try:
        app(arguments)
    except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
