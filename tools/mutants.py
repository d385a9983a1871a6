"""Mutation testing: the package is changed in one place at a time, and each time a test should fail.

    make mutants                                  50 mutants more
    make mutants ARGS="--count 500 --seed 1"      in another order
    make mutants ARGS="--module router --again"   those of one module, and first once more those that survived
    make mutants ARGS="--count 0"                 only the table of what was found so far
    make mutants ARGS="--count 0 --record"        the same, on the page docs/guarantees.md, too

The working tree stays as it is: mutants run in a copy of it, one after the other. Each of them leaves a line in
`runs/mutants.jsonl`. A run may be interrupted at any time, and the next one goes on behind the last line. A line counts
until the code of its module changes.

A mutant is caught if a test of its module (`TESTS`) fails, or takes much longer than without the mutant.
`tools/mutants.toml` lists mutants that no test can catch, with the reason of each. They are not run.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tools.guarantees import MUTANTS, digest_of, fill_page

ROOT = Path(__file__).parents[1]
PACKAGE = "src/sla_ref"
LISTED = ROOT / "tools" / "mutants.toml"
COUNTS = ("mutants", "listed", "run", "caught_at_first", "caught")
TESTS = {
    "reference": "reference block_map",
    "reference_sla2": "reference_sla2",
    "block_map": "block_map attention",
    "attention": "attention module layer",
    "feature_maps": "module attention",
    "module": "module layer attention",
    "sla2": "sla2 fuzz",
    "router": "router fuzz",
    "backends/__init__": "registry attention",
    "backends/pytorch": "backends attention reference",
    "integrations/checkpoints": "checkpoints lora diffusers distributed",
    "integrations/diffusers": "diffusers distributed",
    "integrations/sdpa": "sdpa fuzz",
    "integrations/thu_ml": "thu_ml fuzz",
    "integrations/ulysses": "distributed",
}
"""The modules that are changed, and the tests that should notice: `tests/test_*.py`, the best first."""

SELECTED = "not triton and not numba"  # the tests of kernels, in an interpreter, say little about these modules
PATIENCE, MORE = 4, 30.0  # a mutant may take so many times as long as the tests without one, and so many seconds more

PROCESSES = multiprocessing.get_context("forkserver")
IMPORTED = ["pytest", "hypothesis.strategies", "torch._dynamo", "torch._inductor.compile_fx", "diffusers"]
SIMULATED = {"TRITON_INTERPRET": "1", "NUMBA_ENABLE_CUDASIM": "1"}  # tests/conftest.py asks for it too late
PROCESSES.set_forkserver_preload([*IMPORTED, "triton", "numba.cuda"])  # all that takes longer than many a run of tests

Name = tuple[str, ...]
"""What a mutant is called by, wherever in its function it is: module, function, the lines before and after."""


# --- what is changed -------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """A module with one change."""

    name: Name
    line: int
    source: str
    """The whole module with the change."""

    def __str__(self) -> str:
        module, function, old, new = self.name
        return f"{module}.py:{self.line} {function}: {old}  ->  {new}"


def _both_ways(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}


ORDER = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
ARITHMETIC = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod), (ast.BitAnd, ast.BitOr)]
OTHER_OPERATOR = _both_ways([*ORDER, *ARITHMETIC, (ast.And, ast.Or)])
OTHER_FUNCTION = _both_ways([("min", "max"), ("sym_min", "sym_max"), ("any", "all"), ("zeros", "ones")])
LEFT_OUT = {"to", "double", "float", "clone", "contiguous", "detach", "clamp", "clamp_", "masked_fill", "masked_fill_"}
SYMMETRIC = {
    "min",
    "max",
    "sym_min",
    "sym_max",
    "promote_types",
    "mul",
    "add",
}  # the order of arguments does not matter
HARMLESS = {"device", "strict", "stacklevel"}  # one device, equal lengths, and where a warning points
NO_CONTEXT = "__import__('contextlib').nullcontext()"


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What may become of a node: the part that is replaced, and the source that takes its place."""

    def having(**fields: Any) -> tuple[ast.AST, str]:
        changed = copy.copy(node)
        for field, value in fields.items():
            setattr(changed, field, value)
        return node, ast.unparse(changed)

    match node:
        case ast.Compare(ops=[operator]) if type(operator) in OTHER_OPERATOR:
            yield having(ops=[OTHER_OPERATOR[type(operator)]()])
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OTHER_OPERATOR:
            yield having(op=OTHER_OPERATOR[type(operator)]())
        case ast.UnaryOp(operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield having(value=not value)
        case ast.Constant(value=int(value)):
            yield having(value=value + 1)
        case ast.Constant(value=float(value)):
            yield having(value=2 * value or 1.0)
        case ast.IfExp(body=body, orelse=orelse):
            yield having(body=orelse, orelse=body)
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare):
            yield test, f"not ({ast.unparse(test)})"
        case ast.Slice(lower=lower, upper=upper):
            if lower is not None:
                yield having(lower=None)
            if upper is not None:
                yield having(upper=None)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            name = getattr(function, "attr", getattr(function, "id", ""))
            for keyword in keywords:
                if keyword.arg not in HARMLESS:
                    yield having(keywords=[each for each in keywords if each is not keyword])
            if len(arguments) > 1 and name not in SYMMETRIC and ast.dump(arguments[0]) != ast.dump(arguments[1]):
                yield having(args=[arguments[1], arguments[0], *arguments[2:]])
            if isinstance(function, ast.Attribute) and name in LEFT_OUT:
                yield node, ast.unparse(function.value)
            if name in OTHER_FUNCTION:
                source = ast.unparse(function).removesuffix(name) + OTHER_FUNCTION[name]
                yield function, source
        case ast.With(items=[ast.withitem(context_expr=context, optional_vars=None)]):
            yield context, NO_CONTEXT
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield node, "pass"


