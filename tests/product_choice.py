"""Who multiplies, pinned: for tests whose matter is the bits of one product, whichever is the faster one here."""

import pytest
import torch

from logitless.kernels import cpu

SERVED = cpu.FIXED_PRODUCTS


def pin_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernel's product wherever it serves, as LOGITLESS_PRODUCT=native."""
    monkeypatch.setattr(cpu, "PRODUCT_DTYPES", SERVED)
    monkeypatch.setattr(cpu, "MEASURED_PRODUCTS", frozenset[torch.dtype]())


def pin_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take torch's products, as LOGITLESS_PRODUCT=torch."""
    monkeypatch.setattr(cpu, "PRODUCT_DTYPES", frozenset[torch.dtype]())
    monkeypatch.setattr(cpu, "MEASURED_PRODUCTS", frozenset[torch.dtype]())
