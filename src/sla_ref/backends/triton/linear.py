"""The linear branch: states of key blocks, their sums for every query block, and the way back. [Eq. 5]

A state is one row of memory of (COLUMNS + 2) * COLUMNS elements in the input's dtype, float32 for float16:

    +--------------------+
    | h_j  COLUMNS rows  |   phi(K_j)^T V_j
    | z_j  1 row         |   column sums of phi(K_j)
    | 1, bad, 0, 0, ...  |   how many blocks were added up, and how many of those hold a NaN or Inf
    +--------------------+

The weight of a marginal pair is not 1 but a power of two near 1 / (marginal blocks of the row): H_i and Z_i then are
of about the size of one h_j and z_j, and the factor cancels in phi H / (phi Z) without a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .labels import WEIGHTS_TILE
from .launch import INTERPRETED, SIZES, Call, Tokens, start
from .tokens import dot, for_linear, head_of, load_phi, load_slab, own_rows, phi_of, store, to_tf32, weight_slab

UNCUT = 0 if INTERPRETED else 2**26  # elements of states: more launches would cost more than 128 MiB are worth
PARTS = tl.constexpr(16)  # of a head's keys, in the gradient of Proj's weight
SMALLEST_DENOMINATOR = tl.constexpr(2.0**-96)  # as in the specification

# --- parts of kernels ------------------------------------------------------------------------------------------------


@triton.jit
def state_of(states, block, plan: tl.constexpr):
    """Where the state of a block begins (see the picture above)."""
    return states + block.to(tl.int64) * ((plan.COLUMNS + 2) * plan.COLUMNS)


@triton.jit
def h_slab(feature, plan: tl.constexpr):
    """Offsets of FEATURES rows of h: states are worked through in slabs that fit the registers."""
    return (feature + tl.arange(0, plan.FEATURES))[:, None] * plan.COLUMNS + tl.arange(0, plan.COLUMNS)[None, :]


@triton.jit
def z_slab(feature, plan: tl.constexpr):
    """Offsets of the same part of z."""
    return plan.COLUMNS * plan.COLUMNS + feature + tl.arange(0, plan.FEATURES)


@triton.jit
def inverse_of(denominator, sums, plan: tl.constexpr):
    """1 / (phi(Q_i) Z_i): 0 where there is no marginal block or nothing to divide by, NaN if one is bad. # [ROWS]"""
    blocks = tl.load(sums + (plan.COLUMNS + 1) * plan.COLUMNS).to(tl.float32)
    bad = tl.load(sums + (plan.COLUMNS + 1) * plan.COLUMNS + 1).to(tl.float32)
    denominator = tl.where(blocks > 0, denominator, 0.0)
    inverse = tl.where(tl.abs(denominator) < SMALLEST_DENOMINATOR, 0.0, 1 / denominator)
    return tl.where(bad > 0, float("nan"), inverse)


@triton.jit
def store_state(pointers, tile, plan: tl.constexpr):
    """Write a part of a state in the states' dtype."""
    if plan.TF32:
        tile = to_tf32(tile)
    tl.store(pointers, tile.to(pointers.dtype.element_ty))


