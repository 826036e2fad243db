"""sentence-transformers' own losses, beside the same with ours in their places."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import contrastive_ranks
from logitless._heads import square
from test_lazy import NoTensorOf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    from sentence_transformers.sentence_transformer import losses as theirs
    from sentence_transformers.util import cos_sim, dot_score, manhattan_sim, pairwise_dot_score

    from logitless.integrations import sentence_transformers as ours

from tiny_sentences import WIDTH, sentences, tiny_model

ROWS = 37
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# The packages' own warnings, where a model is made, trained and stored.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(square, "TILE_ROWS", 16)
    monkeypatch.setattr(square, "TILE_COLUMNS", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return tiny_model(folder)


@pytest.fixture(scope="module")
def guide(folder: Path) -> Any:
    return tiny_model(folder, seed=1)


def columns(count: int, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(rows, WIDTH, generator=generator)
    near = [first + 0.7 * torch.randn(rows, WIDTH, generator=generator) for _ in range(count - 1)]
    made = [first, *near]
    made[1][5] = made[1][9]  # two texts that are the same
    return [x.to(dtype).requires_grad_() for x in made]


def held(mine: Callable[..., Tensor], true: Callable[..., Tensor], embeddings: list[Tensor], tolerance: float) -> None:
    """Hold values and gradients to the package's, with an upstream gradient.

    Logits up to 20 have 1e-6 of noise in float32, on both sides; the value is then held to 1e-6, and gradients to more.
    """
    results = []
    for function in (mine, true):
        leaves = [x.detach().clone().requires_grad_() for x in embeddings]
        value = function(leaves)
        results.append([value.detach(), *torch.autograd.grad(value * 1.7, leaves)])
    torch.testing.assert_close(results[0][0].double(), results[1][0].double(), rtol=min(tolerance, 1e-6), atol=0)
    for got, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert expected.abs().max() > 0
        error = (got.double() - expected.double()).abs().max().item()
        assert error <= tolerance * expected.abs().max().item(), (error, expected.abs().max().item())


RANKING: dict[str, dict[str, Any]] = {
    "default": {},
    "scale": {"scale": 5.0},
    "dot": {"scale": 0.3, "similarity_fct": dot_score},
    "symmetric": {"directions": FOUR[::2], "partition_mode": "per_direction"},
    "four": {"directions": FOUR},
    "joint of three": {"directions": FOUR[:3]},
    **{
        f"{mode}, {name}": {"hardness_mode": mode, "hardness_strength": 3.0, **more}
        for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
        for name, more in (("one direction", {}), ("four", {"directions": FOUR}))
    },
}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("option", RANKING)
def test_multiple_negatives_ranking(model: Any, option: str, count: int) -> None:
    arguments = RANKING[option]
    mine, true = (module.MultipleNegativesRankingLoss(model, **arguments) for module in (ours, theirs))
    assert isinstance(mine, theirs.MultipleNegativesRankingLoss)
    assert mine.get_config_dict() == true.get_config_dict()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-6)):
        held(
            lambda leaves: mine.compute_loss_from_embeddings(leaves, None),
            lambda leaves: true.compute_loss_from_embeddings(leaves, None),
            columns(count, dtype),
            tolerance,
        )


@pytest.mark.parametrize("option", RANKING)
def test_cached(model: Any, option: str) -> None:
    arguments = {**RANKING[option], "mini_batch_size": 8}
    mine, true = (module.CachedMultipleNegativesRankingLoss(model, **arguments) for module in (ours, theirs))
    assert mine.get_config_dict() == true.get_config_dict()
    embeddings = columns(3, torch.float64)
    split = [list(x.split(8)) for x in embeddings]
    held(
        lambda leaves: mine.calculate_loss([list(x.split(8)) for x in leaves]),
        lambda leaves: true.calculate_loss([list(x.split(8)) for x in leaves]),
        embeddings,
        1e-10,
    )
    leaves = [[part.detach().requires_grad_() for part in column] for column in split]
    found = []
    for loss in (mine, true):
        value = loss.calculate_loss(leaves, with_backward=True)
        assert not value.requires_grad
        found.append([part.grad for column in leaves for part in column])
        for column in leaves:
            for part in column:
                part.grad = None
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


def features(model: Any, count: int, rows: int = ROWS) -> list[dict[str, Tensor]]:
    return [dict(model.preprocess(sentences(rows, seed))) for seed in range(count)]


def through_the_model(
    model: Any, losses: list[Any], count: int, labels: Tensor | None = None, tolerance: float = 2e-5
) -> None:
    """Value and parameters' gradients of whole losses, from tokens on."""
    results = []
    for loss in losses:
        model.zero_grad()
        value = loss([dict(column) for column in features(model, count)], labels)
        (value * 1.7).backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 5
    torch.testing.assert_close(results[0][0], results[1][0].to(results[0][0].dtype), rtol=1e-6, atol=0)
    largest = max(x.abs().max().item() for x in results[1][1:])
    for got, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert (got - expected).abs().max().item() <= tolerance * max(expected.abs().max().item(), 1e-2 * largest)


