"""Cross-entropy of logits that are not built, as torch operators: a compiled graph holds no logits; see `rows`.

`logitless::head_loss` is a reduced loss and, made on the way, its gradients, which the backward pass multiplies by the
upstream gradient and by what else is late (`_heads.sweep.Factors`). `logitless::head_rows` is the loss of each row, and
`logitless::head_rows_grad` its gradient. Which rows are ignored is known when a graph runs, so they are left out
inside. The passes over tiles are those of eager calls (`_heads.sweep`), so results are theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from logitless._heads.loss_plan import HeadLoss, LossRows, loss_call, loss_reduction
from logitless._heads.rows import HeadRows
from logitless._heads.sweep import (
    HeadCall,
    Reduction,
    factors,
    late_factor,
    row_gradients,
    row_values,
    value_and_gradients,
)
from logitless._heads.tiles import sum_dtype
from logitless._operators.rows import Outputs, backend_of, check_shapes, one_at_a_time
from logitless._rules.derivatives import plain_backward
from logitless._rules.reduction import Empty, Normalizer, as_number
from logitless.kernels.interface import Backend, ClassTarget, RowStats

_PARTS = 4  # hidden, weight, bias and scale: what gradients flow to


class Head(NamedTuple):
    """What an operator is told of logits and their target, in the order of its schema."""

    hidden: Tensor  # [rows, features]
    weight: Tensor
    bias: Tensor | None
    factor: Tensor | None  # the scale where it is a tensor
    scale: float
    softcap: float | None
    target: Tensor | None  # class indices as given
    probabilities: Tensor | None  # [rows, classes]
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    compute: torch.dtype
    max_bytes: int | None
    caller: str

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What gradients flow to."""
        return self[:_PARTS]  # type: ignore[return-value] # a slice of fields forgets their types

    def backend(self, name: str | None) -> Backend:
        """Return the backend of that name, or what takes these tensors."""
        return backend_of(name, *self.parts, self.target, self.probabilities, self.class_weight)

    def needed(self) -> list[bool]:
        """Return which parts need a gradient."""
        enabled = torch.is_grad_enabled()
        return [enabled and part is not None and part.requires_grad for part in self.parts]

    def all_rows(self) -> HeadRows:
        """Return the logits' rows, the ignored ones too."""
        return HeadRows(self.hidden.shape[0], self.weight.shape[0], self.parts, self.scale, self.softcap)

    def rows(self, backend: Backend) -> LossRows:
        """Return the rows that are not ignored; raise if an index is no class."""
        source = self.all_rows()
        check_head(self.caller, self.hidden, self.weight, self.bias, self.factor)
        check_shapes(self.caller, [source.rows, source.classes], probabilities=self.probabilities)
        check_shapes(self.caller, [source.classes], class_weight=self.class_weight)
        check_shapes(self.caller, [source.rows], target=None if self.target is None else self.target.reshape(-1))
        target = ClassTarget(1, source.classes, self.ignore_index, self.target, probabilities=self.probabilities)
        return LossRows.of(self.caller, source, target, torch.Size((source.rows,)), backend)

    def asked(self, normalizer: Normalizer = None) -> HeadLoss:
        """Return what is asked beside logits and target."""
        return HeadLoss(self.class_weight, self.label_smoothing, normalizer, self.max_bytes, None)

    def call(self, backend: Backend, rows: LossRows, gradient: bool | None = None, *, late: bool) -> HeadCall:
        """Plan the pass over the rows."""
        return loss_call(backend, rows, self.asked(), self.compute, gradient, late=late)

    def of_parts(self, parts: Sequence[Tensor | None]) -> Head:
        """Return the same call on other parts."""
        return Head._make((*parts, *self[_PARTS:]))

    def defined(self, backend: Backend) -> tuple[LossRows, Sequence[Tensor]]:
        """Return the rows and what the call gives for each, in plain operations."""
        rows = self.rows(backend)
        return rows, self.call(backend, rows, late=False).definition(*rows.source.tensors)


