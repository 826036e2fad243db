"""Git LFS pointers: the few lines that stand for a file that was not fetched."""

from pathlib import Path

from logitless.cli.errors import InputError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a file that is a pointer to the real one; leave every other problem to whoever reads the file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if start == _POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file it stands for; fetch it with: git lfs pull")
