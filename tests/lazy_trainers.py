"""transformers' Trainer on a tiny Llama with a lazy head, beside the same with a dense head, in several processes.

`run(world)` starts the processes once; each trains every case twice and compares losses, metrics and weights.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import Dataset

import logitless as ll
from lazy_wrappers import meet

CLASSES = 97
STEPS = 3
Run = dict[str, Any]


class Rows(Dataset[dict[str, Tensor]]):
    """Token ids and labels; of the rows that are named nothing is supervised."""

    def __init__(self, rows: int, unsupervised: tuple[int, ...] = ()) -> None:
        draw = torch.Generator().manual_seed(4)
        self.ids = torch.randint(0, CLASSES, (rows, 9), generator=draw)
        self.labels = self.ids.clone()
        self.labels[:, :2] = -100
        self.labels[1::3, 5:] = -100
        self.labels[list(unsupervised)] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[row],
            "labels": self.labels[row],
            "attention_mask": torch.ones_like(self.ids[row]),
        }


def tiny_llama(seed: int = 7, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": CLASSES,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def _metrics(found: Any) -> dict[str, float]:
    logits, labels = found
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    kept = labels[:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[kept]
    return {"accuracy": float(right.float().mean()), "spread": float(logits.std()), "rows": float(len(labels))}


CASES: dict[str, Run] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "no supervised token": {"gradient_accumulation_steps": 2, "unsupervised": tuple(range(12))},
    "nothing supervised at all": {"unsupervised": tuple(range(24))},
    "checkpoints": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": True,
    },
    "tied and clipped": {"tied": True, "max_grad_norm": 0.1},
    "bfloat16": {"bf16": True},
    "LoRA on the head, put on afterwards": {"adapter": {}},
    "DoRA on the head, put on afterwards": {"adapter": {"use_dora": True}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_accumulation_steps": 2},
    "eval in pieces": {"eval_accumulation_steps": 1},
}


def _train(case: Run, folder: str, lazily: bool) -> dict[str, Any]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    case = dict(case)
    unsupervised, tied, adapter = case.pop("unsupervised", ()), case.pop("tied", False), case.pop("adapter", None)
    args = TrainingArguments(
        output_dir=folder,
        **{
            "use_cpu": True,
            "ddp_backend": "gloo",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
            "dataloader_pin_memory": False,
            **case,
        },
    )
    model = tiny_llama(tie_word_embeddings=tied)
    if lazily:
        ll.lazy_head(model)
    if adapter is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        targets = ["lm_head", "q_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **adapter))
    rows = Rows(24, unsupervised)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=Rows(10), compute_metrics=_metrics)
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.MaterializeWarning)  # the metrics ask for all logits
        trainer.train()
        evaluated = trainer.evaluate()
        predicted = trainer.predict(Rows(5))
    kept = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_spread")
    history = [{k: v for k, v in entry.items() if k in kept} for entry in trainer.state.log_history]
    return {
        "history": [x for x in history if x],
        "evaluated": {k: v for k, v in evaluated.items() if k in kept},
        "predicted": torch.as_tensor(predicted.predictions),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def compare(case: Run, folder: str) -> None:
    """Train twice and hold the lazy head's run to the dense head's."""
    dense, lazy = (_train(case, folder, lazily) for lazily in (False, True))
    losses = [entry["loss"] for entry in dense["history"] if "loss" in entry]
    assert len(losses) == STEPS
    assert len(set(losses)) == STEPS or case.get("unsupervised") == tuple(range(24)), "the dense run did not train"
    assert all(p.isfinite().all() for p in lazy["weights"].values()), "the lazy head's run destroyed weights"
    if case.get("bf16"):  # rounded differently, both are as far from the run in float32
        truth = _train({**case, "bf16": False}, folder, lazily=False)["weights"]
        errors = [
            sum(float((run["weights"][name] - p).square().sum()) for name, p in truth.items()) ** 0.5
            for run in (dense, lazy)
        ]
        assert 0 < errors[1] <= 1.25 * errors[0], errors
    else:
        torch.testing.assert_close(lazy, dense, equal_nan=True, rtol=2e-4, atol=1e-5)


def _process(rank: int, world: int, names: list[str], folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meet(rank, world, f"{folder}/group", seconds=600)  # one may wait while the other compiles
    for name in names:
        wrong = ""
        try:
            compare(CASES[name], f"{folder}/{name}")
        except Exception:
            wrong = traceback.format_exc()[-4000:]
        (Path(folder) / f"{name}-{rank}.txt").write_text(wrong)
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


def run(world: int, pattern: str = "") -> dict[str, str]:
    """Train every case in `world` processes; give what went wrong, by case."""
    names = [name for name in CASES if pattern in name]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_process, (world, names, folder), nprocs=world, join=False, start_method="spawn")
        ended = ""
        try:
            while not context.join():
                pass
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        wrong = {}
        for name in names:
            said = [Path(folder) / f"{name}-{rank}.txt" for rank in range(world)]
            texts = [p.read_text() if p.exists() else f"did not end: {ended}" for p in said]
            if any(texts):
                wrong[name] = next(filter(None, texts))
        return wrong


if __name__ == "__main__":
    import sys

    for name, text in run(int(sys.argv[1]), " ".join(sys.argv[2:])).items():
        sys.stdout.write(f"--- {name}\n{text[-1500:]}\n")
