"""The Triton kernels without a GPU: interpreted in processes of their own, and compiled for three targets."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import logitless as ll
import logitless.functional as LF
import test_backends
from logitless.kernels import triton

TESTS = Path(__file__).parent
# What numpy says of numbers that are not finite, where a GPU says nothing.
QUIET = ("-W", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("name", ["kernels", "package", "mutants"])
def test_interpreted(name: str) -> None:
    """All tests of a file pass where TRITON_INTERPRET=1 runs the kernels on the CPU."""
    path = TESTS / f"interpreted_{name}.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *QUIET,
        str(path),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("LOGITLESS_BACKEND", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed[0]) > 10
    assert "skipped" not in done.stdout


def gate() -> ModuleType:
    """The script that compiles every variant."""
    return script("gpu_compile")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TESTS.parent / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What a head of a language model launches, on every target; `benchmarks/gpu_compile.py` compiles everything.
COMPILED = (
    *("nll f32", "nll bf16", "every statistic f32", "parts bf16", "gradient of nll f32", "gradient of everything bf16"),
    *("gradient in the logits' bytes", "js f16", "every measure f32", "gradient of every measure bf16"),
    *("gradients of kl in the logits' bytes", "binary_cross_entropy_with_logits bf16", "gradient of cosine f32"),
    "parts of pairs bf16",
)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills_and_with_wide_loads(target: str) -> None:
    built = gate()
    variants = {variant.name: variant for variant in built.variants()}
    for name in COMPILED:
        for launch in built.launches(variants[name].call):
            made = built.built(launch, built.TARGETS[target])
            kind = built.TARGETS[target].backend
            assert not built.faults(variants[name], launch, made, kind), (name, launch.kernel.__name__)


def test_the_gate_would_notice() -> None:
    built = gate()
    (variant,) = (variant for variant in built.variants() if variant.name == "nll f32")
    (launch,) = built.launches(variant.call)
    bad = built.Built(registers=129, spilled=4, widest_load=4, widest_store=8, warps=8, lanes=32)
    assert len(built.faults(variant, launch, bad, "cuda")) == 3
    good = bad._replace(registers=40, spilled=0, widest_load=16)
    rows = [built.Row("sm_90", variant, made, joins=False) for made in (good, bad)]
    assert list(built.summary(rows)) == [
        "sm_90: 2 kernels, at most 129 registers, at least 1 blocks, 1 with spills, "
        "loads of 4 bytes or more in all 2 whose strides allow it"
    ]


# --- the one command for a card


def test_what_a_card_is_asked_for_is_rehearsed() -> None:
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "benchmarks/gpu.py", "--rehearse"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("every kernel, torch.float64, 65 classes", "products of torch.float16", "heads of torch.bfloat16"):
        assert f"right: {said}" in done.stdout


def broken() -> Iterator[str]:
    yield "a kernel of 7 classes"
    raise AssertionError("row_grad torch.bfloat16 65: off by 99 units")


def test_nothing_is_timed_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("gpu")

    def timed(*args: Any, **options: Any) -> Any:
        pytest.fail("it was timed")

    for name in ("timed", "copy_bandwidth", "dense_cases", "head_cases"):
        monkeypatch.setattr(bench, name, timed)
    monkeypatch.setattr(bench, "kernels_are_right", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for options in ([], ["--correctness"], ["--small"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        assert bench.main() == 1
        said = capsys.readouterr()
        assert "right: a kernel of 7 classes" in said.out
        assert "WRONG in broken, after 'a kernel of 7 classes': AssertionError: row_grad torch.bfloat16 65" in said.err
        assert "nothing was timed" in said.err


def test_no_number_of_a_card_is_right_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with NaN is false, whichever way round it is asked."""
    bench = script("gpu")
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "REHEARSES", True)
    nothing = lambda first, second, out, accumulate=False: out.fill_(torch.nan)  # noqa: E731 # a broken product
    monkeypatch.setattr(bench.triton, "product", nothing)
    with pytest.raises(AssertionError, match=r"product of torch\.bfloat16"):
        list(bench.products_are_right())
    monkeypatch.setattr(bench, "of_head", lambda call, dtype, kind: [torch.tensor(torch.nan)])
    with pytest.raises(AssertionError, match="off by nan"):
        list(bench.heads_are_right())
    with pytest.raises(AssertionError, match="a kernel"):
        bench.near(torch.tensor([1.0, torch.nan]), torch.ones(2), 8.0, "a kernel")


# --- tensors of a GPU that hold nothing


