"""A loss of each row keeps the logits of the last tiles that its bytes hold, and makes only the others again.

A GPU's rules ask for it; here the CPU's kernels are given such rules, since their products have the same bits in any
order. What a remade tile would give is had from the same plan with nothing kept.
"""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless._heads import tiles
from logitless._heads.sweep import HeadCall
from logitless._heads.tiles import HeadTiles
from logitless.kernels import cpu

ROWS, CLASSES, WIDTH = 70, 131, 9
# Rows that the bytes hold: tiles of the call, and how many are kept.
PLANS = {9: (9, 1), 20: (4, 1), 40: (2, 1), 66: (4, 3), 70: (1, 1)}
# A softcap's slope takes as much as the logits, but is there once.
CAPPED = {name: {**PLANS, 66: (2, 2)} for name in ("softcap, bias, scale", "js of two heads")}
Operands = dict[str, Tensor]


def drawn(dtype: torch.dtype = torch.float32) -> Operands:
    make = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(dtype)

    target = torch.randint(CLASSES, (ROWS,), generator=make)
    return {
        "hidden": normal(ROWS, WIDTH),
        "head": normal(CLASSES, WIDTH),
        "bias": normal(CLASSES),
        "scale": torch.tensor(1.25, dtype=dtype),
        "other": normal(CLASSES, WIDTH),
        "given": normal(ROWS, CLASSES),
        "target": target,
        "weight": normal(CLASSES).abs() + 0.1,
        "index": torch.randint(CLASSES, (ROWS, 3), generator=make),
    }


def lazy(d: Operands, **options: Any) -> ll.LazyLogits:
    return ll.linear(d["hidden"], d["head"], **options)


LOSSES: dict[str, Callable[[Operands], Tensor | Sequence[Tensor]]] = {
    "cross_entropy": lambda d: LF.cross_entropy(lazy(d), d["target"], reduction="none"),
    "smoothing, weights": lambda d: LF.cross_entropy(
        lazy(d), d["target"], d["weight"], label_smoothing=0.1, reduction="none"
    ),
    "softcap, bias, scale": lambda d: LF.cross_entropy(
        ll.linear(d["hidden"], d["head"], d["bias"], scale=d["scale"], softcap=4.0), d["target"], reduction="none"
    ),
    "token_stats": lambda d: ll.token_stats(lazy(d), d["target"])[:3],
    "entropy": lambda d: ll.entropy(lazy(d)),
    "kl of two heads": lambda d: ll.kl(ll.linear(d["hidden"], d["other"]), lazy(d)),
    "js of two heads": lambda d: ll.js(ll.linear(d["hidden"], d["other"], softcap=9.0), lazy(d), beta=0.3),
    "kl beside logits": lambda d: ll.kl(d["given"], lazy(d)),
    "pair_stats": lambda d: ll.pair_stats(lazy(d), ll.linear(d["hidden"], d["other"]), d["target"])[:8],
    "logsumexp": lambda d: lazy(d).logsumexp(-1),
    "log_softmax.gather": lambda d: lazy(d).log_softmax(-1).gather(-1, d["index"]),
    "log_softmax.sum": lambda d: lazy(d).log_softmax(-1).sum(-1),
}
LEAVES = ("hidden", "head", "bias", "scale", "other", "given")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def heads_of(name: str) -> int:
    return 2 if "two heads" in name or name == "pair_stats" else 1


def keep(
    monkeypatch: pytest.MonkeyPatch, fit: int, name: str = "cross_entropy", dtype: torch.dtype = DTYPES[0]
) -> None:
    """Let the bytes hold so many rows of every buffer of a loss, and logits wait in them."""
    narrow = name == "kl beside logits" and dtype == torch.bfloat16  # which rounds logits to what they are beside
    row_bytes = CLASSES * (2 if narrow else max(4, dtype.itemsize)) * (heads_of(name) + (name in CAPPED))
    rules = cpu.tile_rules()._replace(
        default_bytes=fit * row_bytes + row_bytes // 2,
        gradient_share=1.0,
        value_share=1.0,
        least_rows=8,
        round_rows=4,
        keeps_logits=True,
    )
    monkeypatch.setattr(cpu, "tile_rules", lambda: rules)


