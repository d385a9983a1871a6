"""What a backend is: one forward, one backward, and two questions it must answer.

A backend is a module (or any object) with the attributes of `Backend`. It computes the two branches of SLA for a block
map it is given; classification, feature maps, Proj and the final sum are not its business.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .block_map import BlockMap


class Saved(NamedTuple):
    """What a forward returns and the backward needs, beside the five inputs. Memory: O(N D).

    Because this is fixed, the forward of one backend can be followed by the backward of another.
    """

    out_sparse: Tensor
    """O^s, (B, H, Nq, D), contiguous, the input's dtype. [Eq. 4]"""
    out_linear: Tensor
    """O^l, (B, H, Nq, D), contiguous, the input's dtype. [Eq. 5]"""
    lse: Tensor
    """L, natural log-sum-exp of a row's critical scores, (B, H, Nq), float32 (float64 for float64 inputs)."""


class Gradients(NamedTuple):
    """Gradients of the five inputs, each contiguous, in the shape and dtype of its input."""

    query: Tensor
    key: Tensor
    value: Tensor
    phi_query: Tensor
    phi_key: Tensor


class Backend(Protocol):
    """The functions of a backend. Tensors arrive validated (see `sla_ref.sparse_linear_attention`), with any strides.

    `query`, `phi_query`: (B, H, Nq, D); `key`, `value`, `phi_key`: (B, H, Nk, D); all of one dtype and device.

    A backend may compute the default feature map, softmax, where it reads phi. It then has two functions more, equal to
    these with phi = softmax(query), softmax(key): `forward_softmax(query, key, value, block_map, scale) -> Saved` and
    `backward_softmax(grad_sparse, grad_linear, query, key, value, saved, block_map, scale)`, which returns the
    gradients of query, key and value, those through phi included.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot be used on this machine, with the command that would help; None if it can."""
        ...

    def unsupported(self, query: Tensor, block_map: BlockMap) -> str | None:
        """Why this backend cannot take this input; None if it can."""
        ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        phi_query: Tensor,
        phi_key: Tensor,
        block_map: BlockMap,
        scale: float,
    ) -> Saved:
        """Algorithm 1, lines 4 and 7 to 16."""
        ...

    def backward(
        self,
        grad_sparse: Tensor,
        grad_linear: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        phi_query: Tensor,
        phi_key: Tensor,
        saved: Saved,
        block_map: BlockMap,
        scale: float,
    ) -> Gradients:
        """Algorithm 2."""
        ...
