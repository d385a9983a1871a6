"""Mutation testing: what is changed, that a run goes on where it stopped, its record, and the listed mutants."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import mutants

SOURCE = '''\
"""Docstring."""

def f(a: int = 1, *rest: float, b: bool | None = None) -> int:
    """Docstring é."""
    assert a is not None
    if TYPE_CHECKING:
        import b
    with torch.no_grad():
        if a < 2 and not rest:
            raise ValueError(f"a must be {a + 1}")
        é = torch.zeros(2, dtype=a); é += a[1:].to(b)
    warn(é, é, stacklevel=2)
    return min(
        é, 0.5
    )
'''
CHANGED = [
    "def f(a: int = 2, *rest: float, b: bool | None = None) -> int:",
    "with (__import__('contextlib').nullcontext()):",
    "if (not (a < 2 and (not rest))):",
    "if (a < 2 or not rest):",
    "if (a <= 2) and not rest:",
    "if a < 3 and not rest:",
    "if a < 2 and (rest):",
    "pass",
    "é = (torch.zeros(2)); é += a[1:].to(b)",
    "é = (torch.ones)(2, dtype=a); é += a[1:].to(b)",
    "é = torch.zeros(3, dtype=a); é += a[1:].to(b)",
    "é = torch.zeros(2, dtype=a); pass",
    "é = torch.zeros(2, dtype=a); é += (a[1:])",
    "é = torch.zeros(2, dtype=a); é += a[:].to(b)",
    "é = torch.zeros(2, dtype=a); é += a[2:].to(b)",
    "pass",
    "return (max)(",
    "é, 1.0",
]


def test_every_kind_of_change():
    """No annotation, docstring or message changes, and nothing that is there for mypy."""
    made = mutants.mutants_of("m", SOURCE)
    assert [mutant.name[3] for mutant in made] == CHANGED
    for mutant in made:
        ast.parse(mutant.source)
        lines = set(mutant.source.splitlines()) - set(SOURCE.splitlines())
        assert [line.strip() for line in lines] == [mutant.name[3]]


def test_the_order_depends_on_the_seed():
    first, again, other = (mutants.in_order(seed, ["feature_maps"]) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A package of one module with two mutants, and a test that one of them survives."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "m.py").write_text("def f(a):\n    return a[1:]\n", encoding="utf-8")

    class Tests:
        clean = 0.1

        def __init__(self, module, tree):
            self.tree = tree

        def run(self, limit):
            namespace = {}
            exec((self.tree / "src" / "m.py").read_text(encoding="utf-8"), namespace)
            assert mutants.source_of("m") == (tmp_path / "src" / "m.py").read_text(encoding="utf-8")
            return "passed" if namespace["f"]([1]) == [] else "FAILED", 0.1

    new = {"ROOT": tmp_path, "PACKAGE": "src", "TESTS": {"m": "m"}, "Tests": Tests, "MUTANTS": tmp_path / "found.json"}
    new["fill_page"] = lambda: None
    for name, value in new.items():
        monkeypatch.setattr(mutants, name, value)
    monkeypatch.setattr(mutants, "copy_of_the_tree", lambda to: shutil.copytree(tmp_path / "src", to / "src"))
    return tmp_path


def call(monkeypatch, *options: object) -> None:
    monkeypatch.setattr("sys.argv", ["mutants.py", *map(str, options)])
    mutants.main()


def test_a_run_stays_off_the_tree_and_goes_on_where_it_stopped(small, monkeypatch):
    out = small / "found.jsonl"
    for number in (1, 2, 2):
        call(monkeypatch, "--out", out, "--count", 1)
        assert len(out.read_text(encoding="utf-8").splitlines()) == number
    call(monkeypatch, "--out", out, "--count", 1, "--again")
    assert {name[3]: result for name, result in mutants.results(out).items()} == {
        "return a[:]": ["FAILED"],
        "return a[2:]": ["passed", "passed"],
    }
    for text, number in (("def f(a):  # a comment\n    return a[1:]\n", 2), ("def f(b):\n    return b[1:]\n", 0)):
        (small / "src" / "m.py").write_text(text, encoding="utf-8")
        assert len(mutants.results(out)) == number, "lines of other code do not count"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.check_output(["git", "-C", str(folder), *who, *arguments], encoding="utf-8").strip()


def test_what_ran_is_recorded_with_its_commit(small, monkeypatch):
    out, found = small / "found.jsonl", small / "found.json"
    git(small, "init", "-q")
    git(small, "add", "src")
    git(small, "commit", "-q", "-m", "1")
    call(monkeypatch, "--out", out, "--record")
    first = json.loads(found.read_text(encoding="utf-8"))
    row = first["modules"]["m"]
    counts = {"mutants": 2, "listed": 0, "run": 2, "caught_at_first": 1, "caught": 1}
    assert row.items() >= counts.items() and row["commit"] == git(small, "rev-parse", "--short", "HEAD")
    assert row["survived"] == ["m.py:2 f: return a[1:]  ->  return a[2:]"]
    assert first["about"]["seed"] == 0 and first["about"]["versions"]["torch"]

    (small / "src" / "m.py").write_text("def f(b):\n    return b[1:]\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="commit src and tests first"):
        call(monkeypatch, "--out", out, "--count", 0, "--record")
    git(small, "commit", "-q", "-a", "-m", "2")
    call(monkeypatch, "--out", out, "--count", 0, "--record")
    assert json.loads(found.read_text(encoding="utf-8"))["modules"] == first["modules"], "nothing ran with this code"


@pytest.mark.long
def test_tests_run_in_a_process_of_their_own(monkeypatch, tmp_path):
    """The quickest first, and earlier still those that have caught a mutant; and each time with the source of then."""
    for folder in ("src", "tests"):
        (tmp_path / folder).mkdir()
    module, tests = tmp_path / "src" / "module_of_a_test.py", tmp_path / "tests" / "test_m.py"
    tests.write_text(
        """
