"""Choices of blocks besides SLA's own. Each makes a `BlockMap`, and every backend accepts every map.

A router is whatever can be called as `classify_blocks`, and the `router` of both layers. `Router` puts one together
from three parts: scores, which rank the key blocks of a row; how many of them are critical; and tokens that are
protected from the ranking. `cube_order` changes what a block is instead: it orders a video's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference_sla2
from .block_map import (
    CRITICAL,
    DEFAULT_BLOCK,
    BlockMap,
    block_scores,
    check_block_map,
    class_sizes,
    classify_blocks,
    labels_by_rank,
    normal,
    num_blocks,
    pool_blocks,
    ranked_map,
    readable,
)
from .checks import check_block_size, check_ratio, check_scale, check_slice, check_tensors, shown

# --- scores ----------------------------------------------------------------------------------------------------------


def sub_block_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    parts_q: int = 4,
    parts_k: int = 4,
) -> Tensor:
    """Scores that see inside a block: the log-sum-exp over its parts, each pooled by itself.

    From SGLang's pull request 34148. A block's mean hides a few unusual keys; the mean of a smaller part shows them.
    `functools.partial(sub_block_scores, parts_k=8)` sets the parts. With one part each, these are `block_scores`.

    Args:
        query, key, block_q, block_k: as in `block_scores`.
        parts_q, parts_k: into how many parts query and key blocks are cut. They must divide block_q and block_k.

    Returns:
        (B, H, Tq, Tk) in the units of `block_scores`, that is before the factor 1 / sqrt(D), without gradient.

    Raises:
        TypeError, ValueError: as `block_scores`; a number of parts is not an int >= 1, or does not divide its block.
    """
    check_tensors(query=query, key=key)
    for name, parts, block in (("parts_q", parts_q, block_q), ("parts_k", parts_k, block_k)):
        check_block_size(name.replace("parts", "block"), block)
        check_block_size(name, parts)
        if block % parts:
            raise ValueError(f"{name} must divide {name.replace('parts', 'block')} {block}, got {parts}")
    root = math.sqrt(query.shape[3])
    scores = block_scores(query, key, block_q=block_q // parts_q, block_k=block_k // parts_k) / root
    query_blocks, key_blocks = num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k)
    missing_q = query_blocks * parts_q - scores.shape[2]  # the last block may have fewer parts
    missing_k = key_blocks * parts_k - scores.shape[3]
    scores = F.pad(scores, (0, missing_k, 0, missing_q), value=-torch.inf)
    return scores.unflatten(3, (key_blocks, parts_k)).unflatten(2, (query_blocks, parts_q)).logsumexp((3, 5)) * root


class _Matrix(nn.Linear):
    """Multiplies in the dtype of the means, float64: the identity then changes no bit, and no ranking."""

    def forward(self, means: Tensor) -> Tensor:
        return means @ self.weight.to(means.dtype).mT


class LearnedScores(nn.Module):
    """SLA2's scores, `proj_q(pool(Q)) proj_k(pool(K))^T` with two learned D x D matrices. [SLA2 Eq. 16]

    Both start at the identity, where the scores are those of `block_scores`. All heads share them. The gradient reaches
    both matrices, and query and key if they ask for one.

    Args:
        head_dim: D.

    Raises:
        TypeError, ValueError: head_dim is not an int of at least 1.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        check_block_size("head_dim", head_dim)
        self.proj_q = _Matrix(head_dim, head_dim, bias=False, dtype=torch.float32)
        self.proj_k = _Matrix(head_dim, head_dim, bias=False, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets both matrices to the identity."""
        nn.init.eye_(self.proj_q.weight)
        nn.init.eye_(self.proj_k.weight)

    def forward(
        self, query: Tensor, key: Tensor, *, block_q: int = DEFAULT_BLOCK, block_k: int = DEFAULT_BLOCK
    ) -> Tensor:
        """Arguments and result as `block_scores`, but with a gradient."""
        check_tensors(query=query, key=key)
        if query.shape[3] != (head_dim := self.proj_q.in_features):
            raise ValueError(f"query must have head_dim {head_dim}, got shape {tuple(query.shape)}")
        check_block_size("block_q", block_q)
        check_block_size("block_k", block_k)
        return self.proj_q(pool_blocks(query, block_q)) @ self.proj_k(pool_blocks(key, block_k)).mT


# --- the router ------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """A choice of blocks put together from scores, a number of critical blocks and protected tokens.

    It is called as `classify_blocks`, and a fresh `Router()` is `classify_blocks`. A layer accepts it as `router=`.

        SparseLinearAttention(64, router=Router(sub_block_scores, top_p=0.9, protected_keys=slice(0, 77)))

    Args:
        scores: what ranks the blocks. `block_scores`, the product of the means (SLA); `sub_block_scores` (SGLang);
            `LearnedScores(head_dim)` (SLA2); or any callable with the arguments and the result of `block_scores`.
        top_p: at least as many blocks of a row are critical, best first, as hold this share of the softmax over its
            scores / sqrt(D), 0 < top_p <= 1. This is top-k united with top-p (SpargeAttention2, arXiv 2602.13515). With
            a critical_ratio of less than one block, only top-p decides. None: top-k, only the critical_ratio decides.
        protected_queries: query tokens that attend to everything exactly: all key blocks are critical for their blocks.
            A boolean tensor (Nq,), or a slice. None: no token.
        protected_keys: key tokens to which every query attends exactly: their blocks are critical for all query blocks.
            A boolean tensor (Nk,), or a slice. None: no token.

    With top_p or protected tokens, rows differ in their number of critical blocks. The map then waits for the device
    once, to count them.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        scores: Callable[..., Tensor] = block_scores,
        *,
        top_p: float | None = None,
        protected_queries: Tensor | slice | None = None,
        protected_keys: Tensor | slice | None = None,
    ) -> None:
        super().__init__()
        if not callable(scores):
            raise TypeError(f"scores must be a callable, as block_scores, got {type(scores).__name__}")
        if top_p is not None:
            check_ratio("top_p", top_p, zero_allowed=False)
        self.scores = scores
        self.top_p = top_p
        self.protected_queries: Tensor | slice | None
        self.protected_keys: Tensor | slice | None
        for name, tokens in (("protected_queries", protected_queries), ("protected_keys", protected_keys)):
            _check_protected(name, tokens)
            if isinstance(tokens, Tensor):
                self.register_buffer(name, tokens, persistent=False)  # moves with the layer, is not saved with it
            else:
                setattr(self, name, tokens)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        critical_ratio: float,
        negligible_ratio: float,
        *,
        block_q: int = DEFAULT_BLOCK,
        block_k: int = DEFAULT_BLOCK,
    ) -> BlockMap:
        """The block map; arguments and result as those of `classify_blocks`.

        Raises:
            TypeError, ValueError: as `classify_blocks`; protected tokens do not fit the lengths or leave no token.
            RuntimeError: the scores ask for a gradient, which a hard choice cannot give them.
        """
        protected = {"protected_queries": self.protected_queries, "protected_keys": self.protected_keys}
        if self.scores is block_scores and self.top_p is None:  # on a GPU, in a kernel
            block_map = classify_blocks(query, key, critical_ratio, negligible_ratio, block_q=block_q, block_k=block_k)
            return protect(block_map, **protected)
        check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
        check_ratio("negligible_ratio", negligible_ratio, zero_allowed=True)
        scores = self._score(query, key, block_q, block_k, detached=True)
        if scores.requires_grad:
            raise RuntimeError(
                "a hard choice of blocks gives the router no gradient. Train the router with the soft one (stage 1, "
                "SLA2Attention's tau), then freeze it: layer.router.requires_grad_(False)"
            )
        num_critical, num_negligible = class_sizes(critical_ratio, negligible_ratio, scores.shape[3])
        sizes = (block_q, block_k, query.shape[2], key.shape[2])
        if self.top_p is None:
            labels = normal(labels_by_rank(scores, num_critical, num_negligible))
            block_map = ranked_map(labels, *sizes, num_critical, num_negligible)
        else:
            shares = torch.softmax(scores / math.sqrt(query.shape[3]), dim=-1).sort(dim=-1, descending=True).values
            before = shares.cumsum(-1) - shares  # the share of all better blocks
            enough = (before < self.top_p).sum(-1, keepdim=True).clamp(min=num_critical)  # (B, H, Tq, 1)
            block_map = BlockMap(labels_by_rank(scores, enough, num_negligible), *sizes)
        return protect(block_map, **protected)

    def soft(
        self,
        query: Tensor,
        key: Tensor,
        critical_ratio: float,
        tau: float = 0.1,
        *,
        block_q: int = DEFAULT_BLOCK,
        block_k: int = DEFAULT_BLOCK,
    ) -> Tensor:
        """SLA2's soft choice, which the router is trained with. [SLA2 Eq. 17]

        Args:
            query, key, critical_ratio, block_q, block_k: as in `classify_blocks`.
            tau: temperature, a finite number > 0. The smaller, the closer to the hard choice.

        Returns:
            How much of each pair belongs to the sparse branch, (B, H, Tq, Tk), float64 (float32 on a device without
            it). A row sums to its number of critical blocks, before protected tokens are added with a 1. The gradient
            reaches what the scores' own reaches.

        Raises:
            TypeError, ValueError: as `forward`; the router has a top_p, which fixes no sum.
        """
        check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
        check_scale(tau, "tau")
        if self.top_p is not None:
            raise ValueError(f"top_p must be None for a soft choice, whose rows have a fixed sum, got {self.top_p}")
        scores = self._score(query, key, block_q, block_k)
        num_critical, _ = class_sizes(critical_ratio, 0.0, scores.shape[3])
        rows = _protected_blocks("protected_queries", self.protected_queries, query.shape[2], block_q, query.device)
        columns = _protected_blocks("protected_keys", self.protected_keys, key.shape[2], block_k, query.device)
        return reference_sla2.soft_top_k(scores, num_critical, float(tau)).masked_fill(rows[:, None] | columns, 1.0)

    def _score(self, query: Tensor, key: Tensor, block_q: int, block_k: int, *, detached: bool = False) -> Tensor:
        """What `scores` makes of checked arguments; TypeError or ValueError unless that is a score for each pair."""
        check_tensors(query=query, key=key)
        check_block_size("block_q", block_q)
        check_block_size("block_k", block_k)
        if detached:
            query, key = query.detach(), key.detach()
        scores = self.scores(query, key, block_q=block_q, block_k=block_k)
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores must return a torch.Tensor, got {type(scores).__name__}")
        expected = (*query.shape[:2], num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k))
        if tuple(scores.shape) != expected or not scores.is_floating_point():
            raise ValueError(f"scores must return floats of shape {expected}, got {scores.dtype} {tuple(scores.shape)}")
        return scores

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        parts = [] if isinstance(self.scores, nn.Module) else [getattr(self.scores, "__name__", repr(self.scores))]
        settings = {"top_p": self.top_p}
        settings |= {name: getattr(self, name) for name in ("protected_queries", "protected_keys")}
        for name, value in settings.items():
            if value is not None:
                parts.append(f"{name}={f'{value.sum()} tokens' if isinstance(value, Tensor) else value}")
        return ", ".join(parts)


