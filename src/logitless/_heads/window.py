"""Parameters that a wrapper (FSDP, ZeRO-3) frees outside their module's forward, and how to have them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

# Gathers the parameters of a head's unit again, and lets them go when it is left.
Window = Callable[[], AbstractContextManager[None]]


def is_freed(tensor: Tensor | None) -> bool:
    """Say whether a tensor's memory was taken away."""
    return tensor is not None and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def opened(window: Window | None, tensors: Sequence[Tensor | None]) -> AbstractContextManager[None]:
    """Return a context in which the memory of freed parameters is there."""
    if window is None or not any(map(is_freed, tensors)):
        return nullcontext()
    return _gathered(window, tensors)


@contextmanager
def _gathered(window: Window, tensors: Sequence[Tensor | None]) -> Iterator[None]:
    with window():
        if any(map(is_freed, tensors)):
            raise RuntimeError(
                "the head's parameters were freed since these logits were made, and gathering them again gave other "
                "memory: compute the loss inside the forward of the module that is sharded"
            )
        yield
