"""Each row of docs/numerics.md: torch's answer and ours, both asserted; the first test keeps the two in step."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from mpmath import mp
from torch import Tensor, tensor
from torch.distributions import Categorical

import logitless as ll
import logitless.functional as LF

INF, NAN = math.inf, math.nan
PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"
BOTH = pytest.mark.parametrize("functional", [F, LF], ids=["torch", "logitless"])


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[float], list[list[float]]]:
    """Return the value and one gradient for each input, flat."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.sum().backward()
    return value.detach().reshape(-1).tolist(), [leaf.grad.reshape(-1).tolist() for leaf in leaves]


def gradient(function: Callable[..., Tensor], leaf: Tensor) -> list[float]:
    return value_and_gradients(function, leaf)[1][0]


def all_nan(values: list[float]) -> bool:
    return all(math.isnan(value) for value in values)


def test_page_and_tests_hold_the_same_rows() -> None:
    rows = re.findall(r"^\| ([A-Z]+\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    tests = [match[1] for name in globals() if (match := re.match(r"test_([A-Z]+\d+)_", name))]
    assert len(rows) == len(set(rows))
    assert len(tests) == len(set(tests))
    assert sorted(rows) == sorted(tests)


# Reductions over nothing


@BOTH
def test_M1_every_row_ignored(functional) -> None:
    (value,), (grad,) = value_and_gradients(
        lambda z: functional.cross_entropy(z, tensor([-100, -100])), tensor([[1.0, 2.0], [3.0, 4.0]])
    )
    assert math.isnan(value)
    assert grad == [0, 0, 0, 0]


def test_M2_every_row_ignored_with_empty_zero() -> None:
    with pytest.raises(TypeError):
        F.cross_entropy(torch.zeros(2, 3), tensor([-100, -100]), empty="zero")
    (value,), (grad,) = value_and_gradients(
        lambda z: LF.cross_entropy(z, tensor([-100, -100]), empty="zero"), tensor([[1.0, INF], [3.0, 4.0]])
    )
    assert value == 0
    assert grad == [0, 0, 0, 0]


@BOTH
def test_M3_empty_batch(functional) -> None:
    logits, target = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    assert functional.cross_entropy(logits, target).isnan()
    assert functional.cross_entropy(logits, target, reduction="sum") == 0
    assert functional.cross_entropy(logits, target, reduction="none").shape == (0,)
    assert functional.cross_entropy(logits, torch.empty(0, 3)).isnan()


def test_M4_empty_batch_with_empty_zero() -> None:
    with pytest.raises(TypeError):
        F.nll_loss(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), empty="zero")
    assert LF.nll_loss(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), empty="zero") == 0
    assert LF.cross_entropy(torch.empty(0, 3), torch.empty(0, 3), empty="zero") == 0


@BOTH
def test_M5_weights_that_sum_to_zero(functional) -> None:
    arguments = tensor([[1.0, 2.0]]), tensor([0]), tensor([0.0, 1.0])
    assert functional.cross_entropy(*arguments).isnan()
    assert LF.cross_entropy(*arguments, empty="zero") == 0


def test_M6_rows_of_no_classes() -> None:
    logits, target = torch.empty(3, 0), torch.empty(3, 0)
    assert math.isnan(F.cross_entropy(logits, target))
    assert LF.cross_entropy(logits, target) == 0
    for reduction in ("sum", "none"):
        ours, theirs = (f.cross_entropy(logits, target, reduction=reduction) for f in (LF, F))
        assert torch.equal(ours, theirs)


# Infinite and NaN logits


def test_I1_masked_class_with_zero_probability() -> None:
    logits, target = tensor([[1.0, 2.0, -INF]]), tensor([[0.25, 0.75, 0.0]])
    expected = math.log(math.e + math.e**2) - 0.25 - 0.75 * 2
    (theirs,), _ = value_and_gradients(lambda z: F.cross_entropy(z, target), logits)
    assert math.isnan(theirs)
    (ours,), (grad,) = value_and_gradients(lambda z: LF.cross_entropy(z, target), logits)
    assert ours == pytest.approx(expected, rel=1e-6)
    p = logits.softmax(1)[0].tolist()
    assert grad == pytest.approx([p[0] - 0.25, p[1] - 0.75, 0], abs=1e-7)


@pytest.mark.parametrize("bad", [-INF, INF, NAN])
def test_I2_ignored_row_is_never_read(bad) -> None:
    logits, target = tensor([[bad, bad], [1.0, 2.0]]), tensor([-100, 0])
    assert all_nan(gradient(lambda z: F.cross_entropy(z, target), logits)[:2])
    clean = torch.tensor([[1.0, 2.0]])
    (ours,), (grad,) = value_and_gradients(lambda z: LF.cross_entropy(z, target), logits)
    assert ours == LF.cross_entropy(clean, tensor([0]))
    assert grad[:2] == [0, 0]
    assert grad[2:] == gradient(lambda z: LF.cross_entropy(z, tensor([0])), clean)


@BOTH
def test_I3_row_of_minus_infinity(functional) -> None:
    (value,), (grad,) = value_and_gradients(lambda z: functional.cross_entropy(z, tensor([0])), tensor([[-INF, -INF]]))
    assert math.isnan(value)
    assert all_nan(grad)


@BOTH
@pytest.mark.parametrize("target", [0, 1])
def test_I4_plus_infinity_shows_itself(functional, target) -> None:
    (value,), (grad,) = value_and_gradients(
        lambda z: functional.cross_entropy(z, tensor([target])), tensor([[INF, 1.0]])
    )
    assert math.isnan(value)
    assert all_nan(grad)


@BOTH
def test_I5_target_on_a_masked_class(functional) -> None:
    (value,), (grad,) = value_and_gradients(lambda z: functional.cross_entropy(z, tensor([0])), tensor([[-INF, 1.0]]))
    assert value == INF
    assert grad == [-1, 1]


@BOTH
def test_I6_masked_class_that_is_not_the_target(functional) -> None:
    (value,), (grad,) = value_and_gradients(
        lambda z: functional.cross_entropy(z, tensor([1])), tensor([[-INF, 1.0, 2.0]])
    )
    assert value == pytest.approx(math.log1p(math.e), rel=1e-6)
    assert grad[0] == 0


@BOTH
def test_I7_smoothing_onto_a_masked_class(functional) -> None:
    assert functional.cross_entropy(tensor([[0.0, 1.0, -INF]]), tensor([0]), label_smoothing=0.1) == INF