def resolve_router(router: str | Callable[..., BlockMap], head_dim: int) -> Callable[..., BlockMap]:
    """The callable behind a name, "pooled" or "learned"; a callable is returned as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(router, str):
        if router not in ("pooled", "learned"):
            raise ValueError(f"router must be 'pooled', 'learned' or a callable, got {shown(router)}")
        return Router() if router == "pooled" else Router(LearnedScores(head_dim))
    if not callable(router):
        raise TypeError(f"router must be 'pooled', 'learned' or a callable, got {type(router).__name__}")
    return router


# --- protected tokens ------------------------------------------------------------------------------------------------


def protect(
    block_map: BlockMap,
    *,
    protected_queries: Tensor | slice | None = None,
    protected_keys: Tensor | slice | None = None,
) -> BlockMap:
    """The same map with the blocks of some tokens critical, in addition to those that are.

    For sequences that hold more than one kind of token: text, audio or a first frame next to the video. Such tokens are
    few, and a ranking by means can lose them. SGLang's pull request 36318 keeps them exact in this way.

    Args:
        block_map: any block map; it stays as it is.
        protected_queries: tokens whose query blocks attend to all key blocks exactly, a boolean (Nq,) or a slice;
            None: no token.
        protected_keys: tokens whose key blocks are critical for all query blocks, a boolean (Nk,) or a slice;
            None: no token. A block with one such token is protected as a whole.

    Returns:
        A new map, or the same one where nothing is to be protected.

    Raises:
        TypeError, ValueError: block_map is not a map; protected tokens have the wrong type, dtype or length, or are all
            tokens. Then every block would be critical, whatever ratio has been asked for: a critical_ratio of 1 says
            that.
    """
    check_block_map(block_map)
    if protected_queries is None and protected_keys is None:
        return block_map
    block_map.require_unchanged()
    sizes = (block_map.block_q, block_map.block_k, block_map.query_length, block_map.key_length)
    block_q, block_k, query_length, key_length = sizes
    device = block_map.labels.device
    rows = _protected_blocks("protected_queries", protected_queries, query_length, block_q, device)
    columns = _protected_blocks("protected_keys", protected_keys, key_length, block_k, device)
    return BlockMap(block_map.labels.masked_fill(rows[:, None] | columns, CRITICAL), *sizes)


def _check_protected(name: str, tokens: Tensor | slice | None) -> None:
    if isinstance(tokens, slice):
        check_slice(name, tokens)
    if tokens is None or isinstance(tokens, slice):
        return
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.bool:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be a boolean tensor, a slice or None, got {got}")
    if tokens.dim() != 1:
        raise ValueError(f"{name} must have shape (tokens,), got {tuple(tokens.shape)}")


def _protected_blocks(
    name: str, tokens: Tensor | slice | None, length: int, block: int, device: torch.device
) -> Tensor:
    """Which blocks hold a protected token, (T,) bool."""
    _check_protected(name, tokens)
    block = min(block, length)  # the only block of a sequence may be far longer than it
    padded = torch.zeros(num_blocks(length, block) * block, dtype=torch.bool, device=device)
    if isinstance(tokens, slice):
        padded[:length][tokens] = True
    elif tokens is not None:
        if len(tokens) != length:
            raise ValueError(f"{name} must have one boolean for each of {length} tokens, got {len(tokens)}")
        padded[:length] = tokens.to(device)
    if tokens is not None and readable(padded) and bool(padded[:length].all()):
        raise ValueError(
            f"{name} must leave a token out, got all {length}: every block would be critical, and no ratio would "
            "matter. A critical_ratio of 1 says that"
        )
    return padded.view(-1, block).any(1)


# --- the order of tokens ---------------------------------------------------------------------------------------------


_MOST_TOKENS = 2**48  # torch counts elements and bytes in 64 bits


def cube_order(frames: int, height: int, width: int, cube: tuple[int, int, int]) -> Tensor:
    """An order of a video's tokens in which cubes of neighbours, not pieces of lines, make up a block.

    From Sliding Tile Attention (arXiv 2502.04507). Attention does not ask for the order of its tokens, so the order is
    changed around the layer, best once for a whole model, after the positions have been added:

        order = cube_order(frames, height, width, (4, 4, 4))
        out = layer(query[:, :, order], key[:, :, order], value[:, :, order])[:, :, order.argsort()]

    A block is one cube where the sides divide the video's and their product is the block size. Elsewhere cubes at the
    edge are smaller, and blocks straddle them.

    Args:
        frames, height, width: the grid of tokens, numbered with width as the fastest axis.
        cube: tokens along each side of a cube, in the same order.

    Returns:
        (frames * height * width,) int64: which token comes in each place. Cubes, and the tokens inside one, keep the
        order of the grid.

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or cube does not have three of them.
    """
    grid = {"frames": frames, "height": height, "width": width}
    if not isinstance(cube, tuple) or len(cube) != 3:
        raise TypeError(f"cube must be a tuple of three ints, got {shown(cube)}")
    for name, size in (*grid.items(), *(("cube", side) for side in cube)):
        check_block_size(name, size)
    if (tokens := math.prod(grid.values())) > _MOST_TOKENS:
        raise ValueError(f"frames, height and width must make at most {_MOST_TOKENS} tokens, got {shown(tokens)}")
    number = torch.zeros(1, dtype=torch.int64)
    for size, side in zip(grid.values(), cube, strict=True):
        along = torch.arange(size) // side
        number = (number[:, None] * num_blocks(size, side) + along).flatten()  # of each token's cube
    return number.argsort(stable=True)
