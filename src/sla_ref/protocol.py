"""What a backend is: one forward, one backward, and two questions it must answer.

A backend is a module (or any object) with the attributes of `Backend`. It computes the two branches of SLA for a block
map it is given. Classification is not its business; the feature map softmax, Proj and the final sum are, if it says so.

Official implementation: thu-ml/SLA, branch SLA-1 at 325cc75, sparse_linear_attention/kernel.py, lines 380 to 491.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .block_map import BlockMap


class Inputs(NamedTuple):
    """What both passes read. Tensors arrive validated (see `sla_ref.sparse_linear_attention`), with any strides.

    They are on one device. Query, key and value have one dtype, and so have the features, with one exception: where
    the operator computes softmax for the backend, the features of float16 and bfloat16 inputs are float32. A row's
    denominator may rest on features that float16 would round to zero.
    """

    query: Tensor
    """Q, (B, H, Nq, D)."""
    key: Tensor
    """K, (B, H, Nk, D)."""
    value: Tensor
    """V, (B, H, Nk, D)."""
    phi_query: Tensor | None
    """phi(Q), (B, H, Nq, D); None for a backend with `softmax_inside` when phi is softmax."""
    phi_key: Tensor | None
    """phi(K), (B, H, Nk, D); None when phi_query is None."""
    block_map: BlockMap
    """The class of every block pair."""
    scale: float
    """Factor on the scores Q K^T."""


class Saved(NamedTuple):
    """What a forward returns, and what the backward needs besides the inputs. Memory: O(N D).

    Because this is fixed, the forward of one backend can be followed by the backward of another.
    """

    out_sparse: Tensor
    """O^s, (B, H, Nq, D), contiguous, the input's dtype. [Eq. 4]"""
    out_linear: Tensor
    """O^l, (B, H, Nq, D), contiguous, the input's dtype. [Eq. 5]"""
    lse: Tensor
    """L, natural log-sum-exp of a row's critical scores, (B, H, Nq), float32 (float64 for float64 inputs)."""


class Gradients(NamedTuple):
    """Gradients of the five input tensors, each contiguous and in the shape of its input."""

    query: Tensor
    """(B, H, Nq, D), the input's dtype. With phi_query = None it includes the gradient through softmax."""
    key: Tensor
    """(B, H, Nk, D), the input's dtype. With phi_key = None it includes the gradient through softmax."""
    value: Tensor
    """(B, H, Nk, D), the input's dtype."""
    phi_query: Tensor | None
    """(B, H, Nq, D), float32 (float64 for float64 inputs), None where phi_query is None.

    It leaves float16's range where phi is small, although its product with the slope of phi does not.
    """
    phi_key: Tensor | None
    """(B, H, Nk, D), as phi_query's."""


class Proj(NamedTuple):
    """The learnable linear map of the layer, or the gradients of its two parts. [Eq. 6]"""

    weight: Tensor
    """(D, D), contiguous, the tokens' dtype; a gradient is float32 (float64 for float64 inputs)."""
    bias: Tensor
    """(D,), as the weight."""


class SavedLayer(NamedTuple):
    """What the forward of a whole layer returns, and all that its backward needs besides the inputs."""

    out: Tensor
    """O = O^s + Proj(O^l), (B, H, Nq, D), contiguous, the input's dtype. [Eq. 6]"""
    lse: Tensor
    """As in `Saved`."""


class Backend(Protocol):
    """The attributes of a backend: its name, what else it computes, two questions and the two algorithms."""

    name: str

    softmax_inside: bool
    """Whether the backend computes phi itself when phi is softmax, where it reads query and key; False if missing.

    It then gets phi_query = phi_key = None in that case. For any other feature map, and for backends that say False,
    phi is computed outside and the gradient through it too.
    """

    proj_inside: bool
    """Whether the backend has `forward_layer` and `backward_layer`, which compute the whole layer; False if missing.

    For backends that say False, `attention.py` multiplies by Proj's weight and adds the branches.
    """

    def unavailable(self) -> str | None:
        """Why this backend cannot be used on this machine, with the command that would help; None if it can."""
        ...

    def unsupported(self, query: Tensor, block_map: BlockMap) -> str | None:
        """Why this backend cannot take this input; None if it can."""
        ...

    def forward(self, inputs: Inputs) -> Saved:
        """Algorithm 1, lines 4 and 7 to 16."""
        ...

    def backward(
        self, grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
    ) -> Gradients:
        """Algorithm 2.

        `grad_sparse` and `grad_linear` are (B, H, Nq, D) in the input's dtype, with any strides. `grad_lse` (B, H, Nq)
        has lse's dtype and is None where nothing was made of lse. It enters line 11 as dS = P (dP - (D^s - dL)).
        """
        ...

    def forward_layer(self, inputs: Inputs, proj: Proj) -> SavedLayer:
        """`forward`, Proj and the sum. [Eq. 6]"""
        ...

    def backward_layer(self, grad_out: Tensor, inputs: Inputs, proj: Proj, saved: SavedLayer) -> tuple[Gradients, Proj]:
        """Algorithm 2 and the gradients of Proj, from the gradient of the layer's output, with any strides."""
        ...


def check_saved(saved: Saved, inputs: Inputs, backend: Backend) -> None:
    """Raise TypeError unless a forward returned what `Saved` says: type, shapes, dtypes, device, contiguous memory."""
    out, rows = _like(inputs.query), (inputs.query.shape[:3], _sum_dtype(inputs))
    _check("forward", Saved, saved, [out, out, rows], inputs, backend)


def check_saved_layer(saved: SavedLayer, inputs: Inputs, backend: Backend) -> None:
    """The same for the forward of a whole layer."""
    expected = [_like(inputs.query), (inputs.query.shape[:3], _sum_dtype(inputs))]
    _check("forward_layer", SavedLayer, saved, expected, inputs, backend)


def check_gradients(gradients: Gradients, inputs: Inputs, backend: Backend) -> None:
    """Raise TypeError unless a backward returned what `Gradients` says for the inputs that it got."""
    phi = [None if each is None else (each.shape, _sum_dtype(inputs)) for each in inputs[3:5]]
    _check("backward", Gradients, gradients, [*map(_like, inputs[:3]), *phi], inputs, backend)


def _like(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _sum_dtype(inputs: Inputs) -> torch.dtype:
    return torch.promote_types(inputs.query.dtype, torch.float32)


def _check(
    function: str,
    kind: type[Saved | SavedLayer | Gradients],
    result: object,
    expected: list,
    inputs: Inputs,
    backend: Backend,
) -> None:
    where = f"backend {getattr(backend, 'name', backend)!r}: {function} must return"
    if not isinstance(result, kind):
        raise TypeError(f"{where} a sla_ref.protocol.{kind.__name__}, got {type(result).__name__}")
    device = inputs.query.device
    for field, tensor, wanted in zip(kind._fields, result, expected, strict=True):
        got = _like(tensor) if isinstance(tensor, Tensor) else tensor
        if got != wanted:
            raise TypeError(f"{where} {field} as {_words(wanted)}, got {_words(got)}")
        if isinstance(tensor, Tensor) and not (tensor.is_contiguous() and tensor.device == device):
            strides = f"strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            raise TypeError(f"{where} {field} contiguous on {device}, got {strides} on {tensor.device}")


def _words(form: object) -> str:
    match form:
        case (tuple(shape), torch.dtype() as dtype):
            return f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
    return "None" if form is None else type(form).__name__
