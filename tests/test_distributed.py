"""Several processes compute what one does: the lab's training under DDP and FSDP2, Ulysses by itself and in Wan.

torchrun starts tests/ranks.py four times, on the CPU with gloo: what came out is compared here with one process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sla_ref import cli
from sla_ref.integrations import checkpoints
from sla_ref.lab.checkpoint import read_checkpoint, write_checkpoint
from sla_ref.lab.weights import load_weights
from tests import ranks

ROOT = Path(__file__).parents[1]
WAN = importlib.util.find_spec("diffusers") is not None
needs_wan = pytest.mark.skipif(not WAN, reason="needs the extra diffusers")


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Processes on this machine's CPU, and a port of their own; nobody has to know the machine's name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--local-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, encoding="utf-8", env=environment, check=False
    )


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny teacher for the command line."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = ["--frames", "4", "--size", "16", "--width", "32", "--depth", "2", "--batch", "2", "--clips", "2"]
    run("train-teacher", "--out", folder / "teacher", "--device", "cpu", "--steps", "2", *tiny)
    return folder


@pytest.fixture(scope="module")
def split(folder):
    """What each of two ranks found, and how the session ended."""
    session = torchrun(ROOT / "tests" / "ranks.py", "split", folder, *(["diffusers"] if WAN else []))
    assert (folder / "split-1.pt").exists(), session.stderr
    return [torch.load(folder / f"split-{rank}.pt") for rank in (0, 1)], session


@pytest.fixture(scope="module")
def trained(folder):
    """The runs of two ranks, one of which goes on from a run of one process, and how the session ended."""
    for name in ("resumed", "sla2 resumed"):
        with pytest.raises(KeyboardInterrupt):
            ranks.training(folder, name, tick=ranks.interrupt_at(3))
    session = torchrun(ROOT / "tests" / "ranks.py", "trained", folder)
    assert session.returncode == 0, session.stderr
    return torch.load(folder / "trained.pt"), session


def close(found: dict, expected: dict, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- Ulysses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["softmax", "hedgehog"])
def test_output_and_gradients_are_those_of_one_process(split, feature_map):
    """45 tokens on two ranks. The ranks' gradients are parts of the gradient of the sum of both losses."""
    found, _ = split
    expected = ranks.outcome(ranks.Attention(feature_map), ranks.tokens())
    outputs = [dict(each[f"summed, {feature_map}"]) for each in found]
    for output in outputs:
        torch.testing.assert_close(output.pop("out"), expected["out"])
    average = {name: (outputs[0][name] + outputs[1][name]) / 2 for name in outputs[0]}
    close(average, {name: value for name, value in expected.items() if name != "out"})
    assert not torch.allclose(outputs[0]["layer.proj_l.weight"], expected["layer.proj_l.weight"]), "half the heads"


def test_ranks_compare_each_shape_once(split):
    """For attention and for gathering, until the number of tokens changes, even where a rank has as many as before."""
    for each in split[0]:
        assert each["comparisons"]["counts"] == [2, 0, 2, 1, 2]
        assert each["comparisons"]["and right again"] == 0


