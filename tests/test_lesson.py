"""show_source shows what is in the files, and check_exercise judges what a reader wrote."""

import importlib.util
import inspect
from types import SimpleNamespace

import lesson
import pytest
import torch

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


# --- exercises -------------------------------------------------------------------------------------------------------


def stub(x):
    """Twice x."""
    ...  # noqa: PIE790


def square(x):
    return x * x


def nothing(x):
    """Twice x, and forgets to return it."""
    2 * x


def test_a_stub_is_reported_and_no_error(capsys):
    with lesson.check_exercise(3, stub):
        assert stub(2) + 1
    assert capsys.readouterr().out == "exercise 3: stub is not filled in yet\n"


def test_a_right_answer_is_called_right(capsys):
    with lesson.check_exercise(3, square):
        lesson.expect("2 squared", square(2), 4)
    assert capsys.readouterr().out == "exercise 3: correct\n"


def test_a_check_that_passes_on_the_stub_is_an_error():
    with (
        pytest.raises(AssertionError, match="the check of exercise 3 passes on the stub"),
        lesson.check_exercise(3, stub),
    ):
        stub(2)


pair = lambda x: (x, x)  # noqa: E731


def crash(x):
    return x.twice()


def missing_row(x):
    result = torch.ones(4, 2) * x
    result[2:] = torch.nan
    return result


@pytest.mark.parametrize(
    ("answer", "expected", "message"),
    [
        (nothing, 4, "what: got None; does the function return its result?"),
        (square, 5.5, "what: expected 5.5, got 4.0"),
        (square, (4, 5), "what: expected a tuple of 2, got 4"),
        (pair, (2, 3), "what[1]: expected 3.0, got 2.0"),
        (square, torch.ones(3), "what: expected the shape (3,), got ()"),
        (missing_row, 2 * torch.ones(4, 2), "what: expected 2.0, got nan at [2, 0]; wrong in 2 of 4 rows, 2 to 3"),
        (crash, 4, "AttributeError: 'int' object has no attribute 'twice'"),
    ],
)
def test_a_wrong_answer_says_what_is_wrong(capsys, answer, expected, message):
    with pytest.raises(lesson.WrongAnswer) as raised, lesson.check_exercise(3, answer):
        lesson.expect("what", answer(2), expected)
    assert str(raised.value) == f"exercise 3, {answer.__name__}: {message}"
    assert capsys.readouterr().out == ""


def test_an_assert_without_a_message_is_shown_itself():
    message = "exercise 3, square: this does not hold: raise AssertionError  # as a plain assert does"
    with pytest.raises(lesson.WrongAnswer, match=message), lesson.check_exercise(3, square):
        raise AssertionError  # as a plain assert does
