"""Most experiments fine-tune a student of the teacher and evaluate it.

All students of one seed see the same clips, noise and times, and so comparisons between them are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_ref.lab import evaluate
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.flow import Batch
from sla_ref.lab.model import VideoTransformer
from sla_ref.lab.train import Objective as TrainObjective
from sla_ref.lab.train import distance_to, flow_loss, train
from sla_ref.lab.weights import TEACHER, load_weights, round_to_half, save_weights

from .classifier import quality, quality_of_real
from .recipe import Objective, Recipe, build
from .setting import Context, Experiment, Setting

REAL = "held-out clips"


def _each_layer(student: VideoTransformer, teacher: VideoTransformer) -> TrainObjective:
    """The error of each layer's output against full attention, on the query, key and value of the teacher's layer.

    It is the mean over layers of the squared error, in units of the mean square of full attention.
    """

    def loss(model: Callable[..., Any], batch: Batch) -> Tensor:
        caught = evaluate.attention_inputs(teacher, batch.x, batch.time, batch.labels)  # without gradient
        losses = []
        for block, inputs in zip(student.blocks, caught, strict=True):
            target = F.scaled_dot_product_attention(*inputs).float()
            output = block.get_submodule("attention.core")(*inputs).float()
            losses.append(F.mse_loss(output, target) / target.square().mean())
        return torch.stack(losses).mean()

    return loss


def fine_tune(
    student: VideoTransformer,
    teacher: VideoTransformer,
    recipe: Recipe,
    setting: Setting,
    seed: int,
    context: Context,
    watch: Callable[[int], object] = lambda step: None,
) -> None:
    """Trains the student in place with `lab.train`, and calls `watch(step)` after each step.

    On a GPU it runs under bfloat16 autocast, with float32 weights. Raises FloatingPointError if the loss is not finite.
    """
    if not recipe.steps(setting):
        return
    on_gpu = context.device.type == "cuda"
    config = TrainConfig(
        recipe.steps(setting),
        setting.batch,
        setting.learning_rate * recipe.rate,
        seed=seed,
        precision="bfloat16" if on_gpu else "float32",
        graph=on_gpu,  # with few tokens, most of the time of a step would go to starting kernels
    )
    objectives: dict[Objective, TrainObjective] = {
        "flow": flow_loss,
        "teacher": distance_to(teacher),
        "layers": _each_layer(student, teacher),
    }
    rates = {"proj_l": recipe.proj_rate}
    train(student, config, objective=objectives[recipe.objective], rates=rates, tick=lambda step, loss: watch(step))


@cache
def find_teacher(setting: Setting, context: Context, backdrop: float = 0.0) -> VideoTransformer:
    """The full-attention model that students start from, without gradients. Callers must not change it.

    It is the shipped model if that fits, otherwise one from the folder `work`, which is trained now if it is missing.
    Training starts from the shipped weights if the width is the same, since nothing in the model depends on the number
    of tokens. `backdrop` is an option of the clips. Raises ValueError if the kept teacher was trained in another way.
    """
    shipped, _ = load_weights(TEACHER, context.device)
    wanted = replace(setting.model, backdrop=backdrop)
    if wanted == replace(shipped.config, block=setting.block):
        return shipped.eval().requires_grad_(False)
    path = context.work / f"teacher-{setting.name}{f'-backdrop-{backdrop}' * bool(backdrop)}.safetensors"
    training = {"steps": setting.teacher_steps, "batch": setting.batch, "learning_rate": setting.learning_rate}
    if path.exists():
        model, card = load_weights(path, context.device)
        if card["training"] != training:
            raise ValueError(f"{path} was trained with {card['training']}, not {training}; name another work folder")
    else:
        torch.manual_seed(0)
        model = VideoTransformer(wanted).to(context.device)
        if wanted.width == shipped.config.width:
            model.load_state_dict(shipped.state_dict())
        fine_tune(model, model, Recipe("full"), replace(setting, steps=setting.teacher_steps), 0, context)
        round_to_half(model)
        context.work.mkdir(parents=True, exist_ok=True)
        save_weights(path, model, {"training": training} | losses(model, model, setting))
    return model.eval().requires_grad_(False)


def losses(student: VideoTransformer, teacher: VideoTransformer, setting: Setting) -> dict[str, float]:
    """The held-out loss and the distance to the teacher, in float32."""
    data = evaluate.held_out(teacher, setting.clips)
    prediction, target = (evaluate.predict(model, data, batch=64) for model in (student, teacher))
    loss = evaluate.held_out_loss(prediction, data)
    return {"held_out_loss": loss, "distance": evaluate.distance(prediction, target)}


def of_recipes(recipes: Callable[[Setting], dict[str, Recipe]], *, generate: bool = False) -> Experiment:
    """An experiment whose cases are fine-tunes.

    With `generate`, the students also generate clips, which are judged. The case `REAL` judges held-out clips.
    """

    def cases(setting: Setting) -> list[str]:
        return [*recipes(setting), *[REAL] * generate]

    def measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
        if case == REAL:
            return quality_of_real(seed, setting, context)
        recipe = recipes(setting)[case]
        teacher = find_teacher(setting, context, recipe.backdrop)
        student = build(recipe, teacher, setting, seed)
        fine_tune(student, teacher, recipe, setting, seed, context)
        flops, sparsity = evaluate.attention_cost(student.config)
        values = losses(student, teacher, setting) | {"attention_mflops": flops / 1e6, "sparsity": sparsity}
        return values | quality(student, setting, context) if generate else values

    return Experiment(cases, measure)
