"""A GGUF file is the model of the directory it was made from, to the last bit, or it is refused by the key's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_models import Type, Writer
from logitless.cli.errors import InputError
from logitless.cli.models import load_model, parse_model_name
from models import byte_tokenizer, save_model

LONG = {"max_position_embeddings": 512}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-untied": ("Llama", {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 8}),
    "llama-3.1": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "llama-3.2": (
        "Llama",
        {
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2-yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0}
        | {"attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3",
        {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    ),
    "gemma3-linear": (
        "Gemma3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": 8, "partial_rotary_factor": 1.0}),
    "phi3-longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.02, 1.05, 1.1, 1.3, 1.9],
                "long_factor": [1.08, 1.25, 2.5, 4.7, 9.1, 30.3],
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


def exact_norms(model: Any) -> None:
    """Draw every weight; those of norms so that adding one and taking it back leaves them, as bfloat16 ones do."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.randint(-64, 65, parameter.shape) / 128)
        assert parameter.abs().sum() > 0, name


def save_family(folder: Path, family: str, **more: Any) -> Path:
    kind, config = FAMILIES[family]
    return save_model(folder, kind, change=exact_norms, **(LONG | config | more))


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    network = load_model(parse_model_name(str(path))).network
    with torch.no_grad():
        found: torch.Tensor = network(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_is_its_directory(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / "model", family)
    file = Writer(folder).write(tmp_path / "model.gguf")
    ids = torch.randint(0, 257, (1, 120))
    expected = logits(folder, ids)
    assert torch.equal(logits(file, ids), expected)
    # The window, the scaling and the caps of each family change these logits: a loader without them would show.
    assert expected.abs().max() > 0.1


TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
TYPES = (*TYPES, "IQ4_XS", "TQ2_0", "MXFP4")


@pytest.mark.parametrize("kind", TYPES)
def test_a_quantised_gguf_file_is_the_directory_of_its_rounded_weights(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128, "num_hidden_layers": 1}
    folder = save_model(tmp_path / "model", initializer_range=0.02, **sizes)
    writer = Writer(folder, lambda name: getattr(Type, kind))
    file = writer.write(tmp_path / "model.gguf")

    def rounded(model: Any) -> None:
        values = writer.stored_values()
        for name, parameter in model.named_parameters():
            stored = torch.from_numpy(np.array(values[gguf_name(name)])).reshape(parameter.shape)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = 2 if "q_proj" in name else 1
                stored = stored.reshape(heads, -1, 2, 256).swapaxes(1, 2).reshape(parameter.shape)
            parameter.copy_(stored)

    other = save_model(tmp_path / "rounded", change=rounded, initializer_range=0.02, **sizes)
    ids = torch.randint(0, 257, (1, 40))
    found = logits(file, ids)
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(other, ids))


