"""SLA where a model calls F.scaled_dot_product_attention: the same model around another attention."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sla_ref
from sla_ref.integrations.checkpoints import load_sla, save_sla, sla_parameters
from sla_ref.integrations.sdpa import replace_sdpa, restore_sdpa

SETTINGS = {"critical_ratio": 0.3, "negligible_ratio": 0.2, "block_q": 8, "block_k": 8}


class Attention(nn.Module):
    """Self-attention with two heads of 16; what the call gets beside query, key and value is to be set."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.extra, self.keywords, self.calls = (), {}, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        for _ in range(self.calls):
            query = F.scaled_dot_product_attention(query, key, value, *self.extra, **self.keywords)
        return self.out(query.transpose(1, 2).flatten(2))


def layer(**changes) -> sla_ref.SparseLinearAttention:
    """With Proj away from its zero."""
    torch.manual_seed(1)
    made = sla_ref.SparseLinearAttention(16, **SETTINGS | changes)
    nn.init.normal_(made.proj_l.weight, std=0.3)
    return made


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention()


TOKENS = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(2))


def test_the_layer_moves_to_the_modules_device():
    module = attention().to("meta")
    replace_sdpa(module, layer())
    assert all(parameter.is_meta for parameter in module.sla.parameters())
    empty = nn.Module()
    replace_sdpa(empty, made := layer())
    assert empty.sla is made, "a module without parameters has no device"


def test_the_layer_runs_and_goes_again():
    module, x = attention(), TOKENS
    dense, names, attributes = module(x), list(module.state_dict()), set(vars(module))
    replace_sdpa(module, layer(critical_ratio=1.0))
    torch.testing.assert_close(module(x), dense)
    restore_sdpa(module)
    assert torch.equal(module(x), dense)
    assert list(module.state_dict()) == names and set(vars(module)) == attributes
    replace_sdpa(module, layer())
    query, key, value = module.qkv(x).view(2, 60, 3, 2, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(module(x), module.out(module.sla(query, key, value).transpose(1, 2).flatten(2)))
    assert not torch.allclose(module(x), dense, atol=1e-2)
    module.keywords = {"scale": 0.5, "dropout_p": 0.0, "attn_mask": None, "is_causal": False}
    torch.testing.assert_close(
        module(x), module.out(module.sla(query, key, value, scale=0.5).transpose(1, 2).flatten(2))
    )


def test_the_layer_of_sla2():
    module = attention()
    dense = module(TOKENS)
    replace_sdpa(module, sla_ref.SLA2Attention(16, 2, critical_ratio=1.0, alpha="ideal", block_q=8, block_k=8))
    torch.testing.assert_close(module(TOKENS), dense)


@pytest.mark.parametrize("entries", [1, 2])
def test_a_mask_that_hides_whole_keys(entries):
    """The same keys in both batch entries, or others in each of them. Hidden keys are not ranked and not summed."""
    module = attention()
    mask = torch.rand(entries, 1, 1, 60, generator=torch.Generator().manual_seed(3)) < 0.6
    module.keywords = {"attn_mask": mask, "scale": 0.5}
    dense = module(TOKENS)
    replace_sdpa(module, layer(critical_ratio=1.0))
    torch.testing.assert_close(module(TOKENS), dense)
    restore_sdpa(module)
    replace_sdpa(module, layer())
    query, key, value = module.qkv(TOKENS).view(2, 60, 3, 2, 16).permute(2, 0, 3, 1, 4)
    for i, found in enumerate(module(TOKENS)):
        shown = mask[i % entries, 0, 0]
        out = module.sla(query[i : i + 1], key[i : i + 1, :, shown], value[i : i + 1, :, shown], scale=0.5)
        torch.testing.assert_close(found, module.out(out[0].transpose(0, 1).flatten(1)))


def test_weights_are_the_models_own(tmp_path):
    model = nn.Sequential(attention(), attention()).double()
    for module in model:
        replace_sdpa(module, layer().double())
    assert {name for name in model.state_dict() if ".sla." in name} == {
        f"{i}.sla.proj_l.{part}" for i in (0, 1) for part in ("weight", "bias")
    }
    model.float()
    model(TOKENS).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert len(sla_parameters(model)) == 4
    save_sla(model, tmp_path / "sla.safetensors")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in sla_parameters(clone):
                parameter.zero_()
        assert not torch.equal(clone(TOKENS), model(TOKENS)), "a copy runs its own layer"
        load_sla(clone, tmp_path / "sla.safetensors")
        assert torch.equal(clone(TOKENS), model(TOKENS))


def test_gradient_checkpointing():
    module = attention()
    replace_sdpa(module, layer())
    gradients = []
    for forward in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        forward(TOKENS).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)


