"""SLA in diffusers' Wan transformer: the same model around another attention."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import sla_ref
from sla_ref import reference_sla2
from sla_ref.sla2 import ALPHAS

pytest.importorskip("diffusers", reason="needs the extra diffusers")
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.training_utils import EMAModel

from sla_ref.integrations import diffusers as wan
from sla_ref.integrations import thu_ml

DENSE = {"critical_ratio": 1.0, "block_q": 8, "block_k": 8}  # every block exact: what the model computed before
SPARSE = {"critical_ratio": 0.2, "negligible_ratio": 0.2, "block_q": 8, "block_k": 8}
SLA2 = {"critical_ratio": 0.2, "variant": "sla2", "alpha": "token", "proj": True, "block_q": 8, "block_k": 8}


def transformer(kind: str = "WanTransformer3DModel", **config) -> torch.nn.Module:
    """Two layers, two heads of 16, random weights; norms too, which start as ones."""
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**small | config)
    with torch.no_grad():
        for block in (*model.blocks, *getattr(model, "vace_blocks", ())):
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.normal_(1, 0.5)
    return model.eval()


def inputs(dtype: torch.dtype = torch.float32, **more) -> dict:
    """Latents of 3 x 8 x 10 pixels, which are 60 tokens: not a multiple of 8."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 10, generator=generator).to(dtype),
        "timestep": torch.tensor([900, 300]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator).to(dtype),
        "return_dict": False,
    } | more


def run(model: torch.nn.Module, *args, **more) -> torch.Tensor:
    arguments = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in inputs(*args, **more).items()}
    return model(**arguments)[0]


def trained(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """The model with added weights that are anywhere but at their start."""
    torch.manual_seed(2)
    for parameter in wan.sla_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def freeze_routers(model: WanTransformer3DModel) -> None:
    for block in model.blocks:
        block.attn1.processor.router.requires_grad_(False)


@pytest.fixture(params=[SPARSE, SLA2], ids=["sla", "sla2"])
def options(request) -> dict:
    return request.param


@pytest.fixture
def installed(options) -> WanTransformer3DModel:
    model = transformer()
    wan.install_sla(model, **options)
    return trained(model)


# --- the same mathematics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_every_block_critical_is_the_original(alpha):
    """SLA2's alpha is 1 in rows without marginal blocks, whatever was learned. "block" is bound to 60 tokens."""
    model = transformer()
    expected = run(model)
    if alpha is None:
        wan.install_sla(model, **DENSE)
    else:
        wan.install_sla(model, **DENSE, variant="sla2", alpha=alpha, query_length=60 if alpha == "block" else None)
        trained(model)
    torch.testing.assert_close(run(model), expected)


def test_it_is_sla_that_runs(installed, options):
    """Layer by layer: what goes into the first attention, through the equations, is what comes out."""
    model = installed
    attention, caught = model.blocks[0].attn1, {}
    attention.register_forward_hook(lambda module, args, out: caught.update(args=args, out=out))
    run(model)
    hidden_states, _, _, (cos, sin) = caught["args"]

    def heads(tokens):
        return tokens.reshape(2, 60, 2, 16).transpose(1, 2)

    def rotated(tokens):  # each pair of features is one complex number
        angle = torch.complex(cos, sin).transpose(1, 2)[..., 0::2]
        return torch.view_as_real(torch.view_as_complex(tokens.reshape(2, 2, 60, 8, 2)) * angle).flatten(-2)

    query = rotated(heads(attention.norm_q(attention.to_q(hidden_states))))
    key = rotated(heads(attention.norm_k(attention.to_k(hidden_states))))
    value = heads(attention.to_v(hidden_states))
    labels = sla_ref.reference.classify(query, key, 0.2, options.get("negligible_ratio", 0.0), 8, 8)
    sparse, linear, _ = sla_ref.reference.sparse_linear_attention(
        query, key, value, query.softmax(-1), key.softmax(-1), labels, 8, 8, 0.25
    )
    proj, layer = (attention.processor.proj_l.weight, attention.processor.proj_l.bias), attention.processor
    if options is SPARSE:
        out = sla_ref.reference.combine(sparse, linear, *proj)
    else:
        logit = torch.einsum("hd,bhnd->bhn", layer.alpha_weight, query) + layer.alpha_logit[:, None]
        out = reference_sla2.combine(sparse, torch.nn.functional.linear(linear, *proj), logit.sigmoid())
    torch.testing.assert_close(attention.to_out[0](out.transpose(1, 2).flatten(2)), caught["out"])


def test_fused_projections(installed):
    expected = run(installed)
    installed.fuse_qkv_projections()
    attention = installed.blocks[0].attn1
    assert attention.fused_projections
    torch.nn.init.zeros_(attention.to_k.weight)  # which the fused projection has taken the place of
    torch.testing.assert_close(run(installed), expected)


def test_image_to_video_model_with_its_added_projections():
    model = transformer(added_kv_proj_dim=32, image_dim=16)
    more = {
        "encoder_hidden_states": torch.randn(2, 512, 16, generator=torch.Generator().manual_seed(3)),
        "encoder_hidden_states_image": torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(4)),
    }
    expected = run(model, **more)
    wan.install_sla(model, **DENSE)
    torch.testing.assert_close(run(model, **more), expected)


