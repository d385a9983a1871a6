"""Python-Markdown extension: the tags of the paper's steps, as [Eq. 5] or [Alg. 1 L9], and the page that shows them.

In the text a tag becomes a link to its step on the page "Side by side". The link is one of mkdocs-autorefs, which finds
the page from any other, and from docstrings too.

A line `::: steps Alg. 1` becomes every step of Algorithm 1 in the tables of docs/paper.md: in words and as a formula on
the left, and on the right the code that carries the tag, on each rung, read from the sources when the site is built.
A line `::: rungs` becomes the buttons that choose the rung to be shown (with CSS only, in docs/stylesheets/extra.css).
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
    "equations": ["reference.py"],
    "torch": ["block_map.py", "module.py", "backends/pytorch.py"],
    "Triton": ["module.py", *sorted(f"backends/triton/{room.name}" for room in SOURCES.glob("backends/triton/*.py"))],
    "Numba": ["block_map.py", "module.py", "backends/numba_cuda.py"],
}

TAG = r"\[((?:Eq|Alg)\. \d+(?: L\d+)?)\]"
LABEL = TAG + r"(?!\()"
BEFORE_LINKS_AFTER_CODE = 175
BEFORE_FENCES_AFTER_SNIPPETS = 31


# --- labels ----------------------------------------------------------------------------------------------------------


class _Tag(InlineProcessor):
    def handleMatch(self, m: Match[str], data: str) -> tuple[Element, int, int]:
        label = Element("autoref", {"identifier": anchor(m[1]), "class": "paper-tag"})
        label.text = m[1]
        return label, m.start(0), m.end(0)


def anchor(tag: str) -> str:
    """The id of a step on the page: alg-1-l9 for Alg. 1 L9."""
    return tag.lower().replace(". ", "-").replace(" ", "-")


# --- the tables of docs/paper.md -------------------------------------------------------------------------------------

ROW = rf"^\| {TAG} \*\*(.+?)\.\*\* (.+?) \| (.+?) \| (?:([^|`]+) \| )?([^|]+) \|$"


class Step(NamedTuple):
    """A row of the tables. Title, reason and formula are Markdown."""

    tag: str
    title: str
    reason: str
    formula: str
    part_of: list[str]
    """The equations that a line of the algorithms belongs to."""
    places: list[str]
    """The functions that take the step, as "file.py::function"."""


def read_steps() -> list[Step]:
    """All rows in the order of the page."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    return [
        Step(*words, re.findall(TAG, part_of), re.findall(r"`(\S+::\S+)`", where))
        for *words, part_of, where in re.findall(ROW, page, re.MULTILINE)
    ]


# --- the code that carries a tag -------------------------------------------------------------------------------------

MOST = 10  # lines of an excerpt
AROUND = 2  # lines on either side of a statement


class Excerpt(NamedTuple):
    """Lines `first` to `last` of a file, counted from 1, of which `marked` carry the tag."""

    first: int
    last: int
    marked: frozenset[int]


