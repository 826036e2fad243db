"""Models for the command line's tests: tiny ones made here, and the real one from its package."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from logitless.cli.models import LanguageModel, ModelName, ModelSource, load_model
from logitless.cli.networks import transformers
from logitless.cli.tokenizer import TextTokenizer, read_tokenizer_json

TEXT = "The quick brown fox jumps over 13 lazy dogs & naïve cats. 😀\n" * 2


def save_two_and_text(folder: Path) -> Path:
    """Save two models of the same tokens, "base" and "other", and `TEXT`."""
    save_model(folder / "base")
    save_model(folder / "other", seed=1)
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return folder


def byte_tokenizer(*, bos: bool = False, extra: int = 0, swapped: bool = False) -> Any:
    """Make a tokenizer of one token a byte, `<s>`, and `extra` tokens that no text contains; two may be swapped."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swapped:
        alphabet[:2] = alphabet[1::-1]
    vocabulary = {token: index for index, token in enumerate(["<s>", *alphabet, *(f"<{i}>" for i in range(extra))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@functools.cache
def text_tokenizer(**options: Any) -> TextTokenizer:
    """Return `byte_tokenizer` as the command line reads it from a directory."""
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer(**options).save_pretrained(folder)
        return read_tokenizer_json(Path(folder))


def save_model(
    folder: Path,
    kind: str = "Llama",
    *,
    rows: int = 257,
    seed: int = 0,
    change: Callable[[Any], None] | None = None,
    tokenizer: Any = None,
    **config: Any,
) -> Path:
    """Save a random model of two small layers as safetensors, with a tokenizer, after `change` has seen it."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    family = getattr(transformers, f"{kind}ForCausalLM")
    model = family(family.config_class(vocab_size=rows, **(sizes | config)))
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


@functools.cache
def real_model() -> LanguageModel:
    """Load the packaged SmolLM2-135M, once a process: it takes 15 seconds."""
    return load_model(ModelName(real_model_path(), None))


def real_model_path() -> Path:
    """Return the file that the demo uses."""
    from logitless.cli.demo import packaged_model

    return packaged_model()


def read_once(name: ModelName, source: ModelSource | None = None) -> LanguageModel:
    """Stand in for `load_model`: the real model comes from `real_model`, others from their files."""
    return real_model() if name.path == real_model_path() and name.rounding is None else load_model(name, source)


def dense_log_probs(network: Any, ids: list[int]) -> torch.Tensor:
    """Return the float64 log-softmax of the model's own full logits, by its own forward."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)
