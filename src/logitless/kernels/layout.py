"""How the kernels see a tensor of any strides: as (outer, classes, inner) rows, with a stride each."""

from typing import NamedTuple

from torch import Tensor

Layout = tuple[int, int, int, int, int, int]  # outer, classes, inner and their strides


def _collapse(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Sizes and strides of several dimensions as one, where one stride walks them all."""
    size, stride = 1, 0
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = step
        elif step != size * stride:
            return None
        size *= n
    return size, stride


def layout_of(tensor: Tensor, class_dim: int, split: int | None = None) -> Layout | None:
    """The tensor as (outer, classes, inner) with a stride each, or None where only a copy has that form.

    Where the classes come last, the leading dimensions from `split` on are the inner one: logits[:, :-1] is such.
    """
    shape, strides = tensor.shape, tensor.stride()
    if len(shape) == 2:
        if class_dim in (1, -1):
            return shape[0], shape[1], 1, strides[0], strides[1], 0
        # A single row of a class-major tile is next to its neighbours too, and is to be read as they would be.
        return 1, shape[0], shape[1], 0, strides[0], strides[1] if shape[1] != 1 else 1
    class_dim %= len(shape)
    split = class_dim if split is None else split
    inner_dims = slice(split, class_dim) if split < class_dim else slice(class_dim + 1, None)
    outer = _collapse(shape[:split], strides[:split])
    inner = _collapse(shape[inner_dims], strides[inner_dims])
    if outer is None or inner is None:
        return None
    return outer[0], shape[class_dim], inner[0], outer[1], strides[class_dim], inner[1]


class Laid(NamedTuple):
    """Tensors of one shape, copied where they must be, and their layouts of the same three sizes."""

    tensors: list[Tensor]
    layouts: list[Layout]
    split: int | None


def laid_out(class_dim: int, *tensors: Tensor) -> Laid:
    """The tensors as rows of the same three sizes; contiguous copies where their strides have no such form."""
    dims = tensors[0].dim()
    splits = (None, *range(1, dims - 1)) if class_dim in (-1, dims - 1) else (None,)
    for split in splits:
        layouts = [layout for t in tensors if (layout := layout_of(t, class_dim, split)) is not None]
        if len(layouts) == len(tensors):
            return Laid(list(tensors), layouts, split)
    return laid_out(class_dim, *(t.contiguous() for t in tensors))
