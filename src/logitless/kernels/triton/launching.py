"""How kernels are launched: whether Triton is there, how many rows and classes a program has, and on which device.

Triton itself is imported when the first kernel is, and never by `import logitless`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed: pip install 'logitless[gpu]'"
# Triton's interpreter runs the kernels on tensors of the CPU, with numpy. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

# A row of more classes is folded in parts of so many, whatever other rows there are: then few long rows fill a GPU, and
# no row's last bits depend on how many there are.
PART_CLASSES = 1 << 16
# Of a gradient's row, which needs no joining.
GRADIENT_PART_CLASSES = 1 << 14


# A row's classes are counted in 32 bits, a block at a time.
_MOST_CLASSES = (1 << 31) - PART_CLASSES - 1
_MOST_PARTS = (1 << 16) - 1  # of a grid's second axis


# What compilers are told beside a program's shape: a product and a sum may be one operation, which nothing in these
# kernels depends on.
COMPILED = {"enable_fp_fusion": True}


class Shape(NamedTuple):
    """How many rows and classes a program has at a time, and by how many warps."""

    rows: int
    block: int
    warps: int


# Numbers that a thread holds of each quantity, and a program at most; the interpreter's programs suit numpy.
_EACH = 8
NUMBERS = 2048
_NUMBERS_INTERPRETED = 1 << 16
_INNER_ROWS = 64


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def shape_of(
    classes: int, rows_are_next_to_each_other: bool, dtype: torch.dtype, most: int = NUMBERS, each: int = _EACH
) -> Shape:
    """Return the shape of a program, by what a row is alone: its last bits are not to depend on other rows.

    Threads lie along what is consecutive in memory: the classes, or the rows where the classes are apart. Numbers of
    float64 take twice the registers, so a thread has half as many.
    """
    if classes > _MOST_CLASSES:
        raise ValueError(f"a GPU's kernels take rows of at most {_MOST_CLASSES} classes, got {classes}")
    if dtype == torch.float64:
        most, each = most // 2, max(1, each // 2)
    numbers = _NUMBERS_INTERPRETED if INTERPRETED else most
    widest = max(1, numbers // _INNER_ROWS) if rows_are_next_to_each_other else numbers
    block = min(power_of_two(classes), widest)
    rows = max(1, numbers // block) if rows_are_next_to_each_other or block < numbers // 4 else 1
    rows = min(rows, numbers // each)  # what is one number a row is in registers too: two of them in a thread
    return Shape(rows, block, max(1, min(8, max(rows * block // (32 * each), rows // 64))))


def parts_of(classes: int, part_classes: int) -> int:
    """Return in how many parts a row is folded."""
    return max(1, -(-classes // part_classes))


def gradient_part(classes: int, shape: Shape) -> int:
    """Return the classes of a part of a gradient's row: the parts lie on an axis of the grid that is a short one."""
    part = max(GRADIENT_PART_CLASSES, shape.block)
    while parts_of(classes, part) > _MOST_PARTS:
        part *= 2
    return part


def blocks(rows: int, shape: Shape) -> int:
    """Return how many programs have all rows between them."""
    return -(-rows // shape.rows)


def warps_of(warps: int, *, lanes: int) -> int:
    """Return as many threads as these warps of 32 lanes, in warps of so many: AMD's data-centre GPUs have 64."""
    return max(1, warps * 32 // lanes)


def launch(kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor], *args: Any, **options: Any) -> None:
    """Run a kernel on the tensors' device and its current stream; of tensors without data, nothing."""
    if 0 in grid or any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
        return
    with _current(tensors[0].device):
        options["num_warps"] = warps_of(options["num_warps"], lanes=32 if torch.version.hip is None else 64)
        kernel[grid](*args, **options, **COMPILED)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
