"""Mutation testing: the package is changed in one place at a time, and each time a test should fail.

    make mutants                                  50 mutants more
    make mutants ARGS="--count 500 --seed 1"      in another order
    make mutants ARGS="--module router --again"   those of one module, and first once more those that survived
    make mutants ARGS="--count 0"                 only the table of what was found so far

The working tree stays as it is: mutants run in a copy of it, one after the other. Each of them leaves a line in
`runs/mutants.jsonl`. A run may be interrupted at any time, and the next one goes on behind the last line. A line counts
until its module changes.

A mutant is caught if a test of its module (`TESTS`) fails, or takes much longer than without the mutant.
`tools/mutants.toml` lists mutants that no test can catch, with the reason of each. They are not run.
"""

from __future__ import annotations

import argparse
import ast
import copy
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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "src/sla_ref"
LISTED = ROOT / "tools" / "mutants.toml"
TESTS = {
    "reference": "reference block_map",
    "reference_sla2": "reference_sla2",
    "block_map": "block_map attention",
    "attention": "attention module layer",
    "feature_maps": "module attention",
    "module": "module layer attention",
    "sla2": "sla2",
    "router": "router",
    "backends/__init__": "registry attention",
    "backends/pytorch": "backends attention",
    "integrations/checkpoints": "checkpoints",
    "integrations/diffusers": "diffusers",
    "integrations/sdpa": "sdpa",
    "integrations/thu_ml": "thu_ml",
    "integrations/ulysses": "distributed",
}
"""The modules that are changed, and the tests that should notice: `tests/test_*.py`, the best first."""

SELECTED = "not triton and not numba"  # the tests of kernels, in an interpreter, say little about these modules
PATIENCE, MORE = 4, 30.0  # a mutant may take so many times as long as the tests without one, and so many seconds more

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch"])  # its import takes as long as many a run of tests

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
SYMMETRIC = {"min", "max", "sym_min", "sym_max", "promote_types"}  # the order of arguments does not matter
HARMLESS = {"device", "strict"}  # keywords: on a CPU there is one device, and `strict` only asks for equal lengths
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
            if len(arguments) > 1 and name not in SYMMETRIC:
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
    """The nodes that may be changed, and the function or class that each is in: no annotation, decorator or message."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
        defaults = [*node.args.defaults, *node.args.kw_defaults] if isinstance(node, ast.FunctionDef) else []
        inner: Iterable[ast.AST | None] = [*defaults, *node.body]
    elif isinstance(node, ast.AnnAssign):
        inner = [node.value]
    elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in HARMLESS):
        inner = []
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


def run_tests(module: str, tree: Path, limit: float | None = None) -> tuple[str, float]:
    """What came out, "passed", "too slow" or the line of a test that failed, and the seconds that it took."""
    started, log = time.perf_counter(), tree / "pytest.log"
    process = PROCESSES.Process(target=_pytest, args=(module, tree, log))
    process.start()
    try:
        process.join(limit)
    finally:
        slow = process.exitcode is None
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if slow:
        return "too slow", time.perf_counter() - started
    text = log.read_text(encoding="utf-8")
    if process.exitcode not in (0, 1, 2, 4):  # passed; a test failed; what is tested, or conftest.py, does not load
        raise RuntimeError(f"pytest ended with {process.exitcode}:\n{text}")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    result = "passed" if process.exitcode == 0 else (failed or text.strip().splitlines()[-1:])[0][:200]
    return result, time.perf_counter() - started


def _pytest(module: str, tree: Path, log: Path) -> None:
    """The tests of a module, in a process of their own and with their output in a file."""
    os.setsid()  # to end with all processes that a test may start
    os.chdir(tree)
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.path.insert(0, str(tree / "src"))
    os.environ["PYTHONPATH"] = str(tree / "src")
    # No bytecode: that of a mutant could be taken for the next one's, which is made in the same second.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    import pytest

    files = [f"tests/test_{name}.py" for name in TESTS[module].split()]
    code = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "-k", SELECTED, *files])
    sys.stdout.flush()
    os._exit(code)


def run(mutants: Iterable[Mutant], out: Path) -> None:
    """Run the tests on each in a copy of the tree, and append a line for each to `out`."""
    clean: dict[str, float] = {}  # seconds without a mutant
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, out.open("a", encoding="utf-8") as file:
        tree = Path(folder)
        copy_of_the_tree(tree)
        for mutant in mutants:
            module = mutant.name[0]
            path = tree / PACKAGE / f"{module}.py"
            source = path.read_text(encoding="utf-8")
            if module not in clean:
                result, clean[module] = run_tests(module, tree)
                if result != "passed":
                    raise RuntimeError(f"the tests of {module} fail without a mutant: {result}")
            path.write_text(mutant.source, encoding="utf-8")
            result, seconds = run_tests(module, tree, PATIENCE * clean[module] + MORE)
            path.write_text(source, encoding="utf-8")
            line = {"mutant": mutant.name, "source": digest(source), "result": result, "seconds": round(seconds, 1)}
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
            print(f"{'SURVIVED' if result == 'passed' else 'caught':8} {mutant}", flush=True)


def results(out: Path) -> dict[Name, str]:
    """The last result of each mutant whose module is still the same."""
    sources = {module: digest(source_of(module)) for module in TESTS}
    lines = map(json.loads, out.read_text(encoding="utf-8").splitlines() if out.exists() else [])
    return {tuple(line["mutant"]): line["result"] for line in lines if sources.get(line["mutant"][0]) == line["source"]}


def table(mutants: list[Mutant], found: dict[Name, str], uncatchable: dict[Name, str]) -> str:
    """How many were caught and which survived, by module. The rate is that of the mutants that ran."""
    lines = [f"{'module':26}{'mutants':>9}{'listed':>9}{'run':>9}{'caught':>9}{'rate':>9}"]
    modules = list(dict.fromkeys(mutant.name[0] for mutant in mutants))
    for title, members in (*((module, {module}) for module in modules), ("all", set(modules))):
        names = [mutant.name for mutant in mutants if mutant.name[0] in members]
        ran = [found[name] for name in names if name in found and name not in uncatchable]
        caught = len(ran) - ran.count("passed")
        rate = f"{100 * caught / len(ran):.0f} %" if ran else "-"
        number_listed = sum(name in uncatchable for name in names)
        lines.append(f"{title:26}{len(names):9}{number_listed:9}{len(ran):9}{caught:9}{rate:>9}")
    survivors = (each for each in mutants if found.get(each.name) == "passed" and each.name not in uncatchable)
    return "\n".join([*lines, *(f"survived: {mutant}" for mutant in survivors)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="how many mutants to run (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="decides their order (default: 0)")
    parser.add_argument("--module", action="append", choices=TESTS, help="only its mutants; may be given several times")
    parser.add_argument("--again", action="store_true", help="begin with those that survived before")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.jsonl", help="where the lines go")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mutants, uncatchable, found = in_order(options.seed, options.module or TESTS), listed(), results(options.out)
    chosen = [mutant for mutant in mutants if options.again and found.get(mutant.name) == "passed"]
    chosen += [mutant for mutant in mutants if mutant.name not in found]
    chosen = [mutant for mutant in chosen if mutant.name not in uncatchable]
    try:
        run(chosen[: options.count], options.out)
    except KeyboardInterrupt:
        print("interrupted: the mutant that was running will run again", file=sys.stderr)
    print(table(mutants, results(options.out), uncatchable))


if __name__ == "__main__":
    main()