def test_ranks_that_disagree_after_a_change_all_say_so(split):
    first, second = (each["comparisons"] for each in split[0])
    expected = "(2, 4, 23, 8) torch.float32 on rank 0; (3, 4, 22, 8) torch.float32 on rank 1"
    assert expected in first["after a change"]
    assert first["after a change"] == second["after a change"] == first["again"] == second["again"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ddp_and_fsdp_give_every_parameter_the_gradient_of_one_process(split, wrapper):
    expected = ranks.outcome(ranks.Attention(), ranks.tokens())
    assert {"layer.proj_l.weight", "layer.phi_query.weight", "layer.phi_key.weight"} <= expected.keys()
    for each in split[0]:
        found = {name: value for name, value in each[wrapper].items() if not name.startswith("input")}
        close(found, {name: value for name, value in expected.items() if name in found and name != "input 0"})
        assert len(found) == len(expected) - 1


def test_files_of_weights_that_fsdp_has_sharded(folder, split):
    """They are written whole, under one name for both ranks or one for each, and loaded into the shards again."""
    expected = ranks.Attention().state_dict()
    added = checkpoints.split_sla_state_dict(expected)[0]
    for name in ("same", "own-0", "own-1"):
        close(checkpoints.read_checkpoint(folder / f"{name}.safetensors"), added)
    close(checkpoints.read_checkpoint(folder / "dcp"), {f"model.{name}": value for name, value in expected.items()})
    for each in split[0]:
        close(each["loaded"], expected)
        close(each["loaded again"], expected)


def test_gathering_sends_back_the_sum_of_all_ranks_gradients(split):
    parts = [each["gather"]["gradient"] for each in split[0]]
    assert torch.equal(torch.cat(parts), 3 * torch.arange(5.0))  # ranks 0 and 1 weigh with 1 and 2


@needs_wan
@pytest.mark.parametrize(
    ("name", "options", "inputs"),
    [
        ("wan", {}, {}),
        ("wan, time per token", {}, {"per_token": True}),
        ("wan, main", {"negligible_ratio": None, "variant": "main"}, {}),
        ("wan, fsdp and checkpointing", {}, {}),
        ("wan, sla2", ranks.PER_TOKEN, {}),
        ("wan, sla2, fsdp and checkpointing", ranks.PER_BLOCK, {}),
        ("wan, taken out", None, {}),
        ("wan, replaced and taken out", None, {}),
    ],
)
def test_wan_on_two_ranks_is_wan_on_one(split, name, options, inputs):
    """The main variant computes in bfloat16."""
    one = ranks.Wan(**options or {})
    if options is None:
        from sla_ref.integrations import diffusers as wan

        wan.remove_sla(one.transformer)
        if name == "wan, taken out":  # and put in again
            wan.install_sla(one.transformer, critical_ratio=1.0, block_q=8, block_k=8)
    expected = ranks.outcome(one, *ranks.latents(**inputs))
    tolerance = {"atol": 0.05, "rtol": 0.05} if name == "wan, main" else {"atol": 1e-4, "rtol": 1e-4}
    for each in split[0]:
        found = {key: value for key, value in each[name].items() if not key.startswith("input")}
        close(found, {key: value for key, value in expected.items() if not key.startswith("input")}, **tolerance)


@pytest.mark.long
@needs_wan
def test_pairs_of_ranks_split_the_tokens_of_a_clip_each(tmp_path):
    """Four ranks. Every parameter gets the mean of both clips' gradients, the gradient of a batch of two."""
    session = torchrun(ROOT / "tests" / "ranks.py", "mesh", tmp_path, processes=4)
    assert session.returncode == 0, session.stderr
    clips = [ranks.outcome(ranks.Wan(), *(each[i : i + 1] for each in ranks.latents())) for i in (0, 1)]
    mean = {name: (clips[0][name] + clips[1][name]) / 2 for name in clips[0] if not name.startswith(("input", "out"))}
    for rank in range(4):
        for found in torch.load(tmp_path / f"mesh-{rank}.pt").values():
            expected = mean | {"out": clips[rank // 2]["out"]}
            close({name: found[name] for name in expected}, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length", "ValueError: query must have one shape and dtype on all ranks, apart from dim 2, split as split_"),
        ("batch", "got (1, 4, 5, 8) torch.float32 on rank 0; (2, 4, 5, 8) torch.float32 on rank 1"),
        ("dims", "got (2, 2) torch.float32 on rank 0; (2, 2, 2) torch.float32 on rank 1"),
        ("dtype", "tokens must have one shape and dtype on all ranks; got (4,) torch.float32 on rank 0; (4,) torch.fl"),
        ("number", "got (4,) torch.float32 on rank 0; (5,) torch.float32 on rank 1"),
        ("few", "tokens must be at least one for each of the 2 ranks, got 1 in all"),
        ("heads", "heads must be divisible by the ranks of the group, which share them out, got 3 on 2 ranks"),
        ("keys", "key must have query's number of tokens 5, got 6"),
        ("int", "tokens must be a float tensor of at most 8 dimensions, got torch.int64 (4,)"),
        ("shape", "attention must return a tensor of shape (1, 2, 10, 8), got (1, 2, 10, 2)"),
        ("output", "TypeError: attention must return a tensor, got SLAOutput; take one of its branches"),
        ("group", "TypeError: group must be a torch.distributed.ProcessGroup or None, got str"),
        ("outside", "ValueError: group must hold this process, got one of other ranks"),
        ("dim", "ValueError: dim must be one of the 4 dimensions of tokens, got 4"),
        ("type", "ValueError: tokens must be a float tensor of at most 8 dimensions, got list"),
    ],
)
def test_all_ranks_raise_the_same_error(split, name, message):
    first, second = (each["errors"][name] for each in split[0])
    assert message in first
    assert first == second


@needs_wan
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heads", "heads must be divisible by the ranks of the group, which share them out, got 3 on 2 ranks"),
        ("replaced", "RuntimeError: blocks.1.attn1 must keep SLA, since install_sla has split the tokens: WanAttnPro"),
        ("layers", "layers must be None with a group: a dense layer would attend only to its rank's tokens; got 1 of"),
        ("size", "tokens must have one shape and dtype on all ranks; got (1, 45, 1, 16)"),
    ],
)
def test_wan_names_what_two_ranks_cannot_do(split, name, message):
    first, second = (each["errors of wan"][name] for each in split[0])
    assert message in first
    assert first == second


