"""What the benchmarks share: a clock, what ran on which hardware with which versions, parts that may fail."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

MIB = 2**20


class Clock:
    """Times work on one device, and its memory there."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], object], turns: int | None = None) -> float:
        """Median of `turns` calls after a few to warm up; None: 101, or as many as take about a second, at least 7.

        The calls are queued, which hides the time that Python takes wherever the work itself takes longer. A shorter
        series could fall into one slow moment of the host as a whole.
        """
        if self.device.type != "cuda":
            return 1000 * self.host_seconds(function)
        for _ in range(3):
            function()
        self.wait()
        if turns is None:
            turns = min(101, max(7, int(1 / self.host_seconds(function))))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(turns)]
        for start, end in events:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def host_seconds(self, function: Callable[[], object]) -> float:
        """Wall time of one call, with the work that it starts."""
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def python_microseconds(self, function: Callable[[], object], turns: int = 60) -> float:
        """Median time until a call returns, while the device has nothing else to do: what Python takes to start work.

        It says so only of small problems. A call that waits for the device counts the wait too.
        """
        times = []
        for _ in range(turns if self.device.type == "cuda" else 1):
            self.wait()
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return 1e6 * statistics.median(times[len(times) // 4 :])

    def launches(self, function: Callable[[], object]) -> dict[str, tuple[int, float]]:
        """What one call runs on the GPU: by kernel, how often and for how many microseconds in all."""
        from torch.profiler import ProfilerActivity, profile

        if self.device.type != "cuda":
            return {}

        function()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            self.wait()
        events = [event for event in profiler.key_averages() if event.self_device_time_total]
        events.sort(key=lambda event: -event.self_device_time_total)
        return {event.key[:120]: (event.count, round(event.self_device_time_total, 1)) for event in events}

    def replayed(self, function: Callable[[], object], turns: int | None = None) -> float:
        """Median time of the same work as a CUDA graph; `turns` as in `milliseconds`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL asks for events from a thread of its own, which would end a recording that covers all threads.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
        return self.milliseconds(graph.replay, turns)

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

    def cost(self, step: Callable[[], object], turns: int) -> dict[str, float]:
        """Of a training step: milliseconds, peak memory, and MiB of weights, gradients and moments between steps."""
        found = {"step": self.milliseconds(step, turns)}
        if self.device.type == "cuda":
            found |= {"peak_mib": self.peak(step), "held_mib": torch.cuda.memory_allocated() / MIB}
        return found


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
        found["versions"] |= {"cuda": torch.version.cuda, "driver": driver.stdout.partition("\n")[0]}
        found["versions"]["cudnn"] = torch.backends.cudnn.version()
    return found
