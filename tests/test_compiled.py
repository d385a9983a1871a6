"""What a compiler makes of the kernels; each check in a process of its own, outside of interpreter and simulator."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from needs import REQUIRED

from sla_ref import compiled

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
of_triton = pytest.mark.backend("triton")

PRODUCTS = {"states", "forward", "grad_sums", "grad_keys", "dq", "dkdv"}
PRODUCTS |= {f"{name} softmax" for name in PRODUCTS}  # the form that computes phi
PRODUCTS |= {"grad_weight softmax"}  # runs only with Proj inside, which is compiled in that form
NAMES = {"lists"} | PRODUCTS
INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"}


def in_its_own_process(code: str, *arguments: str, **variables: str):
    """What `code` prints, as JSON; `sys.argv[1:]` are the arguments, `variables` are added to the environment."""
    simulators = ("TRITON_INTERPRET", "NUMBA_ENABLE_CUDASIM")
    environment = {name: value for name, value in os.environ.items() if name not in simulators} | variables
    command = [sys.executable, "-c", "import json, sys, torch\nfrom sla_ref import compiled\n" + code, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@of_triton
@pytest.mark.parametrize(
    ("target", "head_dim", "block_q"),
    [
        # Always: what needs most registers and most shared memory.
        pytest.param(*each, marks=() if each == ("sm_90", 128, 128) else pytest.mark.long)
        for each in itertools.product(compiled.TARGETS, (64, 128), (64, 128))
    ],
)
def test_no_kernel_spills_or_overflows_shared_memory(target: str, head_dim: int, block_q: int) -> None:
    code = """
sizes = dict(zip(("head_dim", "block_q"), map(int, sys.argv[2:])))
print(json.dumps([entry.as_dict() for entry in compiled.report(sys.argv[1], **sizes, block_k=64)]))
"""
    entries = in_its_own_process(code, target, str(head_dim), str(block_q))
    assert {entry["kernel"] for entry in entries} == NAMES
    assert [f"{entry['kernel']}: {entry['problem']}" for entry in entries if entry["problem"]] == []
    for entry in entries:
        assert entry["stack"] == 0
        assert 0 < entry["registers"] <= 255
        if entry["kernel"] in PRODUCTS:
            assert entry["instruction"].split(".")[0] == INSTRUCTION[target], entry


@of_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_float32_is_exact_and_16_bits_use_the_matrix_unit(dtype: str) -> None:
    code = """
found = {}
sizes = dict(head_dim=16, block_q=16, block_k=16)
for name, binary in compiled.compile_kernels("sm_80", dtype=getattr(torch, sys.argv[1]), **sizes):
    ptx = binary.asm["ptx"]
    found[name] = ["tf32" in ptx, "mma." in ptx, "fma.rn.f32" in ptx]
print(json.dumps(found))
"""
    found = in_its_own_process(code, dtype)
    for name in PRODUCTS | ({"sums"} if dtype == "float32" else set()):
        linear = name.split()[0] not in ("dq", "dkdv", "grad_weight")  # float16 needs float32's range there
        expected = {"float32": [False, False, True], "bfloat16": [False, True], "float16": [linear, True]}[dtype]
        assert found[name][: len(expected)] == expected, name


@of_triton
@pytest.mark.parametrize("blind", [False, True], ids=["", "to alignment"])
def test_calls_of_one_case_are_one_to_triton(blind: bool) -> None:
    """What a case says of the arguments decides what Triton, which looks at all of them, would compile.

    Pointers are moved, tensors are views or missing, numbers differ. Where a case is blind to alignment, this shows.
    """
    code = """
import itertools
from sla_ref import backends, testing
from sla_ref.backends.triton.classify import classify
backend = backends.load("triton")
launch = backend.launch
launch.SHORT = 0  # descriptors for short sequences too
blind = sys.argv[1] == "True"
found, wrong = {}, set()

class Look(launch.Launcher):
    def start(self, kernel, programs, *args, case=None, **options):
        *_, binder = kernel.device_caches[90]  # of the target
        _, seen, _ = binder(*args, **options)
        if blind:
            case = str(case).replace(", 8)", ", 0)")
        key = (kernel.fn, case, *map(type, args))
        if case is not None and found.setdefault(key, str(seen)) != str(seen):
            wrong.add(kernel.__name__)

def moved(tensor, by):
    place = torch.empty(tensor.numel() + by, dtype=tensor.dtype)[by:].view(tensor.shape)
    return place.copy_(tensor)

