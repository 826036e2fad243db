"""Which classes models are compared over, decided from their tokenizers and texts before any of them reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from logitless.cli.errors import InputError
from logitless.cli.models import ModelSource
from logitless.cli.text import TokenisedText, bos_rule, tokenise


@dataclass(frozen=True)
class SharedVocabulary:
    """The number of leading classes that every model measures over, and what to say of the rest."""

    classes: int
    notes: tuple[str, ...]


def shared_vocabulary(sources: Sequence[ModelSource], texts: Sequence[TokenisedText]) -> SharedVocabulary:
    """Return the classes that all models have, or refuse models whose tokens differ.

    `texts` are those of the first model, and every other must split them into the same tokens. A token that no text
    can become (a row kept for later, padding) is no difference. Nor is one that only some models have, where these
    texts do not use it: beyond the classes that all have it is left out.
    """
    base, *candidates = sources
    classes = min(source.classes for source in sources)
    notes = [note for source in _each_once(sources) for note in _trimming(source, classes)]
    for candidate in candidates:
        notes += _refuse_other_tokens(base, candidate, classes)
        _refuse_other_splits(base, candidate, texts)
    for text in texts:
        highest = max(text.ids)
        if highest >= classes:
            short = next(source for source in sources if source.classes == classes)
            raise InputError(
                f"{text.text.name} has token {highest} ({base.tokenizer.tokens.get(highest, '')!r}), "
                f"which is beyond the {classes} classes of {short.name.label}"
            )
    return SharedVocabulary(classes, tuple(notes))


def _each_once(sources: Sequence[ModelSource]) -> list[ModelSource]:
    by_path = {source.name.path.resolve(): source for source in reversed(sources)}
    return list(by_path.values())[::-1]


def _trimming(source: ModelSource, classes: int) -> list[str]:
    """Say what of a model's head is left out."""
    said = []
    if source.rows > source.classes:
        said.append(
            f"{source.name.label}: the last {source.rows - source.classes} of {source.rows} rows of its head belong to "
            "no token of its tokenizer and are left out"
        )
    if source.classes > classes:
        said.append(
            f"{source.name.label}: measured over the first {classes} of its {source.classes} classes, which all models "
            "have; the texts use no other, and its probabilities are divided by what these classes have together"
        )
    return said


def _refuse_other_tokens(base: ModelSource, candidate: ModelSource, classes: int) -> list[str]:
    """Refuse a class that is one token here and another there, unless both are special and so only differ in name."""
    ours, theirs = base.tokenizer.tokens, candidate.tokenizer.tokens
    differing = [i for i in sorted(ours.keys() & theirs.keys()) if i < classes and ours[i] != theirs[i]]
    renamed = [i for i in differing if i in base.tokenizer.special and i in candidate.tokenizer.special]
    names = f"{base.name.label} and {candidate.name.label}"
    others = [i for i in differing if i not in renamed]
    if others:
        first = others[0]
        raise InputError(
            f"{names} have different vocabularies ({len(ours)} and {len(theirs)} tokens; {len(others)} differ, "
            f"{ours[first]!r} and {theirs[first]!r} for one), so their predictions cannot be compared token by token"
        )
    if not renamed:
        return []
    first = renamed[0]
    return [
        f"{names} name {len(renamed)} special tokens differently ({ours[first]!r} and {theirs[first]!r} for one); "
        "the texts use none of them"
    ]


def _refuse_other_splits(base: ModelSource, candidate: ModelSource, texts: Sequence[TokenisedText]) -> None:
    names = f"{base.name.label} and {candidate.name.label}"
    if bos_rule(candidate.tokenizer).token != bos_rule(base.tokenizer).token:
        raise InputError(f"the tokenizers of {names} differ in whether a text begins with a special token")
    if candidate.tokenizer is base.tokenizer:
        return
    for text in texts:
        ids = tokenise(candidate.tokenizer, text.text, text.scored_tokens).ids
        if ids != text.ids:
            place = next((i for i, (a, b) in enumerate(zip(text.ids, ids, strict=False)) if a != b), len(ids))
            raise InputError(
                f"the tokenizers of {names} split {text.text.name} differently, first at token {place} "
                f"({base.tokenizer.decode(text.ids[place : place + 1])!r} and "
                f"{candidate.tokenizer.decode(ids[place : place + 1])!r})"
            )
