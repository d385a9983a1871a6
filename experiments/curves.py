"""What to fine-tune, and towards what: only Proj or everything, the flow loss or the teacher."""

from __future__ import annotations

from .fine_tuning import find_teacher, fine_tune, losses
from .recipe import Recipe, build
from .setting import Context, Experiment, Setting

RECIPES = {
    "Proj alone, flow loss": Recipe(trained="proj_l"),
    "Proj alone, each layer by itself": Recipe(trained="proj_l", objective="layers"),
    "everything, flow loss": Recipe(),
    "everything, towards the teacher": Recipe(objective="teacher"),
}


def _measure(case: str, seed: int, setting: Setting, context: Context) -> dict[str, float]:
    """Loss and distance at the end, the loss at nine points, and the first point where half of the gap is closed.

    The gap is the difference between the untrained student's held-out loss and the teacher's. A recipe that never
    closes half of it has no such step.
    """
    recipe, teacher = RECIPES[case], find_teacher(setting, context)
    student = build(recipe, teacher, setting, seed)
    start = losses(student, teacher, setting)["held_out_loss"]
    half = (start + losses(teacher, teacher, setting)["held_out_loss"]) / 2
    values = {"loss_at_0": start}

    def watch(step: int) -> None:
        if step % (setting.steps // 8) == 0:
            values[f"loss_at_{step}"] = loss = losses(student, teacher, setting)["held_out_loss"]
            if loss <= half:
                values.setdefault("steps_to_half_the_gap", step)

    fine_tune(student, teacher, recipe, setting, seed, context, watch)
    return losses(student, teacher, setting) | values


EXPERIMENT = Experiment(lambda setting: list(RECIPES), _measure)