def test_I8_zero_class_weight_on_a_masked_class() -> None:
    logits, weight = tensor([[-INF, 0.0, 1.0]]), tensor([0.0, 1.0, 1.0])
    for arguments in (
        {"target": tensor([0])},
        {"target": tensor([1]), "label_smoothing": 0.1},
    ):
        assert F.cross_entropy(logits, weight=weight, reduction="sum", **arguments).isnan()
        (ours,), (grad,) = value_and_gradients(
            lambda z, arguments=arguments: LF.cross_entropy(z, weight=weight, reduction="sum", **arguments), logits
        )
        assert math.isfinite(ours)
        assert all(math.isfinite(value) for value in grad)
        assert grad[0] == 0
    assert LF.cross_entropy(logits, tensor([0]), weight, reduction="sum") == 0


def test_I9_ignored_row_of_a_linear_head_is_never_read() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)
    hidden[2] = NAN
    target, kept = tensor([0, 1, -100, 3]), [0, 1, 3]
    _, theirs = value_and_gradients(
        lambda h, w: F.linear_cross_entropy(h, w, target, ignore_index=-100), hidden, weight
    )
    assert all_nan(theirs[0][6:9])
    assert all_nan(theirs[1])
    losses = (
        lambda h, w, t: LF.linear_cross_entropy(h, w, t, ignore_index=-100),
        lambda h, w, t: LF.cross_entropy(ll.linear(h, w), t),
        lambda h, w, t: ll.token_stats(ll.linear(h, w), t).nll,
    )
    for loss in losses:
        value, (of_hidden, of_weight) = value_and_gradients(lambda h, w, f=loss: f(h, w, target), hidden, weight)
        clean, (_, expected) = value_and_gradients(lambda h, w, f=loss: f(h, w, target[kept]), hidden[kept], weight)
        assert sum(value) == pytest.approx(sum(clean), rel=1e-6)
        assert of_hidden[6:9] == [0, 0, 0]
        assert of_weight == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_I10_smoothing_alone_where_the_target_is_impossible(dtype: torch.dtype, backend: str | None) -> None:
    logits, target = tensor([[-INF, 1.0, 2.0], [0.0, 1.0, 2.0]], dtype=dtype), tensor([0, 1])
    onehot = F.one_hot(target, 3).to(dtype)
    options = {"reduction": "none", "label_smoothing": 1.0}
    assert math.isnan(F.cross_entropy(logits, target, **options)[0])
    assert F.cross_entropy(logits, onehot, **options)[0] == INF
    flat = F.cross_entropy(logits[1:], target[1:], **options).item()
    head = ll.linear(torch.eye(2, dtype=dtype), torch.zeros(3, 2, dtype=dtype), logits[0])
    for given in (target, onehot):
        losses = LF.cross_entropy(logits, given, **options, backend=backend)
        assert losses.tolist() == [INF, pytest.approx(flat)]
        assert LF.cross_entropy(logits, given, label_smoothing=1.0, backend=backend) == INF
        strided = logits.T.contiguous().T.unsqueeze(0)
        assert LF.cross_entropy(strided, given.unsqueeze(0), **options, class_dim=-1, backend=backend)[0, 0] == INF
        assert LF.cross_entropy(head, given, **options, backend=backend).tolist() == [INF, INF]
        weight = tensor([0.0, 1.0, 1.0], dtype=dtype)
        assert LF.cross_entropy(logits, given, weight, **options, backend=backend)[0].isfinite()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_I11_infinite_divergence_without_upstream_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITLESS_BACKEND", backend)
    p, q = tensor([[0.0, 1.0, 2.0]] * 2), tensor([[0.0, -INF, 1.0], [0.0, 0.5, 1.0]])
    naive = [x.clone().requires_grad_() for x in (p, q)]
    p_soft, logs = naive[0].softmax(1), [x.log_softmax(1) for x in naive]
    divergence = (p_soft * (logs[0] - logs[1])).sum(1)
    assert math.isnan(torch.autograd.grad(divergence, naive[0], tensor([0.0, 1.0]))[0][0, 0])
    for measure in (ll.kl, lambda p, q: ll.pair_stats(p, q).kl, lambda p, q: ll.pair_stats(p, q).cross_entropy):
        given = [x.clone().requires_grad_() for x in (p, q)]
        alone = [x[1:].clone().requires_grad_() for x in (p, q)]
        value = measure(*given)
        assert value[0] == INF
        grads = torch.autograd.grad(value, given, tensor([0.0, 1.0]))
        for grad, expected in zip(grads, torch.autograd.grad(measure(*alone).sum(), alone), strict=True):
            assert grad[0].tolist() == [0, 0, 0]
            assert grad[1].tolist() == pytest.approx(expected[0].tolist(), rel=1e-5)
        shown = torch.autograd.grad(measure(*given), given, tensor([1.0, 1.0]))
        assert not shown[0][0].isfinite().any()
        assert shown[1][0].isfinite().all()


# One class, and losses close to 0


def test_S1_one_class() -> None:
    logits, target = tensor([[3.0]]), tensor([0])
    theirs = F.cross_entropy(logits, target, reduction="none")
    assert theirs == 0
    assert math.copysign(1, theirs.item()) == -1
    (ours,), (grad,) = value_and_gradients(lambda z: LF.cross_entropy(z, target, reduction="none"), logits)
    assert ours == 0
    assert math.copysign(1, ours) == 1
    assert grad == [0]


def test_S2_a_loss_below_the_spacing_at_one() -> None:
    logits = tensor([[0.0, 30.0, 1.0]])
    truth = math.log1p(math.exp(-30) + math.exp(-29))
    assert F.cross_entropy(logits, tensor([1])) == 0
    assert LF.cross_entropy(logits, tensor([1])).item() == pytest.approx(truth, rel=1e-5, abs=0)


# Half precision


def test_H1_float16_mean_over_many_rows() -> None:
    rows = 70_000
    logits, target = torch.zeros(rows, 10, dtype=torch.float16), torch.zeros(rows, dtype=torch.int64)
    assert not F.cross_entropy(logits, target).isfinite()
    assert gradient(lambda z: F.cross_entropy(z, target), logits)[:2] == [0, 0]
    assert LF.cross_entropy(logits, target) == tensor(math.log(10)).half()
    grad = gradient(lambda z: LF.cross_entropy(z, target), logits)
    assert grad[:2] == [(tensor((0.1 - 1) / rows)).half().item(), tensor(0.1 / rows).half().item()]


