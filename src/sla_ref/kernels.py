"""What a compiler makes of the kernels, without a GPU: registers, stack, spills, shared memory, matrix instructions.

The launchers of the backend run as they are, on tensors without data and with a driver that names the target; instead
of starting a kernel they compile it. So the report shows the very binaries that would run on such a GPU.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .block_map import BlockMap

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one program may have, by architecture."""

TARGETS = tuple(f"sm_{architecture}" for architecture in SHARED_MEMORY)


@dataclass(frozen=True)
class KernelReport:
    """One kernel, compiled for one target. In bytes, but for spills: instructions that read or write the stack."""

    kernel: str
    target: str
    dtype: str
    head_dim: int
    block_q: int
    block_k: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    instruction: str

    @property
    def problem(self) -> str | None:
        """Why this kernel fails the report, or None."""
        if self.stack or self.spills:
            return f"uses {self.stack} bytes of stack ({self.spills} spill instructions)"
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


def _inspect(compiled: Any) -> dict[str, int]:
    """Registers, stack, spills and shared memory of a compiled kernel, from its cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [_tool("nvdisasm"), "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
    }


# --- compiling without a GPU -----------------------------------------------------------------------------------------


class _TargetOnly:
    """Stands in for triton's driver: knows what to compile for, and can start nothing."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # triton keeps compiled kernels per device: one device for each target

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernels(
    target: str, *, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int, length: int = 2048
) -> list[tuple[str, Any]]:
    """(name, what triton compiled) for every kernel that a forward and a backward start, in that order, each once.

    "softmax" behind a name: in the form that computes phi by itself, after those that read it.

    Arguments and errors as for `report`; `length` is the number of tokens.
    """
    import triton

    from .backends import triton_fused

    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled inside Triton's interpreter; unset TRITON_INTERPRET")

    compiled = {}

    def compile_only(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        binary = kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **options)
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        compiled[name + (" softmax" if options.get("SOFTMAX") else ""), binary.hash] = binary

    tokens = torch.empty(1, 2, length, head_dim, dtype=dtype, device="meta")
    blocks = (1, 2, math.ceil(length / block_q), math.ceil(length / block_k))
    block_map = BlockMap(torch.empty(blocks, dtype=torch.int8, device="meta"), block_q, block_k, length, length, 3)
    if (reason := triton_fused.refuses(tokens, block_map)) is not None:
        raise ValueError(f"the triton backend {reason}")
    driver = _TargetOnly(int(target.removeprefix("sm_")))
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton_fused, "_launch", compile_only),
    ):
        saved = triton_fused.forward(tokens, tokens, tokens, tokens, tokens, block_map, 0.125)
        triton_fused.backward(tokens, tokens, tokens, tokens, tokens, tokens, tokens, saved, block_map, 0.125)
        triton_fused.forward_softmax(tokens, tokens, tokens, block_map, 0.125)
        triton_fused.backward_softmax(tokens, tokens, tokens, tokens, tokens, saved, block_map, 0.125)
    return [(name, binary) for (name, _), binary in compiled.items()]


def report(
    target: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    block_q: int = 64,
    block_k: int = 64,
) -> list[KernelReport]:
    """Compile every kernel of the Triton backend for a target and read what came out.

    In 16 bits the marginal blocks are added up by the vendor's matrix product, which is not compiled here.

    Args:
        target: "sm_80", "sm_90", "sm_100" or "sm_120".
        dtype, head_dim, block_q, block_k: what to compile for.

    Returns:
        One entry per kernel, in the order in which they run; `problem` says what is wrong with it, or is None.

    Raises:
        ValueError: an unknown target, or a dtype or size that the backend does not take.
        RuntimeError: called inside Triton's interpreter.
        ModuleNotFoundError: triton is not installed.
    """
    binaries = compile_kernels(target, dtype=dtype, head_dim=head_dim, block_q=block_q, block_k=block_k)
    return [
        KernelReport(
            kernel=name,
            target=target,
            dtype=str(dtype).removeprefix("torch."),
            head_dim=head_dim,
            block_q=block_q,
            block_k=block_k,
            warps=binary.metadata.num_warps,
            shared_limit=SHARED_MEMORY[int(target.removeprefix("sm_"))],
            instruction=_matrix_instruction(binary.asm["ptx"]),
            **_inspect(binary),
        )
        for name, binary in binaries
    ]
