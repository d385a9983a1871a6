"""Time the whole transformer of Wan2.1-1.3B with SDPA and with SLA on this GPU: a denoising step and a training step.

    python benchmarks/wan.py --json benchmarks/results/wan.json

Its full configuration with random weights, at 480p and 81 frames: batch 1, latents of 16 x 21 x 60 x 104, 32760 tokens,
512 text tokens, bfloat16, 5 % critical and 10 % negligible blocks. "forward" is the transformer once, without gradient
(guidance runs it twice per denoising step); "self_attention" is the part of that in the 30 self-attention modules,
with their projections, norms and rotary embedding. "training_step" is forward, backward with gradient checkpointing,
and AdamW over all parameters. Times are medians in milliseconds between CUDA events, peaks in MiB above what is held
before. A part that fails, for want of memory perhaps, is recorded as its error. Wants torch, triton and diffusers;
`--tiny` rehearses on a CPU with the backend torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from gpu import RATIOS
from measure import Clock, about, attempt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla_ref.integrations.diffusers import install_sla, remove_sla, sla_parameters

FULL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2}


class Wan(Clock):
    """The transformer and its inputs."""

    def __init__(self, tiny: bool) -> None:
        super().__init__()
        self.config = TINY if tiny else FULL
        self.latents = (1, 16, 3, 16, 24) if tiny else (1, 16, 21, 60, 104)
        self.backend = "triton" if self.device.type == "cuda" else "torch"
        torch.manual_seed(0)
        with self.device:
            self.model = WanTransformer3DModel(**self.config)
            self.inputs = {
                "hidden_states": torch.randn(self.latents, dtype=torch.bfloat16),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, 512, self.model.config.text_dim, dtype=torch.bfloat16),
            }
        self.to_bfloat16()

    @property
    def tokens(self) -> int:
        _, _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    def to_bfloat16(self) -> None:
        """As `from_pretrained(torch_dtype=torch.bfloat16)` does: some parts stay float32."""
        for name, parameter in self.model.named_parameters():
            if not any(part in name for part in self.model._keep_in_fp32_modules):
                parameter.data = parameter.data.to(torch.bfloat16)

    def install(self, block_q: int, block_k: int) -> None:
        install_sla(self.model, *RATIOS, block_q=block_q, block_k=block_k, backend=self.backend)
        with torch.no_grad():
            for parameter in sla_parameters(self.model):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)  # zero at the start: nothing to multiply
        self.to_bfloat16()

    def output(self) -> Tensor:
        return self.model(**self.inputs, return_dict=False)[0]

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.output()

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

    def training(self, turns: int) -> dict[str, float]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.01)
        target = torch.randn_like(self.inputs["hidden_states"])

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.mse_loss(self.output(), target).backward()
            optimizer.step()

        self.model.enable_gradient_checkpointing()
        try:
            figures = {"training_step": self.milliseconds(step, turns)}
            if self.device.type == "cuda":
                figures["training_peak_mib"] = self.peak(step)
            return figures
        finally:
            self.model.disable_gradient_checkpointing()
            self.model.zero_grad()

    def compiled(self, turns: int) -> float:
        """Milliseconds of the forward with every block compiled by torch."""
        torch._dynamo.reset()
        self.model.compile_repeated_blocks(fullgraph=True)
        try:
            return self.milliseconds(self.forward, turns)
        finally:
            for block in self.model.blocks:
                block._compiled_call_impl = None


def figures(wan: Wan, turns: int, compiled: bool) -> dict[str, object]:
    """Everything that is measured of one arm. If one part fails, the others still run."""
    result: dict[str, object] = {"forward": attempt(lambda: wan.milliseconds(wan.forward, turns))}
    result["self_attention"] = attempt(lambda: wan.self_attention(turns))
    if wan.device.type == "cuda":
        result["forward_peak_mib"] = attempt(lambda: wan.peak(wan.forward))
    if compiled:
        result["forward_compiled"] = attempt(lambda: wan.compiled(turns))
    training = attempt(lambda: wan.training(turns))
    return result | (training if "error" not in training else {"training_step": training})


def table(arms: dict[str, dict]) -> str:
    """The figures for people, and how many times faster than the first arm."""
    columns = ["forward", "forward_compiled", "self_attention", "training_step"]
    columns = [column for column in columns if any(column in row for row in arms.values())]
    lines = [f"{'':22}" + "".join(f"{column:>24}" for column in columns)]
    first = next(iter(arms.values()))
    for name, row in arms.items():
        cells = []
        for column in columns:
            value, base = row.get(column), first.get(column)
            if isinstance(value, float):
                cells.append(f"{value:.1f} ({base / value:.2f}x)" if isinstance(base, float) else f"{value:.1f}")
            else:
                cells.append("error")
        lines.append(f"{name:22}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each part")
    parser.add_argument("--compile", action="store_true", help="also time the forward with compiled blocks")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a model of two small layers")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU here; --tiny rehearses on the CPU")
    wan = Wan(options.tiny)
    result: dict = {"about": about(wan.device, options.commit, ("torch", "triton", "numpy", "diffusers"))}
    result["problem"] = wan.config | {"latents": wan.latents, "tokens": wan.tokens, "text_tokens": 512}
    result["problem"] |= {"dtype": "bfloat16", "critical_ratio": RATIOS[0], "negligible_ratio": RATIOS[1]}
    result["problem"] |= {"backend": wan.backend, "turns": options.turns}
    dense: dict[str, Callable[[], AbstractContextManager]] = {"SDPA, torch's choice": nullcontext}
    if wan.device.type == "cuda":
        dense = {"SDPA, cuDNN": partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)} | dense
    arms: dict[str, dict] = {}
    for name, context in dense.items():
        with context():
            arms[name] = figures(wan, options.turns, options.compile)
    for block_q, block_k in ((32, 16),) if options.tiny else ((128, 64), (64, 64)):
        wan.install(block_q, block_k)
        arms[f"SLA {block_q}x{block_k}"] = figures(wan, options.turns, options.compile)
        remove_sla(wan.model)
    result["arms"] = arms
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["about"]))
    print(table(arms))


if __name__ == "__main__":
    main()
