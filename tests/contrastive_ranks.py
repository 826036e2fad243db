"""Contrastive losses in several processes, each case against one process on the joined batch.

`run(4, 3, 2, 1)` starts four processes once, and runs every case in four, then in three of them, and so on. A case
that fails in one process may leave the others waiting, so the rest is not run.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import logitless as ll
import logitless.nn as losses
from lazy_wrappers import meet
from logitless._heads import square
from logitless.integrations import open_clip as clips
from open_clip_losses import theirs
from test_lazy import NoTensorOf

FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-6}
# Rows of each rank: uneven, and an empty one.
SIZES = {1: [37], 2: [21, 40], 3: [33, 0, 26], 4: [7, 30, 1, 24]}
FEATURES, GUIDE, WIDTH = 13, 5, 2
CASES: dict[str, Callable[[int, int], None]] = {}
# Run by their own names, in new processes: torch.distributed.nn, which these packages call, keeps to the first group.
CLIPS, SENTENCES = "open_clip", "sentence-transformers"


def case(name: str, *args: Any, **kwargs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def take(function: Callable[..., None]) -> Callable[..., None]:
        assert name not in CASES, name
        CASES[name] = functools.partial(function, *args, **kwargs)
        return function

    return take


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Ranks(NamedTuple):
    """How rows are shared out, and where a rank's own are among all."""

    rank: int
    world: int

    @property
    def sizes(self) -> list[int]:
        return SIZES[self.world]

    def own(self, joined: Tensor, times: int = 1, extra: int = 0) -> Tensor:
        """A rank's part of a tensor of all ranks' rows."""
        counts = [size * times + extra for size in self.sizes]
        first = sum(counts[: self.rank])
        return joined[first : first + counts[self.rank]]

    def offset(self, extra: int = 0) -> int:
        return sum(size + extra for size in self.sizes[: self.rank])

    def total(self, times: int = 1, extra: int = 0) -> int:
        return sum(size * times + extra for size in self.sizes)


def near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    if not got.numel():
        return
    assert bool(torch.isfinite(got).all()), what
    largest = expected.abs().max().item()
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(largest, 1e-12), (what, error, largest)


def summed(tensor: Tensor) -> Tensor:
    total = tensor.double().clone()
    dist.all_reduce(total)
    return total


def same_everywhere(loss: Tensor) -> None:
    found = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(found, loss.detach())
    assert all(torch.equal(found[0], each) for each in found)


# Vectors of a call: queries, keys, and where asked negatives; and what options mean on a rank and in one process.


class Options(NamedTuple):
    ours: Callable[[Ranks], dict[str, Any]]
    joined: Callable[[Ranks], dict[str, Any]]
    negatives: str | None = None
    extra: int = 0  # further keys of a rank


def _constant(**options: Any) -> Options:
    return Options(lambda ranks: dict(options), lambda ranks: dict(options))


def _index(ranks: Ranks, extra: int, several: int) -> tuple[Tensor, Tensor]:
    """Indices of own keys, and the same of all ranks' keys."""
    generator = torch.Generator().manual_seed(5)
    own, joined = [], []
    for rank, size in enumerate(ranks.sizes):
        made = torch.randint(-1, max(size + extra, 1), (size, several), generator=generator)
        own.append(made)
        joined.append(torch.where(made < 0, -1, made + Ranks(rank, ranks.world).offset(extra)))
    return own[ranks.rank], torch.cat(joined)


def _sparse(index: Tensor, columns: int) -> Tensor:
    matrix = torch.zeros(len(index), columns + 1, dtype=torch.float64)
    matrix.scatter_(1, torch.where(index < 0, columns, index), 1)
    return matrix[:, :columns].to_sparse()


def _matrix(ranks: Ranks, extra: int) -> tuple[Tensor, Tensor]:
    blocks = [
        torch.rand(size, size + extra, generator=torch.Generator().manual_seed(rank)) > 0.7
        for rank, size in enumerate(ranks.sizes)
    ]
    return blocks[ranks.rank], torch.block_diag(*(block.double() for block in blocks)).bool()


