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
