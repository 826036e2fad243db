"""A model's own tokenizer: what its files say, run by the `tokenizers` library and by nothing else.

transformers builds another tokenizer than the file's where a class name or a model type tells it to; here the file's
own rules are the only source. A directory's are its tokenizer.json; a GGUF file's are read by `gguf_tokenizer`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from logitless.cli.errors import InputError
from logitless.cli.lfs import refuse_lfs_pointer

_MANY_SYMBOLS = ("continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, and the characters that each stands for, from one place up to another."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer, and the token it puts before a text with the reason for it."""

    backend: Tokenizer
    bos: int | None
    bos_reason: str

    def encoded(self, text: str) -> Encoded:
        """Split a text into tokens, without the one that goes before it."""
        found = self.backend.encode(text, add_special_tokens=False)
        return Encoded(found.ids, found.offsets)

    def token(self, index: int) -> str | None:
        """Return a token as the vocabulary spells it, or None where there is none."""
        spelled: str | None = self.backend.id_to_token(index)
        return spelled

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self.backend.decode(ids, skip_special_tokens=False))

    @cached_property
    def description(self) -> dict[str, Any]:
        """The whole tokenizer as tokenizer.json writes it."""
        described: dict[str, Any] = json.loads(self.backend.to_str())
        return described

    @cached_property
    def special(self) -> Mapping[int, str]:
        """The special tokens by id: text that spells one is read as it."""
        return {token["id"]: token["content"] for token in self.description["added_tokens"] if token["special"]}

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """Every token that a text can become, by id.

        A vocabulary may hold more: rows kept for later, padding to a round number, or a token whose merge is missing.
        No text becomes one of those, so they are left out.
        """
        found = {int(token["id"]): str(token["content"]) for token in self.description["added_tokens"]}
        found.update(_model_tokens(self.description["model"]))
        return found

    @cached_property
    def size(self) -> int:
        """One more than the highest id that a text can become."""
        return max(self.tokens, default=-1) + 1


def read_tokenizer_json(folder: Path) -> TextTokenizer:
    """Read a directory's tokenizer.json, and from tokenizer_config.json whether a text begins with a special token."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no fast tokenizer (tokenizer.json), which says how its texts are split; "
            "write one with AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers"
        )
    refuse_lfs_pointer(path)
    try:
        backend = Tokenizer.from_str(path.read_text("utf-8"))
    # The library raises a bare Exception for whatever it cannot read.
    except Exception as error:
        raise InputError(f"{path} is not a tokenizer: {' '.join(str(error).split())}") from error
    backend.no_truncation()
    backend.no_padding()
    return TextTokenizer(backend, *_bos_of_directory(backend, folder))


def _bos_of_directory(backend: Tokenizer, folder: Path) -> tuple[int | None, str]:
    config = _tokenizer_config(folder)
    asked = config.get("add_bos_token")
    if asked is not None:
        given = config.get("bos_token")
        content = given.get("content") if isinstance(given, dict) else given
        token = backend.token_to_id(content) if isinstance(content, str) else None
        if asked and token is None:
            raise InputError(
                f"{folder / 'tokenizer_config.json'} says add_bos_token, but its bos_token is none of tokenizer.json"
            )
        return (token, "its tokenizer_config.json says so") if asked else (None, "its tokenizer_config.json says so")
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    prefix = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else _before(whole, plain)
    if len(prefix) > 1:
        names = ", ".join(str(backend.id_to_token(token)) for token in prefix)
        raise InputError(f"the tokenizer of {folder} puts {len(prefix)} tokens before a text ({names}), not one")
    return (prefix[0], "this tokenizer adds it") if prefix else (None, "this tokenizer adds none")


def _before(whole: list[int], plain: list[int]) -> list[int]:
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    refuse_lfs_pointer(path)
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object")
    return config


def _model_tokens(model: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens that the model itself can make of a text: of BPE, its symbols and what they merge to."""
    vocabulary = model["vocab"]
    if model["type"] != "BPE":
        pieces = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
        return {index: piece for piece, index in pieces.items()}
    if model.get("ignore_merges") or any(model.get(name) for name in _MANY_SYMBOLS):
        return {index: piece for piece, index in vocabulary.items()}
    made = {piece for piece in vocabulary if len(piece) == 1}
    made.update("".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"])
    if model.get("byte_fallback"):
        made.update(f"<0x{byte:02X}>" for byte in range(256))
    if model.get("unk_token") is not None:
        made.add(model["unk_token"])
    return {vocabulary[piece]: piece for piece in made if piece in vocabulary}
