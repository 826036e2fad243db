"""Names, signatures, deprecated arguments, repr, state and pickles are torch's; what is new is keyword-only."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional
from subject import FUNCTIONS, IS_TORCH, MODULES, F, nn

# cosine_similarity is a builtin without a signature; its documentation pins this one.
BUILTIN = {"cosine_similarity": "(x1, x2, dim=1, eps=1e-8)"}


def parameters(thing: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(thing).parameters.values()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_signature(name: str) -> None:
    if name in BUILTIN:
        namespace: dict[str, Any] = {}
        exec(f"def theirs{BUILTIN[name]}: ...", namespace)
        theirs = parameters(namespace["theirs"])
        if IS_TORCH:
            return
    else:
        theirs = parameters(getattr(torch.nn.functional, name))
    ours = parameters(getattr(F, name))
    assert ours[: len(theirs)] == theirs
    assert all(
        kind == inspect.Parameter.KEYWORD_ONLY and default is not inspect.Parameter.empty
        for _, kind, default in ours[len(theirs) :]
    )


@pytest.mark.parametrize("name", MODULES)
def test_constructor_signature(name: str) -> None:
    theirs, ours = (parameters(getattr(namespace, name).__init__) for namespace in (torch.nn, nn))
    assert ours[: len(theirs)] == theirs
    assert all(
        kind == inspect.Parameter.KEYWORD_ONLY and default is not inspect.Parameter.empty
        for _, kind, default in ours[len(theirs) :]
    )
    assert parameters(getattr(nn, name).forward)[:3] == parameters(getattr(torch.nn, name).forward)[:3]


CONSTRUCTIONS: dict[str, list[dict[str, Any]]] = {
    "CrossEntropyLoss": [
        {},
        {"weight": torch.tensor([1.0, 2.0]), "ignore_index": 1, "label_smoothing": 0.1},
        {"reduction": "sum"},
    ],
    "NLLLoss": [{}, {"weight": torch.tensor([1.0, 2.0]), "ignore_index": 1, "reduction": "none"}],
    "KLDivLoss": [{}, {"reduction": "batchmean", "log_target": True}],
    "BCELoss": [{}, {"weight": torch.tensor([1.0, 2.0])}],
    "BCEWithLogitsLoss": [{}, {"weight": torch.tensor([1.0, 2.0]), "pos_weight": torch.tensor([3.0, 1.0])}],
    "CosineEmbeddingLoss": [{}, {"margin": 0.5}],
    "CosineSimilarity": [{}, {"dim": 0, "eps": 1e-6}],
    "LinearCrossEntropyLoss": [
        {"in_features": 4, "num_classes": 3},
        {"in_features": 4, "num_classes": 3, "bias": True},
    ],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, rows in CONSTRUCTIONS.items() for i in range(len(rows))]
)
def test_state_repr_pickle_copy_and_cast(name: str, index: int) -> None:
    arguments = CONSTRUCTIONS[name][index]
    theirs, ours = (getattr(namespace, name)(**arguments) for namespace in (torch.nn, nn))
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    ours.load_state_dict(theirs.state_dict())
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        assert other.__dict__.keys() == ours.__dict__.keys()
        for key, value in theirs.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
    for key, value in ours.to(torch.bfloat16).state_dict().items():
        assert value.dtype == theirs.to(torch.bfloat16).state_dict()[key].dtype


DEPRECATED = [(a, r) for a in (None, True, False) for r in (None, True, False) if (a, r) != (None, None)]
TARGETS: dict[str, tuple[Any, ...]] = {
    "cross_entropy": (torch.tensor([[1.0, -2.0], [0.5, 0.25]]), torch.tensor([0, 1])),
    "nll_loss": (torch.tensor([[-1.0, -2.0], [-0.5, -0.25]]), torch.tensor([0, 1])),
    "kl_div": (torch.tensor([[-1.0, -2.0], [-0.5, -0.25]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])),
    "binary_cross_entropy": (torch.tensor([0.25, 0.5]), torch.tensor([1.0, 0.0])),
    "binary_cross_entropy_with_logits": (torch.tensor([0.25, -0.5]), torch.tensor([1.0, 0.0])),
    "cosine_embedding_loss": (torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, -0.5]]), torch.tensor([-1])),
}
NAMED = {
    "cross_entropy": "CrossEntropyLoss",
    "nll_loss": "NLLLoss",
    "kl_div": "KLDivLoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "cosine_embedding_loss": "CosineEmbeddingLoss",
}


@pytest.mark.parametrize(("size_average", "reduce"), DEPRECATED)
@pytest.mark.parametrize("name", TARGETS)
def test_deprecated_arguments(name: str, size_average: bool | None, reduce: bool | None) -> None:
    """size_average and reduce still rule over reduction, with torch's own warning."""
    flags = {"size_average": size_average, "reduce": reduce}
    results = []
    for functions, modules in ((torch.nn.functional, torch.nn), (F, nn)):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated") as caught:
            value = getattr(functions, name)(*TARGETS[name], **flags)
        said = sorted({str(w.message) for w in caught})
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            module = getattr(modules, NAMED[name])(**flags)
        results.append((value, said, module.reduction))
    (expected, their_words, their_reduction), (got, our_words, our_reduction) = results
    torch.testing.assert_close(got, expected)
    assert our_words == their_words
    assert our_reduction == their_reduction


@pytest.mark.parametrize(
    "name", ["cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
)
def test_the_old_name_of_mean(name: str) -> None:
    """reduction="elementwise_mean" is mean, with torch's warning, where torch takes it."""
    with pytest.warns(UserWarning, match="elementwise_mean"):
        expected = getattr(torch.nn.functional, name)(*TARGETS[name], reduction="elementwise_mean")
    with pytest.warns(UserWarning, match="elementwise_mean"):
        got = getattr(F, name)(*TARGETS[name], reduction="elementwise_mean")
    torch.testing.assert_close(got, expected)


def test_positional_arguments_in_torchs_order() -> None:
    logits, target = TARGETS["cross_entropy"]
    weight = torch.tensor([1.0, 3.0])
    for args in ((weight, None, 1, None, "sum", 0.2), (weight, None, -100, None, "none", 0.1)):
        expected = torch.nn.functional.cross_entropy(logits, target, *args)
        torch.testing.assert_close(F.cross_entropy(logits, target, *args), expected)
    first, second, sign = TARGETS["cosine_embedding_loss"]
    expected = torch.nn.functional.cosine_embedding_loss(first, second, sign, 0.1, None, None, "none")
    torch.testing.assert_close(F.cosine_embedding_loss(first, second, sign, 0.1, None, None, "none"), expected)
    torch.testing.assert_close(
        F.cosine_similarity(first, second, 0, 1e-4), torch.cosine_similarity(first, second, 0, 1e-4)
    )


def test_kl_warns_of_its_default_as_torch_does() -> None:
    for functions in (torch.nn.functional, F):
        with pytest.warns(
            UserWarning, match="'mean' divides the total loss by both the batch size and the support size"
        ):
            functions.kl_div(*TARGETS["kl_div"])
