"""Vectors of a corpus, made once: they are kept beside it, in blocks whose names are digests of what made them.

`CORPUS.vectors/` has a file for each block of items, named by the SHA-256 of the model and of the items. A block is
written whole, then takes its name: a run that is ended finds the blocks before again, and a block of other items, or of
another model, has another name. A run that ends well removes the blocks that its model no longer needs.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitless.cli.encoders import Encoder
from logitless.cli.errors import InputError, first_line
from logitless.cli.items import Items, content_digest
from logitless.cli.names import printable
from logitless.cli.outputs import staged
from logitless.cli.progress import Steps

BLOCK = 256
_PREFIX = 16  # of the model's digest, by which its blocks are told from another's


class Blocks:
    """Vectors in blocks, kept in files or, where they could not be written, in memory: rows for `ll.cosine_topk`."""

    def __init__(self, blocks: Sequence[Path | Tensor], rows: int) -> None:
        """Take blocks of BLOCK rows each, but for the last."""
        self._blocks = blocks
        self.shape = (rows, _vectors(blocks[0]).shape[1])

    def __getitem__(self, rows: slice) -> Tensor:
        """Return a copy of some rows."""
        start, stop, _ = rows.indices(self.shape[0])
        parts = [_vectors(block) for block in self._blocks[start // BLOCK : -(-stop // BLOCK)]]
        offset = start // BLOCK * BLOCK
        return torch.cat(parts)[start - offset : stop - offset]


def corpus_vectors(items: Items, encoder: Encoder, steps: Steps) -> Blocks:
    """Return a vector for each item: those that are kept, and those that are made and kept now."""
    folder = items.path.absolute().with_name(f"{items.path.absolute().name}.vectors")
    numbers = range(0, len(items), BLOCK)
    names = [_name(items.contents[first : first + BLOCK], encoder) for first in numbers]
    blocks: list[Path | Tensor] = [folder / name for name in names]
    sizes = [len(items.contents[first : first + BLOCK]) for first in numbers]
    absent = [i for i, block in enumerate(blocks) if not _is_whole(folder / names[i], sizes[i])]
    writable = not absent or _can_write(folder, steps)
    label = f"vectors of {len(items):,} items by {encoder.name}"
    for i in steps.track(absent, label, len(absent)) if absent else ():
        made = encoder.encode(items.contents[i * BLOCK : i * BLOCK + sizes[i]], "document").float().contiguous()
        if not writable:
            blocks[i] = made
            continue
        with staged(folder / names[i]) as temporary, temporary.open("wb") as file:
            np.save(file, made.numpy())
    if writable and absent:
        _remove_others(folder, set(names), encoder)
    if len(absent) < len(blocks):
        steps.note(f"{len(blocks) - len(absent)} of {len(blocks)} blocks of vectors were kept in {printable(folder)}")
    return Blocks(blocks, len(items))


def _name(contents: Sequence[Any], encoder: Encoder) -> str:
    lines = [encoder.digest, *(content_digest(content) for content in contents)]
    return f"{encoder.digest[:_PREFIX]}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}.npy"


def _vectors(block: Path | Tensor) -> Tensor:
    if isinstance(block, Tensor):
        return block
    try:
        return torch.from_numpy(np.load(block))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {printable(block)}, remove it: {first_line(error)}") from error


def _is_whole(path: Path, rows: int) -> bool:
    """Tell whether a block is there and can be read: one that cannot is made again."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.ndim == 2 and len(array) == rows and array.dtype == np.float32


def _can_write(folder: Path, steps: Steps) -> bool:
    try:
        folder.mkdir(exist_ok=True)
        with staged(folder / "writable"):
            pass
        (folder / "writable").unlink()
    except (OSError, InputError) as error:
        steps.note(f"the vectors are not kept, {printable(folder)} cannot be written: {first_line(error)}")
        return False
    return True


def _remove_others(folder: Path, names: set[str], encoder: Encoder) -> None:
    for path in folder.glob(f"{encoder.digest[:_PREFIX]}-{'[0-9a-f]' * 64}.npy"):
        if path.name not in names:
            with suppress(OSError):
                path.unlink()
