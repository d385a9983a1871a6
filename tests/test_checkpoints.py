"""The weights SLA adds, under our names and those of others: all arrive, or nothing changes and the error says why."""

from __future__ import annotations

import copy
import json
import os
import pickle
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import sla_ref
from sla_ref.feature_maps import FeatureMap, Softmax
from sla_ref.integrations import checkpoints, thu_ml

D, DEPTH = 4, 3
OURS = "blocks.{}.attention.proj_l"
TURBO = "blocks.{}.self_attn.attn_op.local_attn.proj_l"
FAST_VIDEO = "blocks.{}.attn1.attn_impl.proj_l"


class Model(nn.Module):
    """Blocks 0 and 2 have SLA, block 1 is dense; `mlp` is for all else that the checkpoint of a model has."""

    def __init__(self, feature_map: str | FeatureMap = "softmax") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(DEPTH))
        for block in self.blocks:
            block.mlp = nn.Linear(D, D)
        for number in (0, 2):
            self.blocks[number].attention = sla_ref.SparseLinearAttention(D, feature_map=feature_map)


def weights(name: str = OURS, blocks=(0, 2)) -> dict[str, torch.Tensor]:
    """Weights that differ from block to block, and are the same under every name."""
    made = {}
    for number in blocks:
        generator = torch.Generator().manual_seed(number)
        made[f"{name.format(number)}.weight"] = torch.randn(D, D, generator=generator)
        made[f"{name.format(number)}.bias"] = torch.randn(D, generator=generator)
    return made


def assert_loaded(model: nn.Module) -> None:
    state = model.state_dict()
    for name, value in weights().items():
        assert torch.equal(state[name], value), name


def refused(model: nn.Module, state_dict, message: str, error=ValueError) -> None:
    """The error has this text, and the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        checkpoints.load_sla_state_dict(model, state_dict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        OURS,
        TURBO,
        FAST_VIDEO,
        f"net.{TURBO}",
        f"model.{TURBO}",
        f"model.net.{TURBO}",
        f"module.{OURS}",
        f"net.{TURBO.replace('{}.', '{}._checkpoint_wrapped_module.')}",
        TURBO.replace("{}.", "{}._checkpoint_wrapped_module."),
        f"_orig_mod.{OURS}",
        f"net_ema.{TURBO}",
        f"roles.student.transformer.{FAST_VIDEO}",
        f"base_model.model.{OURS}",
        f"transformer.{OURS}",
    ],
)
def test_names_of_every_project(name):
    model = Model()
    checkpoints.load_sla_state_dict(model, weights(name))
    assert_loaded(model)


def test_simple_tuners_one_projection_goes_to_every_layer():
    model, (weight, bias) = Model(), weights(blocks=(0,)).values()
    one = {"proj_l.weight": weight, "proj_l.bias": bias}
    file = {"settings": {"topk": 0.2, "feature_map": "softmax"}, "state": {"4:bf16": one}, "version": 1}
    for state_dict in (file, one):
        fresh = copy.deepcopy(model)
        checkpoints.load_sla_state_dict(fresh, state_dict)
        for number in (0, 2):
            assert torch.equal(fresh.blocks[number].attention.proj_l.weight, weight)
            assert torch.equal(fresh.blocks[number].attention.proj_l.bias, bias)
    file["state"]["8:fp32"] = one
    refused(model, file, r"state_dict\['state'\] must hold one set of weights, got \['4:bf16', '8:fp32'\]")


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model(wrap, tmp_path):
    model = Model()
    wrapped = wrap(model)
    assert list(checkpoints.sla_layers(wrapped)) == list(checkpoints.sla_layers(model))
    checkpoints.load_sla_state_dict(wrapped, weights(TURBO))
    assert_loaded(model)
    checkpoints.save_sla(wrapped, tmp_path / "sla.safetensors")
    assert checkpoints.read_checkpoint(tmp_path / "sla.safetensors").keys() == weights().keys()


def test_a_layer_alone_and_the_authors_layer():
    for layer in (sla_ref.SparseLinearAttention(D), thu_ml.SparseLinearAttention(D, 0.1)):
        state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        checkpoints.load_sla_state_dict(layer, state)
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_feature_map_with_weights_that_layers_share_is_one_entry_for_the_optimizer():
    model, shared = Model(), nn.Linear(D, D)
    for number in (0, 2):
        model.blocks[number].attention = sla_ref.SparseLinearAttention(D, feature_map=shared)
    group = checkpoints.sla_parameters(model)
    assert len(group) == len(set(group)) == 2 * 2 + 2


class Learnable(nn.Module):
    """A feature map with weights, and with a buffer that is drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.register_buffer("directions", torch.randn(D))


