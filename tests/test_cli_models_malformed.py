"""Files that are no model: one clear line and exit status 2, nothing left behind, and no byte of them changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gguf_models import Writer
from models import save_model
from test_cli_compare import refused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model as safetensors and, beside it, as GGUF."""
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder / "model")
    Writer(folder / "model").write(folder / "model.gguf")
    return folder


def rewritten(name: str, content: str | bytes) -> Callable[[Path, Path], Path]:
    """Give a file of the directory another content."""

    def make(folder: Path, file: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return make


def removed(name: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, file: Path) -> Path:
        (folder / name).unlink()
        return folder

    return make


def cut(name: str, share: float) -> Callable[[Path, Path], Path]:
    def make(folder: Path, file: Path) -> Path:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return folder

    return make


def configured(**values: object) -> Callable[[Path, Path], Path]:
    def make(folder: Path, file: Path) -> Path:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
        return folder

    return make


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], Path]:
    """Change the bytes of the GGUF file."""

    def make(folder: Path, file: Path) -> Path:
        file.write_bytes(change(file.read_bytes()))
        return file

    return make


def listed(index: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, file: Path) -> Path:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)
        return folder

    return make


def pickled(folder: Path, file: Path) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": print}, folder / "pytorch_model.bin")
    return folder


def no_weights(folder: Path, file: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def without_config(folder: Path, file: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def first_part(folder: Path, file: Path) -> Path:
    return file.rename(file.with_name("model-00001-of-00002.gguf"))


def header(version: int = 3, tensors: int = 0, keys: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys


def endless_list(content: bytes) -> bytes:
    """Return a file whose one key is a list of 2^60 numbers."""
    key = b"general.architecture"
    return header(keys=struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 1 << 60), count=1)


def twice(content: bytes) -> bytes:
    """Return a file that has one key twice."""
    key = b"general.name"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 1) + b"x"
    return header(keys=entry * 2, count=2)


MALFORMED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "LFS pointer for weights": (rewritten("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "LFS pointer for a tokenizer": (rewritten("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "LFS pointer for a configuration": (rewritten("config.json", POINTER), "config.json is a Git LFS pointer"),
    "LFS pointer for GGUF": (edited(lambda content: POINTER.encode()), "model.gguf is a Git LFS pointer"),
    "weights cut short": (cut("model.safetensors", 0.5), "model.safetensors cannot be loaded: it is cut short"),
    "weights cut in their header": (cut("model.safetensors", 0.01), "model.safetensors cannot be loaded: it is cut"),
    "empty weights": (rewritten("model.safetensors", b""), "model.safetensors cannot be loaded: it is cut short"),
    "weights that are a page of HTML": (
        rewritten("model.safetensors", b"<!DOCTYPE html>\n" * 9),
        "model.safetensors cannot",
    ),
    "weights that are pickled code": (pickled, "holds more than tensors, which could run code when read"),
    "no weights": (no_weights, "holds no weights (model.safetensors)"),
    "an index that is not JSON": (listed("{"), "index.json is not JSON"),
    "an index of nothing": (listed('{"weight_map": {}}'), "index.json lists no weights"),
    "an index of a missing file": (listed('{"weight_map": {"a": "b.safetensors"}}'), "misses b.safetensors, which"),
    "an index that leads away": (
        listed('{"weight_map": {"a": "../b.safetensors"}}'),
        "lists ../b.safetensors, which is",
    ),
    "no configuration": (without_config, "holds no config.json"),
    "a configuration cut short": (cut("config.json", 0.5), "config.json is not JSON"),
    "a configuration that is a list": (rewritten("config.json", "[]"), "config.json is not a JSON object"),
    "a configuration of no kind": (configured(model_type="gone", architectures="gone"), "config.json cannot be loaded"),
    "an unknown kind": (configured(model_type="nobodys"), "config.json cannot be loaded"),
    "code of its own": (configured(model_type="nobodys", auto_map={"AutoConfig": "x.Y"}), "needs code of its own"),
    "no heads": (configured(num_attention_heads=0), "cannot be loaded"),
    "a negative width": (configured(hidden_size=-32), "cannot be loaded"),
    "no end of layers": (configured(num_hidden_layers=4_000_000_000, layer_types="gone"), "says 4000000000 layers"),
    "words for a number": (configured(num_hidden_layers="two"), "cannot be loaded"),
    "another width": (configured(hidden_size=64), "has shape"),
    "no tokenizer": (removed("tokenizer.json"), "has no fast tokenizer (tokenizer.json)"),
    "a tokenizer cut short": (cut("tokenizer.json", 0.5), "tokenizer.json is not a tokenizer"),
    "a tokenizer of nothing": (rewritten("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer"),
    "a tokenizer's options cut short": (cut("tokenizer_config.json", 0.5), "tokenizer_config.json is not JSON"),
    "GGUF cut in its header": (edited(lambda content: content[:400]), "cut short or damaged (it ends at byte 400"),
    "GGUF cut in its weights": (edited(lambda content: content[:-9]), "cut short or damaged (it ends at byte"),
    "an empty GGUF file": (edited(lambda content: b""), "does not begin with GGUF"),
    "GGUF of another version": (edited(lambda content: header(version=9)), "no GGUF of version 2 or 3"),
    "GGUF without an architecture": (edited(lambda content: header()), "it has no general.architecture"),
    "GGUF with an endless list": (edited(endless_list), "cut short or damaged"),
    "GGUF with a key twice": (edited(twice), "it is damaged"),
    "GGML, the format before": (edited(lambda content: b"tjgg" + content[4:]), "in a format older than GGUF"),
    "GGUF without its other parts": (first_part, "model-00002-of-00002.gguf is not beside it"),
    "a text for a model": (lambda folder, file: folder.parent / "text.txt", "neither a Hugging Face directory nor"),
    "weights for a directory": (lambda folder, file: folder / "model.safetensors", "name the directory it is in"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whole: Path, case: str
) -> None:
    make, message = MALFORMED[case]
    folder, file = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(whole / "model", folder)
    shutil.copy(whole / "model.gguf", file)
    text = tmp_path / "text.txt"
    text.write_text("Some text, long enough to be scored.", "utf-8")
    model = make(folder, file)
    before = digests(tmp_path)
    line = refused(monkeypatch, capsys, tmp_path, "score", model, "--text", text, "--window", 64)
    assert message in line
    assert digests(tmp_path) == before
    for advice in ("weights_only", "trust_remote_code", "see above", "Traceback"):
        assert advice not in line


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
