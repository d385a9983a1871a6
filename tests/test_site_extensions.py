"""The extensions of the site: maths, steps side by side, glossary, reading times, API."""

from __future__ import annotations

import re

import griffe
import markdown
import pytest

from tools import api_defaults, glossary, maths, paper_tags, reading_times


def to_html(text: str) -> str:
    ours = [maths.Maths(), paper_tags.PaperTags()]
    return markdown.markdown(text, extensions=["attr_list", "md_in_html", "tables", *ours])


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


def bare():
    first = 1  # [Eq. 9]
    return first


def spaced():
    first = 1

    second = 2
    third = 3  # [Eq. 9]
    fourth = 4

    return fourth


def part():
    """About the step, which is below. [Eq. 9]"""
    before = 1
    also = (
        2
    )
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
    found = paper_tags.excerpts(SOURCE, "Eq. 9")
    ends = [(lines[first - 1].strip(), lines[last - 1].strip()) for first, last, _ in found]
    assert ends == [
        ("def whole(self):", "return 1"),
        ("first = 1  # [Eq. 9]", "return first"),
        ("second = 2", "fourth = 4"),
        ("also = (", "last = 4"),
        ("# From here on. [Eq. 9]", "then = 6"),
    ]
    assert all("[Eq. 9]" in lines[number - 1] for *_, marked in found for number in marked)


FENCE = r'(?ms)^```python title="(.+?)" hl_lines="([\d ]+)"\n(.*?)\n```$'


def panes(step: paper_tags.Step) -> dict[str, str]:
    """Rung -> what the page shows of it."""
    rungs = re.findall(
        r'(?s)<div class="rung (\w+)( first)?" markdown>\n\n(.*?)\n\n</div>', paper_tags.side_by_side(step)
    )
    assert [rung for rung, *_ in rungs] == [rung.lower() for rung in paper_tags.RUNGS]
    with_code = [bool(first) for _, first, pane in rungs if "```" in pane]
    assert with_code == [True, False, False, False][: len(with_code)], "only the first is marked as such"
    return {rung: pane for rung, _, pane in rungs}


@pytest.mark.parametrize("step", paper_tags.read_steps(), ids=lambda step: step.tag)
def test_a_step_shows_a_few_marked_lines_on_each_rung_or_where_they_are(step):
    assert step.title and step.reason.endswith(".")
    others = {other.tag for other in paper_tags.read_steps()}
    for rung, pane in panes(step).items():
        blocks = re.findall(FENCE, pane)
        for title, marked, code in blocks:
            lines = code.splitlines()
            assert 3 <= len(lines) <= paper_tags.MOST, title
            assert all(f"[{step.tag}]" in lines[int(number) - 1] for number in marked.split()), title
        is_line = step.tag.startswith("Alg")
        if rung == "equations":
            assert bool(blocks) is not is_line
        elif rung != "torch" or is_line:
            assert blocks, rung
        if not blocks:
            elsewhere = set(re.findall(paper_tags.TAG, pane))
            assert elsewhere and elsewhere <= others - {step.tag}


def test_code_is_shown_when_its_file_is_there(tmp_path, monkeypatch):
    (tmp_path / "backends").mkdir()
    monkeypatch.setattr(paper_tags, "SOURCES", tmp_path)
    step = paper_tags.Step("Eq. 9", "Look", "To see.", "$x$", [], [])
    assert "```" not in panes(step)["numba"]
    (tmp_path / "backends" / "numba_cuda.py").write_text(SOURCE, encoding="utf-8")
    pane = panes(step)["numba"]
    assert '```python title="Numba: backends/numba_cuda.py::Thing, line 7" hl_lines="2"\ndef whole(self):\n' in pane
    assert '```python title="Numba: backends/numba_cuda.py::part, line 30" hl_lines="4"\nalso = (\n' in pane


