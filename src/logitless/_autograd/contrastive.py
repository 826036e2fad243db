"""Contrastive losses as differentiable operations: the engine's two passes, and the definition that stands for both.

What is kept between the passes is the vectors and a few numbers an anchor. Where the gradient must itself be
differentiated, under transforms of `torch.func` and in forward mode, the loss is its definition, which builds the
similarity matrices. In a function that is compiled the engine is a break in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless._heads.sigmoid import softplus_gradients, softplus_sum
from logitless._heads.square import Contrast, Margin, Panel, Partitions, Rule, fold, gradients, row_losses
from logitless._heads.vectors import units
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.transforms import transform_reason


def contrast(call: Contrast, scale: Tensor | float, *vectors: Tensor) -> Tensor:
    """Return the loss of each anchor; the scale, where it is a tensor, and the vectors get gradients."""
    given = scale if isinstance(scale, Tensor) else None
    if transform_reason(given, *vectors) is not None:
        return definition(call, scale, vectors)
    number = 1.0 if isinstance(scale, Tensor) else scale
    losses: Tensor = _Contrast.apply(call, number, given, *vectors)  # type: ignore[no-untyped-call] # torch types it not
    return losses


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Contrast, number: float, scale: Tensor | None, *vectors: Tensor) -> Tensor:
        sums = fold(call, number if scale is None else scale, vectors)
        operands = (scale, *vectors, *sums)
        ctx.call, others = taken_apart(call, operands)
        ctx.number, ctx.vectors = number, len(vectors)
        ctx.save_for_backward(*operands, *others)
        return row_losses(call, sums)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors
        scale, *vectors = everything[: 1 + ctx.vectors]
        call: Contrast = put_together(ctx.call, everything)
        needs_scale, *needed = ctx.needs_input_grad[2:]
        if needs_plain_backward(grad_output):

            def losses(first: Tensor | None, *others: Tensor | None) -> Tensor:
                used = ctx.number if first is None else first
                return definition(call, used, [x for x in others if x is not None])

            return None, None, *_plain(losses, [scale, *vectors], ctx.needs_input_grad[2:], grad_output)
        sums = Partitions(*everything[1 + ctx.vectors : 4 + ctx.vectors])
        used = ctx.number if scale is None else scale
        to_scale, grads = gradients(call, used, vectors, sums, grad_output, needed, needs_scale=needs_scale)
        return None, None, _like(to_scale, scale), *grads


def _plain(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a definition for those inputs that need one, differentiable again."""
    return plain_backward(lambda *given: (function(*given),), inputs, needed, [grad_output])


