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

With Proj inside, the linear branch runs on V W^T, and O is the sum of both branches and the bias. [Eq. 6]

No kernel reads a pair of blocks that is not critical. Every output element is written by one program, sums have a fixed
order and there are no atomics, so results repeat bit for bit. One-letter names are those of the glossary in
`sla_ref.reference`.

The rooms: `launch` says how kernels are cut, what they are given and how they are started, `tokens` reads and writes
tiles, `labels` makes lists and weights of a block map, `sparse` and `linear` hold the two branches, and this page puts
them together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...block_map import BlockMap
from ...protocol import Gradients, Inputs, Proj, Saved, SavedLayer
from . import linear, sparse
from .labels import read_labels
from .launch import INTERPRETED, SIZES, Call, Tokens, strided, tiled
from .linear import MarginalSums, linear_rows, state_of
from .sparse import sparse_rows
from .tokens import Head, head_of, load, load_slab, own_rows, store

name = "triton"
softmax_inside = True
proj_inside = True

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None if it can."""
    if INTERPRETED or torch.cuda.is_initialized() or torch.cuda.is_available():  # the last takes long to say it
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
    query, key, value, phi_query, lists, sums, bias, out, out_linear, lse, scale,
    first_head, num_heads, query_length, key_length, capacity, plan: tl.constexpr,
):  # fmt: skip
    """Both branches for ROWS rows of query block i. [Alg. 1 L7-L16]

    `out` is O^s, or with Proj inside O; then there is no `out_linear`, and the sums are those of V W^T. [Eq. 6]
    """
    ROWS: tl.constexpr = plan.ROWS
    COLUMNS: tl.constexpr = plan.COLUMNS
    block, head, first = own_rows(first_head, query_length, plan.BLOCK_Q, ROWS)
    query = head_of(query, head, num_heads, query_length, plan)
    key = head_of(key, head, num_heads, key_length, plan)
    value = head_of(value, head, num_heads, key_length, plan)
    out = head_of(out, head, num_heads, query_length, plan)
    listed = (first_head * tl.cdiv(query_length, plan.BLOCK_Q) + block).to(tl.int64)
    kv_indices = lists.indices + listed * capacity
    Q = load(query, first, ROWS, COLUMNS)
    O, L = sparse_rows(Q, key, value, kv_indices, tl.load(lists.num_blocks + listed), scale, plan)  # [Eq. 4]
    if bias is not None:
        column = tl.arange(0, COLUMNS)
        O += tl.load(bias + column, mask=column < plan.D, other=0.0).to(tl.float32)[None, :]
    store(out, first, 0, O)
    row = first + tl.arange(0, ROWS)
    tl.store(lse + head.to(tl.int64) * query_length + row, L, mask=row < query_length)

    if sums is not None:
        phi_query = head_of(phi_query, head, num_heads, query_length, plan)
        O = linear_rows(phi_query, first, state_of(sums, block, plan), ROWS, plan)  # [Eq. 5]
        if out_linear is None:  # O^s has waited in memory: the registers hold one branch at a time
            tl.debug_barrier()
            # It is contiguous. Told so, the compiler computes the addresses again and keeps no registers for them.
            out = Head(out.data, 0, 0, plan.D, query_length, plan.D)
            O = O.to(out.data.dtype.element_ty).to(tl.float32)  # rounded, as Proj's result is outside
            store(out, first, 0, O + load_slab(out, first, 0, ROWS, COLUMNS).to(tl.float32))  # [Eq. 6]
        else:
            store(head_of(out_linear, head, num_heads, query_length, plan), first, 0, O)


def forward(inputs: Inputs) -> Saved:
    """Algorithm 1, lines 4 and 7 to 16; arguments and result as in `sla_ref.protocol.Backend`."""
    query = inputs.query
    make = torch.empty_like if inputs.block_map.has_marginal else torch.zeros_like
    out_linear = make(query, memory_format=torch.contiguous_format)
    out, lse = _forward(inputs, out_linear, None)
    return Saved(out, out_linear, lse)


def forward_layer(inputs: Inputs, proj: Proj) -> SavedLayer:
    """The same with Proj and the sum: phi(Q) H W^T is linear in H, and H in V, so V W^T takes the place of V there."""
    return SavedLayer(*_forward(inputs, None, proj))


def _forward(inputs: Inputs, out_linear: Tensor | None, proj: Proj | None) -> tuple[Tensor, Tensor]:
    """`out` and lse as `forward_kernel` writes them."""
    weight, bias = proj or (None, None)
    query, block_map = inputs.query, inputs.block_map
    with torch.cuda.device_of(query):
        call = Call(inputs, weight, bias)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(*query.shape[:3], dtype=torch.float32, device=query.device)
        cut = call.cut("forward")
        rows, keys = cut.plan.ROWS, cut.plan.KEYS
        tokens = (*tiled((call.query, rows), (call.key, keys), (call.value, keys)), call.phi_query)
        call.lists = read_labels(block_map, call.state_dtype, backward=False)
        outputs = (bias, strided(out), None if out_linear is None else strided(out_linear), lse)
        chunks: Iterable[tuple[int, int, Tensor | None]] = [(0, call.heads, None)]
        if block_map.has_marginal:  # the backward needs more memory than four tensors
            chunks = MarginalSums(call, weight, None, per_query_block=1, tensors=4)
        for first, heads, sums in chunks:
            programs = heads * block_map.labels.shape[2] * (block_map.block_q // rows)
            args = (*tokens, call.lists.keys, sums, *outputs, inputs.scale)
            call.start(forward_kernel, cut, programs, *args, first_head=first)
    return out, lse


def backward(
    grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
) -> Gradients:
    """Algorithm 2; arguments and result as in `sla_ref.protocol.Backend`."""
    gradients, _ = _backward(inputs, saved.out_sparse, saved.lse, grad_sparse, grad_linear, grad_lse, None)
    return gradients


def backward_layer(grad_out: Tensor, inputs: Inputs, proj: Proj, saved: SavedLayer) -> tuple[Gradients, Proj]:
    """The same from the gradient of O, and the gradients of Proj."""
    gradients, grad_proj = _backward(inputs, saved.out, saved.lse, grad_out, grad_out, None, proj)
    assert grad_proj is not None
    return gradients, grad_proj


def _backward(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_linear: Tensor,
    grad_lse: Tensor | None,
    proj: Proj | None,
) -> tuple[Gradients, Proj | None]:
    """Both branches back; `out` as `forward_kernel` writes it, and with Proj inside both gradients are that of O."""
    query, block_map = inputs.query, inputs.block_map
    weight = row_Dl = grad_weight = None
    # The sparse branch adds to what the linear one has left.
    make = torch.empty_like if block_map.has_marginal else torch.zeros_like

    def grad(like: Tensor, dtype: torch.dtype) -> Tokens:
        return strided(make(like, dtype=dtype, memory_format=torch.contiguous_format))

    with torch.cuda.device_of(query):
        of_out, of_grad = strided(out), strided(grad_out)
        of_linear = of_grad if grad_linear is grad_out else strided(grad_linear)
        call = Call(inputs, of_out, of_grad, of_linear, lse, grad_lse, *proj or ())
        dphi_dtype = query.dtype if call.softmax else torch.float32
        dphi_Q, dphi_K, dV = grad(query, dphi_dtype), grad(inputs.key, dphi_dtype), grad(inputs.value, query.dtype)
        call.lists = read_labels(block_map, call.state_dtype, backward=True)
        if block_map.has_marginal:
            if proj is not None:
                weight, rows = proj.weight, block_map.labels.shape[2] * block_map.block_q
                row_Dl = torch.empty(call.heads, rows, dtype=torch.float32, device=query.device)
            linear.backward(call, of_linear, weight, row_Dl, dphi_Q, dphi_K, dV)
            if proj is not None:
                grad_weight = linear.grad_weight(call, dV)
        elif proj is not None:
            grad_weight = torch.zeros_like(proj.weight, dtype=torch.float32)
        if call.softmax:  # the gradient through phi is a part of query's and key's, in the same tensors
            dQ, dK = dphi_Q, dphi_K
        else:  # the states of the linear branch are gone now
            dQ, dK = grad(query, query.dtype), grad(inputs.key, query.dtype)
        grad_bias = sparse.backward(call, of_out, lse, of_grad, grad_lse, dQ, dK, dV, proj, row_Dl)
    of_phi = (None, None) if call.softmax else (dphi_Q.data, dphi_K.data)
    gradients = Gradients(dQ.data, dK.data, dV.data, *of_phi)
    if grad_weight is None or grad_bias is None:
        return gradients, None
    return gradients, Proj(grad_weight, grad_bias)
