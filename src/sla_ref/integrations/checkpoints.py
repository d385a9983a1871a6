"""The weights that SLA adds to a model: saved, loaded, and read under the names of other projects.

Known names of Proj, each with `.weight` and `.bias`, i a block's number:

| whose | name |
|---|---|
| ours | the layer's place in the model, as `blocks.{i}.attn1.processor.proj_l` in a Wan transformer of diffusers |
| thu-ml/TurboDiffusion | `blocks.{i}.self_attn.attn_op.local_attn.proj_l`, in training after `net.` or `net_ema.` |
| FastVideo | `blocks.{i}.attn1.attn_impl.proj_l`, in training after `model.` or `roles.{role}.transformer.` |
| SimpleTuner's `sla_attention.pt` | `proj_l`, one for all layers |
| PEFT, where Proj is one of its `modules_to_save` | ours after `base_model.model.` |

SLA2's alpha and router have only our names: the layer's place with `alpha_logit`, `alpha_weight` or `router.scores.`.
These prefixes, `module.` and `transformer.` may come before any of the names, and those that torch's wrappers insert
anywhere. A model may be wrapped by torch or by PEFT. Everything is checked before anything is copied: on an error the
model is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..block_map import num_blocks
from ..checks import check_path, check_type, shown
from ..feature_maps import FeatureMap, Softmax
from ..files import whole
from ..module import SparseLinearAttention
from ..router import LearnedScores
from ..sla2 import SLA2Attention
from . import thu_ml
from .checkpoint_files import read_checkpoint, read_with_metadata

__all__ = [
    "ROLES",
    "Layer",
    "load_sla",
    "load_sla_state_dict",
    "read_checkpoint",
    "save_sla",
    "sla_layers",
    "sla_parameters",
    "split_sla_state_dict",
]

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")  # torch's, by what they hold
_INSERTED = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
_FRONT = re.compile(r"^(?:(?:net|net_ema|model|module|transformer|base_model|roles\.\w+)\.)+(?=blocks\.)")
_FOREIGN = re.compile(
    r"^blocks\.(\d+)\.(?:self_attn\.attn_op\.local_attn|attn1\.attn_impl)\.(proj_l\.(?:weight|bias))$"
)
_ADDED = re.compile(
    r"(?:^|\.)(?:(?:proj_l\.(?:weight|bias)|alpha_(?:logit|weight))$"
    r"|(?:phi_query|phi_key|feature_map(?:_[qk])?|router\.scores)\.)"
)
_SHARED = ("proj_l.weight", "proj_l.bias")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")

ROLES = ("transformer", "transformer_2")
"""The names of a pipeline's transformers. Wan 2.2 has two, for much and for little noise."""

Layer = SparseLinearAttention | SLA2Attention | thu_ml.SparseLinearAttention


def sla_layers(model: nn.Module) -> dict[str, Layer]:
    """The SLA layers inside a model by name, in the model's order. Names are those without wrappers.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: module for name, module in _modules(model) if isinstance(module, Layer)}
    if not layers:
        raise ValueError(f"model must have SLA layers, got a {type(model).__name__} without any")
    return layers


def sla_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that SLA added, as one group for an optimizer. Errors as `sla_layers`.

    Adapters of PEFT around them are not among them.
    """
    tensors = _tensors(model).values()
    return list(dict.fromkeys(each for each in tensors if isinstance(each, nn.Parameter)))  # layers may share some


