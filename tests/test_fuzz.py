"""Whatever comes in, the right result or an error in words comes out: arguments, problems, files, command lines.

Each test tries a few examples, and thousands with --long. They are the same ones every time and everywhere.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
import torch.nn.functional as F
from hostile import (
    VALUES,
    Argument,
    Call,
    device,
    flag,
    function_or,
    of_type,
    one_of,
    optional,
    path,
    ratio,
    scale,
    size,
    tensor,
    text,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sla_ref
from sla_ref import analysis, backends, sla2, testing
from sla_ref.checks import FLOATS
from sla_ref.feature_maps import Softmax
from sla_ref.integrations import checkpoints, sdpa, thu_ml, ulysses
from sla_ref.lab import evaluate, flow, weights
from sla_ref.lab.arms import ARMS
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.data import MovingDigits
from sla_ref.lab.model import ModelConfig, VideoTransformer, with_attention
from sla_ref.lab.train import flow_loss, train

TIMES = 50  # as many examples with --long
SCALES = pytest.mark.parametrize(
    "times", [pytest.param(1, id="few"), pytest.param(TIMES, id="thousands", marks=pytest.mark.long)]
)


def try_examples(number: int, check: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    settings(max_examples=number)(given(**strategies)(check))()


# --- arguments -------------------------------------------------------------------------------------------------------

Q, K, V = torch.randn(3, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
BLOCKS = {"block_q": size(8), "block_k": size(8)}
RATIOS = {"critical_ratio": ratio(0.3), "negligible_ratio": ratio(0.3, zero=True)}
QUERY_KEY = {"query": tokens(Q), "key": tokens(K)}
TENSORS = QUERY_KEY | {"value": tokens(V)}
OPTIONS = {"critical_ratio": 0.3, "block_q": 8, "block_k": 8}
MAP = sla_ref.classify_blocks(Q, K, 0.3, 0.3, block_q=8, block_k=8)
BLOCK_MAP = of_type(MAP)
FEATURE_MAP = function_or("softmax", "elu", "relu")
LAYERS_FEATURE_MAP = function_or("softmax", "elu", "relu", "hedgehog")
ROUTER = function_or("pooled", "learned")
BACKEND = one_of("torch", "auto", "triton", "numba", called="backend")
PROTECTED = optional(
    Argument(
        slice(0, 3),
        lambda value: isinstance(value, slice) or (isinstance(value, Tensor) and value.dtype == torch.bool),
    )
)
HEADS = optional(of_type(slice(0, 2)))
DTYPES = Argument((torch.float32,), lambda value: isinstance(value, (tuple, list)) and value and value[0] in FLOATS)


def layer(**options: Any) -> sla_ref.SparseLinearAttention:
    return sla_ref.SparseLinearAttention(8, **OPTIONS, **options)


def layer2(alpha: str) -> sla_ref.SLA2Attention:
    return sla_ref.SLA2Attention(8, 2, alpha=alpha, **OPTIONS)


def set_backend(name: str) -> None:
    try:
        sla_ref.set_backend(name)
    finally:
        sla_ref.reset_backend()


def use_backend(name: str) -> None:
    with sla_ref.use_backend(name):
        pass


def register_backend(**arguments: Any) -> None:
    before = dict(backends._registered)
    try:
        sla_ref.register_backend(**arguments)
    finally:
        backends._registered.clear()
        backends._registered.update(before)


def of_the_public_names() -> list[Call]:
    cube = Argument(
        (2, 2, 2), lambda value: isinstance(value, tuple) and len(value) == 3 and all(map(hostile.is_int, value))
    )
    lengths = {"query_length": size(20, called="labels"), "key_length": size(20, called="labels")}
    classes = {"labels": tensor(MAP.labels, [torch.int8], 4), **BLOCKS, **lengths}
    sizes = {"head_dim": size(8), "critical_ratio": ratio(0.3), **BLOCKS}
    both = {"feature_map": LAYERS_FEATURE_MAP, "router": ROUTER, "backend": optional(BACKEND)}
    soft = {"tau": optional(scale(0.5)), "scale": optional(scale(0.5)), "heads": HEADS}
    a_module = Argument(backends.load("torch"), lambda value: False, "backend")
    return [
        Call(
            "sparse_linear_attention",
            sla_ref.sparse_linear_attention,
            TENSORS
            | {name: optional(argument) for name, argument in (RATIOS | BLOCKS).items()}
            | {"feature_map": FEATURE_MAP, "scale": optional(scale(0.5)), "backend": optional(BACKEND)},
        ),
        Call("... with a map", sla_ref.sparse_linear_attention, TENSORS | {"block_map": optional(BLOCK_MAP)}),
        Call("classify_blocks", sla_ref.classify_blocks, QUERY_KEY | RATIOS | BLOCKS),
        Call("block_scores", sla_ref.block_scores, QUERY_KEY | BLOCKS),
        Call(
            "sub_block_scores",
            sla_ref.sub_block_scores,
            QUERY_KEY | BLOCKS | {"parts_q": size(4), "parts_k": size(4)},
        ),
        Call("BlockMap", sla_ref.BlockMap, classes | {"num_critical": optional(size(1, least=0))}),
        Call("BlockMap.to", MAP.to, {"device": device()}),
        Call(
            "SparseLinearAttention",
            sla_ref.SparseLinearAttention,
            sizes | both | {"negligible_ratio": ratio(0.3, zero=True), "proj_init": one_of("zero", "identity")},
        ),
        Call("its forward", layer(), TENSORS | {"block_map": optional(BLOCK_MAP), "scale": optional(scale(0.5))}),
        Call("its classify", layer().classify, QUERY_KEY),
        Call(
            "SLA2Attention",
            sla_ref.SLA2Attention,
            sizes
            | both
            | {"heads": size(2), "alpha": one_of("block", *sla2.ALPHAS), "query_length": optional(size(20))}
            | {"proj": flag(True)},
        ),
        *(
            Call(f"its forward, {alpha}", layer2(alpha), TENSORS | {"block_map": optional(BLOCK_MAP), "heads": HEADS})
            for alpha in ("head", "token", "block_means", "ideal")
        ),
        Call("its forward, soft", layer2("head"), TENSORS | soft),
        Call("Hedgehog", sla_ref.Hedgehog, {"head_dim": size(8)}),
        Call("its forward on tokens", sla_ref.Hedgehog(8), {"tokens": tensor(Q)}),
        Call("Softmax", Softmax, {"temperature": scale(2.0)}),
        Call("LearnedScores", sla_ref.LearnedScores, {"head_dim": size(8)}),
        Call("its scores", sla_ref.LearnedScores(8), QUERY_KEY | BLOCKS),
        Call(
            "Router",
            sla_ref.Router,
            {"scores": function_or(sla_ref.block_scores), "top_p": optional(ratio(0.5))}
            | {"protected_queries": PROTECTED, "protected_keys": PROTECTED},
        ),
        Call("its choice", sla_ref.Router(), QUERY_KEY | RATIOS | BLOCKS),
        Call("its choice, top_p", sla_ref.Router(sla_ref.sub_block_scores, top_p=0.5), QUERY_KEY | RATIOS | BLOCKS),
        Call(
            "its soft choice",
            sla_ref.Router().soft,
            QUERY_KEY | BLOCKS | {"critical_ratio": ratio(0.3), "tau": scale(0.1)},
        ),
        Call(
            "protect",
            sla_ref.protect,
            {"block_map": BLOCK_MAP, "protected_queries": PROTECTED, "protected_keys": PROTECTED},
        ),
        Call("cube_order", sla_ref.cube_order, {"frames": size(2), "height": size(4), "width": size(4), "cube": cube}),
        Call("set_backend", set_backend, {"name": BACKEND}),
        Call("use_backend", use_backend, {"name": BACKEND}),
        Call("which_backend", sla_ref.which_backend, {"query": tokens(Q), "block_map": BLOCK_MAP}),
        Call("register_backend", register_backend, {"name": text("mine"), "module": a_module, "replace": flag(False)}),
    ]


def of_testing_and_analysis() -> list[Call]:
    maps = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mass = maps[..., :4, :4]
    labels = tensor((mass > 0.05).to(torch.int8), [torch.int8])
    lengths = {name: size(20) for name in ("query_length", "key_length")}
    how = {"device": optional(device()), "dtypes": DTYPES, "quick": flag(True)}
    plain = sla_ref.reference.sparse_linear_attention
    return [
        Call(
            "make_problem",
            testing.make_problem,
            {"batch": size(1), "heads": size(2), "query_length": size(20), "key_length": optional(size(18))}
            | {"head_dim": size(8), **BLOCKS, **RATIOS, "labels": one_of("random", "classified", *testing.CLASSES)}
            | {"feature_map": one_of("softmax", "elu", "relu"), "spread": scale(1.0), "equal_keys": flag(False)}
            | {"dtype": Argument(torch.float32, lambda value: isinstance(value, torch.dtype) and value in FLOATS)}
            | {"device": device(), "seed": size(0, least=0, most=2**64 - 1)},
        ),
        Call("check_backend", testing.check_backend, {"backend": one_of("torch", "triton", "numba"), **how}),
        Call("check_function", testing.check_function, {"function": function_or(plain), **how, "device": device()}),
        Call(
            "attention_weights",
            analysis.attention_weights,
            {"query": tensor(Q), "key": tensor(K), "scale": optional(scale(0.5))},
        ),
        Call("weight_bands", analysis.weight_bands, {"weights": tensor(maps)}),
        Call("split_top", analysis.split_top, {"weights": tensor(maps), "share": ratio(0.3, zero=True)}),
        Call("stable_rank", analysis.stable_rank, {"matrix": tensor(maps), "iterations": optional(size(2))}),
        Call("relative_l1", analysis.relative_l1, {"approximation": tensor(maps), "exact": tensor(maps)}),
        Call(
            "error_of_keeping",
            analysis.error_of_keeping,
            {"kept": tensor(maps > 0.05, [torch.bool]), "weights": tensor(maps), "value": tensor(maps[..., :8])},
        ),
        Call("block_mass", analysis.block_mass, {"weights": tensor(maps), **BLOCKS}),
        Call("oracle_labels", analysis.oracle_labels, {"mass": tensor(mass), "labels": labels}),
        Call("critical_recall", analysis.critical_recall, {"labels": labels, "oracle": labels}),
        Call("class_mass", analysis.class_mass, {"mass": tensor(mass), "labels": labels}),
        Call(
            "attention_flops",
            analysis.attention_flops,
            {**lengths, "head_dim": size(8), "critical_share": ratio(0.5, zero=True), "linear": flag(True)},
        ),
    ]


class CallsSdpa(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)


def replace_sdpa(module: Any, layer: Any) -> None:
    """A module takes one layer, once."""
    sdpa.replace_sdpa(*(copy.copy(each) if isinstance(each, nn.Module) else each for each in (module, layer)))


def of_the_integrations(folder: Path) -> list[Call]:
    model, replaced, number = nn.Sequential(layer()), CallsSdpa(), itertools.count()
    sdpa.replace_sdpa(replaced, layer())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoints.save_sla(model, saved := folder / "saved.safetensors")

    def save(model: Any, path: Any) -> None:
        checkpoints.save_sla(model, folder / str(next(number)) if path is saved else path)

    never = Argument(False, lambda value: value is False)
    zero = Argument(0.0, lambda value: isinstance(value, (int, float)) and not value)
    mask = tensor(torch.ones(1, 1, 1, 20, dtype=torch.bool), [torch.bool], 4)
    with_layer = {"model": of_type(model, nn.Module)}
    return [
        Call(
            "thu_ml.SparseLinearAttention",
            thu_ml.SparseLinearAttention,
            {"head_dim": size(8), "topk": ratio(0.3), "feature_map": FEATURE_MAP, "BLKQ": size(8), "BLKK": size(8)}
            | {"use_bf16": flag(True), "variant": one_of(*thu_ml.VARIANTS), "backend": optional(BACKEND)},
        ),
        Call(
            "its forward",
            thu_ml.SparseLinearAttention(8, 0.3, BLKQ=8, BLKK=8),
            {"q": tokens(Q), "k": tensor(K, dims=4, called="key"), "v": tensor(V, dims=4, called="value")}
            | {"return_sparsity": flag(False)},
        ),
        Call("replace_sdpa", replace_sdpa, {"module": of_type(CallsSdpa(), nn.Module), "layer": of_type(layer())}),
        Call("restore_sdpa", lambda module: sdpa.restore_sdpa(module), {"module": of_type(copy.copy(replaced))}),
        Call(
            "what replaced sdpa",
            replaced,
            TENSORS
            | {"attn_mask": optional(mask), "scale": optional(scale(0.5))}
            | {"dropout_p": zero, "is_causal": never, "enable_gqa": never},
        ),
        Call("sla_layers", checkpoints.sla_layers, with_layer),
        Call("sla_parameters", checkpoints.sla_parameters, with_layer),
        Call("save_sla", save, with_layer | {"path": path(saved)}),
        Call("load_sla", checkpoints.load_sla, with_layer | {"path": path(saved)}),
        Call("load_sla_state_dict", checkpoints.load_sla_state_dict, with_layer | {"state_dict": of_type(state)}),
        Call("split_sla_state_dict", checkpoints.split_sla_state_dict, {"state_dict": of_type(state)}),
        Call("read_checkpoint", checkpoints.read_checkpoint, {"path": path(saved), "match": text("proj_l")}),
        Call(
            "own_heads",
            lambda group: ulysses.own_heads(2, group),
            {"group": Argument(None, lambda value: value is None)},
        ),
    ]


def of_the_lab(folder: Path) -> list[Call]:
    config = ModelConfig(frames=2, size=16, width=32, depth=1, heads=2, block=8)
    model, number = VideoTransformer(config), itertools.count()
    weights.save_weights(saved := folder / "weights.safetensors", model, {})
    data, one_step = evaluate.held_out(model, 2), TrainConfig(steps=1, batch=2)

    def save(path: Any, model: Any, card: Any) -> None:
        weights.save_weights(folder / f"w{next(number)}" if path is saved else path, model, card)

    def train_once(model: Any, config: Any, out: Any, **options: Any) -> None:
        own = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        train(own, config, folder / f"run{next(number)}" if out is folder else out, **options)

    a_model = {"model": of_type(model)}
    return [
        Call(
            "TrainConfig",
            TrainConfig,
            {"steps": size(2), "batch": size(2), "learning_rate": scale(0.1), "weight_decay": scale(0.1, zero=True)}
            | {
                "warmup": ratio(0.1, zero=True),
                "clip_norm": scale(1.0, zero=True),
                "seed": size(0, least=0, most=2**64),
            }
            | {"precision": one_of("float32", "bfloat16"), "graph": flag(False)}
            | {name: flag(False) for name in ("compile", "fsdp", "resume")},
        ),
        Call(
            "ModelConfig",
            ModelConfig,
            {
                "frames": size(2),
                "size": size(16),
                "width": size(32),
                "depth": size(1),
                "heads": size(2),
                "block": size(8),
            }
            | {name: ratio(0.5, zero=True) for name in ("critical_ratio", "negligible_ratio", "backdrop")}
            | {"attention": text("sla2"), "alpha": optional(text("token")), "router": optional(text("pooled"))},
        ),
        Call(
            "MovingDigits",
            MovingDigits,
            {
                "split": one_of("train", "held_out"),
                "seed": size(0, least=0, most=2**64),
                "backdrop": ratio(0.5, zero=True),
            }
            | {"size": size(16), "frames": size(2)},
        ),
        Call("its batch", MovingDigits("train", 0, size=16, frames=2).batch, {"count": size(2), "device": device()}),
        Call("held_out", evaluate.held_out, a_model | {"clips": size(2)}),
        Call("predict", evaluate.predict, a_model | {"data": of_type(data), "batch": size(2)}),
        Call("attention_cost", evaluate.attention_cost, {"config": of_type(config)}),
        Call("VideoTransformer", VideoTransformer, {"config": of_type(config)}),
        Call(
            "sample",
            flow.sample,
            a_model
            | {"noise": tensor(data.x, called="x"), "labels": tensor(data.labels, [torch.int64]), "steps": size(2)},
        ),
        Call(
            "with_attention",
            with_attention,
            a_model | {"attention": one_of("sla", *ARMS), "critical_ratio": ratio(0.3)},
        ),
        Call("save_weights", save, a_model | {"path": path(saved), "card": Argument({}, lambda value: True)}),
        Call("load_weights", weights.load_weights, {"path": path(saved), "device": device()}),
        Call(
            "train",
            train_once,
            a_model
            | {"config": of_type(one_step), "out": optional(path(folder)), "objective": function_or(flow_loss)}
            | {"tick": function_or(lambda step, loss: None), "log_every": size(50), "save_every": size(500)}
            | {name: optional(of_type({})) for name in ("about", "rates")},
        ),
    ]


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[Call]:
    folder = tmp_path_factory.mktemp("calls")
    found = [*of_the_public_names(), *of_testing_and_analysis(), *of_the_integrations(folder), *of_the_lab(folder)]
    assert {call.name for call in found} >= {name for name in sla_ref.__all__ if callable(getattr(sla_ref, name))} - {
        "SLAOutput",  # what comes out
        "get_backend",
        "list_backends",
        "reset_backend",  # these take nothing
    }
    return found


@SCALES
def test_arguments_are_taken_or_refused_by_name(calls, times, tmp_path, monkeypatch):
    """One to three arguments at a time."""
    monkeypatch.chdir(tmp_path)  # some strings are names of files

    def check(data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(calls))
        names = data.draw(st.sets(st.sampled_from([*call.arguments]), min_size=1, max_size=3))
        call.check({name: data.draw(st.sampled_from(VALUES)) for name in sorted(names)})

    try_examples(400 * times, check, data=st.data())


@pytest.mark.long
def test_every_value_of_every_argument_is_taken_or_refused_by_name(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults = []
    for call in calls:
        for name, value in itertools.product(call.arguments, VALUES):
            try:
                call.check({name: value})
            except AssertionError as error:
                faults.append(f"{error} ({error.__cause__!r})"[:300])
    assert not faults, "\n".join(faults)
