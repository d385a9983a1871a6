"""What a compiler makes of the kernels; each check in a process of its own, outside of interpreter and simulator."""

from __future__ import annotations

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
PRODUCTS |= {"grad_weight softmax"}  # runs with Proj inside alone, which is compiled in that form
NAMES = {"lists", "weights"} | PRODUCTS
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
@pytest.mark.parametrize("head_dim", ["64", "128"])
@pytest.mark.parametrize("target", compiled.TARGETS)
def test_no_kernel_spills_or_overflows_shared_memory(target: str, head_dim: str) -> None:
    code = """
entries = [e for q in (64, 128) for e in compiled.report(sys.argv[1], head_dim=int(sys.argv[2]), block_q=q, block_k=64)]
print(json.dumps([entry.as_dict() for entry in entries]))
"""
    entries = in_its_own_process(code, target, head_dim)
    assert {entry["kernel"] for entry in entries} == NAMES
    problems = [
        f"{entry['kernel']}, {entry['block_q']} x 64: {entry['problem']}" for entry in entries if entry["problem"]
    ]
    assert not problems
    for entry in entries:
        assert entry["stack"] == 0
        assert 0 < entry["registers"] <= 255
        if entry["kernel"] in PRODUCTS:
            assert entry["instruction"].split(".")[0] == INSTRUCTION[target], entry


@of_triton
def test_float32_is_exact_and_16_bits_use_the_matrix_unit() -> None:
    code = """
found = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for name, binary in compiled.compile_kernels("sm_80", dtype=dtype, head_dim=32, block_q=32, block_k=32):
        ptx = binary.asm["ptx"]
        found[str(dtype) + " " + name] = ["tf32" in ptx, "mma." in ptx, "fma.rn.f32" in ptx]
print(json.dumps(found))
"""
    found = in_its_own_process(code)
    for name in PRODUCTS | {"sums"}:
        assert found[f"torch.float32 {name}"] == [False, False, True], name
    for name in PRODUCTS:
        assert found[f"torch.bfloat16 {name}"][:2] == [False, True], name
        linear = name.split()[0] not in ("dq", "dkdv", "grad_weight")  # float16 needs float32's range there
        assert found[f"torch.float16 {name}"][:2] == [linear, True], name


@of_triton
def test_one_binary_for_all_lengths() -> None:
    """32768 is a multiple of 16 and 32760 is not, and has a partial last block: the same kernels."""
    code = """
hashes = []
for length in (32760, 32768, 75600):
    shape = dict(head_dim=64, block_q=64, block_k=64, length=length)
    binaries = compiled.compile_kernels("sm_80", dtype=torch.bfloat16, **shape)
    hashes.append([binary.hash for name, binary in binaries])
print(json.dumps(hashes))
"""
    one, other, third = in_its_own_process(code)
    assert one == other == third


@of_triton
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path) -> None:
    """As where the home folder belongs to somebody else."""
    code = """
sizes = dict(head_dim=16, block_q=16, block_k=16)
print(json.dumps([name for name, binary in compiled.compile_kernels("sm_80", dtype=torch.float16, **sizes)]))
"""
    (tmp_path / "file").touch()
    assert "forward" in in_its_own_process(code, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))


@of_triton
def test_no_product_is_in_flight_when_its_operand_is_fetched_anew() -> None:
    """A pipelined loop that waits for all products but one raced on an H200: see the linear branch of the forward."""
    code = """
found = []
for block_q in (64, 128):
    shape = dict(head_dim=128, block_q=block_q, block_k=64)
    for name, binary in compiled.compile_kernels("sm_90", dtype=torch.bfloat16, **shape):
        waits = [line.strip(" \\t;") for line in binary.asm["ptx"].splitlines() if "wgmma.wait_group" in line]
        found.append([name, len(waits), [wait for wait in waits if not wait.endswith(" 0")]])
print(json.dumps(found))
"""
    found = in_its_own_process(code)
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
@pytest.mark.parametrize(("target", "head_dim", "block"), [("sm_80", 40, 32), ("sm_90", 128, 64), ("sm_100", 40, 32)])
def test_numba_keeps_arrays_in_registers_and_tiles_in_shared_memory(target: str, head_dim: int, block: int) -> None:
    code = """
target, head_dim, block = sys.argv[1], *map(int, sys.argv[2:])
entries = compiled.report(target, backend="numba", head_dim=head_dim, block_q=block, block_k=block)
print(json.dumps([entry.as_dict() for entry in entries]))
"""
    entries = numba_in_its_own_process(code, target, str(head_dim), str(block))
    assert {entry["kernel"] for entry in entries} == NUMBA_NAMES
    assert [f"{entry['kernel']}: {entry['problem']}" for entry in entries if entry["problem"]] == []
    for entry in entries:
        assert 0 < entry["shared"] <= 48 * 1024
        assert entry["registers"] * 32 * entry["warps"] <= 65536, "the registers of a multiprocessor"


@pytest.mark.backend("numba")
def test_numba_computes_in_float32_alone() -> None:
    """A literal of Python among the arguments of an operation would make it float64, at a fraction of the speed."""
    code = """
found = [[name, ".f64" in ptx, "fma.rn.f32" in ptx, "bar.sync" in ptx]
         for name, threads, ptx in compiled.compile_numba_kernels("sm_90", head_dim=64, block_q=64, block_k=64)]
print(json.dumps(found))
"""
    seen = numba_in_its_own_process(code)
    assert seen == [[name, False, True, True] for name, *_ in seen]
    assert {name for name, *_ in seen} == NUMBA_NAMES


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
