"""The sparse branch: an online softmax along the critical blocks, and its gradients. [Eq. 4]"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...protocol import Proj
from .launch import SIZES, Call, Tokens, tiled
from .tokens import LOG2_E, dot, head_of, load, load_slab, own_rows, store, weight_slab

LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def scores(Q, K, first_key, key_length, PARTIAL: tl.constexpr):
    """Q K^T, not scaled yet; -inf for keys past the end, which only a partial block has. # [ROWS, KEYS]"""
    S = dot(Q, tl.trans(K))
    if PARTIAL:
        S = tl.where((first_key + tl.arange(0, S.shape[1]) < key_length)[None, :], S, float("-inf"))
    return S


# --- forward ---------------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """The online softmax of some rows, as far as it has come."""

    O: Any  # not divided by l yet, [ROWS, COLUMNS]
    l: Any  # each row's sum, [ROWS]
    m: Any  # each row's maximum in base 2, [ROWS]


@triton.jit
def softmax_step(run, Q, key, value, first_key, scale, PARTIAL: tl.constexpr, plan: tl.constexpr):
    """Take KEYS more keys of a critical block into the softmax. [Eq. 4]"""
    K = load(key, first_key, plan.KEYS, plan.COLUMNS)  # [KEYS, COLUMNS]
    S = scores(Q, K, first_key, key.length, PARTIAL)  # [ROWS, KEYS] [Alg. 1 L9]
    m = tl.maximum(run.m, tl.max(S, 1) * scale)
    P = tl.exp2(S * scale - m[:, None])  # one instruction; what rounding m costs is the same factor in P and in l
    shrink = tl.exp2(run.m - m)
    l = run.l * shrink + tl.sum(P, 1)  # [Alg. 1 L10]
    V = load(value, first_key, plan.KEYS, plan.COLUMNS)  # [KEYS, COLUMNS]
    O = dot(P.to(V.dtype), V, run.O * shrink[:, None])  # [Alg. 1 L11]
    return Running(O, l, m)


