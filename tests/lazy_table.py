"""The page docs/lazy.md: what each function of torch does with lazy logits, as `lazy_fuzz.py` finds it.

`python tests/lazy_table.py` calls every function and writes the page anew; the tests hold the page to what they find.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from lazy_fuzz import KINDS, OUTCOMES, SPACES

PAGE = Path(__file__).parent.parent / "docs" / "lazy.md"
START = "<!-- Written by tests/lazy_table.py from here on. -->"
TITLES = {
    "lazy": "Stays lazy",
    "efficient": "Has an efficient form",
    "computes": "Computes all logits, and warns",
    "raises": "Raises",
}
# What a function gives, and whether other arguments gave less.
Entry = tuple[str, bool]
Table = dict[tuple[str, str], Entry]


def is_public(name: str) -> bool:
    """Tell whether users call the function by this name; operators count."""
    space, _, short = name.rpartition(".")
    return not short.startswith("_") or (space == "torch.Tensor" and short.startswith("__"))


def entries(name: str, found: dict[str, Any]) -> Table:
    """Give a function's line in the table, of each kind of lazy tensor that it was called with."""
    table: Table = {}
    for kind in KINDS:
        outcomes = [outcome for outcome in OUTCOMES if outcome in found[kind]]
        if outcomes and is_public(name):
            table[kind, name] = (outcomes[0], len(outcomes) > 1)
    return table


def render(table: Table) -> str:
    """Write the table as the page holds it."""
    lines = [START]
    for outcome in OUTCOMES:
        lines += ["", f"## {TITLES[outcome]}"]
        for kind in KINDS:
            lines += ["", f"### {TITLES[outcome]}: lazy {kind}"]
            for space in SPACES:
                names = sorted(
                    f"`{name.rpartition('.')[2]}`" + ("\\*" if less else "")
                    for (of, name), (best, less) in table.items()
                    if of == kind and best == outcome and name.rpartition(".")[0] == space
                )
                if names:
                    lines += ["", f"`{space}`: " + ", ".join(names)]
    return "\n".join(lines) + "\n"


def read() -> Table:
    """Read the table from the page."""
    table: Table = {}
    outcome = kind = ""
    for line in PAGE.read_text().partition(START)[2].splitlines():
        if line.startswith("### "):
            title, _, kind = line[4:].partition(": lazy ")
            outcome = {v: k for k, v in TITLES.items()}[title]
        elif line.startswith("`torch"):
            space, names = line.split(": ", 1)
            for name, star in re.findall(r"`(\w+)`(\\\*)?", names):
                table[kind, f"{space.strip('`')}.{name}"] = (outcome, bool(star))
    return table


def write(table: Table) -> None:
    """Put the table in its place on the page."""
    PAGE.write_text(PAGE.read_text().partition(START)[0] + render(table))


if __name__ == "__main__":
    import lazy_fuzz

    lazy_fuzz.warm_up()
    results = lazy_fuzz.serve(lazy_fuzz.functions())
    write({key: entry for name, found in results.items() for key, entry in entries(name, found).items()})
    for found in results.values():
        sys.stdout.writelines(problem + "\n" for problem in found["problems"])
