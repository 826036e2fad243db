"""Rows of the other ranks of a process group, on their way: in a ring, one rank's at a time, or all at once.

What a rank carries is read by the others. What is grown is added to by each of them, and comes home: log-sums of
columns, or gradients. Each rank sends and receives tensors at their own sizes, so ranks may have different numbers of
rows, or none. In a ring a rank holds its own rows and those of two others at a time, whatever the number of ranks;
gathered, it holds those of all others. Everything is in one order, so results are the same to the bit each time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Literal["ring", "gather"]


EXCHANGES = ("gather", "ring")


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks of a group. `rows[kind][rank]` counts a rank's rows of a kind, by parts."""

    name: str
    group: dist.ProcessGroup
    rank: int
    world: int
    exchange: Exchange
    rows: tuple[tuple[tuple[int, ...], ...], ...]

    def layout(self, *ranks: int) -> Layout:
        """Return how the rows of these ranks lie together."""
        return Layout(self.rows, ranks)

    def total(self, kind: int) -> int:
        """Return how many rows of a kind all ranks have."""
        return sum(sum(parts) for parts in self.rows[kind])


def peers_of(
    name: str,
    group: dist.ProcessGroup,
    exchange: str,
    rows: Sequence[tuple[int, ...]],
    agreed: Mapping[str, object],
    said: Sequence[bool],
    device: torch.device,
) -> tuple[Peers, list[bool]]:
    """Return the ranks of a group by what each has, and which of the things `said` any of them says.

    Raises on every rank where what must be agreed upon differs.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name}: group must be a torch.distributed.ProcessGroup (torch.distributed.group.WORLD once the processes "
            f"have met), or None for this process alone; got {type(group).__name__}"
        )
    if exchange not in EXCHANGES:
        raise ValueError(f"{name}: exchange must be 'gather' or 'ring', got {exchange!r}")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{name}: group must be one that this process is in; it is not")
    agreed = {**agreed, "exchange": exchange}
    sizes = [count for parts in rows for count in parts]
    numbers = [*sizes, *(zlib.crc32(repr(value).encode()) for value in agreed.values()), *map(int, said)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(gathered, mine, group=group)
    everybody = [each.tolist() for each in gathered]
    for place, (what, value) in enumerate(agreed.items(), len(sizes)):
        other = next((who for who in range(world) if everybody[who][place] != numbers[place]), None)
        if other is not None:
            raise ValueError(
                f"{name}: {what} must be the same on every rank of the group; it is {value} on rank {rank}, and "
                f"another on rank {other}"
            )
    found, start = [], 0
    for parts in rows:
        found.append(tuple(tuple(each[start : start + len(parts)]) for each in everybody))
        start += len(parts)
    anybody = [any(each[len(numbers) - len(said) + place] for each in everybody) for place in range(len(said))]
    return Peers(name, group, rank, world, exchange, tuple(found)), anybody  # type: ignore[arg-type] # checked above


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of some ranks lie in a tensor of them all: part after part, and in each rank after rank."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    ranks: tuple[int, ...]

    def count(self, kind: int) -> int:
        """Return how many rows of a kind there are."""
        return sum(sum(self.rows[kind][rank]) for rank in self.ranks)

    def first_part(self, kind: int) -> int:
        """Return how many rows the first parts have."""
        return sum(self.rows[kind][rank][0] for rank in self.ranks)

    def places(self, kind: int, of: int) -> list[slice]:
        """Return where each part of a rank's rows is."""
        found, start = [], 0
        for part in range(len(self.rows[kind][of])):
            for rank in self.ranks:
                stop = start + self.rows[kind][rank][part]
                if rank == of:
                    found.append(slice(start, stop))
                start = stop
        return found


class Load(NamedTuple):
    """A tensor of one row for each of a kind, which travels."""

    tensor: Tensor
    kind: int


