"""Fills docs/guarantees.md with what the tests saw that keep its promises: `make evidence` records, then runs this.

The page is written by hand, but for two things. In a row of a table that names tests, as in `test_x.py::test_y`, the
cell before them says how many cases of them passed on which device. Between `<!-- evidence: NAME -->` and `<!-- end of
evidence -->` is a list or table of this module.

    python tools/guarantees.py
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
FOLDER = ROOT / "benchmarks" / "results" / "evidence"
MUTANTS = ROOT / "benchmarks" / "results" / "mutants.json"
PACKAGE = ROOT / "src" / "sla_ref"
AROUND_THE_OPERATOR = ("lab", "integrations", "cli.py", "analysis.py", "compiled.py")
AROUND_THE_OPERATOR += ("sla2.py", "reference_sla2.py", "router.py")
BACKENDS = {"torch": "backends/pytorch.py", "triton": "backends/triton/*.py", "numba": "backends/numba_cuda.py"}

TEST = re.compile(r"`(test_\w+\.py::test_\w+)`")
PLACE = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end of evidence -->)", re.DOTALL)
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


class Recording(NamedTuple):
    """A file of evidence: its first line, and the others."""

    about: dict[str, Any]
    cases: list[dict[str, Any]]


# --- which sources ---------------------------------------------------------------------------------------------------


def code(tree: Any) -> Any:
    """A syntax tree as nested lists, without docstrings and whatever else does nothing, and without empty fields.

    `ast.dump` gives other text in other versions of Python.
    """
    if isinstance(tree, list):
        parts = [each for each in tree if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
        return [code(each) for each in parts]
    if isinstance(tree, ast.AST):
        fields = [[name, code(value)] for name, value in ast.iter_fields(tree) if value not in (None, [])]
        return [type(tree).__name__, *fields]
    return repr(tree)


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """A hash of the code of each backend, of the operator, and of what is around it. Comments do not count."""
    files = {name: sorted(package.glob(pattern)) for name, pattern in BACKENDS.items()}
    backends = {path for paths in files.values() for path in paths}
    rest = [path for path in sorted(package.rglob("*.py")) if path not in backends]
    around = [path for path in rest if path.relative_to(package).parts[0] in AROUND_THE_OPERATOR]
    files["the operator"] = [path for path in rest if path not in around]
    files["what is around it"] = around

    def digest(paths: list[Path]) -> str:
        trees = [[path.name, code(ast.parse(path.read_text(encoding="utf-8")))] for path in paths]
        return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:16]

    return {name: digest(paths) for name, paths in files.items()}


def digest_of(source: str) -> str:
    """A hash of the code of one module."""
    return hashlib.sha256(str(code(ast.parse(source))).encode()).hexdigest()[:16]


# --- evidence --------------------------------------------------------------------------------------------------------


def split(nodeid: str) -> tuple[str, str]:
    """pytest's name of a case, such as tests/test_x.py::test_y[z], as the page's name of its test, and z."""
    test, _, case = nodeid.removeprefix("tests/").partition("[")
    return test, case.removesuffix("]")


def named_in(page: str) -> set[str]:
    """The tests in the page's tables."""
    return {test for row in page.splitlines() if row.startswith("| ") for test in TEST.findall(row)}


def read(folder: Path = FOLDER) -> dict[str, Recording]:
    """The evidence, by kind of device."""
    lines = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("*.jsonl"))}
    return {kind: Recording(json.loads(each[0]), [*map(json.loads, each[1:])]) for kind, each in lines.items()}


# --- the page --------------------------------------------------------------------------------------------------------


def fill(page: str, evidence: dict[str, Recording], now: dict[str, str]) -> str:
    """The page with what was recorded; `now` are today's `sources`."""

    def row(line: str) -> str:
        tests = TEST.findall(line) if line.startswith("| ") else []
        return re.sub(r"[^|]*(\|[^|]*\|)$", rf" {cell(tests, evidence, now)} \1", line) if tests else line

    def block(place: re.Match[str]) -> str:
        lines = PLACES[place[2]](evidence, now)
        return "\n".join([place[1], *lines, "", place[3]])

    return PLACE.sub(block, "\n".join(map(row, page.split("\n"))))


def changed(recording: Recording, now: dict[str, str]) -> list[str]:
    """The parts of the package that are not what they were."""
    return [name for name in now if recording.about["sources"].get(name) != now[name]]


def cell(tests: list[str], evidence: dict[str, Recording], now: dict[str, str]) -> str:
    """How many cases of these tests passed, and how much of its error budget the worst of them used."""
    parts = []
    for kind, recording in evidence.items():
        lines = [line for line in recording.cases if line["test"] in tests and line["outcome"] == "passed"]
        if lines:
            text = f"{DEVICES[kind]}{', earlier code' * bool(changed(recording, now))}: {count(len(lines), 'case')}"
            budgets = [line["budget"] for line in lines if "budget" in line]
            parts.append(text + (f", at most {100 * max(budgets):.0f} % of the budget" if budgets else ""))
    return "; ".join(parts) or "not recorded: needs a GPU"


