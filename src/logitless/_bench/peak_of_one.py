"""The peak memory of one case, measured in a process of its own: `python -m logitless._bench.peak_of_one '{...}'`."""

from __future__ import annotations

import json
import os
import sys

import torch

from logitless._bench.memory import extra_bytes
from logitless._bench.suite import cases


def main() -> None:
    """Measure the case that the first argument names, and print how many bytes it took."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    case = next(case for case in cases(quick=asked["quick"]) if case.name == asked["case"])
    provider = next(provider for provider in case.providers if provider.name == asked["provider"])
    sys.stdout.write(json.dumps(extra_bytes(case, provider, asked["mode"])))
    sys.stdout.flush()
    os._exit(0)  # JAX's threads, joined beside OpenMP's, now and then abort the exit


if __name__ == "__main__":
    main()
