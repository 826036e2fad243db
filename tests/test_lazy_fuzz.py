"""Every function of torch on lazy logits and log-probabilities: as the tensor, or an error; as docs/lazy.md says."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lazy_table
from lazy_fuzz import functions

SHARDS = 12


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    """Import torch and its samples once; children are forked of it."""
    path = Path(__file__).with_name("lazy_fuzz.py")
    made = subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with made:
        yield made
        assert made.stdin is not None
        made.stdin.close()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_function_gives_what_the_tensor_gives_or_raises(shard: int, server: "subprocess.Popen[str]") -> None:
    names = functions()[shard::SHARDS]
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(names) + "\n")
    server.stdin.flush()
    results: dict[str, Any] = json.loads(server.stdout.readline())
    problems = [problem for found in results.values() for problem in found["problems"]]
    assert not problems, "\n".join(problems)
    page = {key: entry for key, entry in lazy_table.read().items() if key[1] in results}
    found = {key: entry for name in names for key, entry in lazy_table.entries(name, results[name]).items()}
    # The page is also the floor: a function that is called no longer is missing here.
    differing = {
        key: (page.get(key), found.get(key)) for key in page.keys() | found.keys() if page.get(key) != found.get(key)
    }
    assert not differing, f"docs/lazy.md says otherwise (python tests/lazy_table.py writes it anew): {differing}"


def test_the_page_names_functions_that_exist() -> None:
    known = set(functions())
    table = lazy_table.read()
    assert {name for _, name in table} <= known
    assert {kind for kind, _ in table} == set(lazy_table.KINDS)
    assert {outcome for outcome, _ in table.values()} == set(lazy_table.OUTCOMES)
