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
        f"{operation}: lazy logits have no memory, which a tensor was given for its .data, or a list of them is read "
        f"by, at {callers_line()}: give .data = z.materialize(), and torch.stack of a list"
    )


_all = torch.library.Library("_", "IMPL")
_all.fallback(_refuse, _KEY)
_aten = torch.library.Library("aten", "IMPL")


def _refuse_in(name: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"aten.{name}")

    _aten.impl(name, refuse, _KEY)


# Clones, casts and torch.tensor end in the first, whose kernel is of every backend; torch.tensor of a list reads by the
# others, where no fallback of Python's is called.
for _name in ("copy_", "_local_scalar_dense", "as_strided"):
    _refuse_in(_name)
