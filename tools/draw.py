"""Draws the schematics of the site: `python tools/draw.py` writes docs/images/*.svg, the same bytes every time.

The ink of a drawing is `currentColor`. Inside a page it is therefore the colour of the text, in light and in dark mode;
in a file of its own it is the `color` of the root element. The three classes have their colours from
docs/stylesheets/extra.css, and the marks that the mask explorer gives them: critical a dot, negligible a stroke.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CRITICAL, MARGINAL, NEGLIGIBLE, NEUTRAL = 1, 0, -1, 2
COLOURS = {NEUTRAL: "currentColor", CRITICAL: "#d55e00", MARGINAL: "#56b4e9", NEGLIGIBLE: "#8a8f98"}
LIGHT_INK, DARK_INK = "#1f2328", "#e6edf3"
SANS = "-apple-system,BlinkMacSystemFont,Helvetica,Arial,sans-serif"  # the site's own
SERIF = "'STIX Two Text','Times New Roman','Liberation Serif',Times,serif"
TEXT, SMALL = 18, 15.5
FAINT = 0.62  # opacity of remarks


class Drawing:
    """Shapes in the order in which they are painted, on a canvas without a background."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def svg(self, ink: str = LIGHT_INK) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}"'
            f' viewBox="0 0 {self.width} {self.height}" color="{ink}" role="img" aria-label="{escape(self.title)}"'
            f' font-family="{SANS}" font-size="{TEXT}" fill="none" stroke-width="1.5">'
        )
        return "\n".join([head, *self.parts, "</svg>\n"])

    def shape(self, name: str, **attributes: object) -> None:
        pairs = ((key.replace("_", "-"), number(value)) for key, value in attributes.items() if value is not None)
        self.parts.append(f"<{name} " + " ".join(f'{key}="{value}"' for key, value in pairs) + "/>")

    def path(self, d: str, *, stroke: object = "currentColor", **more: object) -> None:
        self.shape("path", d=d, stroke=stroke, **more)

    def text(self, x: float, y: float, words: str, *, at: str = "middle", size: float = TEXT, **more: object) -> None:
        """One line whose middle is at height y. The parts between dollars are maths: `$H_i$`, `$O^{s}$`."""
        options = {"text-anchor": at if at != "start" else None, "font-size": size if size != TEXT else None, **more}
        pairs = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in options.items() if value is not None)
        place = f'x="{number(x)}" y="{number(y + 0.35 * size)}"'
        self.parts.append(f'<text {place} fill="currentColor"{pairs}>{spans(words, size)}</text>')

    def remark(self, x: float, y: float, words: str, *, at: str = "middle", size: float = SMALL) -> None:
        self.text(x, y, words, at=at, size=size, fill_opacity=FAINT)

    def box(self, x: float, y: float, width: float, height: float, kind: int | None = None, **more: object) -> None:
        """A rounded box; with a class, tinted in its colour."""
        tint = {"fill": COLOURS[kind], "fill_opacity": 0.16, "stroke": COLOURS[kind]} if kind is not None else {}
        self.shape("rect", x=x, y=y, width=width, height=height, **{"rx": 6, "stroke": "currentColor", **tint, **more})

    def cell(self, x: float, y: float, size: float, kind: int, opacity: float | None = None) -> None:
        """A block of the map, or any square in the colour and with the mark of a class."""
        self.shape("rect", x=x, y=y, width=size, height=size, fill=COLOURS[kind], opacity=opacity)
        if kind == CRITICAL:
            self.shape("circle", cx=x + size / 2, cy=y + size / 2, r=size * 0.19, fill="#000", opacity=opacity)
        elif kind == NEGLIGIBLE:
            a, b = size * 0.24, size * 0.76
            self.path(
                f"M{number(x + a)} {number(y + b)}L{number(x + b)} {number(y + a)}",
                stroke="#000",
                stroke_width=max(1, size / 14),
                opacity=opacity,
            )

    def grid(self, x: float, y: float, size: float, labels: list[list[int]], gap: float = 1) -> None:
        for i, row in enumerate(labels):
            for j, kind in enumerate(row):
                self.cell(x + j * size, y + i * size, size - gap, kind)

    def arrow(
        self, *points: tuple[float, float], head: float = 7, colour: str = "currentColor", **more: object
    ) -> None:
        """A line through the points with a head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        u, v = (x1 - x0) / length, (y1 - y0) / length
        neck = (x1 - u * head * 0.8, y1 - v * head * 0.8)
        self.line(*points[:-1], neck, stroke=colour, **more)
        wing = head * 0.5
        corners = [(x1, y1), *((x1 - u * head - s * v * wing, y1 - v * head + s * u * wing) for s in (1, -1))]
        self.path(f"M{through(corners)}Z", stroke=None, fill=colour)

    def line(self, *points: tuple[float, float], **more: object) -> None:
        self.path(f"M{through(points)}", **{"stroke_linejoin": "round", **more})

    def plus(self, x: float, y: float, r: float = 15) -> None:
        self.shape("circle", cx=x, cy=y, r=r, stroke="currentColor")
        self.line((x - r / 2, y), (x + r / 2, y))
        self.line((x, y - r / 2), (x, y + r / 2))

    def cross(self, x: float, y: float, r: float = 6) -> None:
        self.path(f"M{x - r} {y - r}L{x + r} {y + r}M{x - r} {y + r}L{x + r} {y - r}")

    def upright(self, x: float, y: float, words: str, size: float = SMALL) -> None:
        """A remark that reads from bottom to top."""
        self.parts.append(f'<g transform="translate({number(x)} {number(y)}) rotate(-90)">')
        self.remark(0, 0, words, size=size)
        self.parts.append("</g>")


def number(value: object) -> object:
    """Floats with at most two digits behind the point, and no point where there is none."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def through(points: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{number(x)} {number(y)}" for x, y in points)


