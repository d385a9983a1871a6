"""Writes what the mask explorer shows: `python tools/explorer_data.py [--out docs/explorer/data.js]`.

One held-out clip at several noise levels goes through the lab's teacher. For every layer, head and level the page gets
the key blocks of each query block in the order of their scores, and classifies them for any ratio without rounding. For
its few ratios it also gets what the classes hold and cost, which the package computes here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sla_ref
from sla_ref import analysis
from sla_ref.files import whole
from sla_ref.lab import evaluate, flow, weights
from sla_ref.lab.data import MovingDigits
from sla_ref.lab.model import PATCH, ModelConfig

OUT = Path(__file__).parents[1] / "docs" / "explorer" / "data.js"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
CRITICAL_RATIOS = (0.025, 0.05, 0.10, 0.20)
NEGLIGIBLE_RATIOS = (0.0, 0.10, 0.30, 0.50)
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"  # one character for a number below 64


def encode(numbers: Tensor) -> str:
    """Whole numbers below 64, one character each."""
    return "".join(DIGITS[number] for number in numbers.flatten().tolist())


@torch.no_grad()
def attention_inputs() -> tuple[ModelConfig, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The configuration; the clip, clean and at every time (1 + T, F, S, S); of each layer query, key, value."""
    teacher, _ = weights.load_weights(weights.TEACHER)
    config = teacher.config
    clip, labels = MovingDigits("held_out", evaluate.HELD_OUT_SEED, size=config.size, frames=config.frames).batch(1)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(evaluate.HELD_OUT_SEED))
    time = torch.tensor(TIMES)
    x = flow.noised(clip, noise, time)
    return config, torch.cat([clip, x]), evaluate.attention_inputs(teacher, x, time, labels.expand(len(time)))


def describe_layer(query: Tensor, key: Tensor, value: Tensor, block: int) -> dict[str, Any]:
    """What the page needs of one layer: the order [time][head], and figures [ratio][time][head]."""
    sizes = {"block_q": block, "block_k": block}
    order = sla_ref.block_scores(query, key, **sizes).argsort(dim=-1, descending=True, stable=True)
    weights = analysis.attention_weights(query, key)
    mass = analysis.block_mass(weights, block, block)
    full = weights @ value

    def error(labels: Tensor) -> Tensor:
        """Relative L1 error of softmax attention over only the blocks with label 1."""
        block_map = sla_ref.BlockMap(labels, block, block, query.shape[2], key.shape[2])
        output = sla_ref.sparse_linear_attention(query, key, value, block_map=block_map)
        return analysis.relative_l1(output.sparse, full)

    def classes(critical_ratio: float, negligible_ratio: float) -> Tensor:
        return sla_ref.classify_blocks(query, key, critical_ratio, negligible_ratio, **sizes).labels

    rank = order.argsort(dim=-1)
    for ratios in itertools.product(CRITICAL_RATIOS, NEGLIGIBLE_RATIOS):
        labels = classes(*ratios)
        critical, negligible = ((labels[0, 0, 0] == label).sum() for label in (1, -1))
        from_rank = (rank < critical).to(torch.int8) - (rank >= rank.shape[-1] - negligible).to(torch.int8)
        assert torch.equal(labels, from_rank), "the order of the blocks does not give their classes"

    # The largest values of both ratios fit into one row together: neither class depends on the other's ratio.
    assert CRITICAL_RATIOS[-1] + NEGLIGIBLE_RATIOS[-1] <= 1
    by_critical = [classes(ratio, 0.0) for ratio in CRITICAL_RATIOS]
    by_negligible = [classes(CRITICAL_RATIOS[0], ratio) for ratio in NEGLIGIBLE_RATIOS]
    figures = {
        "critical_mass": [analysis.class_mass(mass, labels)[1] for labels in by_critical],
        "critical_error": [error((labels == 1).to(torch.int8)) for labels in by_critical],
        "negligible_mass": [analysis.class_mass(mass, labels)[-1] for labels in by_negligible],
        "negligible_error": [error((labels >= 0).to(torch.int8)) for labels in by_negligible],
    }
    # To what the page shows, 0.1 %.
    rounded = {name: (torch.stack(parts).double() * 1e3).round() / 1e3 for name, parts in figures.items()}
    return {"order": [[encode(head) for head in heads] for heads in order]} | {
        name: parts.tolist() for name, parts in rounded.items()
    }


def collect() -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    config, clips, layers = attention_inputs()
    blocks = config.tokens // config.block
    if blocks * config.block != config.tokens or blocks > len(DIGITS):
        raise ValueError(f"the page takes whole blocks, {len(DIGITS)} at most, got {config.tokens / config.block}")
    sizes = (config.tokens, config.tokens, config.head_dim)
    shares = [max(1, int(ratio * blocks)) / blocks for ratio in CRITICAL_RATIOS]
    return {
        "times": TIMES,
        "critical_ratios": CRITICAL_RATIOS,
        "negligible_ratios": NEGLIGIBLE_RATIOS,
        "heads": config.heads,
        "frames": config.frames,
        "size": config.size,
        "patch": PATCH,
        "block": config.block,
        "blocks": blocks,
        "classes": [[label, name, analysis.CLASS_COLOURS[label]] for label, name in analysis.CLASS_NAMES.items()],
        "full_flops": analysis.attention_flops(*sizes),
        "sla_flops": [analysis.attention_flops(*sizes, critical_share=share, linear=True) for share in shares],
        "digits": DIGITS,
        "clips": [encode(((clip.clamp(-1, 1) + 1) * 31.5).round().int()) for clip in clips],
        "layers": [describe_layer(*layer, config.block) for layer in layers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the mask explorer.")
    parser.add_argument("--out", type=Path, default=OUT, help="the file, which is replaced")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # or else the sums depend on the number of cores
    text = f"window.maskExplorerData = {json.dumps(collect(), separators=(',', ':'))};\n"
    with whole(out) as path:
        path.write_text(text, encoding="utf-8")
    print(f"wrote {out.name}, {len(text):,} bytes")


if __name__ == "__main__":
    main()