@pytest.mark.parametrize("variant", ["main", "SLA-1"])
def test_variants_of_the_released_code(variant):
    model = transformer()
    expected = run(model)
    wan.install_sla(model, **DENSE, variant=variant)
    layer = model.blocks[1].attn1.processor
    assert isinstance(layer, thu_ml.SparseLinearAttention) and layer.variant == variant
    torch.testing.assert_close(run(model), expected, atol=2e-2, rtol=2e-2)  # in bfloat16
    with pytest.raises(ValueError, match=r"negligible_ratio must be None for variant 'main', got 0.1"):
        wan.install_sla(transformer(), 0.1, 0.1, variant="main")
    with pytest.raises(ValueError, match=r"proj_init must be 'zero' for variant 'main', got 'identity'"):
        wan.install_sla(transformer(), 0.1, proj_init="identity", variant="main")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
ANIMATED = {
    "hidden_states": noise(2, 12, 3, 8, 10),
    "pose_hidden_states": noise(2, 4, 2, 8, 10),
    "face_pixel_values": noise(2, 3, 5, 16, 16),
    "encoder_hidden_states_image": noise(2, 4, 16),
}
BY_TOKEN = {"timestep": torch.tensor([[900] * 40 + [0] * 20, [300] * 60])}
BY_FRAME = {"timestep": torch.tensor([[900, 300, 200], [900, 300, 0]]), "enable_diffusion_forcing": True}
FAMILY = [  # name, configuration, what its forward gets beside Wan's, how many self-attentions
    ("WanTransformer3DModel", {}, {}, 2),
    ("WanTransformer3DModel", {}, BY_TOKEN, 2),
    (
        "WanVACETransformer3DModel",
        {"vace_layers": [0], "vace_in_channels": 6},
        {"control_hidden_states": noise(2, 6, 3, 8, 10)},
        3,
    ),
    ("WanAnimateTransformer3DModel", ANIMATE, ANIMATED, 2),
    ("ChronoEditTransformer3DModel", {}, {}, 2),
    ("SkyReelsV2Transformer3DModel", {}, {}, 2),
    ("SkyReelsV2Transformer3DModel", {}, BY_FRAME, 2),
]


@pytest.mark.parametrize(("name", "config", "more", "count"), FAMILY)
def test_models_with_wans_self_attention(name, config, more, count, tmp_path):
    model = transformer(name, **config)
    expected, reached, names = run(model, **more), gradients(model, **more), list(model.state_dict())
    wan.install_sla(model, **DENSE)
    assert len(wan.sla_parameters(model)) == 2 * count
    torch.testing.assert_close(run(model, **more), expected)
    wan.remove_sla(model)
    assert list(model.state_dict()) == names and torch.equal(run(model, **more), expected)
    wan.install_sla(model, **SPARSE)
    sparse = run(trained(model), **more)
    assert not torch.equal(sparse, expected)
    wan.save_sla(model, tmp_path / "sla.safetensors")
    wan.set_schedule(model, dense_layers=range(count))
    assert torch.equal(run(model, **more), expected)
    wan.remove_sla(model)
    wan.install_sla(model, **SPARSE)
    wan.load_sla(model, tmp_path / "sla.safetensors")
    assert torch.equal(run(model, **more), sparse)
    added = set(model.state_dict()) - set(names)
    for parameter, gradient in gradients(model, **more).items():
        if parameter in added or reached[parameter] is not None:  # some belong to inputs that are not given
            assert gradient is not None and gradient.isfinite().all() and gradient.any(), parameter


def test_every_model_that_is_named_is_tested():
    assert {name for name, *_ in FAMILY} == set(wan.MODELS)