class _Reduced(NamedTuple):
    """How `head_loss` reduces the rows, in the order of its schema after a Head."""

    rule: Literal["weights", "rows"] | None  # a normalizer by name, as a number or as a tensor
    divisor: float | None
    normalizer: Tensor | None
    reduction: str
    empty: Empty
    result: torch.dtype

    @property
    def any_normalizer(self) -> Normalizer:
        """What the mean divides by, as the caller gave it."""
        if self.normalizer is not None:
            return self.normalizer
        return self.rule if self.divisor is None else self.divisor

    def reduction_of(self, backend: Backend, head: Head, rows: LossRows) -> Reduction:
        """Return how the losses of these rows become a scalar."""
        return loss_reduction(backend, rows, head.asked(self.any_normalizer), self.reduction, self.result, self.empty)


_HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? factor, float scale, float? softcap, Tensor? target, "
    "Tensor? probabilities, Tensor? class_weight, int ignore_index, float label_smoothing, ScalarType compute, "
    "int? max_bytes, str caller"
)
_NEEDED_SCHEMA = "bool need_hidden, bool need_weight, bool need_bias, bool need_factor"
_HEAD_FIELDS = len(Head._fields)
_SAVED = ("row_max", "log_sum", "dense_mass")  # of a row's statistics: what its gradient needs


def loss(
    backend: Backend, head: Head, normalizer: Normalizer, reduction: str, result: torch.dtype, empty: Empty
) -> Tensor:
    """Return the reduced cross-entropy, differentiable in the head's parts."""
    rule = normalizer if isinstance(normalizer, str) else None
    tensor = normalizer if isinstance(normalizer, Tensor) else None
    number = float(normalizer) if isinstance(normalizer, (int, float)) else None
    reduced = _Reduced(rule, number, tensor, reduction, empty, result)
    value: Tensor = _head_loss(*head, *reduced, *head.needed(), backend=backend.NAME)[0]
    return value


def rows(backend: Backend, head: Head) -> tuple[Tensor, Tensor]:
    """Return the loss and the weight of each row, 0 for ignored ones; the loss is differentiable."""
    losses, weights, *_ = _head_rows(*head, any(head.needed()), backend=backend.NAME)
    return losses, weights


def _outputs(head: Head, kept: Tensor | None, grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> Outputs:
    """Return gradients in these dtypes, of all rows, those of ignored ones 0; one that is not there as empty."""
    made = [
        head.hidden.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)
        for grad, dtype in zip(grads, dtypes, strict=True)
    ]
    if kept is not None and grads[0] is not None:
        made[0] = torch.zeros_like(head.hidden, dtype=dtypes[0]).index_copy_(0, kept, made[0])
    return tuple(made)


def _fake_outputs(head: Head, needed: Sequence[bool], dtypes: Sequence[torch.dtype]) -> Outputs:
    likes: list[Tensor] = []
    for at, (part, need, dtype) in enumerate(zip(head.parts, needed, dtypes, strict=True)):
        if part is None or not need:
            likes.append(head.hidden.new_empty([0], dtype=dtype))
        elif at == 0:  # the hidden states' gradient lies as they do
            likes.append(torch.empty_like(part, dtype=dtype))
        else:
            likes.append(part.new_empty(part.shape, dtype=dtype))
    return tuple(likes)


def _sum_dtypes(head: Head) -> list[torch.dtype]:
    """Return the dtypes of gradients that wait for their upstream gradient."""
    return [sum_dtype(head.hidden.dtype), sum_dtype(head.weight.dtype), torch.float64, torch.float64]


def _part_dtypes(head: Head) -> list[torch.dtype]:
    return [head.hidden.dtype if part is None else part.dtype for part in head.parts]


def _loss_arguments(args: Sequence[Any]) -> tuple[Head, _Reduced, Sequence[bool]]:
    return Head._make(args[:_HEAD_FIELDS]), _Reduced._make(args[_HEAD_FIELDS:-_PARTS]), args[-_PARTS:]


