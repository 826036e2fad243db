"""No public function reads a value on the host, where a device would be waited for.

A table has calls of every public name. Each runs forward and backward, with gradients that are differentiated again
and under `torch.func`, twice over: on numbers that stand for a device's (of the CPU, by the kernels of a backend that
reads no value, where all that asks whether values are readable is told that they are not), beside what an ordinary call
returns; and on tensors of the meta device, which stand for a GPU's and hold nothing to read, where what the host would
copy to a device shows too.
"""

import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless import nn
from logitless._heads import square
from logitless._rules import dispatch
from logitless.kernels import triton
from logitless.losses.guided import guided_loss
from test_api import PUBLIC
from test_backends import Counting, HostReadError, NoHostReads

Drawn = dict[str, Tensor]

ROWS, CLASSES, WIDTH, NEGATIVES = 19, 65, 6, 3


def drawn() -> Drawn:
    make = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    target = torch.randint(0, CLASSES, (ROWS,), generator=make)
    target[2] = -100
    positives = torch.randint(0, ROWS, (ROWS, 3), generator=make)
    positives[4], positives[5, 1] = -1, -1
    several = normal(ROWS, CLASSES) > 1.2
    pairs = normal(ROWS, ROWS) > 1.2
    return {
        **{name: 2 * normal(ROWS, CLASSES) for name in ("z", "y")},
        **{name: normal(ROWS, WIDTH) for name in ("hidden", "query", "key", "guide_query", "guide_key")},
        **{name: normal(CLASSES, WIDTH) for name in ("head", "other_head")},
        "bias": normal(CLASSES),
        "scale": torch.tensor(1.25),
        "shift": torch.tensor(-0.5),
        "unit": torch.rand(ROWS, CLASSES, generator=make),
        "soft": normal(ROWS, CLASSES).softmax(1),
        "weight": normal(CLASSES).abs(),
        "target": target,
        "sides": normal(ROWS).sign(),
        "negatives": normal(ROWS, NEGATIVES, WIDTH),
        "shared": normal(7, WIDTH),
        "there": normal(ROWS, NEGATIVES) > -1,
        "shared_there": normal(7) > -1,
        "labels": torch.randint(0, 6, (ROWS,), generator=make),
        "key_labels": torch.randint(0, 6, (ROWS,), generator=make),
        "positives": positives,
        "false_negatives": pairs,
        "symmetric": pairs | pairs.T,
        "crow": torch.cat([torch.zeros(1, dtype=torch.int64), several.sum(1).cumsum(0)]),
        "col": several.nonzero()[:, 1].contiguous(),
        "places": several.nonzero().T.contiguous(),
        "values": several.sum() * 0 + torch.rand(int(several.sum()), generator=make),
        "pair_places": pairs.nonzero().T.contiguous(),
        "pair_crow": torch.cat([torch.zeros(1, dtype=torch.int64), pairs.sum(1).cumsum(0)]),
        "pair_values": (torch.arange(int(pairs.sum())) % 4).float(),  # of which some are 0, which names no pair
        "top": normal(ROWS, 4).log_softmax(1) - 0.5,
        "top_classes": torch.rand(ROWS, CLASSES, generator=make).topk(4, 1).indices,
        "classes": torch.randint(0, CLASSES, (ROWS, 2), generator=make),
        "scores": normal(ROWS).tanh(),
        "corpus": normal(47, WIDTH),
    }


LEARNS = (
    *("z", "y", "hidden", "head", "other_head", "bias", "scale", "shift", "query", "key", "negatives", "shared"),
    *("scores",),
)


def lazy(d: Drawn, **options: Any) -> ll.LazyLogits:
    return ll.linear(d["hidden"], d["head"], d["bias"], scale=d["scale"], **options)


def other(d: Drawn) -> ll.LazyLogits:
    return ll.linear(d["key"], d["other_head"], softcap=4.0)


