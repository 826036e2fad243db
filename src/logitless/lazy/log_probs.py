"""Log-probabilities that are never built: what `log_softmax` makes of LazyLogits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless._heads import picks
from logitless.lazy.gradient import Form
from logitless.lazy.logits import HeadLogits, LazyLogits, check_classes, gradients_of_rows
from logitless.lazy.moves import MOVES, axis_of
from logitless.lazy.pack import Parts, Settings, pack
from logitless.lazy.proxy import TensorProxy, meaning_of
from logitless.lazy.tensor import LazyTensor, is_eager, no_torch_functions

# No class has it, so no row is left out.
_NO_INDEX = torch.iinfo(torch.int64).min


class LogProbs:
    """The methods of `sign * log_softmax(logits, -1)`, not computed.

    `gather` of a few classes a row, `sum` and `mean` over the classes, and torch's `nll_loss` are computed without
    it: what code that writes cross-entropy, label smoothing or a policy's log-probabilities by hand asks for.
    """

    __slots__ = ()

    fall_back: Callable[..., Any]  # gives what torch's method of a name does

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Say what they are made of."""
        z: Any = self
        return f"LazyLogProbs({z.logits!r}, sign={z.multiplier})"

    def neg(self) -> Any:
        """Return them with the other sign."""
        z: Any = self
        return log_probs_of(z.logits, -z.multiplier)

    __neg__ = neg
    negative = neg

    def _is_class_dim(self, dim: Any) -> bool:
        dims = len(self.shape)  # type: ignore[attr-defined] # of both kinds
        axis = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        return isinstance(axis, int) and axis_of(axis, dims) == dims - 1

    def gather(self, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
        """Return those of the classes that `index` names, without the others."""
        z: Any = self
        fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.shape[:-1] == z.shape[:-1]
        if not self._is_class_dim(dim) or not fits or index.dim() != z.dim():
            return self.fall_back("gather", dim, index)
        check_classes(index, z.shape[-1])
        logits = z.logits
        if index.shape[-1] != 1:
            flat = index.reshape(index.shape[:-1].numel(), index.shape[-1])
            return z.multiplier * logits.picked("gather", picks.gather_log_probs, flat)
        flat = logits.flatten(0, -2) if z.dim() > 2 else logits
        target = index.reshape(flat.shape[:-1])
        nll: Tensor = meaning_of(F.cross_entropy)(flat, target, reduction="none", ignore_index=_NO_INDEX)
        return (-z.multiplier * nll).to(z.dtype).view(index.shape)

    def sum(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        """Return their sum over the classes of each row."""
        z: Any = self
        if not self._is_class_dim(dim):
            return self.fall_back("sum", *([] if dim is None else [dim, keepdim]), dtype=dtype)
        wide = z.dtype if dtype is None else torch.promote_types(z.dtype, dtype)
        total = z.logits.picked("sum", picks.sum_log_probs, dtype=wide).to(dtype or z.dtype)
        return z.multiplier * (total.unsqueeze(-1) if keepdim else total)

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        """Return their mean over the classes of each row."""
        z: Any = self
        if not self._is_class_dim(dim):
            return self.fall_back("mean", *([] if dim is None else [dim, keepdim]), dtype=dtype)
        return self.sum(-1, keepdim, dtype=dtype) / z.shape[-1]

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Any:
        """Return the top class of each row."""
        z: Any = self
        if not self._is_class_dim(dim) or z.multiplier < 0:
            return self.fall_back("argmax", dim, keepdim)
        return z.logits.argmax(dim, keepdim)


class _NoLazyFormError(Exception):
    """A move that picks or moves classes, of which log-probabilities need all."""


def _mover(name: str, move_rows: Callable[..., Any]) -> Callable[..., Any]:
    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return move_rows(self, *args, **kwargs)
        except _NoLazyFormError:
            return self.fall_back(name, *args, **kwargs)

    move.__doc__ = f"Return the same log-probabilities after `{name}` of their rows."
    move.__name__ = name
    return move


for _name, _move in MOVES.items():
    setattr(LogProbs, _name, _mover(_name, _move))


def _refuse_classes(changes: dict[str, Any]) -> None:
    if not changes.keys() <= {"hidden", "dtype"}:
        raise _NoLazyFormError


class LazyLogProbs(LogProbs, LazyTensor):  # type: ignore[misc] # methods of torch that take more than these do
    """Log-probabilities of LazyLogits, as a tensor without memory: the parts are the logits'."""

    class_dim = -1  # where log_softmax of lazy logits is lazy

    @classmethod
    def form_of_parts(cls, parts: Parts, settings: Settings) -> Form:
        """Return what the log-probabilities are from outside."""
        return LazyLogits.form_of_parts(parts, settings[:4])

    @classmethod
    def dense_values(cls, parts: Parts, settings: Settings) -> Tensor:
        """Return the log-probabilities, differentiable in the parts."""
        multiplier: float = settings[4]
        return LazyLogits.dense_values(parts, settings[:4]).log_softmax(-1) * multiplier

    @classmethod
    def gradients_of_dense(
        cls, parts: Parts, wanted: Sequence[bool], settings: Settings, window: Any, dense: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the parts, of a dense gradient of the log-probabilities, a tile at a time."""
        return gradients_of_rows(
            LazyLogits, parts, wanted, settings[:4], window, dense, lambda tile: tile.log_softmax(-1) * settings[4]
        )

    @property
    def multiplier(self) -> float:
        """1, or -1 after a negation."""
        return self.settings[4]  # type: ignore[no-any-return] # settings hold anything

    @property
    def logits(self) -> Any:
        """The logits."""
        with no_torch_functions():
            inherited = None if torch.is_grad_enabled() else self.wanted
            return pack(LazyLogits, self.settings[:4], inherited, self.window, *self.parts())

    def head(self) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """Return hidden, weight, bias and scale, attached to the graph of these log-probabilities."""
        hidden, weight, bias, factor = self.parts()
        assert hidden is not None
        assert weight is not None
        return hidden, weight, bias, self.settings[0] if factor is None else factor

    def changed(self, *, view: bool = False, **changes: Any) -> Any:
        """Return the same of other rows, or in another dtype."""
        _refuse_classes(changes)
        made = log_probs_of(self.logits.changed(**changes), self.multiplier)
        return made.share_memory_of(self) if view and isinstance(made, LazyTensor) else made

    def cast_below_autograd(self, dtype: torch.dtype) -> Any:
        """Return them in another dtype, without a graph."""
        number, softcap, _, class_dim, sign = self.settings
        return LazyLogProbs.made(self.raw, self.wanted, (number, softcap, dtype, class_dim, sign), self.window)

    def detach(self) -> Any:
        """Return them cut from the graph."""
        if not is_eager(*self.raw):
            with torch.no_grad():
                return self.changed()
        with no_torch_functions():
            return Tensor.detach(self)

    __hash__ = Tensor.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send `nll_loss` to cross-entropy of the logits."""
        loss = _nll_loss(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs) if loss is None else loss


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TracedLogProbs(LogProbs, TensorProxy):
    """LazyLogProbs in a graph that is being traced, or under a function transform: a plain object."""

    logits: Any
    multiplier: float = 1.0

    @property
    def class_dim(self) -> int:
        """Where the classes are, counted from the end."""
        return -1

    @property
    def shape(self) -> torch.Size:
        """The log-probabilities' shape, (..., classes)."""
        return self.logits.shape  # type: ignore[no-any-return] # logits of either kind

    @property
    def dtype(self) -> torch.dtype:
        """The dtype they would have."""
        return self.logits.dtype  # type: ignore[no-any-return] # logits of either kind

    @property
    def device(self) -> torch.device:
        """The device they would be on."""
        return self.logits.device  # type: ignore[no-any-return] # logits of either kind

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to anything they are made of."""
        return self.logits.requires_grad  # type: ignore[no-any-return] # logits of either kind

    def head(self) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """Return hidden, weight, bias and scale."""
        return self.logits.head()  # type: ignore[no-any-return] # logits of either kind

    def changed(self, *, view: bool = False, **changes: Any) -> Any:
        """Return the same of other rows, or in another dtype."""
        _refuse_classes(changes)
        return log_probs_of(self.logits.changed(**changes), self.multiplier)

    def materialize(self) -> Tensor:
        """Return them as a tensor, all of them."""
        return self.logits.materialize().log_softmax(-1) * self.multiplier  # type: ignore[no-any-return] # a tensor

    def detach(self) -> Any:
        """Return them cut from the graph."""
        return log_probs_of(self.logits.detach(), self.multiplier)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copy and pickle as the parts."""
        return log_probs_of, (self.logits, self.multiplier)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send `nll_loss` to cross-entropy of the logits."""
        loss = _nll_loss(func, args, kwargs or {})
        return TensorProxy.__torch_function__(func, types, args, kwargs) if loss is None else loss


def _nll_loss(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else kwargs.get("input")
    if func is not F.nll_loss or not isinstance(first, LogProbs) or first.multiplier != 1:  # type: ignore[attr-defined] # of both kinds
        return None
    rest = {name: value for name, value in kwargs.items() if name != "input" or args}
    return meaning_of(F.cross_entropy)(first.logits, *args[1:], **rest)  # type: ignore[attr-defined] # of both kinds


def log_probs_of(logits: HeadLogits, sign: float = 1.0) -> Any:
    """Return `sign * log_softmax(logits, -1)`, not computed."""
    if not isinstance(logits, LazyLogits):
        return TracedLogProbs(logits, sign)
    with no_torch_functions():
        inherited = None if torch.is_grad_enabled() else logits.wanted
        return pack(LazyLogProbs, (*logits.settings, sign), inherited, logits.window, *logits.parts())
