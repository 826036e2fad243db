"""The divergences of distillation against their peers' own conventions, written out in float64, and at their edges."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import exact_rows
import logitless as ll
from oracles import assert_no_worse, nudge

INF = math.inf
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
SKEWS = (0.0, 0.1, 0.5, 0.9)
SIZES = (1, 7, 65, 1000, 49153)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16", "f16"])

# --- the peers' conventions, of a teacher and a student


def trl_generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """As GKD in TRL writes it, summed over the classes: kl_div(input, target) is KL(target || input)."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl_div(log_input: Tensor, log_target: Tensor) -> Tensor:
        return F.kl_div(log_input, log_target, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return kl_div(log_s, log_t)
    if beta == 1:
        return kl_div(log_t, log_s)
    weight = torch.tensor(beta, dtype=student.dtype)
    mixed = torch.logsumexp(torch.stack([log_s + torch.log1p(-weight), log_t + torch.log(weight)]), dim=0)
    return weight * kl_div(mixed, log_t) + (1 - weight) * kl_div(mixed, log_s)


def liger_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """As Liger's kernel has it: X = log q of the student, Y = log p of the teacher, probabilities mixed as such."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * log_p + (1 - beta) * q * log_q - (beta * p + (1 - beta) * q) * log_m).sum(-1)


def distillm_skewed_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """DistiLLM's skewed forward divergence: of the teacher from `skew teacher + (1 - skew) student`."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - (skew * p + (1 - skew) * q).log())).sum(-1)


def distillm_skewed_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """Its skewed reverse divergence: of the student from `(1 - skew) teacher + skew student`."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (q * (q.log() - ((1 - skew) * p + skew * q).log())).sum(-1)


def liger_tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


# Each: what we call it, and the peer's; of a student and a teacher.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    **{
        f"{peer.__name__} {beta}": (
            lambda student, teacher, beta=beta, **o: ll.js(teacher, student, beta=beta, **o),
            lambda student, teacher, peer=peer, beta=beta: peer(student, teacher, beta),
        )
        for peer in (trl_generalized_jsd, liger_jsd)
        for beta in BETAS
    },
    **{
        f"skewed kl {skew}": (
            lambda student, teacher, skew=skew, **o: ll.kl(teacher, student, skew=skew, **o),
            lambda student, teacher, skew=skew: distillm_skewed_kl(student, teacher, skew),
        )
        for skew in SKEWS
    },
    "skewed reverse kl 0.1": (
        lambda student, teacher, **o: ll.kl(student, teacher, skew=0.1, **o),
        lambda student, teacher: distillm_skewed_reverse_kl(student, teacher, 0.1),
    ),
    "tv": (lambda student, teacher, **o: ll.tv(teacher, student, **o), liger_tvd),
}
cases = pytest.mark.parametrize("name", CASES)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(classes: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """A student and a teacher: apart, near each other, and one class that has most of the mass."""
    student, teacher = 2 * draw(classes, rows, classes), 2 * draw(classes + 1, rows, classes)
    student[1] = teacher[1] + 0.05 * draw(classes + 2, classes)
    student[2, classes // 2] += 9
    teacher[3, 0] += 12
    return student, teacher


def check(
    mine: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    what: str,
    temperature: float = 1.0,
) -> None:
    """Value and both gradients, of random upstream gradients, as near to float64 as the peer's formula in the dtype."""
    # Terms of log p / m, and of 1 / skew, add up to 0 over a row.
    floor = (4.0 if "skewed" in what and "0.1" in what else 1.0) / min(temperature, 1.0)
    own = [z.detach().requires_grad_() for z in (student, teacher)]
    exact = [z.detach().double().requires_grad_() for z in (student, teacher)]
    moved = [nudge(z.detach(), torch.promote_types(student.dtype, torch.float32)).requires_grad_() for z in exact]
    naive = [z.detach().to(torch.promote_types(z.dtype, torch.float32)).requires_grad_() for z in own]
    values = [mine(*own), *(peer(*z) for z in (exact, moved, naive))]
    upstream = 3 * draw(99, *values[1].shape)
    grads = [
        torch.autograd.grad(v, z, upstream.to(v.dtype)) for v, z in zip(values, (own, exact, moved, naive), strict=True)
    ]
    assert_no_worse(values[0], values[1], values[3], what, values[2])
    for k, side in enumerate(("student", "teacher")):
        got, true, near, plain = (g[k] for g in grads)
        assert got.dtype == student.dtype
        assert_no_worse(got, true, plain.to(got.dtype), f"{what}: gradient of the {side}", near, floor=floor)


@cases
@dtypes
@pytest.mark.parametrize("classes", SIZES)
def test_peers_conventions(name: str, dtype: torch.dtype, classes: int) -> None:
    student, teacher = (z.to(dtype) for z in rows_of(classes, 4 if classes > 10_000 else 6))
    if classes == 1:  # the peers' own roundings are not 0
        own = [z.requires_grad_() for z in (student, teacher)]
        value = CASES[name][0](*own)
        assert not any(bool(x.any()) for x in (value, *torch.autograd.grad(value.sum(), own)))
        return
    check(*CASES[name], student, teacher, f"{name}, {classes} classes")


@cases
def test_any_layout(name: str) -> None:
    mine, peer = CASES[name]
    for shape, move in (((65, 3, 5), lambda z: z.movedim(0, -1)), ((5, 130), lambda z: z[:, ::2]), ((4, 3, 65), None)):
        student, teacher = (draw(k, *shape).float() for k in (1, 2))
        if move is not None:
            student, teacher = move(student), move(teacher)
        check(mine, peer, student, teacher, f"{name} {shape}")
        check(mine, peer, student.contiguous(), teacher, f"{name} {shape}, one of them contiguous")


@cases
def test_double_backward_is_the_definitions(name: str) -> None:
    mine, _ = CASES[name]
    student, teacher = (z[[0, 2, 3]].requires_grad_() for z in rows_of(7))
    assert torch.autograd.gradcheck(lambda s, t: mine(s, t), (student, teacher))
    assert torch.autograd.gradgradcheck(lambda s, t: mine(s, t), (student, teacher))


@cases
def test_function_transforms(name: str) -> None:
    mine, peer = CASES[name]
    student, teacher = rows_of(7)
    for k in (0, 1):
        got = torch.func.jacrev(mine, argnums=k)(student, teacher)
        torch.testing.assert_close(got, torch.func.jacrev(peer, argnums=k)(student, teacher), rtol=1e-9, atol=1e-10)
    got = torch.func.vmap(mine)(student, teacher)
    torch.testing.assert_close(got, peer(student, teacher), rtol=1e-9, atol=1e-10)


@cases
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(name: str, reduction: str) -> None:
    mine, _ = CASES[name]
    student, teacher = (z.float() for z in rows_of(65))
    rows = mine(student, teacher)
    expected = rows.double().mean() if reduction == "mean" else rows.double().sum()
    torch.testing.assert_close(mine(student, teacher, reduction=reduction), expected.float(), rtol=1e-6, atol=0)


@cases
@dtypes
def test_equal_rows_are_exactly_0(name: str, dtype: torch.dtype) -> None:
    mine, _ = CASES[name]
    rows = rows_of(1000)[0].to(dtype).requires_grad_()
    other = rows.detach().clone().requires_grad_()
    value = mine(rows, other)
    assert bool((value == 0).all())
    for grad in torch.autograd.grad(value, [rows, other], torch.randn_like(value)):
        assert bool((grad.abs() < 1e-6).all())


@cases
@pytest.mark.parametrize("apart", [1e-7, 1e-5, 1e-3, 1e-1, 10.0])
def test_never_negative(name: str, apart: float) -> None:
    mine, _ = CASES[name]
    student = (3 * draw(5, 40, 300)).float()
    assert bool((mine(student, (student + apart * draw(6, 40, 300)).float()) >= 0).all())


# --- edges


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_one_hot_teachers_and_disjoint_support(name: str, dtype: torch.dtype) -> None:
    """Finite values and gradients wherever mathematics has them, against the limit of logits far below the rest."""
    mine, peer = CASES[name]
    student = torch.tensor(
        [
            [0.5, -INF, 1.0, 2.0],  # the same class is masked in both
            [0.5, 3.0, 1.0, -1.0],  # masked in the teacher
            [0.5, -1.0, -2.0, 0.25],  # a one-hot teacher
            [0.5, -INF, 1.0, 2.0],  # masked in the student
            [1.0, 2.0, -INF, -INF],  # nothing in common
        ],
        dtype=dtype,
    )
    teacher = torch.tensor(
        [
            [1.5, -INF, 0.0, 2.0],
            [1.5, -INF, 0.0, 2.0],
            [-INF, 0.0, -INF, -INF],
            [1.5, 0.5, 0.0, 2.0],
            [-INF, -INF, 0.5, 1.0],
        ],
        dtype=dtype,
    )
    low = {torch.float32: -60.0, torch.float64: -300.0}[dtype]
    forward, reverse = name.endswith((" kl 0.0", "jsd 0.0")), name.endswith("jsd 1.0")
    infinite = torch.tensor([False, reverse, reverse, forward, forward or reverse])
    own = [z.clone().requires_grad_() for z in (student, teacher)]
    limit = [z.double().masked_fill(z == -INF, low).requires_grad_() for z in (student, teacher)]
    got, true = mine(*own), peer(*limit)
    finite = ~infinite
    assert bool((got[infinite] == INF).all())
    torch.testing.assert_close(got[finite].double(), true[finite], rtol=1e-6, atol=1e-12)
    upstream = torch.where(finite, 3 * draw(8, 5), 0.0)
    got.backward(upstream.to(dtype))
    true.backward(upstream)
    for mine_z, limit_z, given in zip(own, limit, (student, teacher), strict=True):
        assert mine_z.grad is not None
        assert limit_z.grad is not None
        assert bool(mine_z.grad[finite].isfinite().all())
        assert bool((mine_z.grad[finite][given[finite] == -INF] == 0).all())
        torch.testing.assert_close(mine_z.grad[finite].double(), limit_z.grad[finite], rtol=1e-5, atol=1e-6)


def test_the_slope_of_the_variation_at_ties_is_0() -> None:
    p = torch.tensor([[0.0, 1.0, 2.0, -INF], [0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    q = torch.tensor([[0.0, 2.0, 1.0, -INF], [0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    ll.tv(p, q).sum().backward()
    exact = [z.detach().double().requires_grad_() for z in (p, q)]
    (exact[0].softmax(-1) - exact[1].softmax(-1)).abs().sum().div(2).backward()
    for mine, true in zip((p, q), exact, strict=True):
        assert mine.grad is not None
        assert true.grad is not None
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-6, atol=1e-7)
        assert bool((mine.grad[1] == 0).all())


@pytest.mark.parametrize("weight", [1e-38, 1e-12, 1e-4, 1 - 1e-4, 1 - 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_near_the_ends(weight: float, dtype: torch.dtype) -> None:
    p, q = (z.to(dtype) for z in rows_of(65))
    p = p.masked_fill(torch.arange(65) == 4, -INF)
    q = q.masked_fill(torch.arange(65) == 9, -INF)
    exact = [z.double().requires_grad_() for z in (p, q)]
    own = [z.clone().requires_grad_() for z in (p, q)]
    log_p, log_q = (z.log_softmax(-1) for z in exact)
    log_m = torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))
    terms = [torch.where(a == -INF, 0.0, a.exp() * (a - log_m)) for a in (log_p, log_q)]
    from_p, from_q = (t.sum(-1) for t in terms)
    pairs = [(ll.kl(*own, skew=weight), from_p), (ll.js(*own, beta=weight), weight * from_p + (1 - weight) * from_q)]
    # The textbook's sums cancel to 1e-16 of an entropy.
    slack = 1e-13 if dtype == torch.float64 else 1e-12
    for mine, true in pairs:
        if float(true.detach().min()) > 1e4 * slack:
            torch.testing.assert_close(mine.double(), true, rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=slack)
        assert bool(mine.isfinite().all())
        for grad in torch.autograd.grad(mine.sum(), own):
            assert bool(grad.isfinite().all())


def test_bounds() -> None:
    p, q = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    for weight in (0.1, 0.5, 0.9):
        torch.testing.assert_close(ll.kl(p, q, skew=weight), torch.tensor([-math.log(weight)]))
        spread = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
        torch.testing.assert_close(ll.js(p, q, beta=weight), torch.tensor([spread]))
    assert ll.tv(p, q).tolist() == [1.0]


def test_the_mirror_image() -> None:
    p, q = (z.float() for z in rows_of(1000))
    for beta in (0.1, 0.3, 0.8):
        torch.testing.assert_close(ll.js(p, q, beta=beta), ll.js(q, p, beta=1 - beta), rtol=1e-6, atol=0)
    torch.testing.assert_close(ll.tv(p, q), ll.tv(q, p), rtol=1e-6, atol=0)


def test_errors_say_what_was_expected() -> None:
    z = torch.zeros(2, 3)
    for call, message in (
        (lambda: ll.kl(z, z, skew=1.0), r"kl: expected 0 <= skew < 1, got 1\.0"),
        (lambda: ll.kl(z, z, skew=-0.1), r"kl: expected 0 <= skew < 1, got -0\.1"),
        (lambda: ll.kl(z, z, skew=math.nan), r"kl: expected 0 <= skew < 1, got nan"),
        (lambda: ll.js(z, z, beta=1.5), r"js: expected 0 <= beta <= 1, got 1\.5"),
        (lambda: ll.js(z, z[:1], beta=1), r"js: expected p and q of one shape .*\(2, 3\) and \(1, 3\)"),
        (lambda: ll.tv(z, z[:1]), r"tv: expected p and q of one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    share: Any = torch.tensor(0.5)
    for call in (lambda: ll.js(z, z, beta=share), lambda: ll.kl(z, z, skew=True)):
        with pytest.raises(TypeError, match="must be a number"):
            call()


# --- logits that are not built

WIDTH = 12


def heads(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((rows, WIDTH), (classes, WIDTH), (classes,), (rows, WIDTH + 3), (classes, WIDTH + 3))
    return [draw(20 + k, *shape).to(dtype).requires_grad_() for k, shape in enumerate(shapes)]


def built(parts: list[Tensor]) -> list[Tensor]:
    hidden, weight, bias, other_hidden, other_weight = parts
    return [(hidden @ weight.T + bias) * 0.5, other_hidden @ other_weight.T]


def not_built(parts: list[Tensor]) -> list[Any]:
    hidden, weight, bias, other_hidden, other_weight = parts
    return [ll.linear(hidden, weight, bias, scale=0.5), ll.linear(other_hidden, other_weight)]


@cases
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["two heads", "dense teacher", "dense student"])
def test_lazy_and_mixed(name: str, reduction: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, peer = CASES[name]
    monkeypatch.setattr("logitless.kernels.interface.DEFAULT_MAX_BYTES", 64 * 65 * 4 * 2)  # several tiles
    own = heads(150, 65)
    exact = [z.detach().double().requires_grad_() for z in own]
    student, teacher = not_built(own)
    full_student, full_teacher = built(exact)
    if kind == "dense teacher":
        own, exact = [*own[:3], built(own)[1].detach().requires_grad_()], exact[:3]
        exact.append(own[3].detach().double().requires_grad_())
        teacher, full_teacher = own[3], exact[3]
    elif kind == "dense student":
        own, exact = [built(own)[0].detach().requires_grad_(), *own[3:]], exact[3:]
        exact = [own[0].detach().double().requires_grad_(), *exact]
        student, full_student = own[0], exact[0]
    assert ll.explain(mine, student, teacher, reduction=reduction).backend == "cpu"
    got, true = mine(student, teacher, reduction=reduction), peer(full_student, full_teacher)
    true = true.mean() if reduction == "mean" else true
    upstream = 3 * draw(30, *true.shape)
    torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(got, own, upstream.float())
    for mine_z, true_z in zip(grads, torch.autograd.grad(true, exact, upstream), strict=True):
        assert float((mine_z.double() - true_z).norm()) <= 4e-6 * float(true_z.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["liger_jsd 0.1", "skewed kl 0.9", "tv"])
def test_lazy_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    mine, peer = CASES[name]
    own = heads(40, 65, dtype)
    exact = [z.detach().double().requires_grad_() for z in own]
    got, true = mine(*not_built(own)), peer(*built(exact))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    grads = zip(torch.autograd.grad(got.sum(), own), torch.autograd.grad(true.sum(), exact), strict=True)
    for mine_z, true_z in ((got, true), *grads):
        error = (mine_z.detach().double() - true_z.detach()).norm()
        assert float(error) <= limit * float(true_z.detach().norm())


@pytest.mark.parametrize("name", ["liger_jsd 0.1", "liger_jsd 1.0", "skewed kl 0.9", "tv"])
def test_compiled_graphs_are_eager(name: str) -> None:
    mine, _ = CASES[name]
    dense = [z.float() for z in rows_of(65)]
    for lazy in (False, True):
        torch._dynamo.reset()

        def function(*parts: Tensor, lazy: bool = lazy) -> Tensor:
            return mine(*(not_built(list(parts)) if lazy else parts)).square().sum()

        parts = heads(40, 65) if lazy else [z.clone().requires_grad_() for z in dense]
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        got, expected = compiled(*parts), function(*parts)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        for one, other in zip(torch.autograd.grad(got, parts), torch.autograd.grad(expected, parts), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@cases
def test_threads_make_no_difference(name: str) -> None:
    mine, _ = CASES[name]
    student, teacher = (z.float() for z in rows_of(49153))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            own = [z.clone().requires_grad_() for z in (student, teacher)]
            value = mine(*own)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), own)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- temperatures

TEMPERATURES = (0.5, 0.7, 2.0, 3.0)


@cases
@dtypes
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperature_divides_both_sides(name: str, dtype: torch.dtype, temperature: float) -> None:
    mine, peer = CASES[name]
    student, teacher = (z.to(dtype) for z in rows_of(65))
    check(
        lambda s, t: mine(s, t, temperature=temperature),
        lambda s, t: peer(s / temperature, t / temperature),
        student,
        teacher,
        f"{name} at {temperature}",
        temperature,
    )


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("name", ["liger_jsd 0.1", "liger_jsd 0.5", "skewed kl 0.0", "skewed kl 0.9", "tv"])
def test_small_divergences_keep_their_digits_at_any_temperature(name: str, temperature: float) -> None:
    """A logit of 20 divided in float32 would be off by 1e-6, which is all that sets the rows apart."""
    student = (draw(11, 3, 200) + 20).float()
    teacher = (student + 1e-5 * draw(12, 3, 200)).float()
    got = CASES[name][0](student, teacher, temperature=temperature)
    for value, p, q in zip(got, teacher.double() / temperature, student.double() / temperature, strict=True):
        weight = float(name.split()[-1]) if name != "tv" else 0.5
        exact = exact_rows.divergences(p, q, weight) if weight else {"kl": exact_rows.pair_stats(p, q)["kl"]}
        measure = "tv" if name == "tv" else "kl" if not weight else "weighted_js" if "js" in name else "skewed_kl"
        assert float(value) == pytest.approx(float(exact[measure].exact), rel=4e-7)


@pytest.mark.parametrize("name", ["liger_jsd 0.1", "skewed kl 0.0", "tv"])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_temperature_of_lazy_and_mixed_logits(name: str, temperature: float, reduction: str) -> None:
    mine, peer = CASES[name]
    for mixed in (False, True):
        own = heads(40, 65)
        exact = [z.detach().double().requires_grad_() for z in own]
        student, teacher = not_built(own)
        full_student, full_teacher = built(exact)
        if mixed:
            own, exact = own[:3], exact[:3]
            teacher = full_teacher.detach().float()
            full_teacher = teacher.double()
        got = mine(student, teacher, temperature=temperature, reduction=reduction)
        true = peer(full_student / temperature, full_teacher / temperature)
        true = true.mean() if reduction == "mean" else true
        upstream = 3 * draw(31, *true.shape)
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(got, own, upstream.float())
        for mine_z, true_z in zip(grads, torch.autograd.grad(true, exact, upstream), strict=True):
            assert float((mine_z.double() - true_z).norm()) <= 4e-6 * float(true_z.norm())


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_temperature_goes_by_tiles_and_by_kernels(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitless.kernels.interface.DEFAULT_MAX_BYTES", 20 * 65 * 8 * 2)
    p, q = (draw(k, 150, 65).float().requires_grad_() for k in (1, 2))
    choice = ll.explain(ll.kl, p, q, temperature=temperature)
    assert choice.backend == "cpu"
    assert choice.tile is not None
    assert choice.tile[0] < 150
    value = ll.kl(p, q, temperature=temperature)
    exact = [z.detach().double().requires_grad_() for z in (p, q)]
    true = distillm_skewed_kl(exact[1] / temperature, exact[0] / temperature, 0.0)
    torch.testing.assert_close(value.double(), true, rtol=1e-6, atol=0)
    upstream = 3 * draw(3, 150)
    grads = torch.autograd.grad(value, [p, q], upstream.float())
    for one, other in zip(grads, torch.autograd.grad(true, exact, upstream), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)


def test_temperature_in_graphs_transforms_and_second_derivatives() -> None:
    p, q = (z.requires_grad_() for z in rows_of(7))

    def function(p: Tensor, q: Tensor) -> Tensor:
        return ll.js(p, q, beta=0.1, temperature=1.7) + ll.entropy(q, temperature=1.7)

    assert torch.autograd.gradcheck(function, (p, q))
    assert torch.autograd.gradgradcheck(function, (p, q))
    own = [z.detach().float().requires_grad_() for z in (p, q)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = compiled(*own), function(*own)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for one, other in zip(torch.autograd.grad(got.sum(), own), torch.autograd.grad(expected.sum(), own), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    jacobian = torch.func.jacrev(function)(p.detach(), q.detach())
    torch.testing.assert_close(jacobian.sum(0), torch.autograd.grad(function(p, q).sum(), p)[0])


def test_temperatures_that_are_none() -> None:
    z, t = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for temperature in (0.0, -1.0, INF, math.nan):
        for call in (
            lambda o: ll.kl(z, z, **o),
            lambda o: ll.entropy(z, **o),
            lambda o: ll.log_probs(z, t, **o),
            lambda o: ll.pair_stats(z, z, **o),
        ):
            with pytest.raises(ValueError, match="expected a finite temperature above 0"):
                call({"temperature": temperature})
    wrong: Any = torch.tensor(2.0)
    with pytest.raises(TypeError, match="temperature must be a number"):
        ll.tv(z, z, temperature=wrong)
