"""What accelerate and diffusers' hooks do to a Wan with SLA: rows of the table "Good to know" in docs/wan.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="needs the extra diffusers")
import accelerate
from accelerate.state import AcceleratorState
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, PyramidAttentionBroadcastConfig, WanTransformer3DModel
from diffusers.hooks import apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from diffusers.training_utils import EMAModel
from test_diffusers import DENSE, SPARSE, inputs, run, trained, transformer

from sla_ref.integrations import diffusers as wan


@pytest.fixture
def installed() -> WanTransformer3DModel:
    model = transformer()
    wan.install_sla(model, **SPARSE)
    return trained(model)


# --- accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # all accelerators of a process share one


def step(accelerator: accelerate.Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = run(model).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_accelerate_resumes_where_its_state_was_saved(installed, accelerator, tmp_path):
    model, optimizer = accelerator.prepare(installed, torch.optim.AdamW(installed.parameters(), lr=1e-2))
    step(accelerator, model, optimizer)
    accelerator.save_state(tmp_path)
    losses = [step(accelerator, model, optimizer) for _ in range(2)]
    assert losses[1] < losses[0]
    accelerator.load_state(tmp_path)
    assert [step(accelerator, model, optimizer) for _ in range(2)] == pytest.approx(losses)

    accelerator.load_state(tmp_path)
    expected, fresh = run(model), transformer()
    wan.install_sla(fresh, **SPARSE)
    added, backbone = wan.split_sla_state_dict(wan.read_checkpoint(tmp_path / "model.safetensors"))
    wan.load_sla_state_dict(fresh, added)
    fresh.load_state_dict(backbone, strict=False)
    torch.testing.assert_close(run(fresh), expected)


def test_offloading_by_accelerate(installed, tmp_path):
    """Between two forwards the weights are elsewhere, and a file with none of them must not be written."""
    wan.save_sla(installed, tmp_path / "before.safetensors")
    expected = run(installed)
    accelerate.cpu_offload(installed, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(installed(**inputs())[0], expected)
    with pytest.raises(ValueError, match=r"model must hold its weights, got the meta device for blocks.0.attn1"):
        wan.save_sla(installed, tmp_path / "after.safetensors")
    with pytest.raises(ValueError, match=r"model must hold its weights, got the meta device for blocks.0.attn1"):
        wan.load_sla(installed, tmp_path / "before.safetensors")


# --- files of diffusers ----------------------------------------------------------------------------------------------


def test_the_average_of_proj(installed, tmp_path):
    average = EMAModel(installed.parameters(), decay=0.5, model_cls=WanTransformer3DModel)
    before = [parameter.detach().clone() for parameter in wan.sla_parameters(installed)]
    for parameter in wan.sla_parameters(installed):
        nn.init.zeros_(parameter)
    average.optimization_step = 100  # the first steps have a smaller decay
    average.step(installed.parameters())
    average.copy_to(installed.parameters())
    for parameter, start in zip(wan.sla_parameters(installed), before, strict=True):
        torch.testing.assert_close(parameter, start / 2)
    wan.save_sla(installed, tmp_path / "sla.safetensors")


def test_from_pretrained_drops_proj_with_a_warning(installed, tmp_path, caplog):
    installed.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == transformer().state_dict().keys()
    assert any("proj_l.weight" in record.getMessage() for record in caplog.records)


# --- hooks of guidance and of caches ---------------------------------------------------------------------------------


def skip_block(model: nn.Module) -> None:
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks"))


def blur_queries(model: nn.Module) -> None:
    _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig(indices=[1], fqn="blocks"), blur_sigma=1.0)


@pytest.mark.parametrize("hook", [skip_block, blur_queries])
def test_guidance_that_perturbs_the_model(hook):
    """Every block critical: with the hook too, SLA computes what full attention does."""
    model = transformer()
    plain = run(model)
    wan.install_sla(model, **DENSE)
    hook(model)
    perturbed = run(model)
    wan.remove_sla(model)
    torch.testing.assert_close(perturbed, run(model))
    assert not torch.allclose(perturbed, plain)


@pytest.mark.parametrize("part", ["skip_attention", "skip_attention_scores"])
def test_guidance_that_perturbs_attention_alone_is_refused(installed, part):
    """By diffusers, which has a list of processors: perturbed-attention guidance replaces calls of SDPA."""
    skipped = {"skip_attention": False, "skip_ff": False} | {part: True}
    with pytest.raises(ValueError, match="WanSLAProcessor'> not registered"):
        apply_layer_skip(installed, LayerSkipConfig(indices=[1], fqn="blocks", **skipped))


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=1e9),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1000),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: 500,
        ),
    ],
)
def test_caches_reuse_what_sla_computed(installed, cache):
    """In the second step, SLA of the last block does not run."""
    expected, calls = run(installed), []
    installed.blocks[1].attn1.processor.register_forward_hook(lambda *args: calls.append(1))
    installed.enable_cache(cache)
    with installed.cache_context("cond"), torch.no_grad():
        torch.testing.assert_close(run(installed), expected)
        assert len(calls) == 1
        run(installed, timestep=torch.tensor([800, 200]))
        assert len(calls) == 1
