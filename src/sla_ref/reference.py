"""The specification: sparse-linear attention as the paper's equations, dense and masked.

Every other rung of this package is tested against this page. It needs N x N memory and nothing but torch, supports
every float dtype, and leaves the gradients to autograd. It does not have blocks of work, an online softmax or a
hand-written backward.

Official implementation: thu-ml/SLA, branch SLA-1 at 325cc75, in sparse_linear_attention/: utils.py, lines 55 to 67
(classes), and kernel.py, lines 51 to 148 (both branches). It has no negligible class.

Glossary, for this file and for the one-letter names inside the kernels (paper symbol: meaning)
    query, key, value   Q, K, V         (B, H, N, D): batch, heads, tokens, head dimension (the paper's d)
    phi_query, phi_key  Q^phi, K^phi    the feature map phi applied to Q and K
    block_q, block_k    b_q, b_kv       tokens per query block and per key block; i and j count the blocks
    Tq, Tk              T_m, T_n        number of query blocks and of key blocks; the last may be partial
    critical_ratio      k_h / 100       share of key blocks per query block with exact attention
    negligible_ratio    k_l / 100       share of key blocks per query block that are skipped
    labels              M_c             (B, H, Tq, Tk): 1 critical, 0 marginal, -1 negligible
    scale               1 / sqrt(d)     factor on the scores
    S, P                S_ij, P_ij      scores and softmax weights of a tile
    sparse, linear      O^s, O^l        outputs of the two branches
    lse                 L_i             log-sum-exp of a row's critical scores, natural logarithm
    h, z                h_j, z_j        phi(K_j)^T V_j (D, D) and the column sums of phi(K_j) (D), per key block
    H, Z                H_i, Z_i        their sums over the marginal key blocks of query block i
    dX                  dX              gradient of the loss with respect to X
    Ds, Dl              D^s, D^l        row sums of dO * O, of the sparse and of the linear branch
"""

from __future__ import annotations

import torch
from torch import Tensor


def classify(
    query: Tensor, key: Tensor, critical_ratio: float, negligible_ratio: float, block_q: int, block_k: int
) -> Tensor:
    """Rank key blocks per query block and cut the ranking in three. [Eq. 2] [Eq. 3]

    `query` (B, H, Nq, D), `key` (B, H, Nk, D) -> labels (B, H, Tq, Tk) int8. The order is stable and descending: among
    equal scores the earlier block ranks higher. The softmax and 1/sqrt(d) of Eq. 2 keep the order and are left out.
    """

    def pool(tokens: Tensor, block: int) -> Tensor:  # (B, H, T, D) [Eq. 2]
        return torch.stack([rows.mean(2) for rows in tokens.detach().double().split(block, 2)], 2)

    scores = pool(query, block_q) @ pool(key, block_k).mT  # (B, H, Tq, Tk) [Eq. 2]
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0 is the highest score of its row

    num_blocks = scores.shape[-1]
    num_critical = max(1, int(critical_ratio * num_blocks))
    num_negligible = min(int(negligible_ratio * num_blocks), num_blocks - num_critical)
    labels = torch.zeros_like(rank, dtype=torch.int8)
    labels[rank < num_critical] = 1  # [Eq. 3]
    labels[rank >= num_blocks - num_negligible] = -1
    return labels


def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    labels: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both branches of SLA for a given block map. [Eq. 4] [Eq. 5]

    Args:
        query, phi_query: (B, H, Nq, D), any float dtype.
        key, value, phi_key: (B, H, Nk, D), same dtype.
        labels: (B, H, Tq, Tk); 1 critical, 0 marginal, -1 negligible.
        block_q, block_k: tokens per block.
        scale: factor on the scores.

    Returns:
        sparse and linear (B, H, Nq, D), lse (B, H, Nq), in the input's dtype. A row without critical key has sparse = 0
        and lse = -inf; a row with a zero denominator has linear = 0. Both have zero gradient.
    """
    i = torch.arange(query.shape[2], device=labels.device) // block_q  # the block of each query
    j = torch.arange(key.shape[2], device=labels.device) // block_k
    label = labels[:, :, i[:, None], j]  # (B, H, Nq, Nk), one per token pair

    # Sparse branch: softmax over the critical keys, normalised over them only. [Eq. 4]
    critical = label == 1
    S = (scale * query @ key.mT).masked_fill(~critical, -torch.inf)  # (B, H, Nq, Nk)
    # A softmax over no key at all is 0 / 0. Such rows are computed on zeros and cleared afterwards: just clearing them
    # would leave the NaN in the gradient.
    no_key = ~critical.any(-1, keepdim=True)
    S = S.masked_fill(no_key, 0.0)
    sparse = torch.softmax(S, dim=-1).masked_fill(no_key, 0.0) @ value
    lse = torch.logsumexp(S, dim=-1).masked_fill(no_key.squeeze(-1), -torch.inf)

    # Linear branch: weights phi(q) . phi(k) over the marginal keys, normalised over them only. [Eq. 5]
    # (phi(Q) phi(K)^T) V is phi(Q) (phi(K)^T V): the second order of brackets is what makes it linear in N.
    A = (phi_query @ phi_key.mT).masked_fill(label != 0, 0.0)  # (B, H, Nq, Nk)
    denominator = A.sum(-1, keepdim=True)  # phi(Q_i) Z_i
    zero = denominator.abs() < smallest_denominator(denominator.dtype)
    linear = (A @ value / denominator.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    return sparse, linear, lse


def smallest_denominator(dtype: torch.dtype) -> float:
    """Below this, a denominator phi(Q_i) Z_i counts as zero: 2^-96, or 2^-992 for float64.

    It is not an epsilon that is added to something. Near the end of float32's range, features are rounded to a few
    digits, and the gradient's phi(Q_i) / (phi(Q_i) Z_i) leaves the range at the other end.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).tiny * 2.0**30


def combine(sparse: Tensor, linear: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
    """O = O^s + Proj(O^l), Proj a learnable linear map D -> D shared by the heads of a layer. [Eq. 6]"""
    return sparse + torch.nn.functional.linear(linear, proj_weight, proj_bias)
