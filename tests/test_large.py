"""Logits of more than 2^31 elements: no offset, of elements or of bytes, is held in 32 bits."""

import pytest
import torch

import logitless.functional as F
from logitless.kernels import cpu

ROWS, CLASSES = 2**14 + 16, 2**17  # the last 16 rows are beyond element 2^31, in the fewest rows of a power of two
ABOVE = 2**14
# Some rows below, which a wrapped offset would have written, and all of those above.
CHECKED = [*range(16), *range(ABOVE - 2, ROWS)]


@pytest.mark.slow
def test_cross_entropy_above_two_to_the_31_elements() -> None:
    assert ROWS * CLASSES > 2**31
    try:
        check_values_and_gradients()
    finally:
        cpu.pool_clear()  # the other tests' memory


def check_values_and_gradients() -> None:
    common = torch.randn(CLASSES).bfloat16()
    logits = torch.empty(ROWS, CLASSES, dtype=torch.bfloat16).copy_(common)
    logits[CHECKED] = torch.randn(len(CHECKED), CLASSES).mul_(3).bfloat16()
    logits.requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))
    upstream = torch.randn(ROWS).bfloat16()
    loss = F.cross_entropy(logits, target, reduction="none", backend="cpu")
    loss.backward(upstream)
    assert logits.grad is not None

    expected = common.double().logsumexp(0) - common.double()[target]
    some = logits.detach()[CHECKED].double()
    expected[CHECKED] = some.logsumexp(1) - some.gather(1, target[CHECKED, None]).squeeze(1)
    torch.testing.assert_close(loss.double(), expected, rtol=2**-8, atol=0)

    slope = some.softmax(1)
    slope[range(len(CHECKED)), target[CHECKED]] -= 1
    slope *= upstream[CHECKED, None].double()
    torch.testing.assert_close(logits.grad[CHECKED].double(), slope, rtol=2**-8, atol=0)
