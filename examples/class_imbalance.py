"""Class imbalance: 51 of 1484 proteins of yeast are of a rare kind. What do class weights change?

    python examples/class_imbalance.py

The same linear classifier is trained four times on half of the proteins: by both cross-entropies, each without and with
the weights that make the rare class count as much as the common one. The other half is held out.
"""

import torch
from torch import Tensor

import logitless.functional as F
from data import yeast

STEPS = 300


def trained(features: Tensor, target: Tensor, weight: Tensor | None) -> torch.nn.Linear:
    """Train on integer targets by `cross_entropy`, on floating ones by `binary_cross_entropy_with_logits`."""
    binary = target.is_floating_point()
    model = torch.nn.Linear(features.shape[1], 1 if binary else 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        logits = model(features)
        if binary:
            loss = F.binary_cross_entropy_with_logits(logits.squeeze(1), target, pos_weight=weight)
        else:
            loss = F.cross_entropy(logits, target, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def quality(found: Tensor, rare: Tensor) -> tuple[float, float, float]:
    """Return recall and precision of the rare class, and the mean of both classes' recall."""
    recall = found[rare].double().mean().item()
    precision = rare[found].double().mean().item()
    return recall, precision, (recall + (~found[~rare]).double().mean().item()) / 2


def main() -> None:
    numbers, rare = (torch.from_numpy(each) for each in yeast())
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    known, held_out = order[::2], order[1::2]
    deviation, mean = torch.std_mean(numbers[known], 0)
    features = (numbers - mean) / deviation
    target = rare[known].long()
    counts = torch.bincount(target)
    for name, labels, weight in (
        ("cross_entropy", target, None),
        ("cross_entropy, weight", target, len(target) / (2 * counts)),
        ("binary_cross_entropy_with_logits", target.float(), None),
        ("binary_cross_entropy_with_logits, pos_weight", target.float(), counts[0] / counts[1]),
    ):
        logits = trained(features[known], labels, weight)(features[held_out]).detach()
        found = logits[:, -1] > (logits[:, 0] if logits.shape[1] > 1 else 0)
        recall, precision, balanced = quality(found, rare[held_out])
        print(f"{name}: recall {recall:.3f}, precision {precision:.3f}, balanced accuracy {balanced:.3f}")


if __name__ == "__main__":
    main()
