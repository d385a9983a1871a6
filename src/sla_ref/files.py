"""Files that are written whole or not at all, and folders in which nothing is overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(path: Path) -> Path:
    """Makes the folder; one that is there already must be empty."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out must be a folder, but {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"out must be a new or an empty folder, but {path} is not empty; name another one")
    path.mkdir(parents=True, exist_ok=True)
    return path
