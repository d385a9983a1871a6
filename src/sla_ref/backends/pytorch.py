"""The backend `torch`: Algorithms 1 and 2 block by block in plain PyTorch, with the backward written by hand.

    key blocks j ->   0   1   2   3   4     Sparse branch: query block i gathers its critical key blocks
    query block i   [ 0   1  -1   1   0 ]   side by side, here [K_1 K_3], and runs one small softmax attention
                          |       |         over them. Several query blocks make one step: a batch of products.
                          +-- K --+         Linear branch: H_i = h_0 + h_4, for all i at once as one product
                                            [labels == 0] @ [h_0 .. h_4].

No N x N tensor ever exists: work and memory grow with the critical blocks. As a query block sees all of its critical
keys at once, the softmax needs no running maximum and sum; the GPU kernels, which see one block at a time, do.

Everything is computed in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_map import MARGINAL, BlockMap, trusted_map
from ..protocol import Gradients, Inputs, Saved

name = "torch"
softmax_inside = False


def unavailable() -> str | None:
    """None: where torch is, this backend is."""
    return None


def unsupported(query: Tensor, block_map: BlockMap) -> str | None:
    """None: it takes whatever the operator takes."""
    return None


def forward(inputs: Inputs) -> Saved:
    """Algorithm 1; arguments and result as in `sla_ref.protocol.Backend`."""
    inputs = _fitted(inputs)
    out_sparse, lse = _sparse_forward(inputs)
    return Saved(out_sparse, _linear_forward(inputs), lse)


def backward(
    grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
) -> Gradients:
    """Algorithm 2; arguments and result as in `sla_ref.protocol.Backend`."""
    inputs = _fitted(inputs)
    dQ, dK, dV_sparse = _sparse_backward(grad_sparse, grad_lse, inputs, saved)
    dphi_Q, dphi_K, dV_linear = _linear_backward(grad_linear, inputs, saved)
    dV = dV_sparse.add_(dV_linear)  # [Alg. 2 L17] prints "=", which would lose the sparse part
    dtype = inputs.query.dtype
    return Gradients(dQ.to(dtype), dK.to(dtype), dV.to(dtype), dphi_Q, dphi_K)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _fitted(inputs: Inputs) -> Inputs:
    """The same with blocks no longer than their sequence: a single block of 16,384 may hold 64 tokens."""
    of = inputs.block_map
    block_q, block_k = min(of.block_q, of.query_length), min(of.block_k, of.key_length)
    lengths = of.query_length, of.key_length
    fitted = trusted_map(of.labels, block_q, block_k, *lengths, of.max_critical, of.is_uniform, of.has_marginal)
    return inputs._replace(block_map=fitted)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _cut(tokens: Tensor, block: int) -> Tensor:
    """(B, H, N, D) -> (B * H * T, block, D): the blocks of all heads in a row, the last of each head padded with zeros.

    A view of the tokens where there is nothing to pad and nothing to convert.
    """
    tokens = tokens.to(_compute_dtype(tokens))
    if padding := -tokens.shape[2] % block:
        tokens = F.pad(tokens, (0, 0, 0, padding))
    return tokens.reshape(-1, block, tokens.shape[3])


def _join(blocks: Tensor, like: Tensor) -> Tensor:
    """The reverse of `_cut`: the blocks of all heads in a row, and whatever follows them, -> the shape of `like`."""
    B, H, N, D = like.shape
    T = -(-N // blocks.shape[1])
    return blocks[: B * H * T].reshape(B, H, T * blocks.shape[1], D)[:, :, :N].contiguous()


# --- sparse branch ---------------------------------------------------------------------------------------------------


class _Critical(NamedTuple):
    """The critical key blocks of all query blocks, as rows into what `_cut_inputs` makes of the keys."""

    blocks: Tensor
    """(B * H * Tq, C) int64; slots that a query block does not use point to the block of zeros."""
    bias: Tensor | None
    """(B * H * Tk + 1, block_k): 0 for a real key, -inf for padding; None where no padding can be met."""


def _critical(block_map: BlockMap, dtype: torch.dtype) -> _Critical:
    B, H, Tq, Tk = block_map.labels.shape
    C, device = block_map.max_critical, block_map.labels.device
    zero_block = B * H * Tk
    first = torch.arange(0, zero_block, Tk, device=device).view(B, H, 1, 1)  # first key block of each head
    index = block_map.kv_indices + first
    ragged = block_map.key_length % block_map.block_k != 0
    if not block_map.is_uniform:
        used = torch.arange(C, device=device) < block_map.kv_num_blocks[..., None]
        index = torch.where(used, index, zero_block)
    bias = None
    if ragged or not block_map.is_uniform:
        bias = torch.zeros(zero_block + 1, block_map.block_k, dtype=dtype, device=device)
        bias[zero_block] = -torch.inf
        if ragged:
            bias[:-1].view(B * H, Tk, -1)[:, -1, block_map.key_length % block_map.block_k :] = -torch.inf
    return _Critical(index.view(B * H * Tq, C), bias)


def _steps(index: Tensor, Q: Tensor, K: Tensor) -> list[slice]:
    """Cut the query blocks into steps: small ones on a CPU, whose tiles fit a thread's cache; few elsewhere."""
    scores_per_block = Q.shape[1] * index.shape[1] * K.shape[1]
    scores_per_step = 2**18 * torch.get_num_threads() if Q.device.type == "cpu" else 2**26
    step = max(1, scores_per_step // scores_per_block)
    return [slice(start, min(start + step, len(index))) for start in range(0, len(index), step)]


class _Scratch:
    """Memory for the tiles of a step, used again by the next: a CPU pays dearly for fresh memory."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.empty = torch.empty(0, dtype=dtype, device=device)
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, tile: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if tile not in self.buffers or self.buffers[tile].numel() < size:
            self.buffers[tile] = self.empty.new_empty(size)
        return self.buffers[tile][:size].view(shape)

    def gather(self, tile: str, blocks: Tensor, index: Tensor) -> Tensor:
        """The blocks that each row of `index` (n, C) names, side by side: (n, C * block, D)."""
        (n, C), (_, block, D) = index.shape, blocks.shape
        out = torch.index_select(blocks, 0, index.flatten(), out=self(tile, n * C, block, D))
        return out.view(n, C * block, D)


def _scores(Q: Tensor, K: Tensor, bias: Tensor | None, index: Tensor, scratch: _Scratch) -> Tensor:
    """S = scale Q K^T of the n query blocks of a step, (n, block_q, C * block_k); Q is scaled already. [Alg. 1 L9]"""
    S = torch.bmm(Q, K.mT, out=scratch("S", *Q.shape[:2], K.shape[1]))
    if bias is not None:
        S += bias[index].view(len(Q), 1, -1)
    return S


def _cut_inputs(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V in blocks; Q has the scale already.

    Where query blocks may differ in their number of critical blocks, K and V end with one block of zeros more, for the
    index slots that a query block does not use.
    """
    of = inputs.block_map
    Q, K, V = _cut(inputs.query, of.block_q), _cut(inputs.key, of.block_k), _cut(inputs.value, of.block_k)
    if not of.is_uniform:
        K, V = F.pad(K, (0, 0, 0, 0, 0, 1)), F.pad(V, (0, 0, 0, 0, 0, 1))
    return Q * inputs.scale, K, V


def _sparse_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    query, block_map = inputs.query, inputs.block_map
    Q, K, V = _cut_inputs(inputs)
    index, bias = _critical(block_map, Q.dtype)
    out, lse = torch.empty_like(Q), Q.new_empty(*Q.shape[:2], 1)
    lowest = torch.finfo(Q.dtype).min
    scratch = _Scratch(Q.dtype, Q.device)
    for rows in _steps(index, Q, K):
        K_crit = scratch.gather("K", K, index[rows])  # (n, C * block_k, D)
        V_crit = scratch.gather("V", V, index[rows])
        S = _scores(Q[rows], K_crit, bias, index[rows], scratch)  # (n, block_q, C * block_k)
        m = S.amax(-1, keepdim=True).clamp_(min=lowest)  # no critical key at all: -inf - (-inf) would be NaN
        P = S.sub_(m).exp_()  # [Alg. 1 L9]
        l = P.sum(-1, keepdim=True)  # [Alg. 1 L10]
        torch.bmm(P, V_crit, out=out[rows])  # [Alg. 1 L11]
        out[rows] /= l.clamp(min=1.0)  # l is at least exp(m - m) = 1, or 0 without critical key [Alg. 1 L16]
        torch.add(m, l.log(), out=lse[rows])
    return _join(out, query).to(query.dtype), _join(lse, query[..., :1]).squeeze(-1)


def _sparse_backward(
    grad_sparse: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    block_map = inputs.block_map
    Q, K, V = _cut_inputs(inputs)
    dO = _cut(grad_sparse, block_map.block_q)
    lse = _cut(saved.lse[..., None], block_map.block_q).clamp(min=torch.finfo(Q.dtype).min)  # as m in the forward
    Ds = (dO * _cut(saved.out_sparse, block_map.block_q)).sum(-1, keepdim=True)  # [Alg. 2 L2]
    if grad_lse is not None:
        Ds -= _cut(grad_lse[..., None], block_map.block_q)  # dS = P (dP - Ds) + P dL
    index, bias = _critical(block_map, Q.dtype)
    dQ, dK, dV = torch.empty_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    scratch = _Scratch(Q.dtype, Q.device)
    for rows in _steps(index, Q, K):
        K_crit = scratch.gather("K", K, index[rows])  # (n, C * block_k, D)
        V_crit = scratch.gather("V", V, index[rows])
        S = _scores(Q[rows], K_crit, bias, index[rows], scratch)  # (n, block_q, C * block_k)
        P = S.sub_(lse[rows]).exp_()  # [Alg. 2 L9]
        dP = torch.bmm(dO[rows], V_crit.mT, out=scratch("dP", *P.shape))  # [Alg. 2 L11]
        dKV = scratch("dKV", *K_crit.shape)
        torch.bmm(P.mT, dO[rows], out=dKV)  # [Alg. 2 L10]
        _add_blocks(dV, index[rows], dKV)
        dS = dP.sub_(Ds[rows]).mul_(P)  # [Alg. 2 L11]
        torch.bmm(dS, K_crit, out=dQ[rows])  # [Alg. 2 L12]
        torch.bmm(dS.mT, Q[rows], out=dKV)  # Q brings the scale that the paper's line lacks [Alg. 2 L12]
        _add_blocks(dK, index[rows], dKV)
    return _join(dQ.mul_(inputs.scale), inputs.query), _join(dK, inputs.key), _join(dV, inputs.value)


def _add_blocks(total: Tensor, index: Tensor, tiles: Tensor) -> None:
    """Add the tiles (n, C * block, D) to the blocks of `total` that `index` (n, C) names, in a fixed order."""
    index, tiles = index.flatten(), tiles.view(index.numel(), *total.shape[1:])
    if total.is_cuda:  # where index_add_ would use atomics, whose results differ from run to run
        total.index_put_((index,), tiles, accumulate=True)
    else:
        total.index_add_(0, index, tiles)


# --- linear branch ---------------------------------------------------------------------------------------------------


class _Linear(NamedTuple):
    """What both passes of the linear branch need, for the query and key blocks of a few heads (G of them).

    V_1 is V with a column of ones behind it. It makes each state [h_j z_j] = phi(K_j)^T [V_j 1], and one product with
    phi(Q_i) gives both numerator and denominator. Whatever is done to h and z is done to both at once.
    """

    marginal: Tensor
    """(G, Tq, Tk): 1 where the label is 0, else 0."""
    phi_Q: Tensor
    """(G, Tq, block_q, D), 0 for query blocks without a marginal block."""
    phi_K: Tensor
    """(G, Tk, block_k, D)"""
    V_1: Tensor
    """(G, Tk, block_k, D + 1)"""
    HZ: Tensor
    """[H_i Z_i], (G, Tq, D, D + 1) [Alg. 1 L13]"""


def _linear_states(inputs: Inputs) -> Iterator[tuple[slice, _Linear]]:
    """A few heads at a time: their states never hold many more numbers than the tokens of all heads do.

    Heads without a marginal block are left out: their outputs and gradients are zero.
    """
    block_map = inputs.block_map
    B, H, Tq, Tk = block_map.labels.shape
    D = inputs.value.shape[-1]
    assert inputs.phi_query is not None and inputs.phi_key is not None  # softmax_inside is False
    phi_Q = _cut(inputs.phi_query, block_map.block_q).unflatten(0, (B * H, Tq))
    phi_K = _cut(inputs.phi_key, block_map.block_k).unflatten(0, (B * H, Tk))
    V = _cut(inputs.value, block_map.block_k).unflatten(0, (B * H, Tk))
    marginal = (block_map.labels == MARGINAL).to(V.dtype).flatten(0, 1)  # [Alg. 1 L12]
    group = max(1, B * H * block_map.block_k // D)
    for start in range(0, B * H, group):
        heads = slice(start, start + group)
        some = marginal[heads].any(-1)[..., None, None]  # (G, Tq, 1, 1)
        if some.any():
            V_1 = F.pad(V[heads], (0, 1), value=1.0)
            hz = phi_K[heads].mT @ V_1  # (G, Tk, D, D + 1) [Alg. 1 L4]
            HZ = _sum_over(marginal[heads], hz)  # [Alg. 1 L13]
            # A row without a marginal block is zero whatever its features are, and 0 * NaN would be NaN.
            phi_rows = phi_Q[heads] if some.all() else phi_Q[heads].masked_fill(~some, 0.0)
            yield heads, _Linear(marginal[heads], phi_rows, phi_K[heads], V_1, HZ)


def _sum_over(member: Tensor, states: Tensor) -> Tensor:
    """For each row of the 0/1 `member` (G, Ti, Tj), the sum of the states (G, Tj, D, E) with a 1: (G, Ti, D, E)."""
    total = (member @ states.flatten(2)).unflatten(2, states.shape[2:])
    if not total.sum().isfinite():  # 0 * NaN is NaN: a broken block would reach rows that do not contain it
        total.zero_()
        for j in range(states.shape[1]):
            total += torch.where(member[:, :, j, None, None] == 1, states[:, None, j], 0.0)
    return total


def _inverse(denominator: Tensor) -> Tensor:
    """1 / (phi(Q_i) Z_i), and 0 where there is nothing to divide."""
    zero = denominator.abs() < torch.finfo(denominator.dtype).tiny * 2.0**30  # as in the specification
    return (1 / denominator).masked_fill_(zero, 0.0)


def _linear_forward(inputs: Inputs) -> Tensor:
    query, block_map = inputs.query, inputs.block_map
    B, H, Tq, _ = block_map.labels.shape
    D = query.shape[-1]
    out = query.new_zeros(B * H, Tq, block_map.block_q, D)
    for heads, at in _linear_states(inputs):
        fraction = at.phi_Q @ at.HZ  # numerator and denominator, (G, Tq, block_q, D + 1)
        torch.mul(fraction[..., :D], _inverse(fraction[..., D:]), out=out[heads])  # [Alg. 1 L16]
    return _join(out.flatten(0, 1), query)


def _linear_backward(grad_linear: Tensor, inputs: Inputs, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    block_map = inputs.block_map
    B, H, Tq, Tk = block_map.labels.shape
    D = inputs.query.shape[-1]
    all_dO = _cut(grad_linear, block_map.block_q).unflatten(0, (B * H, Tq))
    all_O = _cut(saved.out_linear, block_map.block_q).unflatten(0, (B * H, Tq))
    dphi_Q = torch.zeros_like(all_dO)
    dphi_K = all_dO.new_zeros(B * H, Tk, block_map.block_k, D)
    dV = torch.zeros_like(dphi_K)
    for heads, at in _linear_states(inputs):
        dO = all_dO[heads]  # (G, Tq, block_q, D)
        Dl = (dO * all_O[heads]).sum(-1, keepdim=True)  # (G, Tq, block_q, 1) [Alg. 2 L2]
        dO_Dl = torch.cat((dO, -Dl), -1)  # belongs to [H Z] as dO to H: (G, Tq, block_q, D + 1)
        inverse = _inverse(at.phi_Q @ at.HZ[..., D:])
        dHZ_i = (at.phi_Q * inverse).mT @ dO_Dl  # [dH_i dZ_i], (G, Tq, D, D + 1) [Alg. 2 L3] [Alg. 2 L4]
        torch.mul(dO_Dl @ at.HZ.mT, inverse, out=dphi_Q[heads])  # [Alg. 2 L5]
        dHZ = _sum_over(at.marginal.mT, dHZ_i)  # [dH dZ], (G, Tk, D, D + 1) [Alg. 2 L14]
        torch.matmul(at.V_1, dHZ.mT, out=dphi_K[heads])  # [Alg. 2 L16]
        torch.matmul(at.phi_K, dHZ[..., :D], out=dV[heads])  # [Alg. 2 L17]
    likes = (inputs.query, inputs.key, inputs.value)
    dphi_Q, dphi_K, dV = (_join(d.flatten(0, 1), like) for d, like in zip((dphi_Q, dphi_K, dV), likes, strict=True))
    return dphi_Q, dphi_K, dV
