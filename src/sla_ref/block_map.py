"""Which key blocks a query block attends to, and how: pooling, scores, the three classes, and `BlockMap`.

Nothing here is differentiated. The classification is a discrete choice, and the paper trains through the two branches
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import backends
from .checks import check_block_size, check_layout, check_ratio, check_tensors, find_device, shown
from .operators import fold_into_batch, operator

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1

DEFAULT_CRITICAL_RATIO = 0.05
DEFAULT_NEGLIGIBLE_RATIO = 0.10
DEFAULT_BLOCK = 64


# --- pooling, scores, classes ----------------------------------------------------------------------------------------


def num_blocks(length: int, block: int) -> int:
    """T = ceil(N / block); the last block may be partial."""
    return -(-length // block)


def pool_blocks(tokens: Tensor, block: int) -> Tensor:
    """Mean over the tokens of each block; the last block may be partial and is averaged over its real tokens.

    `tokens` (B, H, N, D) -> (B, H, T, D), float64 (float32 on a device without float64). [Eq. 2]
    """
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
    block = min(block, tokens.shape[2])
    whole = tokens.shape[2] // block * block
    pooled = tokens[:, :, :whole].unflatten(2, (whole // block, block)).mean(dim=3, dtype=dtype)  # [Eq. 2]
    if whole < tokens.shape[2]:
        tail = tokens[:, :, whole:].mean(dim=2, keepdim=True, dtype=dtype)
        pooled = torch.cat([pooled, tail], dim=2)
    return pooled


def block_scores(query: Tensor, key: Tensor, *, block_q: int = DEFAULT_BLOCK, block_k: int = DEFAULT_BLOCK) -> Tensor:
    """The raw scores that blocks are ranked by, `pool(Q) pool(K)^T`. [Eq. 2] without its softmax and 1/sqrt(d).

    Neither changes the order within a row, but a softmax underflows: scores that differ would become ties. In float64
    nothing depends on the user's tf32 and autocast settings, and the largest float32 numbers do not overflow.

    Args:
        query: (B, H, Nq, D), any float dtype.
        key: (B, H, Nk, D), same dtype and device.
        block_q, block_k: tokens per query block and per key block.

    Returns:
        (B, H, Tq, Tk) float64 (float32 on a device without float64), without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or size.
    """
    check_tensors(query=query, key=key)
    check_block_size("block_q", block_q)
    check_block_size("block_k", block_k)
    return pool_blocks(query.detach(), block_q) @ pool_blocks(key.detach(), block_k).mT  # [Eq. 2]


def classify_blocks(
    query: Tensor,
    key: Tensor,
    critical_ratio: float = DEFAULT_CRITICAL_RATIO,
    negligible_ratio: float = DEFAULT_NEGLIGIBLE_RATIO,
    *,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
) -> BlockMap:
    """Sort the key blocks of every query block into critical, marginal and negligible.

    Each row of `block_scores` is ranked in stable descending order. Its first `max(1, int(critical_ratio * Tk))` blocks
    are critical; its last `int(negligible_ratio * Tk)`, or what is left of the row, are negligible; the rest is
    marginal.

    Args:
        query: (B, H, Nq, D), any float dtype.
        key: (B, H, Nk, D), same dtype and device.
        critical_ratio: share of critical key blocks, 0 < critical_ratio <= 1; the paper's k_h / 100.
        negligible_ratio: share of negligible key blocks, 0 <= negligible_ratio <= 1; the paper's k_l / 100.
        block_q, block_k: tokens per query block and per key block.

    Returns:
        The block map, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or size.
    """
    check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
    check_ratio("negligible_ratio", negligible_ratio, zero_allowed=True)
    check_tensors(query=query, key=key)
    check_block_size("block_q", block_q)
    check_block_size("block_k", block_k)
    num_critical, num_negligible = class_sizes(critical_ratio, negligible_ratio, num_blocks(key.shape[2], block_k))
    labels = normal(_labels(query.detach(), key.detach(), num_critical, num_negligible, block_q, block_k))
    return ranked_map(labels, block_q, block_k, query.shape[2], key.shape[2], num_critical, num_negligible)


def class_sizes(critical_ratio: float, negligible_ratio: float, key_blocks: int) -> tuple[int, int]:
    """How many of a row's key blocks are critical, and how many are negligible."""
    num_critical = max(1, torch.sym_int(critical_ratio * key_blocks))
    num_negligible = min(torch.sym_int(negligible_ratio * key_blocks), key_blocks - num_critical)
    return num_critical, num_negligible


