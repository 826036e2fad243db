"""Log-probabilities that are never built: what `log_softmax` makes of LazyLogits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.kernels import definitions
from logitless.lazy.logits import LazyLogits
from logitless.lazy.proxy import TensorProxy, meaning_of

# No class has it, so no row is left out.
_NO_INDEX = torch.iinfo(torch.int64).min


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyLogProbs(TensorProxy):
    """`sign * log_softmax(logits, -1)`, not computed.

    `gather` of a few classes a row, `sum` and `mean` over the classes, and torch's `nll_loss` are computed without
    it: what code that writes cross-entropy, label smoothing or a policy's log-probabilities by hand asks for.
    """

    logits: LazyLogits
    sign: float = 1.0

    @property
    def shape(self) -> torch.Size:
        """The log-probabilities' shape, (..., classes)."""
        return self.logits.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype they would have."""
        return self.logits.dtype

    @property
    def device(self) -> torch.device:
        """The device they would be on."""
        return self.logits.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to anything they are made of."""
        return self.logits.requires_grad

    def __repr__(self) -> str:
        """Say what they are made of."""
        return f"LazyLogProbs({self.logits!r}, sign={self.sign})"

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Copy and pickle as the parts."""
        return LazyLogProbs, (self.logits, self.sign)

    def materialize(self) -> Tensor:
        """Return them as a tensor, all of them."""
        return self.logits.materialize().log_softmax(-1) * self.sign

    def neg(self) -> LazyLogProbs:
        """Return them with the other sign."""
        return LazyLogProbs(self.logits, -self.sign)

    __neg__ = neg

    def _is_class_dim(self, dim: Any) -> bool:
        axis = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        return isinstance(axis, int) and axis % self.dim() == self.dim() - 1

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """Return those of the classes that `index` names, without the others."""
        leading = self.shape[:-1]
        if not self._is_class_dim(dim) or index.dim() != self.dim() or index.shape[:-1] != leading:
            return self._dense("gather").gather(dim, index)
        if index.shape[-1] != 1:
            return self.sign * (self.logits.gather(-1, index) - self.logits.logsumexp(-1, keepdim=True))
        flat = self.logits.flatten(0, -2) if self.dim() > 2 else self.logits
        target = index.reshape(flat.shape[:-1])
        nll: Tensor = meaning_of(F.cross_entropy)(flat, target, reduction="none", ignore_index=_NO_INDEX)
        return (-self.sign * nll).view(index.shape)

    def sum(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return their sum over the classes of each row."""
        if not self._is_class_dim(dim):
            return self._dense("sum").sum(dim, keepdim, dtype=dtype)
        wide = dtype or self.dtype
        (total,) = self.logits._per_row(lambda tile: (definitions.negative_log_softmax(tile, -1).sum(-1, dtype=wide),))
        return -self.sign * (total.unsqueeze(-1) if keepdim else total)

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return their mean over the classes of each row."""
        if not self._is_class_dim(dim):
            return self._dense("mean").mean(dim, keepdim, dtype=dtype)
        return self.sum(-1, keepdim, dtype=dtype) / self.shape[-1]

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """Return the top class of each row."""
        if not self._is_class_dim(dim) or self.sign < 0:
            return self._dense("argmax").argmax(dim, keepdim)
        return self.logits.argmax(dim, keepdim)

    def __getitem__(self, index: Any) -> Any:
        """Return some rows; some of the classes are computed with all the others."""
        return self._moved("__getitem__", index)

    def _moved(self, name: str, *args: Any, **kwargs: Any) -> LazyLogProbs | Tensor:
        """Return what the logits' method makes of the rows, as log-probabilities, if it leaves the classes alone."""
        logits = getattr(self.logits, name)(*args, **kwargs)
        if isinstance(logits, LazyLogits) and logits.weight.shape == self.logits.weight.shape and logits._last:
            return LazyLogProbs(logits, self.sign)
        result: Tensor = getattr(self._dense(name.strip("_")), name)(*args, **kwargs)
        return result

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send `nll_loss` to cross-entropy of the logits."""
        kwargs = kwargs or {}
        if func is F.nll_loss and isinstance(args[0], LazyLogProbs) and args[0].sign == 1:
            return meaning_of(F.cross_entropy)(args[0].logits, *args[1:], **kwargs)
        return TensorProxy.__torch_function__(func, types, args, kwargs)


def _mover(name: str) -> Callable[..., Any]:
    def move(self: LazyLogProbs, *args: Any, **kwargs: Any) -> Any:
        return self._moved(name, *args, **kwargs)

    move.__doc__ = f"Return the same log-probabilities after `{name}` of their rows."
    move.__name__ = name
    return move


for _name in (
    *("reshape", "view", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim"),
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to", "cpu"),
):
    setattr(LazyLogProbs, _name, _mover(_name))
