"""Time and check the Triton backend on this GPU: the whole layer against cuDNN's SDPA in the same run.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --only lengths,python      # some parts; their names are those of PARTS

The main problem is Wan2.1-1.3B's self-attention at 480p: batch 1, 12 heads, 32760 tokens of 128, bfloat16, 5 % critical
and 10 % negligible blocks. A layer is classification, feature map, both branches, Proj and the sum. Times are medians
between CUDA events; "graph" replays the same work as a CUDA graph, without the time Python takes to start it. A part
that fails is recorded as its error, the others still run. The program needs torch and triton; thu-ml/SLA is timed where
its package can be imported. `--tiny` rehearses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import parity, sanitizer
from measure import Clock, about, attempt
from torch import Tensor

RATIOS = (0.05, 0.10)
BLOCKS = (128, 64)
WAN = (1, 12, 32760, 128)
WAN_14B = (1, 40, 75600, 128)  # at 720p
TINY = (1, 2, 300, 32)
LENGTHS = [(1, 12, length, dim) for dim in (128, 64) for length in (1024, 2048, 4096, 8192, 16384, 32760)]
LENGTHS += [WAN_14B]
ROUNDS = 5  # of the time of Python
CRITICAL = (0.025, 0.05, 0.10, 0.15, 0.25)

# --- the sides -------------------------------------------------------------------------------------------------------


class Problem(Clock):
    """Inputs, and the functions that are timed on them."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = torch.bfloat16
        generator = torch.Generator(self.device).manual_seed(0)
        *self.inputs, self.grad = (
            torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)
            for _ in range(4)
        )
        for tensor in self.inputs:
            tensor.requires_grad_()

    def sdpa(self) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = SDPBackend.CUDNN_ATTENTION if self.device.type == "cuda" else SDPBackend.MATH
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*self.inputs)

    def layer(self, blocks: tuple[int, int] = BLOCKS, critical_ratio: float = RATIOS[0]) -> torch.nn.Module:
        import sla_ref

        torch.manual_seed(0)
        layer = sla_ref.SparseLinearAttention(
            self.shape[-1], critical_ratio, RATIOS[1], block_q=blocks[0], block_k=blocks[1], backend="triton"
        )
        torch.nn.init.normal_(layer.proj_l.weight, std=self.shape[-1] ** -0.5)  # zero at the start: nothing to multiply
        return layer.to(self.device, self.dtype)

    def released_layer(self, blocks: tuple[int, int] = BLOCKS) -> torch.nn.Module:
        """The layer of thu-ml/SLA, where that package is installed."""
        from sparse_linear_attention import SparseLinearAttention

        layer = SparseLinearAttention(head_dim=self.shape[-1], topk=RATIOS[0], BLKQ=blocks[0], BLKK=blocks[1])
        return layer.to(self.device)

    def passes(self, function: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
        """Attention of the inputs, forward without gradients, and forward and backward."""
        parameters = tuple(function.parameters()) if isinstance(function, torch.nn.Module) else ()
        inputs = self.inputs if isinstance(function, torch.nn.Module) else ()
        return {
            "forward": torch.no_grad()(lambda: function(*inputs)),
            "forward_backward": lambda: torch.autograd.grad(function(*inputs), (*self.inputs, *parameters), self.grad),
        }

    def times(self, function: Callable[..., Tensor], *, graph: bool = False, peak: bool = True) -> dict[str, Any]:
        """Milliseconds of both passes, as graphs too if asked for, and the peak memory of forward + backward."""
        passes = self.passes(function)
        found: dict[str, Any] = {name: self.milliseconds(each) for name, each in passes.items()}
        if self.device.type == "cuda":
            if graph:
                found |= {f"{name}_graph": attempt(lambda f=each: self.replayed(f)) for name, each in passes.items()}
            if peak:
                found["peak_mib"] = self.peak(passes["forward_backward"])
        return found


# --- the parts -------------------------------------------------------------------------------------------------------


def layer(problem: Problem, blocks: tuple[int, int]) -> dict[str, Any]:
    """Cold start, times, peak memory, and whether 100 repeats give the same bits."""
    function = problem.layer(blocks)
    passes = problem.passes(function)
    cold_start = problem.host_seconds(passes["forward_backward"])
    found = {"cold_start_s": cold_start} | problem.times(function, graph=True)
    repeats = 100 if problem.device.type == "cuda" else 1

    def run() -> list[Tensor]:
        return [passes["forward"](), *passes["forward_backward"]()]

    first = run()
    different = sum(not all(map(torch.equal, first, run())) for _ in range(repeats))
    return found | {"repeats": repeats, "repeats_that_differ": different}


def wan(tiny: bool) -> dict[str, Any]:
    """The main problem: cuDNN, this layer, thu-ml/SLA's, and FlexAttention over the same critical blocks."""
    problem = Problem(TINY if tiny else WAN)
    sizes = ((64, 32),) if tiny else (BLOCKS, (64, 64))
    found: dict[str, Any] = {"sdpa_cudnn": attempt(lambda: problem.times(problem.sdpa))}
    found["layer"] = {f"{q}x{k}": attempt(lambda q=q, k=k: layer(problem, (q, k))) for q, k in sizes}
    found["released_code"] = {
        f"{q}x{k}": attempt(lambda q=q, k=k: problem.times(problem.released_layer((q, k)))) for q, k in sizes
    }
    found["flex"] = attempt(lambda: flex(problem, (128, 128)))
    found["kernels_us"] = attempt(lambda: kernels(problem, sizes[0]))
    return found


def flex(problem: Problem, blocks: tuple[int, int]) -> dict[str, Any]:
    """FlexAttention, compiled, over the critical blocks of our classification: the sparse branch and nothing else."""
    from torch.nn.attention.flex_attention import flex_attention

    import sla_ref

    block_map = sla_ref.classify_blocks(*problem.inputs[:2], *RATIOS, block_q=blocks[0], block_k=blocks[1])
    mask, compiled = block_map.to_flex(), torch.compile(flex_attention)
    return problem.times(lambda: compiled(*problem.inputs, block_mask=mask)) | {"blocks": blocks}


def kernels(problem: Problem, blocks: tuple[int, int]) -> dict[str, float]:
    """Microseconds of each kernel in one forward and backward of the layer."""
    launched = problem.launches(problem.passes(problem.layer(blocks))["forward_backward"])
    return {name: microseconds for name, (_, microseconds) in launched.items()}


def lengths(tiny: bool) -> list[dict[str, Any]]:
    """cuDNN, this layer and thu-ml/SLA's from short sequences to the longest."""
    rows = []
    for shape in [TINY] if tiny else LENGTHS:
        problem = Problem(shape)
        sides = {"sdpa_cudnn": problem.sdpa, "layer": problem.layer(), "released_code": None}
        row: dict[str, Any] = {"shape": shape}
        for name, function in sides.items():
            row[name] = attempt(
                lambda p=problem, f=function, n=name: p.times(f or p.released_layer(), graph=n == "layer", peak=False)
            )
        rows.append(row)
    return rows


def ratios(tiny: bool) -> list[dict[str, Any]]:
    """The main problem at other shares of critical blocks."""
    problem = Problem(TINY if tiny else WAN)
    return [
        {"critical_ratio": ratio} | attempt(lambda r=ratio: problem.times(problem.layer(critical_ratio=r)))
        for ratio in (CRITICAL[:1] if tiny else CRITICAL)
    ]


def python(tiny: bool) -> dict[str, Any]:
    """What a short call costs before the device does anything: microseconds of Python, and how many kernels start.

    The sides take turns, and the least of several medians counts, because a host that others use has slow moments.
    """
    problem = Problem(TINY if tiny else (1, 12, 1024, 128))
    sides = {"sdpa_cudnn": lambda: problem.sdpa, "layer": problem.layer, "released_code": problem.released_layer}
    passes: dict[tuple[str, str], Callable[[], object]] = {}
    found: dict[str, Any] = {}
    for side, make in sides.items():
        made = attempt(lambda m=make: problem.passes(m()))
        if "error" in made:
            found[side] = made
        else:
            passes |= {(side, name): function for name, function in made.items()}
    for (side, name), function in passes.items():
        launches = sum(count for count, _ in problem.launches(function).values())
        found.setdefault(side, {})[name] = {"launches": launches, "python_us": math.inf}
    for _ in range(1 if tiny else ROUNDS):
        for (side, name), function in passes.items():
            row = found[side][name]
            row["python_us"] = min(row["python_us"], problem.python_microseconds(function))
    return found


def sparse_only(tiny: bool) -> dict[str, Any]:
    """The sparse branch where no block is marginal: 7 heads of 109,632 tokens, 64 critical blocks in each row."""
    import sla_ref

    shape, critical = (TINY, 2) if tiny else ((1, 7, 109632, 128), 64)
    problem, found = Problem(shape), {}
    for block_q, block_k in ((128, 64), (64, 64)):
        rows, columns = math.ceil(shape[2] / block_q), math.ceil(shape[2] / block_k)
        order = torch.rand(1, shape[1], rows, columns, device=problem.device).argsort(-1)
        labels = torch.where(order < critical, 1, -1).to(torch.int8)
        block_map = sla_ref.BlockMap(labels, block_q, block_k, shape[2], shape[2], num_critical=critical)
        attention = torch.no_grad()(
            lambda m=block_map: sla_ref.sparse_linear_attention(*problem.inputs, block_map=m, backend="triton").sparse
        )
        forward = attempt(lambda f=attention: problem.milliseconds(f))
        found[f"{block_q}x{block_k}"] = {"forward": forward}
        if isinstance(forward, float):
            flop = 4 * shape[1] * shape[2] * critical * block_k * shape[3]
            found[f"{block_q}x{block_k}"]["tflops"] = flop / forward / 1e9
    return found


PARTS: dict[str, Callable[[bool], Any]] = {
    "wan": wan,
    "lengths": lengths,
    "ratios": ratios,
    "python": python,
    "sparse_only": sparse_only,
}

# --- the run ---------------------------------------------------------------------------------------------------------


def cell(value: object, base: object = None) -> str:
    """Milliseconds, and how many times faster than `base`."""
    if not isinstance(value, float):
        return "-"
    return f"{value:.2f} ({base / value:.2f}x)" if isinstance(base, float) else f"{value:.2f}"


def report(result: dict[str, Any]) -> list[str]:
    """The results for people. A side that failed says why."""
    lines = []
    names = ("forward", "forward_graph", "forward_backward", "forward_backward_graph")

    def add(title: str, row: dict[str, Any], sdpa: dict[str, Any]) -> None:
        cells = [
            cell(row.get(name), sdpa.get(name.removesuffix("_graph")) if row is not sdpa else None) for name in names
        ]
        if "peak_mib" in row:
            share = f" ({row['peak_mib'] / sdpa['peak_mib']:.2f}x)" if "peak_mib" in sdpa else ""
            cells.append(f"{row['peak_mib']:.0f} MiB{share}")
        lines.append(f"{title:34}" + "".join(f"{each:>18}" for each in cells) + row.get("error", ""))

    lines.append(
        f"{'ms (times cuDNN)':34}" + "".join(f"{each:>18}" for each in ("fwd", "graph", "fwd+bwd", "graph", "peak"))
    )
    sdpa: dict[str, Any] = {}
    if "wan" in result:
        found = result["wan"]
        sdpa = found["sdpa_cudnn"]
        add("SDPA, cuDNN", sdpa, sdpa)
        for name, row in found["layer"].items():
            add(f"sla_ref {name}", row, sdpa)
            if "repeats" in row:
                repeats = f"{row['repeats_that_differ']} of {row['repeats']} repeats differ"
                lines[-1] += f"  {repeats}, cold start {row['cold_start_s']:.1f} s"
        for name, row in found["released_code"].items():
            add(f"thu-ml {name}", row, sdpa)
        add("FlexAttention, critical blocks", found["flex"], sdpa)
    for row in result.get("lengths", []):
        shape = "x".join(map(str, row["shape"][1:]))
        add(f"{shape} cuDNN", row["sdpa_cudnn"], row["sdpa_cudnn"])
        add(f"{shape} sla_ref", row["layer"], row["sdpa_cudnn"])
        add(f"{shape} thu-ml", row["released_code"], row["sdpa_cudnn"])
    for row in result.get("ratios", []):
        add(f"critical {row['critical_ratio']:.1%}", row, sdpa)
    for part in ("python", "sparse_only", "parity", "sanitizer"):
        if part in result:
            lines.append(f"{part}: {json.dumps(result[part])[:1500]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--only", help=f"parts to run, with commas between: {', '.join(PARTS)}, checks")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="for the parity cases")
    parser.add_argument("--parity-seconds", type=float, default=900, help="time limit of the parity cases")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, one parity case")
    options = parser.parse_args()
    parts = (*PARTS, "checks") if options.only is None else options.only.split(",")
    if unknown := set(parts) - {*PARTS, "checks"}:
        parser.error(f"--only takes {', '.join(PARTS)}, checks; got {', '.join(sorted(unknown))}")
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU here; --tiny rehearses in Triton's interpreter")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: the first call compiles everything
        os.environ["TRITON_CACHE_DIR"] = cache
        result: dict[str, Any] = {"about": about(Clock().device, options.commit)}
        result["problem"] = {
            "shape": WAN,
            "dtype": "bfloat16",
            "critical_ratio": RATIOS[0],
            "negligible_ratio": RATIOS[1],
        }
        for name, part in PARTS.items():
            if name in parts:
                started = time.perf_counter()
                result[name] = attempt(lambda p=part: p(options.tiny))
                print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if "checks" in parts:
            with ThreadPoolExecutor(1) as second:  # all that is timed is done
                sanitized = second.submit(attempt, sanitizer)
                result["parity"] = attempt(lambda: parity(options.tiny, options.processes, options.parity_seconds))
                result["sanitizer"] = sanitized.result()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["about"]))
    print("\n".join(report(result)))


if __name__ == "__main__":
    main()
