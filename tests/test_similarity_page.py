"""The page docs/similarity.md runs, builds no matrix of similarities, and its losses are what it says."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import contrastive_oracles as oracle
from logitless._heads import square
from test_lazy import NoTensorOf
from test_ranking import cosent

PAGE = Path(__file__).parent.parent / "docs" / "similarity.md"
PAIRS = 1024


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Run the page under the guard; its names."""
    names: dict[str, Any] = {}
    text = PAGE.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), NoTensorOf(PAIRS * PAIRS // 4):
        patch.setattr(square, "TILE_ROWS", 128)
        patch.setattr(square, "TILE_COLUMNS", 128)
        warnings.simplefilter("error")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            above = text[: block.start(1)].count("\n")  # so that a failure names its line of the page
            exec(compile("\n" * above + block[1], str(PAGE), "exec"), names)
    return names


def near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.detach().double(), expected.detach(), rtol=2e-6, atol=0)


def test_every_loss_of_the_page(page: dict[str, Any]) -> None:
    query, key, topics = page["query"].detach().double(), page["key"].detach().double(), page["topics"]
    same = topics[:, None] == topics
    four = {"directions": page["four"]}
    both = {"directions": ("query_to_doc", "doc_to_query"), "apart": True}
    expected = {
        "loss": oracle.info_nce(query, key, 1 / 0.07),
        "with_negatives": oracle.info_nce(
            query, key, 1 / 0.07, negatives=page["negatives"].double(), present=page["present"]
        ),
        "by_topic": oracle.info_nce(query, key, 1 / 0.07, positive=same),
        "by_margin": oracle.info_nce(query, key, 1 / 0.07, margin=0.1),
        "by_guide": oracle.info_nce(query, key, 1 / 0.07, guide=[each.double() for each in page["guide"]]),
        "improved": oracle.info_nce(query, key, 20.0, **four),
        "symmetric": oracle.info_nce(query, key, 20.0, **both),
    }
    for name, losses in expected.items():
        near(page[name], losses.mean())
    image, text = oracle.units(query), oracle.units(key)
    near(page["clip"], oracle.clip(image, text, 1 / 0.07))
    near(page["clip_of_all"], oracle.clip(image, text, 14.0))
    near(page["of_all"], oracle.info_nce(query, key, 20.0).mean())
    near(page["siglip"], oracle.siglip(image, text, 10.0, -10.0))
    every = topics.repeat(2)
    positive = (every[:, None] == every) & ~torch.eye(len(every), dtype=torch.bool)
    near(page["supcon"], oracle.supcon(torch.cat([image, text]), positive, 0.07, len(every)).mean())
    assert page["log_temperature"].grad.item() != 0
    assert page["hard"] > page["every"] > 0


def test_cosent_and_cosines_of_the_page(page: dict[str, Any]) -> None:
    torch.manual_seed(3)
    labels = torch.rand(PAIRS)
    near(page["ll"].cosent_loss(page["scores"], labels), cosent(page["scores"].detach().double(), labels, 20.0))
    units = [oracle.units(page[name].detach().double()) for name in ("query", "key")]
    torch.testing.assert_close(page["cosines"].detach().double(), units[0][:100] @ units[1][:90].T, rtol=0, atol=4e-7)
