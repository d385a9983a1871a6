"""The attention layer: both branches, the learnable Proj, and their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .attention import attend, attend_whole, autocast_dtype, prepare
from .block_map import DEFAULT_BLOCK, DEFAULT_CRITICAL_RATIO, DEFAULT_NEGLIGIBLE_RATIO, BlockMap
from .checks import FLOATS, check_block_size, check_choice, check_ratio
from .feature_maps import FeatureMap, Hedgehog, resolve_feature_map
from .protocol import Proj
from .router import resolve_router

PROJ_INITS = {"zero": nn.init.zeros_, "identity": nn.init.eye_}


def project(proj_l: nn.Module, linear: Tensor) -> Tensor:
    """Proj(O^l), in the dtype that Proj gives.

    proj_l may be float32 with bfloat16 tokens. A quantised one is given the tokens as they are. Calling it, rather than
    taking its weight, keeps hooks and adapters.
    """
    weight = getattr(proj_l, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOATS:
        linear = linear.to(weight.dtype)
    projected: Tensor = proj_l(linear)
    return projected


class SparseLinearAttention(nn.Module):
    """Takes the place of softmax attention in a model: O = O^s + Proj(O^l). [Eq. 6]

    Where Proj starts decides what a fresh layer is. From zero, it is just the sparse branch, and fine-tuning grows the
    linear branch: the first gradient reaches Proj only, and one step later it reaches phi through Proj too. From the
    identity, it is the sum of both branches, and both learn from the first step on.

    Args:
        head_dim: D, which query, key and value must have.
        critical_ratio: share of key blocks per query block with exact attention, 0 < critical_ratio <= 1.
        negligible_ratio: share of key blocks per query block that are skipped, 0 <= negligible_ratio <= 1.
        block_q, block_k: tokens per query block and per key block.
        feature_map: phi: "softmax", "elu" (elu + 1), "relu", "hedgehog" (learnable, the layer owns it), or a callable,
            such as `sla_ref.feature_maps.Softmax(4.0)`.
        proj_init: where the weight of Proj starts, "zero" or "identity"; its bias starts at zero.
        router: what chooses the classes: "pooled" (SLA's own, by block means), "learned" (SLA2's), or a callable such
            as a `sla_ref.Router`, called as `sla_ref.classify_blocks`.
        backend: name of a backend, or None for what `sla_ref.set_backend` explains.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        head_dim: int,
        critical_ratio: float = DEFAULT_CRITICAL_RATIO,
        negligible_ratio: float = DEFAULT_NEGLIGIBLE_RATIO,
        *,
        block_q: int = DEFAULT_BLOCK,
        block_k: int = DEFAULT_BLOCK,
        feature_map: str | FeatureMap = "softmax",
        proj_init: str = "zero",
        router: str | Callable[..., BlockMap] = "pooled",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_block_size("head_dim", head_dim)
        check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
        check_ratio("negligible_ratio", negligible_ratio, zero_allowed=True)
        check_block_size("block_q", block_q)
        check_block_size("block_k", block_k)
        check_choice("proj_init", proj_init, PROJ_INITS)
        if backend is not None:
            backends.require_known(backend)
        self.head_dim = head_dim
        self.critical_ratio = critical_ratio
        self.negligible_ratio = negligible_ratio
        self.block_q = block_q
        self.block_k = block_k
        self.feature_map = feature_map
        self.proj_init = proj_init
        self.backend = backend
        self.phi_query: FeatureMap
        self.phi_key: FeatureMap
        if isinstance(feature_map, str) and feature_map == "hedgehog":
            self.phi_query, self.phi_key = Hedgehog(head_dim), Hedgehog(head_dim)
        else:
            self.phi_query = self.phi_key = resolve_feature_map(feature_map)
        self.router: Callable[..., BlockMap] = resolve_router(router, head_dim)
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Proj to where `proj_init` says; a Hedgehog map to a new random start."""
        PROJ_INITS[self.proj_init](self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)
        for phi in (self.phi_query, self.phi_key):
            if isinstance(phi, Hedgehog):
                phi.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_map: BlockMap | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of `query` (B, H, Nq, D) over `key`, `value` (B, H, Nk, D).

        Args:
            query, key, value: as `sla_ref.sparse_linear_attention` takes them.
            block_map: classes to use instead of those that this layer's ratios and block sizes give.
            scale: factor on the scores; 1 / sqrt(D) if None.

        Returns:
            (B, H, Nq, D) in the dtype of query (under autocast in the autocast dtype), whatever proj_l's is.

        Raises:
            TypeError, ValueError, RuntimeError: as `sla_ref.sparse_linear_attention`; ValueError if D is not head_dim.
        """
        prepared = prepare(query, key, value, scale, self.backend)
        if query.shape[-1] != self.head_dim:
            raise ValueError(f"query must have head_dim {self.head_dim}, got shape {tuple(query.shape)}")
        if block_map is None:
            block_map = self._classify(prepared.query, prepared.key)
        if (proj := _weight_and_bias(self.proj_l, prepared.query)) is not None:
            return attend_whole(prepared, self.phi_query, self.phi_key, block_map, proj)  # [Eq. 6]
        sparse, linear, _ = attend(prepared, self.phi_query, self.phi_key, block_map)
        return sparse + project(self.proj_l, linear).to(sparse.dtype)  # [Eq. 6]

    def classify(self, query: Tensor, key: Tensor) -> BlockMap:
        """The block map that `forward` makes of query and key if it is given none.

        Raises:
            TypeError, ValueError: as `sla_ref.sparse_linear_attention`.
        """
        prepared = prepare(query, key, key, None, self.backend)
        return self._classify(prepared.query, prepared.key)

    def _classify(self, query: Tensor, key: Tensor) -> BlockMap:
        ratios = self.critical_ratio, self.negligible_ratio
        return self.router(query, key, *ratios, block_q=self.block_q, block_k=self.block_k)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a new feature_map, which would only be printed: phi is made of it once."""
        if name == "feature_map" and hasattr(self, name):
            raise AttributeError("feature_map cannot be changed: make a new layer")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return (
            f"{self.head_dim}, critical_ratio={self.critical_ratio}, negligible_ratio={self.negligible_ratio}, "
            f"block_q={self.block_q}, block_k={self.block_k}, "
            f"feature_map={self.feature_map!r}, backend={self.backend!r}"
        )


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS_OF_ALL = tuple(f"_global{hooks}" for hooks in _HOOKS)


def _weight_and_bias(proj_l: nn.Module, query: Tensor) -> Proj | None:
    """What `proj_l` computes with on these tokens, in their dtype; None where only calling it gives what it does.

    That is any other class than nn.Linear, such as an adapter's, a quantised or a parametrised one; hooks, its own or
    those of all modules; a forward that was replaced; weights of another dtype than the tokens, where autocast does not
    cast them; and weights that are no plain tensors.
    """
    if type(proj_l) is not nn.Linear or "forward" in (own := vars(proj_l)):
        return None
    if any(own[hooks] for hooks in _HOOKS) or any(getattr(nn.modules.module, hooks) for hooks in _HOOKS_OF_ALL):
        return None
    parts, head_dim = (proj_l.weight, proj_l.bias), query.shape[-1]
    if any(type(part) not in (nn.Parameter, Tensor) or part.shape[-1] != head_dim for part in parts):
        return None
    if query.dtype == autocast_dtype(query):
        return Proj(*(part.to(query.dtype) for part in parts))
    return Proj(*parts) if all(part.dtype == query.dtype for part in parts) else None