import os, signal, time
import module_of_a_test as m
def test_slow():
    time.sleep(1)
    assert m.RIGHT < 2
def test_quick():
    assert m.RIGHT < 1
def test_ends():
    time.sleep(0.2)
    if m.RIGHT == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(100 * (m.RIGHT == 4))
""",
        encoding="utf-8",
    )
    for name, value in mutants.SIMULATED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mutants, "TESTS", {"m": "m"})
    module.write_text("RIGHT = 0", encoding="utf-8")
    made = mutants.Tests("m", tmp_path)
    assert made.run()[0] == "passed"
    for value, result in ((1, "FAILED tests/test_m.py::test_quick"), (2, "FAILED tests/test_m.py::test_quick")):
        module.write_text(f"RIGHT = {value}", encoding="utf-8")
        assert made.run()[0].startswith(result)
    tests.write_text(tests.read_text(encoding="utf-8").replace("m.RIGHT < 1", "True"), encoding="utf-8")
    assert made.run()[0].startswith("FAILED tests/test_m.py::test_slow")
    for value, limit, result in ((3, None, "crashed with signal 11"), (4, 10, "too slow")):
        module.write_text(f"RIGHT = {value}", encoding="utf-8")
        assert made.run(limit)[0] == result
    module.write_text("RIGHT = 2", encoding="utf-8")
    with pytest.raises(RuntimeError, match="the tests of m fail without a mutant"):
        mutants.Tests("m", tmp_path)


def test_a_listed_mutant_exists_and_has_a_reason():
    listed = mutants.listed()
    names = {mutant.name for mutant in mutants.in_order(0, {name[0] for name in listed})}
    assert not listed.keys() - names, "the source has changed: mend these rows of tools/mutants.toml"
    assert all(listed.values())


def test_modules_and_their_tests_exist():
    for module, tests in mutants.TESTS.items():
        assert mutants.source_of(module)
        assert all((mutants.ROOT / "tests" / f"test_{name}.py").is_file() for name in tests.split())