@triton.jit
def sparse_rows(Q, key, value, kv_indices, num_blocks, scale, plan: tl.constexpr):
    """O^s and lse of ROWS rows, given the list of their critical blocks. # [ROWS, COLUMNS], [ROWS]"""
    ROWS: tl.constexpr = plan.ROWS
    COLUMNS: tl.constexpr = plan.COLUMNS
    STEPS: tl.constexpr = plan.BLOCK_K // plan.KEYS  # per key block
    num_steps = num_blocks * STEPS
    scale = scale * LOG2_E
    run = Running(
        O=tl.zeros([ROWS, COLUMNS], tl.float32),
        l=tl.zeros([ROWS], tl.float32),
        m=tl.full([ROWS], LOWEST, tl.float32),  # not -inf, which a score can be too: -inf - -inf is NaN
    )
    # The list ascends, so only its last block can be the partial one: the others go without a mask.
    for step in range(num_steps - STEPS):
        first_key = tl.load(kv_indices + step // STEPS) * plan.BLOCK_K + step % STEPS * plan.KEYS
        run = softmax_step(run, Q, key, value, first_key, scale, False, plan)
    for step in range(tl.maximum(num_steps - STEPS, 0), num_steps):
        first_key = tl.load(kv_indices + step // STEPS) * plan.BLOCK_K + step % STEPS * plan.KEYS
        run = softmax_step(run, Q, key, value, first_key, scale, True, plan)
    l = tl.where(run.l == 0, 1.0, run.l)  # no critical block: sparse = 0, lse = -inf
    L = tl.where(run.l == 0, float("-inf"), (run.m + tl.log2(l)) * LN_2)
    return run.O * (1 / l)[:, None], L  # [Alg. 1 L16]


# --- backward --------------------------------------------------------------------------------------------------------


class RowScratch(NamedTuple):
    """Two numbers of each row, which `dq_kernel` leaves for `dkdv_kernel`: (B * H, Tq * block_q) float32.

    They are padded to whole blocks, to be read without a mask.
    """

    L: Any  # lse in base 2, inf past the end
    Ds: Any  # less the gradient of lse


class Rows(NamedTuple):
    """What the backward knows of ROWS query rows."""

    Q: Any
    dO: Any
    L: Any
    Ds: Any


@triton.jit
def dq_step(dQ, rows, key, value, first_key, scale, PARTIAL: tl.constexpr, plan: tl.constexpr):
    """Add to dQ what KEYS keys of a critical block give. # [ROWS, COLUMNS]"""
    K = load(key, first_key, plan.KEYS, plan.COLUMNS)  # [KEYS, COLUMNS]
    S = scores(rows.Q, K, first_key, key.length, PARTIAL)  # [ROWS, KEYS]
    P = tl.exp2(S * scale - rows.L[:, None])  # [Alg. 2 L9]
    V = load(value, first_key, plan.KEYS, plan.COLUMNS)  # [KEYS, COLUMNS]
    dP = dot(rows.dO, tl.trans(V))  # [ROWS, KEYS] [Alg. 2 L11]
    dS = P * (dP - rows.Ds[:, None])  # [Alg. 2 L11]
    return dot(dS.to(K.dtype), K, dQ)  # [Alg. 2 L12]


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    query, key, value, grad_sparse, grad_lse, out_sparse, lse, bias, grad_bias, row_Dl, lists, scratch, grad_query,
    scale, first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """dQ for ROWS rows of query block i, along its list of critical key blocks. [Alg. 2 L12]

    Where phi is softmax, `grad_query` holds the linear branch's share already; this adds to it.
    With Proj inside, `out_sparse` is O, and D^s is what D^l leaves of rowsum(dO (O - b)).
    """
    ROWS: tl.constexpr = plan.ROWS
    COLUMNS: tl.constexpr = plan.COLUMNS
    STEPS: tl.constexpr = plan.BLOCK_K // plan.KEYS  # per key block
    block, head, first = own_rows(first_head, query_length, plan.BLOCK_Q, ROWS)
    key = head_of(key, head, num_heads, key_length, plan)
    value = head_of(value, head, num_heads, key_length, plan)
    grad_query = head_of(grad_query, head, num_heads, query_length, plan)

    dO = load(head_of(grad_sparse, head, num_heads, query_length, plan), first, ROWS, COLUMNS)
    O = load_slab(head_of(out_sparse, head, num_heads, query_length, plan), first, 0, ROWS, COLUMNS)
    O = O.to(tl.float32)
    if bias is not None:
        column = tl.arange(0, COLUMNS)
        O -= tl.load(bias + column, mask=column < plan.D, other=0.0).to(tl.float32)[None, :]
        part = tl.program_id(0).to(tl.int64) * COLUMNS + column
        tl.store(grad_bias + part, tl.sum(dO.to(tl.float32), 0))  # added up outside
    Ds = tl.sum(dO.to(tl.float32) * O, 1)  # [ROWS] [Alg. 2 L2]
    row = first + tl.arange(0, ROWS)
    of_head = head.to(tl.int64) * query_length
    if grad_lse is not None:  # dS = P (dP - Ds) + P dL
        Ds -= tl.load(grad_lse + of_head + row, mask=row < query_length, other=0.0)
    # Past the end lse reads as inf: exp2(S - inf) is 0.
    L = tl.load(lse + of_head + row, mask=row < query_length, other=float("inf")) * LOG2_E  # [ROWS]
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if row_Dl is not None:
        Ds -= tl.load(row_Dl + place)
    tl.store(scratch.L + place, L)
    tl.store(scratch.Ds + place, Ds)

    kv_indices = lists.indices + block.to(tl.int64) * capacity
    num_steps = tl.load(lists.num_blocks + block) * STEPS
    rows = Rows(load(head_of(query, head, num_heads, query_length, plan), first, ROWS, COLUMNS), dO, L, Ds)
    dQ = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(num_steps - STEPS):  # all but the last block, as in the forward
        first_key = tl.load(kv_indices + step // STEPS) * plan.BLOCK_K + step % STEPS * plan.KEYS
        dQ = dq_step(dQ, rows, key, value, first_key, scale * LOG2_E, False, plan)
    for step in range(tl.maximum(num_steps - STEPS, 0), num_steps):
        first_key = tl.load(kv_indices + step // STEPS) * plan.BLOCK_K + step % STEPS * plan.KEYS
        dQ = dq_step(dQ, rows, key, value, first_key, scale * LOG2_E, True, plan)
    dQ *= scale
    if plan.SOFTMAX:
        dQ += load_slab(grad_query, first, 0, ROWS, COLUMNS).to(tl.float32)
    store(grad_query, first, 0, dQ)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    query, key, value, grad_sparse, weight, lists, scratch, grad_key, grad_value, scale,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """dK and the sparse branch's share of dV for KEYS keys of block j, down its list of query blocks. [Alg. 2 L10-L12]

    Scores are held transposed, [KEYS, ROWS], since each product then reads its operands as they lie in memory.
    `grad_value` holds the linear branch's share already, where phi is softmax `grad_key` too; this adds to them.
    With Proj inside, that share is the gradient of V W^T, so it is multiplied by W.
    """
    ROWS: tl.constexpr = plan.ROWS
    KEYS: tl.constexpr = plan.KEYS
    COLUMNS: tl.constexpr = plan.COLUMNS
    STEPS: tl.constexpr = plan.BLOCK_Q // ROWS  # per query block
    block, head, first_key = own_rows(first_head, key_length, plan.BLOCK_K, KEYS)
    num_query_blocks = tl.cdiv(query_length, plan.BLOCK_Q)
    query = head_of(query, head, num_heads, query_length, plan)
    grad_sparse = head_of(grad_sparse, head, num_heads, query_length, plan)
    grad_key = head_of(grad_key, head, num_heads, key_length, plan)
    grad_value = head_of(grad_value, head, num_heads, key_length, plan)
    of_head = head.to(tl.int64) * num_query_blocks * plan.BLOCK_Q
    row_L = scratch.L + of_head
    row_Ds = scratch.Ds + of_head

    offsets = lists.offsets + (block + head)  # a head has one more of them than blocks
    start = tl.load(offsets)
    num_steps = (tl.load(offsets + 1) - start) * STEPS
    q_indices = lists.indices + (head.to(tl.int64) * num_query_blocks * capacity + start)
    log2_scale = scale * LOG2_E
    K = load(head_of(key, head, num_heads, key_length, plan), first_key, KEYS, COLUMNS)  # [KEYS, COLUMNS]
    V = load(head_of(value, head, num_heads, key_length, plan), first_key, KEYS, COLUMNS)  # [KEYS, COLUMNS]
    dK = tl.zeros([KEYS, COLUMNS], tl.float32)
    dV = tl.zeros([KEYS, COLUMNS], tl.float32)
    for step in range(num_steps):
        first = tl.load(q_indices + step // STEPS) * plan.BLOCK_Q + step % STEPS * ROWS
        row = first + tl.arange(0, ROWS)
        # Keys past the end need no mask here: their rows of K and V are zero and their gradients are not stored.
        Q = load(query, first, ROWS, COLUMNS)  # [ROWS, COLUMNS]
        S = dot(K, tl.trans(Q))  # [KEYS, ROWS]
        P = tl.exp2(S * log2_scale - tl.load(row_L + row)[None, :])  # [Alg. 2 L9]
        dO = load(grad_sparse, first, ROWS, COLUMNS)  # [ROWS, COLUMNS]
        dV = dot(P.to(dO.dtype), dO, dV)  # [Alg. 2 L10]
        dP = dot(V, tl.trans(dO))  # [KEYS, ROWS] [Alg. 2 L11]
        dS = P * (dP - tl.load(row_Ds + row)[None, :])  # [Alg. 2 L11]
        dK = dot(dS.to(Q.dtype), Q, dK)  # [Alg. 2 L12]
    dK *= scale
    if plan.SOFTMAX:
        dK += load_slab(grad_key, first_key, 0, KEYS, COLUMNS).to(tl.float32)
    store(grad_key, first_key, 0, dK)
    if weight is None:
        dV += load_slab(grad_value, first_key, 0, KEYS, COLUMNS).to(tl.float32)
    else:
        for feature in tl.range(0, COLUMNS, plan.FEATURES, num_stages=1):
            share = load_slab(grad_value, first_key, feature, KEYS, plan.FEATURES)
            dV = dot(share, weight_slab(weight, feature, 0, plan.FEATURES, COLUMNS, plan), dV)
    store(grad_value, first_key, 0, dV)


# --- outside ---------------------------------------------------------------------------------------------------------


def backward(
    call: Call,
    out: Tokens,
    lse: Tensor,
    grad_out: Tokens,
    grad_lse: Tensor | None,
    dQ: Tokens,
    dK: Tokens,
    dV: Tokens,
    proj: Proj | None = None,
    row_Dl: Tensor | None = None,
) -> Tensor | None:
    """Fill dQ and dK, or add to them where phi is softmax, and add to dV.

    `out` is O^s. With Proj inside it is O, and the result is the gradient of the bias, (D,) float32; `row_Dl` is what
    the linear branch has left, if there is one.
    """
    block_map, scale, device = call.inputs.block_map, call.inputs.scale, lse.device
    *_, num_query_blocks, num_key_blocks = block_map.labels.shape

    def inputs(rows: int, keys: int) -> list[Any]:
        return tiled((call.query, rows), (call.key, keys), (call.value, keys), (grad_out, rows))

    shape = (call.heads, num_query_blocks * block_map.block_q)
    scratch = RowScratch(*(torch.empty(*shape, dtype=torch.float32, device=device) for _ in range(2)))
    cut = call.cut("dq")
    programs = call.heads * num_query_blocks * (block_map.block_q // cut.plan.ROWS)
    weight = bias = grad_bias = None
    if proj is not None:
        bias, grad_bias = proj.bias, torch.empty(programs, call.columns, dtype=torch.float32, device=device)
        weight = None if row_Dl is None else proj.weight
    of_rows = (None if grad_lse is None else grad_lse.contiguous(), out, lse.contiguous())
    of_proj = (bias, grad_bias, row_Dl)
    args = (*inputs(cut.plan.ROWS, cut.plan.KEYS), *of_rows, *of_proj, call.lists.keys, scratch, dQ, scale)
    call.start(dq_kernel, cut, programs, *args)
    cut = call.cut("dkdv")
    programs = call.heads * num_key_blocks * (block_map.block_k // cut.plan.KEYS)
    args = (*inputs(cut.plan.ROWS, cut.plan.KEYS), weight, call.lists.queries, scratch, dK, dV, scale)
    call.start(dkdv_kernel, cut, programs, *args)
    return None if grad_bias is None else grad_bias.sum(0)[: call.head_dim]