def test_H2_float16_mean_of_probability_targets() -> None:
    rows = 30_000
    logits, target = torch.zeros(rows, 10, dtype=torch.float16), torch.full((rows, 10), 0.1, dtype=torch.float16)
    assert F.cross_entropy(logits, target) == INF
    # 0.1 in float16 is 0.09998, so ten of them are a little less than 1.
    assert LF.cross_entropy(logits, target) == tensor(math.log(10) * 10 * tensor(0.1).half().item()).half()


@pytest.mark.parametrize("rows", [1000, 30_000])
def test_H3_bfloat16_mean_rounds_once(rows) -> None:
    logits, target = torch.zeros(rows, 10, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    nearest = tensor(math.log(10)).bfloat16()
    assert F.cross_entropy(logits, target) != nearest
    assert LF.cross_entropy(logits, target) == nearest


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 3000), (torch.bfloat16, 1000)])
def test_H4_sum_rounds_once(dtype, rows) -> None:
    logits, target = torch.zeros(rows, 10, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    nearest = tensor(rows * math.log(10)).to(dtype)
    assert F.cross_entropy(logits, target, reduction="sum") != nearest
    assert LF.cross_entropy(logits, target, reduction="sum") == nearest


@BOTH
def test_H5_float16_sum_that_float16_cannot_hold(functional) -> None:
    logits, target = torch.zeros(70_000, 10, dtype=torch.float16), torch.zeros(70_000, dtype=torch.int64)
    assert functional.cross_entropy(logits, target, reduction="sum") == INF


def test_H6_float16_smoothing_over_many_classes() -> None:
    logits, target = torch.zeros(1, 60_000, dtype=torch.float16), tensor([0])
    assert F.cross_entropy(logits, target, label_smoothing=0.1) == INF
    assert LF.cross_entropy(logits, target, label_smoothing=0.1) == tensor(math.log(60_000)).half()


# Targets of classes


def test_T1_nll_backward_on_channels_last() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 3, 4, 5, generator=generator).log_softmax(1)
    target = torch.randint(3, (2, 4, 5), generator=generator)
    strided = log_probs.to(memory_format=torch.channels_last).requires_grad_()
    with pytest.raises(RuntimeError, match="grad_input must be contiguous"):
        F.nll_loss(strided, target).backward()
    LF.nll_loss(strided, target).backward()
    assert strided.grad.is_contiguous(memory_format=torch.channels_last)
    plain = log_probs.clone().requires_grad_()
    F.nll_loss(plain, target).backward()
    torch.testing.assert_close(strided.grad, plain.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.bool, torch.uint8])
def test_T2_integer_targets_of_any_width(dtype) -> None:
    logits, target = tensor([[1.0, 2.0, 3.0]]), tensor([1], dtype=dtype)
    expected = F.cross_entropy(logits, tensor([1]))
    if dtype == torch.uint8:
        assert F.cross_entropy(logits, target) == expected
    else:
        with pytest.raises(RuntimeError, match="expected target dtype to be Long or Byte"):
            F.cross_entropy(logits, target)
    torch.testing.assert_close(LF.cross_entropy(logits, target), expected)
    assert LF.nll_loss(logits, target) == -2


def test_T3_negative_smoothing() -> None:
    logits, target = tensor([[1.0, 2.0, 3.0]]), tensor([1])
    assert F.cross_entropy(logits, target, label_smoothing=-0.1).isfinite()
    for functional, smoothing in ((LF, -0.1), (LF, 1.5), (F, 1.5)):
        with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0\.0 and 1\.0"):
            functional.cross_entropy(logits, target, label_smoothing=smoothing)


def test_T4_class_outside_the_range() -> None:
    logits, target = torch.zeros(3, 5), tensor([1, 7, 2])
    with pytest.raises(IndexError) as theirs:
        F.cross_entropy(logits, target)
    assert str(theirs.value) == "Target 7 is out of bounds."
    for call in (LF.cross_entropy, LF.nll_loss, ll.token_stats):
        with pytest.raises(IndexError) as ours:
            call(logits, target)
        message = str(ours.value)
        assert "Target 7" in message
        assert "position 1" in message
        assert "5 classes" in message
        assert "ignore_index=-100" in message


def test_T5_target_with_a_dimension_too_many() -> None:
    logits, target = torch.zeros(3, 5), tensor([[1], [2], [3]])
    with pytest.raises(RuntimeError) as theirs:
        F.cross_entropy(logits, target)
    assert str(theirs.value) == "0D or 1D target tensor expected, multi-target not supported"
    with pytest.raises(RuntimeError) as ours:
        LF.cross_entropy(logits, target)
    assert "multi-target not supported" in str(ours.value)
    assert "[3, 1]" in str(ours.value)
    assert "[3, 5]" in str(ours.value)
    assert "target.squeeze(-1)" in str(ours.value)


@BOTH
def test_T6_ignored_index_need_not_be_a_class(functional) -> None:
    logits = torch.zeros(3, 5)
    assert functional.cross_entropy(logits, tensor([1, 5, 2]), ignore_index=5) == pytest.approx(math.log(5))
    assert functional.cross_entropy(logits, tensor([1, -7, 2]), ignore_index=-7) == pytest.approx(math.log(5))


@BOTH
def test_T7_ignore_index_leaves_the_class_in_the_softmax(functional) -> None:
    logits = tensor([[1.0, 2.0, 3.0]])
    with_class = functional.cross_entropy(logits, tensor([0]), ignore_index=2)
    assert with_class == pytest.approx(math.log(math.e + math.e**2 + math.e**3) - 1)


# What "mean" divides by


def test_N1_weighted_mean_of_one_row() -> None:
    logits, target, weight = tensor([[1.0, 2.0, 3.0]]), tensor([0]), tensor([10.0, 1.0, 1.0])
    plain = F.cross_entropy(logits, target)
    assert F.cross_entropy(logits, target, weight) == plain
    torch.testing.assert_close(LF.cross_entropy(logits, target, weight), plain)
    torch.testing.assert_close(LF.cross_entropy(logits, target, weight, normalizer="weights"), plain)
    torch.testing.assert_close(LF.cross_entropy(logits, target, weight, normalizer="rows"), 10 * plain)


