"""Time the whole transformer of Wan2.1-1.3B with SDPA and with SLA on this GPU: a denoising step and training steps.

    python benchmarks/wan.py --json benchmarks/results/wan.json

Its full configuration with random weights, at 480p and 81 frames: batch 1, latents of 16 x 21 x 60 x 104, 32760 tokens,
512 text tokens, bfloat16, 5 % critical and 10 % negligible blocks. "forward" is the transformer once, without gradient
(guidance runs it twice per denoising step); "self_attention" is the part of that in the 30 self-attention modules,
with their projections, norms and rotary embedding. "training_step" is forward, backward with gradient checkpointing,
and AdamW over all parameters. "lora_step" is the same with AdamW over LoRA adapters of rank 32, on q, k, v and out of
self-attention, and over what SLA adds; it wants peft. `--whole-graph` repeats both without gradient checkpointing,
which may need more memory than there is. Times are medians in milliseconds between CUDA events. Peaks are in MiB above
what is held before, which is noted as "held" for a training step: weights, gradients and AdamW's moments. A part that
fails, for want of memory perhaps, is recorded as its error. Wants torch, triton and diffusers; `--tiny` rehearses on a
CPU with the backend torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from gpu import RATIOS
from measure import Clock, about, attempt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla_ref.integrations.diffusers import install_sla, remove_sla, sla_parameters

FULL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2, "text_dim": 32}
SELF_ATTENTION = r".*\.attn1\.(to_q|to_k|to_v|to_out\.0)"
LORA_RANK = 32
TEXT = 512

Clip = tuple[dict[str, Tensor], Tensor]
"""Inputs of the transformer, and what it shall put out."""


class Wan(Clock):
    """The transformer and its inputs.

    By default some parts stay float32, as `from_pretrained(torch_dtype=torch.bfloat16)` leaves them. FSDP2 wants one
    dtype for all.
    """

    def __init__(self, tiny: bool, *, one_dtype: bool = False) -> None:
        super().__init__()
        self.config = TINY if tiny else FULL
        self.latents = (1, 16, 3, 16, 24) if tiny else (1, 16, 21, 60, 104)
        self.backend = "triton" if self.device.type == "cuda" else "torch"
        torch.manual_seed(0)
        with self.device:
            self.model = WanTransformer3DModel(**self.config)
        self.in_float32 = () if one_dtype else tuple(self.model._keep_in_fp32_modules)
        self.to_bfloat16()
        self.inputs, self.target = self.clip(0)

    def clip(self, seed: int) -> Clip:
        generator = torch.Generator(self.device).manual_seed(seed)
        draw = partial(torch.randn, generator=generator, device=self.device, dtype=torch.bfloat16)
        inputs = {
            "hidden_states": draw(self.latents),
            "timestep": torch.tensor([500], device=self.device),
            "encoder_hidden_states": draw(1, TEXT, self.model.config.text_dim),
        }
        return inputs, draw(self.latents)

    @property
    def tokens(self) -> int:
        _, _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    def to_bfloat16(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not any(part in name for part in self.in_float32):
                parameter.data = parameter.data.to(torch.bfloat16)

    def install(self, block_q: int, block_k: int, group: dist.ProcessGroup | None = None) -> None:
        blocks = {"block_q": block_q, "block_k": block_k}
        install_sla(self.model, *RATIOS, **blocks, backend=self.backend, group=group)
        with torch.no_grad():
            for parameter in sla_parameters(self.model):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)  # zero at the start: nothing to multiply
        self.to_bfloat16()

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.model(**self.inputs, return_dict=False)[0]

    def self_attention(self, turns: int) -> float:
        """Milliseconds of one forward that are spent in the self-attention modules: the median over `turns`."""
        spans: list[list[object]] = []

        def mark() -> object:
            if self.device.type != "cuda":
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def milliseconds(start: object, end: object) -> float:
            return start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)

        hooks = []
        for block in self.model.blocks:
            hooks.append(block.attn1.register_forward_pre_hook(lambda *_: spans.append([mark()])))
            hooks.append(block.attn1.register_forward_hook(lambda *_: spans[-1].append(mark())))
        self.forward()
        totals = []
        for _ in range(turns):
            spans.clear()
            self.forward()
            self.wait()
            totals.append(sum(milliseconds(*span) for span in spans))
        for hook in hooks:
            hook.remove()
        return statistics.median(totals)

    def training(self, turns: int, *, lora: bool = False, checkpointing: bool = True) -> dict[str, float]:
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        try:
            with self.adapters() if lora else nullcontext():
                return self.cost(training_step(self.model, [(self.inputs, self.target)]), turns)
        finally:
            self.model.disable_gradient_checkpointing()
            self.model.zero_grad()

    @contextmanager
    def adapters(self) -> Iterator[None]:
        """LoRA on self-attention: only the adapters, and what SLA adds, want a gradient."""
        from peft import LoraConfig

        self.model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=SELF_ATTENTION))
        try:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("lora_" in name or ".processor." in name)
            yield
        finally:
            self.model.unload_lora()
            self.model.requires_grad_()

    def compiled(self, turns: int) -> float:
        """Milliseconds of the forward with every block compiled by torch."""
        torch._dynamo.reset()
        self.model.compile_repeated_blocks(fullgraph=True)
        try:
            return self.milliseconds(self.forward, turns)
        finally:
            for block in self.model.blocks:
                block._compiled_call_impl = None


def training_step(model: nn.Module, clips: list[Clip], learning_rate: float = 1e-5) -> Callable[[], Tensor]:
    """Forward and backward of each clip, then AdamW over all that wants a gradient. Returns the mean loss, float32."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = []
        for inputs, target in clips:
            out = model(**inputs, return_dict=False)[0]
            losses.append(nn.functional.mse_loss(out.float(), target.float()))
            (losses[-1] / len(clips)).backward()
        optimizer.step()
        return torch.stack(losses).detach().mean()

    return step


