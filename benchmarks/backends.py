"""Time the backends and the dense equations on this GPU: what the kernels written with Numba cost and gain.

    python benchmarks/backends.py --json benchmarks/results/backends.json

The problem: batch 1, 12 heads, 8192 tokens of 64, float32, blocks of 64 x 64, 5 % critical and 10 % negligible; softmax
as feature map. The block map is made before: what is timed is the feature map and both branches. Times are medians
between CUDA events; "graph" replays the same work as a CUDA graph, without the time Python takes to start it. Then the
same at 4096 and 16384 tokens with as many critical blocks in a row: time should double with the tokens. A part that
fails is recorded as its error, the others still run. `--tiny` rehearses.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from gpu import RATIOS
from measure import Clock, about, attempt
from torch import Tensor

BACKENDS = ("torch", "triton", "numba")


class Tokens(Clock):
    """Inputs of one length, their block map, and the functions that are timed on them."""

    def __init__(self, shape: tuple[int, int, int, int], block: int, critical_ratio: float) -> None:
        from sla_ref import classify_blocks

        super().__init__()
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator).to(self.device) for _ in range(5)]
        self.inputs, self.grads = [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3:]
        query, key, _ = self.inputs
        self.block_map = classify_blocks(query, key, critical_ratio, RATIOS[1], block_q=block, block_k=block)

    def dense(self) -> tuple[Tensor, Tensor]:
        """The equations, N x N."""
        from sla_ref import reference

        query, key, value = self.inputs
        phi_query, phi_key = query.softmax(-1), key.softmax(-1)
        block_map, scale = self.block_map, query.shape[-1] ** -0.5
        blocks = (block_map.labels, block_map.block_q, block_map.block_k)
        return reference.sparse_linear_attention(query, key, value, phi_query, phi_key, *blocks, scale)[:2]

    def backend(self, name: str) -> Callable[[], tuple[Tensor, Tensor]]:
        import sla_ref

        return lambda: sla_ref.sparse_linear_attention(*self.inputs, block_map=self.block_map, backend=name)[:2]

    def both(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple]:
        return lambda: torch.autograd.grad(function(), self.inputs, self.grads)

    def figures(self, function: Callable[[], tuple[Tensor, Tensor]], turns: int) -> dict[str, float]:
        """Milliseconds, and on a GPU MiB above the inputs."""
        both = self.both(function)
        both()  # compiles
        found = {
            "forward": self.milliseconds(torch.no_grad()(function), turns),
            "forward_backward": self.milliseconds(both, turns),
        }
        if self.device.type == "cuda":
            found["peak_mib"] = self.peak(both)
        return found

    def graph_figures(self, function: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, object]:
        """The same milliseconds as CUDA graphs."""
        if self.device.type != "cuda":
            return {}
        functions = {"forward_graph": torch.no_grad()(function), "forward_backward_graph": self.both(function)}
        return {name: attempt(lambda f=f: self.replayed(f)) for name, f in functions.items()}


def kernel_figures(tokens: Tokens, name: str) -> dict[str, float]:
    """Microseconds of the kernels that take most of one forward and backward of a backend."""
    if tokens.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    both = tokens.both(tokens.backend(name))
    both()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        both()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    found = {event.key[:100]: round(event.self_device_time_total, 1) for event in events[:20]}
    return found | {"all": round(sum(event.self_device_time_total for event in events), 1)}


def resources(tokens: Tokens) -> dict[str, dict[str, int]]:
    """What the driver says of each Numba kernel: registers of a thread, shared memory of a block, spilled bytes."""
    if tokens.device.type != "cuda":
        return {}
    from sla_ref.backends import numba_cuda

    found = {}

    class Noting(numba_cuda.Launcher):
        def start(self, kernel: numba_cuda.Kernel, grid: tuple[int, int], *args: object) -> None:
            super().start(kernel, grid, *args)
            specialized = self.specialized[kernel.function, torch.cuda.current_device()]
            found[kernel.name] = {
                "threads": kernel.threads,
                "registers": specialized.get_regs_per_thread(),
                "shared": specialized.get_shared_mem_per_block(),
                "local": specialized.get_local_mem_per_thread(),
            }

    with numba_cuda.launch_with(Noting()):
        tokens.both(tokens.backend("numba"))()
    return found


def differences(tokens: Tokens) -> dict[str, float]:
    """Root mean square difference of outputs and gradients, Numba's from torch's, in units of torch's own."""
    names = ("sparse", "linear", "grad_query", "grad_key", "grad_value")
    one, other = (
        (*(out.detach() for out in tokens.backend(name)()), *tokens.both(tokens.backend(name))())
        for name in ("numba", "torch")
    )
    pairs = zip(one, other, strict=True)
    return {
        name: ((a - b).square().mean() / b.square().mean()).sqrt().item()
        for name, (a, b) in zip(names, pairs, strict=True)
    }


