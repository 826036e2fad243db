"""Texts, their tokens, and the windows in which a model reads them.

A text is cut into disjoint windows of `window` tokens. The tokens of a window predict themselves shifted by one, and
the last of them predicts the first of the next window, so that every token after the first of a text is scored exactly
once. Texts are never joined.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logitless.cli.errors import InputError
from logitless.cli.tokenizer import TextTokenizer

_BYTE_ORDER_MARK = "\ufeff"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# A text is tokenised from its beginning, in a part that grows, until the tokens asked for no longer depend on the end
# of the part: longer by half they are still the same, and this many tokens follow them.
_CHARACTERS_A_TOKEN = 8
_TOKENS_AFTER = 64


@dataclass(frozen=True)
class Text:
    """A text and the name to report it under."""

    name: str
    content: str
    notes: tuple[str, ...] = ()

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
    notes: tuple[str, ...] = ()

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
    """Read UTF-8 files whole, without a byte order mark; refuse one that is missing, not text, or empty."""
    return [_read_text(path) for path in paths]


def _read_text(path: Path) -> Text:
    try:
        stored = path.read_bytes()
        content = stored.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8" if stored[:2] in _UTF_16 else ""
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded{hint}") from error
    except OSError as error:
        raise InputError(f"cannot read text {path}: {error.strerror}") from error
    notes: tuple[str, ...] = ()
    if content.startswith(_BYTE_ORDER_MARK):
        content = content.removeprefix(_BYTE_ORDER_MARK)
        notes = (f"{path}: the byte order mark it begins with is no text and is left out",)
    if not content.strip():
        raise InputError(f"text {path} is empty")
    return Text(str(path), content, notes)


def tokenise(tokenizer: TextTokenizer, text: Text, max_tokens: int | None) -> TokenisedText:
    """Tokenise a text without special tokens, keeping what is needed to score `max_tokens` of its tokens."""
    content, ids, offsets = _leading_tokens(tokenizer, text.content, None if max_tokens is None else max_tokens + 1)
    if len(ids) < 2:
        raise InputError(f"text {text.name} has {len(ids)} token; two are needed, since the first is not predicted")
    pieces = split_pieces(content, offsets)
    keep = len(ids) if max_tokens is None else max_tokens + 1
    ids = ids[:keep]
    return TokenisedText(text, ids, pieces[:keep], (*text.notes, *_special_tokens(tokenizer, text.name, ids)))


def _leading_tokens(
    tokenizer: TextTokenizer, content: str, count: int | None
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Return a leading part of the text whose first `count` tokens are those of the whole, with all of its tokens."""
    end = len(content) if count is None else _CHARACTERS_A_TOKEN * (count + _TOKENS_AFTER)
    while count is not None and end < len(content):
        part = tokenizer.encoded(content[:end])
        longer = tokenizer.encoded(content[: end + end // 2])
        if len(part.ids) >= count + _TOKENS_AFTER and part.ids[:count] == longer.ids[:count]:
            return content[:end], part.ids, part.offsets
        end *= 2
    whole = tokenizer.encoded(content)
    return content, whole.ids, whole.offsets


def _special_tokens(tokenizer: TextTokenizer, name: str, ids: list[int]) -> list[str]:
    """Say which special tokens the text spells, since they are read as such and not as text."""
    counts = Counter(token for token in ids if token in tokenizer.special)
    return [
        f"{name} spells the special token {tokenizer.special[token]!r} {count} time{'s' if count > 1 else ''}: "
        "it is read as that token, as this model's tokenizer does"
        for token, count in sorted(counts.items())
    ]


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


def bos_rule(tokenizer: TextTokenizer) -> BosRule:
    """Follow the tokenizer: if it starts a text with its beginning-of-text token, every window starts with it."""
    if tokenizer.bos is None:
        return BosRule(None, f"none ({tokenizer.bos_reason})")
    name = tokenizer.token(tokenizer.bos)
    return BosRule(tokenizer.bos, f"{name} before every window, not scored ({tokenizer.bos_reason})")
