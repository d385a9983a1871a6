"""The experiments: what is built and trained, lines that survive an interruption, and a page made of the lines."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments import EXPERIMENTS, comparisons
from experiments.__main__ import main
from experiments.fine_tuning import find_teacher, fine_tune, losses
from experiments.recipe import Recipe, build, tile_order
from experiments.report import fill, read_results, report
from experiments.run import RESULTS, read_lines, run
from experiments.setting import QUICK, SETTINGS, Context, Experiment
from sla_ref.files import append_line
from sla_ref.lab.weights import TEACHER, load_weights

ROOT = Path(__file__).parents[1]
SILENT = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return Context(torch.device("cpu"), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def teacher(context):
    return find_teacher(QUICK, context)


@pytest.fixture
def counted(monkeypatch) -> list[tuple[str, int]]:
    """An experiment "counted" of two cases; the list grows with each measurement."""
    calls: list[tuple[str, int]] = []

    def measure(case, seed, setting, context):
        calls.append((case, seed))
        if case == "breaks":
            raise ArithmeticError("on purpose")
        return {"held_out_loss": seed + 0.5, "distance": 1.0}

    made = Experiment("counted", "Does it count?", lambda setting: ["a", "breaks"], measure, "held_out_loss")
    monkeypatch.setitem(EXPERIMENTS, "counted", made)
    return calls


def start(out, context, **options):
    return run(["counted"], QUICK, options.pop("seeds", [0, 1]), out, context, SILENT, **options)


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_line_says_what_was_measured_and_where(tmp_path, context, counted):
    assert start(tmp_path, context, cases=["a"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"counted.quick.seed{seed}.jsonl" for seed in (0, 1)]
    (line,) = read_lines(tmp_path / "counted.quick.seed1.jsonl")
    about = {"setting", "sizes", "machine", "versions", "commit"}
    assert line.keys() == {"experiment", "case", "seed", "values", "seconds", "ended"} | about
    assert (line["experiment"], line["case"], line["seed"], line["setting"]) == ("counted", "a", 1, "quick")
    assert line["values"] == {"held_out_loss": 1.5, "distance": 1.0}
    assert (line["sizes"]["steps"], line["machine"]["device"]) == (QUICK.steps, "CPU")
    assert line["commit"] == "unknown" or len(line["commit"]) == 40


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
    ],
)
def test_bad_options_are_named_before_any_work(tmp_path, context, counted, options, message):
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "out", context, **options)
    with pytest.raises(ValueError, match=r"experiment must be one of motivation, .* got 'none'"):
        run(["counted", "none"], QUICK, [0], tmp_path / "out", context, SILENT)
    assert counted == [] and not (tmp_path / "out").exists()


def test_every_experiment_runs_quickly(tmp_path, context):
    added = run(list(EXPERIMENTS), QUICK, [0], tmp_path, context, SILENT)
    assert added == sum(len(experiment.cases(QUICK)) for experiment in EXPERIMENTS.values())
    lines = [line for lines in read_results(tmp_path).values() for line in lines]
    assert all(value == value for line in lines for value in line["values"].values())  # no NaN


@pytest.mark.parametrize("setting", SETTINGS)
def test_cases_have_different_names_and_every_setting_has_some(setting):
    for name, experiment in EXPERIMENTS.items():
        cases = experiment.cases(SETTINGS[setting])
        assert cases and len(set(cases)) == len(cases), name
        assert experiment.name == name


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def code(*arguments) -> int:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code

    chosen = ("ablation-steps", "--quick", "--device", "cpu", "--case", "0 steps")
    assert code("run", *chosen, "--seeds", "3,4") == 0
    found = sorted(tmp_path.rglob("*.jsonl"))
    assert [path.name for path in found] == ["ablation-steps.quick.seed3.jsonl", "ablation-steps.quick.seed4.jsonl"]
    assert code("run", *chosen, "--seeds", "3;4") == 2
    assert "seeds must be numbers with commas between them, got '3;4'" in capsys.readouterr().err
    assert code("run", "--setting", "none") == 2
    assert "setting must be one of n1024, n4096, wide, quick, got 'none'" in capsys.readouterr().err
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


def test_one_seed_repeats_and_the_teacher_stays(context, teacher):
    before = [weight.clone() for weight in teacher.parameters()]
    made = []
    for _ in range(2):
        student = build(Recipe(), teacher, QUICK, 0)
        fine_tune(student, teacher, Recipe(), QUICK, 0, context)
        made.append(losses(student, teacher, QUICK))
    assert made[0] == made[1] and made[0]["distance"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_a_teacher_is_the_shipped_one_or_kept_and_not_taken_for_another(context, teacher):
    shipped, _ = load_weights(TEACHER)
    kept, _ = load_weights(context.work / "teacher-quick.safetensors")
    for found, expected in ((find_teacher(SETTINGS["n1024"], context), shipped), (teacher, kept)):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
        assert not any(parameter.requires_grad for parameter in found.parameters())
    with pytest.raises(ValueError, match=r"was trained with .* name another work folder"):
        find_teacher(replace(QUICK, teacher_steps=1), context)


@pytest.mark.parametrize(
    ("recipe", "same"),
    [
        (Recipe("released"), True),  # a Proj of zero
        (Recipe(feature_map="elu"), True),
        (Recipe("sparse"), True),
        (Recipe(proj="identity"), False),
        (Recipe("l+s"), False),
        (Recipe(tiles=True), False),
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


def test_tiles_are_blocks_of_neighbours_and_do_not_matter_where_all_is_critical(teacher):
    order = tile_order(4, 4, (2, 2, 2))
    assert order[:8].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert sorted(order.tolist()) == list(range(64))
    setting = replace(QUICK, tile=(2, 2, 2))  # its order is not its own inverse
    tiled, raster = (build(Recipe(critical_ratio=1.0, tiles=tiles), teacher, setting, 0) for tiles in (True, False))
    assert losses(tiled, teacher, QUICK) == pytest.approx(losses(raster, teacher, QUICK), abs=1e-6)


@pytest.mark.parametrize("changed", [{"rate": 3.0}, {"proj_rate": 10.0}, {"rate": 3.0, "proj_rate": 10.0}])
def test_rates_are_those_of_the_recipe(context, teacher, changed):
    """AdamW's first step is as long as its rate, but for what it decays."""
    one_step = replace(QUICK, steps=1)

    def moved(recipe: Recipe) -> tuple[float, float]:
        student = build(recipe, teacher, QUICK, 0)
        before = [student.out.bias.clone(), student.blocks[0].attention.core.proj_l.bias.clone()]
        fine_tune(student, teacher, recipe, one_step, 0, context)
        after = [student.out.bias, student.blocks[0].attention.core.proj_l.bias]
        return tuple((a - b).abs().median().item() for a, b in zip(after, before, strict=True))

    (others, proj), (plain, plain_proj) = moved(Recipe(**changed)), moved(Recipe())
    rate = changed.get("rate", 1.0)
    assert others == pytest.approx(rate * plain, rel=0.01)
    assert proj == pytest.approx(rate * changed.get("proj_rate", 1.0) * plain_proj, rel=0.01)


