"""SLA in the self-attention of Wan's transformer, and of its relatives, in diffusers. Needs the extra `diffusers`.

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

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from diffusers import ModelMixin, WanTransformer3DModel
except ImportError as missing:
    raise ImportError(
        "sla_ref.integrations.diffusers needs diffusers 0.36 or newer: pip install 'sla-ref[diffusers]'"
    ) from missing

from ..block_map import DEFAULT_BLOCK, DEFAULT_CRITICAL_RATIO, BlockMap
from ..checks import check_block_size, check_ratio, check_scale
from ..feature_maps import FeatureMap
from ..module import SparseLinearAttention
from ..sla2 import SLA2Attention
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
from .ulysses import check_heads, gather_tokens, own_heads, split_tokens, ulysses_attention

__all__ = [
    "MODELS",
    "install_sla",
    "load_sla",
    "load_sla_state_dict",
    "read_checkpoint",
    "remove_sla",
    "save_sla",
    "set_schedule",
    "sla_parameters",
    "split_sla_state_dict",
]


MODELS = (
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "WanAnimateTransformer3DModel",
    "ChronoEditTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
)
"""The models of diffusers that have Wan's self-attention."""

# What each variant accepts, of the arguments of `install_sla` that some variants lack.
_VARIANTS: dict[str, tuple[str, ...]] = {
    "paper": ("negligible_ratio", "proj_init", "router"),
    "main": (),
    "SLA-1": (),
    "sla2": ("alpha", "router", "query_length", "proj"),
}


def install_sla(
    transformer: ModelMixin,
    critical_ratio: float = DEFAULT_CRITICAL_RATIO,
    negligible_ratio: float | None = None,
    *,
    layers: Iterable[int] | None = None,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    feature_map: str | FeatureMap = "softmax",
    proj_init: str = "zero",
    variant: str = "paper",
    alpha: str | None = None,
    router: str | Callable[..., BlockMap] | None = None,
    query_length: int | None = None,
    proj: bool | None = None,
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
    role: str | None = None,
) -> None:
    """Puts an SLA layer of its own into each block's self-attention; cross-attention stays as it is.

    Its weights are created float32 on the block's device, to be trained; `transformer.to()` applies to them afterwards.
    Call this before `torch.compile` or a wrapper for several devices, and before an optimizer is made.
    `transformer.parameters()` then lists the backbone's parameters first, as without SLA, and SLA's behind them.

    With a group of P ranks, each rank's blocks work on its part of the tokens, N / P of them with their own rotary
    embeddings, and its attention on its part of the heads: see `sla_ref.integrations.ulysses`. Input and output stay
    whole and are the same on all ranks.

    Args:
        transformer: one of `MODELS`, as `pipeline.transformer`; Wan 2.2 has a second, `transformer_2`.
        critical_ratio: as in `sla_ref.SparseLinearAttention`.
        negligible_ratio: likewise; 0.10 if None. Only variant "paper" takes one.
        layers: numbers of the blocks that get SLA, the others stay dense; all if None. The control blocks of WanVACE
            are numbered after the others.
        block_q, block_k, feature_map, backend: as in `sla_ref.SparseLinearAttention`.
        proj_init: likewise, for variant "paper" only. The authors' variants start Proj at zero.
        variant: "paper"; "sla2" for `sla_ref.SLA2Attention`; "main" or "SLA-1" for weights trained with the authors'
            code, TurboDiffusion's for example: see `sla_ref.integrations.thu_ml`, which computes in bfloat16.
        alpha, query_length, proj: as in `sla_ref.SLA2Attention`, whose defaults apply if None; for variant "sla2" only.
            With alpha="block", query_length is the number of tokens, after patches are made, of the one video size that
            the model then runs at.
        router: as in both layers, for the variants "paper" and "sla2"; "pooled" if None. A learned one is trained with
            SLA2's soft choice, which the processors' `tau` asks for, and frozen before anything else runs.
        group: ranks to split the tokens between, `torch.distributed.group.WORLD` for all; None: no split. For a
            `WanTransformer3DModel` only.
        role: the transformer's name in its pipeline, "transformer" or "transformer_2". The files of `save_sla` carry
            it, and `load_sla` wants the same. None means "transformer", except that a file with the name transformer_2,
            or in a folder of that name, is saved as that one's.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, SLA is installed already, the transformer's
            self-attention has another processor than diffusers' own, is split over devices, has no weights yet, or has
            heads that the ranks of the group cannot share out evenly. The transformer is then as it was.
    """
    attentions = _self_attentions(transformer)
    chosen = range(len(attentions)) if layers is None else _block_numbers("layers", layers, len(attentions))
    if not chosen:
        raise ValueError("layers must hold at least one number, got none")
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, _VARIANTS))}, got {variant!r}")
    given: dict[str, Any] = {"negligible_ratio": negligible_ratio, "alpha": alpha, "router": router, "proj": proj}
    given |= {"query_length": query_length, "proj_init": None if proj_init == "zero" else proj_init}
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if name not in _VARIANTS[variant]:
            default = "zero" if name == "proj_init" else None
            raise ValueError(f"{name} must be {default!r} for variant {variant!r}, got {value!r}")
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
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(
                f"group must be None unless the model is a WanTransformer3DModel, got a {type(transformer).__name__}"
            )
        check_heads(attentions["blocks.0.attn1"].heads, group)
        if len(chosen) < len(attentions):
            raise ValueError(
                "layers must be None with a group: a dense layer would attend only to its rank's tokens; "
                f"got {len(chosen)} of {len(attentions)} layers"
            )
    common: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "feature_map": feature_map, "backend": backend}
    new, numbered = [], list(attentions.items())
    for place, attention in (numbered[number] for number in chosen):
        device = next(attention.parameters()).device
        if type(attention.processor) is not (original := attention._default_processor_cls):
            kind = type(attention.processor).__name__
            raise ValueError(f"transformer must have diffusers' {original.__name__} in {place}, got {kind}")
        if device.type == "meta":
            raise ValueError(f"transformer must hold its weights, got {place} on the meta device; load them first")
        heads, head_dim = attention.heads, attention.inner_dim // attention.heads
        processor: _WanSelfAttention
        if variant == "paper":
            processor = WanSLAProcessor(head_dim, critical_ratio, **common, **options)
        elif variant == "sla2":
            processor = WanSLA2Processor(head_dim, heads, critical_ratio, **common, **options)
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


