"""How far the features φ are from flat, and the linear branch from an average of V, at each temperature.

The softmax of a small vector is nearly flat. If all features were flat, every query would give all keys the same
weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sla_ref.lab.arms import LinearOnly

from .attention_maps import CLIPS, TIMES, Quantities, mean_and_bounds, noisy_clips, of_all_layers
from .fine_tuning import find_teacher
from .setting import Context, Experiment, Setting

TEMPERATURES = {f"temperature {temperature:g}": temperature for temperature in (1.0, 4.0, 16.0)}


def quantities(query: Tensor, key: Tensor, value: Tensor, *, temperature: float) -> Quantities:
    """Two numbers for each head (B, H), from query, key, value (B, H, N, D) and φ(x) = softmax(temperature x).

    `features_in_use` is exp(entropy) of φ(query) and φ(key) as a share of D, averaged over tokens: 1 is flat, and 1/D
    means a single feature. `from_average` is |O - mean V| / |O|, where O is linear attention over all keys.
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
    of_case = partial(quantities, temperature=TEMPERATURES[case])
    return mean_and_bounds(of_all_layers(teacher, data, len(data.x), of_case))


EXPERIMENT = Experiment(lambda setting: list(TEMPERATURES), _measure)