# --- where it is put -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_cross_attention_and_other_layers_stay(number):
    model = transformer()
    before = model.attn_processors
    wan.install_sla(model, layers=[number])
    changed = {name for name, processor in model.attn_processors.items() if processor is not before[name]}
    assert changed == {f"blocks.{number}.attn1.processor"}


def test_weights_are_the_models_own(installed, options):
    parts = ["proj_l.weight", "proj_l.bias", *([] if options is SPARSE else ["alpha_logit", "alpha_weight"])]
    added = {f"blocks.{i}.attn1.processor.{part}" for i in (0, 1) for part in parts}
    assert set(installed.state_dict()) == set(transformer().state_dict()) | added
    group = wan.sla_parameters(installed)
    assert [id(parameter) for parameter in group] == [
        id(parameter) for name, parameter in installed.named_parameters() if name in added
    ]
    installed.double()
    assert all(parameter.dtype == torch.float64 for parameter in wan.sla_parameters(installed))
    assert run(installed, torch.float64).dtype == torch.float64


def test_options_arrive():
    model = transformer()
    options = {"block_q": 16, "block_k": 8, "feature_map": "hedgehog", "proj_init": "identity", "backend": "torch"}
    wan.install_sla(model, 0.3, 0.2, **options)
    layer = model.blocks[0].attn1.processor
    assert isinstance(layer, sla_ref.SparseLinearAttention)
    assert (layer.critical_ratio, layer.negligible_ratio) == (0.3, 0.2)
    assert {name: getattr(layer, name) for name in options} == options
    assert len(wan.sla_parameters(model)) == 2 * 4


def test_options_of_sla2_arrive():
    model, router = transformer(), sla_ref.Router(protected_keys=slice(0, 8))
    options = {"alpha": "block", "query_length": 60, "router": router, "block_q": 16, "feature_map": "elu"}
    wan.install_sla(model, 0.3, variant="sla2", proj=True, **options)
    layer = model.blocks[0].attn1.processor
    assert isinstance(layer, sla_ref.SLA2Attention)
    assert (layer.critical_ratio, layer.heads) == (0.3, 2) and layer.proj_l is not None
    assert {name: getattr(layer, name) for name in options} == options
    run(model)
    with pytest.raises(ValueError, match="query must have query_length 60, to which alpha='block' is bound"):
        run(model, hidden_states=torch.randn(2, 4, 3, 8, 8))


def test_remove_restores_the_original(options):
    model = transformer()
    before, names, expected = model.attn_processors, list(model.state_dict()), run(model)
    attributes = set(vars(model))
    wan.install_sla(model, **options)
    assert not torch.equal(run(trained(model)), expected)
    wan.remove_sla(model)
    assert model.attn_processors == before
    assert list(model.state_dict()) == names
    assert torch.equal(run(model), expected)
    assert set(vars(model)) == attributes
    wan.install_sla(model, **options)
    model.set_attn_processor(before["blocks.0.attn1.processor"])  # as a user may do
    wan.remove_sla(model)
    assert set(vars(model)) == attributes


# --- where it stays dense --------------------------------------------------------------------------------------------


def kinds(model, *args, **more) -> str:
    """Runs the model; for each block, "s" where SLA ran in its self-attention and "d" where it did not."""
    calls, marks = [], []
    for block in model.blocks:
        processor = block.attn1.processor
        marks.append(processor.proj_l.register_forward_hook(lambda module, *_: calls.append(module)))
    with torch.no_grad():
        run(model, *args, **more)
    for mark in marks:
        mark.remove()
    return "".join("s" if block.attn1.processor.proj_l in calls else "d" for block in model.blocks)


