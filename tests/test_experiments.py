"""The experiments: what is built and trained, lines that survive an interruption, and a page made of the lines."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sla_ref import cli
from sla_ref.lab.data import MovingDigits
from sla_ref.lab.experiments import (
    EXPERIMENTS,
    Context,
    Experiment,
    find_experiment,
    find_setting,
    runner,
    students,
    when,
)
from sla_ref.lab.experiments.report import fill, read_results, report
from sla_ref.lab.experiments.runner import read_lines, run
from sla_ref.lab.experiments.students import Recipe, build, fine_tune, losses, tile_order

ROOT = Path(__file__).parents[1]
QUICK = find_setting("quick")
SILENT = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return Context(torch.device("cpu"), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def teacher(context):
    return context.teacher(QUICK)


@pytest.fixture
def counted(monkeypatch) -> list[tuple[str, int]]:
    """An experiment "counted" of two cases; the list grows with each measurement."""
    calls: list[tuple[str, int]] = []

    def measure(case, seed, setting, context):
        calls.append((case, seed))
        if case == "breaks":
            raise ArithmeticError("on purpose")
        return {"held_out_loss": seed + 0.5, "distance": 1.0}

    made = Experiment("counted", "Does it count?", lambda setting: ["a", "breaks"], measure, shown="held_out_loss")
    monkeypatch.setattr(runner, "find_experiment", lambda name: made)
    return calls


def start(out, context, **options):
    return run(["counted"], QUICK, options.pop("seeds", [0, 1]), out, context, SILENT, commit="abc", **options)


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_line_says_what_was_measured_and_where(tmp_path, context, counted):
    assert start(tmp_path, context, cases=["a"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"counted.quick.seed{seed}.jsonl" for seed in (0, 1)]
    (line,) = read_lines(tmp_path / "counted.quick.seed1.jsonl")
    about = {"setting", "sizes", "machine", "versions", "commit", "jobs"}
    assert line.keys() == {"experiment", "case", "seed", "values", "seconds", "ended"} | about
    assert (line["experiment"], line["case"], line["seed"], line["setting"]) == ("counted", "a", 1, "quick")
    assert line["values"] == {"held_out_loss": 1.5, "distance": 1.0}
    assert (line["commit"], line["sizes"]["steps"], line["machine"]["device"]) == ("abc", QUICK.steps, "CPU")


def test_a_measured_case_is_not_run_again_and_a_torn_line_is(tmp_path, context, counted):
    start(tmp_path, context, cases=["a"])
    assert start(tmp_path, context, cases=["a"]) == 0 and len(counted) == 2
    path = tmp_path / "counted.quick.seed1.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-20], encoding="utf-8")
    assert read_lines(path) == []
    assert start(tmp_path, context, cases=["a"]) == 1
    assert counted[2:] == [("a", 1)] and len(read_lines(path)) == 1
    path.write_text(whole + whole[:30], encoding="utf-8")  # a torn line after a good one
    assert start(tmp_path, context, cases=["a"]) == 0
    assert path.read_text(encoding="utf-8") == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path, context, counted):
    (tmp_path / "counted.quick.seed0.jsonl").write_text("{no\n{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"seed0\.jsonl, line 1, is no JSON"):
        start(tmp_path, context)
    assert counted == []


def test_a_case_that_fails_stops_no_other(tmp_path, context, counted):
    with pytest.raises(RuntimeError, match="2 of 4 cases failed\ncounted, seed 0, breaks: ArithmeticError: on purpose"):
        start(tmp_path, context)
    assert counted == [("a", 0), ("a", 1), ("breaks", 0), ("breaks", 1)]
    assert len(read_lines(tmp_path / "counted.quick.seed0.jsonl")) == 1


def test_no_case_is_started_after_the_time_is_up(tmp_path, context, counted):
    assert start(tmp_path, context, minutes=0) == 0
    assert counted == []


def test_lines_of_other_sizes_are_not_mixed(tmp_path, context, counted):
    start(tmp_path, context, cases=["a"])
    with pytest.raises(ValueError, match=r"measured with \{'steps': 8\}; name another folder"):
        run(["counted"], replace(QUICK, steps=9), [0], tmp_path, context, SILENT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds must be different numbers"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"seeds": [-1]}, "seeds must be different numbers"),
        ({"cases": ["c"]}, "case must be one of a; breaks, got 'c'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named_before_any_work(tmp_path, context, counted, options, message):
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "out", context, **options)
    assert counted == [] and not (tmp_path / "out").exists()


def test_bad_names_are_named():
    with pytest.raises(ValueError, match=r"experiment must be one of motivation, .* got 'none'"):
        find_experiment("none")
    with pytest.raises(ValueError, match="setting must be one of n1024, n4096, wide, quick, got 'none'"):
        find_setting("none")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        replace(QUICK, steps=0)


def test_processes_side_by_side_measure_the_same(tmp_path, teacher, context):
    for jobs in (1, 2):
        run(["ablation-steps"], QUICK, [0, 1], tmp_path / str(jobs), context, SILENT, cases=["2 steps"], jobs=jobs)
    for seed in (0, 1):
        one, two = (
            read_lines(tmp_path / str(jobs) / f"ablation-steps.quick.seed{seed}.jsonl")[0]["values"] for jobs in (1, 2)
        )
        assert one == two


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(tmp_path, context, name):
    assert run([name], QUICK, [0], tmp_path, context, SILENT) == len(EXPERIMENTS[name].cases(QUICK))
    lines = [line for lines in read_results(tmp_path).values() for line in lines]
    assert all(value == value for line in lines for value in line["values"].values())  # no NaN


@pytest.mark.parametrize("setting", ["n1024", "n4096", "wide", "quick"])
def test_cases_have_different_names_and_every_setting_has_some(setting):
    for name, experiment in EXPERIMENTS.items():
        cases = experiment.cases(find_setting(setting))
        assert cases and len(set(cases)) == len(cases), name
        assert experiment.name == name


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def code(*arguments) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(["experiments", *arguments])
        return end.value.code

    chosen = ("ablation-steps", "--quick", "--device", "cpu", "--case", "0 steps")
    assert code("run", *chosen, "--seeds", "3,4", "--commit", "abc") == 0
    found = sorted(tmp_path.rglob("*.jsonl"))
    assert [path.name for path in found] == ["ablation-steps.quick.seed3.jsonl", "ablation-steps.quick.seed4.jsonl"]
    assert code("run", *chosen, "--seeds", "3;4") == 1
    assert "seeds must be numbers with commas between them, got '3;4'" in capsys.readouterr().err
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "experiments.md").write_text(
        "<!-- report: ablation-steps quick -->\n<!-- end of report -->\n", encoding="utf-8"
    )
    assert code("report", "--results", "runs/experiments-quick") == 0
    assert "| 0 steps |" in (tmp_path / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert (
        (tmp_path / "docs" / "experiments" / "ablation-steps.quick.svg").read_text(encoding="utf-8").startswith("<?xml")
    )


# --- students --------------------------------------------------------------------------------------------------------


def test_the_shipped_teacher_is_used_where_it_fits():
    from sla_ref.lab.weights import TEACHER, load_weights

    context = Context(torch.device("cpu"), Path("/nowhere"))  # nothing is written
    teacher = context.teacher(find_setting("n1024"))
    shipped, _ = load_weights(TEACHER)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), shipped.parameters(), strict=True))
    assert context.teacher(find_setting("n1024")) is teacher


def test_a_trained_teacher_is_kept_and_not_taken_for_another(context, teacher):
    again = Context(context.device, context.work).teacher(QUICK)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), teacher.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"was trained with .* name another work folder"):
        Context(context.device, context.work).teacher(replace(QUICK, teacher_steps=1))


def test_one_seed_repeats_and_the_teacher_stays(context, teacher):
    before = [weight.clone() for weight in teacher.parameters()]
    made = []
    for _ in range(2):
        student = build(Recipe(), teacher, QUICK, 0)
        fine_tune(student, teacher, Recipe(), QUICK, 0, context)
        made.append(losses(student, teacher, QUICK))
    assert made[0] == made[1] and made[0]["distance"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


@pytest.mark.parametrize(
    ("recipe", "same"),
    [
        (Recipe("released"), True),  # a Proj of zero
        (Recipe(feature_map="elu"), True),
        (Recipe("sparse"), True),
        (Recipe(proj="identity"), False),
        (Recipe("l+s"), False),
        (Recipe(order="tiles"), False),
        (Recipe(critical_ratio=0.2), False),
        (Recipe(block_factor=2), False),
    ],
)
def test_what_a_recipe_changes_before_training(teacher, recipe, same):
    sla, other = (losses(build(each, teacher, QUICK, 0), teacher, QUICK) for each in (Recipe(), recipe))
    assert (sla == pytest.approx(other, abs=1e-7)) is same


def test_proj_absent_is_the_identity_that_stays_one(context, teacher):
    recipe = Recipe(proj="absent")
    student = build(recipe, teacher, QUICK, 0)
    assert losses(student, teacher, QUICK) == losses(build(Recipe(proj="identity"), teacher, QUICK, 0), teacher, QUICK)
    fine_tune(student, teacher, recipe, QUICK, 0, context)
    assert torch.equal(student.blocks[0].attention.core.proj_l.weight, torch.eye(16))


@pytest.mark.parametrize("objective", ["flow", "teacher", "layers"])
def test_proj_alone_leaves_the_rest_as_it_was(context, teacher, objective):
    recipe = Recipe(trained="proj_l", objective=objective)
    student = build(recipe, teacher, QUICK, 0)
    fine_tune(student, teacher, recipe, QUICK, 0, context)
    old = teacher.state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, old[name]) if name in old else weight.abs().sum() > 0, name


def test_all_blocks_critical_match_the_teacher_layer_by_layer(teacher):
    student = build(Recipe(critical_ratio=1.0), teacher, QUICK, 0)
    batch = (torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([[1, 10], [2, 10]]), torch.zeros(2, 4, 16, 16))
    assert students.OBJECTIVES["layers"](student, teacher, batch).item() < 1e-10
    sparse = build(Recipe(), teacher, QUICK, 0)
    assert students.OBJECTIVES["layers"](sparse, teacher, batch).item() > 1e-3


def test_tiles_are_blocks_of_neighbours():
    order = tile_order(4, 4, (2, 2, 2))
    assert order[:8].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert sorted(order.tolist()) == list(range(64))
    with pytest.raises(ValueError, match="tile must divide 4 rows, got 3"):
        tile_order(4, 4, (2, 3, 2))


def test_order_does_not_matter_where_all_is_critical(teacher):
    raster, tiles = (
        losses(build(Recipe(critical_ratio=1.0, order=order), teacher, QUICK, 0), teacher, QUICK)
        for order in ("raster", "tiles")
    )
    assert raster == pytest.approx(tiles, abs=1e-6)


def test_the_rate_of_proj_is_its_own(teacher):
    recipe = Recipe(rate=3.0, proj_rate=10.0)
    student = build(recipe, teacher, QUICK, 0)
    optimizer, _ = students._optimizer(student, recipe, QUICK, 10, recorded=False)
    others, proj = optimizer.param_groups
    assert proj["lr"] == pytest.approx(10 * others["lr"])
    plain, _ = students._optimizer(student, Recipe(), QUICK, 10, recorded=False)
    assert others["lr"] == pytest.approx(3 * plain.param_groups[0]["lr"])
    assert [tuple(weight.shape) for weight in proj["params"]] == [(16, 16), (16,)] * 2


def test_steps_that_warm_a_recording_up_leave_no_trace(teacher):
    student = build(Recipe(), teacher, QUICK, 0)
    optimizer, _ = students._optimizer(student, Recipe(), QUICK, 10, recorded=False)
    before = [weight.detach().clone() for weight in student.parameters()]
    with students._undone(student, optimizer):
        student(torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([[1, 10]])).square().mean().backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


def test_a_condition_changes_what_its_name_says():
    recipes = when.recipes(find_setting("n1024"))
    changes = {
        "as in main": {},
        "Proj from the identity, temperature 4": {"proj": "identity", "temperature": 4.0},
        "Proj at ten times the rate": {"proj_rate": 10.0},
        "temperature 16": {"temperature": 16.0},
        "100 steps": {"length": 1 / 4},
        "1600 steps": {"length": 4},
        "1600 steps, Proj from the identity, temperature 4": {"length": 4, "proj": "identity", "temperature": 4.0},
        "3200 steps, a third of the rate": {"length": 8, "rate": 1 / 3},
        "3200 steps, a third of the rate, Proj from the identity, temperature 4": {
            "length": 8,
            "rate": 1 / 3,
            "proj": "identity",
            "temperature": 4.0,
        },
        "tokens in tiles": {"order": "tiles"},
        "blocks of 64": {"block_factor": 4},
        "a backdrop": {"backdrop": when.BACKDROP},
    }
    for condition, changed in changes.items():
        assert recipes[f"{condition}: {when.SLA}"] == replace(Recipe(), **changed)
    assert recipes["3200 steps: sparse only, 15 %"] == Recipe("sparse", critical_ratio=0.15, length=8)
    assert recipes["a backdrop: teacher"] == Recipe("full", length=0, backdrop=when.BACKDROP)


@pytest.mark.parametrize("name", ["proj", "order", "objective"])
def test_a_bad_recipe_is_named(teacher, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'no'"):
        build(Recipe(**{name: "no"}), teacher, QUICK, 0)


def test_a_backdrop_is_one_level_per_clip_and_changes_nothing_else():
    plain, backed = (MovingDigits("train", 5, backdrop=level).batch(4)[0] for level in (0.0, 0.5))
    level = backed.amin(dim=(1, 2, 3), keepdim=True)
    assert level.amax() < 0 and len(level.unique()) == 4
    assert torch.equal(backed, plain.maximum(level))
    with pytest.raises(ValueError, match="backdrop must be between 0 and 1, got 2"):
        MovingDigits("train", 0, backdrop=2)


# --- the page --------------------------------------------------------------------------------------------------------


def line(experiment: str, case: str, seed: int, ended: float, **values: float) -> dict:
    machine = {"device": "A GPU", "cpu": "a CPU"}
    versions = {"torch": "2.0", "triton": "3.0"}
    about = {"setting": "quick", "sizes": asdict(QUICK), "machine": machine, "versions": versions, "commit": "a" * 40}
    shown = {"experiment": experiment, "case": case, "seed": seed, "values": values}
    return shown | about | {"seconds": 10.0, "ended": ended, "jobs": 2}


def place(name: str) -> str:
    return f"Before.\n<!-- report: {name} quick -->\nold\n<!-- end of report -->\nAfter.\n"


def test_a_figure_with_bounds_of_its_own_shows_them():
    bounded = {"stable_rank": 2.0, "stable_rank_min": 1.0, "stable_rank_max": 4.0}
    lines = [line("motivation", "t = 0.5", seed, 10.0 + seed, **bounded) for seed in (0, 1)]
    page = fill(place("motivation"), {("motivation", "quick"): lines})
    assert "| t = 0.5 | 2; 1 to 4 |" in page and "min" not in page.replace("minus", "")
    assert "behind a semicolon" in page


def test_a_table_of_known_lines():
    lines = [
        line("ablation-proj", "Proj: identity", 0, 110.0, held_out_loss=0.3),
        line("ablation-proj", "Proj: zero", 0, 115.0, held_out_loss=0.1, sparsity=0.5),
        line("ablation-proj", "Proj: zero", 1, 130.0, held_out_loss=0.2, sparsity=0.5),
    ]
    page = fill(place("ablation-proj"), {("ablation-proj", "quick"): lines})
    assert page.startswith("Before.\n<!--") and page.endswith("-->\nAfter.\n") and "old" not in page
    assert "|  | held-out loss | sparsity |\n| --- | --- | --- |\n| Proj: zero | 0.15 (0.1 to 0.2) | 0.5 |\n" in page
    assert "| Proj: identity (seed 0 alone) | 0.3 | - |" in page, "a case with fewer seeds says so"
    assert "2 seeds (0, 1)" in page and "A GPU, torch 2.0, Triton 3.0, commit aaaaaaaaaaaa;" in page
    assert "8 steps of 4 clips where a row does not say otherwise, learning rate 0.001" in page
    assert "25 s for 3 measurements, 2 at a time" in page  # 100 to 115 and 120 to 130
    assert "(experiments/ablation-proj.quick.svg)" in page
    assert fill(page, {("ablation-proj", "quick"): lines}) == page


def test_pairs_are_compared_seed_by_seed():
    values = {
        "as in main: SLA, 5 %": (1.0, 4.0),
        "as in main: sparse only, 15 %": (0.5, 3.0),
        "temperature 4: SLA, 5 %": (0.25, 1.0),
        "32 steps: SLA, 5 %": (0.5, 1.0),
        "32 steps: sparse only, 15 %": (0.25, 0.75),
        "32 steps, Proj from the identity, temperature 4: SLA, 5 %": (0.125, 0.625),
        "a backdrop: SLA, 5 %": (0.5, 0.5),
    }
    lines = [line("when", case, s, 0.0, held_out_loss=v) for case, each in values.items() for s, v in enumerate(each)]
    page = fill(place("when"), {("when", "quick"): lines})
    assert "| held-out loss, paired by seed | SLA, 5 %, minus sparse only, 15 % |" in page
    assert "| as in main | 0.75 (0.5 to 1) |" in page
    assert "| temperature 4 | -1.125 (-2 to -0.25) |" in page  # beside the sparse arm of the condition above
    assert "| 32 steps | 0.25 |" in page
    assert "| 32 steps, Proj from the identity, temperature 4 | -0.125 |" in page  # beside those of as many steps
    assert "| a backdrop | - |" in page  # its own sparse arm is not measured yet: no other one takes its place


def test_the_page_and_the_lines_must_fit():
    with pytest.raises(ValueError, match=r"needs a place .* <!-- report: when quick -->"):
        fill(place("main"), {("when", "quick"): []})
    with pytest.raises(ValueError, match="has a place for 'nothing'"):
        fill(place("nothing"), {})
    assert "Not measured yet." in fill(place("main"), {})


def test_figures_show_every_seed(tmp_path):
    lines = [
        line("recipes", case, seed, 0.0, held_out_loss=0.1 + seed, loss_at_0=1.0, loss_at_4=0.5 + seed)
        for case in find_experiment("recipes").cases(QUICK)
        for seed in (0, 1)
    ] + [line("ablation-proj", "Proj: zero", seed, 0.0, held_out_loss=0.1 + seed) for seed in (0, 1, 2)]
    for each in lines:
        runner.append_line(tmp_path / f"{each['experiment']}.quick.seed{each['seed']}.jsonl", each)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "experiments.md").write_text(place("recipes") + place("ablation-proj"), encoding="utf-8")
    written = report(tmp_path, docs)
    assert [path.name for path in written] == ["experiments.md", "ablation-proj.quick.svg", "recipes.quick.svg"]
    assert "loss at" not in (docs / "experiments.md").read_text(encoding="utf-8")  # curves are for the figure
    bytes_ = [path.read_bytes() for path in written]
    report(tmp_path, docs)
    assert [path.read_bytes() for path in written] == bytes_


def test_the_committed_page_is_what_the_committed_lines_give():
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert fill(page, read_results(ROOT / runner.RESULTS)) == page
    for name, setting in read_results(ROOT / runner.RESULTS):
        if find_experiment(name).shown:
            assert (ROOT / "docs" / "experiments" / f"{name}.{setting}.svg").is_file()


def test_a_line_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "x.jsonl"
    runner.append_line(path, {"case": "5 %, ü"})
    runner.append_line(path, {"case": "two"})
    assert read_lines(path) == [{"case": "5 %, ü"}, {"case": "two"}]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[1]) == {"case": "two"}


def test_many_figures_are_rows():
    lines = [line("ablation-proj", "Proj: zero", 0, 0.0, **{f"figure_{n}": float(n) for n in range(9)})]
    page = fill(place("ablation-proj"), {("ablation-proj", "quick"): lines})
    assert "|  | Proj: zero |\n| --- | --- |\n| figure 0 | 0 |\n" in page
