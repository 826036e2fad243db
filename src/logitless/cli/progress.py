"""Progress on stderr: bars on a terminal, one line for each finished step elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from logitless.cli.names import printable

Item = TypeVar("Item")


class Steps:
    """Tells whoever waits which step is running, how far it is and how long it took."""

    def __init__(self) -> None:
        """Write to the stderr of this moment."""
        # The stream is fixed here, since stderr is redirected while a model loads (see `models.quiet`).
        self._console = Console(file=sys.stderr, markup=False, emoji=False)

    def note(self, message: str) -> None:
        """Print one line that stays."""
        self._console.print(printable(message), highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show `label` as running for as long as the block lasts."""
        with self._bar(label, None):
            yield

    def track(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        """Yield `items`, moving a bar of `total` steps on after each."""
        with self._bar(label, total) as progress:
            for item in items:
                yield item
                progress.advance(progress.task_ids[0])

    @contextmanager
    def _bar(self, label: str, total: int | None) -> Iterator[Progress]:
        columns = [
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
        ]
        if total is not None:
            columns.append(MofNCompleteColumn())
        started = time.perf_counter()
        progress = Progress(
            *columns,
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with progress:
            task = progress.add_task(printable(label), total=total)
            yield progress
            progress.update(task, total=total or 1, completed=total or 1)
        if not self._console.is_terminal:
            self.note(f"{label}: {time.perf_counter() - started:.1f} s")
