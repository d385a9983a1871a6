"""The specification against what it must become in its limits, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import sla_ref
from sla_ref import reference, testing
from sla_ref.protocol import Inputs


def problem(**arguments):
    return testing.make_problem(**{"query_length": 70, "head_dim": 16, "block_q": 16, "block_k": 16} | arguments).to(
        torch.float64
    )


def run(p: Inputs):
    *tensors, block_map, scale = p
    return reference.sparse_linear_attention(*tensors, block_map.labels, block_map.block_q, block_map.block_k, scale)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("labels", ["classified", "random", "negligible"])
def test_the_equations_token_by_token(labels: str):
    """Eq. 4 and 5 again, without tensors: each sum is a loop over single keys."""
    sizes = {"heads": 1, "query_length": 11, "key_length": 9, "head_dim": 3, "block_q": 4, "block_k": 4}
    p = problem(**sizes, labels=labels, critical_ratio=0.4).inputs
    query, key, value, phi_query, phi_key = (tensor[0, 0].tolist() for tensor in p[:5])
    classes = p.block_map.labels[0, 0].tolist()

    def dot(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    def average(weights: dict[int, float]) -> list[float]:
        total = sum(weights.values())
        return [sum(w * value[n][d] for n, w in weights.items()) / total if weights else 0.0 for d in range(3)]

    sparse, linear, lse = [], [], []
    for m in range(11):
        label = [classes[m // 4][n // 4] for n in range(9)]
        exp = {n: math.exp(p.scale * dot(query[m], key[n])) for n in range(9) if label[n] == 1}
        sparse.append(average(exp))
        linear.append(average({n: dot(phi_query[m], phi_key[n]) for n in range(9) if label[n] == 0}))
        lse.append(math.log(sum(exp.values())) if exp else -math.inf)
    for actual, expected in zip(run(p), (sparse, linear, lse), strict=True):
        close(actual[0, 0], torch.tensor(expected, dtype=torch.float64))


def test_all_critical_is_softmax_attention():
    p = problem(labels="critical").inputs
    sparse, linear, lse = run(p)
    close(sparse, F.scaled_dot_product_attention(p.query, p.key, p.value))
    close(lse, (p.scale * p.query @ p.key.mT).logsumexp(-1))
    assert not linear.any()


def test_all_marginal_is_plain_linear_attention():
    p = problem(labels="marginal").inputs
    sparse, linear, lse = run(p)
    state = p.phi_key.mT @ p.value
    close(linear, p.phi_query @ state / (p.phi_query @ p.phi_key.sum(2)[..., None]))
    assert not sparse.any()
    assert (lse == -torch.inf).all()


def test_all_negligible_is_nothing():
    results = testing.run_function(reference.sparse_linear_attention, problem(labels="negligible"))
    assert (results.pop("lse") == -torch.inf).all()
    assert all(not values.any() for values in results.values())


def test_sparse_branch_is_masked_attention():
    p = problem(labels="random", query_length=64).inputs
    sparse, _, _ = run(p)
    mask = p.block_map.to_dense() == 1
    some = mask.any(-1)
    close(sparse[some], F.scaled_dot_product_attention(p.query, p.key, p.value, attn_mask=mask)[some])
    assert not some.all(), "the case should have query blocks without a critical block"


def test_linear_branch_is_the_papers_recurrence():
    """Eq. 5 literally: H_i and Z_i summed block by block."""
    p = problem(labels="random", key_length=90).inputs
    _, linear, _ = run(p)
    B, H, Tq, Tk = p.block_map.labels.shape
    expected = torch.zeros_like(linear)
    for b in range(B):
        for h in range(H):
            for i in range(Tq):
                rows = slice(16 * i, 16 * i + 16)
                H_i, Z_i = torch.zeros(16, 16).double(), torch.zeros(16).double()
                for j in range(Tk):
                    if p.block_map.labels[b, h, i, j] == 0:
                        phi, value = p.phi_key[b, h, 16 * j : 16 * j + 16], p.value[b, h, 16 * j : 16 * j + 16]
                        H_i, Z_i = H_i + phi.T @ value, Z_i + phi.sum(0)
                if Z_i.any():
                    phi = p.phi_query[b, h, rows]
                    expected[b, h, rows] = phi @ H_i / (phi @ Z_i)[:, None]
    close(linear, expected)


@pytest.mark.parametrize("labels", ["classified", "random", "negligible"])
def test_gradients_by_finite_differences(labels: str):
    p = problem(query_length=11, key_length=9, head_dim=3, block_q=4, block_k=4, labels=labels).inputs
    leaves = [tensor.requires_grad_() for tensor in p[:5]]
    torch.autograd.gradcheck(lambda *tensors: run(Inputs(*tensors, p.block_map, p.scale))[:2], leaves)


def test_classification_by_hand():
    """One query block against five key blocks whose pooled scores are 3, 5, 1, 5, 2."""
    query = torch.ones(1, 1, 2, 1)
    key = torch.tensor([3.0, 5, 1, 5, 2]).repeat_interleave(2).view(1, 1, 10, 1)

    def labels(critical_ratio: float, negligible_ratio: float) -> list[int]:
        labels = reference.classify(query, key, critical_ratio, negligible_ratio, 2, 2)
        assert labels.dtype == torch.int8
        return labels.flatten().tolist()

    assert labels(0.4, 0.4) == [0, 1, -1, 1, -1]
    assert labels(0.2, 0.2) == [0, 1, -1, 0, 0], "among equal scores the first block is critical"
    assert labels(0.01, 0.0) == [0, 1, 0, 0, 0], "there is always one critical block"
    assert labels(0.6, 1.0) == [1, 1, -1, 1, -1], "negligible takes what is left"
    assert labels(1.0, 1.0) == [1, 1, 1, 1, 1]


def test_combine_adds_the_projection():
    sparse, linear = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    weight, bias = torch.randn(4, 4), torch.randn(4)
    torch.testing.assert_close(reference.combine(sparse, linear, weight, bias), sparse + linear @ weight.T + bias)


def test_layer_is_the_reference():
    torch.manual_seed(0)
    layer = sla_ref.SparseLinearAttention(8, 0.3, 0.3, block_q=16, block_k=16).double()
    torch.nn.init.normal_(layer.proj_l.weight)
    torch.nn.init.normal_(layer.proj_l.bias)
    query, key, value = (torch.randn(1, 2, 60, 8, dtype=torch.float64) for _ in range(3))
    labels = reference.classify(query, key, 0.3, 0.3, 16, 16)
    sparse, linear, _ = reference.sparse_linear_attention(
        query, key, value, query.softmax(-1), key.softmax(-1), labels, 16, 16, 8**-0.5
    )
    close(layer(query, key, value), reference.combine(sparse, linear, layer.proj_l.weight, layer.proj_l.bias))


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, -96), (torch.float64, -992)], ids=str)
def test_the_smallest_denominator(dtype, power):
    """In the specification and in the backend torch, with a single key."""
    smallest = 2.0**power
    assert reference.smallest_denominator(dtype) == smallest
    one, labels = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=torch.int8)
    for feature, expected in ((smallest, one), (-smallest, one), (smallest * 0.999, 0 * one)):
        phi, block_map = one * feature, sla_ref.BlockMap(labels, 1, 1, 1, 1)
        assert torch.equal(reference.sparse_linear_attention(one, one, one, phi, one, labels, 1, 1, 1.0)[1], expected)
        found = sla_ref.sparse_linear_attention(phi, one, one, block_map=block_map, feature_map=torch.clone)
        assert torch.equal(found.linear, expected)
