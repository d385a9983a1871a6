"""The public function: check the input, choose the backend, run the one operator that autograd and compilers know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .block_map import (
    DEFAULT_BLOCK,
    DEFAULT_CRITICAL_RATIO,
    DEFAULT_NEGLIGIBLE_RATIO,
    BlockMap,
    check_block_map,
    classify_blocks,
    trusted_map,
    version,
)
from .checks import FLOATS, check_layout, check_scale, check_tensors, shown
from .feature_maps import FeatureMap, resolve_feature_map, softmax
from .operators import fold_into_batch, one_by_one, operator, positional
from .protocol import (
    Backend,
    Gradients,
    Inputs,
    Proj,
    Saved,
    SavedLayer,
    check_gradients,
    check_saved,
    check_saved_layer,
)


class SLAOutput(NamedTuple):
    """The two branches before Proj and the sum, O = sparse + Proj(linear). [Eq. 6]"""

    sparse: Tensor
    """O^s, (B, H, Nq, D), the input's dtype. [Eq. 4]"""
    linear: Tensor
    """O^l, (B, H, Nq, D), the input's dtype. [Eq. 5]"""
    lse: Tensor
    """Log-sum-exp (natural) of each row's critical scores, (B, H, Nq), float32 or float64."""


def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_map: BlockMap | None = None,
    critical_ratio: float | None = None,
    negligible_ratio: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    feature_map: str | FeatureMap = "softmax",
    scale: float | None = None,
    backend: str | None = None,
) -> SLAOutput:
    """Exact attention over the critical key blocks, and linear attention over the marginal ones. [Eq. 4] [Eq. 5]

    Under autocast, query, key and value are cast to the autocast dtype first (float64 stays), and nothing inside
    follows autocast. Sums are float32 or better. Results repeat bit for bit on one device.

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64, any strides. Nq, Nk >= 1 may leave a partial block.
        key, value: (B, H, Nk, D), query's dtype and device.
        block_map: the classes of all block pairs; made by `classify_blocks` from the next four arguments if None.
        critical_ratio, negligible_ratio: shares of critical and negligible key blocks; 0.05 and 0.10 if None.
        block_q, block_k: tokens per block; 64 if None.
        feature_map: phi: "softmax", "elu" (elu + 1), "relu", or a callable that returns a new float tensor of its
            argument's shape and device.
        scale: factor on the scores, finite and > 0; 1 / sqrt(D) if None.
        backend: name of a backend; see `sla_ref.set_backend` for what applies if None.

    Returns:
        The outputs of both branches and the log-sum-exp. Gradients flow from all three to query, key and value,
        through phi too.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or size, a ratio or block size
            is given with a block_map, or the backend cannot take the input.
        RuntimeError: the backend cannot be used on this machine; or a forward-mode derivative or the gradient of a
            gradient is asked for.
    """
    phi = resolve_feature_map(feature_map)
    prepared = prepare(query, key, value, scale, backend)
    if block_map is None:
        block_map = classify_blocks(
            prepared.query,
            prepared.key,
            DEFAULT_CRITICAL_RATIO if critical_ratio is None else critical_ratio,
            DEFAULT_NEGLIGIBLE_RATIO if negligible_ratio is None else negligible_ratio,
            block_q=DEFAULT_BLOCK if block_q is None else block_q,
            block_k=DEFAULT_BLOCK if block_k is None else block_k,
        )
    else:
        given = {"critical_ratio": critical_ratio, "negligible_ratio": negligible_ratio}
        given |= {"block_q": block_q, "block_k": block_k}
        for name, argument in given.items():
            if argument is not None:
                got = shown(argument)
                raise ValueError(f"{name} must not be given with a block_map, which already says it; got {got}")
    return attend(prepared, phi, phi, block_map)


