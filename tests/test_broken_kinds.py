"""Mends that are taken back one at a time: the tests of their kind must notice every one of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import test_connected_arguments
import test_cut_classes
import test_operator_sizes
import test_tracing
from logitless._autograd import measures as dense_measures
from logitless._heads import work
from logitless._operators import rows as row_operators
from logitless._rules import derivatives, transforms


class Broken(NamedTuple):
    """What is put in place of what, and a test that must fail then."""

    owners: tuple[Any, ...]
    name: str
    replacement: Callable[..., Any]
    test: Callable[[], Any]


def without_aliases(
    function: Callable[..., Any], inputs: Any, needed: Any, grad_outputs: Any
) -> tuple[Tensor | None, ...]:
    """As it was: an input that was made from another one is reached through that too."""
    with torch.enable_grad():
        outputs = function(*inputs)
    pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(grads) if need and x is not None else None for x, need in zip(inputs, needed, strict=True))


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = test_connected_arguments.ROWS, test_connected_arguments.CLASSES
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def tiles_of_minus_infinity_added(original: Callable[..., Any]) -> Callable[..., Any]:
    """As it was: what a tile of -inf alone says of its own classes is added to the others'."""

    def combine(self: Any, parts: Any, ranges: Any, start: int, stop: int) -> Any:
        whole, kept = original(self, parts, ranges, start, stop)
        lost = torch.stack([part.row_max for part in parts]).isneginf().any(0)
        return tuple(value.masked_fill(lost, torch.nan) for value in whole), kept

    return combine


def cut_rows() -> None:
    drawn = torch.Generator().manual_seed(0)
    sizes = (test_cut_classes.ROWS, test_cut_classes.CLASSES)
    hidden, weight = (torch.randn(size, test_cut_classes.WIDTH, generator=drawn) for size in sizes)
    test_cut_classes.test_cut_is_whole("a tile", "probabilities", False, 0.0, "mean", (hidden, weight))


BROKEN = {
    "inputs made from each other": Broken(
        (dense_measures,),
        "plain_backward",
        without_aliases,
        lambda: test_connected_arguments.test_derivatives_of_every_kind("kl", numbers()),
    ),
    "a tracer is not seen": Broken(
        (transforms,), "_tracer", lambda: None, lambda: test_tracing.test_jit_trace("cross_entropy")
    ),
    "make_fx is not seen": Broken(
        (transforms,), "_tracer", lambda: None, lambda: test_tracing.test_make_fx("kl", "real")
    ),
    "batched gradients are not seen": Broken(
        (derivatives,),
        "transform_reason",
        lambda *_: None,
        lambda: test_connected_arguments.test_gradients_that_are_plain("js", numbers()),
    ),
    "sizes are not checked": Broken(
        (row_operators,),
        "check_rows",
        lambda *_, **__: None,
        lambda: test_operator_sizes.test_raises(test_operator_sizes.row_stats, "dense_target"),
    ),
    "a tile of -inf is not left out": Broken(
        (work.CrossEntropyWork,),
        "combine",
        tiles_of_minus_infinity_added(work.CrossEntropyWork.combine),
        cut_rows,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_its_own_test_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BROKEN[name]
    for owner in broken.owners:
        monkeypatch.setattr(owner, broken.name, broken.replacement)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        broken.test()


@pytest.mark.parametrize("name", BROKEN)
def test_it_passes_what_is_not_broken(name: str) -> None:
    BROKEN[name].test()