def _guides(ranks: Ranks, extra: int, negatives: int | None = None) -> tuple[Any, Any]:
    of_keys = drawn(31, ranks.total(1, extra), GUIDE)
    joined, own = [drawn(30, ranks.total(), GUIDE)], [ranks.own(drawn(30, ranks.total(), GUIDE))]
    own.append(ranks.own(of_keys, 1, extra))
    joined.append(keys_of_one_process(of_keys, ranks, extra))
    if negatives is not None:
        made = drawn(32, ranks.total(negatives), GUIDE)
        joined.append(made)
        own.append(ranks.own(made, negatives))
    return {"guide": own}, {"guide": joined}


def keys_of_one_process(keys: Tensor, ranks: Ranks, extra: int) -> Tensor:
    """Everybody's own keys, and then the further ones: key i belongs to query i."""
    if not extra:
        return keys
    first, further = [], []
    for rank in range(ranks.world):
        mine = Ranks(rank, ranks.world).own(keys, 1, extra)
        first.append(mine[: len(mine) - extra])
        further.append(mine[len(mine) - extra :])
    return torch.cat([*first, *further])


def labels(ranks: Ranks, extra: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randint(11, (ranks.total(),), generator=generator),
        torch.randint(11, (ranks.total(1, extra),), generator=generator),
    )


def _of_labels(ranks: Ranks) -> dict[str, Any]:
    of_queries, of_keys = labels(ranks, 4)
    return {"positives": (ranks.own(of_queries), ranks.own(of_keys, 1, 4))}


def _present(ranks: Ranks) -> Tensor:
    return torch.rand(ranks.total(), WIDTH, generator=torch.Generator().manual_seed(3)) > 0.4


SYMMETRIC = {"symmetric": True}
OPTIONS: dict[str, Options] = {
    "plain": _constant(),
    "not normalized": _constant(normalize=False),
    "symmetric": _constant(symmetric=True),
    "joint of two": _constant(directions=FOUR[::2]),
    "four directions": _constant(directions=FOUR),
    "further keys": _constant()._replace(extra=3),
    "four directions and further keys": _constant(directions=FOUR)._replace(extra=3),
    "symmetric, margin": _constant(symmetric=True, false_negative_margin=0.1),
    "four directions, margin, further keys": _constant(directions=FOUR, false_negative_margin=-0.2)._replace(extra=2),
    "symmetric by a guide": Options(
        lambda ranks: {**SYMMETRIC, **_guides(ranks, 2)[0]},
        lambda ranks: {**SYMMETRIC, **_guides(ranks, 2)[1]},
        None,
        2,
    ),
    "one positive": Options(
        lambda ranks: {"positives": _index(ranks, 4, 1)[0][:, 0]},
        lambda ranks: {"positives": _index(ranks, 4, 1)[1][:, 0]},
        None,
        4,
    ),
    "several positives": Options(
        lambda ranks: {"positives": _index(ranks, 4, 3)[0]},
        lambda ranks: {"positives": _index(ranks, 4, 3)[1]},
        None,
        4,
    ),
    "sparse positives": Options(
        lambda ranks: {"positives": _sparse(_index(ranks, 0, 3)[0], ranks.sizes[ranks.rank])},
        lambda ranks: {"positives": _sparse(_index(ranks, 0, 3)[1], ranks.total())},
    ),
    "labels": Options(_of_labels, lambda ranks: {"positives": labels(ranks, 4)}, None, 4),
    "labels and negatives": Options(_of_labels, lambda ranks: {"positives": labels(ranks, 4)}, "shared", 4),
    "mask": Options(lambda ranks: {"mask": _matrix(ranks, 0)[0]}, lambda ranks: {"mask": _matrix(ranks, 0)[1]}),
    "mask by index, symmetric": Options(
        lambda ranks: {**SYMMETRIC, "mask": _index(ranks, 0, 3)[0]},
        lambda ranks: {**SYMMETRIC, "mask": _index(ranks, 0, 3)[1]},
    ),
    "paired negatives": _constant()._replace(negatives="paired"),
    "paired negatives, padded": Options(
        lambda ranks: {"negatives_mask": ranks.own(_present(ranks))},
        lambda ranks: {"negatives_mask": _present(ranks)},
        "paired",
    ),
    "shared negatives": _constant()._replace(negatives="shared"),
    "shared negatives, four directions": _constant(directions=FOUR)._replace(negatives="shared"),
    "everybody's negatives, padded": Options(
        lambda ranks: {"negative_mode": "unpaired", "negatives_mask": ranks.own(_present(ranks))},
        lambda ranks: {"negative_mode": "unpaired", "negatives_mask": _present(ranks)},
        "paired",
    ),
    "everybody's negatives, four directions, guide": Options(
        lambda ranks: {"negative_mode": "unpaired", "directions": FOUR, **_guides(ranks, 0, WIDTH)[0]},
        lambda ranks: {"negative_mode": "unpaired", "directions": FOUR, **_guides(ranks, 0, WIDTH)[1]},
        "paired",
    ),
    **{
        f"{which}, {mode}": _constant(hardness=which, hardness_strength=2.5, **options)._replace(negatives=negatives)
        for which in ("in_batch_negatives", "hard_negatives", "all_negatives")
        for mode, options, negatives in (
            ("paired", {}, "paired"),
            ("shared", {}, "shared"),
            ("four directions", {"negative_mode": "unpaired", "directions": FOUR}, "paired"),
        )
    },
}


