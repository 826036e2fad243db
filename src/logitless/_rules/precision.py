"""Which dtype a loss is computed in and which it is returned in: decided here once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.masked import MaskedTensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Precision:
    """`compute` holds every intermediate value; `result` is what the caller gets, after one rounding."""

    compute: torch.dtype
    result: torch.dtype


def under_autocast(device: torch.device) -> bool:
    """Say whether autocast is active for tensors on this device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


class HasDtype(Protocol):
    """A tensor, or logits that are not built."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        ...


def precision_of(*tensors: HasDtype | None, autocast: bool = True) -> Precision:
    """Promote the floating dtypes of the tensors as torch does (integers alone: to the default dtype).

    Half precision computes in float32.

    Under autocast torch's losses answer in float32, and so do these.
    """
    promoted = None
    for tensor in tensors:
        if tensor is not None and (dtype := tensor.dtype).is_floating_point:
            promoted = dtype if promoted is None else torch.promote_types(promoted, dtype)
    result = torch.get_default_dtype() if promoted is None else promoted
    compute = torch.float32 if result in HALF else result
    if autocast and result in HALF and under_autocast(next(t for t in tensors if t is not None).device):
        result = torch.float32
    return Precision(compute, result)


def no_autocast(tensor: HasDtype) -> AbstractContextManager[object]:
    """Return a context in which operations keep the dtypes they are given."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(kind):
        return nullcontext()  # a context that turns off what is off takes as long as a small loss
    return torch.autocast(kind, enabled=False)


def check_real(name: str, **tensors: HasDtype | None) -> None:
    """Raise if one of these is complex, nested or masked: a loss compares and adds real numbers, one in each place."""
    for argument, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested:
            raise TypeError(
                f"{name}: argument '{argument}' must not be a nested tensor; pass its values() and those of the "
                "others, or pad it (torch.nested.to_padded_tensor) and ignore the padding"
            )
        if isinstance(tensor, MaskedTensor):
            raise TypeError(
                f"{name}: argument '{argument}' must not be a MaskedTensor; use {argument}.get_data(), and "
                "ignore_index or weights of 0 for what the mask leaves out"
            )
        if tensor.is_complex():
            raise TypeError(
                f"{name}: argument '{argument}' must be real, got {tensor.dtype}; "
                f"use {argument}.real or {argument}.abs()"
            )


def check_input(name: str, input: object, target: object) -> None:
    """Raise, as torch does, unless both are tensors and the input has a floating dtype.

    An integer target of the input's own shape is the target's mistake, and is left to its check.
    """
    for argument, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor) and not hasattr(value, "materialize"):
            raise TypeError(f"{name}: argument '{argument}' must be Tensor, not {type(value).__name__}")
        if isinstance(value, Tensor) and not value.is_complex():
            check_real(name, **{argument: value})
    if isinstance(input, Tensor) and not input.dtype.is_floating_point:
        raise NotImplementedError(f"{name}: input must have a floating dtype, got {input.dtype}; use input.float()")
