"""Runs experiments, and appends a line of JSON for every case and seed once it is measured.

The file is `<experiment>.<setting>.seed<k>.jsonl`. A case that is in the file is not measured again, so an interrupted
run continues where it stopped. Runs with different seeds write different files and may run in parallel.
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file. If a run was interrupted while it wrote the last line, that line is left out.

    Raises ValueError for any other line that is not JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is empty or not complete
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return found


def run(names: list[str], setting: Setting, seeds: list[int], out: Path, context: Context, console: Console) -> int:
    """Measures what is missing, and returns how many lines were added.

    Each case is measured with all seeds before the next case begins, so a run that ends early leaves whole comparisons.
    An error in a case ends the run, and what was measured before is kept.

    Raises:
        ValueError: before any work, if an experiment is unknown, if a seed is repeated or negative, if `out` has lines
            that were measured at other sizes, or if a GPU has no working Triton backend.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers of at least 0, got {seeds}")
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if context.device.type == "cuda" and (reason := sla_ref.list_backends()["triton"]):
        # Training is recorded as a CUDA graph, and the backend `torch` reads values, which a recording does not allow.
        raise ValueError(f"device must be cpu where the backend 'triton' cannot run ({reason})")
    sizes = json.loads(json.dumps(asdict(setting)))  # as they are read back from a file
    paths = {(name, seed): out / f"{name}.{setting.name}.seed{seed}.jsonl" for name in names for seed in seeds}
    measured = {key: _measured(path, sizes) for key, path in paths.items()}
    cases = [(name, case) for name in dict.fromkeys(names) for case in EXPERIMENTS[name].cases(setting)]
    missing = [(name, case, seed) for name, case in cases for seed in seeds if case not in measured[name, seed]]
    out.mkdir(parents=True, exist_ok=True)
    about = machine(context.device)
    shared = {"sizes": sizes, "versions": about.pop("versions"), "machine": about, "commit": _commit()}
    for number, (name, case, seed) in enumerate(missing, start=1):
        text = f"{number} of {len(missing)}: {name}, seed {seed}, {case}"
        started = time.perf_counter()
        with console.status(text):
            values = EXPERIMENTS[name].measure(case, seed, setting, context)
        seconds = round(time.perf_counter() - started, 3)
        line = {"experiment": name, "setting": setting.name, "case": case, "seed": seed, "values": values}
        append_line(paths[name, seed], line | {"seconds": seconds, "ended": round(time.time(), 3)} | shared)
        console.print(f"{text}: {seconds:.1f} s", highlight=False, markup=False)
    return len(missing)


def _measured(path: Path, sizes: dict[str, Any]) -> set[str]:
    """The cases in a file, after removing a last line that is not complete. ValueError if it has other sizes."""
    lines = read_lines(path)
    for line in lines:
        if line["sizes"] != sizes:
            differ = {key: value for key, value in line["sizes"].items() if sizes.get(key) != value}
            raise ValueError(f"out holds {path.name}, measured with {differ}; name another folder")
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        with whole(path) as temporary:
            temporary.write_bytes(text[: text.rfind(b"\n") + 1])
    return {line["case"] for line in lines}


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout.strip() or "unknown"
