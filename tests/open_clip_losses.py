"""open_clip's own losses, whose package cannot be imported where torchvision is not installed."""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import distribution
from types import ModuleType


@functools.cache
def theirs() -> ModuleType:
    """Return the module that holds them."""
    path = distribution("open_clip_torch").locate_file("open_clip/loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
