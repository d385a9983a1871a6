"""The schematics: the files are what tools/draw.py draws, and every page that shows one has what it needs."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from tools import draw
from tools.build_tutorials import ROOT, with_drawings

FILES = draw.files()
TUTORIALS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tutorials").rglob("*.py")))
SHOWN = re.findall(r"^# !\[.*\]\((.*)\)$", TUTORIALS, re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_the_script_draws(name):
    assert (draw.IMAGES / name).read_text(encoding="utf-8") == FILES[name], "run python tools/draw.py"


@pytest.mark.parametrize("name", FILES)
def test_a_drawing_says_what_it_shows_and_stays_on_its_canvas(name):
    root = ElementTree.fromstring(FILES[name])
    assert root.get("role") == "img"
    assert len(root.get("aria-label", "")) > 80
    width, height = float(root.get("width")), float(root.get("height"))
    for part in root.iter():
        for key in ("x", "cx"):
            assert 0 <= float(part.get(key, 0)) <= width
        for key in ("y", "cy"):
            assert 0 <= float(part.get(key, 0)) <= height


def test_the_class_colours_are_those_of_the_site():
    css = (ROOT / "docs" / "stylesheets" / "extra.css").read_text(encoding="utf-8")
    for name, kind in (("critical", draw.CRITICAL), ("marginal", draw.MARGINAL), ("negligible", draw.NEGLIGIBLE)):
        assert f"--sla-{name}: {draw.COLOURS[kind]};" in css


def test_the_example_map_has_the_default_ratios():
    for row in draw.example_map():
        assert [row.count(kind) for kind in (draw.CRITICAL, draw.MARGINAL, draw.NEGLIGIBLE)] == [1, 17, 2]


def test_every_drawing_has_its_place():
    pages = TUTORIALS + "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/index.md"))
    for name in FILES:
        assert f"docs/images/{name}" in pages


@pytest.mark.parametrize("path", SHOWN)
def test_a_tutorial_shows_a_drawing_with_its_caption(path):
    page = with_drawings(f"Text.\n\n![Alt]({path})\n\n*A caption,\nin two lines.*\n\nMore *text*.")
    drawing = (ROOT / "tutorials" / path).read_text(encoding="utf-8")
    assert drawing.strip() in page
    assert "\n\nA caption,\nin two lines.\n{ .caption }\n\nMore *text*." in page
    assert with_drawings("\n".join(["![Alt](other.png)", "", "*Text*"])) == "![Alt](other.png)\n\n*Text*"


def test_no_drawing_of_a_tutorial_lacks_a_caption():
    cells = re.sub(r"^# ?", "", TUTORIALS, flags=re.MULTILINE)
    assert len(SHOWN) == with_drawings(cells).count("{ .caption }") > 0
