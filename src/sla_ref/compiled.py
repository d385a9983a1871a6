"""What a compiler makes of the kernels, without a GPU: registers, stack, shared memory, matrix instructions.

A backend's forward and backward run as they are, on tensors without data, with a launcher that compiles a kernel where
another would start it. So the report shows the kernels that would run on such a GPU. Triton's are the very binaries.
Numba leaves the last step, from PTX to a binary, to the driver, which NVIDIA's assembler replaces here.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .block_map import BlockMap
from .protocol import Inputs, Proj

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one program may have, by architecture."""

TARGETS = tuple(f"sm_{architecture}" for architecture in SHARED_MEMORY)


@dataclass(frozen=True)
class KernelReport:
    """One kernel, compiled for one target; stack, where registers are spilled to, and shared memory in bytes."""

    backend: str
    kernel: str
    target: str
    dtype: str
    head_dim: int
    block_q: int
    block_k: int
    warps: int
    registers: int
    stack: int
    shared: int
    shared_limit: int
    instruction: str

    @property
    def problem(self) -> str | None:
        """Why this kernel fails the report, or None."""
        if self.stack:
            return f"uses {self.stack} bytes of stack"
        if self.shared > self.shared_limit:
            return f"needs {self.shared} bytes of shared memory, the architecture has {self.shared_limit}"
        return None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"problem": self.problem}


# --- reading a binary ------------------------------------------------------------------------------------------------


