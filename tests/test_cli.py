"""The command line: every command on a tiny model, and errors that are one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import sla_ref
from sla_ref import cli

TINY = ["--batch", "2", "--clips", "2", "--steps", "2"]
MODEL = ["--frames", "4", "--size", "16", "--width", "32", "--depth", "2"]


def run(*arguments) -> None:
    """Runs a command that must succeed."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert end.value.code == 0


def error(capsys, *arguments) -> str:
    """Runs a command that must fail with one clear line; returns it."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert end.value.code == 1
    lines = capsys.readouterr().err.strip()
    assert lines.startswith("sla-ref: ")
    return lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of a tiny teacher and of its SLA fine-tune."""
    folder = tmp_path_factory.mktemp("trained")
    run("train-teacher", "--out", folder / "teacher", "--device", "cpu", *TINY, *MODEL)
    teacher = folder / "teacher" / "full.safetensors"
    run("finetune", "--teacher", teacher, "--out", folder / "sla", "--device", "cpu", *TINY)
    return teacher, folder / "sla" / "sla.safetensors"


def test_help_is_quick_because_it_loads_no_lab():
    script = (
        "import sys; from sla_ref import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'sklearn', 'matplotlib', 'PIL', 'sla_ref.lab', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert "train-teacher" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_without_typer_the_line_that_installs_it_is_printed():
    script = "import sys; sys.modules['typer'] = None; import sla_ref.cli"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 1
    assert "needs typer" in result.stderr
    assert "pip install 'sla-ref[lab]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["demo", "train-teacher", "finetune"])
def test_a_missing_package_of_the_extra_is_named(capsys, monkeypatch, tmp_path, command):
    monkeypatch.setattr(cli, "LAB", ("json", "no_such_package"))
    said = error(capsys, command, "--out", tmp_path / "out")
    assert "needs no_such_package" in said
    assert "pip install 'sla-ref[lab]'" in said
    assert not (tmp_path / "out").exists()


def test_backends_are_listed_with_their_reasons(capsys):
    run("backends")
    said = " ".join(capsys.readouterr().out.split())
    for name, reason in sla_ref.list_backends().items():
        assert f"{name} {' '.join((reason or 'usable').split())}" in said


def test_train_teacher_and_finetune_write_weights_with_a_card(trained):
    from sla_ref.lab.weights import load_weights

    teacher, card = load_weights(trained[0])
    assert (teacher.config.frames, teacher.config.attention) == (4, "full")
    assert (card["training"]["steps"], card["held_out_clips"], card["objective"]) == (2, 2, "flow")
    student, card = load_weights(trained[1])
    assert student.config.attention == "sla"
    assert card["distance"] > 0
    assert {path.name for path in trained[1].parent.iterdir()} == {
        "checkpoint.pt",
        "metrics.jsonl",
        "sla.safetensors",
    }


def test_a_card_speaks_for_the_rounded_weights(trained):
    from sla_ref.lab import evaluate
    from sla_ref.lab.weights import load_weights

    model, card = load_weights(trained[1])
    data = evaluate.held_out(model, 2)
    assert evaluate.held_out_loss(evaluate.predict(model, data), data) == card["held_out_loss"]


def test_an_interrupted_finetune_goes_on_with_resume(capsys, monkeypatch, tmp_path, trained):
    from sla_ref.lab import train as loop
    from sla_ref.lab.weights import load_weights

    out = tmp_path / "run"
    command = ["finetune", "--teacher", trained[0], "--out", out, "--device", "cpu", *TINY]
    advance = loop._Run.advance

    def interrupted(self, *models):
        if self.step == 1:
            raise KeyboardInterrupt
        return advance(self, *models)

    monkeypatch.setattr(loop._Run, "advance", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in command])
    assert end.value.code == 130
    assert "--resume goes on from" in capsys.readouterr().out
    monkeypatch.setattr(loop._Run, "advance", advance)
    assert "not empty" in error(capsys, *command)
    run(*command, "--resume")
    resumed, uninterrupted = (load_weights(path)[0] for path in (out / "sla.safetensors", trained[1]))
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, uninterrupted.state_dict()[name])
    assert "the run in this folder is finished" in error(capsys, *command, "--resume")