def shared_map() -> nn.Module:
    return Model(feature_map=Learnable())


def tied_projections() -> nn.Module:
    model = Model()
    model.blocks[2].attention.proj_l = model.blocks[0].attention.proj_l
    return model


def shared_layer() -> nn.Module:
    model = Model()
    model.blocks[2].attention = model.blocks[0].attention
    return model


@pytest.mark.parametrize("build", [shared_map, tied_projections, shared_layer])
def test_layers_that_share_weights(build, tmp_path):
    model, path = build(), tmp_path / "sla.safetensors"
    for parameter in checkpoints.sla_parameters(model):
        nn.init.normal_(parameter)
    checkpoints.save_sla(model, path)
    other = build()
    checkpoints.load_sla(other, path)
    expected = checkpoints.split_sla_state_dict(model.state_dict())[0]
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items() if name in expected)
    checkpoints.load_sla_state_dict(other, expected)  # as whole models are saved, under all names
    if build is not shared_map:
        refused(model, weights(), "different for weights that are tied in the model: blocks.0.attention.proj_l")
        checkpoints.load_sla_state_dict(model, weights(blocks=(2,)))  # one name is enough


def test_weights_are_cast_to_the_models_dtype():
    model = Model().to(torch.bfloat16)
    checkpoints.load_sla_state_dict(model, weights(TURBO))
    assert torch.equal(model.blocks[2].attention.proj_l.weight, weights()[f"{OURS.format(2)}.weight"].bfloat16())


def test_split_takes_a_whole_models_checkpoint_apart():
    whole = {**weights(f"net.{TURBO}"), "net.blocks.0.self_attn.q.weight": torch.ones(1), "net.proj_out.weight": 0}
    added, rest = checkpoints.split_sla_state_dict(whole)
    assert added.keys() | rest.keys() == whole.keys()
    assert set(rest) == {"net.blocks.0.self_attn.q.weight", "net.proj_out.weight"}
    model = Model()
    message = r"left over: blocks.0.self_attn.q.weight and 1 more of other layers; split_sla_state_dict takes SLA's"
    refused(model, whole, message)
    checkpoints.load_sla_state_dict(model, added)
    assert_loaded(model)


def sla2(**changes) -> sla_ref.SLA2Attention:
    """A layer with weights that are anywhere but at their start."""
    layer = sla_ref.SLA2Attention(D, 2, **changes)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": "head"},
        {"alpha": "token", "router": "learned", "proj": True, "feature_map": "hedgehog"},
        {"alpha": "block", "query_length": 200},
        {"alpha": "block_means", "router": "learned"},
        {"alpha": "ideal"},  # no weights at all
    ],
)
def test_the_weights_of_sla2(tmp_path, options):
    model, fresh = (nn.ModuleDict({"mlp": nn.Linear(D, D), "attention": sla2(**options)}) for _ in range(2))
    assert len(checkpoints.sla_parameters(model)) == len(list(model["attention"].parameters()))
    added, rest = checkpoints.split_sla_state_dict(model.state_dict())
    assert set(added) == {name for name in model.state_dict() if name.startswith("attention.")}
    assert set(rest) == {"mlp.weight", "mlp.bias"}
    path = tmp_path / "sla.safetensors"
    checkpoints.save_sla(model, path)
    checkpoints.load_sla(fresh, path)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in added.items())
    for name in added.keys() - {"attention.phi_query.weight", "attention.phi_key.weight"}:
        *place, last = name.split(".")
        module = fresh.get_submodule(".".join(place))
        whole, module._parameters[last] = module._parameters[last], nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match=r"must hold attention\..* whole and as it was made, .* got {'.*\(3,\)"):
            checkpoints.save_sla(fresh, tmp_path / "sharded.safetensors")
        module._parameters[last] = whole


