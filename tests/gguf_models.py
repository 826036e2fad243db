"""GGUF files for the tests, written with gguf-py as llama.cpp's converter writes them from a Hugging Face directory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from logitless.cli.networks import transformers

Type = gguf.GGMLQuantizationType
F32 = Type.F32

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "granite": "granite",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


class Writer:
    """A GGUF file in the making, from a directory: its parts can be changed before it is written."""

    def __init__(self, folder: Path, type_of: Callable[[str], Type] = lambda name: F32) -> None:
        self.folder = folder
        self.config = transformers.AutoConfig.from_pretrained(folder)
        self.architecture = _ARCHITECTURES[self.config.model_type]
        self.type_of = type_of
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self._add_keys()
        self._add_tensors()
        self.add_tokenizer(folder)

    def key(self, name: str, value: Any) -> None:
        self.keys[f"{self.architecture}.{name}"] = value

    def write(self, path: Path, *, parts: int = 1, alignment: int | None = None) -> Path:
        """Write the file, or split it into parts named as llama.cpp names them; return the first."""
        names = list(self.tensors)
        size = -(-len(names) // parts)
        first = path
        for number in range(parts):
            target = path if parts == 1 else path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf")
            first = target if number == 0 else first
            writer = gguf.GGUFWriter(target, self.architecture)
            if parts > 1:
                writer.add_uint16("split.no", number)
                writer.add_uint16("split.count", parts)
                writer.add_int32("split.tensors.count", len(names))
            if number == 0:
                for key, value in self.keys.items():
                    writer.add_key_value(key, value, *_value_types(key, value))
            for name in names[number * size : (number + 1) * size]:
                self._write_tensor(writer, name)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return first

    def stored_values(self) -> dict[str, np.ndarray]:
        """Return every tensor's values as the file's type rounds them."""
        return {
            name: values if self._type(name) == F32 else gguf.dequantize(self._quantized(name), self._type(name))
            for name, values in self.tensors.items()
        }

    def _type(self, name: str) -> Type:
        return self.type_of(name) if self.tensors[name].ndim > 1 else F32

    def _quantized(self, name: str) -> np.ndarray:
        kind = self._type(name)
        try:
            return gguf.quantize(self.tensors[name], kind)
        except NotImplementedError:
            return _random_blocks(name, self.tensors[name].shape, kind)

    def _write_tensor(self, writer: Any, name: str) -> None:
        kind = self._type(name)
        values = self.tensors[name]
        if values.dtype != np.float32 or kind == F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, self._quantized(name), raw_dtype=kind)

    def _add_keys(self) -> None:
        config = self.config
        rope = config.rope_parameters
        self.keys["general.name"] = "tiny"
        self.keys["general.type"] = "model"
        self.key("context_length", config.max_position_embeddings)
        self.key("embedding_length", config.hidden_size)
        self.key("block_count", config.num_hidden_layers)
        self.key("feed_forward_length", config.intermediate_size)
        self.key("attention.head_count", config.num_attention_heads)
        self.key("attention.head_count_kv", config.num_key_value_heads)
        self.key("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.architecture != "phi3":
            self.key("attention.key_length", head_dim)
            self.key("attention.value_length", head_dim)
        full = rope.get("full_attention", rope)
        if self.architecture not in ("gemma", "gemma2"):
            self.key("rope.freq_base", float(full["rope_theta"]))
        if full["rope_type"] in ("linear", "yarn"):
            self.key("rope.scaling.type", full["rope_type"])
            self.key("rope.scaling.factor", float(full["factor"]))
        if full["rope_type"] == "yarn":
            self.key("rope.scaling.original_context_length", full["original_max_position_embeddings"])
        if self.architecture == "granite":
            self.key("attention.scale", float(config.attention_multiplier))
            self.key("embedding_scale", float(config.embedding_multiplier))
            self.key("residual_scale", float(config.residual_multiplier))
            self.key("logit_scale", float(config.logits_scaling))
        if self.architecture in ("llama", "granite", "smollm3"):
            self.key("vocab_size", config.vocab_size)
            self.key("rope.dimension_count", head_dim)
            if config.model_type == "mistral" and config.sliding_window:
                self.key("attention.sliding_window", config.sliding_window)
            if full["rope_type"] == "llama3":
                self.tensors["rope_freqs.weight"] = llama_3_divisors(full, head_dim)
        if self.architecture == "phi3":
            self._add_phi3(rope, head_dim)
        if self.architecture == "gemma2":
            self.key("attn_logit_softcapping", float(config.attn_logit_softcapping))
            self.key("final_logit_softcapping", float(config.final_logit_softcapping))
        if self.architecture in ("gemma2", "gemma3"):
            self.key("attention.sliding_window", config.sliding_window)

    def _add_phi3(self, rope: dict[str, Any], head_dim: int) -> None:
        config = self.config
        original = config.original_max_position_embeddings
        self.key("rope.dimension_count", int(rope["partial_rotary_factor"] * head_dim))
        self.key("rope.scaling.original_context_length", original)
        self.key("attention.sliding_window", config.sliding_window or 0)
        if rope["rope_type"] != "longrope":
            return
        scale = config.max_position_embeddings / original
        self.key("rope.scaling.attn_factor", math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        for name in ("long", "short"):
            self.tensors[f"rope_factors_{name}.weight"] = np.array(rope[f"{name}_factor"], np.float32)

    def _add_tensors(self) -> None:
        config = self.config
        apart = self.architecture in ("gemma2", "gemma3", "olmo2")
        post_attention = "post_attention_norm" if apart else "ffn_norm"
        names = {**_LAYER, "post_attention_layernorm": post_attention}
        for name, tensor in load_file(self.folder / "model.safetensors").items():
            module, _, part = name.rpartition(".")
            values = tensor.float()
            if module in _OUTER:
                target = _OUTER[module]
            else:
                _, _, layer, inner = module.split(".", 3)
                target = f"blk.{layer}.{names[inner]}"
            if self.architecture in ("llama", "granite", "smollm3") and target.endswith(("attn_q", "attn_k")):
                heads = config.num_attention_heads if target.endswith("attn_q") else config.num_key_value_heads
                values = permuted(values, heads)
            if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
                values = values + 1
            self.tensors[f"{target}.{part}"] = values.contiguous().numpy()

    def add_tokenizer(self, folder: Path, pre: str = "gpt-2") -> None:
        """Write a directory's byte-level tokenizer as llama.cpp's converter does, rows without a token as padding."""
        described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        added = {token["id"]: token for token in described["added_tokens"]}
        by_id = {index: token for token, index in described["model"]["vocab"].items()}
        by_id.update({index: token["content"] for index, token in added.items()})
        tokens, types = [], []
        for index in range(self.config.vocab_size):
            if index not in by_id:
                tokens.append(f"[PAD{index}]")
                types.append(gguf.TokenType.UNUSED)
                continue
            tokens.append(by_id[index])
            special = index in added and added[index]["special"]
            defined = gguf.TokenType.USER_DEFINED if index in added else gguf.TokenType.NORMAL
            types.append(gguf.TokenType.CONTROL if special else defined)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
        self.keys |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [int(kind) for kind in types],
        }
        if merges:
            self.keys["tokenizer.ggml.merges"] = merges


def permuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of queries or keys as llama.cpp's `LlamaModel.permute`."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def llama_3_divisors(rope: dict[str, Any], size: int) -> np.ndarray:
    """Return rope_freqs as llama.cpp's `LlamaModel.generate_extra_tensors`, one frequency at a time."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    factors: list[Any] = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


def _value_types(key: str, value: Any) -> tuple[Any, ...]:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    kinds |= {str: gguf.GGUFValueType.STRING}
    if isinstance(value, list):
        inner = gguf.GGUFValueType.INT32 if key.endswith("token_type") else kinds[type(value[0])]
        return gguf.GGUFValueType.ARRAY, inner
    return (kinds[type(value)],)


def _random_blocks(name: str, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Return random blocks of a type that gguf-py only reads, their half-precision scales drawn to be small numbers."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(sum(map(ord, name)))
    blocks = generator.integers(0, 256, (math.prod(shape) // elements, size), dtype=np.uint8)
    scales = generator.uniform(0.001, 0.004, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    for places in _SCALES[kind]:
        blocks[:, places : places + 2] = scales[:, :2]
    return blocks.reshape(*shape[:-1], -1)


_SCALES: dict[Type, Iterable[int]] = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
