"""The experiments: what is built and trained, lines that survive an interruption, and a page made of the lines."""

from __future__ import annotations

import io
import re
from dataclasses import asdict, replace
from pathlib import Path

import markdown
import pytest
import torch
from rich.console import Console

import sla_ref
from experiments import EXPERIMENTS, comparisons, figures, mixing
from experiments.__main__ import main
from experiments.attention_maps import noisy_clips
from experiments.centroids import Centroids
from experiments.fine_tuning import find_teacher, fine_tune, losses, trained
from experiments.mixing import error_of_rows
from experiments.recipe import Recipe, build
from experiments.report import DOCS, fill, report
from experiments.run import RESULTS, read_lines, run
from experiments.setting import QUICK, SETTINGS, Context, Experiment
from experiments.values import at_best_rate, cases_of, read_results, spread_of
from sla_ref.feature_maps import Softmax
from sla_ref.lab import evaluate
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
    """An experiment "counted" of the cases a and b; the list grows with each measurement."""
    calls: list[tuple[str, int]] = []

    def measure(case, seed, setting, context):
        calls.append((case, seed))
        if seed == 9:
            raise ArithmeticError("on purpose")
        return {"held_out_loss": seed + 0.5, "distance": 1.0}

    monkeypatch.setitem(EXPERIMENTS, "counted", Experiment(lambda setting: ["a", "b"], measure))
    return calls


def start(out, context, *seeds: int):
    return run(["counted"], QUICK, list(seeds), out, context, SILENT)


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_line_says_what_was_measured_and_where(tmp_path, context, counted):
    assert start(tmp_path, context, 0, 1) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"counted.quick.seed{seed}.jsonl" for seed in (0, 1)]
    line, other = read_lines(tmp_path / "counted.quick.seed1.jsonl")
    about = {"setting", "sizes", "machine", "versions", "commit"}
    assert line.keys() == {"experiment", "case", "seed", "values", "seconds", "ended"} | about
    assert (line["experiment"], line["case"], line["seed"], line["setting"]) == ("counted", "a", 1, "quick")
    assert line["values"] == {"held_out_loss": 1.5, "distance": 1.0} and other["case"] == "b"
    assert (line["sizes"]["steps"], line["machine"]["device"]) == (QUICK.steps, "CPU")
    assert line["commit"] == "unknown" or len(line["commit"]) == 40


def test_a_measured_case_is_not_run_again_and_a_torn_line_is(tmp_path, context, counted):
    start(tmp_path, context, 1)
    assert start(tmp_path, context, 1) == 0 and len(counted) == 2
    path = tmp_path / "counted.quick.seed1.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-20], encoding="utf-8")
    assert len(read_lines(path)) == 1
    assert start(tmp_path, context, 1) == 1
    assert counted[2:] == [("b", 1)] and len(read_lines(path)) == 2
    path.write_text(whole + whole[:30], encoding="utf-8")  # a torn line after good ones
    assert start(tmp_path, context, 1) == 0
    assert path.read_text(encoding="utf-8") == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path, context, counted):
    (tmp_path / "counted.quick.seed0.jsonl").write_text("{no\n{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"seed0\.jsonl, line 1, is not JSON"):
        start(tmp_path, context, 0)
    assert counted == []


def test_a_case_that_fails_leaves_what_was_measured_before(tmp_path, context, counted):
    with pytest.raises(ArithmeticError, match="on purpose"):
        start(tmp_path, context, 0, 9)
    assert counted == [("a", 0), ("a", 9)]
    assert len(read_lines(tmp_path / "counted.quick.seed0.jsonl")) == 1


def test_lines_of_other_sizes_are_not_mixed(tmp_path, context, counted):
    start(tmp_path, context, 0)
    with pytest.raises(ValueError, match=r"measured with \{'steps': 8\}; name another folder"):
        run(["counted"], replace(QUICK, steps=9), [0], tmp_path, context, SILENT)


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_bad_arguments_are_named_before_any_work(tmp_path, context, counted, seeds):
    with pytest.raises(ValueError, match="seeds must be different numbers"):
        start(tmp_path / "out", context, *seeds)
    with pytest.raises(ValueError, match=r"experiment must be one of motivation, .* got 'none'"):
        run(["counted", "none"], QUICK, [0], tmp_path / "out", context, SILENT)
    assert counted == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "every", [pytest.param(3, id="every third"), pytest.param(1, id="all", marks=pytest.mark.long)]
)
def test_every_experiment_runs_quickly(tmp_path, context, monkeypatch, every):
    """Of each experiment, the last case and those a few before it."""
    for name, experiment in EXPERIMENTS.items():
        chosen = experiment.cases(QUICK)[::-every]
        monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, cases=lambda setting, chosen=chosen: chosen))
    added = run(list(EXPERIMENTS), QUICK, [0], tmp_path, context, SILENT)
    assert added == sum(len(experiment.cases(QUICK)) for experiment in EXPERIMENTS.values()) > len(EXPERIMENTS)
    lines = [line for lines in read_results(tmp_path).values() for line in lines]
    assert all(value == value for line in lines for value in line["values"].values())  # no NaN