def spans(words: str, size: float) -> str:
    """A line as SVG text, with the maths between dollars set as such."""
    plain_and_maths = words.split("$")
    return "".join(maths(part, size) if odd % 2 else escape(part) for odd, part in enumerate(plain_and_maths))


def maths(formula: str, size: float) -> str:
    """Letters are italic, digits and signs upright; `_x`, `^x`, `_{xy}` and `^{xy}` are lowered and raised."""
    out = []
    for shift, group, single, plain in re.findall(r"([_^])(?:\{([^}]*)\}|(.))|([^_^]+)", formula):
        body = re.sub(r"([A-Za-zα-ω]+)|([^A-Za-zα-ω]+)", italic, plain or group or single)
        if shift:
            dy = size * (0.2 if shift == "_" else -0.38)
            small = f'font-size="{number(size * 0.72)}"'
            body = f'<tspan dy="{number(dy)}" {small}>{body}</tspan><tspan dy="{number(-dy)}">\u200b</tspan>'
        out.append(body)
    return f'<tspan font-family="{SERIF}" font-size="{number(size * 1.1)}">{"".join(out)}</tspan>'


def italic(match: re.Match[str]) -> str:
    return f'<tspan font-style="italic">{match[1]}</tspan>' if match[1] else escape(match[2])


def example_map() -> list[list[int]]:
    """20 by 20 blocks with the default ratios: 1 critical and 2 negligible block in every row."""
    critical = (0, 1, 3, 3, 4, 6, 6, 3, 8, 9, 10, 12, 3, 13, 14, 14, 3, 16, 18, 19)
    rows = []
    for i, j in enumerate(critical):
        row = [MARGINAL] * 20
        row[(j + 6 + 3 * i % 5) % 20] = row[(j + 12 + 5 * i % 6) % 20] = NEGLIGIBLE
        row[j] = CRITICAL
        rows.append(row)
    return rows


# --- the drawings ----------------------------------------------------------------------------------------------------

