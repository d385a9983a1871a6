"""Checkpoints as they lie on disk: safetensors and torch files, shards with an index, folders of DCP.

DCP is torch.distributed.checkpoint. No code in a pickle runs, neither in torch's files nor in DCP's.
"""

from __future__ import annotations

import json
import operator
import pickle
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from ..checks import check_path, shown

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$|\.distcp$")
_DCP_INDEX = ".metadata"
_DCP = "torch.distributed.checkpoint"
_IN_DCP_INDEX = {
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}

_Wanted = Callable[[str], Any]  # whether to read the entry of this name


def read_checkpoint(path: str | Path, match: str = "") -> dict[str, Any]:
    """What is in a safetensors file, a torch file, all shards that an index names, or a folder of DCP.

    From a torch file it reads weights and plain values, from a folder of DCP only weights.

    Args:
        path: of the file, of the index of shards, `*.index.json`, or of the folder with `.metadata` in it that DCP
            wrote. There, nested names come out joined by dots.
        match: a regular expression; only entries in whose name it is found are read. "proj_l" leaves the backbone and
            the optimizer of a large checkpoint on disk.

    Raises:
        FileNotFoundError: there is no such file, or one of the files that belong to it is missing.
        ValueError: it is another folder or one shard of several, is damaged, holds more than weights and plain values,
            or disagrees with its index; or match is not a regular expression.
    """
    path = check_path("path", path)
    try:
        wanted = re.compile(match).search
        wanted("")  # one of bytes finds nothing in text
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"match must be a regular expression, got {shown(match)}: {error}") from error
    return _read(path, wanted)[0]


def read_with_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """As `read_checkpoint`, and the metadata of a safetensors file. Others have none."""
    return _read(check_path("path", path), lambda name: True)


def _read(path: Path, wanted: _Wanted) -> tuple[dict[str, Any], dict[str, str]]:
    """What is in a file, and a safetensors file's metadata. An index of shards gives all that it names."""
    if path.is_dir():
        if not (path / _DCP_INDEX).is_file():
            raise ValueError(
                f"path must be a file, got the folder {path}; name the file in it, or the index of its shards. Only a "
                f"folder of torch.distributed.checkpoint, which has a file {_DCP_INDEX}, is read as a whole"
            )
        return _read_dcp(path, wanted), {}
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file with weights, there is none at {path}")
    if _SHARD.search(path.name):
        raise ValueError(
            f"path must be a whole checkpoint, {path} is one shard of it; name its index, *.index.json, or the folder "
            "of a *.distcp"
        )
    if not path.name.endswith(".index.json"):
        return _read_one(path, wanted)
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        shards = {file: path.parent / file for file in sorted(set(files.values()))}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"path must be an index of shards, {path} has no weight_map of names to files") from error
    if absent := [str(shard) for shard in shards.values() if not shard.is_file()]:
        raise FileNotFoundError(f"path must be an index next to its shards, {path} names {', '.join(absent)}")
    found: dict[str, Any] = {}
    for file, shard in shards.items():
        names = {name for name, place in files.items() if place == file and wanted(name)}
        here, _ = _read_one(shard, wanted)
        if here.keys() != names:
            raise ValueError(
                f"path must be an index that agrees with its shards, {path} and {shard} differ in "
                + ", ".join(sorted(here.keys() ^ names))
            )
        found |= here
    return found, {}


def _read_one(path: Path, wanted: _Wanted) -> tuple[dict[str, Any], dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(9)
        # Eight bytes of length, then JSON. Torch files are zip archives. Either may have any name.
        if head[8:] != b"{" and (path.suffix.lower() != ".safetensors" or head.startswith(b"PK")):
            file.seek(0)
            try:
                held = torch.load(file, map_location="cpu", weights_only=True)
            except Exception:  # torch and pickle raise a dozen kinds for a bad file, and advise to run the code in it
                raise ValueError(
                    f"path must hold weights and plain values only; {path} could not be read: it is damaged, holds "
                    "code, or is neither a safetensors nor a torch file"
                ) from None
            if isinstance(held, dict):
                held = {name: each for name, each in held.items() if wanted(str(name))}
            return held, {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys() if wanted(name)}  # noqa: SIM118
            return found, tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, {path} is damaged: {error}") from error


class _DcpIndex(pickle.Unpickler):
    """Reads the index of a folder of DCP, a pickle, of nothing but the classes that DCP puts there and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        """Any other class or function could be code."""
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return PurePath  # of the writer's machine, and not read
        if (module, name) in _IN_DCP_INDEX or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_dcp(folder: Path, wanted: _Wanted) -> dict[str, Tensor]:
    """The weights in a folder of torch.distributed.checkpoint, whole, whatever number of ranks wrote them."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        with (folder / _DCP_INDEX).open("rb") as file:
            index = _DcpIndex(file).load()
        known = {
            name: about
            for name, about in index.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata) and wanted(name)
        }
        files: dict[str, set[str]] = {name: set() for name in known}
        for place, stored in index.storage_data.items():
            if place.fqn in known:
                files[place.fqn].add(str(folder / stored.relative_path))
    except Exception:  # as in _read_one
        raise ValueError(
            f"path must be a folder with an index, {folder / _DCP_INDEX} is damaged or holds code"
        ) from None
    if absent := [file for file in sorted(set().union(*files.values())) if not Path(file).is_file()]:
        raise FileNotFoundError(
            f"path must be a folder with all its files, {', '.join(absent)} missing, which {folder / _DCP_INDEX} names"
        )
    found = {}
    for name, about in known.items():
        try:
            found[name] = torch.empty(about.size, dtype=about.properties.dtype)
            reader, planner = FileSystemReader(folder), DefaultLoadPlanner()
            reader.set_up_storage_reader(index, True)
            planner.set_up_planner({name: found[name]}, index, True)
            reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
            filled = torch.zeros(about.size, dtype=torch.bool)
            for chunk in about.chunks:
                filled[tuple(map(slice, chunk.offsets, map(operator.add, chunk.offsets, chunk.sizes)))] = True
            if not filled.all():
                raise ValueError("the chunks that the index lists leave a part out")
        except Exception as error:  # of torch, pickle and zipfile
            raise ValueError(
                f"path must be a whole checkpoint, {' or '.join(sorted(files[name])) or folder} is damaged at {name}"
            ) from error
    return found
