"""How much memory a stretch of work took, as the operating system counts it."""

import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from logitless._bench.memory import give_back

_STATM = Path("/proc/self/statm")
_INTERVAL_SECONDS = 0.005


@dataclass(frozen=True)
class MemoryUse:
    """Resident bytes: before a stretch of work, at its peak, and at the peak of the whole process so far."""

    before: int | None
    peak: int | None
    process_peak: int

    @property
    def growth(self) -> int | None:
        """What the stretch itself took: its peak less what was resident when it began."""
        return None if self.before is None or self.peak is None else self.peak - self.before


class MemoryMeter:
    """Samples the resident size every 5 ms while work runs (Linux); elsewhere knows the process's peak only."""

    def __init__(self) -> None:
        """Make a meter; it starts when entered."""
        self._stop = threading.Event()
        self._before: int | None = None
        self._peak: int | None = None
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemoryMeter":
        """Give back what is free, which work could take again unseen; note what is resident then, and sample."""
        give_back()
        self._before = self._peak = _resident()
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def use(self) -> MemoryUse:
        """Return the figures up to now."""
        self._note(_resident())
        scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
        return MemoryUse(self._before, self._peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._note(_resident())

    def _note(self, now: int | None) -> None:
        if now is not None and self._peak is not None:
            self._peak = max(self._peak, now)


def _resident() -> int | None:
    if not _STATM.exists():
        return None
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
