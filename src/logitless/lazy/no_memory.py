"""What happens where torch's C++ takes a lazy tensor's inside for a dense tensor's: an error, and no crash.

`parameter.data = z` makes torch copy what the tensor is from outside, and that it has no memory, into a tensor that
is none of ours; a kernel would read address 0. So lazy tensors carry a dispatch key of a backend that torch has no
kernels for. It lies below Python's, which a lazy tensor never passes, and above the CPU's: with it, every operation on
such a tensor arrives here.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch

from logitless.lazy.proxy import callers_line

_KEY = "FPGA"
KEYS = torch._C.DispatchKeySet(cast("torch._C.DispatchKey", torch._C._parse_dispatch_key(_KEY)))


def _refuse(operation: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{operation}: a tensor was given lazy logits for its .data, at {callers_line()}: they have no memory; "
        "write .data = z.materialize()"
    )


def _refuse_copy(*args: Any, **kwargs: Any) -> NoReturn:
    _refuse("aten.copy_")


_all = torch.library.Library("_", "IMPL")
_all.fallback(_refuse, _KEY)
_aten = torch.library.Library("aten", "IMPL")
# The one kernel that reads memory and is of every backend: clones, casts and torch.tensor end in it.
_aten.impl("copy_", _refuse_copy, _KEY)
