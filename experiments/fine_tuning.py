"""What most experiments do: take the teacher, fine-tune a student, evaluate it.

All students of one seed see the same clips, noise and times, so that a comparison of two is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla_ref.lab import evaluate, flow
from sla_ref.lab.model import VideoTransformer
from sla_ref.lab.weights import TEACHER, load_weights, round_to_half, save_weights

from .classifier import quality, quality_of_real
from .recipe import Objective, Recipe, build
from .setting import Context, Experiment, Setting

BETAS, WEIGHT_DECAY, WARMUP, CLIP_NORM = (0.9, 0.95), 0.01, 0.05, 1.0  # as in lab.train
EVALUATION_BATCH = 64
REAL = "held-out clips"

# --- training --------------------------------------------------------------------------------------------------------

# Noisy clips, times, labels and the velocity to find.
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def _flow_loss(student: VideoTransformer, teacher: VideoTransformer, batch: Batch) -> Tensor:
    x, time, labels, velocity = batch
    return F.mse_loss(student(x, time, labels).float(), velocity)


def _teacher_loss(student: VideoTransformer, teacher: VideoTransformer, batch: Batch) -> Tensor:
    x, time, labels, _ = batch
    with torch.no_grad():
        target = teacher(x, time, labels)
    return F.mse_loss(student(x, time, labels).float(), target.float())


def _layers_loss(student: VideoTransformer, teacher: VideoTransformer, batch: Batch) -> Tensor:
    """Each layer by itself: its output beside full attention, on the query, key and value of the teacher's layer.

    Mean over layers of the squared error, in units of the mean square of full attention.
    """
    caught = evaluate.attention_inputs(teacher, *batch[:3])  # without gradient
    losses = []
    for block, inputs in zip(student.blocks, caught, strict=True):
        target = F.scaled_dot_product_attention(*inputs).float()
        output = block.get_submodule("attention.core")(*inputs).float()
        losses.append(F.mse_loss(output, target) / target.square().mean())
    return torch.stack(losses).mean()


OBJECTIVES: dict[Objective, Callable[[VideoTransformer, VideoTransformer, Batch], Tensor]] = {
    "flow": _flow_loss,
    "teacher": _teacher_loss,
    "layers": _layers_loss,
}


def fine_tune(
    student: VideoTransformer,
    teacher: VideoTransformer,
    recipe: Recipe,
    setting: Setting,
    seed: int,
    context: Context,
    watch: Callable[[int], object] = lambda step: None,
) -> None:
    """Trains the student in place by AdamW on a one-cycle schedule; `watch(step)` is called after each step.

    On a GPU under bfloat16 autocast, with float32 weights. Raises FloatingPointError if the loss leaves the finite.
    """
    steps, device = recipe.steps(setting), context.device
    if not steps:
        return
    clips = student.config.clips("train", seed)
    noises = torch.Generator(device).manual_seed(seed)
    recorded = device.type == "cuda" and context.graph
    objective = OBJECTIVES[recipe.objective]
    optimizer, schedule = _optimizer(student, recipe, setting, steps, recorded)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    video = (setting.batch, setting.frames, setting.size, setting.size)
    batch = (
        torch.zeros(video, device=device),
        torch.zeros(setting.batch, device=device),
        torch.zeros(setting.batch, dtype=torch.int64, device=device),
        torch.zeros(video, device=device),
    )
    total = torch.zeros((), device=device)

    def step() -> None:
        # Without autocast's cache of cast weights: it would outlive the recording of a graph.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            loss = objective(student, teacher, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        total.add_(loss.detach())

    run = _record(step, student, optimizer) if recorded else step
    total.zero_()
    for done in range(1, steps + 1):
        clip, labels = clips.batch(setting.batch, device)
        noise = torch.randn(video, generator=noises, device=device)
        time = torch.rand(setting.batch, generator=noises, device=device)
        fresh = (flow.noised(clip, noise, time), time, labels, flow.velocity(clip, noise))
        for buffer, values in zip(batch, fresh, strict=True):
            buffer.copy_(values)
        run()
        schedule.step()
        watch(done)
    if not total.isfinite():
        raise FloatingPointError(f"the mean loss of {steps} steps is {total.item() / steps}")


def _optimizer(
    student: VideoTransformer, recipe: Recipe, setting: Setting, steps: int, recorded: bool
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    peak = setting.learning_rate * recipe.rate
    groups: list[dict[str, Any]] = []
    for is_proj, rate in ((False, peak), (True, peak * recipe.proj_rate)):
        members = [parameter for name, parameter in named if ("proj_l" in name) == is_proj]
        if members:
            # A recorded step reads its rate from the device; a number would be recorded with it.
            groups.append({"params": members, "lr": torch.tensor(rate, device=members[0].device) if recorded else rate})
    peaks = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True, capturable=recorded)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=steps + 1, pct_start=WARMUP, cycle_momentum=False
    )
    return optimizer, schedule


def _record(step: Callable[[], None], student: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The step as a CUDA graph; the steps that warm it up leave no trace."""
    with _undone(student, optimizer):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


@contextmanager
def _undone(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Afterwards the weights are what they were, and the optimizer has seen no step. Both keep their memory."""
    before = [parameter.detach().clone() for parameter in student.parameters()]
    yield
    with torch.no_grad():
        for parameter, old in zip(student.parameters(), before, strict=True):
            parameter.copy_(old)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


# --- teachers --------------------------------------------------------------------------------------------------------


@cache
def find_teacher(setting: Setting, context: Context, backdrop: float = 0.0) -> VideoTransformer:
    """The full-attention model that students start from, without gradients; not to be changed.

    The shipped one where it fits, else one that the folder `work` keeps, trained now if it is not there. Training
    starts from the shipped weights where the width is theirs: nothing in the model depends on the number of tokens.
    `backdrop` is an option of the clips. Raises ValueError if the kept teacher was trained otherwise.
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
        return model.eval().requires_grad_(False)

    torch.manual_seed(0)
    model = VideoTransformer(wanted).to(context.device)
    if wanted.width == shipped.config.width:
        model.load_state_dict(shipped.state_dict())
    fine_tune(model, model, Recipe("full"), replace(setting, steps=setting.teacher_steps), 0, context)
    round_to_half(model)
    context.work.mkdir(parents=True, exist_ok=True)
    save_weights(path, model, {"training": training} | losses(model, model, setting))
    return model.eval().requires_grad_(False)


# --- evaluation ------------------------------------------------------------------------------------------------------


def losses(student: VideoTransformer, teacher: VideoTransformer, setting: Setting) -> dict[str, float]:
    """Held-out loss and distance to the teacher, in float32."""
    data = evaluate.held_out(teacher, setting.clips)
    prediction = evaluate.predict(student, data, EVALUATION_BATCH)
    target = evaluate.predict(teacher, data, EVALUATION_BATCH)
    return {
        "held_out_loss": evaluate.held_out_loss(prediction, data),
        "distance": evaluate.distance(prediction, target),
    }


def of_recipes(
    name: str,
    question: str,
    recipes: Callable[[Setting], dict[str, Recipe]],
    *,
    generate: bool = False,
    paired: bool = False,
) -> Experiment:
    """An experiment whose cases are fine-tunes.

    With `generate`, the clips that a student makes are judged too, and beside them held-out clips, the case `REAL`.
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

    return Experiment(name, question, cases, measure, "held_out_loss", paired, fine_tunes=True)
