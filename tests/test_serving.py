"""The code in docs/serving.md, called with the arguments that ComfyUI and vLLM-Omni pass."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sla_ref
from sla_ref.integrations.checkpoints import save_sla

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
NODE, PLUGIN = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def names(code: str) -> dict:
    found: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), found)
    return found


def tokens(*shape: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind()


def split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_the_node_of_comfyui(tmp_path):
    """Its ModelPatcher and its wrap_attn (comfy/ldm/modules/attention.py) in a few lines."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Module() for _ in range(2))
    model.blocks[1].attn1 = nn.Module()
    model.blocks[1].attn1.processor = layer = sla_ref.SparseLinearAttention(16, 0.3, block_q=128)
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    save_sla(model, tmp_path / "sla.safetensors")

    patcher = SimpleNamespace(model_options={"transformer_options": {}})
    patcher.clone = lambda: copy.deepcopy(patcher)
    node = names(NODE)["NODE_CLASS_MAPPINGS"]["SLA"]
    inputs = node.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "path", "critical_ratio"] and node.RETURN_TYPES == ("MODEL",)
    (patched,) = getattr(node(), node.FUNCTION)(patcher, str(tmp_path / "sla.safetensors"), 0.3)
    assert patcher.model_options == {"transformer_options": {}}

    def attention_pytorch(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
        out = F.scaled_dot_product_attention(split(q, heads), split(k, heads), split(v, heads), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    def optimized_attention(*args, **kwargs):
        override = kwargs["transformer_options"]["optimized_attention_override"]
        return override(attention_pytorch, *args, **kwargs, _inside_attn_wrapper=True)

    query, key, value = tokens(2, 200, 32)
    options = patched.model_options["transformer_options"] | {"block_index": 1}
    out = optimized_attention(query, key, value, heads=2, transformer_options=options)
    expected = layer(split(query, 2), split(key, 2), split(value, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    dense = attention_pytorch(query, key, value, 2)
    assert not torch.allclose(out, dense, atol=1e-2)
    other = optimized_attention(query, key, value, heads=2, transformer_options=options | {"block_index": 0})
    torch.testing.assert_close(other, dense)
    text = optimized_attention(query, key[:, :7], value[:, :7], heads=2, transformer_options=options)
    torch.testing.assert_close(text, attention_pytorch(query, key[:, :7], value[:, :7], 2))


def test_the_function_for_vllm_omni():
    """Called as by _SparseAttentionImpl.forward in vllm_omni/diffusion/attention/backends/sparse_attn.py."""
    attention = names(PLUGIN)["attention"]
    query, key, value = tokens(2, 200, 2, 16)
    swapped = [each.transpose(1, 2) for each in (query, key, value)]
    out = attention(query, key, value, {"critical_ratio": 1.0}, is_causal=False, softmax_scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2), F.scaled_dot_product_attention(*swapped, scale=0.3))
    out = attention(query, key, value, {"timestep": 3}, is_causal=False, softmax_scale=0.25)
    layer = sla_ref.SparseLinearAttention(16, 0.05, block_q=128)  # with Proj at zero
    torch.testing.assert_close(out.transpose(1, 2), layer(*swapped))
    with pytest.raises(ValueError, match="is_causal must be False"):
        attention(query, key, value, {}, is_causal=True, softmax_scale=0.25)
