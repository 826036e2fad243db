"""Language models: where they load from, what is refused, and the head that turns hidden states into lazy logits."""

import contextlib
import copy
import hashlib
import importlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may touch the network

import torch
from torch import Tensor

import logitless as ll
from logitless.cli.errors import InputError
from logitless.cli.rounding import ROUNDINGS, round_weight
from logitless.lazy.logits import LazyLogits

# By name: its annotations call for types that its own loaders do not return.
transformers: Any = importlib.import_module("transformers")

# The head's replayed logits and the model's own come from the same float32 weights; only the order of sums differs.
_HEAD_TOLERANCE = 1e-5
_CAUSAL_TOLERANCE = 1e-3
_CHECKED_TOKENS = 16


@dataclass(frozen=True)
class ModelName:
    """What the user wrote: a path, and the rounding after the colon."""

    path: Path
    rounding: str | None

    @property
    def label(self) -> str:
        """The name to print: the file or directory alone, with its rounding."""
        name = self.path.resolve().name.removesuffix(".gguf")
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
        """Return the logits of `hidden` without computing them, to be measured in float64."""
        return ll.linear(hidden, self.weight, self.bias, scale=self.scale, softcap=self.softcap).double()  # type: ignore[return-value] # lazy still

    def trimmed(self, rows: int) -> "Head":
        """Return the head of the first `rows` classes."""
        return replace(self, weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows])


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in float32 with its tokenizer, its head, and the digest of its files."""

    name: ModelName
    tokenizer: Any
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
        known = ", ".join(f":{rounding}" for rounding in ROUNDINGS)
        hint = f" (roundings are {known})" if colon and not rounded else ""
        raise InputError(f"no such model: {name.path}{hint}")
    if name.path.is_dir():
        if not (name.path / "config.json").is_file():
            raise InputError(f"{name.path} holds no config.json, so it is not a Hugging Face model directory")
    elif name.path.suffix != ".gguf":
        raise InputError(f"{name.path} is neither a Hugging Face directory nor a .gguf file")
    return name


def load_model(name: ModelName) -> LanguageModel:
    """Load a model and its tokenizer from local files into float32, checked for lost, unfit and non-finite weights."""
    loaded = _load(name)
    return loaded if name.rounding is None else _round_in_place(loaded, name.rounding)


def rounded_copy(model: LanguageModel, rounding: str) -> LanguageModel:
    """Return a rounded copy of a loaded model that shares the weights which rounding leaves alone."""
    untouched = {id(weight): weight for key, weight in model.network.named_parameters() if not _is_rounded(model, key)}
    network = copy.deepcopy(model.network, memo=untouched)
    twin = replace(model, name=replace(model.name, rounding=rounding), network=network, head=_head_of(network))
    return _round_in_place(twin, rounding)


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
        own = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    replayed = model.head.logits(hidden).materialize()
    error = ((replayed - own).abs().max() / own.abs().max()).item()
    if not error <= _HEAD_TOLERANCE:
        raise InputError(
            f"{model.name.label}: its output head does more to the hidden states than weight, bias, scale and softcap "
            f"(logits differ by {error:.1e} of the largest), so it cannot be measured"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars, reports and warnings off the screen; what matters in them is checked here."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _load(name: ModelName) -> LanguageModel:
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = name.path
    if not name.path.is_dir():
        _check_gguf_magic(name.path)
        folder, source["gguf_file"] = name.path.resolve().parent, name.path.name
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
            network, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, weights_only=True, **source
            )
    # transformers and its readers raise any of a dozen types for a damaged or unsuitable file.
    except Exception as error:
        raise InputError(f"{name.path} cannot be loaded as a causal language model: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{name.path} has no fast tokenizer (tokenizer.json), which the place of each token needs")
    _check_complete(name, report)
    network.eval()
    for key, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"{name.path}: weight {key} holds NaN or infinity")
    if network.get_output_embeddings() is None:
        raise InputError(f"{name.path} has no language head")
    return LanguageModel(replace(name, rounding=None), tokenizer, network, _head_of(network), _digest(name.path))


def _check_gguf_magic(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file: it does not begin with GGUF")


def _check_complete(name: ModelName, report: dict[str, Any]) -> None:
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"{name.path} has no language head, or misses weights of one: nothing in it for {lost[0]}{more}"
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
    for key, weight in model.network.named_parameters():
        if _is_rounded(model, key):
            weight.data = round_weight(weight.data, rounding)
    return replace(model, name=replace(model.name, rounding=rounding), head=_head_of(model.network))


def _digest(path: Path) -> str:
    """Return the SHA-256 of a GGUF file, or of the names and digests of the files of a directory."""
    if path.is_file():
        return _file_digest(path)
    kept = (".safetensors", ".bin", ".json", ".model", ".txt")
    lines = [f"{_file_digest(file)}  {file.name}\n" for file in sorted(path.iterdir()) if file.suffix in kept]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