@torch.no_grad()
def save_sla(model: nn.Module, path: str | Path) -> None:
    """Writes the weights that SLA added, and what they belong to, to a new safetensors file.

    With weights sharded by FSDP2, all ranks must call it. Each writes the file that it names, with whole weights.

    Args:
        model: a model with SLA layers.
        path: of the file, which must not exist; it is written whole or not at all.

    Raises:
        TypeError, ValueError: as `sla_layers`; ValueError if the weights are not at hand (on the meta device, on disk,
            sharded by anything but FSDP2), quantised, or changed by an adapter that is not merged.
        FileExistsError: the file exists.
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    tensors, path = _checked(model), check_path("path", path)
    if any(adapter.merged == adapter.disable_adapters for adapter in _adapters(model)):
        raise ValueError(
            "model must have the adapters in its SLA layers merged and enabled, or unmerged and disabled: otherwise a "
            "model without them would not compute the same with these weights; PEFT's merge_adapter() and diffusers' "
            "fuse_lora() merge them"
        )
    if path.exists():
        raise FileExistsError(f"path must name a new file, {path} exists")
    settings = _settings(model)
    if settings.get("role") == "":  # then a file that is called after the second one is the second one's
        settings["role"] = ROLES[1] if ROLES[1] in (path.stem, path.parent.name) else ROLES[0]
    # Names of one tensor would share memory, which safetensors refuses.
    data = save({name: _full(each).cpu().contiguous().clone() for name, each in tensors.items()}, settings)
    with whole(path) as temporary:
        temporary.write_bytes(data)


def load_sla(model: nn.Module, path: str | Path) -> None:
    """Copies the weights of a file into the SLA layers of a model.

    The layers must have the feature map, the variant, SLA2's form of alpha and the role that the weights were trained
    with, where the file says so. A file that names no variant counts as SLA's, and layers of SLA2 are refused. Ratios
    and block sizes may differ: they are choices of each run.

    Args:
        model: a model with SLA layers.
        path: what `save_sla` wrote, or another file that `read_checkpoint` and `load_sla_state_dict` accept.

    Raises:
        FileNotFoundError, TypeError, ValueError: as those two; ValueError for another feature map, variant, form of
            alpha or role.
    """
    (state_dict, metadata), settings = read_with_metadata(path), _settings(model)
    if "variant" not in metadata and "sla2" in settings["variant"]:
        raise ValueError(
            f"model must have SLA's own layers for {path}, which names no variant, got variant 'sla2'; if the weights "
            "are SLA2's, load_sla_state_dict accepts them, and split_sla_state_dict takes them out of a whole model's"
        )
    for setting, here in settings.items():
        here = here or ROLES[0]
        if (there := metadata.get(setting, here)) != here:
            raise ValueError(f"model must have {setting} {there!r} in its SLA layers, as {path} says, got {here!r}")
    try:
        load_sla_state_dict(model, state_dict)
    except (TypeError, ValueError) as error:
        kind = "folder" if Path(path).is_dir() else "file"
        raise type(error)(f"{error}; the state_dict is that of the {kind} {path}") from error


def split_sla_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The entries of a whole model's checkpoint that belong to SLA, and all others, both under the names they have.

    The first part is for `load_sla_state_dict`; what becomes of the second is yours to say.

    Raises:
        TypeError: state_dict does not map names to something.
    """
    check_type("state_dict", state_dict, Mapping)
    for name in state_dict:
        if not isinstance(name, str):
            raise TypeError(f"state_dict must map names to tensors, got {shown(name)} for a name")
    added = {name: value for name, value in state_dict.items() if _ADDED.search(name)}
    return added, {name: value for name, value in state_dict.items() if name not in added}


