"""Moving digits: short clips of real handwritten digits that drift and bounce.

The digits are the 1,797 images of 8 x 8 pixels that come with scikit-learn (UCI "Optical Recognition
of Handwritten Digits", CC BY 4.0). Nothing is downloaded. Every fifth image is kept for the held-out
clips: training and held-out clips never show the same image.

A clip is a float32 tensor (frames, size, size) in [-1, 1]: -1 is empty background, 1 is full ink.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..checks import check_block_size, check_choice, check_ratio, check_seed, find_device

SPLITS = ("train", "held_out")
DIGITS = 10


@cache
def digit_images(split: str) -> tuple[Tensor, Tensor]:
    """The digits of one split: images (count, 8, 8) in [0, 1] and their labels (count,) int64."""
    check_choice("split", split, SPLITS)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    held_out = torch.arange(len(images)) % 5 == 4
    chosen = held_out if split == "held_out" else ~held_out
    return images[chosen], labels[chosen]


class MovingDigits:
    """An endless stream of clips; the same seed gives the same clips on every device.

    What a clip shows is drawn on the CPU; the pixels are made on the device that asks for them. A
    digit is half a frame wide, starts anywhere and moves in a straight line, reflected at the borders.
    With a `backdrop`, each clip has a grey background of one level, drawn from [-1, 2 backdrop - 1]:
    something that all of its tokens share.
    """

    def __init__(self, split: str, seed: int, *, size: int = 32, frames: int = 16, backdrop: float = 0.0) -> None:
        check_choice("split", split, SPLITS)
        check_seed(seed)
        check_ratio("backdrop", backdrop, zero_allowed=True)
        check_block_size("frames", frames)
        check_block_size("size", size)
        if size < 16:
            raise ValueError(f"size must be at least 16, got {size}")
        self.images, self.labels = digit_images(split)
        self.size, self.frames, self.backdrop = size, frames, backdrop
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The next `count` clips (count, frames, size, size) and the digits that they show (count,), int64."""
        check_block_size("count", count)
        device = find_device("device", device)
        # More is drawn than is used, to get the clips that the shipped weights and all measurements come from.
        chosen = torch.randint(len(self.images), (count, 2), generator=self.generator)[:, 0]
        draws = torch.rand(count, 2, 5, generator=self.generator)[:, 0, :4]
        drawn = (self.images[chosen], draws, self.labels[chosen])
        ink, draws, labels = (each.to(device, non_blocking=True) for each in drawn)
        clips = self._render(ink, self._paths(draws))
        if self.backdrop:  # drawn only where it is asked for: without it, the clips of a seed stay what they were
            level = 2 * self.backdrop * torch.rand(count, 1, 1, 1, generator=self.generator) - 1
            clips = clips.maximum(level.to(device, non_blocking=True))
        return clips, labels

    def _paths(self, draws: Tensor) -> Tensor:
        """Where each digit's upper left corner is, in pixels: (count, frames, 2)."""
        room = self.size / 2  # the digit fills the other half
        start = draws[..., 0:2] * room
        angle = draws[..., 2] * 2 * torch.pi
        speed = (0.02 + 0.04 * draws[..., 3]) * self.size  # pixels per frame
        velocity = speed[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        time = torch.arange(self.frames, device=draws.device)
        free = start[..., None, :] + velocity[..., None, :] * time[:, None]
        folded = free.remainder(2 * room)  # a bounce is a straight line, folded
        return torch.minimum(folded, 2 * room - folded)

    def _render(self, ink: Tensor, corner: Tensor) -> Tensor:
        """Bilinear upscaling to sub-pixel places as two small matrix products per digit and frame."""
        digit = self.size / 2
        pixel = torch.arange(self.size, device=ink.device) + 0.5
        # Place of each frame pixel on the 8 x 8 grid, then its weights on the two nearest grid lines.
        place = (pixel - corner[..., None]) * (8 / digit) - 0.5  # (count, frames, 2, size)
        grid = torch.arange(8, device=ink.device)
        weights = (1 - (place[..., None] - grid).abs()).clamp(min=0)
        rows, columns = weights.unbind(dim=2)  # (count, frames, size, 8) each
        return rows @ ink[:, None] @ columns.mT * 2 - 1