def count(number: int, noun: str) -> str:
    """As in 1 case, 1,000 cases."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def devices(evidence: dict[str, Recording], now: dict[str, str]) -> list[str]:
    """For each kind of device: when and on what the evidence was recorded, and whether the code has changed since."""
    lines = []
    for kind, name in DEVICES.items():
        if kind not in evidence:
            lines.append(f"- **{name}**: not recorded with this code. {checked_before()}")
            continue
        about, other = evidence[kind].about, changed(evidence[kind], now)
        chip = about["cpu"] if kind == "cpu" else about["device"]
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        which = f", before the code of {' and '.join(other)} changed," if other else " with this code,"
        lines.append(f"- **{name}**: recorded on {about['date']}{which} on {chip} ({versions}).")
    return lines


def checked_before() -> str:
    """What benchmarks/results says of the kernels on a GPU."""
    parts = []
    for name, file in (("Triton", "gpu"), ("Numba", "backends")):
        found = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))
        about, failed = found["about"], len(found["parity"]["failures"])
        commit = found["parity"].get("commit", about["commit"])  # another one if the file was joined
        passed = f"{found['parity']['checks'] - failed:,} checks" + f" and failed {failed}" * bool(failed)
        parts.append(f"{name}'s kernels passed {passed} on an {about['device']} at {commit[:7]}")
    return f"At earlier commits, {' and '.join(parts)}."


def errors(evidence: dict[str, Recording], now: dict[str, str]) -> list[str]:
    """A table by device, backend and dtype: medians over the cases, and the largest share of a budget that was used."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for kind, recording in evidence.items():
        for line in recording.cases:
            if "budget" in line:
                groups.setdefault((DEVICES[kind], line["backend"], line["dtype"]), []).append(line)
    rows = ["| device | backend | dtype | cases | checks | largest | RMS | RMS over the equations' | budget used |"]
    rows.append("|---" * 9 + "|")
    for key, lines in sorted(groups.items()):
        cells = [*key, f"{len(lines):,}", f"{sum(line['checks'] for line in lines):,}"]
        for name, form in (("largest", ".1e"), ("rms", ".1e"), ("plain", ".2g")):
            middle = median(line.get(name, math.inf) for line in lines)
            cells.append(f"{middle:{form}}" if math.isfinite(middle) else "-")
        rows.append(f"| {' | '.join(cells)} | {100 * max(line['budget'] for line in lines):.0f} % |")
    return rows


def faults(evidence: dict[str, Recording], now: dict[str, str]) -> list[str]:
    """The names of all planted faults, by the test that plants them."""
    names: dict[str, list[str]] = {}
    for line in evidence["cpu"].cases:
        if "fault" in line["test"] and line["outcome"] == "passed":
            names.setdefault(line["test"], []).append(line["case"])
    return [f"- `{test}`, {len(cases)}: {'; '.join(cases)}." for test, cases in names.items()]


def mutants(evidence: dict[str, Recording], now: dict[str, str]) -> list[str]:
    """A table by module, of what `make mutants` recorded."""
    found = json.loads(MUTANTS.read_text(encoding="utf-8"))
    same = {
        module: digest_of((PACKAGE / f"{module}.py").read_text(encoding="utf-8")) == row["source"]
        for module, row in found["modules"].items()
    }
    return table_of_mutants(found, same)


def table_of_mutants(found: dict[str, Any], same: dict[str, bool]) -> list[str]:
    """`same` says for each module whether its code is still what it was."""
    rows = ["| module | commit | mutants | listed | run | caught at first | 95 % interval | caught now |"]
    rows.append("|---" * 8 + "|")
    total: Counter[str] = Counter()
    bounds = []
    for module, row in found["modules"].items():
        bounds.append((row["mutants"], wilson(row["caught_at_first"], row["run"])))
        earlier = "" if same[module] else ", earlier code"
        rows.append(f"| `{module}` | {row['commit']}{earlier} | {cells_of_mutants(row, bounds[-1][1])} |")
        total.update({name: number for name, number in row.items() if isinstance(number, int)})
    low, high = (sum(size * bound[i] for size, bound in bounds) / total["mutants"] for i in (0, 1))
    rows.append(f"| all | | {cells_of_mutants(total, (low, high))} |")
    about = found["about"]
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    last = f"Last recorded on {about['date']}, on {about['cpu']} ({versions}), with seed {about['seed']}."
    survivors = [f"- `{text}`" for row in found["modules"].values() for text in row["survived"]]
    folded = ["", '<details markdown="1"><summary>Those that survive</summary>', "", *survivors, "", "</details>"]
    return [last, "", *rows, *(folded if survivors else [])]


def cells_of_mutants(row: Mapping[str, Any], interval: tuple[float, float]) -> str:
    ran, first, now = row["run"], row["caught_at_first"], row["caught"]
    cells = [f"{row['mutants']:,}", f"{row['listed']:,}", f"{ran:,}", f"{first:,} ({100 * first / ran:.1f} %)"]
    cells.append(f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %")
    return " | ".join([*cells, f"{now:,} ({100 * now / ran:.1f} %)"])


def wilson(hits: int, tries: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    z2 = 1.959964**2
    middle, half = hits + z2 / 2, math.sqrt(z2 * (hits * (tries - hits) / tries + z2 / 4))
    return (middle - half) / (tries + z2), (middle + half) / (tries + z2)


PLACES: dict[str, Callable[[dict[str, Recording], dict[str, str]], list[str]]]
PLACES = {"devices": devices, "errors": errors, "faults": faults, "mutants": mutants}


def fill_page() -> None:
    """Write the page with what is recorded now."""
    from sla_ref.files import whole  # not above: tools/mutants.py loads a changed sla_ref

    text = fill(PAGE.read_text(encoding="utf-8"), read(), sources())
    with whole(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    fill_page()
