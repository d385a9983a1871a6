"""Moving digits: disjoint images, the same clips for the same seed, known pixels."""

import pytest
import torch

from sla_ref.lab import data


def test_no_image_is_in_both_splits_and_none_is_lost():
    train, _ = data.digit_images("train")
    held_out, labels = data.digit_images("held_out")
    assert len(train) + len(held_out) == 1797
    as_bytes = [{image.numpy().tobytes() for image in images} for images in (train, held_out)]
    assert not as_bytes[0] & as_bytes[1]
    assert set(labels.tolist()) == set(range(10))


def test_clips_depend_on_seed_and_split_only():
    first, labels = data.MovingDigits("train", 7).batch(6)
    again = data.MovingDigits("train", 7)
    assert torch.equal(again.batch(6)[0], first)
    assert not torch.equal(again.batch(6)[0], first)  # the stream goes on
    assert not torch.equal(data.MovingDigits("train", 8).batch(6)[0], first)
    assert not torch.equal(data.MovingDigits("held_out", 7).batch(6)[0], first)
    assert labels.shape == (6, data.SLOTS)


@pytest.mark.parametrize(("size", "frames"), [(32, 16), (64, 4)])
def test_shape_and_range(size, frames):
    clips, labels = data.MovingDigits("train", 0, size=size, frames=frames, pairs=0.5).batch(32)
    assert clips.shape == (32, frames, size, size)
    assert clips.dtype == torch.float32
    assert clips.amin() == -1
    assert 0.8 < clips.amax() <= 1
    one = labels[:, 1] == data.NO_DIGIT
    assert 0 < one.sum() < 32
    assert (labels[:, 0] < 10).all()
    # Two digits show more ink than one, and no digit ever leaves the frame.
    ink = (clips + 1).sum(dim=(2, 3))
    assert ink[~one].mean() > 1.3 * ink[one].mean()
    assert (ink > 0).all()
    torch.testing.assert_close(ink[one].amin(1), ink[one].amax(1), rtol=0.15, atol=0)


@pytest.mark.parametrize(("pairs", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_pairs_is_the_share_of_clips_with_two_digits(pairs, share):
    _, labels = data.MovingDigits("train", 0, frames=1, pairs=pairs).batch(50)
    assert (labels[:, 1] != data.NO_DIGIT).float().mean() == share


def test_a_digit_at_rest_is_the_bilinear_upscaling_of_its_image():
    digits = data.MovingDigits("train", 0)
    ink = torch.zeros(1, data.SLOTS, 8, 8)
    ink[0, 0] = digits.images[3]
    frame = digits._render(ink, torch.full((1, data.SLOTS, 1, 2), 8.0))[0, 0]
    expected = torch.nn.functional.interpolate(ink[:, :1], scale_factor=2, mode="bilinear")[0, 0]
    # torch repeats the border where ours fades out, so compare one pixel further in.
    torch.testing.assert_close((frame[9:23, 9:23] + 1) / 2, expected[1:-1, 1:-1])


def test_paths_are_straight_and_bounce():
    digits = data.MovingDigits("train", 0, frames=64)
    corner = digits._paths(torch.rand(20, data.SLOTS, 5, generator=torch.Generator().manual_seed(0)))
    assert corner.amin() >= 0
    assert corner.amax() <= 16
    speed = corner.diff(dim=2).abs()
    fastest = speed.amax(dim=2, keepdim=True)
    assert ((speed - fastest).abs() < 1e-4).float().mean() > 0.8  # the same speed but at a bounce
    assert (corner.diff(dim=2).sign().diff(dim=2) != 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of train, held_out, got 'test'"),
        ({"split": "train", "size": 8}, "size must be at least 16, got 8"),
        ({"split": "train", "frames": 0}, "frames must be at least 1, got 0"),
        ({"split": "train", "pairs": 2}, "pairs must be between 0 and 1, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.MovingDigits(seed=0, **arguments)
