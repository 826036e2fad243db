"""The compiled extension, or why this installation has none: the package works without it."""

from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined] # torch documents it, and exports it not

MISSING: str | None = None

if TYPE_CHECKING:
    from logitless import _native as extension
else:
    try:
        from logitless import _native as extension
    except ImportError as error:
        MISSING = f"this installation has no compiled kernels ({error}); reinstall with a C++ compiler present"
        extension = None  # nothing calls it: `dispatch` sends every call to the reference
    else:
        # A torch before 2.10 has no such table, and a tensor is then described by way of a capsule.
        extension.tensors_are(torch.Tensor, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), to_dlpack)

# As numbered in kernels.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

__all__ = ["DTYPES", "MISSING", "extension"]
