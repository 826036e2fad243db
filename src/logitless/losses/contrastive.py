"""Contrastive losses over a batch of pairs: InfoNCE and CLIP's, by the engine that builds no similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from logitless._autograd.contrastive import contrast, sigmoid_contrast
from logitless._heads.pairs_of_rows import Diagonal, Indexed, Listed, Masked, Pairs, SameLabel
from logitless._heads.square import Contrast, Hardness, Margin, Panel, Rule
from logitless._heads.vectors import BLOCK_ROWS, inverse_norms
from logitless._rules import dispatch
from logitless._rules.precision import check_real, no_autocast, precision_of
from logitless._rules.reduction import Empty, reduce_rows, resolve_reduction
from logitless._rules.sharding import of_the_whole
from logitless._rules.transforms import entries_of, transform_reason, values_are_readable
from logitless.losses.contrastive_group import KEYS, NEGATIVES, Seen, losses_over_ranks, sigmoid_over_ranks

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")

Positives = Tensor | tuple[Tensor, Tensor] | None


@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@of_the_whole
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    negatives: Tensor | None = None,
    negative_mode: Literal["paired", "unpaired"] | None = None,
    negatives_mask: Tensor | None = None,
    positives: Positives = None,
    mask: Tensor | None = None,
    false_negative_margin: float | None = None,
    guide: Sequence[Tensor] | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    partition: Literal["joint", "per_direction"] = "joint",
    symmetric: bool = False,
    hardness: str | None = None,
    hardness_strength: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> Tensor:
    """Return the cross-entropy of each query's own key among all keys: InfoNCE, in nats, without its matrix.

    Equals, with unit vectors q and k, `F.cross_entropy(q @ k.T / temperature, torch.arange(len(q)))`; of several
    positives the mean of their cross-entropies; with directions, `log_z - positive logit` as `log_z` is below.

    Args:
        query: (N, D), floating.
        key: (M, D). Key i belongs to query i unless `positives` says otherwise; further keys are negatives.
        temperature, scale: what similarities are divided by, or multiplied by: one of them, above 0; a tensor of one
            number gets its gradient.
        negatives: (K, D), shared by all queries, or (N, K, D), each query's own.
        negative_mode: "paired" or "unpaired", inferred from `negatives`; "unpaired" with (N, K, D) shows every query
            everybody's.
        negatives_mask: True where a negative is there, False for padding: (N, K), or of shared ones (K,).
        positives: (N,) or (N, P) indices of keys, -1 for none; labels (of queries, of keys), where equal ones are
            positives; or a sparse (N, M) matrix. A query without any has a loss of 0 and is not counted by "mean".
        mask: True where a key is a false negative of a query: (N, M); or indices (N, E) of keys, -1 for none. A
            positive is never left out.
        false_negative_margin: leave out negatives more alike than the positive less this.
        guide: vectors (of queries, of keys, and where given of negatives) whose cosines say so in place of the loss's
            own; the margin is then 0 where not given.
        directions: which similarities are in `log_z`, by sentence-transformers' names: "query_to_doc" always,
            "query_to_query", "doc_to_query", "doc_to_doc". An entry of one sample with itself is left out.
        partition: "joint", one log-sum of them all, or "per_direction", the mean of a log-sum each.
        symmetric: short for ("query_to_doc", "doc_to_query"), "per_direction".
        hardness: "in_batch_negatives", "hard_negatives" or "all_negatives": the logits of these in "query_to_doc" have
            `hardness_strength` times their similarity added, as a constant.
        hardness_strength: see there; 0 or more.
        normalize: divide each vector by its length; a zero vector stays zero, with a gradient of zero.
        reduction: "none", "mean" or "sum", over the queries.
        group: the processes whose vectors are one batch; every rank passes its own. See `docs/similarity.md`.
        exchange: how the others' vectors come: "gather", all at once, or "ring", those of one rank at a time.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar, with a group the same on every rank; or with "none" (N,); float32, or float64 for float64 vectors.
        Half precisions are added up in float32. Nothing of N x M numbers is made, forward or backward, but by the
        definition that serves higher derivatives and `torch.func`. In a compiled function it breaks the graph.

    Raises:
        ValueError: shapes or options that do not fit, or with a group differ between ranks. TypeError: a vector that is
            not floating. RuntimeError: with a group, a higher derivative or a transform.

    Source: van den Oord et al., 2018; directions of Li et al., 2023 (GTE), hardness of Lan et al., 2025. In training it
    pulls a query to its key and pushes it from the keys most alike, the more sharply the lower the temperature.

    >>> import torch, logitless as ll
    >>> ll.info_nce(torch.eye(3), torch.eye(3), temperature=0.5)
    tensor(0.2395)
    """
    reduction = resolve_reduction(reduction, None, None)
    _check_vectors("info_nce", query, key)
    queries, keys = query.shape[0], key.shape[0]
    options = _Directions.of(directions, partition, symmetric, positives, queries, keys)
    factor = _scale("info_nce", temperature, scale)
    _check_hardness(hardness, hardness_strength)
    own = _own_negatives(query, negatives, negative_mode, negatives_mask)
    vectors = [query, key] if own is None else [query, key, own.vectors]
    picked = dispatch.pick("info_nce", (*vectors, factor if isinstance(factor, Tensor) else None), backend)
    pairs = _positive_pairs(positives, queries, keys, query.device)
    precision = precision_of(*vectors)

    guides = None if guide is None else _guides(guide, query, key, own)
    margin = None
    if false_negative_margin is not None or guide is not None:
        margin = _thresholds(query, key, guide, false_negative_margin or 0.0, positives, normalize)
    strength = hardness_strength if hardness_strength > 0 else None

    def rule(first: int, second: int, *, left_out: tuple[Pairs, ...] = (), mask: Tensor | None = None) -> Rule:
        """Return what anchors leave out of the similarities of these two sides."""
        if margin is None:
            return Rule(left_out, mask)
        return Rule(left_out, mask, Margin(margin, None if guides is None else (guides[first], guides[second])))

    excluded, matrix = _excluded(mask, queries, keys)
    plain = rule(0, 1, left_out=excluded, mask=matrix)
    hard = hardness if strength is not None else None
    row_rule = plain
    if strength is not None and hard in ("in_batch_negatives", "all_negatives"):
        row_rule = replace(plain, hardness=Hardness("all_negatives", strength, None))
    columns = options.columns
    panels = [
        Panel(
            0,
            1,
            queries,
            keys,
            columns=columns,
            row_rule=row_rule,
            column_rule=plain if columns is not None and (margin is not None or row_rule is not plain) else None,
            positives=pairs,
        )
    ]
    if own is not None:
        hardened = own.hardness(hard, strength)
        panels.append(
            Panel(
                0,
                2,
                queries,
                own.width,
                row_rule=replace(rule(0, 2, mask=own.absent), hardness=hardened),
                paired=own.paired,
            )
        )
    if options.queries:
        panels.append(Panel(0, 0, queries, queries, row_rule=rule(0, 0, left_out=(Diagonal(queries),))))
    if options.documents:
        panels.append(Panel(1, 1, queries, keys, row_rule=rule(1, 1, left_out=(Diagonal(queries),))))
        if own is not None and not own.paired:
            same = () if own.owners is None else (own.owners,)
            panels.append(Panel(1, 2, queries, own.width, row_rule=rule(1, 2, left_out=same, mask=own.absent)))
    counts = pairs.counts(queries, keys, query.device)
    call = Contrast(
        picked,
        queries,
        tuple(panels),
        options.partitions,
        (normalize,) * len(vectors),
        precision.compute,
        counts,
    )
    with no_autocast(query):
        if group is not None:
            shared = own is not None and not own.paired
            kinds = (KEYS, NEGATIVES) if shared else (KEYS,)
            seen = Seen(
                columns,
                options.queries,
                kinds if options.documents else (),
                shared=shared,
                owned=own is not None and own.owners is not None,
                absent=own.absent if own is not None and own.absent is not None and own.absent.dim() == 1 else None,
                thresholds=margin,
                guides=None if guides is None else tuple(guides),
                labels=(pairs.rows, pairs.columns) if isinstance(pairs, SameLabel) else None,
                hardness=None if hard is None or strength is None else (hard, strength),
            )
            return losses_over_ranks(
                "info_nce",
                call,
                factor,
                tuple(vectors),
                seen,
                group=group,
                exchange=exchange,
                given=positives is not None,
                reduction=reduction,
            )
        losses = contrast(call, factor, *vectors)
        counted: Tensor | float = torch.sym_float(queries) if positives is None else (counts > 0).sum()
        empty: Empty = "nan" if positives is None else "zero"
        return reduce_rows(losses, reduction, denominator=counted, dtype=precision.compute, empty=empty)


@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> Tensor: ...
@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: Literal[True],
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> dict[str, Tensor]: ...
@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@of_the_whole
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Return CLIP's loss: the mean of both directions' cross-entropies of each pair, in nats, without its matrix.

    Equals `z = logit_scale * image_features @ text_features.T; n = torch.arange(len(z));
    (F.cross_entropy(z, n) + F.cross_entropy(z.T, n)) / 2`.

    Args:
        image_features, text_features: (N, D), floating, taken as they are: normalise them before, as CLIP does.
        logit_scale: one number above 0, what similarities are multiplied by: `log_scale.exp()` of the parameter, not
            the parameter. Clamp that after the optimiser's step: `log_scale.data.clamp_(0, math.log(100))`.
        logit_bias: one number, which changes nothing here and has a gradient of 0.
        output_dict: return `{"contrastive_loss": loss}`, as open_clip does.
        group, exchange: the processes whose pairs are one batch, and how their features come; see `logitless.info_nce`.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar; float32, or float64 for float64 features. All tensors get gradients. Nothing of N x N numbers is made;
        see `logitless.info_nce`.

    Raises:
        ValueError: shapes that do not fit, a scale that is not above 0. TypeError: features that are not floating.

    Source: Radford et al., 2021; open_clip's `ClipLoss`. In training it pulls each image and its text together and
    pushes apart those that are taken for each other.

    >>> import torch, logitless as ll
    >>> ll.clip_loss(torch.eye(3), torch.eye(3), 2.0)
    tensor(0.2395)
    """
    rows = _rows_of_both("clip_loss", image_features, text_features)
    factor = one_number("clip_loss", "logit_scale", logit_scale)
    tensors = (image_features, text_features, factor if isinstance(factor, Tensor) else None)
    picked = dispatch.pick("clip_loss", tensors, backend)
    dtype = precision_of(image_features, text_features).compute
    pairs = Diagonal(rows)
    panel = Panel(0, 1, rows, rows, columns=1, positives=pairs)
    counts = pairs.counts(rows, rows, image_features.device)
    call = Contrast(picked, rows, (panel,), 2, (False, False), dtype, counts)
    with no_autocast(image_features):
        if group is None:
            losses = contrast(call, factor, image_features, text_features)
            loss = reduce_rows(losses, "mean", denominator=torch.sym_float(rows), dtype=dtype)
        else:
            both = (image_features, text_features)
            loss = losses_over_ranks("clip_loss", call, factor, both, Seen(1), group=group, exchange=exchange)
        if isinstance(logit_bias, Tensor):
            loss = loss + (logit_bias * 0).sum().to(dtype)  # data-parallel training refuses a parameter without one
    return {"contrastive_loss": loss} if output_dict else loss