METHOD = (
    "SLA on one page. The map of query blocks by key blocks has three classes. Critical blocks, 5 per cent, get exact"
    " softmax attention and give O^s. Marginal blocks, 85 per cent, share one linear attention and give O^l, which goes"
    " through Proj. Negligible blocks, 10 per cent, are skipped. The sum of O^s and Proj of O^l is the output O."
)
LANES = [
    (CRITICAL, "critical, 5 %", "exact softmax"),
    (MARGINAL, "marginal, 85 %", "linear attention"),
    (NEGLIGIBLE, "negligible, 10 %", "skipped"),
]


def method() -> Drawing:
    d = Drawing(960, 340, METHOD)
    x, y, size, row = 40, 40, 14, 9
    d.remark(x + 140, 20, "key blocks", size=17)
    d.upright(20, y + 140, "query blocks", size=17)
    d.grid(x, y, size, example_map())
    middle = y + (row + 0.5) * size - 0.5
    d.box(x - 3, y + row * size - 3, 20 * size + 5, size + 5, rx=3, stroke_width=2)
    bus, left, width = 356, 392, 248
    centres = (middle - 103, middle, middle + 103)
    d.line((x + 20 * size + 2, middle), (bus, middle))
    for centre, (kind, name, what) in zip(centres, LANES, strict=True):
        d.arrow((bus, middle), (bus, centre), (left, centre))
        d.box(left, centre - 37, width, 74, kind, stroke_dasharray="5 4" if kind == NEGLIGIBLE else None)
        d.cell(left + 16, centre - 18, 36, kind)
        d.text(left + 66, centre - 13, name, at="start", size=19, font_weight=600)
        d.text(left + 66, centre + 14, what, at="start", size=19)
    right, plus = left + width, 868
    top, mid, low = centres
    d.arrow((right, top), (plus, top), (plus, mid - 62))
    d.text(right + 60, top - 18, "$O^s$", size=21)
    d.plus(plus, mid - 46)
    d.arrow((right, mid), (732, mid))
    d.text(right + 44, mid - 18, "$O^l$", size=21)
    d.box(732, mid - 24, 84, 48)
    d.text(774, mid, "Proj", size=19)
    d.arrow((816, mid), (plus, mid), (plus, mid - 30))
    d.arrow((plus + 15, mid - 46), (924, mid - 46))
    d.text(942, mid - 47, "$O$", size=23)
    d.line((right, low), (right + 30, low), stroke_dasharray="5 4")
    d.cross(right + 43, low)
    return d


def method_tall() -> Drawing:
    d = Drawing(360, 418, METHOD)
    x, y, size, row = 90, 24, 9, 9
    d.remark(x + 90, 9, "key blocks")
    d.upright(x - 16, y + 90, "query blocks")
    d.grid(x, y, size, example_map())
    middle = y + (row + 0.5) * size - 0.5
    d.box(x - 2.5, y + row * size - 2.5, 20 * size + 4, size + 4, rx=2.5)
    bus, top = 222, 240
    d.line((x + 20 * size + 2, middle), (301, middle), (301, bus))
    for n, (kind, name, what) in enumerate(LANES):
        left = 2 + n * 121
        centre = left + 57
        d.arrow((301, bus), (centre, bus), (centre, top))
        d.box(left, top, 114, 72, kind, stroke_dasharray="5 4" if kind == NEGLIGIBLE else None)
        share = name.split(", ")
        d.cell(left + 10, top + 8, 17, kind)
        d.text(left + 33, top + 17, share[1], at="start", size=14.5, font_weight=600)
        d.text(centre, top + 38, share[0], size=14.5, font_weight=600)
        d.text(centre, top + 57, what, size=13)
    left, middle, right, end = 59, 180, 301, 401
    d.arrow((left, top + 72), (left, end), (middle - 15, end))
    d.text(left - 20, top + 96, "$O^s$", size=17)
    d.arrow((middle, top + 72), (middle, top + 98))
    d.text(middle + 20, top + 85, "$O^l$", size=17)
    d.box(middle - 34, top + 98, 68, 32)
    d.text(middle, top + 114, "Proj")
    d.arrow((middle, top + 130), (middle, end - 15))
    d.plus(middle, end)
    d.arrow((middle + 15, end), (middle + 66, end))
    d.text(middle + 84, end - 1, "$O$", size=20)
    d.line((right, top + 72), (right, top + 92), stroke_dasharray="4 3")
    d.cross(right, top + 102)
    return d


