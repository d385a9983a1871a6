"""The built site: it loads nothing from elsewhere, works in a browser, and is the same when it is built again."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from browser import Page, open_browser
from needs import need_program, need_site

import sla_ref
from sla_ref import analysis
from tools import explorer_data

ROOT = Path(__file__).parents[1]
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def site() -> Path:
    return need_site()


@pytest.fixture(scope="module")
def names(site) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


# --- the files -------------------------------------------------------------------------------------------------------


class _Loads(HTMLParser):
    """Addresses that a page makes a browser load. Links that a reader may follow are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        names = ["src", "srcset", "data", "poster"] + ["href", "xlink:href"] * (tag != "a")
        self.found += [values[name] for name in names if values.get(name)]
        self.found += addresses_in_css(values.get("style") or "")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.found += addresses_in_css(data)


def addresses_in_css(text: str) -> list[str]:
    urls = re.findall(r"url\(\s*['\"]?([^'\")]+)", text)
    return urls + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def is_elsewhere(address: str) -> bool:
    return re.match(r"\s*(https?:)?//", address) is not None


def test_no_page_loads_anything_from_another_host(site, names):
    assert "index.html" in names and len(names) > 10
    seen = 0
    for name in names:
        parser = _Loads()
        parser.feed((site / name).read_text(encoding="utf-8"))
        seen += len(parser.found)
        assert [address for address in parser.found if is_elsewhere(address)] == [], name
    assert seen > len(names), "pages do load their style sheets"


def test_no_style_sheet_loads_anything_from_another_host(site):
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        found = addresses_in_css(sheet.read_text(encoding="utf-8"))
        assert [address for address in found if is_elsewhere(address)] == [], sheet


def test_the_search_for_foreign_addresses_finds_them():
    parser = _Loads()
    parser.feed(
        '<script src="https://a/x.js"></script><link href="//b/y.css"><a href="https://c">c</a>'
        '<p style="background: url(http://d/z.png)"></p><style>@import "https://e/w.css";</style>'
    )
    assert sum(map(is_elsewhere, parser.found)) == 4


@pytest.mark.long
def test_built_again_it_is_the_same(site, tmp_path):
    environment = {"NO_MKDOCS_2_WARNING": "1", "SOURCE_DATE_EPOCH": "0"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    files = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert [str(file) for file in files if (site / file).read_bytes() != (tmp_path / file).read_bytes()] == []


# --- in a browser ----------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser(
        need_program("the site's test in a browser", "chromium", "chromium-browser", "google-chrome")
    ) as page:
        yield page


LEFT_OVER = r"""
(() => {
  const text = document.querySelector('.md-content').cloneNode(true);
  text.querySelectorAll('pre, code, svg, math').forEach(element => element.remove());
  return text.textContent.match(/\$\$|\\[a-z]+\{|^(!!!|\?\?\?|===|:::) |--8<--/m)?.[0] ?? null;
})()
"""
ONE_LINE_CODE = """
[...document.querySelectorAll('pre code')].filter(code => !getComputedStyle(code).whiteSpace.startsWith('pre')).length
"""
UNEVEN_NUMBERS = """
(() => {
  document.querySelectorAll('details').forEach(part => { part.open = true; });
  return [...document.querySelectorAll('.highlighttable')].filter(table => {
    const [numbers, code] = table.querySelectorAll('pre');
    return Math.abs(numbers.offsetHeight - code.offsetHeight) > 22;  // the code has room below for a scroll bar
  }).length;
})()
"""


@pytest.mark.parametrize(
    ("size", "dark"),
    [
        pytest.param(PHONE, True, id="phone, dark"),
        pytest.param(DESKTOP, False, id="desktop, light", marks=pytest.mark.long),
    ],
)
def test_every_page_opens_without_complaint(browser, address, names, size, dark):
    width, height = size
    for name in names:
        browser.open(f"{address}/{name}", width=width, height=height, dark=dark)
        browser.evaluate("document.fonts.ready.then(() => true)")
        assert browser.problems == [], name
        assert [url for url in browser.requests if not url.startswith((address, "data:"))] == [], name
        assert browser.evaluate("document.body.dataset.mdColorScheme") == ("slate" if dark else "default"), name
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
        assert browser.evaluate(ONE_LINE_CODE) == 0, f"code without its line breaks in {name}"
        assert browser.evaluate(UNEVEN_NUMBERS) == 0, f"line numbers that are not next to their lines in {name}"
        assert browser.evaluate(LEFT_OVER) is None, f"Markdown that was not rendered in {name}"