def with_sparse(d: Drawn) -> Drawn:
    """Return the same, with sparse matrices of the places: made outside of what is called."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch warns once of CSR
        return {**d, **sparse_of(d)}


def sparse_of(d: Drawn) -> Drawn:
    return {
        "coo": torch.sparse_coo_tensor(d["places"], d["values"], (ROWS, CLASSES), is_coalesced=True),
        "csr": torch.sparse_csr_tensor(d["crow"], d["col"], d["values"], (ROWS, CLASSES)),
        "pairs": torch.sparse_coo_tensor(d["pair_places"], d["pair_values"], (ROWS, ROWS), is_coalesced=True),
        "loose": torch.sparse_coo_tensor(d["places"], d["values"], (ROWS, CLASSES)),
        "loose_pairs": torch.sparse_coo_tensor(d["pair_places"], d["pair_values"], (ROWS, ROWS)),
        "pairs_csr": torch.sparse_csr_tensor(d["pair_crow"], d["pair_places"][1], d["pair_values"], (ROWS, ROWS)),
    }


def teacher(d: Drawn, tail: Any = "lump") -> ll.SparseLogits:
    return ll.SparseLogits(d["top"], d["top_classes"], CLASSES, tail)


def whole(stats: Any) -> Tensor:
    """All numbers of a result of several, of one shape."""
    floating = [value for value in stats if value is not None and value.is_floating_point() and value.dim() == 1]
    return torch.stack(floating)


def of_info_nce(**options: Any) -> Callable[[Drawn], Tensor]:
    """A call of `info_nce` whose options are numbers, or functions of what was drawn."""

    def call(d: Drawn) -> Tensor:
        told = {name: value(d) if callable(value) else value for name, value in options.items()}
        scaled = {} if "temperature" in told else {"scale": d["scale"]}
        return ll.info_nce(d["query"], d["key"], **scaled, **told)

    return call


def of_head(d: Drawn) -> Tensor:
    """A model whose head is lazy, under torch's own loss."""

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(WIDTH, CLASSES, device=d["hidden"].device)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, hidden: Tensor) -> Tensor:
            made: Tensor = self.head(hidden)
            return made

    model = Tiny()
    with torch.no_grad():
        model.head.weight.copy_(d["other_head"].detach())
        model.head.bias.copy_(d["weight"])
    with ll.lazy_head(model):
        logits = model(d["hidden"])
        return F.cross_entropy(logits, d["target"]) + F.cross_entropy(logits[:-1], d["target"][1:], reduction="sum")


def written(d: Drawn) -> Tensor:
    """Classes of a lazy head that are masked by numbers, in place."""
    logits = lazy({**d, "scale": 1.0})  # type: ignore[dict-item] # a number is a scale too
    logits.index_fill_(1, d["classes"][0], -torch.inf)
    return logits.logsumexp(1)


