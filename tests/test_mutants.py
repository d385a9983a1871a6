"""Mutation testing: what is changed, that a run goes on where it stopped, and that the listed mutants exist."""

from __future__ import annotations

import ast
import shutil

from tools import mutants

SOURCE = '''\
"""Docstring."""

def f(a: int = 1, *rest: float, b: bool | None = None) -> int:
    """Docstring é."""
    with torch.no_grad():
        if a < 2 and not rest:
            raise ValueError(f"a must be {a + 1}")
        é = torch.zeros(2, dtype=a); é += a[1:].to(b)
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
    "return (max)(",
    "é, 1.0",
]


def test_every_kind_of_change():
    """No annotation, docstring or message changes."""
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


def test_a_run_stays_off_the_tree_and_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """With a test that one of two mutants survives."""
    source = "def f(a):\n    return a[1:]\n"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "m.py").write_text(source, encoding="utf-8")

    def run_tests(module, tree, limit=None):
        namespace = {}
        exec((tree / "src" / "m.py").read_text(encoding="utf-8"), namespace)
        assert mutants.source_of("m") == source
        return "passed" if namespace["f"]([1]) == [] else "FAILED", 0.1

    for name, value in {"ROOT": tmp_path, "PACKAGE": "src", "TESTS": {"m": "m"}, "run_tests": run_tests}.items():
        monkeypatch.setattr(mutants, name, value)
    monkeypatch.setattr(mutants, "copy_of_the_tree", lambda to: shutil.copytree(tmp_path / "src", to / "src"))

    out, options = tmp_path / "found.jsonl", ["mutants.py", "--out", str(tmp_path / "found.jsonl"), "--count", "1"]
    monkeypatch.setattr("sys.argv", options)
    for number in (1, 2, 2):
        mutants.main()
        assert len(out.read_text(encoding="utf-8").splitlines()) == number
    assert {name[3]: result for name, result in mutants.results(out).items()} == {
        "return a[:]": "FAILED",
        "return a[2:]": "passed",
    }
    (tmp_path / "src" / "m.py").write_text(source.replace("a", "b"), encoding="utf-8")
    assert not mutants.results(out), "lines of another source do not count"


def test_a_listed_mutant_exists_and_has_a_reason():
    listed = mutants.listed()
    names = {mutant.name for mutant in mutants.in_order(0, {name[0] for name in listed})}
    assert not listed.keys() - names, "the source has changed: mend these rows of tools/mutants.toml"
    assert all(listed.values())


def test_modules_and_their_tests_exist():
    for module, tests in mutants.TESTS.items():
        assert mutants.source_of(module)
        assert all((mutants.ROOT / "tests" / f"test_{name}.py").is_file() for name in tests.split())
