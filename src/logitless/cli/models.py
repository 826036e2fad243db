"""Language models: where they load from, what is refused, and the head that turns hidden states into lazy logits."""

import copy
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import logitless as ll
from logitless.cli.checkpoint import Checkpoint
from logitless.cli.errors import InputError
from logitless.cli.gguf_file import gguf_parts, is_gguf, read_gguf
from logitless.cli.gguf_model import GgufModel
from logitless.cli.gguf_tokenizer import gguf_tokenizer
from logitless.cli.lfs import refuse_lfs_pointer
from logitless.cli.networks import transformers
from logitless.cli.rounding import ROUNDINGS, round_weight
from logitless.cli.tokenizer import TextTokenizer, read_tokenizer_json
from logitless.lazy.logits import LazyLogits

# The head's replayed logits and the model's own come from the same float32 weights; only the order of sums differs.
_HEAD_TOLERANCE = 1e-5
_CAUSAL_TOLERANCE = 1e-3
_CHECKED_TOKENS = 16
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelName:
    """What the user wrote: a path, and the rounding after the colon."""

    path: Path
    rounding: str | None

    @property
    def label(self) -> str:
        """The name to print: the file or directory alone, with its rounding."""
        name = self.path.absolute().name or str(self.path.absolute())
        name = self.path.resolve().name if name == ".." else name.removesuffix(".gguf")
        return name if self.rounding is None else f"{name}:{self.rounding}"


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap tanh((hidden weightᵀ + bias) scale / softcap)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @property
    def rows(self) -> int:
        """The number of classes."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> LazyLogits:
        """Return the logits of `hidden` without computing them: products in float32, sums over classes in float64."""
        return ll.linear(hidden, self.weight, self.bias, scale=self.scale, softcap=self.softcap).double()  # type: ignore[return-value] # lazy still

    def trimmed(self, rows: int) -> "Head":
        """Return the head of the first `rows` classes."""
        return replace(self, weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows])


@dataclass(frozen=True)
class ModelSource:
    """A model's files, looked through but not loaded: what can be refused without its weights has been."""

    name: ModelName
    tokenizer: TextTokenizer
    content: Checkpoint | GgufModel

    @property
    def rows(self) -> int:
        """The rows of the stored head."""
        return self.content.rows

    @property
    def classes(self) -> int:
        """The rows of the head that a token of the tokenizer belongs to, up to the last of them."""
        return min(self.rows, self.tokenizer.size)

    @property
    def context(self) -> int | None:
        """The most tokens the model reads at once, if it says."""
        return self.content.context


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in float32 with its tokenizer, its head, and the digest of its files.

    The head is without the rows that belong to no token of the tokenizer.
    """

    name: ModelName
    tokenizer: TextTokenizer
    network: Any
    head: Head
    digest: str

    @property
    def context(self) -> int | None:
        """The most tokens the model reads at once, if it says."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def hidden(self, ids: list[int]) -> Tensor:
        """Return what the head reads at each of `ids`: the states after the final norm, (tokens, features)."""
        batch = torch.tensor([ids])
        with torch.no_grad():
            output = self.network.base_model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
        states: Tensor = output[0][0]
        return states


def parse_model_name(given: str) -> ModelName:
    """Split `PATH:int8` into its path and rounding, and refuse a path that is neither a directory nor a GGUF file."""
    path, colon, suffix = given.rpartition(":")
    rounded = bool(colon) and suffix in ROUNDINGS
    name = ModelName(Path(path), suffix) if rounded else ModelName(Path(given), None)
    if not name.path.exists():
        raise InputError(f"no such model: {name.path}{_hint(name.path, bool(colon) and not rounded)}")
    if name.path.is_dir():
        if not (name.path / "config.json").is_file():
            raise InputError(
                f"{name.path} holds no config.json, so it is not a Hugging Face model directory{_inside(name)}"
            )
    elif not name.path.is_file():
        raise InputError(f"{name.path} is neither a Hugging Face directory nor a .gguf file")
    elif name.path.suffix != ".gguf":
        refuse_lfs_pointer(name.path)
        if not is_gguf(name.path):
            weights = name.path.suffix in (".safetensors", ".bin", ".pt", ".pth")
            hint = "; name the directory it is in" if weights else ""
            raise InputError(f"{name.path} is neither a Hugging Face directory nor a .gguf file{hint}")
    return name


def _hint(path: Path, unknown_rounding: bool) -> str:
    if unknown_rounding:
        return f" (roundings are {', '.join(f':{rounding}' for rounding in ROUNDINGS)})"
    if path.is_symlink():
        return f" (a link to {path.readlink()}, which is not there)"
    if _HUB_ID.fullmatch(str(path)):
        return f" (only local paths are read: fetch it with hf download {path} --local-dir DIRECTORY, and name that)"
    return ""


