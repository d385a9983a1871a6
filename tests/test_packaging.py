"""What is built and installed: the wheel's contents, one source of the version, light imports, pinned needs."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sla_ref

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*arguments: object) -> str:
    """Run this Python with `arguments`; return what it printed, or fail with it."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(path).decode())


def test_twine_accepts_both_distributions(built):
    assert run("-m", "twine", "check", "--strict", *built.iterdir()).count("PASSED") == 2


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"sla_ref", f"sla_ref-{sla_ref.__version__}.dist-info"}
    assert "sla_ref/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_wheel_holds_the_weights(wheel):
    weights = [name for name in wheel.namelist() if name.endswith(".safetensors")]
    assert weights
    assert all(name.startswith("sla_ref/lab/weights/") for name in weights)
    assert set(weights) == {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/sla_ref/lab/weights").glob("*.safetensors")
    }


def test_version_has_one_source(metadata):
    assert metadata["Version"] == sla_ref.__version__
    assert "version" not in PROJECT
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == sla_ref.__version__


def test_hard_needs_are_torch_and_numpy(metadata):
    needs = [Requirement(need) for need in metadata.get_all("Requires-Dist")]
    assert {need.name for need in needs if "extra" not in str(need.marker)} == {"torch", "numpy"}


def test_import_loads_torch_and_numpy_only():
    optional = [
        Requirement(need).name
        for extra in ("triton", "numba", "lab", "diffusers", "lora")
        for need in PROJECT["optional-dependencies"][extra]
    ]
    modules = {"scikit-learn": "sklearn", "pillow": "PIL", "numba-cuda": "numba_cuda"}
    names = [modules.get(name, name) for name in optional if name not in ("torch", "numpy")]
    loaded = run("-c", f"import sys, sla_ref; print(*sorted(set({names!r}) & set(sys.modules)))")
    assert loaded.split() == []


def test_constraints_pin_every_need_of_make():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
            pins[canonicalize_name(name)] = version
    extras = PROJECT["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = set(",".join(re.findall(r": *EXTRAS = (\S+)", makefile)).split(","))
    assert {"lab", "docs", "dev"} <= installed
    for need in PROJECT["dependencies"] + [need for extra in installed for need in extras[extra]]:
        requirement = Requirement(need)
        if requirement.name == PROJECT["name"]:
            continue
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pinned), f"{need} excludes its pin {pinned}"