def brackets() -> Drawing:
    d = Drawing(
        680,
        424,
        "The same product with two brackets. Left: phi(Q) times phi(K) transposed comes first and makes an N by N"
        " matrix. Right: phi(K) transposed times V comes first and makes a D by D matrix.",
    )
    n, k, gap, top = 112, 22, 54, 66
    shapes = ((k, n, "$φ(Q)$"), (n, k, "$φ(K)^⊤$"), (k, n, "$V$"))
    d.line((338, 10), (338, 414), opacity=0.25)
    for left, first in ((20, True), (366, False)):
        x, edges = float(left + 10), []
        for width, height, name in shapes:
            y = top + (n - height) / 2
            d.box(x, y, width, height, rx=1)
            d.text(x + width / 2, y + height + 17, name, size=16)
            edges.append((x, x + width))
            x += width + gap
        d.text(left + 153, 20, "$(φ(Q) φ(K)^⊤) V$" if first else "$φ(Q) (φ(K)^⊤ V)$", size=22)
        d.remark(left, top + n / 2, "$N$", at="end")
        d.remark(left + 10 + k / 2, top - 13, "$D$")
        start, end = (edges[0][0], edges[1][1]) if first else (edges[1][0], edges[2][1])
        middle, low = (start + end) / 2, top + n + 40
        d.line((start, low - 8), (start, low), (end, low), (end, low - 8))
        d.arrow((middle, low), (middle, low + 24))
        size = n if first else k
        d.box(middle - size / 2, low + 32, size, size, MARGINAL, rx=1)
        words = middle + size / 2 + 14 if first else middle - size / 2 - 14
        side = "start" if first else "end"
        d.text(words, low + 44, "$N × N$" if first else "$D × D$", at=side, font_weight=600)
        d.remark(words, low + 70, "grows with $N^2$" if first else "whatever $N$ is", at=side)
        d.text(left + 153, 386, "$2 N^2 D$ multiplications" if first else "$2 N D^2$ multiplications")
        numbers = "$N$ = 32,760: 1,073,217,600 numbers" if first else "$D$ = 128: 16,384 numbers"
        d.remark(left + 153, 412, numbers)
    return d


def states() -> Drawing:
    d = Drawing(
        680,
        330,
        "Eight key blocks have a state h each. Row i of the map says which of them are marginal; lines lead from these"
        " five alone to a sum, the state H_i of the query block. Critical and negligible blocks have no line.",
    )
    row = [MARGINAL, CRITICAL, MARGINAL, MARGINAL, NEGLIGIBLE, MARGINAL, CRITICAL, MARGINAL]
    size, pitch, x0 = 38, 62, 168
    for y, words, what in (
        (26, "key blocks", "tokens"),
        (108, "states", "$D × D$, made once"),
        (190, "row $i$ of the map", "query block $i$"),
    ):
        d.text(0, y - 10, words, at="start")
        d.remark(0, y + 12, what, at="start")
    sums = []
    for j, kind in enumerate(row):
        x = x0 + j * pitch
        middle = x + size / 2
        d.box(middle - 27, 13, 54, 26, rx=2)
        d.text(middle, 25, f"$K_{j}, V_{j}$", size=14)
        d.arrow((middle, 39), (middle, 86))
        d.box(x, 89, size, size, rx=2)
        d.text(middle, 107, f"$h_{j}$")
        d.line((middle, 127), (middle, 171), opacity=1 if kind == MARGINAL else 0.25)
        d.cell(x, 171, size, kind)
        if kind == MARGINAL:
            d.line((middle, 171 + size), (middle, 240))
            sums.append((j, middle))
    centre = (sums[0][1] + sums[-1][1]) / 2
    d.line((sums[0][1], 240), (sums[-1][1], 240))
    d.arrow((centre, 240), (centre, 268))
    d.box(centre - 22, 271, 44, 44, MARGINAL, rx=2)
    d.text(centre, 292, "$H_i$")
    d.text(centre + 36, 292, "$= " + " + ".join(f"h_{j}" for j, _ in sums) + "$", at="start")
    d.remark(centre - 36, 292, "$D × D$ again", at="end")
    return d


