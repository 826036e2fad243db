"""TRL's log-probabilities, entropies and divergences, of logits that are not built.

TRL's trainers score tokens with a few functions of their own. `install()` puts those of this module in their places, so
that SFT, DPO, GRPO and distillation trainers take the same steps from the same configuration: the same losses,
gradients and metrics, with one tile of logits in memory and each row's numbers independent of the batch.

With dense logits the functions here equal TRL's of the same names; lazy logits (`ll.lazy_head`) stay lazy.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from logitless.lazy.logits import LazyLogits, linear
from logitless.losses.measures import entropy, js, token_stats

IGNORED = -100  # TRL's index of what is not scored


def selective_log_softmax(
    logits: Tensor | LazyLogits, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Return the log-probabilities of one class a row, or of k.

    Equals `(logits / temperature).log_softmax(-1).gather(-1, index)`, with a dimension of 1 added to an index of one
    class a row. It is what a policy gradient weighs; differentiable in the logits.

    Args:
        logits: (..., classes), dense or lazy.
        index: classes (...) or (..., k), each of them a class.
        temperature: what the logits are divided by, above 0.
        row_mask: (...), 0 where a row is not wanted: it is not read, and its log-probabilities are 0.

    Returns:
        Nats of the index's shape, float32 or, of float64 logits, float64.

    Raises:
        ValueError: the temperature is not positive.
        IndexError: an index names no class.

    Source: `trl.trainer.utils.selective_log_softmax`.

    >>> import torch
    >>> from logitless.integrations import trl
    >>> trl.selective_log_softmax(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]))
    tensor([-0.4076])
    """
    _check_temperature(temperature)
    if index.dim() == logits.dim() - 1:
        target = index if row_mask is None else index.masked_fill(row_mask == 0, IGNORED)
        return -token_stats(logits, target, temperature=temperature).nll
    log_probs = (logits / temperature).log_softmax(-1).gather(-1, index)
    if row_mask is not None:
        log_probs = log_probs.masked_fill((row_mask == 0).unsqueeze(-1), 0.0)
    return log_probs