def excerpts(text: str, tag: str) -> list[Excerpt]:
    """The pieces of a source file to show for a tag, of MOST lines at most.

    At a statement the tag marks that statement, which is shown with its neighbours; in a comment of its own, for
    the lines down to the next empty one; in the docstring of a short function, for the function. In the docstring of a
    long one it says what the function is about, and not where the step is.
    """
    if f"[{tag}]" not in text:
        return []
    lines = text.splitlines()
    nodes = list(ast.walk(ast.parse(text)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    simple = [node for node in nodes if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    statement_at = {number: node for node in simple for number in range(node.lineno, node.end_lineno + 1)}
    found: list[Excerpt] = []
    for number, line in enumerate(lines, start=1):
        inside = [node for node in functions if node.lineno <= number <= node.end_lineno]
        if f"[{tag}]" not in line or not inside:  # outside it is in the docstring of a class or of the module
            continue
        function = max(inside, key=lambda node: node.lineno)
        docstring = function.body[0] if ast.get_docstring(function) else None
        statement = statement_at.get(number)
        if statement is None:  # a comment
            first = last = number
            while last < min(function.end_lineno, number + MOST - 1) and lines[last].strip():
                last += 1
        elif statement is not docstring:
            start = docstring.end_lineno + 1 if docstring else function.body[0].lineno
            first = max(start, statement.lineno - AROUND)
            last = min(function.end_lineno, statement.end_lineno + AROUND)
            first = statement_at[first].lineno if first in statement_at else first
            last = statement_at[last].end_lineno if last in statement_at else last
        elif function.end_lineno - function.lineno < MOST:
            first, last = function.lineno, function.end_lineno
        else:
            continue
        while not lines[first - 1].strip():
            first += 1
        while not lines[last - 1].strip():
            last -= 1
        found.append(Excerpt(first, last, frozenset({number})))
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


def buttons() -> str:
    """The choice of the rung, as HTML. Without a choice each step shows the first rung that has it."""
    choices = {"first": "first rung with the step"} | {rung.lower(): rung for rung in RUNGS}
    fields = "".join(
        f'<input type="radio" name="rung" id="rung-{value}" value="{value}"{" checked" * (value == "first")}>'
        f'<label for="rung-{value}">{text}</label>'
        for value, text in choices.items()
    )
    return f'<fieldset class="rungs"><legend>Code</legend>{fields}</fieldset>'


def side_by_side(step: Step) -> str:
    """One step of the page, as Markdown."""
    panes, kind = [], "first"
    for rung, files in RUNGS.items():
        blocks = [block for file in files for block in _code_blocks(rung, file, step.tag)]
        if blocks:
            panes.append(_box(f"rung {rung.lower()} {kind}", *blocks))
            kind = ""
        else:
            panes.append(_box(f"rung {rung.lower()}", _elsewhere(rung, step)))
    heading = f"### [{step.tag}] {step.title} {{ #{anchor(step.tag)} }}"
    words = _box("words", heading, step.reason, f"{step.formula}\n{{ .formula }}")
    return _box("step", words, _box("code", *panes, attributes=" data-search-exclude"))


def _box(kind: str, *parts: str, attributes: str = "") -> str:
    return f'<div class="{kind.strip()}"{attributes} markdown>\n\n' + "\n\n".join(parts) + "\n\n</div>"


def _code_blocks(rung: str, file: str, tag: str) -> Iterator[str]:
    path = SOURCES / file
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for first, last, marked in excerpts(text, tag):
        lines = text.splitlines()[first - 1 : last]
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        code = "\n".join(line[indent:] for line in lines)
        place = next(node for node in ast.parse(text).body if node.lineno <= first <= node.end_lineno).name
        highlight = " ".join(str(number - first + 1) for number in sorted(marked))
        yield f'```python title="{rung}: {file}::{place}, line {first}" hl_lines="{highlight}"\n{code}\n```'


def _elsewhere(rung: str, step: Step) -> str:
    """Where a rung takes a step that has no tag there: torch has no equation in one place, the equations no lines."""
    if not step.part_of:
        lines = [line.tag for line in read_steps() if line.tag.startswith("Alg. 1") and step.tag in line.part_of]
        return f"{rung} does this line by line: {', '.join(f'[{tag}]' for tag in lines)}."
    whole = " and ".join(f"[{tag}]" for tag in step.part_of)
    if step.tag.startswith("Alg. 2"):
        return f"In the {rung}, autograd does this: it differentiates {whole}."
    return f"In the {rung}, this is a part of {whole}."


class _Steps(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [out for line in lines for out in self._expand(line)]

    def _expand(self, line: str) -> list[str]:
        if line == "::: rungs":
            return [buttons()]
        if not (match := re.fullmatch(r"::: steps (.+)", line)):
            return [line]
        steps = [step for step in read_steps() if step.tag.startswith(match[1])]
        if not steps:
            raise ValueError(f"no tag of docs/paper.md begins with {match[1]!r}")
        return "\n\n".join(map(side_by_side, steps)).splitlines()


class PaperTags(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Tag(LABEL, md), "paper_tag", BEFORE_LINKS_AFTER_CODE)
        md.preprocessors.register(_Steps(md), "paper_steps", BEFORE_FENCES_AFTER_SNIPPETS)


def makeExtension(**options: object) -> PaperTags:
    return PaperTags(**options)
