"""What most experiments do: build a student from the teacher, fine-tune it, evaluate it.

A `Recipe` says what is varied. All students of one seed see the same clips, noise and times, so that a comparison of
two is paired. The loop is a small sister of `lab.train`: it keeps no checkpoint, and on a GPU it records one step as a
CUDA graph and replays it, because such a small model spends more time in Python than in its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_ref

from .. import evaluate, flow
from ..arms import ArmOptions, LinearOnly, SparseOnly
from ..data import NO_DIGIT
from ..model import PATCH, VideoTransformer, with_attention
from ..weights import TEACHER, load_weights, round_to_half, save_weights
from . import Context, Experiment, Setting

BETAS, WEIGHT_DECAY, WARMUP, CLIP_NORM = (0.9, 0.95), 0.01, 0.05, 1.0  # as in lab.train
EVALUATION_BATCH = 64
PROJ = ("zero", "identity", "absent")
ORDERS = ("raster", "tiles")
REAL = "held-out clips"


@dataclass(frozen=True)
class Recipe:
    """A student and its training; the defaults are SLA as the paper has it."""

    attention: str = "sla"
    """An arm of `lab.arms`, or "released": the linear branch over all keys, as in the authors' branch main."""
    critical_ratio: float = 0.05
    negligible_ratio: float = 0.10
    block_factor: int = 1
    """Tokens of a block, in units of the setting's."""
    feature_map: str = "softmax"
    temperature: float = 1.0
    """t in softmax(t x); other feature maps know none."""
    proj: str = "zero"
    """How Proj starts; "absent" is an identity that stays one."""
    order: str = "raster"
    """Of the tokens that are cut into blocks."""
    backdrop: float = 0.0
    """Of the clips (`lab.data`); the teacher has learnt them too."""
    length: float = 1.0
    """Fine-tuning steps, in units of the setting's; 0: swapped in, not trained."""
    trained: str = ""
    """Part of the names of the parameters that are trained; "" is in all of them."""
    objective: str = "flow"
    rate: float = 1.0
    """Learning rate, in units of the setting's."""
    proj_rate: float = 1.0
    """Learning rate of Proj, in units of the others'."""

    def steps(self, setting: Setting) -> int:
        """Of the fine-tune."""
        return round(self.length * setting.steps)


# --- attention -------------------------------------------------------------------------------------------------------


class ReleasedSLA(nn.Module):
    """`integrations.thu_ml`'s variant "main" in the dtype of its input: O^s + Proj(linear attention over all keys)."""

    def __init__(self, options: ArmOptions) -> None:
        super().__init__()
        self.sparse, self.linear = SparseOnly(options), LinearOnly()
        self.proj_l = nn.Linear(options.head_dim, options.head_dim)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sparse: Tensor = self.sparse(query, key, value)
        projected: Tensor = self.proj_l(self.linear(query, key, value))
        return sparse + projected.to(sparse.dtype)


