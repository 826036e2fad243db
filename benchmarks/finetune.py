"""Fine-tune SmolLM2-135M on real text with and without `ll.lazy_head`: losses, step time and peak memory side by side.

Each of the two runs in a process of its own, in float32, with AdamW, on the same batches of the help texts that ship
with Python. The losses must agree to 1e-5 relative at every step, or the exit status is 1. Peak memory is what the
steps took beyond the weights, which includes gradients and the optimiser's state in both.
Run: python benchmarks/finetune.py [--steps N] [--tokens N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import logitless as ll
from logitless._bench.memory import call_and_growth
from logitless._bench.protocol import machine, versions
from logitless.cli.demo import packaged_model, unwrap
from logitless.cli.models import ModelName, load_model

LEARNING_RATE = 2e-5
ALLOWED = 1e-5
WARM_UP = 2  # steps in which the optimiser's state and the pools come about
VARIANTS = {"without": contextlib.nullcontext, "lazy_head": ll.lazy_head}


def finetune(variant: str, steps: int, tokens: int) -> dict[str, Any]:
    """Return the losses, the seconds of each step, and the growth of the resident size over all of them."""
    model = load_model(ModelName(packaged_model(), None))
    network = model.network.train()
    text = "\n".join(unwrap(topic) for topic in topics.values())
    ids = torch.tensor(model.tokenizer.encoded(text[: 8 * steps * tokens]).ids[: steps * tokens])
    if len(ids) < steps * tokens:
        raise SystemExit(f"the text has fewer than {steps} x {tokens} tokens")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    seconds: list[float] = []

    def train() -> None:
        for batch in ids.view(steps, 1, tokens):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = network(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)

    torch.manual_seed(0)
    with VARIANTS[variant](network):
        _, growth = call_and_growth(train)
    return {"losses": losses, "seconds": seconds, "growth_bytes": growth}


def run_apart(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return `finetune` of a process of its own."""
    command = [sys.executable, __file__, "--variant", variant, "--steps", str(options.steps)]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here, and print its numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant is not None:
        print(json.dumps(finetune(options.variant, options.steps, options.tokens)))
        return
    runs = {}
    for variant in VARIANTS:
        print(f"{options.steps} steps of {options.tokens} tokens, {variant} ...", file=sys.stderr, flush=True)
        runs[variant] = run_apart(variant, options)
    pairs = list(zip(*(run["losses"] for run in runs.values()), strict=True))
    difference = max(abs(ours - theirs) / abs(theirs) for theirs, ours in pairs)
    print(f"{'':>10} {'step s':>8} {'peak MB':>9} {'first loss':>11} {'last loss':>11}")
    for variant, run in runs.items():
        step = statistics.median(run["seconds"][min(WARM_UP, options.steps - 1) :])
        peak = "" if run["growth_bytes"] is None else f"{run['growth_bytes'] / 1e6:.0f}"
        print(f"{variant:>10} {step:>8.3f} {peak:>9} {run['losses'][0]:>11.6f} {run['losses'][-1]:>11.6f}")
    print(f"largest relative difference of a loss: {difference:.1e} (allowed: {ALLOWED:.0e})")
    if options.json is not None:
        facts = {"machine": machine(), "versions": versions(), "threads": options.threads, "tokens": options.tokens}
        options.json.write_text(json.dumps({**facts, "difference": difference, "runs": runs}, indent=1) + "\n", "utf-8")
    if difference > ALLOWED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
