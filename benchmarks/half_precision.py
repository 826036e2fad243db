"""What rounding costs a bfloat16 head: the error of each way to compute its cross-entropy, beside its time and memory.

torch's product on the CPU writes what it reads, so its logits of a bfloat16 head are rounded to bfloat16. The compiled
kernel writes float32; where it does not serve factors are widened for torch's product of float32, a part at a time.
Float32 copies cost float32 products. Errors are against float64 on the same bfloat16 hidden states and
weight: of a row's loss, in float32, the largest and the mean in nats; of the two gradients the norm of the difference
over the norm.
Run: python benchmarks/half_precision.py [--rows N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import logitless as ll
from logitless import functional
from logitless._bench.heads import SMOLLM2, head_inputs
from logitless._bench.memory import call_and_growth

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_ROUNDS = 5


def rounded_everywhere(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch_functional.cross_entropy(torch_functional.linear(hidden, weight), target)


def rows_of_rounded_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = torch_functional.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch_functional.cross_entropy(wide, target, reduction="none")


def as_it_comes(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.linear_cross_entropy(hidden, weight, target)


def rows_as_they_come(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ll.token_stats(ll.linear(hidden, weight), target).nll


def of_float32(loss: Loss) -> Loss:
    return lambda hidden, weight, target: loss(hidden.float(), weight.float(), target)


# The mean, and the losses of the rows in float32.
WAYS: dict[str, tuple[Loss, Loss]] = {
    "torch: logits, softmax gradient and sums in bfloat16": (rounded_everywhere, rows_of_rounded_logits),
    "logitless: logits and sums in float32": (as_it_comes, rows_as_they_come),
    "logitless: float32 copies of hidden and weight": (of_float32(as_it_comes), of_float32(rows_as_they_come)),
}


def of(loss: Loss, row_losses: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the losses of the rows, and the gradients of their mean."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(*leaves, target).backward()
    with torch.no_grad():
        rows = row_losses(hidden, weight, target)
    grads = [leaf.grad for leaf in leaves]
    assert grads[0] is not None
    assert grads[1] is not None
    return rows.double(), grads[0].double(), grads[1].double()


def step_cost(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the median milliseconds of a step forward and back, and its peak beyond inputs and gradients in MB."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, target).backward()

    _, growth = call_and_growth(step)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3, ((growth or 0) - sum(leaf.nbytes for leaf in leaves)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=SMOLLM2[0])
    rows, (_, features, classes) = parser.parse_args().rows, SMOLLM2
    torch.manual_seed(0)
    inputs = head_inputs(rows, features, classes, torch.bfloat16)
    hidden, weight, target = inputs
    true_rows, *true_grads = of(rounded_everywhere, rows_of_rounded_logits, hidden.double(), weight.double(), target)
    print(f"{rows} x {features} x {classes}, {torch.get_num_threads()} threads")
    print(f"{'':54} {'loss max':>9} {'mean':>9} {'hidden':>9} {'weight':>9} {'ms':>7} {'MB':>7}")
    for name, (loss, row_losses) in WAYS.items():
        each, *grads = of(loss, row_losses, *inputs)
        errors = [(each - true_rows).abs().max(), (each - true_rows).abs().mean()]
        errors += [(grad - true).norm() / true.norm() for grad, true in zip(grads, true_grads, strict=True)]
        milliseconds, megabytes = step_cost(loss, *inputs)
        columns = " ".join(f"{float(error):9.1e}" for error in errors)
        print(f"{name:54} {columns} {milliseconds:7.0f} {megabytes:7.0f}", flush=True)


if __name__ == "__main__":
    main()