@torch.no_grad()
def load_sla_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Copies weights under any of the names above into the SLA layers of a model, every one of them.

    With weights sharded by FSDP2, all ranks must call it, each with the same state_dict.

    Args:
        model: a model with SLA layers.
        state_dict: their weights and nothing else. One of a whole model goes through `split_sla_state_dict` first. The
            "settings" that SimpleTuner writes are not read: they are arguments of the layers.

    Raises:
        TypeError: model is not a module, or state_dict does not map names to tensors.
        ValueError: a weight is missing, left over, given twice, without values, quantised or of another shape (all are
            listed); or the model's weights cannot be written, as in `save_sla`.
    """
    tensors = _checked(model)
    if any(adapter.merged for adapter in _adapters(model)):
        raise ValueError("model must have the adapters in its SLA layers unmerged: unmerging would spoil the weights")
    given = _named_as_in(model, _simple_tuner(state_dict))
    copies: dict[Tensor, Tensor] = {}
    faults = []
    for tensor in dict.fromkeys(tensors.values()):
        names = [name for name, each in tensors.items() if each is tensor]  # more than one for weights that are tied
        found = {source: value for name in names for source, value in given.get(name, {}).items()}
        faults += [fault for source, value in found.items() for fault in _misfits(tensor, source, value)]
        faults += [] if found else [f"missing: {names[0]}"]
        for name in names:
            if len(several := given.get(name, {})) > 1:
                faults.append(f"given {len(several)} times: {name}, as {', '.join(sorted(several))}")
        if not faults:
            copies[tensor], *others = (_full(value) for value in found.values())
            if any(not torch.equal(copies[tensor], other) for other in others):
                faults.append(f"different for weights that are tied in the model: {', '.join(found)}")
    left = [name for name in given if name not in tensors]
    faults += [f"left over: {name}" for name in left if _ADDED.search(name)]
    if other := [name for name in left if not _ADDED.search(name)]:
        faults.append(
            f"left over: {other[0]} and {len(other) - 1} more of other layers; split_sla_state_dict takes SLA's "
            "weights out of a whole model's"
        )
        if any(".lora_" in name for name in other):
            faults.append("load_lora_weights of diffusers' pipelines loads a LoRA")
    if faults:
        raise ValueError("state_dict must hold exactly the weights of the model's SLA layers; " + "; ".join(faults))
    for tensor, value in copies.items():
        tensor.copy_(_sharded_as(tensor, value))


# --- what a model holds ----------------------------------------------------------------------------------------------


def _inside(module: Any) -> nn.Module:
    """What computes inside wrappers of torch and PEFT; a module without any is returned as it is."""
    held = module._modules
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _inside(module.module)
    if hasattr(type(module), "get_base_model"):  # PEFT around a model
        return _inside(module.get_base_model())
    if "modules_to_save" in held and "original_module" in held:  # PEFT around a module that is trained whole
        active = () if module.disable_adapters else module.active_adapters
        return _inside(held["modules_to_save"][active[0]] if active else held["original_module"])
    for name in (*_WRAPPERS, "base_layer"):  # the last is PEFT's, next to an adapter
        if name in held:
            return _inside(held[name])
    return module


def _modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all modules in it by name, without wrappers; one that has several names comes under each."""
    module = _inside(module)
    yield name, module
    for child, inner in module._modules.items():
        if inner is not None:
            yield from _modules(inner, f"{name}.{child}".lstrip("."))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of the SLA layers; one that has several names comes under each."""
    return {
        f"{name}.{own}".lstrip("."): tensor
        for layer, inside in sla_layers(model).items()
        for name, module in _modules(inside, layer)
        for own, tensor in (module._parameters | module._buffers).items()
        if tensor is not None and own not in module._non_persistent_buffers_set
    }


def _adapters(model: nn.Module) -> list[Any]:
    """PEFT's adapters for weights of the SLA layers."""
    inside = (module for layer in sla_layers(model).values() for module in layer.modules())
    return [module for module in inside if "base_layer" in module._modules and hasattr(module, "merged")]


def _checked(model: nn.Module) -> dict[str, Tensor]:
    """`_tensors`; ValueError unless they are at hand, whole, and the plain floats that a fresh model has."""
    tensors = _tensors(model)
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model must hold its weights, got the meta device for {', '.join(absent)}")
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        offloading = registry.get_hook("group_offloading") if registry is not None else None
        if offloading is not None and offloading.group.offload_to_disk_path is not None:
            raise ValueError("model must hold its weights, got one that enable_group_offload keeps on disk")
    for name, layer in sla_layers(model).items():
        for part, wanted in _shapes(layer).items():
            place = f"{name}.{part}".lstrip(".")
            inside = (each for each in tensors if each == place or each.startswith(f"{place}."))
            got = {each.removeprefix(place)[1:]: tuple(tensors[each].shape) for each in inside}
            if got != wanted:
                raise ValueError(
                    f"model must hold {place} whole and as it was made, {wanted}, got {got}; FSDP1 and DeepSpeed shard "
                    "weights, quantisation and parametrisation change them"
                )
    for name, tensor in tensors.items():
        plain = type(tensor.data) is Tensor or hasattr(tensor, "full_tensor")
        if not plain or (isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()):
            raise ValueError(f"model must hold plain float weights, got {tensor.dtype} {type(tensor.data)} for {name}")
    return tensors


