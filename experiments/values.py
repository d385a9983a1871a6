"""Measured lines in the form that the page needs: by experiment and case, as a mean with its range."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from . import EXPERIMENTS
from .comparisons import ARMS, AS_IN_MAIN, IMPROVED, SLA, same_sparse_arms
from .run import read_lines
from .setting import SETTINGS

Lines = list[dict[str, Any]]


class Spread(NamedTuple):
    """A mean over seeds, and the range of the seeds or, with `of_all`, of everything that their values are means of."""

    mean: float
    low: float
    high: float
    of_all: bool = False


def read_results(results: Path) -> dict[str, Lines]:
    """All lines by experiment and setting, as in "main n1024", in the order of seeds."""
    groups: dict[str, Lines] = {}
    for path in sorted(results.glob("*.jsonl")):
        for line in read_lines(path):
            groups.setdefault(f"{line['experiment']} {line['setting']}", []).append(line)
    return {key: sorted(lines, key=lambda line: line["seed"]) for key, lines in groups.items()}


def cases_of(lines: Lines) -> list[str]:
    """The measured cases, in the experiment's order."""
    measured = {line["case"] for line in lines}
    planned = EXPERIMENTS[lines[0]["experiment"]].cases(SETTINGS[lines[0]["setting"]])
    return [case for case in planned if case in measured]


def values_of(lines: Lines, case: str, name: str = "held_out_loss") -> dict[int, float]:
    """A value by seed."""
    return {line["seed"]: line["values"][name] for line in lines if line["case"] == case and name in line["values"]}


def spread(values: list[float]) -> Spread | None:
    """The mean and range of the values; None if there are none."""
    return Spread(mean(values), min(values), max(values)) if values else None


def spread_of(lines: Lines, case: str, name: str = "held_out_loss") -> Spread | None:
    """The spread of one quantity of one case; None if it was not measured."""
    found, low, high = (list(values_of(lines, case, name + bound).values()) for bound in ("", "_min", "_max"))
    return Spread(mean(found), min(low), max(high), of_all=True) if low else spread(found)


def conditions_of(lines: Lines) -> list[str]:
    """The conditions of the experiment "when": the part of a case before the colon."""
    return list(dict.fromkeys(case.partition(": ")[0] for case in cases_of(lines)))


def pairs(lines: Lines, condition: str) -> list[Spread | None]:
    """The losses of the arms in a condition of "when", and SLA's loss minus each of the others, seed by seed."""
    sparse = same_sparse_arms(condition)
    sla, *others = (values_of(lines, f"{condition if arm == SLA else sparse}: {arm}") for arm in ARMS)
    above = [[sla[seed] - other[seed] for seed in sla if seed in other] for other in others]
    return [spread(values) for values in (*(list(arm.values()) for arm in (sla, *others)), *above)]


def at_best_rate(lines: Lines) -> Lines:
    """The lines of "mixing" that count: of the rates of each arm, those of the one with the lowest mean tuning loss."""
    best: dict[str, tuple[float, str]] = {}
    for case in cases_of(lines):
        arm, _, _ = case.rpartition(", rate ")
        tuning = mean(values_of(lines, case, "tuning_loss").values())
        best[arm] = min(best.get(arm, (tuning, case)), (tuning, case))
    chosen = {case for _, case in best.values()}
    return [line for line in lines if line["case"] in chosen]


def typeset(text: str) -> str:
    """The text with names of cases in words, and without line breaks before % and around ±."""
    text = text.replace(IMPROVED, "both changes of SLA").replace(AS_IN_MAIN, "400 steps, nothing changed")
    return re.sub(r" ?%", "\u00a0%", text).replace(" ± ", "\u00a0±\u00a0")
