"""The measures of logits that are not built as torch operators, so that a compiled graph holds no logits.

`logitless::head_measures` gives values a row and `logitless::head_measures_grad` their gradients, by the passes over
tiles of eager calls (`_heads.measure_plan`); see `heads`, which has cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._heads.measure_plan import entropy_call, pair_call, placed, token_call
from logitless._heads.rows import DenseRows, HeadRows, LogitRows
from logitless._heads.sweep import HeadCall, row_gradients, row_values
from logitless._operators.heads import check_head, check_needed, plain_gradients, save_inputs, saved_inputs
from logitless._operators.pairs import divergence_asked, divergence_told
from logitless._operators.rows import Outputs, backend_of, check_shapes, fake_backend_of, one_at_a_time
from logitless._rules.precision import HALF
from logitless._rules.targets import checked_values
from logitless.kernels.interface import Backend, ClassTarget, Divergence, RowStats

_PARTS = 8  # of two heads: what gradients flow to
_MOST = 9  # outputs
_DTYPES = {"argmax": torch.int64, "rank": torch.int64, "same_top": torch.bool, "top_classes": torch.int64}
_TOP = ("top_log_probs", "top_classes")  # of k classes a row
_STILL = (*_DTYPES, "top_log_probs")  # without a gradient
_TOKEN_SAVED = ("row_max", "log_sum", "entropy")  # of a row's statistics: what its gradient needs


class Source(NamedTuple):
    """Rows of logits, and the dtype that the logits have or would have."""

    rows: LogitRows
    dtype: torch.dtype


class Measures(NamedTuple):
    """What an operator is told, in the order of its schema: two rows' logits, or one's; each of a head, or dense."""

    p_logits: Tensor  # [rows, classes]; of a head its hidden states [rows, features]
    p_weight: Tensor | None
    p_bias: Tensor | None
    p_factor: Tensor | None  # the scale where it is a tensor
    q_logits: Tensor | None
    q_weight: Tensor | None
    q_bias: Tensor | None
    q_factor: Tensor | None
    p_scale: float
    p_softcap: float | None
    p_dtype: torch.dtype
    q_scale: float
    q_softcap: float | None
    q_dtype: torch.dtype
    target: Tensor | None  # class indices as given
    ignore_index: int
    names: str
    caller: str
    divergence: str | None  # what the measure of that name is
    weight: float
    top_k: int

    @classmethod
    def of(
        cls,
        caller: str,
        names: Sequence[str],
        p: Source,
        q: Source | None = None,
        target: ClassTarget | None = None,
        divergence: Divergence | None = None,
        top_k: int = 0,
    ) -> Measures:
        """Return what a call on these logits tells; the target is not checked yet."""
        (p_parts, p_settings), (q_parts, q_settings) = _taken_apart(p), _taken_apart(q)
        indices, ignore_index = (None, -100) if target is None else (target.indices, target.ignore_index)
        told = (indices, ignore_index, ",".join(names), caller, *divergence_told(divergence), top_k)
        return cls._make((*p_parts, *q_parts, *p_settings, *q_settings, *told))

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What gradients flow to."""
        return tuple(self[:_PARTS])  # type: ignore[arg-type] # a slice of fields forgets their types

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the values."""
        return torch.float64 if torch.float64 in (self.p_dtype, self.q_dtype) else torch.float32

    def needed(self) -> list[bool]:
        """Return which parts need a gradient."""
        enabled = torch.is_grad_enabled()
        return [enabled and part is not None and part.requires_grad for part in self.parts]

    def places(self) -> list[int]:
        """Return where the tensors of the planned call are among the parts."""
        p = [0] if self.p_weight is None else [0, 1, 2, 3]
        q = [] if self.q_logits is None else [4] if self.q_weight is None else [4, 5, 6, 7]
        return p + q

    def backend(self, name: str | None) -> Backend:
        """Return the backend of that name, or what takes these tensors."""
        return backend_of(name, *self.parts, self.target)

    def _check(self) -> None:
        """Raise unless the parts and the target fit each other."""
        shapes: list[tuple[int, ...]] = []
        for logits, weight, bias, factor in (self.parts[:4], self.parts[4:]):
            if weight is not None and logits is not None:
                check_head(self.caller, logits, weight, bias, factor)
                shapes.append((logits.shape[0], weight.shape[0]))
            elif logits is not None:
                shapes.append(tuple(logits.shape))
        if any(len(shape) != 2 or shape != shapes[0] for shape in shapes):
            raise RuntimeError(f"logitless::{self.caller}: expected logits [rows, classes] of one shape, got {shapes}")
        target = None if self.target is None else self.target.reshape(-1)
        check_shapes(self.caller, shapes[0][:1], target=target)

    def plan(self, backend: Backend, gradient: bool | None = None) -> tuple[HeadCall, Tensor | None]:
        """Plan the pass over the rows, and say which rows it is of (None: all); raise if an index is no class."""
        self._check()
        p = _put_together(self.parts[:4], self.p_scale, self.p_softcap)
        q = _put_together(self.parts[4:], self.q_scale, self.q_softcap)
        names = tuple(self.names.split(","))
        target = None
        if self.target is not None:
            classes = self.p_logits.shape[-1] if self.p_weight is None else self.p_weight.shape[0]
            target = ClassTarget(1, classes, self.ignore_index, self.target)
            checked = checked_values(self.caller, target, reads=backend.READS_VALUES)
            if q is None:
                assert p is not None
                return token_call(backend, p, checked, _compute(self.p_dtype), self.top_k, gradient)
        assert p is not None
        if q is None:
            return entropy_call(backend, p, _compute(self.p_dtype), gradient, late=True), None
        divergence = divergence_asked(self.divergence, self.weight)
        call = pair_call(backend, [p, q], names, target, divergence, self.compute, gradient, late=True)
        return call, None


_PART_SCHEMA = ", ".join(
    f"Tensor{'' if row == 'p' and part == 'logits' else '?'} {row}_{part}"
    for row in "pq"
    for part in ("logits", "weight", "bias", "factor")
)
_SCHEMA = (
    f"{_PART_SCHEMA}, float p_scale, float? p_softcap, ScalarType p_dtype, float q_scale, float? q_softcap, "
    "ScalarType q_dtype, Tensor? target, int ignore_index, str names, str caller, "
    "str? divergence, float weight, int top_k"
)
_NEEDED_SCHEMA = ", ".join(f"bool need_{part}" for part in Measures._fields[:_PARTS])
_FIELDS = len(Measures._fields)


def rows(measures: Measures, backend: Backend) -> list[Tensor]:
    """Return the measures by their names, one value a row, differentiable."""
    outputs = _measures(*measures, any(measures.needed()), backend=backend.NAME)
    return list(outputs[: len(measures.names.split(","))])


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def _taken_apart(source: Source | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if source is None:
        return (None,) * 4, (1.0, None, torch.float32)
    rows = source.rows
    if isinstance(rows, HeadRows):
        return rows.tensors, (rows.scale, rows.softcap, source.dtype)
    assert isinstance(rows, DenseRows)
    return (*rows.tensors, None, None, None), (rows.scale, None, source.dtype)


def _put_together(parts: Sequence[Tensor | None], scale: float, softcap: float | None) -> LogitRows | None:
    logits, weight, bias, factor = parts
    if logits is None:
        return None
    if weight is None:
        return DenseRows(logits.shape[0], logits.shape[1], (logits,), scale)
    return HeadRows(logits.shape[0], weight.shape[0], (logits, weight, bias, factor), scale, softcap)


@torch.library.custom_op(
    "logitless::head_measures",
    mutates_args=(),
    schema=f"({_SCHEMA}, bool gradient, *, str? backend=None) -> ({', '.join(['Tensor'] * (_MOST + 1))})",
)
def _measures(*args: Any, backend: str | None = None) -> Outputs:
    """Return the measures, empty tensors up to their greatest number, and what the gradient needs."""
    measures = Measures._make(args[:_FIELDS])
    call, kept = measures.plan(measures.backend(backend), args[_FIELDS])
    outputs, states = row_values(call, call.tensors)
    rows = measures.p_logits.shape[0]
    values = placed(outputs, kept, torch.Size((rows,)))
    if measures.q_logits is not None:
        saved = torch.cat(states)
    else:
        stats = [torch.cat([getattr(state, name) for state in states]).double() for name in _TOKEN_SAVED]
        saved = torch.stack(stats)
        if kept is not None:
            saved = saved.new_zeros(len(stats), rows).index_copy_(1, kept, saved)
    return *values, *(saved.new_empty(0, dtype=torch.float32) for _ in range(_MOST - len(values))), saved


@_measures.register_fake
def _(*args: Any, backend: str | None = None) -> Outputs:
    measures = Measures._make(args[:_FIELDS])
    like, rows, names = measures.p_logits, measures.p_logits.shape[0], measures.names.split(",")
    values = [
        like.new_empty([rows, measures.top_k] if name in _TOP else [rows], dtype=_DTYPES.get(name, measures.compute))
        for name in names
    ]
    nothing = [like.new_empty([0], dtype=torch.float32) for _ in range(_MOST - len(names))]
    shape = (
        [len(_TOKEN_SAVED), rows] if measures.q_logits is None else [rows, fake_backend_of(backend, like).PAIR_SAVED]
    )
    return *values, *nothing, like.new_empty(shape, dtype=torch.float64)


@torch.library.custom_op(
    "logitless::head_measures_grad",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor saved, {', '.join(f'Tensor? grad_{at}' for at in range(_MOST))}, {_NEEDED_SCHEMA}, *, "
    f"str? backend=None) -> "
    f"({', '.join(['Tensor'] * _PARTS)})",
)
def _measures_grad(*args: Any, backend: str | None = None) -> Outputs:
    """Return the gradients of the needed parts, each tile made again."""
    measures, needed = Measures._make(args[:_FIELDS]), args[-_PARTS:]
    saved, *grads = args[_FIELDS:-_PARTS]
    call, kept = measures.plan(measures.backend(backend), gradient=True)
    rows, numbers = measures.p_logits.shape[0], measures.backend(backend).PAIR_SAVED
    check_shapes(
        measures.caller, [len(_TOKEN_SAVED), rows] if measures.q_logits is None else [rows, numbers], saved=saved
    )
    check_shapes(measures.caller, [rows], **{f"grad_{at}": grad for at, grad in enumerate(grads)})
    if kept is not None:
        saved, grads = saved[:, kept], [None if grad is None else grad[kept] for grad in grads]
    places = measures.places()
    made = row_gradients(
        call,
        call.tensors,
        [needed[at] for at in places],
        grads[: len(call.differentiable)],
        _states(call, measures, saved),
    )
    outputs = [measures.p_logits.new_empty(0, dtype=torch.float32) for _ in range(_PARTS)]
    for at, grad in zip(places, made, strict=True):
        if grad is not None:
            outputs[at] = grad
    if kept is not None and needed[0]:
        outputs[0] = torch.zeros_like(measures.p_logits).index_copy_(0, kept, outputs[0])
    return tuple(outputs)


def _states(call: HeadCall, measures: Measures, saved: Tensor) -> list[Any]:
    """Return what was saved as the passes over tiles have it."""
    if measures.q_logits is not None:
        return [saved[start:stop] for start, stop in call.ranges()]
    real = torch.float64 if call.dtype == torch.float64 else torch.float32
    nothing = RowStats._make((None,) * len(RowStats._fields))
    row_max, log_sum, entropy = saved.unbind()
    row_max, entropy = row_max.to(real), entropy.to(real)
    return [
        nothing._replace(row_max=row_max[start:stop], log_sum=log_sum[start:stop], entropy=entropy[start:stop])
        for start, stop in call.ranges()
    ]


@_measures_grad.register_fake
def _(*args: Any, backend: str | None = None) -> Outputs:
    measures, needed = Measures._make(args[:_FIELDS]), args[-_PARTS:]
    heads = (measures.p_weight is not None, measures.q_weight is not None)
    outputs = []
    for at, (part, need) in enumerate(zip(measures.parts, needed, strict=True)):
        if part is None or not need:
            outputs.append(measures.p_logits.new_empty([0], dtype=torch.float32))
        elif at % 4 == 0 and heads[at // 4]:
            outputs.append(torch.empty_like(part))
        else:
            outputs.append(part.new_empty(part.shape))
    return tuple(outputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
    measures, gradient = Measures._make(inputs[:_FIELDS]), inputs[_FIELDS]
    check_needed("head_measures", ctx.needs_input_grad, [gradient] * _PARTS)
    names = measures.names.split(",")
    still = [value for at, value in enumerate(output) if at >= len(names) or names[at] in _STILL]
    ctx.mark_non_differentiable(*still)
    ctx.set_materialize_grads(False)
    ctx.needed = list(ctx.needs_input_grad[:_PARTS])
    save_inputs(ctx, inputs, output[-1:])
    ctx.backend = keyword_only_inputs["backend"]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, saved = saved_inputs(ctx)
    measures, upstream = Measures._make(inputs[:_FIELDS]), grads[:_MOST]
    if all(grad is None for grad in upstream):
        return (None,) * len(inputs)
    if torch.is_grad_enabled():

        def definition(*parts: Tensor | None) -> Sequence[Tensor]:
            given = Measures._make((*parts, *measures[_PARTS:]))
            call, kept = given.plan(given.backend(ctx.backend))
            values = call.definition(*call.tensors)
            return placed(values, kept, measures.p_logits.shape[:1])

        count = len(measures.names.split(","))
        return plain_gradients(measures.parts, ctx.needed, definition, upstream[:count], len(inputs))
    made = _measures_grad(*measures, *saved, *upstream, *ctx.needed, backend=ctx.backend)
    needed = [grad if need else None for grad, need in zip(made, ctx.needed, strict=True)]
    return *needed, *(None,) * (len(inputs) - _PARTS)


_measures.register_autograd(_backward, setup_context=_setup)
for _operator in (_measures, _measures_grad):
    _operator.register_vmap(one_at_a_time(_operator))