class Prepared(NamedTuple):
    """Checked arguments: query, key and value in the dtype that is computed in, no default left open."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    backend: str


def prepare(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str | None) -> Prepared:
    """Check what does not depend on the block map. Under autocast, the tensors get its dtype; float64 stays."""
    check_tensors(query=query, key=key, value=value)
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"value must have key's number of tokens {key.shape[2]}, got {value.shape[2]}")
    if scale is not None:
        check_scale(scale)
    backend = backends.get_backend() if backend is None else backend
    backends.require_known(backend)
    tensors = (query, key, value)
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        raise RuntimeError(
            "sparse_linear_attention has no forward-mode derivative (jvp, jacfwd, linearize, forward_ad): its gradient "
            "is Algorithm 2, a backward pass; sla_ref.reference.sparse_linear_attention has both"
        )
    dtype = autocast_dtype(query)
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return Prepared(query, key, value, 1 / math.sqrt(query.shape[3]) if scale is None else float(scale), backend)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast has on the tensor's device. None where it is off, or does not exist, as on "meta"."""
    kind = tensor.device.type
    # What is compiled is on a device that has autocast, and torch 2.11's compiler could not follow the question.
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if has_autocast and torch.is_autocast_enabled(kind) else None


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the tensor's device."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)


def attend(prepared: Prepared, phi_query: FeatureMap, phi_key: FeatureMap, block_map: BlockMap) -> SLAOutput:
    """`sparse_linear_attention` with a feature map each for query and key, as a layer with learnable ones needs."""
    *tensors, options = _arguments(prepared, phi_query, phi_key, block_map)
    if torch.is_grad_enabled():
        return SLAOutput(*_Attention.apply(*tensors, options))
    return SLAOutput(*_forward(*tensors, *options))


def attend_whole(
    prepared: Prepared, phi_query: FeatureMap, phi_key: FeatureMap, block_map: BlockMap, proj: Proj
) -> Tensor:
    """The output of the layer, O = O^s + Proj(O^l), for a Proj that is a weight and a bias in query's dtype. [Eq. 6]"""
    *tensors, labels, options = _arguments(prepared, phi_query, phi_key, block_map)
    if torch.is_grad_enabled():
        return _Layer.apply(*tensors, *proj, labels, options)[0]
    return _layer(*tensors, *proj, labels, *options)[0]


def _arguments(prepared: Prepared, phi_query: FeatureMap, phi_key: FeatureMap, block_map: BlockMap) -> tuple[Any, ...]:
    """Those of `_Attention`."""
    query, key, value, scale, backend = prepared
    _check_block_map(block_map, query, key)
    inside = phi_query is softmax and phi_key is softmax  # the default, which the operator computes by itself
    of_map = (block_map.max_critical, block_map.is_uniform, block_map.has_marginal)
    options = (*of_map, block_map.block_q, block_map.block_k, scale, backend)
    features = (None, None) if inside else (_features(phi_query, query, "query"), _features(phi_key, key, "key"))
    tensors = (query, key, value, *features)
    if torch.compiler.is_compiling():  # which does not follow a function that gets one tensor as two arguments
        tensors = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)
    return *tensors, block_map.labels, options


def _check_block_map(block_map: BlockMap, query: Tensor, key: Tensor) -> None:
    check_block_map(block_map)
    expected = (*query.shape[:3], key.shape[2])
    got = (*block_map.labels.shape[:2], block_map.query_length, block_map.key_length)
    if got != expected:
        raise ValueError(f"block_map must be for (batch, heads, Nq, Nk) = {tuple(expected)}, got one for {tuple(got)}")
    if block_map.labels.device != query.device:
        raise ValueError(f"block_map must be on query's device {query.device}, got {block_map.labels.device}")
    block_map.require_unchanged()