# --- training --------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same runs by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("sla", "sla2"):
        ranks.training(folder, name)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "resumed", "interrupted", "sla2 ddp", "sla2 resumed"])
def test_the_loss_curve_is_that_of_one_process(folder, trained, alone, name):
    one = alone / ("sla2" if name.startswith("sla2") else "sla")
    found, expected = lines(folder / name), lines(one)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    first, second = (read_checkpoint(path / "checkpoint.pt") for path in (folder / name, one))
    close(first["model"], second["model"], atol=1e-4, rtol=1e-4)
    assert first["identity"] == second["identity"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(folder, trained, tmp_path, monkeypatch, alone, name):
    """It makes six more steps from the checkpoint of step 6."""
    longer = ranks.TrainConfig(**{**ranks.CONFIG.__dict__, "steps": 6})
    state = read_checkpoint(folder / name / "checkpoint.pt")
    reference = read_checkpoint(alone / "sla" / "checkpoint.pt")
    assert state["optimizer"]["state"].keys() == reference["optimizer"]["state"].keys()
    for place, model in ((tmp_path / "two", state), (tmp_path / "one", reference)):
        place.mkdir()
        write_checkpoint(place / "checkpoint.pt", model)
    runs = []
    for place in ("two", "one"):
        model = ranks.small_model()
        run = ranks.Run(model, longer)
        run.load(tmp_path / place / "checkpoint.pt")
        run.scheduler.last_epoch = 3  # the schedule ends at step 6
        runs.append([run.advance().item() for _ in range(3)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_fsdp_keeps_half_of_the_parameters_on_each_rank(trained):
    found, _ = trained
    expected = ranks.small_model().state_dict()
    close(found["weights"], expected)
    whole = sum(parameter.numel() for parameter in ranks.small_model().parameters())
    assert found["share"] < 0.55 * whole  # ragged ones are padded


def test_an_uneven_batch_is_named_before_anything_runs(folder, trained):
    assert trained[0]["uneven"] == "ValueError: batch must be divisible by the number of processes 2, got 3"
    assert not (folder / "uneven").exists()


def test_stage_1_on_two_ranks_is_refused_before_anything_runs(folder, trained):
    """It calls layers by themselves, around DDP, whose averages the gradients would then lack."""
    assert trained[0]["stage 1"] == "ValueError: objective layers needs one process, got 2"
    assert not (folder / "stage 1").exists()


def test_the_command_writes_what_one_process_writes(folder, trained, tmp_path):
    _, session = trained
    out = tmp_path / "one"
    teacher = folder / "teacher" / "full.safetensors"
    with ranks.smooth_adam():
        run("finetune", "--teacher", teacher, "--out", out, "--device", "cpu", "--steps", 2, "--batch", 2, "--clips", 2)
    assert {path.name for path in (folder / "command").iterdir()} == {path.name for path in out.iterdir()}
    found, card = load_weights(folder / "command" / "sla.safetensors")
    expected, other = load_weights(out / "sla.safetensors")
    close(found.state_dict(), expected.state_dict(), atol=1e-5, rtol=2e-3)  # stored in float16
    assert card["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-3)
    assert session.stdout.count("weights: ") == 1, "one log"
    assert session.stdout.count("step 2 of 2") == 1


def test_fsdp_without_torchrun_is_refused(folder, tmp_path, capsys):
    teacher = folder / "teacher" / "full.safetensors"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["finetune", f"--teacher={teacher}", f"--out={tmp_path / 'out'}", "--device=cpu", "--fsdp"])
    assert "sla-ref: fsdp needs the processes that torchrun starts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_ends_all_with_one_message(split):
    _, session = split
    assert session.returncode == 1
    said = [line for line in session.stderr.splitlines() if line.startswith("sla-ref: ")]
    assert said == ["sla-ref: the clips ran out"]


def test_a_rank_that_stays_away_is_not_waited_for(split):
    said = split[0][0]["waits"].lower()
    assert "timed out" in said or "timeout" in said


def test_a_rank_that_dies_ends_all(tmp_path):
    """torchrun names the rank and its signal; the other rank says so too, unless torchrun was quicker to end it."""
    session = torchrun(ROOT / "tests" / "ranks.py", "dying", tmp_path)
    assert session.returncode == 1
    assert f"exitcode  : {-signal.SIGKILL}" in session.stderr


# --- the benchmark ---------------------------------------------------------------------------------------------------

BENCHMARK = ROOT / "benchmarks" / "several_gpus.py"


@pytest.fixture(scope="module")
def figures(folder, split):
    """What the benchmark wrote in the session of `split`."""
    return json.loads((folder / "new" / "figures.json").read_text(encoding="utf-8"))


def test_the_benchmark_measures_a_layer_and_the_lab_on_two_ranks(figures, split):
    assert figures["about"]["ranks"] == 2
    found = figures["ulysses_480p"]
    assert "error" not in found
    assert max(found["parity"]["largest_difference"].values()) < 0.05  # of bfloat16 numbers up to about 5
    assert max(found["parity"]["proj_relative_error"].values()) < 0.05
    assert found["one"].keys() == found["several"].keys() == {"forward", "forward_backward"}
    assert found["sent_mb"] == pytest.approx(found["predicted_mb"])
    assert all(step["step"] > 0 for step in figures["lab"].values())
    _, session = split
    assert session.stdout.count("ulysses_480p forward_backward: ") == 1, "one report"


def test_the_benchmark_records_ranks_that_cannot_share_the_heads(figures):
    message = "heads must be divisible by the ranks of the group, which share them out, got 3 on 2 ranks"
    assert figures["ulysses_720p"] == {"error": f"ValueError: {message}"}


@needs_wan
def test_the_benchmark_trains_wan_on_two_ranks(figures):
    found = figures["wan"]
    assert found.keys() == {"one", "DDP", "FSDP2", "Ulysses", "one, all clips"}
    assert all(found[name]["step"] > 0 for name in ("one", "DDP", "FSDP2", "Ulysses"))
    # Only roughly: all is bfloat16, and Adam turns the rounding of a tiny gradient into a step. Tests above compare
    # gradients.
    for name, one in (("DDP", "one, all clips"), ("FSDP2", "one, all clips"), ("Ulysses", "one")):
        assert found[name]["losses"] == pytest.approx(found[one]["losses"], rel=1e-2), name
    for name in ("DDP", "Ulysses"):
        assert found[name]["sent_mb"] == pytest.approx(found[name]["predicted_mb"])
    # FSDP2 gathers the weights outside the blocks once, not twice. In this small model they are many.
    assert 2 / 3 < found["FSDP2"]["sent_mb"] / found["FSDP2"]["predicted_mb"] < 1


@pytest.mark.skipif(WAN, reason="diffusers is here")
def test_the_benchmark_records_that_diffusers_is_missing(figures):
    assert "No module named 'diffusers'" in figures["wan"]["DDP"]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here; --tiny rehearses on the CPU"),
        (["--tiny", "--json", str(BENCHMARK)], "--json must name a new file"),
        (["--tiny"], "torchrun must start this program"),
        (["--tiny", "--only", "wan,720p"], "--only takes ulysses_480p, ulysses_720p, lab, wan; got 720p"),
    ],
)
def test_the_benchmark_refuses_before_any_work(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *arguments])
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    assert message in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")


