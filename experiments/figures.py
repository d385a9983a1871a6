"""The figures of docs/experiments.md. Each shows the answer to one question, and the values to compare it with."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .comparisons import ARMS, AS_IN_MAIN, IMPROVED, SLA
from .mixing import BINS
from .values import Lines, Spread, at_best_rate, cases_of, conditions_of, pairs, spread_of, typeset

INK = "#7d8590"  # readable on light and dark pages; the site replaces it by the colour of its text
COLOURS, MARKERS = ("#2a86c8", "#d55e00", "#009e73", "#cc79a7"), "osD^"  # also told apart without colour
STYLE: Any = {
    "svg.fonttype": "none",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **{f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")},
}
Marks = dict[str, float]  # losses to compare with
Series = dict[str, dict[Any, Spread | None]]  # by name: the value in each row, or at each x
Draw = Callable[[Lines, Marks], Figure]


def draw(name: str, groups: dict[str, Lines]) -> str | None:
    """A figure of `FIGURES` as SVG, with the same bytes every time; None if its experiment is not measured."""
    group, function = FIGURES[name]
    if group not in groups:
        return None
    main = groups.get("main n1024", [])
    found = {case: spread_of(main, case) for case in ("teacher", "sparse only, 15 %", "sparse only, 5 %")}
    svg = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = function(groups[group], {case: loss.mean for case, loss in found.items() if loss})
        figure.savefig(svg, format="svg", metadata={"Date": None})
        plt.close(figure)
    return svg.getvalue()


# --- three kinds -----------------------------------------------------------------------------------------------------


def rows(series: Series, label: str, marks: Marks, *, log: bool = False) -> Figure:
    """A marker at the mean of every row and series, on a line from the lowest to the highest value."""
    names = list(next(iter(series.values())))
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.36 * len(names)))
    for number, (name, each) in enumerate(series.items()):
        colour, shift = COLOURS[number], 0.16 * (number - (len(series) - 1) / 2)
        found = [(names.index(row) + shift, of_row) for row, of_row in each.items() if of_row]
        for height, of_row in found:
            axes.plot([of_row.low, of_row.high], [height] * 2, color=colour, linewidth=3, alpha=0.5)
        means = [of_row.mean for _, of_row in found]
        axes.plot(means, [height for height, _ in found], MARKERS[number], color=colour, label=typeset(name))
    axes.set_yticks(range(len(names)), map(typeset, names))
    axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    if log:
        _logarithmic(axes, "x")
    for name, value in marks.items():
        axes.axvline(value, color=INK, linewidth=1, linestyle="--")
        axes.text(value, -0.6, typeset(name), ha="center", va="bottom")
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series))
    return figure


def curves(
    series: Series, label: str, marks: Marks, ticks: Collection[float] = (), *, height: str = "held-out loss"
) -> Figure:
    """The mean of every series over x, in a band from lowest to highest. With `ticks` x is logarithmic, otherwise y."""
    figure, axes = plt.subplots(figsize=(7.2, 3.9))
    for number, (name, each) in enumerate(series.items()):
        found = {x: at_x for x, at_x in each.items() if at_x}
        mean, low, high, _ = zip(*found.values(), strict=True)
        axes.plot(list(found), mean, color=COLOURS[number], marker=MARKERS[number], label=typeset(name))
        axes.fill_between(list(found), low, high, color=COLOURS[number], alpha=0.2)
    axes.set(xlabel=label, ylabel=height)
    _logarithmic(axes, "x" if ticks else "y")
    if ticks:
        axes.set_xticks(list(ticks))
    for name, value in marks.items():
        axes.axhline(value, color=INK, linewidth=1, linestyle="--")
        axes.annotate(typeset(name), (1.01, value), xycoords=("axes fraction", "data"), va="center")
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def pareto(lines: Lines, marks: Marks) -> Figure:
    """Loss against FLOPs, for every student that was trained."""
    names = {"SLA (paper)": "SLA, all three forms", "SLA-1": "", "SLA, released code": ""}
    places = {"SLA (paper)": (8, 6), "L+S": (8, -8), "sparse only, 5 %": (-8, 0), "full attention": (-8, 0)}
    figure, axes = plt.subplots(figsize=(7.2, 3.9))
    for case in cases_of(lines):
        flops, loss = spread_of(lines, case, "attention_mflops"), spread_of(lines, case)
        if flops and loss and case not in ("teacher", "SLA, swapped in, not trained"):
            of_sla = case.startswith("SLA")
            axes.plot(flops.mean, loss.mean, MARKERS[of_sla], color=COLOURS[of_sla], markersize=7)
            away = places.get(case, (8, 0))
            how: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": "left" if away[0] > 0 else "right",
                "va": "center",
            }
            axes.annotate(typeset(names.get(case, case)), (flops.mean, loss.mean), away, **how)
    _logarithmic(axes, "x")
    axes.margins(x=0.4)  # room for the labels
    axes.set(xlabel="attention MFLOPs of one forward", ylabel="held-out loss")
    return figure


def _logarithmic(axes: Axes, name: str) -> None:
    axes.set(**{f"{name}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


# --- what they show --------------------------------------------------------------------------------------------------


def by_case(names: dict[str, str], label: str, *, compare: bool = False, log: bool = False) -> Draw:
    """A row for each case and a series for each quantity. `names` maps the name of a series to its quantity."""

    def function(lines: Lines, marks: Marks) -> Figure:
        cases = cases_of(lines)
        series = {title: {case: spread_of(lines, case, name) for case in cases} for title, name in names.items()}
        return rows(series, label, marks if compare else {}, log=log)

    return function


def crossing(lines: Lines, marks: Marks) -> Figure:
    """Loss against steps, for the arms of "when" and for SLA with both of its changes."""
    conditions = {100: "100 steps", 400: AS_IN_MAIN, 1600: "1600 steps", 3200: "3200 steps"}
    improved = {steps: f"{name}, {IMPROVED}".removeprefix(f"{AS_IN_MAIN}, ") for steps, name in conditions.items()}
    cases = {arm: {steps: f"{name}: {arm}" for steps, name in conditions.items()} for arm in ARMS}
    cases[f"{SLA}, {IMPROVED}"] = {steps: f"{name}: {SLA}" for steps, name in improved.items()}
    series = {title: {x: spread_of(lines, case) for x, case in each.items()} for title, each in cases.items()}
    return curves(series, "fine-tuning steps", {"teacher": marks["teacher"]}, conditions)


def critical(lines: Lines, marks: Marks) -> Figure:
    """Loss against the critical share."""
    found = {float(case.partition("%")[0]): spread_of(lines, case) for case in cases_of(lines)}
    return curves({"SLA": found}, "critical blocks, %", marks, found)


def over_steps(lines: Lines, marks: Marks) -> Figure:
    """Loss against steps, for each recipe."""
    points = {50 * point: f"loss_at_{50 * point}" for point in range(9)}
    series = {case: {x: spread_of(lines, case, name) for x, name in points.items()} for case in cases_of(lines)}
    return curves(series, "fine-tuning steps", marks)


def when(lines: Lines, marks: Marks) -> Figure:
    """SLA's loss minus that of each sparse-only arm, in each condition."""
    found = {condition: pairs(lines, condition) for condition in conditions_of(lines)}
    others = dict(enumerate(list(ARMS)[1:], start=len(ARMS)))
    series = {f"SLA minus {arm}": {row: each[at] for row, each in found.items()} for at, arm in others.items()}
    return rows(series, "difference in held-out loss", {"level": 0.0})


