"""Compare candidates with a base on the same tokens: load, read, measure, and keep the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import logitless as ll
from logitless.cli.errors import InputError
from logitless.cli.measure import ReadingPlan, all_texts, make_plan, pair_rows, read_hidden
from logitless.cli.memory import MemoryMeter, MemoryUse
from logitless.cli.models import (
    Head,
    LanguageModel,
    ModelName,
    ModelSource,
    check_model,
    load_model,
    open_model,
    rounded_copy,
)
from logitless.cli.progress import Steps
from logitless.cli.states import States
from logitless.cli.statistics import Columns
from logitless.cli.text import Text
from logitless.cli.token_names import token_name

_WORST_TOKENS = 12
_CONTEXT_TOKENS = 30


@dataclass(frozen=True)
class ModelFacts:
    """What to say of a model once it is no longer in memory."""

    label: str
    given: str
    digest: str
    rounding: str | None
    architecture: str
    parameters: int
    rows: int
    features: int


@dataclass(frozen=True)
class WorstToken:
    """A token where the two models differ most, and what each would have said there."""

    text: int
    row: int
    base_top: str
    candidate_top: str


@dataclass(frozen=True)
class Pair:
    """A candidate's rows against the base: one set of columns for each text, and all of them joined."""

    candidate: ModelFacts
    classes: int
    per_text: list[Columns]
    overall: Columns
    worst: list[WorstToken]
    memory: MemoryUse
    logits_bytes: int


@dataclass(frozen=True)
class Refused:
    """A candidate that turned out unfit after others had been measured, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A base, its candidates, and the plan by which all of them read the texts."""

    base: ModelFacts
    plan: ReadingPlan
    pairs: list[Pair]
    refused: list[Refused]
    token_names: dict[int, str]  # of the tokens that are only part of a character


def compare_models(
    base_name: ModelName,
    candidate_names: Sequence[ModelName],
    texts: list[Text],
    window: int,
    max_tokens: int | None,
    steps: Steps,
) -> Comparison:
    """Measure each candidate against the base, which reads the texts once, its states kept until the last is measured.

    Candidates are loaded one after another, so that at most two models are in memory; one that is a rounding of the
    base is made from it there. Once no rounding is to follow, the base's own weights go, all but its head's.
    """
    sources = _sources([base_name, *candidate_names])
    plan = make_plan(list(sources.values()), texts, window, max_tokens)
    steps.note(
        f"{plan.scored_tokens} tokens to score in {plan.window_count} windows of {window}; "
        f"beginning-of-text token: {plan.bos.description}"
    )
    for note in plan.notes:
        steps.note(note)
    with steps.step(f"loading {base_name.label}"):
        base = load_model(base_name, sources[base_name])
    check_model(base, plan.sample)
    facts, hidden = facts_of(base), read_hidden(base, plan, steps)
    pairs, refused = list[Pair](), list[Refused]()
    for index, name in enumerate(candidate_names):
        try:
            # In a function of its own, so that a candidate's memory is free before the next one loads.
            pairs.append(_pair(name, sources[name], base, base_name, hidden, plan, steps))
        except InputError as error:
            if len(candidate_names) == 1:
                raise
            refused.append(Refused(name.label, str(error)))
            steps.note(f"{name.label} is left out: {error}")
        if not any(_has_files_of(base_name, later) for later in candidate_names[index + 1 :]):
            base = replace(base, network=None)
    if not pairs:
        raise InputError("no candidate could be measured: " + "; ".join(one.reason for one in refused))
    return Comparison(facts, plan, pairs, refused, _partial_tokens(base, plan))


def _sources(names: Sequence[ModelName]) -> dict[ModelName, ModelSource]:
    """Look through the files of all models, each once however it is rounded; the base stays first."""
    found: dict[Path, ModelSource] = {}
    for name in names:
        path = name.path.resolve()
        if path not in found:
            found[path] = open_model(name)
    return {name: replace(found[name.path.resolve()], name=name) for name in names}


