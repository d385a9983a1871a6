"""Files that are written whole or not at all, and folders that one run has to itself."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` that takes its place when the block ends without an error.

    The file's mode follows the umask, whatever the block writes it with. An OSError in writing names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _named(path, temporary):
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # else a power loss may leave the new name with nothing in it
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds a line of JSON to a file; it is on the disk when this returns. An OSError names `path`."""
    with _named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes an OSError, which may name no file or a temporary one, name the file that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(path), str(temporary)):
            raise  # about something else
        raise OSError(error.errno, f"the file cannot be written: {error.strerror}", str(path)) from error


def new_folder(path: Path) -> Path:
    """Makes the folder; FileExistsError if it exists and is a file or is not empty."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out must be a folder, but {path} is a file")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"out must be a new or an empty folder, but {path} is not empty; name another one")
    return path


@contextmanager
def run_folder(path: Path, resume: bool) -> Iterator[None]:
    """Keeps other runs out of the folder, which is a `new_folder` unless `resume`.

    What a killed run left half-written is removed. The operating system holds the lock, and drops it when the process
    ends, however it ends. Windows and some network file systems have no such lock: a warning says so.

    Raises:
        FileExistsError: as `new_folder`.
        RuntimeError: another run is using the folder.
    """
    if not resume:
        new_folder(path)
    with _lock(path):
        if not resume:
            new_folder(path)  # another run may have begun between the first look and the lock
        for left in path.glob(".*.part"):
            left.unlink()
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    if fcntl is None:
        warnings.warn(f"this system cannot lock {folder}; let no other run write there", stacklevel=4)
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"out must be a folder that no other run is using, but one is using {folder}") from error
        except OSError as error:
            warnings.warn(f"cannot lock {folder} ({error.strerror}); let no other run write there", stacklevel=4)
        yield
    finally:
        os.close(handle)