def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadCall, "kept_tiles", property(lambda call: 0))


class Counted:
    """How many tiles were made by a product, and the bytes of their buffers."""

    def __init__(self) -> None:
        self.made = self.bytes = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    count = Counted()
    made, buffer = HeadTiles.logits, tiles.buffer

    def counting(self: HeadTiles, start: int, stop: int, first: int, last: int) -> tiles.Tile:
        count.made += 1
        return made(self, start, stop, first, last)

    def measured(backend: Any, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory = buffer(backend, numbers, dtype, device)
        count.bytes += memory.nbytes
        return memory

    monkeypatch.setattr(HeadTiles, "logits", counting)
    monkeypatch.setattr(tiles, "buffer", measured)
    return count


def outputs_of(name: str, d: Operands) -> list[Tensor]:
    made = LOSSES[name](d)
    return [value for value in ([made] if isinstance(made, Tensor) else made) if value.requires_grad]


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    make = torch.Generator().manual_seed(6)
    return [torch.randn(value.shape, generator=make).to(value.dtype) for value in outputs]


def gradients(name: str, dtype: torch.dtype, **options: Any) -> list[Tensor | None]:
    d = drawn(dtype)
    leaves = [d[key].requires_grad_() for key in LEAVES]
    outputs = outputs_of(name, d)
    return list(torch.autograd.grad(outputs, leaves, upstream_of(outputs), allow_unused=True, **options))


def assert_same_bits(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fit", PLANS)
@pytest.mark.parametrize("name", LOSSES)
def test_only_what_was_not_kept_is_made_again(
    name: str, fit: int, dtype: torch.dtype, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(monkeypatch, fit, name, dtype)
    got = gradients(name, dtype)
    kept_made, counted.made = counted.made, 0
    with monkeypatch.context() as patch:
        keep_nothing(patch)
        expected = gradients(name, dtype)
    assert_same_bits(got, expected)
    count, kept = CAPPED.get(name, PLANS)[fit]
    assert counted.made == 2 * count * heads_of(name)
    assert kept_made == (2 * count - kept) * heads_of(name)


@pytest.mark.parametrize("fit", PLANS)
@pytest.mark.parametrize("name", ["cross_entropy", "softcap, bias, scale", "kl of two heads"])
def test_explain_counts_what_is_kept(name: str, fit: int, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, fit, name)
    d = drawn()
    for key in LEAVES:
        d[key].requires_grad_()
    choice = ll.explain(LOSSES[name], d)
    assert choice.tile is not None
    assert choice.peak_bytes is not None
    assert choice.kept_bytes > 0
    tile_bytes = 4 * choice.tile[0] * CLASSES * heads_of(name)
    assert choice.kept_bytes % tile_bytes == 0
    assert f"kept_bytes={choice.kept_bytes}" in repr(choice)
    gradients(name, torch.float32)
    slope = tile_bytes if "softcap" in name else 0
    assert counted.bytes == choice.kept_bytes + slope  # the kept tiles' own memory serves the others
    assert counted.bytes <= cpu.tile_rules().default_bytes
    with monkeypatch.context() as patch:
        keep_nothing(patch)
        remade = ll.explain(LOSSES[name], d)
    assert remade.peak_bytes is not None
    assert remade.kept_bytes == 0
    assert "kept_bytes" not in repr(remade)
    assert choice.peak_bytes - remade.peak_bytes == choice.kept_bytes - tile_bytes


def test_explain_of_a_compiled_graph_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66)
    d = drawn()
    d["hidden"].requires_grad_()
    torch._dynamo.reset()
    loss = lambda hidden, head, target: LF.cross_entropy(ll.linear(hidden, head), target, reduction="none")  # noqa: E731
    eager = ll.explain(loss, d["hidden"], d["head"], d["target"])
    graph = ll.explain(torch.compile(loss, backend="aot_eager"), d["hidden"], d["head"], d["target"])
    assert eager.kept_bytes > 0
    assert graph.kept_bytes == 0
    torch._dynamo.reset()


def test_a_reduced_loss_and_one_without_a_gradient_keep_nothing(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(monkeypatch, 66)
    d = drawn()
    d["hidden"].requires_grad_()
    assert ll.explain(LF.cross_entropy, lazy(d), d["target"]).kept_bytes == 0
    with torch.no_grad():
        assert ll.explain(LOSSES["cross_entropy"], d).kept_bytes == 0
    index = d["index"]
    picked = lazy(d).gather(-1, index.repeat(1, 40))  # whose gradient is not made of the logits
    before = counted.made
    picked.backward(torch.ones_like(picked))
    assert counted.made == before


@pytest.mark.parametrize("name", ["cross_entropy", "softcap, bias, scale", "token_stats", "kl of two heads"])
def test_a_graph_that_is_retained_is_read_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66, name)
    d = drawn()
    leaves = [d[key].requires_grad_() for key in LEAVES]
    outputs = outputs_of(name, d)
    told: dict[str, Any] = {"grad_outputs": upstream_of(outputs), "allow_unused": True}
    first = torch.autograd.grad(outputs, leaves, retain_graph=True, **told)
    second = torch.autograd.grad(outputs, leaves, retain_graph=True, **told)
    last = torch.autograd.grad(outputs, leaves, **told)
    assert_same_bits(first, second)
    assert_same_bits(first, last)
    assert_same_bits(first, gradients(name, torch.float32))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(outputs, leaves, **told)


@pytest.mark.parametrize("wanted", [("hidden",), ("head",), ("other",), ("hidden", "other")], ids=str)
def test_some_of_the_parts(wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66, "kl of two heads")
    results = []
    for nothing in (False, True):
        with monkeypatch.context() as patch:
            if nothing:
                keep_nothing(patch)
            d = drawn()
            leaves = [d[key].requires_grad_() for key in wanted]
            outputs = outputs_of("kl of two heads", d)
            results.append(torch.autograd.grad(outputs, leaves, upstream_of(outputs)))
    assert_same_bits(*results)


def test_one_output_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66, "token_stats")
    d = drawn()
    leaves = [d[key].requires_grad_() for key in ("hidden", "head")]
    stats = ll.token_stats(lazy(d), d["target"])
    upstream = torch.randn(ROWS, generator=torch.Generator().manual_seed(8))
    alone = torch.autograd.grad(stats.entropy, leaves, upstream, retain_graph=True)
    torch.autograd.grad(stats.nll, leaves, upstream)
    for one, other in zip(alone, torch.autograd.grad(ll.entropy(lazy(d)), leaves, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66)
    make = torch.Generator().manual_seed(9)
    hidden = torch.randn(9, 3, generator=make, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 3, generator=make, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: ll.entropy(ll.linear(h, w)), (hidden, head))
    assert torch.autograd.gradgradcheck(lambda h, w: ll.entropy(ll.linear(h, w)), (hidden, head))


def test_kept_logits_are_let_go_when_the_backward_pass_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66)
    kept: list[weakref.ref[Tensor]] = []
    original = HeadTiles.keep

    def noticed(self: HeadTiles) -> Tensor:
        memory = original(self)
        kept.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(HeadTiles, "keep", noticed)
    d = drawn()
    d["hidden"].requires_grad_()
    loss = LOSSES["cross_entropy"](d)
    assert isinstance(loss, Tensor)
    gc.collect()
    assert len(kept) == PLANS[66][1]
    loss.sum().backward(retain_graph=True)
    gc.collect()
    assert sum(ref() is None for ref in kept) == 0
    loss.sum().backward()
    gc.collect()
    assert all(ref() is None for ref in kept)
    assert loss.requires_grad  # it is still there


@pytest.mark.parametrize("name", ["cross_entropy", "kl of two heads"])
def test_hooks_of_saved_tensors_see_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 66, name)
    expected = gradients(name, torch.float32)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        got = gradients(name, torch.float32)
    large = [tensor for tensor in packed if tensor.numel() >= 16 * CLASSES]
    assert len(large) == PLANS[66][1] * heads_of(name)
    assert_same_bits(got, expected)


def test_the_cpus_own_rules_keep_nothing() -> None:
    assert not cpu.tile_rules().keeps_logits
    d = drawn()
    d["hidden"].requires_grad_()
    assert ll.explain(LOSSES["cross_entropy"], d).kept_bytes == 0
