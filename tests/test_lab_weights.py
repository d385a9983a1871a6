"""Weight files: what goes in comes out, and a damaged file says so."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sla_ref.lab import weights
from sla_ref.lab.model import ModelConfig, VideoTransformer

TINY = ModelConfig(frames=2, size=16, width=32, depth=1, heads=2, attention="sla", block=8)


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    model = VideoTransformer(TINY)
    weights.round_to_half(model)
    path = tmp_path / "model.safetensors"
    weights.save_weights(path, model, {"seed": 5, "held_out_loss": 0.25})
    return path, model


def test_rounded_weights_come_back_bit_for_bit(stored):
    path, model = stored
    loaded, card = weights.load_weights(path)
    assert card == {"seed": 5, "held_out_loss": 0.25}
    assert loaded.config == TINY
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no weights file .*none\.safetensors"):
        weights.load_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("where", [10, 1000, -1])
def test_one_changed_byte_is_noticed(stored, where):
    path, _ = stored
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(weights.DamagedWeights, match=r"weights file .*model\.safetensors"):
        weights.load_weights(path)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_file_that_was_cut_short_is_noticed(stored, length):
    path, _ = stored
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(weights.DamagedWeights, match=r"model\.safetensors is damaged"):
        weights.load_weights(path)


def _rewrite(path, tensors=None, **changes):
    """Writes the file again with other tensors or metadata, and a checksum that is right."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = tensors or load_file(path)
    metadata = metadata | changes | {"sha256": weights.checksum(tensors)}
    save_file(tensors, path, {name: text for name, text in metadata.items() if text})


def test_files_that_are_whole_but_for_something_else(stored):
    path, _ = stored
    tensors = load_file(path)
    _rewrite(path, {name: tensor for name, tensor in tensors.items() if "mlp" not in name})
    with pytest.raises(weights.DamagedWeights, match=r"(?s)does not fit .*Missing key.*mlp"):
        weights.load_weights(path)
    _rewrite(path, tensors | {"out.bias": torch.zeros(3, dtype=torch.float16)})
    with pytest.raises(weights.DamagedWeights, match=r"size mismatch for out\.bias"):
        weights.load_weights(path)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        _rewrite(path, tensors | {"out.bias": tensors["out.bias"].to(dtype)})
        with pytest.raises(weights.DamagedWeights, match=rf"weights must be float16, got {dtype}"):
            weights.load_weights(path)
    for config in (
        {"depth": 10**9},
        {"width": 2**14, "depth": 1000},
        {"frames": 10**12},
        {"depth": "1"},
        [],
        "{" * 10**5,
    ):
        _rewrite(path, tensors, config=config if isinstance(config, str) else json.dumps(config))
        with pytest.raises(weights.DamagedWeights, match="does not fit this lab's model"):
            weights.load_weights(path)
    _rewrite(path, tensors, config=json.dumps({"colour": "red"}))
    with pytest.raises(weights.DamagedWeights, match="colour"):
        weights.load_weights(path)
    _rewrite(path, tensors, card="")
    with pytest.raises(weights.DamagedWeights, match="lacks card in its metadata"):
        weights.load_weights(path)


def test_a_failed_write_leaves_the_old_file(stored):
    path, model = stored
    before = path.read_bytes()
    with pytest.raises(TypeError):
        weights.save_weights(path, model, {"not": torch.zeros(1)})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_shipped_weights_are_whole_small_and_as_good_as_their_card_says():
    from sla_ref.lab import evaluate

    sizes = [path.stat().st_size for path in (weights.TEACHER, weights.STUDENT)]
    assert sum(sizes) <= 4_000_000
    teacher, teacher_card = weights.load_weights(weights.TEACHER)
    student, student_card = weights.load_weights(weights.STUDENT)
    assert (teacher.config.attention, student.config.attention) == ("full", "sla")
    # A sample of the held-out set must agree with the card within its own scatter.
    for model, card in ((teacher, teacher_card), (student, student_card)):
        data = evaluate.held_out(model, 16)
        errors = (evaluate.predict(model, data) - data.velocity).square().mean(dim=(1, 2, 3))
        assert abs(errors.mean() - card["held_out_loss"]) < 4 * errors.std() / 16**0.5
    text = (weights.SHIPPED / "CARD.md").read_text(encoding="utf-8")
    for card in (teacher_card, student_card):
        assert f"{card['held_out_loss']:.4f}" in text
        assert f"{card['training']['steps']:,}" in text
    assert "CC BY 4.0" in text