def row() -> Drawing:
    d = Drawing(
        680,
        290,
        "A query block walks along the six key blocks of its row. At critical blocks 1, 2 and 5 it updates m, l and O,"
        " at marginal blocks 0 and 3 it updates H and Z, at the negligible block 4 nothing. At the end m, l and O"
        " give O^s and L, and H and Z give O^l.",
    )
    kinds = [MARGINAL, CRITICAL, CRITICAL, MARGINAL, NEGLIGIBLE, CRITICAL]
    size, pitch, x0, x1 = 42, 72, 122, 560
    lanes = {CRITICAL: (150, "$m, l, O$"), MARGINAL: (218, "$H, Z$")}
    d.text(0, 58, "row 3", at="start")
    for y, name in lanes.values():
        d.text(0, y, name, at="start", size=20)
        d.arrow((84, y), (x1, y))
    for j, kind in enumerate(kinds):
        middle = x0 + j * pitch + size / 2
        d.remark(middle, 18, str(j))
        d.cell(middle - size / 2, 37, size, kind)
        if kind == NEGLIGIBLE:
            d.cross(middle, 98)
            continue
        y, _ = lanes[kind]
        for (
            below,
            _,
        ) in lanes.values():  # a critical block's arrow ends on the first line, a marginal one's on the second
            if below < y:
                d.line((middle, 79), (middle, below - 8))
                d.path(f"M{middle} {below - 8}A8 8 0 0 1 {middle} {below + 8}")
        d.arrow((middle, (y - 60 if kind == MARGINAL else 79)), (middle, y - 11))
        d.shape("circle", cx=middle, cy=y, r=11, fill=COLOURS[kind])
        if kind == CRITICAL:
            d.shape("circle", cx=middle, cy=y, r=4, fill="#000")
    d.text(x1 + 10, 150, "$O^s, L$", at="start", size=20)
    d.text(x1 + 10, 218, "$O^l$", at="start", size=20)
    for x, kind, words in (
        (122, CRITICAL, "online softmax"),
        (302, MARGINAL, "add $h_j, z_j$"),
        (462, NEGLIGIBLE, "nothing"),
    ):
        d.cell(x, 262, 18, kind)
        d.remark(x + 26, 271, words, at="start")
    return d


def walks() -> Drawing:
    d = Drawing(
        680,
        432,
        "The same 6 by 6 map twice. Left: one program owns row 2 and walks along its critical blocks 0, 2 and 5 from"
        " left to right. Right: one program owns column 2 and walks down its critical blocks 1, 2 and 4.",
    )
    lists = [(0, 1, 4), (1, 2, 3), (0, 2, 5), (0, 3, 4), (2, 3, 5), (0, 4, 5)]
    size, top, mono = 36, 88, "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    for left, along_row in ((30, True), (418, False)):
        middle, end = left + 3 * size, top + 6 * size
        d.text(middle, 16, "forward, $dQ$: along a row" if along_row else "$dK$, $dV$: down a column", font_weight=600)
        d.remark(middle, 42, "a program owns a query block" if along_row else "a program owns a key block")
        steps = 0
        for i in range(6):
            d.remark(left - 14, top + (i + 0.5) * size, str(i))
            d.remark(left + (i + 0.5) * size, top - 14, str(i))
            for j in range(6):
                x, y = left + j * size, top + i * size
                mine = (i if along_row else j) == 2
                if j not in lists[i]:
                    d.box(x + 0.75, y + 0.75, size - 1.5, size - 1.5, rx=0, opacity=0.6 if mine else 0.18)
                elif not mine:
                    d.cell(x + 0.5, y + 0.5, size - 1, CRITICAL, opacity=0.3)
                else:
                    steps += 1
                    d.shape("rect", x=x + 0.5, y=y + 0.5, width=size - 1, height=size - 1, fill=COLOURS[CRITICAL])
                    d.text(x + size / 2, y + size / 2, str(steps), size=19, font_weight=700, color="#000")
        edge = 2 * size - 1.5
        if along_row:
            d.box(left - 1.5, top + edge, 6 * size + 3, size + 3, rx=3, stroke_width=2.5)
            d.arrow((left + 6 * size + 6, top + 2.5 * size), (left + 6 * size + 30, top + 2.5 * size))
            d.text(left + 6 * size + 35, top + 2.5 * size, "$O_2, dQ_2$", at="start")
        else:
            d.box(left + edge, top - 1.5, size + 3, 6 * size + 3, rx=3, stroke_width=2.5)
            d.arrow((left + 2.5 * size, end + 6), (left + 2.5 * size, end + 30))
            d.text(left + 2.5 * size + 12, end + 22, "$dK_2, dV_2$", at="start")
        d.text(
            middle,
            end + 66,
            "kv_indices[2]" if along_row else "q_indices[q_offsets[2]:q_offsets[3]]",
            size=14,
            font_family=mono,
        )
        d.text(middle, end + 88, "= [0, 2, 5]" if along_row else "= [1, 2, 4]", size=14, font_family=mono)
        d.remark(
            middle,
            end + 116,
            "$Q_2$ stays; $K_j, V_j$ come and go" if along_row else "$K_2, V_2$ stay; $Q_i, dO_i$ come and go",
        )
    return d


