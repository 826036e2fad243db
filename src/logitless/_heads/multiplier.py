"""Who multiplies a head: the backend or torch, whichever was faster when both were timed on this machine.

Neither is everywhere: torch's library is the faster one on some makers' processors and half as fast on others. So where
a backend says that torch's product may be faster (`MEASURED_PRODUCTS`) both are timed when a head is first used, for
some hundredths of a second, on the three products of a small tile, torch's on tiles of either order; once for each
dtype and each power of two of the depth, the one size that all ways to read one head's logits have in common. The times
are kept in a file of the user's cache, by processor, instruction set and versions, so that other processes multiply in
the same way. The backend's product promises bits that no call's shape changes (`products`), so torch's must be faster
by a tenth to be taken.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from logitless.kernels.interface import Backend
from logitless.kernels.products import multiplying

# Torch's product is taken where its time is less than this share of the backend's.
_MARGIN = 0.9
_ROUNDS = 6
_TILE_ROWS = 256
_FACTOR_NUMBERS = 1 << 18  # of the weight that is multiplied: 1 MB of float32
_LEAST_CLASSES, _MOST_CLASSES = 64, 8192


class Times(NamedTuple):
    """The seconds that a small tile's three products took: torch's of a tile [classes, rows], and [rows, classes]."""

    backend: float
    by_class: float
    by_row: float

    @property
    def torch(self) -> float:
        """Torch's, of the order that suits it."""
        return min(self.by_class, self.by_row)

    @property
    def torch_is_faster(self) -> bool:
        """Whether torch's are worth what they do not promise."""
        return self.torch < _MARGIN * self.backend


_known: dict[tuple[str, torch.dtype, int], Times] = {}


def multiplier(backend: Backend, dtype: torch.dtype, depth: int) -> Backend:
    """Return the backend, or where torch's product of this dtype and depth is faster the same with torch's products.

    Its tiles then lie in the order in which these are the faster ones.
    """
    if dtype not in backend.MEASURED_PRODUCTS or depth == 0:
        return backend
    times = _times(backend, dtype, depth)
    if times.torch_is_faster:
        return multiplying(backend, backend.PRODUCT_DTYPES - {dtype}, times.by_class <= times.by_row)
    return backend


def who_multiplies(backend: Backend, dtype: torch.dtype, depth: int) -> str:
    """Return who does, and why, in words."""
    if dtype not in backend.PRODUCT_DTYPES:
        return f"torch multiplies: the kernel's product of {dtype} does not serve, or is known to be slower here"
    if not backend.PRODUCT_BITS_STAND:
        return f"torch multiplies: {backend.product_facts()}"
    if dtype not in backend.MEASURED_PRODUCTS or depth == 0:
        return f"the kernel multiplies {dtype}"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "torch multiplies: its float32_matmul_precision allows less than float32"
    times = _times(backend, dtype, depth)
    ratio = times.torch / times.backend
    who = "torch" if times.torch_is_faster else "the kernel"
    order = ", on tiles of whole rows" if times.torch_is_faster and times.by_row < times.by_class else ""
    return f"{who} multiplies: timed here, torch took {ratio:.2f} times as long as the kernel{order}"


def _times(backend: Backend, dtype: torch.dtype, depth: int) -> Times:
    """Return what is known of a depth's power of two; timed, and written down, where nothing is."""
    power = 1 << max(0, depth - 1).bit_length()
    key = backend.NAME, dtype, power
    times = _known.get(key)
    if times is None:
        named = f"{backend.NAME} {str(dtype).removeprefix('torch.')} {power}"
        file = _file(backend)
        written = _read(file)
        if named in written:
            times = Times(*written[named])
        else:
            times = _timed(backend, dtype, power)
            _write(file, {**_read(file), named: list(times)})  # read again: another process may have written meanwhile
        _known[key] = times
    return times


def _timed(backend: Backend, dtype: torch.dtype, depth: int) -> Times:
    """Return the best times of a tile's logits, and of the gradients of its hidden states and weight, taken in turn.

    On one thread of its own, for the time that it computes itself: there no mode of the caller counts or traces what
    is no part of the call, and what else the processors do falls into no sample.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_timed_alone, backend, dtype, depth).result()
    finally:
        torch.set_num_threads(threads)


def _timed_alone(backend: Backend, dtype: torch.dtype, depth: int) -> Times:
    torch.set_num_threads(1)
    classes = max(_LEAST_CLASSES, min(_MOST_CLASSES, _FACTOR_NUMBERS // depth))
    hidden, weight = torch.ones(_TILE_ROWS, depth, dtype=dtype), torch.ones(classes, depth, dtype=dtype)
    tile, to_hidden, to_weight = weight @ hidden.T, torch.zeros_like(hidden), torch.zeros_like(weight)

    def ours() -> None:
        backend.product(weight, hidden.T, tile)
        backend.product(weight.T, tile, to_hidden.T, accumulate=True)
        backend.product(tile, hidden, to_weight, accumulate=True)

    def by_class() -> None:
        torch.mm(weight, hidden.T, out=tile)
        to_hidden.T.addmm_(weight.T, tile)
        to_weight.addmm_(tile, hidden)

    def by_row() -> None:
        logits = tile.view(_TILE_ROWS, classes)
        torch.mm(hidden, weight.T, out=logits)
        to_hidden.addmm_(logits, weight)
        to_weight.T.addmm_(hidden.T, logits)

    rounds = [tuple(_seconds(each, tile) for each in (ours, by_class, by_row)) for _ in range(_ROUNDS)]
    return Times(*(min(spent) for spent in zip(*rounds, strict=True)))


def _seconds(products: Callable[[], None], tile: Tensor) -> float:
    tile.fill_(1.0)
    start = time.thread_time()
    products()
    return time.thread_time() - start


def _file(backend: Backend) -> Path:
    """Return where the times of this machine and these versions are kept."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_by = processor(), f"torch {torch.__version__}", backend.product_facts()
    name = "-".join("".join(c if c.isalnum() or c == "." else "_" for c in part) for part in made_by)
    return caches / "logitless" / "products" / f"{name}.json"


def processor() -> str:
    """Return the name that the system has for this machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, list[float]]:
    """Return the times of a file that may be missing, unreadable or of another form: they are taken again then."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): list(map(float, Times(*times))) for name, times in written.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, times: dict[str, list[float]]) -> None:
    """Write the file at once, or not at all where the place cannot be written to: this process knows them anyway."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as made:
            try:
                json.dump(times, made)
                made.close()
                os.replace(made.name, file)
            except BaseException:
                os.unlink(made.name)
                raise
    except OSError:
        return
