"""The JSON files: their schema, what made them, and the numbers."""

import json
import math
import platform
from importlib.metadata import version
from typing import Any, BinaryIO

import torch

from logitless.cli.comparison import Comparison, ModelFacts, Pair
from logitless.cli.measure import ReadingPlan
from logitless.cli.memory import MemoryUse
from logitless.cli.names import printable, told_apart
from logitless.cli.statistics import Columns, identity_summary, model_summary, pair_summary

SCHEMA_VERSION = 1


def comparison_results(comparison: Comparison) -> dict[str, Any]:
    """Return every number of a comparison; values in nats unless a name says otherwise."""
    plan = comparison.plan
    sizes = [text.scored_bytes for text in plan.texts]
    first = comparison.pairs[0]
    facts = [comparison.base, *(pair.candidate for pair in comparison.pairs)]
    base_label, *labels = told_apart(
        [_short_name(model, comparison.base) for model in facts], [printable(model.given) for model in facts]
    )
    return {
        "schema": {"name": "logitless.comparison", "version": SCHEMA_VERSION},
        "made_by": made_by(),
        "plan": plan_results(plan),
        "base": {
            "label": base_label,
            "model": model_results(comparison.base),
            "overall": model_summary(first.overall["nll_base"], first.overall["entropy_base"], sum(sizes)),
            "texts": [
                model_summary(columns["nll_base"], columns["entropy_base"], size)
                for columns, size in zip(first.per_text, sizes, strict=True)
            ],
        },
        "candidates": [
            {"label": label, **_pair_results(pair, plan, sizes)}
            for label, pair in zip(labels, comparison.pairs, strict=True)
        ],
        "left_out": [{"name": printable(one.label), "reason": printable(one.reason)} for one in comparison.refused],
    }


def plan_results(plan: ReadingPlan) -> dict[str, Any]:
    """Return how the texts were read, and what they were."""
    return {
        "unit": "nats",
        "arithmetic": "models and their heads' products in float32; log-sum-exp and every sum over classes in float64",
        "window_tokens": plan.window,
        "windows": plan.window_count,
        "scored": "every token of a text after its first, once; texts are not joined",
        "bos": plan.bos.description,
        "notes": [printable(note) for note in plan.notes],
        "texts": [
            {
                "name": printable(text.text.name),
                "sha256": text.text.digest,
                "bytes": len(text.text.content.encode()),
                "scored_tokens": text.scored_tokens,
                "scored_bytes": text.scored_bytes,
            }
            for text in plan.texts
        ],
    }


def model_results(model: ModelFacts) -> dict[str, Any]:
    """Return what identifies a model."""
    return {
        "name": printable(model.label),
        "sha256": model.digest,
        "rounding": model.rounding,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "head_rows": model.rows,
        "hidden_features": model.features,
        "dtype": "float32",
    }


def memory_results(memory: MemoryUse, logits_bytes: int) -> dict[str, Any]:
    """Return the memory figures in bytes, beside what the logits alone would have taken in float32."""
    return {
        "measured": "resident bytes; `measure_growth` is the peak while measuring less what was resident before it, "
        "free memory given back to the system first",
        "before_measure": memory.before,
        "measure_peak": memory.peak,
        "measure_growth": memory.growth,
        "process_peak": memory.process_peak,
        "logits_would_take": logits_bytes,
    }


def made_by() -> dict[str, Any]:
    """Return the versions and the platform that made a result."""
    return {
        "logitless": version("logitless"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def write_json(results: dict[str, Any], file: BinaryIO) -> None:
    """Write strict JSON: a number that is not finite becomes the string "inf", "-inf" or "nan"."""
    file.write((json.dumps(strict(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _short_name(model: ModelFacts, base: ModelFacts) -> str:
    """Return the rounding alone for a rounding of the base's own files, else the model's name."""
    rounded_base = model.digest == base.digest and model.rounding is not None and base.rounding is None
    return str(model.rounding) if rounded_base else printable(model.label)


def _pair_results(pair: Pair, plan: ReadingPlan, sizes: list[int]) -> dict[str, Any]:
    return {
        "model": model_results(pair.candidate),
        "compared_classes": pair.classes,
        "overall": _numbers(pair.overall, sum(sizes)),
        "texts": [
            _numbers({**columns, "cluster": columns["window"]}, size)
            for columns, size in zip(pair.per_text, sizes, strict=True)
        ],
        "worst_tokens": [
            {
                "text": printable(plan.texts[worst.text].text.name),
                "position": int(pair.per_text[worst.text]["position"][worst.row]),
                "token": plan.texts[worst.text].pieces[worst.row + 1],
                "base_top": worst.base_top,
                "candidate_top": worst.candidate_top,
                **{
                    name: float(pair.per_text[worst.text][name][worst.row])
                    for name in ("kl", "nll_base", "nll_candidate")
                },
            }
            for worst in pair.worst
        ],
        "memory": memory_results(pair.memory, pair.logits_bytes),
    }


def _numbers(columns: Columns, size: int) -> dict[str, Any]:
    return {
        "candidate": model_summary(columns["nll_candidate"], columns["entropy_candidate"], size),
        "pair": pair_summary(columns),
        "identity": identity_summary(columns),
    }


def strict(value: Any) -> Any:
    """Replace each number that is not finite, which JSON has no literal for, by its name in quotes."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
