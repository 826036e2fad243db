"""Who multiplies a head is timed once, written down, told, and the same for all that is read of the head."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
import logitless.functional as LF
from logitless._heads import multiplier, tiles
from logitless._heads.multiplier import Times
from logitless.kernels import cpu, reference
from product_choice import pin_kernel, pin_torch

KERNEL, TORCH, TORCH_BY_ROW = Times(1.0, 2.0, 3.0), Times(2.0, 1.0, 1.5), Times(2.0, 1.5, 1.0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(multiplier, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def times(monkeypatch: pytest.MonkeyPatch, found: Times) -> list[tuple[torch.dtype, int]]:
    """Have products take these times; give what was timed."""
    asked: list[tuple[torch.dtype, int]] = []

    def timed(backend: object, dtype: torch.dtype, depth: int) -> Times:
        asked.append((dtype, depth))
        return found

    monkeypatch.setattr(multiplier, "_timed", timed)
    return asked


def head(dtype: torch.dtype = torch.float32, depth: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, depth, generator=draw).to(dtype).requires_grad_() for n in (37, 3000))
    return hidden, weight, torch.randint(3000, (37,), generator=draw)


def loss_and_gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    loss = LF.cross_entropy(ll.linear(hidden, weight), target, reduction="none")
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(4))
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream.to(loss.dtype))]


@pytest.mark.parametrize("found", [KERNEL, TORCH], ids=["kernel", "torch"])
def test_the_faster_one_multiplies(found: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = head()
    times(monkeypatch, found)
    measured = loss_and_gradients(*parts)
    (pin_kernel if found is KERNEL else pin_torch)(monkeypatch)
    for value, pinned in zip(measured, loss_and_gradients(*parts), strict=True):
        assert torch.equal(value, pinned)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tiles_lie_in_the_order_that_suits_who_multiplies(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = head()
    orders = []
    make = tiles.HeadTiles.logits

    def seen(self: tiles.HeadTiles, *stretch: int) -> tiles.Tile:
        made = make(self, *stretch)
        orders.append(made.class_dim)
        return made

    monkeypatch.setattr(tiles.HeadTiles, "logits", seen)
    results = []
    for found, class_dim in ((KERNEL, 0), (TORCH, 0), (TORCH_BY_ROW, 1)):
        monkeypatch.setattr(multiplier, "_known", {})
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
        times(monkeypatch, found)
        orders.clear()
        loss = LF.cross_entropy(ll.linear(hidden, weight), target, label_smoothing=smoothing)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight), torch.tensor(1.7))))
        assert set(orders) == {class_dim}
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_torch_must_be_faster_by_more_than_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, Times(1.0, 0.95, 0.95))
    assert multiplier.multiplier(cpu, torch.float32, 64) is cpu
    monkeypatch.setattr(multiplier, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    times(monkeypatch, Times(1.0, 0.85, 0.95))
    assert torch.float32 not in multiplier.multiplier(cpu, torch.float32, 64).PRODUCT_DTYPES


@pytest.mark.parametrize("found", [KERNEL, TORCH], ids=["kernel", "torch"])
def test_all_that_is_read_of_a_head_is_one_product(found: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, found)
    hidden, weight, target = head()
    z = ll.linear(hidden.detach(), weight.detach())
    dense = z.materialize()
    assert torch.equal(z.gather(-1, target[:, None]), dense.gather(-1, target[:, None]))
    assert torch.equal(z.argmax(-1), dense.argmax(-1))
    assert torch.equal((dense > z.gather(-1, target[:, None])).sum(-1), ll.token_stats(z, target).rank)


def test_a_depth_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, KERNEL)
    for depth in (33, 40, 64):
        loss_and_gradients(*head(depth=depth))
    assert asked == [(torch.float32, 64)]
    multiplier._known.clear()  # another process: it reads the file
    loss_and_gradients(*head())
    assert asked == [(torch.float32, 64)]
    loss_and_gradients(*head(depth=65))
    assert asked == [(torch.float32, 64), (torch.float32, 128)]


@pytest.mark.parametrize(
    "broken", ["", "[]", "{", '{"cpu float32 64": 3}', '{"cpu float32 64": [1, "x", 2]}', '{"cpu float32 64": [1, 2]}']
)
def test_a_broken_file_is_written_again(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, TORCH)
    file = multiplier._file(cpu)
    file.parent.mkdir(parents=True)
    file.write_text(broken)
    multiplier.multiplier(cpu, torch.float32, 40)
    assert asked == [(torch.float32, 64)]
    assert json.loads(file.read_text()) == {"cpu float32 64": [2.0, 1.0, 1.5]}
    assert [made.name for made in file.parent.iterdir()] == [file.name]


def test_without_a_place_to_write_to_the_process_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, TORCH)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    for _ in range(2):
        assert multiplier.multiplier(cpu, torch.float32, 40) is not cpu
    assert asked == [(torch.float32, 64)]


def test_what_is_pinned_or_promised_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, TORCH)
    assert multiplier.multiplier(cpu, torch.bfloat16, 40) is cpu
    assert multiplier.multiplier(cpu, torch.float16, 40) is cpu
    assert multiplier.multiplier(cpu, torch.float32, 0) is cpu
    assert multiplier.multiplier(reference, torch.float32, 40) is reference
    pin_kernel(monkeypatch)
    assert multiplier.multiplier(cpu, torch.float32, 40) is cpu
    assert asked == []


def test_the_times_are_of_both_and_change_nothing() -> None:
    """On two threads, under a mode that sees every operation of its thread."""

    class Seen(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def] # torch's
            self.calls += 1
            return function(*args, **(kwargs or {}))

    torch.set_num_threads(2)
    with Seen() as seen:
        found = multiplier._timed(cpu, torch.float32, 64)
    assert seen.calls == 0
    assert min(found) > 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("found", [KERNEL, TORCH, TORCH_BY_ROW], ids=["kernel", "torch", "torch by row"])
def test_explain_says_which_and_why(found: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, found)
    hidden, weight, target = head()

    def said() -> str | None:
        return ll.explain(LF.cross_entropy, ll.linear(hidden, weight), target).products

    who = "the kernel multiplies: timed here, torch took 2.00 times as long as the kernel"
    if found is not KERNEL:
        who = "torch multiplies: timed here, torch took 0.50 times as long as the kernel"
    if found is TORCH_BY_ROW:
        who += ", on tiles of whole rows"
    assert said() == who
    torch.set_float32_matmul_precision("high")
    try:
        assert said() == "torch multiplies: its float32_matmul_precision allows less than float32"
    finally:
        torch.set_float32_matmul_precision("highest")
    pin_kernel(monkeypatch)
    assert said() == "the kernel multiplies torch.float32"
    pin_torch(monkeypatch)
    assert str(said()).startswith("torch multiplies: the kernel's product of torch.float32 does not serve")
    assert ll.explain(LF.cross_entropy, torch.zeros(2, 3), torch.tensor([0, 1])).products is None


def test_processes_find_each_others_times(tmp_path: Path) -> None:
    """As a user runs it: the first process times and writes, the second does not time."""
    script = """
import torch, logitless as ll, logitless.functional as F
from logitless._heads import multiplier, tiles
real, timed = multiplier._timed, []
multiplier._timed = lambda *asked: timed.append(asked) or real(*asked)
print(ll.explain(F.cross_entropy, ll.linear(torch.randn(9, 50), torch.randn(70, 50)), torch.arange(9)).products)
print(len(timed))
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("LOGITLESS_PRODUCT", None)
    said = [
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (run.stdout.splitlines() for run in said)
    assert (first[1], second[1]) == ("1", "0")
    assert first[0] == second[0]