def batch(ranks: Ranks, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """All ranks' queries, keys, and where asked negatives, in the order of ranks."""
    made = [drawn(1, ranks.total(), FEATURES), drawn(2, ranks.total(1, options.extra), FEATURES)]
    if options.negatives == "paired":
        made.append(drawn(3, ranks.total(), WIDTH, FEATURES))
    if options.negatives == "shared":
        made.append(drawn(3, ranks.total(WIDTH), FEATURES))
    return [x.to(dtype) for x in made]


def parts(ranks: Ranks, options: Options, joined: list[Tensor]) -> list[Tensor]:
    own = [ranks.own(joined[0]), ranks.own(joined[1], 1, options.extra)]
    if options.negatives is not None:
        own.append(ranks.own(joined[2], 1 if options.negatives == "paired" else WIDTH))
    return [x.clone().requires_grad_() for x in own]


def nce(vectors: list[Tensor], scale: Tensor, **options: Any) -> Tensor:
    more = {"negatives": vectors[2]} if len(vectors) > 2 else {}
    return ll.info_nce(vectors[0], vectors[1], scale=scale, **more, **options)


@case("InfoNCE")
def info_nce(rank: int, world: int) -> None:
    ranks = Ranks(rank, world)
    for place, (name, options) in enumerate(OPTIONS.items()):
        if world != 3 and place % 3 != world % 3:  # all of them where a rank is empty, and each of them elsewhere
            continue
        for reduction in ("mean", "sum", "none") if name in ("plain", "several positives") else ("mean",):
            for exchange in ("gather", "ring"):
                _held(f"{name} {reduction} {exchange}", ranks, options, torch.float64, reduction, exchange)
        exchange = ("gather", "ring")[place % 2]
        _held(f"{name} float32 {exchange}", ranks, options, torch.float32, "mean", exchange)


def _held(what: str, ranks: Ranks, options: Options, dtype: torch.dtype, reduction: str, exchange: str) -> None:
    joined = batch(ranks, options, dtype)
    own = parts(ranks, options, joined)
    number = 0.2 if "not normalized" in what else 2.5  # logits of a few units
    scale = torch.tensor(number, dtype=dtype, requires_grad=True)
    group = dist.group.WORLD
    loss = nce(own, scale, reduction=reduction, group=group, exchange=exchange, **options.ours(ranks))
    wide = [x.double().requires_grad_() for x in joined]
    exact = torch.tensor(scale.item(), dtype=torch.float64, requires_grad=True)
    ordered = [wide[0], wide[1], *wide[2:]]
    joint = options.joined(ranks)
    if "positives" not in joint:
        ordered[1] = keys_of_one_process(wide[1], ranks, options.extra)
    expected = nce(ordered, exact, reduction=reduction, **joint)
    tolerance = CLOSE[dtype]
    if reduction == "none":
        near(loss.detach(), ranks.own(expected.detach()), tolerance, what)
        upstream = drawn(9, ranks.total())
        grads = torch.autograd.grad(loss, [*own, scale], ranks.own(upstream).to(dtype))
        times = 1
    else:
        near(loss.detach(), expected.detach(), tolerance, what)
        same_everywhere(loss)
        upstream = drawn(9, 1)[0]
        grads = torch.autograd.grad(loss, [*own, scale], upstream.to(dtype))
        times = ranks.world
    exactly = torch.autograd.grad(expected, [*wide, exact], upstream)
    places = [{}, {"extra": options.extra}, {} if options.negatives == "paired" else {"times": WIDTH}]
    for grad, true, place in zip(grads[:-1], exactly[:-1], places, strict=False):
        part = ranks.own(true, **place)
        error = (grad.double() / times - part).abs().max().item() if part.numel() else 0.0
        assert error <= tolerance * true.abs().max().item(), (what, error, true.abs().max().item())
    near(summed(grads[-1]) / times, exactly[-1], tolerance, f"{what} scale")


def _pairs(ranks: Ranks, dtype: torch.dtype) -> list[Tensor]:
    return [nn.functional.normalize(drawn(seed, ranks.total(), FEATURES), dim=1).to(dtype) for seed in (1, 2)]


@case("CLIP and SigLIP", [ll.clip_loss, ll.siglip_loss])
def of_images_and_texts(functions: list[Any], rank: int, world: int) -> None:
    ranks = Ranks(rank, world)
    for function in functions:
        for dtype in CLOSE:
            for exchange in ("gather", "ring"):
                joined = _pairs(ranks, dtype)
                # One of them not contiguous.
                own = [
                    ranks.own(joined[0]).T.contiguous().T.requires_grad_(),
                    ranks.own(joined[1]).clone().requires_grad_(),
                ]
                numbers = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (4.0, -2.0)]
                loss = function(*own, *numbers, group=dist.group.WORLD, exchange=exchange)
                wide = [x.detach().double().requires_grad_() for x in (*joined, *numbers)]
                expected = function(*wide)
                what = f"{function.__name__} {dtype} {exchange}"
                near(loss.detach(), expected.detach(), CLOSE[dtype], what)
                same_everywhere(loss)
                grads = torch.autograd.grad(loss * -1.7, [*own, *numbers])
                exactly = torch.autograd.grad(expected * -1.7, wide)
                for grad, true in zip(grads[:2], exactly[:2], strict=True):
                    error = (grad.double() / world - ranks.own(true)).abs().max().item() if grad.numel() else 0.0
                    assert error <= CLOSE[dtype] * true.abs().max().item(), (what, error)
                for grad, true in zip(grads[2:], exactly[2:], strict=True):
                    near(summed(grad) / world, true, CLOSE[dtype], what)


