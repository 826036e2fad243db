"""The article: its code prints what stands under it, and each numbered formula is what the library computes."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as F

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("article.md", "article.zh.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\$\$(.*) \\tag\{(\d+)\}\$\$$", re.MULTILINE)


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_code_prints_what_stands_under_it(page) -> None:
    blocks = BLOCK.findall(text(page))
    assert len(blocks) == text(page).count("```python")
    assert len(blocks) > 20
    namespace: dict[str, Any] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        assert printed.getvalue() == expected, code


def test_both_languages_hold_the_same_code_and_formulas() -> None:
    english, chinese = (text(page) for page in PAGES)
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    assert FORMULA.findall(english) == FORMULA.findall(chinese)
    assert [line.count("#") for line in english.splitlines() if line.startswith("#")] == [
        line.count("#") for line in chinese.splitlines() if line.startswith("#")
    ]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", text(page)):
            assert (DOCS / link).is_file(), link


README = DOCS.parent / "README.md"


def test_the_example_of_the_readme_runs_as_it_says() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), namespace := {})
    assert printed.getvalue() == "torch.Size([256]) (256, 50000)\n"
    hidden, head, target = (namespace[name] for name in ("hidden", "head", "target"))
    dense = torch.nn.functional.cross_entropy(head(hidden), target)
    torch.testing.assert_close(namespace["loss"], dense)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(dense, hidden)[0])


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        assert (README.parent / link).is_file(), link


# A row of four classes, a second one, and what the formulas are made of, in plain float64 arithmetic.
Z = [1.2, -0.7, 0.4, 2.0]
Y = [0.1, 0.9, -1.0, 1.5]
SOFT = [0.1, 0.2, 0.4, 0.3]
T, C = 2, 4
CLASSES = range(C)


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


P, Q = softmax(Z), softmax(Y)
CROSS = -sum(a * math.log(b) for a, b in zip(P, Q, strict=True))


def cross_entropy_of_an_index() -> tuple[Any, Any]:
    assert -math.log(P[T]) == pytest.approx(math.log(sum(math.exp(z) for z in Z)) - Z[T], rel=1e-14)
    return math.log(sum(math.exp(z) for z in Z)) - Z[T], F.cross_entropy(row(Z), torch.tensor([T]))


def gradient_of_cross_entropy() -> tuple[Any, Any]:
    leaf = row(Z).requires_grad_()
    F.cross_entropy(leaf, torch.tensor([T])).backward()
    return [P[j] - (j == T) for j in CLASSES], leaf.grad[0]


def weighted_mean() -> tuple[Any, Any]:
    w, targets = [0.5, 1.0, 3.0, 2.0], [T, 0]
    losses = [-math.log(P[T]), -math.log(Q[0])]
    expected = sum(w[t] * loss for t, loss in zip(targets, losses, strict=True)) / sum(w[t] for t in targets)
    return expected, F.cross_entropy(torch.cat([row(Z), row(Y)]), torch.tensor(targets), row(w)[0])


def cross_entropy_of_probabilities() -> tuple[Any, Any]:
    return -sum(t * math.log(p) for t, p in zip(SOFT, P, strict=True)), F.cross_entropy(row(Z), row(SOFT))


def smoothed_target() -> tuple[Any, Any]:
    epsilon = 0.2
    target = [(1 - epsilon) * (j == T) + epsilon / C for j in CLASSES]
    expected = -sum(t * math.log(p) for t, p in zip(target, P, strict=True))
    return expected, F.cross_entropy(row(Z), torch.tensor([T]), label_smoothing=epsilon)


def negative_log_likelihood() -> tuple[Any, Any]:
    w, x = [0.5, 1.0, 3.0, 2.0], [math.log(p) for p in P]
    return -w[T] * x[T], F.nll_loss(row(x), torch.tensor([T]), row(w)[0], reduction="sum")


def kullback_leibler() -> tuple[Any, Any]:
    return divergence(P, Q), F.kl_div(row(Q).log(), row(P), reduction="batchmean")


def distillation() -> tuple[Any, Any]:
    tau = 3.0
    expected = tau**2 * divergence(softmax([z / tau for z in Z]), softmax([y / tau for y in Y]))
    return expected, tau**2 * ll.kl(row(Z) / tau, row(Y) / tau)[0]


def jensen_shannon() -> tuple[Any, Any]:
    mixture = [(a + b) / 2 for a, b in zip(P, Q, strict=True)]
    expected = (divergence(P, mixture) + divergence(Q, mixture)) / 2
    assert expected <= math.log(2)
    return expected, ll.js(row(Z), row(Y))[0]


def divergence_without_cancellation() -> tuple[Any, Any]:
    d = [math.log(b) - math.log(a) for a, b in zip(P, Q, strict=True)]
    assert all(p * (math.exp(x) - 1 - x) >= 0 for p, x in zip(P, d, strict=True))
    return sum(p * (math.exp(x) - 1 - x) for p, x in zip(P, d, strict=True)), ll.kl(row(Z), row(Y))[0]


def entropy() -> tuple[Any, Any]:
    return -sum(p * math.log(p) for p in P), ll.entropy(row(Z))[0]


def entropy_plus_divergence() -> tuple[Any, Any]:
    expected = -sum(p * math.log(p) for p in P) + divergence(P, Q)
    assert expected == pytest.approx(CROSS, rel=1e-14)
    return expected, ll.pair_stats(row(Z), row(Y)).cross_entropy[0]


WEIGHTS = [1.0, 0.5, 2.0, 0.0]


def binary_cross_entropy() -> tuple[Any, Any]:
    expected = [-w * (t * math.log(x) + (1 - t) * math.log(1 - x)) for w, t, x in zip(WEIGHTS, SOFT, P, strict=True)]
    return expected, F.binary_cross_entropy(row(P), row(SOFT), row(WEIGHTS), reduction="none")[0]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def binary_cross_entropy_with_logits() -> tuple[Any, Any]:
    expected = [
        -w * (t * math.log(sigmoid(z)) + (1 - t) * math.log(sigmoid(-z)))
        for w, t, z in zip(WEIGHTS, SOFT, Z, strict=True)
    ]
    return expected, F.binary_cross_entropy_with_logits(row(Z), row(SOFT), row(WEIGHTS), reduction="none")[0]


def two_class_likelihood() -> tuple[Any, Any]:
    labels = [1, 0, 0, 1]
    expected = [-math.log([1 - sigmoid(z), sigmoid(z)][t]) for z, t in zip(Z, labels, strict=True)]
    by_softmax = [-math.log(softmax([0.0, z])[t]) for z, t in zip(Z, labels, strict=True)]
    assert expected == pytest.approx(by_softmax, rel=1e-14)
    return expected, F.binary_cross_entropy(torch.sigmoid(row(Z)), row([1.0, 0.0, 0.0, 1.0]), reduction="none")[0]


def length(x: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in x))


def cosine() -> tuple[Any, Any]:
    dot, tiny = sum(a * b for a, b in zip(Z, Y, strict=True)), [value * 1e-9 for value in Z]
    expected = [dot / (max(length(x), 1e-8) * max(length(Y), 1e-8)) * scale for x, scale in ((Z, 1), (tiny, 1e-9))]
    return expected, F.cosine_similarity(torch.cat([row(Z), row(tiny)]), row(Y))


def cosine_embedding() -> tuple[Any, Any]:
    near = sum(a * b for a, b in zip(Z, Y, strict=True)) / (length(Z) * length(Y))
    pairs = torch.cat([row(Z)] * 3), torch.cat([row(Y), row(Y), -row(Y)])
    expected = [1 - near, max(0, near - 0.1), max(0, -near - 0.1)]
    assert expected[1] > 0
    assert expected[2] == 0
    return expected, F.cosine_embedding_loss(*pairs, torch.tensor([1, -1, -1]), margin=0.1, reduction="none")


# The formula as it is printed, beside the function that evaluates it: a change to one asks for a change to the other.
FORMULAS: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "1": (r"\ell = -\log p_t = \log \sum_j e^{z_j} - z_t", cross_entropy_of_an_index),
    "2": (r"\frac{\partial \ell}{\partial z_j} = p_j - [j = t]", gradient_of_cross_entropy),
    "3": (r"L = \frac{\sum_n w_{t_n} \ell_n}{\sum_n w_{t_n}}", weighted_mean),
    "4": (r"\ell = -\sum_j t_j \log p_j", cross_entropy_of_probabilities),
    "5": (r"t^{\varepsilon}_j = (1 - \varepsilon) [j = t] + \frac{\varepsilon}{C}", smoothed_target),
    "6": (r"\ell = -w_t x_t", negative_log_likelihood),
    "7": (r"D(P \parallel Q) = \sum_j P_j \log \frac{P_j}{Q_j}", kullback_leibler),
    "8": (r"L = \tau^2 D(\mathrm{softmax}(a / \tau) \parallel \mathrm{softmax}(b / \tau))", distillation),
    "9": (
        r"\mathrm{JS} = \tfrac{1}{2} D(P \parallel M) + \tfrac{1}{2} D(Q \parallel M), "
        r"\qquad M = \tfrac{1}{2} (P + Q), \qquad \mathrm{JS} \le \log 2",
        jensen_shannon,
    ),
    "10": (r"D(P \parallel Q) = \sum_j p_j (e^{d_j} - 1 - d_j)", divergence_without_cancellation),
    "11": (r"H(P) = -\sum_j P_j \log P_j", entropy),
    "12": (r"\mathrm{CE}(P, Q) = H(P) + D(P \parallel Q)", entropy_plus_divergence),
    "13": (r"\ell_n = -w_n (t_n \log x_n + (1 - t_n) \log(1 - x_n))", binary_cross_entropy),
    "14": (
        r"\ell_n = -w_n (t_n \log \sigma(z_n) + (1 - t_n) \log \sigma(-z_n))",
        binary_cross_entropy_with_logits,
    ),
    "15": (r"\ell = -\log [1 - x, x]_t = -\log \mathrm{softmax}([0, z])_t", two_class_likelihood),
    "16": (
        r"\cos(x, y) = \frac{x \cdot y}{\max(\lVert x \rVert, \varepsilon) \max(\lVert y \rVert, \varepsilon)}",
        cosine,
    ),
    "17": (
        r"\ell = 1 - \cos(x, y) \text{ if } t = 1, \qquad \ell = \max(0, \cos(x, y) - m) \text{ if } t = -1",
        cosine_embedding,
    ),
}


def test_every_formula_on_the_page_is_evaluated() -> None:
    page = text("article.md")
    found = {tag: formula for formula, tag in FORMULA.findall(page)}
    assert page.count("$$") == 2 * len(found)
    assert found == {tag: formula for tag, (formula, _) in FORMULAS.items()}


@pytest.mark.parametrize("tag", FORMULAS)
def test_formula(tag) -> None:
    by_formula, by_library = FORMULAS[tag][1]()
    # The embedding loss adds 1e-12 to each squared norm, of about 6 and 4 here.
    tolerance = 1e-12 if tag == "17" else 1e-13
    expected = torch.tensor(by_formula, dtype=torch.float64)
    torch.testing.assert_close(by_library, expected, rtol=tolerance, atol=tolerance)
