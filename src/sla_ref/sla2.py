"""SLA2's attention layer (arXiv 2602.12675): both branches, mixed by a weight instead of added through Proj."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, reference_sla2
from .attention import Prepared, attend, prepare, without_autocast
from .block_map import (
    CRITICAL,
    DEFAULT_BLOCK,
    DEFAULT_CRITICAL_RATIO,
    MARGINAL,
    NEGLIGIBLE,
    BlockMap,
    num_blocks,
    pool_blocks,
)
from .checks import check_block_size, check_bool, check_choice, check_ratio, check_scale, check_slice, shown
from .feature_maps import FeatureMap, Hedgehog, resolve_feature_map, softmax
from .module import project
from .router import LearnedScores, Router, resolve_router

ALPHAS = ("head", "block", "token", "block_means", "ideal")

ALPHA_START = 0.9
"""The alpha of a fresh layer where alpha is learned."""


class SLA2Attention(nn.Module):
    """Takes the place of softmax attention in a model: O = alpha O^s + (1 - alpha) O^l. [SLA2 Eq. 13]

    Both branches are averages of values, each normalised over its own keys. alpha says how much of a row's softmax is
    critical, between 0 and 1, so it should differ from row to row. All forms are sigmoid(a), with

    | alpha | a, for a row q of head h | cost | what it cannot express |
    |---|---|---|---|
    | "head" | a number for each head | none | any difference between rows |
    | "block" | a number for each head and query block | none | anything that depends on content; another length |
    | "token" | w_h . q + b_h | N D | anything that depends on the keys, or is not linear in q |
    | "block_means" | lse_critical - lse_m, nothing learned | Nq Tk D | differences between the keys of a block |
    | "ideal" | lse_critical - lse_marginal, nothing learned | Nq Nk D | nothing: it is the softmax's own share |

    - The paper prints alpha as one number for each token in Equation 13 and for each query block in Algorithm 2, with
      no word on heads. As a parameter, that is "block". Each number belongs to one place in the video, so the layer
      works at one length only, `query_length`, and learns nothing for any other.
    - "head" and "token" have parameters of one size and run at any length. But a longer sequence has more marginal keys
      in the denominator, which neither can see: what they have learned holds for about the length they were trained at.
    - "block_means" and "ideal" count the keys that there are, so they follow the length by themselves. "block_means"
      takes `lse_m = log sum_j n_j exp(scale q . mean(K_j))` over the marginal blocks j, of n_j keys each. The mean of
      exponentials is at least the exponential of the mean, so this never overestimates what is marginal. It
      underestimates it the more, the less uniform the keys of a block are. For the backward, it keeps a number for each
      query and key block, 1 / block_k of an attention map; activation checkpointing drops it.
    - "ideal" runs the operator once more with the marginal keys as critical ones, which takes O(N D) memory and the
      time of full attention. It is for studies: with it, only O^l itself is approximate.

    The gradient goes through alpha in every form, by the gradient of the operator's lse where alpha needs it. A row
    without critical block has alpha = 0, one without marginal block alpha = 1.

    A learned router needs two stages, as in the paper. In stage 1, `layer(query, key, value, tau=0.1)` chooses blocks
    softly, and the gradient reaches the router; match it to full attention. Then freeze it,
    `layer.router.requires_grad_(False)`, and train model and alpha with the hard choice. A hard choice gives a router
    no gradient, so one that still asks for it raises RuntimeError. Frozen without stage 1, it is SLA's own choice. tau
    is in units of `block_scores`: the paper's 0.1 leaves no gradient where scores are far larger.

    alpha starts at 0.9 where it is learned ("head", "block", and "token" with w_h = 0), Proj and a learned router at
    the identity.

    Args:
        head_dim: D, which query, key and value must have.
        heads: H, which they must have.
        critical_ratio: share of key blocks per query block with exact attention, 0 < critical_ratio <= 1. All other
            blocks are marginal, none is negligible.
        alpha: "head", "block", "token", "block_means" or "ideal".
        router: as in `sla_ref.SparseLinearAttention`.
        query_length: Nq, for alpha="block", which needs it and is bound to it; None for any other.
        proj: whether O^l goes through SLA's learnable Proj first. The paper has none.
        block_q, block_k: tokens per query block and per key block. The paper's are 128 and 64.
        feature_map: phi: "softmax", "elu" (elu + 1), "relu", "hedgehog" (learnable, the layer owns it), or a callable.
        backend: name of a backend, or None for what `sla_ref.set_backend` explains.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        head_dim: int,
        heads: int,
        critical_ratio: float = DEFAULT_CRITICAL_RATIO,
        *,
        alpha: str = "head",
        router: str | Callable[..., BlockMap] = "pooled",
        query_length: int | None = None,
        proj: bool = False,
        block_q: int = DEFAULT_BLOCK,
        block_k: int = DEFAULT_BLOCK,
        feature_map: str | FeatureMap = "softmax",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_block_size("head_dim", head_dim)
        check_block_size("heads", heads)
        check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
        check_block_size("block_q", block_q)
        check_block_size("block_k", block_k)
        check_choice("alpha", alpha, ALPHAS)
        if alpha == "block":
            check_block_size("query_length", query_length)
        elif query_length is not None:
            got = shown(query_length)
            raise ValueError(f"query_length must be None for alpha={alpha!r}, which accepts any, got {got}")
        check_bool("proj", proj)
        if backend is not None:
            backends.require_known(backend)
        self.head_dim = head_dim
        self.heads = heads
        self.critical_ratio = critical_ratio
        self.alpha = alpha
        self.query_length = query_length
        self.block_q = block_q
        self.block_k = block_k
        self.feature_map = feature_map
        self.backend = backend
        self.phi_query: FeatureMap
        self.phi_key: FeatureMap
        if isinstance(feature_map, str) and feature_map == "hedgehog":
            self.phi_query, self.phi_key = Hedgehog(head_dim), Hedgehog(head_dim)
        else:
            self.phi_query = self.phi_key = resolve_feature_map(feature_map)
        self.router: Callable[..., BlockMap] = resolve_router(router, head_dim)
        if alpha in ("head", "token"):
            self.alpha_logit = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        if alpha == "token":
            self.alpha_weight = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        if alpha == "block":
            assert query_length is not None
            self.alpha_logit = nn.Parameter(torch.empty(heads, num_blocks(query_length, block_q), dtype=torch.float32))
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32) if proj else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to 0.9; Proj and a learned router to the identity; a Hedgehog map to a new random start."""
        if "alpha_logit" in self._parameters:
            nn.init.constant_(self.alpha_logit, math.log(ALPHA_START / (1 - ALPHA_START)))
        if "alpha_weight" in self._parameters:
            nn.init.zeros_(self.alpha_weight)
        if self.proj_l is not None:
            nn.init.eye_(self.proj_l.weight)
            nn.init.zeros_(self.proj_l.bias)
        for part in (self.phi_query, self.phi_key, getattr(self.router, "scores", None)):
            if isinstance(part, (Hedgehog, LearnedScores)):
                part.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_map: BlockMap | None = None,
        tau: float | None = None,
        scale: float | None = None,
        heads: slice | None = None,
    ) -> Tensor:
        """Attention of `query` (B, H, Nq, D) over `key`, `value` (B, H, Nk, D).

        Args:
            query, key, value: as `sla_ref.sparse_linear_attention` takes them.
            block_map: classes to use instead of those that the router gives. Its negligible blocks are in no branch.
            tau: temperature of the router's soft choice, for stage 1; None: the hard choice. [SLA2 Eq. 17] A soft
                choice puts each pair of blocks into both branches. It is computed by the equations of
                `sla_ref.reference_sla2`, in torch and with N x N memory, whatever the backend.
            scale: factor on the scores; 1 / sqrt(D) if None.
            heads: which of the layer's heads query, key and value have, where several processes share them out: see
                `sla_ref.integrations.ulysses.own_heads`. All if None.

        Returns:
            (B, H, Nq, D) in the dtype of query (under autocast in the autocast dtype).

        Raises:
            TypeError, ValueError, RuntimeError: as `sla_ref.sparse_linear_attention`; TypeError if heads is not a
                slice; ValueError if query has another head_dim, number of heads or, for alpha="block", length than the
                layer, or if tau is given with a block_map or with a router that is not a `sla_ref.Router`; RuntimeError
                if the choice is hard and the router's parameters ask for a gradient.
        """
        sparse, linear, alpha = self.branches(query, key, value, block_map=block_map, tau=tau, scale=scale, heads=heads)
        if self.proj_l is not None:
            linear = project(self.proj_l, linear).to(sparse.dtype)
        # alpha is float32 or better, and so is the sum: 1 - alpha would be lost in a shorter dtype.
        return (alpha[..., None] * sparse + (1 - alpha[..., None]) * linear).to(sparse.dtype)  # [SLA2 Eq. 13]

    def branches(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_map: BlockMap | None = None,
        tau: float | None = None,
        scale: float | None = None,
        heads: slice | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward`, with the same arguments, mixes: O^s, O^l before Proj, and alpha.

        Returns:
            sparse and linear (B, H, Nq, D) in the dtype of the result, alpha (B, H, Nq) in float32 or better.
        """
        heads = slice(None) if heads is None else heads
        prepared = prepare(query, key, value, scale, self.backend)
        self._check_query(query, heads)
        if tau is not None:
            check_scale(tau, "tau")
            if block_map is not None:
                raise ValueError("tau must be None with a block_map, which is a hard choice already")
            with without_autocast(query):
                return self._soft_branches(prepared, tau, heads)
        if block_map is None:
            block_map = self.router(
                prepared.query, prepared.key, self.critical_ratio, 0.0, block_q=self.block_q, block_k=self.block_k
            )
        sparse, linear, lse = attend(prepared, self.phi_query, self.phi_key, block_map)
        with without_autocast(query):  # the logarithms are differences of large numbers: bfloat16 would spoil them
            if self.alpha == "block_means":
                logit = lse - _log_mass_of_means(prepared, block_map, lse.dtype)
            elif self.alpha == "ideal":
                logit = lse - _log_mass(prepared, block_map)
            else:
                logit = self._learned_logit(prepared.query, lse.dtype, heads)
        critical, marginal = block_map.labels == CRITICAL, block_map.labels == MARGINAL
        return sparse, linear, _alpha(logit, critical, marginal, query.shape[2], block_map.block_q)

    def _check_query(self, query: Tensor, heads: slice) -> None:
        if not isinstance(heads, slice):
            raise TypeError(f"heads must be a slice or None, got {type(heads).__name__}")
        check_slice("heads", heads)
        for name, axis, size in (("heads", 1, len(range(self.heads)[heads])), ("head_dim", 3, self.head_dim)):
            if query.shape[axis] != size:
                raise ValueError(f"query must have {name} {size}, got shape {tuple(query.shape)}")
        if self.alpha == "block" and query.shape[2] != self.query_length:
            raise ValueError(
                f"query must have query_length {self.query_length}, to which alpha='block' is bound by a parameter for "
                f"each query block, got shape {tuple(query.shape)}"
            )

    def _learned_logit(self, query: Tensor, dtype: torch.dtype, heads: slice) -> Tensor:
        """The tensor of which alpha is the sigmoid, broadcasting to (B, H, Nq)."""
        logit = self.alpha_logit[heads].to(dtype)
        if self.alpha == "block":
            return logit[:, torch.arange(query.shape[2], device=query.device) // self.block_q]
        if self.alpha == "token":
            return (query.to(dtype) * self.alpha_weight[heads].to(dtype)[:, None]).sum(-1) + logit[:, None]
        return logit[:, None]

    def _soft_branches(self, prepared: Prepared, tau: float, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The equations with a soft mask, in float32 or better."""
        if not isinstance(self.router, Router):
            raise ValueError(f"tau must be None for a router that is not a sla_ref.Router, got {tau!r}")
        blocks = {"block_q": self.block_q, "block_k": self.block_k}
        soft = self.router.soft(prepared.query, prepared.key, self.critical_ratio, tau, **blocks)
        dtype = torch.promote_types(prepared.query.dtype, torch.float32)
        query, key, value = (tensor.to(dtype) for tensor in prepared[:3])
        scale, lengths = prepared.scale, (query.shape[2], key.shape[2])
        mask = reference_sla2.expand(soft.to(dtype), *lengths, **blocks)
        sparse = reference_sla2.sparse_branch(query, key, value, mask, scale)
        features = self.phi_query(query).to(dtype), self.phi_key(key).to(dtype)
        linear = reference_sla2.linear_branch(*features, value, mask)
        if self.alpha == "block_means":
            alpha = reference_sla2.block_means_alpha(query, key, mask, self.block_k, scale)
        elif self.alpha == "ideal":
            alpha = reference_sla2.ideal_alpha(query, key, mask, scale)
        else:
            alpha = _alpha(self._learned_logit(query, dtype, heads), soft > 0, soft < 1, lengths[0], self.block_q)
        return sparse.to(prepared.query.dtype), linear.to(prepared.query.dtype), alpha

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change what the layer has been made of once."""
        if name in ("alpha", "feature_map", "heads", "query_length") and hasattr(self, name):
            raise AttributeError(f"{name} cannot be changed: make a new layer")
        if name == "block_q" and hasattr(self, name) and self.alpha == "block":
            raise AttributeError("block_q cannot be changed with alpha='block': make a new layer")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        bound = f", query_length={self.query_length}" if self.alpha == "block" else ""
        return (
            f"{self.head_dim}, {self.heads}, critical_ratio={self.critical_ratio}, alpha={self.alpha!r}{bound}, "
            f"block_q={self.block_q}, block_k={self.block_k}, "
            f"feature_map={self.feature_map!r}, backend={self.backend!r}"
        )


def _alpha(logit: Tensor, critical: Tensor, marginal: Tensor, query_length: int, block_q: int) -> Tensor:
    """sigmoid(logit), (B, H, Nq); 1 in rows without marginal block, 0 in rows without critical block.

    `logit` broadcasts to (B, H, Nq), `critical` and `marginal` are (B, H, Tq, Tk) bool. The sigmoid's gradient at
    infinity is zero, and the logits that are replaced get none.
    """
    i = torch.arange(query_length, device=logit.device) // block_q
    logit = torch.where(marginal.any(-1)[:, :, i], logit, torch.inf)
    return torch.sigmoid(torch.where(critical.any(-1)[:, :, i], logit, -torch.inf))


def _log_mass_of_means(prepared: Prepared, block_map: BlockMap, dtype: torch.dtype) -> Tensor:
    """log sum_j n_j exp(scale q . mean(K_j)) over the marginal key blocks, (B, H, Nq); -inf in rows without one."""
    query, key, block_q, block_k = prepared.query, prepared.key, block_map.block_q, block_map.block_k
    means = pool_blocks(key, block_k).to(dtype)  # (B, H, Tk, D)
    start = block_k * torch.arange(means.shape[2], device=key.device)
    count = (key.shape[2] - start).clamp(max=block_k)  # (Tk,) the last block may be partial
    scores = prepared.scale * query.to(dtype) @ means.mT + count.to(dtype).log()  # (B, H, Nq, Tk)
    i = torch.arange(query.shape[2], device=key.device) // block_q
    marginal = (block_map.labels == MARGINAL)[:, :, i]
    return scores.masked_fill(~marginal, -torch.inf).logsumexp(-1)


def _log_mass(prepared: Prepared, block_map: BlockMap) -> Tensor:
    """log sum exp(scale q . k) over the marginal keys, (B, H, Nq): the operator's lse, were those the critical ones."""
    labels = torch.where(block_map.labels == MARGINAL, CRITICAL, NEGLIGIBLE).to(torch.int8)
    sizes = (block_map.block_q, block_map.block_k, block_map.query_length, block_map.key_length)
    return attend(prepared, softmax, softmax, BlockMap(labels, *sizes)).lse
