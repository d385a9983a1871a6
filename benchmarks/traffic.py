"""What travels between ranks in one training step of Wan2.1-1.3B, computed from shapes, not measured.

    python benchmarks/traffic.py

prints the table of docs/several-gpus.md: what each rank sends, in GB (10^9 bytes), everything in bfloat16, one clip for
each rank (DDP, FSDP2) or for all ranks (Ulysses). Collectives are counted as a ring does them: over P ranks, an
all-gather or a reduce-scatter of M bytes sends (P - 1) / P M from each, an all-reduce twice that. An all-to-all of M
bytes on each rank sends (P - 1) / P M. Exchanged shapes, losses and the gathered output of 64 channels are left out.
"""

from __future__ import annotations

HEADS, HEAD_DIM, LAYERS = 12, 128, 30
PARAMETERS = 1_418_996_800  # a test counts them in diffusers' model; SLA adds 30 (128^2 + 128) to them
TOKENS = {"480p": 32_760, "720p": 75_600}
RANKS = (2, 4, 8)
BYTES = 2  # bfloat16


def ddp(ranks: int, parameters: int = PARAMETERS) -> float:
    """All-reduce of the gradients."""
    return 2 * (ranks - 1) / ranks * parameters * BYTES


def fsdp(ranks: int, parameters: int = PARAMETERS) -> float:
    """All-gather of the weights in forward and backward, reduce-scatter of the gradients."""
    return 3 * (ranks - 1) / ranks * parameters * BYTES


def ulysses(ranks: int, tokens: int) -> float | None:
    """All-to-all of q, k, v and o in each layer, and of their gradients; None if the heads cannot be shared out."""
    if HEADS % ranks:
        return None
    return LAYERS * ulysses_layer(ranks, tokens)


def ulysses_layer(ranks: int, tokens: int, heads: int = HEADS, head_dim: int = HEAD_DIM) -> float:
    """The same of one layer."""
    tensor = tokens / ranks * heads * head_dim * BYTES
    return 2 * 4 * (ranks - 1) / ranks * tensor


def gathered(ranks: int, tokens: int, channels: int) -> float:
    """What a model under Ulysses puts out, given to all ranks, and its gradient. Left out of the table."""
    return 2 * (ranks - 1) * tokens / ranks * channels * BYTES


def rows() -> list[str]:
    """The table in Markdown."""
    lines = [f"| each rank sends, GB | {' | '.join(f'{ranks} ranks' for ranks in RANKS)} |", "|---|---|---|---|"]
    arms = {"DDP: gradients": ddp, "FSDP2: weights twice, gradients": fsdp}
    arms |= {
        f"Ulysses, {size}, N = {tokens:,}: q, k, v, o and their gradients": lambda ranks, n=tokens: ulysses(ranks, n)
        for size, tokens in TOKENS.items()
    }
    arms["Ulysses, 720p, one layer of Wan2.1-14B, 40 heads"] = lambda ranks: ulysses_layer(ranks, TOKENS["720p"], 40)
    for name, arm in arms.items():
        sent = (arm(ranks) for ranks in RANKS)
        lines.append(f"| {name} | {' | '.join('-' if each is None else f'{each / 1e9:.2f}' for each in sent)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