def facts_of(model: LanguageModel) -> ModelFacts:
    """Return what results say of a model."""
    rounding = "" if model.name.rounding is None else f":{model.name.rounding}"
    return ModelFacts(
        label=model.name.label,
        given=f"{model.name.path}{rounding}",
        digest=model.digest,
        rounding=model.name.rounding,
        architecture=type(model.network).__name__,
        parameters=model.parameters,
        rows=model.head.rows,
        features=model.head.weight.shape[1],
    )


def _pair(
    name: ModelName,
    source: ModelSource,
    base: LanguageModel,
    base_name: ModelName,
    base_hidden: States,
    plan: ReadingPlan,
    steps: Steps,
) -> Pair:
    candidate = _candidate(name, source, base, base_name, steps)
    heads = base.head.trimmed(plan.classes), candidate.head.trimmed(plan.classes)
    check_model(candidate, plan.sample)
    facts, hidden = facts_of(candidate), read_hidden(candidate, plan, steps)
    return _measure(base, facts, heads, (base_hidden, hidden), plan, steps)


def _has_files_of(base_name: ModelName, name: ModelName) -> bool:
    return name.path.resolve() == base_name.path.resolve()


def _candidate(
    name: ModelName, source: ModelSource, base: LanguageModel, base_name: ModelName, steps: Steps
) -> LanguageModel:
    if _has_files_of(base_name, name):
        if name.rounding == base_name.rounding:
            return base
        if base_name.rounding is None and name.rounding is not None:
            with steps.step(f"rounding the weights to {name.rounding}"):
                return rounded_copy(base, name.rounding)
    with steps.step(f"loading {name.label}"):
        return load_model(name, source)


def _partial_tokens(base: LanguageModel, plan: ReadingPlan) -> dict[int, str]:
    """Name the tokens of the texts whose own piece of text is empty: a later token completes their character."""
    found = {
        token for text in plan.texts for token, piece in zip(text.ids[1:], text.pieces[1:], strict=True) if piece == ""
    }
    return {token: token_name(base.tokenizer, token) for token in sorted(found)}


def _measure(
    base: LanguageModel,
    candidate: ModelFacts,
    heads: tuple[Head, Head],
    hidden: tuple[States, States],
    plan: ReadingPlan,
    steps: Steps,
) -> Pair:
    with MemoryMeter() as meter:
        per_text = pair_rows(heads, hidden, plan, f"comparing with {candidate.label}", steps)
        memory = meter.use()
    overall = all_texts(per_text)
    _refuse_nan(overall, base.name.label, candidate.label)
    return Pair(
        candidate=candidate,
        classes=heads[0].rows,
        per_text=per_text,
        overall=overall,
        worst=_worst(heads, hidden, plan, overall, base),
        memory=memory,
        logits_bytes=4 * plan.scored_tokens * (heads[0].rows + heads[1].rows),
    )


def _refuse_nan(columns: Columns, base: str, candidate: str) -> None:
    for name in ("nll_base", "nll_candidate", "kl"):
        bad = np.isnan(columns[name])
        if bad.any():
            raise InputError(
                f"{name} of {candidate} against {base} is NaN at {int(bad.sum())} tokens: "
                "the model's states are not finite"
            )


def _worst(
    heads: tuple[Head, Head],
    hidden: tuple[States, States],
    plan: ReadingPlan,
    overall: Columns,
    base: LanguageModel,
) -> list[WorstToken]:
    """Pick the tokens of largest KL, no two within one another's context, and ask both models for their own choice."""
    starts = np.cumsum([0] + [text.scored_tokens for text in plan.texts])
    picked: list[tuple[int, int]] = []
    for place in np.argsort(-overall["kl"], kind="stable"):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        row = int(place - starts[number])
        if all(number != other or abs(row - taken) > _CONTEXT_TOKENS for other, taken in picked):
            picked.append((number, row))
        if len(picked) == _WORST_TOKENS:
            break
    places = [int(starts[number]) + row for number, row in picked]
    tops = []
    for head, states in zip(heads, hidden, strict=True):
        with torch.no_grad():
            stats = ll.token_stats(head.logits(states.rows(places)), torch.zeros(len(places), dtype=torch.long))
        tops.append([token_name(base.tokenizer, token) for token in stats.argmax.tolist()])
    return [WorstToken(*place, *choices) for place, choices in zip(picked, zip(*tops, strict=True), strict=True)]
