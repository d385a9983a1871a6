"""The command line: `sla-ref`, also `python -m sla_ref`.

Commands import what they need when they run: `--help` stays quick, and a missing extra is named by
the command that needs it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from .lab.config import TrainConfig
from .lab.model import ModelConfig

INSTALL = "  pip install 'sla-ref[lab]'    (in a clone of the repository: pip install '.[lab]')"

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    raise SystemExit(f"sla-ref: the command line needs {missing.name}, which is not installed:\n{INSTALL}") from missing

if TYPE_CHECKING:
    import torch

WEIGHTS = ("safetensors", "sklearn")  # what training needs
LAB = (*WEIGHTS, "matplotlib", "PIL")
# typer does not export it: the base of all that is wrong with a command as it was typed.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Sparse-linear attention (SLA): a demo, the lab's training runs, the backends.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(markup=False, emoji=False, highlight=False)  # a path is printed as it is

Out = Annotated[Path, typer.Option(help="A new or empty folder for everything this run writes.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: cuda where there is one.")]
Backend = Annotated[str | None, typer.Option(help="Backend for SLA; see `sla-ref backends`. Default: auto.")]
Clips = Annotated[int, typer.Option(help="Held-out clips to evaluate on.", min=1, max=1_000_000)]
Objective = Annotated[str, typer.Option(help="flow: the velocity; teacher: the teacher's prediction (white box).")]

TRAINING = ("steps", "batch", "learning_rate", "seed", "precision", "compile", "fsdp", "resume")
SHAPE = ("size", "frames", "width", "depth", "heads")
ATTENTION = ("attention", "critical_ratio", "negligible_ratio", "block", "alpha", "router")


def flags(**fields_of: tuple[str, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, in place of a parameter that is a dataclass, a flag for each of the fields named here.

    Help comes from the field's `option`, the default from that of the parameter. typer reads a command's signature, so
    the signature is what changes.
    """

    def change(command: Callable[..., None]) -> Callable[..., None]:
        signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)

        @functools.wraps(command)
        def with_flags(**given: Any) -> None:
            for name, fields in fields_of.items():
                default = signature.parameters[name].default
                given[name] = dataclasses.replace(default, **{field: given.pop(field) for field in fields})
            command(**given)

        parameters = []
        for name, parameter in signature.parameters.items():
            parameter = parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            if name not in fields_of:
                parameters.append(parameter)
                continue
            kinds = get_type_hints(hints[name])
            helps = {each.name: each.metadata.get("help") for each in dataclasses.fields(hints[name])}
            for field in fields_of[name]:
                switch = [f"--{field}"] if kinds[field] is bool else []  # without its --no-...
                kind = Annotated[kinds[field], typer.Option(*switch, help=helps[field])]  # type: ignore[valid-type]
                default = getattr(parameter.default, field)
                parameters.append(parameter.replace(name=field, annotation=kind, default=default))
        with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return with_flags

    return change


@app.command()
@flags(config=("steps", "batch", "learning_rate", "seed", "precision", "compile"))
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new or empty folder. Default: runs/demo-, then date and time.")
    ] = None,
    config: TrainConfig = TrainConfig(steps=80, batch=8, learning_rate=1e-3),  # noqa: B008 (frozen)
    objective: Objective = "flow",
    device: Device = "auto",
    backend: Backend = None,
    clips: Clips = 64,
    samples: Annotated[int, typer.Option(help="Clips to sample, of 0, 1, ...", min=1, max=10)] = 4,
    sample_steps: Annotated[int, typer.Option(help="Euler steps of a sample.", min=1, max=1_000_000)] = 20,
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
    from .lab import weights

    with using(backend):
        lab_demo.run(
            out or Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"),
            teacher or weights.TEACHER,
            student or weights.STUDENT,
            config,
            find_device(device),
            console,
            objective=objective,
            clips=clips,
            samples=samples,
            sample_steps=sample_steps,
        )


@app.command()
@flags(config=TRAINING, model=SHAPE)
def train_teacher(
    out: Out,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    device: Device = "auto",
    clips: Clips = 1024,
    model: ModelConfig = ModelConfig(),  # noqa: B008 (frozen)
) -> None:
    """Train the small video model with full attention, from scratch."""
    _require(WEIGHTS)
    from .lab import runs

    with _training(device, out) as (where, output):
        runs.train_teacher(model, config, out, where, output, clips=clips)


@app.command()
@flags(config=TRAINING, model=ATTENTION)
def finetune(
    out: Out,
    teacher: Annotated[Path | None, typer.Option(help="Weights to start from. Default: the shipped teacher.")] = None,
    model: ModelConfig = ModelConfig(attention="sla"),  # noqa: B008 (frozen)
    objective: Annotated[
        str, typer.Option(help="flow or teacher, as for the demo; layers: stage 1 of sla2's learned router.")
    ] = "flow",
    config: TrainConfig = TrainConfig(steps=4_000, learning_rate=1e-3),  # noqa: B008 (frozen)
    device: Device = "auto",
    backend: Backend = None,
    clips: Clips = 1024,
) -> None:
    """Swap the attention of a trained model and fine-tune all its parameters.

    SLA2's learned router takes two runs. With --attention sla2 --router learned, the first trains router and alpha
    alone: --objective layers. The second takes the first one's sla2.safetensors as --teacher, and trains all but the
    router.
    """
    _require(WEIGHTS)
    from .lab import runs, weights

    changes = {name: getattr(model, name) for name in ATTENTION}
    source = teacher or weights.TEACHER
    with _training(device, out) as (where, output), using(backend):
        runs.finetune(source, changes, objective, config, out, where, output, clips=clips)


