"""What analysis.py measures, against maps whose answers are known by hand."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sla_ref import analysis, backends, classify_blocks, sparse_linear_attention, testing
from sla_ref.lab.arms import LinearOnly


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
    with pytest.raises(ValueError, match=r"share must be a number with 0 <= share <= 1, got 1\.5"):
        analysis.split_top(weights, 1.5)


def test_stable_rank_against_its_definition_and_its_limits():
    torch.manual_seed(0)
    matrix = torch.randn(2, 12, 9, dtype=torch.float64)
    frobenius = matrix.square().sum(dim=(-2, -1))
    spectral = torch.linalg.eigvalsh(matrix.mT @ matrix)[..., -1]
    torch.testing.assert_close(analysis.stable_rank(matrix), frobenius / spectral)
    assert analysis.stable_rank(3 * torch.eye(7)).item() == pytest.approx(7, rel=1e-5)
    assert analysis.stable_rank(torch.ones(5, 6)).item() == pytest.approx(1, rel=1e-5)
    assert analysis.stable_rank(torch.zeros(4, 4)).item() == 0


@pytest.mark.parametrize("shape", [(2, 3, 40, 60), (60, 40), (12, 9), (1, 5)])
def test_stable_rank_by_iteration_is_the_exact_one(shape):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    for matrix in (noise, noise.softmax(dim=-1), (8 * noise).softmax(dim=-1)):
        exact, found = analysis.stable_rank(matrix), analysis.stable_rank(matrix, iterations=40)
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)
        assert (found > (1 - 1e-9) * exact).all()
        few = analysis.stable_rank(matrix, iterations=1)
        assert ((few - exact).abs() >= (found - exact).abs() - 1e-9).all()
    assert torch.equal(analysis.stable_rank(noise, 3), analysis.stable_rank(noise, 3))
    assert analysis.stable_rank(torch.zeros(4, 4), iterations=2).item() == 0
    with pytest.raises(ValueError, match="iterations must be an int >= 1, got 0"):
        analysis.stable_rank(noise, 0)


def test_error_of_keeping_normalises_each_row_anew():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    value = torch.tensor([[1.0], [2.0], [4.0]])  # output 2 and 3
    kept = torch.tensor([[True, True, False], [False, False, False]])  # output 4/3 and nothing
    assert analysis.error_of_keeping(kept, weights, value).item() == pytest.approx((2 / 3 + 3) / 5)
    assert analysis.error_of_keeping(torch.ones_like(kept), weights, value).item() == pytest.approx(0, abs=1e-6)


def test_error_of_keeping_the_critical_blocks_is_that_of_the_sparse_branch():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64)
    block_map = classify_blocks(query, key, 0.3, 0.2, block_q=8, block_k=8)
    weights = analysis.attention_weights(query, key)
    sparse = sparse_linear_attention(query, key, value, block_map=block_map).sparse
    error = analysis.error_of_keeping(block_map.to_dense() == 1, weights, value)
    torch.testing.assert_close(error, analysis.relative_l1(sparse, weights @ value))


def test_relative_l1_is_the_error_beside_the_exact_sum():
    exact = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    approximation = exact + torch.tensor([[[0.5, 0.0], [0.0, -0.5]], [[0.0, 0.0], [0.0, 1.0]]])
    assert analysis.relative_l1(approximation, exact).tolist() == [0.25, 0.25]
    assert analysis.relative_l1(exact, exact).tolist() == [0, 0]


def test_block_mass_is_summed_over_keys_and_averaged_over_queries_also_in_the_partial_block():
    weights = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    expected = torch.tensor([[0.55, 0.45], [0.0, 1.0]])  # two queries or keys in a block, then one
    torch.testing.assert_close(analysis.block_mass(weights, 2, 2), expected)
    maps = torch.rand(2, 3, 50, 41, dtype=torch.float64).softmax(dim=-1)
    mass = analysis.block_mass(maps, 16, 8)
    assert mass.shape == (2, 3, 4, 6)
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(2, 3, 4, dtype=torch.float64))


def test_oracle_hands_out_the_same_classes_by_mass():
    mass = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    labels = torch.tensor([[1, 0, 1, -1], [0, -1, -1, 1]], dtype=torch.int8)
    oracle = analysis.oracle_labels(mass, labels)
    assert oracle.tolist() == [[-1, 1, 0, 1], [1, 0, -1, -1]]
    assert analysis.critical_recall(labels, oracle).item() == 0
    assert analysis.critical_recall(oracle, oracle).item() == 1
    half = torch.tensor([[0, 1, 1, -1], [1, 0, -1, -1]], dtype=torch.int8)
    assert analysis.critical_recall(half, oracle).item() == pytest.approx(2 / 3)


def test_class_mass_adds_up_and_the_oracle_keeps_the_most():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 96, 16)
    mass = analysis.block_mass(analysis.attention_weights(query, key), 16, 8)
    labels = classify_blocks(query, key, 0.2, 0.3, block_q=16, block_k=8).labels
    pooled = analysis.class_mass(mass, labels)
    best = analysis.class_mass(mass, analysis.oracle_labels(mass, labels))
    torch.testing.assert_close(sum(pooled.values()), torch.ones(2, 3))
    assert (best[1] >= pooled[1]).all() and (best[-1] <= pooled[-1]).all()
    assert (best[1] > pooled[1]).any() and (best[-1] < pooled[-1]).any()
    by_hand = mass[0, 0].where(labels[0, 0] == -1, 0.0).sum() / 6
    torch.testing.assert_close(pooled[-1][0, 0], by_hand)


def test_flops_are_the_critical_share_of_full_attention_plus_linear_attention():
    full = analysis.attention_flops(1024, 1024, 64)
    linear = analysis.attention_flops(1024, 1024, 64, critical_share=0, linear=True)
    both = analysis.attention_flops(1024, 1024, 64, critical_share=0.05, linear=True)
    assert full == 2 * (1024 * 1024 * 64) * 2
    assert linear == 2 * (1024 * 64 * 64) * 2
    assert both == pytest.approx(0.05 * full + linear)
    with pytest.raises(ValueError, match="critical_share must be a number with 0 <= critical_share <= 1, got -1"):
        analysis.attention_flops(8, 8, 8, critical_share=-1)


def counted(function: Callable[..., object], *arguments: object) -> int:
    """The operations of all matrix products in a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("sizes", "critical_ratio", "negligible_ratio"),
    [
        ({"query_length": 256, "head_dim": 16, "block_q": 16, "block_k": 16}, 0.05, 0.1),
        ({"query_length": 256, "key_length": 320, "head_dim": 24, "block_q": 32, "block_k": 16}, 0.3, 0.0),
        ({"query_length": 64, "key_length": 192, "head_dim": 8, "block_q": 8, "block_k": 64}, 0.5, 1.0),
        ({"query_length": 128, "head_dim": 32, "block_q": 32, "block_k": 32}, 1.0, 0.0),
    ],
)
def test_flops_are_those_of_the_algorithm_as_torch_counts_them(sizes, critical_ratio, negligible_ratio):
    """Exactly, with the two things that the formula leaves out: the denominators, and the sums of the block states."""
    problem = testing.make_problem(heads=3, **sizes, critical_ratio=critical_ratio, negligible_ratio=negligible_ratio)
    of, head_dim = problem.inputs.block_map, sizes["head_dim"]
    query_length, key_length, query_blocks, key_blocks = of.query_length, of.key_length, *of.labels.shape[2:]
    share, lengths = of.max_critical / key_blocks, (query_length, key_length)
    of_a_head = analysis.attention_flops(*lengths, head_dim, critical_share=share, linear=of.has_marginal)
    if of.has_marginal:
        of_a_head += 2 * (query_length + key_length) * head_dim  # a column of ones next to V
        of_a_head += 2 * query_blocks * key_blocks * head_dim * (head_dim + 1)
    assert counted(backends.load("torch").forward, problem.inputs) == 3 * of_a_head


def test_flops_of_the_limits_are_those_of_plain_attention_as_torch_counts_them():
    query, key, value = torch.randn(3, 2, 3, 40, 8)
    full = counted(lambda: analysis.attention_weights(query, key) @ value)
    assert full == 6 * analysis.attention_flops(40, 40, 8)
    linear = counted(LinearOnly(), query, key, value)
    denominators = 6 * 2 * 40 * 8
    assert linear - denominators == 6 * analysis.attention_flops(40, 40, 8, critical_share=0.0, linear=True)


def test_the_three_classes_have_a_name_and_a_colour_each():
    assert set(analysis.CLASS_NAMES) == set(analysis.CLASS_COLOURS) == {1, 0, -1}
    assert len(set(analysis.CLASS_COLOURS.values())) == 3
