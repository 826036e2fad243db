"""Names of files and models as they can be shown: on a terminal, in a page, in JSON."""

from collections.abc import Sequence
from pathlib import Path

_UNDECODED = range(0xDC80, 0xDD00)  # Python's stand-ins for the bytes of a file name that are not UTF-8


def printable(name: str | Path) -> str:
    """Return the name with undecodable bytes and characters that print nothing, or move the cursor, as escapes.

    >>> printable("a\\x1b[2Jb\\udcff")
    'a\\\\x1b[2Jb\\\\xff'
    """
    return "".join(character if character.isprintable() else _escaped(character) for character in str(name))


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if code in _UNDECODED else character.encode("unicode_escape").decode("ascii")


def told_apart(short: Sequence[str], full: Sequence[str]) -> list[str]:
    """Return the short names, the full ones where short ones coincide, and numbers where the full ones do too.

    >>> told_apart(["int8", "model", "model", "x", "x"], ["m:int8", "a/model", "b/model", "x", "x"])
    ['int8', 'a/model', 'b/model', 'x (1)', 'x (2)']
    """
    names = [long if short.count(name) > 1 else name for name, long in zip(short, full, strict=True)]
    seen: dict[str, int] = {}
    told = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        told.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return told
