"""SLA where a model calls `F.scaled_dot_product_attention`, without a change to the model's code.

    for block in model.blocks:
        replace_sdpa(block.attention, SparseLinearAttention(64, critical_ratio=0.05))
    ...
    restore_sdpa(model.blocks[0].attention)

While such a module runs its forward, a `TorchFunctionMode` of torch passes the one call on to the layer, under whatever
name the code calls the function. The layer is a submodule, `sla`, and its weights are part of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import check_layout, check_tensors, check_type, shown
from ..module import SparseLinearAttention
from ..sla2 import SLA2Attention


def replace_sdpa(module: nn.Module, layer: SparseLinearAttention | SLA2Attention) -> None:
    """Lets `layer` compute what `module` asks of `F.scaled_dot_product_attention`.

    `layer` becomes `module.sla`, on the device of the module's parameters; `module.to()` applies to it afterwards. Call
    this before an optimizer is made, before `torch.compile`, and before a wrapper.

    A boolean `attn_mask` of shape (B or 1, 1, 1, Nk) hides whole keys, such as the padding of a text. The layer then
    runs on one batch entry at a time, with the keys that the mask shows, and computes nothing for the others. All
    queries stay.

    Args:
        module: calls the function once in each forward: an attention module, not a block that holds two of them.
        layer: for this module only, with its head dimension; `SLA2Attention` works too.

    Raises:
        TypeError, ValueError: module is not a `torch.nn.Module`, has an attribute `sla` already, or has a forward that
            something else has replaced; layer is neither `SparseLinearAttention` nor `SLA2Attention`.

    The module's forward then raises:
        ValueError: the call asks for another mask, causality, dropout or grouped heads, none of which SLA has.
        RuntimeError: the function was not called exactly once. `nn.MultiheadAttention` calls it where this cannot see
            it, and kernels of other packages do not call it.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(layer, (SparseLinearAttention, SLA2Attention)):
        raise TypeError(f"layer must be a SparseLinearAttention or an SLA2Attention, got {type(layer).__name__}")
    if hasattr(module, "sla"):
        raise ValueError(f"module must have no attribute 'sla', which the layer becomes, got a {type(module).__name__}")
    if "forward" in vars(module):
        raise ValueError("module must have the forward of its class, got one that something else has replaced")
    first = next(module.parameters(), None)
    module.sla = layer if first is None else layer.to(first.device)
    vars(module)["forward"] = partial(_forward, module)


def restore_sdpa(module: nn.Module) -> None:
    """Takes the layer of `replace_sdpa` out again, and drops its weights.

    Raises:
        ValueError: there is none, or something else has replaced the module's forward since.
    """
    forward = getattr(module, "forward", None)
    if not (isinstance(forward, partial) and forward.func is _forward):
        raise ValueError(f"module must be as replace_sdpa left it, got a {type(module).__name__} with another forward")
    del module.forward, module.sla


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    mode = _Replacement(module.sla)
    with mode:
        out = type(module).forward(module, *args, **kwargs)
    if mode.calls != 1:
        raise RuntimeError(
            "module must call F.scaled_dot_product_attention once in a forward, for its layer to compute; "
            f"{type(module).__name__} called it {mode.calls} times"
        )
    return out


class _Replacement(TorchFunctionMode):
    """Sees every function of torch that is called, and replaces one."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        self.calls += 1
        return _attend(self.layer, *args, **kwargs or {})


def _attend(
    layer: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The arguments of `F.scaled_dot_product_attention`, those of them that SLA has."""
    if not isinstance(dropout_p, (int, float)) or dropout_p:
        raise ValueError(f"dropout_p must be 0, SLA has no attention weights to drop; got {shown(dropout_p)}")
    if is_causal is not False:
        raise ValueError(f"is_causal must be False, SLA attends to all keys; got {shown(is_causal)}")
    if enable_gqa is not False:
        raise ValueError(f"enable_gqa must be False, SLA has a key head for each query head; got {shown(enable_gqa)}")
    if attn_mask is None:
        return layer(query, key, value, scale=scale)
    check_type("attn_mask", attn_mask, Tensor)
    check_layout("attn_mask", attn_mask)
    check_tensors(query=query, key=key, value=value)
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"value must have key's number of tokens {key.shape[2]}, got {value.shape[2]}")
    batch, keys = key.shape[0], key.shape[2]
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in ((batch, 1, 1, keys), (1, 1, 1, keys)):
        raise ValueError(
            f"attn_mask must be None, or a boolean ({batch} or 1, 1, 1, {keys}) that hides whole keys, "
            f"got {attn_mask.dtype} {tuple(attn_mask.shape)}"
        )
    # Entries may differ in their number of keys, so the layer gets them one by one.
    entries = zip(query, key, value, attn_mask[:, 0, 0].expand(batch, keys), strict=True)
    return torch.cat([layer(q[None], k[None, :, seen], v[None, :, seen], scale=scale) for q, k, v, seen in entries])
