"""What a model is worth: measured on held-out clips with fixed noise and fixed times.

Everything here is deterministic. It needs only the predictions of one model on one set: their distance
to the true velocity is the held-out loss, that to the teacher's predictions the distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_ref

from ..analysis import attention_flops
from ..checks import check_block_size, check_type
from . import flow
from .flow import Batch
from .model import ModelConfig, VideoTransformer

HELD_OUT_SEED = 1_000_003  # of clips, noise and times; the same for every model ever compared


def held_out(model: VideoTransformer, clips: int) -> Batch:
    """A set of so many held-out clips on the CPU, always the same; times are spread evenly over [0, 1]."""
    check_type("model", model, VideoTransformer)
    check_block_size("clips", clips)
    clip, labels = model.config.clips("held_out", HELD_OUT_SEED).batch(clips)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    noise = torch.randn(clip.shape, generator=generator)
    time = (torch.arange(clips) + 0.5) / clips
    return Batch(flow.noised(clip, noise, time), time, labels, flow.velocity(clip, noise))


@torch.no_grad()
def predict(
    model: VideoTransformer, data: Batch, batch: int = 8, tick: Callable[[int], object] = lambda done: None
) -> Tensor:
    """The model's velocities for the whole set (n, F, S, S), in float32 on the CPU."""
    check_type("model", model, VideoTransformer)
    check_type("data", data, Batch)
    check_block_size("batch", batch)
    device = next(model.parameters()).device
    model.eval()
    parts = []
    for start in range(0, len(data.x), batch):
        part = slice(start, start + batch)
        inputs = (each[part].to(device) for each in data[:3])
        parts.append(model(*inputs).float().cpu())
        tick(min(start + batch, len(data.x)))
    return torch.cat(parts)


def held_out_loss(prediction: Tensor, data: Batch) -> float:
    """Mean squared error of the velocity; pixels have values in [-1, 1]."""
    return F.mse_loss(prediction, data.velocity).item()


def distance(prediction: Tensor, teacher: Tensor) -> float:
    """Mean squared difference of two predictions, in the units of the loss."""
    return F.mse_loss(prediction, teacher).item()


@torch.no_grad()
def attention_inputs(
    model: VideoTransformer, x: Tensor, time: Tensor, labels: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value (B, H, N, D) of every block, as its attention receives them."""
    caught: list[tuple[Tensor, Tensor, Tensor]] = []

    def catch(core: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        caught.append(inputs)

    cores = [block.get_submodule("attention.core") for block in model.blocks]
    hooks = [core.register_forward_pre_hook(catch) for core in cores]
    try:
        model(x, time, labels)
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def attention_cost(config: ModelConfig) -> tuple[float, float]:
    """FLOPs of all attention in one forward of one clip, and its sparsity, 1 - critical share.

    Counted as `sla_ref.analysis.attention_flops` says, plus the products behind SLA2's alpha; linear-only attention has
    sparsity 1.
    """
    check_type("config", config, ModelConfig)
    critical_share = {"full": 1.0, "linear": 0.0}.get(config.attention)
    if critical_share is None:
        tokens = torch.zeros(1, 1, config.tokens, 1)
        sizes = {"block_q": config.block, "block_k": config.block}
        classes = sla_ref.classify_blocks(tokens, tokens, config.critical_ratio, 0.0, **sizes)
        critical_share = 1 - classes.sparsity
    flops = attention_flops(
        config.tokens,
        config.tokens,
        config.head_dim,
        critical_share=critical_share,
        linear=config.attention in ("sla", "sla2", "linear", "l+s"),
    )
    token_products = {  # a query with so many vectors; "ideal" runs the operator, which multiplies with values too
        "token": 1,
        "block_means": math.ceil(config.tokens / config.block),
        "ideal": 2 * (1 - critical_share) * config.tokens,
    }
    if config.alpha in token_products:
        flops += 2 * config.tokens * config.head_dim * token_products[config.alpha]
    return config.depth * config.heads * flops, 1 - critical_share