def test_N2_index_and_one_hot_targets() -> None:
    logits, target, weight = tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]), tensor([0, 1]), tensor([10.0, 1.0, 1.0])
    one_hot = F.one_hot(target, 3).float()
    for functional in (F, LF):
        ratio = functional.cross_entropy(logits, one_hot, weight) / functional.cross_entropy(logits, target, weight)
        assert ratio == pytest.approx(11 / 2)
    for normalizer in ("weights", "rows", 3):
        torch.testing.assert_close(
            LF.cross_entropy(logits, one_hot, weight, normalizer=normalizer),
            LF.cross_entropy(logits, target, weight, normalizer=normalizer),
        )


def test_N3_a_count_of_ones_own() -> None:
    logits, target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), tensor([0, 1, -100, 3, 2, -100])
    whole = F.cross_entropy(logits, target)
    micro_batches = ((0, 1), (1, 6))  # one row that counts, and three
    mean_of_means = sum(F.cross_entropy(logits[i:j], target[i:j]) for i, j in micro_batches) / 2
    assert abs(mean_of_means - whole) > 0.1
    for normalizer in (4, 4.0, tensor(4.0)):
        parts = [LF.cross_entropy(logits[i:j], target[i:j], normalizer=normalizer) for i, j in micro_batches]
        torch.testing.assert_close(parts[0] + parts[1], whole)
    with pytest.raises(ValueError, match="normalizer"):
        LF.cross_entropy(logits, target, reduction="sum", normalizer=4)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_N4_normalizer_weights_with_probabilities_and_smoothing(smoothing: float, backend: str | None) -> None:
    logits, weight = tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.3]]), tensor([0.5, 2.0, 3.0])
    target = tensor([2, 0])
    soft = tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]])
    options = {"label_smoothing": smoothing, "backend": backend}
    head = ll.linear(torch.eye(2), logits.T.contiguous())
    for given in (logits, head):
        losses = LF.cross_entropy(given, soft, weight, reduction="none", **options)
        mean = LF.cross_entropy(given, soft, weight, normalizer="weights", **options)
        assert mean.item() == pytest.approx((losses.sum() / (soft @ weight).sum()).item(), rel=1e-6)
        by_index, by_onehot = (
            LF.cross_entropy(given, t, weight, normalizer="weights", **options)
            for t in (target, F.one_hot(target, 3).float())
        )
        assert by_index.item() == pytest.approx(by_onehot.item(), rel=1e-6)


# Gradients that torch does not have


def numeric_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    step = 1e-5
    slopes = []
    for index in range(at.numel()):
        offset = torch.zeros_like(at)
        offset[index] = step
        slopes.append((function(at + offset) - function(at - offset)) / (2 * step))
    return torch.stack(slopes)


LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]], dtype=torch.float64)
PROBABILITIES = torch.sigmoid(LOGITS)
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.3, 1.0]], dtype=torch.float64)
WEIGHT_GRADIENTS = {
    "G1": lambda f, w: f.cross_entropy(LOGITS, tensor([2, 0]), weight=w),
    "G2": lambda f, w: f.nll_loss(LOGITS.log_softmax(1), tensor([2, 0]), weight=w),
    "G3": lambda f, w: f.binary_cross_entropy(PROBABILITIES, LABELS, weight=w),
    "G4": lambda f, w: f.binary_cross_entropy_with_logits(LOGITS, LABELS, weight=w),
    "G5": lambda f, w: f.binary_cross_entropy_with_logits(LOGITS, LABELS, pos_weight=w),
}


def check_weight_gradient(row: str) -> None:
    loss = WEIGHT_GRADIENTS[row]
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="is not differentiable with respect to argument"):
        loss(F, weight).backward()
    loss(LF, weight).backward()
    expected = numeric_gradient(lambda w: loss(LF, w), weight.detach())
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(weight.grad, expected, rtol=1e-7, atol=1e-9)


def test_G1_gradient_of_a_class_weight() -> None:
    check_weight_gradient("G1")


def test_G2_gradient_of_an_nll_weight() -> None:
    check_weight_gradient("G2")


def test_G3_gradient_of_a_bce_weight() -> None:
    check_weight_gradient("G3")


def test_G4_gradient_of_a_weight_with_logits() -> None:
    check_weight_gradient("G4")


def test_G5_gradient_of_pos_weight() -> None:
    check_weight_gradient("G5")


# Kullback-Leibler divergence


def kl_elements(functional, log_target: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: functional.kl_div(x, y, reduction="none", log_target=log_target)


def test_K1_zero_target() -> None:
    inputs, target = tensor([-1.0, -2.0]), tensor([0.0, 1.0])
    theirs, (_, their_gradient) = value_and_gradients(kl_elements(F), inputs, target)
    assert theirs == [0, 2]
    assert math.isnan(their_gradient[0])
    ours, (of_input, of_target) = value_and_gradients(kl_elements(LF), inputs, target)
    assert ours == [0, 2]
    assert of_input == [0, -1]
    assert of_target == [0, 3]


def test_K2_log_target_of_minus_infinity() -> None:
    inputs, target = tensor([-1.0, -2.0]), tensor([-INF, 0.0])
    theirs, (_, their_gradient) = value_and_gradients(kl_elements(F, log_target=True), inputs, target)
    assert math.isnan(theirs[0])
    assert math.isnan(their_gradient[0])
    ours, grads = value_and_gradients(kl_elements(LF, log_target=True), inputs, target)
    assert ours == [0, 2]
    assert grads == [[0, -1], [0, 3]]


def test_K3_zero_target_on_an_impossible_class() -> None:
    inputs, target = tensor([-INF, -2.0]), tensor([0.0, 1.0])
    assert math.isnan(value_and_gradients(kl_elements(F), inputs, target)[0][0])
    ours, grads = value_and_gradients(kl_elements(LF), inputs, target)
    assert ours == [0, 2]
    assert grads == [[0, -1], [0, 3]]


@BOTH
def test_K4_possible_target_on_an_impossible_class(functional) -> None:
    assert functional.kl_div(tensor([-INF]), tensor([0.5]), reduction="none") == INF


def test_K5_log_target_that_underflows_on_an_impossible_class() -> None:
    inputs, target = tensor([-INF]), tensor([-200.0])
    assert F.kl_div(inputs, target, reduction="none", log_target=True).isnan()
    ours, grads = value_and_gradients(kl_elements(LF, log_target=True), inputs, target)
    assert ours == [0]
    assert grads == [[0], [0]]


@BOTH
def test_K6_negative_target(functional) -> None:
    assert functional.kl_div(tensor([-1.0]), tensor([-0.5]), reduction="none").isnan()


def test_K7_mean_is_not_the_divergence() -> None:
    p, q = tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), tensor([[0.25, 0.5, 0.25], [0.3, 0.3, 0.4]])
    divergence = (p * (p / q).log()).sum(1).mean()
    for functional in (F, LF):
        with pytest.warns(UserWarning, match="batchmean"):
            mean = functional.kl_div(q.log(), p)
        torch.testing.assert_close(mean, divergence / 3)
        torch.testing.assert_close(functional.kl_div(q.log(), p, reduction="batchmean"), divergence)
    torch.testing.assert_close(LF.kl_div(q.log(), p, reduction="rowmean"), divergence)


