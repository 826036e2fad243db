"""Contrastive fine-tuning: a head on MiniLM's vectors that keeps 32 of 384 numbers, and finds answers by them.

    python examples/contrastive_finetuning.py [--choose]

The head starts as the 32 principal directions of its training vectors. It is trained with InfoNCE, both ways, on half
of the 468 questions and answers, and measured once on the other half. `--choose` shows how the scale and the number of
steps were chosen: on thirds of the training half, without the other.
"""

import sys
from itertools import product

import torch
from torch import Tensor

import logitless as ll
from data import faq
from vectors import vectors

SIZE, SCALE, STEPS = 32, 10.0, 20
SCALES_TRIED, STEPS_TRIED = (5.0, 10.0, 20.0, 40.0), (10, 20, 40, 60, 80)


def principal(rows: Tensor, size: int) -> torch.nn.Linear:
    """Return a head that keeps the directions in which the rows are largest."""
    head = torch.nn.Linear(rows.shape[1], size, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.linalg.svd(rows, full_matrices=False).Vh[:size])
    return head


def trained(query: Tensor, key: Tensor, scale: float, steps: int) -> torch.nn.Linear:
    head = principal(torch.cat([query, key]), SIZE)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = ll.info_nce(head(query), head(key), scale=scale, symmetric=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def ranks(head: torch.nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Return, of each question, the rank of its own answer."""
    with torch.no_grad():
        return ll.paired_ranks(head(query), head(key)).image_to_text


def choose(query: Tensor, key: Tensor) -> None:
    """Print the mean reciprocal rank of pairs left out of training, a third at a time."""
    third = torch.arange(len(query)) % 3
    for scale, steps in product(SCALES_TRIED, STEPS_TRIED):
        left_out = [
            ranks(trained(query[third != i], key[third != i], scale, steps), query[third == i], key[third == i])
            for i in range(3)
        ]
        print(f"scale {scale:.0f}, {steps} steps: mean reciprocal rank {(1 / torch.cat(left_out)).mean():.3f}")


def main() -> None:
    query, key = (torch.nn.functional.normalize(vectors(texts), dim=1) for texts in zip(*faq(), strict=True))
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(1))
    known, held_out = order[::2], order[1::2]
    if "--choose" in sys.argv:
        choose(query[known], key[known])
        return
    before, after, whole = (
        (ranks(head, query[held_out], key[held_out]) == 1).double().mean()
        for head in (
            trained(query[known], key[known], SCALE, steps=0),
            trained(query[known], key[known], SCALE, STEPS),
            torch.nn.Identity(),
        )
    )
    print(
        f"{len(held_out)} questions held out, by {SIZE} numbers: recall@1 {before:.3f} before training, "
        f"{after:.3f} after; by all {query.shape[1]}: {whole:.3f}"
    )


if __name__ == "__main__":
    main()
