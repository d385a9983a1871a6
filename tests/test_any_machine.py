"""What may not depend on the machine: the encoding of text, the numbers that a test draws, how programs print."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for name in ("src", "tests", "tools", "tutorials", "benchmarks", "experiments")
    for path in (ROOT / name).rglob("*.py")
]


def texts_without_encoding(source: str) -> Iterator[int]:
    """Lines that read, write or receive text in whatever encoding the machine's locale has."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if method else getattr(call.func, "id", "")
        modes = [each.value for each in (*call.args, *call.keywords) if isinstance(each, ast.Constant)]
        modes = [
            value for value in modes if isinstance(value, str) and 0 < len(value) <= 3 and set(value) <= set("rwaxbt+")
        ]
        opens = name == "open" and (modes or not method or not call.args) and not any("b" in mode for mode in modes)
        decodes = any(
            keyword.arg in ("text", "universal_newlines") and getattr(keyword.value, "value", True) is True
            for keyword in call.keywords
        )
        if opens or name in ("read_text", "write_text") or (decodes and name in ("run", "Popen", "check_output")):
            yield call.lineno


def test_text_is_utf_8_in_every_locale():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in texts_without_encoding(path.read_text(encoding="utf-8"))
    }
    assert found == set(), "needs encoding='utf-8'"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open(path)", True),
        ("path.open('a')", True),
        ("path.open()", True),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("subprocess.run(command, text=True)", True),
        ("open(path, 'rb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("Image.open(path)", False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_search_for_texts_without_encoding_finds_them(line, found):
    assert bool(list(texts_without_encoding(line))) is found


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return torch.rand(3)


@pytest.mark.parametrize("turn", [1, 2])  # the second finds the fixture made
def test_every_test_draws_the_same_numbers(turn, drawn):
    own = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), own) and not torch.equal(drawn, own)
    assert hypothesis.settings().derandomize


def test_the_terminal_and_a_chosen_backend_change_no_result():
    """Typer breaks its messages at the width of the terminal, and colours them where it is told to."""
    variables = {"FORCE_COLOR": "1", "COLUMNS": "20", "GITHUB_ACTIONS": "true", "SLA_REF_BACKEND": "none"}
    command = [sys.executable, "-m", "pytest", "tests/test_benchmark_finetune.py", "-k", "refuses", "--shuffle=1"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