def test_compiled_forward_and_backward():
    torch._dynamo.reset()
    module = attention()
    replace_sdpa(module, layer())

    def gradients(forward):
        module.zero_grad()
        out = forward(TOKENS)
        out.square().sum().backward()
        return [out, *(parameter.grad for parameter in module.parameters())]

    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(module))


def test_self_attention_of_another_model_of_diffusers():
    """LTX-Video rotates its features in another way than Wan."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 60, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 5),
        "num_frames": 3,
        "height": 4,
        "width": 5,
        "return_dict": False,
    }
    dense = model(**inputs)[0]
    attention = model.transformer_blocks[0].attn1
    replace_sdpa(attention, layer(critical_ratio=1.0))
    torch.testing.assert_close(model(**inputs)[0], dense)
    restore_sdpa(attention)
    replace_sdpa(attention, layer())
    assert not torch.allclose(model(**inputs)[0], dense, atol=1e-4)


def test_text_and_video_in_one_sequence_of_diffusers():
    """CogVideoX: 12 tokens of text, then 60 of video, whose features its own code rotates."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=10,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=12,
        use_rotary_positional_embeddings=True,
    ).eval()
    angles = torch.randn(60, 8).repeat_interleave(2, 1)
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 10),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }
    attention, caught = model.transformer_blocks[0].attn1, []
    attention.register_forward_hook(lambda module, args, out: caught.append(out))
    dense = model(**inputs)[0]
    replace_sdpa(attention, layer(critical_ratio=1.0))
    torch.testing.assert_close(model(**inputs)[0], dense)
    restore_sdpa(attention)
    text = slice(0, 12)
    router = sla_ref.Router(protected_queries=text, protected_keys=text)
    replace_sdpa(attention, layer(router=router))
    model(**inputs)[0].square().sum().backward()
    (video, words), _, (other_video, other_words) = caught
    torch.testing.assert_close(other_words, words)  # the text attends to everything
    assert not torch.allclose(other_video, video, atol=1e-2)
    assert all(parameter.grad.any() for parameter in attention.sla.parameters())


