"""A directory is loaded whole or refused: no weight is left out, cast from a code, or taken from an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_models import Writer
from logitless.cli.errors import InputError
from logitless.cli.models import load_model, open_model, parse_model_name
from models import save_model


def load(path: Path) -> Any:
    return load_model(parse_model_name(str(path)))


def refusal(path: Path, *, early: bool = True) -> str:
    """Return the one line of a refusal, which needs no weights if it is to be early."""
    with pytest.raises(InputError) as error:
        open_model(parse_model_name(str(path))) if early else load(path)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert str(path) in line
    return line


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


CODES = {
    "I8": lambda weight: (weight * 100).to(torch.int8),
    "U8": lambda weight: (weight * 100).to(torch.uint8),
    "I64": lambda weight: (weight * 100).long(),
    "BOOL": lambda weight: weight > 0,
    "F8_E4M3": lambda weight: weight.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_without_a_method_are_no_weights(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: CODES[kind](weights[name])}))
    assert f"{name} is stored as {kind}, and no quantization_config says" in refusal(folder, early=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_are_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_model(tmp_path / "model")
    before = load(folder).network.state_dict()
    change_weights(folder, lambda weights: weights.update({n: w.to(dtype) for n, w in weights.items()}))
    after = load(folder).network.state_dict()
    for name, weight in before.items():
        assert torch.equal(after[name], weight.to(dtype).float()), name


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    change_config(folder, quantization_config={"quant_method": "nobody's", "bits": 8})
    assert 'quantised by "nobody\'s"' in refusal(folder)
    change_config(folder, quantization_config={"bits": 8})
    assert "quantised by None" in refusal(folder)


def test_a_method_whose_library_is_missing_says_so(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "cannot be loaded as a causal language model" in refusal(folder, early=False)


def test_more_weights_than_the_configuration_has_place_for_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "fewer-layers")
    change_config(folder, num_hidden_layers=1)
    assert "holds model.layers.1.input_layernorm.weight and 8 more, which the model" in refusal(folder, early=False)
    folder = save_model(tmp_path / "extra")
    change_weights(folder, lambda weights: weights.update({"model.layers.0.gate": torch.ones(3)}))
    assert "holds model.layers.0.gate, which the model" in refusal(folder, early=False)
    folder = save_model(tmp_path / "biases")
    change_weights(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}))
    assert "holds model.layers.0.mlp.up_proj.bias, which" in refusal(folder, early=False)


def test_a_head_of_its_own_is_used_in_a_model_configured_to_share_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=True)
    head = torch.randn(257, 32)
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": head}))
    loaded = load(folder)
    assert torch.equal(loaded.head.weight, head)
    assert not torch.equal(loaded.network.get_input_embeddings().weight, head)


def test_other_shapes_than_configured_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    change_config(folder, intermediate_size=40)
    line = refusal(folder, early=False)
    assert "has shape (32, 48) where its configuration asks for (32, 40)" in line
    assert "above" not in line


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert "misses weights of one: nothing in it for model.norm.weight" in refusal(folder, early=False)


def test_an_adapter_beside_the_weights_is_refused_whether_or_not_peft_is_there(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    alone = tmp_path / "alone"
    alone.mkdir()
    for place in (folder, alone):
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        save_file({"base_model.model.lora_A.weight": torch.ones(2, 32)}, place / "adapter_model.safetensors")
    assert "holds an adapter (adapter_config.json) beside its weights; merge it" in refusal(folder)
    with pytest.raises(InputError, match=r"holds no config\.json, so it is .* only an adapter: merge it into its base"):
        parse_model_name(str(alone))
    change_config(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert "holds no weights (model.safetensors), only an adapter: merge it into its base" in refusal(folder)


def test_two_models_in_one_directory_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "holds two models, model.safetensors and that of model.safetensors.index.json" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert torch.equal(load(folder).head.weight, weights["lm_head.weight"])
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert "misses model-00001-of-00001.safetensors, which model.safetensors.index.json lists" in refusal(folder)


def test_weights_saved_by_torch_load_and_their_codes_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(load(folder).head.weight, weights["lm_head.weight"])
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    torch.save(weights, folder / "pytorch_model.bin")
    assert "model.norm.weight is stored as int8" in refusal(folder, early=False)
    torch.save({"model": weights}, folder / "pytorch_model.bin")
    assert "holds something else than named tensors" in refusal(folder)


def test_stacks_of_matrices_are_not_rounded_in_silence(tmp_path: Path) -> None:
    from logitless.cli.networks import transformers

    folder = save_model(tmp_path / "model")
    config = transformers.MixtralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_local_experts = 2
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    load(folder)
    with pytest.raises(InputError, match=r"cannot be rounded to int8: its weight .* is a stack of matrices"):
        load_model(parse_model_name(f"{folder}:int8"))


def test_matrices_kept_the_other_way_round_are_rounded_along_their_inputs(tmp_path: Path) -> None:
    from logitless.cli.networks import transformers
    from logitless.cli.rounding import round_weight

    folder = save_model(tmp_path / "model")
    config = transformers.GPT2Config(vocab_size=257, n_embd=40, n_layer=1, n_head=2, tie_word_embeddings=False)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    weight = load(folder).network.transformer.h[0].mlp.c_fc.weight
    rounded = load_model(parse_model_name(f"{folder}:int4")).network.transformer.h[0].mlp.c_fc.weight
    assert weight.shape == (40, 160)
    assert torch.equal(rounded, round_weight(weight.T.contiguous(), "int4").T)


def test_a_model_without_a_vocabulary_is_no_language_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "is no language model: its config.json gives no vocab_size" in refusal(folder)


def test_names_lead_to_what_is_meant(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")

    def said(path: object) -> str:
        with pytest.raises(InputError) as error:
            open_model(parse_model_name(str(path)))
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    assert "only local paths are read: fetch it with hf download org/model-7B" in said("org/model-7B")
    assert "neither a Hugging Face directory nor a .gguf file; name the directory it is in" in said(
        folder / "model.safetensors"
    )
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert "a link to" in said(tmp_path / "gone")
    files = tmp_path / "files"
    files.mkdir()
    Writer(folder).write(files / "model.gguf")
    assert f"it holds {files / 'model.gguf'}: name that" in said(files)
    (files / "config.json").write_text((folder / "config.json").read_text())
    assert f"holds no weights (model.safetensors), only GGUF: name the file, {files / 'model.gguf'}" in said(files)
    cache = tmp_path / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / "0123").symlink_to(folder)
    assert f"it holds {cache / 'snapshots' / '0123'}: name that" in said(cache)
    assert parse_model_name(str(cache / "snapshots" / "0123")).label == "0123"