def _shapes(layer: Layer) -> dict[str, dict[str, tuple[int, ...]]]:
    """Those of the weights that a layer is made with: of a module by their names in it, of a parameter as ""."""
    dim = layer.head_dim
    shapes = {} if layer.proj_l is None else {"proj_l": {"weight": (dim, dim), "bias": (dim,)}}
    if isinstance(getattr(getattr(layer, "router", None), "scores", None), LearnedScores):
        shapes |= {f"router.scores.{each}": {"weight": (dim, dim)} for each in ("proj_q", "proj_k")}
    if isinstance(layer, SLA2Attention):
        if layer.query_length is not None:
            shapes["alpha_logit"] = {"": (layer.heads, num_blocks(layer.query_length, layer.block_q))}
        elif layer.alpha in ("head", "token"):
            shapes["alpha_logit"] = {"": (layer.heads,)}
        if layer.alpha == "token":
            shapes["alpha_weight"] = {"": (layer.heads, dim)}
    return shapes


def _settings(model: nn.Module) -> dict[str, str]:
    """What the weights belong to, as text; the role is empty where `install_sla` was given none."""
    found: dict[str, set[str]] = {}
    for layer in sla_layers(model).values():
        found.setdefault("feature_map", set()).add(_name_of(layer.feature_map))
        if isinstance(layer, SLA2Attention):
            found.setdefault("variant", set()).add("sla2")
            bound = f" of {layer.block_q} of {layer.query_length} tokens" if layer.alpha == "block" else ""
            found.setdefault("alpha", set()).add(layer.alpha + bound)
        else:
            found.setdefault("variant", set()).add(str(getattr(layer, "variant", "paper")))
        if hasattr(layer, "role"):
            found.setdefault("role", set()).add(str(layer.role or ""))
    return {setting: ", ".join(sorted(values)) for setting, values in found.items()}


def _name_of(feature_map: str | FeatureMap) -> str:
    if isinstance(feature_map, Softmax):
        return f"softmax of temperature {float(feature_map.temperature)}"
    return feature_map if isinstance(feature_map, str) else "a callable"


# --- what a state_dict holds -----------------------------------------------------------------------------------------


def _full(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_as(tensor: Any, value: Tensor) -> Tensor:
    """This rank's part of a value, for a tensor that FSDP2 has sharded; the value for any other."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.detach(), tensor.device_mesh, tensor.placements, src_data_rank=None)


def _misfits(tensor: Tensor, source: str, value: Any) -> Iterator[str]:
    """Why a value cannot be copied into a tensor of the model."""
    if not isinstance(value, Tensor):
        raise TypeError(f"state_dict must map names to tensors, got {type(value).__name__} for {source!r}")
    if value.is_meta or value.layout != torch.strided:
        yield f"{'on the meta device' if value.is_meta else value.layout} instead of a tensor with values: {source}"
    if value.shape != tensor.shape:
        yield f"shape {tuple(value.shape)} instead of {tuple(tensor.shape)}: {source}"
    if value.is_floating_point() != tensor.is_floating_point():
        yield f"{value.dtype} instead of {'a float dtype' if tensor.is_floating_point() else tensor.dtype}: {source}"


def _named_as_in(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each weight under the model's name for it, with the names and values it was given by."""
    layers = list(sla_layers(model))
    of_block = {int(found[1]): layer for layer in layers if (found := _BLOCK.search(f"{layer}."))}
    given: dict[str, dict[str, Any]] = {}
    for source, value in state_dict.items():
        if not isinstance(source, str) or isinstance(value, Mapping):
            raise TypeError(
                f"state_dict must map names to tensors, got {type(value).__name__} for {source!r}; pass the part that "
                "holds only weights"
            )
        plain = _INSERTED.sub("", source)
        if plain in _SHARED:
            targets = [f"{layer}.{plain}".lstrip(".") for layer in layers]
        elif (foreign := _FOREIGN.match(_FRONT.sub("", plain))) and int(foreign[1]) in of_block:
            targets = [f"{of_block[int(foreign[1])]}.{foreign[2]}"]
        else:
            targets = [plain if plain.startswith(tuple(layers)) else _FRONT.sub("", plain)]
        for target in targets:
            given.setdefault(target, {})[source] = value
    return given


def _simple_tuner(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights inside SimpleTuner's file, which has one set for each head dimension and dtype it met."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    if set(state_dict) != {"settings", "state", "version"}:
        return state_dict
    sets = state_dict["state"]
    if not isinstance(sets, Mapping) or len(sets) != 1:
        raise ValueError(f"state_dict['state'] must hold one set of weights, got {sorted(sets)}; pass just one set")
    return next(iter(sets.values()))
