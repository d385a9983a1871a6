"""Measure SLA on several GPUs: a layer under Ulysses, and training steps of the lab's model and of Wan2.1-1.3B.

    torchrun --standalone --nproc-per-node 2 benchmarks/several_gpus.py --json benchmarks/results/several_gpus.json
    torchrun --standalone --nproc-per-node 8 benchmarks/several_gpus.py --only ulysses_720p,wan
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/several_gpus.py --tiny   # also without a GPU

torchrun starts one process for each GPU. They talk through NCCL, or through gloo where there is no GPU. The parts:

- ulysses_480p, ulysses_720p: the self-attention of Wan2.1-1.3B at 480p and of Wan2.1-14B at 720p, which every rank
  first runs by itself, on all heads and tokens ("one"), and then with the others, on its tokens ("several"). Times are
  medians on the slowest rank; "graph" replays the same work as a CUDA graph, without the time Python takes to start it.
  The outputs and the gradients of query, key and value are compared bit for bit; those of Proj are sums over ranks, in
  another order than one GPU adds them up. The ranks must divide the 12 or 40 heads.
- lab: a step of the lab's model with DDP and with FSDP2, forward to optimizer. The batch is that of all ranks
  together, so a run with one process (`--nproc-per-node 1`) gives the times to compare with.
- wan: a step of the whole Wan2.1-1.3B at 480p as in `benchmarks/wan.py`, but with all weights in bfloat16. "one" is one
  clip on one GPU. DDP and FSDP2 train on a clip for each rank, Ulysses on one clip for all ranks, with DDP for the
  gradients. "losses" are those of the first two steps, averaged over the ranks. Ulysses should have those of "one",
  DDP and FSDP2 those of "one, all clips", where one GPU adds up the gradients of all clips. The prediction for FSDP2
  gathers all weights twice, but those outside the blocks are gathered once. Wants diffusers.

"sent_mb" is what one forward and backward sends to other ranks, counted at the collectives, next to what
`benchmarks/traffic.py` predicts, in 10^6 bytes. A part that fails is recorded as its error; the others still run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collectives import Sent, maximum, slowest
from gpu import BLOCKS, RATIOS, WAN, WAN_14B, Problem
from measure import Clock, about, attempt
from torch import Tensor, nn
from traffic import ddp, fsdp, gathered, ulysses_layer

from sla_ref import SparseLinearAttention
from sla_ref.integrations.ulysses import check_heads, split_tokens, ulysses_attention
from sla_ref.lab import distributed
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.model import ModelConfig, VideoTransformer
from sla_ref.lab.train import Run

TURNS = 51  # a number that does not depend on the rank: all must take part in each
WAN_TURNS = 5
BATCH = 64
LEARNING_RATE = 1e-3  # of Wan: high, since the losses after a step are compared, and bfloat16 would round 1e-5 away
PACKAGES = ("torch", "triton", "numpy", "diffusers")
SHAPES = {"480p": WAN, "720p": WAN_14B}
TINY = {"480p": (1, 2, 300, 32), "720p": (1, 3, 300, 32)}  # two ranks cannot share out three heads

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
        return ulysses_attention(self.layer, query, key, value)


def ulysses(tiny: bool, size: str) -> dict[str, Any]:
    whole = Problem((TINY if tiny else SHAPES)[size])
    _, heads, tokens, head_dim = whole.shape
    ranks = check_heads(heads)
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
            graphs = {f"{what}_graph": problem.replayed(each, TURNS) for what, each in passes.items()}
            found[name] |= {what: slowest(time, shard) for what, time in graphs.items()}
            found[name]["peak_mib"] = slowest(problem.peak(passes["forward_backward"]), shard)
    with Sent() as sent:
        several["forward_backward"]()
    found |= {"sent_mb": sent.megabytes, "predicted_mb": ulysses_layer(ranks, tokens, heads, head_dim) / 1e6}
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


# --- training --------------------------------------------------------------------------------------------------------


def lab(tiny: bool) -> dict[str, Any]:
    """The lab's model."""
    return {name: attempt(partial(lab_arm, tiny, fsdp)) for name, fsdp in (("DDP", False), ("FSDP2", True))}


def lab_arm(tiny: bool, fsdp: bool) -> dict[str, Any]:
    ranks, clock = dist.get_world_size(), Clock()
    batch = ranks if tiny else BATCH // ranks * ranks
    sizes = {"frames": 4, "size": 16, "width": 32, "depth": 2} if tiny else {}
    torch.manual_seed(0)
    model = VideoTransformer(ModelConfig(attention="sla", **sizes)).to(clock.device)
    precision = "bfloat16" if clock.device.type == "cuda" else "float32"
    run = Run(model, TrainConfig(steps=2 * TURNS, batch=batch, precision=precision, fsdp=fsdp))
    return {"batch": batch, "precision": precision} | of_slowest(run.advance, clock, TURNS)


