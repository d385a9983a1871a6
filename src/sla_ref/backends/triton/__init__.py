"""Algorithms 1 and 2 as GPU kernels, in Triton: the backend `triton`.

What one query block i needs, picture of one head (Tq x Tk blocks; `#` critical, `.` marginal, blank negligible):

              key block j ->                    sparse branch: walk along the list of the #, kv_indices[i],
            +---------------------+             with an online softmax                         `sparse.sparse_rows`
          i | # . .   . # . . . . |   ------>
    query   | . # .   . . .   . # |             linear branch: all the . at once. Their states h_j, z_j are
    block   | . . # . .   # . .   |             made once per key block                        `linear.states_kernel`
      |     | . . . #   . .   . # |             and added up for every query block by one matrix product,
      v     +---------------------+             (Tq x Tk) weights @ (Tk x D D) states          `linear.add_up`
                  ^                             phi(Q_i) then meets its H_i and Z_i            `linear.linear_rows`
                  |
    The backward of K and V walks down the #    dQ along rows, as the forward                  `sparse.dq_kernel`
    of a column: q_indices[q_offsets[j] ...].   dK, dV down columns                          `sparse.dkdv_kernel`
    Its linear branch is the mirror image:      dH_i, dZ_i, dQ^phi per query block             `linear.grad_sums_kernel`
    weights^T @ (dH_i, dZ_i) gives the dh_j.    dK^phi, dV per key block                     `linear.grad_keys_kernel`

No kernel reads a pair of blocks that is not critical. Every output element is written by one program, sums have a fixed
order and there are no atomics, so results repeat bit for bit. One-letter names are those of the glossary in
`sla_ref.reference`.

The rooms: `launch` says how kernels are cut and started, `tokens` reads and writes tiles, `labels` makes lists and
weights of a block map, `sparse` and `linear` hold the two branches, and this page puts them together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...block_map import BlockMap
from ...protocol import Gradients, Inputs, Saved
from . import linear, sparse
from .labels import read_labels
from .launch import INTERPRETED, SIZES, Call
from .linear import MarginalSums, linear_rows, state_of
from .sparse import sparse_rows
from .tokens import head_of, load, own_rows, store, strided, tiled

name = "triton"
softmax_inside = True

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None if it can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "no CUDA GPU is usable here; to run the kernels slowly on the CPU, in Triton's interpreter, "
        "set TRITON_INTERPRET=1 in the environment before Python starts"
    )


def unsupported(query: Tensor, block_map: BlockMap) -> str | None:
    """Why this backend cannot take this input; None if it can."""
    if (reason := refuses(query, block_map)) is not None:
        return reason
    if query.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"takes CUDA tensors, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), got {query.device}"
    return None


def refuses(query: Tensor, block_map: BlockMap) -> str | None:
    """Which dtype or size, if any, the kernels do not take on any device."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    for word, size in (("block_q", block_map.block_q), ("block_k", block_map.block_k)):
        if size not in BLOCK_SIZES:
            return f"takes {word} in {BLOCK_SIZES}, got {size}"
    return None


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, phi_query, lists, sums, out_sparse, out_linear, lse, scale,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """Both branches for ROWS rows of query block i. [Alg. 1 L7-L16]"""
    ROWS: tl.constexpr = plan.ROWS
    block, head, first = own_rows(first_head, query_length, plan.BLOCK_Q, ROWS)
    query = head_of(query, head, num_heads, query_length, plan)
    key = head_of(key, head, num_heads, key_length, plan)
    value = head_of(value, head, num_heads, key_length, plan)
    listed = (first_head * tl.cdiv(query_length, plan.BLOCK_Q) + block).to(tl.int64)
    kv_indices = lists.indices + listed * capacity
    Q = load(query, first, ROWS, plan.COLUMNS)
    O, L = sparse_rows(Q, key, value, kv_indices, tl.load(lists.num_blocks + listed), scale, plan)  # [Eq. 4]
    store(head_of(out_sparse, head, num_heads, query_length, plan), first, 0, O)
    row = first + tl.arange(0, ROWS)
    tl.store(lse + head.to(tl.int64) * query_length + row, L, mask=row < query_length)

    phi_query = head_of(phi_query, head, num_heads, query_length, plan)
    O = linear_rows(phi_query, first, state_of(sums, block, plan), ROWS, plan)  # [Eq. 5]
    store(head_of(out_linear, head, num_heads, query_length, plan), first, 0, O)


def forward(inputs: Inputs) -> Saved:
    """Algorithm 1, lines 4 and 7 to 16; arguments and result as in `sla_ref.protocol.Backend`."""
    call = Call(inputs)
    query, key, value, block_map = inputs.query, inputs.key, inputs.value, inputs.block_map
    out_sparse = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    out_linear = torch.empty_like(out_sparse)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tiles = call.tiles("forward")
    with torch.cuda.device_of(query):
        tokens = (*tiled((query, tiles.rows), (key, tiles.keys), (value, tiles.keys)), strided(call.phi_query))
        call.lists = read_labels(block_map, call.state_dtype, backward=False)
        outputs = (strided(out_sparse), strided(out_linear), lse)
        # The backward needs more memory than four tensors.
        for first, sums in MarginalSums(call, per_query_block=1, tensors=4):
            programs = sums.shape[0] * sums.shape[1] * (block_map.block_q // tiles.rows)
            args = (*tokens, call.lists.keys, sums, *outputs, inputs.scale)
            call.start(forward_kernel, tiles, programs, *args, first_head=first)
    return Saved(out_sparse, out_linear, lse)


def backward(
    grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
) -> Gradients:
    """Algorithm 2; arguments and result as in `sla_ref.protocol.Backend`."""
    call = Call(inputs, grad_sparse, grad_linear, grad_lse, *saved)

    def empty(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=like.device)

    dtype = inputs.query.dtype
    dphi_dtype = dtype if call.softmax else torch.float32
    dphi_Q, dphi_K = empty(inputs.query, dphi_dtype), empty(inputs.key, dphi_dtype)
    dV = empty(inputs.value, dtype)
    with torch.cuda.device_of(inputs.query):
        call.lists = read_labels(inputs.block_map, call.state_dtype, backward=True)
        linear.backward(call, grad_linear, dphi_Q, dphi_K, dV)
        if call.softmax:  # the gradient through phi is a part of query's and key's, in the same tensors
            sparse.backward(call, saved, grad_sparse, grad_lse, dphi_Q, dphi_K, dV)
            return Gradients(dphi_Q, dphi_K, dV, None, None)
        dQ, dK = empty(inputs.query, dtype), empty(inputs.key, dtype)  # the states of the linear branch are gone by now
        sparse.backward(call, saved, grad_sparse, grad_lse, dQ, dK, dV)
        return Gradients(dQ, dK, dV, dphi_Q, dphi_K)
