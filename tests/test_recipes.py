"""The recipes of docs/recipes.md run, build no logits, and are the formulas they say on logits that are built."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from logitless._heads import products
from logitless.kernels import interface
from test_lazy import NoTensorOf

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
ROWS, CLASSES = 4 * 19, 512


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Run the page under the guard; its names."""
    torch.manual_seed(7)
    names: dict[str, Any] = {}
    text = PAGE.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), NoTensorOf(ROWS * CLASSES):
        patch.setattr(interface, "DEFAULT_MAX_BYTES", 8 * CLASSES * 8 * 4)
        patch.setattr("logitless.lazy.proxy._SMALL_BYTES", 0)
        warnings.simplefilter("error")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            above = text[: block.start(1)].count("\n")  # so that a failure names its line of the page
            exec(compile("\n" * above + block[1], str(PAGE), "exec"), names)
    return names


@pytest.fixture
def dense(page: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return page["model"](input_ids=page["ids"]).logits.materialize().double()


def tokens(page: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the labels, 0 where ignored; all log-probabilities; the mask."""
    labels = page["labels"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1)
    kept = labels != -100
    return log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * kept, log_probs, kept


def test_the_page_shows_what_it_promises(page: dict[str, Any]) -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) == 11
    assert type(page["model"](input_ids=page["ids"]).logits) is ll.LazyLogits
    assert page["best"].shape == page["ids"].shape


def test_perplexity(page: dict[str, Any], dense: Tensor) -> None:
    expected = F.cross_entropy(dense[:, :-1].flatten(0, 1), page["ids"][:, 1:].flatten()).exp()
    torch.testing.assert_close(page["perplexity"](page["model"], page["ids"]), expected, rtol=1e-6, atol=0)


def test_z_loss(page: dict[str, Any], dense: Tensor) -> None:
    picked, _, kept = tokens(page, dense)
    expected = (-picked.sum() + 0.1 * (dense[:, :-1].logsumexp(-1).square() * kept).sum()) / kept.sum()
    logits = page["model"](input_ids=page["ids"]).logits
    got = page["loss_with_z"](logits, page["labels"], weight=0.1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_dpo(page: dict[str, Any], dense: Tensor) -> None:
    with torch.no_grad():
        base = page["reference"](input_ids=page["ids"]).logits.materialize().double()
    policy, reference = (tokens(page, logits)[0].sum(-1) for logits in (dense, base))
    margin = (policy - reference)[:2] - (policy - reference)[2:]
    got = page["dpo_loss"](page["model"], page["reference"], page["chosen"], page["rejected"], beta=0.5)
    torch.testing.assert_close(got.double(), -F.logsigmoid(0.5 * margin).mean(), rtol=1e-5, atol=0)
    assert all(parameter.grad is None for parameter in page["reference"].parameters())


def test_grpo(page: dict[str, Any], dense: Tensor) -> None:
    picked, log_probs, kept = tokens(page, dense)
    old = page["old_log_probs"] + 0.3 * torch.randn_like(page["old_log_probs"])  # so that ratios are clipped
    ratio = (picked - old).exp()
    advantages = page["advantages"]
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    expected = -((gain + 0.5 * entropy) * kept).sum() / kept.sum()
    logits = page["model"](input_ids=page["ids"]).logits
    got = page["grpo_loss"](logits, page["labels"], old, advantages, bonus=0.5)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    reference = picked + 0.2 * torch.randn_like(picked)
    penalty = (reference - picked).exp() - (reference - picked) - 1
    expected = -((gain - 0.3 * penalty + 0.5 * entropy) * kept).sum() / kept.sum()
    got = page["grpo_loss"](logits, page["labels"], old, advantages, reference * kept, bonus=0.5, penalty=0.3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_distillation(page: dict[str, Any], dense: Tensor) -> None:
    teacher = page["teacher_logits"].materialize().double()
    kept = tokens(page, dense)[2]
    p, q = ((logits[:, :-1][kept] / 2).log_softmax(-1) for logits in (teacher, dense))
    expected = 4 * (p.exp() * (p - q)).sum(-1).mean()
    logits = page["model"](input_ids=page["ids"]).logits
    got = page["distillation_loss"](page["teacher_logits"], logits, page["labels"])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_stored_distillation(page: dict[str, Any], dense: Tensor) -> None:
    teacher = page["teacher_logits"].materialize().double().log_softmax(-1)
    index = page["stored"]["indices"].long()
    p, q = (logits.softmax(-1).gather(-1, index) for logits in (teacher, dense))
    p, q = (torch.cat([mass, 1 - mass.sum(-1, keepdim=True)], -1) for mass in (p, q))
    got = page["stored_distillation_loss"](page["stored"], page["model"](input_ids=page["ids"]).logits)
    # The stored half-precision logarithms are right to 1e-3 of a nat.
    torch.testing.assert_close(got.double(), (p * (p / q).log()).sum(-1).mean(), rtol=0.02, atol=1e-4)


def test_training_step(page: dict[str, Any]) -> None:
    tagger, inputs, labels = page["tagger"], page["inputs"], page["labels"]
    logits = tagger.head(tagger.body(inputs)[0]).double()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    got = tagger.training_step((inputs, labels), 0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_gkd(page: dict[str, Any], beta: float, temperature: float) -> None:
    answers, learnt = page["answers"], page["learnt"]
    with torch.no_grad():
        logits = [page[name](input_ids=answers).logits for name in ("teacher", "model")]
    kept = learnt[:, 1:] != -100
    p, q = ((z.materialize().double()[:, :-1][kept] / temperature).softmax(-1) for z in logits)
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1).mean()

    expected = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    got = page["gkd_loss"](*logits, learnt, beta, temperature)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_what_each_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's products, counted by their sizes; own head, and the other model's."""
    rows, classes, width, other = 64, 700, 24, 17
    done = {width: 0, other: 0}
    multiply = products.multiply

    def counted(backend: Any, first: Tensor, second: Tensor, out: Tensor, **options: Any) -> None:
        sizes = sorted((*first.shape, second.shape[1]))
        assert sizes[1:] == [rows, classes]
        done[sizes[0]] += 1
        multiply(backend, first, second, out, **options)

    for module in (products, sys.modules["logitless._heads.tiles"]):
        monkeypatch.setattr(module, "multiply", counted)
    hidden, weight = torch.randn(rows, width).requires_grad_(), torch.randn(classes, width).requires_grad_()
    target = torch.randint(classes, (rows,))
    student, teacher = ll.linear(hidden, weight), ll.linear(torch.randn(rows, other), torch.randn(classes, other))

    def z_loss() -> Tensor:
        stats = ll.token_stats(student, target)
        return stats.nll.sum() + stats.lse.square().sum() + stats.entropy.sum()

    def evaluation() -> Tensor:
        with torch.no_grad():
            return ll.token_stats(student, target).nll

    def reference() -> Tensor:
        return ll.token_stats(teacher, target).nll

    lines = [
        lambda: F.cross_entropy(student, target),
        evaluation,
        z_loss,
        reference,
        lambda: ll.js(teacher, student, beta=0.3).mean(),
        lambda: ll.js(teacher, student, beta=0.3, reduction="mean"),
    ]
    found = []
    for call in lines:
        done.update({width: 0, other: 0})
        loss = call()
        if loss.requires_grad:
            loss.backward()
        found.append((done[width], done[other]))
    table = PAGE.read_text(encoding="utf-8").split("| | products of")[1].split("\n\n")[0].splitlines()[2:]
    told = [tuple(int(cell or 0) for cell in map(str.strip, line.strip("|").split("|")[1:])) for line in table]
    assert found == told
