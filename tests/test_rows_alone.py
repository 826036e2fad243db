"""A row's numbers are the same bits whatever rows are beside it: cut, permuted, padded, in tiles, by some threads."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
import logitless as ll
import logitless.functional as LF
from logitless import _native
from logitless.kernels import cpu
from product_choice import SERVED, pin_kernel, pin_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS, SPLITS = 41, 36  # of each number of classes; six of them make more than 200 a dtype
CLASSES = [1, 7, 65, 1000, 8193, 20011]  # below and above the parts into which long rows in lanes are cut
Numbers = dict[str, Tensor]
Call = Callable[[slice | Tensor], Numbers]


@pytest.fixture(autouse=True)
def products_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the product kernel under test wherever it serves; torch's promises nothing of a sum's order."""
    pin_kernel(monkeypatch)


def logits_of(rows: int, classes: int, seed: int) -> Tensor:
    z = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    z[3] += 60  # a neighbour far above the others
    z[5, 0] = 90
    z[7, : classes - 1] = -torch.inf
    return z


def targets_of(rows: int, classes: int) -> Tensor:
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(9))
    target[7] = classes - 1
    target[2] = -100
    return target


def measures(z: Tensor, q: Tensor, target: Tensor) -> Numbers:
    stats = ll.token_stats(z, target)
    return {
        "cross_entropy": LF.cross_entropy(z, target, reduction="none"),
        "smoothed": LF.cross_entropy(z, target, reduction="none", label_smoothing=0.1),
        "nll": stats.nll,
        "lse": stats.lse,
        "entropy of tokens": stats.entropy,
        "rank": stats.rank,
        "entropy": ll.entropy(z),
        "kl": ll.kl(q, z),
        "reverse kl": ll.kl(z, q),
        "js": ll.js(z, q),
    }


def dense(dtype: torch.dtype, classes: int) -> Call:
    z, q = logits_of(ROWS, classes, 1).to(dtype), logits_of(ROWS, classes, 2).to(dtype)
    target = targets_of(ROWS, classes)
    return lambda rows: measures(z[rows], q[rows], target[rows])


def lazy(dtype: torch.dtype, classes: int, depth: int = 33) -> Call:
    make = torch.Generator().manual_seed(4)
    hidden, weight, other = (
        torch.randn(n, depth, generator=make, dtype=torch.float64).to(dtype) for n in (ROWS, classes, classes)
    )
    hidden[3] *= 20
    target = targets_of(ROWS, classes)

    def call(rows: slice | Tensor) -> Numbers:
        z, q = ll.linear(hidden[rows], weight), ll.linear(hidden[rows], other)
        index = target[rows].clamp(min=0).unsqueeze(-1)
        return {
            **measures(z, q, target[rows]),
            "mixed kl": ll.kl(z, q.materialize()),
            "log-probabilities": z.log_softmax(-1).gather(-1, index),
            "logsumexp": z.logsumexp(-1),
            "gather": z.gather(-1, index),
            "values": z.materialize(),
        }

    return call


def choices(seed: int) -> Iterator[list[slice]]:
    make = torch.Generator().manual_seed(seed)
    for _ in range(SPLITS):
        cuts = torch.randint(1, ROWS, (int(torch.randint(1, 5, (1,), generator=make)),), generator=make).tolist()
        ends = [0, *sorted(set(cuts)), ROWS]
        yield [slice(a, b) for a, b in pairwise(ends)]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=1.5), other.nan_to_num(nan=1.5)) and torch.equal(one.isnan(), other.isnan())


def differing(call: Call, seed: int) -> list[str]:
    """Return what differs between all rows at once and the same rows in random parts, or in another order."""
    whole, found = call(slice(0, ROWS)), []
    for parts in choices(seed):
        for rows in parts:
            found += [name for name, value in call(rows).items() if not same(value, whole[name][rows])]
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    return found + [name for name, value in call(order).items() if not same(value, whole[name][order])]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_logits(dtype: torch.dtype, classes: int) -> None:
    assert differing(dense(dtype, classes), seed=classes) == []


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_head(dtype: torch.dtype, classes: int) -> None:
    if dtype in cpu.PRODUCT_DTYPES:
        assert differing(lazy(dtype, classes), seed=classes) == []
        return
    # Torch's products serve: what is dense of the same logits holds.
    z = lazy(dtype, classes)(slice(0, ROWS))["values"]
    q, target = z.flip(0), targets_of(ROWS, classes)
    assert differing(lambda rows: measures(z[rows], q[rows], target[rows]), seed=classes) == []