def memory() -> Drawing:
    d = Drawing(
        680,
        436,
        "Three levels of memory. In HBM lie Q, K, V, O and L. Shared memory holds one tile of Q for the whole walk and"
        " two buffers for tiles of K and V. Registers hold S, P and the running m, l and O. For each block on the list"
        " a tile of K and one of V come up; at the end O_i and L_i go back.",
    )
    bands = ((2, "HBM", "all tokens"), (160, "shared memory", "tiles"), (318, "registers", "one step"))
    for y, name, what in bands:
        d.box(1, y, 678, 116, rx=10, opacity=0.35)
        d.text(16, y + 24, name, at="start", font_weight=600)
        d.remark(16, y + 50, what, at="start")
    columns = {"$Q$": (212, {2}), "$K$": (330, {0, 2, 5}), "$V$": (460, {0, 2, 5}), "$O, L$": (602, {2})}
    for name, (centre, used) in columns.items():
        d.text(centre + 8, 22, name)
        for n in range(6):
            x = centre - 40 + 16 * n
            listed = CRITICAL if len(used) > 1 else NEUTRAL
            d.box(x, 42, 16, 36, listed if n in used else None, rx=0, stroke="currentColor")
            if n in used and listed == CRITICAL:
                d.shape("circle", cx=x + 8, cy=60, r=3, fill="currentColor")
    q, k, v, o = (centre for centre, _ in columns.values())
    d.remark(k + 10, 98, "row $i$'s list", at="start", size=14)
    d.text(q + 10, 138, "once", at="start", size=SMALL)
    d.text((k + v) / 2, 138, "every step", size=SMALL)
    d.text(o - 10, 138, "at the end", at="end", size=SMALL)
    line = 376
    for centre, name in ((q, "$Q_i$"), (k, "$K_j$"), (v, "$V_j$")):
        if centre != q:
            d.box(centre - 16, 202, 48, 48, rx=2, stroke_dasharray="4 3", opacity=0.6)
        d.arrow((centre, 78), (centre, 192))
        d.box(centre - 24, 194, 48, 48, NEUTRAL if centre == q else CRITICAL, rx=2, stroke="currentColor")
        d.text(centre, 218, name)
        d.arrow((centre, 242), (centre, line - (13 if centre == v else 24)))
    d.remark(q - 34, 218, "stays", at="end")
    d.remark(v + 42, 208, "the next", at="start", size=14)
    d.remark(v + 42, 228, "on their way", at="start", size=14)
    d.box(q - 30, line - 24, k - q + 60, 48)
    d.text((q + k) / 2, line, "$S = Q_i K_j^⊤$")
    d.arrow((k + 30, line), (382, line))
    d.box(382, line - 24, 40, 48)
    d.text(402, line, "$P$")
    d.line((422, line), (v - 13, line))
    d.shape("circle", cx=v, cy=line, r=13, stroke="currentColor")
    d.cross(v, line, 5)
    d.arrow((v + 13, line), (o - 88, line))
    d.box(o - 88, line - 36, 152, 72, NEUTRAL, stroke_width=2.5)
    d.text(o - 12, line - 13, "$m, l, O$", size=20)
    d.remark(o - 12, line + 15, "stay")
    d.arrow((o, line - 36), (o, 82))
    d.text(o - 10, 297, "$O / l$,  $m +$ log $l$", at="end", size=SMALL)
    return d