@pytest.mark.parametrize(
    ("condition", "changed"),
    {
        "as in main": {},
        "Proj from the identity, temperature 4": {"proj": "identity", "temperature": 4.0},
        "Proj at ten times the rate": {"proj_rate": 10.0},
        "temperature 16": {"temperature": 16.0},
        "100 steps": {"length": 1 / 4},
        "3200 steps, a third of the rate": {"length": 8, "rate": 1 / 3},
        "1600 steps, Proj from the identity, temperature 4": {"length": 4, "proj": "identity", "temperature": 4.0},
        "tokens in tiles": {"tiles": True},
        "blocks of 64": {"block_factor": 4},
        "a backdrop": {"backdrop": 0.5},
    }.items(),
)
def test_a_condition_changes_what_its_name_says(condition, changed):
    assert comparisons.when(SETTINGS["n1024"])[f"{condition}: {comparisons.SLA}"] == Recipe(**changed)


def test_a_condition_changes_all_its_arms():
    recipes = comparisons.when(SETTINGS["n1024"])
    assert recipes["3200 steps: sparse only, 15 %"] == Recipe("sparse", critical_ratio=0.15, length=8)
    assert recipes["a backdrop: teacher"] == Recipe("full", length=0, backdrop=0.5)


# --- the page --------------------------------------------------------------------------------------------------------


