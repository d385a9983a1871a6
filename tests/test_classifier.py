"""The digit classifier: trained in a moment, kept whole; and the two measures of clips that it gives."""

import pytest
import torch

from experiments.classifier import (
    FEATURES,
    DigitClassifier,
    find_classifier,
    frechet_distance,
    mean_over_frames,
    recognised_share,
    train_classifier,
)
from experiments.setting import QUICK, Context
from sla_ref.lab.data import MovingDigits


@pytest.fixture(scope="module")
def trained() -> DigitClassifier:
    """A quarter of the steps that experiments get: enough for a look."""
    return train_classifier(32, steps=150)


def _clips(split, seed, count=200):
    return MovingDigits(split, seed, size=32, frames=4).batch(count)


def test_the_share_follows_labels_and_clips(trained):
    clips, labels = _clips("held_out", 3)
    assert recognised_share(trained, clips, labels) > 0.85, "a short training tells held-out digits apart"
    assert recognised_share(trained, clips, (labels + 1) % 10) < 0.05
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert recognised_share(trained, noise, labels) < 0.3


def test_the_mean_over_frames_decides():
    class Known(DigitClassifier):
        def forward(self, frames):
            return frames[:, :1, 0] * torch.nn.functional.one_hot(torch.tensor(3), 10) + torch.eye(10)[7]

    clips = torch.zeros(2, 3, 16, 16)
    clips[0, 0] = 9.0  # one frame is sure of 3; in the mean it is 3 against 1 for 7
    labels = torch.tensor([3, 7])
    assert recognised_share(Known(), clips, labels) == 1
    assert recognised_share(Known(), clips, labels.flip(0)) == 0


def test_features_are_means_over_frames(trained):
    clips, _ = _clips("held_out", 4, count=70)  # more than are looked at together
    features = mean_over_frames(trained.features, clips)
    assert features.shape == (70, FEATURES)
    torch.testing.assert_close(features[66], trained.features(clips[66]).mean(dim=0))
    torch.testing.assert_close(trained.out(trained.features(clips[0])), trained(clips[0]))


def test_real_clips_are_near_to_real_clips_and_far_from_noise(trained):
    train, held_out = (mean_over_frames(trained.features, _clips(split, 5)[0]) for split in ("train", "held_out"))
    noise = mean_over_frames(trained.features, torch.randn(200, 4, 32, 32, generator=torch.Generator().manual_seed(0)))
    near, far = frechet_distance(train, held_out), frechet_distance(noise, held_out)
    assert 0 < near < 0.05 * far
    blurred = torch.nn.functional.avg_pool2d(_clips("train", 5)[0], 9, stride=1, padding=4)
    assert frechet_distance(mean_over_frames(trained.features, blurred), held_out) > 2 * near


def test_frechet_distance_of_a_set_with_itself_is_zero_also_of_few_rows():
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows[:3], rows[:3]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    # Rows with mean 0 and covariance 1 exactly: the moments of what is made from them are known.
    normal = normal - normal.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(normal.T.cov()), normal.T, upper=False).T
    a, b, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5]), torch.tensor([0.0, 3.0, 4.0])
    # For diagonal covariances it is the distance of the means and of the standard deviations.
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


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_classifier(16, steps=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    frames = torch.rand(3, 16, 16)
    assert torch.equal(first(frames), train_classifier(16, steps=4)(frames))


def test_a_second_run_loads_what_the_first_one_left(tmp_path, monkeypatch):
    first = find_classifier(QUICK, Context(torch.device("cpu"), tmp_path / "new"))
    monkeypatch.setattr("experiments.classifier.train_classifier", None)
    find_classifier.cache_clear()
    again = find_classifier(QUICK, Context(torch.device("cpu"), tmp_path / "new"))
    frames = torch.rand(3, 16, 16)
    assert again is not first and torch.equal(first(frames), again(frames))
