"""The training loop: it learns, it resumes without loss, and it refuses what would lose something."""

import json
from dataclasses import replace

import pytest
import torch

from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.train import TrainConfig, train

TINY = ModelConfig(frames=2, size=16, width=32, depth=2, heads=2, block=8)
CONFIG = TrainConfig(steps=9, batch=4, learning_rate=1e-2)


def model() -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(TINY)


def weights(made: VideoTransformer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in made.state_dict().items()}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def interrupt_at(when: int):
    def tick(step, loss):
        if step == when:
            raise KeyboardInterrupt

    return tick


def test_the_loss_falls_and_metrics_say_so(tmp_path):
    train(model(), replace(CONFIG, steps=60), tmp_path / "run", log_every=20)
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == [20, 40, 60]
    assert written[-1]["loss"] < 0.9 * written[0]["loss"]
    assert written[-1]["learning_rate"] < 0.02 * CONFIG.learning_rate
    assert all(line["seconds"] > 0 for line in written)


@pytest.mark.parametrize("attention", ["full", "sla"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, attention):
    whole = with_attention(model(), attention)
    train(whole, CONFIG, tmp_path / "whole", log_every=3)

    halves = with_attention(model(), attention)
    with pytest.raises(KeyboardInterrupt):
        train(halves, CONFIG, tmp_path / "halves", log_every=3, tick=interrupt_at(5))
    torch.manual_seed(99)  # a new process starts with other random numbers, and other weights
    halves = with_attention(VideoTransformer(TINY), attention)
    train(halves, CONFIG, tmp_path / "halves", log_every=3, resume=True)

    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(halves)[name]), name
    assert [line["step"] for line in lines(tmp_path / "halves")] == [3, 6, 9]
    assert not list((tmp_path / "halves").glob(".*"))  # no temporary file stays


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    whole = model()
    train(whole, CONFIG, tmp_path / "whole", log_every=1)

    def kill(step, loss):
        if step == 7:
            raise SystemError("no time to save")

    with pytest.raises(SystemError):
        train(model(), CONFIG, tmp_path / "killed", log_every=1, save_every=4, tick=kill)
    assert len(lines(tmp_path / "killed")) == 7
    resumed = model()
    train(resumed, CONFIG, tmp_path / "killed", log_every=1, resume=True)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    for ours, theirs in zip(lines(tmp_path / "killed"), lines(tmp_path / "whole"), strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])


def test_matching_a_teacher_trains_towards_its_prediction(tmp_path):
    teacher = model()
    with torch.no_grad():
        teacher.out.bias.fill_(2.0)  # far from any velocity: only who asks the teacher learns it
    frozen = weights(teacher)
    student = with_attention(model(), "sparse", critical_ratio=0.2)
    config = replace(CONFIG, steps=30, weight_decay=0.0, learning_rate=0.1)
    train(student, config, tmp_path / "run", teacher=teacher, log_every=1)
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


def test_resuming_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*checkpoint\.pt"):
        train(model(), CONFIG, tmp_path / "run", resume=True)
    train(model(), CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match=r"was made with learning_rate = 0\.01, got 0\.02"):
        train(model(), replace(CONFIG, learning_rate=0.02), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"was made with model\.attention = full, got sla"):
        train(with_attention(model(), "sla"), CONFIG, tmp_path / "run", resume=True)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoint\.pt is damaged"):
        train(model(), CONFIG, tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    made = model()
    with torch.no_grad():
        made.out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss at step 1 is nan"):
        train(made, CONFIG, tmp_path / "run", log_every=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"precision": "fp8"}, "precision must be one of float32, bfloat16, got 'fp8'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
