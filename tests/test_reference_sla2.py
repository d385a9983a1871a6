"""The equations of SLA2 against sums written out as loops, full attention and finite differences; the paper's slips."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sla_ref import reference, reference_sla2, testing

BLOCK = 4
LENGTHS = (11, 9)  # the last block of both is partial
SCALE = 0.5


def problem() -> tuple[torch.Tensor, ...]:
    """Query, key, value, proj_q, proj_k in float64."""
    query, key, value = (torch.randn(1, 2, length, 3, dtype=torch.float64) for length in (LENGTHS[0], *LENGTHS[1:] * 2))
    return query, key, value, *torch.randn(2, 3, 3, dtype=torch.float64)


def masks(query: torch.Tensor, key: torch.Tensor, *proj: torch.Tensor) -> dict[str, torch.Tensor]:
    """One hard, one soft, one with a row in which all is critical and one in which nothing is."""
    scores = reference_sla2.router_scores(query, key, *proj, BLOCK, BLOCK)
    hard = reference_sla2.top_k(scores, 1)
    empty = hard.clone()
    empty[:, :, 0], empty[:, :, 1] = 1, 0
    return {"hard": hard, "soft": reference_sla2.soft_top_k(scores, 1), "empty rows": empty}


def expand(mask: torch.Tensor) -> torch.Tensor:
    return reference_sla2.expand(mask, *LENGTHS, BLOCK, BLOCK)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def by_token(query, key, value, mask) -> dict[str, torch.Tensor]:
    """Both branches, alpha and their mix, one row and one key at a time."""
    phi_query, phi_key = query.softmax(-1), key.softmax(-1)
    found = {name: torch.zeros_like(query) for name in ("sparse", "linear", "mixed")}
    found |= {name: torch.zeros(query.shape[:3], dtype=query.dtype) for name in ("ideal", "block_means")}
    for b, h, row in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        critical, marginal, denominator, of_means = 0.0, 0.0, 0.0, 0.0
        sparse, linear = torch.zeros(2, 3, dtype=query.dtype)
        for column in range(LENGTHS[1]):
            j = column // BLOCK
            M = mask[b, h, row // BLOCK, j].item()
            weight = math.exp(SCALE * (query[b, h, row] @ key[b, h, column]).item())
            critical += M * weight
            marginal += (1 - M) * weight
            sparse += M * weight * value[b, h, column]
            feature = (1 - M) * (phi_query[b, h, row] @ phi_key[b, h, column]).item()
            denominator += feature
            linear += feature * value[b, h, column]
            mean = key[b, h, BLOCK * j : BLOCK * (j + 1)].mean(0)
            of_means += (1 - M) * math.exp(SCALE * (query[b, h, row] @ mean).item())
        if critical:
            found["sparse"][b, h, row] = sparse / critical
        if denominator:
            found["linear"][b, h, row] = linear / denominator
        found["ideal"][b, h, row] = alpha = critical / (critical + marginal)
        found["block_means"][b, h, row] = critical / (critical + of_means)
        found["mixed"][b, h, row] = alpha * found["sparse"][b, h, row] + (1 - alpha) * found["linear"][b, h, row]
    return found


def by_equation(query, key, value, mask) -> dict[str, torch.Tensor]:
    mask = expand(mask)
    found = {
        "sparse": reference_sla2.sparse_branch(query, key, value, mask, SCALE),
        "linear": reference_sla2.linear_branch(query.softmax(-1), key.softmax(-1), value, mask),
        "ideal": reference_sla2.ideal_alpha(query, key, mask, SCALE),
        "block_means": reference_sla2.block_means_alpha(query, key, mask, BLOCK, SCALE),
    }
    return found | {"mixed": reference_sla2.combine(found["sparse"], found["linear"], found["ideal"])}


@pytest.mark.parametrize("name", ["hard", "soft", "empty rows"])
def test_equations_are_the_sums_written_out(name):
    query, key, value, *proj = problem()
    mask = masks(query, key, *proj)[name]
    found, expected = by_equation(query, key, value, mask), by_token(query, key, value, mask)
    for tensor in expected:
        close(found[tensor], expected[tensor])


def test_router_scores_are_the_sums_written_out():
    query, key, _, proj_q, proj_k = problem()
    scores = reference_sla2.router_scores(query, key, proj_q, proj_k, BLOCK, BLOCK)
    assert scores.shape == (1, 2, 3, 3)
    for h, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        of_query = proj_q @ query[0, h, BLOCK * i : BLOCK * (i + 1)].mean(0)
        of_key = proj_k @ key[0, h, BLOCK * j : BLOCK * (j + 1)].mean(0)
        close(scores[0, h, i, j], of_query @ of_key)


def test_with_the_router_at_the_identity_the_choice_and_the_branches_are_those_of_sla():
    query, key, value, *_ = problem()
    eye = torch.eye(3, dtype=torch.float64)
    scores = reference_sla2.router_scores(query, key, eye, eye, BLOCK, BLOCK)
    labels = reference.classify(query, key, 0.4, 0.0, BLOCK, BLOCK)
    mask = reference_sla2.top_k(scores, 1)
    assert torch.equal(mask, labels.double())
    features = query.softmax(-1), key.softmax(-1)
    sparse, linear, lse = reference.sparse_linear_attention(query, key, value, *features, labels, BLOCK, BLOCK, SCALE)
    close(reference_sla2.sparse_branch(query, key, value, expand(mask), SCALE), sparse)
    close(reference_sla2.linear_branch(*features, value, expand(mask)), linear)
    close(reference_sla2.log_mass(query, key, expand(mask), SCALE), lse)


@pytest.mark.parametrize("name", ["hard", "soft", "empty rows"])
def test_ideal_alpha_with_an_exact_marginal_average_is_full_attention(name):
    query, key, value, *proj = problem()
    mask = expand(masks(query, key, *proj)[name])
    sparse = reference_sla2.sparse_branch(query, key, value, mask, SCALE)
    exact = reference_sla2.sparse_branch(query, key, value, 1 - mask, SCALE)  # P2 V / (1 - alpha)
    alpha = reference_sla2.ideal_alpha(query, key, mask, SCALE)
    full = F.scaled_dot_product_attention(query, key, value, scale=SCALE)
    close(reference_sla2.combine(sparse, exact, alpha), full)
    if name == "hard":  # both branches may be exact, and still their sum is not attention [SLA's Eq. 6, Proj = 1]
        assert (sparse + exact - full).abs().max() > 0.1


def test_block_means_underestimate_the_marginal_mass_and_are_exact_for_equal_keys():
    query, key, _, *proj = problem()
    mask = expand(masks(query, key, *proj)["hard"])
    ideal = reference_sla2.ideal_alpha(query, key, mask, SCALE)
    assert (reference_sla2.block_means_alpha(query, key, mask, BLOCK, SCALE) >= ideal - 1e-12).all()
    equal = reference_sla2.pool(key, BLOCK)[:, :, torch.arange(LENGTHS[1]) // BLOCK]
    close(
        reference_sla2.block_means_alpha(query, equal, mask, BLOCK, SCALE),
        reference_sla2.ideal_alpha(query, equal, mask, SCALE),
    )


def test_a_row_without_a_key_has_zero_gradient_with_respect_to_its_mask_too():
    query, key, value, *_ = problem()
    mask = torch.zeros(1, 2, *LENGTHS, dtype=torch.float64, requires_grad=True)
    sparse = reference_sla2.sparse_branch(query, key, value, mask, SCALE)
    mass = reference_sla2.log_mass(query, key, mask, SCALE)
    assert (mass == -torch.inf).all()
    linear = reference_sla2.linear_branch(query.softmax(-1), key.softmax(-1), value, 1 + mask)
    total = sparse.sum() + linear.sum() + torch.sigmoid(-mass).sum()
    (grad,) = torch.autograd.grad(total, mask)
    assert not grad.any(), "zero, and no NaN"


# --- soft top-k ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_critical", [1, 3, 7])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_rows_of_the_soft_choice_have_the_sum_of_the_hard_one(num_critical, spread):
    scores = spread * torch.randn(2, 3, 4, 7, dtype=torch.float64)
    mask = reference_sla2.soft_top_k(scores, num_critical)
    assert (mask >= 0).all() and (mask <= 1).all()
    close(mask.sum(-1), torch.full((2, 3, 4), float(num_critical), dtype=torch.float64))


def test_a_small_tau_makes_the_hard_choice():
    scores = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    hard = reference_sla2.top_k(scores, 2)
    torch.testing.assert_close(reference_sla2.soft_top_k(scores, 2, tau=1e-5), hard, atol=1e-6, rtol=0)
    assert (reference_sla2.soft_top_k(scores, 2, tau=1.0) - hard).abs().max() > 0.1


@pytest.mark.parametrize("num_critical", [1, 3, 5])
def test_gradient_of_the_soft_choice_by_finite_differences(num_critical):
    """With all five critical the mask is 1 and its gradient 0."""
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference_sla2.soft_top_k(x, num_critical, 0.3), [scores])


@pytest.mark.parametrize("name", ["hard", "soft", "empty rows"])
@pytest.mark.parametrize("alpha", ["ideal", "block_means"])
def test_gradients_by_finite_differences(name, alpha):
    """With respect to query, key and value; where the mask is soft, through it, and to the router's projections too."""
    *tokens, proj_q, proj_k = problem()
    given = masks(*tokens[:2], proj_q, proj_k)[name]

    def mixed(query, key, value, proj_q, proj_k):
        mask = given
        if name == "soft":
            scores = reference_sla2.router_scores(query, key, proj_q, proj_k, BLOCK, BLOCK)
            mask = reference_sla2.soft_top_k(scores, 1)
        found = by_equation(query, key, value, mask)
        return reference_sla2.combine(found["sparse"], found["linear"], found[alpha])

    leaves = [tensor.requires_grad_() for tensor in tokens]
    projections = [tensor.requires_grad_(name == "soft") for tensor in (proj_q, proj_k)]
    assert torch.autograd.gradcheck(mixed, [*leaves, *projections])