def _features(phi: FeatureMap, tokens: Tensor, name: str) -> Tensor:
    if (before := version(tokens)) is None:  # changes cannot be seen, so phi gets tokens of its own to change
        tokens = tokens.clone()
    features = phi(tokens)
    if before not in (None, version(tokens)):
        raise ValueError(f"feature_map must return a new tensor, it changed {name} in place")
    if not isinstance(features, Tensor):
        raise TypeError(f"feature_map must return a torch.Tensor, got {type(features).__name__} for {name}")
    check_layout("feature_map's result", features)
    if features.shape != tokens.shape:
        raise ValueError(
            f"feature_map must keep the shape of {name} {tuple(tokens.shape)}, it returned {tuple(features.shape)}"
        )
    if features.dtype not in FLOATS:
        raise TypeError(f"feature_map must return float16, bfloat16, float32 or float64, got {features.dtype}")
    if features.device != tokens.device:
        raise ValueError(f"feature_map must stay on {name}'s device {tokens.device}, it returned {features.device}")
    return features.to(tokens.dtype)


# --- one pass of a backend --------------------------------------------------------------------------------------------


def run_forward(backend: Backend, inputs: Inputs) -> Saved:
    """The backend's forward. In `inputs`, phi_query = phi_key = None means that phi is softmax."""
    given = _with_phi(backend, inputs)
    saved = backend.forward(given)
    check_saved(saved, given, backend)
    return saved


def run_backward(
    backend: Backend, grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, inputs: Inputs, saved: Saved
) -> Gradients:
    """The backend's backward. Where `inputs` has no phi, query and key get the gradient through softmax too."""
    if grad_lse is not None:  # a row without critical key has a constant lse, -inf
        grad_lse = grad_lse.masked_fill(saved.lse == -torch.inf, 0.0)
    given = _with_phi(backend, inputs)
    gradients = backend.backward(grad_sparse, grad_linear, grad_lse, given, saved)
    check_gradients(gradients, given, backend)
    return _through_softmax(gradients, inputs, given)


def _through_softmax(gradients: Gradients, inputs: Inputs, given: Inputs) -> Gradients:
    """The gradients of `inputs` from those of `given`, which has the softmax that `inputs` leaves to the operator."""
    if inputs.phi_query is not None or given.phi_query is None:
        return gradients
    return gradients._replace(
        query=_add_through_softmax(gradients.query, gradients.phi_query, given.phi_query),
        key=_add_through_softmax(gradients.key, gradients.phi_key, given.phi_key),
        phi_query=None,
        phi_key=None,
    )


def _with_phi(backend: Backend, inputs: Inputs) -> Inputs:
    if inputs.phi_query is not None or getattr(backend, "softmax_inside", False):
        return inputs
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    return inputs._replace(phi_query=softmax(inputs.query.to(dtype)), phi_key=softmax(inputs.key.to(dtype)))


def _add_through_softmax(grad: Tensor, grad_phi: Tensor | None, phi: Tensor | None) -> Tensor:
    """grad + phi (dphi - phi . dphi). dphi may lie beyond float16's range, its product with phi does not."""
    assert grad_phi is not None and phi is not None
    return (grad + phi * (grad_phi - (phi * grad_phi).sum(-1, keepdim=True))).to(grad.dtype)


def run_forward_layer(backend: Backend, inputs: Inputs, proj: Proj) -> list[Tensor]:
    """O and lse; and both branches, which the backward needs, where the backend does not add them itself. [Eq. 6]"""
    if getattr(backend, "proj_inside", False):
        given = _with_phi(backend, inputs)
        saved = backend.forward_layer(given, proj)
        check_saved_layer(saved, given, backend)
        return [*saved]
    sparse, linear, lse = run_forward(backend, inputs)
    return [sparse + torch.nn.functional.linear(linear, *proj), lse, sparse, linear]


def run_backward_layer(
    backend: Backend, grad_out: Tensor, inputs: Inputs, proj: Proj, saved: list[Tensor]
) -> tuple[Gradients, Proj]:
    """The gradients of the inputs, as `run_backward` gives them, and of Proj. `saved` is what the forward returned."""
    if getattr(backend, "proj_inside", False):
        given = _with_phi(backend, inputs)
        gradients, grad_proj = backend.backward_layer(grad_out, given, proj, SavedLayer(*saved))
        check_gradients(gradients, given, backend)
        return _through_softmax(gradients, inputs, given), grad_proj
    _, lse, sparse, linear = saved
    gradients = run_backward(backend, grad_out, grad_out @ proj.weight, None, inputs, Saved(sparse, linear, lse))
    rows = grad_out.flatten(0, 2)
    return gradients, Proj(rows.mT @ linear.flatten(0, 2), rows.sum(0))


