"""What `explain` says of a call is what the call does: its backend, and for lazy logits its tile and its memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless._rules import dispatch

ROWS, FEATURES, CLASSES = 1000, 32, 49999

# Of a process of its own: the forecast, then the peak of the same call and its backward pass.
MEASURE = """
import json, sys
import torch, logitless as ll, logitless.functional as LF
from logitless._bench.memory import call_and_growth

rows, features, classes, max_bytes, dtype, name, train = json.loads(sys.argv[1])
torch.set_num_threads(2)
dtype = getattr(torch, dtype)
hidden, weight = (torch.randn(n, features).to(dtype).requires_grad_(train) for n in (rows, classes))
target = torch.randint(classes, (rows,))
calls = {
    "cross_entropy": lambda h, t: LF.linear_cross_entropy(h, weight, t, max_bytes=max_bytes),
    "token_stats": lambda h, t: ll.token_stats(ll.linear(h, weight), t).nll.sum(),
    "kl": lambda h, t: ll.kl(ll.linear(-h.detach(), weight.detach()), ll.linear(h, weight)).sum(),
    "labels": lambda h, t: LF.binary_cross_entropy_with_logits(
        ll.linear(h, weight), torch.sparse_coo_tensor(torch.stack([torch.arange(len(t)), t]), torch.ones(len(t)),
                                                      (len(t), classes))),
}

def run(h, t):
    loss = calls[name](h, t)
    return torch.autograd.grad(loss, (hidden, weight)) if train else loss

run(hidden[:8], target[:8])  # libraries and threads are there
grads, growth = call_and_growth(lambda: run(hidden, target))
kept = sum(grad.nbytes for grad in grads) if train else 0
choice = ll.explain(calls[name], hidden, target)
print(json.dumps([choice.backend, choice.tile, choice.peak_bytes, growth - kept]))
"""


@pytest.mark.parametrize(
    ("name", "dtype", "train", "max_bytes"),
    [
        ("cross_entropy", "float32", True, None),
        ("cross_entropy", "float32", False, None),
        ("cross_entropy", "float32", True, 150 * 10**6),
        ("cross_entropy", "bfloat16", True, None),
        ("token_stats", "float32", True, None),
        ("kl", "float32", True, None),
        ("labels", "float32", True, None),
    ],
)
def test_the_forecast_is_what_the_call_takes(name: str, dtype: str, train: bool, max_bytes: int | None) -> None:
    asked = json.dumps([ROWS, FEATURES, CLASSES, max_bytes, dtype, name, train])
    done = subprocess.run([sys.executable, "-c", MEASURE, asked], capture_output=True, text=True, check=True)
    backend, tile, peak, taken = json.loads(done.stdout)
    assert backend == "cpu"
    assert tile[1] == CLASSES
    assert taken == pytest.approx(peak, rel=0.1)
    assert peak < ROWS * CLASSES * 4  # what the logits alone would take
    assert taken <= (max_bytes or peak * 1.1)


CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cross_entropy": lambda h, w: LF.cross_entropy(ll.linear(h, w), torch.zeros(5, dtype=torch.int64)),
    "labels": lambda h, w: LF.binary_cross_entropy_with_logits(ll.linear(h, w), torch.zeros(5, 7)),
    "token_stats": lambda h, w: ll.token_stats(ll.linear(h, w), torch.zeros(5, dtype=torch.int64)),
    "entropy": lambda h, w: ll.entropy(ll.linear(h, w)),
    "kl": lambda h, w: ll.kl(ll.linear(h, w), torch.zeros(5, 7)),
    "pair_stats": lambda h, w: ll.pair_stats(torch.zeros(5, 7), ll.linear(h, w)),
}


@pytest.mark.parametrize("name", CALLS)
def test_lazy_logits_are_served_by_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    choice = ll.explain(CALLS[name], hidden, weight)
    assert choice.backend == "cpu"
    assert choice.tile == (5, 7)
    assert choice.peak_bytes is not None
    assert choice.peak_bytes > 5 * 7 * 4
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    forced = ll.explain(CALLS[name], hidden, weight)
    assert (forced.backend, forced.tile, forced.peak_bytes) == ("reference", None, None)


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_are_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced, a call that the kernels do not serve raises; this one does not, and no reference tile is folded."""

    def no_fold(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the reference served it")

    monkeypatch.setenv("LOGITLESS_BACKEND", "cpu")
    for module in ("head_classification", "binary", "measures"):
        monkeypatch.setattr(f"logitless.losses.{module}.fold_rows", no_fold)
    CALLS[name](torch.randn(5, 3, requires_grad=True), torch.randn(7, 3))


def test_what_the_kernels_do_not_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    logits, target = ll.linear(torch.randn(5, 3), torch.randn(7, 3)), torch.zeros(5, dtype=torch.int64)
    weight = torch.ones(7, requires_grad=True)
    choice = ll.explain(LF.cross_entropy, logits, target, weight)
    assert choice == dispatch.Choice("reference", "weight requires a gradient")
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        LF.cross_entropy(logits, target, weight, backend="cpu")
