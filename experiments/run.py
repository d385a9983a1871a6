"""Runs experiments: a line of JSON for every case and seed, appended when it is measured.

The file is `<experiment>.<setting>.seed<k>.jsonl`. A case that is in it is not run again, so that an interrupted run
goes on where it was. Runs with different seeds write different files: they may go side by side.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import sla_ref
from sla_ref.files import append_line, whole
from sla_ref.lab.machine import machine

from . import EXPERIMENTS
from .setting import Context, Setting

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "experiments"

Unit = tuple[str, str, int]  # an experiment, one of its cases, a seed


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


def run(
    names: list[str],
    setting: Setting,
    seeds: list[int],
    out: Path,
    context: Context,
    console: Console,
    cases: list[str] | None = None,
) -> int:
    """Measures what is missing; returns how many lines were added.

    Case after case, each with all seeds, so that a run that ends early leaves whole comparisons. A case that fails does
    not stop the others.

    Raises:
        ValueError: an unknown experiment or case, a seed twice or below 0, lines in `out` that were measured at other
            sizes, or a graph asked of a backend that cannot be recorded. Before any work.
        RuntimeError: some cases failed; the text names them. After all others.
    """
    _check_graph(context)
    wanted = _wanted(names, setting, seeds, cases)
    sizes = json.loads(json.dumps(asdict(setting)))  # as they come back from a file
    paths = {(name, seed): out / f"{name}.{setting.name}.seed{seed}.jsonl" for name, _, seed in wanted}
    measured = {(name, case, seed) for (name, seed), path in paths.items() for case in _measured(path, sizes)}
    missing = [unit for unit in wanted if unit not in measured]
    if not missing:
        console.print("nothing to do: every case is measured", highlight=False)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    about = machine(context.device)
    shared = {"sizes": sizes, "versions": about.pop("versions"), "machine": about, "commit": _commit()}
    failures = []
    for number, (name, case, seed) in enumerate(missing, start=1):
        text = f"{name}, seed {seed}, {case}"
        started = time.perf_counter()
        try:
            with console.status(f"{number} of {len(missing)}: {text}"):
                values = EXPERIMENTS[name].measure(case, seed, setting, context)
        except Exception as error:
            failures.append(f"{text}: {type(error).__name__}: {error}")
            console.print(f"failed: {failures[-1]}", highlight=False, markup=False)
            continue
        seconds = round(time.perf_counter() - started, 3)
        line = {"experiment": name, "setting": setting.name, "case": case, "seed": seed, "values": values}
        append_line(paths[name, seed], line | {"seconds": seconds, "ended": round(time.time(), 3)} | shared)
        console.print(f"{text}: {seconds:.1f} s", highlight=False, markup=False)
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} of {len(missing)} cases failed", *failures]))
    return len(missing)


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
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    known = [(name, case) for name in dict.fromkeys(names) for case in EXPERIMENTS[name].cases(setting)]
    every = dict.fromkeys(case for _, case in known)
    for case in cases or []:
        if case not in every:
            raise ValueError(f"case must be one of {'; '.join(every)}, got {case!r}")
    return [(name, case, seed) for name, case in known if cases is None or case in cases for seed in seeds]


def _measured(path: Path, sizes: dict[str, Any]) -> list[str]:
    """The cases in a file, which loses a torn last line; ValueError if it is of other sizes."""
    lines = read_lines(path)
    for line in lines:
        if line["sizes"] != sizes:
            differ = {key: value for key, value in line["sizes"].items() if sizes.get(key) != value}
            raise ValueError(f"out holds {path.name}, measured with {differ}; name another folder")
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        with whole(path) as temporary:
            temporary.write_bytes(text[: text.rfind(b"\n") + 1])
    return [line["case"] for line in lines]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"
