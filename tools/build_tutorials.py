"""Runs the tutorials and writes their pages: `python tools/build_tutorials.py [--out docs/tutorials] [scripts]`.

A tutorial is a script in jupytext's percent format. Its cells run from top to bottom in one namespace, each tutorial in
a process of its own, two at a time. The page gets the text, the code, what the code printed, the sources it showed and
its figures. The code of a figure is folded, and so is a long source. Whatever raises, a failing assert too, fails the
build, which names the script's line.

An exercise is four cells: the task in a text cell, then code cells with the tags "exercise" (a stub), "solution" and
"check". The check is written with `lesson.check_exercise`. It must report the stub, pass on the solution, and fail on
the mistake that the solution's cell names: `mistake=["+ 1", ""]` replaces a piece of the solution's text. The page
folds the solution.

Next to the page are its downloads: the script and a notebook, both without the solutions, the script with the solutions
in place of the stubs, and `lesson.py`, which all of them import.

The last cell is a recap, and links to what to read next: "Next: [2. Title](02_name.md)".

Pages are the same, byte for byte, whenever they are built.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import linecache
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
STATES = SCRIPTS / "block_states.py"
TUTORIALS = sorted(set(SCRIPTS.glob("*.py")) - {LESSON, STATES})
AT_A_TIME = 2

WIDTH = 100  # columns of code that a page shows without a scroll bar on a screen of 1400 pixels
LONG = 25  # lines of a source, above which the page folds it
WORDS, LINES = 200, 10  # that somebody reads in a minute

FIGURE = re.compile(r"^figure, [^\n]*plt\.subplots.*?^plt\.show\(\)$", re.DOTALL | re.MULTILINE)
NEXT = re.compile(r"^Next: \[[^\]]+\]\(([\w./]+)\.md\)$", re.MULTILINE)

INK = "#0f0e0d"  # the page replaces it by the colour of its text, which the reader's theme decides
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
    mistake: tuple[str, str] | None
    """Of a solution: what to replace in it, and by what, to make it wrong."""


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
        text, mistake = cell.source, cell.metadata.get("mistake")
        cells.append(Cell(cell.cell_type, text, tags[0] if tags else None, marker + 1, mistake and tuple(mistake)))
        if tags == ["solution"] and (not mistake or text.count(mistake[0]) != 1):
            raise BuildError(f"{script.name}:{marker}: a solution names a mistake, a piece of its text and another")
        for number, line in enumerate(text.splitlines() if cell.cell_type == "code" else [], start=marker + 1):
            if len(line) > WIDTH:
                raise BuildError(f"{script.name}:{number}: code must have at most {WIDTH} columns, got {len(line)}")
        if cell.cell_type == "code" and "plt.show()" in FIGURE.sub("", text):
            raise BuildError(
                f"{script.name}:{marker}: plt.show() must close what begins with `figure, ... = plt.subplots`"
            )
    order = [cell.tag for cell in cells if cell.tag]
    if order != ["exercise", "solution", "check"] * (len(order) // 3):
        raise BuildError(f"{script.name}: an exercise is a stub, a solution and a check in this order, got {order}")
    for number, check in enumerate((cell for cell in cells if cell.tag == "check"), start=1):
        if f"with check_exercise({number}, " not in check.text:
            raise BuildError(f"{script.name}:{check.line}: the check must be in `with check_exercise({number}, ...`")
    if not cells or not cells[0].text.startswith("# "):
        raise BuildError(f"{script.name}: the first cell must be text that begins with the title, '# N. Title'")
    if not cells[-1].text.startswith("## Recap\n") or not re.search(NEXT, cells[-1].text):
        raise BuildError(f"{script.name}: the last cell must be text: '## Recap', and at its end 'Next: [title](page)'")
    return cells


def minutes(script: Path) -> int:
    """How long it takes to read a tutorial, without its exercises, figures' code and the sources that it shows."""
    cells = [cell for cell in read_cells(script) if not cell.tag]
    words = sum(len(cell.text.split()) for cell in cells if cell.kind == "markdown")
    lines = sum(len(FIGURE.sub("", cell.text).splitlines()) for cell in cells if cell.kind == "code")
    return 5 * round((words / WORDS + lines / LINES) / 5)


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
            lines = len(source.code.splitlines())
            if lines > LONG:
                pieces.append(folded("quote", f"{source.caption} ({lines} lines)", fenced(source.code, "python")))
            else:
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
    """A figure as SVG inside a page, where INK is the colour of the page's text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg")
    titles = [axes.get_title() or axes.get_title("left") for axes in figure.axes]
    return for_page(buffer.getvalue(), INK, figure.get_suptitle() or "; ".join(filter(None, titles)) or "figure")


def for_page(svg: str, ink: str, label: str) -> str:
    """An SVG of matplotlib for the inside of a page: `ink` becomes the colour of the page's text."""
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style .*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    label = re.sub(r'[<>&"$]', "", label)
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
                page.append(NEXT.sub(with_minutes, with_drawings(cell.text)) + "\n")
            elif cell.tag == "solution":
                solution = cell  # runs when its check has been tried on the stub
            elif cell.tag == "check":
                try_check(run, cell, solution)
                hidden = [fenced(solution.text, "python"), *run.execute(solution)]
                page += [fenced(cell.text, "python"), *run.execute(cell)]
                page.append(folded("success", "Solution", "\n".join(hidden)))
            else:
                page += [*shown(cell.text), *run.execute(cell)]
        except Exception as error:
            raise BuildError(f"{where(script, error, cell)} (cell {number}): {explain(error)}") from error
        if number == 1:
            page.append(downloads(script))
    return "\n".join(page)