# --- slips and open points of the paper -------------------------------------------------------------------------------


def test_a_constant_lambda_gives_the_wrong_gradient():
    """As some public ports have it: lambda is detached, and the gradient loses its second term."""

    def gradient(mask: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((mask * weight).sum(), scores, retain_graph=True)[0]

    scores = torch.randn(1, 2, 4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(scores)
    mask = reference_sla2.soft_top_k(scores, 2)
    shift = (mask.logit() - scores / 0.1).mean(-1, keepdim=True).detach()  # lambda
    ported = torch.sigmoid(scores / 0.1 + shift)
    torch.testing.assert_close(ported, mask, atol=1e-9, rtol=0)
    assert (gradient(ported) - gradient(mask)).abs().max() > 0.1
    # A shift of all scores changes nothing, which the ported gradient denies.
    close(reference_sla2.soft_top_k(scores + 0.01, 2), mask)
    close(gradient(mask).sum(-1), torch.zeros(1, 2, 4, dtype=torch.float64))
    assert gradient(ported).sum(-1).abs().max() > 0.01


def test_no_proj_of_an_exact_branch_is_full_attention():
    """Equation 10: SLA's Proj would have to take back a share of the sparse branch, in each row another one."""
    query, key, value, *proj = problem()
    mask = expand(masks(query, key, *proj)["hard"])
    sparse, exact = (reference_sla2.sparse_branch(query, key, value, m, SCALE) for m in (mask, 1 - mask))
    alpha = reference_sla2.ideal_alpha(query, key, mask, SCALE)[..., None]
    P2 = (SCALE * query @ key.mT).softmax(-1) * (1 - mask)
    missing = F.scaled_dot_product_attention(query, key, value, scale=SCALE) - sparse
    close(missing, P2 @ value + (alpha - 1) * sparse)
    x = torch.cat([exact, torch.ones_like(alpha)], -1).flatten(0, 2)
    best = torch.linalg.lstsq(x, missing.flatten(0, 2)).solution  # weight and bias, shared by the heads
    assert (x @ best - missing.flatten(0, 2)).abs().max() > 0.01


def test_one_alpha_for_each_query_block_cannot_be_the_ideal_one():
    """Algorithm 2's size of alpha, against Equation 13's: rows of one block differ in how much of them is critical."""
    query, key, value, *proj = problem()
    mask = expand(masks(query, key, *proj)["hard"])
    sparse, exact = (reference_sla2.sparse_branch(query, key, value, m, SCALE) for m in (mask, 1 - mask))
    full = F.scaled_dot_product_attention(query, key, value, scale=SCALE)
    best = torch.empty(1, 2, LENGTHS[0], dtype=torch.float64)
    for rows in torch.arange(LENGTHS[0]).split(BLOCK):  # by least squares: no other number of a block comes closer
        apart, wanted = (sparse - exact)[:, :, rows], (full - exact)[:, :, rows]
        best[:, :, rows] = ((apart * wanted).sum((2, 3)) / apart.square().sum((2, 3)))[..., None]
    assert (reference_sla2.combine(sparse, exact, best) - full).abs().max() > 0.01


def test_softmax_of_the_scores_keeps_the_hard_choice_and_changes_the_soft_one():
    """Algorithm 2, line 8, against Equation 16."""
    scores = torch.randn(1, 2, 4, 64, dtype=torch.float64) * 3
    of_algorithm = (scores / math.sqrt(3)).softmax(-1)
    assert torch.equal(reference_sla2.top_k(scores, 4), reference_sla2.top_k(of_algorithm, 4))
    chosen = reference_sla2.top_k(scores, 4) == 1
    kept, lost = (reference_sla2.soft_top_k(x, 4)[chosen].mean() for x in (scores, of_algorithm))
    assert kept > 0.9
    assert lost < 0.5, "most of the critical blocks' share is spread over the others"


def test_smoothing_the_keys_changes_the_linear_branch():
    """Subtracting the mean key shifts all scores of a row alike, which a softmax over keys does not see. phi does."""
    query, key, value, *proj = problem()
    mask = expand(masks(query, key, *proj)["hard"])
    smooth = key - key.mean(2, keepdim=True)
    close(
        reference_sla2.sparse_branch(query, smooth, value, mask, SCALE),
        reference_sla2.sparse_branch(query, key, value, mask, SCALE),
    )
    one, other = (reference_sla2.linear_branch(query.softmax(-1), k.softmax(-1), value, mask) for k in (smooth, key))
    assert (one - other).abs().max() > 0.01


def algorithm_3(query, key, value, mask, alpha, grad) -> dict[str, torch.Tensor]:
    """The gradients as Algorithm 3 has them, with its two slips mended; both values' terms apart."""
    phi_query, phi_key = query.softmax(-1), key.softmax(-1)
    P = (SCALE * query @ key.mT).masked_fill(mask == 0, -torch.inf).softmax(-1)
    A = (1 - mask) * (phi_query @ phi_key.mT)
    A = A / A.sum(-1, keepdim=True)
    grad_sparse, grad_linear = alpha[..., None] * grad, (1 - alpha[..., None]) * grad
    dP = grad_sparse @ value.mT
    dS = P * (dP - (P * dP).sum(-1, keepdim=True))
    return {
        "query": SCALE * dS @ key,
        "key": SCALE * dS.mT @ query,
        "value_sparse": P.mT @ grad_sparse,
        "value_linear": A.mT @ grad_linear,
        "alpha": (grad * (P @ value - A @ value)).sum(-1),
    }


def test_algorithm_3_as_printed_loses_the_sparse_values_and_the_scale():
    query, key, value, *proj = problem()
    mask = expand(masks(query, key, *proj)["hard"])
    alpha = torch.rand(1, 2, LENGTHS[0], dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(query)
    features = query.softmax(-1), key.softmax(-1)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    sparse = reference_sla2.sparse_branch(*leaves, mask, SCALE)
    linear = reference_sla2.linear_branch(*features, value, mask)  # phi is constant here: Algorithm 3 has dphi apart
    true = torch.autograd.grad(reference_sla2.combine(sparse, linear, alpha), [*leaves, alpha], grad)
    with torch.no_grad():
        found = algorithm_3(query, key, value, mask, alpha, grad)
    for name, expected in zip(("query", "key"), true, strict=False):
        close(found[name], expected)
        assert (found[name] / SCALE - expected).abs().max() > 0.1, "as printed, without 1/sqrt(d)"
    close(found["value_sparse"] + found["value_linear"], true[2])
    assert (found["value_linear"] - true[2]).abs().max() > 0.1, "as printed, dV_j = ... overwrites"
    close(found["alpha"], true[3])


def test_weights_recomputed_from_other_scores_than_the_lse_do_not_sum_to_one():
    """The forward in 8 bits, the backward from unquantised scores: the same quantisation in both cures it."""

    def quantised(x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax((-2, -1), keepdim=True) / 127
        return (x / step).round() * step

    query, key = torch.randn(2, 1, 2, 64, 16) * 4
    scores = query @ key.mT / 4
    of_forward = quantised(query) @ quantised(key).mT / 4
    lse = of_forward.logsumexp(-1, keepdim=True)
    torch.testing.assert_close((of_forward - lse).exp().sum(-1), torch.ones(1, 2, 64), atol=1e-4, rtol=0)
    assert ((scores - lse).exp().sum(-1) - 1).abs().max() > 0.1


def test_float32_is_taken_and_is_as_good():
    """Large scores neither overflow nor underflow, although only one key of many is critical."""
    p = testing.make_problem(query_length=70, head_dim=16, block_q=16, block_k=16, spread=10.0).inputs
    mask = reference_sla2.expand((p.block_map.labels == 1).float(), 70, 70, 16, 16)
    sparse = reference_sla2.sparse_branch(p.query, p.key, p.value, mask, p.scale)
    exact = reference_sla2.sparse_branch(*(x.double() for x in (p.query, p.key, p.value, mask)), p.scale)
    torch.testing.assert_close(sparse.double(), exact, atol=1e-4, rtol=1e-4)
    assert reference_sla2.ideal_alpha(p.query, p.key, mask, p.scale).isfinite().all()
