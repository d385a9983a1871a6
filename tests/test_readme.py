"""The example of the README is short, and it runs."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, "the README shows one Python example"
    return blocks[0]


def test_example_is_at_most_twelve_lines(example):
    assert len(example.splitlines()) <= 12


def test_example_runs(example):
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["output"].shape == names["query"].shape
    gradient = names["layer"].proj_l.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
