"""Python-Markdown extension: the tags of the paper's steps, as [Eq. 5] or [Alg. 1 L9].

In the text a tag is a label and no link. Without that, two tags side by side in a docstring read as Markdown's
`[text][target]`.

A line `::: steps Alg. 1` becomes every step of Algorithm 1 in the tables of docs/paper.md, each with tabs: the formula,
and the code that carries the tag, read from the sources when the site is built.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from re import Match
from typing import NamedTuple
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "sla_ref"
RUNGS = {
    "reference": ["reference.py"],
    "torch": ["block_map.py", "backends/pytorch.py", "module.py"],
    "Triton": [f"backends/triton/{room}.py" for room in ("__init__", "sparse", "linear", "labels")],
    "Numba": ["backends/numba_cuda.py"],
}

TAG = r"\[((?:Eq|Alg)\. \d+(?: L\d+)?)\]"
LABEL = TAG + r"(?!\()"
BEFORE_LINKS_AFTER_CODE = 175
BEFORE_FENCES_AFTER_SNIPPETS = 31


# --- labels ----------------------------------------------------------------------------------------------------------


class _Tag(InlineProcessor):
    def handleMatch(self, m: Match[str], data: str) -> tuple[Element, int, int]:
        label = Element("span", {"class": "paper-tag"})
        label.text = m[1]
        return label, m.start(0), m.end(0)


# --- the tables of docs/paper.md -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A row of the tables: its tag, its formula in Markdown, and the functions named for it, as "file.py::function"."""

    tag: str
    formula: str
    places: list[str]


def read_steps() -> list[Step]:
    """All rows in the order of the page."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {TAG}(?:\([^)]*\))? \| (.*) \| ([^|]+) \|$", page, re.MULTILINE)
    return [Step(tag, formula, re.findall(r"`(\S+::\S+)`", where)) for tag, formula, where in rows]


# --- the code that carries a tag -------------------------------------------------------------------------------------


class Excerpt(NamedTuple):
    """Lines `first` to `last` of a file, counted from 1, of which `marked` carry the tag."""

    first: int
    last: int
    marked: frozenset[int]


def excerpts(text: str, tag: str) -> list[Excerpt]:
    """The pieces of a source file to show for a tag.

    In a function's docstring the tag stands for the function; in a comment of its own, for the lines down to the next
    empty one; beside a statement, for that statement and its neighbours.
    """
    lines = text.splitlines()
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    found: list[Excerpt] = []
    for number, line in enumerate(lines, start=1):
        if f"[{tag}]" not in line:
            continue
        inside = [node for node in functions if node.lineno <= number <= node.end_lineno]
        if not inside:
            continue  # in the docstring of a class or of the module
        function = max(inside, key=lambda node: node.lineno)
        statement = next((node for node in statements if node.lineno <= number <= node.end_lineno), None)
        if statement is function.body[0] and ast.get_docstring(function):
            found.append(Excerpt(function.lineno, function.end_lineno, frozenset()))
        elif statement is None:  # a comment
            last = number
            while last < function.end_lineno and lines[last].strip():
                last += 1
            found.append(Excerpt(number, last, frozenset({number})))
        else:
            first = max(function.body[0].end_lineno + 1, statement.lineno - 2)
            found.append(Excerpt(first, min(statement.end_lineno + 2, function.end_lineno), frozenset({number})))
    return list(_joined(found))


def _joined(found: list[Excerpt]) -> Iterator[Excerpt]:
    """Pieces that overlap or touch, as one."""
    held: Excerpt | None = None
    for piece in sorted(found):
        if held and piece.first <= held.last + 1:
            held = Excerpt(held.first, max(held.last, piece.last), held.marked | piece.marked)
        else:
            if held:
                yield held
            held = piece
    if held:
        yield held


# --- side by side ----------------------------------------------------------------------------------------------------


def side_by_side(step: Step) -> str:
    """A heading and the tabs of one step; a rung that has no such tag, or whose file is not there, has no tab."""
    tabs = [_tab("Formula", step.formula)]
    for rung, files in RUNGS.items():
        blocks = [block for file in files for block in _code_blocks(SOURCES / file, step.tag)]
        if blocks:
            tabs.append(_tab(rung, "\n".join(blocks)))
    return f"### {step.tag}\n\n" + "\n".join(tabs)


def _tab(title: str, body: str) -> str:
    return f'=== "{title}"\n\n' + "".join(f"    {line}\n" if line else "\n" for line in body.splitlines())


def _code_blocks(path: Path, tag: str) -> Iterator[str]:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for first, last, marked in excerpts(text, tag):
        lines = text.splitlines()[first - 1 : last]
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        code = "\n".join(line[indent:] for line in lines).strip("\n")
        highlight = " ".join(str(number - first + 1) for number in sorted(marked))
        options = f'title="{path.relative_to(SOURCES)}" linenums="{first}"' + f' hl_lines="{highlight}"' * bool(marked)
        yield f"```python {options}\n{code}\n```\n"


class _Steps(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [out for line in lines for out in self._expand(line)]

    def _expand(self, line: str) -> list[str]:
        if not (match := re.fullmatch(r"::: steps (.+)", line)):
            return [line]
        steps = [step for step in read_steps() if step.tag.startswith(match[1])]
        if not steps:
            raise ValueError(f"no tag of docs/paper.md begins with {match[1]!r}")
        return "\n".join(map(side_by_side, steps)).splitlines()


class PaperTags(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Tag(LABEL, md), "paper_tag", BEFORE_LINKS_AFTER_CODE)
        md.preprocessors.register(_Steps(md), "paper_steps", BEFORE_FENCES_AFTER_SNIPPETS)


def makeExtension(**options: object) -> PaperTags:
    return PaperTags(**options)
