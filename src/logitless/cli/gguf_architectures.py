"""What GGUF architectures mean: a transformers configuration for their metadata, and parameters for their tensors.

llama.cpp's converter writes a model's configuration as `{architecture}.*` keys, and renames its weights, reorders some
and adds to others. Each entry here undoes that. A key or tensor that no entry knows is refused by `gguf_model`: it
means something, and a model without it is another model.

Sources: llama.cpp's conversion scripts, and for what the files leave out its loading of hyperparameters.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from logitless.cli.errors import InputError
from logitless.cli.gguf_file import GgufFile

Config = dict[str, Any]

# These keys say nothing that changes what a model computes.
_OF_NO_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
# Gemma divides queries by the square root of a head's size, except in its 27B models: llama.cpp tells those by their
# number of layers, since no key does.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN = 6
_SMOLLM3_STEP = 4
_SHOWN = 60  # characters of a value in a message


@dataclass
class Keys:
    """The metadata of an architecture, which remembers what was asked for."""

    file: GgufFile
    asked: set[str] = field(default_factory=set)

    def value(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return `{architecture}.{name}`, or the default where the file has none; refuse one of another type."""
        self.asked.add(name)
        key = f"{self.file.architecture}.{name}"
        if key not in self.file.metadata:
            return default
        found = self.file.metadata[key]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            shown = repr(found) if len(repr(found)) < _SHOWN else f"{repr(found)[:_SHOWN]}..."
            raise InputError(f"{self.file.path}: {key} is {shown}, which is not understood")
        return found

    def integer(self, name: str) -> int:
        """Return a whole number that the file must have."""
        found = self.value(name, int)
        if found is None:
            raise InputError(f"{self.file.path}: metadata {self.file.architecture}.{name} is missing")
        return int(found)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number that the file must have unless there is a default."""
        found = self.value(name, (int, float), default)
        if found is None:
            raise InputError(f"{self.file.path}: metadata {self.file.architecture}.{name} is missing")
        return float(found)

    def must_be(self, name: str, expected: Any) -> None:
        """Refuse a key that says anything else than the one thing that is understood; it may be missing."""
        found = self.value(name, (int, float, str, bool), expected)
        if found != expected:
            raise InputError(
                f"{self.file.path}: {self.file.architecture}.{name} is {found!r}, and only {expected!r} is understood"
            )

    def unknown(self) -> list[str]:
        """Return the architecture's keys that nothing asked for."""
        prefix = f"{self.file.architecture}."
        known = {f"{prefix}{name}" for name in (*self.asked, *_OF_NO_EFFECT)}
        return sorted(key for key in self.file.metadata if key.startswith(prefix) and key not in known)


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture becomes a transformers model."""

    family: Callable[[Keys], str]
    config: Callable[[Keys], Config]
    tensors: Mapping[str, str]
    restored: Callable[[str, Tensor, Config], Tensor] = lambda name, stored, config: stored

    def parameter(self, name: str) -> str | None:
        """Return the parameter that a tensor is, or None if it is none of this architecture's."""
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if block is None:
            return self.tensors.get(name)
        target = self.tensors.get(f"blk.{block[2]}")
        return None if target is None else f"model.layers.{block[1]}.{target}"


def _family(name: str) -> Callable[[Keys], str]:
    return lambda keys: name


def _has(keys: Keys, *suffixes: str) -> bool:
    return any(name.endswith(suffixes) for name in keys.file.tensors)


