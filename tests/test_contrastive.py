"""InfoNCE and CLIP's loss: values and gradients by brute force in float64, the pitfalls of such losses, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_oracles as oracle
import logitless as ll
from logitless._heads import square
from test_lazy import NoTensorOf

FLOATS = (torch.float64, torch.float32, torch.bfloat16)
# Of the largest element. Logits here are below 30, where a float32 has 2e-6 of noise; a bfloat16 gradient is rounded.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LOSS_CLOSE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles both ways, and short last ones, at sizes that brute force takes."""
    monkeypatch.setattr(square, "TILE_ROWS", 32)
    monkeypatch.setattr(square, "TILE_COLUMNS", 24)


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, strided: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    made = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if strided:
        made = torch.stack([made, made], -1)[..., 0]
        assert not made.is_contiguous() or made.numel() <= 1
    return made.requires_grad_()


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert bool(torch.isfinite(got).all())
    largest = max(expected.abs().max().item(), 1e-300) if expected.numel() else 1.0
    error = (got.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * largest, (error, largest)


def check(ours: Callable[..., Tensor], truth: Callable[..., Tensor], tensors: Sequence[Any]) -> None:
    """Hold values and gradients to the truth, each with an upstream gradient of its own."""
    dtype = next(x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point())
    got, exact = ours(*tensors), oracle.wide(*tensors)
    expected = truth(*exact)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, expected.detach(), LOSS_CLOSE[dtype])
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 3 + 0.5
    leaves = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
    wide = [x for x in exact if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(got, leaves, upstream.to(got.dtype))
    truths = torch.autograd.grad(expected, wide, upstream, allow_unused=True)
    largest = max(x.abs().max().item() for x in truths if x is not None)
    for grad, leaf, exactly in zip(grads, leaves, truths, strict=True):
        assert grad.dtype == leaf.dtype
        other = torch.zeros_like(grad, dtype=torch.float64) if exactly is None else exactly
        # A gradient that cancels to nothing, as one pair's does, is held to the largest of the call.
        held_to = max(other.abs().max().item(), 1e-3 * largest)
        assert bool(torch.isfinite(grad).all())
        assert (grad.double() - other).abs().max().item() <= CLOSE[leaf.dtype] * held_to


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 9, 5), (65, 65, 33), (65, 130, 2), (257, 300, 19)])
def test_values_and_gradients(shape: tuple[int, int, int], strided: bool, dtype: torch.dtype) -> None:
    n, m, d = shape
    query, key = (vectors(rows, d, dtype=dtype, seed=seed, strided=strided) for seed, rows in enumerate((n, m)))
    scale = torch.tensor(7.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    check(
        lambda q, k, s: ll.info_nce(q, k, scale=s, reduction="none"),
        lambda q, k, s: oracle.info_nce(q, k, s),
        (query, key, scale),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 7, 65, 300])