# Written in place, which only logits can be whose parts hold data, outside of a transform.
WRITTEN = "classes masked by number"
# Made dense by torch, which has no such operation on meta.
WRITTEN_OUT = "dense, COO"
# Calls by the public name that they are of, and what is particular.
CALLS: dict[tuple[str, str], Callable[[Drawn], Tensor]] = {
    ("logitless.functional.cross_entropy", "mean"): lambda d: LF.cross_entropy(d["z"], d["target"]),
    ("logitless.functional.cross_entropy", "weights and smoothing"): lambda d: LF.cross_entropy(
        d["z"], d["target"], d["weight"], label_smoothing=0.1, empty="zero"
    ),
    **{
        ("logitless.functional.cross_entropy", f"over {rule}"): lambda d, rule=rule: LF.cross_entropy(
            d["z"], d["target"], d["weight"], normalizer=rule
        )
        for rule in ("weights", "rows", 7.0)
    },
    ("logitless.functional.cross_entropy", "over a tensor"): lambda d: LF.cross_entropy(
        d["z"], d["target"], normalizer=(d["target"] != -100).sum()
    ),
    ("logitless.functional.cross_entropy", "all ignored"): lambda d: LF.cross_entropy(
        d["z"], torch.full_like(d["target"], -100), empty="zero"
    ),
    ("logitless.functional.cross_entropy", "probabilities"): lambda d: LF.cross_entropy(
        d["z"], d["soft"], d["weight"], reduction="none"
    ),
    ("logitless.functional.cross_entropy", "sparse teacher"): lambda d: LF.cross_entropy(d["z"], teacher(d)),
    ("logitless.functional.cross_entropy", "head"): lambda d: LF.cross_entropy(lazy(d), d["target"]),
    ("logitless.functional.cross_entropy", "head, everything"): lambda d: LF.cross_entropy(
        lazy(d, softcap=3.0), d["target"], d["weight"], label_smoothing=0.1, reduction="none"
    ),
    ("logitless.functional.cross_entropy", "head, normalizer, empty"): lambda d: LF.cross_entropy(
        lazy(d), d["target"], d["weight"], normalizer="rows", empty="zero"
    ),
    ("logitless.functional.cross_entropy", "head, over a tensor"): lambda d: LF.cross_entropy(
        lazy(d), d["target"], normalizer=(d["target"] != -100).sum()
    ),
    ("logitless.functional.cross_entropy", "head, sparse teacher"): lambda d: LF.cross_entropy(
        lazy(d), teacher(d, "renormalize")
    ),
    ("logitless.functional.linear_cross_entropy", "mean"): lambda d: LF.linear_cross_entropy(
        d["hidden"], d["head"], d["target"], linear_bias=d["bias"], scale=d["scale"]
    ),
    ("logitless.functional.linear_cross_entropy", "cut tiles"): lambda d: LF.linear_cross_entropy(
        d["hidden"], d["head"], d["target"], weight=d["weight"], label_smoothing=0.1, reduction="none", max_bytes=500
    ),
    ("logitless.functional.nll_loss", "mean"): lambda d: LF.nll_loss(d["z"].log_softmax(1), d["target"]),
    ("logitless.functional.nll_loss", "weights"): lambda d: LF.nll_loss(
        d["z"].log_softmax(1), d["target"], d["weight"], normalizer="rows", empty="zero"
    ),
    ("logitless.functional.nll_loss", "head"): lambda d: LF.nll_loss(
        lazy(d).log_softmax(1), d["target"], d["weight"], reduction="sum"
    ),
    ("logitless.functional.kl_div", "batchmean"): lambda d: LF.kl_div(
        d["z"].log_softmax(1), d["soft"], reduction="batchmean"
    ),
    ("logitless.functional.kl_div", "log target"): lambda d: LF.kl_div(
        d["z"].log_softmax(1), d["y"].log_softmax(1), reduction="none", log_target=True
    ),
    ("logitless.functional.binary_cross_entropy", "weights"): lambda d: LF.binary_cross_entropy(
        d["z"].sigmoid(), d["unit"], d["weight"], normalizer="weights"
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", "weights"): lambda d: LF.binary_cross_entropy_with_logits(
        d["z"], d["unit"], d["weight"], pos_weight=d["weight"]
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", "over weights"): lambda d: (
        LF.binary_cross_entropy_with_logits(d["z"], d["unit"], d["weight"], normalizer="weights")
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", WRITTEN_OUT): lambda d: (
        LF.binary_cross_entropy_with_logits(d["z"], d["coo"], reduction="none")
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", "head"): lambda d: LF.binary_cross_entropy_with_logits(
        lazy(d), d["unit"], pos_weight=d["weight"]
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", "head, COO"): lambda d: (
        LF.binary_cross_entropy_with_logits(lazy(d), d["coo"], reduction="sum")
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", "head, CSR"): lambda d: (
        LF.binary_cross_entropy_with_logits(lazy(d), d["csr"], d["weight"], normalizer="weights")
    ),
    ("logitless.functional.cosine_similarity", "rows"): lambda d: LF.cosine_similarity(d["query"], d["key"]),
    ("logitless.functional.cosine_similarity", "crossed"): lambda d: LF.cosine_similarity(
        d["query"].unsqueeze(1), d["key"].unsqueeze(0), dim=2
    ),
    ("logitless.functional.cosine_embedding_loss", "mean"): lambda d: LF.cosine_embedding_loss(
        d["query"], d["key"], d["sides"], margin=0.1
    ),
    ("logitless.token_stats", "dense"): lambda d: whole(ll.token_stats(d["z"], d["target"], temperature=0.7)[:3]),
    ("logitless.token_stats", "head"): lambda d: whole(ll.token_stats(lazy(d), d["target"])[:3]),
    ("logitless.token_stats", "head, top"): lambda d: whole(ll.token_stats(lazy(d), d["target"], top_k=3)[:3]),
    ("logitless.log_probs", "dense"): lambda d: ll.log_probs(d["z"], d["target"], temperature=0.7),
    ("logitless.log_probs", "head"): lambda d: ll.log_probs(lazy(d), d["target"]),
    ("logitless.entropy", "dense"): lambda d: ll.entropy(d["z"], temperature=0.7),
    ("logitless.entropy", "head"): lambda d: ll.entropy(lazy(d, softcap=3.0), reduction="mean"),
    **{
        (f"logitless.{name}", case): lambda d, name=name, call=call: call(getattr(ll, name), d)
        for name in ("kl", "js", "tv")
        for case, call in {
            "dense": lambda f, d: f(d["z"], d["y"], temperature=0.7),
            "two heads": lambda f, d: f(lazy(d), other(d), reduction="mean"),
            "sparse teacher": lambda f, d: f(teacher(d), lazy(d)),
            "renormalized, dense, turned": lambda f, d: f(d["z"], teacher(d, "renormalize"), temperature=0.7),
        }.items()
    },
    ("logitless.kl", "skewed"): lambda d: ll.kl(d["z"], d["y"], skew=0.1),
    ("logitless.js", "beta"): lambda d: ll.js(lazy(d), d["y"], beta=0.9, reduction="sum"),
    ("logitless.pair_stats", "dense"): lambda d: whole(ll.pair_stats(d["z"], d["y"], d["target"])),
    ("logitless.pair_stats", "heads"): lambda d: whole(ll.pair_stats(lazy(d), other(d), d["target"], temperature=0.7)),
    ("logitless.linear", "written out"): lambda d: lazy(d).materialize(),
    ("logitless.LazyLogits", "argmax"): lambda d: lazy(d).argmax(-1),
    ("logitless.LazyLogits", "largest"): lambda d: lazy(d).max(-1).values,
    ("logitless.LazyLogits", "smallest"): lambda d: lazy(d).min(-1).values,
    ("logitless.LazyLogits", "topk"): lambda d: lazy(d).topk(5, -1).values,
    ("logitless.LazyLogits", "gather"): lambda d: lazy(d).gather(1, d["classes"]),
    ("logitless.LazyLogits", "gather of one"): lambda d: lazy(d).gather(1, d["classes"][:, :1]),
    ("logitless.LazyLogits", "log_softmax, gather"): lambda d: lazy(d).log_softmax(-1).gather(1, d["classes"]),
    ("logitless.LazyLogits", "log_softmax, sum"): lambda d: lazy(d).log_softmax(-1).sum(-1),
    ("logitless.LazyLogits", "logsumexp"): lambda d: lazy(d).logsumexp(-1),
    ("logitless.LazyLogits", "rows by number"): lambda d: LF.cross_entropy(
        lazy(d)[d["labels"]], d["target"], reduction="none"
    ),
    ("logitless.LazyLogits", "classes by number"): lambda d: lazy(d)[:, d["classes"][0]].logsumexp(-1),
    ("logitless.LazyLogits", "scaled and shifted"): lambda d: LF.cross_entropy((lazy(d) / 0.7)[1:], d["target"][1:]),
    ("logitless.LazyLogits", WRITTEN): written,
    ("logitless.LazyHead", "torch's loss"): of_head,
    ("logitless.lazy_head", "torch's loss"): of_head,
    ("logitless.SparseLogits", "top_k"): lambda d: ll.kl(ll.SparseLogits.top_k(lazy(d), 3), d["z"]),
    ("logitless.SparseLogits", "top_k of dense, some rows"): lambda d: ll.kl(
        ll.SparseLogits.top_k(d["y"], 3)[1:].flatten(), d["z"][1:]
    ),
    ("logitless.info_nce", "temperature"): of_info_nce(temperature=0.5),
    ("logitless.info_nce", "learnt temperature"): of_info_nce(temperature=lambda d: d["scale"]),
    ("logitless.info_nce", "symmetric"): of_info_nce(symmetric=True, reduction="none"),
    ("logitless.info_nce", "all directions"): of_info_nce(
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        negatives=lambda d: d["shared"],
        negatives_mask=lambda d: d["shared_there"],
    ),
    ("logitless.info_nce", "own negatives"): of_info_nce(
        negatives=lambda d: d["negatives"], negatives_mask=lambda d: d["there"]
    ),
    ("logitless.info_nce", "everybody's negatives"): of_info_nce(
        negatives=lambda d: d["negatives"],
        negative_mode="unpaired",
        negatives_mask=lambda d: d["there"],
        directions=("query_to_doc", "doc_to_doc"),
    ),
    ("logitless.info_nce", "positives by number"): of_info_nce(positives=lambda d: d["positives"][:, 0]),
    ("logitless.info_nce", "several positives"): of_info_nce(positives=lambda d: d["positives"], reduction="none"),
    ("logitless.info_nce", "positives by label"): of_info_nce(positives=lambda d: (d["labels"], d["key_labels"])),
    ("logitless.info_nce", "sparse positives"): of_info_nce(positives=lambda d: d["pairs"]),
    ("logitless.info_nce", "sparse positives by rows"): of_info_nce(positives=lambda d: d["pairs_csr"]),
    ("logitless.info_nce", "several positives, hardness, left out"): of_info_nce(
        positives=lambda d: d["positives"],
        hardness="all_negatives",
        hardness_strength=0.4,
        mask=lambda d: d["false_negatives"],
    ),
    ("logitless.info_nce", "left out by a mask"): of_info_nce(mask=lambda d: d["false_negatives"]),
    ("logitless.info_nce", "left out by number"): of_info_nce(mask=lambda d: d["positives"]),
    ("logitless.info_nce", "margin"): of_info_nce(false_negative_margin=0.1, symmetric=True),
    ("logitless.info_nce", "margin of other positives"): of_info_nce(
        false_negative_margin=0.1, positives=lambda d: d["positives"][:, 0]
    ),
    ("logitless.info_nce", "guide"): of_info_nce(
        guide=lambda d: (d["guide_query"], d["guide_key"], d["negatives"].detach()),
        negatives=lambda d: d["negatives"],
        directions=("query_to_doc", "query_to_query"),
    ),
    **{
        ("logitless.info_nce", f"hardness of {which}, {mode}"): of_info_nce(
            hardness=which, hardness_strength=0.4, negatives=lambda d: d["negatives"], negative_mode=mode
        )
        for which in ("in_batch_negatives", "hard_negatives", "all_negatives")
        for mode in ("paired", "unpaired")
    },
    ("logitless.info_nce", "a guide's rule for sentence-transformers"): lambda d: guided_loss(
        [d["query"], d["key"], d["shared"]],
        [d["guide_query"], d["guide_key"], d["shared"]],
        temperature=0.5,
        margin=0.1,
        relative=True,
        contrast_anchors=True,
        contrast_positives=True,
    ),
    ("logitless.clip_loss", "learnt scale"): lambda d: ll.clip_loss(d["query"], d["key"], d["scale"], d["shift"]),
    ("logitless.siglip_loss", "learnt scale and bias"): lambda d: ll.siglip_loss(
        d["query"], d["key"], d["scale"], d["shift"]
    ),
    ("logitless.supcon_loss", "views"): lambda d: ll.supcon_loss(
        d["negatives"], temperature=d["scale"], base_temperature=0.07, normalize=True
    ),
    ("logitless.supcon_loss", "labels"): lambda d: ll.supcon_loss(d["query"], d["labels"], temperature=0.5),
    ("logitless.supcon_loss", "labels, first view"): lambda d: ll.supcon_loss(
        d["negatives"], d["labels"], contrast_mode="one", temperature=0.5, reduction="none", without_positive="zero"
    ),
    ("logitless.supcon_loss", "mask"): lambda d: ll.supcon_loss(
        d["negatives"], mask=d["symmetric"], temperature=0.5, without_positive="zero"
    ),
    ("logitless.cosent_loss", "scores"): lambda d: ll.cosent_loss(d["scores"], d["labels"].float(), scale=d["scale"]),
    ("logitless.cosent_loss", "vectors"): lambda d: ll.cosent_loss((d["query"], d["key"]), d["unit"][:, 0]),
    **{
        ("logitless.batch_triplet_loss", f"{kind}, {distance}"): lambda d, kind=kind, distance=distance: (
            ll.batch_triplet_loss(d["query"], d["labels"], kind=kind, distance=distance, margin=0.5)
        )
        for kind in ("hard", "semi_hard", "all")
        for distance in ("euclidean", "cosine")
    },
    ("logitless.pairwise_cosine", "two"): lambda d: ll.pairwise_cosine(d["query"], d["corpus"]),
    ("logitless.pairwise_cosine", "one"): lambda d: ll.pairwise_cosine(d["query"]),
    ("logitless.pairwise_cosine", "out"): lambda d: ll.pairwise_cosine(
        d["query"].detach(), d["corpus"], out=torch.empty(ROWS, len(d["corpus"]), device=d["query"].device)
    ),
    ("logitless.cosine_topk", "scores"): lambda d: ll.cosine_topk(d["query"], d["corpus"], 5)[0],
    ("logitless.cosine_topk", "ids, not its own"): lambda d: ll.cosine_topk(
        d["query"], d["corpus"], 5, exclude_self=True, max_bytes=1000
    )[1],
    ("logitless.paired_ranks", "ranks"): lambda d: torch.stack(ll.paired_ranks(d["query"], d["key"])),
    ("logitless.nn.CrossEntropyLoss", "weights"): lambda d: nn.CrossEntropyLoss(d["weight"])(lazy(d), d["target"]),
    ("logitless.nn.NLLLoss", "mean"): lambda d: nn.NLLLoss()(d["z"].log_softmax(1), d["target"]),
    ("logitless.nn.KLDivLoss", "mean"): lambda d: nn.KLDivLoss(reduction="batchmean")(d["z"].log_softmax(1), d["soft"]),
    ("logitless.nn.BCELoss", "mean"): lambda d: nn.BCELoss()(d["z"].sigmoid(), d["unit"]),
    ("logitless.nn.BCEWithLogitsLoss", "mean"): lambda d: nn.BCEWithLogitsLoss()(lazy(d), d["coo"]),
    ("logitless.nn.CosineEmbeddingLoss", "mean"): lambda d: nn.CosineEmbeddingLoss()(d["query"], d["key"], d["sides"]),
    ("logitless.nn.CosineSimilarity", "rows"): lambda d: nn.CosineSimilarity()(d["query"], d["key"]),
    ("logitless.nn.LinearCrossEntropyLoss", "mean"): lambda d: linear_module(d)(d["hidden"], d["target"]),
    ("logitless.nn.InfoNCELoss", "mean"): lambda d: nn.InfoNCELoss(temperature=0.5)(d["query"], d["key"]),
    ("logitless.nn.ClipLoss", "mean"): lambda d: nn.ClipLoss()(d["query"], d["key"], d["scale"]),
    ("logitless.nn.SigLipLoss", "mean"): lambda d: nn.SigLipLoss()(d["query"], d["key"], d["scale"], d["shift"]),
    ("logitless.nn.SupConLoss", "mean"): lambda d: nn.SupConLoss(temperature=0.5)(d["query"], d["labels"]),
    ("logitless.nn.CoSENTLoss", "mean"): lambda d: nn.CoSENTLoss()(d["scores"], d["labels"].float()),
    ("logitless.nn.BatchTripletLoss", "mean"): lambda d: nn.BatchTripletLoss()(d["query"], d["labels"]),
}