def test_a_file_of_adapters_has_no_proj():
    """As LightX2V's, whose sparse attention has no linear branch."""
    lora = {f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": torch.ones(D, D) for part in ("down", "up")}
    added, rest = checkpoints.split_sla_state_dict(lora)
    assert not added and rest == lora
    refused(Model(), lora, r"missing: blocks.0.attention.proj_l.weight; .*; load_lora_weights of diffusers' pipelines")


def test_split_knows_the_weights_of_hedgehog():
    added, rest = checkpoints.split_sla_state_dict(Model("hedgehog").state_dict())
    assert {name.split(".")[-2] for name in added} == {"proj_l", "phi_query", "phi_key"}
    assert {name.split(".")[-2] for name in rest} == {"mlp"}


# --- strictness ------------------------------------------------------------------------------------------------------


def test_missing_and_left_over_are_all_listed():
    message = (
        r"must hold exactly the weights of the model's SLA layers; missing: blocks.2.attention.proj_l.weight; "
        r"missing: blocks.2.attention.proj_l.bias; left over: blocks.1.self_attn.attn_op.local_attn.proj_l.weight; "
        r"left over: blocks.1.self_attn.attn_op.local_attn.proj_l.bias$"
    )
    refused(Model(), weights(TURBO, blocks=(0, 1)), message)


def test_a_layer_that_is_dense_here_or_not_there():
    refused(Model(), weights(TURBO, blocks=(0, 2, 7)), "left over: blocks.7.self_attn")
    refused(Model(), {}, "missing: blocks.0.attention.proj_l.weight; missing: blocks.0.attention.proj_l.bias; missing")
    refused(Model(feature_map="hedgehog"), weights(), "missing: blocks.0.attention.phi_query.weight")


def test_a_weight_given_under_two_names():
    message = "given 2 times: blocks.0.attention.proj_l.weight, as blocks.0.attention.proj_l.weight, blocks.0.self_attn"
    refused(Model(), {**weights(), **weights(TURBO)}, message)


def test_shapes_dtypes_and_values():
    state = weights(TURBO)
    name = f"{TURBO.format(2)}.weight"
    refused(Model(), state | {name: torch.zeros(8, 8)}, rf"shape \(8, 8\) instead of \(4, 4\): {name}")
    zeros = torch.zeros(D, D)
    refused(Model(), state | {name: zeros.to(torch.int8)}, "torch.int8 instead of a float dtype")
    refused(Model(), state | {name: zeros.to(torch.complex64)}, "torch.complex64 instead of a float dtype")
    refused(Model(), state | {name: zeros.to_sparse()}, f"torch.sparse_coo instead of a tensor with values: {name}")
    refused(Model(), state | {name: zeros.to("meta")}, f"on the meta device instead of a tensor with values: {name}")
    refused(Model(), state | {name: [1.0]}, f"state_dict must map names to tensors, got list for '{name}'", TypeError)
    refused(Model(), {"state_dict": state}, "got dict for 'state_dict'; pass the part that holds", TypeError)
    refused(Model(), {0: torch.zeros(1)}, "state_dict must map names to tensors, got Tensor for 0", TypeError)
    refused(Model(), [], "state_dict must be a mapping of names to tensors, got list", TypeError)


def test_models_that_cannot_take_weights():
    with pytest.raises(ValueError, match="model must have SLA layers, got a Linear without any"):
        checkpoints.load_sla_state_dict(nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        checkpoints.sla_parameters({})
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"got the meta device for blocks.0.attention.proj_l.weight"):
        checkpoints.load_sla_state_dict(model, weights())


def int8(layer: nn.Module) -> None:
    layer.proj_l.weight = nn.Parameter(torch.ones(D, D, dtype=torch.int8), requires_grad=False)


def quantised(layer: nn.Module) -> None:
    """Quantised dynamically: the weight is a method."""
    layer.proj_l = nn.Module()
    layer.proj_l.weight = lambda: torch.zeros(D, D)


def sharded(layer: nn.Module) -> None:
    """Sharded as by FSDP1 and DeepSpeed: this rank's part of a flat tensor."""
    layer.proj_l.weight = nn.Parameter(torch.ones(D * D // 2))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (int8, r"model must hold plain float weights, got torch.int8 .* for blocks.2.attention.proj_l.weight"),
        (quantised, r"must hold blocks.2.attention.proj_l whole and as it was made, .*\(4, 4\).*, got {}; FSDP1"),
        (sharded, r"must hold blocks.2.attention.proj_l whole and as it was made, .*, got {.*\(8,\)"),
        (lambda layer: nn.utils.parametrizations.weight_norm(layer.proj_l), "got {.*parametrizations.weight.original0"),
    ],
)
def test_weights_that_a_fresh_model_could_not_load_are_not_written(tmp_path, change, message):
    model = Model()
    change(model.blocks[2].attention)
    refused(model, weights(), message)
    with pytest.raises(ValueError, match=message):
        checkpoints.save_sla(model, tmp_path / "sla.safetensors")
    assert os.listdir(tmp_path) == []


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [save_file, torch.save])
@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".pth", ".bin", ""])
def test_files_of_both_kinds_under_any_name(tmp_path, suffix, write):
    path, model = tmp_path / f"weights{suffix}", Model()
    write(weights(TURBO), path)
    checkpoints.load_sla(model, path)
    assert_loaded(model)
    assert checkpoints.read_checkpoint(str(path)).keys() == weights(TURBO).keys()


