"""SparseLogits against the textbook formula over its buckets, in float64 and, for tails too small for that, mpmath."""

import warnings
from collections.abc import Iterator

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from logitless.kernels import interface
from logitless.lazy import sparse
from test_lazy import NoTensorOf

ROWS, CLASSES, WIDTH, K = 6, 40, 5, 4


@pytest.fixture(autouse=True)
def one_row_is_a_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 1)
    monkeypatch.setattr("logitless.lazy.proxy._SMALL_BYTES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def teacher_logits(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def student() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_()


def buckets(log_probs: Tensor, indices: Tensor, tail: str) -> Tensor:
    """Masses of the kept classes and the tail, by subtraction: right where the tail is large."""
    kept = log_probs.exp().gather(-1, indices)
    if tail == "renormalize":
        return kept / kept.sum(-1, keepdim=True)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def truth(p: Tensor, q: Tensor, indices: Tensor, tail: str, entropy: bool = False) -> Tensor:
    pb, qb = (buckets(logits.log_softmax(-1), indices, tail) for logits in (p, q))
    return -(pb * qb.log()).sum(-1) if entropy else (pb * (pb / qb).log()).sum(-1)


@pytest.mark.parametrize("measure", ["kl", "cross_entropy"])
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
@pytest.mark.parametrize("tail", ["lump", "renormalize"])
def test_value_and_the_students_gradient(tail: sparse.Tail, lazy: bool, measure: str) -> None:
    p = teacher_logits()
    hidden, weight = student()
    teacher = ll.SparseLogits.top_k(p, K, tail=tail)
    expected = truth(p, F.linear(hidden, weight), teacher.indices, tail, measure == "cross_entropy")
    upstream = torch.randn(ROWS, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, [hidden, weight], upstream)
    dense = None if lazy else F.linear(hidden, weight)
    with NoTensorOf(ROWS * CLASSES if lazy else ROWS * CLASSES + 1):
        q = ll.linear(hidden, weight) if dense is None else dense
        got = (ll.kl if measure == "kl" else sparse.cross_entropy)(teacher, q)
        ours = torch.autograd.grad(got, [hidden, weight], upstream)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


def test_kl_is_a_lower_bound_that_rises_to_the_full_one() -> None:
    p, q = teacher_logits(), teacher_logits(2.0).flip(-1)
    full = ll.kl(p, q)
    last = torch.zeros(ROWS, dtype=torch.float64)
    for k in range(1, CLASSES + 1):
        bound = ll.kl(ll.SparseLogits.top_k(p, k), q)
        assert bool((bound >= last - 1e-12).all())
        last = bound
    torch.testing.assert_close(last, full, rtol=1e-10, atol=0)


def test_is_zero_where_the_student_is_the_teacher() -> None:
    q = teacher_logits().requires_grad_()
    for tail in ("lump", "renormalize"):
        value = ll.kl(ll.SparseLogits.top_k(q, K, tail=tail), q)
        assert bool((value >= 0).all())
        assert float(value.detach().max()) < 1e-28
        (gradient,) = torch.autograd.grad(value.sum(), q)
        assert float(gradient.abs().max()) < 1e-14
    stored = ll.SparseLogits.top_k(q.float(), K)
    assert 0 <= float(ll.kl(stored, q).detach().max()) < 1e-12


@pytest.mark.parametrize("gap", [5.0, 40.0, 90.0])
@pytest.mark.parametrize("spare", [1e-3, 1e-9])
def test_a_tiny_tail_is_exact(gap: float, spare: float) -> None:
    """The student leaves exp(-gap) to the others: 1 minus the kept mass is 0 in float64 from 37 on."""
    q = torch.tensor([[gap, 0.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    log_p = torch.log1p(torch.tensor([[-spare]], dtype=torch.float64))
    value = ll.kl(ll.SparseLogits(log_p, torch.tensor([[0]]), 4), q)
    with mpmath.workdps(80):
        kept_p = mpmath.exp(mpmath.mpf(log_p.item()))
        z = [mpmath.exp(mpmath.mpf(x)) for x in (gap, 0.0, 0.0, -1.0)]
        kept_q = z[0] / sum(z)
        tail_p, tail_q = 1 - kept_p, sum(z[1:]) / sum(z)
        exact = kept_p * mpmath.log(kept_p / kept_q) + tail_p * mpmath.log(tail_p / tail_q)
        slopes = [kept_q - kept_p] + [tail_q * x / sum(z[1:]) - tail_p * x / sum(z[1:]) for x in z[1:]]
    assert value.item() == pytest.approx(float(exact), rel=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert gradient[0].tolist() == pytest.approx([float(slope) for slope in slopes], rel=1e-9, abs=1e-25)


def test_masked_classes() -> None:
    inf = float("inf")
    q = torch.tensor([[1.0, -inf, 0.0, -inf], [1.0, 0.5, -inf, -inf]], requires_grad=True)
    kept = torch.tensor([[0, 2], [0, 1]])
    everything = ll.SparseLogits(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), kept, 4)
    value = ll.kl(everything, q)
    full = torch.tensor([[0.75, 0, 0.25, 0], [0.5, 0.5, 0, 0]]).log()
    torch.testing.assert_close(value, ll.kl(full, q))
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert bool(gradient.isfinite().all())
    spare = ll.SparseLogits(torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log(), kept, 4)
    assert ll.kl(spare, q).tolist() == [inf, inf]
    absent = ll.SparseLogits(torch.tensor([[1.0, 0.0], [1.0, 0.0]]).log(), kept, 4)
    torch.testing.assert_close(ll.kl(absent, q), -q.detach().log_softmax(-1)[:, 0])


def test_top_k_of_lazy_logits_is_that_of_the_tensor() -> None:
    hidden, weight = student()
    ours = ll.SparseLogits.top_k(ll.linear(hidden, weight).view(2, 3, CLASSES), K)
    theirs = F.linear(hidden, weight).detach().view(2, 3, CLASSES).log_softmax(-1).topk(K, -1)
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.log_probs, theirs.values)
    assert not ours.log_probs.requires_grad
    assert ours.shape == (2, 3, CLASSES)
    assert ll.SparseLogits.top_k(torch.zeros(1, 9, dtype=torch.bfloat16), 2).log_probs.dtype == torch.float32


def test_rows_are_picked_and_joined() -> None:
    hidden, weight = student()
    q = ll.linear(hidden, weight).view(2, 3, CLASSES)
    teacher = ll.SparseLogits.top_k(teacher_logits().view(2, 3, CLASSES), K, tail="renormalize").to("cpu")
    every = ll.kl(teacher, q)
    assert every.shape == (2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.equal(ll.kl(teacher[mask], q[mask]), every[mask])
    assert torch.equal(ll.kl(teacher[:, 1:], q[:, 1:]), every[:, 1:])
    assert torch.equal(ll.kl(teacher.flatten(), q.flatten(0, 1)), every.flatten())
    with pytest.raises(IndexError, match="leading dimensions only"):
        teacher[..., :2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_log_probabilities_are_accepted(dtype: torch.dtype) -> None:
    p = teacher_logits(8.0)
    exact = ll.SparseLogits.top_k(p, 16)
    stored = ll.SparseLogits(exact.log_probs.to(dtype), exact.indices.to(torch.int32), CLASSES)
    q = teacher_logits(2.0).float()
    value = ll.kl(stored, q)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ll.kl(exact, q.double()).float(), rtol=20 * torch.finfo(dtype).eps, atol=0)


def test_what_is_no_distribution_is_refused() -> None:
    half, pair = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[3, 0]])
    with pytest.raises(IndexError, match=r"indices\[0, 1\] is 4: there are 4 classes"):
        ll.SparseLogits(half, torch.tensor([[3, 4]]), 4)
    with pytest.raises(ValueError, match=r"row \(0,\) names a class twice"):
        ll.SparseLogits(half, torch.tensor([[3, 3]]), 4)
    with pytest.raises(ValueError, match=r"row \(0,\) add up to 1\.1"):
        ll.SparseLogits(torch.tensor([[0.6, 0.5]]).log(), pair, 4)
    with pytest.raises(ValueError, match="add up to nan"):
        ll.SparseLogits(torch.tensor([[float("nan"), 0.5]]), pair, 4)
    with pytest.raises(ValueError, match=r"add up to 0\.0"):
        ll.SparseLogits(torch.full((1, 2), -float("inf")), pair, 4)
    with pytest.raises(ValueError, match=r"one shape \(\.\.\., k\), got \(1, 2\) and \(1, 1\)"):
        ll.SparseLogits(half, pair[:, :1], 4)
    with pytest.raises(ValueError, match="1 to 1 classes a row, got 2"):
        ll.SparseLogits(half, pair, 1)
    with pytest.raises(ValueError, match="integer indices"):
        ll.SparseLogits(half, pair.float(), 4)
    with pytest.raises(ValueError, match=r"log_probs\.detach"):
        ll.SparseLogits(half.clone().requires_grad_(), pair, 4)
    with pytest.raises(ValueError, match="tail must be 'lump' or 'renormalize', got 'drop'"):
        ll.SparseLogits(half, pair, 4, tail="drop")  # type: ignore[arg-type] # what is tested
    with pytest.raises(TypeError, match="log_probs must be Tensor, not list"):
        ll.SparseLogits([0.5], pair, 4)  # type: ignore[arg-type] # what is tested
    with pytest.raises(ValueError, match="k between 1 and 4 classes, got 5"):
        ll.SparseLogits.top_k(torch.zeros(1, 4), 5)
    teacher = ll.SparseLogits(half, pair, 4)
    with pytest.raises(ValueError, match=r"p's shape \(1, 4\), got \(1, 5\)"):
        ll.kl(teacher, torch.zeros(1, 5))
    with pytest.raises(TypeError, match="the student, must have all its logits"):
        ll.kl(teacher, teacher)  # type: ignore[arg-type] # what is tested


def test_it_is_a_target_of_cross_entropy() -> None:
    hidden, weight = student()
    teacher = ll.SparseLogits.top_k(teacher_logits(), K)
    q = F.linear(hidden, weight)
    rows = truth(teacher_logits(), q, teacher.indices, "lump", entropy=True)
    loss = ll.functional.cross_entropy
    for given in (q, ll.linear(hidden, weight)):
        torch.testing.assert_close(loss(given, teacher), rows.mean())
        torch.testing.assert_close(ll.nn.CrossEntropyLoss(reduction="sum")(given, teacher), rows.sum())
        torch.testing.assert_close(loss(given, teacher, reduction="none"), rows)
        torch.testing.assert_close(loss(given, teacher, normalizer=4.0), rows.sum() / 4)
    with pytest.raises(ValueError, match="label_smoothing do not apply"):
        loss(q, teacher, label_smoothing=0.1)
    assert loss(q[:0], teacher[:0], empty="zero").item() == 0


# --- the other divergences


def divergence_of(p: Tensor, q: Tensor, name: str) -> Tensor:
    """Of buckets' masses, by the textbook."""
    kind, _, weight = name.partition(" ")
    if kind == "tv":
        return (p - q).abs().sum(-1) / 2
    if kind == "reverse":
        return (q * (q / p).log()).sum(-1)
    share = float(weight)
    mixture = share * p + (1 - share) * q
    from_p = (p * (p / mixture).log()).sum(-1)
    return from_p if kind == "skew" else share * from_p + (1 - share) * (q * (q / mixture).log()).sum(-1)


def ours(teacher: ll.SparseLogits, student: Tensor | ll.LazyLogits, name: str, temperature: float = 1.0) -> Tensor:
    kind, _, weight = name.partition(" ")
    if kind == "tv":
        return ll.tv(teacher, student, temperature=temperature)
    if kind == "reverse":
        return ll.kl(student, teacher, temperature=temperature)
    if kind == "skew":
        return ll.kl(teacher, student, skew=float(weight), temperature=temperature)
    if kind == "turned":
        return ll.js(student, teacher, beta=1 - float(weight), temperature=temperature)
    return ll.js(teacher, student, beta=float(weight), temperature=temperature)


@pytest.mark.parametrize("name", ["reverse", "js 0.1", "js 0.5", "turned 0.9", "skew 0.1", "tv"])
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
@pytest.mark.parametrize("tail", ["lump", "renormalize"])
def test_divergences_of_a_sparse_teacher(tail: sparse.Tail, lazy: bool, name: str) -> None:
    p = teacher_logits()
    hidden, weight = student()
    teacher = ll.SparseLogits.top_k(p, K, tail=tail)
    of_buckets = [buckets(z.log_softmax(-1), teacher.indices, tail) for z in (p, F.linear(hidden, weight))]
    expected = divergence_of(of_buckets[0], of_buckets[1], name.replace("turned", "js"))
    got = ours(teacher, ll.linear(hidden, weight) if lazy else F.linear(hidden, weight), name)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    upstream = 3 * torch.randn(ROWS, dtype=torch.float64)
    grads = torch.autograd.grad(got, [hidden, weight], upstream)
    for one, other in zip(grads, torch.autograd.grad(expected, [hidden, weight], upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_js_at_the_ends_of_beta_and_reductions() -> None:
    teacher, z = ll.SparseLogits.top_k(teacher_logits(), K), teacher_logits(1.0)
    assert torch.equal(ll.js(teacher, z, beta=0), ll.kl(teacher, z))
    assert torch.equal(ll.js(teacher, z, beta=1), ll.kl(z, teacher))
    torch.testing.assert_close(ll.tv(teacher, z, reduction="mean"), ll.tv(teacher, z).mean())


def test_temperature_needs_the_tail() -> None:
    p, q = teacher_logits(), teacher_logits(1.0)
    teacher = ll.SparseLogits.top_k(p, K, tail="renormalize")
    kept = [z.gather(-1, teacher.indices) / 2 for z in (p, q)]
    for name in ("reverse", "js 0.1", "skew 0.5", "tv"):
        expected = divergence_of(kept[0].softmax(-1), kept[1].softmax(-1), name)
        torch.testing.assert_close(ours(teacher, q, name, 2.0), expected, rtol=1e-9, atol=1e-12)
    full = ll.SparseLogits.top_k(p, CLASSES)
    expected = divergence_of((p / 2).softmax(-1), (q / 2).softmax(-1), "js 0.1")
    torch.testing.assert_close(ours(full, q, "js 0.1", 2.0), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"kl: a temperature of SparseLogits with tail='lump' would need"):
        ll.kl(ll.SparseLogits.top_k(p, K), q, temperature=2.0)


def test_a_student_has_all_its_logits() -> None:
    teacher = ll.SparseLogits.top_k(teacher_logits(), K)
    for call in (lambda: ll.kl(teacher, teacher), lambda: ll.js(teacher, teacher, beta=1)):
        with pytest.raises(TypeError, match="the student, must have all its logits"):
            call()