class Reordered(nn.Module):
    """Attention over tokens in another order, and its output in the old one.

    Attention does not ask for the order of tokens; which of them make a block does.
    """

    order: Tensor
    back: Tensor

    def __init__(self, core: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.core(*(each.index_select(2, self.order) for each in (query, key, value)))
        return out.index_select(2, self.back)


def tile_order(frames: int, side: int, tile: tuple[int, int, int]) -> Tensor:
    """The tokens (frames * side^2) in raster order, sorted by tiles of so many frames, rows and columns."""
    for name, length, part in zip(("frames", "rows", "columns"), (frames, side, side), tile, strict=True):
        if length % part:
            raise ValueError(f"tile must divide {length} {name}, got {part}")
    time, rows, columns = tile
    grid = torch.arange(frames * side * side)
    grid = grid.view(frames // time, time, side // rows, rows, side // columns, columns)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten()


def _core(recipe: Recipe, options: ArmOptions) -> nn.Module:
    if recipe.attention == "released":
        return ReleasedSLA(options)
    feature_map: Any = recipe.feature_map
    if recipe.temperature != 1:
        feature_map = lambda tokens: torch.softmax(recipe.temperature * tokens, dim=-1)  # noqa: E731
    core = sla_ref.SparseLinearAttention(
        options.head_dim,
        options.critical_ratio,
        options.negligible_ratio,
        block_q=options.block,
        block_k=options.block,
        feature_map=feature_map,
    )
    if recipe.proj != "zero":
        nn.init.eye_(core.proj_l.weight)
    core.proj_l.requires_grad_(recipe.proj != "absent")
    return core


def build(recipe: Recipe, teacher: VideoTransformer, setting: Setting, seed: int) -> VideoTransformer:
    """The teacher's weights with the recipe's attention; only what the recipe trains wants a gradient.

    The seed decides the weights of a learnable feature map.
    """
    for name, value, allowed in (
        ("proj", recipe.proj, PROJ),
        ("order", recipe.order, ORDERS),
        ("objective", recipe.objective, tuple(OBJECTIVES)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    torch.manual_seed(seed)
    student = with_attention(
        teacher,
        "sla" if recipe.attention == "released" else recipe.attention,
        critical_ratio=recipe.critical_ratio,
        negligible_ratio=recipe.negligible_ratio,
        block=recipe.block_factor * setting.block,
    )
    config = student.config
    options = ArmOptions(config.head_dim, config.critical_ratio, config.negligible_ratio, config.block)
    student.requires_grad_(True)
    for block in student.blocks:
        attention = block.get_submodule("attention")
        if config.attention == "sla":
            attention.core = _core(recipe, options)
        if recipe.order == "tiles":
            tiles = tile_order(setting.frames, setting.size // PATCH, setting.tile)
            attention.core = Reordered(attention.get_submodule("core"), tiles)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and recipe.trained in name)
    return student.to(next(teacher.parameters()).device)


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


OBJECTIVES: dict[str, Callable[[VideoTransformer, VideoTransformer, Batch], Tensor]] = {
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
        torch.zeros(setting.batch, 2, dtype=torch.int64, device=device),
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
        context.tick(done, None)
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


def load_or_train_teacher(setting: Setting, backdrop: float, context: Context) -> VideoTransformer:
    """What `Context.teacher` gives: the shipped weights where they fit, else those in `work`, trained if need be.

    Training starts from the shipped weights where they have the right width, because nothing in the model depends on
    the number of tokens.
    """
    shipped, _ = load_weights(TEACHER)
    wanted = replace(setting.model, backdrop=backdrop)
    if wanted == replace(shipped.config, block=setting.block):
        return shipped.to(context.device).eval().requires_grad_(False)

    name = f"teacher-{setting.name}" + (f"-backdrop-{backdrop}" if backdrop else "")
    path = context.work / f"{name}.safetensors"
    training = {"steps": setting.teacher_steps, "batch": setting.batch, "learning_rate": setting.learning_rate}
    if path.exists():
        model, card = load_weights(path, context.device)
        if card["training"] != training:
            raise ValueError(f"{path} was trained with {card['training']}, not {training}; name another work folder")
        return model.eval().requires_grad_(False)

    torch.manual_seed(0)
    model = VideoTransformer(wanted)
    if (wanted.width, wanted.depth, wanted.heads) == (
        shipped.config.width,
        shipped.config.depth,
        shipped.config.heads,
    ):
        model.load_state_dict(shipped.state_dict())
    model.to(context.device)
    fine_tune(model, model, Recipe("full"), replace(setting, steps=setting.teacher_steps), 0, context)
    round_to_half(model)
    data = evaluate.held_out(model, setting.clips)
    loss = evaluate.held_out_loss(evaluate.predict(model, data, EVALUATION_BATCH), data)
    context.work.mkdir(parents=True, exist_ok=True)
    save_weights(path, model, {"training": training, "held_out_loss": loss, "held_out_clips": setting.clips})
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


def quality(student: VideoTransformer, setting: Setting, context: Context) -> dict[str, float]:
    """What generated clips are worth to a classifier of digits: all from the same noise, as many of each digit."""
    device = context.device
    generator = torch.Generator().manual_seed(evaluate.HELD_OUT_SEED)
    noise = torch.randn(setting.samples, setting.frames, setting.size, setting.size, generator=generator)
    digits = torch.arange(setting.samples) % 10
    labels = torch.stack([digits, torch.full_like(digits, NO_DIGIT)], dim=1)
    made = []
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for part in torch.arange(setting.samples).split(EVALUATION_BATCH):
            made.append(
                flow.sample(student, noise[part].to(device), labels[part].to(device), setting.sample_steps).float()
            )
    return _judged(torch.cat(made), labels.to(device), setting, context)


def _quality_of_real(seed: int, setting: Setting, context: Context) -> dict[str, float]:
    """The same of held-out clips: the best that a model can reach, and the accuracy of the classifier."""
    clips = setting.model.clips("held_out", evaluate.HELD_OUT_SEED + 2 + seed).batch(setting.samples, context.device)
    return _judged(*clips, setting, context)


def _judged(clips: Tensor, labels: Tensor, setting: Setting, context: Context) -> dict[str, float]:
    """Fréchet distance to as many held-out clips, and the share of clips whose digit the classifier recognises."""
    from ..classifier import clip_features, frechet_distance, recognised_share

    classifier = context.classifier(setting)
    real, _ = setting.model.clips("held_out", evaluate.HELD_OUT_SEED + 1).batch(setting.samples, context.device)
    return {
        "frechet": frechet_distance(*(clip_features(classifier, each) for each in (clips, real))),
        "recognised": recognised_share(classifier, clips, labels),
    }


def cost(student: VideoTransformer) -> dict[str, float]:
    """Attention's MFLOPs in one forward of one clip, and its sparsity."""
    flops, sparsity = evaluate.attention_cost(student.config)
    return {"attention_mflops": flops / 1e6, "sparsity": sparsity}


# --- experiments -----------------------------------------------------------------------------------------------------


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

    def prepare(setting: Setting, context: Context) -> None:
        for backdrop in sorted({recipe.backdrop for recipe in recipes(setting).values()}):
            context.teacher(setting, backdrop=backdrop)
        if generate:
            context.classifier(setting)

    def cases(setting: Setting) -> list[str]:
        return [*recipes(setting), *[REAL] * generate]

    def measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
        if case == REAL:
            return _quality_of_real(seed, setting, context)
        recipe = recipes(setting)[case]
        teacher = context.teacher(setting, backdrop=recipe.backdrop)
        student = build(recipe, teacher, setting, seed)
        fine_tune(student, teacher, recipe, setting, seed, context)
        values = losses(student, teacher, setting) | cost(student)
        return values | quality(student, setting, context) if generate else values

    return Experiment(
        name,
        question,
        cases,
        measure,
        prepare,
        shown="held_out_loss",
        paired=paired,
        fine_tunes=True,
    )
