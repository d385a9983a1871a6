"""Python-Markdown extension: the glossary of docs/notation.md as hover text wherever its words stand.

The names of the three classes are underlined in their colours (docs/stylesheets/extra.css).
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions.abbr import AbbrExtension, AbbrTreeprocessor

PAGE = Path(__file__).parents[1] / "docs" / "notation.md"
CLASSES = ("critical", "marginal", "negligible")


def read_glossary() -> dict[str, str]:
    """Word -> meaning, also for its plural with an s."""
    _, glossary = PAGE.read_text(encoding="utf-8").split("## Glossary")
    entries = re.findall(r"^(\S.*)\n:   (.+)$", glossary, re.MULTILINE)
    return {word + ending: meaning for word, meaning in entries for ending in ("", "s")}


class _Words(AbbrTreeprocessor):
    def create_element(self, title: str, text: str, tail: str) -> Element:
        word = super().create_element(title, text, tail)
        if text in CLASSES:
            word.set("class", f"sla-{text}")
        return word


class Glossary(AbbrExtension):
    def extendMarkdown(self, md: Markdown) -> None:
        super().extendMarkdown(md)
        md.treeprocessors.register(_Words(md, self.abbrs), "abbr", 7)  # in place of the one that was just registered


def makeExtension(**options: object) -> Glossary:
    return Glossary(glossary=read_glossary(), **options)