def remove_sla(transformer: ModelMixin) -> None:
    """Puts back the processors that `install_sla` replaced, and with that the original model; drops SLA's weights.

    Raises:
        TypeError: transformer is not one of `MODELS`.
        ValueError: it has no SLA.
    """
    attentions = _self_attentions(transformer)
    if _HOOKS not in vars(transformer):
        raise ValueError("transformer must have SLA installed, got one without")
    for hook in vars(transformer).pop(_HOOKS):
        hook.remove()
    del transformer.parameters, transformer._skip_layerwise_casting_patterns  # those of the class show again
    for attention in attentions.values():
        if isinstance(attention.processor, _WanSelfAttention):
            attention.set_processor(attention.processor.replaced)


def set_schedule(
    transformer: ModelMixin,
    *,
    min_tokens: int = 1,
    dense_layers: Iterable[int] = (),
    dense_above: float | None = None,
) -> None:
    """Sets where a transformer with SLA still computes full attention; without arguments, nowhere.

    A dense layer calls the processor that SLA replaced. Each call sets the whole schedule and drops the previous one.

    Args:
        transformer: with SLA, which `install_sla` put there without a group.
        min_tokens: shorter sequences stay dense.
        dense_layers: numbers of the blocks that stay dense. They keep their SLA weights, unused.
        dense_above: a time in the scheduler's unit, which falls during sampling. Steps at a greater time than this are
            dense: `scheduler.timesteps[2].item()` makes the first two steps dense, and None makes none of them dense. A
            batch is dense if the times of all its samples are greater; of several times of a sample, the greatest
            counts. Forwards that record gradients ignore it: a training step without SLA would leave Proj without
            gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, transformer has no SLA, or its tokens are split
            between the ranks of a group. The schedule is then as it was.
    """
    attentions = _self_attentions(transformer)
    check_block_size("min_tokens", min_tokens)
    dense = _block_numbers("dense_layers", dense_layers, len(attentions))
    if dense_above is not None:
        check_scale(dense_above, "dense_above")
    if _HOOKS not in vars(transformer):
        raise ValueError("transformer must have SLA installed, got one without")
    processors = _processors(transformer)
    if any(processor.group is not None for processor in processors.values()):
        raise ValueError("transformer must have SLA without a group: dense attention would see only its rank's tokens")
    for number, processor in processors.items():
        processor.min_tokens = sys.maxsize if number in dense else min_tokens
        processor.dense_step = False
    for handle in vars(transformer)[_HOOKS]:
        handle.remove()
    vars(transformer)[_HOOKS] = hooks = []
    if dense_above is not None:
        hook = partial(_find_dense_step, dense_above)
        hooks.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))


_HOOKS = "_sla_hooks"  # on the transformer: what splits its tokens or watches its times, and the sign that it has SLA
_SKIP = "_skip_layerwise_casting_patterns"  # diffusers'


# diffusers has a copy of the computation for each model. Its name tells it from other computations, which may rotate or
# normalise in another way although their modules have the same names.
_WANS_COMPUTATION = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")


