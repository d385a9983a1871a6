"""Puts tables of measured lines into docs/experiments.md, and the drawings of `figures` into docs/experiments/.

It rewrites what is between `<!-- report: NAME SETTING -->` and `<!-- end of report -->`; the rest of the page is
written by hand. Where nothing is measured yet, it writes the command that measures. The table of all machines goes to
the place `<!-- report: machines -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sla_ref.files import whole

from . import EXPERIMENTS
from .comparisons import ARMS
from .figures import FIGURES, draw
from .run import RESULTS
from .setting import SETTINGS
from .values import Lines, Spread, at_best_rate, cases_of, conditions_of, pairs, read_results, spread_of, typeset

DOCS = Path(__file__).parents[1] / "docs"
PLACE = re.compile(r"(<!-- report: (.+?) -->\n).*?(<!-- end of report -->)", re.DOTALL)


class Quantity(NamedTuple):
    """How a table shows a value."""

    title: str
    decimals: int = 4
    percent: bool = False


def _percent(title: str, decimals: int = 0) -> Quantity:
    return Quantity(title, decimals, percent=True)


LOSS = Quantity("held-out loss")
QUANTITIES = {
    "held_out_loss": LOSS,
    "distance": Quantity("distance to the teacher"),
    "frechet": Quantity("Fréchet distance", 0),
    "recognised": _percent("digits recognised"),
    "attention_mflops": Quantity("attention MFLOPs", 0),
    "sparsity": _percent("blocks not critical", 1),
    "steps_to_half_the_gap": Quantity("steps to half the gap", 0),
    "recall_pooled": _percent("oracle's blocks found"),
    **{f"critical_mass_{name}": _percent(f"mass held, {name}") for name in ("pooled", "oracle", "random")},
    **{f"held_out_loss_{name}": Quantity(f"loss, {name}", 3) for name in ("pooled", "oracle", "random")},
    "above_mean": _percent("weights above 1/N"),
    "below_hundredth": _percent("weights below 1/(100 N)"),
    "error_without_small": _percent("error without those below 1/(100 N)", 2),
    "error_only_large": _percent("error with only those above 1/N"),
    "error_without_smallest_45": _percent("error without the smallest 45 %", 1),
    "error_only_largest_8": _percent("error with only the largest 8.1 %"),
    "stable_rank": Quantity("stable rank", 0),
    "stable_rank_top_8": Quantity("stable rank, largest 8 %", 0),
    "stable_rank_rest": Quantity("stable rank, the rest", 1),
    "features_in_use": _percent("features in use, of all"),
    "from_average": _percent("distance from the average of V"),
    "row_error_1": Quantity("error of rows with less than 1/3 outside", 3),
    "row_error_2": Quantity("with 1/3 to 2/3", 3),
    "row_error_3": Quantity("with more than 2/3", 3),
    "alpha_off": Quantity("alpha off by", 3),
}


def report(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Rewrites the page and the figures of everything measured in `results`. Raises ValueError as `fill`."""
    groups = read_results(results)
    page = docs / "experiments.md"
    text = fill(page.read_text(encoding="utf-8"), groups)
    with whole(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    (docs / "experiments").mkdir(exist_ok=True)
    for name in FIGURES:
        if svg := draw(name, groups):
            with whole(docs / "experiments" / f"{name}.svg") as temporary:
                temporary.write_text(svg, encoding="utf-8")


def fill(page: str, groups: dict[str, Lines]) -> str:
    """The page with new tables.

    Raises ValueError unless it has a place for each measured group, and no other but for groups to be measured.
    """
    places = {found[2] for found in PLACE.finditer(page)} - {"machines"}
    planned = {f"{name} {setting}" for name in EXPERIMENTS for setting in SETTINGS}
    if odd := sorted(groups.keys() - places | places - groups.keys() - planned):
        raise ValueError(f"the page must have a place for each measured experiment and no other, which fails for {odd}")

    def block(found: re.Match[str]) -> str:
        name, _, setting = found[2].partition(" ")
        if found[2] == "machines":
            rows = machines(groups)
        elif found[2] not in groups:
            how = f"`python -m experiments run {name} --setting {setting}`"
            return f"{found[1]}\nNot measured yet: {how} does it.\n\n{found[3]}"
        else:
            rows = TABLES.get(name, table)(groups[found[2]])
        rows.insert(1, ["---"] * len(rows[0]))
        text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return f"{found[1]}\n{typeset(text)}\n{found[3]}"

    return PLACE.sub(block, page)


def cell(found: Spread | None, quantity: Quantity = LOSS) -> str:
    """The mean, with half of the seeds' range unless that rounds to zero, or with the range of what was averaged."""
    if found is None:
        return "-"

    unit = " %" * quantity.percent

    def show(value: float) -> str:
        return f"{100 * value if quantity.percent else value:,.{quantity.decimals}f}".replace("-", "−")

    mean, half = show(found.mean), show((found.high - found.low) / 2)
    if found.of_all:
        return f"{mean}{unit} ({show(found.low)} to {show(found.high)}{unit})"
    return mean + (f" ± {half}" if half != show(0) else "") + unit


def table(lines: Lines) -> list[list[str]]:
    """A row for each case and a column for each quantity that varies, or transposed if there are many quantities."""
    cases = cases_of(lines)
    columns = [["", *cases]]
    for name, quantity in QUANTITIES.items():
        column = [cell(spread_of(lines, case, name), quantity) for case in cases]
        if len(set(column)) > 1:
            columns.append([quantity.title, *column])
    return columns if len(columns) > 9 else [list(row) for row in zip(*columns, strict=True)]


def differences(lines: Lines) -> list[list[str]]:
    """A row for each condition of the experiment "when"."""
    header = ["held-out loss", *ARMS, *(f"SLA minus {arm}" for arm in list(ARMS)[1:])]
    return [header, *([condition, *map(cell, pairs(lines, condition))] for condition in conditions_of(lines))]


TABLES: dict[str, Callable[[Lines], list[list[str]]]] = {  # of an experiment, where it is not `table`
    "when": differences,
    "mixing": lambda lines: table(at_best_rate(lines)),
}


def machines(groups: dict[str, Lines]) -> list[list[str]]:
    """A row for each machine, its versions and the commit."""
    found: dict[tuple[str, ...], list[str]] = {}
    for group, lines in groups.items():
        for line in lines:
            machine, versions = line["machine"], line["versions"]
            name = machine["cpu"] if machine["device"] == "CPU" else machine["device"]
            key = (name, f"torch {versions['torch']}, Triton {versions['triton']}", line["commit"][:12])
            found.setdefault(key, []).append(group)
    rows = [[*key, str(len(of_key)), ", ".join(dict.fromkeys(of_key))] for key, of_key in sorted(found.items())]
    return [["machine", "versions", "commit", "measurements", "experiments"], *rows]
