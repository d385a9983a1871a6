"""PEFT's adapters on a Wan with SLA: trained, saved, loaded, merged and unloaded together with Proj."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("diffusers", reason="needs the extra diffusers")
pytest.importorskip("peft", reason="needs the extra lora")
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig, PeftModel, get_peft_model
from test_diffusers import DENSE, SPARSE, run, transformer

from sla_ref.integrations import diffusers as wan

SELF_ATTENTION = r".*\.attn1\.(to_q|to_k|to_v|to_out\.0)"
PROJ = {f"blocks.{i}.attn1.processor.proj_l" for i in (0, 1)}


def with_sla() -> nn.Module:
    """The same weights at each call."""
    model = transformer()
    wan.install_sla(model, **SPARSE)
    return model


def config(**more) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": SELF_ATTENTION} | more)


def train(model: nn.Module) -> set[str]:
    """Two steps on all that is trainable, the second because an adapter starts as a product with zero."""
    before = copy.deepcopy(model.state_dict())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def with_diffusers(model: nn.Module, **more) -> nn.Module:
    model.add_adapter(config(**more))
    return model


def with_peft(model: nn.Module, **more) -> nn.Module:
    return get_peft_model(model, config(**more))


def load_with_diffusers(folder: Path) -> nn.Module:
    model = with_sla()
    model.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    return model


def test_adapters_and_proj_train_together_and_load_from_two_files(tmp_path):
    model = with_diffusers(with_sla())
    for parameter in wan.sla_parameters(model):
        parameter.requires_grad_()
    changed = train(model)
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    places = [f"blocks.{i}.attn1.{each}" for i in (0, 1) for each in projections]
    adapters = {f"{place}.lora_{matrix}.default.weight" for place in places for matrix in "AB"}
    assert changed == adapters | {f"{proj}.{part}" for proj in PROJ for part in ("weight", "bias")}
    expected = run(model)

    wan.save_sla(model, tmp_path / "sla.safetensors")
    model.save_lora_adapter(tmp_path)
    fresh = load_with_diffusers(tmp_path)
    wan.load_sla(fresh, tmp_path / "sla.safetensors")
    torch.testing.assert_close(run(fresh), expected)

    fresh.fuse_lora()
    fresh.unload_lora()
    torch.testing.assert_close(run(fresh), expected)
    assert fresh.state_dict().keys() == with_sla().state_dict().keys()


def test_unloading_leaves_what_was_there_before_the_adapters():
    model = with_diffusers(with_sla())
    train(model)
    base = run(with_sla())
    assert not torch.allclose(run(model), base)
    model.unload_lora()
    torch.testing.assert_close(run(model), base)
    wan.remove_sla(model)
    torch.testing.assert_close(run(model), run(transformer()))


@pytest.mark.parametrize("add", [with_diffusers, with_peft])
def test_modules_to_save_puts_proj_into_the_file_of_the_adapters(add, tmp_path):
    model = add(with_sla(), modules_to_save=["proj_l"])
    changed = train(model)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert {found[1] for name in changed if (found := re.search(r"(blocks.*proj_l)", name))} == PROJ
    if add is with_diffusers:  # which cannot load such a file of its own
        model.save_lora_adapter(tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(with_sla(), tmp_path / "adapter")
        torch.testing.assert_close(run(again), run(model))

    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    added, adapters = wan.split_sla_state_dict(wan.read_checkpoint(file))
    assert len(added) == 4 and all(".lora_" in name for name in adapters)
    wan.save_sla(model, tmp_path / "sla.safetensors")
    plain, wrapped, loaded = with_sla(), add(with_sla(), modules_to_save=["proj_l"]), with_sla()
    wan.load_sla_state_dict(plain, added)
    wan.load_sla(wrapped, tmp_path / "sla.safetensors")
    wan.load_sla(loaded, tmp_path / "sla.safetensors")
    for parameters in zip(*map(wan.sla_parameters, (model, plain, wrapped, loaded)), strict=True):
        assert parameters[0].any() and all(torch.equal(parameters[0], other) for other in parameters[1:])


def test_all_linear_puts_an_adapter_on_proj_too(tmp_path):
    """Merged, its weights are Proj's; before that a file of Proj's would be without them."""
    model = with_peft(with_sla(), target_modules="all-linear")
    changed = train(model)
    assert {f"base_model.model.{proj}.lora_B.default.weight" for proj in PROJ} < changed
    assert all("lora_" in name for name in changed)
    expected = run(model)
    with pytest.raises(ValueError, match="model must have the adapters in its SLA layers merged"):
        wan.save_sla(model, tmp_path / "sla.safetensors")

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(with_sla(), tmp_path / "adapter")
    torch.testing.assert_close(run(again), expected)

    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="merged and enabled, or unmerged and disabled"):
        wan.save_sla(model, tmp_path / "sla.safetensors")
    wan.save_sla(model, tmp_path / "sla.safetensors")
    with pytest.raises(ValueError, match="model must have the adapters in its SLA layers unmerged"):
        wan.load_sla(model, tmp_path / "sla.safetensors")
    merged = model.unload()
    torch.testing.assert_close(run(merged), expected)
    wan.remove_sla(merged)
    wan.install_sla(merged, **SPARSE)
    assert not torch.allclose(run(merged), expected)
    wan.load_sla(merged, tmp_path / "sla.safetensors")
    torch.testing.assert_close(run(merged), expected)


def test_proj_under_an_adapter_is_loaded_and_saved_without_it(tmp_path):
    """Weights of an earlier fine-tune go into Proj while an adapter lies over it; disabled, it is as if not there."""
    source = with_sla()
    for parameter in wan.sla_parameters(source):
        nn.init.normal_(parameter, std=0.3)
    wan.save_sla(source, tmp_path / "sla.safetensors")
    model = with_peft(with_sla(), target_modules=["proj_l"])
    wan.load_sla(model, tmp_path / "sla.safetensors")
    torch.testing.assert_close(run(model), run(source))
    train(model)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), run(source))
        wan.save_sla(model, tmp_path / "disabled.safetensors")
    saved, expected = (wan.read_checkpoint(tmp_path / f"{name}.safetensors") for name in ("disabled", "sla"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_sla_under_adapters_that_are_there_already(tmp_path):
    """A LoRA that was trained without SLA, for a style or for few steps, works in a model with it."""
    model = with_diffusers(transformer())
    train(model)
    expected = run(model)
    wan.install_sla(model, **DENSE)
    torch.testing.assert_close(run(model), expected)
    wan.remove_sla(model)
    assert torch.equal(run(model), expected)
    wrapped = with_peft(transformer())
    with pytest.raises(TypeError, match=r"got PeftModel; take its \.(get_)?base_model"):
        wan.install_sla(wrapped)


def test_gradient_checkpointing_with_adapters():
    models = with_diffusers(with_sla()), with_diffusers(with_sla())
    models[1].load_state_dict(models[0].state_dict())
    models[1].enable_gradient_checkpointing()
    for model in models:
        run(model.train()).square().sum().backward()
    for (name, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) == (not one.requires_grad), name
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_a_lora_under_lightx2vs_names(tmp_path):
    """diffusers reads them, and the alpha that scales the product. There is no Proj in the file, and it stays zero."""
    generator, file, merged = torch.Generator().manual_seed(3), {}, with_sla()
    for i, block in enumerate(merged.blocks):
        linears = {"q": block.attn1.to_q, "k": block.attn1.to_k, "v": block.attn1.to_v, "o": block.attn1.to_out[0]}
        for name, linear in linears.items():
            down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
            place = f"diffusion_model.blocks.{i}.self_attn.{name}"
            file |= {
                f"{place}.lora_down.weight": down,
                f"{place}.lora_up.weight": up,
                f"{place}.alpha": torch.tensor(1.0),
            }
            linear.weight.data += up @ down / 2
    save_file(file, tmp_path / "lora.safetensors")
    model = with_sla()
    found = WanLoraLoaderMixin.lora_state_dict(tmp_path, weight_name="lora.safetensors")
    WanLoraLoaderMixin.load_lora_into_transformer(found, model)
    torch.testing.assert_close(run(model), run(merged))
    with pytest.raises(ValueError, match=r"missing: blocks.0.*; load_lora_weights of diffusers' pipelines loads"):
        wan.load_sla(model, tmp_path / "lora.safetensors")