def linear_module(d: Drawn) -> nn.LinearCrossEntropyLoss:
    module = nn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True, device=d["hidden"].device)
    with torch.no_grad():
        module.linear.weight.copy_(d["other_head"].detach())
        module.linear.bias.copy_(d["weight"])
    return module


@torch.inference_mode()
def in_inference_mode(d: Drawn) -> Tensor:
    logits = lazy({**d, "hidden": d["hidden"] + 1})
    return ll.entropy(logits)


# Calls that wait for a device, and why; docs/gpu.md names each.
WAITS: dict[tuple[str, str], tuple[Callable[[Drawn], Any], str]] = {
    ("logitless.cosine_topk", "allowed"): (
        lambda d: ll.cosine_topk(d["query"], d["corpus"], 5, allowed=d["corpus"][:, 0] > 1),
        "as many columns come back as a query may find",
    ),
    ("logitless.cosine_topk", "rescore"): (
        lambda d: ll.cosine_topk(d["query"], d["corpus"].half(), 5, rescore=d["corpus"]),
        "the rows that were found are read, from a file too",
    ),
    ("logitless.PairedRanks", "metrics"): (
        lambda d: ll.paired_ranks(d["query"], d["key"]).metrics(),
        "its numbers are Python's",
    ),
    ("logitless.functional.binary_cross_entropy_with_logits", "COO that is not coalesced"): (
        lambda d: LF.binary_cross_entropy_with_logits(lazy(d), d["loose"]),
        "torch counts the entries that name one place",
    ),
    ("logitless.info_nce", "COO that is not coalesced"): (
        of_info_nce(positives=lambda d: d["loose_pairs"]),
        "torch counts the entries that name one place",
    ),
    ("logitless.LazyLogits", "made in inference mode"): (
        in_inference_mode,
        "there no tensor counts who wrote to it, so that what the logits are made of is compared",
    ),
    ("logitless.LazyLogits", "printed"): (lambda d: repr(lazy(d)), "its scale is written out"),
    ("logitless.LazyLogits", "classes masked by a number in a tensor"): (
        lambda d: lazy({**d, "scale": 1.0}).index_fill_(1, d["classes"][0], torch.full_like(d["shift"], -torch.inf)),  # type: ignore[dict-item] # a number
        "whether it is -inf decides what is made",
    ),
    ("logitless.LazyLogits", "rows by a mask"): (
        lambda d: lazy(d)[d["sides"] > 0].argmax(-1),
        "as many rows come back as the mask has",
    ),
    ("logitless.LazyLogits", "classes masked by a mask"): (
        lambda d: lazy({**d, "scale": 1.0}).masked_fill_(d["weight"] > 1, -torch.inf),  # type: ignore[dict-item] # a number
        "the classes are listed",
    ),
}
# Names that compute nothing of a tensor's values.
NOTHING_TO_READ = {
    "logitless.BackendStatus": "what `backends` returns",
    "logitless.MaterializeWarning": "a warning",
    "logitless.PairStats": "what `pair_stats` returns",
    "logitless.TokenStats": "what `token_stats` returns",
    "logitless.TopTokenStats": "what `token_stats` returns",
    "logitless.backends": "takes no tensor",
    "logitless.explain": "stops at the choice of a backend",
    "logitless.to_faiss": "hands a corpus to faiss, which lies on the host",
}

