"""The checks that test_gradients.py holds the package to, and test_mutants.py holds broken variants of it to."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
import oracles
from oracles import RejectedError, assert_exactly_zero, assert_no_worse, examine

ROWS = 37


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_problem(dtype: torch.dtype, rows: int = ROWS, classes: int = 65, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Flat rows and confident ones, right and wrong, so that no part of a gradient is lost beside another."""
    draw = generator(seed)
    target = torch.randint(0, classes, (rows,), generator=draw)
    logits = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    logits[::3] *= 0.01
    logits[1::3, 0] += 12
    logits[torch.arange(2, rows, 3), target[2::3]] += 9
    return logits.to(dtype), target


def head_problem(dtype: torch.dtype, rows: int = ROWS, classes: int = 65, width: int = 8) -> tuple[Tensor, ...]:
    draw = generator(3)
    hidden = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    head = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    head[: min(classes, rows) // 2] = hidden[: min(classes, rows) // 2]  # confident rows (style of CCE's tests)
    bias = torch.randn(classes, generator=draw, dtype=torch.float64)
    target = torch.randint(0, classes, (rows,), generator=draw)
    return hidden.to(dtype), head.to(dtype), bias.to(dtype), target


# --- torch's losses


def cross_entropy(dtype: torch.dtype, classes: int = 65, scale: float = 1.0) -> None:
    logits, target = logits_problem(dtype, 7 if classes > 10_000 else ROWS, classes)
    if classes > 1:
        target[::5] = -100
    weight = torch.rand(classes, generator=generator(9), dtype=torch.float64).to(dtype) + 0.25
    combinations = [
        (reduction, smoothing, w)
        for reduction in ("none", "mean", "sum")
        for smoothing in (0.0, 0.1)
        for w in (None, weight)
    ]
    for reduction, smoothing, w in combinations if classes < 10_000 else combinations[:1] + combinations[7:8]:
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}

        def call(
            function: Callable[..., Tensor], z: Tensor, w: Tensor | None = w, options: dict[str, Any] = options
        ) -> Tensor:
            return function(z, target, weight=None if w is None else w.to(z.dtype), **options)

        what = f"cross_entropy {reduction} smoothing={smoothing} weight={w is not None}"
        examine(
            lambda z: call(LF.cross_entropy, z),
            lambda z: call(oracles.cross_entropy, z),
            [logits],
            scale=scale,
            what=what,
            floor=10.0
            if classes == 1
            else 0.0,  # the gradient of a single class is 1 - 0.9 - 0.1 times the upstream one
        )


def soft_cross_entropy(dtype: torch.dtype, classes: int = 65) -> None:
    logits, _ = logits_problem(dtype, 7 if classes > 10_000 else ROWS, classes)
    soft = logits_problem(torch.float64, logits.shape[0], classes, seed=4)[0].softmax(1).to(dtype)
    for reduction, smoothing in (("none", 0.0), ("mean", 0.1), ("sum", 0.0)):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        examine(
            lambda z, t, options=options: LF.cross_entropy(z, t, **options),
            lambda z, t, options=options: oracles.cross_entropy(z, t, **options),
            [logits, soft],
            what=f"cross_entropy of probabilities {reduction} {smoothing}",
        )


def images(dtype: torch.dtype) -> None:
    """(N, C, d1, d2): the classes are in dimension 1."""
    logits = torch.randn(3, 5, 4, 5, generator=generator(2), dtype=torch.float64).to(dtype) * 3
    target = torch.randint(0, 5, (3, 4, 5), generator=generator(3))
    target[0, 0] = -100
    for reduction in ("none", "mean"):
        examine(
            lambda z, r=reduction: LF.cross_entropy(z, target, reduction=r),
            lambda z, r=reduction: oracles.cross_entropy(z, target, reduction=r),
            [logits],
            what=f"cross_entropy of images {reduction}",
        )


