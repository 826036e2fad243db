"""Every check of a class target, once: what it says becomes a frozen `ClassTarget` that all later code trusts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from logitless._rules.precision import check_real
from logitless._rules.transforms import may_be_waited_for, values_are_readable
from logitless.kernels.interface import ClassTarget

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def resolve_class_dim(name: str, dims: int, class_dim: int | None) -> int:
    """Return the class dimension: torch's own (0 for one row, else 1), or the one asked for."""
    if class_dim is None:
        return 0 if dims == 1 else 1
    if not -dims <= class_dim < dims:
        raise IndexError(f"{name}: class_dim={class_dim} is out of range for an input of {dims} dimensions")
    return class_dim % dims


def check_class_weight(name: str, weight: Tensor | None, classes: int) -> None:
    """Raise unless the class weight is one number a class."""
    if weight is None:
        return
    check_real(name, weight=weight)
    if weight.dim() != 1 or weight.numel() != classes:
        raise RuntimeError(
            f"{name}: weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )


def check_weight_dtype(name: str, weight: Tensor | None, dtype: torch.dtype) -> None:
    """Raise, as torch does for class indices, unless the class weight has the input's dtype."""
    if weight is None or weight.dtype == dtype:
        return
    wanted, given = (
        torch.empty(0, dtype=each).type().split(".")[1][: -len("Tensor")] for each in (dtype, weight.dtype)
    )
    raise RuntimeError(
        f"{name}: expected scalar type {wanted} but found {given}: weight must have the input's dtype; "
        f"use weight.to({dtype})"
    )


def class_target(
    name: str,
    sizes: torch.Size,
    target: Tensor,
    *,
    ignore_index: int,
    class_dim: int | None = None,
    probabilities_allowed: bool = True,
) -> ClassTarget:
    """Check a target against the input's sizes and say what it means.

    A target of the input's own shape holds class probabilities, as in torch; any other holds class indices.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: target must be Tensor, not {type(target).__name__}")
    if probabilities_allowed and target.shape == sizes:
        return _probability_target(name, sizes, target, ignore_index, class_dim)
    if len(sizes) == 0:
        raise ValueError(f"{name}: expected an input of 1 or more dimensions, got 0")
    dim = resolve_class_dim(name, len(sizes), class_dim)
    indices = _shaped_indices(name, sizes, target, dim)
    return _index_target(name, indices, sizes[dim], ignore_index, dim)


def _probability_target(
    name: str, sizes: torch.Size, target: Tensor, ignore_index: int, class_dim: int | None
) -> ClassTarget:
    if not target.dtype.is_floating_point:
        raise RuntimeError(
            f"{name}: Expected floating point type for target with class probabilities, got {target.dtype}. "
            f"A target of the input's shape {tuple(sizes)} holds probabilities; class indices have the "
            "input's shape without its class dimension"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"{name}: ignore_index is not supported for floating point target, got ignore_index={ignore_index}"
        )
    if len(sizes) == 0:
        raise IndexError(f"{name}: expected an input of 1 or more dimensions, got 0")
    dim = resolve_class_dim(name, len(sizes), class_dim)
    return ClassTarget(dim, sizes[dim], ignore_index, probabilities=target)


def _shaped_indices(name: str, sizes: torch.Size, target: Tensor, dim: int) -> Tensor:
    expected = sizes[:dim] + sizes[dim + 1 :]
    if target.shape == expected:
        return target
    if len(sizes) == 1 and target.dim() == 1:
        if target.numel() == 1:
            return target.reshape(())
        raise ValueError(f"{name}: for 1D input, 1D target must have size 1, but got target size: {target.numel()}")
    if target.dim() > 0 and expected and target.shape[0] != expected[0]:
        raise ValueError(
            f"{name}: Expected input batch_size ({expected[0]}) to match target batch_size ({target.shape[0]}); "
            f"input {tuple(sizes)}, target {tuple(target.shape)}"
        )
    fix = ""
    if target.dim() == len(expected) + 1 and target.shape[-1] == 1 and target.shape[:-1] == expected:
        fix = "; multi-target not supported: did you mean target.squeeze(-1)?"
    raise RuntimeError(
        f"{name}: Expected target size {list(expected)}, got {list(target.shape)} for an input of size "
        f"{list(sizes)} with its classes in dimension {dim}{fix}"
    )


def _index_target(name: str, target: Tensor, classes: int, ignore_index: int, dim: int) -> ClassTarget:
    if target.dtype not in _INDEX_DTYPES:
        raise RuntimeError(
            f"{name}: expected target dtype to be Long or Byte, or another integer type (class indices), "
            f"but got {target.dtype}; class probabilities have the input's shape"
        )
    return ClassTarget(dim, classes, ignore_index, indices=target.to(torch.int64))


def checked_values(name: str, target: ClassTarget, *, reads: bool = True) -> ClassTarget:
    """Return the target with its indices checked, safe to gather with, and its ignored rows known.

    A checked target stays as it is. Where values may not be read (`reads` is
    `Backend.READS_VALUES`), or cannot be, a bad class makes its row impossible instead of raising.
    """
    indices = target.indices
    if indices is None or target.ignored is not None:
        return target
    readable = (reads and values_are_readable(indices)) or may_be_waited_for(indices)
    if readable and indices.numel():  # usually each is a class: their ends say so at once
        least, most = ends(indices)
        if least >= 0 and most < target.classes and not least <= target.ignore_index <= most:
            return target
    ignored = indices == target.ignore_index
    impossible = ((indices < 0) | (indices >= target.classes)) & ~ignored
    if readable:
        if bool(impossible.any()):
            raise index_error(name, target)
        if not bool(ignored.any()):
            return target
        return replace(target, indices=indices.masked_fill(ignored, 0), ignored=ignored)
    safe = indices.masked_fill(ignored | impossible, 0)
    return replace(target, indices=safe, ignored=ignored, impossible=impossible)


def ends(indices: Tensor) -> tuple[int, int]:
    """Return the least and the largest of indices that can be read; there is one."""
    least, most = torch.aminmax(indices)
    return int(least), int(most)


def first_outside(indices: Tensor, classes: int) -> int | None:
    """Return the first of indices that can be read which is no class, or None where each is one."""
    if not indices.numel():
        return None
    least, most = ends(indices)
    if least >= 0 and most < classes:
        return None
    return int(indices[(indices < 0) | (indices >= classes)][0])


def index_error(name: str, target: ClassTarget) -> IndexError:
    """Return the error for the first index that is neither a class nor ignored."""
    indices = target.indices
    assert indices is not None
    impossible = ((indices < 0) | (indices >= target.classes)) & (indices != target.ignore_index)
    position = tuple(impossible.nonzero()[0].tolist())
    count = int(impossible.sum())
    others = f" and {count - 1} more" if count > 1 else ""
    where = f" at position {position if len(position) != 1 else position[0]}" if position else ""
    return IndexError(
        f"{name}: Target {int(indices[position])} is out of bounds{where}{others}: "
        f"there are {target.classes} classes (0 to {target.classes - 1}) and ignore_index={target.ignore_index}"
    )