def test_padded_text_and_video_in_one_sequence_of_diffusers():
    """HunyuanVideo: 60 tokens of video, which its own code rotates, then up to 12 of text, whose padding a mask hides.

    Its first block has weights of their own for the text, and its second block has the same ones for both.
    """
    diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    lengths = (12, 5)
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 10),
        "timestep": torch.tensor([500, 200]),
        "encoder_hidden_states": torch.randn(2, 12, 16),
        "encoder_attention_mask": torch.arange(12) < torch.tensor(lengths)[:, None],
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }

    def outcome(**changes):
        """The output, and the gradient of every parameter."""
        model.zero_grad()
        out = model(**inputs | changes, return_dict=False)[0]
        out.square().sum().backward()
        return out.detach(), {name: each.grad for name, each in model.named_parameters() if ".sla." not in name}

    attentions = [model.transformer_blocks[0].attn, model.single_transformer_blocks[0].attn]
    caught = []
    attentions[0].register_forward_hook(lambda module, args, out: caught.append(out))
    dense = outcome()
    for attention in attentions:
        replace_sdpa(attention, layer(critical_ratio=1.0))
    torch.testing.assert_close(outcome(), dense, rtol=1e-4, atol=1e-4)
    for attention in attentions:
        restore_sdpa(attention)
    assert torch.equal(outcome()[0], dense[0])

    text = slice(60, None)
    for attention in attentions:
        replace_sdpa(attention, layer(router=sla_ref.Router(protected_queries=text, protected_keys=text)))
    found, gradients = outcome()
    (video, words), *_, (sparse_video, sparse_words) = caught
    torch.testing.assert_close(sparse_words, words)  # the text attends to everything that is not hidden
    assert not torch.allclose(sparse_video, video, atol=1e-3)
    assert all(each.any() for name, each in gradients.items() if "transformer_blocks" in name)
    assert all(parameter.grad.any() for attention in attentions for parameter in attention.sla.parameters())

    other = torch.where(inputs["encoder_attention_mask"][..., None], inputs["encoder_hidden_states"], 7.0)
    torch.testing.assert_close(outcome(encoder_hidden_states=other)[0], found)  # what the padding holds has no effect
    for i, length in enumerate(lengths):
        one = {name: each[i : i + 1] for name, each in inputs.items()}
        one |= {name: one[name][:, :length] for name in ("encoder_hidden_states", "encoder_attention_mask")}
        torch.testing.assert_close(outcome(**one)[0], found[i : i + 1])  # as without padding


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "keywords", "message"),
    [
        ((torch.ones(60, 60).bool(),), {}, r"None, or a boolean \(2 or 1, 1, 1, 60\) .* got torch.bool \(60, 60\)"),
        ((torch.ones(2, 1, 60, 60).bool(),), {}, r"attn_mask must be None, or .* got torch.bool \(2, 1, 60, 60\)"),
        ((torch.zeros(2, 1, 1, 60),), {}, r"attn_mask must be None, or .* got torch.float32"),
        ((None, 0.1), {}, "dropout_p must be 0, SLA has no attention weights to drop; got 0.1"),
        ((), {"is_causal": True}, "is_causal must be False, SLA attends to all keys"),
        ((), {"enable_gqa": True}, "enable_gqa must be False, SLA has a key head for each query head"),
    ],
)
def test_what_sla_does_not_have_is_refused_by_name(extra, keywords, message):
    module = attention()
    replace_sdpa(module, layer())
    module.extra, module.keywords = extra, keywords
    with pytest.raises(ValueError, match=message):
        module(TOKENS)


@pytest.mark.parametrize("calls", [0, 2])
def test_modules_that_do_not_call_it_once(calls):
    module = attention()
    replace_sdpa(module, layer())
    module.calls = calls
    with pytest.raises(RuntimeError, match=f"once in a forward, .* Attention called it {calls} times"):
        module(TOKENS)


def test_multihead_attention_of_torch_is_not_missed_silently():
    module = nn.MultiheadAttention(32, 2, batch_first=True)
    replace_sdpa(module, layer())
    with pytest.raises(RuntimeError, match="MultiheadAttention called it 0 times"):
        module(TOKENS, TOKENS, TOKENS, need_weights=False)


def test_bad_arguments():
    module = attention()
    for arguments, error, message in (
        ((len, layer()), TypeError, "module must be a torch.nn.Module, got builtin"),
        ((module, nn.Linear(1, 1)), TypeError, "layer must be a SparseLinearAttention or an SLA2Attention, got L"),
    ):
        with pytest.raises(error, match=message):
            replace_sdpa(*arguments)
    with pytest.raises(ValueError, match="module must be as replace_sdpa left it, got a Attention with another"):
        restore_sdpa(module)
    replace_sdpa(module, layer())
    with pytest.raises(ValueError, match="module must have no attribute 'sla'"):
        replace_sdpa(module, layer())
    other = attention()
    other.forward = lambda x: x
    with pytest.raises(ValueError, match="module must have the forward of its class"):
        replace_sdpa(other, layer())
    assert not hasattr(other, "sla")