def _self_attentions(transformer: ModelMixin) -> dict[str, Any]:
    """Those of Wan's kind by their places, in the order of their numbers."""
    attentions = {
        f"{stack}.{number}.attn1": getattr(block, "attn1", None)
        for stack in ("blocks", "vace_blocks")
        for number, block in enumerate(getattr(transformer, stack, ()))
    }
    computed = {getattr(each, "_default_processor_cls", type(None)).__name__ for each in attentions.values()}
    if not isinstance(transformer, ModelMixin) or not computed or not computed.issubset(_WANS_COMPUTATION):
        places = ("transformer", "module", "_orig_mod", "get_base_model")  # of pipelines and wrappers
        hint = next(
            (f"take its .{each}, before anything wraps it" for each in places if hasattr(transformer, each)),
            "sla_ref.integrations.sdpa puts SLA into other models",
        )
        raise TypeError(
            f"transformer must be one of diffusers' {', '.join(MODELS)}, got {type(transformer).__name__}; {hint}"
        )
    return attentions


def _processors(transformer: ModelMixin) -> dict[int, _WanSelfAttention]:
    """Those of SLA by their block's number."""
    processors = (attention.processor for attention in _self_attentions(transformer).values())
    return {number: each for number, each in enumerate(processors) if isinstance(each, _WanSelfAttention)}


@torch.compiler.disable  # it reads a time, which may be on a GPU
def _find_dense_step(
    dense_above: float, transformer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Before a forward: compares its timestep, (B,) or (B, n) with several for each sample."""
    timestep = inputs[1] if len(inputs) > 1 else named["timestep"]
    early = timestep.reshape(len(timestep), -1).amax(1) > dense_above
    dense_step = not torch.is_grad_enabled() and bool(early.all())
    for processor in _processors(transformer).values():
        processor.dense_step = dense_step


def _backbone_first(transformer: ModelMixin, recurse: bool = True) -> Iterator[nn.Parameter]:
    """`transformer.parameters()` with those of SLA behind all others."""
    added = {id(own) for each in _processors(transformer).values() for own in each.parameters()}
    return iter(sorted(type(transformer).parameters(transformer, recurse), key=lambda own: id(own) in added))


def _block_numbers(name: str, numbers: Iterable[int], depth: int) -> list[int]:
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Iterable):
        raise TypeError(f"{name} must be block numbers, got {numbers!r}")
    chosen = list(numbers)
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must hold ints, got {number!r} of type {type(number).__name__}")
    if len(set(chosen)) < len(chosen) or not all(0 <= number < depth for number in chosen):
        raise ValueError(f"{name} must hold different numbers from 0 to {depth - 1}, got {chosen}")
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
        for place, attention in _self_attentions(transformer).items():
            if not isinstance(attention.processor, _WanSelfAttention):
                raise RuntimeError(
                    f"{place} must keep SLA, since install_sla has split the tokens: "
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

    replaced: Any  # diffusers' own processor
    group: dist.ProcessGroup | None
    role: str | None
    min_tokens = 1
    dense_step = False
    # diffusers sets this on processors that have it, where tokens are split over devices.
    _parallel_config: Any = None

    @property
    def _attention_backend(self) -> Any:
        """What diffusers' set_attention_backend sets on processors that have it: it is for full attention."""
        return self.replaced._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.replaced._attention_backend = backend

    def forward(
        self,
        attn: Any,
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
        if self.dense_step or hidden_states.shape[1] < self.min_tokens:
            return self.replaced(attn, hidden_states, rotary_emb=rotary_emb)
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
            out = self.attend(query, key, value)
        else:
            out = ulysses_attention(self.attend, query, key, value, self.group)
        out = out.transpose(1, 2).flatten(-2)
        for step in attn.to_out:  # projection, dropout
            out = step(out)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """The attention itself, (B, H, N, D) from (B, H, N, D) each; H are this rank's heads where there is a group."""
        out: Tensor = super().forward(query, key, value, **options)
        return out


class WanSLAProcessor(_WanSelfAttention, SparseLinearAttention):  # type: ignore[misc]  # forward takes other arguments
    """An SLA layer as the attention processor of Wan's self-attention; arguments as `sla_ref.SparseLinearAttention`."""


class WanSLA2Processor(_WanSelfAttention, SLA2Attention):  # type: ignore[misc]
    """SLA2's layer in the same place; arguments as `sla_ref.SLA2Attention`."""

    tau: float | None = None
    """Temperature of the soft choice, to be set for stage 1 of a learned router; None: the hard choice."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        heads = None if self.group is None else own_heads(self.heads, self.group)
        return super().attend(query, key, value, tau=self.tau, heads=heads, **options)


class WanReleasedSLAProcessor(_WanSelfAttention, thu_ml.SparseLinearAttention):  # type: ignore[misc]
    """The authors' layer in the same place; arguments as `sla_ref.integrations.thu_ml.SparseLinearAttention`."""


def _rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features of `tokens` (B, N, H, D) by its angle, which cos and sin (1, N, 1, D) hold twice."""
    cos, sin = cos[..., 0::2], sin[..., 1::2]  # the same elements as diffusers
    even, odd = tokens[..., 0::2], tokens[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(tokens.dtype)
