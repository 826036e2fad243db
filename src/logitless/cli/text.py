"""Texts, their tokens, and the windows in which a model reads them.

A text is cut into disjoint windows of `window` tokens. The tokens of a window predict themselves shifted by one, and
the last of them predicts the first of the next window, so that every token after the first of a text is scored exactly
once. Texts are never joined.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitless.cli.errors import InputError


@dataclass(frozen=True)
class Text:
    """A text and the name to report it under."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the text's UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Window:
    """Tokens a model reads at once; `targets[i]`, at `start + i` in the text, follows `inputs[i]`."""

    index: int
    start: int
    inputs: list[int]
    targets: list[int]


@dataclass(frozen=True)
class TokenisedText:
    """A text's tokens, up to the last one scored, and the piece of the text that each stands for."""

    text: Text
    ids: list[int]
    pieces: list[str]

    @property
    def scored_tokens(self) -> int:
        """How many tokens are predicted: all but the first."""
        return len(self.ids) - 1

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of the pieces that are predicted."""
        return sum(len(piece.encode()) for piece in self.pieces[1:])

    def windows(self, size: int) -> Iterator[Window]:
        """Cut the tokens into windows of `size` inputs; the last may be shorter."""
        for index, start in enumerate(range(0, self.scored_tokens, size)):
            stop = min(start + size, self.scored_tokens)
            yield Window(index, start + 1, self.ids[start:stop], self.ids[start + 1 : stop + 1])


def read_texts(paths: list[Path]) -> list[Text]:
    """Read UTF-8 files whole; refuse one that is missing, not text, or empty."""
    texts = []
    for path in paths:
        try:
            content = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error
        except OSError as error:
            raise InputError(f"cannot read text {path}: {error.strerror}") from error
        if not content.strip():
            raise InputError(f"text {path} is empty")
        texts.append(Text(str(path), content))
    return texts


def tokenise(tokenizer: Any, text: Text, max_tokens: int | None) -> TokenisedText:
    """Tokenise a text without special tokens, keeping what is needed to score `max_tokens` of its tokens."""
    encoded = tokenizer(text.content, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    if len(ids) < 2:
        raise InputError(f"text {text.name} has {len(ids)} token; two are needed, since the first is not predicted")
    pieces = split_pieces(text.content, encoded["offset_mapping"])
    keep = len(ids) if max_tokens is None else max_tokens + 1
    return TokenisedText(text, ids[:keep], pieces[:keep])


def split_pieces(content: str, offsets: list[tuple[int, int]]) -> list[str]:
    """Split a text into one piece for each token, so that the pieces joined are the text again.

    A character that several tokens share (bytes of an emoji) goes to the token that completes it, and what no token
    covers (a space that the tokenizer strips) to the token after it, or to the last.
    """
    starts = [start for start, _ in offsets[1:]] + [len(content)]
    ends = [min(end, following) for (_, end), following in zip(offsets, starts, strict=True)]
    ends[-1] = len(content)
    pieces, position = [], 0
    for end in ends:
        end = max(end, position)
        pieces.append(content[position:end])
        position = end
    return pieces


@dataclass(frozen=True)
class BosRule:
    """The beginning-of-text token that precedes every window, or none; it is context and is never scored."""

    token: int | None
    description: str

    def prefix(self, window: Window) -> list[int]:
        """Return the tokens to put before a window; a text that starts with the token itself gets no second one."""
        if self.token is None or (window.index == 0 and window.inputs[0] == self.token):
            return []
        return [self.token]


def bos_rule(tokenizer: Any) -> BosRule:
    """Follow the tokenizer: if it starts a text with its beginning-of-text token, every window starts with it."""
    with_special: list[int] = list(tokenizer("a")["input_ids"])
    plain: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and with_special[:1] == [bos] and plain[:1] != [bos]:
        return BosRule(bos, f"{tokenizer.bos_token} before every window, not scored (this tokenizer adds it)")
    return BosRule(None, "none (this tokenizer adds none)")
