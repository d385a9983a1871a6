"""The video model: its parts, and that swapping its attention changes nothing else."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sla_ref.lab import evaluate, flow
from sla_ref.lab.arms import ARMS, make_arm
from sla_ref.lab.model import ModelConfig, VideoTransformer, rotary_angles, rotate, with_attention

TINY = ModelConfig(frames=4, size=16, width=32, depth=2, heads=2, block=8)  # 64 tokens, 8 blocks
TIME = torch.tensor([0.2, 0.9])
LABELS = torch.tensor([3, 1])


def model(config: ModelConfig = TINY) -> VideoTransformer:
    """A model that is not the zero function: the zero-initialised layers get values, too."""
    torch.manual_seed(0)
    made = VideoTransformer(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def clip(config: ModelConfig = TINY) -> torch.Tensor:
    return torch.randn(2, config.frames, config.size, config.size, generator=torch.Generator().manual_seed(1))


def test_the_standard_model_is_below_a_million_parameters_with_sla():
    standard = VideoTransformer(ModelConfig(attention="sla"))
    assert sum(p.numel() for p in standard.parameters()) < 1_000_000
    assert standard.config.tokens == 1024
    assert standard.config.head_dim == 64


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    fresh = VideoTransformer(TINY)
    assert not fresh(clip(), TIME, LABELS).any()
    tokens = torch.randn(2, TINY.tokens, TINY.width)
    modulation = fresh.time_projection(torch.randn(2, TINY.width)).unflatten(-1, (6, TINY.width))
    for block in fresh.blocks:
        assert torch.equal(block(tokens, modulation, fresh.cosine, fresh.sine), tokens)


def test_patches_go_in_and_come_out_in_the_same_places():
    identity = VideoTransformer(replace(TINY, width=32, depth=1))  # its block starts as the identity
    with torch.no_grad():
        identity.patch_embedding.weight.copy_(torch.eye(32, 16))
        identity.patch_embedding.bias.zero_()
        identity.out.weight.copy_(torch.eye(16, 32))
    identity.norm_out = torch.nn.Identity()
    identity.time_embedding = torch.nn.Sequential(torch.nn.Linear(32, 32))
    torch.nn.init.zeros_(identity.time_embedding[0].weight)
    torch.nn.init.zeros_(identity.time_embedding[0].bias)
    torch.nn.init.zeros_(identity.label_embedding.weight)
    assert torch.equal(identity(clip(), TIME, LABELS), clip())


def test_a_label_changes_its_own_clip_alone():
    made, x = model(), clip()
    first, other = made(x, TIME, LABELS), made(x, TIME, torch.tensor([3, 8]))
    torch.testing.assert_close(first[0], other[0])
    assert not torch.allclose(first[1], other[1], atol=1e-3)
    with pytest.raises(ValueError, match=r"labels must be \(2,\), one per clip, got \(2, 2\)"):
        made(x, TIME, LABELS.expand(2, 2))


def test_rotation_keeps_lengths_and_sees_only_relative_places():
    angles = rotary_angles(3, 4, 16)
    assert angles.shape == (48, 8)
    torch.manual_seed(0)
    query, key = torch.randn(2, 16)
    rotated = rotate(query.expand(1, 1, 48, 16), angles.cos(), angles.sin())[0, 0]
    keys = rotate(key.expand(1, 1, 48, 16), angles.cos(), angles.sin())[0, 0]
    torch.testing.assert_close(rotated.norm(dim=-1), query.norm().expand(48))
    scores = (rotated @ keys.T).view(3, 4, 4, 3, 4, 4)
    # From (0, 1, 1) to (1, 2, 3) is as far as from (1, 0, 0) to (2, 1, 2).
    torch.testing.assert_close(scores[0, 1, 1, 1, 2, 3], scores[1, 0, 0, 2, 1, 2])
    # Each axis counts: a step in time, down or right gives another score.
    steps = torch.stack([scores[0, 0, 0, 1, 0, 0], scores[0, 0, 0, 0, 1, 0], scores[0, 0, 0, 0, 0, 1]])
    assert steps.unique().numel() == 3
    assert (steps - scores[0, 0, 0, 0, 0, 0]).abs().min() > 1e-3


@pytest.mark.parametrize("arm", list(ARMS))
def test_swapping_keeps_every_other_weight_and_leaves_the_original_alone(arm):
    made = model()
    before = {name: w.clone() for name, w in made.state_dict().items()}
    swapped = with_attention(made, arm, critical_ratio=0.25)
    assert swapped.config == replace(TINY, attention=arm, critical_ratio=0.25)
    for name, weight in swapped.state_dict().items():
        if ".core." in name:
            # A new Proj is zero, and a new alpha 0.9.
            assert not weight.any() if arm == "sla" else torch.all(weight.sigmoid() - 0.9 < 1e-6), arm
        else:
            assert torch.equal(weight, before[name])
            assert weight.data_ptr() != made.state_dict()[name].data_ptr()
    x = clip().requires_grad_()
    out = swapped(x, TIME, LABELS)
    out.square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in swapped.parameters())


def test_swapping_sla_for_sla_keeps_its_proj():
    first = with_attention(model(), "sla")
    with torch.no_grad():
        for block in first.blocks:
            block.attention.core.proj_l.weight.normal_()
    second = with_attention(first, "sla", critical_ratio=0.5)
    for old, new in zip(first.blocks, second.blocks, strict=True):
        assert torch.equal(old.attention.core.proj_l.weight, new.attention.core.proj_l.weight)


def test_swapping_keeps_alpha_where_its_form_and_blocks_stay():
    first = with_attention(model(), "sla2", alpha="token", router="learned")
    with torch.no_grad():
        for parameter in first.blocks[0].attention.core.parameters():
            parameter.normal_()
    old = first.blocks[0].attention.core.state_dict()
    for changes, kept in (
        ({"critical_ratio": 0.5}, ["alpha_logit", "alpha_weight"]),
        ({"alpha": "head"}, []),
        ({"alpha": "block"}, []),
        ({"block": 16}, []),
    ):
        second = with_attention(first, "sla2", **changes)
        assert second.config.router == "learned"
        new = second.blocks[0].attention.core.state_dict()
        same = [name for name in new if new[name].shape == old[name].shape and torch.equal(new[name], old[name])]
        assert same == [*kept, "router.scores.proj_q.weight", "router.scores.proj_k.weight"]
    back = with_attention(first, "sla")
    assert (back.config.alpha, back.config.router) == (None, None)


def test_a_learned_router_is_frozen_unless_it_is_trained():
    made = with_attention(model(), "sla2", alpha="block_means", router="learned")
    frozen = [name for name, parameter in made.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 2 * len(made.blocks) and all(".router." in name for name in frozen)
    made(clip(), TIME, LABELS).sum().backward()  # with a hard choice


@pytest.mark.parametrize("arm", ["sla", "sparse"])
def test_all_blocks_critical_and_a_zero_proj_is_full_attention(arm):
    made = model()
    with torch.no_grad():
        full = made(clip(), TIME, LABELS)
        same = with_attention(made, arm, critical_ratio=1.0)(clip(), TIME, LABELS)
        fewer = with_attention(made, arm, critical_ratio=0.25)(clip(), TIME, LABELS)
    torch.testing.assert_close(same, full, rtol=1e-4, atol=1e-4)
    assert (fewer - full).abs().max() > 1e-2


def test_the_baselines_are_what_they_say():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 64, 16, dtype=torch.float64)
    sparse, linear, both, sla = (
        make_arm(ModelConfig(width=32, attention=arm, critical_ratio=0.25, block=8)).double()(query, key, value)
        for arm in ("sparse", "linear", "l+s", "sla")
    )
    torch.testing.assert_close(both, sparse + linear)
    torch.testing.assert_close(sla, sparse)  # with a Proj of zero
    weights = query.softmax(-1) @ key.softmax(-1).mT
    torch.testing.assert_close(linear, weights / weights.sum(-1, keepdim=True) @ value)
    pool = query.unflatten(2, (8, 8)).mean(3) @ key.unflatten(2, (8, 8)).mean(3).mT
    chosen = torch.zeros_like(pool, dtype=torch.bool).scatter(-1, pool.topk(2).indices, True)
    mask = chosen.repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(sparse, expected)


def test_costs_of_the_arms():
    standard = ModelConfig()
    full, none = evaluate.attention_cost(standard)
    assert full == 8 * 4 * 1024 * 1024 * 64
    assert none == 0
    linear = 8 * 4 * 1024 * 64 * 64
    expected = {
        "sparse": (3 / 64 * full, 61 / 64),
        "sla": (3 / 64 * full + linear, 61 / 64),
        "l+s": (3 / 64 * full + linear, 61 / 64),
        "linear": (linear, 1.0),
    }
    for arm, figures in expected.items():
        assert evaluate.attention_cost(replace(standard, attention=arm)) == pytest.approx(figures)
    sla2 = 3 / 64 * full + linear
    products = {"head": 0, "block": 0, "token": 1, "block_means": 64, "ideal": 2 * 61 / 64 * 1024}
    for alpha, of_a_row in products.items():
        expected_flops = sla2 + 8 * 2 * 1024 * 64 * of_a_row
        flops, _ = evaluate.attention_cost(replace(standard, attention="sla2", alpha=alpha))
        assert flops == pytest.approx(expected_flops), alpha


def test_attention_inputs_are_those_of_every_block():
    made = model()
    caught = evaluate.attention_inputs(made, clip(), TIME, LABELS)
    assert len(caught) == TINY.depth
    assert all(each.shape == (2, 2, 64, 16) for layer in caught for each in layer)
    assert not made.blocks[0].attention.core._forward_pre_hooks


def test_sampling_takes_equal_steps_from_noise_to_clip():
    class Growing(torch.nn.Module):
        """The velocity is t x. A step of 1/5 from time t therefore multiplies x by 1 - t / 5."""

        def forward(self, x, time, labels):
            return time[:, None, None, None] * x

    done = []
    out = flow.sample(Growing(), clip(), LABELS, 5, done.append)
    expected = math.prod(1 - t / 5 for t in (1.0, 0.8, 0.6, 0.4, 0.2)) * clip()
    torch.testing.assert_close(out, expected.clamp(-1, 1))
    assert done == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="steps must be an int >= 1, got 0"):
        flow.sample(Growing(), clip(), LABELS, 0)


def test_flow_ends_are_clip_and_noise_and_the_velocity_joins_them():
    a, b = clip(), clip().flip(0)
    at = [flow.noised(a, b, torch.full((2,), t)) for t in (0.0, 0.5, 1.0)]
    assert torch.equal(at[0], a)
    assert torch.equal(at[2], b)
    torch.testing.assert_close(at[1] + 0.5 * flow.velocity(a, b), b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 30}, "size must be a multiple of 4, got 30"),
        ({"width": 30, "heads": 4}, r"width must be a multiple of twice the heads \(8\), got 30"),
        ({"attention": "dense"}, r"attention must be one of 'full', 'sla', .*, got 'dense'"),
        ({"attention": "sla2", "alpha": "row"}, r"alpha must be one of 'head', .*, got 'row'"),
        ({"attention": "sla2", "router": "best"}, r"router must be 'pooled', 'learned' or a callable, got 'best'"),
        (
            {"attention": "sla", "alpha": "token"},
            "alpha must be left out unless attention is sla2, got 'token' with sla",
        ),
        ({"router": "learned"}, "router must be left out unless attention is sla2, got 'learned' with full"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        VideoTransformer(replace(TINY, **changes))


def test_a_clip_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"x must be \(B, 4, 16, 16\), got \(2, 4, 32, 32\)"):
        model()(torch.zeros(2, 4, 32, 32), TIME, LABELS)
