"""Measure SLA on several GPUs: one layer under Ulysses against one GPU, and the lab's training steps.

    torchrun --standalone --nproc-per-node 2 benchmarks/several_gpus.py --json benchmarks/results/several_gpus.json
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/several_gpus.py --tiny   # also without a GPU

torchrun starts one process for each GPU. They talk through NCCL, or through gloo where there is no GPU.

- ulysses: the layer of `benchmarks/gpu.py`, Wan2.1-1.3B's at 480p, which every rank first runs by itself, on all heads
  and tokens ("one"), and then with the others, on its tokens ("several"). Times are medians on the slowest rank. The
  outputs and the gradients of query, key and value are compared bit for bit; those of Proj are sums over ranks, in
  another order than one GPU adds them up. "sent_mb" is what one forward and backward sent to other ranks, counted at
  the collectives, next to what `benchmarks/traffic.py` predicts, in 10^6 bytes.
- training: a step of the lab's model with DDP and with FSDP2, forward to optimizer. The batch is that of all ranks
  together, so a run with one process (`--nproc-per-node 1`) gives the times to compare with.

A part that fails is recorded as its error. The ranks must divide the 12 heads (2 with `--tiny`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from gpu import BLOCKS, RATIOS, TINY, WAN, Problem
from measure import Clock, about, attempt
from torch import Tensor, nn
from traffic import ulysses_layer

from sla_ref import SparseLinearAttention
from sla_ref.integrations.ulysses import check_heads, split_tokens, ulysses_attention
from sla_ref.lab import distributed
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.model import ModelConfig, VideoTransformer
from sla_ref.lab.train import Run

TURNS = 51  # a number that does not depend on the rank: all must take part in each
BATCH = 64

# --- ulysses ---------------------------------------------------------------------------------------------------------


class Shard(Problem):
    """This rank's tokens of a problem."""

    def __init__(self, whole: Problem) -> None:
        Clock.__init__(self)
        *self.inputs, self.grad = (split_tokens(each.detach(), 2).contiguous() for each in (*whole.inputs, whole.grad))
        for tensor in self.inputs:
            tensor.requires_grad_()


