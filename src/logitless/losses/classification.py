"""Losses of a class target: cross-entropy, negative log-likelihood, and cross-entropy of a linear head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from logitless._autograd.elements import gather
from logitless._autograd.rows import CrossEntropyCall, Reduced, whole_cross_entropy
from logitless._autograd.rows import cross_entropy as dense_cross_entropy
from logitless._heads.loss_plan import HeadLoss
from logitless._rules import dispatch
from logitless._rules.precision import Precision, check_input, no_autocast, precision_of, under_autocast
from logitless._rules.reduction import (
    Empty,
    Normalizer,
    check_empty,
    check_normalizer,
    class_denominator,
    mean_denominator,
    reduce_rows,
    resolve_reduction,
    upstream_divisor,
)
from logitless._rules.targets import check_class_weight, check_weight_dtype, checked_values, class_target
from logitless.kernels import definitions
from logitless.kernels.interface import ClassTarget
from logitless.lazy import sparse
from logitless.lazy.logits import HeadLogits, LazyLogits, unheld_logits
from logitless.lazy.sparse import SparseLogits
from logitless.losses import head_classification

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions


def cross_entropy(
    input: Tensor | LazyLogits,
    target: Tensor | SparseLogits,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_dim: int | None = None,
    normalizer: Normalizer = None,
    empty: Empty = "nan",
    backend: str | None = None,
) -> Tensor:
    """Return the cross-entropy between logits and a target of class indices or class probabilities, in nats.

    Equals `torch.nn.functional.cross_entropy(input, target, weight, ...)`. With indices and no options a row's
    loss is `input.logsumexp(-1) - input[target]`; with probabilities it is `-(target * input.log_softmax(-1)).sum(-1)`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ..., dk), floating; or LazyLogits.
        target: indices, the input's shape without C, any integer dtype; or probabilities, the input's shape; or
            SparseLogits of the input's shape with its classes last, over whose buckets the cross-entropy then is.
        weight: one number a class, (C,); gradients flow to it.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        ignore_index: a row with this index has no loss and a gradient of exactly 0, and is never read. It removes
            rows; it does not remove the class from the softmax.
        reduction: "none", "mean" (the sum over what `normalizer` says) or "sum".
        label_smoothing: 0 to 1; that part of the target becomes uniform over all classes.
        class_dim: the classes' dimension where it is not torch's (0 of one row, else 1).
        normalizer: what "mean" divides by. None is torch's rule: the sum of the targets' weights for indices, the
            number of rows for probabilities. "weights" and "rows" name them; a number or 0-d tensor is taken as is.
        empty: the mean over no rows: "nan" as torch, or "zero" with a gradient of 0.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar, or with "none" the input's shape without C; in the input's dtype, rounded once (float32 under
        autocast). Half precision is computed in float32.

    Raises:
        IndexError: an index is not a class: names it, its position, the class count and ignore_index.
        ValueError, RuntimeError, TypeError: shapes, dtypes and options, as torch raises them.

    Source: `torch.nn.functional.cross_entropy`. In training it pulls up the target's logit and pushes down every
    other by its probability: `softmax(input) - onehot(target)`.

    >>> import torch, logitless.functional as F
    >>> F.cross_entropy(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
    tensor(0.2395)
    """
    if (
        normalizer is None
        and empty == "nan"
        and size_average is None
        and reduce is None
        and class_dim is None
        and backend is None
    ):
        loss = whole_cross_entropy(cross_entropy, input, target, weight, ignore_index, reduction, label_smoothing)
        if loss is not None:
            return loss
    reduction = resolve_reduction(reduction, size_average, reduce)
    check_normalizer(normalizer, reduction)
    check_empty(empty)
    if isinstance(target, SparseLogits):
        return _sparse_cross_entropy(input, target, weight, label_smoothing, reduction, normalizer, empty)
    _check_smoothing("cross_entropy", label_smoothing)
    check_input("cross_entropy", input, target)
    meaning = class_target("cross_entropy", input.shape, target, ignore_index=ignore_index, class_dim=class_dim)
    check_class_weight("cross_entropy", weight, meaning.classes)
    precision = _precision("cross_entropy", input, meaning, weight)
    if isinstance(input, HeadLogits):
        asked = HeadLoss(weight, label_smoothing, normalizer, None, backend)
        return head_classification.cross_entropy(
            "cross_entropy", input, meaning, asked, reduction, precision.result, empty
        )
    obstacle = _kernel_obstacle(input, meaning, weight, normalizer)

    def definition(logits: Tensor) -> Tensor:
        checked = checked_values("cross_entropy", meaning)
        with no_autocast(logits):
            rows = definitions.cross_entropy(logits.to(precision.compute), checked, weight, label_smoothing)
        return _reduced(rows, checked, reduction, precision, normalizer, empty)

    picked = dispatch.pick("cross_entropy", (input, target, weight), backend, obstacle=obstacle, compiles=True)
    if picked.PLAIN:
        return definition(input)

    def reduced(rows: definitions.ClassRows) -> Reduced:
        denominator = class_denominator(rows, meaning, normalizer) if reduction == "mean" else 1.0
        loss = reduce_rows(rows.loss, reduction, denominator=denominator, dtype=precision.result, empty=empty)
        return Reduced(loss, upstream_divisor(denominator, empty))

    call = CrossEntropyCall(picked, "cross_entropy", meaning, weight, label_smoothing, reduced, definition)
    return dense_cross_entropy(input, call)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    class_dim: int | None = None,
    normalizer: Normalizer = None,
    empty: Empty = "nan",
    backend: str | None = None,
) -> Tensor:
    """Return the negative log-likelihood of the target classes under log-probabilities, in nats.

    Equals `torch.nn.functional.nll_loss(input, target, weight, ...)`; a row's loss is `-weight[target] *
    input[target]`. `nll_loss(z.log_softmax(1), t)` is `cross_entropy(z, t)`.

    Args:
        input: log-probabilities (C,), (N, C) or (N, C, d1, ..., dk), floating, any strides.
        target: class indices, the input's shape without C, any integer dtype.
        weight, size_average, ignore_index, reduce, reduction, class_dim, normalizer, empty, backend: as in
            `cross_entropy`.

    Returns:
        A scalar, or with "none" the input's shape without C; in the input's dtype (float32 under autocast).

    Raises:
        IndexError: an index is not a class. ValueError, RuntimeError, TypeError: as torch raises them.

    Source: `torch.nn.functional.nll_loss`. In training it raises the log-probability of the right class alone;
    what holds the others down is the normalisation of its input.

    >>> import torch, logitless.functional as F
    >>> F.nll_loss(torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([0]))
    tensor(0.3567)
    """
    reduction = resolve_reduction(reduction, size_average, reduce)
    check_normalizer(normalizer, reduction)
    check_empty(empty)
    if isinstance(input, HeadLogits):
        raise TypeError("nll_loss takes log-probabilities, got LazyLogits: use cross_entropy, or .materialize()")
    check_input("nll_loss", input, target)
    meaning = class_target(
        "nll_loss",
        input.shape,
        target,
        ignore_index=ignore_index,
        class_dim=class_dim,
        probabilities_allowed=False,
    )
    check_class_weight("nll_loss", weight, meaning.classes)
    picked = dispatch.pick("nll_loss", (input, target, weight), backend)
    precision = _precision("nll_loss", input, meaning, weight)
    with no_autocast(input):
        meaning = checked_values("nll_loss", meaning, reads=picked.READS_VALUES)
        gathered = torch.gather if picked.PLAIN else partial(gather, picked)
        rows = definitions.nll(input, meaning, weight, precision.compute, gathered)
    return _reduced(rows, meaning, reduction, precision, normalizer, empty)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
    normalizer: Normalizer = None,
    empty: Empty = "nan",
    max_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the cross-entropy of a linear head's logits without ever holding the logits, in nats.

    Equals `cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`.

    Args:
        input: (features,) or (N, features), floating.
        linear_weight: (C, features), or (C, d1, ..., dk, features) for a k-dimensional loss.
        target: as `cross_entropy` takes it for logits of shape (N, C, d1, ..., dk).
        linear_bias: `linear_weight.shape[:-1]`, or None.
        weight, reduction, label_smoothing, normalizer, empty, backend: as in `cross_entropy`.
        ignore_index: an index to leave out; None is -100 for indices. Refused with probabilities, as in torch.
        options: accepted for torch's sake: its `acc_dtype` is what the matrix products are computed in; there is no
            unchunked path to choose, so the rest changes nothing.
        scale, softcap: as in `logitless.linear`.
        max_bytes: the most that may be held beyond inputs and gradients (a half-precision weight's gradient is summed
            in float32); None is a default of the order of a cache. `logitless.explain` forecasts the peak.

    Returns:
        A scalar, or with "none" (N, d1, ..., dk); in the input's dtype.

    Raises:
        RuntimeError: shapes that do not fit, as torch raises. IndexError: an index is not a class.

    Source: `torch.nn.functional.linear_cross_entropy`. In training it is cross-entropy; what goes is the memory.

    >>> import torch, logitless.functional as F
    >>> hidden, head = torch.ones(2, 3), torch.eye(4, 3)
    >>> F.linear_cross_entropy(hidden, head, torch.tensor([0, 3]))
    tensor(1.7143)
    """
    reduction = resolve_reduction(reduction, None, None)
    check_normalizer(normalizer, reduction)
    check_empty(empty)
    _check_smoothing("linear_cross_entropy", label_smoothing)
    _check_linear_shapes(input, linear_weight, linear_bias)
    sizes = torch.Size((*input.shape[:-1], *linear_weight.shape[:-1]))
    if target.shape == sizes and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    index = -100 if ignore_index is None else ignore_index
    meaning = class_target("linear_cross_entropy", sizes, target, ignore_index=index)
    check_class_weight("linear_cross_entropy", weight, meaning.classes)
    precision = _precision("linear_cross_entropy", input, meaning, weight)
    if options is not None and options.acc_dtype is not None:
        input, linear_weight = input.to(options.acc_dtype), linear_weight.to(options.acc_dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(options.acc_dtype)
    asked = HeadLoss(weight, label_smoothing, normalizer, max_bytes, backend)
    if linear_weight.dim() == 2:
        logits = unheld_logits(input, linear_weight, linear_bias, scale, softcap)
        return head_classification.cross_entropy(
            "linear_cross_entropy", logits, meaning, asked, reduction, precision.result, empty
        )
    meaning = checked_values("linear_cross_entropy", meaning)
    heads = _position_heads(linear_weight, linear_bias)
    parts = [
        head_classification.cross_entropy_rows(
            "linear_cross_entropy", unheld_logits(input, head, bias, scale, softcap), part, asked
        )
        for (head, bias), part in zip(heads, _position_targets(meaning, len(heads)), strict=True)
    ]
    shape = (input.shape[0], *linear_weight.shape[1:-1])
    rows = definitions.ClassRows(*(torch.stack(values, 1).view(shape) for values in zip(*parts, strict=True)))
    return _reduced(rows, meaning, reduction, precision, normalizer, empty)


def _sparse_cross_entropy(
    input: Tensor | LazyLogits,
    target: SparseLogits,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    normalizer: Normalizer,
    empty: Empty,
) -> Tensor:
    if weight is not None or label_smoothing != 0:
        raise ValueError("cross_entropy: weight and label_smoothing do not apply to a SparseLogits target")
    rows = sparse.cross_entropy(target, input)
    denominator = mean_denominator(normalizer, default="rows", weights=rows.numel, rows=rows.numel)
    return reduce_rows(rows, reduction, denominator=denominator, dtype=precision_of(input).result, empty=empty)


def _check_smoothing(name: str, label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")


def _check_linear_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if input.dim() not in (1, 2):
        raise RuntimeError(f"linear_cross_entropy: expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"linear_cross_entropy: expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "linear_cross_entropy: expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"linear_cross_entropy: expected linear_bias shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"linear_cross_entropy: K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )


def _position_heads(linear_weight: Tensor, linear_bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Return the (C, features) head and (C,) bias of each position of a k-dimensional loss."""
    heads = linear_weight.flatten(1, -2).unbind(1)
    if linear_bias is None:
        return [(head, None) for head in heads]
    return list(zip(heads, linear_bias.flatten(1).unbind(1), strict=True))


def _position_targets(meaning: ClassTarget, count: int) -> list[ClassTarget]:
    """Return the target of each position, each of one class dimension that comes last."""

    def cut(tensor: Tensor | None, leading: int) -> list[Tensor | None]:
        return [None] * count if tensor is None else list(tensor.flatten(leading).unbind(leading))

    return [
        replace(meaning, indices=indices, ignored=ignored, impossible=impossible, probabilities=probabilities)
        for indices, ignored, impossible, probabilities in zip(
            cut(meaning.indices, 1),
            cut(meaning.ignored, 1),
            cut(meaning.impossible, 1),
            cut(meaning.probabilities, 2),
            strict=True,
        )
    ]


def _precision(name: str, input: Tensor | LazyLogits, meaning: ClassTarget, weight: Tensor | None) -> Precision:
    """Return torch's promotion: a probability target and its weight take part, an index target's weight must agree."""
    if meaning.probabilities is not None:
        return precision_of(input, meaning.probabilities, weight)
    precision = precision_of(input)
    if not under_autocast(input.device):
        check_weight_dtype(name, weight, input.dtype)
    return precision


def _reduced(
    rows: definitions.ClassRows,
    meaning: ClassTarget,
    reduction: str,
    precision: Precision,
    normalizer: Normalizer,
    empty: Empty,
) -> Tensor:
    """Return the loss, divided as torch does (by target weights for indices, by rows for probabilities) or as asked."""
    denominator = class_denominator(rows, meaning, normalizer) if reduction == "mean" else 1.0
    return reduce_rows(rows.loss, reduction, denominator=denominator, dtype=precision.result, empty=empty)


def _kernel_obstacle(input: Tensor, meaning: ClassTarget, weight: Tensor | None, normalizer: Normalizer) -> str | None:
    """Return what about this call the compiled kernels do not do, if anything."""
    if input.numel() == 0:
        return "there is nothing to compute"
    if meaning.probabilities is not None and meaning.probabilities.dtype != input.dtype:
        return f"input and probabilities differ in dtype ({input.dtype}, {meaning.probabilities.dtype})"
    if torch.is_grad_enabled():
        for name, tensor in (("weight", weight), ("target", meaning.probabilities), ("normalizer", normalizer)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return f"{name} requires a gradient"
    return None
