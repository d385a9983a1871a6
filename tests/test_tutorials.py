"""The builder of the tutorials' pages, on a small script; and every tutorial, run as a plain script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import SITE

from tools.build_tutorials import LESSON, ROOT, TUTORIALS, BuildError, build_in_process, read_cells

SCRIPT = '''\
# %% [markdown]
# # 1. A lesson
#
# It says $x^2$.

# %%
import matplotlib.pyplot as plt

from sla_ref import reference
from lesson import show_source

print("before")
show_source(reference.combine)
print("after ```")

# %%
figure, axes = plt.subplots()
axes.plot([0, 1], [0, 1], color="#D55E00")
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

# %% tags=["solution"]
def double(x):
    """Twice x."""
    return 2 * x

# %% tags=["check"]
tried = globals().get("tried", 0) + 1
assert double(2) == 4
print("right", tried)
'''


def write(folder: Path, text: str) -> Path:
    script = folder / "01_lesson.py"
    script.write_text(text, encoding="utf-8")
    return script


def build(folder: Path, text: str) -> tuple[int, str]:
    return build_in_process(write(folder, text), folder / "out")


def run_script(script: Path, folder: Path) -> None:
    """As a plain script, from that folder."""
    python_path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    for switch in ("TRITON_INTERPRET", "NUMBA_ENABLE_CUDASIM"):  # a tutorial that needs one sets it itself
        environment.pop(switch, None)
    done = subprocess.run([sys.executable, script], env=environment, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


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
    stub, check, solution = page.index("    ..."), page.index("assert double(2)"), page.index('??? success "Solution"')
    assert stub < check < solution < page.index("        return 2 * x")
    assert page.count("return 2 * x") == 1
    assert "right 1" in page[check:solution], "the try on the stub left something behind"


def test_downloads(built, page):
    assert "[script](01_lesson.py)" in page and "[notebook](01_lesson.ipynb)" in page
    assert (built / "01_lesson.py").read_text(encoding="utf-8") == SCRIPT
    assert "[lesson.py](lesson.py)" in page and (built / "lesson.py").read_bytes() == LESSON.read_bytes()
    cells = json.loads((built / "01_lesson.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code", "markdown", "code", "code", "code"]


def test_a_downloaded_tutorial_runs_in_a_folder_of_its_own(built):
    """It needs what its page offers, and no clone."""
    script = built.parent / "download" / "01_lesson.py"
    script.parent.mkdir()
    for name in ("01_lesson.py", "lesson.py"):
        (script.parent / name).write_bytes((built / name).read_bytes())
    run_script(script, built.parent)


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
    text = "# %% [markdown]\n# # 1. A lesson\n\n# %%\nnumber = 1\n\nassert number == 2, 'no'\n"
    assert failure(tmp_path, text) == "01_lesson.py:7 (cell 2): AssertionError: no"


def test_a_check_that_passes_on_the_stub_is_refused(tmp_path):
    text = SCRIPT.replace("assert double(2) == 4", "assert double")
    line = text.splitlines().index('# %% tags=["check"]') + 2
    assert failure(tmp_path, text).startswith(f"01_lesson.py:{line} (cell 7): the check passes on the stub")


def test_a_wrong_solution_is_refused(tmp_path):
    text = SCRIPT.replace("return 2 * x", "return 3 * x")
    assert "(cell 7): AssertionError" in failure(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print(1)\n\n# %%\nprint(2)\n", "every cell must begin with a line '# %%'"),
        ("# %%\nprint(1)\n", "the first cell must be text that begins with the title"),
        ('# %% [markdown]\n# # 1. T\n\n# %% tags=["answer"]\n1\n', "a tag must be exercise, solution or check"),
        (SCRIPT.replace('# %% tags=["solution"]', "# %%"), "an exercise is a stub, a solution and a check"),
    ],
)
def test_what_is_no_tutorial(tmp_path, text, message):
    with pytest.raises(BuildError, match=message):
        read_cells(write(tmp_path, text))


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_runs_as_a_plain_script(script: Path, tmp_path):
    """From another folder. That each check fails on its stub is seen to by `make docs`.

    What `make docs` has run since the package and the tutorial last changed does not run again, but for the first.
    """
    page = SITE / "tutorials" / f"{script.stem}.html"
    sources = [script, LESSON, *(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks" / "results").rglob("*.json")]
    if script != TUTORIALS[0] and page.exists() and page.stat().st_mtime > max(p.stat().st_mtime for p in sources):
        pytest.skip("make docs ran it as it is now")
    run_script(script, tmp_path)
    assert list(tmp_path.iterdir()) == [], "a tutorial leaves no files behind"
