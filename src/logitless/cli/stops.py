"""Signals that end a run become an exception, so that what was begun is cleaned up and the signal is still told."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C; `timeout`, `kill` and batch systems; a terminal that closes.
_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal asked the run to end; not an `Exception`, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number, with which the process is to end."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def stops_raised() -> Iterator[None]:
    """Raise `Stopped` where the block is when the first signal arrives; ignore those that follow while it ends.

    A signal that is ignored already, as `nohup` does with the hang-up, stays ignored.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in _STOPS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by(stopped: Stopped) -> None:
    """Say which signal it was, and end the process by that signal, so that shells and `timeout` see why it ended."""
    sys.stderr.write(f"logitless: {stopped}\n")
    sys.stderr.flush()
    end_by_signal(stopped.number)


def end_by_signal(number: int) -> None:
    """End this process by a signal's default action, or with the status that a shell reports for it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # the first process of a container is not ended by its own signal
