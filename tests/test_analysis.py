"""What analysis.py measures, against maps whose answers are known by hand."""

import pytest
import torch

from sla_ref import analysis


def test_attention_weights_are_what_sdpa_multiplies_the_values_with():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 8, dtype=torch.float64)
    weights = analysis.attention_weights(query, key)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(weights @ value, expected)
    assert analysis.attention_weights(query.half(), key.half()).dtype == torch.float32


def test_weight_bands_count_strictly_above_the_mean_and_below_a_hundredth_of_it():
    # Of four weights with mean 1/4: one above, one equal to the mean, one between, one below 1/400.
    weights = torch.tensor([[0.65, 0.25, 0.099, 0.001]])
    above, below = analysis.weight_bands(weights)
    assert above.item() == 0.25
    assert below.item() == 0.25


def test_split_top_takes_the_largest_weights_of_the_whole_map_and_adds_up():
    torch.manual_seed(0)
    weights = torch.rand(3, 10, 10)
    top, rest = analysis.split_top(weights, 0.08)
    assert torch.equal(top + rest, weights)
    assert ((top > 0).sum(dim=(-2, -1)) == 8).all()
    assert (top.where(top > 0, 2.0).amin(dim=(-2, -1)) >= rest.amax(dim=(-2, -1))).all()
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, got 1\.5"):
        analysis.split_top(weights, 1.5)


def test_stable_rank_against_its_definition_and_its_limits():
    torch.manual_seed(0)
    matrix = torch.randn(2, 12, 9, dtype=torch.float64)
    frobenius = matrix.square().sum(dim=(-2, -1))
    spectral = torch.linalg.eigvalsh(matrix.mT @ matrix)[..., -1]
    torch.testing.assert_close(analysis.stable_rank(matrix), frobenius / spectral)
    assert analysis.stable_rank(3 * torch.eye(7)).item() == pytest.approx(7)
    assert analysis.stable_rank(torch.ones(5, 6)).item() == pytest.approx(1)
    assert analysis.stable_rank(torch.zeros(4, 4)).item() == 0


def test_flops_are_the_critical_share_of_full_attention_plus_linear_attention():
    full = analysis.attention_flops(1024, 1024, 64)
    linear = analysis.attention_flops(1024, 1024, 64, critical_share=0, linear=True)
    both = analysis.attention_flops(1024, 1024, 64, critical_share=0.05, linear=True)
    assert full == 2 * (1024 * 1024 * 64) * 2
    assert linear == 2 * (1024 * 64 * 64) * 2
    assert both == pytest.approx(0.05 * full + linear)
    with pytest.raises(ValueError, match="critical_share must be between 0 and 1, got -1"):
        analysis.attention_flops(8, 8, 8, critical_share=-1)


def test_the_three_classes_have_a_name_and_a_colour_each():
    assert set(analysis.CLASS_NAMES) == set(analysis.CLASS_COLOURS) == {1, 0, -1}
    assert len(set(analysis.CLASS_COLOURS.values())) == 3
