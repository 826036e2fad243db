"""Losses of a whole batch whose vectors lie in several processes (DTensor)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from logitless.kernels.definitions import beside, is_sharded

Given = ParamSpec("Given")
Result = TypeVar("Result")


def of_the_whole(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a loss in which each vector meets all others take DTensors: every process gathers the vectors.

    They are as many numbers as the caller has, and what is made of them is never built, so each process makes the whole
    loss, which is a DTensor again, the same everywhere. A shard receives its part of the gradient.
    """

    @functools.wraps(function)
    def whole(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        sharded = next((tensor for tensor in _tensors((args, kwargs)) if is_sharded(tensor)), None)
        if sharded is None:
            return function(*args, **kwargs)
        if kwargs.get("group") is not None:
            raise ValueError(
                f"{function.__name__}: vectors that are DTensors are one batch already; leave out group=, or pass each "
                "rank's own vectors (x.to_local())"
            )
        args, kwargs = _mapped((args, kwargs), lambda tensor: tensor.full_tensor() if is_sharded(tensor) else tensor)  # type: ignore[attr-defined] # of a DTensor
        result: Result = _mapped(function(*args, **kwargs), lambda tensor: beside(tensor, sharded))
        return result

    return whole


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, change) for each in value)
    if isinstance(value, dict):
        return {name: _mapped(each, change) for name, each in value.items()}
    return value
