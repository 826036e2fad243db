"""A lazy head inside DDP, FSDP1, FSDP2, accelerate: gradients are the dense head's, in one process and in two."""

import pytest

import lazy_wrappers


@pytest.mark.parametrize("world", [1, 2])
def test_a_wrapped_lazy_head_is_the_dense_head(world: int) -> None:
    wrong = lazy_wrappers.run(world)
    assert not wrong, "\n\n".join(f"{name} in {world} processes:\n{text}" for name, text in wrong.items())
