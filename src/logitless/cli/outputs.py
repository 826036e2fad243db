"""Output files that are either complete or absent, found unwritable before the long work starts."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitless.cli.errors import InputError


def check_distinct(*paths: Path | None) -> None:
    """Refuse two outputs that would overwrite one another."""
    given = [path.resolve() for path in paths if path is not None]
    if len(set(given)) < len(given):
        raise InputError(f"two outputs are the same file: {given[0]}")


@contextmanager
def staged(path: Path | None) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it if the block succeeds and vanishes if it does not.

    Without a path the block still gets a file to write to, which is then dropped.
    """
    folder = path.parent if path is not None else Path(tempfile.gettempdir())
    if path is not None and path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    if path is not None and path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"cannot write {path}: permission denied")
    try:
        handle, name = tempfile.mkstemp(prefix=".logitless-", dir=folder)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if path is not None:
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private; the user's own rule decides
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
