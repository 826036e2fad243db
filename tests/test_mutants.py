"""Deliberately broken variants of the package: the checks that the other tests use must reject every one of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import checks
import logitless._rules.reduction as reduce_module
import test_divergences
from logitless._heads import fold as tiles
from logitless._heads import rows as head_rows
from logitless.kernels import definitions as reference
from logitless.kernels.interface import Divergence
from logitless.losses import binary, classification, divergence, measures, similarity
from oracles import RejectedError

Patch = tuple[Any, str, Callable[..., Any]]


class Mutant(NamedTuple):
    """What is broken, and the checks of which at least the first must notice."""

    patches: Callable[[], list[Patch]]
    check: Callable[[], None]


def on(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    return lambda: checks.CHECKS[name](dtype)


def wrapped(module: Any, name: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """Replace `module.name` by `change(original, *args, **kwargs)`."""
    original = getattr(module, name)
    return lambda: [(module, name, lambda *args, **kwargs: change(original, *args, **kwargs))]


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def rows_changed(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A change of the per-row losses of `cross_entropy`."""
    return lambda original, *args: (rows := original(*args))._replace(loss=change(rows.loss))


def shifted_target(original: Any, logits: Tensor, target: Any, *rest: Any) -> Any:
    from dataclasses import replace

    return original(logits, replace(target, indices=(target.indices + 1) % target.classes), *rest)


def no_max_subtraction(original: Any, logits: Tensor, dim: int) -> Any:
    zero = torch.zeros_like(logits.amax(dim, keepdim=True))
    return reference.LogSumExp(zero, logits.exp().sum(dim, keepdim=True).log())


def wrong_above_512(original: Any, logits: Tensor, dim: int) -> Any:
    top, log_sum = original(logits, dim)
    if logits.shape[dim] <= 512:
        return reference.LogSumExp(top, log_sum)
    return original(logits.narrow(dim, 0, 512), dim)


def without_top(original: Any, logits: Tensor, dim: int) -> Any:
    """Adds exp(0) of the top class twice."""
    top, log_sum = original(logits, dim)
    return reference.LogSumExp(top, torch.log1p(log_sum.exp()))


