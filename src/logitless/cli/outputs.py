"""Where results go: files that are complete or absent, streams that are written to, and never one of the inputs.

A regular file is written beside its place, under a name `.logitless-*.tmp`, and then takes it in one step: whoever
looks sees the old content or the new. A process that is killed outright leaves that file and the old content. Devices,
FIFOs and `-` (standard output) are written to as they are.
"""

import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TextIO, cast

from logitless.cli.errors import InputError
from logitless.cli.names import printable
from logitless.cli.streams import Stream

_KEPT_IN_MEMORY = 1 << 24  # of what goes to a stream; the rest waits in an unnamed file
# Paths of files that somebody holds open, who would not see another file in their place.
_DESCRIPTORS = ("/dev/fd/", "/dev/stderr", "/proc/")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Target:
    """An option's path as given, where that leads through links, and how it is written."""

    option: str
    given: Path
    place: Path
    kind: Literal["file", "stream", "stdout"]

    @property
    def name(self) -> str:
        """The option with its path, for messages."""
        return f"{self.option} {printable(self.given)}"


class Outputs:
    """The outputs a command was given, each found writable, and none an input, before the work; written after it."""

    def __init__(self, given: Mapping[str, Path | None], inputs: Sequence[Path] = ()) -> None:
        """Refuse what cannot or must not be written; `given` maps options to paths, `inputs` are files and folders."""
        check_distinct(*given.values())
        self._targets = {option: _target(option, path) for option, path in given.items() if path is not None}
        self._failed = False
        if sum(target.kind == "stdout" for target in self._targets.values()) > 1:
            raise InputError("two outputs go to standard output; give one of them a file")
        for target in self._targets.values():
            if target.kind == "file":
                _refuse_input(target, inputs)
                with _beside(target.given):
                    pass  # a place without room for a file is known before the work

    @property
    def table_stream(self) -> TextIO:
        """Where tables go: standard output, or stderr if one of the outputs goes to standard output."""
        return sys.stderr if any(target.kind == "stdout" for target in self._targets.values()) else sys.stdout

    def write(self, option: str, fill: Callable[[BinaryIO], object]) -> None:
        """Let `fill` write the output of an option that was given; if the system fails it, say so and go on."""
        target = self._targets.get(option)
        if target is None:
            return
        try:
            _write(target, fill)
        except InputError as error:
            self._failed = True
            sys.stderr.write(f"logitless: {target.name} was not written: {error}\n")
        except OSError as error:
            if target.kind == "stdout" and isinstance(sys.stdout, Stream):
                sys.stdout.fail(error)  # told when the run ends, as a failure of the tables is
                return
            self._failed = True
            sys.stderr.write(f"logitless: {target.name} was not written: {error.strerror or error}\n")
        else:
            if target.kind == "file":
                sys.stderr.write(f"wrote {printable(target.given)}\n")

    def finish(self) -> None:
        """End with status 1 if an output was not written."""
        if self._failed:
            raise SystemExit(1)


def check_distinct(*paths: Path | None) -> None:
    """Refuse two outputs that would overwrite one another; a device may be given twice."""
    given = [path for path in paths if path is not None]
    for index, path in enumerate(given):
        for other in given[:index]:
            if _same_place(path, other) and not (path.exists() and stat.S_ISCHR(path.stat().st_mode)):
                raise InputError(f"two outputs are the same file: {printable(path)}")


def model_files(path: Path) -> list[Path]:
    """Return what must not be overwritten of a model: its directory, or a GGUF file with all its parts."""
    part = _PART.fullmatch(path.name)
    if part is None or path.is_dir():
        return [path]
    names = (_PART.fullmatch(name) for name in os.listdir(path.parent))
    return [path.parent / name[0] for name in names if name and name.groups() == part.groups()]


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place if the block succeeds and vanishes if it does not.

    A link is followed, and the permissions and owner of a file that is there are kept.
    """
    with _beside(path) as temporary:
        yield temporary
        temporary.replace(_followed(path))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield an empty file in the folder `path` leads to, with the permissions of what is there; remove it after."""
    place = _followed(path)
    before = _stat(place)
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise InputError(f"cannot write {printable(path)}: it is a directory")
    if before is not None and not os.access(place, os.W_OK):
        raise InputError(f"cannot write {printable(path)}: permission denied")
    temporary = place.parent / f".logitless-{secrets.token_hex(6)}.tmp"
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode)
    try:
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        except OSError as error:
            raise InputError(f"cannot write {printable(path)}: {error.strerror}") from error
        if before is not None:
            temporary.chmod(mode)
            with suppress(PermissionError):  # only the superuser can give a file away; others write files of their own
                os.chown(temporary, before.st_uid, before.st_gid)
        yield temporary
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):  # it took its place, or could not be made
            temporary.unlink()


def _target(option: str, given: Path) -> _Target:
    if str(given) == "-":
        return _Target(option, given, given, "stdout")
    found = _stat(given)
    if found is not None and stat.S_ISSOCK(found.st_mode):
        raise InputError(f"cannot write {printable(given)}: it is a socket")
    if found is not None and _is_stdout(found):
        return _Target(option, given, given, "stdout")
    if str(given.absolute()).startswith(_DESCRIPTORS):
        return _Target(option, given, given, "stream")
    if found is None or stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return _Target(option, given, _followed(given), "file")
    if not os.access(given, os.W_OK):
        raise InputError(f"cannot write {printable(given)}: permission denied")
    return _Target(option, given, given, "stream")


def _is_stdout(found: os.stat_result) -> bool:
    """Tell whether this is what standard output already writes to (`/dev/stdout`, or the file of a `>`)."""
    try:
        return not stat.S_ISCHR(found.st_mode) and os.path.samestat(found, os.fstat(1))
    except OSError:
        return False


def _refuse_input(target: _Target, inputs: Sequence[Path]) -> None:
    found = _stat(target.place)
    for given in inputs:
        if given.is_dir():
            folder = given.resolve()
            if target.place.is_relative_to(folder):
                raise InputError(
                    f"{target.name} lies in the model directory {printable(given)}, whose files are what is measured; "
                    "give a path outside it"
                )
            files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
        else:
            files = (file for file in [given])
        if found is not None and any(_is(file, found) for file in files):
            raise InputError(f"{target.name} is an input, {printable(given)}, and would destroy it; give another path")


def _is(file: Path, found: os.stat_result) -> bool:
    other = _stat(file)
    return other is not None and os.path.samestat(other, found)


def _write(target: _Target, fill: Callable[[BinaryIO], object]) -> None:
    if target.kind == "file":
        with staged(target.place) as temporary, temporary.open("r+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        return
    with tempfile.SpooledTemporaryFile(_KEPT_IN_MEMORY) as whole:
        fill(cast(BinaryIO, whole))
        whole.seek(0)
        if target.kind == "stdout":
            sys.stdout.flush()
            shutil.copyfileobj(whole, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            with target.given.open("wb") as stream:
                shutil.copyfileobj(whole, stream)


def _same_place(one: Path, other: Path) -> bool:
    first, second = _stat(one), _stat(other)
    if first is not None and second is not None:
        return os.path.samestat(first, second)
    return _followed(one) == _followed(other)


def _followed(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise InputError(f"cannot write {printable(path)}: {getattr(error, 'strerror', None) or error}") from error


def _stat(path: Path) -> os.stat_result | None:
    """Return what is at the end of the path's links, None for nothing."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"cannot write {printable(path)}: {error.strerror}") from error
