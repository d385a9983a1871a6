"""What the ranks of `benchmarks/several_gpus.py` tell each other, and how many bytes their collectives send."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from measure import Clock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def maximum(value: Tensor) -> float:
    """Over all ranks."""
    value = value.detach().double()
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def slowest(value: float, clock: Clock) -> float:
    """The largest value of all ranks."""
    return maximum(torch.tensor(value, device=clock.device))


class Sent(TorchDispatchMode):
    """Counts what this rank sends to others while the mode is on, in 10^6 bytes, as `benchmarks/traffic.py` does.

    Of an all-to-all that is what leaves this rank. The other collectives are counted as a ring of all ranks does them.
    Small all-gathers of lists, by which Ulysses compares shapes, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.megabytes = 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        others = 1 - 1 / dist.get_world_size()
        match op.name():
            case "c10d::allreduce_":
                sent = 2 * others * sum(tensor.nbytes for tensor in args[0])
            case "c10d::_allgather_base_":
                sent = others * args[0].nbytes  # the whole
            case "c10d::_reduce_scatter_base_":
                sent = others * args[1].nbytes
            case "c10d::alltoall_base_":
                _, rows, _, _, leaving, *_ = args
                sent = (1 - leaving[dist.get_rank()] / len(rows)) * rows.nbytes
            case _:
                sent = 0
        self.megabytes += sent / 1e6
        return op(*args, **(kwargs or {}))
