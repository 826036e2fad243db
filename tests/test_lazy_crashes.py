"""Lines of user code on lazy logits, each in a process of its own: one that crashes or hangs fails alone."""

from collections.abc import Iterator

import pytest

from forked import ForkServer
from lazy_cases import CASES


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    made = ForkServer("lazy_cases")
    yield made
    made.close()


@pytest.mark.parametrize("name", CASES)
def test_lazy_logits_do_what_the_tensor_does_or_raise(name: str, server: ForkServer) -> None:
    wrong = server.run(name)
    assert not wrong, wrong