def test_clip_loss(n: int, dtype: torch.dtype) -> None:
    image, text = (
        F.normalize(vectors(n, 21, seed=seed), dim=1).detach().to(dtype).requires_grad_() for seed in range(2)
    )
    scale = torch.tensor(14.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    check(ll.clip_loss, oracle.clip, (image, text, scale))


def test_a_thousand_in_tiles_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    image, text = (F.normalize(vectors(1537, 65, seed=seed), dim=1).detach().requires_grad_() for seed in range(2))
    check(ll.clip_loss, oracle.clip, (image, text, torch.tensor(14.3, dtype=torch.float64, requires_grad=True)))


N, M, D, K = 67, 90, 13, 5
GUIDE = [vectors(rows, 6, seed=40).detach() for rows in (N, M)]
GUIDE_3 = [*GUIDE, vectors(N, K, 6, seed=41).detach()]
GUIDE_2 = [*GUIDE, vectors(K, 6, seed=41).detach()]
PRESENT = torch.rand(N, K, generator=torch.Generator().manual_seed(3)) > 0.4
MASK = torch.rand(N, M, generator=torch.Generator().manual_seed(4)) > 0.7
INDEX = torch.randint(-1, M, (N,), generator=torch.Generator().manual_seed(5))
INDICES = torch.randint(-1, M, (N, 4), generator=torch.Generator().manual_seed(6))
LABELS = [torch.randint(9, (rows,), generator=torch.Generator().manual_seed(7)) for rows in (N, M)]
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def dense(index: Tensor) -> Tensor:
    index = index.view(len(index), -1)
    made = torch.zeros(N, M, dtype=torch.bool)
    for column in index.T:
        made[torch.arange(N)[column >= 0], column[column >= 0]] = True
    return made


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...] | None]] = {
    "paired negatives": ({}, {}, (N, K, D)),
    "shared negatives": ({}, {}, (K, D)),
    "everybody's negatives": ({"negative_mode": "unpaired"}, {"shared": True}, (N, K, D)),
    "paired negatives, padded": ({"negatives_mask": PRESENT}, {"present": PRESENT}, (N, K, D)),
    "shared negatives, padded": ({"negatives_mask": PRESENT[0]}, {"present": PRESENT[0]}, (K, D)),
    "shared negatives, hidden from some": ({"negatives_mask": PRESENT}, {"present": PRESENT}, (K, D)),
    "everybody's, padded": (
        {"negative_mode": "unpaired", "negatives_mask": PRESENT},
        {"shared": True, "present": PRESENT},
        (N, K, D),
    ),
    "one positive": ({"positives": INDEX}, {"positive": dense(INDEX)}, None),
    "several positives": ({"positives": INDICES}, {"positive": dense(INDICES)}, None),
    "sparse positives": ({"positives": dense(INDICES).double().to_sparse()}, {"positive": dense(INDICES)}, None),
    "labels": ({"positives": tuple(LABELS)}, {"positive": LABELS[0][:, None] == LABELS[1]}, None),
    "labels and negatives": ({"positives": tuple(LABELS)}, {"positive": LABELS[0][:, None] == LABELS[1]}, (K, D)),
    "mask": ({"mask": MASK}, {"mask": MASK}, None),
    "mask by index": ({"mask": INDICES}, {"mask": dense(INDICES)}, None),
    "margin": ({"false_negative_margin": 0.1}, {"margin": 0.1}, (N, K, D)),
    "margin below": ({"false_negative_margin": -0.2}, {"margin": -0.2}, (K, D)),
    "guide": ({"guide": GUIDE}, {"guide": GUIDE}, None),
    "guide, paired": (
        {"guide": GUIDE_3, "false_negative_margin": 0.3},
        {"guide": GUIDE_3, "margin": 0.3},
        (N, K, D),
    ),
    "guide, shared": ({"guide": GUIDE_2}, {"guide": GUIDE_2}, (K, D)),
    "symmetric": (
        {"symmetric": True},
        {"directions": ("query_to_doc", "doc_to_query"), "apart": True},
        None,
    ),
    "symmetric and masked": (
        {"symmetric": True, "mask": MASK},
        {"directions": ("query_to_doc", "doc_to_query"), "apart": True, "mask": MASK},
        None,
    ),
    "symmetric by a guide": (
        {"symmetric": True, "guide": GUIDE},
        {"directions": ("query_to_doc", "doc_to_query"), "apart": True, "guide": GUIDE},
        None,
    ),
    "four directions": ({"directions": FOUR}, {"directions": FOUR}, None),
    "four directions, shared": ({"directions": FOUR}, {"directions": FOUR}, (K, D)),
    "four directions, everybody's": (
        {"directions": FOUR, "negative_mode": "unpaired"},
        {"directions": FOUR, "shared": True},
        (N, K, D),
    ),
    "four directions, guide": (
        {"directions": FOUR, "guide": GUIDE_3, "negative_mode": "unpaired"},
        {"directions": FOUR, "shared": True, "guide": GUIDE_3},
        (N, K, D),
    ),
    "joint of two": (
        {"directions": ("query_to_doc", "doc_to_query")},
        {"directions": ("query_to_doc", "doc_to_query")},
        None,
    ),
    **{
        f"{which}, {mode}": (
            {"hardness": which, "hardness_strength": 2.5, **ours},
            {"hardness": which, "strength": 2.5, **truth},
            (N, K, D),
        )
        for which in ("in_batch_negatives", "hard_negatives", "all_negatives")
        for mode, ours, truth in (
            ("paired", {}, {}),
            ("unpaired", {"negative_mode": "unpaired"}, {"shared": True}),
            (
                "four directions",
                {"negative_mode": "unpaired", "directions": FOUR},
                {"shared": True, "directions": FOUR},
            ),
        )
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_options(option: str, dtype: torch.dtype) -> None:
    ours, truth, shape = OPTIONS[option]
    query, key = (vectors(rows, D, dtype=dtype, seed=seed) for seed, rows in enumerate((N, M)))
    temperature = torch.tensor(0.21, dtype=dtype, requires_grad=True)
    negatives = [] if shape is None else [vectors(*shape, dtype=dtype, seed=8)]

    def loss(q: Tensor, k: Tensor, t: Tensor, *extra: Tensor) -> Tensor:
        more = {"negatives": extra[0]} if extra else {}
        return ll.info_nce(q, k, temperature=t, reduction="none", **more, **ours)

    def expected(q: Tensor, k: Tensor, t: Tensor, *extra: Tensor) -> Tensor:
        return oracle.info_nce(q, k, 1 / t, **({"negatives": extra[0]} if extra else {}), **truth)

    check(loss, expected, (query, key, temperature, *negatives))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_definition_says_the_same(option: str) -> None:
    """By higher derivatives: a gradient that is asked to be differentiable comes from the definition."""
    ours, _, shape = OPTIONS[option]
    query, key = (vectors(rows, D, seed=seed) for seed, rows in enumerate((N, M)))
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    more: dict[str, Any] = {} if shape is None else {"negatives": vectors(*shape, seed=8)}
    leaves = [query, key, scale, *more.values()]
    loss = ll.info_nce(query, key, scale=scale, reduction="none", **more, **ours)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    plain = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
    for grad, other in zip(plain, again, strict=True):
        assert other.requires_grad
        assert_near(grad, other.detach(), 1e-11)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own, where it first makes a dual number
def test_higher_derivatives_and_transforms() -> None:
    query, key = vectors(5, 3), vectors(7, 3, seed=1)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return ll.info_nce(q, k, temperature=0.5)

    assert torch.autograd.gradgradcheck(loss, (query, key))
    assert torch.autograd.gradcheck(loss, (query, key))
    exact = torch.func.grad(lambda q: oracle.info_nce(q, key, 2.0).mean())(query.detach())
    torch.testing.assert_close(torch.func.grad(loss)(query.detach(), key.detach()), exact)
    tangent = torch.randn_like(query)
    _, moved = torch.func.jvp(lambda q: loss(q, key.detach()), (query.detach(),), (tangent,))
    torch.testing.assert_close(moved, (exact * tangent).sum())
    stacked = torch.stack([query, query * 2 + 1]).detach()
    each = torch.func.vmap(lambda q: loss(q, key.detach()))(stacked)
    torch.testing.assert_close(each, torch.stack([loss(q, key.detach()) for q in stacked]))


# The pitfalls that such losses were found in elsewhere.


@pytest.mark.parametrize("temperature", [0.01, 0.003])
def test_low_temperatures_and_dissimilar_pairs_do_not_underflow(temperature: float) -> None:
    key = vectors(65, 32, dtype=torch.float32)
    query = (-key.detach() + 0.1 * vectors(65, 32, seed=1, dtype=torch.float32).detach()).requires_grad_()
    got = ll.info_nce(query, key, temperature=temperature, reduction="none")
    expected = oracle.info_nce(query.detach().double(), key.detach().double(), 1 / temperature)
    assert_near(got.detach(), expected, 1e-6)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(got.sum(), (query, key)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_a_scale_of_100(dtype: torch.dtype) -> None:
    image, text = (
        F.normalize(vectors(65, 64, seed=seed), dim=1).detach().to(dtype).requires_grad_() for seed in range(2)
    )
    scale = torch.tensor(100.0, requires_grad=True)
    upstream = 65536.0 if dtype == torch.bfloat16 else 4.0
    loss = ll.clip_loss(image, text, scale)
    wide = oracle.wide(image, text, scale)
    expected = oracle.clip(*wide)
    assert loss.dtype == torch.float32
    assert_near(loss.detach(), expected.detach(), 1e-6)
    grads = torch.autograd.grad(loss * upstream, (image, text, scale))
    for grad, exact in zip(grads, torch.autograd.grad(expected * upstream, wide), strict=True):
        assert_near(grad, exact, CLOSE[dtype])


def test_small_losses_keep_six_digits() -> None:
    """Logits of 100 and 100 - gap, each a float32; the loss is about exp(-gap)."""
    n, gap = 65, 22.0
    features = torch.zeros(n, n + 1)
    features[:, :n] = torch.eye(n)
    key = torch.cat([torch.eye(n) * gap, torch.full((n, 1), 100 - gap)], 1).requires_grad_()
    query = features.clone().requires_grad_()
    query.data[:, n] = 1
    loss = ll.info_nce(query, key, scale=1.0, normalize=False, symmetric=True, reduction="none")
    exact_query, exact_key = oracle.wide(query, key)
    gaps = torch.full((n, n), -gap, dtype=torch.float64).fill_diagonal_(-math.inf)
    expected = torch.log1p(gaps.exp().sum(1))
    assert 1e-9 < expected[0].item() < 1e-7
    assert_near(loss.detach(), expected, 1e-6)
    upstream = torch.linspace(0.5, 2, n)
    grads = torch.autograd.grad(loss, (query, key), upstream)
    p = torch.softmax(torch.full((n, n), -gap, dtype=torch.float64).fill_diagonal_(0), 1)
    off = p.clone().fill_diagonal_(0)
    slope = (off - torch.diag(off.sum(1))) * upstream.double()[:, None] / 2
    slope = slope + (off - torch.diag(off.sum(1))).T * upstream.double() / 2
    # Of elements of 1e-9 that are differences of products with 100.
    assert_near(grads[0][:, :n], (slope @ exact_key.detach())[:, :n], 1e-5)
    assert_near(grads[1][:, :n], (slope.T @ exact_query.detach())[:, :n], 1e-5)


def test_padded_negatives_with_a_learnable_temperature() -> None:
    query, key, negatives = vectors(9, 4), vectors(9, 4, seed=1), vectors(9, 3, 4, seed=2)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        negatives[4] = math.inf  # padding may hold anything
    present = torch.ones(9, 3, dtype=torch.bool)
    present[4] = False
    loss = ll.info_nce(
        query, key, temperature=temperature, negatives=negatives, negatives_mask=present, normalize=False
    )
    kept = negatives.detach().clone()
    kept[4] = 0
    exact = oracle.wide(query, key, temperature)
    expected = oracle.info_nce(
        exact[0], exact[1], 1 / exact[2], negatives=kept, present=present, normalize=False
    ).mean()
    assert_near(loss.detach(), expected.detach(), 1e-13)
    grads = torch.autograd.grad(loss, (query, key, temperature, negatives))
    for grad, other in zip(grads, torch.autograd.grad(expected, exact), strict=False):
        assert_near(grad, other, 1e-12)
    assert torch.equal(grads[3][4], torch.zeros(3, 4, dtype=torch.float64))


def test_all_negatives_masked_is_a_sure_query() -> None:
    query, key = vectors(7, 4), vectors(7, 4, seed=1)
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[2] = True
    loss = ll.info_nce(query, key, temperature=0.1, mask=mask, reduction="none")
    assert loss[2].item() == 0
    grads = torch.autograd.grad(loss[2], (query, key))
    assert not any(grad.count_nonzero() for grad in grads)


def test_no_positive_is_not_counted() -> None:
    query, key = vectors(7, 4), vectors(9, 4, seed=1)
    index = torch.tensor([3, -1, 0, 8, -1, 2, 2])
    loss = ll.info_nce(query, key, temperature=0.5, positives=index, reduction="none")
    assert loss[1].item() == loss[4].item() == 0
    mean = ll.info_nce(query, key, temperature=0.5, positives=index)
    torch.testing.assert_close(mean, loss.sum() / 5)
    assert not torch.autograd.grad(mean, query)[0][[1, 4]].count_nonzero()


def test_duplicates_of_the_positive_count_unless_masked() -> None:
    query, key = vectors(6, 4), vectors(6, 4, seed=1)
    with torch.no_grad():
        key[3] = key[1]
        query.copy_(key)
    plain = ll.info_nce(query, key, temperature=0.1, reduction="none")
    masked = ll.info_nce(query, key, temperature=0.1, mask=torch.tensor([-1, 3, -1, 1, -1, -1]), reduction="none")
    assert bool((plain[[1, 3]] > masked[[1, 3]] + 0.5).all())
    torch.testing.assert_close(plain[[0, 2, 4, 5]], masked[[0, 2, 4, 5]])


def test_two_forwards_before_one_backward_and_a_graph_kept() -> None:
    query, key = vectors(33, 5), vectors(33, 5, seed=1)
    first = ll.info_nce(query, key, temperature=0.2)
    second = ll.info_nce(query * 2, key + 1, temperature=0.3)
    together = torch.autograd.grad(first + second, query, retain_graph=True)[0]
    apart = torch.autograd.grad(first, query, retain_graph=True)[0] + torch.autograd.grad(second, query)[0]
    torch.testing.assert_close(together, apart, rtol=1e-13, atol=1e-15)
    torch.autograd.grad(first, query)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(first, query)


def test_accumulation_adds_up() -> None:
    query, key = vectors(33, 5), vectors(33, 5, seed=1)
    ll.info_nce(query, key, temperature=0.2).backward()
    once = query.grad.clone()  # type: ignore[union-attr]
    ll.info_nce(query, key, temperature=0.2).backward()
    assert torch.equal(query.grad, once * 2)  # type: ignore[arg-type]


def test_what_is_written_to_after_the_forward_is_noticed() -> None:
    query, key = vectors(9, 5), vectors(9, 5, seed=1)
    loss = ll.info_nce(query, key, temperature=0.2)
    with torch.no_grad():
        key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["query", "key", "scale", "query and key"])
def test_a_frozen_part_changes_nothing_else(frozen: str) -> None:
    parts = {"query": vectors(40, 5), "key": vectors(40, 5, seed=1), "scale": torch.tensor(5.0, requires_grad=True)}
    parts["scale"] = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(ll.info_nce(*list(parts.values())[:2], scale=parts["scale"]), list(parts.values()))
    for name in frozen.split(" and "):
        parts[name] = parts[name].detach()
    loss = ll.info_nce(parts["query"], parts["key"], scale=parts["scale"])
    free = [name for name in parts if parts[name].requires_grad]
    grads = torch.autograd.grad(loss, [parts[name] for name in free])
    for name, grad in zip(free, grads, strict=True):
        assert torch.equal(grad, whole[list(parts).index(name)])


def test_one_tensor_as_query_and_key() -> None:
    both = vectors(40, 5)
    check(lambda x: ll.info_nce(x, x, temperature=0.2, reduction="none"), lambda x: oracle.info_nce(x, x, 5.0), (both,))


def test_a_bias_under_a_softmax_gets_zero_and_not_none() -> None:
    image, text, bias = vectors(9, 5), vectors(9, 5, seed=1), torch.tensor(-10.0, requires_grad=True)
    loss = ll.clip_loss(image, text, 3.0, bias)
    torch.testing.assert_close(loss.detach(), oracle.clip(image, text, 3.0).detach())
    loss.backward()
    assert bias.grad is not None
    assert bias.grad.item() == 0


def test_zero_vectors_stay_where_they_are() -> None:
    query, key = vectors(9, 5), vectors(9, 5, seed=1)
    with torch.no_grad():
        query[3] = 0
    loss = ll.info_nce(query, key, temperature=0.2, reduction="none")
    torch.testing.assert_close(loss[3], torch.tensor(9.0, dtype=torch.float64).log())
    grads = torch.autograd.grad(loss.sum(), (query, key))
    assert not grads[0][3].count_nonzero()
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_vectors_whose_squares_overflow() -> None:
    query, key = vectors(9, 5, dtype=torch.float32), vectors(9, 5, dtype=torch.float32, seed=1)
    big = ll.info_nce(query * 1e25, key * 1e-25, temperature=0.2)
    torch.testing.assert_close(big, ll.info_nce(query, key, temperature=0.2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_to_the_bit_each_time(dtype: torch.dtype) -> None:
    query, key = vectors(257, 32, dtype=dtype), vectors(257, 32, dtype=dtype, seed=1)

    def once() -> list[Tensor]:
        loss = ll.info_nce(query, key, temperature=0.05, symmetric=True)
        return [loss.detach(), *torch.autograd.grad(loss * 1.7, (query, key))]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_the_matrix_is_not_built_and_nothing_of_its_size_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(square, "TILE_ROWS", 64)
    monkeypatch.setattr(square, "TILE_COLUMNS", 64)
    n, d = 1000, 8
    query, key = vectors(n, d), vectors(n, d, seed=1)
    negatives = vectors(3, d, seed=2)
    labels = torch.arange(n) // 2
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    with NoTensorOf(n * n // 20), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = (
            ll.clip_loss(query, key, scale),
            ll.info_nce(query, key, scale=scale, negatives=negatives, directions=FOUR),
            ll.info_nce(query, key, scale=scale, positives=(labels, labels), false_negative_margin=None),
            ll.info_nce(query, key, scale=scale, symmetric=True, false_negative_margin=0.1),
        )
        for loss in losses:
            loss.backward()
    given = sum(x.nbytes for x in (query, key, negatives, labels, scale))
    assert sum(kept.values()) <= given + len(losses) * 8 * n * 8
    assert sum(kept.values()) < n * n  # a hundredth and less of what the matrices take


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo's, as it goes on after a break
def test_a_compiled_function_breaks_its_graph_and_gives_the_same() -> None:
    query, key = vectors(33, 5), vectors(33, 5, seed=1)

    def step(q: Tensor, k: Tensor) -> Tensor:
        return ll.info_nce(q * 2, k, temperature=0.2) * 3

    loss = torch.compile(step)(query, key)
    torch.testing.assert_close(loss, step(query, key))
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], torch.autograd.grad(step(query, key), query)[0])


def test_autocast_answers_in_float32() -> None:
    query, key = vectors(33, 16, dtype=torch.float32), vectors(33, 16, dtype=torch.float32, seed=1)
    plain = ll.info_nce(query, key, temperature=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ll.info_nce(query, key, temperature=0.05)
    assert torch.equal(loss, plain)
    assert torch.equal(torch.autograd.grad(loss, query)[0], torch.autograd.grad(plain, query)[0])


def test_the_reference_gives_the_same() -> None:
    query, key = vectors(70, 16), vectors(70, 16, seed=1)
    ours, reference = (
        ll.info_nce(query, key, temperature=0.1, symmetric=True, backend=backend) for backend in (None, "reference")
    )
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (query, key)) for x in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)
    assert ll.explain(ll.info_nce, query, key, temperature=0.1).backend in ll.backends()


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((X, X), {}, "pass temperature="),
        ((X, X), {"temperature": 0.1, "scale": 10.0}, "one of them"),
        ((X, X), {"temperature": 0.0}, "temperature must be above 0, got 0"),
        ((X, X), {"scale": torch.tensor(-1.0)}, "scale must be above 0, got -1"),
        ((X, X[:, :2]), {"scale": 1.0}, r"query must be \(N, D\)"),
        ((X, X[:3]), {"scale": 1.0}, "4 queries need as many keys, got 3"),
        ((X, X), {"scale": 1.0, "directions": ("doc_to_query",)}, "'query_to_doc' among them"),
        ((X, X), {"scale": 1.0, "directions": FOUR, "partition": "per_direction"}, "need partition='joint'"),
        ((X, X), {"scale": 1.0, "positives": torch.tensor([0, 1, 2, 4])}, "from 0 to 3, or -1 for none; got 4"),
        ((X, X), {"scale": 1.0, "negatives": X[:, :2]}, r"negatives must be \(K, 3\)"),
        ((X, X), {"scale": 1.0, "negatives_mask": torch.ones(4, 1).bool()}, "pass negatives="),
        ((X, X), {"scale": 1.0, "hardness": "hard"}, "hardness must be None or one of"),
        ((X, X), {"scale": 1.0, "reduction": "batch"}, "not a valid value for reduction"),
        ((X, X), {"scale": 1.0, "guide": (X, X[:2])}, "guide must hold vectors"),
        ((X, X), {"scale": 1.0, "positives": X[0].long(), "symmetric": True}, "further directions need"),
    ],
)
def test_errors_say_what_to_do(arguments: tuple[Any, ...], options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ll.info_nce(*arguments, **options)


def test_integer_vectors_are_refused() -> None:
    with pytest.raises(TypeError, match="query must have a floating dtype"):
        ll.info_nce(X.long(), X, scale=1.0)
