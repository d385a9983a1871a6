"""How kernels are cut into programs, what they are given, and how they are started."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
        what Triton compiles for (dtypes, alignment, divisors of integers, options) is the same in all calls of that
        case. It spares Triton the look at all arguments by which it finds what it has compiled.
        """
        if case is None or INTERPRETED:
            kernel[(programs,)](*args, **options)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (kernel.fn, device, case, *map(type, args))
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


def layout(argument: Tokens | Tensor | None) -> Hashable:
    """What Triton can see of an argument, as a part of a case. Tokens begin at 16 bytes."""
    if isinstance(argument, Tokens):
        return argument.data.dtype, argument.batch, argument.head, argument.token
    return None if argument is None else (argument.dtype, argument.data_ptr() % 16)


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


# --- what it is given ------------------------------------------------------------------------------------------------

SHORT = 2**22  # elements of a tensor


class Tokens(NamedTuple):
    """A (B, H, N, D) tensor as an argument, unless it is a descriptor by which the hardware reads tiles (TMA)."""

    data: Any  # the tensor; in a kernel a pointer to its first element
    batch: int  # strides of batch, head and token, in elements
    head: int
    token: int


def strided(tensor: Tensor) -> Tokens:
    """A tensor by pointer and strides.

    Triton compiles one kernel for strides that are multiples of 16 and another for those that are not, and these may
    add up in another order. A view that would get another kernel than its contiguous copy is copied, for equal bits.
    """
    strides, as_it_is = _outer_strides(tensor.shape, tensor.stride())
    if as_it_is and tensor.data_ptr() % 16 == 0:
        return Tokens(tensor, *strides)
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    return Tokens(tensor, *_outer_strides(tensor.shape, tensor.stride())[0])


@functools.lru_cache(4096)
def _outer_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The first three, 0 where they do not matter, and whether kernels can use them."""
    _, heads, length, head_dim = shape
    own, contiguous = (
        tuple(0 if size == 1 else stride for size, stride in zip(shape[:3], outer, strict=True))
        for outer in (strides[:3], (heads * length * head_dim, length * head_dim, head_dim))
    )
    alike = all((a % 16 == 0, a == 1) == (b % 16 == 0, b == 1) for a, b in zip(own, contiguous, strict=True))
    # Between tokens 2^24 at most: beyond that a tile of 128 tokens would overflow the int32 inside it.
    return own, alike and strides[3] == 1 and own[2] < 2**24


def tiled(*tokens_and_rows: tuple[Tokens, int]) -> list[Any]:
    """Tokens that are read in whole tiles of so many rows: by descriptor if all of them can be, else as they are."""
    if not descriptors_fit(*(tokens.data for tokens, _ in tokens_and_rows)):
        return [tokens for tokens, _ in tokens_and_rows]
    tensors_and_rows = [(tokens.data, rows) for tokens, rows in tokens_and_rows]
    return [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, columns_of(tensor.shape[-1])])
        for tensor, rows in tensors_and_rows
    ]


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether to let the hardware read tiles of these tensors by descriptor (TMA).

    It needs rows on 16 bytes. It pays where matrix instructions read shared memory themselves; where their operands
    come from registers, as on sm_120, it costs registers. Python needs longer for a descriptor than for a pointer,
    which short sequences do not win back.
    """
    if INTERPRETED or not reads_shared_memory() or tensors[0].element_size() != 2 or tensors[0].numel() < SHORT:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(3) == 1
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


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


class Cut(NamedTuple):
    """How one kernel of a call is cut, and what else the compiler is told."""

    plan: Plan
    options: dict[str, int]


class Call:
    """One forward or backward: what all of its kernels have in common."""

    def __init__(self, inputs: Inputs, *others: Tokens | Tensor | None) -> None:
        """`others` are what kernels get besides the inputs and was not made for this call."""
        query, key, value, phi_query, phi_key, block_map, _ = inputs
        self.inputs = inputs
        self.query, self.key, self.value = strided(query), strided(key), strided(value)
        self.softmax = phi_query is None  # then the kernels read Q and K where they would read phi
        self.phi_query = self.query if phi_query is None else strided(phi_query)
        self.phi_key = self.key if phi_key is None else strided(phi_key)
        tokens = (self.query, self.key, self.value, self.phi_query, self.phi_key)
        self.case = tuple(map(layout, (*tokens, *others)))
        batch, self.num_heads, _, self.head_dim = query.shape
        self.heads = batch * self.num_heads
        self.columns = columns_of(self.head_dim)
        # Features and their sums leave float16's range at both ends. tf32 has float16's precision and float32's range.
        self.tf32 = query.dtype == torch.float16
        self.state_dtype = torch.float32 if self.tf32 else query.dtype
        exact = query.element_size() == 4 and not INTERPRETED
        blocks = (block_map.block_q, block_map.block_k)
        self.size = (_launcher.architecture, self.head_dim, *blocks, exact, self.softmax, self.tf32)
        self.lists: Any = None  # what the labels say: `labels.Lists`, once they are read

    def cut(self, kernel: str) -> Cut:
        """How this kernel is cut on the GPU in use."""
        return _cut(kernel, *self.size)

    def start(self, kernel: Any, cut: Cut, programs: int, *args: Any, first_head: int = 0) -> None:
        """Start a kernel on these arguments, SIZES and the plan."""
        block_map, plan = self.inputs.block_map, cut.plan
        sizes = (first_head, self.num_heads, block_map.query_length, block_map.key_length, block_map.max_critical)
        _launcher.start(kernel, programs, *args, *sizes, plan, case=(self.case, plan), **cut.options)


@functools.cache
def _cut(
    kernel: str, architecture: int, head_dim: int, block_q: int, block_k: int, exact: bool, softmax: bool, tf32: bool
) -> Cut:
    columns = columns_of(head_dim)
    if architecture in _LARGE_ARCHITECTURES:
        case = f"{kernel} {columns} x {block_q}"
        names = [f"{case} sm_{architecture}", case, f"{kernel} {columns}"]
    else:
        names = [f"{kernel} {columns} small", f"{kernel} small"]
    tiles = _EXACT if exact else next((_TILES[name] for name in names if name in _TILES), Tiles())
    tiles = tiles._replace(
        rows=min(tiles.rows, block_q), keys=min(tiles.keys, block_k), features=min(tiles.features, columns)
    )
    plan = Plan(head_dim, columns, block_q, block_k, tiles.rows, tiles.keys, tiles.features, softmax, tf32)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    return Cut(plan, options)


def columns_of(head_dim: int) -> int:
    """D as the kernels see it: a power of two, and at least what a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())
