"""The paper's Figures 1 and 3: few weights are large, many are small, and what is not large has a low stable rank.

The paper's numbers are of one sampled map of Wan2.1: 8.1 % of the weights are above 1/N, about 45 % below 1/(100 N).
Without the smallest 45 % the error is below 3 %, with only the largest 8.1 % about 33 %. The whole map has a stable
rank of 6226, its largest 8 % have 6230, and the others 9. This experiment looks at all layers and heads of the teacher,
on held-out clips.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sla_ref import analysis
from sla_ref.lab import evaluate, flow
from sla_ref.lab.flow import Batch
from sla_ref.lab.model import VideoTransformer

from .fine_tuning import find_teacher
from .setting import Context, Experiment, Setting

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # t of the flow: 0 is the clip, 1 is noise
CASES = {f"t = {time}": time for time in TIMES}
CLIPS = 4  # for each time; with 4 layers and 2 heads they have 32 maps
LARGE_SHARE, SMALL_SHARE = 0.081, 0.45  # the paper's shares of its map
RANK_SHARE = 0.08
ITERATIONS = 30  # give stable ranks to about 1e-5; all eigenvalues of a map with N = 4096 would take too long

Quantities = dict[str, Tensor]


def noisy_clips(model: VideoTransformer, seed: int, times: Tensor, split: str = "held_out") -> Batch:
    """One clip of the split with noise for each entry of `times` (n,). The seed chooses clips and noise."""
    data = model.config.clips(split, evaluate.HELD_OUT_SEED + 1 + seed)
    clip, labels = data.batch(len(times))
    noise = torch.randn(clip.shape, generator=data.generator)
    return Batch(flow.noised(clip, noise, times), times, labels, flow.velocity(clip, noise))


def of_all_layers(
    model: VideoTransformer, data: Batch, clips: int, measure: Callable[[Tensor, Tensor, Tensor], Quantities]
) -> Quantities:
    """What `measure` returns for query, key and value of each layer and clip, stacked.

    It gets one clip at a time, because a map has N x N weights.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {}
    for clip in range(min(clips, len(data.x))):
        inputs = (each[clip : clip + 1].to(device) for each in (data.x, data.time, data.labels))
        for layer in evaluate.attention_inputs(model, *inputs):
            for name, quantity in measure(*layer).items():
                found.setdefault(name, []).append(quantity.double().cpu())
    return {name: torch.stack(each) for name, each in found.items()}


def mean_and_bounds(quantities: Quantities) -> dict[str, float]:
    """The mean of each quantity over clips, layers and heads, and its smallest and largest value."""
    bounds: dict[str, Callable[[Tensor], Tensor]] = {"": Tensor.mean, "_min": Tensor.min, "_max": Tensor.max}
    return {f"{name}{bound}": of(each).item() for name, each in quantities.items() for bound, of in bounds.items()}


def map_quantities(query: Tensor, key: Tensor, value: Tensor) -> Quantities:
    """What the paper reports for its map, for each map of query, key and value (..., N, D).

    Errors are relative L1 errors of the output P V after some weights were dropped and the rows normalised again. Two
    of them drop weights by their size, and two drop the paper's share of the weights, whatever their size.
    """
    weights, value = analysis.attention_weights(query, key), value.float()
    keys = weights.shape[-1]
    above, below = analysis.weight_bands(weights)
    large, _ = analysis.split_top(weights, LARGE_SHARE)
    not_small, _ = analysis.split_top(weights, 1 - SMALL_SHARE)
    errors = {
        "error_without_small": weights >= 1 / (100 * keys),
        "error_only_large": weights > 1 / keys,
        "error_without_smallest_45": not_small > 0,
        "error_only_largest_8": large > 0,
    }
    top, rest = analysis.split_top(weights, RANK_SHARE)
    ranks = {"stable_rank": weights, "stable_rank_top_8": top, "stable_rank_rest": rest}
    return {
        "above_mean": above,
        "below_hundredth": below,
        **{name: analysis.error_of_keeping(kept, weights, value) for name, kept in errors.items()},
        **{name: analysis.stable_rank(part, ITERATIONS) for name, part in ranks.items()},
    }


def _measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
    teacher = find_teacher(setting, context)
    data = noisy_clips(teacher, seed, torch.full((CLIPS,), CASES[case]))
    return mean_and_bounds(of_all_layers(teacher, data, CLIPS, map_quantities))


EXPERIMENT = Experiment(lambda setting: list(CASES), _measure)