def test_K8_rowmean_of_more_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 3, 5, generator=generator).softmax(1) for _ in range(2))
    divergence = (p * (p / q).log()).sum(1).mean()
    batchmean = F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(batchmean, 5 * divergence)
    with pytest.raises(ValueError, match="rowmean"):
        F.kl_div(q.log(), p, reduction="rowmean")
    torch.testing.assert_close(LF.kl_div(q.log(), p, reduction="rowmean"), divergence)
    moved = LF.kl_div(q.log().movedim(1, -1), p.movedim(1, -1), reduction="rowmean", class_dim=-1)
    torch.testing.assert_close(moved, divergence)


def test_K9_divergence_of_equal_rows() -> None:
    z = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    theirs = F.kl_div(z.log_softmax(1), z.softmax(1), reduction="none").sum(1)
    assert (theirs != 0).any()
    assert (ll.kl(z, z) == 0).all()
    assert (ll.js(z, z) == 0).all()


def test_K10_divergence_of_nearly_equal_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200, 50, generator=generator)
    q = p + 1e-4 * torch.randn(200, 50, generator=generator)
    theirs = F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert (theirs < 0).any()
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    ratio = log_q - log_p
    # The Taylor series of exp(d) - 1 - d: the terms left out are d^5 / 120, 1e-17 of what is kept.
    truth = (log_p.exp() * (ratio**2 / 2 + ratio**3 / 6 + ratio**4 / 24)).sum(1)
    ours = ll.kl(p, q).double()
    assert (ours > 0).all()
    assert ((ours - truth).abs() / truth).max() < torch.finfo(torch.float32).eps
    assert ((theirs - truth).abs() / truth).max() > 1


def test_K11_target_that_broadcasts() -> None:
    inputs, target = torch.zeros(3, 4).log_softmax(1), torch.ones(3, 1)
    theirs = F.kl_div(inputs, target, reduction="batchmean")
    with pytest.warns(UserWarning, match=r"input \(3, 4\) and target \(3, 1\)"):
        ours = LF.kl_div(inputs, target, reduction="batchmean")
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="one shape"):
        ll.pair_stats(inputs, target)


def test_K12_divergence_from_an_impossible_class() -> None:
    def theirs(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)

    p, same_mask, other_mask = tensor([[0.0, 1.0, -INF]]), tensor([[1.0, 0.0, -INF]]), tensor([[0.0, -INF, 1.0]])
    assert theirs(p, same_mask).isnan()
    assert ll.kl(p, same_mask).item() == pytest.approx(math.tanh(0.5), rel=1e-6)
    assert theirs(p, other_mask) == INF
    assert ll.kl(p, other_mask) == INF
    assert 0 < ll.js(p, other_mask) < math.log(2)
    assert ll.js(tensor([[0.0, -INF]]), tensor([[-INF, 0.0]])) == pytest.approx(math.log(2), rel=1e-7)


def test_K13_divergence_of_related_rows_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    q = p + 0.05 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    theirs = F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)
    with mp.workprec(256):
        truth = [exact_divergence(*rows) for rows in zip(p.tolist(), q.tolist(), strict=True)]
        worst = [
            max(float(abs(value / exact - 1)) for value, exact in zip(found.tolist(), truth, strict=True))
            for found in (ll.kl(p, q), theirs)
        ]
    # A log-ratio d of about 0.05 carries the rounding of surprises of up to 5, 100 eps of it; d^2 / 2 doubles that.
    assert worst[0] < 200 * torch.finfo(torch.float64).eps
    assert worst[1] > 1000 * torch.finfo(torch.float64).eps


def test_K14_a_mixture_excludes_nothing_of_p() -> None:
    p, q = tensor([[0.0, 1.0, -INF]]).requires_grad_(), tensor([[0.0, -INF, 1.0]]).requires_grad_()
    for value in (ll.kl(p, q, skew=0.1), ll.js(p, q, beta=0.1), ll.js(p, q, beta=0.9)):
        assert 0 < value.item() < -math.log(0.1)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, [p, q]))
    apart = tensor([[0.0, -INF]]), tensor([[-INF, 0.0]])
    assert ll.kl(*apart, skew=0.1).item() == pytest.approx(-math.log(0.1), rel=1e-6)


def test_K15_js_at_the_ends_of_beta() -> None:
    p, q = torch.randn(5, 9), torch.randn(5, 9)
    assert torch.equal(ll.js(p, q, beta=0), ll.kl(p, q))
    assert torch.equal(ll.js(p, q, beta=1), ll.kl(q, p))
    p, q = p.double(), q.double()
    torch.testing.assert_close(ll.js(p, q, beta=1e-9) / 1e-9, ll.kl(p, q), rtol=1e-6, atol=0)
    torch.testing.assert_close(ll.js(p, q, beta=1 - 1e-9) / 1e-9, ll.kl(q, p), rtol=1e-6, atol=0)


@pytest.mark.parametrize("theirs", [True, False])
def test_K16_total_variation_of_equals(theirs: bool) -> None:
    p, q = tensor([[0.0, 1.0, 2.0]]).requires_grad_(), tensor([[0.0, 1.0, 2.0]])
    value = (p.softmax(1) - q.softmax(1)).abs().sum(1) / 2 if theirs else ll.tv(p, q)
    assert value == 0
    assert not bool(torch.autograd.grad(value, p)[0].any())


def test_K17_small_total_variation() -> None:
    p = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    q = p + 1e-6 * torch.randn(40, 1000, generator=torch.Generator().manual_seed(1))
    exact = (p.double().softmax(1) - q.double().softmax(1)).abs().sum(1) / 2
    theirs = (p.softmax(1) - q.softmax(1)).abs().sum(1) / 2
    assert float((theirs / exact - 1).abs().max()) > 1e-3
    assert float((ll.tv(p, q) / exact - 1).abs().max()) < 2 * torch.finfo(torch.float32).eps


