"""The objective "layers": each layer by itself is matched to full attention. SLA2's router is trained with it.

SLA2 is trained in two stages. In stage 1 the model stays as it is, and router and alpha learn to make each layer's
output that of full attention. The choice of blocks is soft then, since a hard one gives the router no gradient. In
stage 2 the router is frozen, the choice is hard, and model and alpha are trained with the model's own loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sla_ref import SLA2Attention

from .evaluate import attention_inputs
from .flow import Batch
from .model import VideoTransformer
from .train import Objective

RATIOS = (1.0, 0.8, 0.6)
"""Critical ratios of stage 1, in units of the layer's own: with 5 %, the paper's 5, 4 and 3 %."""

TAU = 0.1
"""Temperature of the soft choice in stage 1, in units of scores / sqrt(D). [SLA2 Eq. 17]

The paper has the same number, and the factor 1 / sqrt(D) in its Algorithm 2 but not in its Equation 16. Without it,
the choice is so sharp that most rows of the lab's teacher leave the router hardly any gradient.
"""


def for_stage_1(model: VideoTransformer) -> None:
    """Asks for the gradients of SLA2's routers and alphas, and of nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".core.router." in name or ".core.alpha_" in name)


def each_layer(student: VideoTransformer, teacher: VideoTransformer) -> Objective:
    """The error of each layer's output against full attention, on the query, key and value of the teacher's layer.

    It is the mean over layers of the squared error, in units of the mean square of full attention. An SLA2 layer whose
    router asks for a gradient chooses softly, with each of `RATIOS`, and the mean is over these, too.
    """
    layers = [_ways(block.get_submodule("attention.core")) for block in student.blocks]

    def loss(model: Callable[..., Any], batch: Batch) -> Tensor:
        caught = attention_inputs(teacher, batch.x, batch.time, batch.labels)  # without gradient
        losses = []
        for ways, inputs in zip(layers, caught, strict=True):
            target = F.scaled_dot_product_attention(*inputs).float()
            errors = [F.mse_loss(attend(*inputs).float(), target) for attend in ways]
            losses.append(torch.stack(errors).mean() / target.square().mean())
        return torch.stack(losses).mean()

    return loss


def _ways(core: nn.Module) -> list[Callable[..., Tensor]]:
    """The ways in which `each_layer` calls a layer."""
    router = [weight for name, weight in core.named_parameters() if name.startswith("router.")]
    if not isinstance(core, SLA2Attention) or not any(weight.requires_grad for weight in router):
        return [core]
    ways: list[Callable[..., Tensor]] = []
    for ratio in RATIOS:
        layer = copy.copy(core)  # it shares all parameters
        layer.critical_ratio = ratio * core.critical_ratio
        # A soft choice keeps several N x N maps for the backward; they are made again there, one layer at a time.
        soft = partial(layer, tau=TAU * math.sqrt(core.head_dim))
        ways.append(partial(checkpoint, soft, use_reentrant=False, preserve_rng_state=False))
    return ways