def test_an_index_stands_for_its_shards(tmp_path):
    names = {}
    for number, block in ((1, 0), (2, 2)):
        part = f"model-0000{number}-of-00002.safetensors"
        save_file(weights(blocks=(block,)), tmp_path / part)
        names |= dict.fromkeys(weights(blocks=(block,)), part)
    index, model = tmp_path / "model.safetensors.index.json", Model()
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    checkpoints.load_sla(model, index)
    assert_loaded(model)
    (tmp_path / part).unlink()
    for path, error, message in (
        (tmp_path, ValueError, r"got the folder .*; name the file in it, or the index of its shards"),
        (tmp_path / "model-00001-of-00002.safetensors", ValueError, "is one shard of it; name its index"),
        (index, FileNotFoundError, r"names .*model-00002-of-00002.safetensors"),
    ):
        with pytest.raises(error, match=message):
            checkpoints.load_sla(model, path)
    save_file(weights(blocks=(1,)), tmp_path / part)
    both = r"index.json and .*model-00002-of-00002.safetensors differ in blocks.1.*bias, .* blocks.2.*weight$"
    with pytest.raises(ValueError, match=both):
        checkpoints.load_sla(model, index)
    for text in ("{", "[]", "{}", '{"weight_map": ["model"]}', '{"weight_map": {"name": 1}}'):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="path must be an index of shards"):
            checkpoints.load_sla(model, index)


def test_an_error_names_the_file_and_the_key(tmp_path):
    save_file(weights(TURBO, blocks=(0,)), tmp_path / "half.safetensors")
    message = r"missing: blocks.2.attention.proj_l.weight; .*; the state_dict is that of .*half.safetensors$"
    with pytest.raises(ValueError, match=message):
        checkpoints.load_sla(Model(), tmp_path / "half.safetensors")
    torch.save(weights(TURBO) | {"step": 3}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"left over: step and 0 more of other layers; .* of .*more.pt$"):
        checkpoints.load_sla(Model(), tmp_path / "more.pt")


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_only_entries_that_match_are_read(tmp_path, write):
    path, model = tmp_path / "whole", Model()
    write({f"net.{name}": torch.ones(1) for name in ("blocks.0.mlp.weight", "head")} | weights(f"net.{TURBO}"), path)
    assert checkpoints.read_checkpoint(path, "head|mlp").keys() == {"net.blocks.0.mlp.weight", "net.head"}
    checkpoints.load_sla_state_dict(model, checkpoints.read_checkpoint(path, "proj_l"))
    assert_loaded(model)
    for bad in ("(", 3):
        with pytest.raises(ValueError, match="match must be a regular expression, got"):
            checkpoints.read_checkpoint(path, bad)


def save_dcp(state_dict: dict, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state_dict, checkpoint_id=folder, no_dist=True)


