"""Cases of contrastive losses: pairs of vectors, whose matrix of similarities is or is not built."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless._bench.protocol import Case
from logitless._bench.providers import BOTH, Call, Inputs, Loss, Outcome, Provider, bare, eager, ours
from logitless.losses import contrastive, similarity

PAIRS = 4096
MANY_PAIRS = 16384
FEATURES = 512
_SCALE, _BIAS = 20.0, -10.0
_STRIP_ROWS = 1024
_CROSSED = 256, 128, 256
_MINI_BATCH = 512  # of a peer, which is several times slower by its own 32


def similarity_cases(pairs: int, many: int, features: int) -> Iterator[Case]:
    """Yield the symmetric loss and SigLIP's, of pairs beside the dense loss and of many beside their products."""
    losses: Sequence[tuple[str, Loss, Loss]] = (
        ("clip_loss", _clip, _dense_clip),
        ("siglip_loss", _siglip, _dense_siglip),
    )
    for name, loss, dense in losses:
        for rows in (pairs, many):
            needs = 6 * rows * rows * torch.float32.itemsize
            providers = (ours(loss), _products(), eager(dense, needs_bytes=needs))
            yield _case(name, (rows, features, rows), providers, dense)
    needs = 3 * many * many * torch.float32.itemsize
    known = (ours(_info_nce), _cached_stage(), _products(), eager(_dense_info_nce, needs_bytes=needs))
    yield _case("info_nce", (many, features, many), known, _dense_info_nce)
    crossed = _all_pairs(similarity.cosine_similarity), _all_pairs(torch_functional.cosine_similarity)
    yield _case("cosine_similarity, all pairs", _CROSSED, (ours(crossed[0]), eager(crossed[1])), crossed[1])


def _case(name: str, shape: tuple[int, int, int], providers: Sequence[Provider], truth: Loss) -> Case:
    def make(rows: int) -> Inputs:
        return tuple(torch_functional.normalize(torch.randn(rows, shape[1]), dim=1) for _ in range(2))

    return Case("similarity", name, shape, torch.float32, make, providers, truth, (0, 1), (BOTH,), memory=True)


def _clip(image: Tensor, text: Tensor) -> Tensor:
    return contrastive.clip_loss(image, text, _SCALE)


def _siglip(image: Tensor, text: Tensor) -> Tensor:
    return contrastive.siglip_loss(image, text, _SCALE, _BIAS)


def _dense_clip(image: Tensor, text: Tensor) -> Tensor:
    logits = _SCALE * image @ text.T
    own = torch.arange(len(logits))
    return (torch_functional.cross_entropy(logits, own) + torch_functional.cross_entropy(logits.T, own)) / 2


def _dense_siglip(image: Tensor, text: Tensor) -> Tensor:
    logits = _SCALE * image @ text.T + _BIAS
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -torch_functional.logsigmoid(labels * logits).sum() / len(logits)


def _info_nce(query: Tensor, key: Tensor) -> Tensor:
    return contrastive.info_nce(query, key, scale=_SCALE)


def _dense_info_nce(query: Tensor, key: Tensor) -> Tensor:
    cosines = torch_functional.normalize(query, dim=1) @ torch_functional.normalize(key, dim=1).T
    return torch_functional.cross_entropy(_SCALE * cosines, torch.arange(len(query)))


def _all_pairs(cosine: Callable[..., Tensor]) -> Loss:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return cosine(x.unsqueeze(1), y.unsqueeze(0), dim=-1).square().mean()

    return loss


def _cached_stage() -> Provider:
    """Return sentence-transformers' cached loss behind the model: the loss of vectors, and their gradients."""

    def prepare(inputs: Inputs, leaves: Sequence[int], mode: str) -> Call:
        losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
        loss = losses.CachedMultipleNegativesRankingLoss(
            [torch.nn.Identity()], scale=_SCALE, mini_batch_size=_MINI_BATCH
        )
        arguments = [x.detach().requires_grad_() for x in inputs]

        def stage() -> Outcome:
            value = loss.calculate_loss([[x] for x in arguments], with_backward=True)
            gradients = tuple(x.grad for x in arguments)
            for x in arguments:
                x.grad = None
            return value.detach(), gradients

        return stage

    name = "sentence-transformers' cached loss stage"
    return Provider(name, "peer", prepare, (BOTH,), plain=False, needs=("sentence_transformers",))


def _products() -> Provider:
    """Return the four products of a strip at a time, into kept memory: the logits twice, and their gradients."""

    def both(inputs: Inputs) -> Callable[[], object]:
        image, text = inputs
        strip = image.new_empty(min(_STRIP_ROWS, len(image)), len(text))
        grads = torch.empty_like(image), torch.empty_like(text)

        def products() -> None:
            for rows, to_image in zip(image.split(_STRIP_ROWS), grads[0].split(_STRIP_ROWS), strict=True):
                logits = strip[: len(rows)]
                for _ in range(2):
                    torch.mm(rows, text.T, out=logits)
                torch.mm(logits, text, out=to_image)
                grads[1].addmm_(logits.T, rows)

        return products

    return bare("bare products", "limit", {BOTH: both})
