"""Context parallelism after DeepSpeed-Ulysses: ranks share out the tokens, and for attention the heads.

    tokens = split_tokens(tokens, dim=1)                     # (B, N, C) -> this rank's (B, N / P, C)
    ...                                                      # what works token by token needs nothing
    out = ulysses_attention(layer, query, key, value)        # (B, H, N / P, D) each, on P ranks
    ...
    tokens = gather_tokens(tokens, dim=1)                    # (B, N / P, C) -> (B, N, C), on every rank

      tokens ->                all-to-all              tokens ->
    h  0 0 1 1                                       h  0 0 0 0
    e  0 0 1 1     rank 0: all heads, half the       e  0 0 0 0     rank 0: half the heads,
    a  0 0 1 1     tokens; rank 1 the other half     a  1 1 1 1     all tokens
    d  0 0 1 1                                       d  1 1 1 1

Heads know nothing of each other, so each rank's attention is that of one process, for its heads. N need not be
divisible by P: the first N mod P ranks have one token more.

**Gradients.** The three functions are differentiated as what they are, so backward on all ranks gives the derivative of
the *sum* of all ranks' losses, each rank a part of it. DistributedDataParallel and FSDP average these parts. Behind
`gather_tokens` every rank has the loss of one process, and the average over P times the same loss is that loss: wrapped
in DDP or FSDP over all ranks, every parameter gets the gradient of one process. That holds for the weights of Proj and
Hedgehog, and for SLA2's alpha, of which each rank uses the numbers of its heads. Without a wrapper, average the
gradients over the ranks yourself. All ranks of a group must be given the same data, noise and times.

**No ring.** A ring hands the keys around, and a rank sees a part of them at a time. SLA ranks all key blocks of a query
block before it knows the classes [Eq. 3], and normalises over all critical and over all marginal keys [Eq. 4] [Eq. 5].
None of this can be said of a part of the keys, so there is no ring here.

**Who compares what.** A collective of unequal sizes never ends, so the ranks have to agree on shapes and dtypes first.
That takes a small all-gather, for which the host waits. `split_tokens` makes one whenever it is called: it sees what
enters the model. The other two functions make one for each new shape, and remember the answer until `split_tokens` is
given another number of tokens N. A rank cannot tell by its own shape that N is another: of 45 tokens and of 46, rank 0
of 2 has 23. Without `split_tokens` nothing is remembered.

One mistake is therefore not caught: tokens that come from `split_tokens` and then change their shape or dtype on some
ranks only. These ranks compare while the others exchange, and all of them wait until the timeout of the group ends it.
If every rank has a new shape, all compare, and all raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import SLAOutput
from ..checks import FLOATS, check_tensors

_MAX_DIMS = 8


@torch.compiler.disable  # what the ranks tell each other is not known to a compiler
def ulysses_attention(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Self-attention over the tokens of all ranks: `attention` runs on this rank's heads and everybody's tokens.

    Args:
        attention: takes query, key, value (B, H / P, N, D), returns (B, H / P, N, D), each head by itself: a
            `SparseLinearAttention`, for example. With `sparse_linear_attention`, take one of its branches.
        query, key, value: (B, H, n, D), this rank's n of N tokens as `split_tokens` gives them.
        group: the P ranks that the tokens are split between; all ranks if None.

    Returns:
        (B, H, n, D), for the same tokens.

    Raises:
        TypeError, ValueError: a tensor has the wrong type, shape, dtype or device, attention returns another one or
            none, group is not a group of this process, or H is not divisible by P; the ranks disagree on shape or
            dtype, or their tokens are not split as `split_tokens` does. In the last case all ranks raise the same
            error. The ranks compare each shape once; the text at the top of this module says what that cannot find.
    """
    check_tensors(query=query, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[2] != query.shape[2]:
            raise ValueError(f"{name} must have query's number of tokens {query.shape[2]}, got {tensor.shape[2]}")
    ranks = check_heads(query.shape[1], group)
    lengths = _lengths("query", query, 2, group)
    mine = [query.shape[2]] * ranks

    # One exchange for all three. What rank 0 gets comes first, and a token's q, k and v lie side by side.
    parts = (each.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4) for each in (query, key, value))
    rows = torch.stack([*parts], dim=2).flatten(0, 1)  # (P n, 3, B, H / P, D)
    arrived = _AllToAll.apply(rows, mine, lengths, group)  # (N, 3, B, H / P, D)
    query, key, value = arrived.permute(1, 2, 3, 0, 4)
    out = attention(query, key, value)
    if not isinstance(out, Tensor):
        hint = "; take one of its branches" if isinstance(out, SLAOutput) else ""
        raise TypeError(f"attention must return a tensor, got {type(out).__name__}{hint}")
    if out.shape != query.shape:
        raise ValueError(f"attention must return a tensor of shape {tuple(query.shape)}, got {tuple(out.shape)}")
    rows = _AllToAll.apply(out.permute(2, 0, 1, 3), lengths, mine, group)  # (P n, B, H / P, D)
    # The heads of all ranks side by side: (B, n, P, H / P, D), in this order in memory, as most models go on with it.
    return rows.unflatten(0, (ranks, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


@torch.compiler.disable
def split_tokens(tokens: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's part of a tensor that every rank of the group has: (..., N, ...) -> (..., n, ...).

    Raises:
        ValueError: there are fewer tokens than ranks, or the ranks disagree on shape or dtype; all raise it then.
    """
    number, *_ = lengths = _compare("tokens", tokens, dim, group, split=False)
    ranks, rank = len(lengths), dist.get_rank(group)
    if number < ranks:
        raise ValueError(f"tokens must be at least one for each of the {ranks} ranks, got {number} in all")
    whose = group or dist.group.WORLD
    if whose not in _agreed or _agreed[whose].tokens != number:
        _agreed[whose] = _Agreed(number)
    return tokens.tensor_split(ranks, dim)[rank]


@torch.compiler.disable
def gather_tokens(tokens: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """All tokens, on every rank, from each rank's part: (..., n, ...) -> (..., N, ...).

    Raises:
        ValueError: the ranks disagree on shape or dtype, or tokens are not split as `split_tokens` does; all raise it.
    """
    lengths = _lengths("tokens", tokens, dim, group)
    rows = tokens.movedim(dim, 0)
    # Everybody gets what everybody has. The sum over ranks in the backward is that of the copies.
    copies = rows.expand(len(lengths), *rows.shape).flatten(0, 1)
    return _AllToAll.apply(copies, [len(rows)] * len(lengths), lengths, group).movedim(0, dim).contiguous()


def check_heads(heads: int, group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in the group; ValueError unless it divides the number of heads. Errors as `_ranks`."""
    ranks = _ranks(group)
    if heads % ranks:
        raise ValueError(
            f"heads must be divisible by the ranks of the group, which share them out, got {heads} on {ranks} ranks"
        )
    return ranks


def own_heads(heads: int, group: dist.ProcessGroup | None = None) -> slice:
    """Which of all heads `ulysses_attention` gives this rank, for a layer that has parameters for each head.

        attention = partial(layer, heads=own_heads(layer.heads, group))  # a `sla_ref.SLA2Attention`

    Raises:
        TypeError, ValueError: group is not a group of this process, or its ranks cannot share out the heads evenly.
    """
    share = heads // check_heads(heads, group)
    first = dist.get_rank(group) * share
    return slice(first, first + share)


class _AllToAll(torch.autograd.Function):
    """Rows (R, ...) -> (R', ...): the first sent[0] rows go to rank 0, the first received[0] come from it, and so on.

    The gradient goes the same ways back.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.back = (received, sent, group)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _AllToAll.apply(gradient, *ctx.back), None, None, None


def _ranks(group: dist.ProcessGroup | None) -> int:
    """The number of ranks in the group; TypeError unless it is one, ValueError unless this process is in it."""
    if not (group is None or isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if (ranks := dist.get_world_size(group)) < 1:
        raise ValueError("group must hold this process, got one of other ranks")
    return ranks


@dataclass
class _Agreed:
    """What the ranks of a group have found out about each other while the number of tokens is the same."""

    tokens: int
    """N, as `split_tokens` was given it last."""
    lengths: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)
    """The size of a dimension on each rank, by this rank's dtype and shape and the place of the dimension."""


_agreed: WeakKeyDictionary[dist.ProcessGroup | None, _Agreed] = WeakKeyDictionary()


def _lengths(name: str, tensor: Tensor, dim: int, group: dist.ProcessGroup | None) -> list[int]:
    """The size of `dim` on each rank; the ranks compare if this shape is new."""
    _ranks(group)
    world = group or dist.group.WORLD
    agreed = None if world is None else _agreed.get(world)
    shape = (tensor.dtype, tensor.shape, dim) if isinstance(tensor, Tensor) else ()
    if agreed is not None and shape in agreed.lengths:
        return agreed.lengths[shape]
    lengths = _compare(name, tensor, dim, group)
    if agreed is not None and sum(lengths) == agreed.tokens:
        agreed.lengths[shape] = lengths
    return lengths


def _compare(name: str, tensor: Tensor, dim: int, group: dist.ProcessGroup | None, *, split: bool = True) -> list[int]:
    """The size of `dim` on each rank. Whatever else would not fit is an error that all ranks raise."""
    ranks = _ranks(group)
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.dim() > _MAX_DIMS:
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a float tensor of at most {_MAX_DIMS} dimensions, got {got}")
    if dim not in range(-tensor.dim(), tensor.dim()):
        raise ValueError(f"dim must be one of the {tensor.dim()} dimensions of {name}, got {dim!r}")
    place = 2 + range(tensor.dim())[dim]
    mine = [FLOATS.index(tensor.dtype), tensor.dim(), *tensor.shape, *[0] * (_MAX_DIMS - tensor.dim())]
    sent = torch.tensor(mine, device=tensor.device)
    arrived = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(arrived, sent, group=group)
    everybody = [each.tolist() for each in arrived]

    lengths = [each[place] for each in everybody]
    fair = [len(part) for part in torch.empty(sum(lengths), device="meta").tensor_split(len(lengths))]
    wanted = fair if split else lengths[:1] * len(lengths)
    if any(each != [*mine[:place], length, *mine[place + 1 :]] for each, length in zip(everybody, wanted, strict=True)):
        got = "; ".join(
            f"{tuple(each[2 : 2 + each[1]])} {FLOATS[each[0]]} on rank {rank}" for rank, each in enumerate(everybody)
        )
        but = f", apart from dim {place - 2}, split as split_tokens does" if split else ""
        raise ValueError(f"{name} must have one shape and dtype on all ranks{but}; got {got}")
    return lengths