def test_a_schedule_on_an_installed_model(installed):
    """The input has 60 tokens and the times 900 and 300."""
    dense, sparse = run(transformer()), run(installed)
    assert kinds(installed) == "ss"
    for schedule, expected in (
        ({"min_tokens": 60}, "ss"),
        ({"min_tokens": 61}, "dd"),
        ({"dense_layers": [1]}, "sd"),
        ({"dense_above": 300.0}, "ss"),
        ({"dense_above": 299}, "dd"),
        ({"dense_above": 299, "dense_layers": [0]}, "dd"),
        ({"dense_layers": range(2)}, "dd"),
    ):
        wan.set_schedule(installed, **schedule)
        assert kinds(installed) == expected, schedule
        with torch.no_grad():
            assert torch.equal(run(installed), dense) == (expected == "dd"), schedule
    wan.set_schedule(installed, dense_above=299)
    assert torch.equal(run(installed), sparse), "gradients are recorded"
    times = torch.tensor([[0, 900], [300, 0]])[:, [0] * 59 + [1]]  # one for each token, as Wan 2.2 may have it
    assert kinds(installed, timestep=times) == "dd"
    times[1] = 299
    assert kinds(installed, timestep=times) == "ss", "only the first sample has a time above 299"
    file = io.BytesIO()
    torch.save(installed, file)
    file.seek(0)
    for clone in (copy.deepcopy(installed), torch.load(file, weights_only=False)):
        assert kinds(clone) == "dd"
        wan.set_schedule(clone)
        assert kinds(clone) == "ss"
    assert kinds(installed) == "dd", "a copy has its own"
    wan.remove_sla(installed)
    assert not installed._forward_pre_hooks


def test_dense_first_steps_of_a_scheduler(installed):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    wan.set_schedule(installed, dense_above=scheduler.timesteps[2].item())
    steps = [kinds(installed, timestep=time.expand(2)) for time in scheduler.timesteps]
    assert steps == ["dd", "dd", "ss", "ss"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("options", [SPARSE], ids=["sla"], indirect=True)  # what is compiled twice is the same for SLA2
def test_a_schedule_with_compiled_blocks(installed):
    torch._dynamo.reset()
    expected = {
        time: run(model, timestep=torch.tensor([time] * 2)) for time, model in ((900, transformer()), (300, installed))
    }
    installed.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    wan.set_schedule(installed, dense_above=500)
    with torch.no_grad():
        for time, out in expected.items():
            torch.testing.assert_close(run(installed, timestep=torch.tensor([time] * 2)), out)


def test_the_backend_of_full_attention_reaches_scheduled_layers():
    model = transformer()
    wan.install_sla(model, **SPARSE)
    model.set_attention_backend("_native_math")
    assert model.blocks[0].attn1.processor.replaced._attention_backend == "_native_math"
    wan.remove_sla(model)
    assert {each._attention_backend for each in model.attn_processors.values()} == {"_native_math"}


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ({"min_tokens": 0}, ValueError, "min_tokens must be an int >= 1, got 0"),
        ({"dense_layers": [2]}, ValueError, r"dense_layers must hold different numbers from 0 to 1, got \[2\]"),
        ({"dense_layers": 1}, TypeError, "dense_layers must be block numbers, got 1"),
        ({"dense_above": 0}, ValueError, "dense_above must be a finite number > 0, got 0"),
        ({"dense_above": torch.tensor(1.0)}, TypeError, "dense_above must be a finite number > 0, got tensor"),
    ],
)
def test_bad_schedules_change_nothing(installed, schedule, error, message):
    wan.set_schedule(installed, dense_layers=[1])
    with pytest.raises(error, match=message):
        wan.set_schedule(installed, **{"min_tokens": 61} | schedule)
    assert kinds(installed) == "sd"
    with pytest.raises(ValueError, match="transformer must have SLA installed, got one without"):
        wan.set_schedule(transformer())
    installed.blocks[0].attn1.processor.group = object()
    with pytest.raises(ValueError, match="transformer must have SLA without a group"):
        wan.set_schedule(installed)


# --- training --------------------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, **more) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    run(model, **more).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_reach_every_parameter(options):
    model = transformer()
    wan.install_sla(model, **options)  # the added weights still at their start
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_a_learned_router_is_trained_in_stage_1_and_frozen_in_stage_2():
    """Stage 1 matches a soft attention to the original one, on the same input. Stage 2 trains all but the router."""
    model = transformer()
    wan.install_sla(model, **SLA2 | {"router": "learned"})
    with pytest.raises(RuntimeError, match="a hard choice of blocks gives the router no gradient"):
        run(model)
    attention, caught = model.blocks[0].attn1, {}
    attention.register_forward_hook(lambda module, args, out: caught.update(args=args))
    routers = {f"blocks.{i}.attn1.processor.router.scores.proj_{part}.weight" for i in (0, 1) for part in "qk"}
    for block in model.blocks:
        block.attn1.processor.tau = 0.4
    soft = gradients(model)
    assert all(soft[name].any() for name in routers)
    layer, (hidden_states, *_, rotary) = attention.processor, caught["args"]
    dense, layer.critical_ratio = layer.replaced(attention, hidden_states, rotary_emb=rotary), 1.0
    torch.testing.assert_close(attention(hidden_states, rotary_emb=rotary), dense)
    for block in model.blocks:
        block.attn1.processor.tau = None
    freeze_routers(model)
    layer.critical_ratio = 0.2
    assert {name for name, gradient in gradients(model).items() if gradient is None} == routers
    added = {id(parameter) for parameter in wan.sla_parameters(model)}
    assert routers < {name for name, parameter in model.named_parameters() if id(parameter) in added}


