"""Every loss and measure on hard inputs against torch in float64: `python tests/fuzz_losses.py [cases] [seed]`.

Prints what is wrong, with all that was chosen, and how many cases there were of each function; its exit status says
whether all were right.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections import Counter

import torch

from hard_inputs import FUNCTIONS, WrongError, draw

SHOWN = 20


def main(cases: int, seed: int) -> int:
    """Return how many cases were wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # of small tensors two take longer
    names, done, wrong, started = list(FUNCTIONS), Counter[str](), Counter[str](), time.monotonic()
    for number in range(cases):
        name = names[number % len(names)]
        generator = random.Random(f"{seed}/{number}")
        case = draw(generator.choice, name)
        if case.way == "make_fx" and generator.random() < 0.9:
            continue  # a hundred times as slow as the others
        done[name] += 1
        try:
            case.check()
        except Exception as error:
            wrong[name] += 1
            if sum(wrong.values()) <= SHOWN:
                shown = str(error) if isinstance(error, WrongError) else f"{case}: {type(error).__name__}: {error}"
                print(f"{number}: {shown[:600]}", flush=True)
    for name in names:
        print(f"{name:45s} {done[name]:7d} cases {wrong[name]:5d} wrong")
    print(f"{sum(done.values())} cases, {sum(wrong.values())} wrong, seed {seed}, {time.monotonic() - started:.0f} s")
    return sum(wrong.values())


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(given + [120_000, 0][len(given) :])) > 0)
