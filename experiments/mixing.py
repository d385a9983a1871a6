"""How much each branch weighs: SLA's sum of its branches against SLA2's mixture, with alpha known more or less well.

Is it the weight of the linear branch that plain SLA lacks, or is it a better linear branch? In the arms, alpha goes
from a parameter to the softmax's own share, which only full attention knows. "Centroids" take the same weight as alpha
from block means, and replace the linear branch instead.

Each arm is trained at three learning rates. The report shows the rate that has the lowest loss on clips made for this
choice, of digits that were trained on. The held-out clips have no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import sla_ref
from sla_ref.analysis import attention_weights
from sla_ref.lab import evaluate
from sla_ref.lab.flow import Batch
from sla_ref.lab.model import VideoTransformer

from .attention_maps import TIMES, noisy_clips
from .fine_tuning import of_recipes
from .recipe import Recipe
from .setting import Setting

_PROJ: dict[str, Any] = {"proj": "identity", "temperature": 4.0}
_SLA2 = {
    "alpha per head": Recipe("sla2", alpha="head"),
    "alpha per block": Recipe("sla2", alpha="block"),
    "alpha per head, learned router": Recipe("sla2", alpha="head", router="learned"),
    "alpha per block, learned router": Recipe("sla2", alpha="block", router="learned"),
    "alpha from the token": Recipe("sla2", alpha="token"),
    "alpha from block means": Recipe("sla2", alpha="block_means"),
    "ideal alpha": Recipe("sla2", alpha="ideal"),
}
_WITH_PROJ = ("alpha per head", "alpha from the token", "alpha from block means", "ideal alpha")
ARMS = {
    "full attention": Recipe("full"),
    "sparse only, 15 %": Recipe("sparse", critical_ratio=0.15),
    "sparse only, 5 %": Recipe("sparse"),
    "SLA (paper)": Recipe(),
    "SLA, Proj, temperature 4": Recipe(**_PROJ),
    **_SLA2,
    "centroids": Recipe("centroids"),
    **{f"{arm}, Proj, temperature 4": replace(_SLA2[arm], **_PROJ) for arm in _WITH_PROJ},
}
IN_QUICK = ("full attention", "SLA (paper)", "alpha per block, learned router", "ideal alpha", "centroids")
RATES = (1 / 3, 1.0, 3.0)  # in units of the setting's
LENGTHS = (1, 4)  # in units of the setting's steps

CLIPS = 5  # on which rows are looked at; one for each time
BINS = ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))  # of the mass that is not critical


def recipes(setting: Setting) -> dict[str, Recipe]:
    """Each arm at each length and rate. `values.at_best_rate` reads their names."""
    quick = setting.name == "quick"
    arms: Sequence[str] = IN_QUICK if quick else list(ARMS)
    rates: Sequence[float] = RATES[1:2] if quick else RATES
    lengths: Sequence[int] = LENGTHS[:1] if quick or setting.name == "wide" else LENGTHS
    return {
        f"{length * setting.steps} steps: {arm}, rate {rate * setting.learning_rate:.2g}": replace(
            ARMS[arm], length=length, rate=rate
        )
        for length in lengths
        for arm in arms
        for rate in rates
    }


@torch.no_grad()
def error_of_rows(student: VideoTransformer, data: Batch) -> dict[str, float]:
    """Where the error sits: in rows with much mass outside their critical blocks, or in all of them?

    For each layer of the student, on its own query, key and value: the squared error of a row's output against full
    attention, in units of full attention's mean square. It is averaged over the rows of each of `BINS`, by the share of
    the row's softmax that is not critical. A bin without rows is left out. With SLA2, `alpha_off` is the mean distance
    of alpha from the ideal one. Full attention has nothing to measure.
    """
    config = student.config
    if config.attention == "full":
        return {}
    device = next(student.parameters()).device
    cores = [block.get_submodule("attention.core") for block in student.blocks]
    outside, errors, off = [], [], []
    for clip in range(len(data.x)):  # one at a time, because a map has N x N weights
        inputs = (each[clip : clip + 1].to(device) for each in (data.x, data.time, data.labels))
        for core, (query, key, value) in zip(cores, evaluate.attention_inputs(student, *inputs), strict=True):
            choose = getattr(core, "router", sla_ref.classify_blocks)
            block_map = choose(query, key, config.critical_ratio, 0.0, block_q=config.block, block_k=config.block)
            weights = attention_weights(query, key)
            full = weights @ value
            outside.append(weights.where(block_map.to_dense() != 1, 0.0).sum(-1))  # (1, H, N)
            errors.append((core(query, key, value) - full).square().mean(-1) / full.square().mean())
            if isinstance(core, sla_ref.SLA2Attention):
                off.append((core.branches(query, key, value)[2] - (1 - outside[-1])).abs())
    found = _by_bins(torch.stack(outside), torch.stack(errors))
    return found | ({"alpha_off": torch.stack(off).mean().item()} if off else {})


def _by_bins(outside: Tensor, errors: Tensor) -> dict[str, float]:
    found = {}
    for number, (low, high) in enumerate(BINS, start=1):
        rows = (outside >= low) & ((outside < high) | (high == 1))
        found[f"rows_{number}"] = rows.double().mean().item()
        if rows.any():
            found[f"row_error_{number}"] = errors[rows].mean().item()
    return found


def _also(student: VideoTransformer, seed: int, setting: Setting) -> dict[str, float]:
    times = (torch.arange(setting.clips) + 0.5) / setting.clips
    tuning = noisy_clips(student, seed, times, split="train")
    loss = evaluate.held_out_loss(evaluate.predict(student, tuning, batch=64), tuning)
    rows = noisy_clips(student, seed, torch.tensor(TIMES).repeat(CLIPS)[:CLIPS])
    return {"tuning_loss": loss} | error_of_rows(student, rows)


EXPERIMENT = of_recipes(recipes, also=_also)
