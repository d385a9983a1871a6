"""Which backends there are, why one cannot be used, and that nothing falls back."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sla_ref
from sla_ref import backends, cli, protocol


def make_backend(**parts):
    torch_backend = backends.load("torch")
    names = ("name", "softmax_inside", "unavailable", "unsupported", "forward", "backward")
    return types.SimpleNamespace(**{name: getattr(torch_backend, name) for name in names} | parts)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_told", set())


@pytest.fixture
def calls():
    """The calls of a backend "spy", which is the torch backend under another name."""
    calls = []
    real = backends.load("torch")
    spied = {
        name: lambda *args, name=name: (calls.append(name), getattr(real, name)(*args))[1]
        for name in ("forward", "backward")
    }
    sla_ref.register_backend("spy", make_backend(name="spy", **spied))
    return calls


def call(**arguments):
    x = torch.randn(1, 1, 20, 4)
    return sla_ref.sparse_linear_attention(x, x, x, **arguments)


def test_list_backends_gives_reasons():
    sla_ref.register_backend("broken", make_backend(unavailable=lambda: "it needs a screwdriver"))
    listed = sla_ref.list_backends()
    assert listed["torch"] is None
    assert listed["broken"] == "it needs a screwdriver"
    assert "triton" in listed
    assert backends.is_usable("torch") and not backends.is_usable("broken")


@pytest.mark.parametrize("choose", [sla_ref.set_backend, lambda name: sla_ref.use_backend(name).__enter__()])
def test_unknown_and_unusable_names(choose):
    sla_ref.register_backend("broken", make_backend(unavailable=lambda: "it needs a screwdriver"))
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'torch', 'triton', 'numba', 'broken', got 'nope'"
    ):
        choose("nope")
    with pytest.raises(RuntimeError, match="backend 'broken' cannot be used here: it needs a screwdriver"):
        choose("broken")
    assert sla_ref.get_backend() == "auto"
    with pytest.raises(RuntimeError, match="it needs a screwdriver"):
        call(backend="broken")


def test_a_backend_that_cannot_take_an_input_raises():
    sla_ref.register_backend("picky", make_backend(unsupported=lambda query, block_map: "head_dim is 4, not 5"))
    with pytest.raises(ValueError, match="backend 'picky' cannot take this input: head_dim is 4, not 5"):
        call(backend="picky")


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(
        backends, "_BUILT_IN", {"torch": "sla_ref.backends.pytorch", "numba": "sla_ref.backends.absent"}
    )
    reason = sla_ref.list_backends()["numba"]
    assert "cannot be imported" in reason
    assert "pip install 'sla-ref[numba]'" in reason
    with pytest.raises(RuntimeError, match="pip install"):
        call(backend="numba")


def test_a_backend_whose_packages_do_not_fit_together_says_so(monkeypatch):
    real = backends.load

    def load(name):
        if name == "numba":
            raise AttributeError("module 'numpy' has no attribute 'row_stack'")
        return real(name)

    monkeypatch.setattr(backends, "load", load)
    assert "row_stack" in sla_ref.list_backends()["numba"]
    call(backend="torch")


def test_auto_on_a_cpu_is_torch(monkeypatch):
    used = []
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: used.append(name) or real(name))
    call()
    assert set(used) == {"torch"}


@pytest.mark.parametrize("name", ["", "auto", "torch"])
def test_reserved_names(name):
    with pytest.raises(ValueError, match="name must not be empty and none of"):
        sla_ref.register_backend(name, make_backend())


def test_register_checks_the_protocol():
    with pytest.raises(TypeError, match="a backend must have a function 'backward'"):
        sla_ref.register_backend("half", make_backend(backward=None))
    with pytest.raises(TypeError, match="name must be a string, got int"):
        sla_ref.register_backend(3, make_backend())
    backend = make_backend()
    sla_ref.register_backend("twice", backend)
    sla_ref.register_backend("twice", backend)
    edited = make_backend()
    with pytest.raises(ValueError, match=r"name 'twice' is taken by .*; replace=True takes it over"):
        sla_ref.register_backend("twice", edited)
    sla_ref.register_backend("twice", edited, replace=True)
    assert backends.load("twice") is edited


# --- plug-ins --------------------------------------------------------------------------------------------------------


def install(folder, monkeypatch, **sources):
    """Write an installed package for each name, with a module of this source and its entry point."""
    for name, source in sources.items():
        (folder / f"sla_{name}.py").write_text(source, encoding="utf-8")
        about = folder / f"sla_{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sla-{name}\nVersion: 1.0\n", encoding="utf-8")
        (about / "entry_points.txt").write_text(f"[sla_ref.backends]\n{name} = sla_{name}\n", encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"sla_{name}", raising=False)
    monkeypatch.syspath_prepend(folder)


GOOD = "from sla_ref.backends.pytorch import *\nfrom sla_ref.backends.pytorch import name, softmax_inside\n"


def test_a_plug_in_is_found_and_looked_for_once(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, plugged=GOOD)
    assert sla_ref.list_backends()["plugged"] is None
    looks = []
    monkeypatch.setattr(
        backends, "entry_points", lambda **group: looks.append(group) or importlib.metadata.EntryPoints()
    )
    sla_ref.set_backend("plugged")
    assert sla_ref.get_backend() == "plugged"
    assert call().sparse.shape == (1, 1, 20, 4)
    assert looks == []
    with pytest.raises(ValueError, match=r"backend must be one of .*'plugged', got 'nope'"):
        call(backend="nope")  # it might have been installed since
    assert len(looks) == 1


def test_an_installed_name_is_taken(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, plugged=GOOD)
    mine = make_backend()
    with pytest.raises(ValueError, match="name 'plugged' is taken by an installed package; replace=True takes it over"):
        sla_ref.register_backend("plugged", mine)
    sla_ref.register_backend("plugged", mine, replace=True)
    assert backends.load("plugged") is mine


BROKEN = {
    "raises": ("raise OSError('no driver')", "cannot be imported .OSError: no driver"),
    "leaves": ("import sys; sys.exit(3)", "cannot be imported .SystemExit: 3"),
    "no_parts": ("", "must have a function 'unavailable'"),
    "half": (GOOD + "backward = None", "must have a function 'backward'"),
    "throws": (GOOD + "def unavailable(): return 1 / 0", r"unavailable\(\) raised ZeroDivisionError"),
    "vague": (
        GOOD + "def unavailable(): return False",
        r"unavailable\(\) must return None or a reason, it returned False",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plug_in_spoils_nothing_but_itself(tmp_path, monkeypatch, capsys, name):
    source, reason = BROKEN[name]
    install(tmp_path, monkeypatch, **{name: source})
    listed = sla_ref.list_backends()
    assert listed["torch"] is None
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used here: it.*{reason}"):
        sla_ref.set_backend(name)
    call(backend="torch")
    with pytest.raises(SystemExit) as end:
        cli.main(["backends"])
    assert end.value.code == 0
    assert name in capsys.readouterr().out


# --- what a backend returns ------------------------------------------------------------------------------------------


def make_inputs(dtype=torch.float16, phi=True):
    query, key = torch.randn(1, 2, 20, 4, dtype=dtype), torch.randn(1, 2, 30, 4, dtype=dtype)
    block_map = sla_ref.classify_blocks(query, key, block_q=16, block_k=16)
    return protocol.Inputs(query, key, key, query if phi else None, key if phi else None, block_map, 0.5)


def make_results(inputs):
    """What a forward and a backward return, all zeros."""
    sums = torch.promote_types(inputs.query.dtype, torch.float32)
    saved = protocol.Saved(*[torch.zeros_like(inputs.query)] * 2, torch.zeros(1, 2, 20, dtype=sums))
    phi = [None if each is None else torch.zeros(each.shape, dtype=sums) for each in inputs[3:5]]
    return saved, protocol.Gradients(*map(torch.zeros_like, inputs[:3]), *phi)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("phi", [True, False])
def test_right_results_pass(dtype, phi):
    inputs = make_inputs(dtype, phi)
    saved, gradients = make_results(inputs)
    protocol.check_saved(saved, inputs, make_backend())
    protocol.check_gradients(gradients, inputs, make_backend())


@pytest.mark.parametrize("field", protocol.Saved._fields + protocol.Gradients._fields)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensor: tensor[:, :, 1:],
        lambda tensor: tensor.to(torch.bfloat16),
        lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.tolist(),
        lambda tensor: None,
    ],
    ids=["shape", "dtype", "strides", "device", "list", "none"],
)
def test_a_wrong_result_is_named(field, spoil):
    inputs = make_inputs()
    saved, gradients = make_results(inputs)
    result, check = (saved, protocol.check_saved) if field in saved._fields else (gradients, protocol.check_gradients)
    wrong = result._replace(**{field: spoil(getattr(result, field))})
    with pytest.raises(TypeError, match=rf"backend 'torch': (for|back)ward must return {field} "):
        check(wrong, inputs, make_backend())


def test_a_result_of_the_wrong_type_is_named():
    inputs = make_inputs(phi=False)
    saved, gradients = make_results(inputs)
    with pytest.raises(TypeError, match=r"forward must return a sla_ref\.protocol\.Saved, got tuple"):
        protocol.check_saved(tuple(saved), inputs, make_backend())
    with pytest.raises(TypeError, match=r"backward must return a sla_ref\.protocol\.Gradients, got NoneType"):
        protocol.check_gradients(None, inputs, make_backend())
    with pytest.raises(TypeError, match="backward must return phi_key as None"):  # its gradient is part of key's
        protocol.check_gradients(gradients._replace(phi_key=gradients.key), inputs, make_backend())


# --- what "auto" takes -----------------------------------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda")


def on_cuda(query):
    return query.as_subclass(OnCuda)


@pytest.fixture
def triton(monkeypatch):
    """A Triton that supports only head_dim 8."""
    refuse = "takes head_dim 8, got {}".format
    backend = make_backend(name="triton", unsupported=lambda q, m: None if q.shape[-1] == 8 else refuse(q.shape[-1]))
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "triton" else real(name))
    return backend


def test_auto_tells_once_why_it_takes_torch(triton):
    def choose(head_dim):
        query = torch.randn(1, 1, 20, head_dim)
        block_map = sla_ref.classify_blocks(query, query)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = backends.choose("auto", on_cuda(query), block_map)
        name, reason = sla_ref.which_backend(on_cuda(query), block_map)
        assert name == chosen.name
        assert all(reason in str(each.message) for each in caught)
        return chosen.name, [str(each.message) for each in caught]

    said = "backend 'auto' takes 'torch' for a CUDA tensor, since backend 'triton' cannot"
    assert choose(8) == ("triton", [])
    assert choose(4) == ("torch", [f"{said} take this input: takes head_dim 8, got 4"])
    assert choose(4) == ("torch", [])
    assert choose(5) == ("torch", [f"{said} take this input: takes head_dim 8, got 5"])
    triton.unavailable = lambda: "it needs a screwdriver"
    assert choose(8) == ("torch", [f"{said} be used here: it needs a screwdriver"])


def test_the_warning_does_not_break_a_compiled_graph(triton, monkeypatch):
    real = backends.choose
    monkeypatch.setattr(backends, "choose", lambda name, query, block_map: real(name, on_cuda(query), block_map))
    compiled = torch.compile(sla_ref.sparse_linear_attention, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="takes head_dim 8, got 4"):
        compiled(*torch.randn(3, 1, 1, 20, 4))


def test_which_backend():
    query = torch.randn(1, 1, 20, 4)
    block_map = sla_ref.classify_blocks(query, query)
    assert sla_ref.which_backend(query, block_map) == (
        "torch",
        "query is on cpu, and 'auto' takes 'triton' only for CUDA tensors",
    )
    sla_ref.register_backend("picky", make_backend(unsupported=lambda query, block_map: "head_dim is 4, not 5"))
    with sla_ref.use_backend("torch"):
        assert sla_ref.which_backend(query, block_map) == ("torch", None)
    with sla_ref.use_backend("picky"), pytest.raises(ValueError, match="head_dim is 4, not 5"):
        sla_ref.which_backend(query, block_map)
    with pytest.raises(ValueError, match=r"for \(batch, heads, Nq\) = \(1, 1, 9\), got one for \(1, 1, 20\)"):
        sla_ref.which_backend(query[:, :, :9], block_map)


# --- use_backend: threads, tasks, the second forward of checkpointing ------------------------------------------------


def test_threads_do_not_see_each_others_backend(calls):
    together = threading.Barrier(4, timeout=60)

    def worker(number):
        name = ("torch", "spy")[number % 2]
        for _ in range(20):
            with sla_ref.use_backend(name):
                together.wait()
                assert sla_ref.get_backend() == name
                together.wait()
            assert sla_ref.get_backend() == "auto"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(worker, range(4)))


def test_scopes_that_end_in_any_order_leave_nothing_behind(calls):
    async def task(name, begin, end):
        await asyncio.sleep(begin)
        with sla_ref.use_backend(name):
            await asyncio.sleep(end - begin)

    async def main():
        await asyncio.gather(task("torch", 0, 0.02), task("spy", 0.01, 0.03))

    asyncio.run(main())
    assert sla_ref.get_backend() == "auto"
    scopes = {number: sla_ref.use_backend(name) for number, name in enumerate(["torch", "spy", "torch"])}
    for scope in scopes.values():
        scope.__enter__()
    for number, left in ((2, "spy"), (0, "spy"), (1, "auto")):
        scopes[number].__exit__(None, None, None)
        assert sla_ref.get_backend() == left


def test_a_scope_that_ends_in_another_thread_leaves_nothing_behind():
    scope = sla_ref.use_backend("torch")
    scope.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(scope.__exit__, None, None, None).result()
        assert pool.submit(sla_ref.get_backend).result() == "auto"
    assert sla_ref.get_backend() == "auto"


def make_leaves():
    return [each.requires_grad_() for each in torch.randn(3, 1, 1, 20, 4)]


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


@pytest.mark.parametrize("take", [sla_ref.set_backend, lambda name: sla_ref.use_backend(name).__enter__()])
def test_whoever_sets_a_backend_teaches_checkpointing(take, monkeypatch):
    """Nothing may have been set before."""
    taught = []
    monkeypatch.setattr(backends, "_teach_checkpointing", lambda: taught.append(True))
    monkeypatch.setattr(backends._thread, "scopes", backends._Scopes())
    take("torch")
    assert taught == [True]


@pytest.mark.parametrize(("use_reentrant", "compiled"), [(False, False), (True, False), (False, True)])
def test_checkpointing_keeps_the_backend(calls, use_reentrant, compiled):
    """The forward runs again in the backward pass, where another backend may be in force."""
    layer = sla_ref.SparseLinearAttention(4, block_q=16, block_k=16)
    if compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def forward():
        return checkpoint(layer, *make_leaves(), use_reentrant=use_reentrant)

    for run in (lambda backward: backward(), in_another_thread):
        with sla_ref.use_backend("spy"):
            out = forward()
        run(out.sum().backward)
        with sla_ref.use_backend("spy"):
            out = forward()
            run(out.sum().backward)
        sla_ref.set_backend("spy")
        out = forward()
        sla_ref.reset_backend()
        run(out.sum().backward)
        assert calls == ["forward", "forward", "backward"] * 3
        calls.clear()
        with sla_ref.use_backend("spy"), nullcontext(sla_ref.set_backend("torch")), sla_ref.use_backend("torch"):
            out = forward()
        sla_ref.reset_backend()
        with sla_ref.use_backend("spy"):
            run(out.sum().backward)
        assert calls == []
        assert sla_ref.get_backend() == "auto"


def test_a_backend_named_inside_a_checkpointed_function_stays(calls):
    def function(*tensors):
        with sla_ref.use_backend("spy"):
            return sla_ref.sparse_linear_attention(*tensors).sparse

    out = checkpoint(function, *make_leaves(), use_reentrant=False)
    with sla_ref.use_backend("torch"):
        out.sum().backward()
    assert calls == ["forward", "forward", "backward"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, encoding="utf-8"
    )


def test_environment_variable():
    code = "import sla_ref; print(sla_ref.get_backend()); sla_ref.set_backend('auto'); print(sla_ref.get_backend())"
    assert run_python(code, SLA_REF_BACKEND="torch").stdout.split() == ["torch", "auto"]
    assert run_python(code, SLA_REF_BACKEND="").stdout.split() == ["auto", "auto"]


def test_a_wrong_environment_variable_is_named():
    code = "import sla_ref, torch; x = torch.ones(1, 1, 4, 4); sla_ref.sparse_linear_attention(x, x, x)"
    run = run_python(code, SLA_REF_BACKEND="trition")
    assert run.returncode != 0
    assert "got 'trition' (from SLA_REF_BACKEND)" in run.stderr
