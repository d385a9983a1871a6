"""The command line: `sla-ref`, also `python -m sla_ref`.

Commands import what they need when they run, so that `--help` stays quick and a missing extra is
named by the command that needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

INSTALL = "  pip install 'sla-ref[lab]'    (in a clone of the repository: pip install '.[lab]')"

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    raise SystemExit(f"sla-ref: the command line needs {missing.name}, which is not installed:\n{INSTALL}") from missing

if TYPE_CHECKING:
    import torch

LAB = ("safetensors", "sklearn", "matplotlib", "PIL")

app = typer.Typer(
    help="Sparse-linear attention (SLA): a demo, the lab's training runs, the backends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Out = Annotated[Path, typer.Option(help="A new or empty folder for everything this run writes.")]
Seed = Annotated[int, typer.Option(help="Decides clips, noise and initial weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: cuda where there is one.")]
Backend = Annotated[str | None, typer.Option(help="Backend for SLA; see `sla-ref backends`. Default: auto.")]
Steps = Annotated[int, typer.Option(help="Training steps.", min=1)]
Batch = Annotated[int, typer.Option(help="Clips per step, of all processes together.", min=1)]
Clips = Annotated[int, typer.Option(help="Held-out clips to evaluate on.", min=1)]
Rate = Annotated[float, typer.Option("--learning-rate", help="Peak of the one-cycle schedule.")]
Objective = Annotated[str, typer.Option(help="flow: the velocity; teacher: the teacher's prediction (white box).")]
Precision = Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")]
Compile = Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Under torchrun: split the parameters too (FSDP2), not only clips.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")]


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new or empty folder. Default: runs/demo-, then date and time.")
    ] = None,
    steps: Steps = 80,
    batch: Batch = 8,
    learning_rate: Rate = 1e-3,
    objective: Objective = "flow",
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = None,
    clips: Clips = 64,
    samples: Annotated[int, typer.Option(help="Clips to sample, of 0, 1, ...", min=1, max=10)] = 4,
    sample_steps: Annotated[int, typer.Option(help="Euler steps of a sample.", min=1)] = 20,
    teacher: Annotated[
        Path | None, typer.Option(help="Weights with full attention. Default: the shipped ones.")
    ] = None,
    student: Annotated[
        Path | None, typer.Option(help="Weights of a long SLA fine-tune. Default: the shipped ones.")
    ] = None,
) -> None:
    """Put SLA into a small video model, fine-tune it, and show what came out."""
    _require(LAB)
    from .lab import demo as lab_demo
    from .lab.train import TrainConfig
    from .lab.weights import STUDENT, TEACHER

    with _using(backend):
        lab_demo.run(
            out or Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"),
            teacher or TEACHER,
            student or STUDENT,
            TrainConfig(steps=steps, batch=batch, learning_rate=learning_rate, seed=seed),
            _device(device),
            console,
            objective=objective,
            clips=clips,
            samples=samples,
            sample_steps=sample_steps,
        )


@app.command()
def train_teacher(
    out: Out,
    steps: Steps = 12_000,
    batch: Batch = 64,
    learning_rate: Rate = 2e-3,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    compile: Compile = False,
    fsdp: Fsdp = False,
    resume: Resume = False,
    clips: Clips = 1024,
    size: Annotated[int, typer.Option(help="Height and width of a frame, in pixels.")] = 32,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    pairs: Annotated[float, typer.Option(help="Share of clips that show two digits.")] = 0.0,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    depth: Annotated[int, typer.Option(help="Blocks of the model.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 2,
) -> None:
    """Train the small video model with full attention, from scratch."""
    _require(LAB)
    from .lab import jobs
    from .lab.model import ModelConfig
    from .lab.train import TrainConfig

    with _training(device) as (where, output):
        jobs.train_teacher(
            ModelConfig(frames=frames, size=size, pairs=pairs, width=width, depth=depth, heads=heads),
            TrainConfig(
                steps=steps,
                batch=batch,
                learning_rate=learning_rate,
                seed=seed,
                precision=precision,
            ),
            out,
            where,
            output,
            clips=clips,
            resume=resume,
            compiled=compile,
            fsdp=fsdp,
        )


@app.command()
def finetune(
    out: Out,
    teacher: Annotated[Path | None, typer.Option(help="Weights to start from. Default: the shipped teacher.")] = None,
    attention: Annotated[str, typer.Option(help="full, sla, sparse, linear or l+s.")] = "sla",
    critical_ratio: Annotated[float, typer.Option(help="Share of critical blocks.")] = 0.05,
    negligible_ratio: Annotated[float, typer.Option(help="Share of negligible blocks.")] = 0.10,
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 16,
    objective: Objective = "flow",
    steps: Steps = 4_000,
    batch: Batch = 64,
    learning_rate: Rate = 1e-3,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = None,
    precision: Precision = "float32",
    compile: Compile = False,
    fsdp: Fsdp = False,
    resume: Resume = False,
    clips: Clips = 1024,
) -> None:
    """Swap the attention of a trained model and fine-tune all its parameters."""
    _require(LAB)
    from .lab import jobs
    from .lab.train import TrainConfig
    from .lab.weights import TEACHER

    with _training(device) as (where, output), _using(backend):
        jobs.finetune(
            teacher or TEACHER,
            attention,
            {
                "critical_ratio": critical_ratio,
                "negligible_ratio": negligible_ratio,
                "block": block,
            },
            objective,
            TrainConfig(
                steps=steps,
                batch=batch,
                learning_rate=learning_rate,
                seed=seed,
                precision=precision,
            ),
            out,
            where,
            output,
            clips=clips,
            resume=resume,
            compiled=compile,
            fsdp=fsdp,
        )


experiments = typer.Typer(help="The paper's experiments on the lab's model.", no_args_is_help=True)
app.add_typer(experiments, name="experiments")
Results = Annotated[
    Path | None, typer.Option(help="Folder of the measured lines. Default: benchmarks/results/experiments.")
]


@experiments.command("run")
def experiments_run(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; all if left out.")] = None,
    setting: Annotated[str, typer.Option(help="n1024, n4096, wide or quick.")] = "n1024",
    quick: Annotated[bool, typer.Option("--quick", help="Seconds on a CPU: --setting quick, one seed.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Default: 0,1,2; with --quick 0.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeat it for several.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of a fine-tune. Default: the setting's.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Clips per step. Default: the setting's.", min=1)] = None,
    jobs: Annotated[int, typer.Option(help="Cases at a time, each in a process of its own.", min=1)] = 1,
    minutes: Annotated[float | None, typer.Option(help="Start no new case after so many.", min=0)] = None,
    device: Device = "auto",
    backend: Backend = None,
    graph: Annotated[bool, typer.Option(help="On a GPU, record a training step once and replay it.")] = True,
    out: Results = None,
    work: Annotated[Path, typer.Option(help="Folder of trained teachers and classifiers.")] = Path("runs/experiments"),
    commit: Annotated[str | None, typer.Option(help="Of this code, where there is no git.")] = None,
) -> None:
    """Measure what is not measured yet: a line of JSON for every case and seed. The same command goes on."""
    _require(LAB)
    from dataclasses import replace

    from .lab.experiments import EXPERIMENTS, Context, find_setting
    from .lab.experiments.runner import RESULTS, run

    chosen = find_setting("quick" if quick else setting)
    chosen = replace(chosen, steps=steps or chosen.steps, batch=batch or chosen.batch)
    numbers = seeds or ("0" if quick else "0,1,2")
    if not all(part.strip().isdecimal() for part in numbers.split(",")):
        raise ValueError(f"seeds must be numbers with commas between them, got {numbers!r}")
    where = _device(device)
    with _using(backend):
        run(
            names or list(EXPERIMENTS),
            chosen,
            [int(part) for part in numbers.split(",")],
            out or (Path("runs/experiments-quick") if quick else RESULTS),
            Context(where, work, graph),
            console,
            cases=case,
            jobs=jobs,
            commit=commit,
            minutes=minutes,
        )


@experiments.command("report")
def experiments_report(
    results: Results = None,
    docs: Annotated[Path, typer.Option(help="Folder of experiments.md; figures go to experiments/ in it.")] = Path(
        "docs"
    ),
) -> None:
    """Put tables and figures of all measured lines into the documentation."""
    _require(LAB)
    from .lab.experiments.report import report
    from .lab.experiments.runner import RESULTS

    for path in report(results or RESULTS, docs):
        console.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def backends() -> None:
    """Say which backends are usable here, and why the others are not."""
    import sla_ref

    for name, reason in sla_ref.list_backends().items():
        console.print(f"{name:<8} {reason or 'usable'}", highlight=False, markup=False)


@app.command()
def kernels(
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or sm_120.")] = "sm_90",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 (default), float16 or float32; numba: float32 alone.")
    ] = None,
    backend: Annotated[str, typer.Option(help="triton or numba.")] = "triton",
) -> None:
    """Compile a backend's kernels for a GPU, which need not be here, and report the resources that they use.

    Every kernel at head_dim 64 and 128, blocks of 64 x 64 and 128 x 64. Exits with 1 if one of them uses stack, spills
    registers, or needs more shared memory than the target has (numba: than every CUDA GPU has).
    """
    _require(("triton",), "triton")  # for numba too: its wheel holds the tools that read binaries
    if backend == "numba":
        _require(("numba", "numba_cuda"), "numba")
    import torch
    from rich.table import Table

    from .compiled import report

    dtypes = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
    dtype = dtype or ("float32" if backend == "numba" else "bfloat16")
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    table = Table(title=f"{backend}, {target}, {dtype}; bytes")
    columns = (
        "kernel",
        "D",
        "blocks",
        "warps",
        "registers",
        "stack",
        "spills",
        "shared",
        "of",
        "instruction",
        "problem",
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    problems = 0
    with console.status("compiling") as status:
        for head_dim in (64, 128):
            for block_q in (64, 128):
                status.update(f"compiling for head_dim {head_dim}, blocks of {block_q} x 64")
                entries = report(
                    target, backend=backend, dtype=dtypes[dtype], head_dim=head_dim, block_q=block_q, block_k=64
                )
                for entry in entries:
                    problems += entry.problem is not None
                    blocks = f"{block_q} x 64"
                    use = (entry.warps, entry.registers, entry.stack, entry.spills, entry.shared, entry.shared_limit)
                    cells = (entry.kernel, head_dim, blocks, *use, entry.instruction, entry.problem or "")
                    table.add_row(*map(str, cells))
    # Wide enough for every figure: a narrow terminal wraps the lines, where rich would cut them.
    Console(width=max(console.width, 200)).print(table)
    raise typer.Exit(1 if problems else 0)


def _require(modules: tuple[str, ...], extra: str = "lab") -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        install = INSTALL.replace("[lab]", f"[{extra}]")
        raise RuntimeError(f"this command needs {', '.join(missing)}, not installed here:\n{install}")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this torch sees no GPU; allowed here: cpu")
    return device


def _using(backend: str | None) -> AbstractContextManager[object]:
    import sla_ref

    return nullcontext() if backend is None else sla_ref.use_backend(backend)


@contextmanager
def _training(device: str) -> Iterator[tuple[torch.device, Console]]:
    """This process's device, and a console that is silent in all processes of torchrun but the first.

    Says how to go on when a run is interrupted; its checkpoint is already saved.
    """
    from .lab import distributed

    with distributed.process_group(_device(device)) as where:
        output = console if distributed.rank() == 0 else Console(quiet=True)
        try:
            yield where, output
        except KeyboardInterrupt:
            output.print("interrupted; the same command with --resume goes on from the last checkpoint")
            raise typer.Exit(130) from None


def _first_to_fail() -> bool:
    """False in a process of torchrun after another one has said what is wrong."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from .lab import distributed

    return distributed.first_to_fail()


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; an error the user can mend is one line, not a traceback."""
    try:
        app(arguments)
    except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
        if _first_to_fail():
            print(f"sla-ref: {error}", file=sys.stderr)
        raise SystemExit(1) from error