class Ulysses(nn.Module):
    """A layer on the tokens of all ranks."""

    def __init__(self, layer: SparseLinearAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ulysses_attention(self.layer, query, key, value, classify=self.layer.classify)


def ulysses(tiny: bool) -> dict[str, Any]:
    whole = Problem(TINY if tiny else WAN)
    layer = whole.layer((64, 32) if tiny else BLOCKS)
    if whole.device.type == "cpu":
        layer.backend = "torch"
    shard = Shard(whole)
    one, several = whole.passes(layer), shard.passes(Ulysses(layer))
    found: dict[str, Any] = {"shape": whole.shape, "critical_ratio": RATIOS[0], "negligible_ratio": RATIOS[1]}
    found["parity"] = parity(one, several)
    for name, problem, passes in (("one", whole, one), ("several", shard, several)):
        found[name] = {what: slowest(problem.milliseconds(each, TURNS), shard) for what, each in passes.items()}
        if problem.device.type == "cuda":
            found[name]["peak_mib"] = slowest(problem.peak(passes["forward_backward"]), shard)
    with counted() as sent:
        several["forward_backward"]()
    _, heads, tokens, head_dim = whole.shape
    found["sent_mb"] = sum(sent) / 1e6
    found["predicted_mb"] = ulysses_layer(dist.get_world_size(), tokens, heads, head_dim) / 1e6
    return found


def parity(one: dict[str, Callable[[], Any]], several: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Whether all ranks have the bits of one, and how far they are from them."""
    expected = [one["forward"](), *one["forward_backward"]()]
    found = [several["forward"](), *several["forward_backward"]()]
    names, same, largest = ("out", "grad_query", "grad_key", "grad_value"), {}, {}
    for name, mine, whole in zip(names, found[:4], expected[:4], strict=True):
        part = split_tokens(whole, 2)
        same[name] = not distributed.any_rank(not torch.equal(mine, part))
        largest[name] = maximum((mine - part).abs().max())
    proj = {}
    for name, mine, whole in zip(("weight", "bias"), found[4:], expected[4:], strict=True):
        total = mine.float()
        dist.all_reduce(total)
        proj[name] = float((total - whole).norm() / whole.float().norm())
    return {"same_bits": same, "largest_difference": largest, "proj_relative_error": proj}


def maximum(value: Tensor) -> float:
    """Over all ranks."""
    value = value.detach().double()
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def slowest(value: float, clock: Clock) -> float:
    """The largest value of all ranks."""
    return maximum(torch.tensor(value, device=clock.device))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Notes the bytes that each all-to-all sends to other ranks."""
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def count(output: Tensor, rows: Tensor, received: list[int], sizes: list[int], **options: Any) -> Any:
        others = len(rows) - sizes[dist.get_rank()]
        sent.append(others * rows[0].numel() * rows.element_size())
        return exchange(output, rows, received, sizes, **options)

    with patch("torch.distributed.all_to_all_single", count):
        yield sent


# --- training --------------------------------------------------------------------------------------------------------


def training(tiny: bool, fsdp: bool) -> dict[str, Any]:
    ranks, clock = dist.get_world_size(), Clock()
    batch = ranks if tiny else BATCH // ranks * ranks
    sizes = {"frames": 4, "size": 16, "width": 32, "depth": 2} if tiny else {}
    torch.manual_seed(0)
    model = VideoTransformer(ModelConfig(attention="sla", **sizes)).to(clock.device)
    precision = "bfloat16" if clock.device.type == "cuda" else "float32"
    run = Run(model, TrainConfig(steps=2 * TURNS, batch=batch, precision=precision, fsdp=fsdp))
    found = {"batch": batch, "precision": precision, "step": slowest(clock.milliseconds(run.advance, TURNS), clock)}
    if clock.device.type == "cuda":
        found["peak_mib"] = slowest(clock.peak(run.advance), clock)
    return found


# --- the run ---------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = []
    part = result["ulysses"]
    if "error" in part:
        lines.append(f"ulysses: {part['error']}")
    else:
        one, several = part["one"], part["several"]
        for name, value in several.items():
            unit = "MiB" if name == "peak_mib" else "ms"
            lines.append(f"{name}: {one[name]:.3f} {unit} on one, {value:.3f} on several ({one[name] / value:.2f}x)")
        lines.append(f"bits of one: {part['parity']['same_bits']}")
        lines.append(f"sent: {part['sent_mb']:.2f} MB, predicted {part['predicted_mb']:.2f}")
    for name, step in result["training"].items():
        lines.append(f"{name}: " + (step.get("error") or f"{step['step']:.2f} ms a step, batch {step['batch']}"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with small sizes")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    device = Clock().device
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU here; --tiny rehearses on the CPU")
    if not dist.is_torchelastic_launched():
        parser.error("torchrun must start this program, once for each GPU: see --help")
    started = time.perf_counter()
    with distributed.process_group(device) as device:
        try:
            ranks = check_heads((TINY if options.tiny else WAN)[1])
        except ValueError as error:
            parser.error(str(error))
        result: dict[str, Any] = {"about": about(device, options.commit) | {"ranks": ranks}}
        result["about"]["communication"] = "NCCL" if device.type == "cuda" else "gloo"
        result["ulysses"] = attempt(lambda: ulysses(options.tiny))
        wrappers = {"DDP": False, "FSDP2": True}
        result["training"] = {
            name: attempt(lambda fsdp=fsdp: training(options.tiny, fsdp)) for name, fsdp in wrappers.items()
        }
        first = distributed.rank() == 0
    if first:
        result["wall_s"] = time.perf_counter() - started
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["about"]))
        print("\n".join(report(result)))


if __name__ == "__main__":
    main()