def figures(wan: Wan, options: argparse.Namespace) -> dict[str, object]:
    """Everything that is measured of one arm. If one part fails, the others still run."""
    turns = options.turns
    result: dict[str, object] = {"forward": attempt(lambda: wan.milliseconds(wan.forward, turns))}
    result["self_attention"] = attempt(lambda: wan.self_attention(turns))
    if wan.device.type == "cuda":
        result["forward_peak_mib"] = attempt(lambda: wan.peak(wan.forward))
    if options.compile:
        result["forward_compiled"] = attempt(lambda: wan.compiled(turns))
    kinds: dict[str, dict[str, Any]] = {"training": {}, "lora": {"lora": True}}
    if options.whole_graph:
        kinds |= {f"{name}_whole_graph": kind | {"checkpointing": False} for name, kind in kinds.items()}
    for name, kind in kinds.items():
        found = attempt(lambda kind=kind: wan.training(turns, **kind))
        found = {"step": found} if "error" in found else found
        result |= {f"{name}_{figure}": value for figure, value in found.items()}
    return result


def table(arms: dict[str, dict]) -> str:
    """The figures for people, and how many times faster than the first arm."""
    columns = ["forward", "forward_compiled", "self_attention", "training_step", "lora_step"]
    columns += ["training_whole_graph_step", "lora_whole_graph_step"]
    columns = [column for column in columns if any(column in row for row in arms.values())]
    lines = [f"{'':22}" + "".join(f"{column:>27}" for column in columns)]
    first = next(iter(arms.values()))
    for name, row in arms.items():
        cells = []
        for column in columns:
            value, base = row.get(column), first.get(column)
            if isinstance(value, float):
                cells.append(f"{value:.1f} ({base / value:.2f}x)" if isinstance(base, float) else f"{value:.1f}")
            else:
                cells.append("error")
        lines.append(f"{name:22}" + "".join(f"{cell:>27}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each part")
    parser.add_argument("--compile", action="store_true", help="also time the forward with compiled blocks")
    parser.add_argument("--whole-graph", action="store_true", help="also train without gradient checkpointing")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a model of two small layers")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU here; --tiny rehearses on the CPU")
    wan = Wan(options.tiny)
    result: dict = {"about": about(wan.device, options.commit, ("torch", "triton", "numpy", "diffusers", "peft"))}
    result["problem"] = wan.config | {"latents": wan.latents, "tokens": wan.tokens, "text_tokens": TEXT}
    result["problem"] |= {"dtype": "bfloat16", "critical_ratio": RATIOS[0], "negligible_ratio": RATIOS[1]}
    result["problem"] |= {"backend": wan.backend, "turns": options.turns, "lora_rank": LORA_RANK}
    backend = SDPBackend.CUDNN_ATTENTION if wan.device.type == "cuda" else SDPBackend.MATH
    with sdpa_kernel(backend):
        arms: dict[str, dict] = {"SDPA, cuDNN" if wan.device.type == "cuda" else "SDPA": figures(wan, options)}
    for block_q, block_k in ((32, 16),) if options.tiny else ((128, 64), (64, 64)):
        wan.install(block_q, block_k)
        arms[f"SLA {block_q}x{block_k}"] = figures(wan, options)
        remove_sla(wan.model)
    result["arms"] = arms
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["about"]))
    print(table(arms))


if __name__ == "__main__":
    main()