def _tool(name: str) -> str:
    """A tool of the CUDA toolkit, from triton's own wheel."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _matrix_instruction(ptx: str) -> str:
    """The kinds of matrix instruction in a kernel's PTX, most frequent first; "fma" where there is none."""
    found = Counter(re.findall(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*)", ptx))
    kinds: Counter[str] = Counter()
    for instruction, count in found.items():
        kind = instruction.split(".")[0]
        operand = re.search(r"bf16|f16|tf32|f8", instruction)
        kinds[kind + (f".{operand[0]}" if operand else "")] += count
    return "+".join(kind for kind, _ in kinds.most_common()) or "fma"


def _registers_and_stack(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return {"registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}


def _assemble(ptx: str, target: str) -> bytes:
    """The binary of a kernel, made by NVIDIA's assembler: of the two that triton has, the one for newer PTX."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [_tool("ptxas-blackwell"), f"-arch={target}", str(source), "-o", str(binary)]
        run = subprocess.run(command, capture_output=True, encoding="utf-8")
        if run.returncode:
            raise RuntimeError(f"ptxas cannot assemble a kernel for {target}: {run.stderr.strip()[:500]}")
        return binary.read_bytes()


def _static_shared(ptx: str) -> int:
    """Bytes of shared memory that a kernel's PTX declares."""
    return sum(int(size) for size in re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", ptx))


# --- compiling without a GPU -----------------------------------------------------------------------------------------


class _TargetOnly:
    """Replaces triton's driver: knows what to compile for, and cannot start anything."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # triton keeps compiled kernels per device: one device for each target

    def get_current_stream(self, device: int) -> int:
        return 0


def _cache_folder() -> AbstractContextManager[str]:
    """Where triton keeps what it has compiled. If it cannot write there, a temporary folder."""
    import triton

    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        return nullcontext(folder) if os.access(folder, os.W_OK) else tempfile.TemporaryDirectory()
    except OSError:
        return tempfile.TemporaryDirectory()


@contextmanager
def _triton_target(architecture: int) -> Iterator[None]:
    """Inside the `with`, triton compiles for this architecture."""
    from triton.runtime import driver

    try:
        outer = driver.active
    except RuntimeError:  # no GPU is here
        outer = None
    driver.set_active(_TargetOnly(architecture))
    try:
        yield
    finally:
        driver.set_active(outer)


def _inputs(length: int, head_dim: int, dtype: torch.dtype, block_q: int, block_k: int) -> Inputs:
    """Tokens and a block map without data."""
    tokens = torch.empty(1, 2, length, head_dim, dtype=dtype, device="meta")
    blocks = (1, 2, math.ceil(length / block_q), math.ceil(length / block_k))
    labels = torch.empty(blocks, dtype=torch.int8, device="meta")
    block_map = BlockMap(labels, block_q, block_k, length, length, 3)
    return Inputs(tokens, tokens, tokens, tokens, tokens, block_map, 0.125)


def _forward_and_backward(backend: Any, inputs: Inputs) -> None:
    """Start every kernel of a backend once."""
    if (reason := backend.refuses(inputs.query, inputs.block_map)) is not None:
        raise ValueError(f"the {backend.name} backend {reason}")
    saved = backend.forward(inputs)
    backend.backward(inputs.query, inputs.query, saved.lse, inputs, saved)
    if backend.softmax_inside:
        inputs = inputs._replace(phi_query=None, phi_key=None)
        saved = backend.forward(inputs)
        backend.backward(inputs.query, inputs.query, None, inputs, saved)
    if getattr(backend, "proj_inside", False):
        weight = inputs.query[0, 0, : inputs.query.shape[-1]]
        proj = Proj(weight, weight[0])
        backend.backward_layer(inputs.query, inputs, proj, backend.forward_layer(inputs, proj))


def _check_target(target: str) -> int:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    return int(target.removeprefix("sm_"))


def compile_kernels(
    target: str, *, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int, length: int = 2**16
) -> list[tuple[str, Any]]:
    """(name, what triton compiled) for every kernel that a forward and a backward start, in that order, each once.

    "softmax" behind a name means the form that computes phi by itself; these come after those that read phi.

    Arguments and errors as for `report`; `length` is the number of tokens.
    """
    import triton

    from .backends import triton as backend

    architecture = _check_target(target)
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled inside Triton's interpreter; unset TRITON_INTERPRET")

    compiled = {}

    class CompileOnly(backend.launch.Launcher):
        def start(self, kernel: Any, programs: int, *args: Any, case: Any = None, **options: Any) -> None:
            binary = kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **options)
            name = kernel.__name__.removesuffix("_kernel")
            softmax = isinstance(args[-1], backend.launch.Plan) and args[-1].SOFTMAX
            compiled[name + " softmax" * softmax, binary.hash] = binary

    with (
        _cache_folder() as folder,
        triton.knobs.cache.scope(),
        _triton_target(architecture),
        backend.launch.launch_with(CompileOnly()),
    ):
        triton.knobs.cache.dir = folder
        _forward_and_backward(backend, _inputs(length, head_dim, dtype, block_q, block_k))
    return [(name, binary) for (name, _), binary in compiled.items()]


def compile_numba_kernels(
    target: str, *, head_dim: int, block_q: int, block_k: int, length: int = 2**16
) -> list[tuple[str, int, str]]:
    """(name, threads of a thread block, PTX) for every kernel of the Numba backend, in the order of their first start.

    Arguments and errors as for `report`; `length` is the number of tokens.
    """
    from .backends import numba_cuda

    architecture = _check_target(target)
    if numba_cuda.SIMULATED:
        raise RuntimeError("kernels cannot be compiled inside Numba's simulator; unset NUMBA_ENABLE_CUDASIM")

    cuda, cc = numba_cuda.cuda, divmod(architecture, 10)
    compiled: dict[tuple[str, int], tuple[str, int, str]] = {}

    class CompileOnly(numba_cuda.Launcher):
        def start(self, kernel: Any, grid: tuple[int, int], *args: Any) -> None:
            ptx, _ = cuda.compile_ptx(kernel.function.py_func, tuple(map(_numba_type, args)), cc=cc)
            compiled[kernel.name, kernel.threads] = (kernel.name, kernel.threads, ptx)

    # Numba compiles helpers for the GPU that it finds, whatever target the kernel is for, and here may be none.
    get_current_device = cuda.dispatcher.get_current_device
    cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        with numba_cuda.launch_with(CompileOnly()):
            _forward_and_backward(numba_cuda, _inputs(length, head_dim, torch.float32, block_q, block_k))
    finally:
        cuda.dispatcher.get_current_device = get_current_device
    return list(compiled.values())


def _numba_type(argument: Any) -> Any:
    """Numba's type of a kernel's argument, as it finds it itself when it starts the kernel."""
    from numba import float32, int32, types

    if not isinstance(argument, torch.Tensor):
        return float32
    return types.Array({torch.float32: float32, torch.int32: int32}[argument.dtype], argument.dim(), "C")


def report(
    target: str,
    *,
    backend: str = "triton",
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
    block_q: int = 64,
    block_k: int = 64,
) -> list[KernelReport]:
    """Compile every kernel of the Triton or the Numba backend for a target and read what came out.

    Sums of marginal blocks by the vendor's matrix product are not compiled here: Triton's in 16 bits, all of Numba's.

    Args:
        target: "sm_80", "sm_90", "sm_100" or "sm_120".
        backend: "triton" or "numba".
        dtype: what to compile for; bfloat16 for Triton if None. Numba's kernels are float32 whatever the input is.
        head_dim, block_q, block_k: what to compile for.

    Returns:
        One entry per kernel, in the order in which they run; `problem` says what is wrong with it, or is None.

    Raises:
        ValueError: an unknown target or backend, or a dtype or size that the backend does not support.
        RuntimeError: called inside Triton's interpreter or Numba's simulator, or Numba's PTX cannot be assembled.
        ModuleNotFoundError: triton or numba is not installed. The tools that read binaries are triton's for both.
    """
    sizes: dict[str, Any] = {"head_dim": head_dim, "block_q": block_q, "block_k": block_k}
    kernels: list[tuple[str, int, int, str, bytes]]  # name, warps, bytes of shared memory, PTX, binary
    if backend == "triton":
        dtype, limit = dtype or torch.bfloat16, SHARED_MEMORY[_check_target(target)]
        kernels = [
            (name, made.metadata.num_warps, made.metadata.shared, made.asm["ptx"], made.asm["cubin"])
            for name, made in compile_kernels(target, dtype=dtype, **sizes)
        ]
    elif backend != "numba":
        raise ValueError(f"backend must be triton or numba, got {backend!r}")
    elif dtype not in (None, torch.float32):
        raise ValueError(f"dtype must be float32 for numba, whose kernels compute only in float32, got {dtype}")
    else:
        from .backends.numba_cuda import STATIC_SHARED_MEMORY

        dtype, limit = torch.float32, STATIC_SHARED_MEMORY
        kernels = [
            (name, threads // 32, _static_shared(ptx), ptx, _assemble(ptx, target))
            for name, threads, ptx in compile_numba_kernels(target, **sizes)
        ]
    common = {"backend": backend, "target": target, "dtype": str(dtype).removeprefix("torch."), **sizes}
    entries = []
    for name, warps, shared, ptx, binary in kernels:
        used: dict[str, Any] = {"warps": warps, **_registers_and_stack(binary), "shared": shared, "shared_limit": limit}
        entries.append(KernelReport(kernel=name, **common, **used, instruction=_matrix_instruction(ptx)))
    return entries
