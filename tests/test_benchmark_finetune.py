"""benchmarks/finetune.py: what it writes, what each arm trains, and what it refuses."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from sla_ref.lab.model import ModelConfig, VideoTransformer

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "finetune.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def invoke(script: dict, *arguments: str):
    app = typer.Typer()
    app.command()(script["main"])
    return CliRunner().invoke(app, list(arguments))


def test_it_writes_every_run(script, tmp_path):
    out = tmp_path / "new" / "result.json"
    sizes = ("--batch", "1", "--clips", "1", "--seeds", "2", "--steps", "1", "--steps", "2")
    done = invoke(script, "--arm", "sparse", "--arm", "sla, Proj only", *sizes, "--json", str(out))
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(run["steps"], run["seed"], run["arm"]) for run in result["runs"]] == [
        (steps, seed, arm) for steps in (1, 2) for seed in (0, 1) for arm in ("sparse", "sla, Proj only")
    ]
    untrained = result["untrained"]
    assert untrained["sparse"] == untrained["sla, Proj only"]  # a Proj of zero adds nothing
    assert all(run["held_out_loss"] != untrained[run["arm"]]["held_out_loss"] for run in result["runs"])
    assert [run["training"]["step"] for run in result["runs"]] == [[1]] * 4 + [[1, 2]] * 4
    first = [run["training"]["loss"][0] for run in result["runs"] if run["seed"] == 0]
    assert first == pytest.approx([first[0]] * 4)  # same weights at the start, same clips, same noise


def test_an_arm_trains_what_it_says(script):
    torch.manual_seed(0)
    teacher = VideoTransformer(ModelConfig(frames=2, size=16, width=32, depth=2, heads=2, block=8))
    for arm in script["ARMS"]:
        trained = {name for name, p in script["student"](teacher, arm).named_parameters() if p.requires_grad}
        if arm == "sla, Proj only":
            assert trained == {
                f"blocks.{i}.attention.core.proj_l.{part}" for i in (0, 1) for part in ("weight", "bias")
            }
        else:
            assert trained >= {name for name, _ in teacher.named_parameters()}


def test_it_refuses_before_any_work(script, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("mine", encoding="utf-8")
    quick = ("--arm", "sparse", "--batch", "1", "--clips", "1", "--seeds", "1", "--steps", "1")  # should it not refuse
    done = invoke(script, *quick, "--json", str(there))
    assert done.exit_code == 2 and "must name a new file" in " ".join(done.output.split())
    assert there.read_text(encoding="utf-8") == "mine"
    done = invoke(script, *quick, "--arm", "nope")
    assert done.exit_code == 2 and "--arm must be one of full, sparse" in " ".join(done.output.split())
