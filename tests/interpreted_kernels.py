"""Every Triton kernel, interpreted on the CPU, held to the reference in float64 and to exact arithmetic.

`test_triton.py` runs this file in a process of its own: Triton reads TRITON_INTERPRET when it is imported. Memory that
is not initialised holds NaN (conftest.py), so what no program writes fails a test.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import exact_rows
from logitless.kernels import reference
from logitless.kernels.interface import Divergence, ElementLoss
from logitless.kernels.triton import (
    cosine_embedding,
    cosine_embedding_grad,
    cosine_similarity,
    cosine_similarity_grad,
    element_losses,
    launching,
    pair_row_grad,
    pair_row_stats,
    product,
    row_grad,
    row_stats,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 7, 65, 1000, 65537 + 64)
# A kernel's sums of float32 are within so many units in the last place; of halves, exp2(x) alone is within |x| of them.
ULPS = {torch.float32: 8, torch.bfloat16: 64, torch.float16: 64, torch.float64: 64}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The interpreter is slow: rows in parts have the two dtypes that long rows have.
CASES = [(dtype, n) for dtype in DTYPES for n in SIZES if n < 10_000 or dtype in (torch.float32, torch.bfloat16)]
every_case = pytest.mark.parametrize(("dtype", "classes"), CASES, ids=str)


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(classes: int) -> int:
    return 3 if classes > 10_000 else 7


def assert_near(got: Tensor | None, truth: Tensor | None, units: float, what: str, terms: Tensor | None = None) -> None:
    """A result is within some units in the last place of each truth, or of a row's largest where there are rows.

    `terms` is the size of what the truth is the difference of, where it is one.
    """
    assert (got is None) == (truth is None), what
    if got is None or truth is None:
        return
    assert got.dtype == truth.dtype, what
    assert got.shape == truth.shape, what
    if not got.is_floating_point():
        assert torch.equal(got, truth), what
        return
    wide, true = got.double(), truth.double()
    odd = ~true.isfinite()
    assert torch.equal(wide[odd].nan_to_num(nan=0.5), true[odd].nan_to_num(nan=0.5)), what
    size = true.masked_fill(odd, 0).abs()
    if true.dim() > 1:
        size = size.amax(-1, keepdim=True).expand_as(size)
    eps = torch.finfo(real_of(got.dtype)).eps
    if terms is not None:
        size = size.maximum(terms.double().expand_as(size))
    allowed = units * eps * size + torch.finfo(got.dtype).eps * true.masked_fill(odd, 0).abs() + 1e-44
    error = (wide - true).masked_fill(odd, 0).abs()
    assert bool((error <= allowed).all()), f"{what}: {float((error / (eps * size + 1e-300)).max()):.3g} units"


def logits_of(dtype: torch.dtype, classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows with masks, one-hot ones and a large common offset, and a target of which one row is ignored."""
    rows = rows_of(classes)
    z = drawn(seed, rows, classes)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    if classes > 2:
        z[:, classes // 2] = -torch.inf
        z[0, target[0]] += 40  # a loss of 1e-12 or so
        z[-1] += 1000 if dtype != torch.float16 else 100
        target[1] = -100
    return z.to(dtype), target


OPTIONS: dict[str, dict[str, Any]] = {
    "target": {},
    "everything": {"lse": True, "entropy": True, "argmax": True, "rank": True},
    "smooth": {"smooth": True, "class_weight": True},
    "probabilities": {"smooth": True, "class_weight": True, "dense_target": True, "lse": True},
    "no target": {"target": False, "entropy": True, "argmax": True},
}


def asked(name: str, z: Tensor, target: Tensor) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    classes = z.shape[-1]
    options["target"] = None if options.pop("target", True) is False else target
    if options.get("class_weight"):
        weight = drawn(5, classes).abs()
        weight[classes // 2] = 0  # beside -inf
        options["class_weight"] = weight.to(real_of(z.dtype))
    if options.get("dense_target"):
        soft = drawn(6, *z.shape).softmax(-1)
        soft[..., classes // 2] = 0
        options["dense_target"] = soft.to(z.dtype)
    return options


@every_case
@pytest.mark.parametrize("name", OPTIONS)
def test_row_statistics(name: str, dtype: torch.dtype, classes: int) -> None:
    z, target = logits_of(dtype, classes)
    options = asked(name, z, target)
    got, truth = row_stats(z, **options), reference.row_stats(z, **options)
    for field, value, true in zip(got._fields[:-1], got, truth, strict=False):
        units = ULPS[dtype] * (4.0 if field in ("smooth_sum", "dense_sum", "dense_mass") else 1.0)
        if field == "log_sum":
            units *= 2**29 if dtype != torch.float64 else 1  # float64 that holds what float32 sums know
        assert_near(value, true, units, field)
    assert got.bad_row == -1


GRADIENTS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"a_scale": 1.0, "c_scale": -1.0, "target": True},
    "smoothing": {"a_scale": 0.9, "c_scale": -0.9, "f_scale": -0.01, "a_extra": 0.1, "target": True, "weights": True},
    "entropy": {"a_scale": 0.5, "b_scale": -1.0, "c_scale": -1.0, "target": True, "given": "abc"},
    "probabilities": {"a_scale": 1.0, "e_scale": -1.0, "dense": True, "weights": True, "given": "ae"},
}


def gradient_options(name: str, z: Tensor, target: Tensor) -> dict[str, Any]:
    spec, real = dict(GRADIENTS[name]), real_of(z.dtype)
    options: dict[str, Any] = {"upstream": drawn(7, z.shape[0]).to(real)}
    if spec.pop("target", False):
        options["target"] = target
    if spec.pop("weights", False):
        options |= {"class_weight": drawn(5, z.shape[1]).abs().to(real), "index_weight": "target" in options}
    if spec.pop("dense", False):
        options["dense_target"] = drawn(6, *z.shape).softmax(-1).to(z.dtype)
    for letter in spec.pop("given", ""):
        options[letter] = drawn(ord(letter), z.shape[0]).to(real)
    return options | spec


@every_case
@pytest.mark.parametrize("name", GRADIENTS)
def test_row_gradients(name: str, dtype: torch.dtype, classes: int) -> None:
    z, target = logits_of(dtype, classes)
    options, stats = gradient_options(name, z, target), reference.row_stats(z, target)
    saved = (stats.row_max, stats.log_sum)
    got = row_grad(z, *saved, **options)
    truth = reference.row_grad(z, *saved, **options)
    # The reference forms p - 1 in float64.
    terms = (
        options["upstream"].abs().unsqueeze(-1)
        if dtype == torch.float64
        else 2**-29 * options["upstream"].abs()[:, None]
    )
    assert_near(got, truth, ULPS[dtype] * 2, name, terms)
    if classes > 2 and "target" in options:
        assert torch.equal(got[1], torch.zeros_like(got[1]))
    in_place = z.clone()
    assert row_grad(in_place, *saved, **options, out=in_place) is in_place
    assert torch.equal(in_place, got)


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "classes first": lambda z: (z.T.contiguous(), 0),
    "images": lambda z: (z.reshape(1, *z.shape).transpose(1, 2).contiguous(), 1),
    "every other class": lambda z: (torch.stack((z, z), -1).flatten(-2)[:, ::2], -1),
    "a part of each row": lambda z: (torch.cat((z, z), -1)[:, : z.shape[1]], -1),
    "rows of rows": lambda z: (z.unsqueeze(0).expand(2, *z.shape)[:, 1:], -1),
    "broadcast": lambda z: (z[:1].expand(5, z.shape[1]), 1),
}