def test_K18_a_temperature_keeps_the_difference() -> None:
    q = (torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 20).float()
    p = q + 1e-5 * torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    with mp.workprec(256):
        rows = zip((p.double() / 0.7).tolist(), (q.double() / 0.7).tolist(), strict=True)
        exact = torch.tensor([float(exact_divergence(*row)) for row in rows], dtype=torch.float64)
    first, second = (p / 0.7).double(), (q / 0.7).double()  # even with all the rest in float64
    theirs = F.kl_div(second.log_softmax(1), first.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert float((theirs / exact - 1).abs().max()) > 0.01
    assert float((ll.kl(p, q, temperature=0.7) / exact - 1).abs().max()) < 4 * torch.finfo(torch.float32).eps


def exact_divergence(z: list[float], y: list[float]) -> Any:
    log_p, log_q = ([mp.mpf(value) - mp.log(mpmath.fsum(map(mp.exp, row))) for value in row] for row in (z, y))
    return mpmath.fsum(mp.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


# Binary cross-entropy


@BOTH
def test_B1_logarithms_stop_at_minus_100(functional) -> None:
    values, (grad,) = value_and_gradients(
        lambda p: functional.binary_cross_entropy(p, tensor([1.0, 0.0, 0.0, 1.0]), reduction="none"),
        tensor([0.0, 1.0, 0.0, 1.0]),
    )
    assert values == [100, 100, 0, 0]
    assert grad == pytest.approx([-1e12, 1e12, 0, 0])


@BOTH
def test_B2_sigmoid_then_bce_loses_the_gradient(functional) -> None:
    def by_probability(z: Tensor) -> Tensor:
        return functional.binary_cross_entropy(torch.sigmoid(z), tensor([1.0]), reduction="none")

    def by_logit(z: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(z, tensor([1.0]), reduction="none")

    assert abs(gradient(by_probability, tensor([-50.0]))[0]) < 1e-8
    assert gradient(by_logit, tensor([-50.0])) == [-1]
    assert value_and_gradients(by_logit, tensor([-1000.0])) == ([1000], [[-1]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_B3_integer_target(dtype) -> None:
    inputs, labels = tensor([0.2, 0.3]), tensor([1, 0])
    with pytest.raises(RuntimeError, match="but expected Float"):
        F.binary_cross_entropy(inputs, labels.to(dtype))
    expected = F.binary_cross_entropy(inputs, labels.float())
    torch.testing.assert_close(LF.binary_cross_entropy(inputs, labels.to(dtype)), expected)
    with_logits = LF.binary_cross_entropy_with_logits(inputs, labels.to(dtype))
    torch.testing.assert_close(with_logits, F.binary_cross_entropy_with_logits(inputs, labels.float()))


@pytest.mark.parametrize(("bad", "named"), [(NAN, "NaN"), (1.5, "1.5"), (-0.25, "-0.25")])
def test_B4_input_that_is_no_probability(bad, named) -> None:
    inputs, target = tensor([[0.5, 0.5], [0.5, bad]]), torch.ones(2, 2)
    with pytest.raises(RuntimeError) as theirs:
        F.binary_cross_entropy(inputs, target)
    assert str(theirs.value) == "all elements of input should be between 0 and 1"
    with pytest.raises(RuntimeError) as ours:
        LF.binary_cross_entropy(inputs, target)
    assert str(theirs.value) in str(ours.value)
    assert named in str(ours.value)
    assert re.search(r"1, 1", str(ours.value))


def test_B5_target_that_is_no_probability() -> None:
    for functional in (F, LF):
        with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
            functional.binary_cross_entropy(tensor([0.5, 0.5]), tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match=r"target\[1\] is 2\.0"):
        LF.binary_cross_entropy(tensor([0.5, 0.5]), tensor([1.0, 2.0]))


@BOTH
def test_B6_logits_take_any_target(functional) -> None:
    value = functional.binary_cross_entropy_with_logits(tensor([0.5]), tensor([2.0]), reduction="none").item()
    assert value == pytest.approx(math.log1p(math.exp(0.5)) - 1, rel=1e-5)
    assert value < 0


@pytest.mark.parametrize(("logit", "label"), [(INF, 1.0), (-INF, 0.0)])
def test_B7_infinite_logit_of_the_right_label(logit, label) -> None:
    loss = {f: lambda z, f=f: f.binary_cross_entropy_with_logits(z, tensor([label]), reduction="none") for f in (F, LF)}
    assert all_nan(value_and_gradients(loss[F], tensor([logit]))[0])
    assert value_and_gradients(loss[LF], tensor([logit])) == ([0], [[0]])


def test_B8_infinite_logit_of_the_wrong_label() -> None:
    def loss(functional, label: float) -> Callable[[Tensor], Tensor]:
        return lambda z: functional.binary_cross_entropy_with_logits(z, tensor([label]), reduction="none")

    assert value_and_gradients(loss(F, 0.0), tensor([INF])) == ([INF], [[1]])
    assert all_nan(value_and_gradients(loss(F, 1.0), tensor([-INF]))[0])
    assert value_and_gradients(loss(LF, 0.0), tensor([INF])) == ([INF], [[1]])
    assert value_and_gradients(loss(LF, 1.0), tensor([-INF])) == ([INF], [[-1]])


def test_B9_a_weight_for_each_class() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator)
    target = torch.rand(2, 3, 4, generator=generator)
    weight = tensor([1.0, 2.0, 3.0])
    for option in ("weight", "pos_weight"):
        with pytest.raises(RuntimeError):
            F.binary_cross_entropy_with_logits(logits, target, **{option: weight})
        with pytest.raises(RuntimeError, match=r"class_dim=1, or (pos_)?weight\.view\(-1, 1\)"):
            LF.binary_cross_entropy_with_logits(logits, target, **{option: weight})
        torch.testing.assert_close(
            LF.binary_cross_entropy_with_logits(logits, target, **{option: weight}, class_dim=1),
            F.binary_cross_entropy_with_logits(logits, target, **{option: weight.view(3, 1)}),
        )


def test_B10_a_weight_that_fits_two_dimensions() -> None:
    logits, target, weight = torch.zeros(1, 2, 2), torch.ones(1, 2, 2), tensor([1.0, 3.0])
    log2 = math.log(2)
    for functional in (F, LF):
        last = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
        assert last.flatten().tolist() == pytest.approx([log2, 3 * log2, log2, 3 * log2])
    first = LF.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none", class_dim=1)
    assert first.flatten().tolist() == pytest.approx([log2, log2, 3 * log2, 3 * log2])


def test_B11_a_confident_right_answer_keeps_its_digits() -> None:
    # At 20 and a label of 1, (1 - t) z - log sigmoid(z) is right; at -20 and 0 torch's form adds and subtracts.
    truth = math.log1p(math.exp(-20))
    logits, target = tensor([20.0, -20.0]), tensor([1.0, 0.0])
    ours = LF.binary_cross_entropy_with_logits(logits, target, reduction="none")
    theirs = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert ours.tolist() == pytest.approx([truth, truth], rel=3e-7, abs=0)
    assert theirs[0].item() == pytest.approx(truth, rel=3e-7, abs=0)
    assert theirs[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 7, 65, 100_003])
def test_B12_probability_of_minus_zero(count: int, dtype: torch.dtype) -> None:
    probabilities = torch.full((count,), -0.0, dtype=dtype)
    probabilities[count // 2 + 1 :] = 0.0
    target = torch.ones(count, dtype=dtype)
    for given in (target, target.long(), target * 0):
        for options in ({}, {"weight": target}, {"backend": "reference"}):
            value, (grad,) = value_and_gradients(
                lambda p, t=given, o=options: LF.binary_cross_entropy(p, t, reduction="none", **o), probabilities
            )
            assert value == [100.0 * t for t in given.tolist()]
            if dtype in (
                torch.float32,
                torch.float64,
            ):  # in half precision torch's 1e-12 is 0, or rounded before it divides
                theirs = gradient(
                    lambda p, t=given: F.binary_cross_entropy(p, t.to(dtype), reduction="sum"), probabilities
                )
                assert grad == pytest.approx(theirs)
    mean = LF.binary_cross_entropy(probabilities, target)
    assert mean == F.binary_cross_entropy(probabilities.float(), target.float())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_B13_integer_target_that_is_no_label(dtype: torch.dtype, backend: str | None) -> None:
    probabilities = torch.full((3, 5), 0.5)
    target = torch.ones(3, 5, dtype=dtype)
    assert LF.binary_cross_entropy(probabilities, target, backend=backend) == pytest.approx(math.log(2))
    with pytest.raises(RuntimeError, match="Found dtype"):
        F.binary_cross_entropy(probabilities, target)
    target[1, 2] = -1 if dtype.is_signed else 255
    for reduction in ("none", "mean"):
        with pytest.raises(RuntimeError, match=rf"target\[1, 2\] is {int(target[1, 2])}"):
            LF.binary_cross_entropy(probabilities, target, reduction=reduction, backend=backend)


def test_B14_complex_operands() -> None:
    real, z = torch.full((3, 4), 0.5), torch.full((3, 4), 0.5 + 0.5j)
    row, target = z[0], tensor([0, 1, 2])
    calls = {
        "x1": lambda: LF.cosine_similarity(z, real),
        "x2": lambda: LF.cosine_similarity(real, z),
        "input1": lambda: LF.cosine_embedding_loss(z, z, tensor([1, 1, 1])),
        "input2": lambda: LF.cosine_embedding_loss(real, z, tensor([1, 1, 1])),
        "target": lambda: LF.cosine_embedding_loss(real, real, z[:, 0]),
        "target ": lambda: LF.binary_cross_entropy(real, z),
        "target  ": lambda: LF.binary_cross_entropy_with_logits(real, z),
        "weight": lambda: LF.binary_cross_entropy(real, real, z),
        "weight ": lambda: LF.binary_cross_entropy_with_logits(real, real, z),
        "pos_weight": lambda: LF.binary_cross_entropy_with_logits(real, real, pos_weight=z),
        "weight  ": lambda: LF.cross_entropy(real, real, row),
        "input": lambda: LF.kl_div(z, real, reduction="sum"),
        "target   ": lambda: LF.kl_div(real, z, reduction="sum"),
        "q": lambda: ll.kl(real, z),
        "q ": lambda: ll.pair_stats(real, z),
        "hidden": lambda: LF.linear_cross_entropy(z, real, target),
        "weight   ": lambda: ll.linear(real, z),
        "bias": lambda: ll.linear(real, real, z[:, 0]),
        "scale": lambda: ll.linear(real, real, scale=z[0, 0]),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"argument '{name.strip()}' must be real, got torch.complex64"):
            call()
    with pytest.raises(RuntimeError, match="ComplexFloat"):
        F.binary_cross_entropy(real, z)
    assert F.binary_cross_entropy_with_logits(real, z).is_complex()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_B15_mixed_dtypes(dtype: torch.dtype) -> None:
    floating = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    logits = torch.zeros(2, 3, dtype=dtype)
    for of_target, *others in itertools.product([*floating, torch.int64], [None, *floating], [None, *floating]):
        target = torch.ones(2, 3, dtype=of_target)
        weight, positive = (None if other is None else torch.ones(3, dtype=other) for other in others)
        given = [dtype, *(of for of in (of_target, *others) if of is not None and of.is_floating_point)]
        for reduction in ("none", "mean"):
            options = {"weight": weight, "pos_weight": positive, "reduction": reduction}
            loss = LF.binary_cross_entropy_with_logits(logits, target, **options)
            assert loss.dtype == functools.reduce(torch.promote_types, given)
            if of_target.is_floating_point:
                assert F.binary_cross_entropy_with_logits(logits, target, **options).dtype == of_target
    with pytest.raises(RuntimeError, match=r"can't be cast|Subtraction|result type"):
        F.binary_cross_entropy_with_logits(logits, torch.ones(2, 3, dtype=torch.int64))


# Cosine similarity


def test_C1_never_above_one() -> None:
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    assert F.cosine_similarity(x, x).max() > 1
    found = LF.cosine_similarity(x, x)
    assert found.max() <= 1
    assert found.min() > 1 - 4e-7
    assert LF.cosine_similarity(x, -x).min() >= -1


def test_C2_float16_zero_vectors() -> None:
    x = torch.zeros(1, 4, dtype=torch.float16)
    assert F.cosine_similarity(x, x).isnan()
    assert LF.cosine_similarity(x, x) == 0
    assert F.cosine_similarity(x.float(), x.float()) == 0


@BOTH
def test_C3_short_vectors_are_floored_at_eps(functional) -> None:
    x, y = tensor([[1.0, 1.0]], dtype=torch.float64), tensor([[1e-9, 1e-9]], dtype=torch.float64)
    assert functional.cosine_similarity(x, y).item() == pytest.approx(math.sqrt(2) / 10)


def test_C4_short_vectors_with_eps_0() -> None:
    x, y = tensor([[1.0, 1.0]]), tensor([[1e-30, 1e-30]])
    assert F.cosine_similarity(x, y, eps=0) == INF
    assert LF.cosine_similarity(x, y, eps=0) == 1


def test_C5_long_vectors() -> None:
    x, y = tensor([[2e38, 3e38]]), tensor([[3e38, 2e38]])
    assert F.cosine_similarity(x, y) == 0
    assert LF.cosine_similarity(x, y).item() == pytest.approx(12 / 13, rel=3e-7)
    assert F.cosine_embedding_loss(x, y, tensor([1])).isnan()
    assert LF.cosine_embedding_loss(x, y, tensor([1])).item() == pytest.approx(1 / 13, rel=3e-6)


@BOTH
def test_C6_gradient_at_a_zero_vector(functional) -> None:
    (value,), (of_zero, of_other) = value_and_gradients(
        functional.cosine_similarity, tensor([[0.0, 0.0]]), tensor([[1.0, 2.0]])
    )
    assert value == 0
    # y / (|y| eps): the floor makes the function linear there.
    assert of_zero == pytest.approx([1e8 / math.sqrt(5), 2e8 / math.sqrt(5)], rel=1e-6)
    assert of_other == [0, 0]


@BOTH
def test_C7_embedding_loss_has_an_eps_of_its_own(functional) -> None:
    x = torch.full((1, 2), 1e-7)
    assert functional.cosine_similarity(x, x).item() == pytest.approx(1, abs=1e-6)
    squared = 2e-14
    expected = 1 - squared / (squared + 1e-12)
    assert functional.cosine_embedding_loss(x, x, tensor([1])).item() == pytest.approx(expected, rel=1e-6)


@BOTH
def test_C8_embedding_target_that_is_no_sign(functional) -> None:
    assert functional.cosine_embedding_loss(tensor([[1.0, 2.0]]), tensor([[1.0, 1.0]]), tensor([0])) == 0


def test_C9_embedding_target_with_a_dimension_too_many() -> None:
    x, target = torch.ones(2, 3), torch.ones(2, 1)
    with pytest.raises(RuntimeError) as theirs:
        F.cosine_embedding_loss(x, x, target)
    assert str(theirs.value) == "0D or 1D target tensor expected, multi-target not supported"
    with pytest.raises(RuntimeError, match=r"multi-target not supported.*\(2, 3\).*\(2, 1\)"):
        LF.cosine_embedding_loss(x, x, target)


@pytest.mark.parametrize("length", [1e-12, 3e-9, 0.99e-8])
def test_C10_gradient_below_eps(length: float) -> None:
    x = torch.tensor([[0.6, 0.8]], dtype=torch.float64) * length
    y = torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    of_formula = (y / 5 / 1e-8).reshape(-1).tolist()
    for options in ({}, {"backend": "reference"}):
        assert gradient(lambda x, o=options: LF.cosine_similarity(x, y, **o), x) == pytest.approx(of_formula)
    cosine = 24 / 25 * length / 1e-8
    theirs = (y / 5 / 1e-8 - cosine * tensor([0.6, 0.8], dtype=torch.float64) / 1e-8).reshape(-1).tolist()
    assert gradient(lambda x: F.cosine_similarity(x, y), x) == pytest.approx(theirs)


# Entropy


def test_E1_entropy_of_a_masked_row() -> None:
    logits = tensor([[0.0, 1.0, -INF]])
    p = 1 / (1 + math.e)
    expected = -(p * math.log(p) + (1 - p) * math.log1p(-p))
    slope = p * (1 - p)  # dH/dz0 = -p (log p + H)
    (theirs,), (their_gradient,) = value_and_gradients(lambda z: Categorical(logits=z).entropy(), logits)
    (ours,), (grad,) = value_and_gradients(ll.entropy, logits)
    for value, slopes in ((theirs, their_gradient), (ours, grad)):
        assert value == pytest.approx(expected, rel=1e-6)
        assert slopes == pytest.approx([slope, -slope, 0], abs=1e-6)


def test_E2_entropy_of_a_certain_outcome() -> None:
    logits = tensor([[0.0, -INF, -INF]])
    theirs, ours = Categorical(logits=logits).entropy(), ll.entropy(logits)
    assert theirs == 0
    assert ours == 0
    assert math.copysign(1, theirs.item()) == -1
    assert math.copysign(1, ours.item()) == 1
    assert gradient(ll.entropy, logits) == [0, 0, 0]


def test_E3_entropy_of_a_nearly_certain_outcome() -> None:
    logits = tensor([[0.0, 30.0]])
    rest = math.exp(-30)
    truth = math.log1p(rest) + 30 * rest / (1 + rest)
    assert ll.entropy(logits).item() == pytest.approx(truth, rel=1e-7, abs=0)
    assert Categorical(logits=logits).entropy().item() != pytest.approx(truth, rel=1e-3, abs=0)


@pytest.mark.parametrize("bad", [-INF, INF, NAN])
def test_E4_ignored_row_of_token_stats(bad) -> None:
    logits = tensor([[bad, bad], [1.0, 2.0]])
    leaf = logits.clone().requires_grad_()
    stats = ll.token_stats(leaf, tensor([-100, 0]))
    assert [stats.nll[0].item(), stats.lse[0].item(), stats.entropy[0].item()] == [0, 0, 0]
    assert [stats.argmax.tolist(), stats.rank.tolist()] == [[-1, 1], [-1, 1]]
    (stats.nll.sum() + stats.lse.sum() + stats.entropy.sum()).backward()
    assert leaf.grad[0].tolist() == [0, 0]
    assert leaf.grad[1].isfinite().all()
    assert all_nan(gradient(lambda z: F.cross_entropy(z, tensor([-100, 0])), logits)[:2])


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_E5_ignored_row_of_log_probs(bad: float) -> None:
    z = torch.randn(2, 3)
    z[1, 0] = bad
    z.requires_grad_()
    target = torch.tensor([0, -100])
    theirs = z.log_softmax(1).gather(1, target.clamp(min=0)[:, None]).squeeze(1).masked_fill(target < 0, 0)
    if bad != -INF:
        assert bool(torch.autograd.grad(theirs.sum(), z)[0][1].isnan().any())
    value = ll.log_probs(z, target)
    assert value[1] == 0
    assert not bool(torch.autograd.grad(value.sum(), z)[0][1].any())
