"""The weights that SLA adds to a model, alone: saved, loaded, and read under the names of other projects.

Known names of Proj, each with `.weight` and `.bias`, i a block's number:

| whose | name |
|---|---|
| ours | the layer's place in the model, as `blocks.{i}.attn1.processor.proj_l` in a Wan transformer of diffusers |
| thu-ml/TurboDiffusion | `blocks.{i}.self_attn.attn_op.local_attn.proj_l` |
| FastVideo | `blocks.{i}.attn1.attn_impl.proj_l` |
| SimpleTuner's `sla_attention.pt` | `proj_l`, one for all layers |

`net.`, `model.` and `module.` may stand in front, and the names that torch's wrappers insert anywhere. All is checked
before anything is copied: on an error the model is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import whole
from ..module import SparseLinearAttention
from . import thu_ml

_WRAPPERS = re.compile(r"(?<![^.])(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
_FRONT = re.compile(r"^(?:(?:net|model|module)\.)+(?=blocks\.)")
_FOREIGN = re.compile(
    r"^blocks\.(\d+)\.(?:self_attn\.attn_op\.local_attn|attn1\.attn_impl)\.(proj_l\.(?:weight|bias))$"
)
_ADDED = re.compile(r"(?:^|\.)(?:proj_l\.(?:weight|bias)|phi_(?:query|key)\.weight)$")
_SHARED = ("proj_l.weight", "proj_l.bias")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")

Layer = SparseLinearAttention | thu_ml.SparseLinearAttention


def sla_layers(model: nn.Module) -> dict[str, Layer]:
    """The SLA layers inside a model by name, in the model's order.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {_plain(name): module for name, module in model.named_modules() if isinstance(module, Layer)}
    if not layers:
        raise ValueError(f"model must have SLA layers, got a {type(model).__name__} without any")
    return layers


def sla_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that SLA added, as one group for an optimizer. Errors as `sla_layers`."""
    return list(dict.fromkeys(_parameters(model).values()))  # a feature map with weights may be shared by layers


def save_sla(model: nn.Module, path: str | Path) -> None:
    """Writes the weights that SLA added, and the mathematics they belong to, to a new safetensors file.

    Args:
        model: a model with SLA layers.
        path: of the file, which must not exist; it is written whole or not at all.

    Raises:
        TypeError, ValueError: as `sla_layers`; ValueError if weights are on the meta device.
        FileExistsError: the file exists.
    """
    from safetensors.torch import save_file

    parameters = _parameters(model)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"path must name a new file, {path} exists")
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    with whole(path) as temporary:
        save_file(tensors, temporary, _mathematics(model))


def load_sla(model: nn.Module, path: str | Path) -> None:
    """Copies the weights of a file into the SLA layers of a model.

    The layers must have the feature map and the variant that the weights were trained with, where the file says so.
    Ratios and block sizes may differ: they are choices of each run.

    Args:
        model: a model with SLA layers.
        path: what `save_sla` wrote, or another file that `read_checkpoint` and `load_sla_state_dict` take.

    Raises:
        FileNotFoundError, TypeError, ValueError: as those two; ValueError for another feature map or variant.
    """
    path = Path(path)
    state_dict, metadata = _read(path)
    for setting, here in _mathematics(model).items():
        there = metadata.get(setting, here)
        if there != here:
            raise ValueError(f"model must have {setting} {there!r}, with which {path} was trained, got {here!r}")
    load_sla_state_dict(model, state_dict)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What is in a `.safetensors` file, or in a torch file: weights only, no code in a pickle runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds more than weights and plain values.
    """
    return _read(Path(path))[0]


def split_sla_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The entries of a whole model's checkpoint that belong to SLA, and all others, both under the names they have.

    The first part is for `load_sla_state_dict`; what becomes of the second is yours to say.
    """
    added = {name: value for name, value in state_dict.items() if _ADDED.search(name)}
    return added, {name: value for name, value in state_dict.items() if name not in added}


@torch.no_grad()
def load_sla_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Copies weights under any of the names above into the SLA layers of a model, every one of them.

    Args:
        model: a model with SLA layers.
        state_dict: their weights and nothing else. One of a whole model goes through `split_sla_state_dict` first. Of
            what SimpleTuner wrote, its "settings" are not read: they are arguments of the layers.

    Raises:
        TypeError: model is no module, or a value is no tensor.
        ValueError: a weight is missing, left over, given twice, quantised or of another shape (all are listed); or the
            model's weights are on the meta device.
    """
    parameters = _parameters(model)
    given = _named_as_in(model, _simple_tuner(state_dict))
    faults = [f"missing: {name}" for name in parameters if name not in given]
    for name, found in given.items():
        if name not in parameters:
            faults.append(f"left over: {name}")
            continue
        if len(found) > 1:
            faults.append(f"given {len(found)} times: {name}, as {', '.join(sorted(found))}")
        shape = tuple(parameters[name].shape)
        for source, value in found.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"state_dict must hold tensors, got {type(value).__name__} for {source}")
            if tuple(value.shape) != shape:
                faults.append(f"shape {tuple(value.shape)} instead of {shape}: {source}")
            if not value.is_floating_point():
                faults.append(f"{value.dtype} instead of a float dtype: {source}")
    if faults:
        raise ValueError("state_dict must hold exactly the weights of the model's SLA layers; " + "; ".join(faults))
    for name, parameter in parameters.items():
        (value,) = given[name].values()
        parameter.copy_(value)


# --- names -----------------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """Without what torch's wrappers insert."""
    return _WRAPPERS.sub("", name)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {
        f"{layer}.{_plain(name)}".lstrip("."): parameter
        for layer, module in sla_layers(model).items()
        for name, parameter in module.named_parameters()
    }
    absent = [name for name, parameter in parameters.items() if parameter.is_meta]
    if absent:
        raise ValueError(f"model must hold its weights, got the meta device for {', '.join(absent)}")
    return parameters


def _named_as_in(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each weight under the model's name for it, with the names and values it was given by."""
    layers = list(sla_layers(model))
    of_block = {int(found[1]): layer for layer in layers if (found := _BLOCK.search(f"{layer}."))}
    given: dict[str, dict[str, Any]] = {}
    for source, value in state_dict.items():
        plain = _plain(source)
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
        raise ValueError(f"state_dict['state'] must hold one set of weights, got {sorted(sets)}; pass one set alone")
    return next(iter(sets.values()))


# --- files -----------------------------------------------------------------------------------------------------------


def _mathematics(model: nn.Module) -> dict[str, str]:
    """What the model's SLA layers compute, as text: feature map and variant of the linear branch."""
    maps, variants = set(), set()
    for layer in sla_layers(model).values():
        maps.add(layer.feature_map if isinstance(layer.feature_map, str) else "a callable")
        variants.add(layer.variant if isinstance(layer, thu_ml.SparseLinearAttention) else "paper")
    return {"feature_map": ", ".join(sorted(maps)), "variant": ", ".join(sorted(variants))}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file with weights, there is none at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path must be a whole safetensors file, {path} is damaged: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # torch and pickle raise a dozen kinds for a bad file
        raise ValueError(f"path must hold weights and plain values only; {path} could not be read: {error}") from error
