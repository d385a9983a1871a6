"""Runs the tutorials and writes their pages: `python tools/build_tutorials.py [--out docs/tutorials] [scripts]`.

A tutorial is a script in jupytext's percent format. Its cells run from top to bottom in one namespace, each tutorial in
a process of its own, two at a time. The page gets the text, the code, what the code printed, the sources it showed and
its figures; beside the page lie, to download, the script, a notebook and `lesson.py`, which both import. Whatever
raises, a failing assert too, fails the build, which names the script's line.

An exercise is four cells: the task in a text cell, then code cells with the tags "exercise" (a stub), "solution" and
"check". The check must fail on the stub and pass on the solution; the page folds the solution.

Pages are the same, byte for byte, whenever they are built.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jupytext
import matplotlib
import matplotlib.pyplot as plt

from sla_ref.files import whole

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tutorials"
PAGES = ROOT / "docs" / "tutorials"
LESSON = SCRIPTS / "lesson.py"
TUTORIALS = sorted(set(SCRIPTS.glob("*.py")) - {LESSON})
AT_A_TIME = 2

INK = "#0f0e0d"  # stands in a figure for the colour of the text around it, which the reader's theme decides
STYLE = {
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(
        color=["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8F98"]
    ),
    "figure.constrained_layout.use": True,
    "figure.figsize": (6.8, 3.6),
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "hatch.color",
            "xtick.color",
            "ytick.color",
        ),
        INK,
    ),
}


sys.path.insert(0, str(SCRIPTS))  # where a tutorial finds its helper; Python does the same for a plain script
import lesson  # noqa: E402


class BuildError(Exception):
    """A tutorial that does not run, or is not written as one."""


class Cell(NamedTuple):
    kind: str
    """"markdown" or "code"."""
    text: str
    tag: str | None
    """"exercise", "solution", "check" or None."""
    line: int
    """Where the cell's text begins in the script."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_cells(script: Path) -> list[Cell]:
    """The cells of a script, with the line that each begins on."""
    text = script.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    markers = [number for number, line in enumerate(text.splitlines(), start=1) if line.startswith("# %%")]
    if len(markers) != len(notebook.cells):
        raise BuildError(f"{script.name}: every cell must begin with a line '# %%', the first one too")
    cells = []
    for marker, cell in zip(markers, notebook.cells, strict=True):
        tags = cell.metadata.get("tags", [])
        if unknown := set(tags) - {"exercise", "solution", "check"}:
            raise BuildError(f"{script.name}:{marker}: a tag must be exercise, solution or check, got {unknown}")
        cells.append(Cell(cell.cell_type, cell.source, tags[0] if tags else None, marker + 1))
    order = [cell.tag for cell in cells if cell.tag]
    if order != ["exercise", "solution", "check"] * (len(order) // 3):
        raise BuildError(f"{script.name}: an exercise is a stub, a solution and a check in this order, got {order}")
    if not cells or not cells[0].text.startswith("# "):
        raise BuildError(f"{script.name}: the first cell must be text that begins with the title, '# N. Title'")
    return cells


# --- running ---------------------------------------------------------------------------------------------------------


class Run:
    """The namespace that the cells of a script share, and what they put out."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self.figures = 0
        # Classes know their source by the module that they were made in.
        self.module = sys.modules["__main__"] = ModuleType("__main__")
        self.module.__file__ = str(script)

    def execute(self, cell: Cell) -> list[str]:
        """Runs a cell; returns its output as pieces of Markdown in the order in which they came."""
        pieces: list[str] = []
        printed = io.StringIO()

        def flush() -> None:
            if printed.getvalue():
                pieces.append(fenced(printed.getvalue(), "{ .text .output }"))
            printed.seek(0)
            printed.truncate()

        def show(source: lesson.Source) -> None:
            flush()
            pieces.append(fenced(source.code, f'python title="{source.caption}"'))

        lesson.show = show
        # Empty lines in front give every line the number that it has in the script.
        code = compile("\n" * (cell.line - 1) + cell.text, str(self.script), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, self.module.__dict__)
        flush()
        pieces += self._take_figures()
        return pieces

    def _take_figures(self) -> Iterator[str]:
        for number in plt.get_fignums():
            self.figures += 1
            yield inline_svg(plt.figure(number), f"{self.script.stem}-{self.figures}")
        plt.close("all")


def inline_svg(figure: matplotlib.figure.Figure, name: str) -> str:
    """A figure as SVG to stand inside a page, where INK is the colour of the page's text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style .*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    titles = [axes.get_title() or axes.get_title("left") for axes in figure.axes]
    title = figure.get_suptitle() or "; ".join(filter(None, titles)) or "figure"
    label = re.sub(r'[<>&"$]', "", title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return '<div class="figure">\n' + re.sub(r"\s*\n\s*", "\n", svg).strip() + "\n</div>\n"


def with_drawings(text: str) -> str:
    """Text with the drawings of tools/draw.py in the page, where their ink is the text's; a caption in italics follows.

    In the script, and so in the notebook, a drawing is an ordinary image, found from the folder of the tutorials.
    """

    def draw(match: re.Match[str]) -> str:
        svg = (ROOT / "docs" / "images" / f"{match[1]}.svg").read_text(encoding="utf-8").strip()
        return f'<div class="figure drawing" data-search-exclude>\n{svg}\n</div>\n\n{match[2]}\n{{ .caption }}'

    return re.sub(r"^!\[[^\]]*\]\(\.\./docs/images/([\w-]+)\.svg\)\n\n\*([^*]+)\*$", draw, text, flags=re.MULTILINE)


def fenced(text: str, language: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence} {language}\n{text.rstrip()}\n{fence}\n"


def render(script: Path) -> str:
    """Runs a script and returns its page."""
    plt.rcParams.update(STYLE)
    plt.show = lambda *args, **kwargs: None
    run = Run(script)
    page: list[str] = []
    for number, cell in enumerate(read_cells(script), start=1):
        try:
            if cell.kind == "markdown":
                page.append(with_drawings(cell.text) + "\n")
            elif cell.tag == "solution":
                solution = cell  # runs when its check has failed on the stub
            elif cell.tag == "check":
                require_failure(run, cell)
                hidden = [fenced(solution.text, "python"), *run.execute(solution)]
                page += [fenced(cell.text, "python"), *run.execute(cell), folded("Solution", "\n".join(hidden))]
            else:
                page += [fenced(cell.text, "python"), *run.execute(cell)]
        except Exception as error:
            raise BuildError(f"{where(script, error, cell)} (cell {number}): {explain(error)}") from error
        if number == 1:
            page.append(downloads(script))
    return "\n".join(page)


def require_failure(run: Run, check: Cell) -> None:
    """Runs a check on the stub, where it has to fail; in a copy of this process, so that it leaves nothing behind."""
    if (copy := os.fork()) == 0:
        try:
            run.execute(check)
        except Exception:
            os._exit(1)
        os._exit(0)
    if os.waitpid(copy, 0)[1] == 0:
        raise BuildError("the check passes on the stub, so that it checks nothing")


def where(script: Path, error: BaseException, cell: Cell) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(script)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    line = lines[-1] if lines else cell.line
    return f"{script.name}:{line}"


def explain(error: BaseException) -> str:
    return str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"


def folded(title: str, body: str) -> str:
    indented = "".join(f"    {line}\n" if line else "\n" for line in body.splitlines())
    return f'??? success "{title}"\n\n{indented}'


def downloads(script: Path) -> str:
    notebook = f"[notebook]({script.stem}.ipynb){{ download }}"
    needed = f"[{LESSON.name}]({LESSON.name}){{ download }}"
    return f"Download: [script]({script.name}){{ download }} · {notebook}, each with {needed}\n{{ .download }}\n"


def notebook_of(script: Path) -> str:
    """The script as a notebook that has not been run."""
    notebook = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # else random
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return jupytext.writes(notebook, fmt="ipynb")


# --- writing ---------------------------------------------------------------------------------------------------------


def build(script: Path, folder: Path) -> None:
    """Writes the page, the script and the notebook of a tutorial, and the helper that it imports."""
    files = {f"{script.stem}.md": render(script), f"{script.stem}.ipynb": notebook_of(script)}
    files |= {each.name: each.read_text(encoding="utf-8") for each in (script, LESSON)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def build_in_process(script: Path, folder: Path) -> tuple[int, str]:
    """`build` in a Python of its own: exit status and what it said."""
    fixed = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    fixed["CUDA_VISIBLE_DEVICES"] = ""  # the pages are made on a CPU, wherever they are made
    command = [sys.executable, __file__, "--here", "--out", str(folder), str(script)]
    done = subprocess.run(
        command, env=os.environ | fixed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    return done.returncode, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tutorials and write their pages.")
    parser.add_argument("scripts", nargs="*", type=Path, help="all of tutorials/ if none is named")
    parser.add_argument("--out", type=Path, default=PAGES, help="where the pages go")
    parser.add_argument("--here", action="store_true", help="one script, in this process")
    arguments = parser.parse_args()
    if arguments.here:
        try:
            build(arguments.scripts[0], arguments.out)
        except BuildError as error:
            traceback.print_exception(error.__cause__)
            print(error)
            return 1
        return 0
    scripts = [path.resolve() for path in arguments.scripts] or TUTORIALS
    failed = 0
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        done = pool.map(lambda script: build_in_process(script, arguments.out), scripts)
        for script, (status, said) in zip(scripts, done, strict=True):
            print(f"{'built' if status == 0 else 'FAILED'} {script.name}")
            if status:
                print(said, file=sys.stderr)
                failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
