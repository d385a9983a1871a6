"""Several processes, one for each GPU: what the training loop asks of torch.distributed.

torchrun starts the processes; each is a rank. A process started without torchrun is rank 0 of 1, and nothing here
communicates then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from os import environ
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

# What torchrun tells each process. A single name may be a leftover in somebody's environment.
LAUNCH = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(seconds=45)  # a rank that waits longer for the others gives up
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, and gives this one's device.

    For a process without torchrun, or one that has joined already, that is `device` as it is.

    Raises:
        ValueError: device names one GPU, or there are more processes than GPUs.
    """
    if not _launched() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local, gpus = int(environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(f"device must be cuda under torchrun, which gives each process its own, got {device}")
        if local >= gpus:
            raise ValueError(f"nproc-per-node must be at most the number of GPUs here, {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # gloo for `any_rank` even where there are GPUs: what is asked on the CPU does not wait for them.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        # gloo has no type of error of its own.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RuntimeError(
                f"rank {rank()} waited in vain for another rank, which died or hangs: {error}"
            ) from error
        raise
    leave()  # not after an error: the others may be waiting for what this rank will never send


def leave() -> None:
    """Ends the communication; every rank calls it at the same time. After that, each works by itself."""
    if dist.is_initialized():
        dist.barrier()  # nobody hangs up while another rank still listens
        dist.destroy_process_group()


def _launched() -> bool:
    return all(name in environ for name in LAUNCH)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Tensor) -> Tensor:
    """This rank's part of the global batch (B, ...), which every rank has: (B / ranks, ...)."""
    return batch.chunk(count())[rank()]


def mean(value: Tensor) -> Tensor:
    """The average over all ranks."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value / count()


def any_rank(said: bool) -> bool:
    """Whether one of the ranks says so."""
    if not dist.is_initialized():
        return said
    answer = torch.tensor(float(said))
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def wrap(model: nn.Module, fsdp: bool) -> nn.Module:
    """What to call in the model's place, to average gradients over the ranks.

    With `fsdp` the model's own parameters are cut up, too: call this before an optimizer is made.

    Raises:
        ValueError: fsdp without torchrun.
    """
    if not dist.is_initialized():
        if fsdp:
            raise ValueError("fsdp needs the processes that torchrun starts, got one that was started without it")
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (count(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of model and optimizer as one process has them, on rank 0; every rank takes part."""
    return get_state_dict(model, optimizer, options=WHOLE)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state of the model, likewise."""
    return get_model_state_dict(model, options=WHOLE)


def load_whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, model_state: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Gives each rank its part of the states that `whole_state` gave, whatever the number of ranks was then."""
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=WHOLE)


def first_to_fail() -> bool:
    """Whether no other process of this torchrun has failed before; only the first prints its error."""
    if not _launched():
        return True
    store, *_ = next(dist.rendezvous("env://"))
    return store.add("sla_ref/failed", 1) == 1
