"""Kernels broken on purpose, a line of their source replaced: the checks of interpreted_kernels.py reject each of them.

`test_triton.py` runs this file in a process of its own, as it does that one.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import interpreted_kernels as kernels
from logitless.kernels import reference, triton
from logitless.kernels.interface import Divergence
from logitless.kernels.triton import row_grad, row_stats

SOURCES = Path(triton.__file__).parent


def statistics(name: str = "everything", classes: int = 65) -> Callable[[], None]:
    return lambda: kernels.test_row_statistics(name, torch.float32, classes)


def gradients(name: str = "cross-entropy") -> Callable[[], None]:
    return lambda: kernels.test_row_gradients(name, torch.float32, 65)


def pairs() -> None:
    kernels.test_pair_measures(torch.float32, 65, 1.0)


def close_pairs() -> None:
    kernels.test_pair_measures(torch.float32, 65, 0.01)


def far_rows() -> None:
    """Three rows 2^30 numbers apart, so that the last begins 2^31 numbers, 4 GB, behind the first; few pages exist.

    As much lies before them, for an offset that turned negative to read without harm.
    """
    step, classes, before = 2**30 + 16, 7, 2**31
    memory = torch.empty(before + 2 * step + classes, dtype=torch.bfloat16)
    z = memory.as_strided((3, classes), (step, 1), before)
    z.copy_(kernels.drawn(1, 3, classes))
    memory[before + 2 * step - 2**32 :][:classes] = 0  # where 32 bits would lead
    target = torch.tensor([0, 3, 6])
    got, truth = row_stats(z, target), reference.row_stats(z, target)
    kernels.assert_near(got.nll, truth.nll, 64, "nll")
    told = {"a_scale": 1.0, "c_scale": -1.0}
    grad = row_grad(z.clone(), truth.row_max, truth.log_sum, target, **told)
    into = row_grad(z, truth.row_max, truth.log_sum, target, **told, out=z)
    assert torch.equal(into, grad)


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    check: Callable[[], None]


MASKED = 'z = tl.load(begin[:, None] + place * class_stride, mask=inside, other=float("-inf")).to(REAL)'
MUTANTS: dict[str, Mutant] = {
    # What lies beyond the last class is no logit of 0, as softcap(0) would be.
    "no mask after the softcap": Mutant("row_kernels", MASKED, MASKED.replace('float("-inf")', "0.0"), statistics()),
    "the last block is left out": Mutant(
        "row_kernels",
        "        within = column < stop\n        inside = live[:, None] & within[None, :]",
        "        within = column < stop - 1\n        inside = live[:, None] & within[None, :]",
        statistics(),
    ),
    "the running sum is not rescaled": Mutant(
        "row_kernels",
        "sums = tl.where(higher, (sums + 1.0) * factor, sums + factor)",
        "sums = tl.where(higher, sums + 1.0, sums + factor)",
        lambda: kernels.test_row_statistics("everything", torch.float32, kernels.SIZES[-1]),
    ),
    "offsets of 32 bits": Mutant(
        "row_kernels",
        "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)",
        "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
        far_rows,
    ),
    "p - onehot of a rounded p": Mutant(
        "row_kernels",
        "gradient = tl.where(hit, of_target[:, None], gradient)",
        "gradient = tl.where(hit, gradient.to(tl.bfloat16).to(REAL) + c.to(REAL)[:, None], gradient)",
        gradients(),
    ),
    "the top counts twice": Mutant(
        "row_kernels",
        "counted = tl.where(lanes[None, :] == first[:, None], sums, sums + 1.0)",
        "counted = sums + 1.0",
        statistics(),
    ),
    "a part without a class has one": Mutant(
        "row_kernels",
        '        apart = tl.where(nothing, float("-inf"), apart)\n',
        "",
        statistics(),
    ),
    "rank counts ties": Mutant("row_kernels", "(z > at_target[:, None])", "(z >= at_target[:, None])", statistics()),
    "the last of equal classes": Mutant(
        "row_kernels",
        "best = tl.min(tl.where(tops == top[:, None], bests, NO_CLASS), 1)\n        nan",
        "best = tl.max(tl.where(tops == top[:, None], bests, -1), 1)\n        nan",
        lambda: ties(),
    ),
    "0 times infinity": Mutant(
        "row_kernels",
        "raised = gaps + masses * delta\n    return raised + tl.where(weight == 0, 0.0, weight * gap)",
        "raised = gaps + masses * delta\n    return raised + weight * gap",
        statistics("smooth"),
    ),
    "an ignored row is read": Mutant(
        "row_kernels",
        "live = there & (index != ignore_index)",
        "live = there",
        kernels.test_an_ignored_row_is_not_read,
    ),
    "smoothing without the log-sum": Mutant(
        "row_kernels",
        "value = gaps + times(mass, log_sum)\n        tl.store(smooth_sum_ptr",
        "value = gaps\n        tl.store(smooth_sum_ptr",
        statistics("smooth"),
    ),
    "the entropy's slope without its gap": Mutant(
        "row_kernels", "times(b_real[:, None], tl.where(p == 0, 0.0, below))", "b_real[:, None]", gradients("entropy")
    ),
    "KL may be negative": Mutant(
        "pair_kernels",
        "tl.where(near, p * bracket, tl.where(p == 0, q, far))",
        "-p * tl.where(p == 0, 0.0, d)",
        close_pairs,
    ),
    "KL's rows exchanged": Mutant(
        "pair_kernels", "sum1 += _divergence_term(p, q, d,", "sum1 += _divergence_term(q, p, d,", pairs
    ),
    "the mixture's other weight": Mutant(
        "pair_kernels",
        "larger_weight = tl.where(q_larger, of_q, of_p)",
        "larger_weight = tl.where(q_larger, of_p, of_q)",
        lambda: kernels.test_divergences(Divergence("skewed_kl", 0.1), torch.float32, 65),
    ),
    "the shift of every d stays": Mutant(
        "pair_kernels",
        "tl.store(at + 4, shift + small, mask=there)",
        "tl.store(at + 4, shift + small + 1e-4, mask=there)",
        close_pairs,
    ),
    "pos_weight ignored": Mutant(
        "element_kernels",
        "if pos_weight_ptr is not None:",
        "if False:",
        lambda: kernels.test_weights_of_elements(kernels.LOSSES[0], torch.float32),
    ),
    "logarithms not held at -100": Mutant(
        "element_kernels",
        "log_p = tl.where(log_p < -100.0, -100.0, log_p)",
        "log_p = log_p",
        lambda: kernels.test_elements(kernels.LOSSES[1], torch.float32, "plain"),
    ),
    "a norm below eps turns": Mutant(
        "cosine_kernels",
        "free1 = tl.where(norm1 > least, 1.0, tl.where(norm1 == least, 0.5, 0.0))",
        "free1 = tl.where(norm1 > 0, 1.0, 0.0)",
        lambda: short_vectors(),
    ),
}


def ties() -> None:
    z = torch.zeros(2, 65)
    z[:, [3, 40]] = 1.0
    got = row_stats(z, argmax=True)
    assert got.argmax is not None
    assert got.argmax.tolist() == [3, 3]


def short_vectors() -> None:
    x1, x2 = kernels.drawn(1, 7, 65, scale=1e-3), kernels.drawn(2, 7, 65)
    saved = triton.cosine_similarity(x1, x2, 1, 0.25, save=True).saved
    assert saved is not None
    grads = triton.cosine_similarity_grad(x1, x2, saved, 1, 0.25)
    for grad, true in zip(grads, reference.cosine_similarity_grad(x1, x2, saved, 1, 0.25), strict=True):
        kernels.assert_near(grad, true, 64, "gradient", torch.ones(()))


def mutated(mutant: Mutant, folder: Path) -> ModuleType:
    source = (SOURCES / f"{mutant.file}.py").read_text(encoding="utf-8")
    assert mutant.old in source
    path = folder / f"{mutant.file}.py"
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"mutated_{mutant.file}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_reject_the_mutant(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    importlib.import_module(f"logitless.kernels.triton.{mutant.file}")
    monkeypatch.setattr(triton, mutant.file, mutated(mutant, tmp_path))
    with pytest.raises(AssertionError):
        mutant.check()


@pytest.mark.parametrize("check", [far_rows, ties, short_vectors, close_pairs])
def test_the_checks_pass_what_is_not_broken(check: Callable[[], None]) -> None:
    """The others are tests of interpreted_kernels.py."""
    check()
