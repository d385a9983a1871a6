"""A training step as a CUDA graph: recorded once, then replayed.

A model as small as the lab's spends more time in Python than in its kernels. A replay starts all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARM_UP = 3  # steps before the recording, in which libraries allocate what they keep


class RecordedStep:
    """Does what `step(*batch)` does, and returns its loss. The steps before and in the recording leave no trace."""

    def __init__(
        self, step: Callable[..., Tensor], batch: tuple[Tensor, ...], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.batch = tuple(each.clone() for each in batch)  # where the recorded kernels read
        self.graph = torch.cuda.CUDAGraph()
        with unchanged(model, optimizer):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step(*self.batch)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.loss = step(*self.batch)

    def __call__(self, *batch: Tensor) -> Tensor:
        for place, values in zip(self.batch, batch, strict=True):
            place.copy_(values)
        self.graph.replay()
        return self.loss.clone()


@contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Afterwards weights and optimizer are what they were, in the same memory; state that is new is zero."""

    def tensors() -> list[Tensor]:
        return [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]

    before = {tensor: tensor.detach().clone() for tensor in tensors()}
    yield
    with torch.no_grad():
        for tensor in tensors():
            if tensor in before:
                tensor.copy_(before[tensor])
            else:
                tensor.zero_()
