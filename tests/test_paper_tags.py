"""docs/paper.md, docs/paper-sla2.md and the tags in the code say the same."""

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
    raise AssertionError(f"the page names {place}, which does not exist")


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


# --- SLA2 ------------------------------------------------------------------------------------------------------------

SLA2_PAGE = (ROOT / "docs" / "paper-sla2.md").read_text(encoding="utf-8")
SLA2_STEPS = {
    tag: re.findall(r"`(\S+::\S+)`", where)
    for tag, where in re.findall(r"^\| (SLA2 Eq\. \d+) .* \| ([^|]+) \|$", SLA2_PAGE, re.MULTILINE)
}


@pytest.mark.parametrize("tag", SLA2_STEPS)
def test_every_place_that_the_page_of_sla2_names_has_the_tag(tag: str):
    assert SLA2_STEPS[tag], "every equation is somewhere"
    for place in SLA2_STEPS[tag]:
        assert f"[{tag}]" in source_of(place), f"{place} has no [{tag}]"


def test_every_tag_of_sla2_in_the_code_is_on_its_page():
    found = {
        tag
        for path in SOURCE.rglob("*.py")
        for tag in re.findall(r"\[(SLA2 [^\]]+)\]", path.read_text(encoding="utf-8"))
    }
    assert found == set(SLA2_STEPS)


def test_the_tests_that_the_page_of_sla2_names_exist():
    named = re.findall(r"`(?:(test_\w+\.py)(?:::(\w+))?|(test_\w+))`", SLA2_PAGE)
    assert len(named) > 12
    for file, of_file, of_reference in named:
        text = (ROOT / "tests" / (file or "test_reference_sla2.py")).read_text(encoding="utf-8")
        assert f"def {of_file or of_reference}(" in text or (file and not of_file), (file, of_file, of_reference)