@pytest.mark.parametrize("classes", [7, 65, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, classes: int) -> None:
    z, dim = LAYOUTS[layout](logits_of(torch.float32, classes)[0])
    shape = list(z.shape)
    del shape[dim]
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(3))
    options = {"class_dim": dim, "entropy": True, "argmax": True, "rank": True}
    got, truth = row_stats(z, target, **options), reference.row_stats(z, target, **options)
    for field in ("row_max", "nll", "entropy", "argmax", "rank"):
        assert_near(getattr(got, field), getattr(truth, field), 8, field)
    upstream = drawn(4, *shape).float()
    told = {"class_dim": dim, "upstream": upstream, "a_scale": 1.0, "c_scale": -1.0}
    grad = row_grad(z, truth.row_max, truth.log_sum, target, **told)
    true = reference.row_grad(z, truth.row_max, truth.log_sum, target, **told)
    assert_near(grad.movedim(dim, -1), true.movedim(dim, -1), 8, "gradient")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and parts as small as a GPU's or smaller, so that a row has many of each."""
    monkeypatch.setattr(launching, "_NUMBERS_INTERPRETED", 256)
    for module in ("rows", "pairs"):
        monkeypatch.setattr(f"logitless.kernels.triton.{module}.PART_CLASSES", 300)
    monkeypatch.setattr(launching, "GRADIENT_PART_CLASSES", 256)


