"""An installation without the compiled kernels works, on the reference, and says so."""

import subprocess
import sys

CODE = """
import sys
sys.modules["logitless._native"] = None  # what an import of a module that is not there comes to
import torch, logitless as ll, logitless.functional as F

status = ll.backends()["cpu"]
assert not status.available and "no compiled kernels" in status.detail, status
hidden, weight = torch.randn(6, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
target = torch.tensor([0, 1, 2, 3, 4, -100])
logits = hidden @ weight.T
lazy = ll.linear(hidden, weight)
torch.testing.assert_close(F.cross_entropy(logits, target), torch.nn.functional.cross_entropy(logits, target))
torch.testing.assert_close(F.cross_entropy(lazy, target), F.cross_entropy(logits, target))
torch.testing.assert_close(ll.kl(lazy, logits), torch.zeros(6), atol=1e-6, rtol=0)
F.binary_cross_entropy_with_logits(lazy, torch.zeros(6, 5)).backward()
F.cosine_similarity(hidden, hidden).sum().backward()
F.kl_div(logits.log_softmax(1), logits.softmax(1), reduction="batchmean").backward()
assert hidden.grad.isfinite().all()
choice = ll.explain(F.cross_entropy, lazy, target)
assert choice.backend == "reference" and "no compiled kernels" in choice.reason, choice
try:
    F.cross_entropy(logits, target, backend="cpu")
except RuntimeError as error:
    assert "reinstall with a C++ compiler" in str(error), error
else:
    raise AssertionError("a backend that is not there served a call")
print("served")
"""


def test_everything_is_served_and_nothing_is_hidden() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "served\n"
