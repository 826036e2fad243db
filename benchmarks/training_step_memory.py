"""Peak memory of one training step with 128,256 classes: the head's logits built, and not built (`ll.linear`).

Each runs in a process of its own and reports that process's peak resident memory: Python and torch, the weights, their
gradients and everything the step makes. The two losses are compared, so both did the same work.
Run: python benchmarks/training_step_memory.py [--rows 2048] [--features 512] [--classes 128256]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch

import logitless as ll
import logitless.functional as F


def step(lazy: bool, rows: int, features: int, classes: int) -> dict[str, float]:
    """Run a layer, the head and the loss forward and backward, change the weights, and return loss and peak."""
    torch.manual_seed(0)
    body = torch.nn.Linear(features, features)
    head = torch.nn.Linear(features, classes, bias=False)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    inputs, target = torch.randn(rows, features), torch.randint(classes, (rows,))
    before = peak()
    hidden = torch.tanh(body(inputs))
    if lazy:
        loss = F.cross_entropy(ll.linear(hidden, head.weight), target)
    else:
        loss = torch.nn.functional.cross_entropy(head(hidden), target)
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "before": before, "peak": peak()}


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def apart(lazy: bool, sizes: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *sizes, "--one", "lazy" if lazy else "dense"]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"rows": 2048, "features": 512, "classes": 128_256}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--one", choices=("dense", "lazy"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(step(given.one == "lazy", given.rows, given.features, given.classes)))
        return
    arguments = [part for name in sizes for part in (f"--{name}", str(getattr(given, name)))]
    dense, lazy = (apart(lazy, arguments) for lazy in (False, True))
    weight = 4 * given.classes * given.features
    print(
        f"{given.rows} tokens, {given.features} features, {given.classes:,} classes, float32, torch {torch.__version__}"
    )
    print(f"the head's weight and its gradient: {2 * weight / 1e6:,.0f} MB; one copy of the logits: ", end="")
    print(f"{4 * given.rows * given.classes / 1e6:,.0f} MB")
    for name, found in (("dense", dense), ("lazy", lazy)):
        print(
            f"{name:>6}: peak {found['peak'] / 1e6:>6,.0f} MB, {found['before'] / 1e6:,.0f} MB of it before the step; "
            f"loss {found['loss']:.6f}"
        )
    if abs(dense["loss"] - lazy["loss"]) > 1e-5 * dense["loss"]:
        raise SystemExit("the two losses differ: these were not the same step")


if __name__ == "__main__":
    main()
