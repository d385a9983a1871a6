"""Files that are written whole or not at all."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch

from sla_ref.files import append_line, whole
from sla_ref.lab.checkpoint import write_checkpoint
from sla_ref.lab.model import ModelConfig, VideoTransformer
from sla_ref.lab.weights import save_weights


def write_text(path):
    with whole(path) as temporary:
        temporary.write_text("x" * 10_000, encoding="utf-8")


def write_weights(path):
    save_weights(path, VideoTransformer(ModelConfig(frames=2, size=16, width=32, depth=1)), {})


def write_state(path):
    write_checkpoint(path, {"weights": torch.zeros(10_000)})


WRITERS = pytest.mark.parametrize("write", [write_text, write_weights, write_state])


@contextmanager
def full_disk():
    """No file may grow beyond 1,000 bytes, which fails as a full disk does: in the middle."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@WRITERS
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match=r"the file cannot be written: .*: '.*/file'$"), full_disk():
        write(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@WRITERS
def test_a_folder_that_is_missing_or_a_file_is_one_line(tmp_path, write):
    (tmp_path / "note").write_text("mine", encoding="utf-8")
    for folder, kind in (("none", FileNotFoundError), ("note", NotADirectoryError)):
        with pytest.raises(kind, match=rf"the file cannot be written: .*/{folder}/file'$"):
            write(tmp_path / folder / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@WRITERS
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_mode_of_a_file_follows_the_umask(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_writer_that_makes_a_file_of_its_own_does_not_decide_the_mode(tmp_path):
    """safetensors is such a writer."""
    before = os.umask(0o022)
    try:
        with whole(tmp_path / "file") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_an_error_about_something_else_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/other'"), whole(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_line_that_cannot_be_added_names_its_file(tmp_path):
    with pytest.raises(OSError, match=r"the file cannot be written: .*/lines'$"), full_disk():
        append_line(tmp_path / "lines", {"text": "x" * 2000})
