"""Negatives from other ranks: 1 to 4 gloo processes against one on the joined batch, and what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contrastive_ranks
import logitless as ll
from logitless._heads import square


def test_ranks_are_one_process_on_the_joined_batch() -> None:
    wrong = contrastive_ranks.run(4, 3, 2, 1)
    assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())


class Held(TorchDispatchMode):
    """The most bytes that tensors made meanwhile take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: each for key, each in self._live.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return out


@pytest.fixture
def pretended() -> Iterator[Any]:
    """Process groups of any size in which this process is all ranks: what it sends is what it receives."""

    def start(world: int) -> dist.ProcessGroup:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def _echo(monkeypatch: pytest.MonkeyPatch) -> None:
    def echoed(operations: list[Any]) -> list[Any]:
        sent = {each.tag: each.tensor for each in operations if each.op is dist.isend}
        for each in operations:
            if each.op is dist.irecv:
                each.tensor.copy_(sent[each.tag])
        return []

    monkeypatch.setattr(dist, "batch_isend_irecv", echoed)


def _most(group: Any, exchange: Any, rows: int, features: int, monkeypatch: pytest.MonkeyPatch) -> int:
    _echo(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(rows, features, generator=generator).requires_grad_() for _ in range(2))
    with Held() as held:
        for loss in (
            ll.clip_loss(image, text, 0.1, group=group, exchange=exchange),
            ll.siglip_loss(image, text, 0.1, group=group, exchange=exchange),
            ll.info_nce(image, text, scale=2.0, directions=contrastive_ranks.FOUR, group=group, exchange=exchange),
        ):
            loss.backward()
    return held.most


def test_a_ring_holds_as_much_whatever_the_number_of_ranks(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, features = 64, 64
    block = rows * features * 4
    most = {world: _most(pretended(world), "ring", rows, features, monkeypatch) for world in (3, 4, 24)}
    # The numbers of rows of each rank are a few bytes more.
    assert max(most.values()) - min(most.values()) <= 64 * 24 < block / 8
    gathered = {world: _most(pretended(world), "gather", rows, features, monkeypatch) for world in (4, 16)}
    # Of each further rank: the vectors that travel and the gradients that go home, in float32.
    assert gathered[16] - gathered[4] >= 12 * 2 * block
    assert gathered[16] > max(most.values())


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_both_directions_take_four_products_of_own_rows_with_everybodys(
    pretended: Any, exchange: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a tile forward, and in the backward pass the tile again and its gradient to both sides."""
    rows, features, world = 64, 16, 5
    done: list[int] = []

    def counted(products: Any, left: Tensor, right: Tensor, out: Tensor, **options: Any) -> Any:
        done.append(left.shape[0] * left.shape[1] * right.shape[1])
        return multiply(products, left, right, out, **options)

    multiply = square.multiply
    monkeypatch.setattr(square, "multiply", counted)
    _echo(monkeypatch)
    group = pretended(world)
    image, text = (torch.randn(rows, features).requires_grad_() for _ in range(2))
    for loss in (ll.clip_loss, ll.siglip_loss):
        done.clear()
        loss(image, text, 0.1, group=group, exchange=exchange).backward()  # type: ignore[operator]
        assert sum(done) == 4 * rows * (world * rows) * features
