"""torch.compile, torch.export and CUDA graphs: each sees one operator, and nothing in it waits for the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from needs import need_program
from torch.export import Dim, export
from torch.utils import _pytree as pytree

import sla_ref

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {"critical_ratio": 0.3, "negligible_ratio": 0.3, "block_q": 8, "block_k": 8}
# With 15 or 16 key blocks and the default ratios, one block is negligible and one is critical: inductor treats a class
# of one block differently.
SIZES = list(itertools.product((1000, 1024, 8192), (64, 128)))


def tokens(length: int = 30, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(length: int = 30) -> tuple[torch.Tensor, ...]:
    return tuple(tokens(length, seed=seed).requires_grad_() for seed in range(3))


def on_gpu(length: int, dim: int) -> tuple[torch.Tensor, ...]:
    return tuple(tokens(length, dim, seed).to("cuda", torch.bfloat16).requires_grad_() for seed in range(3))


def layer_for(dim: int, device: str = "cpu", **settings) -> sla_ref.SparseLinearAttention:
    layer = sla_ref.SparseLinearAttention(dim, **settings).to(device)
    torch.nn.init.normal_(layer.proj_l.weight, std=0.1)
    return layer


def assert_same(function, expected_function, inputs, wanted=None, **tolerance) -> None:
    """Outputs, and gradients with respect to `wanted`, by default the inputs."""
    out, expected = function(*inputs), expected_function(*inputs)
    torch.testing.assert_close(out, expected, **tolerance)
    grads = (torch.autograd.grad(o.float().square().sum(), wanted or inputs) for o in (out, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def both_branches(*inputs: torch.Tensor, **arguments) -> torch.Tensor:
    out = sla_ref.sparse_linear_attention(*inputs, **arguments)
    return out.sparse + out.linear + out.lse[..., None].clamp(min=-5)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def test_fullgraph_forward_and_backward_with_dynamic_lengths():
    def function(*inputs):
        return both_branches(*inputs, **SMALL)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (30, 64, 47):
        assert_same(compiled, function, qkv(length))


@pytest.mark.parametrize("inference", [False, True], ids=["", "made in inference mode"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_map_built_by_hand(where, inference):
    """Its values cannot be read if the compiled function builds it: C is then Tk, and the result the same."""
    with torch.inference_mode(inference):
        labels = torch.randint(-1, 2, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        outside = sla_ref.BlockMap(labels, 8, 8, 30, 30)
    labels = outside.labels

    def function(*inputs):
        block_map = outside if where == "outside" else sla_ref.BlockMap(labels, 8, 8, 30, 30)
        return both_branches(*inputs, block_map=block_map)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled, lambda *inputs: both_branches(*inputs, block_map=outside), qkv())


def test_a_feature_map_that_works_in_place_changes_nothing():
    """Eager code refuses it; compiled, it gets tokens of its own."""
    compiled = torch.compile(
        lambda *inputs: both_branches(*inputs, feature_map=torch.nn.ReLU(inplace=True), **SMALL),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_same(compiled, lambda *inputs: both_branches(*inputs, feature_map="relu", **SMALL), qkv())


def test_a_frozen_layer():
    """Without a tensor to differentiate, the compiler counts the names that an autograd function has for its inputs."""
    layer = layer_for(4, **SMALL).double().requires_grad_(False)
    inputs = [tokens(seed=seed) for seed in range(3)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_on_a_cpu():
    """Four key blocks, one of them critical and one negligible."""
    need_program("inductor", "g++")
    layer = layer_for(16, **SMALL)
    inputs = tuple(torch.randn(1, 2, 30, 16, requires_grad=True) for _ in range(3))
    assert_same(torch.compile(layer, fullgraph=True), layer, inputs, atol=1e-5, rtol=1e-5)


@needs_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("length", "dim"), SIZES)
def test_inductor_on_a_gpu(length, dim, mode):
    layer, inputs = layer_for(dim, "cuda"), on_gpu(length, dim)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):  # reduce-overhead warms up, then records, then replays
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(
            lambda *x: compiled(*x).clone(), layer, inputs, (*inputs, *layer.parameters()), atol=2e-2, rtol=2e-2
        )


# --- CUDA graphs -----------------------------------------------------------------------------------------------------

# torch warns of it for every leaf, since a graph is captured on a stream of its own.
other_streams = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")


@needs_gpu
@other_streams
@pytest.mark.parametrize(("length", "dim"), SIZES)
def test_graphed_callables(length, dim):
    layer, inputs = layer_for(dim, "cuda"), on_gpu(length, dim)
    samples = tuple(torch.zeros_like(each, requires_grad=True) for each in inputs)
    graphed = torch.cuda.make_graphed_callables(layer_for(dim, "cuda"), samples)
    graphed.load_state_dict(layer.state_dict())
    assert_same(lambda *x: graphed(*x).clone(), layer, inputs, atol=0, rtol=0)


@needs_gpu
@other_streams
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("backend", ["triton"])
def test_a_map_built_by_hand_in_a_cuda_graph(backend, where):
    """Rows differ in their number of critical blocks. Built while the graph is captured, the map is not read at all."""
    inputs = on_gpu(1000, 64)
    labels = torch.randint(-1, 2, (1, 2, 16, 16), generator=torch.Generator().manual_seed(0)).to("cuda", torch.int8)
    outside = sla_ref.BlockMap(labels, 64, 64, 1000, 1000)

    def run(block_map: sla_ref.BlockMap) -> list[torch.Tensor]:
        out = both_branches(*inputs, block_map=block_map, backend=backend)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(outside)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(outside if where == "outside" else sla_ref.BlockMap(labels, 64, 64, 1000, 1000))
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    graph.replay()
    assert all(map(torch.equal, captured, run(outside)))


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_with_a_dynamic_number_of_tokens(strict):
    """Exported with a whole number of blocks, it is right at every other length of more than one block."""
    layer = layer_for(16, **SMALL)
    given = tuple(torch.randn(3, 1, 2, 64, 16))
    shapes = {name: {2: Dim("n", min=9, max=4096)} for name in ("query", "key", "value")}
    program = export(layer, given, dynamic_shapes=shapes, strict=strict).module()
    for length in (64, 9, 61, 200):
        inputs = tuple(torch.randn(3, 1, 2, length, 16))
        torch.testing.assert_close(program(*inputs), layer(*inputs))


def test_export_takes_a_map():
    layer, inputs = layer_for(16), tuple(torch.randn(3, 1, 2, 30, 16))
    block_map = sla_ref.classify_blocks(*inputs[:2], 0.3, 0.3, block_q=8, block_k=8)
    program = export(layer, inputs, {"block_map": block_map}).module()
    spec = pytree.tree_structure(block_map)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec, "as torch.export.save keeps it"
    torch.testing.assert_close(program(*inputs, block_map=block_map), layer(*inputs, block_map=block_map))
