"""The numbers of docs/several-gpus.md that were measured are those of the files in benchmarks/results."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from test_performance_page import digits

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
RANKS = (2, 4)
PROJ = [*itertools.product(RANKS, ("480p", "720p"), ("weight", "bias"))]
FILES = {
    ranks: json.loads((ROOT / "benchmarks" / "results" / f"several_gpus-{ranks}.json").read_text(encoding="utf-8"))
    for ranks in (1, *RANKS)
}
WAN = {ranks: FILES[ranks]["wan"] for ranks in RANKS}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


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
    for ranks, places, words in ((2, 2, "times as many clips a second on two GPUs"), (4, 1, "times as many on four")):
        more = {f"{ranks * WAN[ranks]['one']['step'] / WAN[ranks][arm]['step']:.{places}f}" for arm in ("DDP", "FSDP2")}
        found += [f"{each} {words}" for each in more]
    part = FILES[4]["ulysses_720p"]
    one, four = part["one"]["forward"], part["several"]["forward"]
    found.append(f"would be {one / 4:.1f} ms; the other {four - one / 4:.1f} of the {four:.1f} are")
    off = max(FILES[n][f"ulysses_{size}"]["parity"]["proj_relative_error"][each] for n, size, each in PROJ)
    found.append(f"in another order and differ by {100 * off:.1f} %")
    arms = ("one", "FSDP2", "Ulysses")
    held = {arm: sum(WAN[4][arm][f"{kind}_mib"] for kind in ("held", "peak")) / 1024 for arm in arms}
    found.append(f"{held['FSDP2']:.1f} GiB on four instead of {held['one']:.1f}")
    found.append(f"needs {held['Ulysses']:.1f} GiB instead of {held['one']:.1f}")
    return found


ROWS = [*ulysses_rows("480p"), *ulysses_rows("720p"), *wan_rows(), *lab_rows()]


@pytest.mark.parametrize("text", [*ROWS, *sentences()])
def test_the_page_has_what_was_measured(text: str):
    assert text in " ".join(PAGE.split())


def test_each_rank_sent_what_was_predicted():
    """FSDP2 sends less, as the page says."""
    for ranks in RANKS:
        layers = [FILES[ranks][f"ulysses_{size}"] for size in ("480p", "720p")]
        for part in (*layers, WAN[ranks]["DDP"], WAN[ranks]["Ulysses"]):
            assert part["sent_mb"] == pytest.approx(part["predicted_mb"])


def test_no_other_time_is_on_the_page():
    assert set(re.findall(r"[\d.]+ \(\d\.\d\dx\)", PAGE)) == set(re.findall(r"[\d.]+ \(\d\.\d\dx\)", "\n".join(ROWS)))


def test_all_ranks_have_the_bits_of_one_gpu():
    for ranks in RANKS:
        for size in ("480p", "720p"):
            assert all(FILES[ranks][f"ulysses_{size}"]["parity"]["same_bits"].values())