class Towers(nn.Module):
    """Two small networks, and a scale and a bias that are learned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = (nn.Linear(FEATURES, 6, dtype=torch.float64) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sides = (nn.functional.normalize(net(x), dim=1) for net, x in ((self.image, images), (self.text, texts)))
        return (*sides, self.log_scale.exp(), self.bias)


def _through(kind: str, model: nn.Module, vectors: list[Tensor], group: Any, exchange: Any = "gather") -> Tensor:
    image, text, scale, bias = model(*vectors)
    if kind == "InfoNCE":
        loss = losses.InfoNCELoss(scale=scale, symmetric=True, group=group, exchange=exchange)(image, text)
        return loss + 0 * bias
    module = losses.ClipLoss if kind == "CLIP" else losses.SigLipLoss
    return module(group=group, exchange=exchange)(image, text, scale, bias)


@case("DistributedDataParallel")
def data_parallel(rank: int, world: int) -> None:
    ranks = Ranks(rank, world)
    joined = _pairs(ranks, torch.float64)
    for kind in ("InfoNCE", "CLIP", "SigLIP"):
        for exchange in ("gather", "ring"):
            alone = Towers()
            expected = _through(kind, alone, joined, None)
            (expected * 1.7).backward()
            model = nn.parallel.DistributedDataParallel(Towers())
            for step in range(2):
                model.zero_grad()
                loss = _through(kind, model, [ranks.own(x) for x in joined], dist.group.WORLD, exchange)
                (loss * 1.7).backward()
                near(loss.detach(), expected.detach(), 1e-9, f"{kind} {exchange} step {step}")
            for (name, mine), true in zip(model.module.named_parameters(), alone.parameters(), strict=True):
                near(mine.grad, true.grad, 1e-9, f"{kind} {exchange} {name}")


@case("an upstream gradient of each rank's own")
def own_upstream(rank: int, world: int) -> None:
    """A rank's loss weighs its own anchors: the sum over ranks of upstream times their losses."""
    ranks = Ranks(rank, world)
    joined = _pairs(ranks, torch.float64)
    for exchange in ("gather", "ring"):
        own = [ranks.own(x).clone().requires_grad_() for x in joined]
        loss = ll.info_nce(*own, scale=3.0, symmetric=True, group=dist.group.WORLD, exchange=exchange)
        grads = torch.autograd.grad(loss * (rank + 1.5), own)
        wide = [x.clone().requires_grad_() for x in joined]
        weights = torch.cat([torch.full((n,), r + 1.5, dtype=torch.float64) for r, n in enumerate(ranks.sizes)])
        each = ll.info_nce(*wide, scale=3.0, symmetric=True, reduction="none")
        exactly = torch.autograd.grad((each * weights).sum() * world / ranks.total(), wide)
        for grad, true in zip(grads, exactly, strict=True):
            error = (grad - ranks.own(true)).abs().max().item() if grad.numel() else 0.0
            assert error <= 1e-9 * true.abs().max().item(), (exchange, error)


