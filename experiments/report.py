"""Tables and figures of measured lines, in docs/experiments.md and docs/experiments/.

The page is written by hand but for what stands between `<!-- report: NAME SETTING -->` and `<!-- end of report -->`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sla_ref.files import whole

from . import EXPERIMENTS
from .run import read_lines
from .setting import SETTINGS, Experiment

Line = dict[str, Any]

PLACE = re.compile(r"(<!-- report: (\S+) (\S+) -->\n).*?(<!-- end of report -->)", re.DOTALL)
MOST_COLUMNS = 8
CURVE = re.compile(r"loss_at_(\d+)")
TITLES = {
    "held_out_loss": "held-out loss",
    "distance": "distance to the teacher",
    "frechet": "Fréchet distance",
    "recognised": "digits recognised",
    "attention_mflops": "attention MFLOPs",
    "sparsity": "sparsity",
    "steps_to_half_the_gap": "steps to half the gap",
    "above_mean": "share of weights above 1/N",
    "below_hundredth": "share of weights below 1/(100 N)",
    "error_without_small": "error without those below 1/(100 N)",
    "error_only_large": "error with those above 1/N alone",
    "error_without_smallest_45": "error without the smallest 45 %",
    "error_only_largest_8": "error with the largest 8.1 % alone",
    "features_in_use": "features in use, of all",
    "from_average": "distance from the average of V",
    "stable_rank_top_8": "stable rank, largest 8 %",
    "stable_rank_rest": "stable rank, the rest",
}
INK = "#808080"  # to be read on a light page and on a dark one
STYLE: Any = {
    "svg.fonttype": "path",
    "savefig.transparent": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
SERIES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))  # told apart without colour, too


def report(results: Path, docs: Path) -> list[Path]:
    """Rewrites the page and its figures from all files in `results`; returns what was written.

    Raises:
        FileNotFoundError: there is no page.
        ValueError: the page has no place for something measured, or a place for an experiment that there is not.
    """
    page = docs / "experiments.md"
    if not page.is_file():
        raise FileNotFoundError(f"docs must hold experiments.md, there is no {page}")
    groups = read_results(results)
    text = fill(page.read_text(encoding="utf-8"), groups)
    with whole(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    written = [page]
    for (name, setting), lines in groups.items():
        path = docs / _figure_path(name, setting)
        path.parent.mkdir(exist_ok=True)
        with whole(path) as temporary, matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
            _figure(EXPERIMENTS[name], lines).savefig(temporary, format="svg", metadata={"Date": None})
        written.append(path)
    return written


def read_results(results: Path) -> dict[tuple[str, str], list[Line]]:
    """All lines by experiment and setting, in the order of seeds."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for path in sorted(results.glob("*.jsonl")):
        for line in read_lines(path):
            groups.setdefault((line["experiment"], line["setting"]), []).append(line)
    return {key: sorted(lines, key=lambda line: line["seed"]) for key, lines in groups.items()}


def fill(page: str, groups: dict[tuple[str, str], list[Line]]) -> str:
    """The page with every place filled anew."""
    places = {(found[2], found[3]) for found in PLACE.finditer(page)}
    for name, setting in groups:
        if (name, setting) not in places:
            raise ValueError(f"the page needs a place for what was measured: <!-- report: {name} {setting} -->")
    for name, _ in places:
        if name not in EXPERIMENTS:
            raise ValueError(f"the page has a place for {name!r}; experiments are {', '.join(EXPERIMENTS)}")

    def block(found: re.Match[str]) -> str:
        lines = groups.get((found[2], found[3]))
        body = _block(EXPERIMENTS[found[2]], found[3], lines) if lines else "Not measured yet.\n"
        return f"{found[1]}\n{body}\n{found[4]}"

    return PLACE.sub(block, page)


def _block(experiment: Experiment, setting: str, lines: list[Line]) -> str:
    parts = [_table(experiment, lines)]
    if experiment.paired:
        parts.append(_paired_table(experiment, lines))
    parts.append(_about(experiment, lines))
    path = _figure_path(experiment.name, setting)
    parts.append(f"![{experiment.question} {_title(experiment.shown)} of every case and seed]({path})\n")
    return "\n".join(parts)


