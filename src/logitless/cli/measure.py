"""Per-token rows: what `logitless` itself says of each scored token, as numpy columns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import logitless as ll
from logitless.cli.errors import InputError
from logitless.cli.models import Head, LanguageModel, ModelSource
from logitless.cli.progress import Steps
from logitless.cli.states import States
from logitless.cli.statistics import Columns
from logitless.cli.text import BosRule, Text, TokenisedText, Window, bos_rule, tokenise
from logitless.cli.vocabulary import shared_vocabulary


@dataclass(frozen=True)
class ReadingPlan:
    """The texts as tokens, the size of the windows, what precedes each, and over which classes all is measured."""

    texts: list[TokenisedText]
    window: int
    bos: BosRule
    classes: int
    notes: tuple[str, ...]  # of texts and vocabularies, to be said before anything is read

    def windows(self) -> Iterator[tuple[int, Window]]:
        """Yield each window with the number of its text."""
        for number, text in enumerate(self.texts):
            for window in text.windows(self.window):
                yield number, window

    @property
    def window_count(self) -> int:
        """The number of windows of all texts."""
        return sum(-(-text.scored_tokens // self.window) for text in self.texts)

    @property
    def scored_tokens(self) -> int:
        """The number of tokens scored in all texts."""
        return sum(text.scored_tokens for text in self.texts)

    @property
    def sample(self) -> list[int]:
        """Tokens to check a model with: the first window."""
        return next(self.texts[0].windows(self.window)).inputs


def make_plan(sources: Sequence[ModelSource], texts: list[Text], window: int, max_tokens: int | None) -> ReadingPlan:
    """Tokenise the texts with the first model's tokenizer, and refuse what any of the models has no room for.

    Every refusal that needs no weights falls here, before a model loads: tokens that differ, windows that are too long.
    """
    base = sources[0]
    tokenised = [tokenise(base.tokenizer, text, max_tokens) for text in texts]
    bos = bos_rule(base.tokenizer)
    for source in sources:
        _check_fits(source, tokenised, window, 0 if bos.token is None else 1)
    vocabulary = shared_vocabulary(sources, tokenised)
    notes = (note for text in tokenised for note in text.notes)
    return ReadingPlan(tokenised, window, bos, vocabulary.classes, (*notes, *vocabulary.notes))


def _check_fits(source: ModelSource, texts: Sequence[TokenisedText], window: int, before: int) -> None:
    """Refuse windows longer than a model reads, with what goes before each."""
    needed = before + min(window, max(text.scored_tokens for text in texts))
    if source.context is not None and needed > source.context:
        raise InputError(f"{source.name.label} reads {source.context} tokens at most, not {needed}: lower --window")


def read_hidden(model: LanguageModel, plan: ReadingPlan, steps: Steps) -> States:
    """Return, for each window, the state that predicts each of its targets."""
    label = f"reading with {model.name.label}"
    states = States(plan.scored_tokens)
    for _, window in steps.track(plan.windows(), label, plan.window_count):
        prefix = plan.bos.prefix(window)
        states.append(model.hidden(prefix + window.inputs)[len(prefix) :])
    return states


def score_rows(head: Head, hidden: Iterable[Tensor], plan: ReadingPlan, label: str, steps: Steps) -> list[Columns]:
    """Return the columns of one model for each text: token, window, position, nll, lse, entropy and rank."""
    parts: list[list[Columns]] = [[] for _ in plan.texts]
    for (number, window), states in steps.track(zip(plan.windows(), hidden, strict=True), label, plan.window_count):
        with torch.no_grad():
            stats = ll.token_stats(head.logits(states), torch.tensor(window.targets))
        measured = {"nll": stats.nll, "lse": stats.lse, "entropy": stats.entropy, "rank": stats.rank}
        parts[number].append({**_places(window), **_arrays(measured)})
    return [_joined(part) for part in parts]


def pair_rows(
    heads: tuple[Head, Head],
    hidden: tuple[Iterable[Tensor], Iterable[Tensor]],
    plan: ReadingPlan,
    label: str,
    steps: Steps,
) -> list[Columns]:
    """Return, for each text, what `ll.pair_stats` says of base (p) and candidate (q), and the states' cosine."""
    parts: list[list[Columns]] = [[] for _ in plan.texts]
    rows = zip(plan.windows(), *hidden, strict=True)
    for (number, window), base, candidate in steps.track(rows, label, plan.window_count):
        with torch.no_grad():
            stats = ll.pair_stats(heads[0].logits(base), heads[1].logits(candidate), torch.tensor(window.targets))
            measured: dict[str, Tensor | None] = {
                "kl": stats.kl,
                "reverse_kl": stats.reverse_kl,
                "js": stats.js,
                "cross_entropy": stats.cross_entropy,
                "entropy_base": stats.entropy_p,
                "entropy_candidate": stats.entropy_q,
                "same_top": stats.same_top,
                "nll_base": stats.nll_p,
                "nll_candidate": stats.nll_q,
            }
            if base.shape == candidate.shape:
                measured["cosine"] = ll.functional.cosine_similarity(base, candidate, dim=-1)
        parts[number].append({**_places(window), **_arrays(measured)})
    return [_joined(part) for part in parts]


def all_texts(per_text: Sequence[Columns]) -> Columns:
    """Join the columns of several texts, numbering their windows apart as `cluster`."""
    joined = _joined(per_text)
    sizes = [len(columns["token"]) for columns in per_text]
    text_number = np.repeat(np.arange(len(per_text)), sizes)
    _, joined["cluster"] = np.unique(np.stack([text_number, joined["window"]]), axis=1, return_inverse=True)
    return joined


def _places(window: Window) -> Columns:
    count = len(window.targets)
    return {
        "token": np.array(window.targets),
        "window": np.full(count, window.index),
        "position": np.arange(window.start, window.start + count),
    }


def _arrays(measured: Mapping[str, Tensor | None]) -> Columns:
    arrays: Columns = {}
    for name, values in measured.items():
        assert values is not None, name  # a target is always given, so no field is left out
        arrays[name] = values.double().numpy() if values.is_floating_point() else values.numpy()
    return arrays


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
