"""GGUF files as they are stored: metadata and tensors, of one file or of the parts of a split one joined."""

import functools
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from logitless.cli.errors import InputError
from logitless.cli.lfs import refuse_lfs_pointer

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LEGACY_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_NOT_MODELS = {"adapter": "a LoRA adapter", "mmproj": "the projector of images or sound", "imatrix": "an imatrix"}
_FLOAT = gguf.GGUFValueType.FLOAT32
_STRINGS = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
_INTEGERS = frozenset(getattr(gguf.GGMLQuantizationType, name) for name in ("I8", "I16", "I32", "I64"))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file, in its stored type until it is read."""

    path: Path
    name: str
    stored: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in torch's order."""
        return tuple(int(size) for size in reversed(self.stored.shape))

    def read(self) -> Tensor:
        """Return the values in float32, in memory of their own."""
        kind = self.stored.tensor_type
        if kind in _INTEGERS:
            raise InputError(f"{self.path}: tensor {self.name} holds integers ({kind.name}), which are no weights")
        try:
            values = gguf.dequantize(self.stored.data, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: tensor {self.name} is stored as {kind.name}, which cannot be read"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The metadata and tensors of a model; `path` is the file that was named, `parts` all that belong to it."""

    path: Path
    parts: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """What `general.architecture` says."""
        given = self.metadata.get("general.architecture")
        if not isinstance(given, str):
            raise InputError(f"{self.path} is no model: it has no general.architecture")
        return given


def is_gguf(path: Path) -> bool:
    """Tell whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Return all files of a split model by the name of its first, or the file itself; refuse parts that are missing."""
    found = _PART.fullmatch(path.name)
    if found is None or not (count := int(found["count"])):
        return (path,)
    parts = tuple(path.with_name(f"{found['stem']}-{i + 1:05d}-of-{found['count']}.gguf") for i in range(count))
    if path != parts[0]:
        raise InputError(f"{path} is a later part of a split model: name the first, {parts[0].name}; the rest is found")
    for part in parts[1:]:
        if not part.is_file():
            raise InputError(f"{path} is the first of {count} parts of a model, and {part.name} is not beside it")
    return parts


def read_gguf(path: Path) -> GgufFile:
    """Read a model's metadata and where its tensors lie, and refuse what is damaged, cut short or no model."""
    parts = gguf_parts(path)
    for part in parts:
        _check_magic(part)
    states = tuple((part, (stat := part.stat()).st_size, stat.st_mtime_ns) for part in parts)
    return _read(path, states)


@functools.lru_cache(maxsize=2)  # a model's tokenizer and its weights are asked for one after another
def _read(path: Path, states: tuple[tuple[Path, int, int], ...]) -> GgufFile:
    parts = tuple(part for part, _, _ in states)
    metadata: dict[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, part in enumerate(parts):
        reader = _reader(part)
        found = {name: _value(part, entry) for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
        _check_split(part, found, number, len(parts))
        if number == 0:
            metadata = found
        for stored in reader.tensors:
            if stored.name in tensors:
                raise InputError(f"{part}: tensor {stored.name} is stored twice")
            tensors[stored.name] = StoredTensor(part, stored.name, stored)
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise InputError(f"{path}: its parts hold {len(tensors)} tensors where split.tensors.count says {promised}")
    kind = metadata.get("general.type", "model")
    if kind in _NOT_MODELS or (kind == "model" and any(name.startswith("adapter.") for name in metadata)):
        what = _NOT_MODELS.get(kind, _NOT_MODELS["adapter"])
        hint = "; merge it into its base and convert that" if "adapter" in what else ""
        raise InputError(f"{path} is not a model: it holds {what}{hint}")
    return GgufFile(path, parts, metadata, tensors)


class _BoundedReader(gguf.GGUFReader):
    """The library's reader, which slices past the end of a file without a word and loops over any count it reads."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise _CutShortError(f"it ends at byte {len(self.data)}, and byte {end} is needed")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Read a list at once; the library makes arrays for each of its entries, seconds for a vocabulary."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        entry_type = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        number = self.gguf_scalar_to_np.get(entry_type)
        if number is not None:
            values = self._get(start, number, count)
            return 12 + int(values.nbytes), [values], [0], [gguf.GGUFValueType.ARRAY, entry_type]
        if entry_type != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        strings, end = self._strings(start, count)
        return end - orig_offs, [strings], [0], [gguf.GGUFValueType.ARRAY, entry_type]

    def _strings(self, offset: int, count: int) -> tuple[list[bytes], int]:
        content = self.data.data
        length = struct.Struct(">Q" if self.endianess == gguf.GGUFEndian.BIG else "<Q")
        strings = []
        for _ in range(count):
            if offset + 8 > len(content):
                raise _CutShortError(f"it ends at byte {len(content)}, and byte {offset + 8} is needed")
            start = offset + 8
            offset = start + length.unpack_from(content, offset)[0]
            if offset > len(content):
                raise _CutShortError(f"it ends at byte {len(content)}, and byte {offset} is needed")
            strings.append(bytes(content[start:offset]))
        return strings, offset


class _CutShortError(Exception):
    pass


def _reader(path: Path) -> Any:
    try:
        return _BoundedReader(path)
    except _CutShortError as error:
        raise InputError(f"{path} cannot be loaded: it is cut short or damaged ({error}); fetch it again") from error
    # The reader raises any of a dozen types for bytes that make no sense.
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} cannot be loaded: it is damaged, or no GGUF of version 2 or 3 ({first})") from error


def _value(path: Path, entry: Any) -> Any:
    try:
        if entry.types == _STRINGS:
            return [string.decode("utf-8") for string in entry.parts[entry.data[0]]]
        value = entry.contents()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be loaded: metadata {entry.name} is not UTF-8") from error
    # A float32 is read as the shortest decimal that rounds to it: the number that the model's configuration gave.
    return float(str(np.float32(value))) if entry.types == [_FLOAT] else value


def _check_magic(path: Path) -> None:
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start in _LEGACY_MAGICS:
        raise InputError(f"{path} is in a format older than GGUF; convert the model again with a current llama.cpp")
    if start != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it does not begin with GGUF")


def _check_split(part: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    claimed = metadata.get("split.count", 0)
    if count == 1 and claimed > 1:
        raise InputError(
            f"{part} is one of {claimed} parts of a split model, whose names end in -00001-of-{claimed:05d}.gguf; "
            "name the first part under its own name"
        )
    if count > 1 and (metadata.get("split.no"), claimed) != (number, count):
        raise InputError(f"{part} is not part {number + 1} of {count}: it says split.no {metadata.get('split.no')}")