@pytest.mark.parametrize(("classes", "dtype"), [(65, torch.bfloat16), (400, torch.float32)], ids=str)
def test_rows_of_many_blocks_and_parts(classes: int, dtype: torch.dtype, small_blocks: None) -> None:
    for name in ("everything", "probabilities"):
        test_row_statistics(name, dtype, classes)
    for name in GRADIENTS:
        test_row_gradients(name, dtype, classes)
    test_pair_measures(dtype, classes, 1.0)
    test_divergences(Divergence("skewed_kl", 0.1), dtype, classes)


def test_a_row_in_parts_without_a_class_or_with_nan(small_blocks: None) -> None:
    z = drawn(1, 4, 1000).float()
    z[0, :600] = -torch.inf  # two parts of nothing
    z[1] = -torch.inf
    z[2, 700] = torch.nan
    z[3, 5] = torch.inf
    options = {"lse": True, "entropy": True, "argmax": True}
    got, truth = row_stats(z, **options), reference.row_stats(z, **options)
    assert_near(got.lse[:1], truth.lse[:1], 8, "lse")  # type: ignore[index] # asked for
    assert_near(got.argmax, truth.argmax, 0, "argmax")
    assert got.lse is not None
    assert bool(got.lse[1:].isnan().all())


def test_a_bad_class_makes_its_own_row_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    z, target = logits_of(torch.float32, 65)
    expected = row_stats(z, target, rank=True)
    for wrong in (65, -1, 2**40, -(2**40)):
        bad = target.clone()
        bad[4] = wrong
        got = row_stats(z, bad, rank=True)
        assert got.bad_row == -1
        assert got.nll is not None
        assert got.rank is not None
        assert expected.nll is not None
        assert got.nll[4].isnan()
        assert got.rank[4] == -1
        others = [0, 1, 2, 3, 5, 6]
        assert torch.equal(got.nll[others], expected.nll[others])
        with monkeypatch.context() as patch:
            patch.setenv("LOGITLESS_CHECK", "1")
            assert row_stats(z, bad).bad_row == 4