def nll_loss(dtype: torch.dtype, classes: int = 65, scale: float = 1.0) -> None:
    logits, target = logits_problem(torch.float64, 7 if classes > 10_000 else ROWS, classes)
    if classes > 1:
        target[::5] = -100
    log_probs = (logits * 20).log_softmax(1).to(dtype)  # beyond -100 in places: nothing may clamp
    weight = torch.rand(classes, generator=generator(9), dtype=torch.float64).to(dtype) + 0.25
    for reduction in ("none", "mean", "sum"):
        for w in (None, weight):
            examine(
                lambda z, r=reduction, w=w: LF.nll_loss(z, target, None if w is None else w.to(z.dtype), reduction=r),
                lambda z, r=reduction, w=w: oracles.nll_loss(
                    z, target, None if w is None else w.to(z.dtype), reduction=r
                ),
                [log_probs],
                scale=scale,
                what=f"nll_loss {reduction} weight={w is not None}",
            )


def kl_div(dtype: torch.dtype, classes: int = 65) -> None:
    p, _ = logits_problem(torch.float64, 7 if classes > 10_000 else ROWS, classes, seed=4)
    q, _ = logits_problem(torch.float64, p.shape[0], classes, seed=5)
    for reduction in ("none", "batchmean", "sum"):
        for log_target in (False, True):
            target = p.log_softmax(1) if log_target else p.softmax(1)
            examine(
                lambda z, t, r=reduction, lt=log_target: LF.kl_div(z, t, reduction=r, log_target=lt),
                lambda z, t, r=reduction, lt=log_target: oracles.kl_div(z, t, r, lt),
                [q.log_softmax(1).to(dtype), target.to(dtype)],
                what=f"kl_div {reduction} log_target={log_target}",
            )


def binary_cross_entropy(dtype: torch.dtype, scale: float = 1.0) -> None:
    draw = generator(6)
    logits = torch.randn(19, 7, generator=draw, dtype=torch.float64) * 2
    target = torch.rand(19, 7, generator=draw, dtype=torch.float64).to(dtype)
    weight = (torch.rand(7, generator=draw, dtype=torch.float64) + 0.5).to(dtype)
    for reduction in ("none", "mean", "sum"):
        examine(
            lambda p, r=reduction: LF.binary_cross_entropy(p, target.to(p.dtype), weight.to(p.dtype), reduction=r),
            lambda p, r=reduction: oracles.binary_cross_entropy(p, target.to(p.dtype), weight.to(p.dtype), r),
            [logits.sigmoid().clamp(0.01, 0.99).to(dtype)],
            scale=scale,
            what=f"binary_cross_entropy {reduction}",
        )


def binary_cross_entropy_with_logits(dtype: torch.dtype, scale: float = 1.0) -> None:
    draw = generator(7)
    logits = (torch.randn(19, 7, generator=draw, dtype=torch.float64) * 20).to(dtype)
    target = torch.rand(19, 7, generator=draw, dtype=torch.float64).to(dtype)
    weight, positive = ((torch.rand(7, generator=draw, dtype=torch.float64) + 0.5).to(dtype) for _ in range(2))
    for reduction in ("none", "mean", "sum"):
        examine(
            lambda z, t, w, p, r=reduction: LF.binary_cross_entropy_with_logits(z, t, w, reduction=r, pos_weight=p),
            lambda z, t, w, p, r=reduction: oracles.binary_cross_entropy_with_logits(z, t, w, r, p),
            [logits, target, weight, positive],
            scale=scale,
            what=f"binary_cross_entropy_with_logits {reduction}",
        )