def fake_gpu(monkeypatch: pytest.MonkeyPatch, *, reads_target: bool) -> str:
    """Return the device of fake tensors; meta stands for a GPU where a torch without CUDA does not even compare."""
    if not reads_target or torch.version.cuda is not None or torch.version.hip is not None:
        return "cuda"
    monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset(("meta",)))
    return "meta"


HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cross_entropy": LF.cross_entropy,
    "entropy": lambda z, t: ll.entropy(z),
    "token_stats": lambda z, t: ll.token_stats(z, t).nll,
    "kl": lambda z, t: ll.kl(z, z),
}


@pytest.mark.parametrize("shape", [(8192, 4096, 128256), (16384, 2304, 256000), (4096, 1024, 32000)], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_explain_foresees_a_head_on_a_gpu(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, classes = shape
    device = fake_gpu(monkeypatch, reads_target=name in ("cross_entropy", "token_stats"))
    with FakeTensorMode() if device == "cuda" else nullcontext():
        hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16, device=device) for n in (rows, classes))
        target = torch.empty(rows, dtype=torch.int64, device=device)
        choice = ll.explain(HEADS[name], ll.linear(hidden, weight), target)
    assert (choice.backend, choice.reason) == ("triton", "the tensors are on a GPU")
    assert choice.tile is not None
    assert choice.peak_bytes is not None
    tile = choice.tile
    assert tile[1] == classes
    assert tile[0] >= 1024
    assert choice.products == "torch multiplies: half-precision factors with sums and results in float32"
    assert tile[0] % 128 == 0
    tiles = 2 if name == "kl" else 1
    assert 4 * tile[0] * classes * tiles <= max(512 * 2**20, 4 * 1024 * classes * tiles)
    assert 4 * tile[0] * classes * tiles < choice.peak_bytes < 4 * tile[0] * classes * tiles + 2**27


def test_what_a_caller_allows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_gpu(monkeypatch, reads_target=True)
    with FakeTensorMode() if device == "cuda" else nullcontext():
        hidden, weight = (torch.empty(n, 2304, dtype=torch.bfloat16, device=device) for n in (16384, 256000))
        target = torch.empty(16384, dtype=torch.int64, device=device)
        choice = ll.explain(LF.linear_cross_entropy, hidden, weight, target, max_bytes=256 * 2**20)
    assert choice.tile is not None
    assert choice.tile[0] == 1024  # of some of the classes
    assert 4 * choice.tile[0] * choice.tile[1] <= 256 * 2**20


@pytest.mark.parametrize(
    ("rows", "classes", "max_bytes", "tile", "kept"),
    [
        (1024, 128256, None, 1024, 1),  # all of it: nothing is made again
        (8192, 128256, None, 1024, 1),
        (8192, 128256, 4 * 2**30, 2048, 3),
        (8192, 32000, None, 4096, 1),
    ],
)
def test_a_loss_of_each_row_keeps_what_the_bytes_hold(
    rows: int, classes: int, max_bytes: int | None, tile: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = fake_gpu(monkeypatch, reads_target=True)
    with FakeTensorMode() if device == "cuda" else nullcontext():
        hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device=device) for n in (rows, classes))
        target = torch.empty(rows, dtype=torch.int64, device=device)
        told = (LF.linear_cross_entropy, hidden.requires_grad_(), weight, target)
        choice = ll.explain(*told, reduction="none", max_bytes=max_bytes)
        reduced = ll.explain(*told, max_bytes=max_bytes)
    assert choice.tile == (tile, classes)
    assert choice.kept_bytes == 4 * kept * tile * classes <= max(max_bytes or 0, 512 * 2**20, 4 * 1024 * classes)
    assert reduced.kept_bytes == 0
    assert choice.peak_bytes is not None
    assert choice.peak_bytes > choice.kept_bytes


@pytest.mark.parametrize("name", [name for name in test_backends.CALLS if name not in test_backends.READS])
def test_tensors_of_another_device_are_never_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on meta stand for a GPU's: a value of theirs cannot be read, and none may come to lie on the CPU."""
    monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset(("meta",)))
    loss, d = test_backends.CALLS[name][0], test_backends.drawn()
    if name == "nothing is zero":
        loss = lambda d: LF.cross_entropy(d["z"], d["target"], empty="zero")  # noqa: E731 # on the tensors' own device
    expected = test_backends.results(loss, d)
    there = {key: value.to("meta") for key, value in d.items()}
    with test_backends.NoHostReads():
        got = test_backends.results(loss, there)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


