"""How far the features φ are from flat, and the linear branch from an average of V, at each temperature.

The softmax of a small vector is nearly flat. Were all features flat, every query would weigh all keys alike.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sla_ref.lab.arms import LinearOnly

from .attention_maps import CLIPS, TIMES, Figures, mean_and_bounds, noisy_clips, of_all_layers
from .fine_tuning import find_teacher
from .setting import Context, Experiment, Setting

TEMPERATURES = {f"temperature {temperature:g}": temperature for temperature in (1.0, 4.0, 16.0)}


def figures(query: Tensor, key: Tensor, value: Tensor, *, temperature: float) -> Figures:
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
    teacher = find_teacher(setting, context)
    data = noisy_clips(teacher, seed, torch.tensor(TIMES).repeat(CLIPS)[: setting.clips])
    of_case = partial(figures, temperature=TEMPERATURES[case])
    return mean_and_bounds(of_all_layers(teacher, data, len(data.x), of_case))


EXPERIMENT = Experiment(lambda setting: list(TEMPERATURES), _measure)
