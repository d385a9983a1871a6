"""Weight files: float16 safetensors that carry the model's configuration, a checksum and a card.

The checksum covers the names, shapes and bytes of all tensors. A file that was cut short, altered, or
made for another model raises DamagedWeights instead of loading halfway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_path, check_type, find_device
from ..files import whole
from .model import ModelConfig, VideoTransformer

SHIPPED = Path(__file__).parent / "weights"
TEACHER = SHIPPED / "teacher.safetensors"
STUDENT = SHIPPED / "sla.safetensors"


class DamagedWeights(ValueError):
    """The file is not a weights file of this lab, or not the one that was written."""


def round_to_half(model: VideoTransformer) -> None:
    """Rounds the weights to what a file can hold; an evaluation is then one of the file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())


def save_weights(path: str | Path, model: VideoTransformer, card: dict[str, Any]) -> None:
    """Stores the model in float16; `card` is anything JSON can hold and comes back on loading."""
    from safetensors.torch import save

    path = check_path("path", path)
    check_type("model", model, VideoTransformer)
    tensors = {name: weight.detach().half().cpu().contiguous() for name, weight in model.state_dict().items()}
    try:
        text = json.dumps(card)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"card must be something that JSON can hold, got {type(card).__name__}: {error}") from error
    metadata = {"config": json.dumps(asdict(model.config)), "card": text, "sha256": checksum(tensors)}
    with whole(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # Python's own files say why they cannot be written


def load_weights(path: str | Path, device: torch.device | str = "cpu") -> tuple[VideoTransformer, dict[str, Any]]:
    """The model in float32 and its card. Raises FileNotFoundError or DamagedWeights."""
    from safetensors import SafetensorError, safe_open

    path, device = check_path("path", path), find_device("device", device)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weights file {path}; `sla-ref train-teacher` and `sla-ref finetune` make one"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise DamagedWeights(f"weights file {path} is damaged: {error}") from error
    absent = sorted({"config", "card", "sha256"} - metadata.keys())
    if absent:
        raise DamagedWeights(f"weights file {path} lacks {', '.join(absent)} in its metadata")
    if checksum(tensors) != metadata["sha256"]:
        raise DamagedWeights(f"weights file {path} is damaged: its checksum does not match")
    try:
        if other := sorted({str(tensor.dtype) for tensor in tensors.values()} - {"torch.float16"}):
            raise ValueError(f"weights must be float16, got {', '.join(other)}")
        config = ModelConfig(**json.loads(metadata["config"]))
        with torch.device("meta"):  # without memory: the file may name sizes that its tensors do not have
            VideoTransformer(config).load_state_dict(tensors, assign=True)
        model = VideoTransformer(config)
        model.load_state_dict(tensors)
        card = json.loads(metadata["card"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DamagedWeights(f"weights file {path} does not fit this lab's model: {error}") from error
    return model.to(device), card


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
