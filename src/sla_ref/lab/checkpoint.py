"""What a training run goes on from: its checkpoint, and its lines of metrics. What is damaged is named, never used."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..checks import shown


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """A torch file followed by its SHA-256: torch itself would load flipped bits silently."""
    buffer = io.BytesIO()  # not to the file at once: torch does not say why one cannot be written
    torch.save(state, buffer)
    content = buffer.getvalue()
    with files.whole(path) as temporary:
        temporary.write_bytes(content + hashlib.sha256(content).digest())


def read_checkpoint(path: Path, own: dict[str, Any] | None = None, whole: bool = True) -> dict[str, Any]:
    """What `write_checkpoint` was given, on the CPU.

    `own` is the state of the run that wants to go on. Its "identity" must be that of the checkpoint; with `whole`, all
    the rest must be built in the same way, too.

    Raises:
        ValueError: the file is damaged, or is the checkpoint of another run.
    """
    content = path.read_bytes()
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"checkpoint {path} is damaged: its checksum does not match")
    try:
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # without torch's advice, which is to let the file run code
        raise ValueError(f"checkpoint {path} is damaged: it holds more than tensors and numbers") from error
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise ValueError(f"checkpoint {path} is damaged: it does not say of which run it is")
    if own is not None:
        for key in own["identity"] | state["identity"]:
            there, here = (each["identity"].get(key, "nothing") for each in (state, own))
            if not isinstance(there, (str, int, float)) or there != here:
                there = there if isinstance(there, str) and there.isprintable() else shown(there)
                raise ValueError(
                    f"checkpoint {path} was made with {_name(key)} = {there}, got {here}; a resumed run must keep it"
                )
        if whole:
            _check_form(f"checkpoint {path} is damaged: ", state, own)
    return state


def _check_form(place: str, found: Any, expected: Any) -> None:
    """ValueError unless the one is built as the other: the same keys, types, and shapes of tensors."""
    if type(found) is not type(expected):
        raise ValueError(f"{place[:-1]} must be of type {type(expected).__name__}, got {type(found).__name__}")
    if isinstance(expected, Tensor):
        kinds = [f"{each.dtype} {tuple(each.shape)}" for each in (expected, found)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{place[:-1]} must be {kinds[0]}, got {kinds[1]}")
    if isinstance(expected, (list, tuple)):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if isinstance(expected, dict):
        for key in expected | found:
            if key not in found or key not in expected:
                raise ValueError(f"{place}{_name(key)} {'is missing' if key in expected else 'is too much'}")
            _check_form(f"{place}{_name(key)}/", found[key], expected[key])


def _name(key: Any) -> str:
    """A key as a line of text holds it; it comes from a file, and may be anything."""
    return str(key) if str(key).isprintable() else repr(key)


def keep_lines(path: Path, step: int) -> None:
    """Drops the metrics of steps that a resumed run will repeat and, with a warning, lines that are damaged."""
    lines = path.read_bytes().decode(errors="replace").split("\n") if path.exists() else [""]
    kept, damaged = [], 0
    for line in lines[:-1] if not lines[-1] else lines:  # nothing follows the last line break, or half a line
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (KeyError, TypeError, ValueError):
            damaged += 1
    if damaged:
        warnings.warn(f"{path}: {damaged} damaged line(s) dropped", stacklevel=2)
    with files.whole(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
