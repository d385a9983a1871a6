"""The command line: every command on a tiny model, and errors that are one line."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

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


def error(capsys, *arguments, code=2) -> str:
    """Runs a command that must fail with one clear line; returns it."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert end.value.code == code
    said = capsys.readouterr()
    print(said.out)  # for the test
    lines = said.err.strip().removeprefix("stopping after this step\n")
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
        "print(sorted({'sklearn', 'matplotlib', 'PIL', 'sla_ref.lab.train', 'triton'} & set(sys.modules)))"
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
    monkeypatch.setattr(cli, "WEIGHTS", ("json", "no_such_package"))
    monkeypatch.setattr(cli, "LAB", ("json", "no_such_package"))
    said = error(capsys, command, "--out", tmp_path / "out")
    assert "needs no_such_package" in said
    assert "pip install 'sla-ref[lab]'" in said
    assert not (tmp_path / "out").exists()


def test_training_needs_nothing_that_only_the_demo_uses(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    run("train-teacher", "--out", tmp_path / "out", "--device", "cpu", *TINY, *MODEL)


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
    from sla_ref.lab import runs
    from sla_ref.lab.weights import load_weights

    out = tmp_path / "run[/]"  # brackets are markup to rich
    command = ["finetune", "--teacher", trained[0], "--out", out, "--device", "cpu", *TINY]
    train = runs.train

    def interrupted(*arguments, tick, **options):
        train(*arguments, tick=lambda step, loss: signal.raise_signal(signal.SIGINT), **options)

    monkeypatch.setattr(runs, "train", interrupted)
    assert "sla-ref: interrupted" in error(capsys, *command, code=130)
    monkeypatch.setattr(runs, "train", train)
    assert "not empty" in error(capsys, *command)
    for change, message in (
        (["--objective", "teacher"], "was made with objective = flow, got teacher"),
        (["--teacher", trained[1]], "was made with teacher = weights with sha256"),
    ):
        assert message in error(capsys, *command, "--resume", *change)
    run(*command, "--resume")
    assert f"weights: {out / 'sla.safetensors'}" in capsys.readouterr().out
    resumed, uninterrupted = (load_weights(path)[0] for path in (out / "sla.safetensors", trained[1]))
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, uninterrupted.state_dict()[name])
    assert "the run in this folder is finished" in error(capsys, *command, "--resume")


def test_a_learned_router_takes_two_runs_the_first_of_which_can_be_resumed(capsys, monkeypatch, tmp_path, trained):
    from sla_ref.lab import runs
    from sla_ref.lab.weights import load_weights

    options = ["--device", "cpu", *TINY, "--attention", "sla2", "--router", "learned", "--alpha", "block"]
    first = ["finetune", "--teacher", trained[0], "--out", tmp_path / "first", *options, "--objective", "layers"]
    train = runs.train

    def interrupted(*arguments, tick, **others):
        train(*arguments, tick=lambda step, loss: signal.raise_signal(signal.SIGINT), **others)

    monkeypatch.setattr(runs, "train", interrupted)
    error(capsys, *first, code=130)
    monkeypatch.setattr(runs, "train", train)
    message = "was made with model.alpha = block, got token"
    assert message in error(capsys, *first, "--resume", "--alpha", "token")
    run(*first, "--resume")

    teacher, _ = load_weights(trained[0])
    stage_1, card = load_weights(tmp_path / "first" / "sla2.safetensors")
    assert card["objective"] == "layers" and stage_1.config.alpha == "block"
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, stage_1.state_dict()[name]), name
    routers = {name: weight for name, weight in stage_1.state_dict().items() if ".router." in name}
    assert all(not torch.equal(weight, torch.eye(len(weight))) for weight in routers.values())

    source = tmp_path / "first" / "sla2.safetensors"
    second = ["finetune", "--teacher", source, "--out", tmp_path / "second", *options]
    for change, message in (
        (["--alpha", "head"], "alpha must be that of stage 1, 'block', got 'head'"),
        (["--block", "8"], "block must be that of stage 1, 16, got 8"),
        (["--objective", "teacher"], "objective must be flow from the weights of stage 1"),
        (["--objective", "layers"], "objective layers needs a teacher with attention 'full' to match, got 'sla2'"),
    ):
        assert message in error(capsys, *second, *change)
    run(*second)
    stage_2, card = load_weights(tmp_path / "second" / "sla2.safetensors")
    assert card["objective"] == "flow" and stage_2.config == stage_1.config
    for name, weight in routers.items():
        assert torch.equal(weight, stage_2.state_dict()[name]), name
    assert not torch.equal(stage_2.out.weight, stage_1.out.weight)


