"""Which backends there are, why one cannot be used, and that nothing falls back."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

import sla_ref
from sla_ref import backends


def make_backend(**parts):
    torch_backend = backends.load("torch")
    names = ("name", "unavailable", "unsupported", "forward", "backward")
    return types.SimpleNamespace(**{name: getattr(torch_backend, name) for name in names} | parts)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})


def call(**arguments):
    x = torch.randn(1, 1, 20, 4)
    return sla_ref.sparse_linear_attention(x, x, x, **arguments)


def test_list_backends_gives_reasons():
    sla_ref.register_backend("broken", make_backend(unavailable=lambda: "it needs a screwdriver"))
    listed = sla_ref.list_backends()
    assert listed["torch"] is None
    assert listed["broken"] == "it needs a screwdriver"
    assert "triton" in listed


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
    with pytest.raises(TypeError, match="module must have a function 'backward'"):
        sla_ref.register_backend("half", make_backend(backward=None))
    with pytest.raises(TypeError, match="name must be a string, got int"):
        sla_ref.register_backend(3, make_backend())
    backend = make_backend()
    sla_ref.register_backend("twice", backend)
    sla_ref.register_backend("twice", backend)
    with pytest.raises(ValueError, match="name 'twice' is taken"):
        sla_ref.register_backend("twice", make_backend())


def test_entry_points(monkeypatch):
    plug_in = make_backend()
    point = types.SimpleNamespace(name="plugged", load=lambda: plug_in)
    monkeypatch.setattr(backends, "entry_points", lambda group: [point] if group == "sla_ref.backends" else [])
    assert sla_ref.list_backends()["plugged"] is None
    sla_ref.set_backend("plugged")
    assert sla_ref.get_backend() == "plugged"
    assert call().sparse.shape == (1, 1, 20, 4)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
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
