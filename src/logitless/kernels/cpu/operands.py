"""What the compiled kernels are told of a tensor: addresses, strides, and memory for a gradient of the same layout."""

import torch
from torch import Tensor

from logitless.kernels.cpu.memory import empty_like_pooled
from logitless.kernels.layout import Layout, layout_of


def gradient_like(
    source: Tensor, class_dim: int, split: int | None, out: Tensor | None = None
) -> tuple[Tensor, Layout]:
    """Memory for the gradient of a tensor that has a layout (`out`, where given), and its layout of the same sizes."""
    if out is not None:
        layout = layout_of(out, class_dim, split)
        if layout is None or out.shape != source.shape or out.dtype != source.dtype:
            raise ValueError(
                f"out must have the logits' shape {tuple(source.shape)}, dtype {source.dtype} and a collapsible layout"
            )
        return out, layout
    grad = empty_like_pooled(source)
    layout = layout_of(grad, class_dim, split)
    if layout is None:
        grad = torch.empty(source.shape, dtype=source.dtype)
        layout = layout_of(grad, class_dim, split)
        assert layout is not None
    return grad, layout


def address(tensor: Tensor | None) -> int:
    """Return where a tensor lies; 0: there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def optional(tensors: list[Tensor], layouts: list[Layout]) -> tuple[int, int, int, int]:
    """The address and the strides of a tensor that may not be there."""
    return (tensors[0].data_ptr(), *layouts[0][3:]) if tensors else (0, 0, 0, 0)


def plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a contiguous tensor of a dtype, if there is one."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def without(shape: tuple[int, ...], class_dim: int) -> list[int]:
    """Return the shape of one value a row."""
    sizes = list(shape)
    del sizes[class_dim]
    return sizes