def sigmoid_contrast(call: Contrast, scale: Tensor | float, bias: Tensor | float, *vectors: Tensor) -> Tensor:
    """Return the sum of a yes or no for every entry; scale and bias, where they are tensors, get gradients too."""
    numbers = [1.0 if isinstance(each, Tensor) else each for each in (scale, bias)]
    given = [each if isinstance(each, Tensor) else None for each in (scale, bias)]
    if transform_reason(*given, *vectors) is not None:
        return sigmoid_definition(call, scale, bias, vectors)
    total: Tensor = _Sigmoid.apply(call, numbers, *given, *vectors)  # type: ignore[no-untyped-call] # torch types it not
    return total


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Contrast, numbers: list[float], scale: Tensor | None, bias: Tensor | None, *vectors: Tensor
    ) -> Tensor:
        ctx.call, others = taken_apart(call, (scale, bias, *vectors))
        ctx.numbers, ctx.vectors = numbers, len(vectors)
        ctx.save_for_backward(scale, bias, *vectors, *others)
        return softplus_sum(call, *_given(numbers, scale, bias), vectors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors
        scale, bias, *vectors = everything[: 2 + ctx.vectors]
        call: Contrast = put_together(ctx.call, everything)
        needs_scale, needs_bias, *needed = ctx.needs_input_grad[2:]
        if needs_plain_backward(grad_output):
            inputs = [scale, bias, *vectors]

            def total(*given: Tensor | None) -> Tensor:
                first, second, *others = given
                numbers = _given(ctx.numbers, first, second)
                return sigmoid_definition(call, *numbers, [x for x in others if x is not None])

            return None, None, *_plain(total, inputs, ctx.needs_input_grad[2:], grad_output)
        found = softplus_gradients(
            call,
            *_given(ctx.numbers, scale, bias),
            vectors,
            grad_output,
            needed,
            needs_scale=needs_scale,
            needs_bias=needs_bias,
        )
        return None, None, _like(found.scale, scale), _like(found.bias, bias), *found.vectors


def _given(
    numbers: Sequence[float], scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | float, Tensor | float]:
    return numbers[0] if scale is None else scale, numbers[1] if bias is None else bias


def _like(gradient: Tensor | None, of: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(of.dtype).view(of.shape)


def sigmoid_definition(
    call: Contrast, scale: Tensor | float, bias: Tensor | float, vectors: Sequence[Tensor]
) -> Tensor:
    """Return the same as written: the similarity matrix is built."""
    first, second = (given.to(call.dtype) for given in vectors)
    numbers = [x.to(call.dtype) if isinstance(x, Tensor) else x for x in (scale, bias)]
    logits = (first * numbers[0]) @ second.T + numbers[1]
    labels = 2 * torch.eye(first.shape[0], dtype=call.dtype, device=first.device) - 1
    return -F.logsigmoid(labels * logits).sum()


def definition(call: Contrast, scale: Tensor | float, vectors: Sequence[Tensor]) -> Tensor:
    """Return the loss of each anchor as written, in plain torch: the similarity matrices are built."""
    sides = [
        units(given.to(call.dtype)) if normalize else given.to(call.dtype)
        for given, normalize in zip(vectors, call.normalize, strict=True)
    ]
    scale = scale.to(call.dtype) if isinstance(scale, Tensor) else scale
    parts: list[list[Tensor]] = [[] for _ in range(call.partitions)]
    positive = torch.zeros(call.anchors, dtype=call.dtype, device=vectors[0].device)
    for panel in call.panels:
        left, right = sides[panel.left][: panel.height] * scale, sides[panel.right]
        if panel.paired:
            logits = torch.einsum("nd,nkd->nk", left, right.view(left.shape[0], panel.paired, -1))
        else:
            logits = left @ right[: panel.width].T
        pairs = None
        if panel.positives is not None:
            pairs = panel.positives.matrix(panel.height, panel.width, logits.device)
            positive = positive + torch.where(pairs, logits, 0).sum(1)
        parts[panel.rows].append(_edited(call, panel, panel.row_rule, logits, scale, 1, pairs))
        if panel.columns is not None:
            rule = panel.row_rule if panel.column_rule is None else panel.column_rule
            columns = _edited(call, panel, rule, logits, scale, 0, pairs)[:, : call.anchors]
            parts[panel.columns].append(columns.T)
    # An anchor with nothing to sum over has a loss of zero, and no gradient through a sum over nothing.
    counted = call.positives > 0
    sums = [torch.cat(part, 1).masked_fill(~counted.unsqueeze(1), 0).logsumexp(1) for part in parts]
    return (sum(sums[1:], sums[0]) / call.partitions - positive / call.positives.clamp(min=1)).masked_fill(~counted, 0)


def _edited(
    call: Contrast,
    panel: Panel,
    rule: Rule,
    logits: Tensor,
    scale: Tensor | float,
    along: int,
    positives: Tensor | None,
) -> Tensor:
    """Return logits with what a rule leaves out at -inf, and with what it adds, a constant; `along` 1: of the rows."""
    if rule.changes_nothing:
        return logits
    value = scale.detach() if isinstance(scale, Tensor) else scale
    (rows, columns), device = logits.shape, logits.device
    added = torch.zeros_like(logits)
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    if rule.hardness is not None:
        hard = torch.ones_like(left_out)
        if rule.hardness.own is not None and rule.hardness.which != "all_negatives":
            own = rule.hardness.own.matrix(rows, columns, device)
            hard = own if rule.hardness.which == "hard_negatives" else ~own
        added = torch.where(hard, logits.detach() * (rule.hardness.strength / value), 0)
    if rule.margin is not None:
        left_out = left_out | _too_alike(call, panel, rule.margin, logits.detach(), value, along)
    if rule.mask is not None:
        left_out = left_out | rule.mask
    for pairs in rule.pairs:
        left_out = left_out | pairs.matrix(rows, columns, device)
    if positives is not None:
        added, left_out = added.masked_fill(positives, 0), left_out & ~positives
    return (logits + added.masked_fill(left_out, 0)).masked_fill(left_out, -torch.inf)


def _too_alike(
    call: Contrast, panel: Panel, margin: Margin, logits: Tensor, scale: Tensor | float, along: int
) -> Tensor:
    """Say which entries are above the threshold of their anchor; columns that are nobody's have none."""
    thresholds = margin.thresholds[: logits.shape[1 - along]]
    if not along and logits.shape[1] > panel.height:
        thresholds = F.pad(thresholds, (0, logits.shape[1] - panel.height), value=torch.inf)
    thresholds = thresholds.unsqueeze(along)
    if margin.guide is None:
        return logits > thresholds * scale
    first, second = (units(x.to(call.dtype)) for x in margin.guide)
    if panel.paired:
        return torch.einsum("nd,nkd->nk", first, second.view(first.shape[0], panel.paired, -1)) > thresholds
    return first[: panel.height] @ second[: panel.width].T > thresholds
