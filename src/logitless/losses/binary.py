"""Losses of a target for each element by itself: binary cross-entropy, from probabilities and from logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logitless._autograd.elements import (
    ElementwiseCall,
    Reduction,
    backend_of_few_numbers,
    elementwise,
    kernel_obstacle,
    of_few_numbers,
)
from logitless._heads.fold import fold_rows
from logitless._heads.sweep import HeadCall, forecast
from logitless._rules import dispatch
from logitless._rules.precision import check_input, check_real, no_autocast, precision_of
from logitless._rules.reduction import (
    Normalizer,
    check_normalizer,
    count_of,
    mean_denominator,
    reduce_rows,
    resolve_reduction,
)
from logitless._rules.transforms import dense_of
from logitless._rules.unit_interval import check_within_unit_interval
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, ElementLoss, times_zero_safe
from logitless.lazy.logits import HeadLogits, LazyLogits
from logitless.losses import head_binary


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    class_dim: int | None = None,
    normalizer: Normalizer = None,
    backend: str | None = None,
) -> Tensor:
    """Return the binary cross-entropy between probabilities and targets, in nats.

    Equals `torch.nn.functional.binary_cross_entropy(input, target, weight, ...)`: elementwise
    `-weight * (target * input.log() + (1 - target) * (1 - input).log())`, each logarithm at least -100.

    Args:
        input: probabilities within [0, 1], any shape.
        target: the input's shape, within [0, 1]; floating, integer or bool.
        weight: broadcast against the target from the right, or along `class_dim`; gradients flow to it.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        reduction: "none", "mean" (over what `normalizer` says) or "sum".
        class_dim: the dimension a (C,) weight belongs to, where it is not the last.
        normalizer: what "mean" divides by: None is torch's number of elements; "weights" the sum of the weights,
            "rows" the first size; or a number.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar, or with "none" the input's shape; in the input's dtype (float32 under autocast).

    Raises:
        ValueError: the shapes differ. RuntimeError: a value outside [0, 1] or NaN, of a target of any dtype: names
            it and its position. TypeError: a complex dtype.

    Source: `torch.nn.functional.binary_cross_entropy`. In training the gradient is `(p - t) / (p (1 - p))`, which a
    sigmoid before it cancels; `binary_cross_entropy_with_logits` does that without losing it to rounding.

    >>> import torch, logitless.functional as F
    >>> F.binary_cross_entropy(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
    tensor(0.1643)
    """
    if (
        weight is None
        and size_average is None
        and reduce is None
        and class_dim is None
        and normalizer is None
        and backend is None
        and (reduction == "mean" or reduction == "sum")
        and (quick := backend_of_few_numbers(input, target)) is not None
    ):
        denominator = input.numel() if reduction == "mean" else 1
        return of_few_numbers(quick, "binary_cross_entropy", binary_cross_entropy, input, target, denominator)
    reduction = resolve_reduction(reduction, size_average, reduce)
    check_normalizer(normalizer, reduction)
    check_input("binary_cross_entropy", input, target)
    check_real("binary_cross_entropy", target=target, weight=weight)
    if target.shape != input.shape:
        raise ValueError(
            f"Using a target size ({target.shape}) that is different to the input size ({input.shape}) is "
            "deprecated. Please ensure they have the same size."
        )
    weight = _broadcastable("weight", weight, input.shape, class_dim)
    precision = precision_of(input)

    def definition(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        with no_autocast(input):
            loss = definitions.binary_cross_entropy(input.to(precision.compute), target.to(precision.compute))
            loss, weight = _weighted(loss, weight)
        return _reduced(loss, weight, reduction, precision.result, normalizer)

    picked = _pick("binary_cross_entropy", input, {"target": target, "weight": weight}, normalizer, backend)
    if picked.PLAIN:
        check_within_unit_interval(input, target)
        return definition(input, target, weight)
    kept = _kernel_reduction(picked, reduction, input.shape, weight, normalizer, precision.result)
    return elementwise(ElementwiseCall(picked, "binary_cross_entropy", kept, definition), input, target, weight)


def binary_cross_entropy_with_logits(
    input: Tensor | LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    class_dim: int | None = None,
    normalizer: Normalizer = None,
    backend: str | None = None,
) -> Tensor:
    """Return the binary cross-entropy between logits and targets, in nats.

    Equals `torch.nn.functional.binary_cross_entropy_with_logits(input, target, weight, pos_weight=pos_weight)`:
    elementwise `-weight * (pos_weight * target * logsigmoid(input) + (1 - target) * logsigmoid(-input))`.

    Args:
        input: logits, any shape; or LazyLogits (rows, classes), which "mean" and "sum" never build.
        target: the input's shape; floating, integer or bool. Not required to lie within [0, 1], as in torch. Also a
            sparse tensor (rows, classes), COO or CSR: the positives of each row as a list, for LazyLogits of many
            classes.
        weight, pos_weight: broadcast against the target from the right, or along `class_dim`; `pos_weight` above 1
            raises recall. Gradients flow to both.
        size_average, reduce, reduction, class_dim, normalizer, backend: as in `binary_cross_entropy`.

    Returns:
        A scalar, or with "none" the input's shape; in the promoted dtype (float32 under autocast). An infinite
        logit of the right label costs 0.

    Raises:
        ValueError: the shapes differ. RuntimeError: a weight does not broadcast. TypeError: a complex dtype.

    Source: `torch.nn.functional.binary_cross_entropy_with_logits`. In training the gradient is
    `sigmoid(input) - target`: each class is its own question, and confident right answers stop moving.

    >>> import torch, logitless.functional as F
    >>> F.binary_cross_entropy_with_logits(torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.0]))
    tensor(0.0878)
    """
    if (
        weight is None
        and pos_weight is None
        and size_average is None
        and reduce is None
        and class_dim is None
        and normalizer is None
        and backend is None
        and (reduction == "mean" or reduction == "sum")
        and (quick := backend_of_few_numbers(input, target)) is not None
    ):
        denominator = input.numel() if reduction == "mean" else 1
        name: ElementLoss = "binary_cross_entropy_with_logits"
        assert isinstance(input, Tensor)
        return of_few_numbers(quick, name, binary_cross_entropy_with_logits, input, target, denominator)
    reduction = resolve_reduction(reduction, size_average, reduce)
    check_normalizer(normalizer, reduction)
    check_input("binary_cross_entropy_with_logits", input, target)
    check_real("binary_cross_entropy_with_logits", target=target, weight=weight, pos_weight=pos_weight)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.shape}) must be the same as input size ({input.shape})")
    if target.layout != torch.strided:
        _check_sparse(target)
        target = target if isinstance(input, HeadLogits) and reduction != "none" else dense_of(target)
    weight = _broadcastable("weight", weight, input.shape, class_dim)
    pos_weight = _broadcastable("pos_weight", pos_weight, input.shape, class_dim)
    if isinstance(input, HeadLogits):
        if reduction != "none":
            return _lazy_binary_cross_entropy(input, target, weight, pos_weight, reduction, normalizer, backend)
        input = input.materialize()  # the answer asked for is itself of the logits' size
    precision = precision_of(input, target, weight, pos_weight)

    def definition(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
        compute = precision.compute
        with no_autocast(input):
            positive = None if pos_weight is None else pos_weight.to(compute)
            loss = definitions.binary_cross_entropy_with_logits(input.to(compute), target.to(compute), positive)
            loss, weight = _weighted(loss, weight)
        return _reduced(loss, weight, reduction, precision.result, normalizer)

    constants = {"target": target, "weight": weight, "pos_weight": pos_weight}
    picked = _pick("binary_cross_entropy_with_logits", input, constants, normalizer, backend)
    if picked.PLAIN:
        return definition(input, target, weight, pos_weight)
    kept = _kernel_reduction(picked, reduction, input.shape, weight, normalizer, precision.result)
    call = ElementwiseCall(picked, "binary_cross_entropy_with_logits", kept, definition)
    return elementwise(call, input, target, weight, pos_weight)


def _lazy_binary_cross_entropy(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    normalizer: Normalizer,
    backend: str | None,
) -> Tensor:
    """Return the reduced loss of logits made a tile at a time: each row is summed over its classes."""
    precision = precision_of(input, target, weight, pos_weight)
    rows = input.rows()
    constants = {"target": target, "weight": weight, "pos_weight": pos_weight}
    if isinstance(normalizer, Tensor):
        constants["normalizer"] = normalizer
    dense = target.layout == torch.strided
    tensors = [*rows.tensors, weight, pos_weight, target if dense else None]
    obstacle = kernel_obstacle(input.numel(), **constants)

    def plan(backend: Backend) -> HeadCall:
        return head_binary.binary_call(backend, input, target, weight, pos_weight, precision.compute)

    name = "binary_cross_entropy_with_logits"
    picked = dispatch.pick(name, tensors, backend, obstacle=obstacle, forecast=lambda taken: forecast(plan(taken)))
    if not picked.PLAIN:
        kept = _kernel_reduction(picked, reduction, input.shape, weight, normalizer, precision.result)
        return head_binary.binary_cross_entropy(plan(picked), kept)
    target = target if dense else dense_of(target)
    per_row: list[Tensor | None] = [target.reshape(-1, input.num_classes)]
    shared: list[Tensor | None] = []
    along: list[bool] = []
    for tensor in (weight, pos_weight):
        by_row = tensor is not None and tensor.shape[:-1].numel() > 1
        along.append(by_row)
        if tensor is not None and by_row:
            per_row.append(tensor.expand(input.shape).reshape(-1, input.num_classes))
        else:
            shared.append(None if tensor is None else tensor.reshape(-1))

    def function(tile: Tensor, tile_target: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        by_row, by_class = iter(rest[: sum(along)]), iter(rest[sum(along) :])
        tile_weight, positive = (next(by_row) if row else next(by_class) for row in along)
        compute = precision.compute
        positive = None if positive is None else positive.to(compute)
        loss = definitions.binary_cross_entropy_with_logits(tile.to(compute), tile_target.to(compute), positive)
        loss, element_weight = _weighted(loss, tile_weight)
        counted = torch.ones_like(loss) if element_weight is None else element_weight.expand_as(loss)
        return loss.sum(1), counted.sum(1)

    loss, counted = fold_rows(function, [rows], per_row, shared, itemsize=precision.compute.itemsize)
    denominator = _denominator(normalizer, input.shape, counted.sum)
    return reduce_rows(loss, reduction, denominator=denominator, dtype=precision.result)


def _check_sparse(target: Tensor) -> None:
    if target.dim() != 2 or target.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise ValueError(
            "binary_cross_entropy_with_logits: a sparse target is COO or CSR of shape (rows, classes), "
            f"got {target.layout} of shape {tuple(target.shape)}; flatten(0, -2) the logits"
        )


def _broadcastable(name: str, weight: Tensor | None, sizes: torch.Size, class_dim: int | None) -> Tensor | None:
    """Return the weight shaped to broadcast from the right, from a (C,) weight along `class_dim` if asked."""
    if weight is None:
        return None
    if class_dim is not None:
        if weight.dim() != 1 or weight.shape[0] != sizes[class_dim]:
            raise RuntimeError(
                f"{name}: class_dim={class_dim} expects shape ({sizes[class_dim]},), got {tuple(weight.shape)}"
            )
        axis = class_dim % len(sizes)
        return weight.view([-1 if dim == axis else 1 for dim in range(len(sizes))])
    padded = (1,) * (len(sizes) - weight.dim()) + tuple(weight.shape)
    if len(padded) != len(sizes) or any(have not in (1, want) for have, want in zip(padded, sizes, strict=True)):
        hint = ""
        if weight.dim() == 1 and len(sizes) > 2 and weight.shape[0] == sizes[1]:
            hint = (
                "; for one number a class pass class_dim=1, or "
                + f"{name}.view({', '.join(['-1'] + ['1'] * (len(sizes) - 2))})"
            )
        raise RuntimeError(f"{name} of shape {tuple(weight.shape)} does not broadcast to {tuple(sizes)}{hint}")
    return weight


def _pick(
    operation: str, input: Tensor, constants: dict[str, Tensor | None], normalizer: Normalizer, backend: str | None
) -> Backend:
    """Return the backend: kernels give a gradient for the input alone."""
    if isinstance(normalizer, Tensor):
        constants = {**constants, "normalizer": normalizer}
    obstacle = kernel_obstacle(input.numel(), **constants)
    return dispatch.pick(operation, (input, *constants.values()), backend, obstacle=obstacle, compiles=True)


def _kernel_reduction(
    backend: Backend,
    reduction: str,
    sizes: torch.Size,
    weight: Tensor | None,
    normalizer: Normalizer,
    dtype: torch.dtype,
) -> Reduction:
    """Return how the kernels' elements are reduced."""

    def weights() -> Tensor | float:
        return (
            count_of(sizes) if weight is None else weight.sum(dtype=torch.float64) * (count_of(sizes) // weight.numel())
        )

    denominator = _denominator(normalizer, sizes, weights) if reduction == "mean" else 1.0
    if isinstance(denominator, Tensor) and not torch.compiler.is_compiling():
        denominator = backend.scalar(denominator)
    return Reduction(reduction, denominator, dtype)


def _weighted(loss: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight is None:
        return loss, None
    weight = weight.to(loss.dtype)
    return times_zero_safe(weight, loss), weight


def _reduced(loss: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype, normalizer: Normalizer) -> Tensor:
    if reduction != "mean":
        return reduce_rows(loss, reduction, denominator=1.0, dtype=dtype)
    counted = loss.numel if weight is None else weight.expand_as(loss).sum
    return reduce_rows(loss, reduction, denominator=_denominator(normalizer, loss.shape, counted), dtype=dtype)


def _denominator(normalizer: Normalizer, sizes: torch.Size, weights: Callable[[], Tensor | float]) -> Tensor | float:
    """Return what the mean divides by: torch's number of elements where nothing else is asked for."""
    if normalizer is None:
        count: float = torch.sym_float(count_of(sizes))  # float() would make an open size a constant
        return count
    rows = torch.sym_float(sizes[0]) if sizes else 1.0
    return mean_denominator(normalizer, default="rows", weights=weights, rows=lambda: rows)
