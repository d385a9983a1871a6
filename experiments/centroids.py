"""Attention without a linear branch: each marginal block counts as one key, its mean, as often as it has keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import sla_ref
from sla_ref.block_map import pool_blocks
from sla_ref.lab.model import ModelConfig


class Centroids(nn.Module):
    """One softmax over the critical keys and the means of all other blocks.

        O_i = (sum_critical e^s_ij v_j + sum_J n e^s_iJ mean(V_J)) / (sum_critical e^s_ij + sum_J n e^s_iJ)

    with s_ij = q_i . k_j / sqrt(D), s_iJ = q_i . mean(K_J) / sqrt(D), and n the tokens of a block, which must divide
    the length. The operator gives the critical part and the logarithm of its sum. So this is SLA2's mixture with alpha
    from block means, and with their own average in place of the linear branch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ratio, block = self.config.critical_ratio, self.config.block
        block_map = sla_ref.classify_blocks(query, key, ratio, 1.0, block_q=block, block_k=block)  # others: negligible
        sparse, _, lse = sla_ref.sparse_linear_attention(query, key, value, block_map=block_map)
        with torch.autocast(query.device.type, enabled=False):
            mean_key, mean_value = (pool_blocks(each, block).to(lse.dtype) for each in (key, value))  # (B, H, Tk, D)
            scores = query.to(lse.dtype) @ mean_key.mT / math.sqrt(query.shape[-1]) + math.log(block)
            critical = (block_map.labels == 1).repeat_interleave(block, dim=2)  # (B, H, N, Tk)
            scores = scores.masked_fill(critical, -torch.inf)
            alpha = torch.sigmoid(lse - scores.logsumexp(-1))[..., None]
            rest = scores.softmax(-1) @ mean_value
            return (alpha * sparse + (1 - alpha) * rest).to(sparse.dtype)
