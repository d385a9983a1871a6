"""A video diffusion transformer: Wan's, made small.

Kept from Wan: patches of (1, 4, 4), rotary embedding over frame, row and column, RMS norm of query
and key, adaLN-zero with one shared time projection and a learned table per block, heads of 64, tokens
in raster order. Left out: the text encoder and its cross-attention, and the VAE. Instead, the digit that
a clip shows is a class label, whose embedding is added to the time embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_type, shown
from .arms import ARMS, make_arm
from .config import check_limits, option
from .data import DIGITS, MovingDigits

PATCH = 4
MOST_TOKENS, MOST_NUMBERS = 2**20, 2**30
SLA2_DEFAULTS = {"alpha": "head", "router": "pooled"}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build a model. N = frames * (size / 4)^2 tokens."""

    frames: int = option(16, "Frames of a clip.", least=1)
    size: int = option(32, "Height and width of a frame, in pixels.", least=16)
    backdrop: float = option(0.0, "Of the clips it is for: how bright a background may be.", least=0, most=1)
    width: int = option(128, "Width of the model.", least=2, most=2**14)
    depth: int = option(4, "Blocks of the model.", least=1, most=1000)
    heads: int = option(2, "Attention heads.", least=1, most=2**13)
    attention: str = option("full", "full, sla, sla2, sparse, linear or l+s.")
    critical_ratio: float = option(0.05, "Share of critical blocks.", least=0, most=1)
    negligible_ratio: float = option(0.10, "Share of negligible blocks, of sla alone.", least=0, most=1)
    block: int = option(16, "Tokens of a block.", least=1, most=MOST_TOKENS)
    # Of sla2 alone: None for any other attention, and replaced by the defaults here for sla2.
    alpha: str | None = option(None, "With sla2: head (default), block, token, block_means or ideal.")
    router: str | None = option(None, "With sla2: pooled (default) or learned.")

    def __post_init__(self) -> None:
        check_limits(self)
        if self.size % PATCH:
            raise ValueError(f"size must be a multiple of {PATCH}, got {self.size}")
        # A small model: what a machine cannot hold is a mistake, and the system kills a process that finds out later.
        numbers, weights = self.tokens * self.width, 12 * self.depth * self.width**2
        if self.tokens > MOST_TOKENS or numbers > MOST_NUMBERS or weights > MOST_NUMBERS:
            got = f"{shown(self.tokens)}, {shown(numbers)} and {shown(weights)}"
            raise ValueError(
                f"frames, size, width and depth must make at most {MOST_TOKENS:,} tokens, {MOST_NUMBERS:,} numbers for "
                f"them and {MOST_NUMBERS:,} weights, got {got}"
            )
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads ({2 * self.heads}), got {self.width}")
        for name, default in SLA2_DEFAULTS.items():
            value = getattr(self, name)
            if self.attention != "sla2" and value is not None:
                got = f"{shown(value)} with {self.attention}"
                raise ValueError(f"{name} must be left out unless attention is sla2, got {got}")
            if self.attention == "sla2" and value is None:
                object.__setattr__(self, name, default)  # the dataclass is frozen

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        return self.frames * (self.size // PATCH) ** 2

    def clips(self, split: str, seed: int) -> MovingDigits:
        """The stream of clips that such a model is for."""
        return MovingDigits(split, seed, size=self.size, frames=self.frames, backdrop=self.backdrop)


def rotary_angles(frames: int, side: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Angles (N, head_dim / 2) of the 3-D rotary embedding; like Wan, time gets what thirds leave."""
    pairs = head_dim // 2
    space = pairs // 3
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(side), torch.arange(side))
    angles = []
    for axis, share in enumerate((pairs - 2 * space, space, space)):
        frequencies = base ** (-torch.arange(share) / max(share, 1))
        angles.append(places[:, axis, None] * frequencies)
    return torch.cat(angles, dim=-1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of x (B, H, N, D) by the angles of its token."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def time_features(time: Tensor, width: int) -> Tensor:
    """Sinusoids (B, width) of 1000 t, as diffusion transformers have them."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=time.device))
    angles = 1000 * time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    """Projections, norms and rotation around an exchangeable `core`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm_query = nn.RMSNorm(config.width, eps=1e-6)
        self.norm_key = nn.RMSNorm(config.width, eps=1e-6)
        self.core = make_arm(config)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        full = self.norm_query.weight.dtype  # norms and rotation keep it under autocast
        query, key = self.norm_query(query.to(full)), self.norm_key(key.to(full))
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value)
        )  # (B, H, N, D)
        query, key = (rotate(each, cosine, sine).to(value.dtype) for each in (query, key))
        return self.out(self.core(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by time and labels (adaLN-zero)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(config)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, modulation: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x (B, N, width), modulation (B, 6, width) shared by all blocks."""
        table = (modulation + self.scale_shift_table)[:, :, None]  # (B, 6, 1, width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unbind(dim=1)
        attended = self.attention(self.norm_attention(x) * (1 + scale_a) + shift_a, cosine, sine)
        x = x + gate_a * attended
        return x + gate_m * self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)


class VideoTransformer(nn.Module):
    """Predicts the velocity of a noisy clip."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_type("config", config, ModelConfig)
        width = config.width
        self.config = config
        self.patch_embedding = nn.Linear(PATCH * PATCH, width)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embedding = nn.Embedding(DIGITS, width)
        self.time_projection = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, PATCH * PATCH)
        # adaLN-zero: every gate starts at 0, which makes each block start as the identity.
        for layer in (self.time_projection, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = rotary_angles(config.frames, config.size // PATCH, config.head_dim)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """x (B, frames, size, size), time (B,) in [0, 1], labels (B,) -> velocity, shaped as x."""
        expected = (self.config.frames, self.config.size, self.config.size)
        if x.shape[1:] != expected:
            raise ValueError(f"x must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels must be ({len(x)},), one per clip, got {tuple(labels.shape)}")
        width, side = self.config.width, self.config.size // PATCH
        tokens = x.unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH)).transpose(3, 4)
        tokens = self.patch_embedding(tokens.flatten(4).flatten(1, 3))  # (B, N, width)

        condition = self.time_embedding(time_features(time, width)) + self.label_embedding(labels)
        modulation = self.time_projection(F.silu(condition)).unflatten(-1, (6, width))
        for block in self.blocks:
            tokens = block(tokens, modulation, self.cosine, self.sine)

        shift, scale = (condition[:, None] + self.scale_shift_table)[:, :, None].unbind(dim=1)
        tokens = self.out(self.norm_out(tokens) * (1 + scale) + shift)
        grid = tokens.unflatten(1, (-1, side, side)).unflatten(-1, (PATCH, PATCH))
        return grid.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def with_attention(model: VideoTransformer, attention: str, **changes: Any) -> VideoTransformer:
    """A copy of `model` with the same weights and another attention in every block.

    `changes` are fields of ModelConfig: critical_ratio, negligible_ratio, block, alpha, router. A parameter
    that only the new attention has (SLA's proj_l) starts as it makes it; one that only the old one had is
    left behind. SLA2's alpha is kept only where its form and its blocks stay.
    """
    check_type("model", model, VideoTransformer)
    check_choice("attention", attention, ARMS)
    old = model.config
    if attention != old.attention:
        changes = dict.fromkeys(SLA2_DEFAULTS) | changes
    new = replace(old, attention=attention, **changes)
    swapped = VideoTransformer(new)
    weights = swapped.state_dict()
    same_alpha = (old.alpha, old.block) == (new.alpha, new.block)
    kept = (name for name in model.state_dict() if name in weights and (same_alpha or ".core.alpha_" not in name))
    weights.update((name, model.state_dict()[name]) for name in kept)
    swapped.load_state_dict(weights)
    return swapped.to(next(model.parameters()).device)
