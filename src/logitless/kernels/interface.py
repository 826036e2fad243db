"""The seam: what a backend offers, what each function takes, gives and promises. All that is above is handed a backend.

A backend is a module, or an object, with the names of `Backend`. It works on plain data: no function here knows of
autograd. Values a row come in the logits' shape without the class dimension, in the compute dtype: float32, or float64
for float64 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

# What a call on logits that are not built may hold where its caller does not say.
DEFAULT_MAX_BYTES = 128 * 2**20

# What the losses of single elements read beside their input.
ELEMENT_DTYPES = frozenset(
    (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)

DivergenceFamily = Literal["skewed_kl", "weighted_js", "total_variation"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence of two rows, asked for by itself, with `m = weight p + (1 - weight) q`, 0 < weight < 1.

    skewed_kl is KL(p || m); weighted_js is weight KL(p || m) + (1 - weight) KL(q || m); total_variation is
    sum |p - q| / 2, which has no mixture.
    """

    family: DivergenceFamily
    weight: float = 0.5


ElementLoss = Literal["binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "kl_div_log_target"]


def times_zero_safe(coefficient: Tensor, value: Tensor) -> Tensor:
    """Return `coefficient * value` where a zero coefficient wins over an infinite value."""
    excluded = (coefficient == 0) & torch.isinf(value)
    return coefficient * value.masked_fill(excluded, 0)


@dataclass(frozen=True, slots=True)
class ClassTarget:
    """What a target of `cross_entropy` or `nll_loss` means.

    Exactly one of `indices` and `probabilities` is set. `indices` are int64 as given: a kernel that reads them anyway
    checks their values itself and raises `index_error`; others call `checked_values` first. After that they are safe
    to gather with (an ignored or impossible position holds 0), and `ignored` and `impossible` are boolean rows, or None
    when no row is so. A row is impossible when its class does not exist and the values could not be read to raise
    (another device, a transform, a compiler): its loss is NaN.
    """

    class_dim: int
    classes: int
    ignore_index: int
    indices: Tensor | None = None
    ignored: Tensor | None = None
    impossible: Tensor | None = None
    probabilities: Tensor | None = None


class RowStats(NamedTuple):
    """One value per row, of the logits' shape without the class dimension; what was not asked for is None.

    lse = row_max + log_sum; of a row of -inf alone these are -inf and NaN, of one with a NaN row_max is not -inf and
    log_sum is NaN. log_sum is float64 always, so that the gradient can be right to an ulp. An ignored row
    has 0 everywhere and -1 for argmax and rank. `bad_row` is the first row (in row-major order) whose target is
    neither a class nor ignore_index, or -1; such rows have NaN. A backend that would have to wait for it says -1.
    """

    row_max: Tensor
    log_sum: Tensor
    nll: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None
    rank: Tensor | None
    smooth_sum: Tensor | None
    dense_sum: Tensor | None
    dense_mass: Tensor | None
    bad_row: int

    def losses(self, row_weight: Tensor | None, smoothing: float, classes: int) -> Tensor:
        """Return the cross-entropy of each row: of its probabilities, or of its index times `row_weight`."""
        loss = self.nll if self.dense_sum is None else self.dense_sum
        assert loss is not None
        if row_weight is not None:
            loss = times_zero_safe(row_weight, loss)
        if smoothing > 0:
            assert self.smooth_sum is not None
            kept = (1 - smoothing) * loss if smoothing < 1 else 0.0  # not 0 * inf
            loss = kept + smoothing / classes * self.smooth_sum
        return loss


class PairRowStats(NamedTuple):
    """One value per row for p = softmax(first), q = softmax(second); what was not asked for is None.

    `saved`, float64 of PAIR_SAVED numbers a row, is what `pair_row_grad` needs, for the measures asked for here.
    """

    kl: Tensor | None
    reverse_kl: Tensor | None
    js: Tensor | None
    cross_entropy: Tensor | None
    entropy_p: Tensor | None
    entropy_q: Tensor | None
    nll_p: Tensor | None
    nll_q: Tensor | None
    divergence: Tensor | None
    same_top: Tensor | None
    saved: Tensor
    bad_row: int


class CosineRows(NamedTuple):
    """One value a pair of vectors, and what the gradient needs of the forward pass (None where not asked for)."""

    out: Tensor
    saved: Tensor | None


class TileRules(NamedTuple):
    """How a backend wants the logits of a head cut into tiles."""

    default_bytes: int  # what a call may hold where its caller does not say
    gradient_share: float  # of these bytes, what tiles take where gradients are made ...
    value_share: float  # ... and where they are not
    least_rows: int  # products of fewer rows run at a fraction of their speed: classes are cut before rows get fewer
    cut_rows: int  # rows of a tile whose classes are cut, as long as so many classes fit beside them
    least_classes: int
    round_rows: int  # no tile but the last has a part of so many rows
    class_major: bool  # [classes, rows] is the faster order where nothing else asks for one
    line: int  # rows that a class of such a tile has room for at least: fewer are read in another way
    default_rows: int = 0  # rows of a tile, of all classes, whatever they take, where its caller does not say
    keeps_logits: bool = False  # logits wait for a backward pass, as far as these bytes go, rather than be made again


class Backend(Protocol):
    """Who computes.

    Every function promises: inputs are not written to but where `out` says so; an ignored row is never read, and its
    gradient is exactly 0; 0 log 0 = 0; a row's result does not depend on its neighbours.
    """

    @property
    def NAME(self) -> str:  # noqa: N802 # a constant of a module
        """What `backend=` and LOGITLESS_BACKEND call it."""
        ...

    @property
    def DEVICE_TYPES(self) -> frozenset[str]:  # noqa: N802
        """Of which devices its kernels take tensors."""
        ...

    @property
    def PLAIN(self) -> bool:  # noqa: N802
        """Whether torch differentiates what it does: a call is its definition then, and nothing of ours wraps it."""
        ...

    @property
    def READS_VALUES(self) -> bool:  # noqa: N802
        """Whether values of tensors on the CPU may be read on the host; on a device that would wait for all before."""
        ...

    @property
    def PAIR_SAVED(self) -> int:  # noqa: N802
        """How many numbers a row `pair_row_stats` saves."""
        ...

    @property
    def PRODUCT_DTYPES(self) -> frozenset[torch.dtype]:  # noqa: N802
        """Of which `product` takes factors. A set: a graph that is being compiled can ask it."""
        ...

    @property
    def MEASURED_PRODUCTS(self) -> frozenset[torch.dtype]:  # noqa: N802
        """Of these the ones whose product by torch may be faster, so that both are timed."""
        ...

    @property
    def FIXED_PRODUCTS(self) -> frozenset[torch.dtype]:  # noqa: N802
        """Of which it has a product, be it the slower one, whose sums have an order that the depth alone decides."""
        ...

    @property
    def PRODUCTS_ARE_FIXED(self) -> bool:  # noqa: N802
        """Whether they are taken where torch's float32_matmul_precision would allow less than float32, too."""
        ...

    @property
    def PRODUCT_BITS_STAND(self) -> bool:  # noqa: N802
        """Whether an element of `product` has the same bits in a call of whatever shape."""
        ...

    @property
    def NARROWS(self) -> bool:  # noqa: N802
        """Whether `row_grad` and `pair_row_grad` write bfloat16 into the first bytes of each row of float32 logits.

        `out` then begins where the logits do, with the same number of bytes from row to row.
        """
        ...

    def missing(self) -> str | None:
        """Return why its kernels are not installed, or None if they are."""
        ...

    def lacks(self) -> str | None:
        """Return why it cannot run on this machine, or None if it can: for `backends()`."""
        ...

    def detail(self) -> str:
        """Return what it is, for `backends()`."""
        ...

    def obstacle(self, tensors: Sequence[Tensor | None]) -> str | None:
        """Return why it cannot take these tensors, or None if it can."""
        ...

    def served(self) -> str:
        """Return why a call goes to it, where it does."""
        ...

    def tile_rules(self) -> TileRules:
        """Return how it wants a head's logits cut."""
        ...

    def workspace_bytes(self) -> int:
        """Return what its products hold beside the tiles."""
        ...

    def product_facts(self) -> str:
        """Return what decides how fast its products are, beside the processor: what a time of them is kept under.

        Of products that are torch's, how these are made.
        """
        ...

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory that is not initialised."""
        ...

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return memory of a tensor's shape, layout and dtype that is not initialised."""
        ...

    def scalar(self, value: Tensor) -> Tensor | float:
        """Return one number as these functions like it best: read on the host where nothing waits for that."""
        ...

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        dense_target: Tensor | None = None,
        lse: bool = False,
        entropy: bool = False,
        argmax: bool = False,
        rank: bool = False,
        smooth: bool = False,
    ) -> RowStats:
        """Return every per-row quantity of the losses.

        nll = lse - z[target] (with a target); smooth_sum = sum_j w_j (lse - z_j) (with `smooth`); with a dense target
        of the logits' shape and dtype, dense_sum = sum_j t_j w_j (lse - z_j) and dense_mass = sum_j t_j w_j, where
        0 * inf = 0. w is class_weight, or 1. The target is int64, of the logits' shape without the class dimension.
        """
        ...

    def row_grad(
        self,
        logits: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        target: Tensor | None = None,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        index_weight: bool = False,
        dense_target: Tensor | None = None,
        upstream: Tensor | None = None,
        a_scale: float = 0.0,
        b_scale: float = 0.0,
        c_scale: float = 0.0,
        e_scale: float = 0.0,
        f_scale: float = 0.0,
        a_extra: Tensor | float = 0.0,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        e: Tensor | None = None,
        f: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return dz_j = p_j (A + B (z_j - lse)) + C [j = target] + E t_j w_j + F w_j, of the logits' shape and dtype.

        With g the row's element of `upstream` (one per row, or one for all; 1 when None) and v the target's class
        weight with `index_weight`, else 1: A = g (a_scale a v + a_extra), B = g b_scale b, C = g c_scale c v,
        E = g e_scale e, F = g f_scale f; a to f are one per row, or 1 when None. `out` may be the logits themselves.
        Cross-entropy of index targets is a_scale = 1, c_scale = -1.
        """
        ...

    def pair_row_stats(
        self,
        first: Tensor,
        second: Tensor,
        target: Tensor | None = None,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        kl: bool = True,
        reverse_kl: bool = False,
        js: bool = False,
        cross_entropy: bool = False,
        entropy: bool = False,
        divergence: Divergence | None = None,
        same_top: bool = True,
    ) -> PairRowStats:
        """Return divergences of every row of `first` from the same row of `second`, in nats.

        kl = KL(p || q), reverse_kl = KL(q || p), cross_entropy = -sum p log q, entropy gives both rows' entropies, and
        a target the nll of both. A `divergence` comes alone: none of these is asked for beside it. Both have one shape
        and dtype.
        """
        ...

    def pair_row_grad(
        self,
        first: Tensor,
        second: Tensor,
        saved: Tensor,
        target: Tensor | None = None,
        *,
        class_dim: int = -1,
        ignore_index: int = -100,
        kl: Tensor | None = None,
        reverse_kl: Tensor | None = None,
        js: Tensor | None = None,
        cross_entropy: Tensor | None = None,
        entropy_p: Tensor | None = None,
        entropy_q: Tensor | None = None,
        nll_p: Tensor | None = None,
        nll_q: Tensor | None = None,
        divergence: Divergence | None = None,
        divergence_grad: Tensor | None = None,
        need_first: bool = True,
        need_second: bool = True,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return gradients for both rows' logits, given one upstream gradient per row and measure (None: zero).

        `divergence_grad` is that of `divergence`, which comes alone. `saved` is of a `pair_row_stats` call that asked
        for every measure named here. `out` takes those that are needed, and may be the logits themselves.
        """
        ...

    def elements(
        self,
        loss: ElementLoss,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, bool]:
        """Return a loss of each element, and whether one was seen outside the range that the loss checks.

        `input` and `target` have one shape, and the weights broadcast to it from the right. The result has the input's
        layout, in `dtype` (the input's where None).
        """
        ...

    def elements_sum(
        self,
        loss: ElementLoss,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> tuple[Tensor | float, bool]:
        """Return the sum of `elements` in float64 (a number where nothing waits for it), and whether it saw one."""
        ...

    def elements_grad(
        self,
        loss: ElementLoss,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        *,
        upstream: Tensor | None = None,
        scale: Tensor | float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of `elements` for the input, times `upstream` (the input's shape, or one for all)."""
        ...

    def cosine_similarity(
        self, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8, *, save: bool = False
    ) -> CosineRows:
        """Return `x1 . x2 / (max(|x1|, eps) max(|x2|, eps))` within [-1, 1] along `dim`.

        Both have one dtype and shapes that broadcast. With `save`, `saved` (float64, (3, *out.shape)) is what
        `cosine_similarity_grad` needs.
        """
        ...

    def cosine_similarity_grad(
        self,
        x1: Tensor,
        x2: Tensor,
        saved: Tensor,
        dim: int = 1,
        eps: float = 1e-8,
        *,
        upstream: Tensor | None = None,
        scale: Tensor | float = 1.0,
        wanted: tuple[bool, bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients for x1 and x2, of one shape, that are wanted."""
        ...

    def cosine_embedding(
        self, x1: Tensor, x2: Tensor, target: Tensor, margin: float = 0.0, *, save: bool = False
    ) -> CosineRows:
        """Return `1 - cos` where the target is 1, `max(0, cos - margin)` where it is -1, and 0 elsewhere.

        The vectors lie along the last dimension; 1e-12 is added to each squared norm, as torch does.
        """
        ...

    def cosine_embedding_grad(
        self,
        x1: Tensor,
        x2: Tensor,
        target: Tensor,
        saved: Tensor,
        margin: float = 0.0,
        *,
        upstream: Tensor | None = None,
        scale: Tensor | float = 1.0,
        wanted: tuple[bool, bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients for x1 and x2, of one shape, that are wanted."""
        ...

    def product(self, first: Tensor, second: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """Write `first @ second` to `out`, or add it, with sums in float32: matrices of PRODUCT_DTYPES."""
        ...

    def search(
        self,
        query: Tensor,
        rows: Tensor,
        scores: Tensor,
        ids: Tensor,
        *,
        first_id: int,
        normalized: bool,
        allowed: Tensor | None,
        self_id: int | None,
    ) -> None:
        """Bring in the rows that are better than what `scores` and `ids` [queries, k] hold, the best first.

        The score of a row is its product with the query, float32 and contiguous, over the row's length (0 of a zero
        row), within [-1, 1]; with `normalized` the product alone. The larger score is better, of equal ones the
        smaller id, and a NaN is worse than any number. The rows are float32, a half precision or int8, with consecutive
        elements and the ids from `first_id` on, larger than any there. `allowed` is boolean, [rows] or [queries, rows];
        query i does not find the row of id self_id + i. A place that no row has taken has id -1 and score -inf.

        A score depends on its two vectors alone, and equal rows have equal scores.
        """
        ...

    def search_ranks(self, query: Tensor, rows: Tensor, *, first_query: int, normalized: bool) -> Tensor:
        """Return, from 1, which place row first_query + i, of floats, has in the order of `search` for query i."""
        ...


class WholeCalls(Backend, Protocol):
    """A backend that does torch's own cross-entropy of contiguous rows in one call each way.

    It spares small calls all that stands around a kernel.
    """

    def cross_entropy(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        mean: bool,
        result: Tensor | None,
        losses: Tensor | None,
        save: bool,
    ) -> tuple[int, float, bytes] | None:
        """Return (bad_row, loss, saved), or None where these tensors are not what it takes.

        That is contiguous logits [rows, classes] or [classes], not negated; a target of int64, without the classes, or
        of probabilities, of the logits' shape and dtype, with an `ignore_index` below 0; and contiguous `class_weight`
        in the compute dtype. `result`, in it too, gets the loss, and `losses` each row's own. `saved` is for
        `cross_entropy_grad`, and empty unless `save`.
        """
        ...

    def cross_entropy_grad(
        self, logits: Tensor, target: Tensor, class_weight: Tensor | None, saved: bytes, upstream: Tensor
    ) -> Tensor:
        """Return the gradient of `cross_entropy`, times `upstream`, one number or each row's, in the compute dtype."""
        ...
