"""Pooling, classification, and the index lists of a BlockMap."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sla_ref
from sla_ref import reference
from sla_ref.block_map import class_sizes, pool_blocks

sizes = st.integers(1, 70)
blocks = st.sampled_from([1, 4, 7, 16, 64])
ratios = st.floats(0, 1)


def tokens(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 2, length, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60)
@given(nq=sizes, nk=sizes, block_q=blocks, block_k=blocks, critical=ratios.filter(bool), negligible=ratios)
def test_classes_are_those_of_the_specification(nq, nk, block_q, block_k, critical, negligible):
    query, key = tokens(nq), tokens(nk, 1)
    block_map = sla_ref.classify_blocks(query, key, critical, negligible, block_q=block_q, block_k=block_k)
    assert torch.equal(block_map.labels, reference.classify(query, key, critical, negligible, block_q, block_k))
    num_blocks = math.ceil(nk / block_k)
    num_critical = max(1, int(critical * num_blocks))
    num_negligible = min(int(negligible * num_blocks), num_blocks - num_critical)
    assert ((block_map.labels == 1).sum(-1) == num_critical).all()
    assert ((block_map.labels == -1).sum(-1) == num_negligible).all()
    assert class_sizes(critical, negligible, num_blocks) == (num_critical, num_negligible)
    assert block_map.max_critical == num_critical
    assert block_map.sparsity == pytest.approx(1 - num_critical / num_blocks)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 1), *((dtype, 10.0**n) for dtype in (torch.bfloat16, torch.float32) for n in (-24, 0, 20))],
    ids=str,
)
def test_near_ties_and_extreme_sizes_rank_as_in_the_specification(dtype, size):
    """Rounded to a few digits, many scores are equal or differ where float32 no longer tells them apart."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        length, block = (int(torch.randint(1, 90, (), generator=generator)) for _ in range(2))
        query, key = (
            ((torch.randn(1, 2, length, 4, generator=generator, dtype=torch.float64) * 4).round() / 3 * size).to(dtype)
            for _ in range(2)
        )
        block_map = sla_ref.classify_blocks(query, key, 0.3, 0.3, block_q=block, block_k=max(1, block // 4))
        assert torch.equal(block_map.labels, reference.classify(query, key, 0.3, 0.3, block, max(1, block // 4)))
        scores = sla_ref.block_scores(query, key, block_q=block, block_k=max(1, block // 4))
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., : block_map.num_critical]
        assert (block_map.labels.gather(-1, best) == 1).all(), "scores rank as the classes do"


def test_the_defaults_are_those_of_the_paper():
    """5 % critical, 10 % negligible, blocks of 64 by 64."""
    block_map = sla_ref.classify_blocks(tokens(1300), tokens(2550))
    assert block_map.labels.shape == (2, 2, 21, 40)
    assert [(block_map.labels == label).sum(-1).unique().tolist() for label in (1, 0, -1)] == [[2], [34], [4]]


def test_whether_any_block_is_marginal():
    """Without one, backends leave out the linear branch."""
    for critical, negligible, expected in ((0.5, 0.5, False), (0.5, 0.25, True), (0.75, 0.5, False), (1.0, 0.0, False)):
        block_map = sla_ref.classify_blocks(tokens(16), tokens(16), critical, negligible, block_q=4, block_k=4)
        assert block_map.has_marginal is expected
        assert sla_ref.BlockMap(block_map.labels, 4, 4, 16, 16).has_marginal is expected


@pytest.mark.parametrize(
    ("query", "key", "options", "error", "message"),
    [
        ([1.0], tokens(8), {}, TypeError, "query must be a torch.Tensor, got list"),
        (tokens(8), [1.0], {}, TypeError, "key must be a torch.Tensor, got list"),
        (tokens(8), tokens(8)[0], {}, ValueError, r"key must have shape \(batch, heads, tokens, head_dim\)"),
        (tokens(8), tokens(8).float(), {}, TypeError, "key must have query's dtype torch.float64, got torch.float32"),
        (tokens(8), tokens(8)[..., :1], {}, ValueError, "key must have query's head_dim 4, got 1"),
        (tokens(8), tokens(8), {"block_q": 0}, ValueError, "block_q must be an int >= 1, got 0"),
        (tokens(8), tokens(8), {"block_q": "8"}, TypeError, "block_q must be an int >= 1, got '8' of type str"),
        (tokens(8), tokens(8), {"block_k": "8"}, TypeError, "block_k must be an int >= 1, got '8' of type str"),
        (tokens(8), tokens(8), {"block_k": 0}, ValueError, "block_k must be an int >= 1, got 0"),
    ],
)
@pytest.mark.parametrize("function", [sla_ref.block_scores, sla_ref.classify_blocks])
def test_bad_tokens(function, query, key, options, error, message):
    with pytest.raises(error, match=message):
        function(query, key, **options)


@pytest.mark.parametrize("bad", [{"critical_ratio": 0.0}, {"negligible_ratio": 1.5}], ids=str)
def test_bad_ratios(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        sla_ref.classify_blocks(tokens(8), tokens(8), **bad)


def test_ratio_is_truncated_as_float_arithmetic_gives_it():
    query = key = tokens(100)
    block_map = sla_ref.classify_blocks(query, key, 0.29, 0.0, block_q=1, block_k=1)
    assert block_map.max_critical == 28  # 0.29 * 100 is 28.999...


@settings(max_examples=60)
@given(data=st.data(), tq=st.integers(1, 6), tk=st.integers(1, 6))
def test_index_lists_hold_the_critical_pairs(data, tq, tk):
    values = data.draw(st.lists(st.sampled_from([1, 0, -1]), min_size=tq * tk, max_size=tq * tk))
    labels = torch.tensor(values, dtype=torch.int8).view(1, 1, tq, tk)
    block_map = sla_ref.BlockMap(labels, 4, 4, 4 * tq, 4 * tk - 1)
    pairs = {(i, j) for i in range(tq) for j in range(tk) if labels[0, 0, i, j] == 1}

    by_query = [block_map.kv_indices[0, 0, i, : block_map.kv_num_blocks[0, 0, i]].tolist() for i in range(tq)]
    assert {(i, j) for i, row in enumerate(by_query) for j in row} == pairs
    assert all(row == sorted(set(row)) for row in by_query)
    assert not any(block_map.kv_indices[0, 0, i, len(row) :].any() for i, row in enumerate(by_query)), "filled up"

    offsets = block_map.q_offsets[0, 0].tolist()
    by_key = [block_map.q_indices[0, 0, offsets[j] : offsets[j + 1]].tolist() for j in range(tk)]
    assert {(i, j) for j, column in enumerate(by_key) for i in column} == pairs
    assert all(column == sorted(set(column)) for column in by_key)
    assert offsets[0] == 0
    assert offsets[-1] == len(pairs)

    assert block_map.sparsity == pytest.approx(1 - len(pairs) / (tq * tk))
    for lists in (block_map.kv_num_blocks, block_map.kv_indices, block_map.q_offsets, block_map.q_indices):
        assert lists.dtype == torch.int32
        assert lists.is_contiguous()


def test_pooling_averages_real_tokens_only():
    x = tokens(10)
    pooled = pool_blocks(x, 4)
    expected = torch.stack([x[:, :, :4].mean(2), x[:, :, 4:8].mean(2), x[:, :, 8:].mean(2)], 2)
    torch.testing.assert_close(pooled, expected)
    assert pool_blocks(x.half(), 4).dtype == torch.float64


def test_of_equal_scores_the_earlier_block_ranks_higher():
    """In long rows too, where torch's plain sort keeps no order among equals."""
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 0.0]).repeat(50).view(1, 1, 100, 1)
    labels = [1] * 30 + [0] * 20 + [0] * 40 + [-1] * 10  # by rank: the even blocks are ahead of the odd ones
    expected = torch.tensor(labels, dtype=torch.int8).view(2, 50).mT.flatten().expand(1, 1, 2, 100)
    assert torch.equal(sla_ref.classify_blocks(query, key, 0.3, 0.1, block_q=1, block_k=1).labels, expected)
    assert torch.equal(reference.classify(query, key, 0.3, 0.1, 1, 1), expected)


def test_scores_are_not_squashed_by_a_softmax():
    """Scores whose softmax underflows to equal zeros must keep their order."""
    query, key = torch.full((1, 1, 1, 1), 1000.0), torch.tensor([0.0, 9, 1, 2]).view(1, 1, 4, 1)
    scores = sla_ref.block_scores(query, key, block_q=1, block_k=1)
    assert scores.softmax(-1).flatten().tolist() == [0, 1, 0, 0]
    assert sla_ref.classify_blocks(query, key, 0.5, 0.5, block_q=1, block_k=1).labels.flatten().tolist() == [
        -1,
        1,
        -1,
        1,
    ]


def test_scores_ignore_autocast_and_gradients():
    query, key = (tokens(64, seed, dtype=torch.float32).requires_grad_() for seed in range(2))
    plain = sla_ref.block_scores(query, key, block_q=8, block_k=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sla_ref.block_scores(query, key, block_q=8, block_k=8), plain)
    assert plain.dtype == torch.float64
    assert not plain.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_still_classify(bad: float):
    query, key = tokens(32), tokens(32, 1)
    key[0, 0, 5] = bad
    labels = sla_ref.classify_blocks(query, key, 0.3, 0.3, block_q=8, block_k=8).labels
    assert ((labels == 1).sum(-1) == 1).all()
    assert ((labels == -1).sum(-1) == 1).all()


def test_to_dense_and_to_flex_say_the_same():
    query, key = tokens(300), tokens(200, 1)
    block_map = sla_ref.classify_blocks(query, key, 0.4, 0.3, block_q=128, block_k=64)
    dense = block_map.to_dense()
    assert dense.shape == (2, 2, 300, 200)
    assert dense[1, 0, 299, 199] == block_map.labels[1, 0, 2, 3]

    flex = block_map.to_flex()
    assert flex.seq_lengths == (300, 200)
    rows, columns = torch.arange(300)[:, None], torch.arange(200)[None]
    for b in range(2):
        for h in range(2):
            assert torch.equal(flex.mask_mod(b, h, rows, columns), dense[b, h] == 1)
    assert torch.equal(flex.to_dense(), (block_map.labels == 1).to(flex.to_dense().dtype))


def test_a_map_cannot_be_changed():
    block_map = sla_ref.classify_blocks(tokens(16), tokens(16), block_q=8, block_k=8)
    with pytest.raises(AttributeError):
        block_map.block_q = 4


def hand_made(**arguments) -> sla_ref.BlockMap:
    """Rows with 2, 0 and 1 critical blocks."""
    labels = torch.tensor([[1, 1, 0], [0, -1, 0], [-1, -1, 1]], dtype=torch.int8)[None, None]
    return sla_ref.BlockMap(
        **{"labels": labels, "block_q": 4, "block_k": 4} | arguments, query_length=12, key_length=11
    )


USES = {
    "kv_num_blocks": lambda m: m.kv_num_blocks,
    "kv_indices": lambda m: m.kv_indices,
    "q_offsets": lambda m: m.q_offsets,
    "q_indices": lambda m: m.q_indices,
    "sparsity": lambda m: m.sparsity,
    "to_dense": lambda m: m.to_dense(),
    "to_flex": lambda m: m.to_flex(),
    "to": lambda m: m.to("cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "operator": lambda m: sla_ref.sparse_linear_attention(*[torch.ones(1, 1, n, 4) for n in (12, 11, 11)], block_map=m),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("inference", [False, True], ids=["", "made in inference mode"])
def test_labels_edited_in_place_are_noticed(use, inference):
    """Lists that were read before would be stale, and C too small for the new rows."""
    with torch.inference_mode(inference):
        block_map = hand_made()
    USES[use](block_map)
    block_map.labels[0, 0, 1] = 1
    with pytest.raises(ValueError, match="labels must not be changed in place"):
        USES[use](block_map)


def test_replace_checks_and_counts_again():
    block_map = hand_made()
    changed = dataclasses.replace(block_map, labels=torch.ones_like(block_map.labels))
    assert (changed.max_critical, changed.is_uniform, changed.sparsity) == (3, True, 0)
    assert changed.kv_num_blocks.flatten().tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="labels must hold only 1, 0 and -1"):
        dataclasses.replace(block_map, labels=block_map.labels + 4)
    classified = sla_ref.classify_blocks(tokens(12), tokens(11), 0.4, block_q=4, block_k=4)
    with pytest.raises(ValueError, match="got 1 for rows with 3 to 3"):
        dataclasses.replace(classified, labels=torch.ones_like(classified.labels))


def test_the_number_of_critical_blocks():
    """It is counted when a map is made by hand; a given number is checked."""
    assert (hand_made().num_critical, hand_made().max_critical, hand_made().is_uniform) == (None, 2, False)
    same = hand_made(labels=torch.ones(1, 1, 3, 3, dtype=torch.int8), num_critical=3)
    assert (same.num_critical, same.max_critical, same.is_uniform) == (3, 3, True)
    none = hand_made(labels=torch.zeros(1, 1, 3, 3, dtype=torch.int8), num_critical=0)
    assert (none.max_critical, none.is_uniform) == (1, False), "C is at least 1"


def test_a_map_whose_labels_cannot_be_read():
    """As under torch.compile: all blocks of a row may be critical, and any may be marginal."""
    labels = torch.ones(1, 1, 3, 3, dtype=torch.int8, device="meta")
    counted, given = hand_made(labels=labels), hand_made(labels=labels, num_critical=2)
    assert (counted.max_critical, counted.is_uniform, counted.has_marginal) == (3, False, True)
    assert (given.max_critical, given.is_uniform, given.has_marginal) == (2, True, True)
    one = sla_ref.BlockMap(labels[..., :1], 4, 4, query_length=12, key_length=4)
    assert (one.max_critical, one.is_uniform) == (1, False), "it need not be critical"


def test_nothing_is_read_after_a_map_is_made(monkeypatch):
    """Each read of a tensor's value waits for the device, and cannot be captured in a CUDA graph."""
    maps = hand_made(), sla_ref.classify_blocks(tokens(12)[:1, :1], tokens(11)[:1, :1], 0.4, block_q=4, block_k=4)
    inputs = [torch.randn(1, 1, n, 4, requires_grad=True) for n in (12, 11, 11)]

    def read(*args):
        raise AssertionError("a value was read")

    for method in ("__int__", "__float__", "__index__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, read)
    for block_map in maps:
        out = sla_ref.sparse_linear_attention(*inputs, block_map=block_map)
        torch.autograd.grad(out.sparse.sum() + out.linear.sum() + out.lse.clamp(min=0).sum(), inputs)


@pytest.mark.parametrize(
    "copied",
    [
        lambda m: m.to("cpu"),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.utils._pytree.tree_map(torch.clone, m),
    ],
    ids=["to", "deepcopy", "pickle", "pytree"],
)
def test_copies_of_a_map(copied):
    """Copies work, even if the labels were edited before: a copied tensor starts with an edit count of 0."""
    labels = hand_made().labels.neg_().neg_()
    for block_map in (hand_made(labels=labels), sla_ref.classify_blocks(tokens(12), tokens(11), block_q=4, block_k=4)):
        other = copied(block_map)
        for field in dataclasses.fields(sla_ref.BlockMap):
            if field.name not in ("labels", "_version"):
                assert getattr(other, field.name) == getattr(block_map, field.name)
        assert torch.equal(other.labels, block_map.labels)
        assert torch.equal(other.q_indices, block_map.q_indices)


def test_a_printed_map_shows_what_it_was_made_of():
    fields = re.findall(r"(\w+)=", repr(hand_made()))
    assert fields[-6:] == ["block_q", "block_k", "query_length", "key_length", "num_critical", "max_critical"]
    assert "has_marginal" not in fields and "labels" in fields


def test_a_map_is_a_node_of_a_tree():
    """As torch.export needs it: with the path of its labels, and with what it serialises."""
    pytree, tree = torch.utils._pytree, {"a map": hand_made()}
    (path, _), *others = pytree.tree_flatten_with_path(tree)[0]
    assert pytree.keystr(path) == "['a map'].labels" and not others
    same = pytree.tree_map_with_path(lambda path, labels: labels, tree)["a map"]
    assert (repr(same), same.is_uniform, same.has_marginal) == (repr(tree["a map"]), False, True)
    spec = pytree.tree_flatten(tree)[1]
    assert pytree.treespec_loads(text := pytree.treespec_dumps(spec)) == spec and '"sla_ref.BlockMap"' in text


def test_a_map_moves_to_another_device():
    moved = hand_made().to("meta")
    assert moved.labels.device.type == "meta" and moved.max_critical == 2
    assert moved.kv_indices.shape == (1, 1, 3, 2)


LABELS = torch.zeros(1, 1, 2, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LABELS.float(), 4, 4, 8, 12), TypeError, "labels must be an int8 tensor, got torch.float32"),
        (([0], 4, 4, 8, 12), TypeError, "labels must be an int8 tensor, got list"),
        ((LABELS[0], 4, 4, 8, 12), ValueError, r"labels must have shape \(batch, heads, 2, 3\)"),
        ((LABELS, 4, 4, 8, 13), ValueError, r"labels must have shape \(batch, heads, 2, 4\).*got \(1, 1, 2, 3\)"),
        ((LABELS, 0, 4, 8, 12), ValueError, "block_q must be an int >= 1, got 0"),
        ((LABELS, 4, 4.0, 8, 12), TypeError, "block_k must be an int >= 1, got 4.0"),
        ((LABELS, 4, 4, 0, 12), ValueError, "query_length must be an int >= 1, got 0"),
        ((LABELS.to_sparse(), 4, 4, 8, 12), TypeError, "labels must be a dense tensor .*, got layout torch.sparse_coo"),
        ((LABELS[:0], 4, 4, 8, 12), ValueError, r"labels must have no empty dimension, got shape \(0, 1, 2, 3\)"),
        ((LABELS, 4, 4, 8, 12, 1), ValueError, "num_critical must be the number .* got 1 for rows with 0 to 0"),
        ((LABELS, 4, 4, 8, 12, 4), ValueError, "num_critical must be between 0 and the 3 key blocks, got 4"),
        ((LABELS, 4, 4, 8, 12, 0.0), TypeError, "num_critical must be an int or None, got 0.0 of type float"),
        ((LABELS + 2, 4, 4, 8, 12), ValueError, "labels must hold only 1, 0 and -1, got values from 2 to 2"),
        ((LABELS - 2, 4, 4, 8, 12), ValueError, "labels must hold only 1, 0 and -1, got values from -2 to -2"),
    ],
)
def test_bad_maps(arguments, error, message):
    with pytest.raises(error, match=message):
        sla_ref.BlockMap(*arguments)
