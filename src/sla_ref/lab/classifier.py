"""Which digit a frame shows: a small classifier, and what it says about generated clips.

It is trained here, on frames of the training clips, and its accuracy is measured on frames of the held-out images. Two
figures of a set of clips come from it: the share in which it recognises the digit that was asked for, and the Fréchet
distance between its features of these clips and of real ones (what FID does with a network trained on photographs).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import whole
from .data import NO_DIGIT, MovingDigits
from .weights import DamagedWeights

DIGITS = 10
FEATURES = 32
SIDE = 32  # frames of every size are brought to this one; a digit has 8 x 8 pixels behind it, so nothing gets lost


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of the training."""

    size: int
    steps: int = 600
    batch: int = 128
    learning_rate: float = 3e-3
    seed: int = 0
    held_out_frames: int = 4000


class DigitClassifier(nn.Module):
    """Frames (B, size, size) in [-1, 1] -> logits (B, 10), whatever the size. `accuracy` is that on held-out frames."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = float("nan")  # not measured yet
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
        )
        self.hidden = nn.Linear(64, FEATURES)
        self.out = nn.Linear(FEATURES, DIGITS)

    def features(self, frames: Tensor) -> Tensor:
        """What the last layer sees, (B, FEATURES)."""
        maps = self.convolutions(F.interpolate(frames[:, None], size=(SIDE, SIDE), mode="area"))
        return F.relu(self.hidden(maps.amax(dim=(2, 3))))  # the largest value, wherever the digit is

    def forward(self, frames: Tensor) -> Tensor:
        return self.out(self.features(frames))


def train_classifier(recipe: Recipe, device: torch.device | str = "cpu") -> DigitClassifier:
    """A classifier trained on single frames of one digit each, its accuracy measured; the same for the same recipe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = DigitClassifier().to(device)
    data = MovingDigits("train", recipe.seed, size=recipe.size, frames=1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.1
    )
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for _ in range(recipe.steps):
            clips, labels = data.batch(recipe.batch, device)
            loss = F.cross_entropy(classifier(clips[:, 0]), labels[:, 0])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
    classifier.eval().requires_grad_(False)
    held_out = MovingDigits("held_out", recipe.seed, size=recipe.size, frames=1)
    classifier.accuracy = recognised_share(classifier, *held_out.batch(recipe.held_out_frames))
    return classifier


def load_or_train_classifier(
    cache: Path, device: torch.device | str, *, size: int, quick: bool = False
) -> DigitClassifier:
    """The classifier for frames of `size`, from the folder `cache` or trained now and left there.

    It is kept as `classifier-SIZE.safetensors` with a card `classifier-SIZE.json`. `quick` trains for a moment, to try
    things out; what comes of it is kept under another name.

    Raises:
        DamagedWeights: the file is not the one that its card speaks of.
        ValueError: size is below 16, or the kept classifier is of another recipe.
    """
    from safetensors.torch import load_file, save_file

    recipe = Recipe(size, steps=40, held_out_frames=500) if quick else Recipe(size)
    path = cache / f"classifier-{size}{'-quick' if quick else ''}.safetensors"
    card_path = path.with_suffix(".json")
    if card_path.is_file():  # it is written last
        card = json.loads(card_path.read_text(encoding="utf-8"))
        if card["recipe"] != asdict(recipe):
            raise ValueError(f"{card_path} is of the recipe {card['recipe']}, not {asdict(recipe)}; remove it")
        if not path.is_file() or _checksum(path) != card["sha256"]:
            raise DamagedWeights(f"{path} is not the file that {card_path.name} speaks of; remove both")
        classifier = DigitClassifier()
        classifier.load_state_dict(load_file(path))
        classifier.accuracy = card["held_out_accuracy"]
        return classifier.to(device).eval().requires_grad_(False)

    started = time.perf_counter()
    classifier = train_classifier(recipe, device)
    seconds = time.perf_counter() - started
    cache.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        save_file({name: weight.cpu().contiguous() for name, weight in classifier.state_dict().items()}, temporary)
        card = {
            "recipe": asdict(recipe),
            "held_out_accuracy": classifier.accuracy,
            "seconds": round(seconds, 1),
            "device": torch.device(device).type,
            "sha256": _checksum(temporary),
        }
    with whole(card_path) as temporary:
        temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return classifier


@torch.no_grad()
def clip_features(classifier: DigitClassifier, clips: Tensor) -> Tensor:
    """One row per clip: (n, frames, size, size) -> (n, FEATURES), the mean over its frames, on the CPU."""
    return torch.cat([part.mean(dim=1) for part in _by_clip(classifier, classifier.features, clips)])


@torch.no_grad()
def recognised_share(classifier: DigitClassifier, clips: Tensor, labels: Tensor) -> float:
    """In what share of clips (n, frames, size, size) the digit is that of `labels` (n, 2), as `MovingDigits` gives it.

    The class of a clip is the largest of its frames' mean logits. Raises ValueError where a clip has a second digit:
    the classifier knows frames of one digit only.
    """
    if len(clips) != len(labels):
        raise ValueError(f"labels must have one row per clip ({len(clips)}), got {len(labels)}")
    if (labels[:, 1] != NO_DIGIT).any():
        raise ValueError(f"labels must have no second digit, got {int((labels[:, 1] != NO_DIGIT).sum())} rows with one")
    logits = torch.cat([part.mean(dim=1) for part in _by_clip(classifier, classifier, clips)])
    return (logits.argmax(dim=1) == labels[:, 0].cpu()).double().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians with the means and covariances of the rows of a (n, F) and b (m, F).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64. The distance of two finite samples of the same
    distribution is above zero, the more the fewer they are: compare sets of the same size, of more rows than features.

    Raises ValueError if a set has fewer than two rows or the two differ in F.
    """
    for name, rows in (("a", a), ("b", b)):
        if rows.dim() != 2 or len(rows) < 2:
            raise ValueError(f"{name} must have shape (n, F) with n of at least 2, got {tuple(rows.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b must have as many features as a ({a.shape[1]}), got {b.shape[1]}")
    a, b = a.double(), b.double()
    root = _square_root(torch.atleast_2d(a.T.cov()))
    covariance_b = torch.atleast_2d(b.T.cov())
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    distance = apart + root.square().sum() + covariance_b.trace() - 2 * cross  # |root|^2 is the trace of its square
    return max(0.0, distance.item())  # rounding may leave a little less than nothing


def _square_root(matrix: Tensor) -> Tensor:
    """The positive semi-definite square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _by_clip(classifier: DigitClassifier, function: Callable[[Tensor], Tensor], clips: Tensor) -> Iterator[Tensor]:
    """What `function` makes of all frames, a few clips at a time: (clips, frames, ...) each, float32 on the CPU."""
    device = next(classifier.parameters()).device
    for part in clips.split(64):
        yield function(part.to(device).flatten(0, 1).float()).unflatten(0, part.shape[:2]).cpu()


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