def test_an_ignored_row_is_not_read() -> None:
    z, target = logits_of(torch.float32, 1000)
    broken = z.clone()
    broken[1] = torch.nan
    got, expected = row_stats(broken, target, lse=True, entropy=True), row_stats(z, target, lse=True, entropy=True)
    for one, other in zip(got[:5], expected[:5], strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    assert expected.nll is not None
    assert expected.nll[1] == 0
    told = {"a_scale": 1.0, "c_scale": -1.0, "upstream": torch.full((7,), torch.inf)}
    assert torch.equal(row_grad(broken, expected.row_max, expected.log_sum, target, **told)[1], torch.zeros(1000))


def test_a_narrow_gradient_lies_in_the_logits_own_bytes() -> None:
    z, target = logits_of(torch.float32, 1000)
    stats = reference.row_stats(z, target)
    told = {"a_scale": 1.0, "c_scale": -1.0, "upstream": drawn(7, 7).float()}
    wide = row_grad(z, stats.row_max, stats.log_sum, target, **told)
    memory = z.clone()
    out = memory.view(torch.bfloat16)[:, :1000]
    assert row_grad(memory, stats.row_max, stats.log_sum, target, **told, out=out) is out
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    assert bool(((out.double() - wide.double()).abs() <= 2**-7 * wide.abs()).all())
    with pytest.raises(ValueError, match="in their own bytes"):
        row_grad(z, stats.row_max, stats.log_sum, target, **told, out=torch.empty(7, 1000, dtype=torch.bfloat16))


# --- two rows


def pair_of(dtype: torch.dtype, classes: int, apart: float) -> tuple[Tensor, Tensor, Tensor]:
    z = drawn(1, rows_of(classes), classes, scale=2.0)
    y = z + drawn(2, *z.shape, scale=apart)
    target = torch.randint(classes, (z.shape[0],), generator=torch.Generator().manual_seed(3))
    if classes > 2:
        z[:, classes // 2] = y[:, classes // 2] = -torch.inf
        z[0, 0] = -torch.inf  # a class that one of them excludes
        target[1] = -100
    return z.to(dtype), y.to(dtype), target


ASKED = dict.fromkeys(("kl", "reverse_kl", "js", "cross_entropy", "entropy"), True)
UPSTREAM = ("kl", "reverse_kl", "js", "cross_entropy", "entropy_p", "entropy_q", "nll_p", "nll_q")


@pytest.mark.parametrize("apart", [0.01, 1.0])
@every_case
def test_pair_measures(dtype: torch.dtype, classes: int, apart: float) -> None:
    z, y, target = pair_of(dtype, classes, apart)
    got, truth = pair_row_stats(z, y, target, **ASKED), reference.pair_row_stats(z, y, target, **ASKED)
    for field, value, true in zip(got._fields[:-2], got, truth, strict=False):
        assert_near(value, true, ULPS[dtype] * 2, field)
    upstream = {name: drawn(i, z.shape[0]).to(real_of(dtype)) for i, name in enumerate(UPSTREAM)}
    groups = [UPSTREAM, *((name,) for name in UPSTREAM)] if classes in (7, 65) else [UPSTREAM]
    for names in groups:
        given = {name: upstream[name] for name in names}
        if "reverse_kl" in given and classes > 2:  # infinite where p excludes a class of q's
            given = {name: grad.index_fill(0, torch.tensor(0), 0) for name, grad in given.items()}
        grads = pair_row_grad(z, y, got.saved, target, **given)
        trues = reference.pair_row_grad(z, y, truth.saved, target, **given)
        for grad, true in zip(grads, trues, strict=True):
            assert grad is not None
            assert true is not None
            kept = slice(1, None) if classes > 2 else slice(None)
            assert_near(grad[kept], true[kept], ULPS[dtype] * 16, str(names))


DIVERGENCES = [
    *(Divergence("skewed_kl", weight) for weight in (0.1, 0.9)),
    *(Divergence("weighted_js", weight) for weight in (0.1, 0.5)),
    Divergence("total_variation"),
]


@pytest.mark.parametrize("classes", [7, 65, 1000])
@every_dtype
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.family} {d.weight}")
def test_divergences(divergence: Divergence, dtype: torch.dtype, classes: int) -> None:
    for apart in (0.01, 1.0):
        z, y, _ = pair_of(dtype, classes, apart)
        told = {"kl": False, "divergence": divergence}
        got, truth = pair_row_stats(z, y, **told), reference.pair_row_stats(z, y, **told)
        assert_near(got.divergence, truth.divergence, ULPS[dtype] * 2, "divergence")
        given = {"divergence": divergence, "divergence_grad": drawn(4, z.shape[0]).to(real_of(dtype))}
        grads = pair_row_grad(z, y, got.saved, **given)
        for grad, true in zip(grads, reference.pair_row_grad(z, y, truth.saved, **given), strict=True):
            terms = given["divergence_grad"].abs()[:, None] * (1.0 if dtype == torch.float64 else 0.0)
            assert_near(grad, true, ULPS[dtype] * 64, "gradient", terms)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0**20])
def test_equal_rows_are_nothing_apart(shift: float) -> None:
    z = drawn(1, 7, 1000).float()
    z[:, 3] = -torch.inf
    if shift > 1:
        z = z.round()  # so that the shift rounds nothing
    got = pair_row_stats(z, z + shift, reverse_kl=True, js=True)
    for value in (got.kl, got.reverse_kl, got.js):
        assert value is not None
        limit = 0.0 if shift != 0.5 else 1e-13
        assert bool((value >= 0).all())
        assert float(value.max()) <= limit
    assert got.same_top is not None
    assert bool(got.same_top.all())


def test_disjoint_rows() -> None:
    z = torch.full((1, 8), -torch.inf)
    y = z.clone()
    z[0, :4], y[0, 4:] = 0.0, 0.0
    got = pair_row_stats(z, y, js=True)
    assert got.kl is not None
    assert got.js is not None
    assert got.kl.item() == torch.inf
    assert got.js.item() == pytest.approx(0.6931471805599453, rel=1e-7)
    tv = pair_row_stats(z, y, kl=False, divergence=Divergence("total_variation")).divergence
    assert tv is not None
    assert tv.item() == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize("apart", [1e-3, 0.3, 3.0])
