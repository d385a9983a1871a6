"""`pytest --evidence FOLDER` runs the tests that docs/guarantees.md names, and writes down what they saw.

FOLDER gets cpu.jsonl, or cuda.jsonl where there is a GPU: a line about the machine and the sources, then a line for
each case of each test. Nothing is written unless all of them pass. `tools/guarantees.py` puts what is written here
into the page.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_ref import testing
from sla_ref.files import whole
from sla_ref.lab.machine import machine
from tools import guarantees


def worst(checks: list[testing.Check]) -> dict[str, Any]:
    """The dtype of a case, the number of its checks, and the largest of each number of `testing.Error` in them.

    An infinite ratio is left out: the exact result is 0, or the equations make no error.
    """
    errors = [asdict(check.error) for check in checks if check.error is not None]
    found = {name: max(error[name] for error in errors) for name in errors[0]}
    numbers = {name: float(f"{value:.3g}") for name, value in found.items() if math.isfinite(value)}
    return {"dtype": checks[0].case.rpartition(", ")[2], "checks": len(checks), **numbers}


class Recorder:
    """The plugin. With xdist, the workers run it too, and what they see comes to the one process that writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{'cuda' if torch.cuda.is_available() else 'cpu'}.jsonl"
        self.lines: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        named = guarantees.named_in(guarantees.PAGE.read_text(encoding="utf-8"))
        chosen = [item for item in items if guarantees.split(item.nodeid)[0] in named]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
        for item in items:
            item.user_properties += [("backend", mark.args[0]) for mark in item.iter_markers("backend")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped:
            test, case = guarantees.split(report.nodeid)
            seen = dict(report.user_properties)
            numbers = seen.pop("errors", {})
            self.lines[report.nodeid] = {"test": test, "case": case, "outcome": report.outcome, **seen, **numbers}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.OK or not self.lines or hasattr(session.config, "workerinput"):
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        about = {"date": time.strftime("%Y-%m-%d"), **machine(device), "sources": guarantees.sources()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as temporary:
            lines = [about, *(self.lines[nodeid] for nodeid in sorted(self.lines))]
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
