"""torch.jit.trace and make_fx record what is computed: the graph answers for other inputs than those it was made of."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import logitless as ll
import logitless.functional as LF

ROWS, CLASSES, WIDTH = 5, 7, 3
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def operands(seed: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(ROWS, size, generator=make) for size in (CLASSES, CLASSES, WIDTH)]
    target = torch.randint(CLASSES, (ROWS,), generator=make)
    return [*drawn, torch.randn(CLASSES, WIDTH, generator=make), target]


def total(values: tuple[Tensor | None, ...]) -> Tensor:
    return sum((v.sum() for v in values if v is not None and v.is_floating_point()), torch.zeros(()))


# Each of logits z and y, hidden states h, a head w and a target t.
CALLS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda z, y, h, w, t: LF.cross_entropy(z, t),
    "cross_entropy, each row": lambda z, y, h, w, t: LF.cross_entropy(z, t, reduction="none"),
    "cross_entropy, options": lambda z, y, h, w, t: LF.cross_entropy(z, t, w[:, 0].abs(), label_smoothing=0.1),
    "cross_entropy, one row": lambda z, y, h, w, t: LF.cross_entropy(z[0], t[0]),
    "probabilities": lambda z, y, h, w, t: LF.cross_entropy(z, y.softmax(1)),
    "nll_loss": lambda z, y, h, w, t: LF.nll_loss(z, t, w[:, 0]),
    "kl_div": lambda z, y, h, w, t: LF.kl_div(z, y.sigmoid(), reduction="batchmean"),
    "kl_div of logarithms": lambda z, y, h, w, t: LF.kl_div(z, y, reduction="sum", log_target=True),
    "binary_cross_entropy": lambda z, y, h, w, t: LF.binary_cross_entropy(z.sigmoid(), y.sigmoid()),
    "binary_cross_entropy_with_logits": lambda z, y, h, w, t: LF.binary_cross_entropy_with_logits(z, y.sigmoid()),
    "cosine_similarity": lambda z, y, h, w, t: LF.cosine_similarity(z, y),
    "cosine_embedding_loss": lambda z, y, h, w, t: LF.cosine_embedding_loss(z, y, y[:, 0].sign()),
    "linear_cross_entropy": lambda z, y, h, w, t: LF.linear_cross_entropy(h, w, t),
    "linear_cross_entropy, each row": lambda z, y, h, w, t: LF.linear_cross_entropy(h, w, t, reduction="none"),
    "token_stats": lambda z, y, h, w, t: total(ll.token_stats(z, t)),
    "pair_stats": lambda z, y, h, w, t: total(ll.pair_stats(z, y, t)),
    "entropy": lambda z, y, h, w, t: ll.entropy(z),
    "kl": lambda z, y, h, w, t: ll.kl(z, y),
    "js": lambda z, y, h, w, t: ll.js(z, y),
    "lazy cross_entropy": lambda z, y, h, w, t: LF.cross_entropy(ll.linear(h, w), t),
    "lazy binary": lambda z, y, h, w, t: LF.binary_cross_entropy_with_logits(ll.linear(h, w), y.sigmoid()),
    "lazy token_stats": lambda z, y, h, w, t: total(ll.token_stats(ll.linear(h, w), t)),
    "lazy kl": lambda z, y, h, w, t: ll.kl(ll.linear(h, w), y, reduction="mean"),
    "lazy log_softmax": lambda z, y, h, w, t: ll.linear(h, w).log_softmax(-1).gather(-1, t.unsqueeze(1)),
    "lazy logsumexp": lambda z, y, h, w, t: ll.linear(h, w).logsumexp(-1),
    "lazy max": lambda z, y, h, w, t: ll.linear(h, w).max(-1).values,
    "token_stats, top_k": lambda z, y, h, w, t: total(ll.token_stats(z, t, temperature=0.5, top_k=3)),
    "pair_stats, temperature": lambda z, y, h, w, t: total(ll.pair_stats(z, y, t, temperature=2.0)),
    "log_probs": lambda z, y, h, w, t: ll.log_probs(z, t),
    "kl, skew": lambda z, y, h, w, t: ll.kl(z, y, skew=0.1),
    "js, beta": lambda z, y, h, w, t: ll.js(z, y, beta=0.2, reduction="mean"),
    "tv": lambda z, y, h, w, t: ll.tv(z, y, temperature=2.0),
    "lazy token_stats, top_k": lambda z, y, h, w, t: total(ll.token_stats(ll.linear(h, w), t, top_k=3)),
    "lazy log_probs": lambda z, y, h, w, t: ll.log_probs(ll.linear(h, w), t, temperature=0.5),
    "lazy kl, skew": lambda z, y, h, w, t: ll.kl(ll.linear(h, w), y, skew=0.1),
    "lazy js, beta": lambda z, y, h, w, t: ll.js(y, ll.linear(h, w), beta=0.8, reduction="mean"),
    "lazy tv": lambda z, y, h, w, t: ll.tv(ll.linear(h, w), ll.linear(h.flip(0), w)),
    "pairwise_cosine": lambda z, y, h, w, t: ll.pairwise_cosine(z, y),
    "pairwise_cosine, out": lambda z, y, h, w, t: (
        ll.pairwise_cosine(z.detach(), y.detach(), out=torch.empty(ROWS, ROWS)) + z.sum()
    ),
    "info_nce": lambda z, y, h, w, t: ll.info_nce(z, y, temperature=w[0, 0].square() + 0.5),
    "info_nce, all directions": lambda z, y, h, w, t: ll.info_nce(
        z, y, scale=2.0, negatives=z + y, directions=DIRECTIONS, false_negative_margin=0.1
    ),
    "info_nce, own negatives": lambda z, y, h, w, t: ll.info_nce(
        z, y, scale=2.0, negatives=torch.stack([y, z + y], 1), hardness="hard_negatives", hardness_strength=0.5
    ),
    "info_nce, shared negatives": lambda z, y, h, w, t: ll.info_nce(
        z,
        y,
        scale=2.0,
        negatives=torch.stack([y, z + y], 1),
        negative_mode="unpaired",
        hardness="in_batch_negatives",
        hardness_strength=0.5,
    ),
    "info_nce, positives": lambda z, y, h, w, t: ll.info_nce(z, y, scale=2.0, positives=t % 2, mask=t.flip(0) % 3),
    "info_nce, some positives": lambda z, y, h, w, t: ll.info_nce(
        z, y, scale=2.0, positives=torch.stack([t % 3, t % 2 - 1], 1), mask=y[:, :ROWS] > 0
    ),
    "info_nce, labels": lambda z, y, h, w, t: ll.info_nce(z, y, scale=2.0, positives=(t % 3, t.flip(0) % 3)),
    "info_nce, guide": lambda z, y, h, w, t: ll.info_nce(z, y, scale=2.0, guide=(h, h.flip(0)), symmetric=True),
    "clip_loss": lambda z, y, h, w, t: ll.clip_loss(z, y, w[0, 0].exp()),
    "siglip_loss": lambda z, y, h, w, t: ll.siglip_loss(z, y, w[0, 0].exp(), w[0, 1]),
    "supcon_loss": lambda z, y, h, w, t: ll.supcon_loss(torch.stack([z, y], 1), t % 3, temperature=0.5),
    "supcon_loss, mask": lambda z, y, h, w, t: ll.supcon_loss(
        z, mask=(t.unsqueeze(1) % 2 == t % 2).float(), temperature=0.5, contrast_mode="one"
    ),
    "cosent_loss": lambda z, y, h, w, t: ll.cosent_loss((z, y), t, scale=2.0),
    "batch_triplet_loss": lambda z, y, h, w, t: ll.batch_triplet_loss(z, t % 2),
    "batch_triplet_loss, semi_hard": lambda z, y, h, w, t: ll.batch_triplet_loss(z, t % 2, kind="semi_hard"),
    "batch_triplet_loss, all": lambda z, y, h, w, t: ll.batch_triplet_loss(
        z, t % 2, kind="all", distance="cosine", margin=0.5
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_jit_trace(name: str) -> None:
    call = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's of torch.jit.trace itself
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes are read, as torch's Python losses do
        traced: Any = torch.jit.trace(call, tuple(operands(1)))
    for seed in (1, 2):
        torch.testing.assert_close(traced(*operands(seed)), call(*operands(seed)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CALLS)
def test_make_fx(name: str, mode: str) -> None:
    call = CALLS[name]

    def with_gradients(*given: Tensor) -> tuple[Tensor, ...]:
        *floating, target = given
        leaves = [tensor.detach().requires_grad_() for tensor in floating]
        value = call(*leaves, target)
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        return value.detach(), *(grad for grad in grads if grad is not None)

    graphs = [(make_fx(f, tracing_mode=mode)(*operands(1)), f) for f in (call, with_gradients)]
    for graph, function in graphs:
        for seed in (1, 2):
            torch.testing.assert_close(graph(*operands(seed)), function(*operands(seed)))
        assert not [node for node in graph.graph.nodes if "logitless" in str(node.target)]


@pytest.mark.parametrize("name", ["cross_entropy", "kl", "lazy token_stats"])
def test_make_fx_before_autograd(name: str) -> None:
    graph = make_fx(CALLS[name], pre_dispatch=True)(*operands(1))
    for seed in (1, 2):
        torch.testing.assert_close(graph(*operands(seed)), CALLS[name](*operands(seed)))


def test_explain_says_why() -> None:
    z, _, _, _, t = operands(1)
    said = []
    make_fx(lambda z, t: (said.append(ll.explain(LF.cross_entropy, z, t)), z)[1])(z, t)
    assert said[0].backend == "reference"
    assert "make_fx" in said[0].reason