@pytest.mark.skipif("avx512" not in cpu.native_info()["supported"], reason="tiles are emulated with AVX-512")
def test_rows_of_a_bfloat16_head_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the steps that a processor's tiles take, where there are none."""
    before = cpu.native_info()["tiles"]
    _native.select_tiles("emulated")
    monkeypatch.setattr(cpu, "PRODUCT_DTYPES", SERVED | {torch.bfloat16})
    try:
        assert differing(lazy(torch.bfloat16, 1000), seed=3) == []
        hidden, weight, _ = heads(torch.bfloat16, 1000)
        target = targets_of(ROWS, 1000)
        nll = ll.token_stats(ll.linear(hidden, weight), target).nll
        truth = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, target, reduction="none")
        assert (nll.double() - truth).abs().max() < 1e-5
    finally:
        _native.select_tiles(before)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 20])
def test_long_rows_are_folded_in_parts_however_many_they_are(rows: int) -> None:
    """From 65536 classes on the parts of few rows are work for several threads."""
    for dtype in DTYPES:
        z = torch.randn(20, 70001, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
        target = torch.arange(20) * 3000
        whole, part = measures(z, z.flip(0), target), measures(z[:rows], z.flip(0)[:rows], target[:rows])
        assert [name for name in whole if not same(whole[name][:rows], part[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [19, 9001])
def test_positions_beside_each_other_in_memory(dtype: torch.dtype, classes: int) -> None:
    """Of (N, C, d), whose rows lie in lanes: a neighbour 40 nats above moves no bit of the others."""
    z = torch.randn(3, classes, 21, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z[1, 4, 11] = 45.0
    z = z.to(dtype)
    target = torch.randint(classes, (3, 21), generator=torch.Generator().manual_seed(6))

    def losses(z: Tensor, target: Tensor) -> Numbers:
        last = z.movedim(1, -1)
        return {
            "cross_entropy": LF.cross_entropy(z, target, reduction="none"),
            "smoothed": LF.cross_entropy(z, target, reduction="none", label_smoothing=0.1),
            "entropy": ll.entropy(last),
            "kl": ll.kl(last, last.flip(0)),
        }

    whole = losses(z, target)
    low = z.clone()
    low[1, 4, 11] = 0.0
    alone = losses(low, target)
    others = torch.ones(3, 21, dtype=torch.bool)
    others[1, 11] = False
    for name, value in alone.items():
        if name != "kl":  # whose other side is another image, which has no such neighbour
            assert same(value[others], whole[name][others]), name
    for first, last in ((0, 13), (8, 21), (2, 10)):
        part = losses(z[:, :, first:last], target[:, first:last])
        assert [name for name in part if not same(part[name], whole[name][:, first:last])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_one_row_alone(dtype: torch.dtype, classes: int) -> None:
    """Logits (C,) are the row that they would be among others, by whatever function."""
    z, target = logits_of(ROWS, classes, 1).to(dtype), targets_of(ROWS, classes)
    probabilities = z.double().softmax(-1).to(dtype)
    for reduction in ("none", "sum"):
        for given in (target, probabilities):
            whole = LF.cross_entropy(z, given, reduction="none")
            rows = [LF.cross_entropy(one, at, reduction=reduction) for one, at in zip(z, given, strict=True)]
            assert same(torch.stack(rows), whole)
    assert same(torch.stack([ll.entropy(one) for one in z]), ll.entropy(z))


def test_padding_and_threads_and_tiles() -> None:
    classes, depth = 3001, 17
    make = torch.Generator().manual_seed(8)
    hidden, weight = torch.randn(90, depth, generator=make), torch.randn(classes, depth, generator=make)
    target = torch.randint(classes, (90,), generator=make)
    padded_hidden = torch.cat([torch.full((5, depth), 1e30), hidden, torch.full((7, depth), torch.nan)])
    padded = torch.cat([torch.full((5,), -100), target, torch.full((7,), -100)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows = ll.token_stats(ll.linear(hidden, weight), target)
            if count == 1:
                first = rows
            # 40 rows of all classes, and all of them.
            for most in (40 * classes * 4 * 16 // 15 + 64, 200 * classes * 4):
                for wanted in (False, True):
                    leaf = hidden.clone().requires_grad_(wanted)
                    loss = LF.linear_cross_entropy(leaf, weight, target, reduction="none", max_bytes=most)
                    wide = LF.linear_cross_entropy(padded_hidden, weight, padded, reduction="none", max_bytes=most)
                    assert torch.equal(loss, wide[5:95])
                    assert torch.equal(loss, LF.cross_entropy(ll.linear(hidden, weight), target, reduction="none"))
            for name in ("nll", "lse", "entropy", "argmax", "rank"):
                assert torch.equal(getattr(rows, name), getattr(first, name)), name
    finally:
        torch.set_num_threads(threads)


def test_a_call_whose_sums_follow_its_rows_is_found_out() -> None:
    """The check itself: an order of summation that the number of rows decides does not pass it."""
    z = logits_of(ROWS, 1000, 1).float()

    def mutant(rows: slice | Tensor) -> Numbers:
        given = z[rows]
        turned = given.roll(given.shape[0], 1)
        return {"log_sum": (turned - given.amax(1, keepdim=True)).exp().sum(1).log()}

    assert differing(mutant, seed=1)


def asked_for(z: ll.LazyLogits, q: ll.LazyLogits, target: Tensor) -> Numbers:
    stats = ll.token_stats(z, target, deterministic=True)
    pairs = ll.pair_stats(z, q, target.clamp(min=0), deterministic=True)
    return {
        **{f"token_stats {name}": value for name, value in stats._asdict().items()},
        **{f"pair_stats {name}": value for name, value in pairs._asdict().items() if value is not None},
        "log_probs": ll.log_probs(z, target, deterministic=True),
        "log_probs of a temperature": ll.log_probs(z, target, temperature=0.7, deterministic=True),
        "entropy": ll.entropy(z, deterministic=True),
        "kl": ll.kl(q, z, deterministic=True),
        "skewed kl": ll.kl(q, z, skew=0.1, deterministic=True),
        "js": ll.js(z, q, deterministic=True),
        "weighted js": ll.js(z, q, beta=0.1, deterministic=True),
        "tv": ll.tv(z, q, deterministic=True),
    }


def heads(dtype: torch.dtype, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(5)
    hidden, weight, other = (
        torch.randn(n, 33, generator=make, dtype=torch.float64).to(dtype) for n in (ROWS, classes, classes)
    )
    return hidden, weight, other


@pytest.mark.parametrize("classes", [7, 1000, 20011])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype in SERVED])
def test_deterministic_rows_where_torch_multiplies(
    dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, other = heads(dtype, classes)
    target = targets_of(ROWS, classes)

    def call(rows: slice | Tensor) -> Numbers:
        return asked_for(ll.linear(hidden[rows], weight), ll.linear(hidden[rows], other), target[rows])

    by_the_kernel = ll.log_probs(ll.linear(hidden, weight), target)
    pin_torch(monkeypatch)
    assert differing(call, seed=classes) == []
    assert torch.equal(call(slice(0, ROWS))["log_probs"], by_the_kernel)


def test_deterministic_rows_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pin_torch(monkeypatch)
    hidden, weight, other = heads(torch.float32, 1000)
    target = targets_of(ROWS, 1000)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden: Tensor) -> list[Tensor]:
        z, q = ll.linear(hidden, weight), ll.linear(hidden, other)
        return [
            ll.token_stats(z, target, deterministic=True).entropy,
            ll.log_probs(z, target, deterministic=True),
            ll.kl(q, z, deterministic=True),
        ]

    z, q = ll.linear(hidden, weight), ll.linear(hidden, other)
    eager = asked_for(z, q, target)
    torch._dynamo.reset()
    found = compiled(hidden)
    torch._dynamo.reset()
    for value, name in zip(found, ("token_stats entropy", "log_probs", "kl"), strict=True):
        assert torch.equal(value, eager[name]), name


def test_deterministic_rows_are_differentiated_as_the_others() -> None:
    hidden, weight, other = heads(torch.float64, 65)
    target, upstream = targets_of(ROWS, 65), torch.randn(ROWS, dtype=torch.float64)
    hidden.requires_grad_()
    for asked in (
        lambda d: ll.log_probs(ll.linear(hidden, weight), target, deterministic=d),
        lambda d: ll.js(ll.linear(hidden, weight), ll.linear(hidden, other), beta=0.3, deterministic=d),
    ):
        mine, plain = (torch.autograd.grad(asked(d), hidden, upstream)[0] for d in (True, False))
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_deterministic_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, other = heads(torch.float32, 65)
    z, q, target = ll.linear(hidden, weight), ll.linear(hidden, other), targets_of(ROWS, 65)
    choice = ll.explain(ll.log_probs, z, target, deterministic=True)
    assert (choice.backend, choice.products) == ("cpu", "the kernel multiplies torch.float32")
    sparse = ll.SparseLogits.top_k(z, 3)
    with pytest.raises(RuntimeError, match="kl: deterministic=True cannot be kept: torch's operations serve SparseLog"):
        ll.kl(sparse, q, deterministic=True)
    with monkeypatch.context() as patched:
        patched.setenv("LOGITLESS_BACKEND", "reference")
        with pytest.raises(RuntimeError, match="entropy: deterministic=True cannot be kept: torch's operations serve"):
            ll.entropy(z, deterministic=True)
    with monkeypatch.context() as patched:
        patched.setattr(cpu, "FIXED_PRODUCTS", frozenset[torch.dtype]())
        with pytest.raises(RuntimeError, match=r"no kernel multiplies torch\.float32 on this processor"):
            ll.log_probs(z, target, deterministic=True)
        assert ll.log_probs(z.materialize(), target, deterministic=True).shape == target.shape  # nothing is multiplied
    by_the_kernel = ll.log_probs(z, target, deterministic=True)
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(ll.log_probs(z, target, deterministic=True), by_the_kernel)
    finally:
        torch.set_float32_matmul_precision("highest")
