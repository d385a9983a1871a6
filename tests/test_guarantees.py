"""docs/guarantees.md: its promises have tests, and its evidence has the cases of these tests, from these sources."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import takewhile
from types import SimpleNamespace

import pytest
from evidence import Recorder, worst

from sla_ref import backends, testing
from tools.guarantees import (
    FOLDER,
    PAGE,
    ROOT,
    Recording,
    code,
    fill,
    named_in,
    read,
    sources,
    split,
    table_of_mutants,
    wilson,
)

NOW = {"torch": "a", "the operator": "b"}
MACHINE = {"date": "2026-01-02", "device": "CPU", "cpu": "A CPU", "versions": {"torch": "2.11"}, "sources": NOW}
CASE = {"test": "test_x.py::test_y", "case": "z", "outcome": "passed"}
NUMBERS = {
    "backend": "torch",
    "dtype": "float32",
    "checks": 9,
    "largest": 2e-7,
    "rms": 1e-7,
    "plain": 1.5,
    "budget": 0.5,
}


# --- the committed page and evidence ---------------------------------------------------------------------------------


def test_every_promise_names_tests_that_exist():
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    promises = [row for row in rows if row.count(" | ") == 3 and not row.startswith("| promise |")]
    assert all(named_in(row) for row in promises)
    for test in sorted(named_in("\n".join(promises))):
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_page_shows_the_committed_evidence():
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page, read(), sources()) == page, "run python tools/guarantees.py"


def test_the_evidence_of_the_cpu_is_of_these_sources():
    assert read()["cpu"].about["sources"] == sources(), "the code has changed: run make evidence"


def test_the_evidence_has_the_cases_of_the_tests(tmp_path):
    """Except for those of a backend that cannot run here."""
    files = sorted({f"tests/{test.split('::')[0]}" for test in named_in(PAGE.read_text(encoding="utf-8"))})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run([*command, f"--evidence={tmp_path}"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {split(line) for line in done.stdout.splitlines() if line.startswith("tests/")}
    unusable = {name for name, reason in backends.list_backends().items() if reason is not None}
    recorded = {(line["test"], line["case"]): line.get("backend") for line in read()["cpu"].cases}
    assert collected - recorded.keys() == set(), "not in the evidence: run make evidence"
    assert {case for case in recorded.keys() - collected if recorded[case] not in unusable} == set(), "no longer a case"
    assert not any(tmp_path.iterdir()), "a run without a test records nothing"


# --- sources ---------------------------------------------------------------------------------------------------------

SOURCE = '''
"""A module."""
X = 1
"""What X is."""
def f(a, b=None):
    """Adds."""
    return f"{a:>{b}}"  # a comment
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A module.", "Another text.", True),
        ('    """Adds."""\n', "", True),
        ("  # a comment", "", True),
        ("What X is.", "X.", True),
        ("X = 1", "X = (1)\n\n", True),
        ("X = 1", "X = 2", False),
        ("X = 1", "X = True", False),
        ("b=None", "b=0", False),
        ("b=None", "b", False),
        ("{b}", "{a}", False),
        (":>", ":<", False),
        ("return ", "", False),
    ],
)
def test_the_hash_is_of_the_code(old, new, same):
    assert SOURCE.count(old) == 1
    before, after = (code(ast.parse(text)) for text in (SOURCE, SOURCE.replace(old, new)))
    assert (before == after) is same


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("backends/pytorch.py", ["torch"]),
        ("backends/triton/sparse.py", ["triton"]),
        ("reference.py", ["the operator"]),
        ("lab/model.py", ["what is around it"]),
    ],
)
def test_each_part_has_its_own_hash(file, part, tmp_path):
    for name in ("backends/pytorch.py", "backends/triton/sparse.py", "reference.py", "lab/model.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1", encoding="utf-8")
    before = sources(tmp_path)
    (tmp_path / file).write_text("x = 2", encoding="utf-8")
    assert [name for name, digest in sources(tmp_path).items() if digest != before[name]] == part


# --- the page --------------------------------------------------------------------------------------------------------

ROW = "| We promise. | always |{}| `test_x.py::test_y` |"


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([CASE], "CPU: 1 case"),
        ([CASE, CASE | NUMBERS], "CPU: 2 cases, at most 50 % of the budget"),
        ([CASE | {"outcome": "skipped"}], "not recorded: needs a GPU"),
        ([CASE | {"test": "test_x.py::test_other"}], "not recorded: needs a GPU"),
    ],
)
def test_a_row_says_what_its_tests_saw(cases, expected):
    filled = fill(ROW.format(" "), {"cpu": Recording(MACHINE, cases)}, NOW)
    assert filled == ROW.format(f" {expected} ")
    assert fill(filled, {"cpu": Recording(MACHINE, cases)}, NOW) == filled


def test_evidence_that_is_older_than_the_code_says_so():
    page = f"{ROW.format(' ')}\n<!-- evidence: devices -->\n<!-- end of evidence -->"
    gpu = Recording(MACHINE | {"device": "A GPU", "sources": NOW | {"torch": "old"}}, [CASE | NUMBERS])
    filled = fill(page, {"cpu": Recording(MACHINE, [CASE]), "cuda": gpu}, NOW)
    assert "| CPU: 1 case; GPU, earlier code: 1 case, at most 50 % of the budget |" in filled
    assert "**CPU**: recorded on 2026-01-02 with this code, on A CPU (torch 2.11)." in filled
    assert "**GPU**: recorded on 2026-01-02, before the code of torch changed, on A GPU (torch 2.11)." in filled
    assert "**GPU**: not recorded with this code." in fill(page, {"cpu": Recording(MACHINE, [CASE])}, NOW)


def test_the_tables_show_medians_the_largest_budget_and_every_fault():
    faults = [{"test": "test_x.py::test_a_fault_is_caught", "case": name, "outcome": "passed"} for name in ("b", "a")]
    others = [CASE | NUMBERS | {"rms": 5e-8, "budget": 0.7}, CASE | NUMBERS | {"rms": 9.0, "plain": 900.0}]
    evidence = {"cpu": Recording(MACHINE, [CASE | NUMBERS, *others, *faults])}
    places = "".join(f"<!-- evidence: {name} -->\n<!-- end of evidence -->\n" for name in ("errors", "faults"))
    filled = fill(places, evidence, NOW)
    assert "| CPU | torch | float32 | 3 | 27 | 2.0e-07 | 1.0e-07 | 1.5 | 70 % |" in filled
    assert "- `test_x.py::test_a_fault_is_caught`, 2: b; a." in filled


def test_the_table_of_mutants():
    row = {"commit": "abc", "mutants": 1200, "listed": 1, "run": 100, "caught_at_first": 95, "caught": 99}
    found = {"about": MACHINE | {"seed": 3}, "modules": {"m": row | {"survived": ["m.py:1 f: a  ->  b"]}}}
    lines = table_of_mutants(found, {"m": True})
    assert lines[0] == "Last recorded on 2026-01-02, on A CPU (torch 2.11), with seed 3."
    numbers = "1,200 | 1 | 100 | 95 (95.0 %) | 88.8 to 97.8 % | 99 (99.0 %) |"
    assert f"| `m` | abc | {numbers}" in lines
    assert f"| all | | {numbers}" in lines
    assert "- `m.py:1 f: a  ->  b`" in lines
    assert f"| `m` | abc, earlier code | {numbers}" in table_of_mutants(found, {"m": False})
    del found["modules"]["m"]["survived"][0]
    assert [*table_of_mutants(found, {"m": True}), ""] == list(takewhile(lambda line: "<details" not in line, lines))
    small = {"commit": "abc", "mutants": 400, "listed": 0, "run": 10, "caught_at_first": 10, "caught": 10}
    found["modules"]["n"] = small | {"survived": []}
    total = table_of_mutants(found, {"m": True, "n": True})[-1]
    assert "| 1,600 | 1 | 110 | 105 (95.5 %) | 84.7 to 98.4 % | 109 (99.1 %) |" in total, "3/4 of m's and 1/4 of n's"


@pytest.mark.parametrize(
    ("hits", "tries", "low", "high"),
    [(95, 100, 0.8882, 0.9785), (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (1, 2, 0.0945, 0.9055)],
)
def test_wilsons_interval(hits, tries, low, high):
    assert wilson(hits, tries) == pytest.approx((low, high), abs=5e-5)


# --- the recorder ----------------------------------------------------------------------------------------------------


def report(when: str, outcome: str = "passed", **properties: object) -> SimpleNamespace:
    name = "tests/test_x.py::test_y[z]"
    skipped = outcome == "skipped"
    return SimpleNamespace(
        nodeid=name, when=when, outcome=outcome, skipped=skipped, user_properties=list(properties.items())
    )


def test_worst_is_the_largest_of_each_number():
    errors = testing.Error(1e-7, 2e-7, float("nan"), 0.25), testing.Error(3e-7, 1e-8, 2.0, 0.123456)
    checks = [testing.Check("sparse", True, case="ragged, float32", error=error) for error in errors]
    checks.append(replace(checks[0], error=None))
    expected = {"dtype": "float32", "checks": 3, "largest": 3e-7, "rms": 2e-7, "budget": 0.25}
    assert worst(checks) == expected


def test_a_case_is_a_line_and_a_failure_writes_nothing(tmp_path):
    recorder = Recorder(tmp_path / "new")
    for each in (report("setup"), report("call", backend="torch", errors={"budget": 0.5}), report("teardown")):
        recorder.pytest_runtest_logreport(each)
    controller, worker = (
        SimpleNamespace(config=SimpleNamespace()),
        SimpleNamespace(config=SimpleNamespace(workerinput=1)),
    )
    recorder.pytest_sessionfinish(controller, pytest.ExitCode.TESTS_FAILED)
    recorder.pytest_sessionfinish(worker, pytest.ExitCode.OK)
    assert not recorder.path.exists()
    recorder.pytest_sessionfinish(controller, pytest.ExitCode.OK)
    about, *cases = map(json.loads, recorder.path.read_text(encoding="utf-8").splitlines())
    assert about["sources"] == sources() and re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert cases == [CASE | {"backend": "torch", "budget": 0.5}]


def test_a_skipped_case_is_a_line():
    recorder = Recorder(FOLDER)
    recorder.pytest_runtest_logreport(report("setup", "skipped", backend="triton"))
    assert list(recorder.lines.values()) == [CASE | {"outcome": "skipped", "backend": "triton"}]