def _inside(name: ModelName) -> str:
    """Say what else a directory without a configuration holds."""
    if (name.path / "adapter_config.json").is_file():
        return ", only an adapter: merge it into its base (merge_and_unload of peft) and save the result"
    files = sorted(name.path.glob("*.gguf"))
    snapshots = sorted(name.path.glob("snapshots/*/config.json"))
    found = files[0] if files else snapshots[0].parent if snapshots else None
    return "" if found is None else f"; it holds {found}: name that"


def open_model(name: ModelName) -> ModelSource:
    """Look through a model's files without reading its weights, and refuse what is not understood in whole."""
    if name.path.is_dir():
        checkpoint = Checkpoint(name.path)
        return ModelSource(name, read_tokenizer_json(name.path), checkpoint)
    file = read_gguf(name.path)
    model = GgufModel(file)
    return ModelSource(name, gguf_tokenizer(file), model)


def load_model(name: ModelName, source: ModelSource | None = None) -> LanguageModel:
    """Load a model and its tokenizer from local files into float32, checked for lost, unfit and non-finite weights.

    `source` is what `open_model` found, where it has looked already.
    """
    source = open_model(name) if source is None else source
    network = source.content.network()
    for key, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"{name.path}: weight {key} holds NaN or infinity")
    if network.get_output_embeddings() is None:
        raise InputError(f"{name.path} has no language head")
    head = _head_of(network)
    if head.rows != source.rows:
        raise InputError(
            f"{name.path}: its head has {head.rows} rows where its configuration gives {source.rows} classes"
        )
    head = head.trimmed(source.classes)
    loaded = LanguageModel(replace(name, rounding=None), source.tokenizer, network, head, _digest(name.path))
    return loaded if name.rounding is None else _round_in_place(loaded, name.rounding)


def rounded_copy(model: LanguageModel, rounding: str) -> LanguageModel:
    """Return a rounded copy of a loaded model that shares the weights which rounding leaves alone."""
    untouched = {id(weight): weight for key, weight in model.network.named_parameters() if not _is_rounded(model, key)}
    network = copy.deepcopy(model.network, memo=untouched)
    return _round_in_place(replace(model, network=network), rounding)


def check_model(model: LanguageModel, ids: list[int]) -> None:
    """Refuse a model whose logits the head does not reproduce, or that sees the tokens it is to predict."""
    ids = ids[:_CHECKED_TOKENS]
    hidden = model.hidden(ids)
    # Shorter by one token, the states of the others must be as before.
    seen = 0.0
    if len(ids) > 1:
        seen = ((hidden[:-1] - model.hidden(ids[:-1])).abs().max() / hidden.abs().max()).item()
    if not seen <= _CAUSAL_TOLERANCE:
        raise InputError(
            f"{model.name.label} is not a causal language model: its states depend on the tokens that follow "
            f"(by {seen:.1e} of the largest), which it is to predict"
        )
    with torch.no_grad():
        own = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, : model.head.rows].float()
    replayed = model.head.logits(hidden).materialize()
    error = ((replayed - own).abs().max() / own.abs().max()).item()
    if not error <= _HEAD_TOLERANCE:
        raise InputError(
            f"{model.name.label}: its output head does more to the hidden states than weight, bias, scale and softcap "
            f"(logits differ by {error:.1e} of the largest), so it cannot be measured"
        )


def _head_of(network: Any) -> Head:
    config = network.config.get_text_config()
    layer = network.get_output_embeddings()
    # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling; Gemma caps them.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(layer, "bias", None)
    return Head(layer.weight.detach(), None if bias is None else bias.detach(), scale, softcap)


def _is_rounded(model: LanguageModel, key: str) -> bool:
    """Tell whether rounding applies: to every matrix but the token embedding, and a head tied to it."""
    weight = model.network.get_parameter(key)
    return weight.ndim == 2 and weight is not model.network.get_input_embeddings().weight


def _round_in_place(model: LanguageModel, rounding: str) -> LanguageModel:
    # GPT-2 keeps its matrices the other way round: their columns are what one input feeds, not their rows.
    turned = {
        id(module.weight) for module in model.network.modules() if isinstance(module, transformers.pytorch_utils.Conv1D)
    }
    for key, weight in model.network.named_parameters():
        if weight.ndim > 2:
            raise InputError(
                f"{model.name.label} cannot be rounded to {rounding}: its weight {key} is a stack of matrices, "
                "and only single matrices are"
            )
        if _is_rounded(model, key):
            matrix = weight.data.T if id(weight) in turned else weight.data
            rounded = round_weight(matrix.contiguous(), rounding)
            weight.data = rounded.T.contiguous() if id(weight) in turned else rounded
    head = _head_of(model.network).trimmed(model.head.rows)
    return replace(model, name=replace(model.name, rounding=rounding), head=head)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a GGUF file, or of the names and digests of the files of a directory or of split GGUF."""
    if path.is_file():
        files = list(gguf_parts(path))
        if len(files) == 1:
            return _file_digest(path)
    else:
        kept = (".safetensors", ".bin", ".json", ".model", ".txt")
        files = [file for file in sorted(path.iterdir()) if file.suffix in kept]
    lines = [f"{_file_digest(file)}  {file.name}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
