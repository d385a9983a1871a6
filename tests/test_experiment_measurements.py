"""What `attention_maps`, `flatness` and `block_choice` measure, against maps and layers whose answers are known."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import sla_ref
from experiments import attention_maps, block_choice, flatness
from experiments.fine_tuning import find_teacher
from experiments.setting import QUICK, SETTINGS, Context
from sla_ref import analysis
from sla_ref.lab import evaluate
from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.weights import STUDENT, load_weights, save_weights


@pytest.fixture
def context(tmp_path):
    """A context that has a teacher in its folder of work."""
    torch.manual_seed(0)
    teacher = VideoTransformer(QUICK.model)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # a fresh model predicts zero, whatever its attention
    training = {"steps": QUICK.teacher_steps, "batch": QUICK.batch, "learning_rate": QUICK.learning_rate}
    save_weights(tmp_path / "teacher-quick.safetensors", teacher, {"training": training})
    return Context(torch.device("cpu"), tmp_path)


# --- attention maps --------------------------------------------------------------------------------------------------


def _attending(weights):
    """Query and key (..., N, N) whose attention has these weights."""
    query = weights.clamp(min=1e-30).log() * weights.shape[-1] ** 0.5
    return query, torch.eye(weights.shape[-1]).expand_as(query)


def test_figures_of_a_map_that_sees_each_token_alone_and_of_one_that_sees_all_alike():
    value = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)).abs()
    alone = attention_maps.map_quantities(*_attending(torch.eye(100)), value)
    assert alone["above_mean"] == pytest.approx(0.01) and alone["below_hundredth"] == pytest.approx(0.99)
    for name in ("without_small", "only_large", "without_smallest_45", "only_largest_8"):
        assert alone[f"error_{name}"] == 0
    assert alone["stable_rank"].item() == pytest.approx(100, rel=1e-5) and alone["stable_rank_rest"] == 0
    # A uniform map with one step: half of the weights of each row are three times as large as the others.
    halves = torch.full((100, 100), 0.005)
    halves[:, :50] = 0.015
    known = attention_maps.map_quantities(*_attending(halves), value)
    assert known["above_mean"] == 0.5 and known["below_hundredth"] == 0
    assert known["error_without_small"].item() == pytest.approx(0, abs=1e-6)
    whole, half = halves @ value, value[:50].mean(dim=0)
    assert known["error_only_large"].item() == pytest.approx(
        ((half - whole).abs().sum() / whole.sum()).item(), rel=1e-4
    )
    assert known["stable_rank"].item() == pytest.approx(1, rel=1e-5)


def test_errors_of_the_papers_shares_keep_those_shares():
    generator = torch.Generator().manual_seed(0)
    weights = (3 * torch.randn(2, 60, 60, generator=generator)).softmax(dim=-1)
    value = torch.randn(2, 60, 4, generator=generator)
    figures = attention_maps.map_quantities(*_attending(weights), value)
    for name, share in (("error_only_largest_8", 0.081), ("error_without_smallest_45", 0.55)):
        least = weights.flatten(1).sort(dim=1, descending=True).values[:, round(share * 3600) - 1]
        expected = analysis.error_of_keeping(weights >= least[:, None, None], weights, value)
        torch.testing.assert_close(figures[name], expected)
    top, rest = analysis.split_top(weights, 0.08)
    for name, part in (("stable_rank", weights), ("stable_rank_top_8", top), ("stable_rank_rest", rest)):
        torch.testing.assert_close(figures[name], analysis.stable_rank(part), rtol=1e-3, atol=0)


def test_iterated_stable_ranks_of_the_teachers_maps_are_right(context):
    data = attention_maps.noisy_clips(find_teacher(SETTINGS["n1024"], context), 0, torch.tensor([0.3]))
    inputs = evaluate.attention_inputs(find_teacher(SETTINGS["n1024"], context), data.x, data.time, data.labels)
    for query, key, _ in inputs:
        weights = analysis.attention_weights(query, key)
        found = analysis.stable_rank(weights, attention_maps.ITERATIONS)
        torch.testing.assert_close(found, analysis.stable_rank(weights), rtol=1e-4, atol=0)


def test_noisy_clips_are_the_seeds_and_between_clip_and_noise(context):
    teacher = find_teacher(QUICK, context)
    times = torch.tensor([0.0, 0.5, 1.0])
    data = attention_maps.noisy_clips(teacher, 3, times)
    assert torch.equal(data.x, attention_maps.noisy_clips(teacher, 3, times).x)
    assert not torch.equal(data.x, attention_maps.noisy_clips(teacher, 4, times).x)
    assert data.x[0].min() == -1 and data.x[2].std() == pytest.approx(1, abs=0.1)
    # The velocity leads from x_t back to the clip, and on to the noise.
    clip = data.x - data.time[:, None, None, None] * data.velocity
    assert clip.min() >= -1 - 1e-5 and clip.max() <= 1 + 1e-5
    assert (clip[1:] + data.velocity[1:]).std() == pytest.approx(1, abs=0.1)


def test_motivation_gives_mean_and_bounds_of_all_maps(context):
    cases = attention_maps.EXPERIMENT.cases(QUICK)
    assert cases == ["t = 0.1", "t = 0.3", "t = 0.5", "t = 0.7", "t = 0.9"]
    first, last = (attention_maps.EXPERIMENT.measure(cases[case], 0, QUICK, context) for case in (0, -1))
    assert first == attention_maps.EXPERIMENT.measure(cases[0], 0, QUICK, context)
    assert first != attention_maps.EXPERIMENT.measure(cases[0], 1, QUICK, context)
    assert first["stable_rank"] != last["stable_rank"]
    assert first["error_only_large_min"] < first["error_only_large"] < first["error_only_large_max"]
    teacher = find_teacher(QUICK, context)
    data = attention_maps.noisy_clips(teacher, 0, torch.full((4,), 0.1))
    maps = [analysis.attention_weights(q, k) for q, k, _ in evaluate.attention_inputs(teacher, *_inputs(data))]
    above = torch.stack([analysis.weight_bands(each)[0] for each in maps])
    assert above.numel() == 2 * 4 * 2  # layers, clips, heads
    figures = (first["above_mean"], first["above_mean_min"], first["above_mean_max"])
    assert figures == pytest.approx((above.mean().item(), above.min().item(), above.max().item()), abs=1e-3)


def _inputs(data):
    return data.x, data.time, data.labels


# --- features --------------------------------------------------------------------------------------------------------


def test_features_in_use_are_all_of_a_flat_token_and_one_of_a_sharp_one():
    tokens = torch.zeros(1, 2, 6, 4)
    tokens[:, 1, :, 0] = 1.0  # the second head's features become one at a high temperature
    found = flatness.quantities(tokens, tokens, torch.ones(1, 2, 6, 8), temperature=100.0)["features_in_use"]
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / 4]]))


def test_linear_branch_is_the_average_of_flat_features_and_far_from_it_with_sharp_ones():
    torch.manual_seed(0)
    value = torch.randn(1, 1, 4, 8)
    flat = flatness.quantities(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), value, temperature=4.0)
    assert flat["from_average"].item() == pytest.approx(0, abs=1e-6)
    # One feature for each key: linear attention returns the value of the key that the query asks for.
    sharp = flatness.quantities(torch.eye(4)[None, None], torch.eye(4)[None, None], value, temperature=50.0)
    expected = (value - value.mean(dim=-2, keepdim=True)).norm() / value.norm()
    assert sharp["from_average"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_are_measured_over_all_layers_heads_and_times(context):
    cases = flatness.EXPERIMENT.cases(QUICK)
    assert cases == ["temperature 1", "temperature 4", "temperature 16"]
    found = [flatness.EXPERIMENT.measure(case, 0, QUICK, context) for case in cases]
    used = [each["features_in_use"] for each in found]
    assert used == sorted(used, reverse=True) and used[0] > used[1]
    assert found[0]["from_average_min"] < found[0]["from_average"] < found[0]["from_average_max"]
    assert found[0] != flatness.EXPERIMENT.measure(cases[0], 1, QUICK, context)
    teacher = find_teacher(QUICK, context)
    data = attention_maps.noisy_clips(teacher, 0, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.1, 0.3, 0.5]))
    layers = evaluate.attention_inputs(teacher, *_inputs(data))
    alone = torch.stack([flatness.quantities(*layer, temperature=4.0)["from_average"] for layer in layers])
    assert alone.numel() == 2 * 8 * 2  # layers, clips, heads
    figures = [found[1][f"from_average{bound}"] for bound in ("", "_min", "_max")]
    assert figures == pytest.approx([alone.mean().item(), alone.min().item(), alone.max().item()], rel=1e-4)


# --- choice ----------------------------------------------------------------------------------------------------------


CONFIG = ModelConfig(critical_ratio=0.3, negligible_ratio=0.2, block=8)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 96, 8)
    return query, key, value, sla_ref.classify_blocks(query, key, 0.3, 0.2, block_q=8, block_k=8)


def test_all_choices_hand_out_the_same_classes_and_the_oracle_keeps_the_most(attention):
    query, key, _, block_map = attention
    weights = analysis.attention_weights(query, key)
    mass = analysis.block_mass(weights, 8, 8)
    labels = {name: choose(query, key, block_map) for name, choose in block_choice.choices(0).items()}
    assert torch.equal(labels["pooled"], block_map.labels)
    assert torch.equal(labels["oracle"], analysis.oracle_labels(mass, block_map.labels))
    for of_choice in labels.values():
        assert of_choice.dtype == torch.int8
        assert torch.equal(of_choice.sort(dim=-1).values, block_map.labels.sort(dim=-1).values)
    kept = {name: analysis.class_mass(mass, of_choice)[1].mean() for name, of_choice in labels.items()}
    assert kept["oracle"] > kept["pooled"] > kept["random"]
    assert torch.equal(block_choice.choices(0)["random"](query, key, block_map), labels["random"])
    assert not torch.equal(block_choice.choices(1)["random"](query, key, block_map), labels["random"])


def test_figures_of_maps_are_those_of_the_dense_definition(attention):
    query, key, value, block_map = attention
    figures = block_choice.map_quantities(query, key, value, CONFIG, block_choice.choices(0))
    weights = analysis.attention_weights(query, key)
    for name, choose in block_choice.choices(0).items():
        labels = choose(query, key, block_map)
        kept = replace(block_map, labels=labels).to_dense() == 1
        torch.testing.assert_close(figures[f"sparse_error_{name}"], analysis.error_of_keeping(kept, weights, value))
        torch.testing.assert_close(figures[f"critical_mass_{name}"], weights.where(kept, 0.0).sum((-2, -1)) / 96)
        total = sum(figures[f"{of_class}_mass_{name}"] for of_class in analysis.CLASS_NAMES.values())
        torch.testing.assert_close(total, torch.ones(2, 3))
    assert "recall_oracle" not in figures
    assert figures["recall_pooled"].mean() > figures["recall_random"].mean()
    # A random choice finds as many of the critical blocks as there are among all blocks, 3 of 12.
    repeated = [
        block_choice.map_quantities(query, key, value, CONFIG, block_choice.choices(seed)) for seed in range(20)
    ]
    found = torch.stack([each["recall_random"] for each in repeated]).mean().item()
    assert found == pytest.approx(3 / 12, abs=0.03)


def test_pooled_choice_is_sla_itself_and_other_choices_reach_the_output(context, attention):
    query, key, value, _ = attention
    sla = sla_ref.SparseLinearAttention(8, 0.3, 0.2, block_q=8, block_k=8)
    torch.nn.init.normal_(sla.proj_l.weight)
    outputs = {
        name: block_choice.Choosing(sla, choose)(query, key, value) for name, choose in block_choice.choices(0).items()
    }
    assert torch.equal(outputs["pooled"], sla(query, key, value))
    assert not torch.allclose(outputs["oracle"], outputs["pooled"])

    teacher = find_teacher(QUICK, context)
    swapped = with_attention(teacher, "sla", critical_ratio=0.2, block=4)
    data = attention_maps.noisy_clips(teacher, 0, torch.tensor([0.1, 0.5]))
    chosen = {name: block_choice.with_choice(swapped, choose) for name, choose in block_choice.choices(0).items()}
    predictions = {name: evaluate.predict(model, data) for name, model in chosen.items()}
    assert torch.equal(predictions["pooled"], evaluate.predict(swapped, data))
    assert not torch.allclose(predictions["oracle"], predictions["pooled"])
    assert isinstance(swapped.blocks[0].attention.core, sla_ref.SparseLinearAttention)  # a copy was changed


def test_with_all_blocks_critical_every_choice_is_full_attention(attention):
    query, key, value, _ = attention
    sla = sla_ref.SparseLinearAttention(8, 1.0, 0.0, block_q=8, block_k=8)
    for choose in block_choice.choices(0).values():
        output = block_choice.Choosing(sla, choose)(query, key, value)
        torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value))


def test_cases_leave_out_ratios_below_one_block():
    assert block_choice.EXPERIMENT.cases(QUICK) == ["blocks of 4, 10 %", "blocks of 4, 20 %", "blocks of 8, 20 %"]
    n1024 = block_choice.EXPERIMENT.cases(SETTINGS["n1024"])
    assert n1024[:5] == [*(f"blocks of 16, {ratio} %" for ratio in (2.5, 5, 10, 20)), "blocks of 32, 5 %"]
    assert "blocks of 64, 5 %" not in n1024 and n1024[-1] == block_choice.STUDENT_CASE
    n4096 = block_choice.EXPERIMENT.cases(SETTINGS["n4096"])
    assert len(n4096) == 12 and block_choice.STUDENT_CASE not in n4096
    assert block_choice.arms(SETTINGS["n4096"])["blocks of 64, 2.5 %"] == (64, 0.025)


def test_choice_measures_repeatably_and_its_losses_are_those_of_the_models(context):
    first = block_choice.EXPERIMENT.measure("blocks of 4, 20 %", 0, QUICK, context)
    assert first == block_choice.EXPERIMENT.measure("blocks of 4, 20 %", 0, QUICK, context)
    assert first != block_choice.EXPERIMENT.measure("blocks of 4, 20 %", 1, QUICK, context)
    assert first["critical_share"] == 3 / 16
    assert first["critical_mass_oracle"] > first["critical_mass_pooled"] > first["critical_mass_random"]
    teacher = find_teacher(QUICK, context)
    data = attention_maps.noisy_clips(teacher, 0, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.1, 0.3, 0.5]))
    assert first["held_out_loss_teacher"] == evaluate.held_out_loss(evaluate.predict(teacher, data), data)
    swapped = with_attention(teacher, "sla", critical_ratio=0.2, negligible_ratio=0.1, block=4)
    assert first["held_out_loss_pooled"] == evaluate.held_out_loss(evaluate.predict(swapped, data), data)


def test_the_student_case_is_of_the_shipped_student(context):
    setting = replace(SETTINGS["n1024"], clips=2)
    values = block_choice.EXPERIMENT.measure(block_choice.STUDENT_CASE, 0, setting, context)
    student, _ = load_weights(STUDENT)
    data = attention_maps.noisy_clips(student, 0, torch.tensor([0.1, 0.3]))
    assert values["held_out_loss_pooled"] == evaluate.held_out_loss(evaluate.predict(student, data), data)
    assert values["critical_share"] == 3 / 64
    assert values["held_out_loss_pooled"] < values["held_out_loss_random"]
