"""Distillation: the head of EfficientNet-Lite0 learns to say what the larger EfficientNet-Lite1 says of a picture.

    python examples/distillation.py [--choose]

Both classify photographs into ImageNet's 1000 classes, and of Fashion-MNIST's pictures they say different things. On
1000 of these the student's head is trained by the divergence from the teacher; 500 others are held out. No label is
used, and neither head's logits are ever built. `--choose` shows how the learning rate and the number of steps were
chosen: on a fifth of the training pictures. The features are made once, in about a minute.
"""

import sys
from copy import deepcopy
from itertools import product

import torch
from torch import Tensor

import logitless as ll
from pictures import features, head

STUDENT, TEACHER = "efficientnet-lite0", "efficientnet-lite1"
KNOWN, HELD_OUT = 1000, 500
RATE, STEPS = 1e-3, 200
RATES_TRIED, STEPS_TRIED = (3e-4, 1e-3, 3e-3, 1e-2), (25, 50, 100, 200)


def distilled(student: torch.nn.Linear, hidden: Tensor, teacher: ll.LazyLogits, rate: float, steps: int) -> None:
    """Train the student's head on what its network makes of some pictures, and what the teacher says of them."""
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    for _ in range(steps):
        loss = ll.kl(teacher, ll.linear(hidden, student.weight, student.bias), reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def agreement(student: torch.nn.Linear, hidden: Tensor, teacher: ll.LazyLogits) -> str:
    with torch.no_grad():
        told = ll.pair_stats(teacher, ll.linear(hidden, student.weight, student.bias))
    return f"KL {told.kl.mean():.3f} nats, the same class first {told.same_top.double().mean():.3f}"


def choose(hidden: Tensor, teacher_hidden: Tensor) -> None:
    """Print how well heads trained on four fifths of the pictures agree with the teacher on the rest."""
    cut = len(hidden) * 4 // 5
    first, teacher = head(STUDENT), head(TEACHER).requires_grad_(False)
    taught, asked = (ll.linear(part, teacher.weight, teacher.bias) for part in teacher_hidden.tensor_split([cut]))
    for rate, steps in product(RATES_TRIED, STEPS_TRIED):
        student = deepcopy(first)
        distilled(student, hidden[:cut], taught, rate, steps)
        print(f"rate {rate}, {steps} steps: {agreement(student, hidden[cut:], asked)}")


def main() -> None:
    known = [features(name, "train", KNOWN) for name in (STUDENT, TEACHER)]
    if "--choose" in sys.argv:
        choose(*known)
        return
    held_out = [features(name, "t10k", HELD_OUT) for name in (STUDENT, TEACHER)]
    student, teacher = head(STUDENT), head(TEACHER).requires_grad_(False)
    taught, asked = (ll.linear(hidden[1], teacher.weight, teacher.bias) for hidden in (known, held_out))
    print(f"{HELD_OUT} pictures held out, before: {agreement(student, held_out[0], asked)}")
    distilled(student, known[0], taught, RATE, STEPS)
    print(f"{HELD_OUT} pictures held out, after: {agreement(student, held_out[0], asked)}")
    print(f"the {KNOWN} of training, after: {agreement(student, known[0], taught)}")


if __name__ == "__main__":
    main()