@pytest.mark.parametrize("setting", SETTINGS)
def test_cases_have_different_names_and_every_setting_has_some(setting):
    for name, experiment in EXPERIMENTS.items():
        cases = experiment.cases(SETTINGS[setting])
        assert cases and len(set(cases)) == len(cases), name


def test_the_command_line(tmp_path, monkeypatch, capsys, counted):
    monkeypatch.chdir(tmp_path)

    def code(*arguments) -> int:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code

    chosen = ("run", "counted", "--setting", "quick", "--device", "cpu")
    assert code(*chosen, "--seed", "3", "--seed", "4") == 0
    found = sorted(tmp_path.rglob("*.jsonl"))
    assert [path.name for path in found] == ["counted.quick.seed3.jsonl", "counted.quick.seed4.jsonl"]
    assert "4 measurements added in runs/experiments-quick" in capsys.readouterr().out
    assert code(*chosen) == 0 and len(counted) == 4 + 2 * 3
    assert code(*chosen, "--seed", "9") == 2
    assert capsys.readouterr().err == "experiments: on purpose\n"
    assert code("run", "--setting", "none") == 2
    assert "setting must be one of n1024, n4096, wide, quick, got 'none'" in capsys.readouterr().err


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
    order = sla_ref.cube_order(4, 4, 4, (2, 2, 2))
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