def places(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """The nodes that may be changed, and the function or class that each is in.

    No annotation, decorator or message is changed, and nothing that is there for mypy: imports if TYPE_CHECKING, and
    `assert`, which says what holds for all callers.
    """
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
        defaults = [*node.args.defaults, *node.args.kw_defaults] if isinstance(node, ast.FunctionDef) else []
        inner: Iterable[ast.AST | None] = [*defaults, *node.body]
    elif isinstance(node, ast.AnnAssign):
        inner = [node.value]
    elif isinstance(node, (ast.JoinedStr, ast.Assert)) or (isinstance(node, ast.keyword) and node.arg in HARMLESS):
        inner = []
    elif isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
        inner = node.orelse
    else:
        yield node, function
        inner = [] if isinstance(node, ast.Raise) else ast.iter_child_nodes(node)
    for child in inner:
        if child is not None:
            yield from places(child, function)


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All of them. Changes that look the same in one function count once."""
    data, starts, found = source.encode(), [0], {}  # ast counts columns in bytes
    for text in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    for place, function in places(ast.parse(source)):
        for node, new in changes(place):
            if not isinstance(node, (ast.stmt, ast.Slice, ast.Constant)):
                new = f"({new})"
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            first, last = starts[node.lineno - 1], starts[node.end_lineno]  # of the lines
            before, after = data[first:last], data[first:begin] + new.encode() + data[end:last]
            name = (module, function, *(" ".join(lines.decode().split()) for lines in (before, after)))
            changed = (data[:first] + after + data[last:]).decode()
            found.setdefault(name, Mutant(name, node.lineno, changed))
    return list(found.values())


def source_of(module: str) -> str:
    return (ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def digest(thing: object) -> str:
    return hashlib.sha256(str(thing).encode()).hexdigest()[:16]


def in_order(seed: int, modules: Iterable[str]) -> list[Mutant]:
    """All mutants of the modules. A mutant keeps its place among the others when some of them go."""
    mutants = [mutant for module in modules for mutant in mutants_of(module, source_of(module))]
    return sorted(mutants, key=lambda mutant: digest((seed, mutant.name)))


def listed() -> dict[Name, str]:
    """The mutants of `tools/mutants.toml`, each with its reason."""
    rows = tomllib.loads(LISTED.read_text(encoding="utf-8"))["mutant"]
    return {(row["module"], row["function"], row["old"], row["new"]): row["reason"] for row in rows}


# --- how it is tried -------------------------------------------------------------------------------------------------


def copy_of_the_tree(to: Path) -> None:
    """All files that git would see, as they are now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


class Tests:
    """The tests of a module. Those that caught the most mutants a second run first."""

    def __init__(self, module: str, tree: Path) -> None:
        self.files, self.tree = [f"tests/test_{name}.py" for name in TESTS[module].split()], tree
        self.seconds: dict[str, float] = {}  # of each test without a mutant
        self.caught: Counter[str] = Counter()
        result, self.clean = self.run()
        if result != "passed":
            raise RuntimeError(f"the tests of {module} fail without a mutant: {result}")

    def run(self, limit: float | None = None) -> tuple[str, float]:
        """What came out: "passed", "too slow", a crash or the line of a test that failed; and the seconds it took."""
        started, log, times = time.perf_counter(), self.tree / "pytest.log", self.tree / "pytest.json"
        process = PROCESSES.Process(target=self._pytest, args=(log, times))
        process.start()
        try:
            process.join(limit)
        finally:
            slow = process.exitcode is None
            with suppress(ProcessLookupError):  # nothing is left
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        seconds = time.perf_counter() - started
        if slow:
            return "too slow", seconds
        if process.exitcode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE):
            return f"crashed with signal {-process.exitcode}", seconds
        text = log.read_text(encoding="utf-8")
        if process.exitcode not in (0, 1, 2, 4):  # passed; a test failed; what is tested, or conftest.py, does not load
            raise RuntimeError(f"pytest ended with {process.exitcode}:\n{text}")
        found = json.loads(times.read_text(encoding="utf-8"))
        self.seconds = self.seconds or found["seconds"]
        self.caught.update(found["failed"])
        failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
        result = "passed" if process.exitcode == 0 else (failed or text.strip().splitlines()[-1:])[0][:200]
        return result, seconds

    def _pytest(self, log: Path, times: Path) -> None:
        """In a process of its own, with its output in a file."""
        os.setsid()  # to end with all processes that a test may start
        os.chdir(self.tree)
        with log.open("w", encoding="utf-8") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.path.insert(0, str(self.tree / "src"))
        os.environ["PYTHONPATH"] = str(self.tree / "src")
        # No bytecode: that of a mutant could be taken for the next one's, which is made in the same second.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        gc.freeze()  # pytest collects garbage at its end, and would go through all that is imported already
        import pytest

        assert "sla_ref" not in sys.modules, "not the one that has the mutant"
        order = {test: self.seconds[test] / (1 + self.caught[test]) for test in self.seconds}
        seconds: dict[str, float] = {}
        longest: dict[str, float] = {}  # setup in each file: whichever of its tests comes first makes what they share
        failed = []

        class Plugin:
            def pytest_collection_modifyitems(self, items: list[Any]) -> None:
                items.sort(key=lambda item: order.get(item.nodeid, 0.0))

            def pytest_runtest_logreport(self, report: Any) -> None:
                file = report.nodeid.partition("::")[0]
                if report.when == "setup":
                    longest[file] = max(longest.get(file, 0.0), report.duration)
                else:
                    seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
                if report.failed:
                    failed.append(report.nodeid)

        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--assert=plain", "-k", SELECTED]
        code = pytest.main([*options, *self.files], plugins=[Plugin()])
        seconds = {test: taken + longest[test.partition("::")[0]] for test, taken in seconds.items()}
        times.write_text(json.dumps({"seconds": seconds, "failed": failed}), encoding="utf-8")
        sys.stdout.flush()
        os._exit(code)


