r"""Python-Markdown extension: LaTeX between dollars becomes MathML while the site is built: `$x^2$`, or as a paragraph

    $$
    O = O^s + \mathrm{Proj}(O^l)
    $$

The browser then needs neither a script nor a network. MathML Core, which browsers implement, has no `mathvariant` and
no `columnalign`: math-core writes letters such as a double-struck R as their Unicode characters, and alignment as CSS.
LaTeX that it does not know fails the build. A dollar sign in the text is written `\$`, or has a space next to it.
"""

from re import Match

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexError, LatexToMathML

DISPLAY = r"(?<!\\)\$\$(.+?)\$\$"
INLINE = r"(?<![\\$])\$(?![\s$])([^$]*?)(?<![\s\\])\$(?!\d)([,.;:!?)]*)"
AFTER_CODE_BEFORE_ESCAPES = 185
CONVERTER = LatexToMathML(fancy_error=False)


class _Maths(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, *, display: bool) -> None:
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, m: Match[str], data: str) -> tuple[str, int, int]:
        html = to_mathml(m[1], display=self.display)
        if not self.display:  # no line begins with the comma after a formula
            html = f'<span class="maths">{html}{m[2]}</span>'
        return self.md.htmlStash.store(html), m.start(0), m.end(0)


def to_mathml(latex: str, *, display: bool) -> str:
    """A formula as MathML; raises ValueError with the formula where it is not understood."""
    try:
        return CONVERTER.convert_with_local_state(latex.strip(), displaystyle=display)
    except LatexError as error:
        raise ValueError(f"formula not understood: {latex.strip()}: {error}") from error


class Maths(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Maths(DISPLAY, md, display=True), "maths_display", AFTER_CODE_BEFORE_ESCAPES + 1)
        md.inlinePatterns.register(_Maths(INLINE, md, display=False), "maths_inline", AFTER_CODE_BEFORE_ESCAPES)
        if "$" not in md.ESCAPED_CHARS:
            md.ESCAPED_CHARS.append("$")


def makeExtension(**options: object) -> Maths:
    return Maths(**options)
