"""How far each measure is from the truth on this machine, beside the formula that one would write with torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpmath import mp
from torch import Tensor
from torch.distributions import Categorical

import logitless as ll
import logitless.functional as LF
from logitless._rules import dispatch
from logitless._verify import truth as _truth
from logitless._verify.truth import (
    MARGIN,
    NLL_WEIGHT,
    SMOOTHING,
    Exact,
    Sample,
    Truth,
    VectorSample,
    log_probs,
    soft_targets,
)


def _one(row: Tensor) -> Tensor:
    return row.unsqueeze(0)


def _index(sample: Sample) -> Tensor:
    return torch.tensor([sample.target])


def _torch_js(sample: Sample) -> Tensor:
    p, q = sample.p.softmax(0), sample.q.softmax(0)
    middle = ((p + q) / 2).log()
    kl = torch.nn.functional.kl_div
    return (kl(middle, p, reduction="none").sum() + kl(middle, q, reduction="none").sum()) / 2


def _torch_kl(first: Tensor, second: Tensor) -> Tensor:
    inputs, targets = second.log_softmax(0), first.log_softmax(0)
    return torch.nn.functional.kl_div(inputs, targets, reduction="none", log_target=True).sum()


def _torch_entropy(sample: Sample) -> Tensor:
    entropy: Tensor = Categorical(logits=sample.p, validate_args=False).entropy()
    return entropy


def _kl_div_call(function: Callable[..., Tensor]) -> Callable[[Sample], Tensor]:
    def call(sample: Sample) -> Tensor:
        inputs, targets = log_probs(sample.q), log_probs(sample.p)
        return function(inputs, targets, reduction="sum", log_target=True)

    return call


@dataclass(frozen=True)
class Measure:
    """A measure of rows: ours, the formula one would write with torch, and the truth.

    `per_row` marks the measures of rows: the reference computes them in float64 whatever the input, and they answer
    half precision in float32. The others compute in the input's dtype, half precision in float32. The functions are
    looked up when called, so that a test can break one.
    """

    name: str
    ours: Callable[[Any], Tensor]
    theirs: Callable[[Any], Tensor]
    truth: Callable[[Any], Truth | list[Truth]]
    per_row: bool


MEASURES = (
    Measure(
        "token_stats.nll",
        lambda s: ll.token_stats(_one(s.p), _index(s)).nll,
        lambda s: torch.nn.functional.cross_entropy(_one(s.p), _index(s)),
        _truth.true_nll,
        per_row=True,
    ),
    Measure(
        "token_stats.lse",
        lambda s: ll.token_stats(_one(s.p), _index(s)).lse,
        lambda s: torch.logsumexp(s.p, 0),
        _truth.true_lse,
        per_row=True,
    ),
    Measure("entropy", lambda s: ll.entropy(_one(s.p)), _torch_entropy, _truth.true_entropy, per_row=True),
    Measure("kl", lambda s: ll.kl(_one(s.p), _one(s.q)), lambda s: _torch_kl(s.p, s.q), _truth.true_kl, per_row=True),
    Measure(
        "pair_stats.reverse_kl",
        lambda s: ll.pair_stats(_one(s.p), _one(s.q)).reverse_kl,
        lambda s: _torch_kl(s.q, s.p),
        _truth.true_reverse_kl,
        per_row=True,
    ),
    Measure("js", lambda s: ll.js(_one(s.p), _one(s.q)), _torch_js, _truth.true_js, per_row=True),
    Measure(
        "pair_stats.cross_entropy",
        lambda s: ll.pair_stats(_one(s.p), _one(s.q)).cross_entropy,
        lambda s: torch.nn.functional.cross_entropy(_one(s.q), _one(s.p.softmax(0))),
        _truth.true_cross_entropy_of_rows,
        per_row=True,
    ),
    Measure(
        "cross_entropy, index",
        lambda s: LF.cross_entropy(_one(s.p), _index(s)),
        lambda s: torch.nn.functional.cross_entropy(_one(s.p), _index(s)),
        _truth.true_nll,
        per_row=False,
    ),
    Measure(
        "cross_entropy, probabilities",
        lambda s: LF.cross_entropy(_one(s.p), _one(soft_targets(s))),
        lambda s: torch.nn.functional.cross_entropy(_one(s.p), _one(soft_targets(s))),
        _truth.true_soft_cross_entropy,
        per_row=False,
    ),
    Measure(
        "cross_entropy, smoothing",
        lambda s: LF.cross_entropy(_one(s.p), _index(s), label_smoothing=SMOOTHING),
        lambda s: torch.nn.functional.cross_entropy(_one(s.p), _index(s), label_smoothing=SMOOTHING),
        _truth.true_smoothed_cross_entropy,
        per_row=False,
    ),
    Measure(
        "nll_loss, weighted sum",
        lambda s: LF.nll_loss(_one(log_probs(s.p)), _index(s), torch.full_like(s.p, NLL_WEIGHT), reduction="sum"),
        lambda s: torch.nn.functional.nll_loss(
            _one(log_probs(s.p)), _index(s), torch.full_like(s.p, NLL_WEIGHT), reduction="sum"
        ),
        _truth.true_nll_loss,
        per_row=False,
    ),
    Measure(
        "kl_div, log target",
        _kl_div_call(lambda *args, **kwargs: LF.kl_div(*args, **kwargs)),
        _kl_div_call(torch.nn.functional.kl_div),
        _truth.true_kl_div,
        per_row=False,
    ),
)


def _sign(sample: VectorSample) -> Tensor:
    return torch.tensor([sample.sign])


BINARY_MEASURES = (
    Measure(
        "binary_cross_entropy",
        lambda s: LF.binary_cross_entropy(s.probabilities, s.target, reduction="none"),
        lambda s: torch.nn.functional.binary_cross_entropy(s.probabilities, s.target, reduction="none"),
        _truth.true_bce,
        per_row=False,
    ),
    Measure(
        "binary_cross_entropy_with_logits",
        lambda s: LF.binary_cross_entropy_with_logits(s.logits, s.target, reduction="none"),
        lambda s: torch.nn.functional.binary_cross_entropy_with_logits(s.logits, s.target, reduction="none"),
        _truth.true_bce_with_logits,
        per_row=False,
    ),
)

VECTOR_MEASURES = (
    Measure(
        "cosine_similarity",
        lambda s: LF.cosine_similarity(_one(s.x), _one(s.y)),
        lambda s: torch.nn.functional.cosine_similarity(_one(s.x), _one(s.y)),
        _truth.true_cosine,
        per_row=False,
    ),
    Measure(
        "cosine_embedding_loss",
        lambda s: LF.cosine_embedding_loss(_one(s.x), _one(s.y), _sign(s), margin=MARGIN),
        lambda s: torch.nn.functional.cosine_embedding_loss(_one(s.x), _one(s.y), _sign(s), margin=MARGIN),
        _truth.true_cosine_embedding,
        per_row=False,
    ),
)

# What the compiled kernels are held to where a measure of rows answers in float32, on every row, however it is
# conditioned: they take the difference of two logits exactly, and add in pairs.
KERNEL_ULPS = 4.0

# Half precision cannot hold the widest rows; the losses compute it in float32 and round once.
_HALF_FAMILIES = ("flat, 1000", "dominant class, 1000", "spread 1e1,", "ties", "all equal", "one -inf mask")


@dataclass
class Accuracy:
    """The worst of a measure over all rows of a dtype, each answer in ulp of the dtype that it came in.

    `bound` is that of the row with the largest error; `used` is the largest share of its own bound that a row takes,
    and `family` names that row. `theirs` leaves out `theirs_lost` rows, on which torch's formula is NaN, or infinite
    where the truth is not.
    """

    measure: str
    dtype: str
    rows: int = 0
    ours: float = 0.0
    theirs: float = 0.0
    theirs_lost: int = 0
    bound: float = 0.0
    used: float = 0.0
    family: str = ""

    @property
    def passed(self) -> bool:
        """Say whether every row is within its own bound."""
        return self.rows > 0 and self.used <= 1

    def add(self, family: str, truth: Truth, ours: Answer, theirs: Answer, bound: float) -> None:
        """Count one value."""
        error, their_error = ulps(ours.value, truth.value, ours.dtype), ulps(theirs.value, truth.value, theirs.dtype)
        self.rows += 1
        if math.isfinite(their_error):
            self.theirs = max(self.theirs, their_error)
        else:
            self.theirs_lost += 1
        if error >= self.ours:
            self.ours, self.bound = error, bound
        if error / bound >= self.used:
            self.used, self.family = error / bound, family


@dataclass(frozen=True)
class Answer:
    """A number, and the dtype it was returned in."""

    value: float
    dtype: torch.dtype


def _answers(values: Tensor) -> list[Answer]:
    return [Answer(value, values.dtype) for value in values.detach().double().reshape(-1).tolist()]


def row_backend(dtype: torch.dtype) -> str:
    """Return the backend that the measures of rows take for this dtype."""
    return dispatch.pick("entropy", (torch.zeros(1, 2, dtype=dtype),)).NAME


def _bound(measure: Measure, dtype: torch.dtype, result: torch.dtype, backend: str, truth: Truth) -> float:
    """Return how far, in ulp of the result, an answer may be from the truth."""
    if measure.per_row and backend == "cpu" and result == torch.float32:
        return KERNEL_ULPS
    float64 = dtype == torch.float64 or (measure.per_row and backend == "reference")
    arithmetic = torch.float64 if float64 else torch.float32
    return 0.5 + truth.growth * torch.finfo(arithmetic).eps / torch.finfo(result).eps


def ulps(value: float, truth: Any, dtype: torch.dtype) -> float:
    """Return how far `value` is from `truth`, in spacings of the dtype's numbers at `truth`."""
    info = torch.finfo(dtype)
    if not mp.isfinite(truth) or abs(truth) > info.max:
        return 0.0 if value == (math.copysign(math.inf, truth)) else math.inf
    if not math.isfinite(value):
        return math.inf
    if not truth:
        return 0.0 if value == 0 else math.inf
    _, exponent = mp.frexp(truth)
    spacing = max(mp.ldexp(mp.mpf(info.eps), exponent - 1), mp.mpf(info.smallest_normal) * info.eps)
    return float(abs(mp.mpf(value) - truth) / spacing)


