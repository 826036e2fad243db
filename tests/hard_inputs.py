"""Inputs on which losses break, for every function, and what torch gives for them in float64.

`draw(choose, name)` makes a `Case` of one choice after another, so that hypothesis can shrink it and a seeded
generator can draw a hundred thousand (`fuzz_losses.py`). `Case.check` calls the function as the case says and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import logitless as ll
import logitless.functional as LF

INF = math.inf
ROWS = (0, 1, 2, 3, 7)
CLASSES = (1, 2, 3, 7, 8, 17, 64, 65, 130)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "every second", "offset", "one stride")
CONTENTS = ("normal", "large", "constant", "negative zeros", "-inf blocks", "-inf single")
TEMPERATURES = (1.0, 0.5, 4.0)
DIVERGENCES = ("kl, skew", "js, beta", "tv", "lazy kl, skew", "lazy js, beta", "lazy tv")
WAYS = ("gradient", "gradient", "gradient", "no gradient", "batched", "graph", "make_fx")
# Of relative error: rounded once from sums in float32, or from float64 in float64.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


class Choose(Protocol):
    """Returns one of the options."""

    def __call__(self, options: Sequence[Any]) -> Any: ...


class WrongError(AssertionError):
    """A case whose result is not torch's in float64."""


@dataclass(frozen=True)
class Case:
    """A call on `tensors`, what gives the same in float64, and how the call is made."""

    name: str
    said: str  # all that was chosen
    tensors: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    way: str
    tolerance: float
    floor: float = 1e-2  # the size of the terms that a gradient is the sum of

    def check(self) -> None:
        """Raise `WrongError` if value or gradient are not right."""
        exact = [tensor.detach().double().requires_grad_() for tensor in self.tensors]
        expected = self.truth(*exact)
        if self.way == "no gradient":
            self.compare("value", self.ours(*self.tensors), expected)
            return
        if self.way == "make_fx":
            self.compare("value", make_fx(lambda *given: self.ours(*given))(*self.tensors)(*self.tensors), expected)
            return
        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        value = self.ours(*leaves)
        self.compare("value", value, expected)
        if not value.requires_grad or not bool(expected.isfinite().all()):
            return
        upstream = torch.randn(2, *expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        upstream = upstream.to(value.dtype)
        true = self.each_gradient(expected, exact, upstream.double(), create_graph=False)
        if self.way == "batched":
            found = torch.autograd.grad(value, leaves, upstream, is_grads_batched=True, allow_unused=True)
        else:
            found = self.each_gradient(value, leaves, upstream, create_graph=self.way == "graph")
        for at, (mine, known) in enumerate(zip(found, true, strict=True)):
            if known is not None and bool(known.isfinite().all()):
                self.compare(f"gradient {at}", torch.zeros(()) if mine is None else mine, known)

    @staticmethod
    def each_gradient(
        value: Tensor, leaves: Sequence[Tensor], upstream: Tensor, create_graph: bool
    ) -> list[Tensor | None]:
        """Return the gradients for one upstream gradient after another."""
        rows = [
            torch.autograd.grad(value, leaves, given, retain_graph=True, create_graph=create_graph, allow_unused=True)
            for given in upstream
        ]
        return [None if one[0] is None else torch.stack(one) for one in zip(*rows, strict=True)]  # type: ignore[arg-type] # all or none

    def compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Raise unless these agree to within the tolerance of the largest number, and in what is not finite."""
        mine, known = found.detach().double(), expected.detach()
        if mine.shape != known.shape:
            raise WrongError(f"{self}: {what} has shape {tuple(mine.shape)}, expected {tuple(known.shape)}")
        if not known.numel():
            return
        most = 6e4 if torch.float16 in {tensor.dtype for tensor in self.tensors} else 1e30
        # What the dtype cannot hold is infinite.
        beyond = known.isfinite() & (known.abs() > most) & mine.isinf() & (mine.sign() == known.sign())
        known = torch.where(beyond, mine, known)
        finite = known.isfinite()
        odd = ~finite & ~((mine == known) | (mine.isnan() & known.isnan()))
        # A gradient is a difference of terms as large as its upstream gradient, of which a rounding is left.
        scale = known[finite].abs().max().clamp(min=self.floor) if bool(finite.any()) else torch.zeros(())
        far = finite & ~((mine - known).abs() <= self.tolerance * scale)
        if bool((odd | far).any()):
            at = tuple((odd | far).nonzero()[0].tolist())
            raise WrongError(f"{self}: {what}{list(at)} is {mine[at].item()!r}, expected {known[at].item()!r}")

    def __str__(self) -> str:
        """Say what was chosen."""
        return f"{self.name} [{self.said}, {self.way}]"


class _Draw:
    """The choices of one case."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self.said: list[str] = []
        self.make = torch.Generator().manual_seed(self.one("seed", range(1000)))

    def one(self, name: str, options: Sequence[Any]) -> Any:
        picked = self._choose(options)
        self.said.append(f"{name}={picked}")
        return picked

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.make)

    def logits(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return numbers (..., classes) whose rows have a number above -inf."""
        content = self.one(f"{name} content", CONTENTS)
        values = self.normal(*shape)
        if content == "large":
            values = values * 30
        elif content == "constant":
            values = torch.full_like(values, 0.75)
        elif content == "negative zeros":
            values = torch.where(values > 0, -0.0, values.round())
        elif content == "-inf blocks" and shape[-1] > 1:
            block = max(1, shape[-1] // 2)
            first = self.one(f"{name} block", (0, shape[-1] - block))
            values[..., first : first + block] = -INF
        elif content == "-inf single" and shape[-1] > 1:
            values[..., self.one(f"{name} class", range(shape[-1]))] = -INF
        return self.laid(name, values.to(dtype))

    def laid(self, name: str, values: Tensor) -> Tensor:
        """Return the same numbers, otherwise in memory."""
        layout = self.one(f"{name} layout", LAYOUTS)
        if layout == "transposed" and values.dim() > 1:
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "every second":
            return torch.stack([values, values * 0], -1).select(-1, 0)
        if layout == "offset":
            return torch.cat([values.new_zeros(1), values.reshape(-1)])[1:].view(values.shape)
        if layout == "one stride" and values.numel() == 1:
            return torch.empty_strided(values.shape, (2,) * values.dim(), dtype=values.dtype).copy_(values)
        return values

    def indices(self, shape: Sequence[int], classes: int, ignored: bool = True) -> Tensor:
        if not classes:
            return torch.full(tuple(shape), -100)
        target = torch.randint(classes, tuple(shape), generator=self.make)
        if ignored and self.one("ignored", (False, True)):
            target = target.masked_fill(torch.rand(tuple(shape), generator=self.make) < 0.4, -100)
        return target

    def probabilities(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.rand(*shape, dtype=torch.float64, generator=self.make)
        drawn = drawn * (torch.rand(*shape, generator=self.make) < 0.6)
        return drawn / drawn.sum(-1, keepdim=True).clamp(min=1e-3)

    def case(
        self,
        name: str,
        tensors: Sequence[Tensor],
        ours: Any,
        truth: Any,
        factor: float = 1.0,
        way: Any = None,
        floor: float = 1e-2,
    ) -> Case:
        way = self.one("way", WAYS) if way is None else way
        tolerance = factor * max(TOLERANCE[tensor.dtype] for tensor in tensors)
        return Case(name, ", ".join(self.said), tuple(tensors), ours, truth, way, tolerance, floor)


# What torch gives, with 0 times infinity 0 where the 0 is a probability or a weight


def _product(coefficient: Tensor, value: Tensor) -> Tensor:
    return coefficient * value.masked_fill((coefficient == 0) & value.isinf(), 0)


def _reduced(rows: Tensor, reduction: str, count: Tensor | float) -> Tensor:
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / count


def _cross_entropy(z: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, reduction: str) -> Tensor:
    """Of logits whose classes come last."""
    surprise, classes = -z.log_softmax(-1), z.shape[-1]
    w = torch.ones(classes, dtype=z.dtype) if weight is None else weight.double()
    if target.is_floating_point():
        soft = target.double() * (1 - smoothing) + smoothing / max(classes, 1)
        rows = _product(soft * w, surprise).sum(-1)
        return _reduced(rows, reduction, rows.numel())
    kept = target != -100
    if not classes:
        return _reduced(z.sum(-1), reduction, torch.zeros((), dtype=z.dtype))
    at = target.masked_fill(~kept, 0)
    counted = w[at].masked_fill(~kept, 0)
    rows = _product(w[at], surprise.gather(-1, at.unsqueeze(-1)).squeeze(-1))
    if smoothing:
        rows = (1 - smoothing) * rows + smoothing / classes * _product(w, surprise).sum(-1)
    return _reduced(rows.masked_fill(~kept, 0), reduction, counted.sum())


def _entropy(z: Tensor) -> Tensor:
    return _product(z.softmax(-1), -z.log_softmax(-1)).sum(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    both = log_p.isneginf() & log_q.isneginf()
    ratio = log_p.masked_fill(both | log_p.isneginf(), 0) - log_q.masked_fill(both | log_p.isneginf(), 0)
    return _product(p.softmax(-1), ratio).sum(-1)


def _js(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    mixture = ((p.softmax(-1) + q.softmax(-1)) / 2).clamp(min=1e-300).log()

    def half(logs: Tensor) -> Tensor:
        gone = logs.isneginf()
        return (logs.masked_fill(gone, 0).exp().masked_fill(gone, 0) * (logs.masked_fill(gone, 0) - mixture)).sum(-1)

    return (half(log_p) + half(log_q)) / 2


# The functions


def _classification(d: _Draw, name: str) -> Case:
    dtype = d.one("dtype", DTYPES)
    rows, classes = d.one("rows", ROWS), d.one("classes", (0, *CLASSES) if name == "cross_entropy" else CLASSES)
    if dtype in (torch.bfloat16, torch.float16):
        classes = d.one("classes of half", (classes, 4099))
    inner = d.one("inner", (None, None, 0, 1, 3))
    shape = (rows, classes) if inner is None else (rows, inner, classes)
    z = d.logits("z", shape, dtype)
    soft = name == "cross_entropy" and classes > 0 and d.one("probabilities", (False, True))
    target = d.probabilities(shape).to(dtype) if soft else d.indices(shape[:-1], classes)
    weight = d.one("weight", (False, True))
    weights = torch.rand(classes, dtype=torch.float64, generator=d.make).to(dtype) if weight else None
    smoothing = d.one("smoothing", (0.0, 0.0, 0.1)) if name == "cross_entropy" else 0.0
    reduction = d.one("reduction", ("none", "mean", "sum"))
    options: dict[str, Any] = {"reduction": reduction, "weight": weights}
    if name == "cross_entropy":
        options["label_smoothing"] = smoothing

    def moved(x: Tensor) -> Tensor:
        return x if inner is None else x.movedim(-1, 1)

    def ours(z: Tensor) -> Tensor:
        given = moved(target) if soft else target
        return getattr(LF, name)(moved(z), given, **options)  # type: ignore[no-any-return] # of either loss

    def truth(z: Tensor) -> Tensor:
        if name == "cross_entropy":
            return _cross_entropy(z, target, weights, smoothing, reduction)
        kept = target != -100
        w = torch.ones(classes, dtype=z.dtype) if weights is None else weights.double()
        at = target.masked_fill(~kept, 0)
        found = _product(-w[at], z.gather(-1, at.unsqueeze(-1)).squeeze(-1)).masked_fill(~kept, 0)
        return _reduced(found, reduction, w[at].masked_fill(~kept, 0).sum())

    return d.case(name, [z], ours, truth)


def _elements(d: _Draw, name: str) -> Case:
    dtype = d.one("dtype", DTYPES)
    shape = (d.one("rows", ROWS), d.one("classes", (0, *CLASSES)))
    reduction = d.one("reduction", ("none", "mean", "sum"))
    chance = torch.rand(*shape, dtype=torch.float64, generator=d.make)
    weight = torch.rand(shape[1], dtype=torch.float64, generator=d.make).to(dtype)
    if name == "kl_div":
        log_target = d.one("log_target", (False, True))
        x = d.logits("x", shape, dtype)
        target = d.laid("target", (d.probabilities(shape).log() if log_target else d.probabilities(shape)).to(dtype))
        reduction = d.one("kind", ("none", "batchmean", "sum")) if shape[0] else "sum"

        def kl_truth(x: Tensor) -> Tensor:
            t = target.double().exp() if log_target else target.double()
            log_t = target.double() if log_target else target.double().log()
            gone = t == 0
            each = t * (log_t.masked_fill(gone, 0) - x.masked_fill(gone, 0))
            return _reduced(each, "mean" if reduction == "batchmean" else reduction, max(shape[0], 1))

        return d.case(name, [x], lambda x: LF.kl_div(x, target, reduction=reduction, log_target=log_target), kl_truth)
    labels = d.one("labels", (False, True))
    target = d.laid("target", chance.round().long() if labels else chance.to(dtype))
    given = d.one("weight", (False, True))
    options: dict[str, Any] = {"reduction": reduction, "weight": weight if given else None}
    exact = {"reduction": reduction, "weight": weight.double() if given else None}
    if name == "binary_cross_entropy":
        ends = d.one("ends", (False, True))
        p = torch.rand(*shape, dtype=torch.float64, generator=d.make).clamp(1e-3, 1 - 1e-3)
        p = d.laid("p", (torch.where(p < 0.3, -0.0, p.round()) if ends else p).to(dtype))
        return d.case(
            name,
            [p],
            lambda p: LF.binary_cross_entropy(p, target, **options),
            lambda p: F.binary_cross_entropy(p, target.double(), **exact),
            # Torch's own 1e-12, by which the gradient of an end is divided, is a float32.
            factor=1e3 if ends and dtype == torch.float64 else 1.0,
            way="no gradient" if ends and dtype in (torch.float16, torch.bfloat16) else None,
        )
    positive = d.one("pos_weight", (None, weight))
    content = d.one("content", (1.0, 30.0, 0.0))
    z = d.laid("z", (d.normal(*shape) * content).to(dtype))
    return d.case(
        name,
        [z],
        lambda z: LF.binary_cross_entropy_with_logits(z, target, pos_weight=positive, **options),
        lambda z: F.binary_cross_entropy_with_logits(
            z, target.double(), pos_weight=None if positive is None else positive.double(), **exact
        ),
    )


def _cosines(d: _Draw, name: str) -> Case:
    dtype = d.one("dtype", DTYPES)
    rows, width = d.one("rows", ROWS), d.one("width", (0, *CLASSES))
    x = d.laid("x", d.normal(rows, width).to(dtype))
    shared = d.one("shared", (False, True))
    tensors = [x] if shared else [x, d.laid("y", d.normal(rows, width).to(dtype))]
    signs = torch.where(torch.rand(rows, generator=d.make) > 0.5, 1, -1)
    reduction = d.one("reduction", ("none", "sum")) if name == "cosine_embedding_loss" else "none"
    # Of one number a vector the gradient is a rounding of what cancels.
    way = "no gradient" if width < 2 or rows < 2 else None

    def both(module: Any) -> Callable[..., Tensor]:
        def call(x: Tensor, y: Tensor | None = None) -> Tensor:
            other = x.flip(0) if y is None else y
            if name == "cosine_similarity":
                return module.cosine_similarity(x, other)  # type: ignore[no-any-return] # torch's or ours
            return module.cosine_embedding_loss(x, other, signs, margin=-0.5, reduction=reduction)  # type: ignore[no-any-return] # as above

        return call

    return d.case(name, tensors, both(LF), both(F), factor=2.0, way=way)


def _measures(d: _Draw, name: str) -> Case:
    dtype = d.one("dtype", DTYPES)
    shape = (d.one("rows", ROWS), d.one("classes", (0, *CLASSES)))
    z = d.logits("z", shape, dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "entropy":
        return d.case(name, [z.to(real)], ll.entropy, _entropy)
    if name == "token_stats":
        target = d.indices(shape[:1], shape[1])

        def nll_and_lse(z: Tensor) -> Tensor:
            stats = ll.token_stats(z, target)
            return stats.nll + 2 * stats.lse.masked_fill(target == -100, 0)

        def truth(z: Tensor) -> Tensor:
            nll = _cross_entropy(z, target, None, 0.0, "none")
            return nll + 2 * z.logsumexp(-1).masked_fill(target == -100, 0)

        return d.case(name, [z.to(real)], nll_and_lse, truth)
    if name == "log_probs":
        target = d.indices(shape[:1], shape[1])
        temperature = d.one("temperature", TEMPERATURES)
        return d.case(
            name,
            [z.to(real)],
            lambda z: ll.log_probs(z, target, temperature=temperature),
            lambda z: -_cross_entropy(z / temperature, target, None, 0.0, "none"),
            factor=3.0,
        )
    shared = d.one("shared", (False, True))
    # One mask for both, so that no divergence is infinite.
    other = (z * 0.5 + 0.25 * d.normal(*shape).to(dtype)).to(real)
    tensors = [z.to(real)] if shared else [z.to(real), d.laid("q", other)]

    if name in DIVERGENCES:
        ours, theirs = _divergence(d, name)
        return d.case(name, tensors, _of_turned(ours), _of_turned(theirs), factor=3.0, way=_way(d, name, "z", shared))

    def turned(x: Tensor) -> Tensor:
        return x * 0.25 - 0.5 if name != "js" else x.flip(0)

    def of(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda p, q=None: measure(p, turned(p) if q is None else q)

    known = {"kl": _kl, "js": _js, "pair_stats": lambda p, q: _kl(p, q) + 3 * _js(p, q) + _entropy(q)}[name]

    def all_of(p: Tensor, q: Tensor) -> Tensor:
        stats = ll.pair_stats(p, q)
        return stats.kl + 3 * stats.js + stats.entropy_q

    mine = {"kl": ll.kl, "js": ll.js, "pair_stats": all_of}[name]
    return d.case(name, tensors, of(mine), of(known), factor=3.0)


def _of_turned(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a measure of two, the second made of the first where it is not given; both exclude the same classes."""
    return lambda p, q=None: measure(p, p * 0.25 - 0.5 if q is None else q)


def _divergence(d: _Draw, name: str) -> tuple[Callable[[Any, Any], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Return a divergence and what it is by its definition."""
    temperature = d.one("temperature", TEMPERATURES)
    if name.endswith("tv"):

        def tv(p: Tensor, q: Tensor) -> Tensor:
            return ((p / temperature).softmax(-1) - (q / temperature).softmax(-1)).abs().sum(-1) / 2

        return lambda p, q: ll.tv(p, q, temperature=temperature), tv
    share = d.one("share", (0.5, 0.1, 0.9, 1e-3))
    js = name.endswith("js, beta")

    def known(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
        gone = log_p.isneginf() & log_q.isneginf()
        log_p, log_q = log_p.masked_fill(gone, 0), log_q.masked_fill(gone, 0)
        mixture = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
        of_p, of_q = ((x.exp() * (x - mixture)).masked_fill(gone, 0).sum(-1) for x in (log_p, log_q))
        return share * of_p + (1 - share) * of_q if js else of_p

    if js:
        return lambda p, q: ll.js(p, q, beta=share, temperature=temperature), known
    return lambda p, q: ll.kl(p, q, skew=share, temperature=temperature), known


def _way(d: _Draw, name: str, logits: str, one: bool) -> str | None:
    """Total variation has no derivative where both give a class the same: a rounding says which side it is on."""
    same = any(f"{logits} content={content}" in d.said for content in ("constant", "negative zeros"))
    return "no gradient" if one and same and name.endswith("tv") else None


# Losses of a batch of vectors


def _vectors(d: _Draw, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    content = d.one(f"{name} content", ("normal", "zero vectors", "negative zeros", "alike"))
    values = d.normal(rows, width)
    if content == "zero vectors":
        values = values * (torch.rand(rows, 1, generator=d.make) < 0.5)
    elif content == "negative zeros":
        values = torch.where(values > 0, -0.0, values)
    elif content == "alike":
        values = values[:1].expand(rows, width) * 2 if rows else values
    return d.laid(name, values.to(dtype))


def _unit(x: Tensor) -> Tensor:
    squares = x.square().sum(-1, keepdim=True)
    zero = squares == 0
    return (x / squares.masked_fill(zero, 1).sqrt()).masked_fill(zero, 0)


def _mean(rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the mean of rows, or of those that are kept: 0 of none."""
    return rows.sum() / len(rows) if kept is None else rows.sum() / kept.sum().clamp(min=1)


def _batches(d: _Draw, name: str) -> Case:
    dtype = d.one("dtype", DTYPES)
    rows, width = d.one("rows", (1, 2, 3, 7)), d.one("width", (0, 1, 2, 5, 33))
    x = _vectors(d, "x", rows, width, dtype)
    shared = d.one("shared", (False, True))
    tensors = [x] if shared else [x, _vectors(d, "y", rows, width, dtype)]
    labels = torch.randint(3, (rows,), generator=d.make)
    scale = d.one("scale", (1.0, 20.0))
    own = torch.eye(rows, dtype=torch.bool)

    def of(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda x, y=None: loss(x, x.flip(0) if y is None else y)

    ours: Callable[[Tensor, Tensor], Tensor]
    truth: Callable[[Tensor, Tensor], Tensor]
    if name == "pairwise_cosine":
        ours, truth = ll.pairwise_cosine, lambda x, y: _unit(x) @ _unit(y).T
    elif name == "info_nce":
        kind = d.one("positives", ("own", "labels", "indices"))
        index = torch.randint(-1, rows, (rows, 2), generator=d.make)
        there = {"own": own, "labels": labels.unsqueeze(1) == labels, "indices": own & ~own}[kind]
        if kind == "indices":
            there = (index.unsqueeze(-1) == torch.arange(rows)).any(1)
        given = {"own": None, "labels": (labels, labels), "indices": index}[kind]
        out = torch.rand(rows, rows, generator=d.make) < d.one("masked", (0.0, 0.5))
        count = there.sum(1)

        def ours(x: Tensor, y: Tensor) -> Tensor:
            return ll.info_nce(x, y, scale=scale, positives=given, mask=out)

        def truth(x: Tensor, y: Tensor) -> Tensor:
            z = scale * _unit(x) @ _unit(y).T
            log_z = z.masked_fill(out & ~there, -INF).masked_fill((count == 0).unsqueeze(1), 0).logsumexp(1)
            each = log_z - torch.where(there, z, 0).sum(1) / count.clamp(min=1)
            return _mean(torch.where(count > 0, each, 0), count > 0)
    elif name == "clip_loss":

        def ours(x: Tensor, y: Tensor) -> Tensor:
            return ll.clip_loss(x, y, scale)

        def truth(x: Tensor, y: Tensor) -> Tensor:
            z = scale * x @ y.T
            return (F.cross_entropy(z, torch.arange(rows)) + F.cross_entropy(z.T, torch.arange(rows))) / 2
    elif name == "siglip_loss":

        def ours(x: Tensor, y: Tensor) -> Tensor:
            return ll.siglip_loss(x, y, scale, -3.0)

        def truth(x: Tensor, y: Tensor) -> Tensor:
            return -F.logsigmoid((2 * own.double() - 1) * (scale * x @ y.T - 3)).sum() / rows
    elif name == "supcon_loss":
        every = labels.repeat(2)
        others = ~torch.eye(2 * rows, dtype=torch.bool)
        same = (every.unsqueeze(1) == every) & others

        def ours(x: Tensor, y: Tensor) -> Tensor:
            return ll.supcon_loss(torch.stack([x, y], 1), labels, temperature=1 / scale, normalize=True)

        def truth(x: Tensor, y: Tensor) -> Tensor:
            z = _unit(torch.cat([x, y]))
            z = scale * z @ z.T
            log_p = z - z.masked_fill(~others, -INF).logsumexp(1, keepdim=True)
            return _mean(-torch.where(same, log_p, 0).sum(1) / same.sum(1))
    elif name == "cosent_loss":
        below = labels.unsqueeze(1) < labels

        def ours(x: Tensor, y: Tensor) -> Tensor:
            # Cosines in the dtype that they are computed in, of vectors that are not short.
            return ll.cosent_loss(ll.pairwise_cosine(x, y).diagonal(), labels, scale=scale)

        def truth(x: Tensor, y: Tensor) -> Tensor:
            scores = scale * (_unit(x) * _unit(y)).sum(1)
            apart = (scores.unsqueeze(1) - scores).masked_fill(~below, -INF)
            return torch.cat([apart.reshape(-1), scores.new_zeros(1)]).logsumexp(0)
    else:
        margin = d.one("margin", (0.5, 50.0))
        every, own = labels.repeat(2), torch.eye(2 * rows, dtype=torch.bool)
        same = every.unsqueeze(1) == every

        def ours(x: Tensor, y: Tensor) -> Tensor:
            return ll.batch_triplet_loss(torch.cat([x, y]), every, kind="all", margin=margin)

        def truth(x: Tensor, y: Tensor) -> Tensor:
            v = torch.cat([x, y])  # their sum, in a half, would be rounded to where another vector lies
            squares = (v.unsqueeze(1) - v).square().sum(-1)
            apart = torch.where(squares > 0, squares.masked_fill(squares == 0, 1).sqrt(), 0)
            each = apart.unsqueeze(2) - apart.unsqueeze(1) + margin
            counted = (same & ~own).unsqueeze(2) & ~same.unsqueeze(1) & (each > 0)
            return torch.where(counted, each, 0).sum() / counted.sum().clamp(min=1)

    # Of one number a vector of length 1 has no gradient, but for a rounding of what cancels.
    way = "no gradient" if width < 2 and name not in ("clip_loss", "siglip_loss", "batch_triplet_loss") else None
    if shared and dtype in (torch.float16, torch.bfloat16):
        way = "no gradient"  # of two ways that are each rounded to a half
    factor = 8.0 if scale > 1 else 4.0
    lengths = torch.cat([tensor.double().norm(dim=1) for tensor in tensors])
    shortest = float(lengths[lengths > 0].min()) if bool((lengths > 0).any()) else 1.0
    floor = 1e-2 * (1 + scale) / min(1.0, shortest)  # what turns a vector of length 1 is divided by its length
    if name in ("clip_loss", "siglip_loss") and x.numel():
        # A probability is off by a rounding of its logit, and is multiplied by a scaled vector.
        largest = max(float(tensor.abs().max()) for tensor in tensors)
        floor = max(floor, 1e-3 * (scale * width * largest**2) * (scale * largest))
    return d.case(name, tensors, of(ours), of(truth), factor=factor, way=way, floor=floor)


def _heads(d: _Draw, name: str) -> Case:
    dtype = d.one("dtype", (torch.float32, torch.float64))
    rows, classes, width = d.one("rows", ROWS), d.one("classes", CLASSES), d.one("width", (0, 1, 2, 5, 33))
    hidden = d.laid("hidden", d.normal(rows, width).to(dtype))
    weight = d.laid("weight", d.normal(classes, width).to(dtype))
    bias = d.logits("bias", (classes,), dtype)
    max_bytes = d.one("max_bytes", (None, 1 << 12))
    target = d.indices((rows,), classes)
    soft = d.probabilities((rows, classes)).to(dtype)
    reduction = d.one("reduction", ("none", "mean", "sum"))
    tensors = [hidden, weight]

    def of(logits: Callable[..., Any], loss: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
        return lambda h, w: loss(logits(h, w))

    def exact(h: Tensor, w: Tensor) -> Tensor:
        return h @ w.T + bias.double()

    def lazy(h: Tensor, w: Tensor) -> Any:
        return ll.linear(h, w, bias)

    if name == "linear_cross_entropy":
        given = soft if d.one("probabilities", (False, True)) else target
        smoothing = d.one("smoothing", (0.0, 0.1))

        def ours(h: Tensor, w: Tensor) -> Tensor:
            options = {"reduction": reduction, "label_smoothing": smoothing, "max_bytes": max_bytes}
            return LF.linear_cross_entropy(h, w, given, linear_bias=bias, **options)  # type: ignore[arg-type] # of several kinds

        return d.case(
            name, tensors, ours, of(exact, lambda z: _cross_entropy(z, given, None, smoothing, reduction)), factor=4.0
        )
    if name == "lazy binary_cross_entropy_with_logits":
        return d.case(
            name,
            tensors,
            lambda h, w: LF.binary_cross_entropy_with_logits(ll.linear(h, w), soft, reduction=reduction),
            lambda h, w: F.binary_cross_entropy_with_logits(h @ w.T, soft.double(), reduction=reduction),
            factor=4.0,
        )
    if name in DIVERGENCES:
        mine, known = _divergence(d, name)
        return d.case(
            name,
            tensors,
            of(lazy, lambda z: mine(z, z.materialize() * 0.5)),
            of(exact, lambda z: known(z, z * 0.5)),
            factor=8.0,
            way=_way(d, name, "bias", width == 0),
        )
    losses: dict[str, tuple[Any, Any]] = {
        "lazy log_probs": (
            lambda z: ll.log_probs(z, target, temperature=2.0),
            lambda z: -_cross_entropy(z / 2, target, None, 0.0, "none"),
        ),
        "lazy top_k": (
            lambda z: ll.token_stats(z, target, top_k=1, temperature=0.5).nll,
            lambda z: _cross_entropy(z * 2, target, None, 0.0, "none"),
        ),
        "lazy entropy": (ll.entropy, _entropy),
        "lazy logsumexp": (lambda z: z.logsumexp(-1), lambda z: z.logsumexp(-1)),
        "lazy nll": (lambda z: ll.token_stats(z, target).nll, lambda z: _cross_entropy(z, target, None, 0.0, "none")),
        "lazy kl": (lambda z: ll.kl(z, z.materialize() * 0.5), lambda z: _kl(z, z * 0.5)),
    }
    mine, known = losses[name]
    return d.case(name, tensors, of(lazy, mine), of(exact, known), factor=4.0)


FUNCTIONS: dict[str, Callable[[_Draw, str], Case]] = {
    **dict.fromkeys(("cross_entropy", "nll_loss"), _classification),
    **dict.fromkeys(("kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits"), _elements),
    **dict.fromkeys(("cosine_similarity", "cosine_embedding_loss"), _cosines),
    **dict.fromkeys(("entropy", "token_stats", "kl", "js", "pair_stats", "log_probs", *DIVERGENCES[:3]), _measures),
    **dict.fromkeys(
        (
            "pairwise_cosine",
            "info_nce",
            "clip_loss",
            "siglip_loss",
            "supcon_loss",
            "cosent_loss",
            "batch_triplet_loss",
        ),
        _batches,
    ),
    **dict.fromkeys(
        (
            "linear_cross_entropy",
            "lazy binary_cross_entropy_with_logits",
            "lazy entropy",
            "lazy logsumexp",
            "lazy nll",
            "lazy kl",
            "lazy log_probs",
            "lazy top_k",
            *DIVERGENCES[3:],
        ),
        _heads,
    ),
}


def draw(choose: Choose, name: str) -> Case:
    """Return a case of this function."""
    return FUNCTIONS[name](_Draw(choose), name)
