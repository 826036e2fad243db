"""The page that shows the house: its paths are what real calls enter, its floors are the contract's, its links lead."""

from __future__ import annotations

import re
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as F
from logitless._bench import suite
from logitless.kernels import cpu

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ll.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RECORDS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
LINK = re.compile(r"\]\(([^)#]+)\)")
ROWS, CLASSES, WIDTH = 7, 65, 5


class Place(NamedTuple):
    """A function, and the file of the package that it is in."""

    file: str
    function: str


class Trace(NamedTuple):
    """The functions of the package that a call entered, and which of them entered which (by way of torch or not)."""

    entered: set[Place]
    calls: set[tuple[Place, Place]]

    @property
    def files(self) -> set[str]:
        return {place.file for place in self.entered}


def traced(call: Callable[[], Any]) -> tuple[Trace, Any]:
    """Return what a call enters, and what it returns."""
    inside, entered, calls = f"{PACKAGE}/", set[Place](), set[tuple[Place, Place]]()

    def place(frame: FrameType | None) -> Place | None:
        while frame is not None and not frame.f_code.co_filename.startswith(inside):
            frame = frame.f_back
        return frame and Place(frame.f_code.co_filename.removeprefix(inside), frame.f_code.co_qualname)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside):
            here, caller = place(frame), place(frame.f_back)
            assert here is not None
            entered.add(here)
            if caller is not None:
                calls.add((caller, here))

    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return Trace(entered, calls), result


def hops(trace: Trace, start: str, goal: str) -> int:
    """Return over how many files, at least, one gets from the first to the last by calls that were made."""
    far, queue = {start: 0}, deque([start])
    while queue:
        file = queue.popleft()
        for caller, called in trace.calls:
            if caller.file == file and called.file not in far:
                far[called.file] = far[file] + 1
                queue.append(called.file)
    return far[goal]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def lazy(width: int = WIDTH) -> ll.LazyLogits:
    return ll.linear(drawn(ROWS, width), drawn(CLASSES, width))


TARGET = torch.arange(ROWS) % CLASSES

# The listed calls, by the headings of the page; each gives what is differentiated.
LISTED: dict[str, Callable[[], Tensor]] = {
    "`F.cross_entropy`, dense, torch's own options": lambda: F.cross_entropy(drawn(ROWS, CLASSES), TARGET),
    "`F.cross_entropy`, dense, in general": lambda: F.cross_entropy(drawn(ROWS, CLASSES), TARGET, normalizer="rows"),
    "`F.cross_entropy`, lazy": lambda: F.cross_entropy(lazy(), TARGET),
    "`ll.kl`, dense": lambda: ll.kl(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES)),
    "`ll.kl`, lazy": lambda: ll.kl(lazy(), lazy(WIDTH + 1)),
    "`F.cosine_similarity`, dense": lambda: F.cosine_similarity(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES)),
}


def section(heading: str) -> str:
    assert PAGE.count(f"### {heading}\n") == 1
    return re.split(r"^##", PAGE.split(f"### {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row below the heading of the one table."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    yield from ([cell.strip().replace("`", "") for cell in row] for row in rows[2:])


@pytest.mark.parametrize("heading", LISTED)
def test_a_listed_path_is_what_the_call_takes(heading: str) -> None:
    call = LISTED[heading]
    call()  # what is made once is not part of the path
    forward, out = traced(call)
    backward, _ = traced(lambda: out.backward(torch.full_like(out, 0.75)))
    steps = list(table(section(heading)))
    assert [int(number) for number, *_ in steps] == list(range(len(steps)))
    assert len(steps) > 2
    for trace, column in ((forward, 2), (backward, 3)):
        listed = [Place(step[1], step[column]) for step in steps if step[column]]
        assert set(listed) <= trace.entered
        for before, after in pairwise(listed):
            assert any(caller.file == before.file and called == after for caller, called in trace.calls), after
    assert hops(forward, steps[0][1], steps[-1][1]) == len(steps) - 1
    asked = re.findall(r"`([\w/]+\.py)`", section(heading).split("Asked on the way:")[1])
    assert asked == sorted(asked)
    if torch.float32 not in cpu.PRODUCT_DTYPES and "kernels/cpu/products.py" in asked:
        asked.remove("kernels/cpu/products.py")  # torch multiplies here
    assert sorted([*asked, *(step[1] for step in steps)]) == sorted(forward.files | backward.files)


def probabilities() -> Tensor:
    return drawn(ROWS, CLASSES).softmax(1).detach()


# Every loss and measure of the table, dense and lazy where it is.
DEFINED: dict[str, dict[str, Callable[[], object]]] = {
    "F.cross_entropy": {
        "dense": lambda: F.cross_entropy(drawn(ROWS, CLASSES), TARGET),
        "lazy": lambda: F.cross_entropy(lazy(), TARGET),
    },
    "F.nll_loss": {"dense": lambda: F.nll_loss(drawn(ROWS, CLASSES), TARGET)},
    "F.linear_cross_entropy": {
        "lazy": lambda: F.linear_cross_entropy(drawn(ROWS, WIDTH), drawn(CLASSES, WIDTH), TARGET)
    },
    "F.kl_div": {"dense": lambda: F.kl_div(drawn(ROWS, CLASSES), probabilities(), reduction="sum")},
    "F.binary_cross_entropy": {"dense": lambda: F.binary_cross_entropy(probabilities(), probabilities())},
    "F.binary_cross_entropy_with_logits": {
        "dense": lambda: F.binary_cross_entropy_with_logits(drawn(ROWS, CLASSES), probabilities()),
        "lazy": lambda: F.binary_cross_entropy_with_logits(lazy(), probabilities()),
    },
    "F.cosine_similarity": {"dense": lambda: F.cosine_similarity(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES))},
    "F.cosine_embedding_loss": {
        "dense": lambda: F.cosine_embedding_loss(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES), TARGET % 2 * 2 - 1)
    },
    "ll.token_stats": {
        "dense": lambda: ll.token_stats(drawn(ROWS, CLASSES), TARGET),
        "lazy": lambda: ll.token_stats(lazy(), TARGET),
    },
    "ll.log_probs": {
        "dense": lambda: ll.log_probs(drawn(ROWS, CLASSES), TARGET),
        "lazy": lambda: ll.log_probs(lazy(), TARGET),
    },
    "ll.pair_stats": {
        "dense": lambda: ll.pair_stats(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES)),
        "lazy": lambda: ll.pair_stats(lazy(), lazy()),
    },
    "ll.entropy": {"dense": lambda: ll.entropy(drawn(ROWS, CLASSES)), "lazy": lambda: ll.entropy(lazy())},
    "ll.kl": {
        "dense": lambda: ll.kl(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES)),
        "lazy": lambda: ll.kl(lazy(), lazy()),
    },
    "ll.js": {
        "dense": lambda: ll.js(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES)),
        "lazy": lambda: ll.js(lazy(), lazy()),
    },
    "ll.tv": {
        "dense": lambda: ll.tv(drawn(ROWS, CLASSES), drawn(ROWS, CLASSES)),
        "lazy": lambda: ll.tv(lazy(), lazy()),
    },
}
ARITHMETIC = list(table(PAGE.split("## From a name to its arithmetic")[1].split("\n\n### ")[0]))