def gguf_name(parameter: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    module, _, part = parameter.rpartition(".")
    return f"{names.get_name(module)}.{part}"


def test_the_parts_of_a_split_file_are_joined(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    writer = Writer(folder)
    whole, first = writer.write(tmp_path / "whole.gguf"), writer.write(tmp_path / "split.gguf", parts=3)
    assert first.name == "split-00001-of-00003.gguf"
    ids = torch.randint(0, 257, (1, 40))
    assert torch.equal(logits(first, ids), logits(whole, ids))
    one, other = (load_model(parse_model_name(str(path))).digest for path in (first, whole))
    assert one != other
    second = tmp_path / "split-00002-of-00003.gguf"
    with pytest.raises(InputError, match=r"later part of a split model: name the first, split-00001-of-00003\.gguf"):
        load_model(parse_model_name(str(second)))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(InputError, match=r"split-00002-of-00003\.gguf is not beside it"):
        load_model(parse_model_name(str(first)))
    second.write_bytes((tmp_path / "split-00003-of-00003.gguf").read_bytes())
    with pytest.raises(InputError, match=r"is not part 2 of 3: it says split\.no 2"):
        load_model(parse_model_name(str(first)))
    second.write_bytes(content)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"is one of 3 parts of a split model"):
        load_model(parse_model_name(str(renamed)))


def test_other_frequencies_than_llama_3s_divide_the_rotary_embedding(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", **LONG)
    writer = Writer(folder)
    divisors = torch.linspace(1.0, 5.0, 8)
    writer.tensors["rope_freqs.weight"] = divisors.numpy()
    ids = torch.randint(0, 257, (1, 100))
    found = logits(writer.write(tmp_path / "model.gguf"), ids)
    network = load_model(parse_model_name(str(folder))).network
    rotary = network.model.rotary_emb
    rotary.inv_freq.copy_(1 / (10000 ** (torch.arange(8) / 8)) / divisors)
    with torch.no_grad():
        expected = network(input_ids=ids, use_cache=False).logits
    assert not torch.equal(found, logits(folder, ids))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_bias_among_others_is_zero(tmp_path: Path) -> None:
    def without_output_bias(model: Any) -> None:
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias.normal_()
            layer.self_attn.o_proj.bias.zero_()

    folder = save_model(tmp_path / "model", attention_bias=True, change=without_output_bias)
    writer = Writer(folder)
    for layer in range(2):
        del writer.tensors[f"blk.{layer}.attn_output.bias"]
    ids = torch.randint(0, 257, (1, 40))
    assert torch.equal(logits(writer.write(tmp_path / "model.gguf"), ids), logits(folder, ids))


def with_key(name: str, value: Any) -> Callable[[Writer], None]:
    return lambda writer: writer.key(name, value)


def with_tensor(name: str, values: Any) -> Callable[[Writer], None]:
    return lambda writer: writer.tensors.update({name: np.asarray(values)})


def without(key: str) -> Callable[[Writer], None]:
    return lambda writer: writer.keys.pop(f"{writer.architecture}.{key}")


def with_general(key: str, value: Any) -> Callable[[Writer], None]:
    return lambda writer: writer.keys.update({key: value})


FLOATS = np.ones(8, np.float32)
REFUSED: dict[str, tuple[str, Callable[[Writer], Any], str]] = {
    "an unknown key": ("llama", with_key("residual_scale", 0.5), r"metadata key llama\.residual_scale is not"),
    "experts": ("llama", with_key("expert_count", 8), r"llama\.expert_count is 8, and only 0"),
    "a scaling of another kind": ("qwen2", with_key("rope.scaling.type", "ntk"), r"rope\.scaling\.type is 'ntk'"),
    "longrope without factors": ("llama", with_key("rope.scaling.type", "longrope"), r"type is 'longrope'"),
    "a factor on attention": ("qwen2", with_key("rope.scaling.attn_factor", 1.2), r"rope\.scaling\.attn_factor"),
    "yarn's own factor": ("llama", with_key("rope.scaling.yarn_attn_factor", 2.0), r"rope\.scaling\.yarn_attn_factor"),
    "part of a head turned": ("qwen2", with_key("rope.dimension_count", 8), r"dimension_count is 8, and only 16"),
    "a window under qwen2": ("qwen2", with_key("attention.sliding_window", 64), r"qwen2\.attention\.sliding_window"),
    "another size of values": ("llama", with_key("attention.value_length", 8), r"value_length is 8, and only 16"),
    "another window pattern": ("gemma3", with_key("attention.sliding_window_pattern", 4), r"pattern is 4, and only 6"),
    "heads by layer": ("llama", with_key("attention.head_count", [2, 2]), r"attention\.head_count is \[2, 2\]"),
    "no end of layers": ("qwen3", with_key("block_count", 4_000_000_000), r"is 4000000000, and it holds"),
    "one kind of factors": (
        "phi3-longrope",
        lambda writer: writer.tensors.pop("rope_factors_short.weight"),
        r"rope_factors_short\.weight is missing, or has not 6",
    ),
    "factors of another size": (
        "phi3-longrope",
        with_tensor("rope_factors_long.weight", FLOATS),
        r"rope_factors_long\.weight is missing, or has not 6 values",
    ),
    "a missing tensor": (
        "llama",
        lambda writer: writer.tensors.pop("blk.1.ffn_up.weight"),
        r"nothing in it for model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "no heads": ("llama", with_key("attention.head_count", 0), r"describes no model|makes no Llama"),
    "a tensor too many": (
        "llama",
        with_tensor("blk.0.attn_sinks.weight", FLOATS),
        r"tensor blk\.0\.attn_sinks",
    ),
    "a layer too many": ("llama", with_key("block_count", 1), r"holds blk\.1\.\w+\.weight and \d+ more, which"),
    "a layer too few": ("llama", with_key("block_count", 3), r"block_count is 3, and it holds the weights of 2"),
    "frequencies elsewhere": ("qwen2", with_tensor("rope_freqs.weight", FLOATS), r"tensor rope_freqs\.weight is none"),
    "frequencies of another size": ("llama", with_tensor("rope_freqs.weight", FLOATS[:4]), r"shape \(4,\), not 8"),
    "integers": ("llama", with_tensor("output_norm.weight", np.ones(32, np.int32)), r"output_norm\.weight holds int"),
    "another shape": (
        "llama",
        with_tensor("output_norm.weight", FLOATS),
        r"output_norm\.weight has shape \(8,\)",
    ),
    "no embedding": ("llama", lambda writer: writer.tensors.pop("token_embd.weight"), r"no tensor token_embd\.weight"),
    "no width": ("llama", without("embedding_length"), r"metadata llama\.embedding_length is missing"),
    "an adapter": ("llama", with_general("general.type", "adapter"), r"a LoRA adapter; merge it into its base"),
    "a projector": ("llama", with_general("general.type", "mmproj"), r"it holds the projector"),
    "an unknown splitting rule": ("llama", with_general("tokenizer.ggml.pre", "none's"), r"pre is \"none's\", whose"),
    "no splitting rule": ("llama", lambda writer: writer.keys.pop("tokenizer.ggml.pre"), r"ggml\.pre is missing"),
    "another kind of tokenizer": ("llama", with_general("tokenizer.ggml.model", "bert"), r"model is 'bert'; gpt2 and"),
    "a normaliser": ("llama", with_general("tokenizer.ggml.precompiled_charsmap", "x"), r"precompiled_charsmap is not"),
    "no tokens": ("llama", lambda writer: writer.keys.pop("tokenizer.ggml.tokens"), r"holds no tokenizer"),
    "types for fewer tokens": ("llama", with_general("tokenizer.ggml.token_type", [1, 1]), r"2 entries for 257 tokens"),
    "a merge of no tokens": ("llama", with_general("tokenizer.ggml.merges", ["a bcd"]), r"'a bcd', which is no merge"),
    "a beginning that is none": ("llama", with_general("tokenizer.ggml.bos_token_id", 999), r"is 999, of 257 tokens"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, change: str) -> None:
    family, apply, message = REFUSED[change]
    writer = Writer(save_family(tmp_path / "model", family))
    apply(writer)
    file = writer.write(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=message) as error:
        load_model(parse_model_name(str(file)))
    assert len(str(error.value).splitlines()) == 1
    assert str(file) in str(error.value)


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    writer = Writer(save_model(tmp_path / "model"))
    writer.architecture = "mamba"
    file = writer.write(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="architecture 'mamba' is not one that is read from GGUF"):
        load_model(parse_model_name(str(file)))


def test_a_link_is_the_file_it_points_to(tmp_path: Path) -> None:
    one, other = (save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    store, use = tmp_path / "store", tmp_path / "use"
    store.mkdir()
    use.mkdir()
    Writer(one).write(store / "current.gguf")
    Writer(other).write(store / "v2.gguf")
    (use / "current.gguf").symlink_to("../store/v2.gguf")
    ids = torch.randint(0, 257, (1, 40))
    assert torch.equal(logits(use / "current.gguf", ids), logits(other, ids))
    # Hugging Face's cache: a link whose target has a digest for its name.
    (store / "v2.gguf").rename(store / "0123abcd")
    (use / "current.gguf").unlink()
    (use / "current.gguf").symlink_to("../store/0123abcd")
    name = parse_model_name(str(use / "current.gguf"))
    assert name.label == "current"
    assert torch.equal(logits(use / "current.gguf", ids), logits(other, ids))
    assert torch.equal(logits(store / "0123abcd", ids), logits(other, ids))


def test_another_tokenizer_beside_a_gguf_file_is_not_used(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    file = Writer(folder).write(folder / "model.gguf")
    (folder / "tokenizer.json").write_text("{}")
    assert load_model(parse_model_name(str(file))).tokenizer.encoded("ab").ids == byte_tokenizer()("ab")["input_ids"]
