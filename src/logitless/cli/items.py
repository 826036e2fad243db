"""What is searched: the lines of a text file, the objects of a JSON Lines file, a folder of pictures, or vectors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from logitless.cli.errors import InputError, first_line
from logitless.cli.names import printable
from logitless.cli.text import read_texts

Kind = Literal["text", "image", "vector"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Items:
    """The items of a corpus by their numbers: texts, paths of pictures, or the rows of an array."""

    path: Path
    kind: Kind
    texts: tuple[str, ...] = ()
    pictures: tuple[Path, ...] = ()
    vectors: Any = None

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.vectors) if self.kind == "vector" else len(self.contents)

    @property
    def contents(self) -> tuple[str, ...] | tuple[Path, ...]:
        """What an encoder reads: texts, or paths of pictures."""
        return self.texts if self.kind == "text" else self.pictures

    def shown(self, number: int) -> str:
        """Return what an item is called in a table."""
        if self.kind == "vector":
            return f"row {number}"
        return self.texts[number] if self.kind == "text" else str(self.pictures[number].relative_to(self.path))

    def files(self) -> list[Path]:
        """Return the files that no output may overwrite."""
        return list(self.pictures) if self.kind == "image" else [self.path]


def read_items(path: Path, field: str) -> Items:
    """Read a corpus; what it is shows in its name. `field` is the one that holds an object's text."""
    if path.is_dir():
        pictures = tuple(sorted(file for file in path.rglob("*") if is_picture(file)))
        if not pictures:
            raise InputError(f"{printable(path)} holds no picture ({', '.join(PICTURES)})")
        return Items(path, "image", pictures=pictures)
    if not path.exists():
        raise InputError(f"no such corpus: {printable(path)}")
    if path.suffix == ".npy":
        return Items(path, "vector", vectors=read_vectors(path))
    (text,) = read_texts([path])
    lines = [line for line in text.content.splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_text_of(path, number, line, field) for number, line in enumerate(lines, 1)]
    return Items(path, "text", texts=tuple(lines))


def is_picture(path: Path) -> bool:
    """Tell whether a file is one of the pictures that are read, by its name."""
    return path.suffix.lower() in PICTURES and path.is_file()


def read_vectors(path: Path) -> Any:
    """Return a mapped array of vectors (rows, features); one vector is one row."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{printable(path)} is no array of NumPy: {first_line(error)}") from error
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{printable(path)} must hold vectors (rows, features), and holds {array.shape}")
    return array


def content_digest(content: str | Path) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, or of a picture's file."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    try:
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {printable(content)}: {error.strerror}") from error


def _text_of(path: Path, number: int, line: str, field: str) -> str:
    try:
        held = json.loads(line)
    except ValueError as error:
        raise InputError(f"{printable(path)}, line {number} is no JSON: {error}") from error
    if not isinstance(held, dict) or not isinstance(held.get(field), str):
        has = f"; it has {', '.join(map(repr, held))}" if isinstance(held, dict) else ""
        where = f"{printable(path)}, line {number}"
        raise InputError(f"{where} has no text under {field!r}{has}; name the field by --field")
    text: str = held[field]
    return text