@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> Tensor: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: Literal[True],
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> dict[str, Tensor]: ...
@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@of_the_whole
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    backend: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Return SigLIP's loss: whether each image and each text are a pair, a yes or no each, without the matrix of them.

    Equals `-F.logsigmoid(labels * (logit_scale * image_features @ text_features.T + logit_bias)).sum() / N`, where
    labels are 1 on the diagonal and -1 elsewhere.

    Args:
        image_features, text_features: (N, D), floating, taken as they are: normalise them before, as SigLIP does.
        logit_scale: one number above 0: `log_scale.exp()` of the parameter, which starts at log 10.
        logit_bias: one number, added to every logit; SigLIP's parameter starts at -10.
        output_dict: return `{"contrastive_loss": loss}`, as open_clip does.
        group, exchange: the processes whose pairs are one batch, and how their features come; see `logitless.info_nce`.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar in nats per image; float32, or float64 for float64 features. All tensors get gradients. Nothing of
        N x N numbers is made; see `logitless.info_nce`.

    Raises:
        ValueError: shapes that do not fit, a scale that is not above 0. TypeError: features that are not floating.

    Source: Zhai et al., 2023; open_clip's `SigLipLoss`. In training each pair is pulled together and each other one
    pushed apart on its own account: no softmax makes negatives compete, so the batch may be small.

    >>> import torch, logitless as ll
    >>> ll.siglip_loss(torch.eye(3), torch.eye(3), 2.0, -1.0)
    tensor(0.9398)
    """
    rows = _rows_of_both("siglip_loss", image_features, text_features)
    factor = one_number("siglip_loss", "logit_scale", logit_scale)
    bias = 0.0 if logit_bias is None else one_number("siglip_loss", "logit_bias", logit_bias, positive=False)
    numbers = [each if isinstance(each, Tensor) else None for each in (factor, bias)]
    picked = dispatch.pick("siglip_loss", (image_features, text_features, *numbers), backend)
    dtype = precision_of(image_features, text_features).compute
    pairs = Diagonal(rows)
    counts = pairs.counts(rows, rows, image_features.device)
    panel = Panel(0, 1, rows, rows, positives=pairs)
    call = Contrast(picked, rows, (panel,), 0, (False, False), dtype, counts)
    with no_autocast(image_features):
        if group is None:
            total = sigmoid_contrast(call, factor, bias, image_features, text_features)
            loss = reduce_rows(total, "mean", denominator=torch.sym_float(rows), dtype=dtype)
        else:
            both = (image_features, text_features)
            loss = sigmoid_over_ranks("siglip_loss", call, factor, bias, *both, group=group, exchange=exchange)
    return {"contrastive_loss": loss} if output_dict else loss


@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@of_the_whole
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: Tensor | float = 0.07,
    base_temperature: float | None = None,
    contrast_mode: Literal["all", "one"] = "all",
    normalize: bool = False,
    without_positive: Literal["left_out", "zero"] = "left_out",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Return the supervised contrastive loss: of each view, the mean cross-entropy of its class among all other views.

    Equals, of view i with positives P(i), `-mean over p in P(i) of (z[i, p] - logsumexp of z[i, a] over all a != i)`
    with `z = x @ x.T / temperature`: the L_out of its paper.

    Args:
        features: (B, V, D), V views of B samples, or (B, D), floating, taken as they are.
        labels: (B,); samples of one label are positives. Without labels or mask, a sample's own views are (SimCLR).
        mask: (B, B), in place of labels; sample j is a positive of sample i where it is not 0.
        temperature: what similarities are divided by, above 0; a tensor of one number gets its gradient.
        base_temperature: multiply the loss by temperature / base_temperature, as the paper's code does with 0.07.
        contrast_mode: "all": every view is an anchor; "one": the first view of each sample is.
        normalize: divide each vector by its length.
        without_positive: an anchor without one is "left_out" of the mean, or counts as "zero" in it (the paper's code).
        reduction: "none", "mean" or "sum", over the anchors.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar in nats, or with "none" (V * B,), the first views of all samples first ((B,) with "one"); float32, or
        float64 for float64 features. The matrix of views is never built; see `logitless.info_nce`.

    Raises:
        ValueError: shapes or options that do not fit. TypeError: features that are not floating.

    Source: Khosla et al., 2020, and their code. In training it gathers a class around its members and spreads the
    classes, hardest for the members that are hardest to tell from another class.

    >>> import torch, logitless as ll
    >>> ll.supcon_loss(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=0.5)
    tensor(1.0986)
    """
    reduction = resolve_reduction(reduction, None, None)
    if not isinstance(features, Tensor) or not features.is_floating_point():
        given = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"supcon_loss: features must be a Tensor of a floating dtype, got {given}")
    check_real("supcon_loss", features=features)
    if features.dim() not in (2, 3):
        raise ValueError(f"supcon_loss: features must be (B, V, D) or (B, D), got {tuple(features.shape)}")
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"supcon_loss: contrast_mode must be 'all' or 'one', got {contrast_mode!r}")
    if without_positive not in ("left_out", "zero"):
        raise ValueError(f"supcon_loss: without_positive must be 'left_out' or 'zero', got {without_positive!r}")
    views = features if features.dim() == 3 else features.unsqueeze(1)
    samples, count, width = views.shape
    flat = views.transpose(0, 1).reshape(samples * count, width)
    anchors = flat.shape[0] if contrast_mode == "all" else samples
    factor = 1 / one_number("supcon_loss", "temperature", temperature)
    picked = dispatch.pick("supcon_loss", (flat, factor if isinstance(factor, Tensor) else None), backend)
    pairs = _class_pairs(labels, mask, samples, count, anchors, features.device)
    counts = pairs.counts(anchors, flat.shape[0], features.device)
    panel = Panel(0, 0, anchors, flat.shape[0], row_rule=Rule((Diagonal(anchors),)), positives=pairs)
    dtype = precision_of(features).compute
    call = Contrast(picked, anchors, (panel,), 1, (normalize,), dtype, counts)
    with no_autocast(features):
        losses = contrast(call, factor, flat)
        if base_temperature is not None:
            losses = losses * (temperature / base_temperature)
        counted = (counts > 0).sum() if without_positive == "left_out" else torch.sym_float(anchors)
        return reduce_rows(losses, reduction, denominator=counted, dtype=dtype, empty="zero")