def reduced(change: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """A change of what is handed to `reduce_rows`."""
    return lambda original, rows, reduction, **kwargs: original(
        rows, reduction, **(kwargs | change(rows, reduction, kwargs))
    )


def times(factor: float) -> Callable[..., Any]:
    return lambda original, *args, **kwargs: original(*args, **kwargs) * factor


def element(index: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A change of one output of a measure."""

    def changed(original: Any, *args: Any) -> Any:
        out = list(original(*args))
        out[index] = change(out[index])
        return tuple(out)

    return changed


def last_row_of_a_tile_dropped(original: Any, plan: Any, tensors: Any, grad_outputs: Any, *rest: Any) -> Any:
    start, stop = rest[-2:]
    kept = [None if g is None else g.clone() for g in grad_outputs]
    for grad in kept:
        if grad is not None and stop > start:
            grad[stop - 1] = 0
    return original(plan, tensors, kept, *rest)


def tile_rows_overlap(original: Any, plan: Any) -> Any:
    """The first row of the second tile is taken from the first: an off-by-one at the boundary."""
    for start, stop in original(plan):
        yield (start - 1, stop - 1) if start else (start, stop)


def activate_without_scale(original: Any, self: Any, raw: Tensor, tensors: Any) -> Tensor:
    return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def raw_without_bias(original: Any, self: Any, tensors: Any, start: int, stop: int) -> Tensor:
    return tensors[0][start:stop] @ tensors[1].T


def gradient_only_of_last_tile(original: Any, self: Any, grads: Any, grad_raw: Tensor, *rest: Any) -> None:
    for grad in grads[1:3]:
        if grad is not None:
            grad.zero_()
    original(self, grads, grad_raw, *rest)


def cosine_without_eps(original: Any, x1: Tensor, x2: Tensor, dim: int, eps: float) -> Tensor:
    return original(x1, x2, dim, 0.0)


def softmax_over_rows(original: Any, logits: Tensor, dim: int) -> Any:
    top, log_sum = original(logits, 0)
    return reference.LogSumExp(top.expand_as(logits).narrow(dim, 0, 1), log_sum.expand_as(logits).narrow(dim, 0, 1))


def smoothing_over_wrong_count(original: Any, logits: Tensor, target: Any, weight: Any, smoothing: float) -> Any:
    from dataclasses import replace

    return original(logits, replace(target, classes=target.classes - 1), weight, smoothing)


def ignored_rows_counted(original: Any, rows: Any, target: Any) -> Any:
    done = original(rows, target)
    return done._replace(weight=rows.weight)


def ignored_rows_kept(original: Any, rows: Any, target: Any) -> Any:
    return rows


def without_the_target(original: Any, log_probs: Tensor, target: Tensor, log_target: bool) -> Tensor:
    return original(log_probs, target, log_target) - (
        target.exp() * target if log_target else torch.special.xlogy(target, target)
    )


def js_without_half(original: Any, pair: Any) -> Tensor:
    return original(pair) * 2


def of_the_other_weight(original: Any, p: Tensor, q: Tensor, asked: Divergence) -> Tensor:
    return original(p, q, replace(asked, weight=1 - asked.weight))


def peers(name: str, dtype: torch.dtype) -> Callable[[], None]:
    """The check of a divergence against its peer's convention."""
    return lambda: test_divergences.test_peers_conventions(name, dtype, 65)


def writes_to_its_input(original: Any, logits: Tensor, *rest: Any) -> Any:
    out = original(logits, *rest)
    logits.data.add_(0.5)  # behind autograd's back, and the loss does not change by a shift
    return out


MUTANTS: dict[str, Mutant] = {
    # the row functions
    "sign flipped": Mutant(wrapped(reference, "cross_entropy", rows_changed(lambda loss: -loss)), on("cross_entropy")),
    "value x 1.01": Mutant(
        wrapped(reference, "cross_entropy", rows_changed(lambda loss: loss * 1.01)), on("cross_entropy")
    ),
    "gradient x 1.01": Mutant(
        wrapped(reference, "cross_entropy", rows_changed(lambda loss: Scaled.apply(loss, 1.01))), on("cross_entropy")
    ),
    "gradient x 1.01 in bfloat16": Mutant(
        wrapped(reference, "cross_entropy", rows_changed(lambda loss: Scaled.apply(loss, 1.02))),
        on("cross_entropy", torch.bfloat16),
    ),
    "gradient 0": Mutant(
        wrapped(reference, "cross_entropy", rows_changed(lambda loss: Scaled.apply(loss, 0.0))), on("cross_entropy")
    ),
    "gradient's sign flipped": Mutant(
        wrapped(reference, "cross_entropy", rows_changed(lambda loss: Scaled.apply(loss, -1.0))), on("cross_entropy")
    ),
    "target off by one": Mutant(wrapped(reference, "cross_entropy", shifted_target), on("cross_entropy")),
    "target off by one in nll_loss": Mutant(wrapped(reference, "nll", shifted_target), on("nll_loss")),
    "no maximum subtracted": Mutant(wrapped(reference, "log_sum_exp", no_max_subtraction), on("extremes")),
    "wrong above 512 classes": Mutant(
        wrapped(reference, "log_sum_exp", wrong_above_512),
        lambda: checks.BY_CLASSES["cross_entropy"](torch.float32, 1000),
    ),
    "top class counted twice": Mutant(wrapped(reference, "log_sum_exp", without_top), on("cross_entropy")),
    "softmax over the rows": Mutant(
        wrapped(reference, "log_sum_exp", softmax_over_rows), on("cross_entropy of images")
    ),
    "smoothing over one class fewer": Mutant(
        wrapped(reference, "cross_entropy", smoothing_over_wrong_count), on("cross_entropy")
    ),
    "ignored rows counted": Mutant(wrapped(reference, "_without_ignored", ignored_rows_counted), on("cross_entropy")),
    "ignored rows kept": Mutant(wrapped(reference, "_without_ignored", ignored_rows_kept), on("cross_entropy")),
    "class weight squared": Mutant(
        wrapped(reference, "_row_weight", lambda original, *args: original(*args) ** 2), on("cross_entropy")
    ),
    "nll clamped at 100": Mutant(
        wrapped(reference, "nll", lambda original, log_probs, *rest: original(log_probs.clamp(min=-100), *rest)),
        on("nll_loss"),
    ),
    "input written to": Mutant(wrapped(reference, "cross_entropy", writes_to_its_input), on("cross_entropy")),
    # reductions
    "mean over elements instead of weights": Mutant(
        wrapped(classification, "reduce_rows", reduced(lambda rows, reduction, kwargs: {"denominator": rows.numel()})),
        on("cross_entropy"),
    ),
    "denominator one too large": Mutant(
        wrapped(
            classification,
            "reduce_rows",
            reduced(lambda rows, reduction, kwargs: {"denominator": kwargs["denominator"] + 1}),
        ),
        on("nll_loss"),
    ),
    "mean over one element fewer": Mutant(
        wrapped(binary, "reduce_rows", reduced(lambda rows, reduction, kwargs: {"denominator": rows.numel() - 1})),
        on("binary_cross_entropy"),
    ),
    "sum is a mean": Mutant(
        lambda: [
            (
                m,
                "reduce_rows",
                lambda rows, reduction, **kw: reduce_module.reduce_rows(
                    rows, "mean" if reduction == "sum" else reduction, **kw
                ),
            )
            for m in (divergence, similarity)
        ],
        on("cosine_embedding_loss"),
    ),
    "batchmean divides by elements": Mutant(
        wrapped(divergence, "reduce_rows", reduced(lambda rows, reduction, kwargs: {"denominator": rows.numel()})),
        on("kl_div"),
    ),
    # divergences
    "kl_div without the target's entropy": Mutant(wrapped(reference, "kl_div", without_the_target), on("kl_div")),
    "KL's arguments swapped": Mutant(
        lambda: [
            (
                measures,
                "_divergence",
                lambda name, p, q, *rest, real=measures._divergence: real(name, q, p, *rest),
            )
        ],
        on("kl"),
    ),
    "KL to base 2": Mutant(wrapped(reference, "_divergence_terms", times(1 / math.log(2))), on("pair_stats")),
    "JS without the half": Mutant(wrapped(reference, "_jensen_shannon", js_without_half), on("js")),
    "JS of the other weight": Mutant(
        wrapped(reference, "divergence", of_the_other_weight), peers("liger_jsd 0.1", torch.float64)
    ),
    "skewed towards the student": Mutant(
        wrapped(reference, "divergence", of_the_other_weight), peers("skewed kl 0.9", torch.float64)
    ),
    "variation without the half": Mutant(
        wrapped(reference, "_total_variation", lambda original, pair: 2 * original(pair)), peers("tv", torch.float64)
    ),
    "variation of one sign": Mutant(
        wrapped(reference, "_total_variation", lambda original, pair: (pair.q - pair.p).clamp(min=0).sum(-1) * 1.5),
        peers("tv", torch.float64),
    ),
    "entropy's sign flipped": Mutant(wrapped(reference, "entropy", times(-1.0)), on("entropy")),
    "KL can be negative": Mutant(
        wrapped(reference, "_divergence_terms", lambda original, p, q, r: -p * r), on("identities")
    ),
    "lse is the maximum": Mutant(
        wrapped(reference, "token_stats", element(1, lambda lse: lse - 1e-4)), on("token_stats")
    ),
    "rank counts ties and the target": Mutant(
        wrapped(reference, "token_stats", element(4, lambda rank: rank + 1)), on("token_stats")
    ),
    # binary and cosine
    "pos_weight ignored": Mutant(
        wrapped(reference, "binary_cross_entropy_with_logits", lambda original, z, t, w: original(z, t, None)),
        on("binary_cross_entropy_with_logits"),
    ),
    "target and its complement exchanged": Mutant(
        wrapped(reference, "binary_cross_entropy", lambda original, p, t: original(p, 1 - t)),
        on("binary_cross_entropy"),
    ),
    "cosine without eps": Mutant(wrapped(reference, "cosine_similarity", cosine_without_eps), on("cosine_similarity")),
    "margin ignored": Mutant(
        wrapped(reference, "cosine_embedding_loss", lambda original, a, b, t, margin, dim: original(a, b, t, 0.0, dim)),
        on("cosine_embedding_loss"),
    ),
    # tiles and heads
    "last row of each tile has no gradient": Mutant(
        wrapped(tiles, "_add_tile", last_row_of_a_tile_dropped), on("lazy token_stats")
    ),
    "tile boundary off by one": Mutant(wrapped(tiles._Plan, "tiles", tile_rows_overlap), on("linear_cross_entropy")),
    "scale ignored by a head": Mutant(
        wrapped(head_rows.HeadRows, "activate", activate_without_scale), on("lazy entropy")
    ),
    "bias ignored by a head": Mutant(wrapped(head_rows.HeadRows, "raw", raw_without_bias), on("lazy kl")),
    "weight gradient of the last tile only": Mutant(
        wrapped(head_rows.HeadRows, "accumulate", gradient_only_of_last_tile), on("linear_cross_entropy")
    ),
}


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants break the reference, so it has to be what runs."""
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_rejects_the_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, check = MUTANTS[name]
    for owner, attribute, replacement in patches():
        monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(RejectedError):
        check()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_passes_what_is_not_broken(name: str) -> None:
    """Each check fails for the mutation alone."""
    MUTANTS[name].check()


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 15
