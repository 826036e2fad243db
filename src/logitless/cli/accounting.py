"""Whether all of a file reached the model and all of the model came from the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitless.cli.errors import InputError


def refuse_differences(path: Path, report: Mapping[str, Any], stored: Mapping[str, str] | None = None) -> None:
    """Refuse a model that misses weights, holds some it has no use for, or whose weights have other shapes.

    `report` is transformers' own of a load; `stored` tells what a file calls a parameter.
    """
    names = stored or {}
    for entry in sorted(report["mismatched_keys"], key=str):
        key, found, expected = entry
        raise InputError(
            f"{path}: {names.get(key, key)} has shape {tuple(found)} where its configuration asks for {tuple(expected)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{path} has no language head, or misses weights of one: nothing in it for {missing[0]}{_more(missing)}"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        raise InputError(
            f"{path} holds {names.get(unexpected[0], unexpected[0])}{_more(unexpected)}, which the model that its "
            "configuration describes has no place for"
        )


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""