CALLS_BY_FUNC = [name for name in CALLS if name[1] != WRITTEN]
CALLS_WITHOUT_DATA = [name for name in CALLS_BY_FUNC if name[1] != WRITTEN_OUT]


def test_every_public_name_is_here() -> None:
    assert {name for name, _ in (*CALLS, *WAITS)} | set(NOTHING_TO_READ) == set(PUBLIC)
    assert not {name for name, _ in CALLS} & set(NOTHING_TO_READ)


class Device:
    """The CPU as a device with kernels of its own, whose values nobody may look at once it `forbids` that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self._backend = monkeypatch, Counting()
        self._backend.READS_VALUES = True
        monkeypatch.setitem(dispatch.BACKENDS, self._backend.NAME, self._backend)
        monkeypatch.delitem(dispatch.BACKENDS, "cpu")
        monkeypatch.setattr(dispatch, "WHOLE_CALLS", SimpleNamespace(missing=lambda: "a device has none"))
        # Several tiles of the few numbers here.
        monkeypatch.setattr(square, "TILE_ROWS", 8)
        monkeypatch.setattr(square, "TILE_COLUMNS", 7)

    def forbid(self) -> None:
        self._backend.READS_VALUES = False
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "logitless" and hasattr(module, "values_are_readable"):
                self._patch.setattr(module, "values_are_readable", lambda tensor: False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def leaves_of(d: Drawn) -> Drawn:
    learnt = {name: d[name].clone().requires_grad_() for name in LEARNS}
    return {**d, **learnt}


def upstream_of(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, max(1, out.numel()), device=out.device).to(out.dtype).view(out.shape)


def once(call: Callable[[Drawn], Tensor], d: Drawn) -> list[Tensor | None]:
    """The result, and its gradients."""
    leaves = leaves_of(d)
    out = call(leaves)
    if not out.requires_grad:
        return [out]
    wanted = [leaves[name] for name in LEARNS]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream_of(out), allow_unused=True)]


def under_autocast(call: Callable[[Drawn], Tensor], d: Drawn) -> list[Tensor | None]:
    with torch.autocast("cpu", torch.bfloat16):
        return once(call, d)


def twice(call: Callable[[Drawn], Tensor], d: Drawn) -> list[Tensor | None]:
    """The gradients of the gradients' squares."""
    leaves = leaves_of(d)
    out = call(leaves)
    if not out.requires_grad:
        return []
    wanted = [leaves[name] for name in LEARNS]
    grads = torch.autograd.grad(out, wanted, upstream_of(out), create_graph=True, allow_unused=True)
    squares = [grad.square().sum() for grad in grads if grad is not None and grad.requires_grad]
    return list(torch.autograd.grad(torch.stack(squares).sum(), wanted, allow_unused=True)) if squares else []


