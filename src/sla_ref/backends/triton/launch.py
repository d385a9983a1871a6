"""How kernels are cut into programs and started."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...protocol import Inputs

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read by triton when a kernel is declared
SIZES = ("first_head", "num_heads", "query_length", "key_length", "capacity")
"""Numbers that every large kernel gets, in this order. Triton compiles no special kernel for special values of them."""

# Where matrix instructions read shared memory, of which there is 227 KB. 0 is the interpreter.
_LARGE_ARCHITECTURES = (0, 90, 100, 103)


# --- starting a kernel -----------------------------------------------------------------------------------------------


class Launcher:
    """Starts kernels on the GPU in use. Another one, set by `launch_with`, may look at them or only compile them."""

    @property
    def architecture(self) -> int:
        """90 for sm_90 and so on; 0 in the interpreter."""
        if INTERPRETED:
            return 0
        driver = triton.runtime.driver.active
        return _architecture(driver, driver.get_current_device())

    def start(self, kernel: Any, programs: int, *args: Any, case: Hashable = None, **options: Any) -> None:
        """Start a kernel on a grid of one axis: the others are limited to 65535 programs.

        `args` are all arguments of the kernel, in their order; `options` are for the compiler. `case` is a promise:
        what Triton compiles for (dtypes, alignment, divisors of integers) is the same in all calls of that case. It
        spares Triton the look at all arguments by which it finds what it has compiled.
        """
        if case is None or INTERPRETED:
            kernel[(programs,)](*args, **options)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (kernel.fn, device, case, *options.values(), *map(type, args))
        if (kept := _kept.get(key)) is None:
            compiled = kernel[(programs,)](*args, **options)
            if len(_kept) >= 4096:  # a program that never sees a length twice
                _kept.clear()
            _kept[key] = compiled.run, compiled.function, compiled.packed_metadata
        else:  # the call with which Triton (3.6, 3.7) itself ends, without the hooks of its profiler
            run, *binary = kept
            run(programs, 1, 1, driver.get_current_stream(device), *binary, None, None, None, *args)


_kept: dict[tuple, tuple] = {}  # what `start` has compiled


@functools.cache
def _architecture(driver: Any, device: int) -> int:
    return driver.get_current_target().arch


def layout(tensor: Tensor | None) -> Hashable:
    """What Triton can see of a tensor, as a part of a case."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)


_launcher = Launcher()


@contextmanager
def launch_with(launcher: Launcher) -> Iterator[None]:
    """Inside the `with`, this launcher starts all kernels of the process."""
    global _launcher
    outer, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = outer