def test_a_line_asks_for_steps_and_one_for_the_buttons():
    html = to_html("::: rungs\n\n::: steps Alg. 1\n")
    assert html.count('type="radio"') == 1 + len(paper_tags.RUNGS) and html.count(" checked") == 1
    steps = [step for step in paper_tags.read_steps() if step.tag.startswith("Alg. 1")]
    assert html.count("<h3 id=") == len(steps) > 5
    assert all(f'<h3 id="{paper_tags.anchor(step.tag)}">' in html for step in steps)
    with pytest.raises(ValueError, match=r"begins with 'Alg\. 7'"):
        to_html("::: steps Alg. 7\n")


def test_tags_are_links_to_their_steps_and_other_links_stay():
    html = to_html("[Eq. 4] [Alg. 1 L9] and [Eq. 6](side.md)")
    assert re.findall(r'<autoref class="paper-tag" identifier="(.+?)">(.+?)</autoref>', html) == [
        ("eq-4", "Eq. 4"),
        ("alg-1-l9", "Alg. 1 L9"),
    ]
    assert '<a href="side.md">Eq. 6</a>' in html


# --- glossary --------------------------------------------------------------------------------------------------------


def test_words_of_the_glossary_get_hover_text():
    words = glossary.read_glossary()
    assert {"critical", "marginal", "negligible"} <= set(words)
    html = markdown.markdown("A critical block, two feature maps.", extensions=[glossary.makeExtension()])
    assert f'<abbr class="sla-critical" title="{words["critical"]}">critical</abbr>' in html
    assert f'<abbr title="{words["feature map"]}">feature maps</abbr>' in html


def test_a_section_explains_a_word_once():
    text = (
        "## A critical block\n\nTwo feature maps, one feature map.\n\n- critical\n- critical\n\n## Next\n\nfeature map"
    )
    html = markdown.markdown(text, extensions=[glossary.makeExtension()])
    assert re.findall(r"<abbr[^>]*>(.*?)</abbr>", html) == ["feature maps", "critical", "feature map"]
    assert "<span>" in html and "block</h2>" in html


# --- reading times ---------------------------------------------------------------------------------------------------


def test_a_section_tells_how_long_its_pages_take(monkeypatch):
    monkeypatch.setattr(reading_times, "minutes", {"a.md": 12.0, "b.md": 9.0, "c/d.md": 80.0}.get)
    section = "All {hours}.\n\n1. [A](a.md) and [B](b.md) ({minutes})\n2. [part](a.md#x), [D](c/d.md): {minutes}"
    html = markdown.markdown(
        f"{section}\n\n## Next\n\n[A](a.md): {{hours}}", extensions=[reading_times.makeExtension()]
    )
    assert "All 1½ hours." in html and "(20 minutes)" in html and ": 80 minutes</li>" in html
    assert html.endswith("</a>: 10 minutes</p>")


def test_a_page_without_times_may_link_to_pages_of_its_own_folder():
    text = "Next: [2. Mask classification](02_mask_classification.md)."
    assert "02_mask" in markdown.markdown(text, extensions=[reading_times.makeExtension()])


def test_folded_tables_take_no_time_and_code_takes_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_times, "DOCS", tmp_path)
    page = "word " * 400 + "\n<details>\n" + "cell " * 9000 + "\n</details>\n```sh\n" + "line\n" * 30 + "```\n"
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    assert reading_times.minutes("page.md") == pytest.approx(2 + 3)


# --- API -------------------------------------------------------------------------------------------------------------


def test_a_default_that_is_a_constant_is_shown_as_its_value():
    ours = griffe.load_extensions(api_defaults.ConstantDefaults)
    package = griffe.load("sla_ref", search_paths=[paper_tags.ROOT / "src"], extensions=ours)
    of_layer = package["module.SparseLinearAttention.__init__"].parameters
    assert (of_layer["critical_ratio"].default, of_layer["block_q"].default) == ("0.05", "64")
    assert package["integrations.diffusers.install_sla"].parameters["block_k"].default == "64"
    assert of_layer["feature_map"].default == "'softmax'" and str(of_layer["backend"].default) == "None"
