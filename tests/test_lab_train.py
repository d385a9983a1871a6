"""The training loop: it learns, it resumes without loss, and it refuses what would lose something."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from sla_ref.lab.checkpoint import read_checkpoint, write_checkpoint
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.graph import unchanged
from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.train import Run, distance_to, flow_loss, train

TINY = ModelConfig(frames=2, size=16, width=32, depth=2, heads=2, block=8)
CONFIG = TrainConfig(steps=9, batch=4, learning_rate=1e-2)


def model() -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(TINY)


def weights(made: VideoTransformer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in made.state_dict().items()}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def signal_at(when: int, *numbers: signal.Signals):
    def tick(step, loss):
        if step == when:
            for number in numbers:
                signal.raise_signal(number)

    return tick


def test_the_loss_falls_and_metrics_say_so(tmp_path):
    train(model(), replace(CONFIG, steps=60), tmp_path / "run", log_every=20)
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == [20, 40, 60]
    assert written[-1]["loss"] < 0.9 * written[0]["loss"]
    assert written[-1]["learning_rate"] < 0.02 * CONFIG.learning_rate
    assert all(line["seconds"] > 0 for line in written)


def test_seconds_are_those_since_the_last_line_and_go_on_after_a_resume(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run = Run(model(), CONFIG)
    seen = []
    for clock[0] in (2.5, 3.0):
        run.advance()
        seen.append(run.log_line()["seconds"])
    clock[0] = 5.0
    run.advance()
    run.save(tmp_path / "checkpoint.pt")
    clock[0] = 100.0
    resumed = Run(model(), CONFIG)
    resumed.load(tmp_path / "checkpoint.pt")
    clock[0] = 101.0
    assert [*seen, resumed.log_line()["seconds"]] == [2.5, 0.5, 3.0]


@pytest.mark.parametrize(
    ("attention", "numbers"),
    [("full", [signal.SIGTERM]), ("sla", [signal.SIGINT]), ("sla", [signal.SIGINT, signal.SIGINT, signal.SIGTERM])],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, attention, numbers):
    """The signal comes in the middle of a step: from within its loss."""
    whole = with_attention(model(), attention)
    train(whole, CONFIG, tmp_path / "whole", log_every=3)

    halves, calls = with_attention(model(), attention), []

    def interrupted_loss(forward, batch):
        calls.append(1)
        if len(calls) == 5:
            for number in numbers:
                signal.raise_signal(number)
        return flow_loss(forward, batch)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(halves, CONFIG, tmp_path / "halves", log_every=3, objective=interrupted_loss)
    assert len(calls) == 5
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    torch.manual_seed(99)  # a new process starts with other random numbers, and other weights
    halves = with_attention(VideoTransformer(TINY), attention)
    train(halves, replace(CONFIG, resume=True), tmp_path / "halves", log_every=3)

    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(halves)[name]), name
    same = [[(line["step"], line["loss"]) for line in lines(tmp_path / name)] for name in ("whole", "halves")]
    assert [step for step, _ in same[0]] == [3, 6, 9]
    assert same[0] == same[1]
    assert not list((tmp_path / "halves").glob(".*"))  # no temporary file stays


def test_a_signal_that_is_ignored_stays_ignored_and_one_in_the_last_step_is_not_lost(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(model(), CONFIG, tick=signal_at(3, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt):
        train(model(), CONFIG, tick=signal_at(CONFIG.steps, signal.SIGINT))


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    whole = model()
    train(whole, CONFIG, tmp_path / "whole", log_every=1)

    def kill(step, loss):
        if step == 7:
            raise SystemError("no time to save")

    with pytest.raises(SystemError):
        train(model(), CONFIG, tmp_path / "killed", log_every=1, save_every=4, tick=kill)
    assert len(lines(tmp_path / "killed")) == 7
    (tmp_path / "killed" / ".checkpoint.pt.1.part").write_text("half", encoding="utf-8")
    resumed = model()
    train(resumed, replace(CONFIG, resume=True), tmp_path / "killed", log_every=1)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    for ours, theirs in zip(lines(tmp_path / "killed"), lines(tmp_path / "whole"), strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"checkpoint.pt", "metrics.jsonl"}


def test_matching_a_teacher_trains_towards_its_prediction(tmp_path):
    teacher = model()
    with torch.no_grad():
        teacher.out.bias.fill_(2.0)  # far from any velocity: only who asks the teacher learns it
    frozen = weights(teacher)
    student = with_attention(model(), "sparse", critical_ratio=0.2)
    config = replace(CONFIG, steps=30, weight_decay=0.0, learning_rate=0.1)
    train(student, config, tmp_path / "run", objective=distance_to(teacher), log_every=1)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[0] == pytest.approx(4)
    assert losses[-1] < 2
    for name, weight in weights(teacher).items():
        assert torch.equal(weight, frozen[name])
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bfloat16_autocast_runs_on_a_cpu_and_leaves_float32_weights(tmp_path):
    made = with_attention(model(), "sla")
    train(made, replace(CONFIG, steps=3, precision="bfloat16"), tmp_path / "run")
    assert all(weight.dtype == torch.float32 for weight in made.state_dict().values())


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"out must be a new or an empty folder, but .* not empty"):
        train(model(), CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    with pytest.raises(FileExistsError, match=r"out must be a folder, but .*note\.txt is a file"):
        train(model(), CONFIG, tmp_path / "note.txt")


RESUME = replace(CONFIG, resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(model(), CONFIG, folder, about={"objective": "flow"})
    return folder


def resume(folder):
    """Goes on from a finished run: there is nothing left to do."""
    made = model()
    train(made, RESUME, folder, about={"objective": "flow"})
    return made


def test_resuming_names_what_differs(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*checkpoint\.pt"):
        train(model(), RESUME, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for made, config, about, message in (
        (model(), replace(RESUME, learning_rate=0.02), "flow", r"was made with learning_rate = 0\.01, got 0\.02"),
        (with_attention(model(), "sla"), RESUME, "flow", r"was made with model\.attention = full, got sla"),
        (model(), RESUME, "teacher", r"was made with objective = flow, got teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            train(made, config, finished, about={"objective": about})
    with pytest.raises(ValueError, match=r"was made with objective = flow, got nothing"):
        train(model(), RESUME, finished)
    expected = read_checkpoint(finished / "checkpoint.pt")["model"]
    assert all(torch.equal(weight, expected[name]) for name, weight in resume(finished).state_dict().items())


def test_a_run_that_trains_a_part_of_the_model_goes_on(tmp_path):
    """Frozen parameters have no optimizer state, and the resumed run does not miss it."""
    made = []
    for number, config in enumerate((CONFIG, RESUME)):
        made.append(with_attention(model(), "sla"))
        for name, parameter in made[number].named_parameters():
            parameter.requires_grad_("proj_l" in name)
        with suppress(KeyboardInterrupt):
            train(made[number], config, tmp_path / "run", tick=signal_at(5 if not number else 0, signal.SIGINT))
    whole = with_attention(model(), "sla")
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_("proj_l" in name)
    train(whole, CONFIG)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(made[1])[name]), name


def edited(change):
    """A fault that edits the state before it is saved, with a checksum that is right."""

    def damage(path):
        state = read_checkpoint(path)
        change(state)
        write_checkpoint(path, state)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "checksum"),
        (lambda path: path.write_bytes(b""), "checksum"),
        (lambda path: write_checkpoint(path, [1]), "it does not say of which run it is"),
        (lambda path: write_checkpoint(path, {"identity": os.system}), "more than tensors"),
        (edited(lambda state: state.pop("step")), "step is missing"),
        (edited(lambda state: state.update(step=10**9)), "its step 1000000000 cannot be"),
        (edited(lambda state: state.update(step=8)), "its step 8 cannot be"),
        (edited(lambda state: state.update(step=8, logged=8)), "its step 8 cannot be"),
        (edited(lambda state: state.update(step="9")), "step must be of type int, got str"),
        (edited(lambda state: state["model"].pop("out.bias")), "model/out.bias is missing"),
        (edited(lambda state: state["model"].update(more=1)), "model/more is too much"),
        (edited(lambda state: state["model"].update({"out.bias": torch.zeros(3)})), r"got torch.float32 \(3,\)"),
        (edited(lambda state: state["model"].update({"out.bias": None})), "model/out.bias must be of type Tensor"),
        (edited(lambda state: state["optimizer"].update(state={})), "optimizer/state/.* is missing"),
        (edited(lambda state: state["optimizer"].update(param_groups=[])), "optimizer/param_groups/0 is missing"),
        (edited(lambda state: state["clips"].zero_()), "state"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(finished, tmp_path, damage, message):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match=rf"checkpoint .*checkpoint\.pt is damaged: .*{message}") as raised:
        resume(tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_a_flipped_bit_is_noticed(finished, tmp_path):
    path, content = tmp_path / "checkpoint.pt", (finished / "checkpoint.pt").read_bytes()
    for place in range(0, len(content), len(content) // 150):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(ValueError, match="its checksum does not match"):
            read_checkpoint(path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("damage", ['{"step": 9, "lo', "\n", "\0" * 30, '"step"\n', '{"loss": 1}\n', "\xff\n{}\n"])
def test_damaged_lines_of_metrics_are_dropped_with_a_word(finished, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    kept = (folder / "metrics.jsonl").read_bytes()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(damage.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: \d damaged line"):
        resume(folder)
    assert (folder / "metrics.jsonl").read_bytes() == kept


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_locks_nothing(tmp_path):
    pytest.importorskip("fcntl")
    folder, script = (
        tmp_path / "run",
        "import sys, time; from sla_ref.files import run_folder; from pathlib import Path\n",
    )
    script += "with run_folder(Path(sys.argv[1]), False): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, encoding="utf-8"
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="out must be a folder that no other run is using"):
            train(model(), CONFIG, folder)
        assert not list(folder.iterdir())
        other.kill()
    train(model(), replace(CONFIG, steps=1), folder)


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sla_ref.files.fcntl", None)
    with pytest.warns(UserWarning, match="cannot lock .*run; let no other run write there"):
        train(model(), replace(CONFIG, steps=1), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    made = model()
    with torch.no_grad():
        made.out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss at step 1 is nan"):
        train(made, CONFIG, tmp_path / "run", log_every=1)


def test_a_part_of_the_parameters_has_a_rate_of_its_own():
    """AdamW's first step is as long as its rate, but for what it decays."""
    made = model()
    before, one_step = weights(made), replace(CONFIG, steps=1, weight_decay=0.0)
    train(made, one_step, rates={"out.weight": 10.0})
    moved = {name: (weight - before[name]).abs().amax().item() for name, weight in weights(made).items()}
    rate = moved["out.bias"]
    assert 0 < rate <= CONFIG.learning_rate
    assert moved["out.weight"] == pytest.approx(10 * rate, rel=0.01)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_steps_that_are_tried_before_a_recording_leave_no_trace(steps_before):
    """They leave none in a fresh run, nor in one that goes on."""
    run = Run(model(), CONFIG)
    for _ in range(steps_before):
        run.advance()

    def state() -> list[torch.Tensor]:
        moments = [value for each in run.optimizer.state.values() for value in each.values()]
        return [each.detach().clone() for each in (*run.model.parameters(), *moments)]

    before, batch = state(), run.next_batch()
    with unchanged(run.model, run.optimizer):
        run.learn(*batch)
        assert any(not torch.equal(a, b) for a, b in zip(before, state(), strict=False))
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert not any(each.any() for each in after[len(before) :])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_run_ends_where_one_of_single_steps_does():
    made = {graph: model().cuda() for graph in (False, True)}
    for graph, each in made.items():
        train(each, replace(CONFIG, graph=graph))
    single, recorded = (weights(each) for each in made.values())
    for name, weight in single.items():
        torch.testing.assert_close(recorded[name], weight, rtol=1e-3, atol=1e-4)


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="graph needs one process on a GPU, got 1 on cpu"):
        train(model(), replace(CONFIG, graph=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615, got 18446744073709551616"),
        ({"precision": "fp8"}, "precision must be one of .float32., .bfloat16., got 'fp8'"),
        ({"graph": True, "compile": True}, "graph, compile and fsdp must not go together"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