def test_a_folder_of_dcp(tmp_path):
    save_dcp(weights(FAST_VIDEO), tmp_path / "sla")
    model = Model()
    checkpoints.load_sla(model, tmp_path / "sla")
    assert_loaded(model)

    moments = {f"{name}.exp_avg": torch.ones_like(value) for name, value in weights(FAST_VIDEO).items()}
    save_dcp({"model": weights(FAST_VIDEO), "optimizer": {"state": moments, "lr": 0.1}}, tmp_path / "training")
    whole = checkpoints.read_checkpoint(tmp_path / "training")
    assert len(whole) == 8 and all(isinstance(value, torch.Tensor) for value in whole.values())
    for added in (
        checkpoints.split_sla_state_dict(whole)[0],
        checkpoints.read_checkpoint(tmp_path / "training", "^model"),
    ):
        model = Model()
        checkpoints.load_sla_state_dict(model, added)
        assert_loaded(model)


def test_turbodiffusions_training_has_two_nets_in_a_folder_of_dcp(tmp_path):
    """The trained one and its average, which is the one that TurboDiffusion publishes."""
    zeros = {name: torch.zeros_like(value) for name, value in weights(f"net.{TURBO}").items()}
    save_dcp(zeros | weights(f"net_ema.{TURBO}"), tmp_path)
    name = TURBO.format(0)
    with pytest.raises(
        ValueError, match=rf"given 2 times: blocks.0.attention.proj_l.weight, as net.{name}.weight, net_ema"
    ):
        checkpoints.load_sla(Model(), tmp_path)
    model = Model()
    checkpoints.load_sla_state_dict(model, checkpoints.read_checkpoint(tmp_path, r"^net_ema\."))
    assert_loaded(model)


def test_damaged_folders_of_dcp(tmp_path):
    save_dcp(weights(), tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    with pytest.raises(ValueError, match=r"distcp is one shard of it; name its index, .*, or the folder of a"):
        checkpoints.read_checkpoint(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{file} is damaged at blocks"):
        checkpoints.load_sla(Model(), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"path must be a folder with all its files, {file} missing"):
        checkpoints.load_sla(Model(), tmp_path)
    index = tmp_path / ".metadata"
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"\.metadata is damaged or holds code"):
        checkpoints.load_sla(Model(), tmp_path)


def test_save_and_load(tmp_path):
    model, other = Model(), Model()
    checkpoints.load_sla_state_dict(model, weights())
    checkpoints.save_sla(model, tmp_path / "sla.safetensors")
    assert checkpoints.read_checkpoint(tmp_path / "sla.safetensors").keys() == weights().keys(), "nothing else"
    checkpoints.load_sla(other, tmp_path / "sla.safetensors")
    assert_loaded(other)
    assert os.listdir(tmp_path) == ["sla.safetensors"]


def test_save_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    def breaks(path, data):
        path.write_text("half", encoding="utf-8")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", breaks)
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save_sla(Model(), tmp_path / "sla.safetensors")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        checkpoints.save_sla(Model(), tmp_path / "no" / "sla.safetensors")
    (tmp_path / "mine").touch()
    checkpoints.save_sla(Model(), tmp_path / "sla")
    assert (tmp_path / "sla").stat().st_mode == (tmp_path / "mine").stat().st_mode, "as the umask says"
    (tmp_path / "there").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="path must name a new file"):
        checkpoints.save_sla(Model(), tmp_path / "there")
    assert (tmp_path / "there").read_text(encoding="utf-8") == "mine"


def test_load_wants_the_mathematics_of_the_file(tmp_path):
    path = tmp_path / "sla.safetensors"
    checkpoints.save_sla(Model("elu"), path)
    with pytest.raises(ValueError, match=r"must have feature_map 'elu' in its SLA layers, as .* says, got 'softmax'"):
        checkpoints.load_sla(Model(), path)
    sharp = tmp_path / "sharp.safetensors"
    checkpoints.save_sla(Model(Softmax(4)), sharp)
    checkpoints.load_sla(Model(Softmax(4.0)), sharp)
    with pytest.raises(ValueError, match=r"must have feature_map 'softmax of temperature 4.0' .* got 'softmax'"):
        checkpoints.load_sla(Model(), sharp)
    layer = thu_ml.SparseLinearAttention(D, 0.1)
    checkpoints.save_sla(layer, tmp_path / "main.safetensors")
    with pytest.raises(ValueError, match=r"must have variant 'main' in its SLA layers, as .* says, got 'paper'"):
        checkpoints.load_sla(sla_ref.SparseLinearAttention(D), tmp_path / "main.safetensors")