def test_a_broken_page_is_noticed(browser, tmp_path):
    page = tmp_path / "broken.html"
    page.write_text(
        "<body><script src='nowhere.js'></script><script>throw new Error('planted')</script></body>", encoding="utf-8"
    )
    browser.open(page.as_uri(), width=800, height=600, dark=False)
    said = " ".join(browser.problems)
    assert "planted" in said and "ERR_FILE_NOT_FOUND" in said


def test_search_finds_critical(browser, address):
    browser.open(f"{address}/index.html", width=1280, height=900, dark=False)
    browser.evaluate(
        """
        (() => {
          document.querySelector('[data-md-toggle=search]').click();
          const field = document.querySelector('[data-md-component=search-query]');
          field.focus();
          field.value = 'critical';
          field.dispatchEvent(new Event('keyup', {bubbles: true}));
        })()
        """
    )
    results = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    found = browser.wait_for(f"(links => links.length > 2 && links)({results})")
    assert any("notation.html" in link for link in found), found
    assert browser.problems == []


def test_maths_is_mathml_in_its_own_font(browser, address):
    browser.open(f"{address}/notation.html", width=1280, height=900, dark=False)
    browser.evaluate("document.fonts.ready.then(() => true)")
    letters = "[...document.querySelectorAll('math mi')].map(letter => letter.textContent)"
    assert "ℝ" in browser.evaluate(letters)
    kind = "document.querySelector('math').constructor.name"
    assert browser.evaluate(kind) == "MathMLElement"
    assert browser.evaluate("document.fonts.check('16px \"STIX Two Math\"')") is True
    assert browser.evaluate("[...document.fonts].filter(font => font.status === 'loaded').length") == 1
    exponent = "document.querySelector('math msup')"
    base, raised = (browser.evaluate(f"{exponent}.children[{n}].getBoundingClientRect().top") for n in (0, 1))
    assert raised < base, "an exponent is not above its base"


def test_figures_take_the_colour_of_the_text(browser, address):
    colours = []
    for dark in (False, True):
        browser.open(f"{address}/tutorials/paper_vs_code.html", width=1280, height=900, dark=dark)
        colours.append(
            browser.evaluate(
                "getComputedStyle(document.querySelector('.figure svg [style*=currentColor]')).stroke + '/' +"
                "getComputedStyle(document.querySelector('.figure')).color"
            )
        )
    assert colours[0] != colours[1], colours


# --- side by side ----------------------------------------------------------------------------------------------------

SHOWN = """
[...document.querySelectorAll('.step')].map(step =>
  [...step.querySelectorAll('.rung')].filter(rung => rung.offsetHeight).map(rung => rung.classList[1]).join())
"""
CLIPPED = """
[...document.querySelectorAll('.step :is(.maths, pre, code)')].filter(part => {
  const right = part.getBoundingClientRect().right, column = part.closest('.words, .code').getBoundingClientRect();
  return right > column.right + 1 || part.clientWidth && part.scrollWidth > part.clientWidth + 1;
}).length
"""
PLACES = """
(() => {
  const box = part => document.querySelector(part).getBoundingClientRect().toJSON();
  return {bar: box('.rungs'), step: box('.step:has(#alg-2-l11)'), title: box('#alg-2-l11'),
          words: box('.step:has(#alg-2-l11) .words'), code: box('.step:has(#alg-2-l11) .code')};
})()
"""