CONTRASTIVE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "info_nce": lambda q, k, s: ll.info_nce(q, k, scale=s),
    "clip_loss": ll.clip_loss,
    "siglip_loss": lambda q, k, s: ll.siglip_loss(q, k, s, s),
}


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_losses_of_another_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that they make lies there too, and no value is read."""
    monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset(("meta",)))
    leaves = [torch.empty(size, device="meta", requires_grad=True) for size in ((33, 16), (33, 16), ())]
    with test_backends.NoHostReads():
        grads = torch.autograd.grad(CONTRASTIVE[name](*leaves), leaves)
    assert [grad.device.type for grad in grads] == ["meta"] * 3


def test_tensors_of_two_gpus_are_left_to_torch() -> None:
    """A kernel would read addresses of the one on the other."""
    with FakeTensorMode():
        logits, target = torch.empty(3, 5, device="cuda:0"), torch.empty(3, dtype=torch.int64, device="cuda:1")
        choice = ll.explain(LF.cross_entropy, logits, target)
        assert choice == ("reference", "tensors are on cuda:0 and on cuda:1")
        assert ll.explain(LF.cross_entropy, logits, target.to("cuda:0")).backend == "triton"


def test_gpus_that_triton_does_not_compile_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for capability, reason in (
        ((7, 5), "Triton compiles for compute capability 8.0 and later; cuda:0 has 7.5"),
        ((8, 0), None),
        ((9, 0), None),
    ):
        triton._too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        assert triton._too_old(device) == reason
    triton._too_old.cache_clear()


@pytest.mark.parametrize("classes", [1000, 2**20, 2**30 + 16, 2**31 - 2**17])
def test_a_row_of_any_length_fits_a_grid(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts lie on the second axis, which has 65,535 places."""
    grids: list[tuple[int, ...]] = []
    for module in (triton.rows, triton.pairs):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    z, row = torch.empty(2, classes, dtype=torch.bfloat16, device="meta"), torch.empty(2, device="meta")
    index, wide = torch.empty(2, dtype=torch.int64, device="meta"), row.double()
    triton.row_stats(z, index)
    triton.row_grad(z, row, wide, index, a_scale=1.0, c_scale=-1.0)
    saved = torch.empty(2, triton.PAIR_SAVED, dtype=torch.float64, device="meta")
    triton.pair_row_stats(z, z, index)
    triton.pair_row_grad(z, z, saved, kl=row)
    assert len(grids) >= 6
    assert max(grid[1] for grid in grids if len(grid) > 1) <= 65535


def test_a_row_that_cannot_be_counted_is_refused() -> None:
    z = torch.empty(1, 2**31, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="rows of at most 2147418111 classes, got 2147483648"):
        triton.row_stats(z)


def test_an_older_torch_adds_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch before 2.10 has no `addmm(out_dtype=)` to float32; its `mm(out_dtype=)` is made here of float32."""
    products = triton.products
    monkeypatch.setattr(products, "writes_wide", lambda device: True)
    monkeypatch.setattr(products, "_ADDS_WIDE", False)
    monkeypatch.setattr(products, "_WIDENED", 700)
    multiplied: list[torch.Size] = []

    def mm(first: Tensor, second: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        multiplied.append(first.shape)
        return first.to(out_dtype) @ second.to(out_dtype)

    make = torch.Generator().manual_seed(1)
    first, second = torch.randn(65, 33, generator=make).bfloat16(), torch.randn(33, 100, generator=make).bfloat16()
    out = torch.ones(100, 65).T
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        triton.product(first, second, out, accumulate=True)
    assert len(multiplied) == 10
    torch.testing.assert_close(out.double(), 1 + first.double() @ second.double(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    assert triton.product_facts().endswith("which are added a part at a time")


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "MISSING", "Triton is not installed")
    assert ll.backends()["triton"] == (False, "Triton is not installed")
    with FakeTensorMode():
        logits, target = torch.empty(3, 5, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
        assert ll.explain(LF.cross_entropy, logits, target) == ("reference", "Triton is not installed")
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            LF.cross_entropy(logits, target, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_every_dtype_without_data(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch takes the products that are asked for, and gradients have their tensors' dtypes."""
    monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset(("meta",)))
    hidden, weight = (torch.empty(n, 64, dtype=dtype, device="meta", requires_grad=True) for n in (5000, 1000))
    target = torch.empty(5000, dtype=torch.int64, device="meta")
    for logits in (ll.linear(hidden, weight), ll.linear(hidden, weight, weight[:, 0], softcap=3.0)):
        with test_backends.NoHostReads():
            grads = torch.autograd.grad(HEADS[name](logits, target).sum(), (hidden, weight))
        assert [(grad.dtype, grad.shape) for grad in grads] == [(dtype, hidden.shape), (dtype, weight.shape)]
