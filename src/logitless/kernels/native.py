"""The compiled extension, or why this installation has none: the package works without it."""

from typing import TYPE_CHECKING

MISSING: str | None = None

if TYPE_CHECKING:
    from logitless import _native as extension
else:
    try:
        from logitless import _native as extension
    except ImportError as error:
        MISSING = f"this installation has no compiled kernels ({error}); reinstall with a C++ compiler present"
        extension = None  # nothing calls it: `_dispatch` sends every call to the reference

__all__ = ["MISSING", "extension"]
