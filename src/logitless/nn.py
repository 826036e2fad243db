"""The loss modules of `torch.nn`, with its names, constructors, repr, state and semantics.

Each is a subclass of torch's module of the same name whose `forward` is the function in `logitless.functional`. Those
of contrastive losses, which torch lacks, come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from logitless import functional as F
from logitless._rules.reduction import Empty, Normalizer, check_empty, check_normalizer
from logitless.lazy.logits import LazyLogits
from logitless.losses import contrastive, ranking

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "BatchTripletLoss",
    "ClipLoss",
    "CoSENTLoss",
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "CrossEntropyLoss",
    "InfoNCELoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "NLLLoss",
    "SigLipLoss",
    "SupConLoss",
]


def _extra_repr(**options: object) -> str:
    """Return the options that differ from torch's behaviour; nothing, as torch, where none does."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items() if value not in (None, "nan"))


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`logitless.functional.cross_entropy` as a module.

    Equals `torch.nn.CrossEntropyLoss(weight, ...)(input, target)`, and takes LazyLogits too. `class_dim`,
    `normalizer`, `empty` and `backend` are the function's. Source, shapes, units (nats), errors and what it does to
    training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.CrossEntropyLoss()(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
    tensor(0.2395)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_dim: int | None = None,
        normalizer: Normalizer = None,
        empty: Empty = "nan",
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        check_normalizer(normalizer, self.reduction)
        check_empty(empty)
        self.class_dim = class_dim
        self.normalizer = normalizer
        self.empty = empty
        self.backend = backend

    def forward(self, input: Tensor | LazyLogits, target: Tensor) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            class_dim=self.class_dim,
            normalizer=self.normalizer,
            empty=self.empty,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(class_dim=self.class_dim, normalizer=self.normalizer, empty=self.empty, backend=self.backend)


class NLLLoss(torch.nn.NLLLoss):
    """`logitless.functional.nll_loss` as a module.

    Equals `torch.nn.NLLLoss(weight, ...)(input, target)`. `class_dim`, `normalizer`, `empty` and `backend` are the
    function's. Source, shapes, units (nats), errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.NLLLoss()(torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([0]))
    tensor(0.3567)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        class_dim: int | None = None,
        normalizer: Normalizer = None,
        empty: Empty = "nan",
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        check_normalizer(normalizer, self.reduction)
        check_empty(empty)
        self.class_dim = class_dim
        self.normalizer = normalizer
        self.empty = empty
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return F.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            class_dim=self.class_dim,
            normalizer=self.normalizer,
            empty=self.empty,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(class_dim=self.class_dim, normalizer=self.normalizer, empty=self.empty, backend=self.backend)


class KLDivLoss(torch.nn.KLDivLoss):
    """`logitless.functional.kl_div` as a module.

    Equals `torch.nn.KLDivLoss(...)(input, target)`; `reduction` may also be "rowmean". `class_dim` and `backend` are
    the function's. Source, shapes, units (nats), errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.KLDivLoss(reduction="batchmean")(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    tensor(0.6931)
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        class_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(size_average, reduce, reduction, log_target)
        self.class_dim = class_dim
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return F.kl_div(
            input,
            target,
            reduction=self.reduction,
            log_target=self.log_target,
            class_dim=self.class_dim,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(class_dim=self.class_dim, backend=self.backend)


class BCELoss(torch.nn.BCELoss):
    """`logitless.functional.binary_cross_entropy` as a module.

    Equals `torch.nn.BCELoss(weight, ...)(input, target)`. `class_dim`, `normalizer` and `backend` are the function's.
    Source, shapes, units (nats), errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.BCELoss()(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
    tensor(0.1643)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        class_dim: int | None = None,
        normalizer: Normalizer = None,
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(weight, size_average, reduce, reduction)
        check_normalizer(normalizer, self.reduction)
        self.class_dim = class_dim
        self.normalizer = normalizer
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return F.binary_cross_entropy(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            class_dim=self.class_dim,
            normalizer=self.normalizer,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(class_dim=self.class_dim, normalizer=self.normalizer, backend=self.backend)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """`logitless.functional.binary_cross_entropy_with_logits` as a module.

    Equals `torch.nn.BCEWithLogitsLoss(weight, ...)(input, target)`, and takes LazyLogits too. `class_dim`,
    `normalizer` and `backend` are the function's. Source, shapes, units (nats), errors and what it does to training:
    see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.BCEWithLogitsLoss()(torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.0]))
    tensor(0.0878)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        class_dim: int | None = None,
        normalizer: Normalizer = None,
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        check_normalizer(normalizer, self.reduction)
        self.class_dim = class_dim
        self.normalizer = normalizer
        self.backend = backend

    def forward(self, input: Tensor | LazyLogits, target: Tensor) -> Tensor:
        """Return the loss."""
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
            class_dim=self.class_dim,
            normalizer=self.normalizer,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(class_dim=self.class_dim, normalizer=self.normalizer, backend=self.backend)


