"""How far the features φ are from flat, and the linear branch from an average of V, at each temperature.

The softmax of a small vector is nearly flat. Were it so here, every query would weigh all keys alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import evaluate
from ..arms import LinearOnly
from . import Context, Experiment, Setting
from .motivation import CLIPS, TIMES, mean_and_bounds, noisy_clips

TEMPERATURES = {f"temperature {temperature:g}": temperature for temperature in (1.0, 4.0, 16.0)}


def figures(query: Tensor, key: Tensor, value: Tensor, temperature: float) -> dict[str, Tensor]:
    """Of each head of each clip (B, H), from query, key and value (B, H, N, D), with φ(x) = softmax(temperature x).

    `features_in_use` is exp(entropy) of φ(query) and φ(key) as a share of D, mean over tokens: 1 is flat, 1/D is one
    feature alone. `from_average` is |O - mean V| / |O|, where O is linear attention over all keys.
    """
    query, key = temperature * query, temperature * key
    both = torch.cat([query, key], dim=-2).softmax(dim=-1)
    in_use = torch.special.entr(both).sum(dim=-1).exp() / query.shape[-1]
    linear: Tensor = LinearOnly()(query, key, value)
    apart = (linear - value.mean(dim=-2, keepdim=True)).norm(dim=(-2, -1)) / linear.norm(dim=(-2, -1))
    return {"features_in_use": in_use.mean(dim=-1), "from_average": apart}


def _measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
    teacher = context.teacher(setting)
    data = noisy_clips(teacher, seed, torch.tensor(TIMES).repeat(CLIPS)[: setting.clips])
    inputs = (each.to(context.device) for each in (data.x, data.time, data.labels))
    layers = [
        figures(query, key, value, TEMPERATURES[case])
        for query, key, value in evaluate.attention_inputs(teacher, *inputs)
    ]
    return mean_and_bounds({name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})


def _prepare(setting: Setting, context: Context) -> None:
    context.teacher(setting)


EXPERIMENT = Experiment(
    "features",
    "Are the features of the linear branch flat, and the branch an average of V?",
    lambda setting: list(TEMPERATURES),
    _measure,
    _prepare,
    shown="from_average",
)
