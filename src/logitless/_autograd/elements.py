"""The elementwise and cosine kernels as differentiable operations: forward, backward, and what they do not do.

An operation keeps its inputs, and of a cosine three numbers a pair. A loss that is reduced is added up as it is
computed. In a compiled graph the operation is an operator of `_operators`. Where the gradient must itself be
differentiated, or upstream gradients come in a batch, the backward pass is the definition's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._operators import cosines as cosine_operators
from logitless._operators import elements as element_operators
from logitless._rules import dispatch
from logitless._rules.derivatives import applied_directly, needs_plain_backward, plain_backward
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.reduction import reduce_rows, reduced_sum
from logitless._rules.transforms import surroundings
from logitless._rules.unit_interval import check_within_unit_interval
from logitless.kernels.interface import ELEMENT_DTYPES, Backend, ElementLoss


def kernel_obstacle(numel: int, **constants: Tensor | None) -> str | None:
    """Return what about these operands no kernel does, if anything: none gives a gradient for `constants`."""
    if numel == 0:
        return "there is nothing to compute"
    for name, tensor in constants.items():
        if tensor is None:
            continue
        if tensor.dtype not in ELEMENT_DTYPES:
            return f"no kernel reads {name} in {tensor.dtype}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient"
    return None


class Reduction(NamedTuple):
    """What becomes of the elements or rows of a loss: `divisor` is what "mean" divides by."""

    kind: str
    divisor: Tensor | float  # a tensor where its value is not known, or reading it would wait
    dtype: torch.dtype

    def of(self, rows: Tensor) -> Tensor:
        """Return the loss of these elements or rows, or of their sum."""
        return reduce_rows(rows, self.kind, denominator=self.divisor, dtype=self.dtype)

    def of_total(self, total: Tensor | float) -> Tensor:
        """Return the loss of elements already added up."""
        if isinstance(total, Tensor):
            return self.of(total)
        divisor = self.divisor
        if isinstance(divisor, Tensor) or divisor == 0:
            return self.of(torch.scalar_tensor(total, dtype=torch.float64))
        value = reduced_sum(total, divisor, self.kind)
        if -6e4 < value < 6e4:
            return torch.scalar_tensor(value, dtype=self.dtype)
        # What the dtype does not hold is infinite, where scalar_tensor would raise.
        return torch.scalar_tensor(value, dtype=torch.float64).to(self.dtype)

    def upstream(self, backend: Backend, grad_output: Tensor) -> tuple[Tensor | None, Tensor | float]:
        """Return what the gradient of each element or row is multiplied by: values, or one number for all."""
        if self.kind == "none":
            return grad_output, 1.0
        given = backend.scalar(grad_output)
        if self.kind == "sum":
            return None, given
        divisor = self.divisor
        return None, given / divisor if isinstance(divisor, Tensor) or divisor else given * math.inf


class ElementwiseCall(NamedTuple):
    """What one call asks of its elements; `definition` is of the input and the operands."""

    backend: Backend
    loss: ElementLoss
    reduction: Reduction
    definition: Callable[..., Tensor]
    holds_tensors: bool = True  # whether there may be one in the reduction or the definition


def elementwise(call: ElementwiseCall, input: Tensor, target: Tensor, *weights: Tensor | None) -> Tensor:
    """Return a loss of each element by itself, reduced; only the input gets a gradient."""
    if torch.compiler.is_compiling():
        reduction = call.reduction
        dtype = reduction.dtype if reduction.kind == "none" else None
        made = element_operators.elementwise(call.loss, input, target, *weights, backend=call.backend, dtype=dtype)
        return reduction.of(made)
    result: Tensor = _apply_elementwise(call, input, target, *weights)
    return result


# Of more numbers the arithmetic costs more than the checks.
FEW_NUMBERS = 1 << 16


def backend_of_few_numbers(input: object, target: object) -> Backend | None:
    """Return who takes these without any further check: few numbers of one shape and dtype; None where they are not.

    Around so little arithmetic it is the checks that cost, so this is as brief as can be; what it denies is looked at
    in full.
    """
    if torch.compiler.is_compiling() or not isinstance(input, Tensor) or type(target) is not Tensor:
        return None
    if (
        (type(input) is Tensor or type(input) is torch.nn.Parameter)
        and input.shape == target.shape
        and 0 < input.numel() <= FEW_NUMBERS
        and (input.dtype is torch.float32 or input.dtype is torch.float64)
        and target.dtype is input.dtype
        and (input.is_cpu and target.is_cpu)
        and input.layout is target.layout is torch.strided
        and not (target.requires_grad or input.is_neg() or target.is_neg())
        and surroundings() is None
    ):
        return dispatch.whole_calls()
    return None


def of_few_numbers(
    backend: Backend,
    loss: ElementLoss,
    summed: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    denominator: int,
) -> Tensor:
    """Return the sum of an elementwise loss over `denominator`; `summed` is the public function, asked for the sum."""

    def definition(input: Tensor, target: Tensor) -> Tensor:
        return summed(input, target, reduction="sum", backend=dispatch.DEFINITION) / denominator

    call = ElementwiseCall(backend, loss, Reduction("mean", denominator, input.dtype), definition, holds_tensors=False)
    result: Tensor = _apply_elementwise(call, input, target)
    return result


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ElementwiseCall, input: Tensor, target: Tensor, *weights: Tensor | None) -> Tensor:
        operands = (input, target, *weights)
        ctx.operands = len(operands)
        ctx.call, others = taken_apart(call, operands) if call.holds_tensors else (call, list[Tensor]())
        ctx.save_for_backward(*operands, *others)
        if call.reduction.kind == "none":
            loss, outside = call.backend.elements(call.loss, input, target, *weights, dtype=call.reduction.dtype)
        else:
            total, outside = call.backend.elements_sum(call.loss, input, target, *weights)
            loss = call.reduction.of_total(total)
        if outside:
            check_within_unit_interval(input, target)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors
        input, *operands = everything[: ctx.operands]
        call: ElementwiseCall = put_together(ctx.call, everything) if ctx.call.holds_tensors else ctx.call
        if needs_plain_backward(grad_output):
            grad = plain_backward(lambda x: (call.definition(x, *operands),), [input], [True], [grad_output])[0]
        else:
            upstream, scale = call.reduction.upstream(call.backend, grad_output)
            grad = call.backend.elements_grad(call.loss, input, *operands, upstream=upstream, scale=scale)
        return None, grad, *(None,) * len(operands)


_apply_elementwise = applied_directly(_Elementwise)


class CosineCall(NamedTuple):
    """A cosine similarity along `dim`, or with a target the embedding loss along the last dimension.

    `sizes` is the shape that both vectors (and the target, without `dim`) broadcast to; `definition` is of both vectors
    and the target.
    """

    backend: Backend
    sizes: torch.Size
    dim: int
    eps: float
    margin: float
    reduction: Reduction
    definition: Callable[..., Tensor]


def cosine(call: CosineCall, x1: Tensor, x2: Tensor, target: Tensor | None = None) -> Tensor:
    """Return the similarity or loss of pairs of vectors of one dtype, reduced; both vectors get gradients."""
    if torch.compiler.is_compiling():
        summed = call.reduction.kind != "none"
        rows = cosine_operators.cosine(
            call.backend, x1, x2, target, dim=call.dim, eps=call.eps, margin=call.margin, summed=summed
        )
        return call.reduction.of(rows)
    result: Tensor = _Cosine.apply(call, x1, x2, target)  # type: ignore[no-untyped-call] # torch types it not
    return result


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: CosineCall, x1: Tensor, x2: Tensor, target: Tensor | None) -> Tensor:
        rows = cosine_operators.rows(
            call.backend,
            x1,
            x2,
            target,
            sizes=call.sizes,
            dim=call.dim,
            eps=call.eps,
            margin=call.margin,
            turned=cosine_operators.crossed(x1, x2, target, call.dim),
            save=any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(x1, x2, target, rows.saved)
        ctx.call = call
        return call.reduction.of(rows.out)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, target, saved = ctx.saved_tensors
        call: CosineCall = ctx.call
        wanted = ctx.needs_input_grad[1:3]
        if needs_plain_backward(grad_output):

            def definition(x1: Tensor, x2: Tensor) -> Sequence[Tensor]:
                return (call.definition(x1, x2) if target is None else call.definition(x1, x2, target),)

            return None, *plain_backward(definition, [x1, x2], wanted, [grad_output]), None
        upstream, scale = call.reduction.upstream(call.backend, grad_output)
        grads = cosine_operators.row_gradients(
            call.backend,
            x1,
            x2,
            target,
            saved,
            sizes=call.sizes,
            dim=call.dim,
            eps=call.eps,
            margin=call.margin,
            turned=cosine_operators.crossed(x1, x2, target, call.dim),
            upstream=upstream,
            scale=scale,
            wanted=wanted,
        )
        return None, *grads, None


# Of fewer bytes torch's own gather is the faster one.
_LARGE_BYTES = 1 << 20


def gather(backend: Backend, input: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return `input.gather(dim, index)`, where no two indices name one element, with a gradient written once."""
    if input.nbytes < _LARGE_BYTES:
        return input.gather(dim, index)
    result: Tensor = _Gather.apply(backend, input, dim, index)  # type: ignore[no-untyped-call] # torch types it not
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, input: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(input, index)
        ctx.backend, ctx.dim = backend, dim
        return input.gather(dim, index)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor | None, None, None]:
        input, index = ctx.saved_tensors
        if needs_plain_backward(grad_output):
            grad = plain_backward(lambda x: (x.gather(ctx.dim, index),), [input], [True], [grad_output])[0]
            return None, grad, None, None
        grad = ctx.backend.empty_like(input).zero_()
        if grad.itemsize == 2:  # torch scatters half precision through a float32 copy of the whole, integers in place
            grad.view(torch.int16).scatter_(ctx.dim, index, grad_output.view(torch.int16))
        else:
            grad.scatter_(ctx.dim, index, grad_output)
        return None, grad, None, None
