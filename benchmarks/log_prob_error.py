"""How far token log-probabilities of a head lie from float64, for each way to get them.

`python benchmarks/log_prob_error.py` prints the table of docs/numerics.md: the largest and the mean error in nats, and
the largest in units in the last place of the result's float32. Hidden states and weights are drawn at random, as large
as in a trained model, so that logits spread by some nats; a scale sharpens the rows until a token is nearly certain.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

import logitless as ll


def truth_of(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    rows = [
        (h.double() @ weight.double().T).log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)
        for h, t in zip(hidden.split(64), target.split(64), strict=True)
    ]
    return torch.cat(rows)


def ways(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    at = target[:, None]
    dense = F.linear(hidden, weight)
    found = {
        "ours: `-ll.token_stats(ll.linear(h, w), t).nll`": -ll.token_stats(ll.linear(hidden, weight), target).nll,
        "ours, of logits: `-ll.token_stats(h @ w.T, t).nll`": -ll.token_stats(dense, target).nll,
        "torch: `F.linear(h, w).log_softmax(-1).gather(...)`": dense.log_softmax(-1).gather(-1, at).squeeze(-1),
    }
    if hidden.dtype != torch.float32:
        name = "torch, logits rounded: `F.linear(h, w).float().log_softmax(-1).gather(...)`"
        found[name] = dense.float().log_softmax(-1).gather(-1, at).squeeze(-1)
        wide = F.linear(hidden.float(), weight.float())
        name = "torch, all in float32: `F.linear(h.float(), w.float())...`"
        found[name] = wide.log_softmax(-1).gather(-1, at).squeeze(-1)
    return found


def table(rows: int, width: int, classes: int) -> list[str]:
    torch.manual_seed(0)
    lines = [
        "| head | rows | how | largest error, nats | mean error, nats | largest, ulp of float32 |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for sharpness, kind in ((3.0, "spread"), (12.0, "nearly certain")):
            hidden = torch.randn(rows, width).to(dtype)
            weight = (torch.randn(classes, width) * sharpness / width**0.5).to(dtype)
            target = torch.randint(classes, (rows,))
            # Half of the targets are the likeliest class, whose log-probability may be close to 0.
            target[::2] = (hidden[::2].float() @ weight.float().T).argmax(-1)
            truth = truth_of(hidden, weight, target)
            ulp = torch.nextafter(truth.float().abs(), torch.tensor(torch.inf)).double() - truth.float().abs().double()
            for name, found in ways(hidden, weight, target).items():
                error = (found.double() - truth).abs()
                head = f"{str(dtype).removeprefix('torch.')}, {kind}"
                numbers = f"{error.max():.1e} | {error.mean():.1e} | {(error / ulp).max():.2g}"
                lines.append(f"| {head} | {rows} | {name} | {numbers} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=32000)
    options = parser.parse_args()
    print(f"{options.rows} rows, {options.width} features, {options.classes} classes, torch {torch.__version__}\n")
    print("\n".join(table(options.rows, options.width, options.classes)))


if __name__ == "__main__":
    main()