def _class_pairs(
    labels: Tensor | None, mask: Tensor | None, samples: int, views: int, anchors: int, device: torch.device
) -> Pairs:
    if labels is not None and mask is not None:
        raise ValueError("supcon_loss: labels and mask say the same: pass one of them")
    if mask is not None:
        if mask.shape != (samples, samples):
            raise ValueError(f"supcon_loss: mask must be ({samples}, {samples}), got {tuple(mask.shape)}")
        return Masked(mask if mask.dtype == torch.bool else mask != 0, others=True)
    if labels is None:
        labels = torch.arange(samples, device=device)
    elif labels.numel() != samples:
        raise ValueError(f"supcon_loss: labels must be ({samples},), got {tuple(labels.shape)}")
    every = labels.reshape(-1).repeat(views)
    return SameLabel(every[:anchors], every, others=True)


@dataclass(frozen=True, slots=True)
class _Directions:
    """What is in an anchor's log-partition functions: the one of columns, and whether queries and documents are."""

    columns: int | None
    queries: bool
    documents: bool
    partitions: int

    @classmethod
    def of(
        cls,
        directions: Sequence[str],
        partition: str,
        symmetric: bool,
        positives: Positives,
        queries: int,
        keys: int,
    ) -> _Directions:
        asked = (directions,) if isinstance(directions, str) else tuple(directions)
        if symmetric:
            if asked != ("query_to_doc",):
                raise ValueError(f"info_nce: symmetric=True sets the directions; leave out directions={directions!r}")
            asked, partition = ("query_to_doc", "doc_to_query"), "per_direction"
        unknown = [name for name in asked if name not in DIRECTIONS]
        if unknown or "query_to_doc" not in asked or len(set(asked)) < len(asked):
            raise ValueError(
                f"info_nce: directions must be different ones of {', '.join(DIRECTIONS)}, 'query_to_doc' among them; "
                f"got {directions!r}"
            )
        if partition not in ("joint", "per_direction"):
            raise ValueError(f"info_nce: partition must be 'joint' or 'per_direction', got {partition!r}")
        apart = partition == "per_direction"
        if apart and {"query_to_query", "doc_to_doc"} & set(asked):
            raise ValueError(
                "info_nce: 'query_to_query' and 'doc_to_doc' have no positive of their own, and need partition='joint'"
            )
        if len(asked) > 1 and positives is not None:
            raise ValueError(
                "info_nce: further directions need key i to belong to query i (positives=None); for both directions of "
                "other positives add up two calls, info_nce(query, key) and info_nce(key, query)"
            )
        if positives is None and queries > keys:
            raise ValueError(
                f"info_nce: {queries} queries need as many keys, got {keys}; pass positives= where they share keys"
            )
        both = "doc_to_query" in asked
        columns = (1 if apart else 0) if both else None
        return cls(columns, "query_to_query" in asked, "doc_to_doc" in asked, 2 if apart and both else 1)


