"""A Hugging Face directory as a transformers model, with every stored weight accounted for."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from logitless.cli.accounting import refuse_differences
from logitless.cli.errors import InputError, first_line
from logitless.cli.lfs import refuse_lfs_pointer
from logitless.cli.networks import quiet, transformers

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """The configuration and weight files of a directory, checked before a weight is read."""

    def __init__(self, folder: Path) -> None:
        """Refuse a directory without a causal language model of its own, or with files that are not all there."""
        self._folder = folder
        self._given = _read_json(folder / "config.json")
        if (folder / "adapter_config.json").exists():
            raise InputError(
                f"{folder} holds an adapter (adapter_config.json) beside its weights; merge it into them "
                "(merge_and_unload of peft) and save the result, or remove it"
            )
        if self._given.get("auto_map") and self._given.get("model_type") not in transformers.CONFIG_MAPPING:
            raise InputError(f"{folder} needs code of its own (auto_map in config.json), which is not run here")
        self._refuse_unknown_quantization()
        self._files = _weight_files(folder)
        try:
            with quiet():
                self._config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        # transformers raises any of a dozen types for a configuration it cannot use.
        except Exception as error:
            raise InputError(f"{folder / 'config.json'} cannot be loaded: {first_line(error)}") from error
        if not isinstance(getattr(self._config.get_text_config(), "vocab_size", None), int):
            raise InputError(f"{folder} is no language model: its config.json gives no vocab_size")
        layers = getattr(self._config.get_text_config(), "num_hidden_layers", None)
        stored = sum(1 for file in self._files for _ in _stored_types(file))
        if isinstance(layers, int) and layers > stored:
            raise InputError(f"{folder}: config.json says {layers} layers, and its files hold {stored} weights")

    @property
    def rows(self) -> int:
        """The rows of the head, as configured."""
        return int(self._config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """The most tokens the model reads at once, if it says."""
        limit = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def network(self) -> Any:
        """Read all weights into float32 and return the model."""
        try:
            with quiet():
                network, report = transformers.AutoModelForCausalLM.from_pretrained(
                    self._folder,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    weights_only=True,
                    local_files_only=True,
                    trust_remote_code=False,
                )
        # transformers and its readers raise any of a dozen types for a damaged or unsuitable file.
        except Exception as error:
            raise InputError(
                f"{self._folder} cannot be loaded as a causal language model: {first_line(error)}"
            ) from error
        refuse_differences(self._folder, report)
        if self._given.get("quantization_config") is None:
            self._refuse_codes(network)
        return network.eval()

    def _refuse_unknown_quantization(self) -> None:
        quantization = self._given.get("quantization_config")
        if quantization is None:
            return
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        known = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        if method not in known:
            raise InputError(
                f"{self._folder}: its weights are quantised by {method!r} (quantization_config in config.json), "
                "a method that is not known here"
            )

    def _refuse_codes(self, network: Any) -> None:
        """Refuse weights that are stored as integers or as float8: without a method they are codes, not weights."""
        ignored = [re.compile(pattern) for pattern in network._keys_to_ignore_on_load_unexpected or ()]
        for file in self._files:
            for name, kind in _stored_types(file):
                if kind not in _FLOATS and not any(pattern.search(name) for pattern in ignored):
                    raise InputError(
                        f"{file}: {name} is stored as {kind}, and no quantization_config says what its values stand for"
                    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads, in its order of preference; refuse one that is missing or cut short."""
    for whole in _WHOLE:
        index = folder / f"{whole}.index.json"
        if (folder / whole).exists():
            if index.exists() and set(_shards(index)) != {whole}:
                raise InputError(f"{folder} holds two models, {whole} and that of {index.name}: remove one")
            files = [folder / whole]
        elif index.exists():
            files = [folder / shard for shard in _shards(index)]
        else:
            continue
        for file in files:
            if not file.is_file():
                raise InputError(f"{folder} misses {file.name}, which {index.name} lists")
            _check_whole(file)
        return files
    raise InputError(f"{folder} holds no weights (model.safetensors){_instead(folder)}")


def _instead(folder: Path) -> str:
    if any(folder.glob("adapter_model.*")):
        return ", only an adapter: merge it into its base (merge_and_unload of peft) and save the result"
    found = sorted(folder.glob("*.gguf"))
    return f", only GGUF: name the file, {found[0]}" if found else ""


def _shards(index: Path) -> list[str]:
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index} lists no weights (weight_map)")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} lists {name}, which is not beside it")
    return names


def _check_whole(file: Path) -> None:
    refuse_lfs_pointer(file)
    for _ in _stored_types(file):
        pass


def _stored_types(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and stored type of every tensor, without reading any; refuse a file that is no list of tensors."""
    if file.suffix == ".safetensors":
        try:
            with safetensors.safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    yield name, stored.get_slice(name).get_dtype()
        except safetensors.SafetensorError as error:
            raise InputError(
                f"{file} cannot be loaded: it is cut short or damaged ({first_line(error)}); fetch it again"
            ) from error
        return
    try:
        stored = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} cannot be loaded: it is damaged, or holds more than tensors, which could run code when read; "
            "save the model as safetensors"
        ) from error
    # A file that is no archive of torch's ends in any of several types.
    except Exception as error:
        raise InputError(f"{file} cannot be loaded: it is cut short or damaged ({first_line(error)})") from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in stored.values()):
        raise InputError(f"{file} cannot be loaded: it holds something else than named tensors")
    for name, tensor in stored.items():
        yield name, _TORCH_FLOATS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _read_json(path: Path) -> Mapping[str, Any]:
    refuse_lfs_pointer(path)
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object")
    return found
