"""Stage 1 of SLA2: layers matched to full attention, with a soft choice of blocks."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sla_ref.lab.config import TrainConfig
from sla_ref.lab.layers import TAU, each_layer, for_stage_1
from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.train import Run, train

TINY = ModelConfig(frames=4, size=32, width=32, depth=2, heads=2, block=8)  # 32 blocks
CONFIG = TrainConfig(steps=20, batch=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def teacher() -> VideoTransformer:
    torch.manual_seed(0)
    made = VideoTransformer(TINY)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # a fresh model's blocks do nothing
    return made.requires_grad_(False)


def student(teacher: VideoTransformer, **changes) -> VideoTransformer:
    made = with_attention(teacher, "sla2", **{"router": "learned", "alpha": "head", "critical_ratio": 0.2} | changes)
    for_stage_1(made)
    return made


@pytest.mark.parametrize("alpha", ["head", "block_means"])
def test_the_loss_is_that_of_soft_choices_at_each_ratio_and_so_is_its_gradient(teacher, alpha):
    made = student(teacher, alpha=alpha)
    run = Run(made, CONFIG)
    batch = run.next_batch()
    each_layer(made, teacher)(made, batch).backward()
    found = {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.requires_grad}
    assert found and all((".router." in name) or (".alpha_" in name) for name in found)
    made.zero_grad()

    layers, expected = [], 0.0
    for block in teacher.blocks:
        block.attention.core.register_forward_pre_hook(lambda core, inputs: layers.append(inputs))
    teacher(batch.x, batch.time, batch.labels)
    for block, inputs in zip(made.blocks, layers, strict=True):
        core, target = block.attention.core, scaled_dot_product_attention(*inputs)
        for ratio in (0.2, 0.16, 0.12):
            core.critical_ratio = ratio  # 6, 5 and 3 of 32 blocks
            error = (core(*inputs, tau=TAU * 4.0) - target).square().mean() / target.square().mean()
            expected = expected + error / 6
        core.critical_ratio = 0.2
    for block in teacher.blocks:
        block.attention.core._forward_pre_hooks.clear()
    expected.backward()
    torch.testing.assert_close(each_layer(made, teacher)(made, batch), expected)
    for name, weight in made.named_parameters():
        if weight.requires_grad:
            assert weight.grad.any(), name
            torch.testing.assert_close(found[name], weight.grad)


def test_stage_1_brings_the_soft_choice_closer_to_full_attention(teacher):
    """Whether the hard choice is better too differs from start to start; experiments measure that."""
    made = student(teacher)
    with torch.no_grad():
        for block in made.blocks:
            torch.nn.init.normal_(block.attention.core.router.scores.proj_q.weight, std=0.05)
    batch = Run(made, replace(CONFIG, batch=8)).next_batch()
    start = {name: weight.clone() for name, weight in made.state_dict().items()}
    before = each_layer(made, teacher)(made, batch).item()
    train(made, CONFIG, objective=each_layer(made, teacher))
    assert each_layer(made, teacher)(made, batch).item() < 0.7 * before
    for name, weight in made.state_dict().items():
        trained = ".router." in name or ".alpha_" in name
        assert torch.equal(weight, start[name]) is not trained, name


def test_a_layer_without_a_router_to_train_is_called_as_it_is(teacher):
    made = with_attention(teacher, "sla", critical_ratio=1.0)
    batch = Run(made, CONFIG).next_batch()
    assert each_layer(made, teacher)(made, batch).item() == pytest.approx(0.0, abs=1e-10)
    fewer = with_attention(teacher, "sla", critical_ratio=0.2)
    assert each_layer(fewer, teacher)(fewer, batch).item() > 1e-3