class Growth(NamedTuple):
    """What a tensor that is added to on its way starts from, where it has been nowhere."""

    kind: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: float

    def of(self, layout: Layout, device: torch.device) -> Tensor:
        """Return it for so many rows."""
        return torch.full((layout.count(self.kind), *self.shape), self.start, dtype=self.dtype, device=device)


Visit = Callable[[Layout, list[Tensor], list[Tensor]], None]
Merge = Callable[[list[Tensor]], None]


def exchange(
    peers: Peers, carried: Sequence[Load], grown: Sequence[Growth], device: torch.device, visit: Visit, merge: Merge
) -> None:
    """Call `visit` with the others' rows and what grows of them; and `merge` with what others grew of one's own."""
    if peers.world == 1:
        return
    (_in_a_ring if peers.exchange == "ring" else _gathered)(peers, carried, grown, device, visit, merge)


def _in_a_ring(
    peers: Peers, carried: Sequence[Load], grown: Sequence[Growth], device: torch.device, visit: Visit, merge: Merge
) -> None:
    after, before = (peers.rank + 1) % peers.world, (peers.rank - 1) % peers.world
    held = [load.tensor.detach().contiguous() for load in carried]
    growing: list[Tensor] = []
    for step in range(1, peers.world):
        layout = peers.layout((peers.rank - step) % peers.world)
        coming = [x.new_empty(layout.count(load.kind), *x.shape[1:]) for x, load in zip(held, carried, strict=True)]
        fresh = [growth.of(layout, device) for growth in grown]
        _transfer(peers, after, [*held, *growing], before, [*coming, *(fresh if step > 1 else [])])
        held, growing = coming, fresh
        visit(layout, held, growing)
    if grown:
        layout = peers.layout(peers.rank)
        home = [growth.of(layout, device) for growth in grown]
        _transfer(peers, after, growing, before, home)
        merge(home)


def _gathered(
    peers: Peers, carried: Sequence[Load], grown: Sequence[Growth], device: torch.device, visit: Visit, merge: Merge
) -> None:
    steps = range(1, peers.world)
    layout, own = peers.layout(*((peers.rank - step) % peers.world for step in steps)), peers.layout(peers.rank)
    sent = [load.tensor.detach().contiguous() for load in carried]
    kinds = [load.kind for load in carried]
    joined = [x.new_empty(layout.count(kind), *x.shape[1:]) for x, kind in zip(sent, kinds, strict=True)]
    outgoing = _parts(sent, kinds, own, peers.rank)
    for step in steps:
        before = (peers.rank - step) % peers.world
        _transfer(peers, (peers.rank + step) % peers.world, outgoing, before, _parts(joined, kinds, layout, before))
    growing = [growth.of(layout, device) for growth in grown]
    visit(layout, joined, growing)
    del joined
    kinds = [growth.kind for growth in grown]
    for step in steps if grown else ():
        after, before = (peers.rank + step) % peers.world, (peers.rank - step) % peers.world
        home = [growth.of(own, device) for growth in grown]
        arriving = _parts(home, kinds, own, peers.rank)
        _transfer(peers, after, _parts(growing, kinds, layout, after), before, arriving)
        merge(home)


def _parts(tensors: Sequence[Tensor], kinds: Sequence[int], layout: Layout, rank: int) -> list[Tensor]:
    return [x[place] for x, kind in zip(tensors, kinds, strict=True) for place in layout.places(kind, rank)]


def _transfer(peers: Peers, after: int, outgoing: Sequence[Tensor], before: int, incoming: Sequence[Tensor]) -> None:
    """Send these tensors to one rank and receive those from another, all at once; what is empty is not sent."""
    operations = [
        dist.P2POp(call, tensor, group=peers.group, group_peer=peer, tag=tag)
        for call, peer, tensors in ((dist.isend, after, outgoing), (dist.irecv, before, incoming))
        for tag, tensor in enumerate(tensors)
        if tensor.numel()
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
