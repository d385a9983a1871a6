"""What `torch.func.vmap` makes of an operator: the axis that it adds becomes a part of the batch axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def fold_into_batch(operator: CustomOpDef) -> None:
    """Register the rule of an operator whose tensors, arguments and results, all have the batch as their first axis."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def fold(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if dim is None:  # the same for all samples
                return argument.expand(info.batch_size, *argument.shape).flatten(0, 1)
            return argument.movedim(dim, 0).flatten(0, 1)

        def unfold(result: Tensor) -> Tensor:
            return result.unflatten(0, (info.batch_size, -1))

        results = operator(*map(fold, arguments, in_dims))
        if isinstance(results, Tensor):
            return unfold(results), 0
        kind = type(results)  # tuple or list
        return kind(map(unfold, results)), kind([0] * len(results))

    operator.register_vmap(rule)


def one_by_one(operator: CustomOpDef) -> None:
    """Register the rule of an operator with tensors that have no batch axis: it runs once for each sample."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def pick(argument: Any, dim: int | None, sample: int) -> Any:
            return argument if dim is None else argument.select(dim, sample)

        samples = [
            operator(*(pick(argument, dim, sample) for argument, dim in zip(arguments, in_dims, strict=True)))
            for sample in range(info.batch_size)
        ]
        results = [torch.stack(tensors) for tensors in zip(*samples, strict=True)]
        return results, [0] * len(results)

    operator.register_vmap(rule)
