"""What is read of a head's logits without building them: some of them, or a few numbers of each row.

Every logit here is the losses' own: made by the same products of the same tiles (`tiles.HeadTiles`), so that what is
gathered, compared, taken as a maximum or written out agrees bit for bit with what a loss reads. Values are rounded to
the dtype that the logits have, `dtype`; rows are [rows, classes]. Everything is differentiable with any upstream
gradient, and holds one tile at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitless._heads.rows import HeadRows
from logitless.kernels.interface import Backend


def materialize(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the logits [rows, classes], all of them."""
    raise NotImplementedError


def argmax(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the first class [rows] that has the largest logit."""
    raise NotImplementedError


def largest(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest logit [rows] and the first class that has it."""
    raise NotImplementedError


def smallest(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the smallest logit [rows] and the first class that has it."""
    raise NotImplementedError


def topk(
    backend: Backend, rows: HeadRows, dtype: torch.dtype, k: int, *, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the k largest (or smallest) logits and their classes, both [rows, k]."""
    raise NotImplementedError


def logsumexp(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the log-sum-exp [rows] of the logits before they are rounded to `dtype`."""
    raise NotImplementedError


def gather(backend: Backend, rows: HeadRows, dtype: torch.dtype, index: Tensor) -> Tensor:
    """Return the logits [rows, k] of the classes that `index` [rows, k] names.

    Raises RuntimeError, as torch, where a class does not exist and the index can be read.
    """
    raise NotImplementedError


def gather_log_probs(backend: Backend, rows: HeadRows, dtype: torch.dtype, index: Tensor) -> Tensor:
    """Return `log_softmax(logits)` [rows, k] at the classes that `index` names: never above 0."""
    raise NotImplementedError


def sum_log_probs(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the sum over the classes of `log_softmax(logits)` [rows]."""
    raise NotImplementedError


def of_classes(rows: HeadRows, classes: int | slice | Tensor) -> HeadRows:
    """Return the rows of some classes only, a head of those weight rows: `logits[:, classes]`, still two-dimensional.

    One class stays as a dimension of size 1. A class that does not exist raises IndexError, as torch.
    """
    raise NotImplementedError
