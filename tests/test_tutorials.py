"""The builder of the tutorials' pages, on a small script; and every tutorial, run as a plain script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import SITE

from tools.build_tutorials import (
    LESSON,
    NEXT,
    ROOT,
    SCRIPTS,
    TUTORIALS,
    BuildError,
    build_in_process,
    helpers,
    read_cells,
)

SCRIPT = '''\
# %% [markdown]
# # 1. A lesson
#
# It says $x^2$.

# %%
import matplotlib.pyplot as plt
import torch

from sla_ref import reference
from lesson import check_exercise, expect, show_source

print("before")
show_source(reference.combine, reference.sparse_linear_attention)
print("after ```")

# %%
ends = [0, 1]
figure, axes = plt.subplots()
axes.plot(ends, ends, color="#D55E00")
axes.set(title="A <line>", xlabel="x (tokens)")
plt.show()

# %% [markdown]
# ## Exercises
#
# Double a number.

# %% tags=["exercise"]
def double(x):
    """Twice x."""
    ...

# %% tags=["solution"] mistake=["2 * x", "x * x"]
def double(x):
    """Twice x."""
    return 2 * x

# %% tags=["check"]
tried = globals().get("tried", 0) + 1
with check_exercise(1, double):
    expect("twice 2", double(2), 4)
    expect("twice a matrix", double(torch.ones(3, 2)), torch.full((3, 2), 2.0))
    print("right", tried)

# %%
print("the lesson goes on")

# %% [markdown]
# ## Recap
#
# Two is one and one.
#
# Next: [3. The linear branch](03_linear_branch.md)
'''
WRONG, RIGHT = "return x * x", "return 2 * x"


def write(folder: Path, text: str) -> Path:
    script = folder / "01_lesson.py"
    script.write_text(text, encoding="utf-8")
    return script


def build(folder: Path, text: str) -> tuple[int, str]:
    return build_in_process(write(folder, text), folder / "out")


def run_script(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a plain script, from that folder."""
    python_path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    for switch in ("TRITON_INTERPRET", "NUMBA_ENABLE_CUDASIM"):  # a tutorial that needs one sets it itself
        environment.pop(switch, None)
    return subprocess.run([sys.executable, script], env=environment, cwd=folder, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tutorial")
    status, said = build(folder, SCRIPT)
    assert status == 0, said
    return folder / "out"


@pytest.fixture(scope="module")
def page(built) -> str:
    return (built / "01_lesson.md").read_text(encoding="utf-8")


def test_output_and_sources_come_in_their_order(page):
    parts = [
        'print("before")',
        "``` { .text .output }\nbefore\n```",
        '``` python title="sla_ref/reference.py, combine"\ndef combine(',
        "```` { .text .output }\nafter ```\n````",  # a fence that its text does not close
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


def test_a_figure_is_inline_in_the_colour_of_the_text(page):
    svg = page[page.index('<div class="figure">') : page.index("</svg>")]
    assert 'aria-label="A line"' in svg and "#d55e00" in svg and "currentColor" in svg
    for foreign in ("#000000", "#ffffff", "#0f0e0d", "<style", "<metadata", "\n\n"):
        assert foreign not in svg.lower()


def test_the_solution_is_folded_and_comes_last(page):
    stub, check, solution = page.index("    ..."), page.index('expect("twice 2"'), page.index('??? success "Solution"')
    assert stub < check < solution < page.index("        return 2 * x")
    assert page.count(RIGHT) == 1 and WRONG not in page
    assert "right 1\nexercise 1: correct" in page[check:solution], "a try left something behind"


def test_what_draws_a_figure_is_folded(page):
    folded = page.index('??? quote "Code of the figure"')
    assert page.index("``` python\nends = [0, 1]\n```") < folded < page.index("    figure, axes = plt")
    assert page.index("    plt.show()\n    ```\n") < page.index('<div class="figure">')


def test_a_long_source_is_folded(page):
    title, lines = re.search(r'\?\?\? quote "(.+), sparse_linear_attention \((\d+) lines\)"', page).groups()
    assert title == "sla_ref/reference.py" and int(lines) > 25
    assert "    def sparse_linear_attention(" in page and "\ndef sparse_linear_attention(" not in page


def test_the_page_tells_its_reading_time_and_that_of_the_next(page):
    assert re.search(r"^0 minutes, exercises not counted · Download: ", page, re.MULTILINE)
    assert re.search(r"^Next: \[3. The linear branch\]\(03_linear_branch.md\), [1-9]\d minutes\.$", page, re.MULTILINE)


def test_downloads(built, page):
    offered = re.findall(r"\]\((\S+)\)\{ download \}", page)
    assert sorted([*offered, "01_lesson.md"]) == sorted(path.name for path in built.iterdir())
    assert offered.index("01_lesson.py") < offered.index("01_lesson_solutions.py")
    assert (built / "lesson.py").read_bytes() == LESSON.read_bytes()
    assert '`pip install ".[lab,notebooks]"` and `jupyter lab tutorials/01_lesson.ipynb`' in page


def test_downloads_to_fill_in_hold_no_solution(built):
    script = (built / "01_lesson.py").read_text(encoding="utf-8")
    cells = json.loads((built / "01_lesson.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [cell["cell_type"][0] for cell in cells] == list("mccmcccm")
    for text in (script, "".join("".join(cell["source"]) + "\n" for cell in cells)):
        assert "    ..." in text and "check_exercise(1, double)" in text
        assert RIGHT not in text and WRONG not in text and "mistake" not in text
        assert text.index("A wrong answer stops it with an error") < text.index("import")
    solutions = (built / "01_lesson_solutions.py").read_text(encoding="utf-8")
    assert RIGHT in solutions and "    ...\n" not in solutions and "mistake" not in solutions


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        ("...", 0, "exercise 1: double is not filled in yet\nthe lesson goes on\n"),
        (
            WRONG,
            1,
            "exercise 1, double: twice a matrix: expected 2.0, got 1.0 at [0, 0]; wrong in 3 of 3 rows, 0 to 2\n",
        ),
    ],
)
def test_a_downloaded_tutorial_judges_the_answer(built, tmp_path, answer, status, says):
    """It runs in a folder of its own: it needs only what its page offers, not a clone."""
    (tmp_path / "lesson.py").write_bytes((built / "lesson.py").read_bytes())
    script = tmp_path / "01_lesson.py"
    text = (built / "01_lesson.py").read_text(encoding="utf-8")
    script.write_text(text.replace("    ...\n", f"    {answer}\n"), encoding="utf-8")
    done = run_script(script, built.parent)
    assert done.returncode == status and (done.stderr if status else done.stdout).endswith(says), done


def test_the_downloaded_solutions_run(built):
    done = run_script(built / "01_lesson_solutions.py", built.parent)
    assert done.returncode == 0 and "exercise 1: correct" in done.stdout


def test_the_same_bytes_again(built, tmp_path):
    assert build(tmp_path, SCRIPT)[0] == 0
    for file in built.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def failure(folder: Path, text: str) -> str:
    """What the builder says last of a script that it refuses; nothing may have been written."""
    status, said = build(folder, text)
    assert status == 1
    assert not (folder / "out").exists()
    return said.strip().splitlines()[-1]


def test_a_failing_assert_is_named_with_line_and_cell(tmp_path):
    text = SCRIPT.replace("ends = [0, 1]", "number = 1\n\nassert number == 2, 'no'")
    line = text.splitlines().index("assert number == 2, 'no'") + 1
    assert failure(tmp_path, text) == f"01_lesson.py:{line} (cell 3): AssertionError: no"


def test_a_check_that_passes_on_the_stub_is_refused(tmp_path):
    text = re.sub("    expect.*\n", "", SCRIPT)
    line = text.splitlines().index('# %% tags=["check"]') + 2
    assert failure(tmp_path, text).startswith(f"01_lesson.py:{line} (cell 7): the check must report the stub")


def test_a_check_that_passes_on_the_mistake_is_refused(tmp_path):
    text = re.sub('    expect."twice a.*\n', "", SCRIPT)  # 2 * 2 is 2 + 2
    assert "(cell 7): the check must fail on a wrong answer; it passes with 'x * x'" in failure(tmp_path, text)


def test_a_wrong_solution_is_refused(tmp_path):
    text = SCRIPT.replace("return 2 * x", "return 3 - 2 * x")
    assert "(cell 7): WrongAnswer: exercise 1, double: twice 2: expected 4.0, got -1.0" in failure(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print(1)\n\n# %%\nprint(2)\n", "every cell must begin with a line '# %%'"),
        ("# %%\nprint(1)\n", "the first cell must be text that begins with the title"),
        ('# %% [markdown]\n# # 1. T\n\n# %% tags=["answer"]\n1\n', "a tag must be exercise, solution or check"),
        (re.sub(r'(# %%) tags=\["solution"\].*', r"\1", SCRIPT), "an exercise is a stub, a solution and a check"),
        (re.sub(" mistake=.*", "", SCRIPT), "a solution names a mistake"),
        (SCRIPT.replace('mistake=["2 * x"', 'mistake=["3 * x"'), "a solution names a mistake"),
        (SCRIPT.replace("check_exercise(1, ", "check_exercise(2, "), r"the check must be in `with check_exercise\(1, "),
        (SCRIPT.replace("## Recap", "## The end"), "the last cell must be text: '## Recap'"),
        (SCRIPT.replace("Next: ", "Then: "), "the last cell must be text: '## Recap'"),
        (SCRIPT.replace('print("before")', f"print({'before' * 20!r})"), "code must have at most 100 columns, got 129"),
        (SCRIPT.replace("figure, axes =", "drawing, axes ="), r"plt.show\(\) must close what begins with `figure, "),
    ],
)
def test_what_is_no_tutorial(tmp_path, text, message):
    with pytest.raises(BuildError, match=message):
        read_cells(write(tmp_path, text))


def test_a_page_offers_the_modules_that_its_tutorial_imports():
    beside = {path.stem for path in LESSON.parent.glob("*.py")}
    for script in TUTORIALS:
        imported = set(re.findall(r"^(?:from|import) (\w+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert imported & beside <= {helper.stem for helper in helpers(script)}, script.name


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_is_written_as_a_tutorial(script: Path):
    text = read_cells(script)[-1].text
    page = NEXT.search(text)[1]
    target = SCRIPTS / f"{page}.py" if page[0].isdigit() else (ROOT / "docs" / "tutorials" / f"{page}.md").resolve()
    title = re.search(r"^(?:# )?# (?!%%)(.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"Next: [{title}](" in text


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_runs_as_a_plain_script(script: Path, tmp_path):
    """It runs from another folder. `make docs` sees to it that each check reports its stub and fails on the mistake.

    What `make docs` has run since the package and the tutorial last changed does not run again, but for a quick one.
    """
    page = SITE / "tutorials" / f"{script.stem}.html"
    sources = [script, *helpers(script), *(ROOT / "src").rglob("*.py")]
    sources += (ROOT / "benchmarks" / "results").rglob("*.json")
    quick = script.stem == "04_algorithm_1"
    if not quick and page.exists() and page.stat().st_mtime > max(p.stat().st_mtime for p in sources):
        pytest.skip("make docs ran it as it is now")
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    exercises = [cell for cell in read_cells(script) if cell.tag == "check"]
    assert done.stdout.count(": correct\n") == len(exercises)
    assert list(tmp_path.iterdir()) == [], "a tutorial leaves no files behind"
