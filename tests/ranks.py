"""What test_distributed.py runs in several processes: torchrun starts this file with a folder, and what to do in it.

The comparisons with one process are made there; here each rank does its work and writes down what came out.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sla_ref
from sla_ref import cli
from sla_ref.integrations.checkpoints import (
    load_sla,
    load_sla_state_dict,
    save_sla,
    sla_parameters,
    split_sla_state_dict,
)
from sla_ref.integrations.ulysses import gather_tokens, split_tokens, ulysses_attention
from sla_ref.lab import distributed, runs
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.train import Run, train

TOKENS = 45  # 23 on one rank and 22 on the other
SLA2 = {"variant": "sla2", "negligible_ratio": None}
PER_TOKEN = SLA2 | {"alpha": "token", "router": "learned", "proj": True}
PER_BLOCK = SLA2 | {"alpha": "block", "query_length": TOKENS}
CONFIG = TrainConfig(steps=6, batch=4, learning_rate=1e-2)


class Attention(nn.Module):
    """A little of a model: a projection before SLA and one behind it, learnable feature maps, tokens split or not."""

    def __init__(self, feature_map: str = "hedgehog") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)
        self.layer = sla_ref.SparseLinearAttention(8, 0.3, 0.2, block_q=8, block_k=8, feature_map=feature_map)
        nn.init.normal_(self.layer.proj_l.weight)
        nn.init.normal_(self.layer.proj_l.bias)
        self.out = nn.Linear(32, 32)
        self.split = False  # whether tokens are split
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = split_tokens(tokens, 1) if self.split else tokens
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)  # (B, 4, N, 8)
        if self.split:
            out = ulysses_attention(self.layer, query, key, value)
        else:
            out = self.layer(query, key, value)
        tokens = self.out(out.transpose(1, 2).flatten(2))
        return gather_tokens(tokens, 1) if self.split else tokens


def tokens() -> Tensor:
    return torch.randn(2, TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outcome(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, and the gradient of every input and every parameter."""
    inputs = tuple(each.clone().requires_grad_(each.is_floating_point()) for each in inputs)
    out = model(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    found = {"out": out.detach()}
    found |= {f"input {i}": each.grad for i, each in enumerate(inputs) if each.grad is not None}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name.removeprefix("module.")] = getattr(gradient, "full_tensor", lambda g=gradient: g)()
    return found


class Wan(nn.Module):
    """diffusers' transformer with SLA; with a group, its tokens are split."""

    def __init__(self, group: dist.ProcessGroup | None = None, heads: int = 2, **options) -> None:
        from diffusers import WanTransformer3DModel

        from sla_ref.integrations import diffusers as wan

        super().__init__()
        torch.manual_seed(0)
        small = {"num_attention_heads": heads, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 32}
        small |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "rope_max_seq_len": 32}
        self.transformer = WanTransformer3DModel(**small)
        sparse = {"critical_ratio": 0.2, "negligible_ratio": 0.2, "block_q": 8, "block_k": 8}
        wan.install_sla(self.transformer, **sparse | options, group=group)
        for parameter in wan.sla_parameters(self.transformer):
            nn.init.normal_(parameter, std=0.3)
        if options.get("router") == "learned":  # stage 2 of its training
            for block in self.transformer.blocks:
                block.attn1.processor.router.requires_grad_(False)

    def forward(self, latents: Tensor, text: Tensor, times: Tensor) -> Tensor:
        return self.transformer(latents, times, text, return_dict=False)[0]


