"""Choices of blocks: what each makes critical, in which layer, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch

import sla_ref
from sla_ref import backends, reference_sla2, testing

BLOCKS = {"block_q": 16, "block_k": 16}
LENGTH = 90  # six blocks, the last of ten tokens


def tokens(length: int = LENGTH, head_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, length, head_dim), torch.randn(1, 2, length, head_dim)


def labels(router, query, key, critical_ratio=0.2, negligible_ratio=0.3, **blocks) -> torch.Tensor:
    return router(query, key, critical_ratio, negligible_ratio, **(blocks or BLOCKS)).labels


# --- scores ----------------------------------------------------------------------------------------------------------


def test_pooled_and_an_untrained_learned_router_are_slas_choice():
    query, key = tokens()
    expected = labels(sla_ref.classify_blocks, query, key)
    assert torch.equal(labels(sla_ref.Router(), query, key), expected)
    learned = sla_ref.Router(sla_ref.LearnedScores(16)).requires_grad_(False)
    assert torch.equal(learned.scores(query, key, **BLOCKS), sla_ref.block_scores(query, key, **BLOCKS))
    assert torch.equal(labels(learned, query, key), expected)
    learned.scores.proj_k.weight.neg_()
    assert torch.equal(labels(learned, query, key, 0.2, 0.0), labels(sla_ref.Router(), query, -key, 0.2, 0.0))


def test_learned_scores_are_the_equation():
    query, key = tokens()
    scores = sla_ref.LearnedScores(16)
    for parameter in scores.parameters():
        torch.nn.init.normal_(parameter)
    weights = (scores.proj_q.weight.double(), scores.proj_k.weight.double())
    expected = reference_sla2.router_scores(query.double(), key.double(), *weights, 16, 16)
    torch.testing.assert_close(scores(query, key, **BLOCKS), expected)
    scores.reset_parameters()
    assert torch.equal(scores.proj_q.weight, torch.eye(16))


def test_sub_block_scores_are_the_log_sum_exp_over_parts():
    query, key = tokens()
    found = sla_ref.sub_block_scores(query, key, **BLOCKS, parts_q=2, parts_k=4)
    for h, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        parts_q = query[0, h, 16 * i : 16 * (i + 1)].double().split(8)
        parts_k = key[0, h, 16 * j : 16 * (j + 1)].double().split(4)
        total = sum(math.exp((q.mean(0) @ k.mean(0)).item() / 4) for q in parts_q for k in parts_k)
        assert found[0, h, i, j].item() == pytest.approx(4 * math.log(total))
    torch.testing.assert_close(
        sla_ref.sub_block_scores(query, key, **BLOCKS, parts_q=1, parts_k=1),
        sla_ref.block_scores(query, key, **BLOCKS),
    )


def test_sub_block_scores_see_keys_that_the_mean_hides():
    """Four keys of block 1 match the queries, the rest of the block is their opposite."""
    query = torch.ones(1, 1, 64, 16)
    key = torch.zeros(1, 1, 64, 16)
    key[:, :, 16:32] = -4.0
    key[:, :, 16:20] = 4.0
    assert labels(sla_ref.Router(), query, key, 0.25, 0.0)[0, 0, 0].tolist() == [1, 0, 0, 0]
    assert labels(sla_ref.Router(sla_ref.sub_block_scores), query, key, 0.25, 0.0)[0, 0, 0].tolist() == [0, 1, 0, 0]


# --- how many --------------------------------------------------------------------------------------------------------


def test_top_p_by_hand():
    """One key per block; the shares of the two rows are 0.7, 0.2, 0.08, 0.02 and four times a quarter."""
    key = torch.eye(4)[None, None]
    query = torch.tensor([[0.7, 0.08, 0.2, 0.02], [0.25, 0.25, 0.25, 0.25]]).log()[None, None] * 2  # 1/sqrt(4) = 1/2

    def of(top_p, critical_ratio=0.01, negligible_ratio=0.0):
        router = sla_ref.Router(top_p=top_p)
        return labels(router, query, key, critical_ratio, negligible_ratio, block_q=1, block_k=1)[0, 0].tolist()

    assert of(0.5) == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert of(0.8) == [[1, 0, 1, 0], [1, 1, 1, 1]], "just enough blocks to reach the share"
    assert of(1.0) == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert of(0.01) == [[1, 0, 0, 0], [1, 0, 0, 0]], "the best block always"
    assert of(0.5, 0.5) == [[1, 0, 1, 0], [1, 1, 0, 0]], "united with the two best"
    assert of(0.8, 0.01, 0.5) == [[1, -1, 1, -1], [1, 1, 1, 1]], "critical before negligible"


# --- protected tokens ------------------------------------------------------------------------------------------------


def test_protected_tokens_by_hand():
    block_map = sla_ref.BlockMap(torch.full((1, 1, 3, 4), -1, dtype=torch.int8), 4, 2, 10, 7)
    found = sla_ref.protect(block_map, protected_keys=slice(3, 5)).labels[0, 0].tolist()
    assert found == [[-1, 1, 1, -1]] * 3
    tail = torch.zeros(10, dtype=torch.bool)
    tail[9] = True
    found = sla_ref.protect(block_map, protected_queries=tail, protected_keys=slice(-1, None)).labels[0, 0].tolist()
    assert found == [[-1, -1, -1, 1], [-1, -1, -1, 1], [1, 1, 1, 1]]
    assert (block_map.labels == -1).all()
    assert sla_ref.protect(block_map) is block_map


@pytest.mark.parametrize("scores", [sla_ref.block_scores, sla_ref.sub_block_scores])
def test_a_router_protects_in_addition_to_its_choice(scores):
    query, key = tokens()
    chosen = labels(sla_ref.Router(scores), query, key)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[20] = True
    found = labels(sla_ref.Router(scores, protected_queries=slice(80, None), protected_keys=mask), query, key)
    chosen[:, :, :, 1] = 1
    chosen[:, :, 5] = 1
    assert torch.equal(found, chosen)


@pytest.mark.parametrize(
    ("protected", "error", "message"),
    [
        (torch.ones(89, dtype=torch.bool), ValueError, "must have one boolean for each of 90 tokens, got 89"),
        (torch.ones(90, dtype=torch.bool), ValueError, "must leave a token out, got all 90: .*critical_ratio of 1"),
        (slice(None), ValueError, "must leave a token out, got all 90: .*critical_ratio of 1"),
        (torch.ones(90), TypeError, r"must be a boolean tensor, a slice or None, got torch.float32"),
        ([True] * 90, TypeError, "must be a boolean tensor, a slice or None, got list"),
        (torch.ones(1, 90, dtype=torch.bool), ValueError, r"must have shape \(tokens,\), got \(1, 90\)"),
    ],
)
@pytest.mark.parametrize("name", ["protected_queries", "protected_keys"])
def test_bad_protected_tokens(name, protected, error, message):
    query, key = tokens()
    with pytest.raises(error, match=f"{name} {message}"):
        sla_ref.protect(sla_ref.classify_blocks(query, key, **BLOCKS), **{name: protected})
    with pytest.raises(error, match=f"{name} {message}"):
        sla_ref.SparseLinearAttention(16, router=sla_ref.Router(**{name: protected}), **BLOCKS)(query, key, key)


# --- the order of tokens ---------------------------------------------------------------------------------------------


def test_cube_order_by_hand():
    assert sla_ref.cube_order(1, 2, 4, (1, 2, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert sla_ref.cube_order(2, 2, 2, (2, 1, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert sla_ref.cube_order(1, 2, 3, (1, 2, 2)).tolist() == [0, 1, 3, 4, 2, 5], "smaller at the edge"


def test_blocks_are_cubes_where_the_sides_divide_the_video():
    order = sla_ref.cube_order(4, 8, 8, (2, 4, 2))
    assert torch.equal(order.sort().values, torch.arange(256))
    position = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij"), -1)
    blocks = position.flatten(0, 2)[order].view(-1, 16, 3)
    assert (blocks.amax(1) - blocks.amin(1) == torch.tensor([1, 3, 1])).all()


def test_the_order_is_undone_around_a_layer():
    """Full attention does not ask for an order. SLA with its blocks does."""
    query, key = tokens(64)
    order = sla_ref.cube_order(4, 4, 4, (2, 2, 4))

    def both(layer):
        ordered = layer(query[:, :, order], key[:, :, order], key[:, :, order])[:, :, order.argsort()]
        return ordered, layer(query, key, key)

    full = sla_ref.SparseLinearAttention(16, 1.0, **BLOCKS)
    torch.testing.assert_close(*both(full))
    one, other = both(sla_ref.SparseLinearAttention(16, 0.25, **BLOCKS))
    assert (one - other).abs().max() > 0.1


# --- in the layers, on the backends ----------------------------------------------------------------------------------


def routers() -> dict[str, sla_ref.Router]:
    parts = partial(sla_ref.sub_block_scores, parts_k=2)
    return {
        "learned": sla_ref.Router(sla_ref.LearnedScores(16)).requires_grad_(False),
        "all the rest": sla_ref.Router(parts, top_p=0.4, protected_queries=slice(0, 3), protected_keys=slice(-3, None)),
    }


@pytest.mark.parametrize("name", routers())
def test_both_layers_take_a_router(name):
    router = routers()[name]
    query, key = tokens()
    block_map = router(query, key, 0.4, 0.0, **BLOCKS)
    for layer in (
        sla_ref.SparseLinearAttention(16, 0.4, 0.0, router=router, **BLOCKS),
        sla_ref.SLA2Attention(16, 2, 0.4, router=router, **BLOCKS),
    ):
        assert torch.equal(layer(query, key, key), layer(query, key, key, block_map=block_map))


def test_backends_take_maps_with_rows_of_unequal_length(backend_name, device):
    query, key = (tensor.to(device) for tensor in tokens(40))
    block_map = routers()["all the rest"](query, key, 0.1, 0.3, **BLOCKS)
    assert not block_map.is_uniform
    problem = testing.make_problem(query_length=40, head_dim=16, **BLOCKS, device=device)
    problem = problem._replace(inputs=problem.inputs._replace(query=query, key=key, block_map=block_map))
    exact = testing.oracle(problem)
    results = testing.run_backend(backends.load(backend_name), problem)
    testing.assert_within(results, exact, testing.error_budget(problem, exact))


def test_a_function_is_a_router():
    query, key = tokens()
    everything = lambda query, key, *ratios, **blocks: sla_ref.classify_blocks(query, key, 1.0, **blocks)  # noqa: E731
    layer = sla_ref.SparseLinearAttention(16, router=everything, **BLOCKS)
    full = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    torch.testing.assert_close(layer(query, key, key), full)


@pytest.mark.parametrize("name", routers())
def test_copies_and_compiled_routers_choose_alike(name):
    torch._dynamo.reset()
    router = routers()[name]
    layer = sla_ref.SparseLinearAttention(16, 0.2, 0.3, router=router, **BLOCKS)
    dynamic = name == "learned"  # the other takes a minute to trace so
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (60, 47) if dynamic else (60,):
        query, key = tokens(length)
        expected = layer(query, key, key)
        for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(clone(query, key, key), expected)
        torch.testing.assert_close(compiled(query, key, key), expected)


def test_a_mask_moves_with_the_layer_and_is_not_saved():
    mask = torch.tensor([True, False])
    layer = sla_ref.SparseLinearAttention(16, router=sla_ref.Router(protected_keys=mask))
    assert set(layer.state_dict()) == {"proj_l.weight", "proj_l.bias"}
    assert layer.to("meta").router.protected_keys.is_meta
    assert layer.bfloat16().router.protected_keys.dtype == torch.bool
    learned = sla_ref.SparseLinearAttention(16, router="learned")
    assert set(learned.state_dict()) >= {"router.scores.proj_q.weight", "router.scores.proj_k.weight"}


def test_printing_says_what_chooses():
    mask = torch.tensor([True, False, True])
    router = sla_ref.Router(sla_ref.sub_block_scores, top_p=0.5, protected_queries=mask, protected_keys=slice(0, 3))
    text = "sub_block_scores, top_p=0.5, protected_queries=2 tokens, protected_keys=slice(0, 3, None)"
    assert repr(router) == f"Router({text})"
    assert repr(sla_ref.Router()) == "Router(block_scores)"


# --- the soft choice -------------------------------------------------------------------------------------------------


def test_soft_choice_is_the_equation_and_keeps_protected_blocks():
    query, key = tokens()
    router = sla_ref.Router(sla_ref.LearnedScores(16), protected_keys=slice(0, 1))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    soft = router.soft(query, key, 0.34, 0.5, **BLOCKS)
    expected = reference_sla2.soft_top_k(router.scores(query, key, **BLOCKS), 2, 0.5)
    expected[..., 0] = 1
    assert torch.equal(soft, expected)
    soft.square().sum().backward()
    assert all(parameter.grad.any() for parameter in router.parameters())
    papers = router.soft(query, key, 0.34, 0.1, **BLOCKS)
    assert torch.equal(router.soft(query, key, 0.34, **BLOCKS), papers) and not torch.equal(papers, soft)


def test_a_hard_choice_does_not_pretend_to_train_the_router():
    query, key = tokens()
    for layer in (
        sla_ref.SparseLinearAttention(16, router="learned", **BLOCKS),
        sla_ref.SLA2Attention(16, 2, router="learned", **BLOCKS),
    ):
        with pytest.raises(RuntimeError, match=r"gives the router no gradient.*layer\.router\.requires_grad_\(False\)"):
            layer(query, key, key)
        with torch.no_grad():
            expected = layer(query, key, key)
        layer.router.requires_grad_(False)
        assert torch.equal(layer(query, key, key), expected)
        trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        assert trained
        assert not any("router" in name for name in trained)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [sla_ref.SparseLinearAttention, partial(sla_ref.SLA2Attention, heads=2)])
def test_bad_names(layer):
    with pytest.raises(ValueError, match="router must be 'pooled', 'learned' or a callable, got 'best'"):
        layer(16, router="best")
    with pytest.raises(TypeError, match="router must be 'pooled', 'learned' or a callable, got int"):
        layer(16, router=5)
    with pytest.raises(TypeError, match=r"block_map must be a sla_ref\.BlockMap, got Tensor"):
        layer(16, router=lambda query, *rest, **blocks: query)(*tokens(), tokens()[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": "pooled"}, TypeError, "scores must be a callable, as block_scores, got str"),
        ({"top_p": 0}, ValueError, "top_p must be a number with 0 < top_p <= 1, got 0"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a number"),
        ({"protected_keys": 77}, TypeError, "protected_keys must be a boolean tensor, a slice or None, got int"),
    ],
)
def test_bad_router(arguments, error, message):
    with pytest.raises(error, match=message):
        sla_ref.Router(**arguments)


def test_bad_arguments_of_a_choice():
    query, key = tokens()
    with pytest.raises(ValueError, match="parts_k must divide block_k 16, got 5"):
        sla_ref.sub_block_scores(query, key, **BLOCKS, parts_k=5)
    with pytest.raises(TypeError, match=r"parts_q must be an int >= 1, got 2\.0"):
        sla_ref.sub_block_scores(query, key, **BLOCKS, parts_q=2.0)
    with pytest.raises(ValueError, match="top_p must be None for a soft choice"):
        sla_ref.Router(top_p=0.9).soft(query, key, 0.1)
    with pytest.raises(ValueError, match="tau must be a finite number > 0, got 0"):
        sla_ref.Router().soft(query, key, 0.1, 0)
    with pytest.raises(ValueError, match="critical_ratio must be a number"):
        sla_ref.Router(sla_ref.sub_block_scores)(query, key, 0.0, 0.0)
    with pytest.raises(TypeError, match="cube must be a tuple of three ints"):
        sla_ref.cube_order(4, 4, 4, (2, 2))
    with pytest.raises(ValueError, match="cube must be an int >= 1, got 0"):
        sla_ref.cube_order(4, 4, 4, (2, 2, 0))
    with pytest.raises(ValueError, match="height must be an int >= 1, got 0"):
        sla_ref.cube_order(4, 0, 4, (2, 2, 2))
