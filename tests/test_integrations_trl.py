"""TRL's own functions and trainers, beside the same with ours in their places."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import trl_steps
from logitless.integrations import trl as ours
from logitless.kernels import interface
from test_lazy import NoTensorOf

CLASSES, WIDTH = 499, 8
SMALL = {"classes": CLASSES, "width": WIDTH, "length": 16, "rows": 2}


@pytest.fixture(autouse=True)
def tiles_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles of no more than 8 rows, so that none of them is as large as a sequence's logits."""
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 12 * CLASSES * 4)


@pytest.fixture(scope="module")
def utils() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl.trainer.utils as module
    return module


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(2)
    logits = (torch.randn(3, 7, CLASSES, generator=make, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    index = torch.randint(CLASSES, (3, 7), generator=make)
    return logits, index, torch.randint(0, 2, (3, 7), generator=make)


def gradients(outputs: tuple[Tensor, ...], logits: Tensor) -> list[Tensor]:
    make = torch.Generator().manual_seed(3)
    upstream = [torch.randn(out.shape, generator=make, dtype=torch.float64).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [logits], upstream)]


CALLS: dict[str, Any] = {
    "selected": lambda m, z, i, k: (m.selective_log_softmax(z, i),),
    "selected, masked": lambda m, z, i, k: (m.selective_log_softmax(z, i, 0.7, k),),
    "selected of k": lambda m, z, i, k: (m.selective_log_softmax(z, torch.stack([i, i.flip(0)], -1), 1.3),),
    "entropy": lambda m, z, i, k: (m.entropy_from_logits(z, chunk_size=4),),
    "both": lambda m, z, i, k: m.selective_log_softmax_and_entropy(z, i),
    "both, masked": lambda m, z, i, k: m.selective_log_softmax_and_entropy(z, i, True, 0.7, k),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_of_logits(name: str, dtype: torch.dtype, utils: Any) -> None:
    logits, index, mask = drawn(dtype)
    wide = logits.detach().double().requires_grad_()
    expected = gradients(CALLS[name](utils, wide, index, mask), wide)
    found = gradients(CALLS[name](ours, logits, index, mask), logits)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["selected", "entropy", "both", "selected of k"])
def test_functions_of_lazy_logits_build_none(name: str) -> None:
    make = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 21, WIDTH, generator=make).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, generator=make).requires_grad_()
    index = torch.randint(CLASSES, (3, 21), generator=make)
    dense = hidden @ weight.T
    upstream = [torch.randn(out.shape, generator=make) for out in CALLS[name](ours, dense, index, None)]
    expected = torch.autograd.grad(CALLS[name](ours, dense, index, None), [hidden, weight], upstream)
    with NoTensorOf(21 * CLASSES):
        found = torch.autograd.grad(
            CALLS[name](ours, ll.linear(hidden, weight), index, None), [hidden, weight], upstream
        )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("labelled", [False, True])
def test_generalized_jsd_loss(beta: float, reduction: str, labelled: bool, utils: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer

    student, index, mask = drawn(torch.float64)
    teacher = student.detach().flip(0) * 0.7
    labels = index.masked_fill(mask == 0, -100) if labelled else None
    for count in (None, 5, torch.tensor(7)):
        losses = [
            loss(student, teacher, labels, beta, 1.7, reduction, count)
            for loss in (GKDTrainer.generalized_jsd_loss, ours.generalized_jsd_loss)
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-11, atol=1e-14)
        theirs, mine = (torch.autograd.grad(loss, student)[0] for loss in losses)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_the_fused_head_and_distillation_ask(softcap: float | None, bias: bool, temperature: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    make = torch.Generator().manual_seed(5)
    sizes = ((23, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    student = [torch.randn(size, generator=make).requires_grad_() for size in sizes]
    teacher = [torch.randn(size, generator=make) for size in sizes]
    if not bias:
        student[2] = teacher[2] = None  # type: ignore[call-overload]
    target = torch.randint(CLASSES, (23,), generator=make)
    leaves = [part for part in student if part is not None]

    def scored(function: Any) -> list[Tensor]:
        out = function.apply(*student, target, temperature, 128, softcap, 1.3)
        upstream = torch.linspace(-1, 2, 23)
        return [*out, *torch.autograd.grad([out[0], out[1]], leaves, [upstream, upstream.flip(0)])]

    def distilled(function: Any) -> list[Tensor]:
        out = function.apply(*student, *teacher, 0.3, temperature, 1.3, softcap, 0.8, softcap)
        return [*out, *torch.autograd.grad(out[0], leaves, torch.linspace(-1, 2, 23))]

    for call, theirs, mine in (
        (scored, ChunkedLogProbFunction, ours.ChunkedLogProbFunction),
        (distilled, ChunkedDivergenceFunction, ours.ChunkedDivergenceFunction),
    ):
        for found, expected in zip(call(mine), call(theirs), strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_metrics_of_a_half_precision_head_are_those_of_its_numbers() -> None:
    make = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, WIDTH, generator=make).bfloat16() for n in (23, CLASSES))
    target = torch.randint(CLASSES, (23,), generator=make)
    found = ours.ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 128)
    z = hidden.double() @ weight.double().T
    log_p = z.log_softmax(-1)
    expected = (
        log_p.gather(-1, target[:, None]).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        (2 * log_p).logsumexp(-1),
        z.mean(-1),
        z.argmax(-1) == target,
    )
    for one, truth in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one.to(truth.dtype), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", trl_steps.TRAINERS)
def test_a_trainer_takes_the_same_steps_without_logits(name: str) -> None:
    theirs = trl_steps.step(name, False, SMALL)
    # A batch has 2 rows of at least 8 tokens; generation reads one row of logits a sequence.
    mine = trl_steps.step(name, True, SMALL, NoTensorOf(16 * CLASSES))
    logged, far = trl_steps.apart(theirs, mine)
    assert logged < 1e-5
    assert far < 1e-5


def test_what_was_installed_is_removed(utils: Any) -> None:
    names = ("selective_log_softmax", "entropy_from_logits", "_ChunkedLogProbFunction", "_use_triton")
    before = [vars(utils)[name] for name in names]
    with ours.install() as installed:
        assert utils.selective_log_softmax is ours.selective_log_softmax
        assert utils._use_triton(torch.device("cpu"))
    assert [vars(utils)[name] for name in names] == before
    installed.remove()
    assert not installed


def test_errors_say_what_was_expected() -> None:
    z, index = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for call in (ours.selective_log_softmax, ours.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="positive temperature, got 0"):
            call(z, index, temperature=0.0)
    with pytest.raises(ValueError, match="'batchmean', 'sum' or 'mean', got 'none'"):
        ours.generalized_jsd_loss(z, z, reduction="none")
    with pytest.raises(IndexError):
        ours.selective_log_softmax(z, index - 1)