def by_func(call: Callable[[Drawn], Tensor], d: Drawn) -> list[Tensor | None]:
    def summed(*given: Tensor) -> Tensor:
        out = call({**d, **dict(zip(LEARNS, given, strict=True))})
        return (out * upstream_of(out)).sum() if out.is_floating_point() else given[0].sum()

    return list(torch.func.grad(summed, tuple(range(len(LEARNS))))(*(d[name] for name in LEARNS)))


WAYS = {"once": once, "under autocast": under_autocast, "twice": twice, "by torch.func": by_func}


def assert_close(got: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    assert [value is None for value in got] == [value is None for value in expected]
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            size = float(other[other.isfinite()].abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for way in WAYS for name in (CALLS_BY_FUNC if way == "by torch.func" else CALLS)],
    ids=lambda each: each if isinstance(each, str) else ", ".join(each),
)
def test_no_value_is_read(name: tuple[str, str], way: str, device: Device) -> None:
    call, d = CALLS[name], with_sparse(drawn())
    expected = WAYS[way](call, d)
    device.forbid()
    with NoHostReads():
        got = WAYS[way](call, d)
    assert_close(got, expected, 1e-4 if way == "twice" else 1e-5)


@pytest.mark.parametrize("name", CALLS, ids=", ".join)
def test_the_reference_reads_none_either(
    name: tuple[str, str], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves a device without Triton."""
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    d = with_sparse(drawn())
    expected = once(CALLS[name], d)
    device.forbid()
    with NoHostReads():
        got = once(CALLS[name], d)
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("name", CALLS_WITHOUT_DATA, ids=", ".join)
def test_tensors_of_another_device_are_never_read(name: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies anywhere but on the tensors' own device, and nothing is copied there from the host."""
    monkeypatch.setattr(square, "TILE_ROWS", 8)
    monkeypatch.setattr(square, "TILE_COLUMNS", 7)
    call, plain = CALLS[name], drawn()
    expected = once(call, with_sparse(plain))
    monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset(("meta",)))
    there = with_sparse({name: value.to("meta") for name, value in plain.items()})
    with NoHostReads():
        got = once(call, there)
    assert [value is None for value in got] == [value is None for value in expected]
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


@pytest.mark.parametrize("name", WAITS, ids=", ".join)
def test_calls_that_wait_are_these(name: tuple[str, str], device: Device) -> None:
    """Each of them does: one that no longer does belongs in the other table."""
    device.forbid()
    with torch.no_grad(), pytest.raises(HostReadError), NoHostReads():
        WAITS[name][0](with_sparse(drawn()))
