"""Python-Markdown extension: a tag of the paper, as [Eq. 5] or [Alg. 1 L9], is a label and no link.

Without it, two tags side by side in a docstring read as Markdown's `[text][target]`.
"""

from re import Match
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

TAG = r"\[((?:Eq|Alg)\. \d+(?: L\d+)?)\]"
BEFORE_LINKS_AFTER_CODE = 175


class _Tag(InlineProcessor):
    def handleMatch(self, m: Match[str], data: str) -> tuple[Element, int, int]:
        label = Element("span", {"class": "paper-tag"})
        label.text = m[1]
        return label, m.start(0), m.end(0)


class PaperTags(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Tag(TAG, md), "paper_tag", BEFORE_LINKS_AFTER_CODE)


def makeExtension(**options: object) -> PaperTags:
    return PaperTags(**options)
