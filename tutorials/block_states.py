"""Four ways to add up block states: H_i, the sum of h_j over the marginal key blocks j of query block i. [Alg. 1 L13]

Each function takes the same two matrices and returns the same sums:

    member  (Tq, Tk) bool: whether key block j is marginal for query block i
    states  (Tk, M) float: the states h_j, flattened to rows of numbers (M = D * D)
    -> (Tq, M) in the dtype of states, and the number of row additions that this took

An addition is that of one row to another, M numbers at a time; a row that is added to zeros counts. The first three are
the paper's (appendix), the last is what the backends do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lookup_table(member: Tensor, states: Tensor) -> tuple[Tensor, int]:
    """List the marginal blocks of each row once, then add up what the list names. Good where few are marginal."""
    positions = member.nonzero()[:, 1]  # row after row
    counts = member.sum(dim=1)
    starts = counts.cumsum(0) - counts
    return F.embedding_bag(positions, states, starts, mode="sum"), len(positions)


def pre_aggregate(member: Tensor, states: Tensor) -> tuple[Tensor, int]:
    """Add up all states once, then subtract from the total what does not belong. Good where most are marginal."""
    total = states.sum(dim=0)
    others, subtractions = lookup_table(~member, states)
    return total - others, len(states) + subtractions


def four_russians(member: Tensor, states: Tensor, group: int) -> tuple[Tensor, int]:
    """Take `group` states together, make all their 2^group subset sums, then look one up per group and row.

    The bits of `member` in a group are the number of the subset. Good where about half are marginal.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    (rows, blocks), width = member.shape, states.shape[1]
    groups = -(-blocks // group)
    missing = groups * group - blocks  # the last group is filled up with states that no row has
    bits = F.pad(member, (0, missing)).view(rows, groups, group)
    grouped = F.pad(states, (0, 0, 0, missing)).view(groups, group, width)

    sums = states.new_zeros(groups, 2**group, width)
    for bit in range(
        group
    ):  # each state doubles the table: every subset without it, and every one with it
        torch.add(sums[:, : 2**bit], grouped[:, bit, None], out=sums[:, 2**bit : 2 ** (bit + 1)])
    table_additions = groups * (2**group - 1)

    subset = (bits * 2 ** torch.arange(group)).sum(dim=2)  # (rows, groups), 0 to 2^group - 1
    places = subset + 2**group * torch.arange(groups)
    return F.embedding_bag(places, sums.flatten(0, 1), mode="sum"), table_additions + rows * groups


def matrix_product(member: Tensor, states: Tensor) -> tuple[Tensor, int]:
    """One product of a 0/1 matrix with the states: it multiplies by every 0, on the fastest unit there is."""
    return member.to(states.dtype) @ states, member.numel()