def test_forward_from_tokens(model: Any) -> None:
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        through_the_model(model, [getattr(module, name)(model) for module in (ours, theirs)], 3)
    labels = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    through_the_model(model, [module.CoSENTLoss(model) for module in (ours, theirs)], 2, labels)


def test_matryoshka_wraps_ours(model: Any) -> None:
    for name, count in (
        ("MultipleNegativesRankingLoss", 3),
        ("CachedMultipleNegativesRankingLoss", 3),
        ("CoSENTLoss", 2),
    ):
        labels = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
        wrapped = [
            theirs.MatryoshkaLoss(model, getattr(module, name)(model), [16, 8, 4], [1, 0.5, 2])
            for module in (ours, theirs)
        ]
        through_the_model(model, wrapped, count, labels)


def test_adaptive_layers_wrap_ours(model: Any) -> None:
    wrapped = []
    for module in (ours, theirs):
        loss = module.MultipleNegativesRankingLoss(model)
        wrapped.append(theirs.AdaptiveLayerLoss(model, loss, n_layers_per_step=-1))
    through_the_model(model, wrapped, 2)


GUIDED: dict[str, dict[str, Any]] = {
    "default": {},
    "warmer": {"temperature": 0.2},
    "absolute": {"margin": 0.1, "temperature": 0.1},
    "relative": {"margin_strategy": "relative", "margin": 0.05, "temperature": 0.1},
    "a margin below": {"margin": -0.8, "temperature": 0.3},  # anchors see themselves
    "no anchors": {"contrast_anchors": False, "temperature": 0.1},
    "no positives": {"contrast_positives": False, "temperature": 0.1},
    "neither": {"contrast_anchors": False, "contrast_positives": False, "temperature": 0.1},
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("option", GUIDED)
def test_gist(model: Any, guide: Any, option: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [module.GISTEmbedLoss(model, guide, **GUIDED[option]) for module in (ours, theirs)]
    assert {**losses[0].get_config_dict(), "guide": None} == {**losses[1].get_config_dict(), "guide": None}
    embeddings = columns(count, torch.float64)
    guides = [x.detach() for x in columns(count, torch.float64)]
    guides = [x + 0.8 * torch.roll(x, 1, 0) for x in guides]
    guides[1][3] = guides[0][3]  # an anchor that the guide cannot tell from its positive
    guides[1][20] = guides[1][21]

    def given(loss: Any, leaves: list[Tensor]) -> Tensor:
        """A loss whose two models give these embeddings."""
        queue = [list(leaves), guides]
        for where in (
            "sentence_transformers.sentence_transformer.losses.gist_embed.embed_columns",
            "logitless.integrations.sentence_transformers.embed_columns",
        ):
            monkeypatch.setattr(where, lambda *_: queue.pop(0))
        return loss([{} for _ in leaves], None)

    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-6)):
        held(
            lambda leaves: given(losses[0], leaves),
            lambda leaves: given(losses[1], leaves),
            [x.to(dtype) for x in embeddings],
            tolerance,
        )


