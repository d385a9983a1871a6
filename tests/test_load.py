"""Under load and in trouble: runs that are killed, disks that are full, a thousand steps, many threads."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_files import full_disk
from torch import Tensor

import sla_ref
from sla_ref import cli
from sla_ref.integrations.checkpoints import save_sla
from sla_ref.lab.checkpoint import read_checkpoint, write_checkpoint
from sla_ref.lab.config import TrainConfig
from sla_ref.lab.model import ModelConfig, VideoTransformer
from sla_ref.lab.train import Run, train
from sla_ref.lab.weights import save_weights

TINY = ModelConfig(frames=2, size=16, width=32, depth=1, heads=2, attention="sla", block=8)
STEPS, SAVE_EVERY = 8, 2


def model() -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(TINY)


# --- killed ----------------------------------------------------------------------------------------------------------

# A process of its own, whose training ends in the middle of something.
KILLED = """
import os, signal, sys
from pathlib import Path
import test_load, torch
torch.set_num_threads(int(sys.argv[4]))
kill = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
def tick(step, loss):
    if step == int(sys.argv[3]):
        if sys.argv[2] == "after a step":
            kill()
        elif sys.argv[2] == "while it saves":
            os.replace = kill
        else:
            torch.Tensor.backward = kill
test_load.train_tiny(Path(sys.argv[1]), tick=tick)
"""


def train_tiny(folder: Path, *, resume: bool = False, **options: object) -> VideoTransformer:
    made = model()
    config = TrainConfig(steps=STEPS, batch=4, learning_rate=1e-2, resume=resume)
    train(made, config, folder, save_every=SAVE_EVERY, log_every=1, **options)
    return made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> VideoTransformer:
    return train_tiny(tmp_path_factory.mktemp("uninterrupted") / "run")


def kills() -> list:
    """From the first checkpoint on: after each step, in the middle of one, and while a checkpoint is written."""
    cases = [("in a step", step) for step in range(SAVE_EVERY, STEPS)]
    cases += [("after a step", step) for step in range(SAVE_EVERY + 1, STEPS + 1)]
    cases += [("while it saves", step) for step in range(SAVE_EVERY + 1, STEPS)]
    return [pytest.param(*case, marks=() if case == ("while it saves", 5) else pytest.mark.long) for case in cases]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(("when", "step"), kills())
def test_a_killed_run_goes_on_to_the_same_bits(uninterrupted, tmp_path, when, step):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(sla_ref.__file__).parents[1])]
    arguments = [tmp_path / "run", when, step, torch.get_num_threads()]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] in range(SAVE_EVERY, step + 1, SAVE_EVERY)
    resumed = train_tiny(tmp_path / "run", resume=True)
    for name, weight in uninterrupted.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "metrics.jsonl"}


# --- no room, no permission ------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], None]] = {
    "save_sla": lambda path: save_sla(sla_ref.SparseLinearAttention(4), path),
    "save_weights": lambda path: save_weights(path, model(), {}),
    "write_checkpoint": lambda path: write_checkpoint(path, {"identity": {}, "weights": torch.zeros(1000)}),
}
CALLS = ("pathlib.Path.touch", "pathlib.Path.write_bytes", "pathlib.Path.chmod", "os.fsync", "os.replace")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_call_fails_the_error_names_the_file_and_nothing_is_left(tmp_path, monkeypatch, writer, number, call):
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match=r"the file cannot be written: .*: '.*/out'$") as raised:
        WRITERS[writer](tmp_path / "out")
    assert raised.value.errno == number
    assert not list(tmp_path.iterdir())


COMMAND = ["train-teacher", "--device", "cpu", "--steps", "2", "--batch", "2", "--clips", "2"]
COMMAND += ["--frames", "2", "--size", "16", "--width", "32", "--depth", "1"]


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_command_on_a_full_disk_says_so_in_one_line(capsys, tmp_path):
    with full_disk():
        line = said(capsys, *COMMAND, "--out", str(tmp_path / "out"))
    assert line.startswith("sla-ref: ") and line.count("\n") == 1
    assert "checkpoint.pt" in line and "the file cannot be written: " in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"], "no half of a checkpoint"


@pytest.mark.parametrize("place", ["/proc/out", "/dev/null", "/dev/null/out"])
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs folders that not even root can write to")
def test_a_command_whose_folder_cannot_be_written_says_so_in_one_line(capsys, place):
    line = said(capsys, *COMMAND, "--out", place)
    assert line.startswith("sla-ref: ") and line.count("\n") == 1 and place in line


# --- a thousand steps ------------------------------------------------------------------------------------------------

SLACK = 16 * 2**20  # bytes: what an allocator and caches may still grow by


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def training() -> Callable[[], object]:
    return Run(model(), TrainConfig(steps=10_000, batch=4)).advance


def layer() -> Callable[[], object]:
    made, tokens = sla_ref.SparseLinearAttention(32, block_q=16, block_k=16), torch.randn(3, 1, 2, 128, 32)
    optimizer = torch.optim.AdamW(made.parameters())

    def step() -> None:
        optimizer.zero_grad()
        query, key, value = tokens.clone().requires_grad_()
        made(query, key, value).square().sum().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(
    ("warm", "last"), [pytest.param(10, 50, id="50"), pytest.param(200, 1000, id="1000", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("make", [training, layer])
def test_memory_stays_flat(make, warm, last):
    step, seen = make(), []
    for number in range(1, last + 1):
        step()
        if number in (warm, last):
            seen.append((live_tensors(), resident()))
    (tensors_before, bytes_before), (tensors, size) = seen
    assert tensors == tensors_before
    assert size < bytes_before + SLACK


# --- many threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_backends_of_many_threads_do_not_leak_into_each_other(rounds):
    """Half of the threads choose for themselves, one inside the other; the others choose for the process meanwhile."""
    plain, ran = sla_ref.backends.load("torch"), threading.local()

    def spy(name: str) -> object:
        class Spy:
            unavailable, unsupported = staticmethod(plain.unavailable), staticmethod(plain.unsupported)

            def forward(self, inputs):
                ran.forward = name
                return plain.forward(inputs)

            def backward(self, *arguments):
                ran.backward = name
                return plain.backward(*arguments)

        return Spy()

    names, tokens = [f"spy{number}" for number in range(4)], torch.randn(3, 1, 1, 16, 4)
    for name in names:
        sla_ref.register_backend(name, spy(name))
    together = threading.Barrier(16, timeout=120)

    def attend_with(name: str) -> None:
        query, key, value = tokens.clone().requires_grad_()
        out = sla_ref.sparse_linear_attention(query, key, value).sparse.sum()
        together.wait()  # another thread's forward comes between this one's forward and backward
        torch.autograd.grad(out, query)
        assert (ran.forward, ran.backward) == (name, name)

    def own(number: int) -> None:
        for round_ in range(rounds):
            outer, inner = names[(number + round_) % 4], names[(number + round_ + 1) % 4]
            with sla_ref.use_backend(outer):
                with sla_ref.use_backend(inner):
                    together.wait()
                    assert sla_ref.get_backend() == inner
                    attend_with(inner)
                assert sla_ref.get_backend() == outer
                attend_with(outer)

    def everybodys(number: int) -> None:
        for round_ in range(rounds):
            sla_ref.set_backend(names[(number + round_) % 4])
            for _ in range(3):
                assert sla_ref.get_backend() in names
                together.wait()

    def work(number: int) -> None:
        try:
            (own if number % 2 else everybodys)(number)
        except BaseException:
            together.abort()  # the others would wait for this one
            raise

    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
    finally:
        for name in names:
            del sla_ref.backends._registered[name]
