"""The compiled extension, or why this installation has none: the package works without it."""

from typing import TYPE_CHECKING

import torch

MISSING: str | None = None

if TYPE_CHECKING:
    from logitless import _native as extension
else:
    try:
        from logitless import _native as extension
    except ImportError as error:
        MISSING = f"this installation has no compiled kernels ({error}); reinstall with a C++ compiler present"
        extension = None  # nothing calls it: `dispatch` sends every call to the reference

# As numbered in kernels.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

__all__ = ["DTYPES", "MISSING", "extension"]