def test_every_loss_and_measure_is_in_the_table() -> None:
    measures = ("token_stats", "log_probs", "pair_stats", "entropy", "kl", "js", "tv")
    assert all(hasattr(ll, name) for name in measures)
    public = [f"F.{name}" for name in F.__all__] + [f"ll.{name}" for name in measures]
    assert sorted(row[0] for row in ARITHMETIC) == sorted(public) == sorted(DEFINED)


@pytest.mark.parametrize("row", ARITHMETIC, ids=[row[0] for row in ARITHMETIC])
def test_a_definition_is_as_many_hops_away_as_the_table_says(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    name, file, definition, far = row
    goal = Place(*definition.split())
    told = {}
    for kind, call in DEFINED[name].items():
        trace, _ = traced(call)
        assert Place(file, name.split(".")[1]) in trace.entered
        assert goal in trace.entered
        told[kind] = hops(trace, file, goal.file)
        assert told[kind] <= 2  # and three from the file that only names
    assert far == ", ".join(str(number) if kind == "dense" else f"lazy {number}" for kind, number in told.items())


def floors() -> list[set[str]]:
    """Return the floors of the contract, from the top."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (layers,) = (each["layers"] for each in tools["importlinter"]["contracts"] if each["type"] == "layers")
    return [set(re.split(r"\s*\|\s*", layer)) for layer in layers]


def test_the_rooms_are_those_of_the_contract_in_its_order() -> None:
    rooms = re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)
    assert (rooms.pop(0), rooms.pop()) == ("benchmarks", "csrc")
    for floor in floors():
        assert {rooms.pop(0) for _ in floor} == floor
    assert not rooms


def test_the_picture_shows_the_floors_of_the_contract() -> None:
    picture = re.findall(r"^```mermaid\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    names = dict(re.findall(r'(\w+)\["<b>(\w+)</b>', picture))
    below: dict[str, set[str]] = {}
    for line in picture.splitlines():
        if "-->" not in line:
            continue
        chain = [[names[node] for node in part.split("&")] for part in line.replace(" ", "").split("-->")]
        for upper, lower in pairwise(chain):
            for room in upper:
                below.setdefault(room, set()).update(lower)
    expected = [{"benchmarks"}, *floors(), {"csrc"}]
    for upper, lower in pairwise(expected):
        assert all(below[room] == lower for room in upper)
    assert set(names.values()) == set().union(*expected)


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|toml|md))`", PAGE))
    assert len(named) > 40
    for path in named:
        assert any((base / path).is_file() for base in (PACKAGE, ROOT)), path
    folders = set(re.findall(r"`(?:csrc/)?(\w+)/`", section("`csrc`") + section("From there into C++")))
    assert folders == {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}


PARTS = ["Context", "Decision", "Consequence", "Measure it again"]


@pytest.mark.parametrize("record", RECORDS, ids=[record.stem for record in RECORDS])
def test_a_decision_has_its_parts_on_less_than_a_page(record: Path) -> None:
    text = record.read_text(encoding="utf-8")
    number = int(record.name[:4])
    assert RECORDS[number - 1] == record
    assert re.match(rf"# {number}\. \S", text)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == PARTS
    assert all(part.strip() for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:])
    assert len(text.splitlines()) < 60
    title = text.splitlines()[0].removeprefix(f"# {number}. ")
    assert f"{number}. [{title}](decisions/{record.name})" in PAGE
    assert f"decisions/{record.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_what_decisions_say_to_run_is_there() -> None:
    cases = [case.name for case in suite.cases(quick=False)]
    for record in RECORDS:
        text = record.read_text(encoding="utf-8")
        for path, function in re.findall(r"((?:tests|benchmarks)/[\w/]+\.py)((?:::\w+)?)", text):
            assert f"def {function.removeprefix('::')}" in (ROOT / path).read_text(encoding="utf-8"), (record, path)
        for pattern in re.findall(r"bench --only '?([^'\n]+)", text):
            for part in pattern.split("|"):
                assert any(re.search(part, name) for name in cases), (record, part)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "docs" / "architecture.md", *RECORDS):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), link
