"""A GGUF file as a transformers model, with every key and every tensor of it accounted for."""

import math
from typing import Any

import torch
from torch import Tensor

from logitless.cli.accounting import refuse_differences
from logitless.cli.errors import InputError, first_line
from logitless.cli.gguf_architectures import ARCHITECTURES, Architecture, Keys
from logitless.cli.gguf_file import GgufFile
from logitless.cli.networks import build_network, transformers

_ROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_ROPE_DIVISORS = "rope_freqs.weight"
# Llama 3's bounds as published with its code; llama.cpp's converter writes what they give, not the bounds.
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufModel:
    """The configuration of a file's model, checked against its keys and tensor names before a weight is read."""

    def __init__(self, file: GgufFile) -> None:
        """Refuse an architecture, key or tensor that is not understood."""
        self._file = file
        architecture = ARCHITECTURES.get(file.architecture)
        if architecture is None:
            raise InputError(
                f"{file.path}: architecture {file.architecture!r} is not one that is read from GGUF "
                f"({', '.join(ARCHITECTURES)}); give the model's Hugging Face directory instead"
            )
        if "token_embd.weight" not in file.tensors:
            raise InputError(f"{file.path} is no language model: it has no tensor token_embd.weight")
        self._architecture: Architecture = architecture
        keys = Keys(file)
        self._kind = getattr(transformers, f"{architecture.family(keys)}ForCausalLM")
        self._config = architecture.config(keys)
        self._divisors = self._rope_divisors()
        for key in keys.unknown():
            raise InputError(f"{file.path}: metadata key {key} is not understood, so its model cannot be rebuilt")
        self._parameters = self._named()
        try:
            self._built = self._kind.config_class(**self._config)
        # transformers raises errors of its own and of others' for sizes that make no model.
        except Exception as error:
            raise InputError(f"{file.path}: its metadata describes no model: {first_line(error)}") from error

    @property
    def rows(self) -> int:
        """The rows of its head."""
        head = self._file.tensors.get("output.weight", self._file.tensors["token_embd.weight"])
        return head.shape[0]

    @property
    def context(self) -> int:
        """The most tokens it reads at once."""
        return int(self._config["max_position_embeddings"])

    def network(self) -> Any:
        """Read all weights into float32 and return the model."""
        weights = {}
        for parameter, name in self._parameters.items():
            stored = self._file.tensors[name]
            weights[parameter] = self._architecture.restored(name, stored.read(), self._config)
        self._add_zero_biases(weights)
        network, report = build_network(self._kind, self._built, weights)
        refuse_differences(self._file.path, report, self._parameters)
        if self._divisors is not None:
            rotary = network.model.rotary_emb
            rotary.inv_freq.div_(self._divisors)
            rotary.original_inv_freq.div_(self._divisors)
        return network

    def _named(self) -> dict[str, str]:
        """Return which tensor is which parameter; refuse a tensor that is none, and one of a layer too many."""
        found = {}
        for name in self._file.tensors:
            if name in _ROPE_FACTORS and self._file.architecture == "phi3":
                continue
            if name == _ROPE_DIVISORS and self._file.architecture == "llama":
                continue
            parameter = self._architecture.parameter(name)
            if parameter is None:
                raise InputError(
                    f"{self._file.path}: tensor {name} is none that a model of architecture {self._file.architecture} "
                    "has, so its model cannot be rebuilt"
                )
            found[parameter] = name
        return found

    def _rope_divisors(self) -> Tensor | None:
        """Turn rope_freqs into Llama 3's rule where it is that bit for bit, else keep what to divide by."""
        stored = self._file.tensors.get(_ROPE_DIVISORS)
        if stored is None or self._file.architecture != "llama":
            return None
        divisors, rotary, size = stored.read(), self._config["rope_parameters"], self._config["head_dim"]
        if divisors.shape != (size // 2,):
            raise InputError(f"{self._file.path}: {_ROPE_DIVISORS} has shape {tuple(divisors.shape)}, not {size // 2}")
        if bool((divisors == 1).all()):
            return None
        if rotary["rope_type"] != "default":
            raise InputError(f"{self._file.path}: {_ROPE_DIVISORS} beside rope scaling {rotary['rope_type']!r}")
        factor = divisors.max().item()
        if torch.equal(divisors, _llama_3_divisors(rotary["rope_theta"], size, factor)):
            rotary |= {"rope_type": "llama3", "factor": factor, **_LLAMA_3}
            return None
        return divisors

    def _add_zero_biases(self, weights: dict[str, Tensor]) -> None:
        """Add the biases that transformers has where the file has some of them: no bias is a bias of zero."""
        layers = range(self._config["num_hidden_layers"])
        for option, module, names in (
            ("attention_bias", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp_bias", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ):
            if not self._config.get(option):
                continue
            for prefix in (f"model.layers.{layer}.{module}.{name}" for layer in layers for name in names):
                if f"{prefix}.bias" not in weights and f"{prefix}.weight" in weights:
                    weights[f"{prefix}.bias"] = torch.zeros(weights[f"{prefix}.weight"].shape[0])


def _llama_3_divisors(base: float, size: int, factor: float) -> Tensor:
    """Return what llama.cpp's converter writes of Llama 3's rule, in its order of operations."""
    low, high, original = _LLAMA_3.values()
    wavelengths = 2 * math.pi / (1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)))
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(wavelengths > original / low, torch.tensor(factor), between)
    return torch.where(wavelengths < original / high, torch.tensor(1.0), divisors)
