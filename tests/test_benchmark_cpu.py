"""benchmarks/cpu.py: it runs, and writes what it measured."""

import json
import runpy
from pathlib import Path

import pytest
import typer

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cpu.py"


def test_it_writes_every_row(tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    out = tmp_path / "new" / "cpu.json"
    main(turns=1, threads=1, longest=1024, out=out)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["head_dim"], row["length"]) for row in result["rows"]] == [(64, 1024), (128, 1024)]
    for row in result["rows"]:
        assert row["forward_ratio"] == pytest.approx(row["sdpa_forward"] / row["sla_forward"])
    assert [row["length"] for row in result["sparse_branch_forward"]] == [1024]
    with pytest.raises(typer.BadParameter, match="--json must name a new file"):
        main(turns=1, threads=1, longest=1024, out=out)
