"""The matrix products of a head's tile: the compiled kernel beside torch's, as `logitless` uses each.

A tile is so many rows by all classes, class-major. `logits` = weight @ hidden.T, `to hidden` adds weight.T @ gradient,
`to weight` adds gradient @ hidden. Of bfloat16 the kernel writes and reads the tile in float32 and adds in float32;
torch's writes bfloat16, and adds nothing. Medians, in turn, in milliseconds; a dash: the kernel does not serve here.
Run: python benchmarks/products.py [--rows N] [--features N] [--classes N] [--orders]

`--orders` times all three products of 2048 rows, torch's, in tiles of fewer rows, [classes, rows] and [rows, classes].
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from logitless.kernels import cpu

Call = Callable[[], object]
_ROUNDS = 7


def medians(calls: dict[str, Call]) -> dict[str, float]:
    """Return the median milliseconds of each call, all of them measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def torch_products(hidden: Tensor, weight: Tensor) -> dict[str, Call]:
    tile = torch.empty(len(weight), len(hidden), dtype=hidden.dtype)
    gradient = torch.randn(tile.shape).to(tile.dtype)
    to_hidden, to_weight = torch.zeros_like(hidden.T), torch.zeros_like(weight)
    calls: dict[str, Call] = {"logits": lambda: torch.mm(weight, hidden.T, out=tile)}
    if hidden.dtype == torch.float32:
        calls["to hidden"] = lambda: to_hidden.addmm_(weight.T, gradient)
        calls["to weight"] = lambda: to_weight.addmm_(gradient, hidden)
    else:
        calls["to hidden"] = lambda: torch.mm(weight.T, gradient, out=to_hidden)
        calls["to weight"] = lambda: torch.mm(gradient, hidden, out=to_weight)
    return calls


def kernel_products(hidden: Tensor, weight: Tensor) -> dict[str, Call]:
    if hidden.dtype not in cpu.PRODUCT_DTYPES:
        return {}
    tile = torch.empty(len(weight), len(hidden))
    gradient = torch.randn(tile.shape)
    to_hidden, to_weight = torch.zeros(hidden.shape), torch.zeros(weight.shape)
    return {
        "logits": lambda: cpu.product(weight, hidden.T, tile),
        "to hidden": lambda: cpu.product(weight.T, gradient, to_hidden.T, accumulate=True),
        "to weight": lambda: cpu.product(gradient, hidden, to_weight, accumulate=True),
    }


def orders(rows: int, features: int, classes: int) -> None:
    hidden, weight = torch.randn(rows, features), torch.randn(classes, features)
    to_hidden, to_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def by_class(tile_rows: int, memory: Tensor) -> None:
        tile = memory.view(classes, tile_rows)
        for part, to_part in zip(hidden.split(tile_rows), to_hidden.split(tile_rows), strict=True):
            torch.mm(weight, part.T, out=tile)
            to_part.T.addmm_(weight.T, tile)
            to_weight.addmm_(tile, part)

    def by_row(tile_rows: int, memory: Tensor) -> None:
        tile = memory.view(tile_rows, classes)
        for part, to_part in zip(hidden.split(tile_rows), to_hidden.split(tile_rows), strict=True):
            torch.mm(part, weight.T, out=tile)
            to_part.addmm_(tile, weight)
            to_weight.T.addmm_(part.T, tile)

    tile_rows = 128
    while tile_rows <= rows:
        memory = torch.empty(tile_rows * classes)
        calls: dict[str, Call] = {
            "[classes, rows]": partial(by_class, tile_rows, memory),
            "[rows, classes]": partial(by_row, tile_rows, memory),
        }
        told = "   ".join(f"{order} {milliseconds:7.1f}" for order, milliseconds in medians(calls).items())
        print(f"tiles of {tile_rows:5} rows: {told}", flush=True)
        tile_rows *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=416)
    parser.add_argument("--features", type=int, default=576)
    parser.add_argument("--classes", type=int, default=49152)
    parser.add_argument("--orders", action="store_true")
    asked = parser.parse_args()
    if asked.orders:
        orders(2048, asked.features, asked.classes)
        return
    print(f"{asked.rows} x {asked.features} x {asked.classes}, {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        factors = [torch.randn(lines, asked.features).to(dtype) for lines in (asked.rows, asked.classes)]
        kernels = kernel_products(*factors)
        for name, call in torch_products(*factors).items():
            beside = {"torch": call}
            if name in kernels:
                beside["kernel"] = kernels[name]
            times = medians(beside)
            told = "   ".join(
                f"{who} {times[who]:7.1f}" if who in times else f"{who}       -" for who in ("torch", "kernel")
            )
            print(f"{dtype!s:15} {name:10} {told}", flush=True)


if __name__ == "__main__":
    main()
