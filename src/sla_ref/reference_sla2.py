"""The specification of SLA2 (arXiv 2602.12675), dense and masked: learned blocks, and a weight between the branches.

SLA adds a projection of its linear branch to its sparse branch. SLA2 mixes the two, O = alpha O^s + (1 - alpha) O^l,
and learns which blocks are critical. The formulas are the paper's where they carry a tag. Those marked "own" are not in
the paper. Everything supports every float dtype, needs N x N memory, and leaves the gradients to autograd, except that
of the soft top-k.

Glossary, in addition to that of `reference.py` (paper symbol: meaning)
    scores       P_c         (B, H, Tq, Tk): what the router ranks key blocks by
    mask         M           1 in the sparse branch, 0 in the linear branch; in between while the router is trained.
                             (B, H, Tq, Tk) of blocks, or (B, H, Nq, Nk) of tokens, which `expand` makes of it
    tau, lambda  tau, lambda temperature of the soft top-k, and the shift that gives each row its sum
    alpha        alpha       (B, H, Nq): the weight of the sparse branch in a row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import smallest_denominator

# --- the router ------------------------------------------------------------------------------------------------------


def pool(tokens: Tensor, block: int) -> Tensor:
    """Mean over each block: (B, H, N, D) -> (B, H, T, D). [SLA2 Eq. 15]"""
    return torch.stack([rows.mean(2) for rows in tokens.split(block, 2)], 2)


def router_scores(query: Tensor, key: Tensor, proj_q: Tensor, proj_k: Tensor, block_q: int, block_k: int) -> Tensor:
    """What key blocks are ranked by: `query` (B, H, Nq, D), `key` (B, H, Nk, D) -> (B, H, Tq, Tk). [SLA2 Eq. 16]

    `proj_q` and `proj_k` are (D, D). With both at the identity this is SLA's own choice. Algorithm 2 of the paper takes
    a softmax and 1/sqrt(d) here, Equation 16 does not. The hard choice is the same; the soft top-k is not. This follows
    the equation, since the softmax of many blocks lies so close together that tau = 0.1 cannot tell them apart. In turn
    these scores grow with the tokens and with D, and where they are large a tau of 0.1 is so sharp that it leaves no
    gradient.
    """
    return (pool(query, block_q) @ proj_q.mT) @ (pool(key, block_k) @ proj_k.mT).mT


def top_k(scores: Tensor, num_critical: int) -> Tensor:
    """The hard choice: mask 1 for the `num_critical` largest scores of each row, else 0. [SLA2 Eq. 16]"""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < num_critical).to(scores.dtype)


def soft_top_k(scores: Tensor, num_critical: int, tau: float = 0.1) -> Tensor:
    """The soft choice: mask sigmoid(scores / tau + lambda), each row of which sums to `num_critical`. [SLA2 Eq. 17]

    The sum is the number that the hard choice takes, which is the limit for tau -> 0.
    """
    mask: Tensor = _SoftTopK.apply(scores, num_critical, tau)
    return mask


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, num_critical: int, tau: float) -> Tensor:
        x = scores / tau
        share = x.new_full((), num_critical / scores.shape[-1])  # made on the device: a CUDA graph records no copy
        # The sum grows with lambda. With the largest x at `share` it is too small, with the smallest there too large.
        low, high = (share.logit() - bound for bound in (x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)))
        for _ in range(64):  # [SLA2 Eq. 17] bisection
            middle = (low + high) / 2
            too_small = torch.sigmoid(x + middle).sum(-1, keepdim=True) < num_critical
            low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
        mask = torch.sigmoid(x + high)
        ctx.save_for_backward(mask)
        ctx.tau = tau
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # The implicit function theorem (own): lambda moves with the scores to keep the sum. Without the second term
        # lambda would count as a constant.
        (mask,) = ctx.saved_tensors
        s = mask * (1 - mask)
        total = s.sum(-1, keepdim=True)
        mean = (s * grad).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return s * (grad - mean) / ctx.tau, None, None


# --- the branches ----------------------------------------------------------------------------------------------------


def expand(mask: Tensor, query_length: int, key_length: int, block_q: int, block_k: int) -> Tensor:
    """The mask of token pairs: (B, H, Tq, Tk) -> (B, H, Nq, Nk)."""
    i = torch.arange(query_length, device=mask.device) // block_q
    j = torch.arange(key_length, device=mask.device) // block_k
    return mask[:, :, i[:, None], j]


def sparse_branch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """O^s, (B, H, Nq, D): weights M e^S, normalised in each row; `mask` (B, H, Nq, Nk). [SLA2 Eq. 8]

    The form with a soft mask is own. A row whose mask is all 0 gives 0, with zero gradient.
    """
    weights, total, _ = _softmax_weights(query, key, mask, scale)
    return weights @ value / total.masked_fill(total == 0, 1.0)


def log_mass(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The logarithm of each row's sum of M e^S, (B, H, Nq): the lse of the sparse branch; -inf where the mask is 0."""
    _, total, largest = _softmax_weights(query, key, mask, scale)
    none = total == 0
    return (largest + total.masked_fill(none, 1.0).log()).masked_fill(none, -torch.inf).squeeze(-1)


def _softmax_weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """M e^(S - m), their sum, and m, the largest score of a row. m cancels out, so it is a constant to autograd."""
    S = (scale * query @ key.mT).masked_fill(mask == 0, -torch.inf)  # (B, H, Nq, Nk)
    m = S.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    weights = mask * torch.exp(S - m)
    return weights, weights.sum(-1, keepdim=True), m


def linear_branch(phi_query: Tensor, phi_key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """O^l, (B, H, Nq, D): weights (1 - M) phi(Q) phi(K)^T, normalised in each row. [SLA2 Eq. 14]

    A row with a zero denominator gives 0, with zero gradient.
    """
    weights = (1 - mask) * (phi_query @ phi_key.mT)  # (B, H, Nq, Nk)
    denominator = weights.sum(-1, keepdim=True)
    zero = denominator.abs() < smallest_denominator(denominator.dtype)
    return (weights @ value / denominator.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


# --- the weight between them -----------------------------------------------------------------------------------------


def ideal_alpha(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The share of a row's softmax that is critical, (B, H, Nq); `mask` (B, H, Nq, Nk). [SLA2 Eq. 7]

    exp(lse_critical - lse_all), written as sigmoid(lse_critical - lse_marginal). With it, and with the exact marginal
    average as O^l, `combine` is full attention.
    """
    return torch.sigmoid(log_mass(query, key, mask, scale) - log_mass(query, key, 1 - mask, scale))


def block_means_alpha(query: Tensor, key: Tensor, mask: Tensor, block_k: int, scale: float) -> Tensor:
    """The same with each marginal key replaced by the mean of its block: an estimate without N x N scores (own)."""
    j = torch.arange(key.shape[2], device=key.device) // block_k
    means = pool(key, block_k)[:, :, j]  # (B, H, Nk, D)
    return torch.sigmoid(log_mass(query, key, mask, scale) - log_mass(query, means, 1 - mask, scale))


def combine(sparse: Tensor, linear: Tensor, alpha: Tensor) -> Tensor:
    """O = alpha O^s + (1 - alpha) O^l; `alpha` broadcasts to (B, H, Nq). [SLA2 Eq. 12], [SLA2 Eq. 13]"""
    return alpha[..., None] * sparse + (1 - alpha[..., None]) * linear
