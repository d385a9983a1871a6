"""What is particular to the Numba kernels; that they are right is checked with all backends in test_backends.py.

Without a GPU they run in Numba's simulator, one Python thread for each thread of the GPU: problems are tiny.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from faults import Fault, assert_caught
from test_kernel_backends import assert_right, make

from sla_ref import backends, testing
from sla_ref.block_map import BlockMap
from sla_ref.protocol import Inputs

pytestmark = pytest.mark.backend("numba")
if (reason := backends.list_backends()["numba"]) is not None:
    pytest.skip(reason, allow_module_level=True)
numba_cuda = backends.load("numba")


# --- the checker is checked: a fault planted in each kernel is caught -------------------------------------------------


fault = functools.partial(Fault, "numba_cuda.py")
FAULTS = {
    "the tail is read as if it were there": fault(
        "load",
        "array[head, first + n, column + d] if inside else ZERO",
        "array[head, min(first + n, array.shape[1] - 1), min(column + d, array.shape[2] - 1)]",
        "linear",
    ),
    "negligible counts as marginal": fault("sums_by_chunk", "labels == MARGINAL", "labels <= MARGINAL", "linear"),
    "a chunk's sums go to the first heads": fault(
        "sums_by_chunk", "yield chunk,", "yield slice(0, size),", "linear", heads=2, query_length=1, labels="marginal"
    ),
    "Z is skipped": fault("states_kernel", "product_spare(z, phi, V, TOKENS)", "pass", "linear"),
    "the spare column is not filled": fault("states_kernel", "V[thread, COLUMNS] =", "V[thread, 0] =", "linear"),
    "no barrier after K is loaded": fault(
        "forward_kernel", "cuda.syncthreads()  # all of K is there", "pass", "sparse"
    ),
    "no barrier after P is stored": fault(
        "forward_kernel", "cuda.syncthreads()  # all of V and P is there", "pass", "sparse"
    ),
    "the keys of the neighbour": fault("forward_kernel", "% STEPS * KEYS", "% STEPS * KEYS ^ 16", "sparse"),
    "the tail is not masked": fault(
        "forward_kernel", "S[r, c] * log2_scale if inside", "S[r, c] * log2_scale if True", "sparse"
    ),
    "the wrong scale": fault("forward_kernel", "log2_scale = scale * LOG2_E", "log2_scale = LOG2_E", "sparse"),
    "no running maximum": fault("forward_kernel", "highest[r] = max(highest[r], m[r])", "pass", "sparse", spread=20.0),
    "O is not rescaled": fault("forward_kernel", "O[r, c] *= shrink", "pass", "sparse"),
    "l is not rescaled": fault("forward_kernel", "l[r] *= shrink", "pass", "sparse"),
    "lanes are not added up": fault("forward_kernel", "sum_lanes(partial, l)", "pass", "sparse"),
    "lse in base 2": fault("forward_kernel", "(m[r] + math.log2(l[r])) * LN_2", "(m[r] + math.log2(l[r]))", "lse"),
    "phi(Q) H is not divided": fault("forward_kernel", "ONE / denominator[r] if defined", "ONE if defined", "linear"),
    "D^s is forgotten": fault("dq_kernel", "(dP[r, c] - Ds[r])", "dP[r, c]", "grad_query"),
    "dL is forgotten": fault("dq_kernel", "Ds[r] -= grad_lse[head, n]", "pass", "grad_key"),
    "scale is forgotten in dQ": fault("dq_kernel", "dQ[r, c] *= scale", "pass", "grad_query"),
    "the second half of a query block gives the first's dQ": fault(
        "dq_kernel", "% PARTS * ROWS", "% 1 * ROWS", "grad_query", block_q=64, query_length=40
    ),
    "scale is forgotten in dK": fault("dkdv_kernel", "dK[r, c] *= scale", "pass", "grad_key"),
    "dV is overwritten": fault("dkdv_kernel", "fetch(dV, grad_value, head, first_key)", "clear(dV)", "grad_value"),
    "one query block too few": fault("dkdv_kernel", "- start) * STEPS", "- start - 1) * STEPS", "grad_key"),
    "no barrier before the next Q": fault(
        "dkdv_kernel", "cuda.syncthreads()  # nobody needs the last Q, dO, P and dS any more", "pass", "grad_key"
    ),
    "the second half of a key block gives the first's dK": fault(
        "dkdv_kernel", "% PARTS * KEYS", "% 1 * KEYS", "grad_key", block_k=64, labels="critical"
    ),
    "Z is skipped in dQ^phi": fault("grad_sums_kernel", "H.T, COLUMNS + 1)", "H.T, COLUMNS)", "grad_phi_query"),
    "dZ has the wrong sign": fault(
        "grad_sums_kernel", "share_spare[head, n] = -Dl[r]", "share_spare[head, n] = Dl[r]", "grad_phi_key"
    ),
    "dz is skipped": fault("grad_keys_kernel", "dh.T, COLUMNS + 1)", "dh.T, COLUMNS)", "grad_phi_key"),
    "phi is not loaded": fault("grad_keys_kernel", "load(tokens, phi_key, head, first, 0)", "pass", "grad_value"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the simulator, where a fault lets a number overflow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str, tmp_path, device: str) -> None:
    if "barrier" in name and device == "cuda":
        pytest.skip("a race: on a GPU the few threads of this problem may happen to win it")
    assert_caught(numba_cuda, FAULTS[name], tmp_path, make(device, **FAULTS[name].problem))


# --- the parts -------------------------------------------------------------------------------------------------------


def test_states_are_products_of_their_block(device: str) -> None:
    inputs = make(device).inputs
    phi, V = inputs.phi_key.flatten(0, 1), inputs.value.flatten(0, 1)
    spare = torch.arange(37.0, device=device)[None]
    states, broken = numba_cuda.block_states(phi, V, spare, 16)
    assert states.shape == (1, 3, 8, 9)
    assert not broken.any()
    tail = slice(32, 37)
    torch.testing.assert_close(states[0, 2, :, :8], phi[0, tail].T @ V[0, tail])
    torch.testing.assert_close(states[0, 2, :, 8], phi[0, tail].T @ spare[0, tail])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_state_reaches_its_members_alone(bad: float, device: str) -> None:
    """The broken number is in one head in h and in the other in z."""
    features, values, spare = torch.ones(2, 48, 8), torch.ones(2, 48, 8), torch.ones(2, 48)
    values[0, 10, 3] = spare[1, 10] = bad
    states = numba_cuda.block_states(*(tensor.to(device) for tensor in (features, values, spare)), 16)
    member = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], device=device).expand(2, 2, 3)
    sums = numba_cuda.add_up(member, *states)
    assert sums[:, 0].isnan().all()
    assert (sums[:, 1] == 16).all()


def test_each_part_of_a_state_may_be_the_broken_one(device: str) -> None:
    """With 40 features a state is made by two thread blocks, and only the second one meets the NaN."""
    features, values, spare = torch.ones(1, 32, 40), torch.ones(1, 32, 40), torch.ones(1, 32)
    features[0, 10, 35] = math.nan
    states = numba_cuda.block_states(*(tensor.to(device) for tensor in (features, values, spare)), 16)
    sums = numba_cuda.add_up(torch.eye(2, device=device)[None], *states)
    assert sums[:, 0].isnan().all()
    assert (sums[:, 1] == 16).all()


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_users_tf32_switch_is_put_back(setting: str) -> None:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = setting
    try:
        with numba_cuda.float32_products():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == setting
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (16, 16)])
def test_chunks_cover_all_heads_within_bounds(blocks: tuple[int, int]) -> None:
    """At Wan's size, a chunk's states take at most the memory of four queries in float32."""
    query = torch.empty(2, 12, 32760, 128, device="meta")
    labels = torch.empty(2, 12, *(math.ceil(32760 / block) for block in blocks), dtype=torch.int8, device="meta")
    heads, states = [], []

    class Recorder(numba_cuda.Launcher):
        def start(self, kernel, grid, *args) -> None:
            heads.append(grid[1] if kernel.name == "forward" else 0)
            states.append(sum(arg.numel() for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4))

    with numba_cuda.launch_with(Recorder()):
        block_map = BlockMap(labels, *blocks, 32760, 32760, 25)
        numba_cuda.forward(Inputs(query, query, query, query, query, block_map, 0.1))
    assert sum(heads) == 24
    assert 0 < states[0] + states[1] <= 4 * query.numel()  # h of the key blocks, and their sums


def test_kernels_walk_along_the_lists_of_the_map(device: str) -> None:
    given = []

    class Recorder(numba_cuda.Launcher):
        def start(self, kernel, grid, *args) -> None:
            given.extend(arg.flatten() for arg in args if isinstance(arg, torch.Tensor) and arg.dtype == torch.int32)
            super().start(kernel, grid, *args)

    problem = make(device, query_length=17, key_length=20)
    with numba_cuda.launch_with(Recorder()):
        testing.run_backend(numba_cuda, problem)
    for name in ("kv_num_blocks", "kv_indices", "q_offsets", "q_indices"):
        of_map = getattr(problem.inputs.block_map, name).flatten()
        assert any(torch.equal(of_map, arg) for arg in given), name


# --- the contract's corners ------------------------------------------------------------------------------------------


def test_the_default_blocks(device: str) -> None:
    """With blocks of 64, several thread blocks share a query or a key block, and a key block is several tiles."""
    assert_right(numba_cuda, make(device, query_length=70, key_length=130, block_q=64, block_k=64, labels="critical"))


def test_a_head_dim_that_is_no_multiple_of_the_lanes(device: str) -> None:
    assert_right(numba_cuda, make(device, head_dim=75, query_length=5, key_length=17))


def test_takes_as_many_heads_as_a_grid_has() -> None:
    labels = torch.zeros(1, 65536, 1, 1, dtype=torch.int8)
    query = torch.empty(1, 65536, 1, 8)
    assert "65535" in numba_cuda.unsupported(query, BlockMap(labels, 16, 16, 1, 1))


def test_never_chosen_unless_named(device: str) -> None:
    inputs = make(device).inputs
    assert backends.choose("auto", inputs.query, inputs.block_map).name != "numba"
    assert backends.choose("numba", inputs.query, inputs.block_map) is numba_cuda
