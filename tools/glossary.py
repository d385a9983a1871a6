"""Python-Markdown extension: the glossary of docs/notation.md as hover text wherever its words stand."""

import re
from pathlib import Path

from markdown.extensions.abbr import AbbrExtension

PAGE = Path(__file__).parents[1] / "docs" / "notation.md"


def read_glossary() -> dict[str, str]:
    """Word -> meaning, also for its plural with an s."""
    _, glossary = PAGE.read_text(encoding="utf-8").split("## Glossary")
    entries = re.findall(r"^(\S.*)\n:   (.+)$", glossary, re.MULTILINE)
    return {word + ending: meaning for word, meaning in entries for ending in ("", "s")}


def makeExtension(**options: object) -> AbbrExtension:
    return AbbrExtension(glossary=read_glossary(), **options)
