"""The digit classifier: trained in a moment, kept whole; and the two figures that it gives of clips."""

import json

import pytest
import torch

from sla_ref.lab import classifier as module
from sla_ref.lab.classifier import (
    FEATURES,
    DigitClassifier,
    Recipe,
    clip_features,
    frechet_distance,
    load_or_train_classifier,
    recognised_share,
    train_classifier,
)
from sla_ref.lab.data import MovingDigits
from sla_ref.lab.weights import DamagedWeights


@pytest.fixture(scope="module")
def trained() -> DigitClassifier:
    """Half the steps that experiments get, with smaller batches: enough for a look."""
    return train_classifier(Recipe(32, steps=300, batch=48, held_out_frames=1000))


def _clips(split, seed, count=200):
    return MovingDigits(split, seed, size=32, frames=4).batch(count)


def test_a_short_training_already_tells_held_out_digits_apart(trained):
    assert trained.accuracy > 0.9
    clips, labels = _clips("held_out", 3)
    frames, of_frames = clips.flatten(0, 1), labels[:, 0].repeat_interleave(4)
    by_frame = (trained(frames).argmax(dim=1) == of_frames).float().mean().item()
    assert by_frame == pytest.approx(trained.accuracy, abs=0.06)
    assert recognised_share(trained, clips, labels) == pytest.approx(trained.accuracy, abs=0.06)


def test_the_share_follows_labels_and_clips(trained):
    clips, labels = _clips("train", 3)
    right = recognised_share(trained, clips, labels)
    others = torch.stack([(labels[:, 0] + 1) % 10, labels[:, 1]], dim=1)
    assert right > 0.9
    assert recognised_share(trained, clips, others) < 0.05
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert recognised_share(trained, noise, labels) < 0.3
    with pytest.raises(ValueError, match=r"labels must have one row per clip \(200\), got 3"):
        recognised_share(trained, clips, labels[:3])
    two = MovingDigits("train", 0, size=32, frames=2, pairs=1.0).batch(5)
    with pytest.raises(ValueError, match="labels must have no second digit, got 5 rows with one"):
        recognised_share(trained, *two)


def test_the_mean_over_frames_decides():
    class Known(DigitClassifier):
        def forward(self, frames):
            return frames[:, :1, 0] * torch.nn.functional.one_hot(torch.tensor(3), 10) + torch.eye(10)[7]

    clips = torch.zeros(2, 3, 16, 16)
    clips[0, 0] = 9.0  # one frame is sure of 3; in the mean it is 3 against 1 for 7
    labels = torch.tensor([[3, 10], [7, 10]])
    assert recognised_share(Known(), clips, labels) == 1
    assert recognised_share(Known(), clips, labels.flip(0)) == 0


def test_features_are_means_over_frames(trained):
    clips, _ = _clips("held_out", 4, count=70)  # more than are looked at together
    features = clip_features(trained, clips)
    assert features.shape == (70, FEATURES)
    torch.testing.assert_close(features[66], trained.features(clips[66]).mean(dim=0))
    torch.testing.assert_close(trained.out(trained.features(clips[0])), trained(clips[0]))


def test_real_clips_are_near_to_real_clips_and_far_from_noise(trained):
    train, held_out = (clip_features(trained, _clips(split, 5)[0]) for split in ("train", "held_out"))
    noise = clip_features(trained, torch.randn(200, 4, 32, 32, generator=torch.Generator().manual_seed(0)))
    near, far = frechet_distance(train, held_out), frechet_distance(noise, held_out)
    assert 0 < near < 0.05 * far
    blurred = torch.nn.functional.avg_pool2d(_clips("train", 5)[0], 9, stride=1, padding=4)
    assert frechet_distance(clip_features(trained, blurred), held_out) > 2 * near


def test_frechet_distance_of_a_set_with_itself_is_zero_also_of_few_rows():
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows[:3], rows[:3]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    # Rows with mean 0 and covariance 1 exactly, so that what is made of them is known exactly.
    normal = normal - normal.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(normal.T.cov()), normal.T, upper=False).T
    a, b, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5]), torch.tensor([0.0, 3.0, 4.0])
    # Of diagonal covariances it is the distance of the means and of the standard deviations.
    expected = 25 + 1 + 0 + 6.25
    assert frechet_distance(white * a, white * b + shift) == pytest.approx(expected)
    # Covariances that do not commute: with A = M M and B = W W, the closed form in two dimensions.
    m, w = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double()
    product = m @ m @ w @ w
    trace_of_root = (product.trace() + 2 * product.det().sqrt()).sqrt()  # of a 2 x 2 matrix
    expected = ((m @ m).trace() + (w @ w).trace() - 2 * trace_of_root).item()
    assert frechet_distance(white[:, :2] @ m, white[:, :2] @ w) == pytest.approx(expected)
    assert frechet_distance(white[:, :2] @ w, white[:, :2] @ m) == pytest.approx(expected)
    assert frechet_distance(white[:, :1], 2 * white[:, :1]) == pytest.approx(1)


def test_frechet_distance_names_sets_that_it_cannot_take():
    rows = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"a must have shape \(n, F\) with n of at least 2, got \(1, 4\)"):
        frechet_distance(rows[:1], rows)
    with pytest.raises(ValueError, match=r"b must have shape \(n, F\) with n of at least 2, got \(5,\)"):
        frechet_distance(rows, rows[:, 0])
    with pytest.raises(ValueError, match=r"b must have as many features as a \(4\), got 3"):
        frechet_distance(rows, rows[:, :3])


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    recipe = Recipe(16, steps=4, held_out_frames=50)
    first = train_classifier(recipe)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = train_classifier(recipe)
    frames = torch.rand(3, 16, 16)
    assert torch.equal(first(frames), again(frames)) and first.accuracy == again.accuracy
    other = train_classifier(Recipe(16, steps=4, held_out_frames=50, seed=1))
    assert not torch.equal(first(frames), other(frames))


def test_a_second_call_loads_what_the_first_one_left(tmp_path, monkeypatch):
    first = load_or_train_classifier(tmp_path / "new", "cpu", size=16, quick=True)
    path, card_path = (tmp_path / "new" / f"classifier-16-quick.{end}" for end in ("safetensors", "json"))
    card = json.loads(card_path.read_text(encoding="utf-8"))
    assert card["held_out_accuracy"] == first.accuracy
    assert sorted(each.name for each in path.parent.iterdir()) == [card_path.name, path.name]
    monkeypatch.setattr(module, "train_classifier", None)
    again = load_or_train_classifier(tmp_path / "new", "cpu", size=16, quick=True)
    frames = torch.rand(3, 16, 16)
    assert torch.equal(first(frames), again(frames)) and again.accuracy == first.accuracy
    assert not any(parameter.requires_grad for parameter in (*first.parameters(), *again.parameters()))
    with pytest.raises(TypeError):  # another size is another classifier, and training is off
        load_or_train_classifier(tmp_path / "new", "cpu", size=32, quick=True)

    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DamagedWeights, match=r"classifier-16-quick\.safetensors is not the file"):
        load_or_train_classifier(tmp_path / "new", "cpu", size=16, quick=True)
    card_path.write_text(json.dumps(card | {"recipe": card["recipe"] | {"steps": 1}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is of the recipe .*'steps': 1.*, not .*; remove it"):
        load_or_train_classifier(tmp_path / "new", "cpu", size=16, quick=True)


def test_a_small_size_is_named(tmp_path):
    with pytest.raises(ValueError, match="size must be at least 16, got 8"):
        load_or_train_classifier(tmp_path, "cpu", size=8)
