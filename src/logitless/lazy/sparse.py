"""A distribution of which only the likeliest classes are kept: a teacher that fits on a disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from logitless._heads import picks
from logitless._heads.fold import fold_rows
from logitless._heads.rows import LogitRows, dense_rows
from logitless._rules import dispatch
from logitless._rules.precision import check_input
from logitless._rules.transforms import values_are_readable
from logitless.kernels import definitions
from logitless.kernels.interface import times_zero_safe
from logitless.lazy.logits import HeadLogits, LazyLogits
from logitless.lazy.tensor import as_tensor

Tail = Literal["lump", "renormalize"]


@dataclass(frozen=True, eq=False)
class SparseLogits:
    """A distribution over `num_classes` classes by the log-probabilities of k of them.

    Equals, with tail="lump", the distribution over k + 1 buckets: the kept classes, and all others as one, of mass
    `1 - log_probs.exp().sum(-1)`. A divergence between lumped distributions is a lower bound of the full one, and
    equals it where the student spreads its own tail as the teacher does. With tail="renormalize" it is the
    distribution over the k kept classes only, each side divided by its mass there: what the student gives to the
    other classes is then free, and not learnt.

    Args:
        log_probs: (..., k), natural logarithms of the probabilities in the full distribution; not logits.
        indices: (..., k), their classes, each once a row, any integer dtype.
        num_classes: how many classes there are.
        tail: "lump" or "renormalize".

    Raises:
        TypeError: log_probs or indices are no tensors.
        ValueError: shapes, dtypes, a row that names a class twice, a sum of probabilities above 1 (by more than the
            rounding of log_probs' dtype), NaN, or log_probs that require a gradient.
        IndexError: an index is not a class.

    Source: arXiv:2503.16870 shows what dropping the tail does to a student. In training it is a teacher: the student
    alone has a gradient, of `ll.kl(sparse, student)`, `ll.kl(student, sparse)`, `ll.js`, `ll.tv` or `cross_entropy`.
    Where the kept classes have all the mass, a student with mass elsewhere is infinitely far in the reverse divergence.

    >>> import torch, logitless as ll
    >>> teacher = ll.SparseLogits(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[3, 0]]), num_classes=4)
    >>> ll.kl(teacher, torch.zeros(1, 4))
    tensor([0.1733])
    >>> ll.kl(torch.zeros(1, 4), teacher)  # the reverse divergence, over the same buckets
    tensor([0.1733])
    """

    log_probs: Tensor
    indices: Tensor
    num_classes: int
    tail: Tail = "lump"

    def __post_init__(self) -> None:
        """Check what was given."""
        _check_parts(self.log_probs, self.indices, self.num_classes, self.tail)
        if values_are_readable(self.log_probs) and values_are_readable(self.indices):
            _check_values(self.log_probs, self.indices, self.num_classes)

    @classmethod
    def top_k(cls, logits: Tensor | LazyLogits, k: int, *, tail: Tail = "lump") -> SparseLogits:
        """Return the k likeliest classes of each row of logits (..., classes), dense or lazy, without a gradient.

        >>> import torch, logitless as ll
        >>> ll.SparseLogits.top_k(torch.tensor([[2.0, 0.0, 1.0]]), 2).indices
        tensor([[0, 2]])
        """
        check_input("SparseLogits.top_k", logits, logits)
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"SparseLogits.top_k: expected k between 1 and {logits.shape[-1]} classes, got {k}")

        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if isinstance(logits, HeadLogits):
            log_probs, indices = logits.picked("SparseLogits.top_k", picks.top_log_probs, k, dtype=dtype)
        else:
            rows = as_tensor(logits, "SparseLogits.top_k").detach().reshape(-1, logits.shape[-1])
            backend = dispatch.pick("SparseLogits.top_k", [rows])
            log_probs, indices = picks.likeliest(backend, rows, dtype, k)
        shape = (*logits.shape[:-1], k)
        return cls(log_probs.view(shape), indices.view(shape), logits.shape[-1], tail)

    @property
    def shape(self) -> torch.Size:
        """The shape of the full distribution, (..., num_classes)."""
        return torch.Size((*self.log_probs.shape[:-1], self.num_classes))

    def __getitem__(self, index: Any) -> SparseLogits:
        """Return some rows: an index into the leading dimensions."""
        log_probs = self.log_probs[index]
        if log_probs.shape[-1:] != self.log_probs.shape[-1:]:
            raise IndexError(f"SparseLogits of shape {tuple(self.shape)} are indexed by their leading dimensions only")
        return replace(self, log_probs=log_probs, indices=self.indices[index])

    def flatten(self) -> SparseLogits:
        """Return the rows in one dimension."""
        k = self.log_probs.shape[-1]
        return replace(self, log_probs=self.log_probs.reshape(-1, k), indices=self.indices.reshape(-1, k))

    def to(self, device: torch.device | str) -> SparseLogits:
        """Return the same distribution on a device."""
        return replace(self, log_probs=self.log_probs.to(device), indices=self.indices.to(device))


def divergence(
    name: str,
    measure: definitions.PairMeasure,
    p: SparseLogits | Tensor | LazyLogits,
    q: SparseLogits | Tensor | LazyLogits,
    scale: float = 1.0,
) -> Tensor:
    """Return a measure of each row over the buckets of the one that is sparse, of the logits times `scale`.

    What the tail is made of is not known, so of a lumped one no other scale than 1 can be had.
    """
    turned = not isinstance(p, SparseLogits)
    sparse, full = (q, p) if turned else (p, q)
    assert isinstance(sparse, SparseLogits)
    if isinstance(full, SparseLogits):
        raise TypeError(f"{name}: {'p' if turned else 'q'}, the student, must have all its logits, not SparseLogits")
    if scale != 1.0 and sparse.tail == "lump" and sparse.indices.shape[-1] < sparse.num_classes:
        raise ValueError(
            f"{name}: a temperature of SparseLogits with tail='lump' would need the teacher's whole tail: store "
            "SparseLogits.top_k(logits / temperature, k) and give student / temperature, or take tail='renormalize'"
        )
    of_buckets = (lambda kept, masses: measure(masses, kept)) if turned else measure
    return _fold(name, of_buckets, sparse, full, scale)


def cross_entropy(p: SparseLogits, q: Tensor | LazyLogits) -> Tensor:
    """Return the cross-entropy of each row over p's buckets: `kl(p, q)` plus what p's buckets have of entropy."""
    return _fold("cross_entropy", _cross_entropy, p, q, 1.0)


def _cross_entropy(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    probabilities = torch.exp(-definitions.negative_log_softmax(logits_p, -1))
    return times_zero_safe(probabilities, definitions.negative_log_softmax(logits_q, -1)).sum(-1)


def _fold(name: str, measure: definitions.PairMeasure, p: SparseLogits, q: Tensor | LazyLogits, scale: float) -> Tensor:
    """Return a measure of p's buckets and q's masses in them, both scaled, made a tile of q's rows at a time."""
    if isinstance(q, SparseLogits):
        raise TypeError(f"{name}: q, the student, must have all its logits, not SparseLogits")
    check_input(name, q, q)
    if q.shape != p.shape:
        raise ValueError(f"{name}: expected q of p's shape {tuple(p.shape)}, got {tuple(q.shape)}")
    rows = _rows_of(q)
    dispatch.pick(name, (*rows.tensors, p.log_probs, p.indices))
    k = p.indices.shape[-1]
    lump = p.tail == "lump" and k < p.num_classes
    buckets = _buckets(p.log_probs.detach().double(), lump).reshape(rows.rows, k + lump) * scale
    slack = _sum_slack(p.log_probs)
    result = torch.float64 if torch.float64 in (q.dtype, p.log_probs.dtype) else torch.float32

    def function(tile: Tensor, log_p: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        wide = tile.double() * scale
        masses = wide.gather(-1, indices)
        if lump:  # the other classes' own log-sum-exp: 1 minus the kept mass would lose a small tail to rounding
            others = wide.scatter(-1, indices, -math.inf)
            masked = torch.isneginf(others).all(-1, keepdim=True)  # whose log-sum-exp would have a gradient of NaN
            others = others.masked_fill(masked, 0).logsumexp(-1, keepdim=True).masked_fill(masked, -math.inf)
            masses = torch.cat([masses, others], -1)
            # A student that masks all others is not infinitely wrong for a tail that is the rounding of log_probs.
            rounding = masked & (log_p[:, k:] < scale * math.log(slack))
            log_p = torch.cat([log_p[:, :k], log_p[:, k:].masked_fill(rounding, -math.inf)], -1)
        return (measure(log_p, masses).to(result),)

    (value,) = fold_rows(function, [rows], [buckets, p.indices.reshape(rows.rows, k).long()])
    return value.view(p.shape[:-1])


def _rows_of(logits: Tensor | LazyLogits) -> LogitRows:
    if isinstance(logits, HeadLogits):
        return logits.rows()
    return dense_rows(as_tensor(logits, "a measure"))


def _buckets(log_probs: Tensor, lump: bool) -> Tensor:
    """Return the log-masses of the kept classes, and of the tail: nothing where rounding left no room for one."""
    if not lump:
        return log_probs
    total = log_probs.logsumexp(-1, keepdim=True)
    kept = log_probs - total.clamp(min=0)
    return torch.cat([kept, torch.log(-torch.expm1(total.clamp(max=0)))], -1)


def _sum_slack(log_probs: Tensor) -> float:
    """Return how far rounding moves the sum of the probabilities: each by p |log p| eps, all by log(k) eps at most."""
    return 2 * torch.finfo(log_probs.dtype).eps * (1 + math.log(log_probs.shape[-1]))


def _check_parts(log_probs: Tensor, indices: Tensor, num_classes: int, tail: str) -> None:
    for name, value in (("log_probs", log_probs), ("indices", indices)):
        if not isinstance(value, Tensor):
            raise TypeError(f"SparseLogits: {name} must be Tensor, not {type(value).__name__}")
    if tail not in ("lump", "renormalize"):
        raise ValueError(f"SparseLogits: tail must be 'lump' or 'renormalize', got {tail!r}")
    if log_probs.shape != indices.shape or log_probs.dim() < 1:
        raise ValueError(
            "SparseLogits: expected log_probs and indices of one shape (..., k), "
            f"got {tuple(log_probs.shape)} and {tuple(indices.shape)}"
        )
    if not 1 <= log_probs.shape[-1] <= num_classes:
        raise ValueError(f"SparseLogits: expected 1 to {num_classes} classes a row, got {log_probs.shape[-1]}")
    if not log_probs.dtype.is_floating_point or indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise ValueError(
            f"SparseLogits: expected floating log_probs and integer indices, got {log_probs.dtype}, {indices.dtype}"
        )
    if log_probs.requires_grad:
        raise ValueError("SparseLogits: a sparse teacher has no gradient; give log_probs.detach()")


def _check_values(log_probs: Tensor, indices: Tensor, num_classes: int) -> None:
    outside = (indices < 0) | (indices >= num_classes)
    if bool(outside.any()):
        position = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"SparseLogits: indices{list(position)} is {int(indices[position])}: there are {num_classes} classes"
        )
    ordered = indices.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if bool(twice.any()):
        raise ValueError(f"SparseLogits: row {tuple(twice.nonzero()[0].tolist())} names a class twice")
    total = log_probs.double().logsumexp(-1)
    wrong = ~(total <= math.log1p(_sum_slack(log_probs))) | (total == -math.inf)
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"SparseLogits: the probabilities of row {position} add up to {math.exp(float(total[position]))}, not to "
            "more than 0 and at most 1: log_probs are log-probabilities of the full distribution, "
            "logits.log_softmax(-1).gather(-1, indices)"
        )
