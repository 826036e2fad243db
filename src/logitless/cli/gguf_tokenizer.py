"""The tokenizer that a GGUF file holds as `tokenizer.ggml.*`, built for the `tokenizers` library.

Two kinds are known, by their llama.cpp names: `gpt2`, byte-level BPE with the merges in the file, and `llama`, the BPE
of SentencePiece, whose merges follow from the scores of its pieces.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from logitless.cli.errors import InputError
from logitless.cli.gguf_file import GgufFile
from logitless.cli.networks import transformers
from logitless.cli.pre_tokenizers import NAMES, pre_tokenizer
from logitless.cli.tokenizer import TextTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_PREFIX = "tokenizer.ggml."
# What these say is of no use here: which token ends what, how to lay out a chat, how bad a piece is.
_OF_NO_EFFECT = (
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "padding_token_id",
    "seperator_token_id",
    "mask_token_id",
    "cls_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "prefix_token_id",
    "suffix_token_id",
    "middle_token_id",
    "add_eos_token",
    "add_sep_token",
    "token_type_count",
)
_KNOWN = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "bos_token_id",
    "unknown_token_id",
    "add_bos_token",
    "add_space_prefix",
    "remove_extra_whitespaces",
)


class GgufVocabulary:
    """The tokenizer keys of a file, their lengths and types checked."""

    def __init__(self, file: GgufFile) -> None:
        """Refuse a file without tokens, or with a tokenizer key that is not understood."""
        self.file = file
        self._metadata: Mapping[str, Any] = file.metadata
        for key in sorted(file.metadata):
            name = key.removeprefix(_PREFIX)
            if key.startswith(_PREFIX) and name not in _KNOWN and name not in _OF_NO_EFFECT:
                raise InputError(f"{file.path}: metadata key {key} is not understood, so its tokenizer cannot be built")
        self.tokens: list[str] = self._array("tokens", str)
        if not self.tokens:
            raise InputError(f"{file.path} holds no tokenizer: metadata {_PREFIX}tokens is missing")
        if len(set(self.tokens)) != len(self.tokens):
            raise InputError(f"{file.path}: {_PREFIX}tokens lists a token twice")
        self.types: list[int] = self._array("token_type", int, len(self.tokens)) or [_NORMAL] * len(self.tokens)

    def get(self, name: str, kind: type, default: Any) -> Any:
        """Return `tokenizer.ggml.{name}`, or the default where the file has none; refuse another type."""
        found = self._metadata.get(f"{_PREFIX}{name}", default)
        if found is not default and not isinstance(found, kind):
            raise InputError(f"{self.file.path}: metadata {_PREFIX}{name} is not understood")
        return found

    def token_id(self, name: str) -> int | None:
        """Return the id that a key gives, which must be a token's."""
        found: int | None = self.get(name, int, None)
        if found is not None and not 0 <= found < len(self.tokens):
            raise InputError(f"{self.file.path}: metadata {_PREFIX}{name} is {found}, of {len(self.tokens)} tokens")
        return found

    def merges(self) -> list[tuple[str, str]]:
        """Return the merges in their order, each two tokens whose joining is a token."""
        known = set(self.tokens)
        found = []
        for merge in self._array("merges", str):
            # The first space within separates; a token may begin with a space in an old file.
            place = merge.find(" ", 1)
            left, right = merge[:place], merge[place + 1 :]
            if place < 1 or not {left, right, left + right} <= known:
                raise InputError(f"{self.file.path}: {_PREFIX}merges holds {merge!r}, which is no merge of its tokens")
            found.append((left, right))
        return found

    def scores(self) -> list[float]:
        """Return the score of every token."""
        found: list[float] = self._array("scores", float, len(self.tokens))
        if not found:
            raise InputError(f"{self.file.path}: metadata {_PREFIX}scores is missing, from which its merges follow")
        return found

    def of_type(self, *kinds: int) -> dict[str, int]:
        """Return the tokens of these types with their ids."""
        return {token: i for i, token in enumerate(self.tokens) if self.types[i] in kinds}

    def _array(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        found = self._metadata.get(f"{_PREFIX}{name}", [])
        if not isinstance(found, list) or not all(isinstance(entry, kind) for entry in found):
            raise InputError(f"{self.file.path}: metadata {_PREFIX}{name} is not a list of {kind.__name__}")
        if found and length is not None and len(found) != length:
            raise InputError(f"{self.file.path}: {_PREFIX}{name} has {len(found)} entries for {length} tokens")
        return found


def gguf_tokenizer(file: GgufFile) -> TextTokenizer:
    """Return the tokenizer of a GGUF file, or refuse one of a kind or rule that is not known."""
    vocabulary = GgufVocabulary(file)
    model = vocabulary.get("model", str, None)
    if model == "gpt2":
        backend, adds_bos = _byte_level(vocabulary)
    elif model == "llama":
        backend, adds_bos = _sentencepiece(vocabulary), True
    else:
        raise InputError(f"{file.path}: metadata {_PREFIX}model is {model!r}; gpt2 and llama are understood")
    bos = vocabulary.token_id("bos_token_id")
    asked = vocabulary.get("add_bos_token", bool, None)
    reason = "this tokenizer adds none" if asked is None else "its metadata says so"
    if not (adds_bos if asked is None else asked):
        return TextTokenizer(backend, None, reason)
    if bos is None:
        raise InputError(f"{file.path}: its tokenizer begins a text with a token, and {_PREFIX}bos_token_id is missing")
    return TextTokenizer(backend, bos, "this tokenizer adds it" if asked is None else reason)


def _byte_level(vocabulary: GgufVocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.get("pre", str, None)
    rule = None if name is None else pre_tokenizer(name)
    if rule is None:
        what = "is missing" if name is None else f"is {name!r}, whose rule is not known"
        raise InputError(
            f"{vocabulary.file.path}: metadata {_PREFIX}pre {what}, so its texts cannot be split as its model's are; "
            f"known are {', '.join(NAMES)}"
        )
    if vocabulary.get("add_space_prefix", bool, False):
        raise InputError(f"{vocabulary.file.path}: metadata {_PREFIX}add_space_prefix is true, not understood for gpt2")
    backend = Tokenizer(
        BPE(
            vocab=vocabulary.of_type(_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE),
            merges=vocabulary.merges(),
            ignore_merges=rule.ignore_merges,
        )
    )
    if rule.normalizer is not None:
        backend.normalizer = rule.normalizer
    backend.pre_tokenizer = rule.cut
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(backend, vocabulary)
    return backend, rule.adds_bos


def _sentencepiece(vocabulary: GgufVocabulary) -> Tokenizer:
    if vocabulary.get("remove_extra_whitespaces", bool, False):
        raise InputError(
            f"{vocabulary.file.path}: metadata {_PREFIX}remove_extra_whitespaces is true, which is not understood"
        )
    known = vocabulary.of_type(_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    # A run of spaces that is a piece is stored as spaces; as a piece it is merged like others.
    tokens = {_SPACE * len(token) if _is_spaces(token) else token: index for token, index in known.items()}
    if len(tokens) != len(known):
        raise InputError(
            f"{vocabulary.file.path}: {_PREFIX}tokens has a run of spaces twice, as spaces and as {_SPACE}"
        )
    merges = vocabulary.merges() or _merges_of_pieces(vocabulary, tokens)
    unknown = vocabulary.token_id("unknown_token_id")
    backend = Tokenizer(
        BPE(
            vocab=tokens,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    restored: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        restored.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(restored)
    _add_whole_tokens(backend, vocabulary)
    return backend


def _merges_of_pieces(vocabulary: GgufVocabulary, tokens: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece makes of its pieces: the better piece first.

    Gemma's scores do not follow the order of its merges, the order of its pieces does; transformers says the same.
    """
    if vocabulary.file.architecture.startswith("gemma"):
        scores = {token: float(-index) for token, index in tokens.items()}
    else:
        stored = vocabulary.scores()
        scores = {token: stored[index] for token, index in tokens.items()}
    never_merged = vocabulary.of_type(_UNKNOWN, _CONTROL, _BYTE)
    merges: list[tuple[str, str]] = transformers.tokenization_utils_base.generate_merges(tokens, scores, never_merged)
    return merges


def _add_whole_tokens(backend: Tokenizer, vocabulary: GgufVocabulary) -> None:
    """Mark the tokens that a text is searched for before anything else, as llama.cpp marks them."""
    special = [AddedToken(token, normalized=False) for token in vocabulary.of_type(_CONTROL, _UNKNOWN)]
    backend.add_special_tokens(special)
    whole = [
        token for token in vocabulary.of_type(_USER_DEFINED) if not _is_spaces(token) or backend.token_to_id(token)
    ]
    backend.add_tokens([AddedToken(token, normalized=False) for token in whole])


def _is_spaces(token: str) -> bool:
    return bool(token) and not token.strip(" ")
