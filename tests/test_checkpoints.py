"""The weights SLA adds, under our names and those of others: all arrive, or nothing changes and the error says why."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sla_ref
from sla_ref.integrations import checkpoints, thu_ml

D, DEPTH = 4, 3
OURS = "blocks.{}.attention.proj_l"
TURBO = "blocks.{}.self_attn.attn_op.local_attn.proj_l"
FAST_VIDEO = "blocks.{}.attn1.attn_impl.proj_l"


class Model(nn.Module):
    """Blocks 0 and 2 have SLA, block 1 is dense; `mlp` stands for what the checkpoint of a whole model has besides."""

    def __init__(self, feature_map: str = "softmax") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(DEPTH))
        for block in self.blocks:
            block.mlp = nn.Linear(D, D)
        for number in (0, 2):
            self.blocks[number].attention = sla_ref.SparseLinearAttention(D, feature_map=feature_map)


def weights(name: str = OURS, blocks=(0, 2)) -> dict[str, torch.Tensor]:
    """Different ones for each block; the same under every name."""
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


def test_a_wrapped_model():
    model = Model()
    wrapped = torch.compile(model, backend="eager")
    assert list(checkpoints.sla_layers(wrapped)) == list(checkpoints.sla_layers(model))
    checkpoints.load_sla_state_dict(wrapped, weights(TURBO))
    assert_loaded(model)


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
    refused(model, whole, r"left over: blocks.0.self_attn.q.weight; left over: net.proj_out.weight")
    checkpoints.load_sla_state_dict(model, added)
    assert_loaded(model)


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
    refused(Model(), state | {name: torch.zeros(D, D, dtype=torch.int8)}, "torch.int8 instead of a float dtype")
    refused(Model(), state | {name: [1.0]}, f"state_dict must hold tensors, got list for {name}", TypeError)
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


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_files(tmp_path, suffix):
    path, model = tmp_path / f"weights.{suffix}", Model()
    (save_file if suffix == "safetensors" else torch.save)(weights(TURBO), path)
    checkpoints.load_sla(model, path)
    assert_loaded(model)
    assert checkpoints.read_checkpoint(str(path)).keys() == weights(TURBO).keys()


def test_save_and_load(tmp_path):
    model, other = Model(), Model()
    checkpoints.load_sla_state_dict(model, weights())
    checkpoints.save_sla(model, tmp_path / "sla.safetensors")
    assert checkpoints.read_checkpoint(tmp_path / "sla.safetensors").keys() == weights().keys(), "nothing else"
    checkpoints.load_sla(other, tmp_path / "sla.safetensors")
    assert_loaded(other)
    assert os.listdir(tmp_path) == ["sla.safetensors"]


def test_save_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    def breaks(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_sla(Model(), tmp_path / "sla.safetensors")
    assert os.listdir(tmp_path) == []
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError, match="path must name a new file"):
        checkpoints.save_sla(Model(), tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"


def test_load_wants_the_mathematics_of_the_file(tmp_path):
    path = tmp_path / "sla.safetensors"
    checkpoints.save_sla(Model("elu"), path)
    with pytest.raises(ValueError, match=r"feature_map 'elu', with which .* was trained, got 'softmax'"):
        checkpoints.load_sla(Model(), path)
    layer = thu_ml.SparseLinearAttention(D, 0.1)
    checkpoints.save_sla(layer, tmp_path / "main.safetensors")
    with pytest.raises(ValueError, match=r"model must have variant 'main', with which .* was trained, got 'paper'"):
        checkpoints.load_sla(sla_ref.SparseLinearAttention(D), tmp_path / "main.safetensors")


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
    with pytest.raises(ValueError, match="path must hold weights and plain values only"):
        checkpoints.load_sla(Model(), path)
    assert not (tmp_path / "exploded").exists()


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a file with weights, there is none at"):
        checkpoints.read_checkpoint(tmp_path / "none.safetensors")
    path = tmp_path / "cut.safetensors"
    save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"path must be a whole safetensors file, .* is damaged"):
        checkpoints.read_checkpoint(path)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="could not be read"):
        checkpoints.read_checkpoint(tmp_path / "text.pt")
