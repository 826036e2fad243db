"""What surrounds a call: function transforms, forward mode, a compiler, fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from logitless.kernels.checks import waits

TRACED = "torch.compile traces plain operations"


def surroundings() -> str | None:
    """Return what surrounds a call that only plain differentiable operations serve, if anything does."""
    return TRACED if torch.compiler.is_compiling() else _transform()


def _transform() -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def compile_reason() -> str | None:
    """Return why only plain operations serve this call inside a compiled graph, or None if an operator may."""
    if torch.compiler.is_exporting():
        return "an exported program runs where logitless is not installed"
    return _transform()


def transform_reason(*tensors: Tensor | None) -> str | None:
    """Return why only plain differentiable operations serve this call, or None if a kernel may."""
    reason = surroundings()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor):
            return "upstream gradients come in a batch"
    return None


def hold_data(*tensors: Tensor | None) -> bool:
    """Say whether all tensors hold data: neither fake, nor on meta."""
    return all(t is None or not (isinstance(t, FakeTensor) or t.is_meta) for t in tensors)


def values_are_readable(tensor: Tensor) -> bool:
    """Say whether looking at the values is possible and free of a device synchronisation."""
    return tensor.device.type == "cpu" and hold_data(tensor) and transform_reason(tensor) is None


def may_be_waited_for(tensor: Tensor) -> bool:
    """Say whether the values are to be looked at though that waits for a device: LOGITLESS_CHECK=1 asks for it."""
    return waits() and hold_data(tensor) and transform_reason(tensor) is None
