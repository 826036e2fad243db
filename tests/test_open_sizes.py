"""torch.export with a batch whose size stays open: the program answers for another number of rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
import logitless.nn as LN

CLASSES, WIDTH = 7, 3


def operand(kind: str, rows: int) -> Tensor:
    make = torch.Generator().manual_seed(rows)
    if kind == "target":
        return torch.randint(CLASSES, (rows,), generator=make)
    if kind == "sign":
        return torch.where(torch.rand(rows, generator=make) > 0.5, 1, -1)
    if kind == "chance":
        return torch.rand(rows, CLASSES, generator=make)
    return torch.randn(rows, WIDTH if kind == "hidden" else CLASSES, generator=make)


class Calls(torch.nn.Module):
    """A function of its operands and of a head."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.head = torch.nn.Parameter(torch.linspace(-1, 1, CLASSES * WIDTH).view(CLASSES, WIDTH))

    def forward(self, *given: Tensor) -> Any:
        return self.function(self.head, *given)


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
WEIGHT = torch.linspace(0.5, 1.5, CLASSES)
MODULES: dict[str, tuple[torch.nn.Module, tuple[str, ...]]] = {
    "CrossEntropyLoss": (LN.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), ("logits", "target")),
    "CrossEntropyLoss of probabilities": (LN.CrossEntropyLoss(), ("logits", "chance")),
    "NLLLoss": (LN.NLLLoss(WEIGHT), ("logits", "target")),
    "KLDivLoss": (LN.KLDivLoss(reduction="batchmean"), ("logits", "chance")),
    "BCELoss": (LN.BCELoss(), ("chance", "chance")),
    "BCEWithLogitsLoss": (LN.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), ("logits", "chance")),
    "CosineSimilarity": (LN.CosineSimilarity(), ("logits", "chance")),
    "CosineEmbeddingLoss": (LN.CosineEmbeddingLoss(), ("logits", "chance", "sign")),
    "token_stats": (Calls(lambda w, z, t: ll.token_stats(z, t)[:3]), ("logits", "target")),
    "pair_stats": (Calls(lambda w, z, p, t: ll.pair_stats(z, p, t)[:8]), ("logits", "chance", "target")),
    "entropy": (Calls(lambda w, z: ll.entropy(z, reduction="mean")), ("logits",)),
    "kl": (Calls(lambda w, z, p: ll.kl(z, p)), ("logits", "chance")),
    "js": (Calls(lambda w, z, p: ll.js(z, p, reduction="mean")), ("logits", "chance")),
    "linear_cross_entropy": (Calls(lambda w, h, t: LF.linear_cross_entropy(h, w, t)), ("hidden", "target")),
    "lazy token_stats": (Calls(lambda w, h, t: ll.token_stats(ll.linear(h, w), t).nll), ("hidden", "target")),
    "lazy kl": (Calls(lambda w, h, z: ll.kl(ll.linear(h, w), z)), ("hidden", "logits")),
    "lazy entropy": (Calls(lambda w, h: ll.entropy(ll.linear(h, w), reduction="mean")), ("hidden",)),
    "lazy binary": (
        Calls(lambda w, h, p: LF.binary_cross_entropy_with_logits(ll.linear(h, w), p)),
        ("hidden", "chance"),
    ),
    "lazy logsumexp": (Calls(lambda w, h: ll.linear(h, w).logsumexp(-1)), ("hidden",)),
    "token_stats, top_k": (
        Calls(lambda w, z, t: ll.token_stats(z, t, temperature=0.5, top_k=3)),
        ("logits", "target"),
    ),
    "pair_stats, temperature": (Calls(lambda w, z, p: ll.pair_stats(z, p, temperature=2.0)[:6]), ("logits", "chance")),
    "log_probs": (Calls(lambda w, z, t: ll.log_probs(z, t)), ("logits", "target")),
    "log_probs, temperature": (Calls(lambda w, z, t: ll.log_probs(z, t, temperature=2.0)), ("logits", "target")),
    "entropy, temperature": (Calls(lambda w, z: ll.entropy(z, temperature=2.0)), ("logits",)),
    "kl, skew": (Calls(lambda w, z, p: ll.kl(z, p, skew=0.1, reduction="mean")), ("logits", "chance")),
    "js, beta": (Calls(lambda w, z, p: ll.js(z, p, beta=0.2)), ("logits", "chance")),
    "tv": (Calls(lambda w, z, p: ll.tv(z, p, temperature=2.0)), ("logits", "chance")),
    "lazy token_stats, top_k": (
        Calls(lambda w, h, t: ll.token_stats(ll.linear(h, w), t, temperature=0.5, top_k=3)),
        ("hidden", "target"),
    ),
    "lazy log_probs": (Calls(lambda w, h, t: ll.log_probs(ll.linear(h, w), t)), ("hidden", "target")),
    "lazy kl, skew": (Calls(lambda w, h, z: ll.kl(ll.linear(h, w), z, skew=0.1)), ("hidden", "logits")),
    "lazy js, beta": (
        Calls(lambda w, h, z: ll.js(z, ll.linear(h, w), beta=0.8, reduction="sum")),
        ("hidden", "logits"),
    ),
    "lazy tv": (Calls(lambda w, h, z: ll.tv(ll.linear(h, w), z)), ("hidden", "logits")),
    "pairwise_cosine": (Calls(lambda w, z, p: ll.pairwise_cosine(z, p)), ("logits", "chance")),
    "info_nce": (LN.InfoNCELoss(temperature=0.5), ("logits", "chance")),
    "info_nce, all directions": (
        Calls(lambda w, z, p: ll.info_nce(z, p, temperature=0.5, negatives=z + p, directions=DIRECTIONS)),
        ("logits", "chance"),
    ),
    "info_nce, options": (
        Calls(
            lambda w, z, p, t: ll.info_nce(
                z,
                p,
                scale=2.0,
                positives=t % 2,
                false_negative_margin=0.0,
                hardness="all_negatives",
                hardness_strength=0.5,
            )
        ),
        ("logits", "chance", "target"),
    ),
    "info_nce, labels": (
        Calls(lambda w, z, p, t: ll.info_nce(z, p, temperature=0.5, positives=(t, t), reduction="none")),
        ("logits", "chance", "target"),
    ),
    "clip_loss": (Calls(lambda w, z, p: ll.clip_loss(z, p, 2.0)), ("logits", "chance")),
    "siglip_loss": (Calls(lambda w, z, p: ll.siglip_loss(z, p, 2.0, -1.0)), ("logits", "chance")),
    "supcon_loss": (Calls(lambda w, z, t: ll.supcon_loss(z, t, temperature=0.5)), ("logits", "target")),
    "cosent_loss": (Calls(lambda w, z, p, t: ll.cosent_loss((z, p), t)), ("logits", "chance", "target")),
    "batch_triplet_loss": (Calls(lambda w, z, t: ll.batch_triplet_loss(z, t % 2)), ("logits", "target")),
    "batch_triplet_loss, all": (
        Calls(lambda w, z, t: ll.batch_triplet_loss(z, t % 2, kind="all", distance="cosine", margin=0.5)),
        ("logits", "target"),
    ),
    "batch_triplet_loss, semi_hard": (
        Calls(lambda w, z, t: ll.batch_triplet_loss(z, t % 2, kind="semi_hard")),
        ("logits", "target"),
    ),
}
STRICT = ("CrossEntropyLoss", "BCELoss", "pair_stats", "lazy kl")


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODULES), *((name, True) for name in STRICT)])
def test_another_batch(name: str, strict: bool) -> None:
    module, kinds = MODULES[name]
    sizes: Any = tuple({0: torch.export.Dim("rows", min=2, max=4096)} for _ in kinds)
    if isinstance(module, Calls):
        sizes = (sizes,)
    program = torch.export.export(
        module, tuple(operand(kind, 4) for kind in kinds), dynamic_shapes=sizes, strict=strict
    )
    for rows in (4, 9):
        given = [operand(kind, rows) for kind in kinds]
        torch.testing.assert_close(program.module()(*given), module(*given))
