"""The four ways to add up block states: the same sums, and the additions they say."""

from functools import partial

import block_states as states
import pytest
import torch

WAYS = {
    "lookup_table": states.lookup_table,
    "pre_aggregate": states.pre_aggregate,
    "four_russians_1": partial(states.four_russians, group=1),
    "four_russians_5": partial(states.four_russians, group=5),
    "four_russians_8": partial(states.four_russians, group=8),
    "matrix_product": states.matrix_product,
}


def problem(share: float, rows: int = 12, blocks: int = 19, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    member = torch.rand(rows, blocks, generator=generator) < share
    return member, torch.randn(blocks, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_sums_are_those_of_a_plain_loop(way, share):
    member, rows = problem(share)
    if share == 0.5:
        member[3], member[4] = False, True  # rows without and with every block among the others
    expected = torch.zeros(12, 10, dtype=torch.float64)
    for i in range(12):
        for j in range(19):
            if member[i, j]:
                expected[i] += rows[j]
    sums, additions = WAYS[way](member, rows)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
    assert sums.dtype == torch.float64
    assert isinstance(additions, int)


def test_additions_are_counted():
    member, rows = problem(0.3)
    marginal = int(member.sum())
    counted = {name: way(member, rows)[1] for name, way in WAYS.items()}
    assert counted == {
        "lookup_table": marginal,
        "pre_aggregate": 19 + 12 * 19 - marginal,
        "four_russians_1": 19 * 1 + 12 * 19,
        "four_russians_5": 4 * 31 + 12 * 4,  # 19 blocks are four groups of five, the last with a state of zeros
        "four_russians_8": 3 * 255 + 12 * 3,
        "matrix_product": 12 * 19,
    }


def test_only_the_subtraction_leaves_something_where_nothing_belongs():
    member, rows = problem(0.0, blocks=500)
    left = {name: way(member, rows.float())[0].abs().max().item() for name, way in WAYS.items()}
    assert left.pop("pre_aggregate") > 0
    assert set(left.values()) == {0.0}


def test_a_group_of_none_is_named():
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        states.four_russians(*problem(0.5), group=0)
