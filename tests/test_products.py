"""The compiled matrix product against float64, and where it serves."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product as combinations

import pytest
import torch
from torch import Tensor

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless import _native
from logitless._heads import products
from logitless.kernels import cpu
from logitless.kernels.native import DTYPES
from product_choice import pin_kernel, pin_torch

ORDERS = tuple(combinations((False, True), repeat=2))
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
UNIT = torch.finfo(FLOAT32).eps / 2
# One row, part of a tile, several; depths of half a unit, of several cuts, and longer than what is packed at once.
SHAPES = (
    (1, 1, 1),
    (7, 3, 5),
    (65, 33, 65),
    (14, 16, 32),
    (130, 1000, 97),
    (13, 2001, 33),
    (3001, 70, 20),
    (1000, 31, 1030),
    (100, 49153, 7),
    (300, 5000, 450),
)


@pytest.fixture(params=_native.native_info()["supported"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that is compiled in and that this processor has."""
    before = cpu.native_info()["isa"]
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa(before)


def matrix(seed: int, rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return numbers.T.contiguous().T if transposed else numbers


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix inside a wider one, all NaN."""
    return torch.full((rows, columns + 3), torch.nan, dtype=dtype)[:, :columns]


def assert_is_product(out: Tensor, first: Tensor, second: Tensor, before: Tensor | None = None) -> None:
    """Within 16 roundings of float32 of the terms' sizes, and of one to the dtype of `out`."""
    truth, size = first.double() @ second.double(), first.double().abs() @ second.double().abs()
    if before is not None:
        truth, size = truth + before, size + before.abs()
    allowed = 16 * UNIT * size + torch.finfo(out.dtype).eps / 2 * truth.abs()
    assert bool(((out.double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize(("first_transposed", "second_transposed"), ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(isa: str, shape: tuple[int, int, int], first_transposed: bool, second_transposed: bool) -> None:
    rows, depth, columns = shape
    cpu.empty_pooled(torch.Size((2**21,)), FLOAT32).fill_(torch.nan)  # what panels are packed into next
    first = matrix(1, rows, depth, FLOAT32, first_transposed)
    second = matrix(2, depth, columns, FLOAT32, second_transposed)
    out = poisoned(rows, columns, FLOAT32)
    outside = torch.as_strided(out, (rows, 3), out.stride(), columns)
    cpu.product(first, second, out)
    assert_is_product(out, first, second)
    before = out.double()
    cpu.product(first, second, out, accumulate=True)
    assert_is_product(out, first, second, before)
    assert bool(outside.isnan().all())
    by_column = poisoned(columns, rows, FLOAT32).T
    cpu.product(first, second, by_column)
    assert_is_product(by_column, first, second)


def tiles_that_serve() -> list[str]:
    """The tiles (or none: vectors) that multiply bfloat16 here; emulated ones wherever there is AVX-512."""
    before, found = cpu.native_info()["tiles"], []
    for name in ("none", "processor", "emulated"):
        try:
            _native.select_tiles(name)
        except RuntimeError:  # this processor has none
            continue
        if _native.product_serves(DTYPES[BFLOAT16]):
            found.append(name)
    _native.select_tiles(before)
    return found


TILES = tiles_that_serve()


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.native_info()["tiles"]
    _native.select_tiles(request.param)
    yield request.param
    _native.select_tiles(before)


def test_tiles_are_named() -> None:
    assert cpu.native_info()["tiles"] in ("none", "processor")
    with pytest.raises(RuntimeError, match="tiles round: expected none, processor or emulated"):
        _native.select_tiles("round")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("first_transposed", "second_transposed"), ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape: tuple[int, int, int], first_transposed: bool, second_transposed: bool) -> None:
    rows, depth, columns = shape
    cpu.empty_pooled(torch.Size((2**21,)), FLOAT32).fill_(torch.nan)
    wide = matrix(1, rows, depth, FLOAT32, first_transposed)
    first, second = wide.to(BFLOAT16), matrix(2, depth, columns, BFLOAT16, second_transposed)
    for dtype in (BFLOAT16, FLOAT32):
        out = poisoned(rows, columns, dtype)
        cpu.product(first, second, out)
        assert_is_product(out, first, second)
        rounded_inside = poisoned(rows, columns, dtype)
        cpu.product(wide, second, rounded_inside)
        assert torch.equal(rounded_inside, out)
    before = out.double()
    cpu.product(first, second, out, accumulate=True)
    assert_is_product(out, first, second, before)
    turned = poisoned(rows, columns, FLOAT32)
    cpu.product(second.T, wide.T, turned.T)  # the float32 factor is the second
    assert_is_product(turned, first, second)


@pytest.mark.parametrize("shape", [(500, 100, 70), (30, 5000, 600), (5000, 300, 64)], ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    first, second = matrix(1, rows, depth, FLOAT32, False), matrix(2, depth, columns, FLOAT32, True)
    outs = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        outs.append(poisoned(rows, columns, FLOAT32))
        cpu.product(first, second, outs[-1])
    torch.set_num_threads(threads)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.usefixtures("tiles")
def test_rows_columns_and_threads_do_not_change_a_bit_of_bfloat16() -> None:
    """A sum is of its row, its column and the depth alone."""
    first, second = matrix(1, 131, 1501, BFLOAT16, False), matrix(2, 1501, 77, BFLOAT16, True)
    whole = poisoned(131, 77, FLOAT32)
    cpu.product(first, second, whole)
    threads = torch.get_num_threads()
    for count, rows, columns in (
        (1, slice(0, 1), slice(0, 77)),
        (2, slice(5, 40), slice(3, 36)),
        (3, slice(0, 131), slice(70, 77)),
    ):
        torch.set_num_threads(count)
        part = poisoned(rows.stop - rows.start, columns.stop - columns.start, FLOAT32)
        cpu.product(first[rows], second[:, columns], part)
        assert torch.equal(part, whole[rows, columns])
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("tiles")
def test_infinities_and_nans_of_bfloat16_pass() -> None:
    first, second = matrix(1, 40, 70, BFLOAT16, False), matrix(2, 70, 33, BFLOAT16, False)
    first[3, 5], first[34, 6], second[7, 8] = torch.inf, torch.nan, -torch.inf
    out = poisoned(40, 33, FLOAT32)
    cpu.product(first, second, out)
    truth = first.double() @ second.double()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())


def test_infinities_and_nans_pass(isa: str) -> None:
    first, second = matrix(1, 20, 40, FLOAT32, False), matrix(2, 40, 33, FLOAT32, False)
    first[3, 5], first[4, 6], second[7, 8] = torch.inf, torch.nan, -torch.inf
    out = poisoned(20, 33, FLOAT32)
    cpu.product(first, second, out)
    truth = first.double() @ second.double()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())


def test_factors_that_no_kernel_reads_are_copied() -> None:
    first, second = matrix(1, 80, 60, FLOAT32, False)[::2, ::3], matrix(2, 20, 9, FLOAT32, False)
    out = poisoned(40, 9, FLOAT32)
    products.multiply(cpu, first, second, out)
    assert_is_product(out, first, second)


def test_without_depth_a_product_is_0() -> None:
    out = poisoned(4, 5, FLOAT32)
    products.multiply(cpu, torch.empty(4, 0), torch.empty(0, 5), out)
    assert bool((out == 0).all())
    products.multiply(cpu, torch.empty(4, 0), torch.empty(0, 5), out.fill_(2.0), accumulate=True)
    assert bool((out == 2).all())


def test_less_than_float32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pin_kernel(monkeypatch)
    served = []
    monkeypatch.setattr(cpu, "product", lambda *factors, **_: served.append(factors))
    first, second, out = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(2, 4)
    products.multiply(cpu, first, second, out)
    assert served
    served.clear()
    torch.set_float32_matmul_precision("medium")
    try:
        products.multiply(cpu, first, second, out)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not served
    assert bool((out == 3).all())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("widened", [1, 60, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_where_torch_serves_half_factors_are_widened_part_by_part(
    dtype: torch.dtype, turned: bool, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of half precisions are those of float32, whichever factor is larger: none is rounded on the way."""
    pin_torch(monkeypatch)
    monkeypatch.setattr(products, "_WIDENED", widened)
    assert not products.needs_spare(cpu, dtype)
    first, second = matrix(1, 50, 20, dtype, False), matrix(2, 20, 8, dtype, False)
    if turned:
        first, second = second.T, first.T
    out = poisoned(first.shape[0], second.shape[1], FLOAT32)
    products.multiply(cpu, first, second, out)
    assert_is_product(out, first, second)
    before = out.clone()
    products.multiply(cpu, first, second, out, accumulate=True)
    assert_is_product(out, first, second, before)


HEAD = """
import torch, logitless as ll
make = torch.Generator().manual_seed(3)
h, w = torch.randn(40, 96, generator=make).bfloat16(), torch.randn(5000, 96, generator=make).bfloat16()
t = torch.arange(40) * 100
nll = ll.token_stats(ll.linear(h, w), t).nll
truth = torch.nn.functional.cross_entropy(h.double() @ w.double().T, t, reduction="none")
print(float((nll - truth).abs().max()))
"""


@pytest.mark.parametrize("product", ["", "torch"])
@pytest.mark.parametrize("isa", _native.native_info()["supported"])
def test_logits_of_a_bfloat16_head_are_never_rounded(isa: str, product: str) -> None:
    environment = {**os.environ, "LOGITLESS_ISA": isa, "LOGITLESS_PRODUCT": product, "LOGITLESS_AMX": "0"}
    run = subprocess.run([sys.executable, "-c", HEAD], env=environment, capture_output=True, text=True, check=True)
    assert 0 < float(run.stdout) < 1e-5


def test_matrices_that_do_not_fit_are_refused() -> None:
    out = torch.empty(2, 2)
    with pytest.raises(
        ValueError, match="c has b's dtype" if torch.float64 in cpu.PRODUCT_DTYPES else "none of this dtype"
    ):
        cpu.product(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64), out)
    with pytest.raises(ValueError, match="c has b's dtype"):
        cpu.product(torch.ones(2, 2), torch.ones(2, 2), out.double())
    with pytest.raises(ValueError, match="no depth"):
        cpu.product(torch.ones(2, 0), torch.ones(0, 2), out)
    with pytest.raises(ValueError, match="one dtype"):
        cpu.product(torch.ones(2, 2), torch.ones(2, 2, dtype=BFLOAT16), out.T)
    with pytest.raises(ValueError, match="consecutive"):
        cpu.product(torch.ones(2, 2, dtype=BFLOAT16), torch.ones(2, 2), out)


SERVED = """
import torch, logitless as ll
from logitless.kernels import cpu
h, w, t = torch.randn(9, 40), torch.randn(700, 40), torch.arange(9)
whole = ll.token_stats(ll.linear(h, w), t).nll
parts = [ll.token_stats(ll.linear(h[i:], w), t[i:]).nll for i in range(9)]
print(sorted(map(str, cpu.PRODUCT_DTYPES)), all(torch.equal(part, whole[i:]) for i, part in enumerate(parts)))
"""


@pytest.mark.parametrize("isa", _native.native_info()["supported"])
def test_the_product_is_chosen_by_name(isa: str) -> None:
    def run(product: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LOGITLESS_ISA": isa, "LOGITLESS_PRODUCT": product}
        return subprocess.run(
            [sys.executable, "-c", SERVED], env=environment, capture_output=True, text=True, check=False
        )

    native = run("native").stdout
    assert "torch.float32" in native
    assert native.rstrip().endswith("True")
    assert run("torch").stdout.startswith("[]")
    assert "LOGITLESS_PRODUCT: expected native or torch, got 'mkl'" in run("mkl").stderr
