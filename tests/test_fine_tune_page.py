"""The numbers of docs/fine-tune.md that were measured here are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.run import RESULTS
from experiments.setting import SETTINGS
from experiments.values import at_best_rate, cases_of, read_results, spread_of, values_of

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8").split())
LINES = read_results(RESULTS)
GPU, WAN = (json.loads((RESULTS.parent / f"{name}.json").read_text(encoding="utf-8")) for name in ("gpu", "wan"))


def gib(arm: dict, name: str) -> str:
    return f"{arm[f'{name}_mib'] / 1024:.1f} GiB"


# Cells of the table on cost.
MEMORY: list[Callable[[dict], str]] = [
    lambda arm: gib(arm, "training_peak"),
    lambda arm: gib(arm, "training_held"),
    lambda arm: f"{arm['training_whole_graph_step'] / 1000:.2f} s, {gib(arm, 'training_whole_graph_peak')}",
    lambda arm: f"{arm['lora_step'] / 1000:.2f} s",
    lambda arm: f"{gib(arm, 'lora_peak')}, {gib(arm, 'lora_held')}",
]


def loss(case: str, experiment: str = "when") -> float:
    """The mean held-out loss of a case, with 1,024 tokens."""
    return spread_of(LINES[f"{experiment} n1024"], case).mean


def losses(experiment: str, *cases: str) -> list[str]:
    return [f"{loss(case, experiment):.4f}" for case in cases]


def sentences() -> list[str]:
    """What the page says of the lab and of the GPU."""
    teacher, full, untrained, same, more = losses(
        "main", "teacher", "full attention", "SLA, swapped in, not trained", "sparse only, 5 %", "sparse only, 15 %"
    )
    proj, _, everything, towards = losses("recipes", *cases_of(LINES["recipes n1024"]))
    zero, identity, zero_long, identity_long = losses(
        "ablation-proj", "Proj: zero", "Proj: identity", "Proj: zero, 1600 steps", "Proj: identity, 1600 steps"
    )
    changes = "Proj from the identity, temperature 4"
    both, both_1600, both_3200, sla_1600, sla_3200, slow_3200, more_3200, slow, fast = losses(
        "when",
        f"{changes}: SLA, 5 %",
        f"1600 steps, {changes}: SLA, 5 %",
        f"3200 steps, {changes}: SLA, 5 %",
        "1600 steps: SLA, 5 %",
        "3200 steps: SLA, 5 %",
        "3200 steps, a third of the rate: SLA, 5 %",
        "3200 steps: sparse only, 15 %",
        "a third of the rate: SLA, 5 %",
        "three times the rate: SLA, 5 %",
    )
    shares = losses("ablation-critical", *(f"{share}% critical" for share in ("2.5", "5.0", "10.0", "20.0")))
    negligible = losses("ablation-negligible", *(f"{share}% negligible" for share in (0, 10, 30, 50)))
    tuned = at_best_rate(LINES["mixing n1024"])
    means, sla_tuned, sparse_tuned, token = (
        [
            spread_of(tuned, next(case for case in cases_of(tuned) if case.startswith(f"{steps} steps: {arm}, "))).mean
            for steps in (400, 1600)
        ]
        for arm in (
            "alpha from block means, Proj, temperature 4",
            "SLA, Proj, temperature 4",
            "sparse only, 15 %",
            "alpha from the token, Proj, temperature 4",
        )
    )
    small, large = losses("ablation-block", "blocks of 16", "blocks of 64")
    by_steps = {steps: loss(f"{steps} steps", "ablation-steps") for steps in (50, 100, 200, 400)}
    by_steps |= {steps: loss(f"{steps} steps: SLA, 5 %") for steps in (1600, 3200)}
    gains = [f"{by_steps[steps] - by_steps[2 * steps]:.4f}" for steps in (100, 200, 1600)]
    half = max(values_of(LINES["recipes n1024"], "everything, flow loss", "steps_to_half_the_gap").values())
    dense, sla, square = (WAN["arms"][name] for name in ("SDPA, cuDNN", "SLA 128x64", "SLA 64x64"))
    second, dense_second, forward = (
        milliseconds / 1000 for milliseconds in (sla["training_step"], dense["training_step"], dense["forward"])
    )
    hours, dense_hours, teacher_hours = (2000 * 64 * each / 3600 for each in (second, dense_second, forward))
    cudnn = GPU["wan"]["sdpa_cudnn"]["forward_backward"]
    speed = {row["critical_ratio"]: cudnn / row["forward_backward"] for row in GPU["ratios"]}
    lab = SETTINGS["n1024"]
    return [
        f"{lab.depth} layers of width {lab.width}",
        f"for {lab.steps} steps of {lab.batch} clips",
        f"the teacher has {teacher}, full attention that is fine-tuned as long has {full}, and SLA before any training "
        f"has {untrained}",
        f"{everything}, against {proj} with only Proj",
        f"{towards}, against {everything} with the model's own loss",
        f"{identity}, against {zero} from zero; after 1,600 steps {identity_long} against {zero_long}",
        f"{both} after 400 steps and {both_1600} after 1,600",
        "{} at 2.5 %, {} at 5, {} at 10, {} at 20".format(*shares),
        f"from {min(negligible)} to {max(negligible)} for 0 to 50 %",
        f"{small} with blocks of 16, {large} with 64",
        f"{slow}, {everything} and {fast} at a third of the peak {lab.learning_rate:g}",
        f"after 3,200 steps {slow_3200} at a third, {sla_3200} at {lab.learning_rate:g}",
        f"{by_steps[50]:.4f} after 50, {by_steps[100]:.4f} after 100, {by_steps[400]:.4f} after 400, {sla_1600} after "
        f"1,600, {sla_3200} after 3,200",
        f"within {half:.0f} steps",
        "{} from 100 to 200, {} from 200 to 400, and {} from 1,600 to 3,200".format(*gains),
        f"critical blocks, {everything} against {same}",
        f"three times as many, which has {more}",
        "{:.4f} after 400 steps and {:.4f} after 1,600, each at the best of three learning rates".format(*means),
        "SLA with the same Proj and temperature has {:.4f} and {:.4f}".format(*sla_tuned),
        "sparse-only attention at 15 % has {:.4f} and {:.4f}. In the lab".format(*sparse_tuned),
        "costs almost nothing and reaches {:.4f} and {:.4f}".format(*token),
        f"SLA then has {both_3200}, and sparse-only attention at 15 % has {more_3200}",
        f"{WAN['problem']['tokens']:,} tokens",
        f"| {second:.2f} s | {dense_second:.2f} s |",
        f"| {forward:.2f} s more |",
        *(" | ".join(["", *(text(arm) for arm in (sla, dense)), ""]).strip() for text in MEMORY),
        f"| {hours:.0f} hours | {dense_hours:.0f} hours |",
        f"would add {teacher_hours:.0f} hours",
        f"64 x 64 a step takes {square['training_step'] / 1000:.2f} s",
        f"{speed[0.05]:.1f} times as fast as cuDNN's attention at 5 %, {speed[0.1]:.1f} times at 10 %, "
        f"{speed[0.15]:.1f} times at 15 % and {speed[0.25]:.1f} times at 25 %",
    ]


@pytest.mark.parametrize("sentence", sentences())
def test_the_page_says_what_was_measured(sentence: str):
    assert sentence in PAGE


@pytest.mark.parametrize("number", [r"\b0\.\d{4}\b", r"[\d.,]+ (?:s|GiB|hours)\b", r"\d\.\d times"])
def test_no_other_number_of_a_measurement_is_on_the_page(number: str):
    assert set(re.findall(number, PAGE)) <= set(re.findall(number, " ".join(sentences())))