def proj() -> Drawing:
    d = Drawing(
        680,
        356,
        "Two rows with the same O^s and the same O^r. In the first, 80 per cent of the attention is on critical keys"
        " and the full output O lies close to O^s. In the second it is 30 per cent and O lies far from O^s. The arrow"
        " Proj(O^l) is the same in both: too long for the first row, too short for the second.",
    )
    width, reach = 286, 0.45
    dx, dy = 252, -136
    length = (dx * dx + dy * dy) ** 0.5
    for left, share, verdict in ((14, 0.8, "too far"), (380, 0.3, "not far enough")):
        x0, y0 = left + 24, 288

        def place(t: float, below: float = 0, x0: float = x0, y0: float = y0) -> tuple[float, float]:
            """A point on the way from O^s to O^r, or so far below it."""
            return x0 + t * dx - below * dy / length, y0 + t * dy + below * dx / length

        d.text(left, 16, f"a row with $α = {share}$", at="start", font_weight=600)
        cut = width * share
        d.shape("rect", x=left, y=36, width=cut, height=20, fill=COLOURS[CRITICAL])
        d.shape("rect", x=left + cut, y=36, width=width - cut, height=20, fill=COLOURS[MARGINAL])
        for n in range(1, int(cut / 14)):
            d.shape("circle", cx=left + 14 * n, cy=46, r=2.6, fill="#000")
        d.remark(left, 73, "critical keys", at="start")
        d.remark(left + width, 73, "other keys", at="end")

        output, tip = 1 - share, reach
        d.line(place(0), place(1), opacity=0.5)
        d.arrow(place(0, 16), place(tip, 16), head=13, colour=COLOURS[MARGINAL], stroke_width=4)
        d.text(*place(0.3, 38), "Proj$(O^l)$", at="start")
        low, high = sorted((output, tip))
        d.line(place(low, -14), place(low, -22), place(high, -22), place(high, -14))
        d.text(*place((low + high) / 2, -34), verdict, at="end", size=SMALL)
        (sx, sy), (rx, ry), (ox, oy) = place(0), place(1), place(output)
        d.shape("circle", cx=sx, cy=sy, r=8, fill=COLOURS[CRITICAL])
        d.shape("circle", cx=sx, cy=sy, r=3, fill="#000")
        d.shape("circle", cx=rx, cy=ry, r=8, fill=COLOURS[MARGINAL])
        d.shape("circle", cx=ox, cy=oy, r=6, fill="currentColor")
        d.text(sx - 4, sy + 28, "$O^s$", size=20)
        d.text(rx + 4, ry - 26, "$O^r$", size=20)
        d.text(*((ox + 4, oy + 26) if output > tip else (ox - 24, oy - 10)), "$O$", size=20)
    return d


DRAWINGS = {
    "method": method,
    "method-tall": method_tall,
    "brackets": brackets,
    "states": states,
    "row": row,
    "walks": walks,
    "memory": memory,
    "proj": proj,
}


def files() -> dict[str, str]:
    """The name and the content of every file. README.md needs the first drawing in dark mode too."""
    drawn = {f"{name}.svg": draw().svg() for name, draw in DRAWINGS.items()}
    return drawn | {"method-dark.svg": method().svg(DARK_INK)}


if __name__ == "__main__":
    for name, svg in files().items():
        (IMAGES / name).write_text(svg, encoding="utf-8")
