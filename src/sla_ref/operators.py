"""Functions as operators of torch: compilers, torch.export and torch.func see the call and not what is in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Bound(NamedTuple):
    """Arguments as `inspect.BoundArguments` has them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _Positional(inspect.Signature):
    """A signature that takes arguments as they are. Its names are there for torch.compile, which counts them."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


def positional(function: Callable) -> Callable:
    """Decorator for the forward of an autograd function, all of whose arguments are given by position.

    `torch.autograd.Function.apply` binds arguments to names in every call, which takes longer than to start a kernel.
    """
    function.__signature__ = _Positional(list(inspect.signature(function).parameters.values()))  # type: ignore[attr-defined]
    return function


def operator(name: str) -> Callable[[Callable], Any]:
    """Decorator that makes a function the operator `sla_ref::name`; the function changes none of its arguments.

    `torch.library.custom_op` does the same, but every call goes through more Python, which takes longer than the call.
    """
    qualified = f"sla_ref::{name}"

    def define(function: Callable) -> Any:
        def run(*arguments: Any) -> Any:
            results = function(*arguments)
            given = {argument.data_ptr() for argument in arguments if isinstance(argument, Tensor)}
            made = [result.data_ptr() for result in ((results,) if isinstance(results, Tensor) else results)]
            if len(given.union(made)) != len(given) + len(made):
                raise RuntimeError(f"{qualified} must return new tensors, got an argument or one result twice")
            return results

        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", run)
        return getattr(torch.ops.sla_ref, name).default

    return define


def fold_into_batch(operator: Any) -> None:
    """Let `torch.func.vmap` make its axis a part of the batch axis.

    For an operator whose tensors, arguments and results, all have the batch as their first axis.
    """

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

    torch.library.register_vmap(operator, rule)


def one_by_one(operator: Any) -> None:
    """Let `torch.func.vmap` run the operator once for each sample: for one with tensors that have no batch axis."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def pick(argument: Any, dim: int | None, sample: int) -> Any:
            return argument if dim is None else argument.select(dim, sample)

        samples = [
            operator(*(pick(argument, dim, sample) for argument, dim in zip(arguments, in_dims, strict=True)))
            for sample in range(info.batch_size)
        ]
        results = [torch.stack(tensors) for tensors in zip(*samples, strict=True)]
        return results, [0] * len(results)

    torch.library.register_vmap(operator, rule)