def turned(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor

views = [lambda t: t, lambda t: moved(t, 16), lambda t: moved(t, 8 // t.element_size()), turned]
with compiled._triton_target(90), launch.launch_with(Look()):
    for seed, (view, dtype, phi, capacity) in enumerate(
        itertools.product(views, (torch.bfloat16, torch.float32), (True, False), (1, 2, 8))
    ):
        sizes = dict(heads=3, query_length=100 + seed % 2, key_length=161, head_dim=16, seed=seed, dtype=dtype)
        problem = testing.make_problem(**sizes, block_q=16, block_k=16)._map_tensors(view)
        problem = problem if phi else problem.default_phi()
        labels = torch.zeros(1, 3, 7, 11, dtype=torch.int8)
        labels[..., :capacity] = 1
        block_map = backend.BlockMap(view(labels), 16, 16, 100 + seed % 2, 161)
        inputs = problem.inputs._replace(block_map=block_map)
        classify(inputs.query, inputs.key, capacity, 1, 16, 16)
        saved = backend.forward(inputs)
        saved = saved._replace(lse=moved(saved.lse, 2 * (seed % 2)))
        for grad_lse in (problem.grad_lse, None):
            backend.backward(problem.grad_sparse, problem.grad_linear, grad_lse, inputs, saved)
print(json.dumps([len(found), sorted(wrong)]))
"""
    cases, wrong = in_its_own_process(code, str(blind))
    assert cases > 50
    assert bool(wrong) == blind, wrong


@of_triton
def test_the_second_start_of_a_case_ends_in_the_same_call(tmp_path) -> None:
    """The first goes through Triton as a whole. Its driver is told to start a kernel by the same words each time."""
    code = """
from sla_ref.backends.triton import launch
from sla_ref.backends.triton.classify import classify
calls = []

class Driver(compiled._TargetOnly):
    class utils:
        load_binary = staticmethod(lambda *args: ("module", "function", 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 2**17})

    def launcher_cls(self, src, metadata):
        return lambda *args: calls.append((src.fn.__name__, *args))

compiled._TargetOnly = Driver
tokens = torch.randn(1, 2, 40, 16)
with compiled._triton_target(90):
    for _ in range(2):
        classify(tokens, tokens, 1, 1, 16, 16)
    kept = len(launch._kept)

def words(name, *args):  # but for the hooks of a profiler, and with tensors as what they are like
    return [name, *((x.shape, launch.layout(x)) if isinstance(x, torch.Tensor) else x for x in (*args[:6], *args[9:]))]

first, again = calls[:2], calls[2:]
same = [str(words(*call)) for call in first] == [str(words(*call)) for call in again]
print(json.dumps([kept, [name for name, *_ in again], same]))
"""
    kept, names, same = in_its_own_process(code, TRITON_CACHE_DIR=str(tmp_path))  # the home folder may not be writable
    assert (kept, names, same) == (2, ["pool_kernel", "labels_kernel"], True)


@of_triton
def test_one_binary_for_all_lengths() -> None:
    """32768 is a multiple of 16 and 32760 is not, and has a partial last block: the same kernels."""
    code = """
hashes = []
for length in (32760, 32768, 75600):
    shape = dict(head_dim=16, block_q=16, block_k=16, length=length)
    binaries = compiled.compile_kernels("sm_80", dtype=torch.bfloat16, **shape)
    hashes.append([binary.hash for name, binary in binaries])
print(json.dumps(hashes))
"""
    one, other, third = in_its_own_process(code)
    assert one == other == third


@of_triton
@pytest.mark.long
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path) -> None:
    """This happens where the home folder belongs to somebody else."""
    code = """
sizes = dict(head_dim=16, block_q=16, block_k=16)
print(json.dumps([name for name, binary in compiled.compile_kernels("sm_80", dtype=torch.float16, **sizes)]))
"""
    (tmp_path / "file").touch()
    assert "forward" in in_its_own_process(code, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))


@of_triton
@pytest.mark.parametrize("block_q", [pytest.param("64", marks=pytest.mark.long), "128"])
def test_no_product_is_in_flight_when_its_operand_is_fetched_anew(block_q: str) -> None:
    """A pipelined loop that waits for all products but one raced on an H200: see the linear branch of the forward."""
    code = """
found = []
sizes = dict(head_dim=128, block_q=int(sys.argv[1]), block_k=64)
for name, binary in compiled.compile_kernels("sm_90", dtype=torch.bfloat16, **sizes):
    waits = [line.strip(" \\t;") for line in binary.asm["ptx"].splitlines() if "wgmma.wait_group" in line]
    found.append([name, len(waits), [wait for wait in waits if not wait.endswith(" 0")]])
print(json.dumps(found))
"""
    found = in_its_own_process(code, block_q)
    assert sum(number for _, number, _ in found) > 10
    assert [entry for entry in found if entry[2]] == []


@of_triton
def test_a_kernel_that_spills_is_a_problem() -> None:
    common = {
        "backend": "triton",
        "target": "sm_120",
        "dtype": "bfloat16",
        "head_dim": 64,
        "block_q": 64,
        "block_k": 64,
    }
    common |= {"warps": 4, "registers": 255}
    fine = compiled.KernelReport(
        kernel="forward", **common, stack=0, shared=1024, shared_limit=2048, instruction="mma.bf16"
    )
    assert fine.problem is None
    for change, word in (({"stack": 8}, "stack"), ({"shared": 4096}, "shared memory")):
        assert word in compiled.KernelReport(**{**fine.__dict__, **change}).problem


@of_triton
def test_unknown_target() -> None:
    code = """
try:
    compiled.report("sm_70")
except ValueError as error:
    print(json.dumps(str(error)))
"""
    assert "sm_80, sm_90, sm_100, sm_120" in in_its_own_process(code)


NUMBA_NAMES = {"states", "forward", "dq", "dkdv", "grad_sums", "grad_keys"}

CAN_COMPILE = """
try:
    from sla_ref.backends import numba_cuda
    numba_cuda.cuda.cudadrv.nvvm.NVVM()
    numba_cuda.cuda.cudadrv.nvrtc.get_supported_ccs()
except Exception as error:
    print(json.dumps(str(error)))
    sys.exit()
"""


def numba_in_its_own_process(code: str, *arguments: str):
    """The same for Numba, or a skip where NVIDIA's compiler libraries are not installed."""
    seen = in_its_own_process(CAN_COMPILE + code, *arguments)
    if isinstance(seen, str):
        reason = f"Numba compiles with nvidia-nvvm and nvidia-cuda-nvrtc, pip install 'sla-ref[numba]': {seen}"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return seen


@pytest.mark.backend("numba")
@pytest.mark.parametrize(
    ("target", "head_dim", "block"),
    [
        pytest.param("sm_80", 40, 32, marks=pytest.mark.long),
        ("sm_90", 128, 64),
        pytest.param("sm_100", 40, 32, marks=pytest.mark.long),
    ],
)
def test_numba_keeps_arrays_in_registers_and_computes_in_float32_alone(target: str, head_dim: int, block: int) -> None:
    """A literal of Python among the arguments of an operation would make it float64, at a fraction of the speed."""
    code = """
target, head_dim, block = sys.argv[1], *map(int, sys.argv[2:])
sizes = dict(head_dim=head_dim, block_q=block, block_k=block)
kernels = compiled.compile_numba_kernels(target, **sizes)
compiled.compile_numba_kernels = lambda *args, **sizes: kernels  # once is enough
entries = compiled.report(target, backend="numba", **sizes)
found = [[name, ".f64" in ptx, "fma.rn.f32" in ptx, "bar.sync" in ptx] for name, threads, ptx in kernels]
print(json.dumps([[entry.as_dict() for entry in entries], found]))
"""
    entries, found = numba_in_its_own_process(code, target, str(head_dim), str(block))
    assert {entry["kernel"] for entry in entries} == {name for name, *_ in found} == NUMBA_NAMES
    assert [f"{entry['kernel']}: {entry['problem']}" for entry in entries if entry["problem"]] == []
    for entry in entries:
        assert 0 < entry["shared"] <= 48 * 1024
        assert entry["registers"] * 32 * entry["warps"] <= 65536, "the registers of a multiprocessor"
    assert found == [[name, False, True, True] for name, *_ in found]


@pytest.mark.backend("numba")
@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_numba_takes_no_other_dtype_and_size() -> None:
    code = """
said = []
for arguments in ({"dtype": torch.float16}, {"backend": "torch"}, {"head_dim": 160}):
    try:
        compiled.report("sm_90", **{"backend": "numba"} | arguments)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    dtype, backend, head_dim = in_its_own_process(code)
    assert "float32" in dtype and "torch.float16" in dtype
    assert "triton or numba" in backend
    assert "160" in head_dim