@app.command()
def backends() -> None:
    """Say which backends are usable here, and why the others are not."""
    import sla_ref

    for name, reason in sla_ref.list_backends().items():
        console.print(f"{name:<8} {reason or 'usable'}", soft_wrap=True)


@app.command()
def kernels(
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or sm_120.")] = "sm_90",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 (default), float16 or float32; numba: only float32.")
    ] = None,
    backend: Annotated[str, typer.Option(help="triton or numba.")] = "triton",
) -> None:
    """Compile a backend's kernels for a GPU, which need not be here, and report the resources that they use.

    It compiles every kernel at head_dim 64 and 128, blocks of 64 x 64 and 128 x 64. It exits with 1 if one of them uses
    stack, which is where registers spill, or needs more shared memory than the target has (numba: than every CUDA GPU
    has).
    """
    _require(("triton",), "triton")  # for numba too: its wheel holds the tools that read binaries
    if backend == "numba":
        _require(("numba", "numba_cuda"), "numba")
    import torch
    from rich.table import Column, Table

    from .compiled import report

    dtypes = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
    dtype = dtype or ("float32" if backend == "numba" else "bfloat16")
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    columns = ("kernel", "D", "blocks", "warps", "registers", "stack", "shared", "of", "instruction", "problem")
    table = Table(*(Column(name, no_wrap=True) for name in columns), title=f"{backend}, {target}, {dtype}; bytes")
    problems = 0
    with console.status("compiling") as status:
        for head_dim, block_q in itertools.product((64, 128), (64, 128)):
            blocks, sizes = f"{block_q} x 64", {"head_dim": head_dim, "block_q": block_q, "block_k": 64}
            status.update(f"compiling for head_dim {head_dim}, blocks of {blocks}")
            for entry in report(target, backend=backend, dtype=dtypes[dtype], **sizes):
                problems += entry.problem is not None
                use = (entry.warps, entry.registers, entry.stack, entry.shared, entry.shared_limit)
                cells = (entry.kernel, head_dim, blocks, *use, entry.instruction, entry.problem or "")
                table.add_row(*map(str, cells))
    # Wide enough for all columns: a narrow terminal wraps the lines, where rich would cut them.
    Console(width=max(console.width, 200)).print(table)
    raise typer.Exit(1 if problems else 0)


def _require(modules: tuple[str, ...], extra: str = "lab") -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        install = INSTALL.replace("[lab]", f"[{extra}]")
        raise RuntimeError(f"this command needs {', '.join(missing)}, not installed here:\n{install}")


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one. Raises ValueError if it is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = None
    if name.partition(":")[0] in ("cpu", "cuda"):  # others have no data, or were never tried
        with suppress(RuntimeError):
            device = torch.device(name)
    if device is None:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but the GPUs that this torch sees are {torch.cuda.device_count()}")
    return device


def using(backend: str | None) -> AbstractContextManager[object]:
    """The backend for the block; None leaves what is set."""
    import sla_ref

    return nullcontext() if backend is None else sla_ref.use_backend(backend)


@contextmanager
def _training(device: str, out: Path) -> Iterator[tuple[torch.device, Console]]:
    """This process's device, and a console that is silent in all processes of torchrun but the first.

    Says how to go on when a run is interrupted, where there is something to go on from.
    """
    from .lab import distributed
    from .lab.train import CHECKPOINT

    with distributed.process_group(find_device(device)) as where:
        output = console if distributed.rank() == 0 else Console(quiet=True)
        try:
            yield where, output
        except KeyboardInterrupt:
            if (out / CHECKPOINT).is_file():
                output.print("the same command with --resume goes on from the last checkpoint", soft_wrap=True)
            raise


def _first_to_fail() -> bool:
    """False in a process of torchrun after another one has said what is wrong."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from .lab import distributed

    return distributed.first_to_fail()


def main(arguments: list[str] | None = None) -> None:
    """Runs a command of `sla-ref`."""
    run_app(app, "sla-ref", arguments)


def run_app(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Runs a command; an error the user can mend is one line and exit code 2, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = app((sys.argv[1:] if arguments is None else arguments) or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (UsageError, ArithmeticError, ValueError, OSError, RuntimeError) as error:
        if _first_to_fail():
            print(f"{name}: {getattr(error, 'format_message', error.__str__)()}", file=sys.stderr)
        raise SystemExit(2) from error
    if code == 130 and _first_to_fail():  # newer versions of typer return it
        print(f"{name}: interrupted", file=sys.stderr)
    raise SystemExit(code or 0)