def accuracy_steps() -> Iterator[tuple[str, Callable[[], list[Accuracy]]]]:
    """Yield a label and the work for each dtype and kind of input."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        yield f"logit rows, {_name(dtype)}", partial(_rows_accuracy, dtype)
        yield f"binary targets, {_name(dtype)}", partial(_accuracy, _truth.binary_samples, BINARY_MEASURES, dtype)
        yield f"vectors, {_name(dtype)}", partial(_accuracy, _truth.vector_samples, VECTOR_MEASURES, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows_accuracy(dtype: torch.dtype) -> list[Accuracy]:
    half = dtype in (torch.bfloat16, torch.float16)
    chosen = [s for s in _truth.samples(dtype) if not half or s.family.startswith(_HALF_FAMILIES)]
    return _accuracy(lambda _: iter(chosen), MEASURES, dtype, prepare=Exact)


def _accuracy(
    make: Callable[[torch.dtype], Iterator[Any]],
    measures: tuple[Measure, ...],
    dtype: torch.dtype,
    *,
    prepare: Callable[[Any], Any] = lambda sample: sample,
) -> list[Accuracy]:
    found = [Accuracy(measure.name, _name(dtype)) for measure in measures]
    backend = row_backend(dtype)
    with mp.workprec(_truth.BITS):
        for sample in make(dtype):
            exact = prepare(sample)
            for measure, accuracy in zip(measures, found, strict=True):
                truth = measure.truth(exact)
                truths = [truth] if isinstance(truth, Truth) else truth
                ours, theirs = _answers(measure.ours(sample)), _answers(measure.theirs(sample))
                for one, a, b in zip(truths, ours, theirs, strict=True):
                    accuracy.add(sample.family, one, a, b, _bound(measure, dtype, a.dtype, backend, one))
    return found
