"""show_source shows what stands in the files."""

import importlib.util
import inspect
from types import SimpleNamespace

import lesson
import pytest

import sla_ref


def test_prints_each_source_with_its_place(capsys):
    lesson.show_source(sla_ref.reference.combine, sla_ref.BlockMap.to_dense)
    printed = capsys.readouterr().out
    assert "# sla_ref/reference.py, combine\ndef combine(" in printed
    assert inspect.getsource(sla_ref.reference.combine) in printed
    assert "# sla_ref/block_map.py, BlockMap.to_dense\ndef to_dense(" in printed  # not indented as in its class


def test_decorated_functions_and_classes(capsys):
    lesson.show_source(sla_ref.use_backend, sla_ref.BlockMap)
    printed = capsys.readouterr().out
    assert "@contextmanager\ndef use_backend(" in printed
    assert "@dataclass(frozen=True, eq=False)\nclass BlockMap:" in printed


@pytest.mark.parametrize("attribute", ["fn", "py_func"])
def test_a_compiled_kernel_is_the_function_it_was_made_of(attribute):
    kernel = SimpleNamespace(**{attribute: sla_ref.reference.combine})
    assert lesson.source_of(kernel).code == inspect.getsource(sla_ref.reference.combine)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra triton")
def test_a_triton_kernel():
    from sla_ref.backends.triton import forward_kernel

    source = lesson.source_of(forward_kernel)
    assert source.caption == "sla_ref/backends/triton/__init__.py, forward_kernel"
    assert source.code.startswith("@triton.jit") and "[Alg. 1 L7-L16]" in source.code


def test_what_has_no_source_raises_before_anything_is_shown(capsys):
    with pytest.raises(TypeError, match="objects must be functions or classes written in Python, got <built-in"):
        lesson.show_source(sla_ref.reference.combine, len)
    assert capsys.readouterr().out == ""


def test_a_notebook_gets_it_highlighted(monkeypatch):
    shown = []
    notebook = SimpleNamespace(get_ipython=lambda: object(), display=SimpleNamespace(display=shown.append))
    monkeypatch.setitem(lesson.sys.modules, "IPython", notebook)
    lesson.show_source(sla_ref.reference.combine)
    assert shown[0]._repr_markdown_().startswith('```python title="sla_ref/reference.py, combine"\ndef combine(')


def test_measured_reads_the_clone_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lesson.measured("cpu")["rows"]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "cpu.json").write_text("{}", encoding="utf-8")
    assert lesson.measured("cpu") == {}  # where it is run comes first
    with pytest.raises(FileNotFoundError, match=r"found no absent\.json"):
        lesson.measured("absent")
