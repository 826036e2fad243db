"""Standard output and error that outlive their readers: a closed pipe or a full disk does not end a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Stream:
    """A text stream whose first failure is kept, and which drops what is written to it afterwards."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream; characters that its encoding lacks are written as escapes."""
        self._stream = stream
        self.failure: OSError | None = None
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, or drop the text if the stream has failed."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream has failed."""
        self._attempt(self._stream.flush)

    def fail(self, error: OSError) -> None:
        """Note a failure; what the stream still buffers goes nowhere, or Python would try it again as it exits."""
        if self.failure is not None:
            return
        self.failure = error
        with suppress(OSError):  # a stream of a test has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _attempt(self, act: Any) -> None:
        if self.failure is None:
            try:
                act()
            except OSError as error:
                self.fail(error)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[tuple[Stream, Stream]]:
    """Put streams that last in the place of stdout and stderr for as long as the block runs, and yield both."""
    before = sys.stdout, sys.stderr
    output, errors = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output, errors
        output.flush()
        errors.flush()
    finally:
        sys.stdout, sys.stderr = before
