"""docs/paper.md and the tags in the code say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools.paper_tags import read_steps

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sla_ref"
TAG = re.compile(r"\[((?:Eq|Alg)\. \d+(?: L\d+)?)\]")
BACKENDS = {
    "torch": [SOURCE / "backends" / "pytorch.py"],
    "triton": sorted((SOURCE / "backends" / "triton").glob("*.py")),
    "numba": [SOURCE / "backends" / "numba_cuda.py"],
}
FILES = [SOURCE / name for name in ("reference.py", "block_map.py", "attention.py", "module.py")]
FILES += [file for files in BACKENDS.values() for file in files]


def table() -> dict[str, list[str]]:
    """Tag -> the functions that the page names for it, as "file.py::function"."""
    return {step.tag: step.places for step in read_steps()}


def source_of(place: str) -> str:
    file, name = place.split("::")
    (path,) = SOURCE.rglob(file)
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"docs/paper.md names {place}, which does not exist")


def test_the_table_is_read():
    assert len(table()) > 20


@pytest.mark.parametrize("tag", table())
def test_every_place_that_the_page_names_has_the_tag(tag: str):
    assert table()[tag], "every step is somewhere"
    for place in table()[tag]:
        assert f"[{tag}]" in source_of(place), f"{place} has no [{tag}]"


def test_every_tag_in_the_code_is_on_the_page():
    for file in FILES:
        unknown = {f"[{tag}]" for tag in TAG.findall(file.read_text(encoding="utf-8"))} - {
            f"[{tag}]" for tag in table()
        }
        assert not unknown, f"{file.name} has tags that docs/paper.md does not explain: {unknown}"


def test_every_backend_has_every_line_of_the_algorithms():
    steps = {tag for tag in table() if tag.startswith("Alg")} - {"Alg. 1 L5", "Alg. 1 L6"}  # classified before
    for name, files in BACKENDS.items():
        assert steps <= {tag for file in files for tag in TAG.findall(file.read_text(encoding="utf-8"))}, name


def test_reference_has_every_equation():
    assert {tag for tag in table() if tag.startswith("Eq")} <= set(
        TAG.findall((SOURCE / "reference.py").read_text(encoding="utf-8"))
    )


def test_the_tests_that_the_page_names_exist():
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)`", page))
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
