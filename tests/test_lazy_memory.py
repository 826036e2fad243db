"""Resident memory of what is read of lazy logits and of every loss, by the operating system, one process each."""

import json
import subprocess
import sys

import pytest

ROWS, CLASSES, WIDTH = 2048, 50000, 16
MARGIN = 16 * 2**20  # beside the tile budget: libraries' own, and a few numbers a row

# Each an expression of z (lazy logits), t (targets [rows]) and so on, its gradient taken where it has one.
CALLS = {
    "argmax": "z.argmax(-1)",
    "max": "z.max(-1)",
    "topk": "z.topk(8, -1)",
    "logsumexp": "z.logsumexp(-1)",
    "gather": "z.gather(-1, t.unsqueeze(-1))",
    "gather of many": "z.gather(-1, many)",
    "log_softmax.gather": "z.log_softmax(-1).gather(-1, t.unsqueeze(-1))",
    "log_softmax.gather of some": "z.log_softmax(-1).gather(-1, some)",
    "log_softmax.sum": "z.log_softmax(-1).sum(-1)",
    "log_softmax.argmax": "z.log_softmax(-1).argmax(-1)",
    "one class": "z.view(2, -1, z.shape[-1])[:, :, 5]",
    "two classes": "z[..., [5, 7]].materialize()",
    "cross_entropy": "F.cross_entropy(z, t)",
    "cross_entropy, rows": "F.cross_entropy(z, t, reduction='none')",
    "smoothing": "F.cross_entropy(z, t, label_smoothing=0.1)",
    "token_stats": "ll.token_stats(z, t)",
    "entropy": "ll.entropy(z, reduction='mean')",
    "kl of two heads": "ll.kl(z, y)",
    "js of two heads": "ll.js(z, y, reduction='mean')",
    "pair_stats": "ll.pair_stats(z, y, t)",
    "positives": "F.binary_cross_entropy_with_logits(z, labels)",
    "sparse teacher": "ll.kl(teacher, z)",
    "top_k": "ll.SparseLogits.top_k(z, 8)",
}
SCRIPT = """
import json, sys, torch, logitless as ll, logitless.functional as F
from logitless._bench.memory import call_and_growth
from logitless.kernels.interface import DEFAULT_MAX_BYTES

rows, classes, width, expression, gradient, dtype = json.loads(sys.argv[1])
torch.set_num_threads(2)
torch.manual_seed(0)
dtype = getattr(torch, dtype)
parts = {}

def operands(rows):
    h, w = torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype)
    made = {"t": torch.randint(classes, (rows,)), "some": torch.randint(classes, (rows, 3))}
    made["many"] = torch.randint(classes, (rows, 2000)) if "many" in expression else None
    if gradient:
        h.requires_grad_(), w.requires_grad_()
    made["z"] = ll.linear(h, w)
    made["y"] = ll.linear(torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype))
    at = torch.stack([torch.arange(rows), torch.randint(classes, (rows,))])
    made["labels"] = torch.sparse_coo_tensor(at, torch.ones(rows), (rows, classes), check_invariants=True).coalesce()
    if "teacher" in expression:
        made["teacher"] = ll.SparseLogits(torch.full((rows, 4), -3.0), torch.arange(4).expand(rows, 4), classes)
    return made, [h, w]

def run(made, wanted):
    value = eval(expression, {"ll": ll, "F": F, "torch": torch}, made)
    outputs = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, torch.Tensor)]
    if not gradient:
        return outputs, []
    outputs = [v for v in outputs if v.requires_grad]
    return outputs, list(torch.autograd.grad(outputs, wanted, [torch.ones_like(v) for v in outputs]))

run(*operands(8))  # libraries and threads are there
made, wanted = operands(rows)
(outputs, grads), growth = call_and_growth(lambda: run(made, wanted))
kept = sum(v.nbytes for v in outputs) + sum(g.nbytes for g in grads)
if gradient and dtype in (torch.float16, torch.bfloat16):
    kept += sum(4 * part.numel() for part in wanted)  # gradients wait in float32
print(json.dumps([growth - kept, DEFAULT_MAX_BYTES]))
"""


def growth(name: str, *, gradient: bool, dtype: str = "float32") -> tuple[int, int]:
    asked = json.dumps([ROWS, CLASSES, WIDTH, CALLS[name], gradient, dtype])
    done = subprocess.run([sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, budget = json.loads(done.stdout)
    return taken, budget


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and resets a process's peak")
NO_GRADIENT = ("argmax", "log_softmax.argmax", "top_k")


@linux
@pytest.mark.parametrize("name", [*NO_GRADIENT, "max", "gather of many", "cross_entropy", "token_stats"])
def test_values_take_no_more_than_the_tile_budget(name: str) -> None:
    taken, budget = growth(name, gradient=False)
    assert taken < budget + MARGIN


@linux
@pytest.mark.parametrize("name", [name for name in CALLS if name not in NO_GRADIENT])
def test_gradients_take_no_more_than_the_tile_budget(name: str) -> None:
    taken, budget = growth(name, gradient=True)
    assert taken < budget + MARGIN


@linux
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["max", "logsumexp", "log_softmax.gather of some", "cross_entropy"])
def test_half_precision_heads_take_no_more(name: str, dtype: str) -> None:
    taken, budget = growth(name, gradient=True, dtype=dtype)
    assert taken < budget + MARGIN
