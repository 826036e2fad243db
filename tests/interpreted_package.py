"""Losses and measures, dense and of heads, served by interpreted Triton kernels; `test_triton.py` runs this file.

What holds any backend to the reference (test_backends.py), to float64 (test_devices.py) and to the suite's own truths
(checks.py) holds this one. Asked for by name it takes tensors of the CPU; unasked it never does.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import checks
import logitless as ll
import logitless.functional as LF
import oracles
import test_backends
import test_devices
from logitless._heads.sweep import HeadCall
from logitless._heads.tiles import HeadTiles
from logitless.kernels import triton

# The target of these requires a gradient there, which no kernel gives.
PLAIN = {"cross_entropy of probabilities", "kl_div", "binary_cross_entropy_with_logits"}
NO_KERNEL = {"cross_entropy with probabilities", "kl_div"}  # so here
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOGITLESS_BACKEND", "triton")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", test_backends.CALLS)
def test_eager_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, drawn = test_backends.CALLS[name][0], test_backends.drawn()
    got = test_backends.results(loss, drawn)
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    test_backends.assert_close(got, test_backends.results(loss, drawn))


@pytest.mark.parametrize("name", ["weighted and smooth", "pair_stats", "binary", "cosine", "lazy", "lazy kl"])
def test_compiled_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, drawn = test_backends.CALLS[name][0], test_backends.drawn()
    got = test_backends.results(torch.compile(loss, fullgraph=True, backend="aot_eager"), drawn)
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    test_backends.assert_close(got, test_backends.results(loss, drawn))


@pytest.mark.parametrize("name", [name for name in test_devices.CASES if name not in NO_KERNEL])
def test_against_float64(name: str) -> None:
    test_devices.test_value_and_gradients("cpu", name, torch.float32)


@pytest.mark.parametrize("name", [name for name in checks.CHECKS if name not in PLAIN])
def test_the_checks_of_the_suite(name: str) -> None:
    for dtype in (torch.float32, torch.float64, *(HALVES if name in ("cross_entropy", "lazy token_stats") else ())):
        checks.CHECKS[name](dtype)


# --- heads


def head_of(dtype: torch.dtype, rows: int = 45, classes: int = 65, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, width, generator=make).to(dtype) for n in (rows, classes))
    return hidden, weight, torch.randint(classes, (rows,), generator=make)


Loss = Callable[[ll.LazyLogits | Tensor, Tensor], Tensor]
HEAD_LOSSES: dict[str, Loss] = {
    "cross_entropy": LF.cross_entropy,
    "a row": lambda z, t: LF.cross_entropy(z, t, reduction="none"),
    "entropy": lambda z, t: ll.entropy(z),
    "token_stats": lambda z, t: ll.token_stats(z, t).nll,
    "js of both": lambda z, t: ll.js(z, z * 0.5, reduction="mean"),
    "binary": lambda z, t: LF.binary_cross_entropy_with_logits(z, torch.nn.functional.one_hot(t, z.shape[1]).float()),
    "log_softmax": lambda z, t: torch.log_softmax(z, 1).gather(1, t[:, None]),
}


def cut(monkeypatch: pytest.MonkeyPatch, **changed: int) -> None:
    """Cut heads as a GPU's are, but with fewer rows to a tile: a program has one row, and each takes its time here."""
    rules = triton.tile_rules()._replace(**changed)
    monkeypatch.setattr(triton, "tile_rules", lambda: rules)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", HEAD_LOSSES)