def shown(code: str) -> Iterator[str]:
    """The code of a cell; what draws a figure is folded."""
    end = 0
    for figure in FIGURE.finditer(code):
        if before := code[end : figure.start()].strip():
            yield fenced(before, "python")
        yield folded("quote", "Code of the figure", fenced(figure[0], "python"))
        end = figure.end()
    if after := code[end:].strip():
        yield fenced(after, "python")


def try_check(run: Run, check: Cell, solution: Cell) -> None:
    """Raises BuildError unless the check reports the stub, which has run, and fails on the solution's mistake."""
    if verdict(run, check) != "not filled in yet":
        raise BuildError("the check must report the stub; it passes there, or fails outside of `with check_exercise`")
    old, new = solution.mistake
    wrong = solution._replace(text=solution.text.replace(old, new))
    if verdict(run, wrong, check) != "wrong":
        raise BuildError(f"the check must fail on a wrong answer; it passes with {new!r} for {old!r} in the solution")


def verdict(run: Run, *cells: Cell) -> str:
    """What a check at the end of the cells says; they run in a copy of this process, and leave nothing behind."""
    verdicts = ["correct", "not filled in yet", "wrong", "failed"]
    if (copy := os.fork()) == 0:
        said = "failed"
        try:
            lines = run.script.read_text(encoding="utf-8").splitlines(keepends=True)
            for cell in cells:  # Triton reads the source of a kernel: from here, where the text is not that of the file
                own = [line + "\n" for line in cell.text.splitlines()]
                lines[cell.line - 1 : cell.line - 1 + len(own)] = own
            linecache.cache[str(run.script)] = (0, None, lines, str(run.script))
            printed = "".join(piece for cell in cells for piece in run.execute(cell))
            said = "not filled in yet" if "not filled in yet" in printed else "correct"
        except lesson.WrongAnswer:
            said = "wrong"
        finally:
            os._exit(verdicts.index(said))
    return verdicts[os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])]


def where(script: Path, error: BaseException, cell: Cell) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(script)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    line = lines[-1] if lines else cell.line
    return f"{script.name}:{line}"


