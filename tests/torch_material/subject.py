"""The modules under test, and torch's names for them.

LOGITLESS_TEST_SUBJECT=torch runs the same material against torch itself: what fails there is torch's own defect.
"""

import importlib
import os
import random
from functools import lru_cache
from typing import Any

import torch
import torch.nn
import torch.nn.functional
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

IS_TORCH = os.environ.get("LOGITLESS_TEST_SUBJECT", "logitless") == "torch"
F = importlib.import_module("torch.nn.functional" if IS_TORCH else "logitless.functional")
nn = importlib.import_module("torch.nn" if IS_TORCH else "logitless.nn")

FUNCTIONS = (
    "cross_entropy",
    "nll_loss",
    "kl_div",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cosine_similarity",
    "linear_cross_entropy",
)
MODULES = (
    "CrossEntropyLoss",
    "NLLLoss",
    "KLDivLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "LinearCrossEntropyLoss",
)
OPS = {
    op.formatted_name.removeprefix("nn_functional_"): op
    for op in op_db
    if op.name.startswith("nn.functional.") and op.name.removeprefix("nn.functional.") in FUNCTIONS
}
MODULE_INFOS = {info.name.removeprefix("nn."): info for info in module_db if info.name.removeprefix("nn.") in MODULES}


def function_of(op_name: str) -> Any:
    """The function under test for one of OPS."""
    return getattr(F, OPS[op_name].name.removeprefix("nn.functional."))


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)


@lru_cache(maxsize=16)
def op_samples(op_name: str, dtype: torch.dtype, requires_grad: bool = False) -> tuple[Any, ...]:
    seed()
    return tuple(OPS[op_name].sample_inputs("cpu", dtype, requires_grad=requires_grad))


@lru_cache(maxsize=16)
def module_samples(name: str, dtype: torch.dtype, requires_grad: bool = False) -> tuple[Any, ...]:
    seed()
    info = MODULE_INFOS[name]
    # Both modes of training are the same loss; torch's own tests draw them apart.
    return tuple(info.module_inputs_func(info, "cpu", dtype, requires_grad, True))
