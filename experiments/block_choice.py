"""Does the classification choose well? Pooled scores against a perfect ranking and a random one.

The *oracle* ranks key blocks by the attention that the query block really spends on them, which only the full map
knows. It and the random choice hand out as many labels of each class as the pooled scores do. The oracle is the best
choice for the mass that is kept; for an output or a loss it need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import sla_ref
from sla_ref import analysis
from sla_ref.lab import evaluate
from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.weights import STUDENT, load_weights

from .attention_maps import TIMES, Figures, noisy_clips, of_all_layers
from .fine_tuning import find_teacher
from .setting import Context, Experiment, Setting

CRITICAL_RATIOS = (0.025, 0.05, 0.1, 0.2)
LEAST_BLOCK = 16  # tokens; or what the setting has, if that is smaller
MAP_CLIPS = 10  # whose maps are looked at
STUDENT_CASE = "the fine-tuned student"

Choice = Callable[[Tensor, Tensor, sla_ref.BlockMap], Tensor]
"""Gives labels for query, key (B, H, N, D), as many of each class as the map of the pooled scores has."""


def choices(seed: int) -> dict[str, Choice]:
    """The three that are compared; the random one goes on from call to call."""
    generator = torch.Generator().manual_seed(seed)

    def oracle(query: Tensor, key: Tensor, block_map: sla_ref.BlockMap) -> Tensor:
        labels = []  # of one clip at a time, because its map is N x N
        for q, k, of_clip in zip(query, key, block_map.labels, strict=True):
            mass = analysis.block_mass(analysis.attention_weights(q, k), block_map.block_q, block_map.block_k)
            labels.append(analysis.oracle_labels(mass, of_clip))
        return torch.stack(labels)

    def random(query: Tensor, key: Tensor, block_map: sla_ref.BlockMap) -> Tensor:
        ranking = torch.rand(block_map.labels.shape, generator=generator)
        return analysis.oracle_labels(ranking.to(query.device), block_map.labels)

    return {"pooled": lambda query, key, block_map: block_map.labels, "oracle": oracle, "random": random}


class Choosing(nn.Module):
    """An SLA layer whose blocks are classified by `choose`."""

    def __init__(self, sla: sla_ref.SparseLinearAttention, choose: Choice) -> None:
        super().__init__()
        self.sla, self.choose = sla, choose

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sla = self.sla
        block_map = sla_ref.classify_blocks(
            query, key, sla.critical_ratio, sla.negligible_ratio, block_q=sla.block_q, block_k=sla.block_k
        )
        block_map = replace(block_map, labels=self.choose(query, key, block_map))
        out: Tensor = sla(query, key, value, block_map=block_map)
        return out


def with_choice(model: VideoTransformer, choose: Choice) -> VideoTransformer:
    """A copy of a model with SLA whose layers classify by `choose`."""
    chosen = with_attention(model, "sla")
    for block in chosen.blocks:
        attention = block.get_submodule("attention")
        attention.core = Choosing(attention.core, choose)  # type: ignore[arg-type]
    return chosen


def map_figures(query: Tensor, key: Tensor, value: Tensor, config: ModelConfig, compared: dict[str, Choice]) -> Figures:
    """Of each map of query, key, value (B, H, N, D): recall, mass of each class and error of the sparse branch.

    The error is the relative L1 error of O^s [Eq. 4] against full attention.
    """
    block_map = sla_ref.classify_blocks(
        query, key, config.critical_ratio, config.negligible_ratio, block_q=config.block, block_k=config.block
    )
    weights = analysis.attention_weights(query, key)
    mass = analysis.block_mass(weights, config.block, config.block)
    full = weights @ value.float()
    best = analysis.oracle_labels(mass, block_map.labels)
    figures = {}
    for name, choose in compared.items():
        labels = choose(query, key, block_map)
        if name != "oracle":  # its recall is 1 by definition
            figures[f"recall_{name}"] = analysis.critical_recall(labels, best)
        for label, held in analysis.class_mass(mass, labels).items():
            figures[f"{analysis.CLASS_NAMES[label]}_mass_{name}"] = held
        sparse = sla_ref.sparse_linear_attention(query, key, value, block_map=replace(block_map, labels=labels)).sparse
        figures[f"sparse_error_{name}"] = analysis.relative_l1(sparse.float(), full)
    return figures | {"critical_share": torch.tensor(1 - block_map.sparsity)}


def arms(setting: Setting) -> dict[str, tuple[int, float]]:
    """Block size and critical ratio of each case. Ratios that are less than one block of a row are left out."""
    least = min(LEAST_BLOCK, setting.block)
    return {
        f"blocks of {block}, {100 * ratio:g} %": (block, ratio)
        for block in (least, 2 * least, 4 * least)
        for ratio in CRITICAL_RATIOS
        if int(ratio * math.ceil(setting.model.tokens / block)) >= 1
    }


def _cases(setting: Setting) -> list[str]:
    """The shipped student is one of them where it has the setting's size."""
    student, _ = load_weights(STUDENT)
    fits = setting.model == replace(student.config, attention="full")
    return [*arms(setting), *[STUDENT_CASE] * fits]


def _measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
    """Figures of maps are means over layers, heads and clips, as many of each time; the losses are of more clips."""
    teacher = find_teacher(setting, context)
    if case == STUDENT_CASE:
        sla, _ = load_weights(STUDENT, context.device)
        looked_at = sla
    else:
        block, ratio = arms(setting)[case]
        sla = with_attention(teacher, "sla", block=block, critical_ratio=ratio, negligible_ratio=0.1)
        looked_at = teacher
    compared = choices(seed)
    data = noisy_clips(teacher, seed, torch.tensor(TIMES).repeat(setting.clips)[: setting.clips])
    of_layer = partial(map_figures, config=sla.config, compared=compared)
    found = of_all_layers(looked_at, data, MAP_CLIPS, of_layer)
    values = {name: figure.mean().item() for name, figure in found.items()}
    models = {name: with_choice(sla, choose) for name, choose in compared.items()} | {"teacher": teacher}
    losses = {name: evaluate.held_out_loss(evaluate.predict(model, data), data) for name, model in models.items()}
    return values | {f"held_out_loss_{name}": loss for name, loss in losses.items()}


EXPERIMENT = Experiment(_cases, _measure)