class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss):
    """`logitless.functional.cosine_embedding_loss` as a module.

    Equals `torch.nn.CosineEmbeddingLoss(margin, ...)(input1, input2, target)`. `backend` is the function's. Source,
    shapes, errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.CosineEmbeddingLoss()(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), torch.tensor([1]))
    tensor(0.0400)
    """

    def __init__(
        self,
        margin: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(margin, size_average, reduce, reduction)
        self.backend = backend

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return F.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction, backend=self.backend
        )

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(backend=self.backend)


class CosineSimilarity(torch.nn.CosineSimilarity):
    """`logitless.functional.cosine_similarity` as a module.

    Equals `torch.nn.CosineSimilarity(dim, eps)(x1, x2)`. `backend` is the function's. Source, shapes, errors and what
    it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.CosineSimilarity()(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    tensor([0.9600])
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8, *, backend: str | None = None) -> None:
        """Take torch's arguments, and the function's own."""
        super().__init__(dim, eps)
        self.backend = backend

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the similarity."""
        return F.cosine_similarity(x1, x2, self.dim, self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        """Return the options that are not torch's."""
        return _extra_repr(backend=self.backend)


# torch has the class from 2.13 on; before that there is nothing for isinstance to find.
_LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):  # type: ignore[misc,valid-type] # the base depends on torch
    """`logitless.functional.linear_cross_entropy` as a module that holds the head.

    Equals `torch.nn.LinearCrossEntropyLoss(in_features, num_classes, ...)(input, target)`, with its parameters' names
    and shapes. `scale`, `softcap`, `normalizer`, `empty`, `max_bytes` and `backend` are the function's. Source, shapes,
    units (nats), errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> head = nn.LinearCrossEntropyLoss(3, 4)
    >>> head(torch.zeros(2, 3), torch.tensor([0, 3])).item() == torch.tensor(4.0).log().item()
    True
    """

    ignore_index: int | None
    label_smoothing: float

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        scale: float | Tensor = 1.0,
        softcap: float | None = None,
        normalizer: Normalizer = None,
        empty: Empty = "nan",
        max_bytes: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Take torch's arguments, and the function's own."""
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        _WeightedLoss.__init__(self, weight=weight, size_average=None, reduce=None, reduction=reduction)
        check_normalizer(normalizer, reduction)
        check_empty(empty)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        # Flat, as in torch, so that states load from one into the other.
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.options = options
        self.scale = scale
        self.softcap = softcap
        self.normalizer = normalizer
        self.empty = empty
        self.max_bytes = max_bytes
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            scale=self.scale,
            softcap=self.softcap,
            normalizer=self.normalizer,
            empty=self.empty,
            max_bytes=self.max_bytes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return torch's description, and the options that are not torch's."""
        torchs = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, options={self.options}"
        )
        own = _extra_repr(
            scale=None if isinstance(self.scale, float) and self.scale == 1.0 else self.scale,
            softcap=self.softcap,
            normalizer=self.normalizer,
            empty=self.empty,
            max_bytes=self.max_bytes,
            backend=self.backend,
        )
        return f"{torchs}, {own}" if own else torchs


