"""Python-Markdown extension: the glossary of docs/notation.md as hover text, where a section first uses a word of it.

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
HEADINGS = ("h1", "h2", "h3")


def read_glossary() -> dict[str, str]:
    """Word -> meaning, also for its plural with an s."""
    _, glossary = PAGE.read_text(encoding="utf-8").split("## Glossary")
    entries = re.findall(r"^(\S.*)\n:   (.+)$", glossary, re.MULTILINE)
    return {word + ending: meaning for word, meaning in entries for ending in ("", "s")}


class _Words(AbbrTreeprocessor):
    def run(self, root: Element) -> None:
        super().run(root)
        explained: set[str] = set()
        for element in root.iter():
            if element.tag in HEADINGS:
                explained.clear()
                for word in element.iter("abbr"):
                    _plain(word)
            elif element.tag == "abbr":
                if element.get("title") in explained:
                    _plain(element)
                explained.add(element.get("title", ""))

    def create_element(self, title: str, text: str, tail: str) -> Element:
        word = super().create_element(title, text, tail)
        if text in CLASSES:
            word.set("class", f"sla-{text}")
        return word


def _plain(word: Element) -> None:
    word.tag = "span"
    word.attrib.clear()


class Glossary(AbbrExtension):
    def extendMarkdown(self, md: Markdown) -> None:
        super().extendMarkdown(md)
        md.treeprocessors.register(_Words(md, self.abbrs), "abbr", 7)  # in place of the one that was just registered


def makeExtension(**options: object) -> Glossary:
    return Glossary(glossary=read_glossary(), **options)