def test_one_step_on_the_added_parameters_changes_them_alone(installed):
    before = copy.deepcopy(installed.state_dict())
    gradients(installed)
    torch.optim.SGD(wan.sla_parameters(installed), lr=0.1).step()
    changed = {name for name, value in installed.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".processor." in name}


def test_gradient_checkpointing(installed):
    expected = gradients(installed)
    installed.enable_gradient_checkpointing()
    calls = []
    installed.blocks[0].attn1.register_forward_hook(lambda *args: calls.append(1))
    for name, gradient in gradients(installed).items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(calls) == 2, "the block ran again for the backward"


def near(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """As a whole: rounding may turn a near-tie of two blocks, and with it a few elements. Without Proj, 17 % differ."""
    return (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Wan's own norms under autocast
def test_bfloat16_autocast(device, options):
    """Blocks of 16, which every backend takes."""
    model = transformer()
    wan.install_sla(model, **options | {"block_q": 16, "block_k": 16})
    installed = trained(model).to(device)
    expected = run(installed)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = run(installed)
        assert all(gradient.isfinite().all() for gradient in gradients(installed).values())
    assert out.dtype == torch.bfloat16
    assert near(out, expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_that_keeps_the_norms_in_float32():
    """On some devices query and key come out of their norms in a wider dtype than value."""
    model = transformer()
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.register_forward_hook(lambda module, args, out: out.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(model)
        wan.install_sla(model, **DENSE)
        torch.testing.assert_close(run(model), expected, atol=3e-2, rtol=3e-2)


def test_model_in_bfloat16(installed):
    expected = run(installed)
    proj = installed.blocks[0].attn1.processor.proj_l
    installed.to(torch.bfloat16)
    assert proj.weight.dtype == torch.bfloat16
    assert near(run(installed, torch.bfloat16), expected)
    proj.float()  # and float32 mixed with bfloat16
    assert near(run(installed, torch.bfloat16), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what goes into a block
def test_compiled_forward_and_backward(installed):
    torch._dynamo.reset()
    expected, out = gradients(installed), run(installed)
    installed.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(installed), out)
    for name, gradient in gradients(installed).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_sampling_with_diffusers_scheduler():
    """The loop of WanPipeline: guidance, the scheduler's steps; SLA with every block critical ends where SDPA does."""

    @torch.no_grad()
    def sample(model):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(5)
        latents = torch.randn(1, 4, 3, 8, 10, generator=generator)
        prompt, negative = torch.randn(2, 1, 5, 16, generator=generator)
        for time in scheduler.timesteps:
            wanted, unwanted = (
                model(latents, time.expand(1), text, return_dict=False)[0] for text in (prompt, negative)
            )
            latents = scheduler.step(unwanted + 5.0 * (wanted - unwanted), time, latents, return_dict=False)[0]
        return latents

    model = transformer()
    dense = sample(model)
    wan.install_sla(model, **DENSE)
    torch.testing.assert_close(sample(model), dense, atol=1e-4, rtol=1e-4)
    wan.remove_sla(model)
    wan.install_sla(model, **SPARSE)
    sparse = sample(model)
    assert sparse.isfinite().all() and not torch.allclose(sparse, dense, atol=1e-2)


def test_the_benchmark_rehearses(tmp_path, monkeypatch):
    folder, out = Path(__file__).parents[1] / "benchmarks", tmp_path / "wan.json"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.argv", ["wan.py", "--tiny", "--turns", "1", "--whole-graph", "--json", str(out)])
    runpy.run_path(str(folder / "wan.py"), run_name="__main__")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["about"].keys() == {"device", "versions", "commit", "date"}
    for name in ("SDPA", "SLA 32x16"):
        row = result["arms"][name]
        if importlib.util.find_spec("peft") is None:
            errors = [row.pop(step)["error"] for step in ("lora_step", "lora_whole_graph_step")]
            assert all("No module named 'peft'" in error for error in errors)
        assert all(isinstance(value, float) and value > 0 for value in row.values()), row
        assert row.keys() >= {"forward", "self_attention", "training_step", "training_whole_graph_step"}


# --- files and copies ------------------------------------------------------------------------------------------------


def test_save_and_load(installed, options, tmp_path):
    wan.save_sla(installed, tmp_path / "sla.safetensors")
    other = transformer()
    wan.install_sla(other, **options)
    assert not torch.equal(run(other), run(installed))
    wan.load_sla(other, tmp_path / "sla.safetensors")
    assert torch.equal(run(other), run(installed))
    with pytest.raises(FileExistsError, match="path must name a new file"):
        wan.save_sla(installed, tmp_path / "sla.safetensors")
    another = transformer()
    wan.install_sla(another, **SLA2 if options is SPARSE else SPARSE)
    with pytest.raises(ValueError, match=r"model must have variant '(paper|sla2)' in its SLA layers"):
        wan.load_sla(another, tmp_path / "sla.safetensors")


def test_the_way_through_from_pretrained(installed, options, tmp_path):
    """What docs/wan.md says: the model as diffusers saves it, with the added weights in a file of their own."""
    wan.save_sla(installed, tmp_path / "sla.safetensors")
    expected = run(installed)
    wan.remove_sla(installed)
    installed.save_pretrained(tmp_path)
    other = WanTransformer3DModel.from_pretrained(tmp_path)
    wan.install_sla(other, **options)
    wan.load_sla(other, tmp_path / "sla.safetensors")
    torch.testing.assert_close(
        run(other), expected
    )  # its weights may lie elsewhere in memory: other kernels, other bits


def test_each_of_two_transformers_takes_its_own_file(tmp_path):
    """Those of Wan 2.2 are alike in all but the weights."""
    first, second, unnamed = transformer(), transformer(), transformer()
    wan.install_sla(first, role="transformer")
    wan.install_sla(second, role="transformer_2")
    wan.install_sla(unnamed)
    wan.save_sla(second, tmp_path / "low.safetensors")
    (tmp_path / "transformer_2").mkdir()
    wan.save_sla(unnamed, tmp_path / "transformer_2" / "sla.safetensors")
    wan.save_sla(unnamed, tmp_path / "transformer_2.safetensors")
    wan.save_sla(unnamed, tmp_path / "any.safetensors")
    for name in ("low.safetensors", "transformer_2/sla.safetensors", "transformer_2.safetensors"):
        wan.load_sla(second, tmp_path / name)
        for model in (first, unnamed):
            with pytest.raises(ValueError, match=r"model must have role 'transformer_2' .*, got 'transformer'"):
                wan.load_sla(model, tmp_path / name)
    for model in (first, unnamed):
        wan.load_sla(model, tmp_path / "any.safetensors")
    with pytest.raises(ValueError, match=r"model must have role 'transformer' .*, got 'transformer_2'"):
        wan.load_sla(second, tmp_path / "any.safetensors")


def test_save_pretrained_with_sla_in(installed, options, tmp_path):
    """For one file and for shards, the error names the way to a model with SLA, and that way works."""
    fresh, expected = transformer(), run(installed)
    wan.install_sla(fresh, **options)
    for size, name in (("1GB", "safetensors"), ("20KB", "safetensors.index.json")):
        installed.save_pretrained(tmp_path, max_shard_size=size)
        path = tmp_path / f"diffusion_pytorch_model.{name}"
        with pytest.raises(ValueError, match=r"split_sla_state_dict takes (SLA's weights|them) out of a whole"):
            wan.load_sla(fresh, path)
        wan.load_sla_state_dict(fresh, wan.split_sla_state_dict(wan.read_checkpoint(path))[0])
        torch.testing.assert_close(run(fresh), expected)


def test_the_average_of_the_backbone(installed, tmp_path):
    """EMAModel.save_pretrained copies by place into a transformer without SLA."""
    average = EMAModel(installed.parameters(), model_cls=WanTransformer3DModel, model_config=installed.config)
    average.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, installed.state_dict()[name]), name
    parameters = list(installed.parameters())
    assert len(parameters) == len(set(parameters)) == len(list(installed.named_parameters()))
    added = wan.sla_parameters(installed)
    assert all(one is other for one, other in zip(parameters[-len(added) :], added, strict=True))
    assert list(copy.deepcopy(installed).parameters())[-1] is not parameters[-1], "a copy has its own"


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_group_offloading(installed, tmp_path, where):
    wan.save_sla(installed, tmp_path / "before.safetensors")
    expected, options = run(installed), {"offload_to_disk_path": str(tmp_path / "groups")} if where == "disk" else {}
    cpu = torch.device("cpu")
    installed.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level", **options)
    torch.testing.assert_close(run(installed), expected)
    saved = tmp_path / "after.safetensors"
    if where == "disk":  # between two forwards the parameters do not hold the weights
        with pytest.raises(ValueError, match="model must hold its weights, got one that enable_group_offload keeps on"):
            wan.save_sla(installed, saved)
        with pytest.raises(ValueError, match="model must hold its weights"):
            wan.load_sla(installed, tmp_path / "before.safetensors")
    else:
        wan.save_sla(installed, saved)
        before = wan.read_checkpoint(tmp_path / "before.safetensors")
        assert all(torch.equal(value, before[name]) for name, value in wan.read_checkpoint(saved).items())


def test_offloading_on_disk_brings_back_a_learned_router(tmp_path):
    model, cpu = transformer(), torch.device("cpu")
    wan.install_sla(model, **SLA2 | {"router": "learned"})
    freeze_routers(trained(model))
    expected, options = run(model), {"onload_device": cpu, "offload_device": cpu, "offload_type": "leaf_level"}
    model.enable_group_offload(**options, offload_to_disk_path=str(tmp_path))
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_layerwise_casting_leaves_proj_its_dtype(order):
    model = transformer()
    if order == "after":
        wan.install_sla(model, **SPARSE)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if order == "before":
        wan.install_sla(model, **SPARSE)
    trained(model)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert {parameter.dtype for parameter in wan.sla_parameters(model)} == {torch.float32}
    assert run(model).isfinite().all()


def test_deepcopy_and_torch_save(installed):
    expected = run(installed)
    file = io.BytesIO()
    torch.save(installed, file)
    file.seek(0)
    for clone in (copy.deepcopy(installed), torch.load(file, weights_only=False)):
        assert torch.equal(run(clone), expected)
        wan.remove_sla(clone)
        assert not torch.equal(run(clone), expected)


# --- bad input -------------------------------------------------------------------------------------------------------


class Pipeline:
    transformer = None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"transformer": torch.nn.Linear(1, 1)},
            TypeError,
            "must be one of diffusers' WanTransformer3DModel, .*, got L",
        ),
        (
            {"transformer": torch.nn.Linear(1, 1)},
            TypeError,
            "got Linear; sla_ref.integrations.sdpa puts SLA into other",
        ),
        ({"transformer": Pipeline()}, TypeError, "got Pipeline; take its .transformer, before anything wraps it"),
        ({"transformer": torch.nn.DataParallel(torch.nn.Linear(1, 1))}, TypeError, "DataParallel; take its .module,"),
        ({"transformer": torch.compile(torch.nn.Linear(1, 1))}, TypeError, "got OptimizedModule; take its ._orig_mod,"),
        ({"role": "low"}, ValueError, "role must be one of 'transformer', 'transformer_2' or None, got 'low'"),
        ({"group": "ranks"}, TypeError, "group must be a torch.distributed.ProcessGroup or None, got str"),
        ({"critical_ratio": 0}, ValueError, "critical_ratio must be a number with 0 < critical_ratio <= 1, got 0"),
        ({"negligible_ratio": 2}, ValueError, "negligible_ratio must be"),
        ({"block_q": 0}, ValueError, "block_q must be an int >= 1, got 0"),
        ({"critical_ratio": 2, "variant": "main"}, ValueError, "critical_ratio must be"),
        ({"block_k": 0, "variant": "main"}, ValueError, "block_k must be an int >= 1, got 0"),
        ({"feature_map": "tanh"}, ValueError, "feature_map must be one of"),
        ({"proj_init": "eye"}, ValueError, "proj_init must be one of 'zero', 'identity', got 'eye'"),
        ({"backend": "nope"}, ValueError, "backend must be one of"),
        ({"variant": "SLA-2"}, ValueError, "variant must be one of 'paper', 'main', 'SLA-1', 'sla2', got 'SLA-2'"),
        ({"variant": "sla2", "negligible_ratio": 0.1}, ValueError, "negligible_ratio must be None for variant 'sla2'"),
        ({"variant": "sla2", "proj_init": "identity"}, ValueError, "proj_init must be 'zero' for variant 'sla2'"),
        ({"variant": "sla2", "alpha": "row"}, ValueError, "alpha must be one of 'head', 'block', .*, got 'row'"),
        ({"variant": "sla2", "alpha": "block"}, TypeError, "query_length must be an int >= 1, got None"),
        ({"variant": "sla2", "query_length": 60}, ValueError, "query_length must be None for alpha='head'"),
        ({"variant": "sla2", "router": "lerned"}, ValueError, "router must be 'pooled', 'learned' or a callable"),
        ({"alpha": "head"}, ValueError, "alpha must be None for variant 'paper', got 'head'"),
        ({"proj": False}, ValueError, "proj must be None for variant 'paper', got False"),
        ({"variant": "main", "router": "pooled"}, ValueError, "router must be None for variant 'main', got 'pooled'"),
        ({"layers": [0, 2]}, ValueError, r"layers must hold different numbers from 0 to 1, got \[0, 2\]"),
        ({"layers": [0, 0]}, ValueError, "layers must hold different numbers"),
        ({"layers": []}, ValueError, "layers must hold at least one number, got none"),
        ({"layers": [-1]}, ValueError, "layers must hold different numbers"),
        ({"layers": 1}, TypeError, "layers must be block numbers, got 1"),
        ({"layers": ["1"]}, TypeError, "layers must hold ints, got '1' of type str"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(changes, error, message):
    model = transformer()
    before = model.attn_processors
    with pytest.raises(error, match=message):
        wan.install_sla(**{"transformer": model} | changes)
    assert model.attn_processors == before


def test_a_head_dim_that_the_feature_map_cannot_take():
    model = transformer(attention_head_dim=16)
    model.blocks[1].attn1.inner_dim = 30  # only in the second layer: nothing may be installed in the first
    before = model.attn_processors
    with pytest.raises(ValueError, match="head_dim must be an even int >= 2 for the hedgehog feature map, got 15"):
        wan.install_sla(model, feature_map="hedgehog")
    assert model.attn_processors == before


def test_attention_that_looks_like_wans_and_computes_something_else():
    """Helios has the same names in its blocks.*.attn1, and rotates its features in another way."""
    model = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_dim=(4, 6, 6),
    )
    with pytest.raises(TypeError, match=r"WanVACETransformer3DModel, .*, got HeliosTransformer3DModel; sla_ref"):
        wan.install_sla(model)


def test_tokens_of_other_models_are_not_split():
    with pytest.raises(ValueError, match="group must be None unless the model is a WanTransformer3DModel, got a Chro"):
        wan.install_sla(transformer("ChronoEditTransformer3DModel"), group="ranks")


def test_twice_and_without(installed):
    before = installed.attn_processors
    with pytest.raises(ValueError, match="SLA, which is installed already; remove_sla takes it out"):
        wan.install_sla(installed)
    assert installed.attn_processors == before
    with pytest.raises(ValueError, match="transformer must have SLA installed"):
        wan.remove_sla(transformer())


def test_another_processor_is_not_replaced():
    model = transformer()
    model.blocks[1].attn1.set_processor(Pipeline())
    with pytest.raises(ValueError, match=r"WanAttnProcessor in blocks.1.attn1, got Pipeline"):
        wan.install_sla(model)
    assert "proj_l" not in " ".join(model.state_dict())


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = transformer()
    with pytest.raises(ValueError, match=r"got blocks.0.attn1 on the meta device; load them first"):
        wan.install_sla(model)


def test_split_tokens_are_refused(installed):
    """Each device would attend to its own tokens only, and nothing would say so."""
    for block in installed.blocks:
        block.attn1.processor._parallel_config = object()
    with pytest.raises(RuntimeError, match=r"has split the tokens over devices.*so no ring can run it"):
        run(installed)
    model = transformer()
    model._parallel_config = object()
    with pytest.raises(ValueError, match="one that enable_parallelism has split over devices"):
        wan.install_sla(model)


def test_masks_and_cross_attention_are_refused(installed):
    attention, tokens = installed.blocks[0].attn1, torch.zeros(1, 4, 32)
    for arguments in ((tokens, tokens), (tokens, None, torch.ones(4, 4))):
        with pytest.raises(ValueError, match="SLA takes self-attention without a mask"):
            attention(*arguments)


def test_without_diffusers_the_import_says_what_helps(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "sla_ref.integrations.diffusers")
    with pytest.raises(ImportError, match=r"pip install 'sla-ref\[diffusers\]'"):
        importlib.import_module("sla_ref.integrations.diffusers")
