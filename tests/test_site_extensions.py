"""The Markdown extensions of the site: maths, steps side by side, glossary."""

from __future__ import annotations

import re

import markdown
import pytest

from tools import glossary, maths, paper_tags


def to_html(text: str) -> str:
    return markdown.markdown(text, extensions=["tables", maths.Maths(), paper_tags.PaperTags()])


# --- maths -----------------------------------------------------------------------------------------------------------


def test_letters_are_unicode_and_no_attribute_that_browsers_ignore():
    html = maths.to_mathml(r"\mathbb{R} \mathcal{L} \boldsymbol{h}", display=False)
    assert "ℝ" in html and "ℒ" in html and "𝒉" in html
    assert "mathvariant" not in html


def test_aligned_rows_are_aligned_by_css():
    html = maths.to_mathml(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", display=True)
    assert html.count("<mtr>") == 2 and html.count("<mtd") == 4
    assert "text-align: right" in html and "text-align: left" in html and "columnalign" not in html


def test_inline_and_display():
    html = to_html(
        "Let $i<j$, and\n\n$$\nO = O^s\n$$\n\n- in a list $x_1$\n\n| $a_i$ | b |\n|---|---|\n| $c_j$ | 1 |\n"
    )
    assert html.count("<math>") == 4 and html.count('<math display="block">') == 1
    assert "$" not in html and "<em>" not in html
    assert "<mo>&lt;</mo><mi>j</mi></math>,</span>" in html  # the comma stays with its formula


def test_a_paragraph_of_one_formula_is_a_paragraph():
    assert to_html("$x$").startswith("<p><span")


def test_dollars_that_are_no_maths():
    assert to_html("`$x$` costs $5 or $6, or $5-$6, and \\$HOME\\$").count("<math") == 0


def test_backslashes_and_underscores_inside_are_latex():
    html = to_html("$\\{a_i, b_i\\}$\n\n$$\n\\begin{aligned} a_i &= b_i \\\\ c &< d \\end{aligned}\n$$\n")
    assert ">{</mo>" in html and html.count("<mtr>") == 2 and html.count("<msub>") == 4


def test_unknown_latex_names_the_formula():
    with pytest.raises(ValueError, match=r"formula not understood: \\nonsense\{x\}.*nonsense"):
        to_html(r"$\nonsense{x}$")


# --- steps -----------------------------------------------------------------------------------------------------------

SOURCE = '''\
"""A module. [Eq. 9]"""


class Thing:
    """Not shown. [Eq. 9]"""

    def whole(self):
        """All of it. [Eq. 9]"""
        return 1


def part():
    """Parts."""
    before = 1
    also = 2
    here = before  # [Eq. 9]
    after = 3
    last = 4
    unseen = 5

    # From here on. [Eq. 9]
    then = 6

    end = 7
'''


def test_what_is_shown_for_a_tag():
    lines = SOURCE.splitlines()
    shown = [lines[first - 1 : last] for first, last, _ in paper_tags.excerpts(SOURCE, "Eq. 9")]
    assert [part[0].strip() for part in shown] == ["def whole(self):", "before = 1", "# From here on. [Eq. 9]"]
    assert [part[-1].strip() for part in shown] == ["return 1", "last = 4", "then = 6"]
    marked = [lines[number - 1] for *_, numbers in paper_tags.excerpts(SOURCE, "Eq. 9") for number in numbers]
    assert all("[Eq. 9]" in line for line in marked) and len(marked) == 2


def test_every_step_shows_code_and_every_excerpt_its_tag():
    for step in paper_tags.read_steps():
        page = paper_tags.side_by_side(step)
        assert f"[{step.tag}]" in page, step.tag
        tabs = re.findall(r'^=== "(\w+)"', page, re.MULTILINE)
        assert tabs[0] == "Formula"
        wanted = {"reference"} if step.tag.startswith("Eq") else {"torch"}
        if step.tag.startswith("Alg") and step.tag not in ("Alg. 1 L5", "Alg. 1 L6"):
            wanted.add("Triton")
        assert wanted <= set(tabs), step.tag


def test_a_backend_gets_its_tab_when_its_file_is_there(tmp_path, monkeypatch):
    (tmp_path / "backends").mkdir()
    monkeypatch.setattr(paper_tags, "SOURCES", tmp_path)
    step = paper_tags.Step("Eq. 9", "$x$", [])
    assert "Numba" not in paper_tags.side_by_side(step)
    (tmp_path / "backends" / "numba_cuda.py").write_text(SOURCE, encoding="utf-8")
    page = paper_tags.side_by_side(step)
    assert '=== "Numba"' in page
    assert '```python title="backends/numba_cuda.py" linenums="14" hl_lines="3"' in page


def test_a_line_asks_for_steps():
    html = to_html("::: steps Alg. 1\n")
    assert html.count("<h3>Alg. 1 L") == sum(step.tag.startswith("Alg. 1") for step in paper_tags.read_steps()) > 5
    with pytest.raises(ValueError, match=r"begins with 'Alg\. 7'"):
        to_html("::: steps Alg. 7\n")


def test_tags_are_labels_and_links_stay_links():
    html = to_html("[Eq. 4] [Eq. 5] and [Eq. 6](side.md)")
    assert html.count('<span class="paper-tag">') == 2 and '<a href="side.md">Eq. 6</a>' in html


# --- glossary --------------------------------------------------------------------------------------------------------


def test_words_of_the_glossary_get_hover_text():
    words = glossary.read_glossary()
    assert {"critical", "marginal", "negligible"} <= set(words)
    html = markdown.markdown("A critical block, two feature maps.", extensions=[glossary.makeExtension()])
    assert f'<abbr class="sla-critical" title="{words["critical"]}">critical</abbr>' in html
    assert f'<abbr title="{words["feature map"]}">feature maps</abbr>' in html