def start(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Start a kernel by the launcher in force."""
    _launcher.start(kernel, programs, *args, **options)


def reads_shared_memory() -> bool:
    """Whether matrix instructions of the GPU in use read their operands from shared memory."""
    return _launcher.architecture in _LARGE_ARCHITECTURES


# --- how it is cut ---------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How a kernel is cut and started."""

    rows: int = 64  # query rows at a time
    keys: int = 64  # keys at a time
    features: int = 64  # rows of a state at a time; its columns, in `states_kernel`
    warps: int = 4
    stages: int = 2  # of the software pipeline: tiles that are on their way from memory
    registers: int | None = None  # per thread at most: fewer may let two programs share a multiprocessor


_EXACT = Tiles(rows=32, keys=32, features=16, stages=1)  # float32: no matrix instruction, every product in registers
_TILES = {
    # matrix instructions that read their operands from shared memory: sm_90, sm_100
    "grad_sums 64 x 128": Tiles(warps=8),
    # the same, D over 64: whole rows at a time, so that softmax computes its exponentials once
    "forward 128": Tiles(features=128),
    "grad_sums 128": Tiles(features=128, warps=8),
    "grad_keys 128": Tiles(features=128, warps=8),
    # the same, query blocks of 128; with all of its rows at once the forward reads K and V half as often
    "forward 128 x 128 sm_90": Tiles(rows=128, features=128, warps=8, registers=128),
    "grad_sums 128 x 128": Tiles(warps=8),
    "grad_sums 128 x 128 sm_90": Tiles(features=128, warps=16),
    # operands from registers, less shared memory: sm_80, sm_120
    "dkdv small": Tiles(warps=8),
    "dq small": Tiles(keys=32),
    "grad_sums small": Tiles(features=32, warps=8),
    "states 128 small": Tiles(stages=3, registers=168),
    "forward 128 small": Tiles(keys=32, warps=8),
    "grad_keys 128 small": Tiles(warps=8),
    "grad_sums 128 small": Tiles(features=32, warps=8),
}
"""For 16 bits, where it is not `Tiles()`: by kernel, D if over 64, x block_q, architecture. The longest name counts."""


class Plan(NamedTuple):
    """What a kernel is compiled for: its one constexpr argument."""

    D: int
    COLUMNS: int  # D rounded up, see `columns_of`
    BLOCK_Q: int
    BLOCK_K: int
    ROWS: int
    KEYS: int
    FEATURES: int
    SOFTMAX: bool  # whether phi is softmax, computed where phi is read
    TF32: bool  # whether the linear branch multiplies float32 tiles as tf32, which float16 inputs need for its range


class Call:
    """One forward or backward: what all of its kernels have in common."""

    def __init__(self, inputs: Inputs, *others: Tensor | None) -> None:
        """`others` are the tensors besides the inputs that kernels get and that were not made for this call."""
        query, key, value, phi_query, phi_key, block_map, _ = inputs
        tensors = (query, key, value, phi_query, phi_key, *others)
        self.case = (block_map.block_q, block_map.block_k, *map(layout, tensors))
        self.inputs = inputs
        self.softmax = phi_query is None  # then the kernels read Q and K where they would read phi
        self.phi_query = query if phi_query is None else phi_query
        self.phi_key = key if phi_key is None else phi_key
        self.heads = query.shape[0] * query.shape[1]
        self.columns = columns_of(query.shape[-1])
        # Features and their sums leave float16's range at both ends. tf32 has float16's precision and float32's range.
        self.tf32 = query.dtype == torch.float16
        self.state_dtype = torch.float32 if self.tf32 else query.dtype
        self.lists: Any = None  # what the labels say: `labels.Lists`, once they are read

    def tiles(self, kernel: str) -> Tiles:
        """How this kernel is cut on the GPU in use."""
        block_map = self.inputs.block_map
        exact = self.inputs.query.element_size() == 4 and not INTERPRETED
        return _tiles(kernel, _launcher.architecture, self.columns, block_map.block_q, block_map.block_k, exact)

    def start(self, kernel: Any, tiles: Tiles, programs: int, *args: Any, first_head: int = 0) -> None:
        """Start a kernel on these arguments, SIZES and the plan."""
        (_, num_heads, _, head_dim), block_map = self.inputs.query.shape, self.inputs.block_map
        sizes = (first_head, num_heads, block_map.query_length, block_map.key_length, block_map.max_critical)
        blocks = (block_map.block_q, block_map.block_k)
        plan = Plan(head_dim, self.columns, *blocks, tiles.rows, tiles.keys, tiles.features, self.softmax, self.tf32)
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        if tiles.registers is not None:
            options["maxnreg"] = tiles.registers
        _launcher.start(kernel, programs, *args, *sizes, plan, case=(self.case, plan), **options)


@functools.cache
def _tiles(kernel: str, architecture: int, columns: int, block_q: int, block_k: int, exact: bool) -> Tiles:
    if architecture in _LARGE_ARCHITECTURES:
        case = f"{kernel} {columns} x {block_q}"
        names = [f"{case} sm_{architecture}", case, f"{kernel} {columns}"]
    else:
        names = [f"{kernel} {columns} small", f"{kernel} small"]
    tiles = _EXACT if exact else next((_TILES[name] for name in names if name in _TILES), Tiles())
    return tiles._replace(
        rows=min(tiles.rows, block_q), keys=min(tiles.keys, block_k), features=min(tiles.features, columns)
    )


def columns_of(head_dim: int) -> int:
    """D as the kernels see it: a power of two, and at least what a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())