def run(mutants: Iterable[Mutant], out: Path) -> None:
    """Run the tests on each in a copy of the tree, and append a line for each to `out`."""
    tests: dict[str, Tests] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, out.open("a", encoding="utf-8") as file:
        tree = Path(folder)
        copy_of_the_tree(tree)
        for mutant in mutants:
            module = mutant.name[0]
            path = tree / PACKAGE / f"{module}.py"
            source = path.read_text(encoding="utf-8")
            if module not in tests:
                tests[module] = Tests(module, tree)
            path.write_text(mutant.source, encoding="utf-8")
            result, seconds = tests[module].run(PATIENCE * tests[module].clean + MORE)
            path.write_text(source, encoding="utf-8")
            line = {"mutant": mutant.name, "source": digest_of(source), "result": result, "seconds": round(seconds, 1)}
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
            print(f"{'SURVIVED' if result == 'passed' else 'caught':8} {mutant}", flush=True)


def results(out: Path) -> dict[Name, list[str]]:
    """What came out for each mutant each time that it ran, if the last time was with its module's present code."""
    sources, found = {module: digest_of(source_of(module)) for module in TESTS}, {}
    for line in map(json.loads, out.read_text(encoding="utf-8").splitlines() if out.exists() else []):
        found.setdefault(tuple(line["mutant"]), []).append((line["source"], line["result"]))
    return {name: [result for _, result in seen] for name, seen in found.items() if seen[-1][0] == sources.get(name[0])}


