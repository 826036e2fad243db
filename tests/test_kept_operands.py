"""What a loss keeps between its forward and its backward pass: seen by autograd, unchanged, and let go afterwards."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless._heads import sweep
from logitless._rules.keeping import put_together, taken_apart

ROWS, CLASSES, WIDTH = 70, 131, 9
Operands = dict[str, Tensor]


def drawn() -> Operands:
    make = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    target = torch.randint(CLASSES, (ROWS,), generator=make)
    target[::9] = -100
    return {
        "z": 3 * normal(ROWS, CLASSES),
        "y": 3 * normal(ROWS, CLASSES),
        "hidden": normal(ROWS, WIDTH),
        "head": normal(CLASSES, WIDTH),
        "bias": normal(CLASSES),
        "scale": torch.tensor(1.25),
        "target": target,
        "soft": normal(ROWS, CLASSES).softmax(1),
        "weight": normal(CLASSES).abs() + 0.1,
        "sign": torch.where(normal(ROWS) > 0, 1, -1),
        "prob": normal(ROWS, CLASSES).sigmoid(),
        "index": torch.randint(CLASSES, (ROWS, 3), generator=make),
        "level": torch.tensor(-1.0),
        "label": torch.randint(9, (ROWS,), generator=make),
        "key": torch.randint(ROWS, (ROWS, 2), generator=make),
        "left_out": torch.randint(ROWS, (ROWS, 4), generator=make),
        "other": normal(ROWS, 2, CLASSES),
        "there": normal(ROWS, 2) > -1,
        "alike": (normal(ROWS, ROWS) > 1).float(),
    }


LEAVES = ("z", "y", "hidden", "head", "bias", "scale", "level", "prob", "other")


def lazy(d: Operands, **options: Any) -> ll.LazyLogits:
    return ll.linear(d["hidden"], d["head"], d["bias"], scale=d["scale"], **options)


def every(values: tuple[Tensor, ...]) -> Tensor:
    return sum((value * (at + 1) for at, value in enumerate(values) if value.is_floating_point()), torch.zeros(()))


# Each a loss and the operands whose values its gradient depends on.
CALLS: dict[str, tuple[Callable[[Operands], Tensor], tuple[str, ...]]] = {
    "cross_entropy": (lambda d: LF.cross_entropy(d["z"], d["target"]), ("z", "target")),
    "cross_entropy, weights": (
        lambda d: LF.cross_entropy(d["z"], d["target"], d["weight"], label_smoothing=0.1),
        ("z", "target", "weight"),
    ),
    "cross_entropy, strided": (
        lambda d: LF.cross_entropy(d["z"].T.unsqueeze(0), d["target"].unsqueeze(0), d["weight"], reduction="none"),
        ("z", "target", "weight"),
    ),
    "cross_entropy, rows": (lambda d: LF.cross_entropy(d["z"], d["target"], reduction="none"), ("z", "target")),
    "probabilities": (lambda d: LF.cross_entropy(d["z"], d["soft"], d["weight"]), ("z", "soft", "weight")),
    "nll_loss": (lambda d: LF.nll_loss(d["z"], d["target"], d["weight"]), ("target", "weight")),
    "entropy": (lambda d: ll.entropy(d["z"]), ("z",)),
    "token_stats": (lambda d: every(ll.token_stats(d["z"], d["target"])[:3]), ("z", "target")),
    "kl": (lambda d: ll.kl(d["z"], d["y"]), ("z", "y")),
    "pair_stats": (lambda d: every(ll.pair_stats(d["z"], d["y"], d["target"])), ("z", "y", "target")),
    "binary": (lambda d: LF.binary_cross_entropy(d["prob"], d["soft"], d["weight"]), ("prob", "soft", "weight")),
    "binary with logits": (
        lambda d: LF.binary_cross_entropy_with_logits(d["z"], d["soft"], d["weight"], pos_weight=d["weight"]),
        ("z", "soft", "weight"),
    ),
    "kl_div": (lambda d: LF.kl_div(d["z"].log_softmax(1), d["soft"], reduction="batchmean"), ("soft",)),
    "cosine": (lambda d: LF.cosine_similarity(d["z"], d["y"]), ("z", "y")),
    "cosine embedding": (lambda d: LF.cosine_embedding_loss(d["z"], d["y"], d["sign"]), ("z", "y", "sign")),
    "lazy": (lambda d: LF.cross_entropy(lazy(d), d["target"]), ("hidden", "head", "target")),
    "lazy, weights": (
        lambda d: LF.cross_entropy(lazy(d), d["target"], d["weight"], label_smoothing=0.1),
        ("hidden", "head", "bias", "target", "weight"),
    ),
    "lazy, rows": (
        lambda d: LF.cross_entropy(lazy(d, softcap=4.0), d["target"], d["weight"], reduction="none"),
        ("hidden", "head", "bias", "scale", "target", "weight"),
    ),
    "lazy probabilities": (
        lambda d: LF.cross_entropy(lazy(d), d["soft"], d["weight"]),
        ("hidden", "head", "soft", "weight"),
    ),
    "lazy entropy": (lambda d: ll.entropy(lazy(d)), ("hidden", "head", "bias")),
    "lazy token_stats": (lambda d: every(ll.token_stats(lazy(d), d["target"])[:3]), ("hidden", "head", "target")),
    "lazy student": (lambda d: ll.kl(d["y"], lazy(d), reduction="mean"), ("hidden", "head", "y")),
    "lazy student, rows": (lambda d: ll.js(d["y"], lazy(d)), ("hidden", "head", "y")),
    "lazy binary": (
        lambda d: LF.binary_cross_entropy_with_logits(lazy(d), d["soft"], d["weight"], pos_weight=d["weight"]),
        ("hidden", "head", "soft", "weight"),
    ),
    "lazy logsumexp": (lambda d: lazy(d).logsumexp(-1), ("hidden", "head", "bias")),
    "lazy gather": (lambda d: lazy(d).gather(-1, d["index"]), ("hidden", "head", "index")),
    "log_probs": (lambda d: ll.log_probs(d["z"], d["target"]), ("z", "target")),
    "temperature": (lambda d: ll.log_probs(d["z"], d["target"], temperature=2.0), ("z", "target")),
    "token_stats, top_k": (
        lambda d: every(ll.token_stats(d["z"], d["target"], top_k=3)[:3]),
        ("z", "target"),
    ),
    "kl, skew": (lambda d: ll.kl(d["z"], d["y"], skew=0.1), ("z", "y")),
    "js, beta": (lambda d: ll.js(d["z"], d["y"], beta=0.2), ("z", "y")),
    "tv": (lambda d: ll.tv(d["z"], d["y"], temperature=2.0), ("z", "y")),
    "lazy log_probs": (lambda d: ll.log_probs(lazy(d), d["target"]), ("hidden", "head", "target")),
    "lazy top_k": (
        lambda d: every(ll.token_stats(lazy(d), d["target"], temperature=2.0, top_k=3)[:3]),
        ("hidden", "head", "target"),
    ),
    "lazy kl, skew": (lambda d: ll.kl(d["y"], lazy(d), skew=0.1), ("hidden", "head", "y")),
    "lazy js, beta": (lambda d: ll.js(d["y"], lazy(d), beta=0.2, reduction="mean"), ("hidden", "head", "y")),
    "lazy tv": (lambda d: ll.tv(lazy(d), d["y"]), ("hidden", "head", "y")),
    "pairwise_cosine": (lambda d: ll.pairwise_cosine(d["z"], d["y"]), ("z", "y")),
    "info_nce": (
        lambda d: ll.info_nce(d["z"], d["y"], scale=d["scale"], positives=d["key"], mask=d["left_out"]),
        ("z", "y", "scale", "key", "left_out"),
    ),
    "info_nce, negatives": (
        lambda d: ll.info_nce(
            d["z"], d["y"], scale=d["scale"], negatives=d["other"], negatives_mask=d["there"], symmetric=True
        ),
        ("z", "y", "scale", "other", "there"),
    ),
    "info_nce, margin": (
        lambda d: ll.info_nce(
            d["z"], d["y"], scale=2.0, false_negative_margin=0.1, hardness="all_negatives", hardness_strength=0.5
        ),
        ("z", "y"),
    ),
    "info_nce, guide": (
        lambda d: ll.info_nce(d["z"], d["y"], scale=2.0, guide=(d["hidden"].detach(), d["hidden"].detach().flip(0))),
        ("z", "y"),
    ),
    "info_nce, labels": (
        lambda d: ll.info_nce(d["z"], d["y"], scale=2.0, positives=(d["label"], d["label"]), reduction="none"),
        ("z", "y", "label"),
    ),
    "clip_loss": (lambda d: ll.clip_loss(d["z"], d["y"], d["scale"]), ("z", "y", "scale")),
    "siglip_loss": (lambda d: ll.siglip_loss(d["z"], d["y"], d["scale"], d["level"]), ("z", "y", "scale", "level")),
    "supcon_loss": (lambda d: ll.supcon_loss(d["z"], d["label"], temperature=d["scale"]), ("z", "label", "scale")),
    "supcon_loss, mask": (lambda d: ll.supcon_loss(d["z"], mask=d["alike"]), ("z", "alike")),
    "cosent_loss": (lambda d: ll.cosent_loss((d["z"], d["y"]), d["label"], scale=d["scale"]), ("z", "y", "scale")),
    "batch_triplet_loss": (lambda d: ll.batch_triplet_loss(d["z"], d["label"]), ("z", "label")),
    "batch_triplet_loss, all": (
        lambda d: ll.batch_triplet_loss(d["z"], d["label"], kind="all", distance="cosine", margin=0.5),
        ("z", "label"),
    ),
}
# Indices in order, masks turned round, vectors of length 1 in float64, one over a temperature.
COPIED = {
    ("temperature", "target"),
    ("info_nce", "key"),
    ("info_nce", "left_out"),
    ("info_nce, negatives", "other"),
    ("info_nce, negatives", "there"),
    ("supcon_loss", "label"),
    ("supcon_loss", "scale"),
    ("supcon_loss, mask", "alike"),
    ("cosent_loss", "scale"),
    ("batch_triplet_loss", "z"),
    ("batch_triplet_loss, all", "z"),
}
PAIRS = [(name, operand) for name, (_, operands) in CALLS.items() for operand in operands]


def leaves_of(d: Operands) -> Operands:
    return {k: v.clone().requires_grad_(k in LEAVES) for k, v in d.items()}


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, max(1, loss.numel())).view(loss.shape)


@pytest.fixture(params=["", "reference"], ids=["kernels", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param:
        monkeypatch.setenv("LOGITLESS_BACKEND", request.param)
    else:
        monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    return str(request.param)


@pytest.mark.parametrize(("name", "operand"), PAIRS)
def test_an_operand_changed_in_between_is_never_read_in_silence(name: str, operand: str, backend: str) -> None:
    """It raises as in torch; where a loss made a copy of its own in the forward pass, the gradient is of that."""
    d = leaves_of(drawn())
    wanted = [d[leaf] for leaf in LEAVES if leaf in CALLS[name][1]] or [d["z"]]
    loss = CALLS[name][0](d)
    expected = torch.autograd.grad(loss, wanted, upstream_of(loss))
    loss = CALLS[name][0](d)
    with torch.no_grad():
        d[operand].copy_(d[operand].flip(0) if d[operand].dim() else d[operand] * 2)
    found = refusal = None
    try:
        found = torch.autograd.grad(loss, wanted, upstream_of(loss))
    except RuntimeError as error:
        refusal = str(error)
    if found is None:
        assert "modified by an inplace operation" in str(refusal) or "modified in place" in str(refusal)
        return
    # Plain operations, of a target that is made safe to read; and the rows that are left when others are ignored.
    copied = name in ("nll_loss", "kl_div") or (name.startswith("lazy") and operand in ("hidden", "target"))
    assert backend or copied or (name, operand) in COPIED
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_held_after_the_backward_pass(name: str) -> None:
    """The loss lives on; what it was made of does not, though it leads to what the gradients flow to."""
    d = leaves_of(drawn())
    given = {k: v * 1 if v.requires_grad else v for k, v in d.items()}  # not leaves: the graph ends beyond them
    loss = CALLS[name][0](given)
    kept = [weakref.ref(given[operand]) for operand in CALLS[name][1]]
    loss.backward(upstream_of(loss))
    d = {}
    given = {}
    gc.collect()
    assert [ref() is None for ref in kept] == [True] * len(kept)
    assert loss.grad_fn is not None


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_that_is_kept_gives_the_same_again_and_one_that_is_not_raises(name: str) -> None:
    d = leaves_of(drawn())
    loss = CALLS[name][0](d)
    wanted = [d[operand] for operand in LEAVES if operand in CALLS[name][1]] or [d["z"]]
    upstream = upstream_of(loss)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    copies = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()  # a gradient is its receiver's
    again = torch.autograd.grad(loss, wanted, 2 * upstream, retain_graph=True)
    third = torch.autograd.grad(loss, wanted, upstream)
    for one, two, three in zip(copies, again, third, strict=True):
        torch.testing.assert_close(2 * one, two)
        assert torch.equal(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted, upstream)


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensor_hooks_see_all_that_is_kept(name: str) -> None:
    """Packed as copies and unpacked as others: gradients made early, statistics, targets and weights go that way."""
    d = leaves_of(drawn())
    loss = CALLS[name][0](d)
    wanted = [d[operand] for operand in LEAVES if operand in CALLS[name][1]] or [d["z"]]
    expected = torch.autograd.grad(loss, wanted, upstream_of(loss))
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach().clone()

    def poison(tensor: Tensor) -> None:
        (tensor.fill_(0) if not tensor.is_floating_point() else tensor.fill_(torch.nan)) if tensor.numel() else None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda copy: copy):
        loss = CALLS[name][0](d)
    # Everything that was saved is spoiled where it was: the backward pass reads what the hooks made of it.
    parts = {d[k].data_ptr() for k in LEAVES}
    with torch.no_grad():
        for tensor in packed:
            if tensor.data_ptr() not in parts and type(tensor) is Tensor and not tensor.requires_grad:
                poison(tensor)
    found = torch.autograd.grad(loss, wanted, upstream_of(loss))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_offloading_moves_early_gradients(reduction: str) -> None:
    d = leaves_of(drawn())
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LF.cross_entropy(lazy(d), d["target"], reduction=reduction)
    assert max(sizes) < ROWS * CLASSES  # nothing of the logits' size
    gradients = sizes.count(CLASSES * WIDTH)
    parts = sum(1 for size in sizes if size == CLASSES * WIDTH)
    assert gradients == parts >= (2 if reduction == "mean" else 1)


def test_a_call_is_taken_apart_and_put_together() -> None:
    first, second = torch.ones(2), torch.zeros(3)

    def function(x: Tensor) -> Tensor:
        return x + second

    call = (first, [second, 1], function, None)
    hollow, others = taken_apart(call, [first])
    assert [id(t) for t in others] == [id(second)]
    made = put_together(hollow, [first * 2, second + 5])
    assert torch.equal(made[0], first * 2)
    assert torch.equal(made[1][0], second + 5)
    assert torch.equal(made[2](torch.ones(3)), torch.full((3,), 6.0))
    assert hollow[2] is not function


def no_keeping(*_: Any) -> None:
    raise AssertionError("something was kept")


@pytest.mark.parametrize("name", ["lazy", "lazy, weights", "lazy, rows", "lazy token_stats", "lazy student"])
def test_nothing_is_kept_where_no_gradient_can_follow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CALLS[name][0](leaves_of(drawn())).detach()
    monkeypatch.setattr(sweep, "taken_apart", no_keeping)
    with torch.no_grad():
        assert torch.equal(CALLS[name][0](leaves_of(drawn())), expected)
    found = CALLS[name][0](drawn())
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with pytest.raises(AssertionError, match="something was kept"):
        CALLS[name][0](leaves_of(drawn()))


def test_a_fused_loss_makes_no_lazy_tensor() -> None:
    d = leaves_of(drawn())
    loss = LF.linear_cross_entropy(d["hidden"], d["head"], d["target"])
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [following for following, _ in node.next_functions]
    assert names == {"_ReducedBackward", "IndexBackward0", "torch::autograd::AccumulateGrad"}


def test_a_fused_loss_refuses_a_weight_whose_memory_was_freed() -> None:
    d = drawn()
    d["head"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the weight's memory was freed"):
        LF.linear_cross_entropy(d["hidden"], d["head"], d["target"])
