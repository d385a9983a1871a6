"""Most experiments fine-tune a student of the teacher and evaluate it.

All students of one seed see the same clips, noise and times, and so comparisons between them are paired.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from sla_ref.lab import evaluate
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.layers import each_layer, for_stage_1
from sla_ref.lab.model import VideoTransformer
from sla_ref.lab.train import Objective as TrainObjective
from sla_ref.lab.train import distance_to, flow_loss, train
from sla_ref.lab.weights import TEACHER, load_weights, round_to_half, save_weights

from .classifier import quality, quality_of_real
from .recipe import Objective, Recipe, build, cost
from .setting import Context, Experiment, Setting

REAL = "held-out clips"
STAGE_1 = 4  # a quarter of the setting's steps and clips for SLA2's router: its N x N maps are slow and large


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
        "layers": each_layer(student, teacher),
    }
    rates = {"proj_l": recipe.proj_rate}
    train(student, config, objective=objectives[recipe.objective], rates=rates, tick=lambda step, loss: watch(step))


def trained(
    recipe: Recipe, teacher: VideoTransformer, setting: Setting, seed: int, context: Context
) -> VideoTransformer:
    """A fine-tuned student. A learned router comes from stage 1, which does not depend on length and rate."""
    if recipe.router == "learned":
        student = copy.deepcopy(_after_stage_1(replace(recipe, length=1.0, rate=1.0), setting, seed, context))
    else:
        student = build(recipe, teacher, setting, seed)
    fine_tune(student, teacher, recipe, setting, seed, context)
    return student


@cache
def _after_stage_1(recipe: Recipe, setting: Setting, seed: int, context: Context) -> VideoTransformer:
    """A student whose routers, and alphas, were matched to full attention. Callers must not change it."""
    teacher = find_teacher(setting, context, recipe.backdrop)
    student = build(recipe, teacher, setting, seed)
    wanted = [parameter.requires_grad for parameter in student.parameters()]
    for_stage_1(student)
    short = replace(setting, steps=setting.steps // STAGE_1, batch=max(1, setting.batch // STAGE_1))
    fine_tune(student, teacher, Recipe(objective="layers"), short, seed, context)
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        parameter.requires_grad_(gradient)
    return student


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


def of_recipes(
    recipes: Callable[[Setting], dict[str, Recipe]],
    *,
    generate: bool = False,
    also: Callable[[VideoTransformer, int, Setting], dict[str, float]] = lambda student, seed, setting: {},
) -> Experiment:
    """An experiment whose cases are fine-tunes.

    With `generate`, the students also generate clips, which are judged. The case `REAL` judges held-out clips.
    `also(student, seed, setting)` returns more quantities of a student.
    """

    def cases(setting: Setting) -> list[str]:
        return [*recipes(setting), *[REAL] * generate]

    def measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
        if case == REAL:
            return quality_of_real(seed, setting, context)
        recipe = recipes(setting)[case]
        teacher = find_teacher(setting, context, recipe.backdrop)
        student = trained(recipe, teacher, setting, seed, context)
        flops, sparsity = cost(recipe, student.config)
        values = losses(student, teacher, setting) | {"attention_mflops": flops / 1e6, "sparsity": sparsity}
        values |= also(student, seed, setting)
        return values | quality(student, setting, context) if generate else values

    return Experiment(cases, measure)