def test_demo_writes_its_pictures_and_its_report(capsys, tmp_path, trained):
    out = tmp_path / "demo"
    ends = ["--teacher", trained[0], "--student", trained[1], "--device", "cpu", "--backend", "torch"]
    run("demo", "--out", out, *ends, *TINY, "--samples", "2", "--sample-steps", "2", "--seed", "3")
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "block_classes.png",
        "clips.gif",
        "clips.png",
        "overview.png",
        "report.json",
    }
    for name, frames in (("block_classes.png", 1), ("clips.png", 1), ("overview.png", 1), ("clips.gif", 4)):
        with Image.open(out / name) as picture:
            assert getattr(picture, "n_frames", 1) == frames
            assert len(set(picture.convert("L").tobytes())) > 2
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == [
        "full attention",
        "SLA, swapped in, untrained",
        "sparse only, 2 steps",
        "SLA, 2 steps",
        "SLA, shipped, 2 steps",
    ]
    assert all(name in said for name in rows)
    assert rows["full attention"]["distance"] == 0
    assert rows["SLA, 2 steps"]["attention_flops"] > rows["sparse only, 2 steps"]["attention_flops"]
    assert (report["seed"], report["backend"], len(report["attention_maps"])) == (3, "torch", 2)
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert sla_ref.get_backend() == "auto"  # the choice ends with the command
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "not empty" in error(capsys, "demo", "--out", out, *ends)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--attention", "dense"], "attention must be one of full, sla"),
        (["--objective", "beauty"], "objective must be one of flow, teacher, got 'beauty'"),
        (["--backend", "abacus"], "abacus"),
        (["--critical-ratio", "0"], "critical_ratio must be"),
        (["--learning-rate", "0"], "learning_rate must be positive, got 0.0"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(capsys, tmp_path, trained, arguments, message):
    out = tmp_path / "out"
    said = error(capsys, "finetune", "--teacher", trained[0], "--out", out, *TINY, *arguments)
    assert message in said
    assert not out.exists()


def test_a_damaged_weights_file_is_named(capsys, tmp_path, trained):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(trained[0].read_bytes()[:-9])
    assert f"weights file {broken} is damaged" in error(capsys, "demo", "--teacher", broken, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_python_m_is_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "sla_ref", "backends"],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert result.stdout.startswith("torch    usable")


@pytest.mark.parametrize(("stack", "code"), [(0, 0), (16, 1)])
def test_kernels_exits_with_one_where_a_kernel_uses_stack(capsys, monkeypatch, stack, code):
    """The compilation itself is tested in test_compiled.py."""
    pytest.importorskip("triton")
    from sla_ref import compiled

    def report(target, *, backend, dtype, head_dim, block_q, block_k):
        sizes = (str(dtype), head_dim, block_q, block_k)
        return [compiled.KernelReport(backend, "forward", target, *sizes, 4, 128, stack, 0, 1024, 2048, "wgmma.bf16")]

    monkeypatch.setattr(compiled, "report", report)
    with pytest.raises(SystemExit) as end:
        cli.main(["kernels", "--target", "sm_90"])
    assert end.value.code == code
    printed = capsys.readouterr().out
    assert "forward" in printed
    assert (f"uses {stack} bytes of stack (0 spill instructions)" in printed) == bool(stack), "nothing may be cut off"


def test_kernels_refuses_unknown_names(capsys):
    pytest.importorskip("triton")
    assert "target must be one of sm_80, sm_90, sm_100, sm_120, got 'sm_70'" in error(
        capsys, "kernels", "--target", "sm_70"
    )
    assert "dtype must be one of bfloat16, float16, float32, got 'int8'" in error(capsys, "kernels", "--dtype", "int8")
    assert "backend must be triton or numba, got 'torch'" in error(capsys, "kernels", "--backend", "torch")
