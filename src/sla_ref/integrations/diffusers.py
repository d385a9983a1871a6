"""SLA in the self-attention of a Wan transformer of diffusers. Needs the extra `diffusers`.

    transformer = WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
    install_sla(transformer, critical_ratio=0.05)
    optimizer = torch.optim.AdamW(sla_parameters(transformer))
    ...
    save_sla(transformer, "sla.safetensors")

diffusers chooses its attention backends by names from a closed list, with no place for weights. An attention processor
that is an `nn.Module` has one: its weights are part of the model, as `blocks.{i}.attn1.processor.proj_l.weight`.
`from_pretrained` drops names it does not know, so the added weights travel in a file of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
except ImportError as missing:
    raise ImportError(
        "sla_ref.integrations.diffusers needs diffusers 0.36 or newer: pip install 'sla-ref[diffusers]'"
    ) from missing

from ..block_map import DEFAULT_BLOCK, DEFAULT_CRITICAL_RATIO, DEFAULT_NEGLIGIBLE_RATIO
from ..checks import check_block_size, check_ratio
from ..feature_maps import FeatureMap
from ..module import SparseLinearAttention
from . import thu_ml
from .checkpoints import (
    ROLES,
    load_sla,
    load_sla_state_dict,
    read_checkpoint,
    save_sla,
    sla_parameters,
    split_sla_state_dict,
)
from .ulysses import check_heads, gather_tokens, split_tokens, ulysses_attention

__all__ = [
    "install_sla",
    "load_sla",
    "load_sla_state_dict",
    "read_checkpoint",
    "remove_sla",
    "save_sla",
    "sla_parameters",
    "split_sla_state_dict",
]


def install_sla(
    transformer: WanTransformer3DModel,
    critical_ratio: float = DEFAULT_CRITICAL_RATIO,
    negligible_ratio: float | None = None,
    *,
    layers: Iterable[int] | None = None,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    feature_map: str | FeatureMap = "softmax",
    proj_init: str = "zero",
    variant: str = "paper",
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
    role: str | None = None,
) -> None:
    """Puts an SLA layer of its own into each block's self-attention; cross-attention stays as it is.

    Proj is created float32 on the block's device, to be trained; `transformer.to()` applies to it afterwards.
    Call this before `torch.compile` or a wrapper for several devices, and before an optimizer is made.
    `transformer.parameters()` then lists the backbone's parameters first, as without SLA, and SLA's behind them.

    With a group of P ranks, each rank's blocks work on its part of the tokens, N / P of them with their own rotary
    embeddings, and its attention on its part of the heads: see `sla_ref.integrations.ulysses`. Input and output stay
    whole and are the same on all ranks.

    Args:
        transformer: a `WanTransformer3DModel`, as `pipeline.transformer`; Wan 2.2 has a second, `transformer_2`.
        critical_ratio: as in `sla_ref.SparseLinearAttention`.
        negligible_ratio: likewise; 0.10 if None. Only variant "paper" takes one.
        layers: numbers of the blocks that get SLA, the others stay dense; all if None.
        block_q, block_k, feature_map, backend: as in `sla_ref.SparseLinearAttention`.
        proj_init: likewise. The other variants start Proj at zero.
        variant: "paper", or "main" or "SLA-1" for weights trained with the authors' code, TurboDiffusion's for example:
            see `sla_ref.integrations.thu_ml`, which computes in bfloat16.
        group: ranks to split the tokens between, `torch.distributed.group.WORLD` for all; None: no split.
        role: the transformer's name in its pipeline, "transformer" or "transformer_2". The files of `save_sla` carry
            it, and `load_sla` wants the same. None means "transformer", except that a file with the name transformer_2,
            or in a folder of that name, is saved as that one's.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, SLA is installed already, the transformer's
            self-attention has another processor than diffusers' own, is split over devices, has no weights yet, or has
            heads that the ranks of the group cannot share out evenly. The transformer is then as it was.
    """
    attentions = _self_attentions(transformer)
    chosen = _chosen(layers, len(attentions))
    # The layers check the rest, but the authors' one has other names for these.
    check_ratio("critical_ratio", critical_ratio, zero_allowed=False)
    check_block_size("block_q", block_q)
    check_block_size("block_k", block_k)
    if role not in (None, *ROLES):
        raise ValueError(f"role must be one of {', '.join(map(repr, ROLES))} or None, got {role!r}")
    if _HOOKS in vars(transformer):
        raise ValueError("transformer must be without SLA, which is installed already; remove_sla takes it out")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            f"transformer must be whole, got one that enable_parallelism has split over devices. {_NO_RING}"
        )
    if group is not None:
        check_heads(attentions[0].heads, group)
        if len(chosen) < len(attentions):
            raise ValueError(
                "layers must be None with a group: a dense layer would attend only to its rank's tokens; "
                f"got {len(chosen)} of {len(attentions)} layers"
            )
    new = []
    for number in chosen:
        attention = attentions[number]
        place, device = f"blocks.{number}.attn1", next(attention.parameters()).device
        if type(attention.processor) is not WanAttnProcessor:
            kind = type(attention.processor).__name__
            raise ValueError(f"transformer must have diffusers' WanAttnProcessor in {place}, got {kind}")
        if device.type == "meta":
            raise ValueError(f"transformer must hold its weights, got {place} on the meta device; load them first")
        head_dim = attention.inner_dim // attention.heads
        processor: _WanSelfAttention
        if variant == "paper":
            share = DEFAULT_NEGLIGIBLE_RATIO if negligible_ratio is None else negligible_ratio
            processor = WanSLAProcessor(
                head_dim,
                critical_ratio,
                share,
                block_q=block_q,
                block_k=block_k,
                feature_map=feature_map,
                proj_init=proj_init,
                backend=backend,
            )
        elif negligible_ratio is not None:
            raise ValueError(f"negligible_ratio must be None for variant {variant!r}, got {negligible_ratio!r}")
        elif proj_init != "zero":
            raise ValueError(f"proj_init must be 'zero' for variant {variant!r}, got {proj_init!r}")
        else:
            processor = WanReleasedSLAProcessor(
                head_dim, critical_ratio, feature_map, block_q, block_k, variant=variant, backend=backend
            )
        processor.replaced, processor.group, processor.role = attention.processor, group, role
        new.append((attention, processor.to(device)))
    for attention, processor in new:
        attention.set_processor(processor)
    vars(transformer)[_HOOKS] = [] if group is None else _split(transformer, group)
    # EMAModel.save_pretrained copies parameters by their place into a transformer without SLA.
    vars(transformer)["parameters"] = partial(_backbone_first, transformer)
    # Proj keeps its dtype under enable_layerwise_casting.
    vars(transformer)[_SKIP] = [*(getattr(transformer, _SKIP, None) or ()), r"attn1\.processor"]


def remove_sla(transformer: WanTransformer3DModel) -> None:
    """Puts back the processors that `install_sla` replaced, and with that the original model; drops SLA's weights.

    Raises:
        TypeError: transformer is not a `WanTransformer3DModel`.
        ValueError: it has no SLA.
    """
    attentions = _self_attentions(transformer)
    if _HOOKS not in vars(transformer):
        raise ValueError("transformer must have SLA installed, got one without")
    for hook in vars(transformer).pop(_HOOKS):
        hook.remove()
    del transformer.parameters, transformer._skip_layerwise_casting_patterns  # those of the class show again
    for attention in attentions:
        if isinstance(attention.processor, _WanSelfAttention):
            attention.set_processor(attention.processor.replaced)


_HOOKS = "_sla_hooks"  # on the transformer: where to find what splits its tokens, and the sign that it has SLA
_SKIP = "_skip_layerwise_casting_patterns"  # diffusers'


def _self_attentions(transformer: WanTransformer3DModel) -> list[WanAttention]:
    if not isinstance(transformer, WanTransformer3DModel):
        places = ("transformer", "module", "_orig_mod", "get_base_model")  # of pipelines and wrappers
        hint = next(
            (f"; take its .{each}, before anything wraps it" for each in places if hasattr(transformer, each)), ""
        )
        raise TypeError(f"transformer must be diffusers' WanTransformer3DModel, got {type(transformer).__name__}{hint}")
    return [block.attn1 for block in transformer.blocks]


def _backbone_first(transformer: WanTransformer3DModel, recurse: bool = True) -> Iterator[nn.Parameter]:
    """`transformer.parameters()` with those of SLA behind all others."""
    processors = (attention.processor for attention in _self_attentions(transformer))
    added = {id(own) for each in processors if isinstance(each, nn.Module) for own in each.parameters()}
    return iter(sorted(type(transformer).parameters(transformer, recurse), key=lambda own: id(own) in added))


def _chosen(layers: Iterable[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be block numbers or None, got {layers!r}")
    chosen = list(layers)
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"layers must hold ints, got {number!r} of type {type(number).__name__}")
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= number < depth for number in chosen):
        raise ValueError(f"layers must hold different numbers from 0 to {depth - 1}, at least one, got {chosen}")
    return chosen


def _split(transformer: WanTransformer3DModel, group: dist.ProcessGroup) -> list[Any]:
    """Cuts the tokens up where they enter the blocks, with all that belongs to a token, and joins them at the end."""

    def angles(module: nn.Module, inputs: Any, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(split_tokens(each, 1, group) for each in cos_sin)  # (1, N, 1, D)

    def times(module: nn.Module, inputs: Any, conditions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        time, projected, *texts = conditions
        if time.dim() == 3:  # (B, N, C): Wan 2.2 may have a time for each token
            time, projected = split_tokens(time, 1, group), split_tokens(projected, 1, group)
        return time, projected, *texts

    def tokens(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for number, attention in enumerate(_self_attentions(transformer)):
            if not isinstance(attention.processor, _WanSelfAttention):
                raise RuntimeError(
                    f"blocks.{number}.attn1 must keep SLA, since install_sla has split the tokens: "
                    f"{type(attention.processor).__name__} would attend only to this rank's; remove_sla ends the split"
                )
        return split_tokens(inputs[0], 1, group), *inputs[1:]  # (B, N, C)

    def output(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        return gather_tokens(patches, 1, group)

    return [
        transformer.rope.register_forward_hook(angles),
        transformer.condition_embedder.register_forward_hook(times),
        transformer.blocks[0].register_forward_pre_hook(tokens),
        transformer.proj_out.register_forward_hook(output),
    ]


# --- the processor ---------------------------------------------------------------------------------------------------


_NO_RING = (
    "SLA needs all keys at once, for its classes and for both normalisations, so no ring can run it; "
    "install_sla(..., group=...) splits tokens by all-to-all"
)


class _WanSelfAttention(nn.Module):
    """What Wan does around its self-attention; the attention itself is that of the other base class."""

    replaced: WanAttnProcessor
    group: dist.ProcessGroup | None
    role: str | None
    # diffusers sets this on processors that have it, where tokens are split over devices.
    _parallel_config: Any = None

    def forward(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention of `hidden_states` (B, N, C), the arguments as diffusers passes them."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("SLA takes self-attention without a mask, got encoder_hidden_states or attention_mask")
        if self._parallel_config is not None:
            raise RuntimeError(f"enable_parallelism has split the tokens over devices. {_NO_RING}")
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # The norm runs over all heads at once, so it comes before they are told apart.
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (query, key, value))  # (B, N, H, D)
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        value = value.to(query.dtype)  # autocast may keep the norms in float32
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, H, N, D)
        if self.group is None:
            out = super().forward(query, key, value)
        else:
            classify = self.classify if isinstance(self, SparseLinearAttention) else None
            out = ulysses_attention(super().forward, query, key, value, self.group, classify=classify)
        out = out.transpose(1, 2).flatten(-2)
        for step in attn.to_out:  # projection, dropout
            out = step(out)
        return out


class WanSLAProcessor(_WanSelfAttention, SparseLinearAttention):  # type: ignore[misc]  # forward takes other arguments
    """An SLA layer as the attention processor of Wan's self-attention; arguments as `sla_ref.SparseLinearAttention`."""


class WanReleasedSLAProcessor(_WanSelfAttention, thu_ml.SparseLinearAttention):  # type: ignore[misc]
    """The authors' layer in the same place; arguments as `sla_ref.integrations.thu_ml.SparseLinearAttention`."""


def _rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features of `tokens` (B, N, H, D) by its angle, which cos and sin (1, N, 1, D) hold twice."""
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    even, odd = tokens[..., 0::2], tokens[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(tokens.dtype)