@case("two forwards before one backward, a graph kept, the same to the bit")
def several(rank: int, world: int) -> None:
    ranks, group = Ranks(rank, world), dist.group.WORLD
    joined = _pairs(ranks, torch.float64)
    for exchange in ("gather", "ring"):
        own = [ranks.own(x).clone().requires_grad_() for x in joined]

        def first(own: list[Tensor] = own, exchange: Any = exchange) -> Tensor:
            return ll.clip_loss(*own, 3.0, group=group, exchange=exchange)

        def second(own: list[Tensor] = own, exchange: Any = exchange) -> Tensor:
            return ll.info_nce(own[0] * 2, own[1] + 1, temperature=0.3, group=group, exchange=exchange)

        a, b = first(), second()
        together = torch.autograd.grad(a + b, own, retain_graph=True)
        again = torch.autograd.grad(a + b, own)
        apart = [x + y for x, y in zip(*(torch.autograd.grad(f(), own) for f in (first, second)), strict=True)]
        for x, y, z in zip(together, again, apart, strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-15)
        assert torch.equal(a, first())


@case("frozen towers and no gradient at all")
def frozen(rank: int, world: int) -> None:
    ranks, group = Ranks(rank, world), dist.group.WORLD
    joined = _pairs(ranks, torch.float64)
    for exchange in ("gather", "ring"):
        own = [ranks.own(x).clone().requires_grad_() for x in joined]
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        for function in (ll.clip_loss, ll.siglip_loss):
            options = {"group": group, "exchange": exchange}
            loss = function(*own, scale, **options)
            whole = torch.autograd.grad(loss, [*own, scale], retain_graph=True)
            only = torch.autograd.grad(loss, own[0])[0]  # of one alone: what was promised travels all the same
            assert torch.equal(only, whole[0])
            image = torch.autograd.grad(function(own[0], own[1].detach(), 3.0, **options), own[0])[0]
            assert torch.equal(image, whole[0])
            text = torch.autograd.grad(function(own[0].detach(), own[1], 3.0, **options), own[1])[0]
            assert torch.equal(text, whole[1])
            number = torch.autograd.grad(function(own[0].detach(), own[1].detach(), scale, **options), scale)[0]
            assert torch.equal(number, whole[2])
            with torch.no_grad():
                assert torch.equal(function(*own, scale, **options), loss)