def test_centroids_are_one_softmax_over_critical_keys_and_the_means_of_other_blocks():
    torch.manual_seed(0)
    config = replace(QUICK.model, critical_ratio=0.2)  # 3 of 16 blocks of 4
    query, key, value = (torch.randn(2, 2, config.tokens, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    critical = sla_ref.classify_blocks(query, key, 0.2, 0.0, block_q=4, block_k=4).to_dense() == 1
    means = [each.unflatten(2, (16, 4)).mean(3).repeat_interleave(4, 2) for each in (key, value)]
    scores = torch.where(critical, query @ key.mT, query @ means[0].mT) / 4
    weights = scores.softmax(-1)
    expected = weights.where(critical, 0.0) @ value + weights.where(~critical, 0.0) @ means[1]
    found = Centroids(config)(query, key, value)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    for gradient, of_dense in zip(
        torch.autograd.grad(found, (query, key, value), direction),
        torch.autograd.grad(expected, (query, key, value), direction),
        strict=True,
    ):
        torch.testing.assert_close(gradient, of_dense)


def test_the_arms_of_mixing_differ_in_what_their_names_say(teacher):
    def core(arm: str):
        return build(mixing.ARMS[arm], teacher, QUICK, 0).blocks[0].attention.core

    token, proj, block = core("alpha from the token"), core("ideal alpha, Proj, temperature 4"), core("alpha per block")
    assert (token.alpha, token.proj_l, token.feature_map, token.critical_ratio) == ("token", None, "softmax", 0.05)
    assert (proj.alpha, proj.feature_map) == ("ideal", Softmax(4.0)) and torch.equal(proj.proj_l.weight, torch.eye(16))
    assert block.alpha_logit.shape == (2, 16)
    recipes = mixing.recipes(SETTINGS["n4096"])
    assert len(recipes) == 2 * 3 * len(mixing.ARMS)
    assert recipes["1600 steps: centroids, rate 0.003"] == Recipe("centroids", length=4, rate=3.0)


def test_a_learned_router_is_trained_once_and_only_in_stage_1(context, teacher):
    recipe = mixing.ARMS["alpha per head, learned router"]
    students = [trained(replace(recipe, rate=rate), teacher, QUICK, 0, context) for rate in (1.0, 3.0)]
    router = [each.blocks[0].attention.core.router.scores.proj_q.weight for each in students]
    other = [each.out.weight for each in students]
    assert torch.equal(*router) and not torch.equal(router[0], torch.eye(16))
    assert not torch.equal(*other) and not torch.equal(other[0], teacher.out.weight)
    assert students[0].out.weight.requires_grad and not router[0].requires_grad


def test_errors_of_rows_by_the_mass_that_is_not_critical(context, teacher):
    data = noisy_clips(teacher, 0, torch.tensor([0.1, 0.5]))
    ideal = build(mixing.ARMS["ideal alpha"], teacher, QUICK, 0)
    exact = error_of_rows(build(replace(mixing.ARMS["ideal alpha"], critical_ratio=1.0), teacher, QUICK, 0), data)
    assert exact["rows_1"] == 1 and exact["row_error_1"] == pytest.approx(0, abs=1e-9) and "row_error_3" not in exact
    found, head = error_of_rows(ideal, data), error_of_rows(build(Recipe("sla2"), teacher, QUICK, 0), data)
    assert sum(found[f"rows_{number}"] for number in (1, 2, 3)) == pytest.approx(1)
    assert found["alpha_off"] == pytest.approx(0, abs=1e-5) and head["alpha_off"] > 0.01
    assert found["row_error_3"] != head["row_error_3"]
    bins = mixing._by_bins(torch.tensor([0.0, 0.3, 0.4, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert bins == {"rows_1": 0.5, "row_error_1": 2, "rows_2": 0.25, "row_error_2": 5, "rows_3": 0.25, "row_error_3": 7}
    assert error_of_rows(build(Recipe("full"), teacher, QUICK, 0), data) == {}


def test_rates_are_chosen_on_other_clips_than_those_of_the_loss(teacher):
    times = torch.tensor([0.5] * 4)
    tuning, rows = noisy_clips(teacher, 0, times, split="train"), noisy_clips(teacher, 0, times)
    held_out = evaluate.held_out(teacher, 4)
    for one, other in ((tuning, rows), (tuning, held_out), (rows, held_out)):
        assert not torch.equal(one.velocity, other.velocity)


def test_a_condition_changes_all_its_arms():
    recipes = comparisons.when(SETTINGS["n1024"])
    assert recipes["3200 steps: sparse only, 15 %"] == Recipe("sparse", critical_ratio=0.15, length=8)
    assert recipes["a backdrop: teacher"] == Recipe("full", length=0, backdrop=0.5)


# --- the page --------------------------------------------------------------------------------------------------------


def line(experiment: str, case: str, seed: int, **values: float) -> dict:
    machine = {"device": "A GPU" if seed else "CPU", "cpu": "a CPU"}
    versions = {"torch": "2.0", "triton": "3.0"}
    about = {"setting": "quick", "sizes": asdict(QUICK), "machine": machine, "versions": versions, "commit": "a" * 40}
    return {"experiment": experiment, "case": case, "seed": seed, "values": values} | about


def lines(experiment: str, **values: dict[str, tuple[float, ...]]) -> list[dict]:
    """Each quantity has its values by case, one for each seed."""
    return [
        line(experiment, case, seed, **{name: value})
        for name, of_name in values.items()
        for case, of_case in of_name.items()
        for seed, value in enumerate(of_case)
    ]


def filled(measured: list[dict]) -> str:
    group = f"{measured[0]['experiment']} quick"
    page = f"Before.\n<!-- report: {group} -->\nold\n<!-- end of report -->\nAfter.\n"
    page += "<!-- report: machines -->\n<!-- end of report -->\n"
    found = fill(page, {group: measured})
    assert found.startswith("Before.\n<!--") and "-->\nAfter.\n" in found and "old" not in found
    assert fill(found, {group: measured}) == found
    return found.replace("\u00a0", "_")


def test_a_table_has_the_cases_in_their_order_and_what_varies():
    zero, identity = (
        line("ablation-proj", f"Proj: {start}", 0, held_out_loss=0.3, sparsity=0.5) for start in ("zero", "identity")
    )
    page = filled([identity, zero, line("ablation-proj", "Proj: zero", 1, held_out_loss=0.1, sparsity=0.5)])
    rows = "|  | held-out loss |\n| --- | --- |\n| Proj: zero | 0.2000_±_0.1000 |\n| Proj: identity | 0.3000 |\n"
    assert rows in page
    machines = "| A GPU | torch 2.0, Triton 3.0 | aaaaaaaaaaaa | 1 | ablation-proj quick |\n| a CPU | torch"
    assert machines in page


def test_a_value_with_bounds_of_its_own_shows_them_and_many_quantities_are_rows():
    bounded = {"above_mean": 0.2, "above_mean_min": 0.1, "above_mean_max": 0.4}
    others = ("below_hundredth", "stable_rank", "stable_rank_rest", "stable_rank_top_8", "features_in_use")
    others += ("error_without_small", "error_only_large", "error_only_largest_8", "error_without_smallest_45")
    measured = [
        line("motivation", f"t = {t}", 0, **dict.fromkeys(others, 10 * t), **{k: v * t for k, v in bounded.items()})
        for t in (0.5, 0.1)
    ]
    page = filled(measured)
    assert "|  | t = 0.1 | t = 0.5 |\n" in page
    assert "| weights above 1/N | 2_% (1 to 4_%) | 10_% (5 to 20_%) |\n" in page
    measured[0]["values"] = measured[1]["values"]
    assert "weights above" not in filled(measured), "what does not vary is not a column"


def test_pairs_are_compared_seed_by_seed_with_the_sparse_arms_of_their_steps():
    values = {
        "as in main: SLA, 5 %": (1.0, 4.0),
        "as in main: sparse only, 5 %": (1.0, 4.0),
        "as in main: sparse only, 15 %": (0.5, 3.0),
        "temperature 4: SLA, 5 %": (0.25, 1.0),
        "32 steps: SLA, 5 %": (0.5,),
        "32 steps: sparse only, 15 %": (0.25, 0.75),
        "32 steps, Proj from the identity, temperature 4: SLA, 5 %": (0.25, 0.75),
    }
    page = filled(lines("when", held_out_loss=values))
    assert (
        "400 steps, nothing changed | 2.5000_±_1.5000 | 2.5000_±_1.5000 | 1.7500_±_1.2500 | 0.0000 | 0.7500_±_0.2500 |"
        in page
    )
    assert (
        "| temperature 4 | 0.6250_±_0.3750 | 2.5000_±_1.5000 | 1.7500_±_1.2500 | −1.8750_±_1.1250 | −1.1250_±_0.8750 |"
        in page
    )
    assert "| 32 steps | 0.5000 | - | 0.5000_±_0.2500 | - | 0.2500 |" in page
    assert "| 32 steps, both changes of SLA | 0.5000_±_0.2500 | - | 0.5000_±_0.2500 | - | 0.0000 |" in page


def test_the_page_and_the_lines_must_fit():
    place = "<!-- report: none quick -->\n<!-- end of report -->\n"
    with pytest.raises(ValueError, match=r"no other, which fails for \['none quick', 'when quick'\]"):
        fill(place, {"when quick": []})


def test_a_place_for_what_is_not_measured_yet_says_how_to_measure_it():
    page = fill("<!-- report: mixing n4096 -->\nold\n<!-- end of report -->\n", {})
    assert "Not measured yet: `python -m experiments run mixing --setting n4096`" in page and "old" not in page
    assert fill(page, {}) == page


def mixing_lines() -> list[dict]:
    """Seed 0 alone would take another rate than both seeds together."""
    case = "400 steps: {}, rate {}".format
    tuning = {case("SLA (paper)", rate): (loss, 0.5) for rate, loss in (("0.00033", 0.3), ("0.001", 0.2))}
    tuning[case("SLA (paper)", "0.003")] = (0.25, 0.4)
    tuning[case("ideal alpha", "0.001")] = (0.1, 0.1)
    held_out = {name: (0.01 * number,) * 2 for number, name in enumerate(tuning, start=1)}
    errors = {f"row_error_{number}": dict.fromkeys(tuning, (0.1 * number,) * 2) for number in (1, 3)}
    made = lines("mixing", held_out_loss=held_out)
    for each in made:
        more = {"tuning_loss": tuning} | errors
        each["values"] |= {name: of_case[each["case"]][each["seed"]] for name, of_case in more.items()}
        each["setting"] = "n1024"
    return made


def test_each_arm_of_mixing_is_shown_at_its_best_rate():
    measured = mixing_lines()
    found = fill("<!-- report: mixing n1024 -->\n<!-- end of report -->\n", {"mixing n1024": measured})
    shown = [row for row in found.splitlines() if row.startswith("| 400")]
    assert shown == [
        "| 400 steps: SLA (paper), rate 0.003 | 0.0300 |",
        "| 400 steps: ideal alpha, rate 0.001 | 0.0400 |",
    ]
    for name in ("mixing", "error-by-mass"):
        svg = figures.draw(name, {"mixing n1024": measured})
        assert svg is not None and "ideal alpha" in svg and "rate" not in svg


def test_the_answer_on_branch_weights_has_the_measured_losses():
    """Of the prose; the tables are compared below."""
    page = (DOCS / "experiments.md").read_text(encoding="utf-8")
    prose = page.partition("## How much each branch weighs")[2].partition("<details")[0]
    best = at_best_rate(read_results(RESULTS)["mixing n1024"])
    losses = {f"{spread_of(best, case).mean:.4f}" for case in cases_of(best)}
    found = set(re.findall(r"\b0\.0[1-9]\d\d\b", prose))
    assert len(found) > 20 and found - losses == set()

    shares = []  # of the squared error, in rows with more than two thirds outside; the arms of the figure
    for arm in ("SLA (paper)", "alpha per head", "alpha from block means", "ideal alpha"):
        case = next(case for case in cases_of(best) if case.startswith(f"400 steps: {arm}, rate"))
        rows, errors = (
            [spread_of(best, case, f"{name}_{number}").mean for number in (1, 2, 3)] for name in ("rows", "row_error")
        )
        parts = [row * error for row, error in zip(rows, errors, strict=True)]
        shares.append(100 * parts[2] / sum(parts))
    assert f"hold {min(shares):.0f} to {max(shares):.0f} % of the squared error" in " ".join(prose.split())


def test_the_committed_page_is_what_the_committed_lines_give():
    page = (DOCS / "experiments.md").read_text(encoding="utf-8")
    assert fill(page, read_results(RESULTS)) == page
    shown = re.findall(r"^!\[.+\]\(experiments/(.+)\.svg\)$", page, flags=re.MULTILINE)
    committed = [path.stem for path in (DOCS / "experiments").iterdir()]
    measured = read_results(RESULTS).keys()
    assert sorted(shown) == sorted(committed)
    assert sorted(shown) == sorted(name for name, (group, _) in figures.FIGURES.items() if group in measured)


def test_figures_show_the_lines_in_the_same_bytes_every_time(tmp_path):
    groups = read_results(RESULTS)
    for name in ("crossing", "main", "when"):
        svg = figures.draw(name, groups)
        assert svg == figures.draw(name, groups)
        assert set(re.findall(r"[\w ,+]*sparse only, 15\u00a0%", svg)) != set() and figures.INK in svg
    assert figures.draw("when", {}) is None
    changed = {"when n1024": [each | {"values": {"held_out_loss": 0.05}} for each in groups["when n1024"]]}
    assert figures.draw("when", changed) != svg
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "experiments.md").write_text("", encoding="utf-8")
    report(tmp_path, docs)  # nothing measured
    assert list((docs / "experiments").iterdir()) == []


def test_a_page_of_the_site_holds_its_figures():
    page = markdown.markdown("![Loss](experiments/main.svg)\n\nText.\n", extensions=["md_in_html", "tools.figures"])
    assert '<svg role="img" aria-label="Loss"' in page and "currentColor" in page and "<p>Text.</p>" in page
    assert figures.INK not in page and "<img" not in page and "<style" not in page
