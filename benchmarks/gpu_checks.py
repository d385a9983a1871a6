"""Whether the Triton kernels are right on this GPU: every case of `sla_ref.testing`, and compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from multiprocessing import get_context
from pathlib import Path

import torch

DTYPES = ("float32", "float16", "bfloat16")


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