def test_measures_in_exact_arithmetic(apart: float) -> None:
    """Within a few units of the exact value, beside what half a unit of each logit would change."""
    z, y = drawn(1, 2, 257).float(), None
    y = (z.double() + drawn(2, 2, 257, scale=apart)).float()
    stats = row_stats(z, torch.tensor([3, 200]), lse=True, entropy=True)
    pair = pair_row_stats(z, y, reverse_kl=True, js=True, cross_entropy=True, entropy=True)
    for row in range(2):
        truths = exact_rows.token_stats(z[row], [3, 200][row]) | exact_rows.pair_stats(z[row], y[row])
        for name, (exact, _) in truths.items():
            value = getattr(stats, name, None) if name in ("nll", "lse", "entropy") else getattr(pair, name)
            assert exact_rows.ulps(float(value[row]), exact, torch.float32) < 5, (name, row)
        for weight in (0.1, 0.7):
            exacts = exact_rows.divergences(z[row], y[row], weight)
            for family, name in (("skewed_kl", "skewed_kl"), ("weighted_js", "weighted_js"), ("total_variation", "tv")):
                asked_for = Divergence(family, weight)  # type: ignore[arg-type] # one of the three
                made = pair_row_stats(z, y, kl=False, divergence=asked_for).divergence
                assert made is not None
                assert exact_rows.ulps(float(made[row]), exacts[name].exact, torch.float32) < 5, (name, row)


# --- single elements


LOSSES: tuple[ElementLoss, ...] = (
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "kl_div",
    "kl_div_log_target",
)


def elements_of(loss: ElementLoss, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    x, t = drawn(1, *shape, scale=5.0), drawn(2, *shape).sigmoid()
    t.view(-1)[:2] = torch.tensor([0.0, 1.0])
    if loss == "binary_cross_entropy":
        x = x.sigmoid()
        x.view(-1)[:4] = torch.tensor([0.0, 1.0, 1e-9, 0.5])
    return x.to(dtype), (t.log() if loss == "kl_div_log_target" else t).to(dtype)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "turned": lambda x: x.T,
    "every other": lambda x: x[:, ::2],
    "of four dimensions": lambda x: torch.stack((x, x)).unflatten(1, (7, 1, 1))[:, ::2, ..., 1:].transpose(0, 2),
}


@pytest.mark.parametrize("form", FORMS)
@every_dtype
@pytest.mark.parametrize("loss", LOSSES)
def test_elements(loss: ElementLoss, dtype: torch.dtype, form: str) -> None:
    x, t = (FORMS[form](e) for e in elements_of(loss, dtype, 7, 65))
    assert_elements(loss, x, t, None, None)


def assert_elements(loss: ElementLoss, x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> None:
    units = 8.0
    for kind in {x.dtype, real_of(x.dtype)}:
        got, outside = element_losses.elements(loss, x, t, weight, pos_weight, dtype=kind)
        assert not outside
        true = reference.elements(loss, x, t, weight, pos_weight, dtype=kind)[0]
        assert got.stride() == true.stride()
        terms = x.abs().reshape(-1, 1) if loss == "kl_div" else None  # t log t and t x may cancel
        assert_near(got.reshape(-1, 1), true.reshape(-1, 1), units, "value", terms)
    total, truth = (e.elements_sum(loss, x, t, weight, pos_weight)[0] for e in (element_losses, reference))
    assert isinstance(total, Tensor)
    size = float(reference.elements(loss, x.double(), t.double(), weight, pos_weight)[0].abs().sum())
    assert abs(float(total) - float(truth)) <= 8 * torch.finfo(real_of(x.dtype)).eps * size
    upstream = drawn(3, *x.shape).to(x.dtype)
    for scale in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        told = {"upstream": upstream, "scale": scale}
        got = element_losses.elements_grad(loss, x, t, weight, pos_weight, **told)
        true = reference.elements_grad(loss, x, t, weight, pos_weight, **told)
        terms = 0.3 * upstream.abs().flatten() if loss == LOSSES[0] else None  # sigmoid(x) - t may cancel
        assert_near(got.flatten(), true.flatten(), units, "gradient", terms)
    in_place = x.clone()
    made = element_losses.elements_grad(loss, in_place, t, weight, pos_weight, upstream=upstream[:1, :1].reshape(-1)[0])
    out = element_losses.elements_grad(
        loss, in_place, t, weight, pos_weight, upstream=upstream[:1, :1].reshape(-1)[0], out=in_place
    )
    assert out is in_place
    assert torch.equal(in_place, made)


@every_dtype
@pytest.mark.parametrize("loss", LOSSES[:2])
def test_weights_of_elements(loss: ElementLoss, dtype: torch.dtype) -> None:
    x, t = elements_of(loss, dtype, 7, 65)
    of_class, of_row = drawn(4, 65).abs().to(dtype), drawn(5, 7, 1).abs().to(dtype)
    of_class[3] = 0
    positive = drawn(6, 65).abs().to(dtype) if loss == LOSSES[0] else None
    for weight in (of_class, of_row):
        assert_elements(loss, x, t, weight, positive)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8, torch.int32], ids=str)
