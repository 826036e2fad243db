"""Steps of TRL's trainers on a tiny Llama in memory, by TRL's own losses and by ours.

`python tests/trl_steps.py` prints one table: how far what is logged and the gradients lie apart, and what each took
beyond its model, by the operating system.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from typing import Any

from torch import Tensor

from lazy_trainers import tiny_llama

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

TRAINERS = ("sft", "sft smoothed", "sft weighted", "dpo", "grpo", "grpo tempered", "distillation", "gkd")
STEPS = 2


def tokenizer(classes: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(classes - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def model_of(classes: int, width: int, seed: int) -> Any:
    sizes = {"vocab_size": classes, "hidden_size": width, "intermediate_size": 2 * width}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return tiny_llama(seed, max_position_embeddings=1024, **sizes, **tokens)


def trainer_of(name: str, folder: str, classes: int, width: int, length: int, rows: int) -> Any:
    """Return a trainer whose two steps are the same each time it is made."""
    import trl
    from datasets import Dataset

    draw = random.Random(4)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(classes - 3)}" for _ in range(words))

    common: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": rows,
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "optim": "sgd",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    count = 2 * rows * STEPS
    model, other = model_of(classes, width, 7), model_of(classes, width, 8)
    parts: dict[str, Any] = {"model": model, "processing_class": tokenizer(classes)}
    half = max(2, length // 2)
    kind, _, variant = name.partition(" ")
    if kind == "sft":
        data = Dataset.from_dict({"text": [text(draw.randrange(half, length)) for _ in range(count)]})
        if variant == "smoothed":
            common["label_smoothing_factor"] = 0.1
        if variant == "weighted":
            common["loss_type"] = "dft"
        return trl.SFTTrainer(train_dataset=data, args=trl.SFTConfig(max_length=length, **common), **parts)
    if kind == "dpo":
        sides = {side: [text(draw.randrange(half, length)) for _ in range(count)] for side in ("chosen", "rejected")}
        data = Dataset.from_dict({"prompt": [text(3) for _ in range(count)], **sides})
        args = trl.DPOConfig(max_length=length, **common)
        return trl.DPOTrainer(ref_model=other, train_dataset=data, args=args, **parts)
    prompts = Dataset.from_dict({"prompt": [text(half) for _ in range(count)]})
    if kind == "grpo":
        other.save_pretrained(f"{folder}/start")
        parts["model"] = type(other).from_pretrained(f"{folder}/start")  # its own reference is read from there
        options = {"temperature": 0.7} if variant == "tempered" else {}
        args = trl.GRPOConfig(num_generations=2, max_completion_length=half, beta=0.1, **options, **common)

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(sum(map(ord, text)) % 7) for text in completions]

        return trl.GRPOTrainer(train_dataset=prompts, reward_funcs=reward, args=args, **parts)
    if kind == "distillation":
        args = trl.DistillationConfig(max_completion_length=half, beta=0.3, **common)
        return trl.DistillationTrainer(teacher_model=other, train_dataset=prompts, args=args, **parts)
    assert kind == "gkd", name
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    roles = [{"role": "user", "content": text(half)}, {"role": "assistant", "content": text(half)}]
    data = Dataset.from_dict(
        {"messages": [[dict(roles[0]), {**roles[1], "content": text(half)}] for _ in range(count)]}
    )
    args = GKDConfig(max_length=2 * length, lmbda=0.0, beta=0.3, max_new_tokens=half, **common)
    return GKDTrainer(teacher_model=other, train_dataset=data, args=args, **parts)


def step(name: str, ours: bool, sizes: dict[str, int], guard: Any = None) -> dict[str, Any]:
    """Train, and return what was logged and each step's gradients."""
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback

    import logitless as ll

    gradients: list[dict[str, Tensor]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients.append({key: weight.grad.clone() for key, weight in model.named_parameters()})

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        # Trainers share what they know of devices with whatever asks for it next.
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        made = trainer_of(name, folder, **sizes)
        if ours:
            from logitless.integrations import trl as integration

            stack.enter_context(integration.install())
            if name in ("gkd", "sft smoothed"):  # which ask their models for logits
                stack.enter_context(ll.lazy_head(made.model))
            if name == "gkd":
                stack.enter_context(ll.lazy_head(made.teacher_model))
            warnings.simplefilter("error", ll.MaterializeWarning)
            # For its metrics TRL's smoothed loss scores once more, by way of the head's weight.
            warnings.filterwarnings("ignore", "lazy_head: a forward", ll.MaterializeWarning)
        made.add_callback(Keep())
        if guard is not None:
            stack.enter_context(guard)
        made.train()
        logs = [entry for entry in made.state.log_history if "loss" in entry]
        return {"logs": logs, "gradients": gradients}


def apart(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return how far what was logged lies apart, and the gradients, relative to the largest of each."""
    logged = far = 0.0
    for mine, theirs in zip(one["logs"], other["logs"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"step_time", "epoch", "step"}:
            logged = max(logged, abs(mine[key] - theirs[key]) / max(1.0, abs(mine[key])))
    assert len(one["gradients"]) == STEPS
    for mine, theirs in zip(one["gradients"], other["gradients"], strict=True):
        largest = max(float(grad.abs().max()) for grad in mine.values())
        assert largest > 0
        far = max(far, *(float((grad - theirs[key]).abs().max()) / largest for key, grad in mine.items()))
    return logged, far


def peak(name: str, ours: bool, sizes: dict[str, int]) -> int:
    """Return how far resident memory rose in training, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, json.dumps([name, ours, sizes])]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return int(out.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print the table, or the peak of one process."""
    if len(sys.argv) > 1:
        from logitless._bench.memory import call_and_growth

        name, ours, sizes = json.loads(sys.argv[1])
        step(name, ours, {**sizes, "length": 8, "rows": 2})  # what is loaded once
        _, growth = call_and_growth(lambda: step(name, ours, sizes))
        print(growth)
        return
    small = {"classes": 499, "width": 8, "length": 16, "rows": 2}
    large = {"classes": 32000, "width": 16, "length": 512, "rows": 4}
    print("| trainer | what is logged apart | gradients apart | peak, TRL's own | peak, ours |\n|---|---|---|---|---|")
    for name in TRAINERS:
        loss, far = apart(step(name, False, small), step(name, True, small))
        before, after = (peak(name, ours, large) >> 20 for ours in (False, True))
        print(f"| {name} | {loss:.1e} | {far:.1e} | {before} MB | {after} MB |", flush=True)


if __name__ == "__main__":
    main()
