"""Markdown extension: how long a way through the site takes, in docs/start.md.

In a section of that page, {minutes} becomes the reading time of the pages linked before it, back to the last {minutes},
and {hours} becomes that of all pages linked in the section. A link to a part of a page is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

from tools import build_tutorials

DOCS = Path(__file__).parents[1] / "docs"
PAGE = re.compile(r"\]\(([\w/-]+\.md)\)")
BEFORE_EVERYTHING = 100


def minutes(page: str) -> float:
    """Of a page named as in a link of docs/start.md. Folded tables are left out."""
    if page.startswith("tutorials/"):
        return build_tutorials.minutes(build_tutorials.SCRIPTS / f"{Path(page).stem}.py")
    text = re.sub(r"<details.*?</details>", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    code = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    lines = sum(block.count("\n") - 1 for block in code.findall(text))
    return len(code.sub("", text).split()) / build_tutorials.WORDS + lines / build_tutorials.LINES


def in_words(pages: Iterable[str]) -> str:
    """The time for these pages together: minutes in steps of five, from 90 on hours in steps of a half."""
    total = sum(map(minutes, pages))
    if total < 90:
        return f"{max(5, 5 * round(total / 5))} minutes"
    whole, half = divmod(round(total / 30), 2)
    return f"{whole}{'½' * half} hours"


def with_times(section: str) -> str:
    """A section of the page with its times filled in."""
    parts = section.split("{minutes}")
    times = [in_words(PAGE.findall(part)) for part in parts[:-1]]
    text = "".join(part + time for part, time in zip(parts, [*times, ""], strict=True))
    # By a function, which runs only where there is something to fill in: links of other pages start in other folders.
    return re.sub(r"\{hours\}", lambda _: in_words(PAGE.findall(section)), text)


class _Times(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return "".join(map(with_times, re.split(r"^(?=## )", "\n".join(lines), flags=re.MULTILINE))).split("\n")


class ReadingTimes(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Times(md), "reading_times", BEFORE_EVERYTHING)


def makeExtension(**options: object) -> ReadingTimes:
    return ReadingTimes(**options)
