"""Logits that are never built: `linear` returns them as a lazy object that every loss and measure accepts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless._precision import under_autocast


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows `activate(hidden @ weight.T + bias)`, made a tile at a time; see `_tiles.LogitRows`."""

    rows: int
    classes: int
    tensors: tuple[Tensor | None, ...]  # hidden [rows, features], weight [classes, features], bias, scale
    scale: float
    softcap: float | None

    def raw(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> Tensor:
        """Return the tile of `hidden @ weight.T + bias`."""
        hidden, weight, bias, _ = tensors
        assert hidden is not None
        assert weight is not None
        return F.linear(hidden[start:stop], weight, bias)

    def activate(self, raw: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return `softcap * tanh(raw * scale / softcap)`."""
        if raw.dtype in (torch.float16, torch.bfloat16):
            raw = raw.float()
        scale = self.scale if tensors[3] is None else tensors[3]
        scaled = raw if isinstance(scale, float) and scale == 1.0 else raw * scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def accumulate(
        self,
        grads: Sequence[Tensor | None],
        grad_raw: Tensor,
        tensors: Sequence[Tensor | None],
        start: int,
        stop: int,
    ) -> None:
        """Take a tile's gradient back through the matrix product; the weight's adds up in float32 or wider."""
        hidden, weight, _, _ = tensors
        grad_hidden, grad_weight, grad_bias, _ = grads
        assert hidden is not None
        assert weight is not None
        if grad_hidden is not None:
            grad_hidden[start:stop] = grad_raw @ weight
        if grad_weight is not None:
            grad_weight.addmm_(grad_raw.to(grad_weight.dtype).T, hidden[start:stop].to(grad_weight.dtype))
        if grad_bias is not None:
            grad_bias += grad_raw.sum(0, dtype=grad_bias.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class LazyLogits:
    """The logits `softcap * tanh((hidden @ weight.T + bias) * scale / softcap)`, not computed.

    Stands wherever logits of shape (..., classes) stand: in every function and module of logitless, and in
    torch's own losses. Reshaping and slicing of the leading dimensions, casts and scaling by a number stay
    lazy; any other torch function computes the logits, after one warning that names it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    softcap: float | None = None
    dtype_: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """The logits' shape, (..., classes)."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the logits would have."""
        return self.hidden.dtype if self.dtype_ is None else self.dtype_

    @property
    def device(self) -> torch.device:
        """The device the logits would be on."""
        return self.hidden.device

    @property
    def num_classes(self) -> int:
        """The size of the last dimension."""
        return self.weight.shape[0]

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to anything the logits are made of."""
        parts = (self.hidden, self.weight, self.bias, self.scale)
        return any(isinstance(part, Tensor) and part.requires_grad for part in parts)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.hidden.dim()

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.hidden.dim()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return how many numbers the logits would be."""
        return self.shape.numel()

    def __len__(self) -> int:
        """Return the first size."""
        return self.shape[0]

    def rows(self) -> HeadRows:
        """Return the logits as rows to be made tile by tile."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        scale = self.scale if isinstance(self.scale, Tensor) else None
        factor = 1.0 if isinstance(self.scale, Tensor) else float(self.scale)
        tensors = (hidden, self.weight, self.bias, scale)
        return HeadRows(hidden.shape[0], self.num_classes, tensors, factor, self.softcap)

    def materialize(self) -> Tensor:
        """Return the logits as a tensor, all of them."""
        rows = self.rows()
        logits = rows.activate(rows.raw(rows.tensors, 0, rows.rows), rows.tensors)
        return logits.view(self.shape).to(self.dtype)

    def reshape(self, *shape: Any) -> LazyLogits:
        """Return the same logits with other leading dimensions; the last stays the classes."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not sizes or sizes[-1] not in (self.num_classes, -1):
            raise ValueError(
                f"LazyLogits of shape {tuple(self.shape)} keep their classes last: cannot reshape to {tuple(sizes)}; "
                "call .materialize() first"
            )
        if sizes[-1] == -1:
            leading = sizes[:-1]
            if torch.Size(leading).numel() != self.hidden.shape[:-1].numel():
                raise ValueError(f"shape {tuple(sizes)} is invalid for LazyLogits of shape {tuple(self.shape)}")
        return replace(self, hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    def view(self, *shape: Any) -> LazyLogits:
        """Return the same logits with other leading dimensions."""
        return self.reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> LazyLogits:
        """Return the logits with the leading dimensions from start_dim to end_dim joined."""
        last = end_dim % self.dim()
        if last == self.dim() - 1:
            raise ValueError("LazyLogits keep their classes last: flatten(0, -2) joins the rows")
        return replace(self, hidden=self.hidden.flatten(start_dim, last))

    def contiguous(self) -> LazyLogits:
        """Return the same logits."""
        return self

    def detach(self) -> LazyLogits:
        """Return the logits cut from the graph of everything they are made of."""
        return replace(
            self,
            hidden=self.hidden.detach(),
            weight=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            scale=self.scale.detach() if isinstance(self.scale, Tensor) else self.scale,
        )

    def float(self) -> LazyLogits:
        """Return the logits as float32."""
        return replace(self, dtype_=torch.float32)

    def to(self, dtype: torch.dtype) -> LazyLogits:
        """Return the logits in another floating dtype."""
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"LazyLogits.to takes a floating dtype, got {dtype!r}; call .materialize() first")
        return replace(self, dtype_=dtype)

    def __getitem__(self, index: Any) -> LazyLogits | Tensor:
        """Return some of the rows; an index into the classes computes the logits of those classes only."""
        items = index if isinstance(index, tuple) else (index,)
        reach = sum(1 for item in items if item is not None and item is not Ellipsis)
        if Ellipsis in [item if isinstance(item, type(Ellipsis)) else None for item in items] or reach >= self.dim():
            return self._materialize_for("indexing of the classes")[index]
        return replace(self, hidden=self.hidden[index])

    def __mul__(self, factor: object) -> LazyLogits | Tensor:
        """Return the logits scaled by a number."""
        if isinstance(factor, (int, float)) and self.softcap is None:
            return replace(self, scale=self.scale * factor)
        return self._materialize_for("mul") * factor  # type: ignore[operator] # torch decides

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> LazyLogits | Tensor:
        """Return the logits divided by a number, such as a temperature."""
        if isinstance(divisor, (int, float)) and self.softcap is None:
            return replace(self, scale=self.scale / divisor)
        return self._materialize_for("div") / divisor  # type: ignore[operator] # torch decides

    def _materialize_for(self, name: str) -> Tensor:
        size = self.numel() * self.dtype.itemsize
        caller = sys._getframe(2)
        warnings.warn(
            f"{name} at {caller.f_code.co_filename}:{caller.f_lineno} computes all the logits of LazyLogits "
            f"{tuple(self.shape)} ({size / 2**20:.1f} MiB); call .materialize() to say that this is meant",
            stacklevel=3,
        )
        return self.materialize()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send torch's losses to the functions of the same name here; compute the logits for anything else."""
        from logitless import functional

        if getattr(F, getattr(func, "__name__", ""), None) is func and func.__name__ in functional.__all__:
            return getattr(functional, func.__name__)(*args, **(kwargs or {}))

        def dense(value: Any) -> Any:
            if isinstance(value, LazyLogits):
                return value._materialize_for(getattr(func, "__name__", repr(func)))
            return type(value)(map(dense, value)) if type(value) in (list, tuple) else value

        return func(*map(dense, args), **{name: dense(value) for name, value in (kwargs or {}).items()})


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LazyLogits:
    """Return the logits of a classifier head as a lazy object: `F.linear`, not computed.

    Equals `F.linear(hidden, weight, bias) * scale`, and with a softcap `softcap * tanh(that / softcap)`,
    in every loss and measure it is given to; nothing of its size is ever allocated.

    Args:
        hidden: (..., features), floating.
        weight: (classes, features), the dtype of hidden.
        bias: (classes,), or None.
        scale: a number or a 0-d tensor that gradients flow to (an inverse temperature, CLIP's logit scale).
        softcap: a positive number, or None.

    Raises:
        TypeError: a tensor is none.
        ValueError: a shape or dtype does not fit, or the softcap is not positive.

    Source: `torch.nn.functional.linear`; the softcap is Gemma 2's (arXiv:2408.00118, section 2).
    In training, the head's logits and their gradient stop being the largest tensors of a step.

    >>> import torch, logitless as ll
    >>> logits = ll.linear(torch.ones(3, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    >>> logits.shape
    torch.Size([3, 2])
    >>> ll.functional.cross_entropy(logits, torch.tensor([1, 1, 1]))
    tensor(0.1269)
    """
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"linear: {name} must be Tensor, not {type(tensor).__name__}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: expected hidden (..., features) and weight (classes, features), "
            f"got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear: softcap must be positive, got {softcap}")
    if isinstance(scale, Tensor) and scale.dim() != 0:
        raise ValueError(f"linear: scale must be a number or a 0-d tensor, got shape {tuple(scale.shape)}")
    if under_autocast(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        dtypes = [str(t.dtype) for t in (hidden, weight, bias) if t is not None]
        raise ValueError(f"linear: hidden, weight and bias must share one dtype, got {', '.join(dtypes)}")
    return LazyLogits(hidden, weight, bias, scale, softcap)