def line(experiment: str, case: str, seed: int, ended: float, **values: float) -> dict:
    machine = {"device": "A GPU", "cpu": "a CPU"}
    versions = {"torch": "2.0", "triton": "3.0"}
    about = {"setting": "quick", "sizes": asdict(QUICK), "machine": machine, "versions": versions, "commit": "a" * 40}
    shown = {"experiment": experiment, "case": case, "seed": seed, "values": values}
    return shown | about | {"seconds": 10.0, "ended": ended} | ({"jobs": 2} if seed else {})


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
    assert "25 s for 3 measurements, 1 and 2 at a time" in page  # 100 to 115 and 120 to 130
    assert "(experiments/ablation-proj.quick.svg)" in page
    assert fill(page, {("ablation-proj", "quick"): lines}) == page


def test_pairs_are_compared_seed_by_seed_where_a_condition_has_both():
    values = {
        "as in main: SLA, 5 %": (1.0, 4.0),
        "as in main: sparse only, 5 %": (1.0, 4.0),
        "as in main: sparse only, 15 %": (0.5, 3.0),
        "temperature 4: SLA, 5 %": (0.25, 1.0),
        "32 steps: SLA, 5 %": (0.5,),
        "32 steps: sparse only, 15 %": (0.25, 0.75),
    }
    lines = [line("when", case, s, 0.0, held_out_loss=v) for case, each in values.items() for s, v in enumerate(each)]
    page = fill(place("when"), {("when", "quick"): lines})
    header = "| held-out loss, paired by seed | SLA, 5 %, minus sparse only, 5 % | SLA, 5 %, minus sparse only, 15 % |"
    rows = page[page.index(header) :].split("\n\n")[0].splitlines()[2:]
    assert rows == ["| as in main | 0 | 0.75 (0.5 to 1) |", "| 32 steps | - | 0.25 |"]


def test_the_page_and_the_lines_must_fit():
    with pytest.raises(ValueError, match=r"needs a place .* <!-- report: when quick -->"):
        fill(place("main"), {("when", "quick"): []})
    with pytest.raises(ValueError, match="has a place for 'nothing'"):
        fill(place("nothing"), {})
    assert "Not measured yet." in fill(place("main"), {})


def test_figures_show_every_seed(tmp_path):
    lines = [
        line("recipes", case, seed, 0.0, held_out_loss=0.1 + seed, loss_at_0=1.0, loss_at_4=0.5 + seed)
        for case in EXPERIMENTS["recipes"].cases(QUICK)
        for seed in (0, 1)
    ] + [line("ablation-proj", "Proj: zero", seed, 0.0, held_out_loss=0.1 + seed) for seed in (0, 1, 2)]
    for each in lines:
        append_line(tmp_path / f"{each['experiment']}.quick.seed{each['seed']}.jsonl", each)
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
    assert fill(page, read_results(RESULTS)) == page
    for name, setting in read_results(RESULTS):
        assert (ROOT / "docs" / "experiments" / f"{name}.{setting}.svg").is_file()


def test_many_figures_are_rows():
    lines = [line("ablation-proj", "Proj: zero", 0, 0.0, **{f"figure_{n}": float(n) for n in range(9)})]
    page = fill(place("ablation-proj"), {("ablation-proj", "quick"): lines})
    assert "|  | Proj: zero |\n| --- | --- |\n| figure 0 | 0 |\n" in page
