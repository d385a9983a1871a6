"""Runs experiments: a line of JSON for every case and seed, appended when it is measured.

The file is `<experiment>.<setting>.seed<k>.jsonl`. A case that is in it is not run again, so that an interrupted run
goes on where it was. Cases are independent: with `jobs` they run side by side in processes of their own, also on one
GPU, which a single small model cannot fill. Only the parent writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import sla_ref

from ...files import whole
from ..console import progress_bar
from ..machine import machine
from . import Context, Setting, find_experiment

RESULTS = Path("benchmarks/results/experiments")


@dataclass(frozen=True)
class Unit:
    """One case of an experiment with one seed."""

    experiment: str
    case: str
    seed: int

    def __str__(self) -> str:
        return f"{self.experiment}, seed {self.seed}, {self.case}"


def results_file(out: Path, experiment: str, setting: str, seed: int) -> Path:
    """Where the lines of an experiment go."""
    return out / f"{experiment}.{setting}.seed{seed}.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file. A last line that was cut short is no measurement and is left out.

    Raises ValueError for any other line that is no JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is empty, or torn
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
    return found


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds a line; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _repair(path: Path) -> None:
    """Drops a torn last line, which the next one would be appended to."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        kept = read_lines(path)
        with whole(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def run(
    names: list[str],
    setting: Setting,
    seeds: list[int],
    out: Path,
    context: Context,
    console: Console,
    *,
    cases: list[str] | None = None,
    jobs: int = 1,
    commit: str | None = None,
    minutes: float | None = None,
) -> int:
    """Measures what is missing; returns how many lines were added.

    Case after case, each with all seeds, so that a run that ends early leaves whole comparisons. After `minutes` no new
    case is started. A case that fails does not stop the others.

    Raises:
        ValueError: an unknown experiment or case, a seed twice or below 0, lines in `out` that were measured at other
            sizes, or a graph asked of a backend that cannot be recorded. Before any work.
        RuntimeError: some cases failed; the text names them. After all others.
    """
    _check_graph(context)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    units = _missing(_wanted(names, setting, seeds, cases), setting, out)
    if not units:
        console.print("nothing to do: every case is measured", highlight=False)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(unit.experiment for unit in units):
        with console.status(f"preparing {name}"):
            find_experiment(name).prepare(setting, context)
    about = machine(context.device)
    shared = {
        "setting": setting.name,
        "sizes": json.loads(json.dumps(asdict(setting))),  # as they come back from a file
        "versions": about.pop("versions"),
        "machine": about,
        "commit": commit or _commit(),
        "jobs": jobs,
    }
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    done, failures = 0, []
    with (
        progress_bar(console, names[0] if len(names) == 1 else "experiments", len(units)) as tick,
        _workers(jobs, setting, context) as measured,
    ):
        for unit, future in measured(units, deadline):
            try:
                measurement = future.result()
            except Exception as error:
                failures.append(f"{unit}: {type(error).__name__}: {error}")
                console.print(f"failed: {failures[-1]}", highlight=False, markup=False)
                continue
            path = results_file(out, unit.experiment, setting.name, unit.seed)
            append_line(path, asdict(unit) | measurement | shared)
            done += 1
            tick(done)
            console.print(f"{unit}: {measurement['seconds']:.1f} s", highlight=False, markup=False)
    left = len(units) - done - len(failures)
    if left:
        console.print(f"{left} cases are left; the same command goes on with them", highlight=False)
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} of {len(units)} cases failed", *failures]))
    return done


def _check_graph(context: Context) -> None:
    """The backend `torch` reads data on the way, which stops a recording."""
    if context.device.type != "cuda" or not context.graph:
        return
    backend = sla_ref.get_backend()
    reason = sla_ref.list_backends()["triton"] if backend in ("auto", "triton") else f"the backend is {backend!r}"
    if reason is not None:
        raise ValueError(f"graph needs the backend 'triton' ({reason}); --no-graph goes without")


def _wanted(names: list[str], setting: Setting, seeds: list[int], cases: list[str] | None) -> list[Unit]:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers of at least 0, got {seeds}")
    known = {name: find_experiment(name).cases(setting) for name in dict.fromkeys(names)}
    everything = [case for each in known.values() for case in each]
    for case in cases or []:
        if case not in everything:
            raise ValueError(f"case must be one of {'; '.join(everything)}, got {case!r}")
    return [
        Unit(name, case, seed)
        for name, each in known.items()
        for case in each
        if cases is None or case in cases
        for seed in seeds
    ]


def _missing(units: list[Unit], setting: Setting, out: Path) -> list[Unit]:
    sizes = json.loads(json.dumps(asdict(setting)))
    there = set()
    for name, seed in dict.fromkeys((unit.experiment, unit.seed) for unit in units):
        path = results_file(out, name, setting.name, seed)
        for line in read_lines(path):
            if line["sizes"] != sizes:
                differ = {key: value for key, value in line["sizes"].items() if sizes.get(key) != value}
                raise ValueError(f"out holds {path.name}, measured with {differ}; name another folder")
            there.add(Unit(name, line["case"], seed))
        _repair(path)
    return [unit for unit in units if unit not in there]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"


# --- processes -------------------------------------------------------------------------------------------------------


def _measure(unit: Unit, setting: Setting, context: Context) -> dict[str, Any]:
    started = time.perf_counter()
    values = find_experiment(unit.experiment).measure(unit.case, unit.seed, setting, context)
    seconds = time.perf_counter() - started
    if context.device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes beside this one
    return {"values": values, "seconds": round(seconds, 3), "ended": round(time.time(), 3)}


_worker: tuple[Setting, Context] | None = None


def _start_worker(setting: Setting, device: str, work: Path, graph: bool, backend: str) -> None:
    global _worker
    torch.set_num_threads(1)
    sla_ref.set_backend(backend)
    _worker = setting, Context(torch.device(device), work, graph)


def _measure_in_worker(unit: Unit) -> dict[str, Any]:
    if _worker is None:
        raise RuntimeError("this process was not started as a worker")
    return _measure(unit, *_worker)


@contextmanager
def _workers(jobs: int, setting: Setting, context: Context) -> Iterator[Any]:
    """Gives a function that measures units and yields each with its future as it is done."""
    if jobs == 1:

        def one_by_one(units: list[Unit], deadline: float | None) -> Iterator[tuple[Unit, Future[Any]]]:
            for unit in units:
                if deadline is not None and time.monotonic() > deadline:
                    return
                future: Future[Any] = Future()
                try:
                    future.set_result(_measure(unit, setting, context))
                except Exception as error:
                    future.set_exception(error)
                yield unit, future

        yield one_by_one
        return

    start = (setting, str(context.device), context.work, context.graph, sla_ref.get_backend())
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=start)

    def side_by_side(units: list[Unit], deadline: float | None) -> Iterator[tuple[Unit, Future[Any]]]:
        queue = iter(units)
        # As many at a time as there are workers: what waits in the pool could not be held back any more.
        running = {pool.submit(_measure_in_worker, unit): unit for unit in islice(queue, jobs)}
        while running:
            future = next(as_completed(running))
            yield running.pop(future), future
            late = deadline is not None and time.monotonic() > deadline
            following = None if late else next(queue, None)
            if following is not None:
                running[pool.submit(_measure_in_worker, following)] = following

    try:
        yield side_by_side
    except KeyboardInterrupt:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