@triton.jit
def linear_rows(phi_query, first, sums, ROWS: tl.constexpr, plan: tl.constexpr):
    """phi(Q_i) H_i / (phi(Q_i) Z_i), for ROWS rows of query block i. # [ROWS, COLUMNS] [Alg. 1 L16]"""
    COLUMNS: tl.constexpr = plan.COLUMNS
    phi_rows = phi_of(phi_query, first, ROWS, plan)
    O = tl.zeros([ROWS, COLUMNS], tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    # Not pipelined: phi is read by the matrix unit and for the denominator. For such a tile Triton's pipeline (3.6 and
    # 3.7, on sm_90) has one buffer, and fetches the next tile into it while the product of this one is under way.
    for feature in tl.range(0, plan.COLUMNS, plan.FEATURES, num_stages=1):
        phi = load_phi(phi_rows, feature, ROWS, plan.FEATURES, plan)
        H = tl.load(sums + h_slab(feature, plan))  # [FEATURES, COLUMNS]
        Z = tl.load(sums + z_slab(feature, plan)).to(tl.float32)  # [FEATURES]
        denominator += tl.sum(phi.to(tl.float32) * Z[None, :], 1)
        O = dot(phi, H, O, plan.TF32)
    inverse = inverse_of(denominator, sums, plan)
    return tl.where((inverse == 0)[:, None], 0.0, O) * inverse[:, None]  # [Alg. 1 L16]


@triton.jit
def projected(value, weight, first, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, plan: tl.constexpr):
    """Some features of V W^T for ROWS keys: the values as Proj leaves them. # [ROWS, WIDTH]"""
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for feature in tl.range(0, plan.COLUMNS, plan.FEATURES, num_stages=1):
        V = load_slab(value, first, feature, ROWS, plan.FEATURES)
        W = weight_slab(weight, column, feature, WIDTH, plan.FEATURES, plan)
        acc = dot(V, tl.trans(W), acc)
    return acc


# --- states and their sums -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def states_kernel(
    phi_key, value, weight, projected_value, states,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """h_j = phi(K_j)^T V_j and z_j, for one key block. [Alg. 1 L4]

    With Proj inside, V_j W^T takes the place of V_j. It is kept where there is a place for it.
    """
    COLUMNS: tl.constexpr = plan.COLUMNS
    block, head, first = own_rows(first_head, key_length, plan.BLOCK_K, plan.BLOCK_K)
    phi_key = head_of(phi_key, head, num_heads, key_length, plan)
    value = head_of(value, head, num_heads, key_length, plan)
    state = state_of(states, block, plan)

    phi = load_phi(phi_of(phi_key, first, plan.BLOCK_K, plan), 0, plan.BLOCK_K, COLUMNS, plan)
    columns = tl.arange(0, COLUMNS)
    z = tl.sum(phi.to(tl.float32), 0)  # [COLUMNS] [Alg. 1 L4]
    # The product that adds states up cannot leave a block out: 0 * NaN is NaN. So what a NaN or Inf has spoilt counts
    # as zero, and the block as bad; the query blocks that it is marginal to turn their rows into NaN.
    spoilt = tl.sum(z * 0.0, 0)  # 0, or NaN: no other number is left of a NaN or Inf
    z = tl.where(spoilt == 0, z, 0.0)
    store_state(state + COLUMNS * COLUMNS + columns, z, plan)
    for column in range(0, COLUMNS, plan.FEATURES):
        if weight is None:
            V = load_slab(value, first, column, plan.BLOCK_K, plan.FEATURES)  # [BLOCK_K, FEATURES]
        else:
            V = projected(value, weight, first, column, plan.BLOCK_K, plan.FEATURES, plan)
            if projected_value is not None:
                store(head_of(projected_value, head, num_heads, key_length, plan), first, column, V)
        spoilt += tl.sum(V.to(tl.float32) * 0.0)
        h = dot(tl.trans(phi), for_linear(V, value, plan), None, plan.TF32)  # [COLUMNS, FEATURES] [Alg. 1 L4]
        h = tl.where(spoilt == 0, h, 0.0)
        place = columns[:, None] * COLUMNS + (column + tl.arange(0, plan.FEATURES))[None, :]
        store_state(state + place, h, plan)
    bad = tl.where(spoilt == 0, 0.0, 1.0)
    counts = tl.where(columns == 0, 1.0, tl.where(columns == 1, bad, 0.0))
    store_state(state + (COLUMNS + 1) * COLUMNS + columns, counts, plan)


@triton.jit(do_not_specialize=["num_out", "num_in", "head_stride"])
def sums_kernel(
    weights, states, sums, num_out, num_in, head_stride, out_stride, in_stride,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """weights @ states in float32: H_i, Z_i from h_j, z_j [Alg. 1 L13], or back, their gradients [Alg. 2 L14].

    As tf32 the products are exact too: weights are powers of two, and states were stored with no more bits than that.
    """
    program = tl.program_id(0)
    tiles_out = tl.cdiv(num_out, BLOCKS)
    tiles = tl.cdiv(SIZE, TILE)
    # Neighbouring programs share a tile of the states, the big operand.
    out = program % tiles_out * BLOCKS + tl.arange(0, BLOCKS)
    column = program // tiles_out % tiles * TILE + tl.arange(0, TILE)
    head = (program // (tiles_out * tiles)).to(tl.int64)
    weights += head * head_stride
    states += head * num_in * SIZE
    sums += head * num_out * SIZE
    acc = tl.zeros([BLOCKS, TILE], tl.float32)
    for first in range(0, num_in, BLOCKS):
        inner = first + tl.arange(0, BLOCKS)
        # The weights are padded with zeros to whole tiles, the states are not.
        W = tl.load(weights + (out[:, None] * out_stride + inner[None, :] * in_stride))  # [BLOCKS, BLOCKS]
        mask = (inner < num_in)[:, None] & (column < SIZE)[None, :]
        place = inner.to(tl.int64)[:, None] * SIZE + column[None, :]
        h = tl.load(states + place, mask=mask, other=0.0)  # [BLOCKS, TILE]
        acc = dot(W, h, acc, TF32)  # [Alg. 1 L13] [Alg. 2 L14]
    if TF32:
        acc = to_tf32(acc)
    mask = (out < num_out)[:, None] & (column < SIZE)[None, :]
    tl.store(sums + (out.to(tl.int64)[:, None] * SIZE + column[None, :]), acc.to(sums.dtype.element_ty), mask=mask)


def add_up(call: Call, weights: Tensor, states: Tensor, sums: Tensor) -> None:
    """sums = weights @ states for the heads of a chunk, by the vendor's product where its float32 sums are certain.

    For float32 states torch would follow the user's tf32 setting, so there a kernel of our own does it.
    """
    heads, num_in, size = states.shape
    num_out = sums.shape[1]
    if states.element_size() == 2:
        torch.bmm(weights, states, out=sums)
        return
    tile = 4096 if INTERPRETED else 128  # in the interpreter a program costs more than an element
    programs = heads * math.ceil(num_out / WEIGHTS_TILE) * math.ceil(size / tile)
    sizes = (num_out, num_in, *weights.stride())
    start(sums_kernel, programs, weights, states, sums, *sizes, size, WEIGHTS_TILE, tile, call.tf32, num_warps=4)


def chunks_of_heads(call: Call, per_query_block: int, tensors: int) -> list[tuple[int, int]]:
    """Cut the B * H heads, as (first, number): a chunk's states take the memory of `tensors` queries at most.

    A chunk has one state for each key block, and `per_query_block` for each query block. What `UNCUT` holds is not cut.
    """
    query, labels = call.inputs.query, call.inputs.block_map.labels
    num_states = labels.shape[3] + per_query_block * labels.shape[2]
    allowed = max(UNCUT, tensors * query.numel())
    size = min(call.heads, max(1, allowed // (num_states * (call.columns + 2) * call.columns)))
    size = math.ceil(call.heads / math.ceil(call.heads / size))  # chunks of about one size
    return [(first, min(size, call.heads - first)) for first in range(0, call.heads, size)]


def part(of_heads: Tensor, first: int, heads: int) -> Tensor:
    """What belongs to some heads; a slice of all of them would be work for nothing."""
    return of_heads if heads == of_heads.shape[0] else of_heads[first : first + heads]


class MarginalSums:
    """H_i and Z_i of all query blocks, made again for a chunk of heads at a time. [Alg. 1 L4] [Alg. 1 L13]

    Arguments as for `chunks_of_heads`. With Proj's weight they are those of V W^T, which is left in `projected`, if
    given.
    """

    def __init__(
        self, call: Call, weight: Tensor | None, projected: Tokens | None, per_query_block: int, tensors: int
    ) -> None:
        device, (_, _, rows, columns) = call.inputs.query.device, call.inputs.block_map.labels.shape
        self.call, self.chunks = call, chunks_of_heads(call, per_query_block, tensors)
        self.keys = (call.phi_key, call.value, weight, projected)
        self.weights = call.lists.weights[:, :rows, :columns]
        (_, heads), size = self.chunks[0], (call.columns + 2) * call.columns
        self.states = torch.empty(heads, columns, size, dtype=call.state_dtype, device=device)
        self.sums = torch.empty(heads, rows, size, dtype=call.state_dtype, device=device)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """The first head of each chunk, how many there are, and their sums (heads, Tq, size of a state)."""
        cut = self.call.cut("states")
        for first, heads in self.chunks:
            states, sums = part(self.states, 0, heads), part(self.sums, 0, heads)
            self.call.start(states_kernel, cut, heads * states.shape[1], *self.keys, states, first_head=first)
            add_up(self.call, part(self.weights, first, heads), states, sums)
            yield first, heads, sums

    def back(self, first: int, grad_sums: Tensor) -> Tensor:
        """The gradients of a chunk's states from those of its sums, in the place of the states. [Alg. 2 L14]"""
        heads = grad_sums.shape[0]
        states = part(self.states, 0, heads)
        add_up(self.call, part(self.weights, first, heads).mT, grad_sums, states)
        return states


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def grad_sums_kernel(
    phi_query, grad_linear, grad_phi_query, row_Dl, sums, grad_sums,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """dQ^phi, or its share of dQ where phi is softmax, dH_i and dZ_i for query block i. [Alg. 2 L3-L5]"""
    ROWS: tl.constexpr = plan.BLOCK_Q
    COLUMNS: tl.constexpr = plan.COLUMNS
    block, head, first = own_rows(first_head, query_length, ROWS, ROWS)
    phi_query = head_of(phi_query, head, num_heads, query_length, plan)
    grad_phi_query = head_of(grad_phi_query, head, num_heads, query_length, plan)
    sums = state_of(sums, block, plan)
    grad_sums = state_of(grad_sums, block, plan)

    phi_rows = phi_of(phi_query, first, ROWS, plan)
    grad_linear = head_of(grad_linear, head, num_heads, query_length, plan)
    dO = for_linear(load_slab(grad_linear, first, 0, ROWS, COLUMNS), grad_linear, plan)
    denominator = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for feature in range(0, COLUMNS, plan.FEATURES):
        H = tl.load(sums + h_slab(feature, plan))  # [FEATURES, COLUMNS]
        Z = tl.load(sums + z_slab(feature, plan)).to(tl.float32)  # [FEATURES]
        phi = load_phi(phi_rows, feature, ROWS, plan.FEATURES, plan).to(tl.float32)  # [ROWS, FEATURES]
        denominator += tl.sum(phi * Z[None, :], 1)
        along += tl.sum(phi * dot(dO, tl.trans(H), None, plan.TF32), 1)
    inverse = inverse_of(denominator, sums, plan)  # no gradient through a row that is zero by definition
    # This is rowsum(dO * O) with an O that is not rounded. Where few features hold a row, dphi is a small difference.
    Dl = along * inverse  # [ROWS] [Alg. 2 L2]
    for feature in range(0, COLUMNS, plan.FEATURES):
        H = tl.load(sums + h_slab(feature, plan))  # [FEATURES, COLUMNS]
        Z = tl.load(sums + z_slab(feature, plan)).to(tl.float32)  # [FEATURES]
        dphi = dot(dO, tl.trans(H), None, plan.TF32) - Dl[:, None] * Z[None, :]  # [Alg. 2 L5], but for the division
        phi = load_phi(phi_rows, feature, ROWS, plan.FEATURES, plan)
        weight = phi.to(tl.float32) * inverse[:, None]  # phi(Q_i) / (phi(Q_i) Z_i), [ROWS, FEATURES]
        # dx = phi (dphi - phi . dphi), and phi . dphi = 0: O^l is the same for a longer phi(Q).
        dphi *= weight if plan.SOFTMAX else inverse[:, None]
        store(grad_phi_query, first, feature, dphi)
        if row_Dl is not None:  # here: a store between the loops would have H loaded, and phi computed, once more
            tl.store(row_Dl + block.to(tl.int64) * ROWS + tl.arange(0, ROWS), Dl)

        weight_tile = for_linear(weight, grad_linear, plan)
        dH = dot(tl.trans(weight_tile), dO, None, plan.TF32)  # [FEATURES, COLUMNS] [Alg. 2 L3]
        dZ = -tl.sum(weight * Dl[:, None], 0)  # [FEATURES] [Alg. 2 L4]
        store_state(grad_sums + h_slab(feature, plan), dH, plan)
        store_state(grad_sums + z_slab(feature, plan), dZ, plan)
    counts = (COLUMNS + 1) * COLUMNS + tl.arange(0, COLUMNS)  # they have no gradient
    tl.store(grad_sums + counts, tl.zeros([COLUMNS], grad_sums.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def grad_keys_kernel(
    phi_key, value, grad_phi_key, grad_value, grad_states,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """dK^phi (its share of dK where phi is softmax) and the share of dV for key block j. [Alg. 2 L16] [Alg. 2 L17]

    With Proj inside, `value` is V W^T, in the place where its gradient goes.
    """
    KEYS: tl.constexpr = plan.BLOCK_K
    COLUMNS: tl.constexpr = plan.COLUMNS
    block, head, first = own_rows(first_head, key_length, KEYS, KEYS)
    phi_key = head_of(phi_key, head, num_heads, key_length, plan)
    grad_phi_key = head_of(grad_phi_key, head, num_heads, key_length, plan)
    grad_state = state_of(grad_states, block, plan)

    phi_rows = phi_of(phi_key, first, KEYS, plan)
    value = head_of(value, head, num_heads, key_length, plan)
    V = for_linear(load_slab(value, first, 0, KEYS, COLUMNS), value, plan)  # [KEYS, COLUMNS]
    dV = tl.zeros([KEYS, COLUMNS], tl.float32)
    along = tl.zeros([KEYS], tl.float32)
    for feature in range(0, COLUMNS, plan.FEATURES):
        dh = tl.load(grad_state + h_slab(feature, plan))  # [FEATURES, COLUMNS]
        dz = tl.load(grad_state + z_slab(feature, plan)).to(tl.float32)  # [FEATURES]
        phi = load_phi(phi_rows, feature, KEYS, plan.FEATURES, plan)
        dV = dot(phi, dh, dV, plan.TF32)  # [Alg. 2 L17]
        along += tl.sum(phi.to(tl.float32) * dz[None, :], 1)
    along += tl.sum(V.to(tl.float32) * dV, 1)  # phi . dphi, [KEYS]
    for feature in range(0, COLUMNS, plan.FEATURES):
        dh = tl.load(grad_state + h_slab(feature, plan))  # [FEATURES, COLUMNS]
        dz = tl.load(grad_state + z_slab(feature, plan)).to(tl.float32)  # [FEATURES]
        dphi = dot(V, tl.trans(dh), None, plan.TF32) + dz[None, :]  # [KEYS, FEATURES] [Alg. 2 L16]
        if plan.SOFTMAX:  # dx = phi (dphi - phi . dphi)
            phi = load_phi(phi_rows, feature, KEYS, plan.FEATURES, plan)
            dphi = phi.to(tl.float32) * (dphi - along[:, None])
        store(grad_phi_key, first, feature, dphi)
    store(head_of(grad_value, head, num_heads, key_length, plan), first, 0, dV)


@triton.jit(do_not_specialize=SIZES)
def grad_weight_kernel(
    grad_value, value, partial,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """A part of the gradient of Proj's weight: FEATURES rows of dV^T V, over each PARTS-th tile of a head's keys.

    dV is the share of V W^T. The parts are added up outside, in an order that depends on the sizes alone.
    """
    FEATURES: tl.constexpr = plan.FEATURES
    COLUMNS: tl.constexpr = plan.COLUMNS
    SLABS: tl.constexpr = COLUMNS // FEATURES
    program = tl.program_id(0)
    head = program // (PARTS * SLABS)
    feature = program % SLABS * FEATURES
    grad_value = head_of(grad_value, head, num_heads, key_length, plan)
    value = head_of(value, head, num_heads, key_length, plan)
    acc = tl.zeros([FEATURES, COLUMNS], tl.float32)
    start = program // SLABS % PARTS * plan.KEYS
    # Not pipelined, for the reason that `linear_rows` gives.
    for step in tl.range(tl.cdiv(key_length - start, PARTS * plan.KEYS), num_stages=1):
        first = start + step * (PARTS * plan.KEYS)
        dV = load_slab(grad_value, first, feature, plan.KEYS, FEATURES)  # [KEYS, FEATURES]
        V = load_slab(value, first, 0, plan.KEYS, COLUMNS)  # [KEYS, COLUMNS]
        acc = dot(tl.trans(dV), V, acc)
    row = program.to(tl.int64) // SLABS * COLUMNS + feature + tl.arange(0, FEATURES)
    tl.store(partial + (row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]), acc)


def grad_weight(call: Call, dV: Tokens) -> Tensor:
    """The gradient of Proj's weight from the linear branch's share of dV: the sum of dV^T V. # (D, D) float32"""
    cut, parts = call.cut("grad_weight"), call.heads * PARTS.value
    partial = torch.empty(parts, call.columns, call.columns, dtype=torch.float32, device=dV.data.device)
    programs = parts * (call.columns // cut.plan.FEATURES)
    call.start(grad_weight_kernel, cut, programs, dV, call.value, partial)
    total = partial.sum(0)
    return total if call.head_dim == call.columns else total[: call.head_dim, : call.head_dim]


def backward(
    call: Call,
    grad_linear: Tokens,
    weight: Tensor | None,
    row_Dl: Tensor | None,
    dphi_Q: Tokens,
    dphi_K: Tokens,
    dV: Tokens,
) -> None:
    """Fill dphi_Q and dphi_K (with a share of dQ and dK where phi is softmax), and dV with this branch's share.

    With Proj's weight, `grad_linear` is the gradient of Proj(O^l), and dV gets the share of V W^T. D^l is left in
    `row_Dl`, (B * H, Tq * block_q) float32, where there is one. [Alg. 2 L2]
    """
    sums_of = MarginalSums(call, weight, None if weight is None else dV, per_query_block=2, tensors=2)
    all_grad_sums = torch.empty_like(sums_of.sums)
    of_keys = (call.phi_key, call.value if weight is None else dV, dphi_K, dV)
    query_cut, key_cut = call.cut("grad_sums"), call.cut("grad_keys")
    for first, heads, sums in sums_of:
        grad_sums = part(all_grad_sums, 0, heads)
        args = (call.phi_query, grad_linear, dphi_Q, None if row_Dl is None else row_Dl[first:], sums, grad_sums)
        call.start(grad_sums_kernel, query_cut, heads * sums.shape[1], *args, first_head=first)
        grad_states = sums_of.back(first, grad_sums)
        call.start(grad_keys_kernel, key_cut, heads * grad_states.shape[1], *of_keys, grad_states, first_head=first)