def _figure_path(name: str, setting: str) -> str:
    return f"experiments/{name}.{setting}.svg"


# --- tables ----------------------------------------------------------------------------------------------------------


def _cases(experiment: Experiment, lines: list[Line]) -> list[str]:
    """The measured cases in the experiment's order; what it does not know any more comes last."""
    measured = dict.fromkeys(line["case"] for line in lines)
    planned = [case for case in experiment.cases(SETTINGS[lines[0]["setting"]]) if case in measured]
    return list(dict.fromkeys([*planned, *measured]))


def _values(lines: Iterable[Line], case: str, name: str) -> dict[int, float]:
    """A figure by seed."""
    return {line["seed"]: line["values"][name] for line in lines if line["case"] == case and name in line["values"]}


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def _spread(values: Iterable[float]) -> str:
    """Mean, and range where there is one, in four digits."""
    found = list(values)
    if not found:
        return "-"
    mean, low, high = (f"{each:.4g}" for each in (statistics.mean(found), min(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _is_bound(name: str, names: list[str]) -> bool:
    """Whether a figure is the lowest or highest value of another one."""
    return name.endswith(("_min", "_max")) and name[:-4] in names


def _cell(lines: list[Line], case: str, name: str) -> str:
    """Mean and range over seeds; or, for a figure with bounds of its own, the mean and these."""
    values = _values(lines, case, name).values()
    low, high = (_values(lines, case, name + bound).values() for bound in ("_min", "_max"))
    if not low:
        return _spread(values)
    return f"{statistics.mean(values):.3g}; {min(low):.2g} to {max(high):.3g}"


def _rows(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _table(experiment: Experiment, lines: list[Line]) -> str:
    """A row per case and a column per figure, or the other way round where figures are many."""
    found = [name for line in lines for name in line["values"] if not CURVE.fullmatch(name)]
    names = [name for name in dict.fromkeys(found) if not _is_bound(name, found)]
    cases = _cases(experiment, lines)
    cells = [[_cell(lines, case, name) for name in names] for case in cases]
    across, down = [_title(name) for name in names], [case + _missing_seeds(lines, case) for case in cases]
    if len(names) > max(MOST_COLUMNS, len(cases)):
        across, down, cells = down, across, [list(row) for row in zip(*cells, strict=True)]
    return _rows(["", *across], ([title, *row] for title, row in zip(down, cells, strict=True)))


def _missing_seeds(lines: list[Line], case: str) -> str:
    """Says so where a case was measured with fewer seeds than others."""
    seeds = {line["seed"] for line in lines if line["case"] == case}
    few = len(seeds) < len({line["seed"] for line in lines})
    return f" (seed {', '.join(map(str, sorted(seeds)))} alone)" if few else ""


def _paired_table(experiment: Experiment, lines: list[Line]) -> str:
    """What the first arm's figure is above each other arm's, seed by seed, where a condition has both."""
    conditions, (first, *others) = _conditions(experiment, lines)
    rows = []
    for condition in conditions:
        of_arm = [_values(lines, f"{condition}: {arm}", experiment.shown) for arm in (first, *others)]
        differences = [[of_arm[0][seed] - other[seed] for seed in of_arm[0] if seed in other] for other in of_arm[1:]]
        if any(differences):
            rows.append([condition, *map(_spread, differences)])
    return _rows([f"{_title(experiment.shown)}, paired by seed", *(f"{first}, minus {arm}" for arm in others)], rows)


def _conditions(experiment: Experiment, lines: list[Line]) -> tuple[list[str], list[str]]:
    parts = [case.partition(": ") for case in _cases(experiment, lines)]
    return list(dict.fromkeys(part[0] for part in parts)), list(dict.fromkeys(part[2] for part in parts))


def _about(experiment: Experiment, lines: list[Line]) -> str:
    def all_of(values: Iterable[str]) -> str:
        return " and ".join(dict.fromkeys(values))

    seeds = sorted({line["seed"] for line in lines})
    sizes = lines[0]["sizes"]
    hardware = all_of(
        line["machine"]["cpu"] if line["machine"]["device"] == "CPU" else line["machine"]["device"] for line in lines
    )
    versions = all_of(f"torch {line['versions']['torch']}, Triton {line['versions']['triton']}" for line in lines)
    commits = all_of(line["commit"][:12] for line in lines)
    jobs = all_of(str(line.get("jobs", 1)) for line in lines)
    training = (
        f"{sizes['steps']} steps of {sizes['batch']} clips where a row does not say otherwise, learning rate "
        f"{sizes['learning_rate']:g}, {sizes['clips']} held-out clips. "
    )
    figures = list(lines[0]["values"])
    bounded = any(_is_bound(name, figures) for name in figures)
    bounds = "; behind a semicolon, lowest to highest of all that was averaged" if bounded else ""
    return (
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))}): mean, and lowest to highest "
        f"in brackets{bounds}. {training if experiment.fine_tunes else ''}{hardware}, {versions}, commit {commits}; "
        f"{_wall(lines):.0f} s for {len(lines)} measurements, {jobs} at a time.\n"
    )


