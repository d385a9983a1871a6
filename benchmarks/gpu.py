"""Time and check the Triton backend on this GPU: the whole layer against cuDNN's SDPA in the same run.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

The problem is Wan2.1-1.3B's self-attention at 480p: batch 1, 12 heads, 32760 tokens of 128, bfloat16, 5 % critical and
10 % negligible blocks. A layer is classification, feature map, both branches, Proj and the sum. Times are medians
between CUDA events; "graph" replays the same work as a CUDA graph, without the time Python takes to start it. A part
that fails is recorded as its error, the others still run. Wants torch and triton, nothing else; `--tiny` rehearses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RATIOS = (0.05, 0.10)
DTYPES = ("float32", "float16", "bfloat16")
MIB = 2**20


# --- measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """Times work on one device, and its memory there."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], object], turns: int = 101) -> float:
        """The median of `turns` after a few to warm up. They are queued: Python's time shows only if it is longer than
        the work itself. A short series may fall as a whole into one slow moment of the host.
        """
        if self.device.type != "cuda":
            started = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - started)
        for _ in range(3):
            function()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(turns)]
        for start, end in events:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def replayed(self, function: Callable[[], object]) -> float:
        """Median time of the same work as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self.milliseconds(graph.replay)

    def peak(self, function: Callable[[], object]) -> float:
        """MiB above the inputs."""
        function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB


# --- the two sides ---------------------------------------------------------------------------------------------------


class Problem(Clock):
    """Inputs, and the functions that are timed on them."""

    def __init__(self, tiny: bool) -> None:
        super().__init__()
        self.shape = (1, 2, 300, 32) if tiny else (1, 12, 32760, 128)
        self.dtype = torch.bfloat16
        self.blocks = ((64, 32),) if tiny else ((128, 64), (64, 64))
        generator = torch.Generator().manual_seed(0)
        tensors = (torch.randn(self.shape, generator=generator).to(self.dtype).to(self.device) for _ in range(4))
        *self.inputs, self.grad = (tensor.contiguous() for tensor in tensors)
        for tensor in self.inputs:
            tensor.requires_grad_()

    def sdpa(self) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = SDPBackend.CUDNN_ATTENTION if self.device.type == "cuda" else SDPBackend.MATH
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*self.inputs)

    def layer(self, block_q: int, block_k: int) -> torch.nn.Module:
        import sla_ref

        torch.manual_seed(0)
        layer = sla_ref.SparseLinearAttention(
            self.shape[-1], *RATIOS, block_q=block_q, block_k=block_k, backend="triton"
        )
        torch.nn.init.normal_(layer.proj_l.weight, std=self.shape[-1] ** -0.5)  # zero at the start: nothing to multiply
        return layer.to(self.device, self.dtype)

    def forward(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(function)

    def both(self, function: Callable[[], Tensor], parameters: tuple = ()) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(), (*self.inputs, *parameters), self.grad)


def sdpa_figures(problem: Problem) -> dict[str, float]:
    both = problem.both(problem.sdpa)
    figures = {
        "forward": problem.milliseconds(problem.forward(problem.sdpa)),
        "forward_backward": problem.milliseconds(both),
    }
    if problem.device.type == "cuda":
        figures["peak_mib"] = problem.peak(both)
    return figures


def layer_figures(problem: Problem, block_q: int, block_k: int) -> dict[str, object]:
    """Cold start, times, peak memory, and whether 100 repeats give the same bits."""
    layer = problem.layer(block_q, block_k)
    both = problem.both(lambda: layer(*problem.inputs), tuple(layer.parameters()))
    forward = problem.forward(lambda: layer(*problem.inputs))
    problem.wait()
    started = time.perf_counter()
    both()
    problem.wait()
    figures: dict[str, object] = {"cold_start_s": time.perf_counter() - started}
    figures["forward"] = problem.milliseconds(forward)
    figures["forward_backward"] = problem.milliseconds(both)
    if problem.device.type == "cuda":
        figures["peak_mib"] = problem.peak(both)
        figures["forward_graph"] = attempt(lambda: problem.replayed(forward))
        figures["forward_backward_graph"] = attempt(lambda: problem.replayed(both))
    repeats = 100 if problem.device.type == "cuda" else 1
    first = (forward(), *both())
    different = sum(
        not all(torch.equal(a, b) for a, b in zip(first, (forward(), *both()), strict=True)) for _ in range(repeats)
    )
    return figures | {"repeats": repeats, "repeats_that_differ": different}


def kernel_figures(problem: Problem, block_q: int, block_k: int) -> dict[str, float]:
    """Microseconds of each kernel in one forward and backward of the layer."""
    if problem.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    layer = problem.layer(block_q, block_k)
    both = problem.both(lambda: layer(*problem.inputs), tuple(layer.parameters()))
    both()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        both()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:120]: round(event.self_device_time_total, 1) for event in events if event.self_device_time_total}


def released_code_figures(problem: Problem) -> dict[str, object]:
    """thu-ml/SLA's layer, where that package is installed."""
    from sparse_linear_attention import SparseLinearAttention

    figures = {}
    for block_q, block_k in problem.blocks:
        layer = SparseLinearAttention(head_dim=problem.shape[-1], topk=RATIOS[0], BLKQ=block_q, BLKK=block_k)
        layer = layer.to(problem.device)
        both = problem.both(lambda layer=layer: layer(*problem.inputs))
        figures[f"{block_q}x{block_k}"] = {
            "forward": problem.milliseconds(problem.forward(lambda layer=layer: layer(*problem.inputs))),
            "forward_backward": problem.milliseconds(both),
            "peak_mib": problem.peak(both),
        }
    return figures


