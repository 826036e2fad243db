"""A sentence-transformers model of a few thousand numbers, made in a folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

WIDTH = 16
_WORDS = [f"word{number}" for number in range(60)]


def tiny_model(folder: Path, seed: int = 0) -> Any:
    """Return a model of two layers without dropout, the same for the same seed."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel, BertTokenizerFast

    place = folder / f"model{seed}"
    if not place.exists():
        place.mkdir(parents=True)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
        (place / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(vocab_file=str(place / "vocab.txt")).save_pretrained(place)
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
        )
        BertModel(config).save_pretrained(place)
    transformer = modules.Transformer(str(place), max_seq_length=16)
    return SentenceTransformer(modules=[transformer, modules.Pooling(WIDTH)], device="cpu")


def sentences(count: int, seed: int) -> list[str]:
    """Return sentences of one to eight words, drawn at random."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(_WORDS, k=drawn.randint(1, 8))) for _ in range(count)]
