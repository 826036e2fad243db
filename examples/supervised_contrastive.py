"""Supervised contrastive learning: whose vectors put clothes of one kind side by side?

    python examples/supervised_contrastive.py [--choose]

The same small network is trained on 5000 pictures of Fashion-MNIST: by SupCon on its vectors, or by cross-entropy of a
linear head on them. Of 10000 pictures held out, how many have a picture of their own kind as the nearest of the 5000?
`--choose` shows how the temperature and the number of epochs were chosen: on 5000 other pictures of the training set.
"""

import sys
from typing import TypeAlias

import torch
from torch import Tensor, nn

import logitless as ll
import logitless.functional as F
from data import fashion

KNOWN, SIZE, KINDS, BATCH = 5000, 64, 10, 500
TEMPERATURE, TEMPERATURES_TRIED = 0.05, (0.05, 0.1, 0.2, 0.5)
# Of SupCon and of cross-entropy: first as few for both, then the number that is best for each.
EPOCHS, EPOCHS_TRIED = ((10, 10), (40, 80)), (10, 20, 40, 80)

Pictures: TypeAlias = tuple[Tensor, Tensor]


def pictures(part: str) -> Pictures:
    """Return the pixels of each picture, from 0 to 1, and its kind."""
    pixels, kinds = fashion(part)
    return torch.from_numpy(pixels.reshape(len(pixels), -1) / 255).float(), torch.from_numpy(kinds.copy()).long()


def trained(pixels: Tensor, kinds: Tensor, temperature: float | None, epochs: int) -> tuple[nn.Module, nn.Module]:
    """Return a network and a head, trained by SupCon, which needs none, or without a temperature by cross-entropy."""
    generator = torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(pixels.shape[1], 256), nn.ReLU(), nn.Linear(256, SIZE))
    head = nn.Linear(SIZE, KINDS)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels), generator=generator).split(BATCH):
            vectors = network(pixels[batch])
            if temperature is None:
                loss = F.cross_entropy(head(vectors), kinds[batch])
            else:
                loss = ll.supcon_loss(vectors, kinds[batch], temperature=temperature, normalize=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network, head


def nearest_right(query: Tensor, kind: Tensor, corpus: Tensor, kinds: Tensor) -> float:
    """Return the share of queries whose nearest neighbour is of their kind."""
    _, found = ll.cosine_topk(query, corpus, 1)
    return (kinds[found[:, 0]] == kind).double().mean().item()


def measured(known: Pictures, others: Pictures, temperature: float | None, epochs: int) -> str:
    network, head = trained(*known, temperature, epochs)
    with torch.no_grad():
        vectors = network(others[0])
        right = f"{nearest_right(vectors, others[1], network(known[0]), known[1]):.3f}"
        by_head = (head(vectors).argmax(1) == others[1]).double().mean()
    return right if temperature is not None or epochs == 0 else f"{right} ({by_head:.3f} by its head)"


def choose(known: Pictures, others: Pictures) -> None:
    for epochs in EPOCHS_TRIED:
        for temperature in TEMPERATURES_TRIED:
            print(f"SupCon, temperature {temperature}, {epochs} epochs: {measured(known, others, temperature, epochs)}")
        print(f"cross-entropy, {epochs} epochs: {measured(known, others, None, epochs)}")


def main() -> None:
    torch.set_num_threads(1)  # Eighty epochs would carry a rounding that depends on their number into the last digit.
    pixels, kinds = pictures("train")
    known = pixels[:KNOWN], kinds[:KNOWN]
    if "--choose" in sys.argv:
        choose(known, (pixels[-KNOWN:], kinds[-KNOWN:]))
        return
    held_out = pictures("t10k")
    print(
        f"{len(held_out[0])} pictures held out, the nearest of {KNOWN} of the same kind: "
        f"{nearest_right(*held_out, *known):.3f} by pixels, {measured(known, held_out, None, 0)} before training"
    )
    for supcon, cross_entropy in EPOCHS:
        print(f"SupCon, {supcon} epochs: {measured(known, held_out, TEMPERATURE, supcon)}")
        print(f"cross-entropy, {cross_entropy} epochs: {measured(known, held_out, None, cross_entropy)}")


if __name__ == "__main__":
    main()
