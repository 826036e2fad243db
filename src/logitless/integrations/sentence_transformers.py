"""sentence-transformers' losses with the same arguments, whose similarity matrix is never built.

Change the import and nothing else: each is a subclass of the class of its name, so that trainers, model cards, and the
losses that wrap another (`MatryoshkaLoss`, `AdaptiveLayerLoss`) take it for that. With `gather_across_devices` ranks
need not have the same number of rows, and the value is the mean over all ranks' rows, the same on every rank, where
sentence-transformers' is that of a rank's own; gradients are the same.

Written against sentence-transformers 6.2. Half-precision embeddings are added up in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import batch_to_device, similarity_fct_name
from torch import Tensor

from logitless.losses.contrastive import info_nce
from logitless.losses.guided import guided_loss
from logitless.losses.ranking import cosent_loss

__all__ = ["CachedMultipleNegativesRankingLoss", "CoSENTLoss", "GISTEmbedLoss", "MultipleNegativesRankingLoss"]

# By the name of the function: whether vectors are divided by their lengths first.
_NORMALIZED = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """`ll.info_nce` as sentence-transformers' `MultipleNegativesRankingLoss`.

    Equals `sentence_transformers.losses.MultipleNegativesRankingLoss(model, ...)` of the same arguments, in value and
    gradient. `similarity_fct` must be `cos_sim` or `dot_score`. Source, units (nats) and what it does to training: see
    `logitless.info_nce`.

    Raises:
        ValueError: another similarity, or fewer than two columns.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the class of this name."""
        super().__init__(*args, **kwargs)
        _normalized(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss of columns of embeddings: queries, their documents, and any hard negatives."""
        return _ranking(self, embeddings)


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """`ll.info_nce` behind GradCache, as sentence-transformers' `CachedMultipleNegativesRankingLoss`.

    Equals `sentence_transformers.losses.CachedMultipleNegativesRankingLoss(model, ...)` of the same arguments, in value
    and gradient. The encoder runs by mini-batches, as there; the loss stage runs once, on the whole batch. Source,
    units and what it does to training: see `logitless.info_nce`.

    Raises:
        ValueError: a similarity other than `cos_sim` or `dot_score`, or fewer than two columns.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the class of this name."""
        super().__init__(*args, **kwargs)
        _normalized(self)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of mini-batches of embeddings; with `with_backward`, without a graph, which has been run."""
        loss = _ranking(self, [torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class GISTEmbedLoss(theirs.GISTEmbedLoss):
    """sentence-transformers' `GISTEmbedLoss` without its similarity matrices, the guide's among them.

    Equals `sentence_transformers.losses.GISTEmbedLoss(model, guide, ...)` of the same arguments, in value and gradient.
    Guide similarities within 1e-6 of the threshold are ties, which stay in. What the guide takes for a false negative
    does not push; source and units (nats): Solatorio, 2024.

    Raises:
        ValueError: other than two or three columns.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Return the loss of columns of tokenized texts: anchors, positives, and any negatives."""
        columns = list(sentence_features)
        guided = [dict(column) for column in columns]  # the guide writes its outputs into what it is given
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guided = [self._for_the_guide(column) for column in columns]
            guides = embed_columns(self.guide, guided)
        return self.compute_loss_from_embeddings(embeddings, guides)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        """Return the loss of columns of embeddings, and the guide's of the same texts."""
        if len(embeddings) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(embeddings)}")
        return guided_loss(
            embeddings,
            guides,
            temperature=self.temperature,
            margin=self.margin,
            relative=self.margin_strategy == "relative",
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            group=_group(self.gather_across_devices),
        )

    def _for_the_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same texts by the guide's own tokenizer."""
        ids: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:  # texts that lie end to end
            ends = column["cu_seq_lens_q"].tolist()
            ids = [ids[0].tolist()[start:end] for start, end in itertools.pairwise(ends)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        moved: dict[str, Tensor] = batch_to_device(self.guide.preprocess(texts), self.guide.device)
        return moved


class CoSENTLoss(theirs.CoSENTLoss):
    """`ll.cosent_loss` as sentence-transformers' `CoSENTLoss`, in float64 and O(N log N).

    Equals `sentence_transformers.losses.CoSENTLoss(model, scale, similarity_fct)`, in value and gradient, with any
    `similarity_fct` of pairs. Source and what it does to training: see `logitless.cosent_loss`.

    Raises:
        ValueError: other than one label a pair.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of two columns of embeddings."""
        pairs = embeddings[0].shape[0]
        if labels.numel() != pairs:
            raise ValueError(
                f"{type(self).__name__} expects {pairs} labels (one per example), but got {labels.numel()} labels with "
                f"shape {tuple(labels.shape)}."
            )
        scores = self.similarity_fct(embeddings[0], embeddings[1])
        grades = labels.view(-1)
        return cosent_loss(scores, grades.int() if grades.dtype == torch.bool else grades, scale=self.scale)


def _normalized(loss: Any) -> bool:
    """Say whether a loss compares by cosines; raise where it is by neither these nor dot products."""
    name = similarity_fct_name(loss.similarity_fct)
    if name not in _NORMALIZED:
        raise ValueError(
            f"{type(loss).__name__}: similarity_fct must be cos_sim or dot_score, whose matrix need not be built; got "
            f"{name}. For another, use sentence_transformers.losses.{type(loss).__name__}"
        )
    return _NORMALIZED[name]


def _ranking(loss: Any, embeddings: list[Tensor]) -> Tensor:
    if len(embeddings) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
    query, document, *further = embeddings
    hardness = loss.hardness_mode if loss.hardness_strength > 0 else None
    return info_nce(
        query,
        document,
        scale=loss.scale,
        negatives=torch.stack(further, 1) if further else None,
        negative_mode="unpaired" if further else None,
        directions=tuple(dict.fromkeys(loss.directions)),
        partition=loss.partition_mode,
        hardness=hardness,
        hardness_strength=loss.hardness_strength,
        normalize=_normalized(loss),
        group=_group(loss.gather_across_devices),
    )


def _group(gather: bool) -> dist.ProcessGroup | None:
    """Return the processes that are gathered from; none where there is one, as sentence-transformers has it."""
    return dist.group.WORLD if gather and dist.is_available() and dist.is_initialized() else None