def _sizes(keys: Keys) -> Config:
    """Return what every decoder states, and refuse heads whose keys, values and rotated part differ in size."""
    embedding, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = int(keys.value("attention.key_length", int, embedding // max(heads, 1)))
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("attention.causal", True)
    layers = keys.integer("block_count")
    stored = {name.split(".")[1] for name in keys.file.tensors if name.startswith("blk.")}
    if layers > len(stored):
        key = f"{keys.file.architecture}.block_count"
        raise InputError(f"{keys.file.path}: {key} is {layers}, and it holds the weights of {len(stored)} layers")
    return {
        "vocab_size": keys.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": embedding,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(keys.value("attention.head_count_kv", int, heads)),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in keys.file.tensors,
    }


def _rotary(keys: Keys, base: float = 10000.0) -> Config:
    """Return the rotary embedding: its base and how it is stretched, whichever of the ways a key tells."""
    found: Config = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", base)}
    kind = keys.value("rope.scaling.type", str, "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    original = keys.value("rope.scaling.original_context_length", int)
    keys.must_be("rope.scaling.yarn_ext_factor", 1.0)
    fast, slow = keys.number("rope.scaling.yarn_beta_fast", 32.0), keys.number("rope.scaling.yarn_beta_slow", 1.0)
    if kind == "linear":
        return found if factor == 1.0 else found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        if original is None:
            original = keys.integer("context_length")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return found | yarn | {"beta_fast": fast, "beta_slow": slow}
    if kind not in ("none", "longrope"):
        raise InputError(f"{keys.file.path}: {keys.file.architecture}.rope.scaling.type is {kind!r}, not understood")
    return found


def _whole_heads(keys: Keys, config: Config) -> Config:
    """Refuse a rotary embedding that turns only a part of each head, or one that asks for factors it has not."""
    keys.must_be("rope.dimension_count", config["head_dim"])
    if keys.value("rope.scaling.type", str) == "longrope":
        raise InputError(f"{keys.file.path}: {keys.file.architecture}.rope.scaling.type is 'longrope', not understood")
    return config


def _llama(keys: Keys) -> Config:
    config = _sizes(keys) | {"rope_parameters": _rotary(keys)}
    keys.must_be("expert_count", 0)
    keys.must_be("expert_used_count", 0)
    window = keys.value("attention.sliding_window", int, 0)
    biased = _has(keys, "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
    mlp_biased = _has(keys, "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
    if window:
        # Llama has none; Mistral is Llama with one, and without biases.
        if biased or mlp_biased:
            raise InputError(f"{keys.file.path}: {keys.file.architecture}.attention.sliding_window with biases")
        return _whole_heads(keys, config | {"sliding_window": window})
    return _whole_heads(keys, config | {"attention_bias": biased, "mlp_bias": mlp_biased})


def _qwen2(keys: Keys) -> Config:
    return _whole_heads(keys, _sizes(keys) | {"rope_parameters": _rotary(keys)})


def _qwen3(keys: Keys) -> Config:
    biased = _has(keys, "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
    return _whole_heads(keys, _sizes(keys) | {"rope_parameters": _rotary(keys), "attention_bias": biased})


def _phi3(keys: Keys) -> Config:
    config = _sizes(keys)
    rotated = keys.value("rope.dimension_count", int, config["head_dim"])
    rotary = _rotary(keys) | {"partial_rotary_factor": rotated / config["head_dim"]}
    original = keys.value("rope.scaling.original_context_length", int, config["max_position_embeddings"])
    attention = keys.value("rope.scaling.attn_factor", (int, float))
    factors = {name: keys.file.tensors.get(f"rope_factors_{name}.weight") for name in ("short", "long")}
    if any(factors.values()):
        for name, stored in factors.items():
            if stored is None or stored.shape != (rotated // 2,):
                raise InputError(
                    f"{keys.file.path}: rope_factors_{name}.weight is missing, or has not {rotated // 2} values"
                )
            rotary[f"{name}_factor"] = stored.read().tolist()
        rotary["rope_type"] = "longrope"
        rotary["original_max_position_embeddings"] = original
        if attention is not None and not _same_float(attention, _longrope_attention(config, original)):
            rotary["attention_factor"] = float(attention)
    elif attention is not None and attention != 1.0:
        raise InputError(f"{keys.file.path}: {keys.file.architecture}.rope.scaling.attn_factor without its factors")
    return config | {
        "rope_parameters": rotary,
        "original_max_position_embeddings": original,
        "sliding_window": keys.value("attention.sliding_window", int, 0) or None,
        "pad_token_id": None,
    }


def _granite(keys: Keys) -> Config:
    """Granite is Llama with four multipliers."""
    config = _llama(keys)
    if "sliding_window" in config:
        raise InputError(f"{keys.file.path}: {keys.file.architecture}.attention.sliding_window is not understood")
    return config | {
        "attention_multiplier": keys.number("attention.scale"),
        "embedding_multiplier": keys.number("embedding_scale"),
        "residual_multiplier": keys.number("residual_scale"),
        "logits_scaling": keys.number("logit_scale"),
    }


def _smollm3(keys: Keys) -> Config:
    """SmolLM3 is Llama whose every fourth layer is not rotated, which llama.cpp knows and no key says."""
    config = _whole_heads(keys, _sizes(keys) | {"rope_parameters": _rotary(keys)})
    turned = [int((layer + 1) % _SMOLLM3_STEP != 0) for layer in range(config["num_hidden_layers"])]
    return config | {"no_rope_layers": turned, "use_sliding_window": False, "pad_token_id": None}


def _longrope_attention(config: Config, original: int) -> float:
    scale = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _same_float(one: float, other: float) -> bool:
    return bool(np.float32(one) == np.float32(other))


def _gemma(keys: Keys) -> Config:
    return _whole_heads(keys, _sizes(keys) | {"rope_parameters": _rotary(keys)})


def _gemma_scale(keys: Keys, config: Config) -> int:
    if config["num_hidden_layers"] == _GEMMA_27B_LAYERS[keys.file.architecture]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(keys: Keys) -> Config:
    config = _sizes(keys) | {"rope_parameters": _rotary(keys)}
    return _whole_heads(keys, config) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0) or None,
        "sliding_window": keys.integer("attention.sliding_window"),
        "query_pre_attn_scalar": _gemma_scale(keys, config),
    }


def _gemma3(keys: Keys) -> Config:
    config = _whole_heads(keys, _sizes(keys))
    layers = config["num_hidden_layers"]
    window = keys.value("attention.sliding_window", int, 0)
    full = _rotary(keys, 1_000_000.0)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    keys.must_be("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    sliding = [bool(window) and (layer + 1) % _GEMMA3_PATTERN != 0 for layer in range(layers)]
    return config | {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "sliding_window": window or config["max_position_embeddings"],
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "query_pre_attn_scalar": _gemma_scale(keys, config),
    }


def _unpermuted(name: str, stored: Tensor, config: Config) -> Tensor:
    """Put the rows of queries and keys back: llama.cpp pairs neighbours where transformers pairs halves."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return stored
    return stored.reshape(heads, -1, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)


def _less_one(name: str, stored: Tensor, config: Config) -> Tensor:
    """Take back the one that llama.cpp adds to Gemma's norms."""
    return stored - 1 if name.endswith("norm.weight") else stored


_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}


def _both(stored: str, target: str) -> dict[str, str]:
    return {f"blk.{stored}.{part}": f"{target}.{part}" for part in ("weight", "bias")}


_ATTENTION = {
    **_both("attn_q", "self_attn.q_proj"),
    **_both("attn_k", "self_attn.k_proj"),
    **_both("attn_v", "self_attn.v_proj"),
    **_both("attn_output", "self_attn.o_proj"),
}
_FEED_FORWARD = {
    **_both("ffn_gate", "mlp.gate_proj"),
    **_both("ffn_up", "mlp.up_proj"),
    **_both("ffn_down", "mlp.down_proj"),
}
_NORMS = {
    "blk.attn_norm.weight": "input_layernorm.weight",
    "blk.ffn_norm.weight": "post_attention_layernorm.weight",
}
_QUERY_KEY_NORMS = {
    "blk.attn_q_norm.weight": "self_attn.q_norm.weight",
    "blk.attn_k_norm.weight": "self_attn.k_norm.weight",
}
_FOUR_NORMS = {
    "blk.attn_norm.weight": "input_layernorm.weight",
    "blk.post_attention_norm.weight": "post_attention_layernorm.weight",
    "blk.ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "blk.post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_NORMS_AFTER = {
    "blk.post_attention_norm.weight": "post_attention_layernorm.weight",
    "blk.post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_DECODER = {**_OUTER, **_ATTENTION, **_FEED_FORWARD, **_NORMS}
_PHI3 = {
    **_OUTER,
    **_NORMS,
    "blk.attn_qkv.weight": "self_attn.qkv_proj.weight",
    "blk.attn_output.weight": "self_attn.o_proj.weight",
    "blk.ffn_up.weight": "mlp.gate_up_proj.weight",
    "blk.ffn_down.weight": "mlp.down_proj.weight",
}


def _llama_family(keys: Keys) -> str:
    return "Mistral" if keys.value("attention.sliding_window", int, 0) else "Llama"


ARCHITECTURES = {
    "llama": Architecture(_llama_family, _llama, _DECODER, _unpermuted),
    "qwen2": Architecture(_family("Qwen2"), _qwen2, _DECODER),
    "qwen3": Architecture(_family("Qwen3"), _qwen3, {**_DECODER, **_QUERY_KEY_NORMS}),
    "granite": Architecture(_family("Granite"), _granite, _DECODER, _unpermuted),
    "smollm3": Architecture(_family("SmolLM3"), _smollm3, _DECODER, _unpermuted),
    "olmo2": Architecture(
        _family("Olmo2"), _qwen2, {**_OUTER, **_ATTENTION, **_FEED_FORWARD, **_NORMS_AFTER, **_QUERY_KEY_NORMS}
    ),
    "phi3": Architecture(_family("Phi3"), _phi3, _PHI3),
    "gemma": Architecture(_family("Gemma"), _gemma, _DECODER, _less_one),
    "gemma2": Architecture(
        _family("Gemma2"), _gemma2, {**_OUTER, **_ATTENTION, **_FEED_FORWARD, **_FOUR_NORMS}, _less_one
    ),
    "gemma3": Architecture(
        _family("Gemma3"),
        _gemma3,
        {**_OUTER, **_ATTENTION, **_FEED_FORWARD, **_FOUR_NORMS, **_QUERY_KEY_NORMS},
        _less_one,
    ),
}
