"""What surrounds a call: function transforms, forward mode, a compiler, a tracer, fake tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from logitless.kernels.checks import waits

# Asked at each call, of which the shortest take as long as three of these: by names of their own.
_is_tracing, _modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
_key_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_of_a_batch = torch._C._functorch.is_legacy_batchedtensor
_PROXIES = torch._C._TorchDispatchModeKey.PROXY
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_RECORDED = "make_fx records plain operations"
TRACED = "torch.compile traces plain operations"


def surroundings() -> str | None:
    """Return what surrounds a call that only plain differentiable operations serve, if anything does."""
    return TRACED if is_compiling() else _transform() or _tracer()


def _tracer() -> str | None:
    """Return what records the operations that torch sees, if anything does: a kernel's results would be constants."""
    if _is_tracing():
        return "torch.jit.trace records plain operations"
    if _modes() and torch._C._get_dispatch_mode(_PROXIES) is not None:
        return _RECORDED
    if _key_is_included(_PRE_DISPATCH) and get_proxy_mode() is not None:
        return _RECORDED
    return None


def _transform() -> str | None:
    if _transforms_are_active():
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
        if tensor is not None and _is_of_a_batch(tensor):
            return "upstream gradients come in a batch"
    return None


def dense_of(sparse: Tensor) -> Tensor:
    """Return a sparse tensor written out."""
    with _outside_of_transforms(sparse):
        return sparse.to_dense()


def entries_of(sparse: Tensor) -> Tensor:
    """Return a sparse tensor as COO, with each place once; one that was not coalesced is waited for."""
    with _outside_of_transforms(sparse):
        entries: Tensor = sparse.to_sparse_coo().coalesce()
        return entries


def _outside_of_transforms(sparse: Tensor) -> AbstractContextManager[object]:
    """No transform can wrap a tensor that is sparse in rows (CSR): it is a constant of what runs."""
    if sparse.layout == torch.sparse_csr and torch._C._are_functorch_transforms_active():
        context: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
        return context
    return nullcontext()


def hold_data(*tensors: Tensor | None) -> bool:
    """Say whether all tensors hold data: neither fake, nor on meta."""
    return all(t is None or not (isinstance(t, FakeTensor) or t.is_meta) for t in tensors)


def values_are_readable(tensor: Tensor) -> bool:
    """Say whether looking at the values is possible and free of a device synchronisation."""
    return tensor.device.type == "cpu" and hold_data(tensor) and transform_reason(tensor) is None


def may_be_waited_for(tensor: Tensor) -> bool:
    """Say whether the values are to be looked at though that waits for a device: LOGITLESS_CHECK=1 asks for it."""
    return waits() and hold_data(tensor) and transform_reason(tensor) is None