def entropy_from_logits(logits: Tensor | LazyLogits, chunk_size: int = 128) -> Tensor:
    """Return the entropy of each row, in nats.

    Equals `torch.distributions.Categorical(logits=logits).entropy()`. As a bonus it keeps a policy from collapsing;
    differentiable in the logits.

    Args:
        logits: (..., classes), dense or lazy.
        chunk_size: has no effect: nothing of the size of the logits is made.

    Source: `trl.trainer.utils.entropy_from_logits`.

    >>> import torch
    >>> from logitless.integrations import trl
    >>> trl.entropy_from_logits(torch.zeros(1, 4))
    tensor([1.3863])
    """
    return entropy(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor | LazyLogits,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of one class a row, and the row's entropy, in one pass over the logits.

    Equals `selective_log_softmax` and `entropy_from_logits` of the logits divided by the temperature, where
    `row_mask` is 0 both are 0. With `entropy_requires_grad=False` the entropy has no gradient.

    Source: `trl.trainer.utils.selective_log_softmax_and_entropy`.

    >>> import torch
    >>> from logitless.integrations import trl
    >>> trl.selective_log_softmax_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
    (tensor([-1.3863]), tensor([1.3863]))
    """
    _check_temperature(temperature)
    target = index if row_mask is None else index.masked_fill(row_mask == 0, IGNORED)
    stats = token_stats(logits, target, temperature=temperature)
    return -stats.nll, stats.entropy if entropy_requires_grad else stats.entropy.detach()


def generalized_jsd_loss(
    student_logits: Tensor | LazyLogits,
    teacher_logits: Tensor | LazyLogits,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence between a teacher and a student, as GKD trains with it.

    Equals `ll.js(teacher_logits, student_logits, beta=beta, temperature=temperature)` summed over the rows whose label
    is not -100, by `num_items_in_batch` where that is given; else "batchmean" divides by how many these rows are (no
    fewer than 1), "sum" by nothing, "mean" by rows times classes. The student learns to spread its mass as the
    teacher does, nearer to its modes the larger beta is.

    Raises:
        ValueError: the temperature is not positive, beta is not between 0 and 1, or the reduction is another one:
            values of each class, TRL's reduction "none", would be as large as the logits.

    Source: `trl.experimental.gkd.GKDTrainer.generalized_jsd_loss`, arXiv:2306.13649.

    >>> import torch
    >>> from logitless.integrations import trl
    >>> trl.generalized_jsd_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(0.1109)
    """
    _check_temperature(temperature)
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(f"generalized_jsd_loss: expected reduction 'batchmean', 'sum' or 'mean', got {reduction!r}")
    rows = js(teacher_logits, student_logits, beta=beta, temperature=temperature)
    count: Tensor | int = max(rows.shape[0], 1)
    if labels is not None:
        kept = labels != IGNORED
        rows = rows.masked_fill(~kept, 0.0)
        count = kept.sum().clamp(min=1)
    total = rows.sum()
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    if reduction == "mean":
        count = (rows.numel() if labels is None else kept.sum()) * student_logits.shape[-1]
    return total if reduction == "sum" else total / count


class ChunkedLogProbFunction:
    """What TRL's fused head asks of hidden states and its weight; `apply` has the arguments of TRL's."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Return log-probability, entropy, log of the sum of squared probabilities, mean logit, and whether it is top.

        `chunk_size` has no effect. What `outputs` does not name is None, but for the log-probability.
        """
        logits = linear(*_of_one_dtype(hidden, weight, bias), scale=logit_scale, softcap=final_logit_softcapping)
        stats = token_stats(logits, targets, temperature=temperature)
        squares = mean = top = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                squared = token_stats(logits, targets, temperature=temperature / 2)
                squares = squared.lse - 2 * stats.lse
            if "mean_logits" in outputs:
                total = (logits / temperature).log_softmax(-1).sum(-1, dtype=stats.lse.dtype)
                mean = stats.lse + total / logits.shape[-1]
            if "is_top1" in outputs:
                top = stats.argmax == targets
        return -stats.nll, stats.entropy if "entropy" in outputs else None, squares, mean, top


class ChunkedDivergenceFunction:
    """What TRL's distillation asks of two models' hidden states and heads; `apply` has the arguments of TRL's."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return each row's divergence, which learns in the student alone, and the student's entropy without one."""
        student = linear(
            *_of_one_dtype(student_hidden, student_weight, student_bias),
            scale=student_logit_scale,
            softcap=student_final_logit_softcapping,
        )
        with torch.no_grad():
            teacher = linear(
                *_of_one_dtype(teacher_hidden, teacher_weight, teacher_bias),
                scale=teacher_logit_scale,
                softcap=teacher_final_logit_softcapping,
            )
        divergence = js(teacher, student, beta=beta, temperature=temperature)
        with torch.no_grad():
            spread = token_stats(student, _no_targets(student_hidden), temperature=temperature).entropy
        return divergence, spread


def _no_targets(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)


def _of_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a head in the dtype that TRL multiplies in: the autocast one, or that of the hidden states."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"expected a positive temperature, got {temperature}")


# The names under which TRL's modules look each of them up; a version may have some of them.
_PLACES: dict[str, Any] = {
    # TRL leaves out rows that are not scored only where it has kernels of its own: said to be everywhere.
    "_use_triton": lambda device: True,
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    "_ChunkedLogProbFunction": ChunkedLogProbFunction,
    "ChunkedDivergenceFunction": ChunkedDivergenceFunction,
}


class Installed:
    """What `install` changed, and the way back: `.remove()`, or leaving its `with` block."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._replaced: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Put a value in a place, and remember what was there."""
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def __bool__(self) -> bool:
        """Say whether anything is replaced."""
        return bool(self._replaced)

    def remove(self) -> None:
        """Give TRL its own functions back; a second call does nothing."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def __enter__(self) -> Installed:
        """Return the handle."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.remove()


def install() -> Installed:
    """Put the functions of this module in the places of TRL's own, for every trainer of the process.

    Import the trainers first: what TRL's modules took from each other before is found in those that are loaded. Lazy
    heads are not needed then, as TRL hands over hidden states and weight; code that asks a model for its logits, as
    GKD does, wants `ll.lazy_head(model)` as well.

    Returns:
        A handle: `.remove()`, or leaving its `with` block, gives TRL its own functions back.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL has none of the functions.
    """
    import trl.trainer.utils  # noqa: F401 # so that there is something to replace

    installed = Installed()
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("trl.") and m is not None]
    modules = [m for m in modules if not m.__name__.startswith("trl.kernels")]  # which choose their own kernels
    for module in modules:
        for name, ours in _PLACES.items():
            if name in vars(module):
                installed.put(module, name, ours)
        kind = vars(module).get("GKDTrainer")
        if isinstance(kind, type) and "generalized_jsd_loss" in vars(kind):
            installed.put(kind, "generalized_jsd_loss", staticmethod(generalized_jsd_loss))
    if not installed:
        raise RuntimeError("install: this version of TRL has none of the functions that would be replaced")
    return installed
