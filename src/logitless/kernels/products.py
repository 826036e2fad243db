"""A backend beside another: with its kernels, and its own products of some dtypes alone."""

from __future__ import annotations

from typing import Any, cast

import torch

from logitless.kernels.interface import Backend, TileRules


class _Multiplying:
    """Another backend in all but the dtypes that it multiplies, which nobody measures any more, and its tile order."""

    def __init__(self, backend: Backend, dtypes: frozenset[torch.dtype], class_major: bool | None = None) -> None:
        self._backend = backend
        self.PRODUCT_DTYPES = dtypes
        self.MEASURED_PRODUCTS: frozenset[torch.dtype] = frozenset()
        self._class_major = class_major

    def tile_rules(self) -> TileRules:
        rules = self._backend.tile_rules()
        return rules if self._class_major is None else rules._replace(class_major=self._class_major)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Fixed(_Multiplying):
    """One whose rows' bits nothing beside them decides: its own products alone, and rows that are not cut."""

    def __init__(self, backend: Backend, name: str) -> None:
        super().__init__(backend, backend.FIXED_PRODUCTS)
        self.NAME = name
        self.PRODUCTS_ARE_FIXED = True

    def tile_rules(self) -> TileRules:
        rules = self._backend.tile_rules()
        return rules._replace(least_rows=rules.line)


def multiplying(backend: Backend, dtypes: frozenset[torch.dtype], class_major: bool) -> Backend:
    """Return the backend with its own products of these dtypes alone, and tiles in the order that suits the others."""
    return cast(Backend, _Multiplying(backend, dtypes, class_major))


def of_fixed_order(backend: Backend, name: str) -> Backend:
    """Return the backend, by another name, for rows that have the same bits beside whatever others."""
    return cast(Backend, _Fixed(backend, name))
