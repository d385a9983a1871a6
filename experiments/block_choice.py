"""Does the classification choose well? Pooled scores against a perfect ranking and a random one.

The *oracle* ranks key blocks by the attention that the query block really gives them, which only the full map shows.
The oracle and the random choice assign as many labels of each class as the pooled scores do. No other choice keeps more
mass than the oracle, but another choice may well give a better output or loss.
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

from .attention_maps import TIMES, Quantities, noisy_clips, of_all_layers
from .fine_tuning import find_teacher
from .setting import Context, Experiment, Setting

CRITICAL_RATIOS = (0.025, 0.05, 0.1, 0.2)
LEAST_BLOCK = 16  # tokens, unless the setting's blocks are smaller
MAP_CLIPS = 10  # clips whose maps are measured
STUDENT_CASE = "the fine-tuned student"

Choice = Callable[[Tensor, Tensor, sla_ref.BlockMap], Tensor]
"""Returns labels for query and key (B, H, N, D), as many of each class as the given map has."""


def choices(seed: int) -> dict[str, Choice]:
    """The three choices that are compared. The random one differs from call to call."""
    generator = torch.Generator().manual_seed(seed)

    def oracle(query: Tensor, key: Tensor, block_map: sla_ref.BlockMap) -> Tensor:
        labels = []  # one clip at a time, because a map has N x N weights
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


def map_quantities(
    query: Tensor, key: Tensor, value: Tensor, config: ModelConfig, compared: dict[str, Choice]
) -> Quantities:
    """Recall, mass of each class and error of the sparse branch, for each map of query, key, value (B, H, N, D).

    The error is the relative L1 error of O^s [Eq. 4] against full attention.
    """
    block_map = sla_ref.classify_blocks(
        query, key, config.critical_ratio, config.negligible_ratio, block_q=config.block, block_k=config.block
    )
    weights = analysis.attention_weights(query, key)
    mass = analysis.block_mass(weights, config.block, config.block)
    full = weights @ value.float()
    best = analysis.oracle_labels(mass, block_map.labels)
    found = {}
    for name, choose in compared.items():
        labels = choose(query, key, block_map)
        if name != "oracle":  # its recall is 1 by definition
            found[f"recall_{name}"] = analysis.critical_recall(labels, best)
        for label, held in analysis.class_mass(mass, labels).items():
            found[f"{analysis.CLASS_NAMES[label]}_mass_{name}"] = held
        sparse = sla_ref.sparse_linear_attention(query, key, value, block_map=replace(block_map, labels=labels)).sparse
        found[f"sparse_error_{name}"] = analysis.relative_l1(sparse.float(), full)
    return found | {"critical_share": torch.tensor(1 - block_map.sparsity)}


def arms(setting: Setting) -> dict[str, tuple[int, float]]:
    """Block size and critical ratio of each case, without the ratios that amount to less than one block in a row."""
    least = min(LEAST_BLOCK, setting.block)
    return {
        f"blocks of {block}, {100 * ratio:g} %": (block, ratio)
        for block in (least, 2 * least, 4 * least)
        for ratio in CRITICAL_RATIOS
        if int(ratio * math.ceil(setting.model.tokens / block)) >= 1
    }


def _cases(setting: Setting) -> list[str]:
    """All cases. The shipped student is one of them if it has the setting's size."""
    student, _ = load_weights(STUDENT)
    fits = setting.model == replace(student.config, attention="full")
    return [*arms(setting), *[STUDENT_CASE] * fits]


def _measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
    """Means over layers, heads and clips with equally many of each time. The losses are means over more clips."""
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
    of_layer = partial(map_quantities, config=sla.config, compared=compared)
    found = of_all_layers(looked_at, data, MAP_CLIPS, of_layer)
    values = {name: quantity.mean().item() for name, quantity in found.items()}
    models = {name: with_choice(sla, choose) for name, choose in compared.items()} | {"teacher": teacher}
    losses = {name: evaluate.held_out_loss(evaluate.predict(model, data), data) for name, model in models.items()}
    return values | {f"held_out_loss_{name}": loss for name, loss in losses.items()}


EXPERIMENT = Experiment(_cases, _measure)