def of_slowest(step: Callable[[], object], clock: Clock, turns: int) -> dict[str, float]:
    """Time and memory of a step, on the rank that needs most."""
    return {name: slowest(value, clock) for name, value in clock.cost(step, turns).items()}


def wan(tiny: bool) -> dict[str, Any]:
    """The whole Wan2.1-1.3B. For each arm, the seeds of the clips that this rank trains on."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    clips = {"one": [0], "DDP": [rank], "FSDP2": [rank], "Ulysses": [0]}
    found = {arm: attempt(partial(wan_arm, tiny, arm, each)) for arm, each in clips.items()}
    found["one, all clips"] = attempt(partial(wan_arm, tiny, "one", list(range(ranks)), timed=False))
    return found


def wan_arm(tiny: bool, arm: str, clips: list[int], timed: bool = True) -> dict[str, Any]:
    """The first losses of an arm, what its step costs, and what it sends."""
    from wan import Wan, training_step

    gc.collect()  # the arm before: wrapped modules refer to themselves
    transformer = Wan(tiny, one_dtype=True)
    model, config, ranks = transformer.model, transformer.config, dist.get_world_size()
    transformer.install(*(32, 16) if tiny else BLOCKS, group=dist.group.WORLD if arm == "Ulysses" else None)
    model.enable_gradient_checkpointing()
    parameters, channels = sum(each.numel() for each in model.parameters()), model.proj_out.out_features
    wrapped = model if arm == "one" else distributed.wrap(model, fsdp=arm == "FSDP2")
    step = training_step(wrapped, [transformer.clip(seed) for seed in clips], LEARNING_RATE)
    found: dict[str, Any] = {"losses": [distributed.mean(step()).item() for _ in range(2)]}
    if timed:
        found |= of_slowest(step, transformer, WAN_TURNS)
    if arm != "one":
        with Sent() as sent:
            step()
        predicted = fsdp(ranks, parameters) if arm == "FSDP2" else ddp(ranks, parameters)
        if arm == "Ulysses":
            heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
            layer = ulysses_layer(ranks, transformer.tokens, heads, head_dim)
            predicted += 1.5 * config["num_layers"] * layer  # checkpointing: another forward
            predicted += gathered(ranks, transformer.tokens, channels)
        found |= {"sent_mb": sent.megabytes, "predicted_mb": predicted / 1e6}
    return found


# --- the run ---------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "ulysses_480p": partial(ulysses, size="480p"),
    "ulysses_720p": partial(ulysses, size="720p"),
    "lab": lab,
    "wan": wan,
}


def report(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = []
    for name in ("ulysses_480p", "ulysses_720p"):
        part = result.get(name, {})
        if "error" in part:
            lines.append(f"{name}: {part['error']}")
        elif part:
            for what, value in part["several"].items():
                unit, one = "MiB" if what == "peak_mib" else "ms", part["one"][what]
                lines.append(f"{name} {what}: {one:.3f} {unit} on one, {value:.3f} on several ({one / value:.2f}x)")
            lines.append(f"{name} bits of one: {part['parity']['same_bits']}")
            lines.append(f"{name} sent: {part['sent_mb']:.2f} MB, predicted {part['predicted_mb']:.2f}")
    for name in ("lab", "wan"):
        for arm, found in result.get(name, {}).items():
            figures = [f"{what} {value:.2f}" for what, value in found.items() if isinstance(value, float)]
            losses = [f"losses {', '.join(f'{loss:.6f}' for loss in found['losses'])}"] if "losses" in found else []
            lines.append(f"{name} {arm}: " + (found.get("error") or "; ".join(figures + losses)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--only", help=f"parts to run, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with small sizes")
    options = parser.parse_args()
    parts = list(PARTS) if options.only is None else options.only.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    device = Clock().device
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU here; --tiny rehearses on the CPU")
    if not dist.is_torchelastic_launched():
        parser.error("torchrun must start this program, once for each GPU: see --help")
    started = time.perf_counter()
    with distributed.process_group(device) as device:
        result: dict[str, Any] = {"about": about(device, options.commit, PACKAGES) | {"ranks": dist.get_world_size()}}
        result["about"]["communication"] = "NCCL" if device.type == "cuda" else "gloo"
        for name, part in PARTS.items():
            if name in parts:
                result[name] = attempt(partial(part, options.tiny))
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
