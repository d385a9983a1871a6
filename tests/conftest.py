"""`pytest` tries every backend that this machine can run; `pytest --backend=triton` the tests of one alone.

Without a GPU, Triton runs in its interpreter and Numba in its simulator: same kernels, no hardware. The header of the
run says which it is.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported, so before anything imports it
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # the same for numba

from sla_ref import backends  # noqa: E402

torch.set_num_threads(1)  # test processes side by side share the cores; spinning threads would fight for them

BACKENDS = tuple(backends.list_backends())
WITHOUT_GPU = {"triton": "in its interpreter, on the CPU", "numba": "in its simulator, on the CPU"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", choices=(*BACKENDS, "all"), help="run the tests of this backend alone (all: of every backend)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backend(name): the test is about this backend")
    asked = config.getoption("--backend")
    if asked not in (None, "all") and (reason := backends.list_backends()[asked]) is not None:
        raise pytest.UsageError(f"--backend={asked}: {reason}")


def pytest_report_header() -> list[str]:
    lines = []
    for name, reason in backends.list_backends().items():
        on = WITHOUT_GPU.get(name, "on cpu") if DEVICE == "cpu" else f"on {DEVICE}"
        lines.append(f"backend {name}: {on if reason is None else f'not tested, {reason}'}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        usable = [name for name, reason in backends.list_backends().items() if reason is None]
        marked = [pytest.param(name, marks=pytest.mark.backend(name)) for name in usable]
        metafunc.parametrize("backend_name", marked)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--backend")
    if asked is None:
        return
    names = {item: {mark.args[0] for mark in item.iter_markers("backend")} for item in items}
    chosen = [item for item in items if (names[item] if asked == "all" else asked in names[item])]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _default_backend():
    """No test leaves a backend set for the next."""
    yield
    backends.reset_backend()
