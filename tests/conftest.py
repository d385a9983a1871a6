"""`pytest` tries every backend that this machine can run; `pytest --backend=triton` tries only that one.

Without a GPU, Triton runs in its interpreter and Numba in its simulator: same kernels, no hardware. The header of the
run says which it is. `pytest --shuffle=1` runs the tests in another order (2, 3, ...: in yet another).
`pytest --long` runs those as well that take long and vary what another test checks: more targets, sizes or starts.
`pytest --evidence=FOLDER` runs those that docs/guarantees.md names, and records what they see (evidence.py).

What a test sees does not depend on where it runs: not on the variables that decide how programs print, not on the
tests before it.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

# Programs print plain text, 80 columns wide; some read these variables when they are imported.
OF_THE_TERMINAL = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS")
OF_THE_TERMINAL += ("TTY_COMPATIBLE", "TTY_INTERACTIVE")
for name in (*OF_THE_TERMINAL, "SLA_REF_BACKEND", "TORCHELASTIC_RUN_ID"):
    os.environ.pop(name, None)

# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernels for a CPU without AVX-512 have to be chosen for ATen and oneDNN alike. If only ATen's are, attention in
# bfloat16 asks oneDNN what the CPU can do, goes that way and fails.
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    # Inductor would take code from its cache that it made for the CPU's own capability.
    own = f"torchinductor_{os.environ['ATEN_CPU_CAPABILITY']}_{os.getuid()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), own))

# Test processes share out the GPUs. CUDA reads the variable once, when something first looks at the devices.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    gpus = every if given is None else given.split(",")
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported, so before anything imports it
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # the same for numba

import evidence  # noqa: E402
from simulators import let_numba_wait_at_barriers, patch_triton_once_a_launch  # noqa: E402

from sla_ref import backends  # noqa: E402

# One thread, unless asked: test processes side by side share the cores, and spinning threads would fight for them.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

# The same examples everywhere, whatever failed in this folder before, and however long a busy machine takes.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=slow
)
hypothesis.settings.load_profile("fixed")

BACKENDS = tuple(backends.list_backends())
USABLE = [name for name, reason in backends.list_backends().items() if reason is None]
if DEVICE == "cpu" and "triton" in USABLE:
    patch_triton_once_a_launch()
if DEVICE == "cpu" and "numba" in USABLE:
    let_numba_wait_at_barriers()
WITHOUT_GPU = {"triton": "in its interpreter, on the CPU", "numba": "in its simulator, on the CPU"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", choices=(*BACKENDS, "all"), help="run only the tests of this backend (all: of every backend)"
    )
    parser.addoption("--long", action="store_true", help="run the tests marked as long, too")
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run the files, and the tests of each file, in another order"
    )
    parser.addoption(
        "--evidence", metavar="FOLDER", help="run the tests that docs/guarantees.md names, and record what they see"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backend(name): the test is about this backend")
    config.addinivalue_line("markers", "long: the test runs with --long only")
    asked = config.getoption("--backend")
    if asked not in (None, "all") and (reason := backends.list_backends()[asked]) is not None:
        raise pytest.UsageError(f"--backend={asked}: {reason}")
    if (folder := config.getoption("--evidence")) is not None:
        config.pluginmanager.register(evidence.Recorder(Path(folder)))


def pytest_report_header() -> list[str]:
    lines = []
    for name, reason in backends.list_backends().items():
        on = WITHOUT_GPU.get(name, "on cpu") if DEVICE == "cpu" else f"on {DEVICE}"
        lines.append(f"backend {name}: {on if reason is None else f'not tested, {reason}'}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        marked = [pytest.param(name, marks=pytest.mark.backend(name)) for name in USABLE]
        metafunc.parametrize("backend_name", marked)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:
        random.Random(seed).shuffle(items)
        first = {item.path: place for place, item in reversed(list(enumerate(items)))}
        items.sort(key=lambda item: first[item.path])  # what the tests of a file share is made once
    chosen = [item for item in items if config.getoption("--long") or item.get_closest_marker("long") is None]
    if (asked := config.getoption("--backend")) is not None:
        names = {item: {mark.args[0] for mark in item.iter_markers("backend")} for item in chosen}
        chosen = [item for item in chosen if (names[item] if asked == "all" else asked in names[item])]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    """So does every fixture, and what it draws changes nothing for the test, which may find it made for another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))
        return (yield)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _default_backend():
    """No test leaves a backend set for the next."""
    yield
    backends.reset_backend()