def _wall(lines: list[Line]) -> float:
    """Seconds in which at least one of the cases was being measured."""
    total, until = 0.0, 0.0
    for start, end in sorted((line["ended"] - line["seconds"], line["ended"]) for line in lines):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


# --- figures ---------------------------------------------------------------------------------------------------------


def _figure(experiment: Experiment, lines: list[Line]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.set_title(experiment.question, fontsize=11)
        curves = any(CURVE.fullmatch(name) for line in lines for name in line["values"])
        (_curves if curves else _dots)(experiment, lines, figure, axes)
    return figure


def _dots(experiment: Experiment, lines: list[Line], figure: Figure, axes: Axes) -> None:
    """A row per case, or per condition with a mark per arm: a small mark per seed, a line at their mean."""
    if experiment.paired:
        rows, arms = _conditions(experiment, lines)
        cases = {(row, arm): f"{row}: {arm}" for row in rows for arm in arms}
    else:
        rows, arms = [case for case in _cases(experiment, lines) if _values(lines, case, experiment.shown)], [""]
        cases = {(row, ""): row for row in rows}
    figure.set_figheight(0.9 + 0.34 * len(rows) * max(1, len(arms) / 2))
    for number, arm in enumerate(arms):
        colour, marker = SERIES[number % len(SERIES)]
        shift = 0.25 * (number - (len(arms) - 1) / 2)
        for place, row in enumerate(rows):
            found = list(_values(lines, cases[row, arm], experiment.shown).values())
            if found:
                height = place + shift
                axes.plot(found, [height] * len(found), marker, color=colour, markersize=4, alpha=0.7)
                axes.plot([statistics.mean(found)] * 2, [height - 0.12, height + 0.12], color=colour, linewidth=2)
        axes.plot([], [], marker, color=colour, label=arm)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(_title(experiment.shown))
    if len(arms) > 1:
        figure.legend(loc="outside lower center", ncols=len(arms))


def _curves(experiment: Experiment, lines: list[Line], figure: Figure, axes: Axes) -> None:
    """The loss of every case over steps: a line through the means, a band from the lowest to the highest seed."""
    for number, case in enumerate(_cases(experiment, lines)):
        colour, marker = SERIES[number % len(SERIES)]
        names = {name for line in lines if line["case"] == case for name in line["values"]}
        points = sorted((int(found[1]), name) for name in names if (found := CURVE.fullmatch(name)))
        steps = [step for step, _ in points]
        seen = [list(_values(lines, case, name).values()) for _, name in points]
        means = [statistics.mean(each) for each in seen]
        axes.plot(steps, means, color=colour, marker=marker, markersize=4, label=case)
        axes.fill_between(steps, [min(each) for each in seen], [max(each) for each in seen], color=colour, alpha=0.2)
    axes.set_xlabel("fine-tuning steps")
    axes.set_ylabel("held-out loss")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
