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
    assert labels.shape == (6,)


def test_the_clips_of_a_seed_are_those_that_the_shipped_weights_were_judged_by():
    digits = data.MovingDigits("held_out", 1_000_003)
    digits.batch(4)
    clips, labels = digits.batch(6)
    assert labels.tolist() == [3, 7, 7, 2, 5, 7]
    assert clips.argmax() == 20850 and clips.mean().item() == pytest.approx(-0.8619137, abs=1e-5)


@pytest.mark.parametrize(("size", "frames"), [(32, 16), (64, 4)])
def test_shape_and_range(size, frames):
    clips, labels = data.MovingDigits("train", 0, size=size, frames=frames).batch(32)
    assert clips.shape == (32, frames, size, size)
    assert clips.dtype == torch.float32
    assert clips.amin() == -1
    assert 0.8 < clips.amax() <= 1
    assert labels.amin() >= 0 and labels.amax() < data.DIGITS
    ink = (clips + 1).sum(dim=(2, 3))
    torch.testing.assert_close(ink.amin(1), ink.amax(1), rtol=0.15, atol=0)  # no digit ever leaves the frame


def test_a_digit_at_rest_is_the_bilinear_upscaling_of_its_image():
    digits = data.MovingDigits("train", 0)
    ink = digits.images[3:4]
    frame = digits._render(ink, torch.full((1, 1, 2), 8.0))[0, 0]
    expected = torch.nn.functional.interpolate(ink[None], scale_factor=2, mode="bilinear")[0, 0]
    # torch repeats the border where ours fades out, so compare one pixel further in.
    torch.testing.assert_close((frame[9:23, 9:23] + 1) / 2, expected[1:-1, 1:-1])


def test_paths_are_straight_and_bounce():
    digits = data.MovingDigits("train", 0, frames=64)
    corner = digits._paths(torch.rand(40, 4, generator=torch.Generator().manual_seed(0)))
    assert corner.amin() >= 0
    assert corner.amax() <= 16
    speed = corner.diff(dim=1).abs()
    fastest = speed.amax(dim=1, keepdim=True)
    assert ((speed - fastest).abs() < 1e-4).float().mean() > 0.8  # the same speed but at a bounce
    assert (corner.diff(dim=1).sign().diff(dim=1) != 0).any()


def test_a_backdrop_is_one_level_per_clip_and_changes_nothing_else():
    plain, backed, again = (data.MovingDigits("train", 5, backdrop=level).batch(4)[0] for level in (0.0, 0.5, 0.5))
    assert torch.equal(again, backed)
    level = backed.amin(dim=(1, 2, 3), keepdim=True)
    assert level.amax() < 0 and len(level.unique()) == 4
    assert torch.equal(backed, plain.maximum(level))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of .train., .held_out., got 'test'"),
        ({"split": "train", "size": 8}, "size must be at least 16, got 8"),
        ({"split": "train", "frames": 0}, "frames must be an int >= 1, got 0"),
        ({"split": "train", "backdrop": 2}, "backdrop must be a number with 0 <= backdrop <= 1, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.MovingDigits(seed=0, **arguments)