@case("half precisions are sent in half and added up in float32")
def halves(rank: int, world: int) -> None:
    ranks, group = Ranks(rank, world), dist.group.WORLD
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        joined = _pairs(ranks, dtype)
        wide = [x.double().requires_grad_() for x in joined]
        expected = ll.clip_loss(*wide, 10.0)
        exactly = torch.autograd.grad(expected, wide)
        for exchange in ("gather", "ring"):
            own = [ranks.own(x).clone().requires_grad_() for x in joined]
            with _Sent() as sent:
                loss = ll.clip_loss(*own, 10.0, group=group, exchange=exchange)
            assert loss.dtype == torch.float32
            near(loss.detach(), expected.detach(), 1e-6, f"{dtype} {exchange}")
            if world > 1:
                vectors = {x.dtype for x in sent.tensors if x.dim() == 2}
                assert vectors <= {dtype}, vectors
            with _Sent() as sent:
                grads = torch.autograd.grad(loss, own)
            assert {x.dtype for x in sent.tensors if x.dim() == 2} <= {dtype, torch.float32}
            for grad, true in zip(grads, exactly, strict=True):
                assert grad.dtype == dtype
                error = (grad.double() / world - ranks.own(true)).abs().max().item() if grad.numel() else 0.0
                assert error <= tolerance * true.abs().max().item(), (dtype, exchange, error)


class _Sent:
    """The tensors that are sent meanwhile."""

    def __enter__(self) -> _Sent:
        self.tensors: list[Tensor] = []
        self._real = dist.batch_isend_irecv

        def watched(operations: list[Any]) -> list[Any]:
            self.tensors += [each.tensor for each in operations if each.op is dist.isend]
            return self._real(operations)

        dist.batch_isend_irecv = watched
        return self

    def __exit__(self, *_: object) -> None:
        dist.batch_isend_irecv = self._real


@case("nothing of the matrix's size")
def no_matrix(rank: int, world: int) -> None:
    n, d, group = 200, 8, dist.group.WORLD
    query, key, shared = (drawn(seed + rank, n, d).requires_grad_() for seed in (11, 21, 31))
    with NoTensorOf(n * n // 4):
        for exchange in ("gather", "ring"):
            for loss in (
                ll.clip_loss(query, key, 3.0, group=group, exchange=exchange),
                ll.siglip_loss(query, key, 3.0, -1.0, group=group, exchange=exchange),
                ll.info_nce(query, key, scale=3.0, negatives=shared, directions=FOUR, group=group, exchange=exchange),
                ll.info_nce(
                    query, key, scale=3.0, false_negative_margin=0.1, symmetric=True, group=group, exchange=exchange
                ),
            ):
                loss.backward()


@case("a group of some ranks")
def part_of_the_ranks(rank: int, world: int) -> None:
    """Ranks of a smaller group, whose numbers are not those of the whole; the others are refused by name."""
    members = list(range(1, world)) or [0]
    group = dist.new_group(members)
    vectors = [drawn(seed + rank, 5 + rank, FEATURES).requires_grad_() for seed in (41, 51)]
    joined = [torch.cat([drawn(seed + each, 5 + each, FEATURES) for each in members]) for seed in (41, 51)]
    if rank in members:
        expected = ll.clip_loss(*joined, 0.3)
        for exchange in ("gather", "ring"):
            loss = ll.clip_loss(*vectors, 0.3, group=group, exchange=exchange)
            near(loss.detach(), expected, 1e-9, exchange)
            loss.backward()
    else:
        with pytest.raises((ValueError, TypeError), match="clip_loss: group must be"):
            ll.clip_loss(*vectors, 0.3, group=group)
    dist.barrier()


@case("what differs between ranks, and what a group cannot do, is refused on every rank")
def refused(rank: int, world: int) -> None:
    group = dist.group.WORLD
    x = drawn(1 + rank, 4, 3).requires_grad_()
    other = rank == world - 1 and world > 1
    if world > 1:
        for error, call in {
            "directions": lambda: ll.info_nce(x, x, scale=1.0, symmetric=other, group=group),
            "reduction": lambda: ll.info_nce(x, x, scale=1.0, reduction="sum" if other else "mean", group=group),
            "the dtypes of vectors": lambda: ll.clip_loss(*[x.float() if other else x] * 2, 1.0, group=group),
            "the length of vectors": lambda: ll.clip_loss(*[x[:, :2] if other else x] * 2, 1.0, group=group),
            "which features require a gradient": lambda: ll.siglip_loss(
                x, x.detach() if other else x, 1.0, group=group
            ),
            "exchange": lambda: ll.clip_loss(x, x, 1.0, group=group, exchange="ring" if other else "gather"),
            "the scale": lambda: ll.info_nce(x, x, scale=2.0 if other else 1.0, group=group),
        }.items():
            with pytest.raises(ValueError, match=f"{error}.* must be the same on every rank"):
                call()
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup"):
        ll.clip_loss(x, x, 1.0, group=True)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="exchange must be 'gather' or 'ring', got 'tree'"):
        ll.clip_loss(x, x, 1.0, group=group, exchange="tree")  # type: ignore[call-overload]
    for function in (ll.clip_loss, ll.siglip_loss):
        loss = function(x, x * 2, 1.0, group=group)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no transform sees.*torch\.func"):
            torch.func.grad(lambda y, f=function: f(y, y, 1.0, group=group))(x.detach())