def cosine_similarity(dtype: torch.dtype, scale: float = 1.0) -> None:
    draw = generator(8)
    x, y = (torch.randn(11, 6, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    for dim in (1, -1):
        examine(
            lambda a, b, d=dim: LF.cosine_similarity(a, b, dim=d),
            lambda a, b, d=dim: oracles.cosine_similarity(a, b, d),
            [x, y],
            scale=scale,
            what=f"cosine_similarity dim={dim}",
        )
    if dtype in (torch.float32, torch.float64):
        small = x[:, :, 0] * 1e-9  # below eps, which then is the length
        examine(
            lambda a, b: LF.cosine_similarity(a, b),
            oracles.cosine_similarity,
            [small, y[:, :, 0]],
            what="cosine below eps",
        )


def cosine_embedding_loss(dtype: torch.dtype, scale: float = 1.0) -> None:
    draw = generator(8)
    x, y = (torch.randn(12, 6, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    target = torch.tensor([1, -1, -1] * 4)
    for reduction in ("none", "mean", "sum"):
        examine(
            lambda a, b, r=reduction: LF.cosine_embedding_loss(a, b, target, margin=-0.25, reduction=r),
            lambda a, b, r=reduction: oracles.cosine_embedding_loss(a, b, target, -0.25, r),
            [x, y],
            scale=scale,
            what=f"cosine_embedding_loss {reduction}",
        )


def linear_cross_entropy(dtype: torch.dtype, classes: int = 65, scale: float = 1.0) -> None:
    hidden, head, bias, target = head_problem(dtype, 7 if classes > 10_000 else ROWS, classes)
    if classes > 1:
        target[::5] = -100
    weight = torch.rand(classes, generator=generator(9), dtype=torch.float64).to(dtype) + 0.25
    cases: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "none", "label_smoothing": 0.1, "weight": weight},
        {"reduction": "sum", "scale": 0.5, "softcap": 5.0},
    ]
    for options in cases[:1] if classes > 10_000 else cases:
        tile = 1 << (24 if classes > 10_000 else 16)  # several rows a tile, several tiles

        def candidate(h: Tensor, w: Tensor, b: Tensor, options: dict[str, Any] = options, tile: int = tile) -> Tensor:
            return LF.linear_cross_entropy(h, w, target, linear_bias=b, max_bytes=tile, **options)

        def truth(h: Tensor, w: Tensor, b: Tensor, options: dict[str, Any] = options) -> Tensor:
            rest = {k: v.to(h.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
            logits = oracles.linear(h, w, b, rest.pop("scale", 1.0), rest.pop("softcap", None))
            return oracles.cross_entropy(logits, target, **rest)

        examine(candidate, truth, [hidden, head, bias], scale=scale, what=f"linear_cross_entropy {sorted(options)}")


# --- the measures


def measure(
    name: str,
    dtype: torch.dtype,
    classes: int = 65,
    *,
    lazy: bool = False,
    outputs: tuple[str, ...] = (),
    scale: float = 1.0,
) -> None:
    """token_stats, pair_stats, entropy, kl or js, dense or of heads; each output with its own upstream gradient."""
    rows = 7 if classes > 10_000 else ROWS
    wanted = outputs or {
        "token_stats": ("nll", "lse", "entropy", "argmax", "rank"),
        "pair_stats": (
            "kl",
            "reverse_kl",
            "js",
            "cross_entropy",
            "entropy_p",
            "entropy_q",
            "same_top",
            "nll_p",
            "nll_q",
        ),
    }.get(name, ())
    first, target = logits_problem(dtype, rows, classes, seed=4)
    second, _ = logits_problem(dtype, rows, classes, seed=5)
    hidden, head, bias, _ = head_problem(dtype, rows, classes)
    other_hidden, other_head = (
        torch.randn(rows, 5, generator=generator(1)).to(dtype),
        torch.randn(classes, 5, generator=generator(2)).to(dtype),
    )
    two = name in ("pair_stats", "kl", "js")
    tensors = [first] + ([second] if two else [])
    if lazy:
        tensors = [hidden, head, bias] + ([other_hidden, other_head] if two else [])

    def arguments(given: tuple[Tensor, ...], linear: Callable[..., Any]) -> list[Any]:
        if not lazy:
            return list(given)
        return [linear(*given[:3], scale=0.5)] + ([linear(*given[3:])] if two else [])

    if name == "token_stats" and classes > 1:
        target[::5] = -100

    def candidate(*given: Tensor) -> tuple[Tensor, ...]:
        logits = arguments(given, ll.linear)
        if name in ("entropy", "kl", "js"):
            return (getattr(ll, name)(*logits),)
        found = getattr(ll, name)(*logits, target)
        return tuple(getattr(found, n) for n in wanted)

    def truth(*given: Tensor) -> tuple[Tensor, ...]:
        logits = arguments(given, oracles.linear)
        if dtype in (torch.bfloat16, torch.float16) and given[0].dtype == dtype and not lazy:
            logits = [z.float() for z in logits]  # a half's measures come out in float32
        if name in ("entropy", "kl", "js"):
            return (getattr(oracles, name)(*logits),)
        found = getattr(oracles, name)(*logits, target)
        return tuple(found[n] for n in wanted)

    if lazy and dtype in (torch.bfloat16, torch.float16):
        raise ValueError("a half's matrix product has its own rounding: see half_precision_head")
    # A divergence's gradient cancels over a row, and the head's product adds it up over all classes: terms of log q / p
    # times a weight, each above 10, that a product rounds as it pleases.
    floor = 4.0 if lazy and two and classes > 10_000 else 0.0
    examine(candidate, truth, tensors, scale=scale, what=f"{name}{' lazy' if lazy else ''} {wanted}", floor=floor)


def lazy(name: str) -> Callable[..., None]:
    def check(dtype: torch.dtype, classes: int = 65) -> None:
        if dtype in (torch.bfloat16, torch.float16):
            half_precision_head(name, dtype)
        else:
            measure(name, dtype, classes, lazy=True)

    return check


def half_precision_head(name: str, dtype: torch.dtype) -> None:
    """A head in half precision: within a few units of the dtype of the truth, value and every gradient."""
    hidden, head, bias, target = head_problem(dtype)
    own, exact = oracles.leaves((hidden, head, bias)), oracles.leaves((hidden, head, bias), torch.float64)

    def total(module: Any, logits: Any) -> Tensor:
        zeros = torch.zeros(tuple(logits.shape), dtype=torch.float64 if module is oracles else dtype)
        if name == "token_stats":
            found = module.token_stats(logits, target)
        elif name == "pair_stats":
            found = module.pair_stats(logits, zeros, target)
        else:
            return getattr(module, name)(*((logits,) if name == "entropy" else (logits, zeros))).sum()
        keys = ("nll", "entropy") if name == "token_stats" else ("kl", "js", "nll_p")
        return sum(((found[k] if isinstance(found, dict) else getattr(found, k)).sum() for k in keys), torch.zeros(()))

    got, true = total(ll, ll.linear(*own)), total(oracles, oracles.linear(*exact))
    limit = 4 * torch.finfo(dtype).eps
    pairs = [(got, true), *zip(torch.autograd.grad(got, own), torch.autograd.grad(true, exact), strict=True)]
    for i, (mine, expected) in enumerate(pairs):
        error = float((mine.detach().double() - expected.detach()).norm() / expected.detach().norm())
        if not error <= limit:
            raise RejectedError(f"lazy {name} in {dtype}: result {i} is off by {error:.2e}, allowed {limit:.2e}")


def dense(name: str) -> Callable[..., None]:
    def check(dtype: torch.dtype, classes: int = 65) -> None:
        measure(name, dtype, classes)

    return check


def scaled(name: str, is_lazy: bool) -> Callable[..., None]:
    return lambda dtype, scale: measure(name, dtype, lazy=is_lazy, scale=scale)


# --- edges


def ignored_rows(dtype: torch.dtype, poison: float = math.nan, smoothing: float = 0.0, reduction: str = "mean") -> None:
    logits, target = logits_problem(dtype, 9, 5)
    target[3], target[7] = -100, -100
    clean = logits.clone()
    logits[3], logits[7, 2] = poison, poison
    own = logits.requires_grad_()
    out = LF.cross_entropy(own, target, label_smoothing=smoothing, reduction=reduction)
    kept = target != -100
    naive = oracles.cross_entropy(clean, target, label_smoothing=smoothing, reduction=reduction)
    true = oracles.cross_entropy(clean.double(), target, label_smoothing=smoothing, reduction=reduction)
    assert_no_worse(out, true, naive, "value beside ignored rows")
    (grad,) = torch.autograd.grad(out.sum() * 3, own)
    assert_exactly_zero(grad[~kept], "an ignored row's gradient")
    if not bool(grad.isfinite().all()) or not bool((grad[kept] != 0).any()):
        raise RejectedError("the rows that count have no finite gradient")


def extremes(dtype: torch.dtype) -> None:
    """Logits far beyond where exp overflows; every class of a large row counts."""
    big = 6e4 if dtype == torch.float16 else 1e30
    logits = torch.tensor([[big, 0.0, -big], [-big, -big, -big + 1]], dtype=torch.float64).to(dtype)
    target = torch.tensor([0, 1])
    for got, true in (
        (
            LF.cross_entropy(logits, target, reduction="none"),
            oracles.cross_entropy(logits.double(), target, reduction="none"),
        ),
        (ll.token_stats(logits, target).nll, oracles.token_stats(logits.double(), target)["nll"]),
        (ll.entropy(logits), oracles.entropy(logits.double())),
    ):
        assert_no_worse(got, true, what="extreme logits")


def identities(dtype: torch.dtype) -> None:
    """A divergence of a row from itself is 0 and none is negative; entropy lies in [0, log C]; JS in [0, log 2]."""
    p, _ = logits_problem(dtype, seed=4)
    q, _ = logits_problem(dtype, seed=5)
    stats = ll.pair_stats(p, q)
    for name in ("kl", "reverse_kl", "js", "entropy_p"):
        if bool((getattr(stats, name) < 0).any()):
            raise RejectedError(f"{name} is negative")
    for values, most in (
        (stats.js, math.log(2)),
        (stats.entropy_p, math.log(p.shape[1])),
        (stats.entropy_q, math.log(p.shape[1])),
    ):
        if bool((values > most * (1 + 1e-6)).any()):
            raise RejectedError(f"above {most}")
    for zero in (ll.kl(p, p), ll.js(p, p)):
        assert_exactly_zero(zero, "a row's divergence from itself")
    near, _ = logits_problem(torch.float64, seed=4)
    other = near + 1e-9 * torch.randn(near.shape, generator=generator(6), dtype=torch.float64)
    p_near, delta = near.softmax(1), other - near
    half_variance = (p_near * (delta - (p_near * delta).sum(1, keepdim=True)).square()).sum(1) / 2
    for found, expected in ((ll.kl(near, other), half_variance), (ll.js(near, other), half_variance / 4)):
        if not torch.allclose(found, expected, rtol=1e-5, atol=0):
            raise RejectedError(f"divergences of 1e-19: {found[:3].tolist()}, expected {expected[:3].tolist()}")
    if not torch.allclose(stats.cross_entropy.double(), stats.entropy_p.double() + stats.kl.double(), rtol=1e-6):
        raise RejectedError("CE is not H + KL")


CHECKS: dict[str, Callable[..., None]] = {
    "cross_entropy": cross_entropy,
    "cross_entropy of probabilities": soft_cross_entropy,
    "cross_entropy of images": images,
    "nll_loss": nll_loss,
    "kl_div": kl_div,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "cosine_similarity": cosine_similarity,
    "cosine_embedding_loss": cosine_embedding_loss,
    "linear_cross_entropy": lambda dtype: (
        linear_cross_entropy(dtype) if dtype in (torch.float64, torch.float32) else ignored_rows(dtype)
    ),
    **{name: dense(name) for name in ("token_stats", "pair_stats", "entropy", "kl", "js")},
    **{f"lazy {name}": lazy(name) for name in ("token_stats", "pair_stats", "entropy", "kl", "js")},
    "extremes": extremes,
    "identities": identities,
}
BY_CLASSES: dict[str, Callable[..., None]] = {
    "cross_entropy": cross_entropy,
    "cross_entropy of probabilities": soft_cross_entropy,
    "nll_loss": nll_loss,
    "kl_div": kl_div,
    "linear_cross_entropy": linear_cross_entropy,
    **{name: dense(name) for name in ("token_stats", "pair_stats")},
    **{f"lazy {name}": lazy(name) for name in ("token_stats", "kl")},
}
BY_SCALE: dict[str, Callable[..., None]] = {
    **{
        f.__name__: lambda dtype, scale, f=f: f(dtype, scale=scale)
        for f in (
            cross_entropy,
            nll_loss,
            binary_cross_entropy,
            cosine_similarity,
            cosine_embedding_loss,
            linear_cross_entropy,
        )
    },
    "token_stats": scaled("token_stats", False),
    "lazy token_stats": scaled("token_stats", True),
    "pair_stats": scaled("pair_stats", False),
    "lazy js": scaled("js", True),
}
