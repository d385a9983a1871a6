"""The numbers of docs/several-gpus.md that were measured are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
RANKS = (2, 4)
FILES = {
    ranks: json.loads((ROOT / "benchmarks" / "results" / f"several_gpus-{ranks}.json").read_text(encoding="utf-8"))
    for ranks in (1, *RANKS)
}
WAN = {ranks: FILES[ranks]["wan"] for ranks in RANKS}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def digits(value: float) -> str:
    """Two or three of them."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def ulysses_rows(size: str) -> list[str]:
    """Milliseconds and MiB on one GPU and on several, and how many times less that is."""
    rows = []
    for name, words in (PASSES | {"peak_mib": "peak memory, MiB"}).items():
        cells = [digits(FILES[RANKS[0]][f"ulysses_{size}"]["one"][name])]
        for ranks in RANKS:
            part = FILES[ranks][f"ulysses_{size}"]
            several = part["several"][name]
            cells.append(f"{digits(several)} ({part['one'][name] / several:.2f}x)")
        rows.append(f"| {size}, {words} | {' | '.join(cells)} |")
    return rows


def wan_row(name: str, ranks: int, arm: str) -> str:
    """A training step: how long, how many clips a second, memory, what is sent and what was predicted."""
    part = WAN[ranks][arm]
    clips = ranks if arm in ("DDP", "FSDP2") else 1
    cells = [f"{part['step'] / 1000:.2f}", f"{1000 * clips / part['step']:.2f}"]
    cells += [f"{part[kind] / 1024:.1f}" for kind in ("held_mib", "peak_mib")]
    sent = f"{part['sent_mb'] / 1000:.2f} ({part['predicted_mb'] / 1000:.2f})" if "sent_mb" in part else "-"
    return f"| {name} | {' | '.join(cells)} | {sent} |"


def wan_rows() -> list[str]:
    rows = [wan_row("one GPU", RANKS[0], "one")]
    return rows + [wan_row(f"{arm}, {ranks}", ranks, arm) for arm in ("DDP", "FSDP2", "Ulysses") for ranks in RANKS]


def lab_rows() -> list[str]:
    steps = {arm: [digits(FILES[ranks]["lab"][arm]["step"]) for ranks in FILES] for arm in ("DDP", "FSDP2")}
    return [f"| {arm} | {' | '.join(cells)} |" for arm, cells in steps.items()]


def sentences() -> list[str]:
    found = []
    for arm, same in (("Ulysses", "one"), ("DDP", "one, all clips"), ("FSDP2", "one, all clips")):
        off = max(abs(WAN[n][arm]["losses"][1] / WAN[n][same]["losses"][1] - 1) for n in RANKS)
        found.append(f"{100 * off:.2f} % ({arm})")
    sent = FILES[4]["ulysses_720p"]
    assert sent["sent_mb"] == pytest.approx(sent["predicted_mb"])
    return found


ROWS = [*ulysses_rows("480p"), *ulysses_rows("720p"), *wan_rows(), *lab_rows()]


@pytest.mark.parametrize("row", ROWS)
def test_the_page_has_the_row(row: str):
    assert row in PAGE


@pytest.mark.parametrize("sentence", sentences())
def test_the_page_says_what_was_measured(sentence: str):
    assert sentence in " ".join(PAGE.split())


def test_no_other_time_is_on_the_page():
    assert set(re.findall(r"[\d.]+ \(\d\.\d\dx\)", PAGE)) == set(re.findall(r"[\d.]+ \(\d\.\d\dx\)", "\n".join(ROWS)))


def test_all_ranks_have_the_bits_of_one_gpu():
    for ranks in RANKS:
        for size in ("480p", "720p"):
            assert all(FILES[ranks][f"ulysses_{size}"]["parity"]["same_bits"].values())