# --- the operator ----------------------------------------------------------------------------------------------------
# Compilers take the two operators as they are. The two autograd functions around them hold the gradient, since
# torch.func cannot transform one that is registered with an operator. Of a BlockMap only the labels and what was read
# of them travel; its index lists are made inside. The backend travels as a string, so the backward runs on the
# backend of its forward, whatever is set by then.
# Without phi_query and phi_key, phi is softmax, nothing is kept of it for the backward, and the gradient through it is
# part of query's and key's.


@operator("forward")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor | None,
    phi_key: Tensor | None,
    labels: Tensor,
    max_critical: int,
    is_uniform: bool,
    has_marginal: bool,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (block_q, block_k, query.shape[2], key.shape[2])
    block_map = trusted_map(labels, *sizes, max_critical, is_uniform, has_marginal)
    chosen = backends.choose(backend, query, block_map)
    with without_autocast(query):
        return run_forward(chosen, Inputs(query, key, value, phi_query, phi_key, block_map, scale))


@operator("backward")
def _backward(
    grad_sparse: Tensor,
    grad_linear: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor | None,
    phi_key: Tensor | None,
    out_sparse: Tensor,
    out_linear: Tensor,
    lse: Tensor,
    labels: Tensor,
    max_critical: int,
    is_uniform: bool,
    has_marginal: bool,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> list[Tensor]:
    sizes = (block_q, block_k, query.shape[2], key.shape[2])
    block_map = trusted_map(labels, *sizes, max_critical, is_uniform, has_marginal)
    chosen = backends.choose(backend, query, block_map)
    inputs = Inputs(query, key, value, phi_query, phi_key, block_map, scale)
    with without_autocast(query):
        saved = Saved(out_sparse, out_linear, lse)
        gradients = run_backward(chosen, grad_sparse, grad_linear, grad_lse, inputs, saved)
    return _in_dtype(gradients, query.dtype)


def _in_dtype(gradients: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Those that there are, in this dtype; one kernel casts all that are in another."""
    given = [gradient for gradient in gradients if gradient is not None]
    others = [gradient for gradient in given if gradient.dtype != dtype]
    if not others:
        return given
    results = [gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype) for gradient in given]
    torch._foreach_copy_([new for new, old in zip(results, given, strict=True) if new is not old], others)
    return results


@torch.library.register_fake(_forward)
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), query.new_empty(query.shape), lse


@torch.library.register_fake(_backward)
def _(grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor | None, *rest: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in rest[:5] if tensor is not None]


fold_into_batch(_forward)
fold_into_batch(_backward)


class _Attention(torch.autograd.Function):
    """The outputs, differentiated by `_Gradient`."""

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        phi_query: Tensor | None,
        phi_key: Tensor | None,
        labels: Tensor,
        options: tuple[int, bool, bool, int, int, float, str],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(query, key, value, phi_query, phi_key, labels, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, labels, options = inputs
        ctx.set_materialize_grads(False)  # lse is seldom used: None then saves the kernels a read
        ctx.save_for_backward(*tensors, *output, labels)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *inputs, out_sparse, out_linear, lse, labels = ctx.saved_tensors
        grad_sparse, grad_linear = (
            torch.zeros_like(output) if grad is None else grad
            for grad, output in zip(grads, (out_sparse, out_linear), strict=False)
        )
        arguments = (grad_sparse, grad_linear, grads[2], *inputs, out_sparse, out_linear, lse, labels)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Gradient.apply(*arguments, ctx.options)
        else:
            gradients = _backward(*arguments, *ctx.options)
        return *gradients, *[None] * (7 - len(gradients))


class _Gradient(torch.autograd.Function):
    """The gradients of query, key and value, and of phi_query and phi_key if given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, options = arguments
        return tuple(_backward(*tensors, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            "sparse_linear_attention has no second derivative: its gradient cannot be differentiated again"
        )


# --- the whole layer as one operator ---------------------------------------------------------------------------------
# Where Proj is nothing but a weight and a bias, a backend may add the branches itself, and need not keep them. The
# operator is built as the one above.


@operator("layer")
def _layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor | None,
    phi_key: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    max_critical: int,
    is_uniform: bool,
    has_marginal: bool,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> list[Tensor]:
    sizes = (block_q, block_k, query.shape[2], key.shape[2])
    block_map = trusted_map(labels, *sizes, max_critical, is_uniform, has_marginal)
    chosen = backends.choose(backend, query, block_map)
    inputs = Inputs(query, key, value, phi_query, phi_key, block_map, scale)
    with without_autocast(query):
        return run_forward_layer(chosen, inputs, Proj(weight.contiguous(), bias.contiguous()))


@operator("layer_backward")
def _layer_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor | None,
    phi_key: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    out_sparse: Tensor | None,
    out_linear: Tensor | None,
    labels: Tensor,
    max_critical: int,
    is_uniform: bool,
    has_marginal: bool,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> list[Tensor]:
    sizes = (block_q, block_k, query.shape[2], key.shape[2])
    block_map = trusted_map(labels, *sizes, max_critical, is_uniform, has_marginal)
    chosen = backends.choose(backend, query, block_map)
    inputs = Inputs(query, key, value, phi_query, phi_key, block_map, scale)
    proj = Proj(weight.contiguous(), bias.contiguous())
    saved = [tensor for tensor in (out, lse, out_sparse, out_linear) if tensor is not None]
    with without_autocast(query):
        gradients, grad_proj = run_backward_layer(chosen, grad_out, inputs, proj, saved)
    return _in_dtype((*gradients, *grad_proj), query.dtype)


@torch.library.register_fake(_layer)
def _(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    labels, max_critical, is_uniform, has_marginal, block_q, block_k, _, backend = rest[-8:]
    sizes = (block_q, block_k, query.shape[2], key.shape[2])
    block_map = trusted_map(labels, *sizes, max_critical, is_uniform, has_marginal)
    inside = getattr(backends.choose(backend, query, block_map), "proj_inside", False)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    branches = [] if inside else [query.new_empty(query.shape), query.new_empty(query.shape)]
    return [query.new_empty(query.shape), lse, *branches]


@torch.library.register_fake(_layer_backward)
def _(grad_out: Tensor, *rest: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in rest[:7] if tensor is not None]


one_by_one(_layer)
one_by_one(_layer_backward)


class _Layer(torch.autograd.Function):
    """The output, and what else the forward keeps, differentiated by `_LayerGradient`."""

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        phi_query: Tensor | None,
        phi_key: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        options: tuple[int, bool, bool, int, int, float, str],
    ) -> tuple[Tensor, ...]:
        return tuple(_layer(query, key, value, phi_query, phi_key, weight, bias, labels, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, labels, options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for what is only kept
        ctx.save_for_backward(*tensors, *output, *[None] * (4 - len(output)), labels)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *rest: None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _LayerGradient.apply(grad_out, *ctx.saved_tensors, ctx.options)
        else:
            gradients = _layer_backward(grad_out, *ctx.saved_tensors, *ctx.options)
        *of_tokens, grad_weight, grad_bias = gradients
        return *of_tokens, *[None] * (5 - len(of_tokens)), grad_weight, grad_bias, None, None


class _LayerGradient(_Gradient):
    """The gradients of query, key and value, of phi_query and phi_key if given, and of Proj's weight and bias."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, options = arguments
        return tuple(_layer_backward(*tensors, *options))