def test_gist_from_tokens_and_by_another_tokenizer(model: Any, guide: Any, folder: Path) -> None:
    other = tiny_model(folder, seed=2)
    other.max_seq_length = 8  # shorter than the model's: texts are tokenized again
    for guided, again in ((guide, False), (other, True)):
        losses = [module.GISTEmbedLoss(model, guided, temperature=0.1, margin=0.05) for module in (ours, theirs)]
        assert losses[0].must_retokenize is again
        through_the_model(model, losses, 3)
        through_the_model(model, [theirs.MatryoshkaLoss(model, loss, [16, 8]) for loss in losses], 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["graded", "binary", "of booleans"])
def test_cosent(model: Any, dtype: torch.dtype, kind: str) -> None:
    labels = torch.randint(6, (ROWS,), generator=torch.Generator().manual_seed(2)) / 5
    labels = labels if kind == "graded" else (labels > 0.5 if kind == "of booleans" else (labels > 0.5).float())
    mine, true = (module.CoSENTLoss(model, scale=7.0) for module in (ours, theirs))
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    held(
        lambda leaves: mine.compute_loss_from_embeddings(leaves, labels),
        lambda leaves: true.compute_loss_from_embeddings(leaves, labels),
        columns(2, dtype),
        tolerance,
    )
    mine, true = (module.CoSENTLoss(model, 0.2, pairwise_dot_score) for module in (ours, theirs))
    held(
        lambda leaves: mine.compute_loss_from_embeddings(leaves, labels),
        lambda leaves: true.compute_loss_from_embeddings(leaves, labels),
        columns(2, dtype),
        tolerance,
    )


def test_half_precision_embeddings_are_added_up_in_float32(model: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        embeddings = columns(3, dtype)
        loss = ours.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings, None)
        wide = [x.detach().double() for x in embeddings]
        exact = theirs.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(wide, None)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_nothing_of_the_matrix_is_built(model: Any) -> None:
    rows = 512
    embeddings = [torch.randn(rows, WIDTH, requires_grad=True) for _ in range(3)]
    with NoTensorOf(rows * rows // 8):
        ours.MultipleNegativesRankingLoss(model, directions=FOUR).compute_loss_from_embeddings(
            embeddings, None
        ).backward()
        cached = ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
        cached.calculate_loss([list(x.split(64)) for x in embeddings], with_backward=True)


def test_what_is_not_served_is_refused(model: Any) -> None:
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        kind = getattr(ours, name)
        with pytest.raises(
            ValueError, match=rf"{name}: similarity_fct must be cos_sim or dot_score.*got manhattan_sim"
        ):
            kind(model, similarity_fct=manhattan_sim)
        loss = kind(model)
        loss.similarity_fct = manhattan_sim
        with pytest.raises(ValueError, match="similarity_fct must be"):
            loss([dict(column) for column in features(model, 2)], None)
        kind(model, similarity_fct=cos_sim)
    with pytest.raises(ValueError, match="Scale must be a positive value"):
        ours.MultipleNegativesRankingLoss(model, scale=0.0)
    with pytest.raises(ValueError, match="at least 2 embeddings"):
        ours.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(columns(2)[:1], None)
    with pytest.raises(ValueError, match="expects 37 labels"):
        ours.CoSENTLoss(model).compute_loss_from_embeddings(columns(2), torch.rand(3))


def test_the_trainer_takes_the_same_steps(model: Any, tmp_path: Path) -> None:
    """Three steps of the package's own trainer, from the same start."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    data = Dataset.from_dict(
        {name: sentences(48, seed) for seed, name in enumerate(("anchor", "positive", "negative"))}
    )
    ends = []
    start = copy.deepcopy(model.state_dict())
    for module in (ours, theirs):
        model.load_state_dict(start)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            max_steps=3,
            learning_rate=1e-2,
            optim="sgd",  # Adam divides what is all but zero by itself
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=5,
        )
        loss = theirs.MatryoshkaLoss(model, module.MultipleNegativesRankingLoss(model), [16, 8])
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
        trainer.train()
        ends.append([p.detach().clone() for p in model.parameters()])
    moved = max((p - start[name]).abs().max().item() for name, p in model.named_parameters())
    assert moved > 1e-4
    for got, expected in zip(*ends, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * moved)


def test_gathered_across_devices() -> None:
    """Two processes of the package's own gather, which wants as many rows on each."""
    wrong = contrastive_ranks.run(2, pattern=contrastive_ranks.SENTENCES)
    assert not wrong, "\n".join(wrong.values())