def summary(mutants: list[Mutant], found: dict[Name, list[str]], uncatchable: dict[Name, str]) -> dict[str, Any]:
    """By module how many mutants there are, are listed, ran, were caught the first and the last time that they ran."""
    rows: dict[str, Any] = {}
    for mutant in mutants:
        row = rows.setdefault(mutant.name[0], dict.fromkeys(COUNTS, 0) | {"survived": []})
        row["mutants"] += 1
        if mutant.name in uncatchable:
            row["listed"] += 1
        elif (seen := found.get(mutant.name)) is not None:
            row["run"] += 1
            row["caught_at_first"] += seen[0] != "passed"
            row["caught"] += seen[-1] != "passed"
            row["survived"] += [str(mutant)] * (seen[-1] == "passed")
    return {module: rows[module] for module in TESTS if module in rows}


def table(rows: dict[str, Any]) -> str:
    """The summary as text. The rate is that of the mutants that ran."""
    rows = rows | {"all": {name: sum(row[name] for row in rows.values()) for name in COUNTS}}
    lines = [f"{'module':26}{''.join(f'{name:>9}' for name in ('mutants', 'listed', 'run', 'caught', 'rate'))}"]
    for module, row in rows.items():
        rate = f"{100 * row['caught'] / row['run']:.0f} %" if row["run"] else "-"
        lines.append(f"{module:26}{row['mutants']:9}{row['listed']:9}{row['run']:9}{row['caught']:9}{rate:>9}")
    return "\n".join([*lines, *(f"survived: {each}" for row in rows.values() for each in row.get("survived", []))])


def record(rows: dict[str, Any], seed: int) -> None:
    """Write the summary to `MUTANTS` and to the page. A module whose present code had no run keeps its old record."""
    import torch

    from sla_ref.files import whole
    from sla_ref.lab.machine import machine

    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", PACKAGE, "tests"]).returncode:
        raise SystemExit(f"commit {PACKAGE} and tests first: the record names the commit that the mutants were made of")
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], encoding="utf-8").strip()
    about = {"date": time.strftime("%Y-%m-%d"), "seed": seed, **machine(torch.device("cpu"))}
    modules = json.loads(MUTANTS.read_text(encoding="utf-8"))["modules"] if MUTANTS.exists() else {}
    for module, row in rows.items():
        if row["run"]:
            modules[module] = {"commit": commit, "source": digest_of(source_of(module)), **row}
    with whole(MUTANTS) as temporary:
        modules = {module: modules[module] for module in TESTS if module in modules}
        temporary.write_text(json.dumps({"about": about, "modules": modules}, indent=1) + "\n", encoding="utf-8")
    fill_page()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="how many mutants to run (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="decides their order (default: 0)")
    parser.add_argument("--module", action="append", choices=TESTS, help="only its mutants; may be given several times")
    parser.add_argument("--again", action="store_true", help="begin with those that survived before")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.jsonl", help="where the lines go")
    parser.add_argument("--record", action="store_true", help="write the table to benchmarks/results and the page")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(SIMULATED)
    for end in (signal.SIGINT, signal.SIGTERM):  # a shell lets a program in its background ignore the first
        signal.signal(end, signal.default_int_handler)
    mutants, uncatchable, found = in_order(options.seed, options.module or TESTS), listed(), results(options.out)
    chosen = [mutant for mutant in mutants if options.again and found.get(mutant.name, [""])[-1] == "passed"]
    chosen += [mutant for mutant in mutants if mutant.name not in found]
    chosen = [mutant for mutant in chosen if mutant.name not in uncatchable]
    try:
        run(chosen[: options.count], options.out)
    except KeyboardInterrupt:
        print("interrupted: the mutant that was running will run again", file=sys.stderr)
    rows = summary(mutants, results(options.out), uncatchable)
    print(table(rows))
    if options.record:
        record(rows, options.seed)


if __name__ == "__main__":
    main()