def parity(quick: bool) -> dict[str, object]:
    """The checks of `sla_ref.testing` on the Numba backend."""
    from sla_ref import testing

    report = testing.check_backend("numba", quick=quick)
    failures = [str(check) for check in report.failures]
    return {"checks": len(report.checks), "failures": failures, "refused": report.refused}


def table(result: dict) -> str:
    """The figures for people."""
    columns = ("forward", "forward_graph", "forward_backward", "forward_backward_graph")
    lines = [f"{'N':>6} {'':16}" + "".join(f"{column:>24}" for column in (*columns, "peak_mib"))]
    for length, rows in result["lengths"].items():
        dense = rows.get("dense equations", {})
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"{length:>6} {name:14} {row['error'][:90]}")
                continue
            cells = []
            for column in columns:
                value, base = row.get(column), dense.get(column.removesuffix("_graph"))
                ratio = f" ({base / value:.1f}x)" if isinstance(value, float) and base else ""
                cells.append(f"{value:.2f}{ratio}" if isinstance(value, float) else "-")
            cells.append(f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-")
            lines.append(f"{length:>6} {name:16}" + "".join(f"{cell:>24}" for cell in cells))
    for part in ("parity", "difference_from_torch", "resources", "kernels_us"):
        lines.append(f"{part}: {json.dumps(result[part], indent=1)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--all-cases", action="store_true", help="parity on every case, not only on the quick ones")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, no parity checks")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    if not torch.cuda.is_available():
        if not options.tiny:
            parser.error("there is no GPU here; --tiny rehearses in Triton's interpreter and Numba's simulator")
        os.environ["TRITON_INTERPRET"] = "1"  # before they are imported
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    heads, head_dim, block, lengths = (1, 16, 16, (32, 64)) if options.tiny else (12, 64, 64, (8192, 4096, 16384))
    blocks = lengths[0] // block
    critical = max(1, int(RATIOS[0] * blocks))  # blocks in a row, at every length
    result: dict = {"lengths": {}}
    for length in lengths:
        # Half a block more than asked for: then rounding cannot lose one.
        tokens = Tokens((1, heads, length, head_dim), block, (critical + 0.5) / (length // block))
        if "about" not in result:
            result = {
                "about": about(tokens.device, options.commit, ("torch", "triton", "numba", "numba-cuda", "numpy"))
            } | result
            result["problem"] = {"heads": heads, "head_dim": head_dim, "block": block, "critical_blocks": critical}
            result["problem"] |= {"dtype": "float32", "negligible_ratio": RATIOS[1]}
        rows = {name: attempt(lambda t=tokens, n=name: t.figures(t.backend(n), 101)) for name in BACKENDS}
        for name in ("triton", "numba"):  # the torch backend looks at its sums, which no graph can do
            rows[name] |= tokens.graph_figures(tokens.backend(name))
        if length == lengths[0]:
            rows["dense equations"] = attempt(lambda t=tokens: t.figures(t.dense, 7))
            for part, function in (
                ("difference_from_torch", differences),
                ("resources", resources),
            ):
                result[part] = attempt(lambda t=tokens, f=function: f(t))
            result["kernels_us"] = {name: attempt(lambda t=tokens, n=name: kernel_figures(t, n)) for name in BACKENDS}
        result["lengths"][str(length)] = rows
    result["parity"] = {} if options.tiny else attempt(lambda: parity(not options.all_cases))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["about"]))
    print(table(result))


if __name__ == "__main__":
    main()