@dataclass(frozen=True, slots=True)
class _Negatives:
    """Explicit negatives as a matrix of vectors: `width` of them a query sees, `paired` of its own alone."""

    vectors: Tensor
    width: int
    paired: int
    absent: Tensor | None
    owners: Pairs | None  # of shared ones, whose each is

    def hardness(self, which: str | None, strength: float | None) -> Hardness | None:
        if which is None or strength is None:
            return None
        if self.owners is not None:
            return Hardness(which, strength, self.owners)
        return None if which == "in_batch_negatives" else Hardness("all_negatives", strength, None)


def _own_negatives(
    query: Tensor, negatives: Tensor | None, mode: str | None, present: Tensor | None
) -> _Negatives | None:
    if negatives is None:
        if mode is not None or present is not None:
            raise ValueError("info_nce: negative_mode and negatives_mask say how negatives are meant: pass negatives=")
        return None
    if mode not in (None, "paired", "unpaired"):
        raise ValueError(f"info_nce: negative_mode must be 'paired' or 'unpaired', got {mode!r}")
    check_real("info_nce", negatives=negatives)
    rows, features = query.shape
    fits = negatives.dim() in (2, 3) and negatives.shape[-1] == features
    if not fits or (negatives.dim() == 3 and negatives.shape[0] != rows) or (negatives.dim() == 2 and mode == "paired"):
        raise ValueError(
            f"info_nce: negatives must be (K, {features}), shared, or ({rows}, K, {features}), each query's own; got "
            f"{tuple(negatives.shape)}" + (f" with negative_mode={mode!r}" if mode else "")
        )
    if not negatives.is_floating_point():
        raise TypeError(f"info_nce: negatives must have a floating dtype, got {negatives.dtype}")
    each = negatives.dim() == 3
    width = negatives.shape[-2]
    flat = negatives.reshape(-1, features)
    absent = None
    if present is not None:
        shapes = [(rows, width)] if each else [(width,), (rows, width)]
        if present.dtype != torch.bool or tuple(present.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"info_nce: negatives_mask must be boolean {expected}, got {present.dtype} {tuple(present.shape)}"
            )
        absent = ~present
        # Padding may hold anything, and a probability of 0 times that is not always 0.
        if absent.numel() == flat.shape[0]:
            flat = flat.masked_fill(absent.reshape(-1, 1), 0)
    if each and mode != "unpaired":
        if not width:
            return None
        return _Negatives(flat, width, width, absent, None)
    owners: Pairs | None = None
    if each:
        every = torch.arange(rows * width, device=query.device)
        owners = Listed(every // max(1, width), every)
        absent = None if absent is None else absent.reshape(-1)
    return _Negatives(flat, flat.shape[0], 0, absent, owners)


def _check_vectors(name: str, first: Tensor, second: Tensor, names: tuple[str, str] = ("query", "key")) -> None:
    for argument, tensor in zip(names, (first, second), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: argument '{argument}' must be Tensor, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {argument} must have a floating dtype, got {tensor.dtype}")
        check_real(name, **{argument: tensor})
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{name}: {names[0]} must be (N, D) and {names[1]} (M, D), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )


def _rows_of_both(name: str, images: Tensor, texts: Tensor) -> int:
    """Return how many pairs there are; raise where these are no features of pairs."""
    _check_vectors(name, images, texts, ("image_features", "text_features"))
    if texts.shape[0] != images.shape[0]:
        raise ValueError(f"{name}: expected as many texts as images, got {texts.shape[0]} and {images.shape[0]}")
    return images.shape[0]


def one_number(name: str, argument: str, value: Tensor | float, *, positive: bool = True) -> Tensor | float:
    """Return a number, or a tensor without dimensions that gets a gradient; raise where it is not above 0."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: {argument} must be one floating number, got {value.dtype} {tuple(value.shape)}")
        if positive and values_are_readable(value) and not value.item() > 0:
            raise ValueError(f"{name}: {argument} must be above 0, got {value.item()}")
        return value.reshape(())
    if positive and not value > 0:
        raise ValueError(f"{name}: {argument} must be above 0, got {value}")
    return float(value)


def _scale(name: str, temperature: Tensor | float | None, scale: Tensor | float | None) -> Tensor | float:
    if temperature is not None and scale is None:
        return 1 / one_number(name, "temperature", temperature)
    if scale is not None and temperature is None:
        return one_number(name, "scale", scale)
    raise ValueError(
        f"{name}: pass temperature= (similarities are divided by it) or scale= (multiplied), one of them; got "
        f"temperature={temperature!r}, scale={scale!r}"
    )


def _check_hardness(hardness: str | None, strength: float) -> None:
    if hardness is not None and hardness not in HARDNESS:
        raise ValueError(f"info_nce: hardness must be None or one of {', '.join(HARDNESS)}, got {hardness!r}")
    if strength < 0:
        raise ValueError(f"info_nce: hardness_strength must be 0 or more, got {strength}")


def _indices(name: str, index: Tensor, rows: int, keys: int) -> Indexed:
    if index.dim() not in (1, 2) or index.shape[0] != rows or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"info_nce: {name} must hold indices ({rows},) or ({rows}, some) of keys, got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    if index.numel() and values_are_readable(index):
        least, most = int(index.min()), int(index.max())
        if least < -1 or most >= keys:
            raise ValueError(
                f"info_nce: {name} must be from 0 to {keys - 1}, or -1 for none; got {least if least < -1 else most}"
            )
    return Indexed.of(index)


def _positive_pairs(positives: Positives, rows: int, keys: int, device: torch.device) -> Pairs:
    if positives is None:
        return Diagonal(rows)
    if isinstance(positives, (tuple, list)):
        if len(positives) != 2 or positives[0].shape != (rows,) or positives[1].shape != (keys,):
            shapes = [tuple(each.shape) for each in positives]
            raise ValueError(f"info_nce: labels as positives must be ({rows},) and ({keys},), got {shapes}")
        return SameLabel(*positives)
    if positives.layout != torch.strided:
        if positives.shape != (rows, keys):
            raise ValueError(f"info_nce: sparse positives must be ({rows}, {keys}), got {tuple(positives.shape)}")
        entries = entries_of(positives)
        (found, columns), there = entries.indices(), entries.values() != 0
        if values_are_readable(there):
            return Listed.of(found[there], columns[there], keys)
        return Listed(found.masked_fill(~there, rows), columns)
    return _indices("positives", positives, rows, keys)


def _excluded(mask: Tensor | None, rows: int, keys: int) -> tuple[tuple[Pairs, ...], Tensor | None]:
    if mask is None:
        return (), None
    if mask.dtype != torch.bool:
        return (_indices("mask", mask, rows, keys),), None
    if mask.shape != (rows, keys):
        raise ValueError(
            f"info_nce: mask must be boolean ({rows}, {keys}), True where left out, or indices ({rows}, some); got "
            f"{tuple(mask.shape)}"
        )
    return (), mask


def _guides(guide: Sequence[Tensor], query: Tensor, key: Tensor, own: _Negatives | None) -> list[Tensor]:
    """Return a guide's vectors, one matrix for each of the loss's."""
    sides = [("query", query), ("key", key)] + ([] if own is None else [("negatives", own.vectors)])
    flat = [each.detach().reshape(-1, each.shape[-1]) for each in guide]
    expected = [side.shape[0] for _, side in sides]
    if [each.shape[0] for each in flat] != expected:
        names = ", ".join(name for name, _ in sides)
        raise ValueError(
            f"info_nce: guide must hold vectors for {names}: {expected} of them, got {[each.shape[0] for each in flat]}"
        )
    return flat


@torch.no_grad()
def _thresholds(
    query: Tensor,
    key: Tensor,
    guide: Sequence[Tensor] | None,
    margin: float,
    positives: Positives,
    normalize: bool,
) -> Tensor:
    """Return the similarity above which a negative of each query is taken for a positive."""
    first, second = (query.detach(), key.detach()) if guide is None else (guide[0].detach(), guide[1].detach())
    if positives is not None:
        if not isinstance(positives, Tensor) or positives.layout != torch.strided or positives.dim() != 1:
            raise ValueError("info_nce: a margin or guide needs one positive a query: positives=None or (N,) indices")
        second = second[positives.clamp(min=0)]
    second = second[: query.shape[0]]

    def similarities(first: Tensor, second: Tensor) -> Tensor:
        found = (first.double() * second.double()).sum(1)
        if normalize or guide is not None:
            for side in (first, second):
                found = found * inverse_norms(side, torch.float64).squeeze(1)
        return found

    if transform_reason(first, second) is not None:
        found = similarities(first, second)
    else:
        parts = zip(first.split(BLOCK_ROWS), second.split(BLOCK_ROWS), strict=True)
        found = torch.cat([similarities(*part) for part in parts])
    return (found - margin).to(precision_of(query, key).compute)