def test_ctrl_c_while_torch_is_loading_is_one_line(tmp_path):
    """The real torch takes seconds to import; this one is interrupted at once."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(sla_ref.__file__).parents[1])])
    command = [sys.executable, "-m", "sla_ref", "backends"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "sla-ref: interrupted\n")
    script = [sys.executable, "-c", "import sla_ref"]  # somebody else's program
    done = subprocess.run(
        script, capture_output=True, encoding="utf-8", check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert "Traceback" in done.stderr and "sla-ref" not in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("place", ["sla_ref.lab.runs.load_weights", "sla_ref.lab.evaluate.held_out"])
def test_ctrl_c_before_the_first_step_promises_nothing(capsys, monkeypatch, tmp_path, trained, place):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(["finetune", "--teacher", str(trained[0]), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (130, "sla-ref: interrupted\n")
    assert "--resume" not in said.out


def test_demo_writes_its_pictures_and_its_report(capsys, monkeypatch, tmp_path, trained):
    monkeypatch.setenv("COLUMNS", "20")  # tables are printed whole all the same
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
    assert all(f"{row['held_out_loss']:.4f}" in said for row in rows.values())
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
        (["--device", "meta"], "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "device is 'cuda:99', but"),
        (["--attention", "dense"], "attention must be one of 'full', 'sla'"),
        (["--objective", "beauty"], "objective must be one of flow, teacher, layers, got 'beauty'"),
        (["--alpha", "token"], "alpha must be left out unless attention is sla2, got 'token' with sla"),
        (["--attention", "sla2", "--alpha", "row"], "alpha must be one of 'head', 'block', 'token'"),
        (["--attention", "sla2", "--router", "learned"], "router 'learned' needs the weights of stage 1"),
        (["--attention", "sla2", "--objective", "layers"], "objective layers is stage 1 of sla2's router 'learned'"),
        (["--objective", "layers"], "got router None and attention 'sla'"),
        (["--backend", "abacus"], "abacus"),
        (["--critical-ratio", "0"], "critical_ratio must be"),
        (["--learning-rate", "0"], "learning_rate must be positive and finite, got 0.0"),
        (["--block", "0"], "block must be at least 1, got 0"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--seed", str(2**64)], "seed must be at most 18446744073709551615, got 18446744073709551616"),
        (["--nope"], "No such option: --nope"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(capsys, monkeypatch, tmp_path, trained, arguments, message):
    monkeypatch.setenv("COLUMNS", "20")
    out = tmp_path / "out"
    said = error(capsys, "finetune", "--teacher", trained[0], "--out", out, *TINY, *arguments)
    assert message in said
    assert "\n" not in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("heads", 0, "heads must be at least 1, got 0"),
        ("heads", -2, "heads must be at least 1, got -2"),
        ("depth", 0, "depth must be at least 1, got 0"),
        ("width", 0, "width must be at least 2, got 0"),
        ("size", -16, "size must be at least 16, got -16"),
        ("frames", -1, "frames must be at least 1, got -1"),
    ],
)
def test_bad_sizes_are_one_line_and_write_nothing(capsys, tmp_path, option, value, message):
    assert error(capsys, "train-teacher", "--out", tmp_path / "out", f"--{option}={value}") == f"sla-ref: {message}"
    assert not (tmp_path / "out").exists()


def test_the_demo_refuses_what_would_make_its_report_untrue(capsys, tmp_path, trained):
    teacher, student = trained
    for arguments, message in (
        (["--objective", "nope"], "objective must be one of flow, teacher, got 'nope'"),
        (["--teacher", student], "teacher must have full attention"),
        (["--teacher", teacher], "student must be for the teacher's frames and size, (4, 16), got (16, 32)"),
    ):
        assert message in error(capsys, "demo", "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()


def test_a_leftover_of_torchrun_in_the_environment_changes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "old")
    run("train-teacher", "--out", tmp_path / "out", "--device", "cpu", *TINY, *MODEL)
    assert "got 0" in error(capsys, "train-teacher", "--out", tmp_path / "other", "--steps", "0")


def test_a_folder_whose_name_the_terminal_cannot_show(monkeypatch, tmp_path):
    """The terminal shows only ASCII. To Python, a byte that is not UTF-8 is a surrogate."""
    out, files = tmp_path / os.fsdecode("é[red]:smile:".encode() + b"\xff"), {}
    for name in ("stdout", "stderr"):
        files[name] = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(files[name], encoding="ascii", write_through=True))
    command = ["train-teacher", "--out", out, "--device", "cpu", *TINY, *MODEL]
    run(*command)
    assert rb"\xe9[red]:smile:\udcff/full.safetensors" + b"\n" in files["stdout"].getvalue()
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(each) for each in command])
    assert rb"\xe9[red]:smile:\udcff/full.safetensors is there already" in files["stderr"].getvalue()


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
        return [compiled.KernelReport(backend, "forward", target, *sizes, 4, 128, stack, 1024, 2048, "wgmma.bf16")]

    monkeypatch.setattr(compiled, "report", report)
    with pytest.raises(SystemExit) as end:
        cli.main(["kernels", "--target", "sm_90"])
    assert end.value.code == code
    printed = capsys.readouterr().out
    assert "forward" in printed
    assert (f"uses {stack} bytes of stack" in printed) == bool(stack), "nothing may be cut off"


def test_kernels_refuses_unknown_names(capsys):
    pytest.importorskip("triton")
    assert "target must be one of sm_80, sm_90, sm_100, sm_120, got 'sm_70'" in error(
        capsys, "kernels", "--target", "sm_70"
    )
    assert "dtype must be one of bfloat16, float16, float32, got 'int8'" in error(capsys, "kernels", "--dtype", "int8")
    assert "backend must be triton or numba, got 'torch'" in error(capsys, "kernels", "--backend", "torch")