# --- parity and sanitizer --------------------------------------------------------------------------------------------


def check(case_name: str, dtype: str, thorough: bool) -> tuple[int, list[str]]:
    """How many checks of one case there are, and those that failed. Runs in a process of its own."""
    from sla_ref import backends, testing

    case = next(case for case in testing.CASES if case.name == case_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks = testing.check_case(
        backends.load("triton"), case, device=device, dtype=getattr(torch, dtype), thorough=thorough
    )
    return len(checks), [str(check) for check in checks if not check.passed]


def parity(tiny: bool, processes: int, seconds: float) -> dict[str, object]:
    """Every case of `sla_ref.testing` in every dtype, several at a time: most of the time goes to compiling."""
    from sla_ref import testing

    names = [case.name for case in testing.CASES if not tiny or case.name == "random map"]
    jobs = [(name, dtype, not tiny) for dtype in (DTYPES[-1:] if tiny else DTYPES) for name in names]
    done, failures, unfinished = {}, [], [f"{name}, {dtype}" for name, dtype, _ in jobs]
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    futures = {pool.submit(check, *job): f"{job[0]}, {job[1]}" for job in jobs}
    try:
        for future in as_completed(futures, timeout=seconds):
            unfinished.remove(futures[future])
            try:
                done[futures[future]], failed = future.result()
                failures += failed
            except Exception as error:
                failures.append(f"{futures[future]}: {type(error).__name__}: {error}")
    except OutOfTime:
        for process in list(pool._processes.values()):
            process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return {"cases": len(done), "checks": sum(done.values()), "failures": failures, "unfinished": unfinished}


SANITIZED = """
import torch
from sla_ref import backends, testing
problem = testing.make_problem(query_length=200, key_length=300, dtype=torch.bfloat16, device="cuda")
testing.run_backend(backends.load("triton"), problem)
torch.cuda.synchronize()
"""


def sanitizer() -> dict[str, object]:
    """compute-sanitizer's memcheck and racecheck on one small forward and backward, both at once."""
    places = [*Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    places += Path(torch.__file__).parents[1].glob("nvidia/**/compute-sanitizer")
    program = shutil.which("compute-sanitizer") or next((str(place) for place in places if place.is_file()), None)
    if program is None:
        raise FileNotFoundError("compute-sanitizer is not installed")
    runs = {
        tool: subprocess.Popen(
            [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for tool in ("memcheck", "racecheck")
    }
    result = {}
    for tool, run in runs.items():
        try:
            output, _ = run.communicate(timeout=120)
            result[tool] = "clean" if run.returncode == 0 else output[-1500:]
        except subprocess.TimeoutExpired:
            run.kill()
            result[tool] = "not finished"
    return result


# --- the run ---------------------------------------------------------------------------------------------------------


def attempt(part: Callable[[], object]) -> object:
    """What a part returns, or its error; the other parts still run."""
    try:
        return part()
    except Exception as error:
        print(traceback.format_exc(limit=-2), file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def about(
    device: torch.device, commit: str | None, packages: tuple[str, ...] = ("torch", "triton", "numpy")
) -> dict[str, object]:
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if commit is None:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        run = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        commit = run.stdout.strip() or "unknown"
    found = {"device": "CPU", "versions": versions, "commit": commit, "date": time.strftime("%Y-%m-%d")}
    if device.type == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        found["device"] = torch.cuda.get_device_name(device)
        found["versions"] |= {"cuda": torch.version.cuda, "driver": driver.stdout.strip()}
        found["versions"]["cudnn"] = torch.backends.cudnn.version()
    return found


def table(result: dict) -> str:
    """The figures for people."""
    sdpa = result["sdpa_cudnn"]
    lines = [f"{'':22}{'forward':>16}{'graph':>16}{'fwd + bwd':>16}{'graph':>16}{'peak MiB':>14}{'cold s':>8}"]

    def cell(row: dict, key: str, base: str) -> str:
        value = row.get(key)
        if not isinstance(value, float):
            return "-"
        ratio = sdpa.get(base)
        return f"{value:.2f} ({ratio / value:.2f}x)" if ratio and row is not sdpa else f"{value:.2f}"

    rows = {"SDPA, cuDNN": sdpa} | {f"sla_ref {name}": row for name, row in result["layer"].items()}
    released = result["released_code"]
    if "error" not in released:
        rows |= {f"thu-ml {name}": row for name, row in released.items()}
    for name, row in rows.items():
        peak = row.get("peak_mib")
        share = f"{peak:.0f} ({peak / sdpa['peak_mib']:.2f}x)" if peak and "peak_mib" in sdpa else "-"
        cold = f"{row['cold_start_s']:.1f}" if "cold_start_s" in row else "-"
        lines.append(
            f"{name:22}{cell(row, 'forward', 'forward'):>16}{cell(row, 'forward_graph', 'forward'):>16}"
            f"{cell(row, 'forward_backward', 'forward_backward'):>16}"
            f"{cell(row, 'forward_backward_graph', 'forward_backward'):>16}{share:>14}{cold:>8}"
        )
        if "error" in row:
            lines.append(f"    {row['error']}")
        if "repeats" in row:
            lines.append(f"    {row['repeats_that_differ']} of {row['repeats']} repeats differ in a bit")
    checked = result["parity"]
    if "error" in checked:
        lines.append(f"parity: {checked['error']}")
    else:
        lines.append(
            f"parity: {checked['cases']} cases, {checked['checks']} checks, {len(checked['failures'])} failed, "
            f"{len(checked['unfinished'])} cases not finished"
        )
        lines += [f"    {failure}" for failure in checked["failures"][:20]]
    lines.append(f"compute-sanitizer: {result['sanitizer']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here; must not exist")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="for the parity cases")
    parser.add_argument("--parity-seconds", type=float, default=900, help="time limit of the parity cases")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, one parity case")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json must name a new file, {options.json} exists")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU here; --tiny rehearses in Triton's interpreter")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: the first call compiles everything
        os.environ["TRITON_CACHE_DIR"] = cache
        problem = Problem(options.tiny)
        result: dict = {"about": about(problem.device, options.commit), "problem": {"shape": problem.shape}}
        result["problem"] |= {"dtype": "bfloat16", "critical_ratio": RATIOS[0], "negligible_ratio": RATIOS[1]}
        result["sdpa_cudnn"] = attempt(lambda: sdpa_figures(problem))
        result["layer"] = {
            f"{q}x{k}": attempt(lambda q=q, k=k: layer_figures(problem, q, k)) for q, k in problem.blocks
        }
        result["released_code"] = attempt(lambda: released_code_figures(problem))
        result["kernels_us"] = attempt(lambda: kernel_figures(problem, *problem.blocks[0]))
        with ThreadPoolExecutor(1) as beside:  # all that is timed is done
            sanitized = beside.submit(attempt, sanitizer)
            result["parity"] = attempt(lambda: parity(options.tiny, options.processes, options.parity_seconds))
            result["sanitizer"] = sanitized.result()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["about"]))
    print(table(result))


if __name__ == "__main__":
    main()