def test_integer_targets_of_elements(kind: torch.dtype) -> None:
    x, t = elements_of(LOSSES[0], torch.float32, 7, 65)
    labels = (t > 0.5).to(kind)
    got, true = (e.elements(LOSSES[0], x, labels)[0] for e in (element_losses, reference))
    assert_near(got.flatten(), true.flatten(), 8, "value")


# --- cosines


SHAPES = (((7, 65), (7, 65), 1), ((7, 65), (7, 65), 0), ((3, 5, 6), (3, 5, 6), 1), ((3, 1, 6), (3, 5, 6), 1))


@pytest.mark.parametrize("shapes", [*SHAPES, ((1000,), (1000,), 0), ((2, 1), (2, 1), 1)], ids=str)
@every_dtype
def test_cosine_similarity(dtype: torch.dtype, shapes: tuple[Any, Any, int]) -> None:
    first, second, dim = shapes
    x1, x2 = drawn(1, *first).to(dtype), drawn(2, *second).to(dtype)
    eps = 0.25 if dtype != torch.float64 else 1e-8
    got, truth = cosine_similarity(x1, x2, dim, eps, save=True), reference.cosine_similarity(x1, x2, dim, eps)
    assert_near(got.out.reshape(-1, 1), truth.out.reshape(-1, 1), 4, "cosine", torch.ones(()))
    if first != second:
        return
    assert got.saved is not None
    told = {"upstream": drawn(3, *got.out.shape).to(got.out.dtype), "scale": 0.5}
    grads = cosine_similarity_grad(x1, x2, got.saved, dim, eps, **told)
    trues = reference.cosine_similarity_grad(x1, x2, got.saved, dim, eps, **told)
    for grad, true in zip(grads, trues, strict=True):
        assert grad is not None
        assert true is not None
        terms = torch.ones(()) if dtype == torch.float64 else None  # in which the reference loses as much
        assert_near(grad.movedim(dim, -1), true.movedim(dim, -1), 4, "gradient", terms)
    one = cosine_similarity_grad(x1, x2, got.saved, dim, eps, wanted=(False, True))
    assert one[0] is None


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_cosines_of_tiny_and_huge_vectors(size: float) -> None:
    x = drawn(1, 7, 65)
    for kind, factor in ((torch.float32, size), (torch.float64, size**7)):
        one = cosine_similarity((x * factor).to(kind), x.to(kind), 1, 0.0).out
        assert_near(one, torch.ones_like(one), 2, "cosine")


@every_dtype
def test_cosine_embedding(dtype: torch.dtype) -> None:
    x1, x2 = drawn(1, 9, 65).to(dtype), drawn(2, 9, 65).to(dtype)
    x2[0] = x1[0]
    target = torch.tensor([1, -1, 1, -1, 0, 1, -1, 1, -1])
    for margin in (-0.1, 0.5):
        got, truth = (
            cosine_embedding(x1, x2, target, margin, save=True),
            reference.cosine_embedding(x1, x2, target, margin),
        )
        assert float((got.out.double() - truth.out.double()).abs().max()) < 2 * torch.finfo(real_of(dtype)).eps
        assert got.saved is not None
        told = {"upstream": drawn(3, 9).to(got.out.dtype)}
        grads = cosine_embedding_grad(x1, x2, target, got.saved, margin, **told)
        trues = reference.cosine_embedding_grad(x1, x2, target, got.saved, margin, **told)
        for grad, true in zip(grads, trues, strict=True):
            assert grad is not None
            assert true is not None
            assert_near(grad[1:], true[1:], 16, "gradient")
        assert grads[0] is not None
        assert torch.equal(grads[0][4], torch.zeros_like(grads[0][4]))


# --- products


@pytest.mark.parametrize("kinds", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32,) * 2], ids=str)
def test_products_are_written_in_float32(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    first, second = drawn(1, 65, 33).to(kinds[0]), drawn(2, 33, 100).to(kinds[1])
    truth, out = first.double() @ second.double(), torch.ones(65, 100)
    product(first, second, out, accumulate=True)
    torch.testing.assert_close(out, (truth + 1).float(), rtol=1e-5, atol=1e-4)
    product(first, second, out)
    torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-4)
    if kinds[0] != torch.float32:
        product(first.float(), second, out)
        torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-4)
        product(second.T, first.T.float(), out.T, accumulate=True)
        torch.testing.assert_close(out, 2 * truth.float(), rtol=1e-5, atol=1e-4)