class InfoNCELoss(torch.nn.Module):
    """`logitless.info_nce` as a module; a temperature or scale that is a Parameter is one of the module's.

    Equals `logitless.info_nce(query, key, temperature=temperature, ...)`. Source, shapes, units (nats), errors and what
    it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.InfoNCELoss(temperature=0.5)(torch.eye(3), torch.eye(3))
    tensor(0.2395)
    """

    def __init__(
        self,
        *,
        temperature: Tensor | float | None = None,
        scale: Tensor | float | None = None,
        negative_mode: Literal["paired", "unpaired"] | None = None,
        false_negative_margin: float | None = None,
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
    ) -> None:
        """Take the function's options."""
        super().__init__()
        self.temperature = temperature
        self.scale = scale
        self.negative_mode: Literal["paired", "unpaired"] | None = negative_mode
        self.false_negative_margin = false_negative_margin
        self.directions = tuple(directions)
        self.partition: Literal["joint", "per_direction"] = partition
        self.symmetric = symmetric
        self.hardness = hardness
        self.hardness_strength = hardness_strength
        self.normalize = normalize
        self.reduction = reduction
        self.group = group
        self.exchange: Literal["gather", "ring"] = exchange
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        negatives_mask: Tensor | None = None,
        positives: Tensor | tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        guide: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the loss."""
        return contrastive.info_nce(
            query,
            key,
            temperature=self.temperature,
            scale=self.scale,
            negatives=negatives,
            negative_mode=None if negatives is None else self.negative_mode,
            negatives_mask=negatives_mask,
            positives=positives,
            mask=mask,
            false_negative_margin=self.false_negative_margin,
            guide=guide,
            directions=self.directions,
            partition=self.partition,
            symmetric=self.symmetric,
            hardness=self.hardness,
            hardness_strength=self.hardness_strength,
            normalize=self.normalize,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


class _OfImagesAndTexts(torch.nn.Module):
    """A loss of pairs that is called as open_clip calls its own: `output_dict` is passed with each call."""

    _function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        exchange: Literal["gather", "ring"] = "gather",
        backend: str | None = None,
    ) -> None:
        """Take the function's options."""
        super().__init__()
        self.group = group
        self.exchange: Literal["gather", "ring"] = exchange
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss."""
        loss = self._function(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class ClipLoss(_OfImagesAndTexts):
    """`logitless.clip_loss` as a module.

    Equals `logitless.clip_loss(image_features, text_features, logit_scale)`. Source, shapes, units (nats), errors and
    what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.ClipLoss()(torch.eye(3), torch.eye(3), 2.0)
    tensor(0.2395)
    """

    _function = staticmethod(contrastive.clip_loss)


class SigLipLoss(_OfImagesAndTexts):
    """`logitless.siglip_loss` as a module.

    Equals `logitless.siglip_loss(image_features, text_features, logit_scale, logit_bias)`. Source, shapes, units
    (nats), errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.SigLipLoss()(torch.eye(3), torch.eye(3), 2.0, -1.0)
    tensor(0.9398)
    """

    _function = staticmethod(contrastive.siglip_loss)


class SupConLoss(torch.nn.Module):
    """`logitless.supcon_loss` as a module; a temperature that is a Parameter is one of the module's.

    Equals `logitless.supcon_loss(features, labels, temperature=temperature, ...)`. Source, shapes, units (nats), errors
    and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.SupConLoss(temperature=0.5)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    tensor(1.0986)
    """

    def __init__(
        self,
        temperature: Tensor | float = 0.07,
        contrast_mode: Literal["all", "one"] = "all",
        base_temperature: float | None = None,
        *,
        normalize: bool = False,
        without_positive: Literal["left_out", "zero"] = "left_out",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        """Take the function's options."""
        super().__init__()
        self.temperature = temperature
        self.contrast_mode: Literal["all", "one"] = contrast_mode
        self.base_temperature = base_temperature
        self.normalize = normalize
        self.without_positive: Literal["left_out", "zero"] = without_positive
        self.reduction = reduction
        self.backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the loss."""
        return contrastive.supcon_loss(
            features,
            labels,
            mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            normalize=self.normalize,
            without_positive=self.without_positive,
            reduction=self.reduction,
            backend=self.backend,
        )


class CoSENTLoss(torch.nn.Module):
    """`logitless.cosent_loss` as a module; a scale that is a Parameter is one of the module's.

    Equals `logitless.cosent_loss(scores, labels, scale=scale)`. Source, shapes, errors and what it does to training:
    see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.CoSENTLoss()(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1.0, 0.0, 0.0]))
    tensor(0.1269)
    """

    def __init__(self, scale: Tensor | float = 20.0) -> None:
        """Take the function's options."""
        super().__init__()
        self.scale = scale

    def forward(self, scores: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss."""
        return ranking.cosent_loss(scores, labels, scale=self.scale)


class BatchTripletLoss(torch.nn.Module):
    """`logitless.batch_triplet_loss` as a module.

    Equals `logitless.batch_triplet_loss(features, labels, kind=kind, margin=margin, distance=distance)`. Source,
    shapes, errors and what it does to training: see the function.

    >>> import torch, logitless.nn as nn
    >>> nn.BatchTripletLoss(margin=2.0)(torch.tensor([[0.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
    tensor(0.7500)
    """

    def __init__(
        self,
        kind: Literal["hard", "semi_hard", "all"] = "hard",
        margin: float = 5.0,
        distance: Literal["euclidean", "cosine"] = "euclidean",
    ) -> None:
        """Take the function's options."""
        super().__init__()
        self.kind: Literal["hard", "semi_hard", "all"] = kind
        self.margin = margin
        self.distance: Literal["euclidean", "cosine"] = distance

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        return ranking.batch_triplet_loss(features, labels, kind=self.kind, margin=self.margin, distance=self.distance)