@needs_wan
def test_the_script_of_the_page_runs_on_two_ranks(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    session = torchrun(script)
    assert session.returncode == 0, session.stderr


def test_the_page_has_the_table_of_the_benchmark(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "traffic.py"), run_name="__main__")
    assert capsys.readouterr().out in PAGE


@needs_wan
def test_the_table_counts_the_parameters_of_wan():
    from diffusers import WanTransformer3DModel

    traffic = runpy.run_path(str(ROOT / "benchmarks" / "traffic.py"))
    sizes = {"num_attention_heads": traffic["HEADS"], "attention_head_dim": traffic["HEAD_DIM"]}
    with torch.device("meta"):
        model = WanTransformer3DModel(**sizes, num_layers=traffic["LAYERS"], ffn_dim=8960)
    assert sum(parameter.numel() for parameter in model.parameters()) == traffic["PARAMETERS"]


def test_the_table_counts_what_the_collectives_send(monkeypatch):
    """One layer of Ulysses, forward and backward, as in the table: rows that leave for another rank."""
    sent = []

    def all_to_all(arrived, rows, received, leaving, group):
        sent.append((sum(leaving) - leaving[0]) * rows[0].numel() * rows.element_size())
        arrived.copy_(rows.repeat(2, *[1] * (rows.dim() - 1))[: len(arrived)])

    def all_gather(arrived, mine, group):
        for each in arrived:
            each.copy_(mine)

    monkeypatch.setattr("torch.distributed.all_to_all_single", all_to_all)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    traffic = runpy.run_path(str(ROOT / "benchmarks" / "traffic.py"))
    width = traffic["HEADS"] * traffic["HEAD_DIM"]
    shards = torch.randn(3, 1, traffic["HEADS"], 8, traffic["HEAD_DIM"], dtype=torch.bfloat16, requires_grad=True)
    ranks.ulysses_attention(lambda query, key, value: query + key + value, *shards).sum().backward()
    assert len(sent) == 4  # q, k and v together, o, and their gradients
    assert sum(sent) * traffic["LAYERS"] == traffic["ulysses"](2, 16) == 8 * 30 * 8 * width * 2 / 2