# Other packages' losses over several ranks. Theirs want as many rows on each, and warn.


def _averaged(value: Tensor) -> Tensor:
    return summed(value.detach()) / dist.get_world_size()


def _beside_theirs(what: str, mine: Any, true: Any, vectors: list[Tensor], numbers: list[Tensor]) -> None:
    """A mean over ranks of their values is ours everywhere; gradients of vectors are equal, of numbers on average."""
    results = []
    for loss in (mine, true):
        leaves = [x.detach().clone().requires_grad_() for x in (*vectors, *numbers)]
        with warnings.catch_warnings():
            if loss is true:
                warnings.simplefilter("ignore")
            value = loss(*leaves)
            results.append([value, *torch.autograd.grad(value * 1.7, leaves, allow_unused=True)])
    same_everywhere(results[0][0])
    near(results[0][0].detach(), _averaged(results[1][0]), 1e-9, what)
    count = 1 + len(vectors)
    for got, expected in zip(results[0][1:count], results[1][1:count], strict=True):
        near(got, expected, 1e-9, what)
    for got, expected in zip(results[0][count:], results[1][count:], strict=True):
        if expected is not None and expected.abs() > 1e-9:
            near(_averaged(got), _averaged(expected), 1e-9, f"{what}, a number")


@case(CLIPS)
def open_clip(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    vectors = [
        nn.functional.normalize(torch.randn(9, FEATURES, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    ]
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (4.0, -2.0)]
    where = {"rank": rank, "world_size": world}
    for local, with_grad in ((False, False), (False, True), (True, True)):
        mine, true = (
            module.ClipLoss(local_loss=local, gather_with_grad=with_grad, **where) for module in (clips, theirs())
        )
        _beside_theirs(f"ClipLoss {local} {with_grad}", mine, true, vectors, numbers)
    for how in (None, "bidir", "shift", "gather"):
        mine, true = (module.SigLipLoss(dist_impl=how, **where) for module in (clips, theirs()))
        _beside_theirs(f"SigLipLoss {how}", mine, true, vectors, numbers)
    with pytest.raises(ValueError, match="rank and world_size must be those of torch"):
        clips.ClipLoss(rank=(rank + 1) % world, world_size=world)(*vectors, 1.0)


@case(SENTENCES)
def sentence_transformers(rank: int, world: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer import losses as real

        from logitless.integrations import sentence_transformers as ours
    generator = torch.Generator().manual_seed(rank)

    def drawn_here() -> Tensor:
        return torch.randn(9, FEATURES, generator=generator, dtype=torch.float64)

    vectors, guides = ([drawn_here() for _ in range(3)] for _ in range(2))
    model = nn.ModuleList([nn.Identity()])
    for count in (2, 3):
        for options in ({}, {"directions": FOUR}, {"directions": FOUR[::2], "partition_mode": "per_direction"}):
            hardness = {"hardness_mode": "in_batch_negatives", "hardness_strength": 2.0}
            for more in ({}, hardness):
                arguments = {**options, **more, "gather_across_devices": True}
                for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
                    made = [getattr(module, name)(model, **arguments) for module in (ours, real)]
                    if name.startswith("Cached"):
                        functions = [lambda *x, loss=loss: loss.calculate_loss([[each] for each in x]) for loss in made]
                    else:
                        functions = [
                            lambda *x, loss=loss: loss.compute_loss_from_embeddings(list(x), None) for loss in made
                        ]
                    _beside_theirs(f"{name} {count} {arguments}", *functions, vectors[:count], [])
        for options in ({}, {"margin_strategy": "relative", "margin": 0.1}, {"contrast_positives": False}):
            made = [_guided(module.GISTEmbedLoss, temperature=0.3, **options) for module in (ours, real)]
            for module in (ours, real):
                source = sys.modules[module.GISTEmbedLoss.__module__]
                source.embed_columns = lambda columns, _: columns
            functions = [lambda *x, loss=loss: loss(*_columns(loss, list(x), guides[: len(x)])) for loss in made]
            _beside_theirs(f"GISTEmbedLoss {count} {options}", *functions, vectors[:count], [])


def _guided(kind: Any, **options: Any) -> Any:
    """A loss whose model and guide are the columns that they give."""
    loss = kind.__new__(kind)
    nn.Module.__init__(loss)
    loss.must_retokenize = False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    defaults = {"margin_strategy": "absolute", "margin": 0.0, "contrast_anchors": True, "contrast_positives": True}
    for name, value in {**defaults, "gather_across_devices": True, **options}.items():
        setattr(loss, name, value)
    return loss


def _columns(loss: Any, embeddings: list[Tensor], guides: list[Tensor]) -> tuple[list[Any], None]:
    object.__setattr__(loss, "model", embeddings)
    object.__setattr__(loss, "guide", guides)
    return [{} for _ in embeddings], None


# The processes.


def _processes(rank: int, worlds: list[int], names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    square.TILE_ROWS, square.TILE_COLUMNS = 20, 16  # several tiles both ways
    for world in worlds:
        if rank >= world:
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        meet(rank, world, f"{folder}/group{world}", seconds=60)
        for place, name in enumerate(names):
            wrong = ""
            try:
                CASES[name](rank, world)
            except Exception:
                wrong = traceback.format_exc()[-3000:]
            (Path(folder) / f"{world}-{place}-{rank}").write_text(wrong)
            if wrong:
                return
        dist.barrier()
        dist.destroy_process_group()


def run(*worlds: int, pattern: str = "") -> dict[str, str]:
    """Run the cases in these numbers of processes, one number after another; give what went wrong, by case."""
    names = [name for name in CASES if (pattern in name if pattern else name not in (CLIPS, SENTENCES))]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _processes, (list(worlds), names, folder), nprocs=max(worlds), join=False, start_method="spawn"
        )
        ended = ""
        try:
            while not context.join():
                pass
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        wrong = {}
        for world in worlds:
            for place, name in enumerate(names):
                said = [Path(folder) / f"{world}-{place}-{rank}" for rank in range(world)]
                texts = [path.read_text() if path.exists() else f"did not end: {ended}" for path in said]
                if any(texts):
                    of_ranks = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
                    wrong[f"{name}, {world} processes"] = "\n".join(of_ranks)
        return wrong