def test_sla_and_sla2_do_not_load_each_others_files(tmp_path):
    """Not even where their weights have the same names, and where a file says nothing."""
    proj = {"alpha": "block_means", "proj": True}
    layers = {"paper": sla_ref.SparseLinearAttention(D), "sla2": sla2(**proj)}
    for variant, layer in layers.items():
        checkpoints.save_sla(layer, tmp_path / variant)
    state = layers["paper"].state_dict()
    assert state.keys() == layers["sla2"].state_dict().keys()
    save_file(state, tmp_path / "unnamed")
    torch.save(state, tmp_path / "theirs.pt")
    checkpoints.save_sla(sla2(alpha="ideal", proj=True), tmp_path / "ideal")
    bound = {"alpha": "block", "query_length": 128}
    checkpoints.save_sla(sla2(**bound), tmp_path / "bound")
    for layer, name, message in (
        (layers["paper"], "sla2", r"must have variant 'sla2' in its SLA layers, as .* says, got 'paper'"),
        (layers["sla2"], "paper", r"must have variant 'paper' in its SLA layers, as .* says, got 'sla2'"),
        (layers["sla2"], "unnamed", r"must have SLA's own layers for .*, which names no variant, got variant 'sla2'"),
        (layers["sla2"], "theirs.pt", r"must have SLA's own layers for"),
        (layers["sla2"], "ideal", r"must have alpha 'ideal' in its SLA layers, as .* says, got 'block_means'"),
        (sla2(alpha="block", query_length=120), "bound", "must have alpha 'block of 64 of 128 tokens' in"),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=message):
            checkpoints.load_sla(layer, tmp_path / name)
        assert all(torch.equal(value, before[each]) for each, value in layer.state_dict().items())
    for name in ("paper", "unnamed", "theirs.pt"):
        checkpoints.load_sla(layers["paper"], tmp_path / name)
    checkpoints.load_sla(sla2(**bound), tmp_path / "bound")


class Bomb:
    """Code in a pickle: unpickling it would make the file that it names."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_no_code_in_a_pickle_runs(tmp_path, write):
    path = tmp_path / "bomb.pt"
    write({**weights(TURBO), "bomb": Bomb(tmp_path / "exploded")}, path)
    with pytest.raises(ValueError, match="path must hold weights and plain values only") as raised:
        checkpoints.load_sla(Model(), path)
    assert "weights_only" not in "".join(traceback.format_exception(raised.value)), "torch's advice is to run the code"
    assert not (tmp_path / "exploded").exists()


def dotted(path: Path) -> bytes:
    """A pickle that does the same, and finds the function through a module of which DCP's index has classes."""
    module, name, argument = (
        b"\x8c" + bytes([len(text)]) + text.encode()
        for text in ("torch.distributed.checkpoint.metadata", "os.mkdir", str(path))
    )
    return b"\x80\x04" + module + name + b"\x93" + argument + b"\x85R."  # global, tuple of one, call, stop


@pytest.mark.parametrize("dump", [lambda path: pickle.dumps(Bomb(path)), dotted])
def test_no_code_in_the_index_of_dcp_runs(tmp_path, dump):
    (tmp_path / ".metadata").write_bytes(dump(tmp_path / "exploded"))
    with pytest.raises(ValueError, match=r"\.metadata is damaged or holds code"):
        checkpoints.read_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(dump(tmp_path / "exploded"))
    assert (tmp_path / "exploded").exists(), "it would have"


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a file with weights, there is none at"):
        checkpoints.read_checkpoint(tmp_path / "none.safetensors")
    path = tmp_path / "cut.safetensors"
    save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"path must be a whole safetensors file, .* is damaged"):
        checkpoints.read_checkpoint(path)
    (tmp_path / "text.pt").write_text("no weights", encoding="utf-8")
    with pytest.raises(ValueError, match="could not be read"):
        checkpoints.read_checkpoint(tmp_path / "text.pt")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ValueError, match=r"path must be a whole safetensors file, .* is damaged"):
        checkpoints.read_checkpoint(tmp_path / "empty.safetensors")
