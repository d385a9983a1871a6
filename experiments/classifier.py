"""A small classifier that recognises the digit in a frame, and what it says about generated clips.

It is trained here, on frames of the training clips. It judges a set of clips by two quantities: the share of clips in
which it recognises the requested digit, and the Fréchet distance between its features of these clips and of real ones,
as FID does with a network trained on photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sla_ref.files import whole
from sla_ref.lab import evaluate, flow
from sla_ref.lab.data import DIGITS, MovingDigits
from sla_ref.lab.model import VideoTransformer

from .setting import QUICK, Context, Setting

FEATURES = 32
SIDE = 32  # pixels that frames are scaled to; digits are drawn from 8 x 8 pixels, so nothing gets lost
CLIPS_AT_A_TIME = 64


class DigitClassifier(nn.Module):
    """Frames (B, size, size) in [-1, 1] -> logits (B, 10), whatever the size."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            nn.Conv2d(64, 64, 3, padding=1),
        )
        self.hidden = nn.Linear(64, FEATURES)
        self.out = nn.Linear(FEATURES, DIGITS)

    def features(self, frames: Tensor) -> Tensor:
        """The input of the last layer, (B, FEATURES)."""
        maps = self.convolutions(F.interpolate(frames[:, None], size=(SIDE, SIDE), mode="area"))
        return F.relu(self.hidden(maps.amax(dim=(2, 3))))  # the largest value, wherever the digit is

    def forward(self, frames: Tensor) -> Tensor:
        return self.out(self.features(frames))


def train_classifier(size: int, steps: int, device: torch.device | str = "cpu") -> DigitClassifier:
    """A classifier trained on single frames of `size`. On one device it is always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = DigitClassifier().to(device)
    data = MovingDigits("train", 0, size=size, frames=1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for _ in range(steps):
            clips, labels = data.batch(128, device)
            loss = F.cross_entropy(classifier(clips[:, 0]), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
    return classifier


@cache
def find_classifier(setting: Setting, context: Context) -> DigitClassifier:
    """The classifier for frames of the setting's size, read from the folder `work` or else trained and kept there."""
    steps = 40 if setting == QUICK else 600
    path = context.work / f"classifier-{setting.size}-{steps}.safetensors"
    if path.exists():
        classifier = DigitClassifier().to(context.device)
        classifier.load_state_dict(load_file(path))
    else:
        classifier = train_classifier(setting.size, steps, context.device)
        context.work.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            save_file(classifier.state_dict(), temporary)
    return classifier.eval()


@torch.no_grad()
def mean_over_frames(function: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
    """The mean of `function` over the frames of each clip, (n, frames, size, size) -> (n, ...)."""
    parts = clips.split(CLIPS_AT_A_TIME)
    return torch.cat([function(part.flatten(0, 1)).unflatten(0, part.shape[:2]).mean(dim=1) for part in parts])


def recognised_share(classifier: DigitClassifier, clips: Tensor, labels: Tensor) -> float:
    """The share of clips (n, frames, size, size) that are classified as their `labels` (n,).

    The class of a clip is the largest of its frames' mean logits.
    """
    return (mean_over_frames(classifier, clips).argmax(dim=1) == labels).double().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians with the means and covariances of the rows of a (n, F) and b (m, F).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64. Two finite samples of the same distribution
    have a distance above zero, which is larger for smaller samples. So compare sets of the same size, with more rows
    than features.
    """
    a, b = a.double().cpu(), b.double().cpu()
    covariance_a, covariance_b = (torch.atleast_2d(rows.T.cov()) for rows in (a, b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    distance = apart + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding may make it slightly negative


def _judged(clips: Tensor, labels: Tensor, setting: Setting, context: Context) -> dict[str, float]:
    """Fréchet distance to as many held-out clips, and the share of clips whose digit the classifier recognises."""
    classifier = find_classifier(setting, context)
    real, _ = setting.model.clips("held_out", evaluate.HELD_OUT_SEED + 1).batch(setting.samples, context.device)
    return {
        "frechet": frechet_distance(*(mean_over_frames(classifier.features, each) for each in (clips, real))),
        "recognised": recognised_share(classifier, clips, labels),
    }


def quality(student: VideoTransformer, setting: Setting, context: Context) -> dict[str, float]:
    """How good a student's clips are. All students start from the same noise, with equally many clips of each digit."""
    device = context.device
    generator = torch.Generator().manual_seed(evaluate.HELD_OUT_SEED)
    noise = torch.randn(setting.samples, setting.frames, setting.size, setting.size, generator=generator).to(device)
    labels = torch.arange(setting.samples, device=device) % DIGITS
    parts = zip(noise.split(CLIPS_AT_A_TIME), labels.split(CLIPS_AT_A_TIME), strict=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        clips = [flow.sample(student, *part, setting.sample_steps).float() for part in parts]
    return _judged(torch.cat(clips), labels, setting, context)


def quality_of_real(seed: int, setting: Setting, context: Context) -> dict[str, float]:
    """The same for held-out clips: the best that a model can reach, and the accuracy of the classifier."""
    clips = setting.model.clips("held_out", evaluate.HELD_OUT_SEED + 2 + seed).batch(setting.samples, context.device)
    return _judged(*clips, setting, context)
