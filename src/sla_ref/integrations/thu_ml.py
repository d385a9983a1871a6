"""The authors' layer, thu-ml/SLA: their arguments and their results, on this package's operator.

    from sla_ref.integrations.thu_ml import SparseLinearAttention  # instead of: from sparse_linear_attention import ...

Their code departs from the paper. Those departures live here and nowhere else in this package.

Official implementation: thu-ml/SLA, sparse_linear_attention/core.py, lines 24 to 105 at d973e55 (branch main) and 24 to
101 at 325cc75 (branch SLA-1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..attention import sparse_linear_attention
from ..block_map import DEFAULT_NEGLIGIBLE_RATIO, classify_blocks
from ..checks import check_block_size, check_bool, check_choice, check_ratio, check_tensors
from ..feature_maps import FeatureMap, resolve_feature_map

VARIANTS = ("main", "SLA-1", "paper")

# What each variant leaves out of the linear branch. "main" has a linear branch of its own, so here all goes.
_NEGLIGIBLE = {"main": 1.0, "SLA-1": 0.0, "paper": DEFAULT_NEGLIGIBLE_RATIO}
_EPSILON = 1e-5


class SparseLinearAttention(nn.Module):
    """thu-ml/SLA's `SparseLinearAttention`; its state_dict has their two names, `proj_l.weight` and `proj_l.bias`.

    | variant | linear branch runs over | added to its denominator |
    |---|---|---|
    | "main", their branch main and TurboDiffusion | all keys, critical ones too | 1e-5 |
    | "SLA-1", their branch of that name | all but the critical blocks | nothing |
    | "paper" | all but the critical blocks and the 10 % negligible ones | nothing |

    Three things differ from their code. At least one block is critical, where theirs has none on short sequences and
    returns NaN. A zero denominator gives zero. Blocks are ranked in float32 or better, so near-ties in half precision
    may be decided otherwise.

    Args:
        head_dim: D, which q, k and v must have.
        topk: share of key blocks per query block with exact attention, 0 < topk <= 1; `critical_ratio` elsewhere here.
        feature_map: phi: "softmax", "elu", "relu", or a callable.
        BLKQ, BLKK: tokens per query block and per key block.
        use_bf16: whether to compute in bfloat16 or in float16, whatever the dtype of q.
        tie_feature_map_qk: accepted for compatibility, without effect as in their code: these maps have no weights.
        variant: whose mathematics, as in the table.
        backend: name of a backend, or None for what `sla_ref.set_backend` explains.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        head_dim: int,
        topk: float,
        feature_map: str | FeatureMap = "softmax",
        BLKQ: int = 64,
        BLKK: int = 64,
        use_bf16: bool = True,
        tie_feature_map_qk: bool = True,
        *,
        variant: str = "main",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_block_size("head_dim", head_dim)
        check_ratio("topk", topk, zero_allowed=False)
        check_block_size("BLKQ", BLKQ)
        check_block_size("BLKK", BLKK)
        check_bool("use_bf16", use_bf16)
        check_choice("variant", variant, VARIANTS)
        if backend is not None:
            backends.require_known(backend)
        self.head_dim = head_dim
        self.topk = topk
        self.BLKQ = BLKQ
        self.BLKK = BLKK
        self.dtype = torch.bfloat16 if use_bf16 else torch.float16
        self.feature_map = feature_map
        self.feature_map_q = self.feature_map_k = resolve_feature_map(feature_map)
        self.variant = variant
        self.backend = backend
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        self.init_weights_()

    def init_weights_(self) -> None:
        """Sets Proj to zero."""
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, return_sparsity: bool = False) -> Tensor | tuple[Tensor, float]:
        """Attention of `q` (B, H, L, D) over `k`, `v` (B, H, L, D).

        Args:
            q, k, v: float16, bfloat16 or float32; computed in bfloat16 or float16, as `use_bf16` says.
            return_sparsity: also return what their code calls so: the share of blocks that are critical.

        Returns:
            (B, H, L, D) in q's dtype; with `return_sparsity`, that and the share.

        Raises:
            TypeError, ValueError, RuntimeError: as `sla_ref.sparse_linear_attention`; ValueError if D is not head_dim.
        """
        check_tensors(q=q, k=k, v=v)
        check_bool("return_sparsity", return_sparsity)
        if q.shape[-1] != self.head_dim:
            raise ValueError(f"q must have head_dim {self.head_dim}, got shape {tuple(q.shape)}")
        dtype, device = q.dtype, q.device.type
        # Their kernels see no autocast, so what surrounds this layer must not change the dtype they compute in.
        with torch.autocast(device, enabled=False):
            block_map = classify_blocks(
                q, k, self.topk, _NEGLIGIBLE[self.variant], block_q=self.BLKQ, block_k=self.BLKK
            )
            q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
            sparse, linear, _ = sparse_linear_attention(
                q, k, v, block_map=block_map, feature_map=self.feature_map_q, backend=self.backend
            )
            if self.variant == "main":
                linear = self._linear_over_all_keys(q, k, v)
        with torch.autocast(device, dtype=self.dtype):  # float32 weights, products in half precision
            out = (sparse + self.proj_l(linear)).to(dtype)
        if return_sparsity:
            return out, block_map.max_critical / block_map.labels.shape[-1]
        return out

    def _linear_over_all_keys(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype = q.dtype
        if dtype == torch.float16:  # sums over all keys leave its range
            q, k, v = q.float(), k.float(), v.float()
        phi_q, phi_k = self.feature_map_q(q).to(q.dtype), self.feature_map_k(k).to(k.dtype)
        state = phi_k.mT @ v  # (B, H, D, D)
        denominator = (phi_q * phi_k.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)  # (B, H, L, 1)
        return ((phi_q @ state) / (denominator + _EPSILON)).to(dtype)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return (
            f"{self.head_dim}, topk={self.topk}, feature_map={self.feature_map!r}, BLKQ={self.BLKQ}, BLKK={self.BLKK}, "
            f"use_bf16={self.dtype == torch.bfloat16}, variant={self.variant!r}, backend={self.backend!r}"
        )