def latents(size: int = 10, per_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """3 x 6 x 10 pixels, which are 45 tokens."""
    generator = torch.Generator().manual_seed(1)
    times = torch.arange(TOKENS).expand(2, -1) * 20 if per_token else torch.tensor([900, 300])
    return (
        torch.randn(2, 4, 3, 6, size, generator=generator),
        torch.randn(2, 5, 16, generator=generator),
        times,
    )


def small_model(attention: str = "sla", **options) -> VideoTransformer:
    torch.manual_seed(0)
    made = VideoTransformer(ModelConfig(frames=2, size=16, width=32, depth=2, heads=2, block=8))
    with torch.no_grad():
        for parameter in made.parameters():  # away from the zeros, behind which most gradients are zero at first
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return with_attention(made, attention, **options)


def smooth_adam() -> AbstractContextManager:
    """Adam whose steps can be compared.

    Adam divides a gradient by its own size. Where it is nearly zero, how a CPU rounds a sum decides the step's sign. A
    large eps leaves such steps small.
    """
    return patch("torch.optim.AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))


def training(folder: Path, name: str, config: TrainConfig = CONFIG, **options) -> None:
    """Stage 2 of SLA2, with a router that is frozen, where the name asks for it."""
    model = small_model("sla2", alpha="token", router="learned") if name.startswith("sla2") else small_model()
    with smooth_adam():
        train(model, config, folder / name, log_every=1, **options)


def interrupt_at(when: int | None):
    """For `train`: Ctrl-C, twice, after the loss of a step has been noted."""

    def tick(step: int, loss: float | None) -> None:
        if step == when:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    return tick


def message(function, *arguments, **options) -> str:
    """The type and text of the error that a call must raise."""
    try:
        function(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def split(folder: Path) -> None:
    """Ulysses, by itself and in Wan."""
    found: dict[str, object] = {}
    for feature_map in ("softmax", "hedgehog"):
        model = Attention(feature_map)
        model.split = True
        found[f"summed, {feature_map}"] = outcome(model, tokens())
    model = Attention()
    model.split = True
    found["ddp"] = outcome(DistributedDataParallel(model), tokens())
    model = Attention()
    model.split = True
    fully_shard(model.layer)
    fully_shard(model)
    found["fsdp"] = outcome(model, tokens())
    rank = dist.get_rank()
    for name in ("same", f"own-{rank}"):
        save_sla(model, folder / f"{name}.safetensors")
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    with torch.no_grad():
        for parameter in sla_parameters(model):
            parameter.zero_()
    load_sla(model, folder / "same.safetensors")
    found["loaded"] = {name: each.full_tensor() for name, each in model.state_dict().items()}
    load_sla_state_dict(model, split_sla_state_dict(model.state_dict())[0])  # from weights that are sharded, too
    found["loaded again"] = {name: each.full_tensor() for name, each in model.state_dict().items()}
    part = torch.arange(rank * 3.0, 5.0 if rank else 3.0).requires_grad_()
    (gather_tokens(part, 0) * (rank + 1) * torch.arange(5.0)).sum().backward()
    found["gather"] = {"gradient": part.grad}
    if "diffusers" in sys.argv:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        from sla_ref.integrations import diffusers as wan

        group = dist.group.WORLD
        found["wan"] = outcome(DistributedDataParallel(Wan(group)), *latents())
        found["wan, time per token"] = outcome(DistributedDataParallel(Wan(group)), *latents(per_token=True))
        found["wan, main"] = outcome(
            DistributedDataParallel(Wan(group, negligible_ratio=None, variant="main")), *latents()
        )
        found["wan, sla2"] = outcome(DistributedDataParallel(Wan(group, **PER_TOKEN)), *latents())
        for name, options in (("wan", {}), ("wan, sla2", PER_BLOCK)):
            model = Wan(group, **options)
            model.transformer.enable_gradient_checkpointing()
            for block in model.transformer.blocks:
                fully_shard(block)
            fully_shard(model)
            found[f"{name}, fsdp and checkpointing"] = outcome(model, *latents())
        model = Wan(group)
        wan.remove_sla(model.transformer)
        wan.install_sla(model.transformer, critical_ratio=1.0, block_q=8, block_k=8)
        found["wan, taken out"] = outcome(model, *latents())
        replaced = Wan(group).transformer
        replaced.blocks[1].attn1.set_processor(WanAttnProcessor())
        said = message(replaced, *latents()[::2], latents()[1])
        replaced.set_attn_processor(WanAttnProcessor())
        wan.remove_sla(replaced)
        model.transformer = replaced
        found["wan, replaced and taken out"] = outcome(model, *latents())
        found["errors of wan"] = {
            "heads": message(Wan, group, heads=3),
            "replaced": said,
            "layers": message(Wan, group, layers=[1]),
            "size": message(Wan(group), *latents(10 + 2 * rank)),
        }
    found["comparisons"] = comparisons()
    one = torch.randn(1, 4, 5, 8)
    found["errors"] = {
        "length": message(ulysses_attention, Attention().layer, *[torch.randn(1, 4, 5 + 2 * rank, 8)] * 3),
        "batch": message(ulysses_attention, Attention().layer, *[torch.randn(1 + rank, 4, 5, 8)] * 3),
        "dims": message(gather_tokens, torch.randn([2] * (2 + rank)), 0),
        "dtype": message(split_tokens, torch.randn(4, dtype=torch.float64 if rank else torch.float32), 0),
        "number": message(split_tokens, torch.randn(4 + rank), 0),
        "few": message(split_tokens, torch.randn(1), 0),
        "heads": message(ulysses_attention, Attention().layer, *[torch.randn(1, 3, 5, 8)] * 3),
        "keys": message(ulysses_attention, Attention().layer, one, torch.randn(1, 4, 6, 8), one),
        "int": message(split_tokens, torch.arange(4), 0),
        "shape": message(ulysses_attention, lambda query, key, value: query[..., :2], one, one, one),
        "output": message(ulysses_attention, sla_ref.sparse_linear_attention, one, one, one),
        "group": message(split_tokens, one, 2, "all"),
        "outside": message(split_tokens, one, 2, dist.GroupMember.NON_GROUP_MEMBER),
        "dim": message(gather_tokens, one, 4),
        "type": message(split_tokens, [1.0, 2.0], 0),
    }
    found["waits"] = waits()
    torch.save(found, folder / f"split-{rank}.pt")


def mesh(folder: Path) -> None:
    """Ulysses in two pairs of ranks, each with a clip of its own; DDP and FSDP2 over all four."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("clips", "tokens"))
    clip, group = pairs["clips"].get_local_rank(), pairs["tokens"].get_group()
    inputs = tuple(each[clip : clip + 1] for each in latents())
    found = {"ddp": outcome(DistributedDataParallel(Wan(group)), *inputs)}
    model = Wan(group)
    for block in model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    found["fsdp"] = outcome(model, *inputs)
    torch.save(found, folder / f"mesh-{dist.get_rank()}.pt")


def trained(folder: Path) -> None:
    """The lab's training under DDP and FSDP2, interrupted by what another number of processes began."""
    training(folder, "ddp")
    training(folder, "fsdp", replace(CONFIG, fsdp=True))
    training(folder, "sla2 ddp")
    for name in ("resumed", "sla2 resumed"):
        training(folder, name, replace(CONFIG, fsdp=True, resume=True))
    # A signal reaches only one rank; the other one must not wait for it.
    tick = interrupt_at(3) if dist.get_rank() else interrupt_at(None)
    with suppress(KeyboardInterrupt):
        training(folder, "interrupted", tick=tick)
        raise AssertionError("this rank trained on")
    training(folder, "interrupted", replace(CONFIG, resume=True))
    said = message(training, folder, "uneven", TrainConfig(batch=3))
    changes, device = {"attention": "sla2", "router": "learned"}, torch.device("cpu")
    source, out = folder / "teacher" / "full.safetensors", folder / "stage 1"
    stage_1 = message(runs.finetune, source, changes, "layers", CONFIG, out, device, Console(quiet=True), clips=2)
    model = small_model()
    distributed.wrap(model, fsdp=True)
    optimizer = torch.optim.AdamW(model.parameters())
    share = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    weights = distributed.whole_state(model, optimizer)[0]
    if dist.get_rank() == 0:
        found = {"share": share, "weights": weights, "uneven": said, "stage 1": stage_1}
        torch.save(found, folder / "trained.pt")


def comparisons() -> dict[str, object]:
    """How often the ranks compare shapes, and what they say when each of them has another new one."""
    group, rank = dist.new_group(), dist.get_rank()
    layer = Attention("softmax").layer.float()
    all_gather, found = dist.all_gather, {}

    def attend(length: int, batch: int = 1) -> int:
        """The comparisons of five layers on the shards of a clip, and of the tokens gathered after each of them."""
        with patch("torch.distributed.all_gather", side_effect=all_gather) as compare:
            shards = [split_tokens(torch.randn(1, 4, length, 8), 2, group)] * 3
            compare.reset_mock()
            for _ in range(5):
                out = ulysses_attention(layer, *(each.expand(batch, -1, -1, -1) for each in shards), group)
                gather_tokens(out[0, 0], 0, group)
        return compare.call_count

    # Rank 0 has 23 tokens of 45 and of 46.
    found["counts"] = [attend(length, batch) for length, batch in ((45, 1), (45, 1), (46, 1), (46, 2), (45, 1))]
    found["after a change"] = message(attend, 45, 2 + rank)
    found["again"] = message(attend, 45, 2 + rank)
    found["and right again"] = attend(45)
    return found


def waits() -> str:
    """What rank 0 says when rank 1 stays away from a collective."""
    dist.barrier()  # the limit holds for the founding of the group too, so both begin it together
    group, said = dist.new_group(timeout=timedelta(seconds=5)), ""
    if dist.get_rank() == 0:
        try:
            ulysses_attention(Attention().layer.float(), *[torch.randn(1, 4, 5, 8)] * 3, group)
        except RuntimeError as error:
            said = str(error)
    dist.barrier()
    return said


def finetune(folder: Path, name: str, **options: object) -> None:
    """The command, as somebody would type it after torchrun."""
    teacher = folder / "teacher" / "full.safetensors"
    options = {"teacher": teacher, "out": folder / name, "device": "cpu", "batch": 2, "clips": 2} | options
    try:
        with smooth_adam():
            cli.main(["finetune", *(f"--{key}={value}" for key, value in options.items()), "--fsdp"])
    except SystemExit as end:
        if end.code:
            raise


def failing(folder: Path) -> None:
    """Only rank 1 meets an error, while rank 0 waits for its gradients."""
    advance = Run.advance

    def advance_or_raise(run: Run) -> Tensor:
        if run.step == 2 and int(os.environ["RANK"]) == 1:
            raise ValueError("the clips ran out")
        return advance(run)

    Run.advance = advance_or_raise  # type: ignore[method-assign]
    finetune(folder, "failing", steps=50)


def benchmark(folder: Path) -> None:
    """benchmarks/several_gpus.py, in the processes that have imported all that it needs."""
    script = Path(__file__).parents[1] / "benchmarks" / "several_gpus.py"
    arguments = [str(script), "--tiny", "--json", str(folder / "new" / "figures.json")]
    with patch.object(sys, "argv", arguments), patch.object(sys, "path", [str(script.parent), *sys.path]):
        runpy.run_path(str(script), run_name="__main__")


def main(what: str, folder: Path) -> None:
    with distributed.process_group(torch.device("cpu")):
        if what == "split":
            split(folder)
            benchmark(folder)
            failing(folder)
        elif what == "mesh":
            mesh(folder)
        elif what == "trained":
            trained(folder)
            finetune(folder, "command", steps=2)
        elif dist.get_rank() == 0:
            training(folder, "dying")
        else:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