def test_heads_of_every_dtype(
    name: str, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three tiles; the truth is float64 of the same numbers, the measure what torch loses of dense logits."""
    cut(monkeypatch, default_bytes=0, default_rows=16, least_rows=16, round_rows=8)
    hidden, weight, target = head_of(dtype)
    loss = HEAD_LOSSES[name]
    if name != "log_softmax":
        choice = ll.explain(loss, ll.linear(hidden.requires_grad_(), weight, softcap=softcap), target)
        assert choice.tile == (16, 65)

    def results(kind: torch.dtype, lazy: bool) -> list[Tensor]:
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (hidden, weight))
        if lazy:
            logits = ll.linear(h, w, softcap=softcap)
        else:
            logits = h @ w.T
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        out = loss(logits, target)
        upstream = torch.linspace(0.5, 2, max(1, out.numel())).to(out.dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, (h, w), upstream)]

    got = results(dtype, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITLESS_BACKEND", "reference")
        truths, naive = results(torch.float64, False), results(dtype, False)
    for result, truth, plain in zip(got, truths, naive, strict=True):
        oracles.assert_no_worse(result.to(plain.dtype), truth, plain, name)


@pytest.mark.parametrize(("max_bytes", "tile"), [(4 * 65 * 18, (16, 65)), (3000, (15, 46))])
def test_tiles_of_rows_and_of_classes(max_bytes: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, least_rows=16, cut_rows=15, round_rows=8, least_classes=16)
    told = {"label_smoothing": 0.1, "max_bytes": max_bytes}
    assert ll.explain(LF.linear_cross_entropy, *head_of(torch.float32), **told).tile == tile
    hidden, weight, target = (x.requires_grad_() if x.is_floating_point() else x for x in head_of(torch.float32))
    grads = []
    for limit in (None, max_bytes):
        loss = LF.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, max_bytes=limit)
        grads.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_logits_that_are_kept_are_those_that_would_be_made_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tiles one is kept, and a bfloat16 gradient is written into its bytes; bit for bit."""
    cut(monkeypatch, least_rows=16, round_rows=8)
    hidden, weight, target = head_of(dtype, rows=43)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    upstream = torch.linspace(-1, 2, 43)

    def loss() -> Tensor:
        return LF.linear_cross_entropy(*leaves, target, reduction="none", max_bytes=4 * 65 * 28)

    choice, made, original = ll.explain(loss), [], HeadTiles.logits
    assert choice.tile is not None
    assert choice.kept_bytes == 4 * 65 * choice.tile[0]
    results = []
    for kept in (1, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HeadTiles, "logits", lambda *args: made.append(1) or original(*args))
            if not kept:
                patch.setattr(HeadCall, "kept_tiles", property(lambda call: 0))
            made.clear()
            results.append(torch.autograd.grad(loss(), leaves, upstream.to(loss().dtype)))
        assert len(made) == 4 - kept + 2  # the second loss has no backward pass
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_gradients_and_transforms_are_the_definitions() -> None:
    hidden, weight, target = head_of(torch.float64, rows=5, classes=7, width=3)
    hidden.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: LF.cross_entropy(ll.linear(h, weight), target), hidden)
    assert torch.autograd.gradgradcheck(lambda h: ll.entropy(h @ weight.T), hidden)


def test_unasked_it_leaves_tensors_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.zeros(3, 5), torch.tensor([0, 1, 2])
    asked = ll.explain(LF.cross_entropy, logits, target)
    assert asked == ("triton", "TRITON_INTERPRET=1: the kernels are interpreted")
    monkeypatch.delenv("LOGITLESS_BACKEND")
    assert ll.explain(LF.cross_entropy, logits, target).backend in ("cpu", "reference")
    assert ll.explain(LF.cross_entropy, logits, target, backend="triton").backend == "triton"
    weight = torch.ones(5, requires_grad=True)
    assert ll.explain(LF.cross_entropy, logits, target, weight).backend == "reference"
    assert ll.backends()["triton"].available


def test_a_bad_class_is_named_where_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = head_of(torch.float32, rows=7)
    target[4] = 65
    for logits in (hidden @ weight.T, ll.linear(hidden, weight)):
        for call in (LF.cross_entropy, lambda z, t: ll.token_stats(z, t).nll.mean()):
            assert call(logits, target).isnan()
            with monkeypatch.context() as patch:
                patch.setenv("LOGITLESS_CHECK", "1")
                with pytest.raises(IndexError, match="Target 65 is out of bounds at position 4"):
                    call(logits, target)


def test_autocast() -> None:
    hidden, weight, target = head_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = LF.cross_entropy(ll.linear(hidden, weight), target)
    assert got.dtype == torch.float32
    expected = LF.cross_entropy(ll.linear(hidden.bfloat16(), weight.bfloat16()), target)
    torch.testing.assert_close(got, expected.float(), rtol=2**-8, atol=0)


def test_it_is_interpreted() -> None:
    assert triton.launching.INTERPRETED
