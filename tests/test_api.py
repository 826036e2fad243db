"""Promises about the public names that prose would forget."""

import importlib
import inspect
from pathlib import Path

import pytest

import logitless as ll
from logitless import functional, nn

ROOT = Path(__file__).parent.parent
PUBLIC = [
    *(f"logitless.{name}" for name in ll.__all__ if name not in ("functional", "nn")),
    *(f"logitless.functional.{name}" for name in functional.__all__),
    *(f"logitless.nn.{name}" for name in nn.__all__),
]


def resolve(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_name_has_a_place_on_the_api_page(path: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"\n::: {path}\n" in page


@pytest.mark.parametrize("path", [path for path in PUBLIC if inspect.isfunction(resolve(path))])
def test_every_public_function_states_its_contract_and_shows_a_run(path: str) -> None:
    text = inspect.getdoc(resolve(path)) or ""
    assert "Equals" in text
    assert ">>> " in text


def test_a_module_passes_on_every_option_of_its_function() -> None:
    pairs = {
        nn.CrossEntropyLoss: functional.cross_entropy,
        nn.NLLLoss: functional.nll_loss,
        nn.KLDivLoss: functional.kl_div,
        nn.BCELoss: functional.binary_cross_entropy,
        nn.BCEWithLogitsLoss: functional.binary_cross_entropy_with_logits,
        nn.CosineEmbeddingLoss: functional.cosine_embedding_loss,
        nn.CosineSimilarity: functional.cosine_similarity,
        nn.LinearCrossEntropyLoss: functional.linear_cross_entropy,
        nn.InfoNCELoss: ll.info_nce,
        nn.SupConLoss: ll.supcon_loss,
        nn.CoSENTLoss: ll.cosent_loss,
        nn.BatchTripletLoss: ll.batch_triplet_loss,
    }
    tensors = {
        "query",
        "key",
        "negatives",
        "negatives_mask",
        "positives",
        "guide",
        "features",
        "scores",
        "labels",
        "mask",
    }
    tensors |= {"input", "target", "input1", "input2", "x1", "x2", "linear_weight", "linear_bias"}
    for module, function in pairs.items():
        wanted = set(inspect.signature(function).parameters) - tensors
        assert wanted <= set(inspect.signature(module).parameters), module.__name__


def test_importing_the_package_imports_none_of_the_command_lines_libraries() -> None:
    import subprocess
    import sys

    libraries = ("typer", "transformers", "plotly", "pyarrow", "mpmath")
    code = f"import sys, logitless; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