def _by_steps(lines: Lines) -> dict[str, dict[str, str]]:
    """The cases of "mixing" at their best rates: by "400 steps", and then by arm."""
    found: dict[str, dict[str, str]] = {}
    for case in cases_of(at_best_rate(lines)):
        steps, _, arm = case.rpartition(", rate ")[0].partition(": ")
        found.setdefault(steps, {})[arm] = case
    return found


def mixing(lines: Lines, marks: Marks) -> Figure:
    """Loss of each arm, each at the best of its rates, and of its numbers of steps a series."""
    by_steps = _by_steps(lines)
    arms = dict.fromkeys(arm for cases in by_steps.values() for arm in cases)
    series = {
        steps: {arm: spread_of(lines, cases[arm]) if arm in cases else None for arm in arms}
        for steps, cases in by_steps.items()
    }
    return rows(series, "held-out loss", {})


def error_by_mass(lines: Lines, marks: Marks) -> Figure:
    """Error of rows against the mass outside their critical blocks, for four arms after the fewest steps."""
    cases = next(iter(_by_steps(lines).values()))
    centres = {number: (low + high) / 2 for number, (low, high) in enumerate(BINS, start=1)}
    series: Series = {
        arm: {x: spread_of(lines, cases[arm], f"row_error_{number}") for number, x in centres.items()}
        for arm in ("SLA (paper)", "alpha per head", "alpha from block means", "ideal alpha")
        if arm in cases
    }
    return curves(series, "share of a row's softmax outside its critical blocks", {}, height="error of the row")


RANKS = {"whole map": "stable_rank", "largest 8 %": "stable_rank_top_8", "the rest": "stable_rank_rest"}
FLATNESS = {"features in use, of all": "features_in_use", "distance from the average of V": "from_average"}
CHOICES = {name: f"held_out_loss_{name}" for name in ("random", "pooled", "oracle", "teacher")}
ABLATION = by_case({"SLA": "held_out_loss"}, "held-out loss", compare=True)
FIGURES: dict[str, tuple[str, Draw]] = {  # by name of the file: the experiment that it shows, and how
    "crossing": ("when n1024", crossing),
    "motivation": ("motivation n1024", by_case(RANKS, "stable rank", log=True)),
    "choice": ("choice n1024", by_case(CHOICES, "held-out loss", log=True)),
    "main": ("main n1024", pareto),
    "main-4096": ("main n4096", pareto),
    "critical": ("ablation-critical n1024", critical),
    **{part: (f"ablation-{part} n1024", ABLATION) for part in ("negligible", "feature-map", "block", "proj")},
    "recipes": ("recipes n1024", over_steps),
    "when": ("when n1024", when),
    "when-4096": ("when n4096", when),
    "when-wide": ("when wide", when),
    "features": (
        "features n1024",
        by_case(FLATNESS, "share of all features; distance as a share of the branch's size"),
    ),
    "mixing": ("mixing n1024", mixing),
    "mixing-4096": ("mixing n4096", mixing),
    "error-by-mass": ("mixing n1024", error_by_mass),
}