@torch.library.custom_op(
    "logitless::head_loss",
    mutates_args=(),
    schema=f"({_HEAD_SCHEMA}, str? rule, float? divisor, Tensor? normalizer, str reduction, str empty, "
    f"ScalarType result, {_NEEDED_SCHEMA}, *, str? backend=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _head_loss(*args: Any, backend: str | None = None) -> Outputs:
    head, reduced, needed = _loss_arguments(args)
    kernels = head.backend(backend)
    rows = head.rows(kernels)
    call, how = head.call(kernels, rows, any(needed), late=False), reduced.reduction_of(kernels, head, rows)
    parts = factors(call, how)
    value, grads = value_and_gradients(call, how, parts, rows.source.tensors, needed)
    late = as_number(parts.late, torch.float64, head.hidden.device)
    return value, *_outputs(head, rows.kept, grads, _sum_dtypes(head)), late


@_head_loss.register_fake
def _(*args: Any, backend: str | None = None) -> Outputs:
    head, reduced, needed = _loss_arguments(args)
    value = head.hidden.new_empty([], dtype=reduced.result)
    late = head.hidden.new_empty([], dtype=torch.float64)
    return value, *_fake_outputs(head, needed, _sum_dtypes(head)), late


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
    check_needed("head_loss", ctx.needs_input_grad, inputs[-_PARTS:])
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    save_inputs(ctx, inputs, grads)
    ctx.backend = keyword_only_inputs["backend"]


def _loss_backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    inputs, (*grads, late) = saved_inputs(ctx)
    head, reduced, needed = _loss_arguments(inputs)
    if grad_output is None:
        return (None,) * len(inputs)
    if torch.is_grad_enabled():

        def definition(*parts: Tensor | None) -> Sequence[Tensor]:
            kernels, given = head.backend(ctx.backend), head.of_parts(parts)
            rows, values = given.defined(kernels)
            return (reduced.reduction_of(kernels, given, rows).value(values[0]),)

        return plain_gradients(head.parts, needed, definition, [grad_output], len(inputs))
    factor = late_factor(late, grad_output)
    assert isinstance(factor, Tensor)
    scaled = [
        _times(grad, factor).to(part.dtype) if need and part is not None else None
        for grad, part, need in zip(grads, head.parts, needed, strict=True)
    ]
    if scaled[0] is not None and head.target is not None:  # 0 times an upstream gradient that is not finite
        ignored = (head.target == head.ignore_index).reshape(-1, 1)
        scaled[0] = scaled[0].masked_fill(ignored, 0)
    return *scaled, *(None,) * (len(inputs) - _PARTS)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    wide = sum_dtype(grad.dtype)
    return grad.to(wide) * factor.to(wide)


_head_loss.register_autograd(_loss_backward, setup_context=_loss_setup)


@torch.library.custom_op(
    "logitless::head_rows",
    mutates_args=(),
    schema=f"({_HEAD_SCHEMA}, bool gradient, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _head_rows(*args: Any, backend: str | None = None) -> Outputs:
    """Return the loss and weight of each row, and what its gradient needs."""
    head, gradient = Head._make(args[:_HEAD_FIELDS]), args[_HEAD_FIELDS]
    kernels = head.backend(backend)
    rows = head.rows(kernels)
    outputs, states = row_values(head.call(kernels, rows, gradient, late=True), rows.source.tensors)
    saved: list[Tensor] = []
    for name in _SAVED:
        values = [value for state in states if (value := getattr(state, name)) is not None]
        saved.append(rows.everywhere(torch.cat(values)) if values else head.hidden.new_empty(0, dtype=head.compute))
    return *map(rows.everywhere, outputs), *saved


@_head_rows.register_fake
def _(*args: Any, backend: str | None = None) -> Outputs:
    head = Head._make(args[:_HEAD_FIELDS])
    shape, compute = head.hidden.shape[:1], head.compute
    dense = head.hidden.new_empty(shape if head.probabilities is not None else [0], dtype=compute)
    losses, weights, row_max = (head.hidden.new_empty(shape, dtype=compute) for _ in range(3))
    return losses, weights, row_max, head.hidden.new_empty(shape, dtype=torch.float64), dense


@torch.library.custom_op(
    "logitless::head_rows_grad",
    mutates_args=(),
    schema=f"({_HEAD_SCHEMA}, Tensor row_max, Tensor log_sum, Tensor dense_mass, Tensor grad, "
    f"{_NEEDED_SCHEMA}, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _head_rows_grad(*args: Any, backend: str | None = None) -> Outputs:
    """Return the gradients of the needed parts, each tile made again."""
    head, needed = Head._make(args[:_HEAD_FIELDS]), args[-_PARTS:]
    *saved, grad = args[_HEAD_FIELDS:-_PARTS]
    kernels = head.backend(backend)
    rows = head.rows(kernels)
    call = head.call(kernels, rows, gradient=True, late=True)
    if rows.kept is not None:
        saved, grad = [value[rows.kept] if value.numel() else value for value in saved], grad[rows.kept]
    row_max, log_sum, dense_mass = saved
    check_shapes("head_rows_grad", [rows.source.rows], row_max=row_max, log_sum=log_sum, grad=grad)
    if head.probabilities is not None:
        check_shapes("head_rows_grad", [rows.source.rows], dense_mass=dense_mass)
    nothing = RowStats._make((None,) * len(RowStats._fields))
    states = [
        nothing._replace(
            row_max=row_max[start:stop],
            log_sum=log_sum[start:stop],
            dense_mass=None if head.probabilities is None else dense_mass[start:stop],
        )
        for start, stop in call.ranges()
    ]
    grads = row_gradients(call, rows.source.tensors, needed, [grad, None], states)
    return _outputs(head, rows.kept, grads, _part_dtypes(head))


@_head_rows_grad.register_fake
def _(*args: Any, backend: str | None = None) -> Outputs:
    head = Head._make(args[:_HEAD_FIELDS])
    return _fake_outputs(head, args[-_PARTS:], _part_dtypes(head))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
    gradient = inputs[_HEAD_FIELDS]
    check_needed("head_rows", ctx.needs_input_grad, [gradient] * _PARTS)
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.needed = list(ctx.needs_input_grad[:_PARTS])
    save_inputs(ctx, inputs, others[1:])
    ctx.backend = keyword_only_inputs["backend"]


def _rows_backward(ctx: Any, grad_losses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    inputs, saved = saved_inputs(ctx)
    head = Head._make(inputs[:_HEAD_FIELDS])
    if grad_losses is None:
        return (None,) * len(inputs)
    if torch.is_grad_enabled():

        def definition(*parts: Tensor | None) -> Sequence[Tensor]:
            rows, values = head.of_parts(parts).defined(head.backend(ctx.backend))
            return (rows.everywhere(values[0]),)

        return plain_gradients(head.parts, ctx.needed, definition, [grad_losses], len(inputs))
    grads = _head_rows_grad(*head, *saved, grad_losses, *ctx.needed, backend=ctx.backend)
    needed = [grad if need else None for grad, need in zip(grads, ctx.needed, strict=True)]
    return *needed, *(None,) * (len(inputs) - _PARTS)


_head_rows.register_autograd(_rows_backward, setup_context=_rows_setup)

for _operator in (_head_loss, _head_rows, _head_rows_grad):
    _operator.register_vmap(one_at_a_time(_operator))


def check_head(
    operator: str, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Tensor | None
) -> None:
    """Raise unless these are the parts of a head."""
    if hidden.dim() != 2 or weight is None or weight.dim() != 2:
        raise RuntimeError(f"logitless::{operator}: expected hidden [rows, features] and weight [classes, features]")
    check_shapes(operator, [weight.shape[0], hidden.shape[1]], weight=weight)
    check_shapes(operator, weight.shape[:1], bias=bias)
    check_shapes(operator, [], scale=factor)


def check_needed(name: str, requires_grad: Sequence[bool], needed: Sequence[bool]) -> None:
    for at, given in enumerate(requires_grad):
        if given and not (at < len(needed) and needed[at]):
            raise NotImplementedError(f"logitless::{name} has a gradient for the parts of a head that it was asked for")


def save_inputs(ctx: Any, inputs: Sequence[Any], others: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs), *others)
    ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]


def saved_inputs(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    tensors, count = ctx.saved_tensors, len(ctx.values)
    inputs = [value if tensor is None else tensor for tensor, value in zip(tensors[:count], ctx.values, strict=True)]
    return inputs, tensors[count:]


def plain_gradients(
    parts: Sequence[Tensor | None],
    needed: Sequence[bool],
    definition: Callable[..., Sequence[Tensor]],
    grad_outputs: Sequence[Tensor | None],
    inputs: int,
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again: of the definition, in plain operations on all rows."""
    return *plain_backward(definition, parts, needed, grad_outputs), *(None,) * (inputs - len(parts))