def explain(error: BaseException) -> str:
    return str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"


def folded(kind: str, title: str, body: str) -> str:
    indented = "".join(f"    {line}\n" if line else "\n" for line in body.splitlines())
    return f'??? {kind} "{title}"\n\n{indented}'


def with_minutes(link: re.Match[str]) -> str:
    """The link to the next page, with its reading time if it is a tutorial."""
    script = SCRIPTS / f"{link[1]}.py"
    return f"{link[0]}, {minutes(script)} minutes." if script.exists() else f"{link[0]}."


# --- downloads -------------------------------------------------------------------------------------------------------


def without(tag: str, script: Path) -> str:
    """The text of a script without the cells that have this tag."""
    cells = re.split(r"^(?=# %%)", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    left = "".join(cell for cell in cells if not cell.startswith(f'# %% tags=["{tag}"]'))
    return re.sub(r"^(# %%.*?) mistake=.*$", r"\1", left, flags=re.MULTILINE)


def to_fill_in(script: Path) -> str:
    """The script without the solutions; where it has exercises, the first cell says how to do them."""
    first, marker, rest = without("solution", script).partition("\n# %%")
    if has_exercises(script):
        first = first.rstrip() + "\n" + HOW_TO
    return first + marker + rest


HOW_TO = """\
#
# *Exercises: write your answers where a function has nothing in its body but `...`. A check follows each of them. It
# says "correct". While nothing is filled in, it says so and the lesson goes on. A wrong answer stops it with an error.*
"""


def downloads(script: Path) -> str:
    """The line below the title: how long the tutorial takes, what to download, and how a notebook is opened."""
    name, text = script.stem, script.read_text(encoding="utf-8")
    files = {"script": script.name, "notebook": f"{name}.ipynb"} | {each.name: each.name for each in helpers(script)}
    takes = f"{minutes(script)} minutes"
    if has_exercises(script):
        files["solutions"] = f"{name}_solutions.py"
        takes += ", exercises not counted"
    link = {what: f"[{what}]({file}){{ download }}" for what, file in files.items()}
    imported = " ".join(re.findall(r"^(?:import|from) (\S+)", text, re.MULTILINE))
    needed = [extra for extra in ("triton", "numba") if re.search(rf"\b{extra}\b", imported)]
    needed_files = " and ".join(link.pop(each.name) for each in helpers(script))
    return (
        f"{takes} · Download: {link.pop('script')} · {link.pop('notebook')} · "
        f"{needed_files}, which both need{''.join(f' · {each}' for each in link.values())}<br>\n"
        "To open the notebook, save it in the folder `tutorials` of a clone, then "
        f'`pip install ".[{",".join(["lab", "notebooks", *needed])}]"` and `jupyter lab tutorials/{name}.ipynb`.\n'
        "{ .download }\n"
    )


def helpers(script: Path) -> list[Path]:
    """The modules in the script's folder that it needs."""
    return [LESSON, STATES] if STATES.stem in script.read_text(encoding="utf-8") else [LESSON]


def has_exercises(script: Path) -> bool:
    return any(cell.tag for cell in read_cells(script))


def notebook_of(text: str) -> str:
    """A script as a notebook that has not been run."""
    notebook = jupytext.reads(text, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # else random
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return jupytext.writes(notebook, fmt="ipynb")


# --- writing ---------------------------------------------------------------------------------------------------------


def build(script: Path, folder: Path) -> None:
    """Writes the page of a tutorial and what can be downloaded from it."""
    exercises = to_fill_in(script)
    files = {f"{script.stem}.md": render(script), script.name: exercises}
    files[f"{script.stem}.ipynb"] = notebook_of(exercises)
    if has_exercises(script):
        files[f"{script.stem}_solutions.py"] = without("exercise", script)
    files |= {each.name: each.read_text(encoding="utf-8") for each in helpers(script)}
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
