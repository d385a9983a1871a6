"""Python-Markdown extension: puts an SVG of docs/experiments/ or docs/performance/ into the page, in its text colour.

In Markdown it is an ordinary image, which also shows elsewhere; there its ink is a grey for light and dark.
"""

import re
from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

from tools.build_tutorials import for_page

DOCS = Path(__file__).parents[1] / "docs"
IMAGE = re.compile(r"^!\[([^\]]*)\]\(((?:experiments|performance)/[\w.-]+\.svg)\)$")
INK = "#7d8590"  # as in experiments/figures.py
BEFORE_HTML_BLOCKS = 26


class _Figures(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [part for line in lines for part in IMAGE.sub(self.svg, line).split("\n")]

    def svg(self, match: re.Match[str]) -> str:
        return for_page((DOCS / match[2]).read_text(encoding="utf-8"), INK, match[1])


class Figures(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Figures(md), "figures", BEFORE_HTML_BLOCKS)


def makeExtension(**options: object) -> Figures:
    return Figures(**options)