def places(page: Page) -> dict[str, dict[str, float]]:
    """Where the bar and the parts of one step are in the window, after two frames."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate(PLACES)


@pytest.mark.parametrize("size", [(1400, 900), PHONE], ids=["desktop", "phone"])
def test_a_rung_is_chosen_once_for_all_steps(browser, address, size):
    browser.open(f"{address}/side_by_side.html#alg-2-l11", width=size[0], height=size[1], dark=False)
    browser.evaluate("document.fonts.ready.then(() => true)")
    seen = places(browser)
    assert seen["bar"]["top"] >= 0 and seen["bar"]["bottom"] <= seen["title"]["top"] < size[1] / 2, (
        "the link leads there"
    )
    assert set(browser.evaluate(SHOWN)) == {"equations", "torch"}, "without a choice, the first rung that has the step"
    for rung in ("equations", "torch", "numba", "triton"):
        before = places(browser)["step"]["top"]
        browser.evaluate(f"document.querySelector('label[for=rung-{rung}]').click()")
        after = places(browser)
        assert abs(after["step"]["top"] - max(before, after["bar"]["bottom"])) < 2, "the step stays where it is"
        assert set(browser.evaluate(SHOWN)) == {rung}
        assert browser.evaluate(CLIPPED) == 0, rung

    browser.evaluate("window.before = true")
    browser.send("Page.reload")
    browser.wait_for("!window.before && document.readyState === 'complete'")
    assert set(browser.evaluate(SHOWN)) == {"triton"}, "the choice is remembered"
    assert browser.problems == []


def test_words_stay_in_view_while_their_code_scrolls(browser, address):
    browser.open(f"{address}/side_by_side.html", width=1400, height=900, dark=False)
    browser.evaluate("document.querySelector('label[for=rung-numba]').click()")
    browser.evaluate(f"scrollBy({{top: {places(browser)['step']['bottom'] - 350}, behavior: 'instant'}})")
    seen = places(browser)
    assert seen["words"]["right"] < seen["code"]["left"]
    assert seen["code"]["top"] < seen["bar"]["bottom"] <= seen["words"]["top"]


def test_words_are_above_their_code_on_a_phone(browser, address):
    browser.open(f"{address}/side_by_side.html", width=PHONE[0], height=PHONE[1], dark=True)
    seen = places(browser)
    assert seen["words"]["bottom"] <= seen["code"]["top"] and seen["words"]["left"] == seen["code"]["left"]


def test_side_by_side_works_without_scripts(browser, address):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"{address}/side_by_side.html", width=1400, height=900, dark=False)
        assert set(browser.evaluate(SHOWN)) == {"equations", "torch"}
        browser.evaluate("document.querySelector('label[for=rung-triton]').click()")
        assert set(browser.evaluate(SHOWN)) == {"triton"}
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_tags_lead_to_their_steps_from_every_page(site, names):
    anchors = set(re.findall(r'<h3 id="([^"]+)"', (site / "side_by_side.html").read_text(encoding="utf-8")))
    linking = set()
    for name in names:
        page = (site / name).read_text(encoding="utf-8")
        assert '<span class="paper-tag"' not in page and "<autoref" not in page, name
        for start in re.findall(r"<a [^>]*paper-tag[^>]*>", page):
            target, anchor = re.search(r'href="(?:(\S*side_by_side\.html))?#(\S+)"', start).groups()
            assert ((site / name).parent / (target or "side_by_side.html")).samefile(site / "side_by_side.html"), name
            assert anchor in anchors, f"{name}: {anchor}"
            linking.add(name)
    assert {"api/layer.html", "paper.html", "side_by_side.html", "tutorials/03_linear_branch.html"} <= linking


# --- the mask explorer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explorer_layers():
    """Query, key, value (time, head, token, feature) of each layer."""
    return explorer_data.attention_inputs()[2]


@pytest.fixture
def explorer(browser, address) -> Page:
    browser.open(f"{address}/explorer.html", width=1280, height=900, dark=False)
    browser.wait_for("!!document.querySelector('#explorer-map')")
    return browser


def press_buttons(page: Page, **places: int) -> None:
    """Presses the button of each setting at a place counted from 0."""
    for name, place in places.items():
        page.evaluate(f"document.querySelectorAll('#explorer-{name} input')[{place}].click()")


COLOURS_ON_THE_MAP = """
(() => {
  const map = document.querySelector('#explorer-map'), blocks = 64, cell = map.width / blocks;
  const {data} = map.getContext('2d').getImageData(0, 0, map.width, map.height);
  return Array.from({length: blocks * blocks}, (_, pair) => {
    const y = Math.floor(pair / blocks) * cell + 2, x = pair % blocks * cell + 2;  // not on dot or stroke
    const pixel = 4 * (y * map.width + x);
    return [...data.subarray(pixel, pixel + 3)];
  });
})()
"""


def shown_labels(page: Page) -> torch.Tensor:
    """The class of each pair of blocks (Tq, Tk), from the colours on the map."""
    label_of = {tuple(bytes.fromhex(colour[1:])): label for label, colour in analysis.CLASS_COLOURS.items()}
    labels = [label_of[tuple(colour)] for colour in page.evaluate(COLOURS_ON_THE_MAP)]
    return torch.tensor(labels, dtype=torch.int8).view(64, 64)


def package_labels(layers, layer: int, t: int, head: int, critical: int, negligible: int) -> torch.Tensor:
    query, key, _ = layers[layer]
    ratios = explorer_data.CRITICAL_RATIOS[critical], explorer_data.NEGLIGIBLE_RATIOS[negligible]
    return sla_ref.classify_blocks(query, key, *ratios, block_q=16, block_k=16).labels[t, head]


def test_the_explorers_data_are_those_that_its_tool_computes(site):
    text = (site / "explorer/data.js").read_text(encoding="utf-8")
    assert len(text) < 600_000
    built = json.loads(text.removeprefix("window.maskExplorerData = ").removesuffix(";\n"))
    assert built == json.loads(json.dumps(explorer_data.collect()))


def test_the_explorer_shows_the_classes_of_the_package(explorer, explorer_layers):
    maps = [{"layer": n // 10, "t": n // 2 % 5, "head": n % 2} for n in range(4 * 5 * 2)]
    ratios = [{"critical": n // 4, "negligible": n % 4} for n in range(4 * 4)]
    for settings in [one | ratios[n % 16] for n, one in enumerate(maps)] + [maps[7] | one for one in ratios]:
        press_buttons(explorer, **settings)
        assert torch.equal(shown_labels(explorer), package_labels(explorer_layers, **settings)), settings


def test_the_explorers_figures_are_those_of_dense_attention(explorer, explorer_layers):
    settings = {"layer": 3, "t": 1, "head": 1, "critical": 2, "negligible": 3}
    press_buttons(explorer, **settings)
    labels = package_labels(explorer_layers, **settings)
    query, key, value = (tokens[1, 1].double() for tokens in explorer_layers[3])
    weights = torch.softmax(query @ key.T / 8, dim=-1)
    of_pairs = labels.repeat_interleave(16, 0).repeat_interleave(16, 1)

    def held(label):
        return f"{100 * weights.where(of_pairs == label, 0).sum() / 1024:.1f} %"

    def error(kept):
        some = weights.where(kept, 0)
        output, full = some / some.sum(dim=-1, keepdim=True) @ value, weights @ value
        return f"{100 * (output - full).abs().sum() / full.abs().sum():.1f} %"

    cells = "[...document.querySelectorAll('#explorer td:not(:first-child)')].map(cell => cell.textContent)"
    assert explorer.evaluate(cells) == [
        *("6 of 64", held(1), "26 of 64", held(0), "32 of 64", held(-1)),
        "41.9 MFLOP, 15.6 % of full attention's 268.4 MFLOP",
        error(of_pairs == 1),
        error(of_pairs >= 0),
    ]
    bars = "[...document.querySelectorAll('.explorer-bar')].map(bar => [...bar.children].map(part => part.style.width))"
    widths = [[float(width.removesuffix("%")) for width in bar] for bar in explorer.evaluate(bars)]
    assert widths[0] == pytest.approx([100 * count / 64 for count in (6, 26, 32)])
    assert widths[1] == pytest.approx([float(held(label).removesuffix(" %")) for label in (1, 0, -1)], abs=0.1)


@pytest.mark.parametrize("clip", ["noisy", "clean"])
def test_the_explorer_tints_the_clip_in_the_colours_of_the_classes(explorer, explorer_layers, clip):
    settings = {"layer": 3, "t": 1, "head": 1, "critical": 3, "negligible": 3}
    press_buttons(explorer, **settings)
    if clip == "clean":
        explorer.evaluate("document.querySelector('#explorer-clip').click()")
    labels = package_labels(explorer_layers, **settings)[25].tolist()
    clips = explorer_data.attention_inputs()[1].clamp(-1, 1)
    frames = clips[0 if clip == "clean" else 1 + settings["t"]]
    for block, label in enumerate(labels):
        x, y = 20, block % 4 * 8 + 5  # away from the marks and outlines, in pixels of the clip
        grey = 255 * (frames[block // 4, y, x].item() + 1) / 2
        place = (block // 4 % 4 * 138 + 4 * x + 2, block // 16 * 138 + 4 * y + 2)
        pixel = f"[...document.querySelector('#explorer-frames').getContext('2d').getImageData{(*place, 1, 1)}.data]"
        colour = bytes.fromhex(analysis.CLASS_COLOURS[label][1:])
        assert explorer.evaluate(pixel)[:3] == pytest.approx([(grey + part) / 2 for part in colour], abs=4), block


def chosen_pair(page: Page) -> tuple[int, int]:
    """The query block and the key block that the text speaks of, counted from 0."""
    text = page.evaluate("document.querySelector('#explorer-said').textContent")
    query_block, key_block = re.search(r"Query block (\d+) .*Key block (\d+) ", text).groups()
    return int(query_block) - 1, int(key_block) - 1


def test_the_explorer_answers_to_the_keyboard(explorer, explorer_layers):
    explorer.evaluate("document.querySelector('#explorer-critical input:checked').focus()")
    explorer.press("ArrowRight")  # to 10 %
    settings = {"layer": 2, "t": 2, "head": 0, "critical": 2, "negligible": 1}
    assert torch.equal(shown_labels(explorer), package_labels(explorer_layers, **settings))

    explorer.evaluate("[...document.querySelectorAll('.explorer-tries a')].at(-1).focus()")
    visited = []
    for _ in range(9):
        explorer.press("Tab")
        visited.append(explorer.evaluate("document.activeElement.closest('[id^=explorer-]').id.slice(9)"))
    assert visited == ["layer", "head", "t", "critical", "negligible", "query", "map", "clip", "frames"]

    i, j = chosen_pair(explorer)
    explorer.press("ArrowRight")  # in the clip: a frame on
    assert chosen_pair(explorer) == (i + 4, j)
    explorer.evaluate("document.querySelector('#explorer-map').focus()")
    for key in ("ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowUp"):
        explorer.press(key)
    i, j = i + 3, j - 2
    assert chosen_pair(explorer) == (i, j)
    assert explorer.evaluate("document.querySelector('#explorer-query').value") == str(i)

    said = explorer.evaluate("document.querySelector('#explorer-said').textContent")
    listed = re.findall(r"(\d+) \(frame (\d+)\)", said)
    query, key, _ = explorer_layers[2]
    order = sla_ref.block_scores(query, key, block_q=16, block_k=16)[2, 0, i].argsort(descending=True, stable=True)
    assert listed == [(str(block + 1), str(block // 4 + 1)) for block in order[:6].tolist()]
    label = package_labels(explorer_layers, **settings)[i, j].item()
    assert f"is {analysis.CLASS_NAMES[label]}, rank {order.tolist().index(j) + 1} of 64" in said
    for _ in range(70):
        explorer.press("ArrowUp")
    assert chosen_pair(explorer) == (0, j), "the first block is the end"


def test_the_explorer_answers_to_the_mouse(explorer):
    chosen = chosen_pair(explorer)
    explorer.point("#explorer-map", 10.5 / 64, 50.5 / 64)
    assert chosen_pair(explorer) == (50, 10)
    explorer.point("h1", 0.5, 0.5)
    assert chosen_pair(explorer) == chosen, "pointing does not choose"
    explorer.point("#explorer-map", 10.5 / 64, 50.5 / 64, click=True)
    explorer.point("h1", 0.5, 0.5)
    assert chosen_pair(explorer) == (50, 10)
    explorer.point("#explorer-frames", 0.65, 0.42, click=True)  # third frame of the second row, its third band
    assert chosen_pair(explorer) == (6 * 4 + 2, 10)
    assert explorer.problems == []


SETTINGS = """
Object.fromEntries(['layer', 'head', 't', 'critical', 'negligible', 'query', 'clip'].map(name => {
  const part = document.querySelector(`#explorer-${name}`);
  const place = [...part.querySelectorAll('input')].findIndex(button => button.checked);
  return [name, {range: Number(part.value), checkbox: Number(part.checked)}[part.type] ?? place];
}))
"""
START = {"layer": 2, "head": 0, "t": 2, "critical": 1, "negligible": 1, "query": 25, "clip": 0}


def wait_for_settings(page: Page, settings: dict[str, int]) -> None:
    """Waits until the controls are at these places, counted from 0; a new address takes a moment to have its effect."""
    page.wait_for(f"JSON.stringify({SETTINGS}) === {json.dumps(json.dumps(settings, separators=(',', ':')))}")


def test_the_address_holds_what_the_explorer_shows(explorer, explorer_layers, address):
    assert explorer.evaluate(SETTINGS) == START
    assert explorer.evaluate("location.hash") == "", "nothing has been set yet"
    chosen = {"layer": 1, "head": 1, "t": 4, "critical": 3, "negligible": 2}
    press_buttons(explorer, **chosen)
    explorer.evaluate("document.querySelector('#explorer-clip').click()")
    explorer.point("#explorer-map", 10.5 / 64, 50.5 / 64, click=True)
    words = "#layer=2&head=2&t=0.9&critical=0.2&negligible=0.3&query=51&key=11&clip=clean"
    explorer.wait_for(f"location.hash === {json.dumps(words)}")

    explorer.open(f"{address}/explorer.html{words}", width=1280, height=900, dark=False)
    explorer.wait_for("!!document.querySelector('#explorer-map')")
    assert explorer.evaluate(SETTINGS) == chosen | {"query": 50, "clip": 1}
    assert chosen_pair(explorer) == (50, 10)
    assert torch.equal(shown_labels(explorer), package_labels(explorer_layers, **chosen))

    explorer.evaluate("location.hash = '#what-you-see'")
    explorer.evaluate("new Promise(done => setTimeout(done, 0))")
    assert explorer.evaluate(SETTINGS) == chosen | {"query": 50, "clip": 1}, "a heading's address changes nothing"
    explorer.evaluate("location.hash = '#layer=9&t=0.1&sigma=3'")
    wait_for_settings(explorer, START | {"t": 0})  # what the address does not know is as at the start
    assert explorer.problems == []


def test_what_to_try_sets_the_explorer_and_the_back_button_undoes_it(explorer):
    stops = {
        "layer": ["1", "2", "3", "4"],
        "head": ["1", "2"],
        "t": list(map(str, explorer_data.TIMES)),
        "critical": list(map(str, explorer_data.CRITICAL_RATIOS)),
        "negligible": list(map(str, explorer_data.NEGLIGIBLE_RATIOS)),
    }
    links = explorer.evaluate("[...document.querySelectorAll('.explorer-tries a')].map(link => link.hash)")
    assert len(links) >= 6
    states = [START]
    for at, link in enumerate(links):
        given = dict(pair.split("=") for pair in link.removeprefix("#").split("&"))
        state = START | {name: stops[name].index(word) for name, word in given.items()}
        # With the mouse: a link that a script clicks while the page is busy loading makes no step in the history.
        explorer.point(f'.explorer-tries a[href="{link}"]', 0.5, 0.5, click=True)
        wait_for_settings(explorer, state)
        current = "[...document.querySelectorAll('.explorer-tries a')].map(link => link.ariaCurrent === 'true')"
        assert explorer.evaluate(current) == [other == at for other in range(len(links))]
        press_buttons(explorer, layer=0, head=0)  # the back button does not stop at these
        # Later than the explorer's own timer, which writes the address: timers of a page fire in their order.
        explorer.evaluate("new Promise(done => setTimeout(done, 400))")
        assert explorer.evaluate("location.hash").startswith("#layer=1&head=1&")
        states.append(state | {"layer": 0, "head": 0})
    # Two of these states are equal, so each step is counted: a second one before the first has ended would be lost.
    explorer.evaluate("window.steps = 0, addEventListener('popstate', () => { steps += 1; })")
    for step, state in enumerate(reversed(states[:-1]), 1):
        explorer.evaluate("history.back()")
        explorer.wait_for(f"steps === {step}")
        wait_for_settings(explorer, state)
    assert explorer.evaluate("location.hash") == ""
    assert explorer.problems == []
