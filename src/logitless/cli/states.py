"""The hidden states of every window of the texts, kept until a candidate's are compared with them."""

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

from logitless.cli.errors import InputError

_KEPT_IN_MEMORY = 1 << 30  # bytes of a model's states; more of them wait in a file


class States:
    """States appended window by window and read back as often as needed, in memory or in an unnamed file.

    The file is in the folder for temporary files (`TMPDIR`) and has no name there, so a process that is killed leaves
    nothing of it.
    """

    def __init__(self, rows: int) -> None:
        """Expect `rows` states in all."""
        self._rows = rows
        self._windows: list[Tensor] = []
        self._sizes: list[int] = []
        self._features = 0
        self._file: IO[bytes] | None = None

    def append(self, states: Tensor) -> None:
        """Keep the states of the next window, (tokens, features) in float32."""
        if not self._sizes:
            self._features = states.shape[1]
            if 4 * self._rows * self._features > _KEPT_IN_MEMORY:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed when the object goes)
                weakref.finalize(self, self._file.close)
        self._sizes.append(len(states))
        if self._file is None:
            self._windows.append(states)
            return
        try:
            content = memoryview(states.float().numpy().tobytes())
            while content:  # a disk that fills takes a part, and refuses the next
                content = content[self._file.write(content) :]
        except OSError as error:
            raise InputError(
                f"the hidden states of {self._rows} tokens take {4 * self._rows * self._features:,} bytes in "
                f"{tempfile.gettempdir()}, which has no room for them ({error.strerror}): point TMPDIR to another "
                "folder, or lower --max-tokens"
            ) from error

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the states of each window."""
        start = 0
        for index, size in enumerate(self._sizes):
            yield self._windows[index] if self._file is None else self._read(start, size)
            start += size

    def rows(self, places: Sequence[int]) -> Tensor:
        """Return the states at these places of all windows joined, (places, features)."""
        starts = np.cumsum([0, *self._sizes])
        found = []
        for place in places:
            window = int(np.searchsorted(starts, place, side="right")) - 1
            if self._file is None:
                found.append(self._windows[window][place - starts[window]])
            else:
                found.append(self._read(place, 1)[0])
        return torch.stack(found)

    def _read(self, start: int, count: int) -> Tensor:
        assert self._file is not None
        self._file.seek(4 * start * self._features)
        content = bytearray(4 * count * self._features)
        self._file.readinto(content)  # type: ignore[attr-defined]
        return torch.frombuffer(content, dtype=torch.float32).view(count, self._features)
