"""One step of CLIP's loss over more pairs than the dense loss has memory for: time, and memory beyond the gradients.

    python benchmarks/contrastive_memory.py [--pairs 65536] [--features 512]

The matrix of similarities alone would take `4 pairs^2` bytes, 17 GB of 65536 pairs, and the dense loss holds at least
two of that size.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import logitless as ll
from logitless._bench.memory import call_and_growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=65536)
    parser.add_argument("--features", type=int, default=512)
    asked = parser.parse_args()
    torch.manual_seed(0)
    ll.clip_loss(*(torch.randn(8, asked.features, requires_grad=True) for _ in range(2)), 20.0).backward()
    image, text = (F.normalize(torch.randn(asked.pairs, asked.features), dim=1).requires_grad_() for _ in range(2))

    def step() -> torch.Tensor:
        loss = ll.clip_loss(image, text, 20.0)
        loss.backward()
        return loss.detach()

    start = time.perf_counter()
    loss, growth = call_and_growth(step)
    spent = time.perf_counter() - start
    assert image.grad is not None
    extra = (growth or 0) - 2 * image.grad.nbytes
    matrix = 4 * asked.pairs**2
    print(
        f"{asked.pairs:,} pairs of {asked.features} features on {torch.get_num_threads()} threads: loss {loss:.4f}, "
        f"{spent:.1f} s forward and backward, {extra / 1e6:.0f} MB beyond the gradients: "
        f"{extra / matrix:.2%} of the matrix of {matrix / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
