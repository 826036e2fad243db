"""What is waited for where LOGITLESS_CHECK=1 asks for it: values on a device that no call otherwise waits for."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def waits() -> bool:
    """Say whether values are checked on the host, at the price of waiting for the device."""
    return os.environ.get("LOGITLESS_CHECK", "") == "1"


def first_bad_row(target: Tensor | None, classes: int, ignore_index: int) -> int:
    """Return the first row whose target is neither a class nor ignored; -1 without one, or unless asked to look."""
    if target is None or not waits() or torch.compiler.is_compiling():
        return -1
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    return int(bad.flatten().nonzero()[0]) if bool(bad.any()) else -1