def labels_by_rank(scores: Tensor, num_critical: int | Tensor, num_negligible: int) -> Tensor:
    """Cut each row's ranking in three: `scores` (B, H, Tq, Tk) -> labels of the same shape, int8. [Eq. 3]

    The order is stable and descending. `num_critical` may differ from row to row, (B, H, Tq, 1). Where the two numbers
    overlap, a block is critical.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    # [Eq. 3] [Alg. 1 L6] The class of each rank, and then each block gets that of its own.
    rank = torch.arange(scores.shape[-1], device=scores.device)
    last = torch.where(rank >= scores.shape[-1] - num_negligible, NEGLIGIBLE, MARGINAL)
    by_rank = torch.where(rank < num_critical, CRITICAL, last).to(torch.int8)
    return torch.empty_like(order, dtype=torch.int8).scatter_(-1, order, by_rank.expand_as(order))


# One operator to compilers: whether N is a multiple of the block size is then no question to an exported graph.
@operator("labels")
def _labels(query: Tensor, key: Tensor, num_critical: int, num_negligible: int, block_q: int, block_k: int) -> Tensor:
    if query.is_cuda and backends.is_usable("triton"):  # in float64, faster than the torch code below
        from .backends.triton.classify import classify

        return classify(query, key, num_critical, num_negligible, block_q, block_k)
    scores = block_scores(query, key, block_q=block_q, block_k=block_k)  # (B, H, Tq, Tk) [Alg. 1 L5]
    return labels_by_rank(scores, num_critical, num_negligible)


@torch.library.register_fake(_labels)
def _(query: Tensor, key: Tensor, num_critical: int, num_negligible: int, block_q: int, block_k: int) -> Tensor:
    blocks = num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k)
    return query.new_empty(*query.shape[:2], *blocks, dtype=torch.int8)


fold_into_batch(_labels)


# --- the map ---------------------------------------------------------------------------------------------------------


def _positions(member: Tensor, capacity: int) -> Tensor:
    """For each row of a boolean (..., T), the indices of its members in ascending order, (..., capacity) int32.

    Rows with fewer members are filled up with zeros, which are never read.
    """
    # Every member knows its place by counting; non-members write to one slot too many, which is cut off.
    slot = torch.where(member, member.cumsum(-1) - 1, capacity)
    index = torch.arange(member.shape[-1], dtype=torch.int32, device=member.device).expand(member.shape)
    out = torch.zeros(*member.shape[:-1], capacity + 1, dtype=torch.int32, device=member.device)
    return out.scatter_(-1, slot, index)[..., :capacity].contiguous()


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The class of every pair of a query block and a key block, and the index lists that kernels walk along.

    The values of labels are read once, when the map is made. Where they cannot be read (under torch.compile, while a
    CUDA graph is captured, on the meta device), they are not checked, and without `num_critical` C is Tk.

    Args:
        labels: (B, H, Tq, Tk) int8; 1 critical, 0 marginal, -1 negligible. The paper's M_c. Not to be changed in place.
        block_q, block_k: tokens per query block and per key block.
        query_length, key_length: Nq and Nk; the last block of each may be partial.
        num_critical: number of critical blocks in every row, where it is known; None: it is counted, rows may differ.

    Raises:
        TypeError: labels is not a dense int8 tensor, or a size is not an int.
        ValueError: a size is below 1, labels does not fit the lengths, holds another value, or has rows with another
            number of critical blocks than num_critical. Or, when the map is used: labels was changed in place.
    """

    labels: Tensor
    block_q: int
    block_k: int
    query_length: int
    key_length: int
    num_critical: int | None = None

    max_critical: int = field(init=False)
    """C, the largest number of critical blocks in a row, at least 1."""
    is_uniform: bool = field(init=False, repr=False)
    """Whether every query block is known to have exactly C critical blocks."""
    has_marginal: bool = field(init=False, repr=False)
    """False where no block is known to be marginal: there is no linear branch then."""
    _version: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int8:
            got = self.labels.dtype if isinstance(self.labels, Tensor) else type(self.labels).__name__
            raise TypeError(f"labels must be an int8 tensor, got {got}")
        check_layout("labels", self.labels)
        for name in ("block_q", "block_k", "query_length", "key_length"):
            check_block_size(name, getattr(self, name))
        expected = num_blocks(self.query_length, self.block_q), num_blocks(self.key_length, self.block_k)
        if self.labels.dim() != 4 or tuple(self.labels.shape[2:]) != expected:
            raise ValueError(
                f"labels must have shape (batch, heads, {expected[0]}, {expected[1]}) for query_length "
                f"{self.query_length} in blocks of {self.block_q} and key_length {self.key_length} in blocks of "
                f"{self.block_k}, got {tuple(self.labels.shape)}"
            )
        if 0 in self.labels.shape:
            raise ValueError(f"labels must have no empty dimension, got shape {tuple(self.labels.shape)}")
        object.__setattr__(self, "labels", normal(self.labels))
        least, most, has_marginal = self._count()
        object.__setattr__(self, "max_critical", max(1, most))
        object.__setattr__(self, "is_uniform", least == self.max_critical)
        object.__setattr__(self, "has_marginal", has_marginal)
        object.__setattr__(self, "_version", version(self.labels))

    def _count(self) -> tuple[int, int, bool]:
        """Check what labels holds; the fewest and the most critical blocks in a row, and if any block is marginal."""
        num_key_blocks = self.labels.shape[3]
        given = self.num_critical
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
                got = f"{shown(given)} of type {type(given).__name__}"
                raise TypeError(f"num_critical must be an int or None, got {got}")
            if not 0 <= given <= num_key_blocks:
                got = shown(given)
                raise ValueError(f"num_critical must be between 0 and the {num_key_blocks} key blocks, got {got}")
        if not readable(self.labels):
            return (0, num_key_blocks, True) if given is None else (given, given, True)
        counts = (self.labels == CRITICAL).sum(-1)
        bounds = [*self.labels.aminmax(), *counts.aminmax(), (self.labels == MARGINAL).any()]
        low, high, least, most, marginal = torch.stack([bound.long() for bound in bounds]).tolist()  # one wait
        if low < NEGLIGIBLE or high > CRITICAL:
            raise ValueError(f"labels must hold only 1, 0 and -1, got values from {low} to {high}")
        if given is not None and not least == most == given:
            raise ValueError(
                f"num_critical must be the number of critical blocks in every row of labels, or None; got {given} for "
                f"rows with {least} to {most}"
            )
        return least, most, bool(marginal)

    def require_unchanged(self) -> None:
        """Raise ValueError if labels was changed in place since: what was read then does not hold any more."""
        if None not in (seen := (self._version, version(self.labels))) and seen[0] != seen[1]:
            raise ValueError("labels must not be changed in place after a BlockMap was made of it: make a new BlockMap")

    @property
    def _critical(self) -> Tensor:
        self.require_unchanged()
        return self.labels == CRITICAL

    @property
    def kv_num_blocks(self) -> Tensor:
        """Number of critical key blocks of each query block, (B, H, Tq) int32."""
        return self._critical.sum(-1, dtype=torch.int32)

    @property
    def kv_indices(self) -> Tensor:
        """Critical key blocks of each query block, ascending, (B, H, Tq, C) int32; read the first `kv_num_blocks`."""
        return _positions(self._critical, self.max_critical)

    @property
    def q_offsets(self) -> Tensor:
        """Where each key block's list starts in `q_indices`, (B, H, Tk + 1) int32; entry j + 1 is where it ends."""
        counts = self._critical.sum(-2)  # (B, H, Tk)
        return torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))

    @property
    def q_indices(self) -> Tensor:
        """Query blocks to which a key block is critical, ascending, one list after the other, (B, H, Tq * C) int32."""
        num_query_blocks = self.labels.shape[2]
        member = self._critical.mT.flatten(2)  # (B, H, Tk * Tq): key block by key block
        return _positions(member, num_query_blocks * self.max_critical) % num_query_blocks

    @property
    def sparsity(self) -> float:
        """1 - share of critical blocks, the paper's "sparsity". Reads the data of a map whose rows may differ."""
        if self.is_uniform:
            return 1 - self.max_critical / self.labels.shape[-1]
        return 1 - int(self._critical.sum()) / self.labels.numel()

    def to(self, device: torch.device | str) -> BlockMap:
        """The same map on another device; TypeError or ValueError if `device` names none that torch can use here."""
        device = find_device("device", device)
        self.require_unchanged()
        _, *rest = _parts(self)
        return trusted_map(self.labels.to(device), *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        self.require_unchanged()
        return trusted_map, _parts(self)

    def to_dense(self) -> Tensor:
        """The class of every token pair, (B, H, Nq, Nk) int8. For checks and pictures: it is N x N."""
        self.require_unchanged()
        i = torch.arange(self.query_length, device=self.labels.device) // self.block_q  # the block of each token
        j = torch.arange(self.key_length, device=self.labels.device) // self.block_k
        return self.labels[:, :, i[:, None], j]

    def to_flex(self) -> BlockMask:
        """The critical blocks as a FlexAttention `BlockMask`; its eager form ignores blocks, so `mask_mod` is set."""
        from torch.nn.attention.flex_attention import BlockMask

        labels, block_q, block_k = self.labels, self.block_q, self.block_k

        def is_critical(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return labels[b, h, q // block_q, k // block_k] == CRITICAL

        return BlockMask.from_kv_blocks(
            self.kv_num_blocks,
            _positions(self._critical, labels.shape[-1]),  # flex wants the full width
            BLOCK_SIZE=(block_q, block_k),
            mask_mod=is_critical,
            seq_lengths=(self.query_length, self.key_length),
        )


def check_block_map(block_map: object) -> None:
    """Raise TypeError unless it is a `BlockMap`."""
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map must be a sla_ref.BlockMap, got {type(block_map).__name__}")


def trusted_map(
    labels: Tensor,
    block_q: int,
    block_k: int,
    query_length: int,
    key_length: int,
    max_critical: int,
    is_uniform: bool,
    has_marginal: bool,
) -> BlockMap:
    """A map of parts that are known to fit: nothing is checked and no data is read."""
    block_map = object.__new__(BlockMap)
    num_critical = max_critical if is_uniform else None
    sizes = block_q, block_k, query_length, key_length
    values = (labels, *sizes, num_critical, max_critical, is_uniform, has_marginal, version(labels))
    for name, value in zip(BlockMap.__dataclass_fields__, values, strict=True):
        object.__setattr__(block_map, name, value)  # the dataclass is frozen
    return block_map


def ranked_map(
    labels: Tensor,
    block_q: int,
    block_k: int,
    query_length: int,
    key_length: int,
    num_critical: int,
    num_negligible: int,
) -> BlockMap:
    """A trusted map whose rows all have these numbers of critical and negligible blocks."""
    # Under a compiler the numbers may be symbols, and a graph would be tied to the answer.
    has_marginal = torch.compiler.is_compiling() or bool(num_critical + num_negligible < labels.shape[3])
    return trusted_map(labels, block_q, block_k, query_length, key_length, num_critical, True, has_marginal)


def _parts(block_map: BlockMap) -> tuple[Any, ...]:
    """The arguments of `trusted_map`."""
    sizes = block_map.block_q, block_map.block_k, block_map.query_length, block_map.key_length
    return block_map.labels, *sizes, block_map.max_critical, block_map.is_uniform, block_map.has_marginal


def readable(labels: Tensor) -> bool:
    """Whether values can be read here and now."""
    if torch.compiler.is_compiling() or labels.is_meta:
        return False
    return not (labels.is_cuda and torch.cuda.is_current_stream_capturing())


def normal(labels: Tensor) -> Tensor:
    """A copy if labels was made in inference mode: autograd keeps no such tensor, and nobody counts its changes."""
    if torch.compiler.is_compiling() or not labels.is_inference():
        return labels
    with torch.inference_mode(False):
        return labels.clone()


def version(tensor: Any) -> int | None:
    """How often the tensor was changed in place; None where torch does not count, or not while it compiles."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return tensor._version


# To torch.export and torch.func, a map is a container of one tensor.
pytree.register_pytree_node(
    BlockMap,
    lambda block_map: ([block_map.labels], _parts(block_map)[1:]),
    lambda labels, rest: trusted_map(*labels, *rest),
    flatten_with_keys_fn=lambda block_map: ([(pytree.GetAttrKey("labels"), block_map.labels)], _parts(block_map)[1:]),
    serialized_type_name="sla_ref.BlockMap",
    to_dumpable_context=list,  # JSON has no tuples
    from_dumpable_context=tuple,
)
