"""The GPU kernels on a card: right first, then timed beside torch and Liger-Kernel. A few minutes.

    python benchmarks/gpu.py [--json FILE] [--correctness] [--model]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse

Runs from a source tree, without the compiled CPU kernels, on torch 2.11 with Triton 3.6 and later. On a machine without
a GPU it says so and fails: no figure of it is ever a guess. `--correctness` stops before the timings. `--model` prints,
anywhere, the bytes and products that each case moves and what the ceilings of an H200 would make of them: a model, not
a measurement. `--rehearse` goes through the correctness part without a GPU, at small sizes, on Triton's interpreter.

Where anything is wrong, this says what and after which case, times nothing, and exits with 1.

Times are medians of device events, each call on inputs far larger than the cache. Peak memory is what a call adds to
the inputs; gradients of the inputs are subtracted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import logitless as ll
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    import logitless as ll
import logitless.functional as LF
from logitless.kernels import reference, triton
from logitless.kernels.interface import Divergence

# Of an H200, as measured there by others: a copy, and products of bfloat16.
COPY_BYTES, PRODUCT_FLOPS = 4.3e12, 770e12
HALVES = (torch.bfloat16, torch.float16)
REHEARSES = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSES else "cuda"


class Dense(NamedTuple):
    rows: int
    classes: int
    dtype: torch.dtype


class Head(NamedTuple):
    rows: int
    width: int
    classes: int


DENSE = [
    Dense(rows, classes, dtype)
    for rows, classes in ((16384, 131072), (32768, 32000))
    for dtype in (torch.bfloat16, torch.float32)
]
HEADS = [Head(8192, 4096, 128256), Head(16384, 2304, 256000)]


# --- right first


def near(got: Any, truth: Any, units: float, what: str) -> None:
    """Fail unless a result is within some units in the last place of a row's largest true value."""
    if (got is None) != (truth is None):
        raise AssertionError(f"{what}: {got is None} {truth is None}")
    if got is None:
        return
    if not got.is_floating_point():
        if not torch.equal(got, truth):
            raise AssertionError(what)
        return
    wide, true = got.double(), truth.double()
    odd = ~true.isfinite()
    size = true.masked_fill(odd, 0).abs()
    size = size.amax(-1, keepdim=True) if size.dim() > 1 else size
    eps = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    allowed = units * eps * size + torch.finfo(got.dtype).eps * true.masked_fill(odd, 0).abs() + 1e-30
    error = (wide - true).masked_fill(odd, 0).abs()
    if not bool((error <= allowed).all()) or not torch.equal(
        wide[odd].nan_to_num(nan=0.5), true[odd].nan_to_num(nan=0.5)
    ):
        raise AssertionError(
            f"{what}: off by {float((error / (eps * size + 1e-300)).max()):.3g} units, {units} allowed"
        )


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    made = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(shape, generator=made, dtype=torch.float64, device=DEVICE)).to(dtype)


def classes_of(seed: int, rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def kernels_are_right() -> Iterator[str]:
    """Hold every kernel, of every dtype, to the reference in float64 on the same card."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        units = 64.0 if dtype != torch.float32 else 16.0
        for classes in (1, 65) if REHEARSES else (1, 7, 65, 1000, 49152, 131072 + 8):
            n = 5 if REHEARSES else 33
            z, y = normal(1, n, classes, dtype=dtype), normal(2, n, classes, dtype=dtype)
            if classes > 2:
                z[:, classes // 2] = y[:, classes // 2] = -torch.inf
            target, case = classes_of(3, n, classes), f"{dtype} {classes}"
            target[1] = -100
            weight, dense = normal(4, classes).abs().to(real), normal(5, n, classes).softmax(1).to(dtype)
            weight[classes // 2] = dense[:, classes // 2] = 0
            asked = {"lse": True, "entropy": True, "argmax": True, "rank": True}
            more = {"smooth": True, "class_weight": weight, "dense_target": dense}
            for options in (asked, more):
                pairs = zip(
                    triton.row_stats(z, target, **options), reference.row_stats(z, target, **options), strict=True
                )
                for place, (got, true) in enumerate(pairs):
                    if place != 1 and isinstance(true, Tensor):  # the log-sum has digits of its own
                        near(got, true, 4 * units, f"row_stats {place} {case}")
            stats = reference.row_stats(z, target)
            told = (z, stats.row_max, stats.log_sum, target)
            for options in (
                {"a_scale": 1.0, "c_scale": -1.0, "upstream": normal(6, n).to(real)},
                {"a_scale": 0.9, "c_scale": -0.9, "f_scale": -0.1, "e_scale": -0.5, "b_scale": -1.0, **more},
            ):
                options.pop("smooth", None)
                got = triton.row_grad(*told, **options)
                near(got, reference.row_grad(*told, **options), 4 * units, f"row_grad {case}")
            every = dict.fromkeys(("kl", "reverse_kl", "js", "cross_entropy", "entropy"), True)
            got, true = triton.pair_row_stats(z, y, target, **every), reference.pair_row_stats(z, y, target, **every)
            for name in got._fields[:-2]:
                near(getattr(got, name), getattr(true, name), 4 * units, f"{name} {case}")
            up = {name: normal(i, n).to(real) for i, name in enumerate(got._fields[:8])}
            grads, trues = (b.pair_row_grad(z, y, s.saved, target, **up) for b, s in ((triton, got), (reference, true)))
            for one, other in zip(grads, trues, strict=True):
                near(one, other, 32 * units, f"pair_row_grad {case}")
            for family in ("skewed_kl", "weighted_js", "total_variation"):
                alone = {"kl": False, "divergence": Divergence(family, 0.3)}
                got, true = triton.pair_row_stats(z, y, **alone), reference.pair_row_stats(z, y, **alone)
                near(got.divergence, true.divergence, 4 * units, f"{family} {case}")
                given = {"divergence": alone["divergence"], "divergence_grad": up["kl"]}
                grads = triton.pair_row_grad(z, y, got.saved, **given)
                trues = reference.pair_row_grad(z, y, true.saved, **given)
                for one, other in zip(grads, trues, strict=True):
                    near(one, other, 256 * units, f"gradient of {family} {case}")
            probabilities = dense.double().clamp(0, 1).to(dtype)
            for loss, x in (
                ("binary_cross_entropy_with_logits", z.masked_fill(z.isinf(), -9)),
                ("binary_cross_entropy", probabilities),
                ("kl_div", y.masked_fill(y.isinf(), -9)),
            ):
                values = (backend.elements(loss, x, dense)[0] for backend in (triton, reference))
                near(*values, 4 * units, f"{loss} {case}")
                slopes = (backend.elements_grad(loss, x, dense) for backend in (triton, reference))
                near(*slopes, 8 * units, f"gradient of {loss} {case}")
            x1, x2 = normal(7, n, classes, dtype=dtype), normal(8, n, classes, dtype=dtype)
            cosine = triton.cosine_similarity(x1, x2, 1, save=True)
            assert cosine.saved is not None
            error = (cosine.out.double() - reference.cosine_similarity(x1, x2, 1).out.double()).abs().max()
            if not float(error) <= 4 * torch.finfo(real).eps:
                raise AssertionError(f"cosine {case}: off by {float(error):.3g}")
            yield f"every kernel, {dtype}, {classes} classes"
    if REHEARSES:
        return  # the interpreter cuts bfloat16 off where a GPU rounds it
    tile = normal(1, 512, 49152, dtype=torch.float32)
    target = classes_of(3, 512, 49152)
    stats = triton.row_stats(tile, target)
    told = {"a_scale": 1.0, "c_scale": -1.0}
    wide = triton.row_grad(tile, stats.row_max, stats.log_sum, target, **told).bfloat16()
    narrow = tile.view(torch.bfloat16)[:, :49152]
    triton.row_grad(tile, stats.row_max, stats.log_sum, target, **told, out=narrow)
    if not torch.equal(narrow, wide):
        raise AssertionError("a gradient in the logits' own bytes differs")
    yield "a gradient in the logits' own bytes, bit for bit"
    rows, classes = 2, 2**30 + 16
    if torch.cuda.mem_get_info()[0] > 24e9:
        large = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
        large[1, -1] = 8
        got = triton.row_stats(large, torch.tensor([0, classes - 1], device="cuda"), argmax=True)
        if got.argmax is None or got.argmax.tolist() != [0, classes - 1]:
            raise AssertionError("a row that begins 2^30 numbers behind another")
        yield "more than 2^31 numbers"


def products_are_right() -> Iterator[str]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows, depth, columns = (65, 33, 100) if REHEARSES else (1024, 512, 2048)
        first, second = normal(1, rows, depth, dtype=dtype, scale=1), normal(2, depth, columns, dtype=dtype, scale=1)
        truth = first.double() @ second.double()
        out = torch.ones(rows, columns, device=DEVICE)
        for accumulate, expected in ((True, truth + 1), (False, truth)):
            triton.product(first, second, out, accumulate=accumulate)
            if not float((out.double() - expected).abs().max()) <= 1e-3:
                raise AssertionError(f"product of {dtype}, accumulate={accumulate}")
        if dtype in HALVES:
            triton.product(first.float(), second, out)
            if not float((out.double() - truth).abs().max()) <= 1e-3:
                raise AssertionError(f"product of float32 and {dtype}")
        yield f"products of {dtype}, written and added in float32"


def calls() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses of hidden states, a head and a target, dense and lazy."""
    return {
        "cross_entropy": lambda h, w, t: LF.cross_entropy(h @ w.T, t, label_smoothing=0.1),
        "lazy cross_entropy": lambda h, w, t: LF.cross_entropy(ll.linear(h, w), t, label_smoothing=0.1),
        "lazy cross_entropy, a row": lambda h, w, t: LF.cross_entropy(ll.linear(h, w), t, reduction="none").sum(),
        "lazy cross_entropy, summed": lambda h, w, t: LF.cross_entropy(ll.linear(h, w), t, reduction="sum"),
        "lazy entropy": lambda h, w, t: ll.entropy(ll.linear(h, w, softcap=30.0)).mean(),
        "lazy token_stats": lambda h, w, t: ll.token_stats(ll.linear(h, w), t).nll.mean(),
        "lazy kl": lambda h, w, t: ll.kl(ll.linear(h, w), ll.linear(h.roll(1, 0), w), reduction="mean"),
        "lazy js": lambda h, w, t: ll.js(ll.linear(h, w), ll.linear(h.roll(1, 0), w), beta=0.9, reduction="mean"),
    }


def calls_never_wait() -> Iterator[str]:
    """No call waits for the device, each may be captured in a graph, and runs on a side stream."""
    hidden, weight = (
        normal(i, n, 64, dtype=torch.bfloat16, scale=1).requires_grad_() for i, n in ((1, 512), (2, 1000))
    )
    target = classes_of(3, 512, 1000)
    for name, call in calls().items():

        def run(call: Callable[..., Tensor] = call) -> list[Tensor]:
            loss = call(hidden, weight, target)
            return [loss, *torch.autograd.grad(loss, (hidden, weight))]

        expected = run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        torch.cuda.synchronize()
        for got, true in zip(captured, expected, strict=True):
            if not torch.equal(got, true):
                raise AssertionError(f"{name}: a captured call gives something else")
        yield f"{name}: no wait, on a side stream, captured in a graph"


def heads_are_right() -> Iterator[str]:
    for dtype in (torch.float32, *HALVES):
        for name, call in calls().items():
            for got, true in zip(*(of_head(call, dtype, kind) for kind in (dtype, torch.float64)), strict=True):
                error = float((got.double() - true).norm() / true.norm())
                limit = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
                if not error <= limit:  # of NaN too
                    raise AssertionError(f"{name} {dtype}: off by {error:.2e} of {limit}")
        yield f"heads of {dtype}"


def of_head(call: Callable[..., Tensor], dtype: torch.dtype, kind: torch.dtype) -> list[Tensor]:
    """Return loss and gradients of a head's numbers of a dtype; of float64, by the reference."""
    rows, width, classes = (9, 16, 50) if REHEARSES else (3000, 256, 5000)
    sizes = ((1, rows), (2, classes))
    leaves = [normal(i, n, width, dtype=dtype, scale=0.5).to(kind).requires_grad_() for i, n in sizes]
    target = classes_of(3, rows, classes)
    target[::7] = -100
    with forced("reference" if kind == torch.float64 else "triton"):
        loss = call(*leaves, target)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    before = os.environ.get("LOGITLESS_BACKEND")
    os.environ["LOGITLESS_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOGITLESS_BACKEND"]
        else:
            os.environ["LOGITLESS_BACKEND"] = before


def all_is_right(parts: Sequence[Callable[[], Iterator[str]]]) -> bool:
    """Go through all that must hold before anything is timed; say what does not, and after which case it was found."""
    last = "nothing"
    for part in parts:
        try:
            for last in part():
                print(f"right: {last}", flush=True)
        except Exception as error:  # whatever it is, nothing may be timed after it
            traceback.print_exc()
            print(f"WRONG in {part.__name__}, after {last!r}: {type(error).__name__}: {error}", file=sys.stderr)
            print("nothing was timed", file=sys.stderr)
            return False
    return True


# --- then timed


class Timing(NamedTuple):
    milliseconds: float
    extra_bytes: int


def timed(call: Callable[[], Any], kept_bytes: int = 0, repeats: int = 15) -> Timing:
    """Return the median time of a call, and the memory it adds beyond what it keeps."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - kept_bytes
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return Timing(statistics.median(start.elapsed_time(stop) for start, stop in events), extra)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def copy_bandwidth() -> float:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source)).milliseconds * 1e3


def dense_cases(case: Dense) -> Iterator[tuple[str, str, Timing]]:
    z = torch.randn(case.rows, case.classes, device="cuda", dtype=case.dtype).requires_grad_()
    target = torch.randint(case.classes, (case.rows,), device="cuda")
    label = f"{case.rows} x {case.classes} {str(case.dtype).removeprefix('torch.')}"
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda z: LF.cross_entropy(z, target),
        "torch": lambda z: F.cross_entropy(z, target),
        "torch.compile": torch.compile(lambda z: F.cross_entropy(z, target)),
    }
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_cross_entropy

        losses["liger"] = lambda z: liger_cross_entropy(z, target)
    for name, loss in losses.items():
        # Liger writes its gradient over the logits: that is its own way, and its logits are its own.
        given = z.detach().clone().requires_grad_() if name == "liger" else z
        with torch.no_grad():
            yield f"cross-entropy {label}, forward", name, timed(lambda loss=loss, z=given: loss(z))
        yield (
            f"cross-entropy {label}, forward and backward",
            name,
            timed(lambda loss=loss, z=given: gradients(loss(z), z), 0 if name == "liger" else z.nbytes),
        )
    measures = {
        "entropy": (
            ll.entropy,
            lambda z: -(torch.softmax(z.float(), 1) * torch.log_softmax(z.float(), 1)).sum(1),
        ),
    }
    for measure, (ours, theirs) in measures.items():
        for name, function in {"ours": ours, "torch.compile": torch.compile(theirs)}.items():
            call = lambda f=function: gradients(f(z).sum(), z)  # noqa: E731 # called at once
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                yield f"{measure} {label}, forward and backward", name, timed(call, z.nbytes)
    y = torch.randn_like(z).requires_grad_()
    plain = torch.compile(
        lambda z, y: F.kl_div(y.float().log_softmax(1), z.float().log_softmax(1), log_target=True, reduction="sum")
    )
    for name, function in {"ours": lambda z, y: ll.kl(z, y, reduction="sum"), "torch.compile": plain}.items():
        call = lambda f=function: gradients(f(z, y), z, y)  # noqa: E731 # called at once
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            yield f"kl {label}, forward and backward", name, timed(call, 2 * z.nbytes)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loop that a user would write: a chunk of 1024 rows at a time, forward and back."""
    total = torch.zeros((), device="cuda")
    to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, hidden.shape[0], 1024):
        part = hidden[start : start + 1024].detach().requires_grad_()
        leaf = weight.detach().requires_grad_()
        loss = F.cross_entropy((part @ leaf.T).float(), target[start : start + 1024], reduction="sum")
        loss = loss / hidden.shape[0]
        grads = gradients(loss, part, leaf)
        to_hidden[start : start + 1024] = grads[0]
        to_weight += grads[1]
        total += loss.detach()
    return total, to_hidden, to_weight


def head_cases(case: Head) -> Iterator[tuple[str, str, Timing]]:
    rows, width, classes = case
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(classes, width, device="cuda") / width**0.5).bfloat16().requires_grad_()
    target = torch.randint(classes, (rows,), device="cuda")
    kept, label = hidden.nbytes + weight.nbytes, f"head {rows} x {width} x {classes} bfloat16"
    tile = 1024
    h, w = hidden.detach(), weight.detach()
    logits = torch.empty(tile, classes, device="cuda", dtype=torch.bfloat16)
    to_hidden, to_weight = torch.empty(tile, width, device="cuda", dtype=torch.bfloat16), torch.empty_like(w)

    def bare() -> None:
        for start in range(0, rows, tile):
            part = h[start : start + tile]
            torch.mm(part, w.T, out=logits)
            torch.mm(logits, w, out=to_hidden)
            torch.mm(logits.T, part, out=to_weight)

    yield label, "the three bare products", timed(bare)
    losses: dict[str, Callable[[], object]] = {
        "ours": lambda: gradients(LF.linear_cross_entropy(hidden, weight, target), hidden, weight),
        "torch, 1024 rows at a time": lambda: chunked(hidden, weight, target),
        "torch": lambda: gradients(F.cross_entropy((hidden @ weight.T).float(), target), hidden, weight),
    }
    if hasattr(F, "linear_cross_entropy"):
        theirs = F.linear_cross_entropy
        losses["torch.linear_cross_entropy"] = lambda: gradients(theirs(hidden, weight, target), hidden, weight)
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        losses["liger"] = lambda: gradients(liger(hidden, weight, target), hidden, weight)
    for name, call in losses.items():
        try:
            yield label, name, timed(call, kept)
        except (torch.cuda.OutOfMemoryError, RuntimeError, TypeError) as error:
            if name == "ours":
                raise
            print(f"  {label}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    upstream = torch.rand(rows, device="cuda")
    for said, allowed in (("", None), (", 8 GB", 8 * 2**30)):

        def each_row(allowed: int | None = allowed) -> object:
            losses = LF.linear_cross_entropy(hidden, weight, target, reduction="none", max_bytes=allowed)
            return torch.autograd.grad(losses, (hidden, weight), upstream)

        yield f"{label}, a loss of each row", f"ours{said}", timed(each_row, kept)
    other = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

    def kl() -> object:
        loss = ll.kl(ll.linear(other, w), ll.linear(hidden, weight), reduction="mean")
        return gradients(loss, hidden, weight)

    yield f"kl of two heads {rows} x {width} x {classes}", "ours", timed(kl, kept)


def verdicts(results: dict[tuple[str, str], Timing], copy: float) -> Iterator[str]:
    """Compare with what is asked of an H200."""
    for case in DENSE:
        label = f"{case.rows} x {case.classes} {str(case.dtype).removeprefix('torch.')}"
        size = case.rows * case.classes * case.dtype.itemsize
        for name, passes, asked in (("forward", 1, 0.85), ("forward and backward", 3, 0.80)):
            time = results["cross-entropy " + label + ", " + name, "ours"]
            share = passes * size / (time.milliseconds / 1e3) / copy
            yield f"cross-entropy {label}, {name}: {share:.0%} of a copy's bandwidth (asked at 131072: {asked:.0%})"
    for head in HEADS:
        label = f"head {head.rows} x {head.width} x {head.classes} bfloat16"
        ours, bare = results[label, "ours"], results[label, "the three bare products"]
        slower = ours.milliseconds / bare.milliseconds
        yield f"{label}: {slower:.3f} of its bare products (asked: 1.10), {ours.extra_bytes / 1e9:.2f} GB extra (1)"
        for name in ("torch, 1024 rows at a time", "liger"):
            if (label, name) in results:
                ratio = results[label, name].milliseconds / ours.milliseconds
                yield f"{label}: {ratio:.2f} times as fast as {name}"
        pair = results[f"kl of two heads {head.rows} x {head.width} x {head.classes}", "ours"]
        slower = pair.milliseconds / (bare.milliseconds * 4 / 3)
        asked_for = "asked: 1.15" if head == HEADS[0] else "nothing asked: few features a class"
        yield f"kl of two heads {head.rows} x {head.width} x {head.classes}: {slower:.3f} of its four ({asked_for})"


# --- what the ceilings allow


def model() -> None:
    """Print bytes and products, counted, and the time they would take at the ceilings."""
    ceilings = f"bytes over {COPY_BYTES / 1e12} TB/s, products over {PRODUCT_FLOPS / 1e12:.0f} TFLOP/s"
    print(f"A model, not a measurement: {ceilings}")
    print(f"{'case':66} {'bytes':>10} {'products':>12} {'ms':>8} {'of products':>11}")

    def line(name: str, moved: float, flops: float = 0.0) -> None:
        time, products = moved / COPY_BYTES + flops / PRODUCT_FLOPS, flops / PRODUCT_FLOPS
        share = f"{time / products:11.3f}" if flops else f"{'':11}"
        print(f"{name:66} {moved / 1e9:7.2f} GB {flops / 1e12:8.2f} TFL {time * 1e3:8.2f} {share}")

    for rows, classes, dtype in DENSE:
        size, kind = rows * classes * dtype.itemsize, str(dtype).removeprefix("torch.")
        line(f"cross-entropy {rows} x {classes} {kind}, forward", size)
        line(f"cross-entropy {rows} x {classes} {kind}, forward, backward", 3 * size)
        line(f"entropy {rows} x {classes} {kind}, forward, backward", 3 * size)
        line(f"kl {rows} x {classes} {kind}, forward, backward", 8 * size)
    for rows, width, classes in HEADS:
        product, logits = 2.0 * rows * width * classes, rows * classes
        tiles = -(-rows // 1024)
        # Of each logit in float32: written by the product, read for the statistics and for the gradient, the gradient
        # written in bfloat16 and read by both products; of each tile the weight read twice, its sum read and written.
        moved = logits * (4 + 4 + 4 + 2 + 2 + 2) + tiles * classes * width * (2 + 2 + 4 + 4)
        # The products' own traffic is in their rate already; what is beside it:
        beside = logits * (4 + 4 + 2)
        line(f"head {rows} x {width} x {classes}, kernels beside the products", beside, 3 * product)
        print(f"{'':66} {moved / 1e9:7.2f} GB with what the products move, of {tiles} tiles")
        for said, kept in (("nothing kept", 0.0), ("half kept", 0.5), ("all kept", 1.0)):
            each_row = f"head {rows} x {width} x {classes}, a loss of each row, {said}"
            line(each_row, beside, (4 - kept) * product)
        # Of each pair of logits: read for the log-sums, for the divergence, for the gradient, which is written.
        line(f"kl of two heads {rows} x {width} x {classes}, one trained", logits * (8 + 8 + 8 + 2), 4 * product)


def sanitizer_finds_nothing() -> Iterator[str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield "compute-sanitizer is not installed: not run"
        return
    command = [tool, "--error-exitcode", "9", sys.executable, str(Path(__file__)), "--correctness", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise AssertionError(done.stdout[-2000:] + done.stderr[-2000:])
    yield "compute-sanitizer: no access out of bounds"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--correctness", action="store_true", help="stop before the timings")
    parser.add_argument("--small", action="store_true", help="the kernels alone, as for compute-sanitizer")
    parser.add_argument("--model", action="store_true", help="what the ceilings of an H200 would make of each case")
    parser.add_argument("--rehearse", action="store_true", help="the correctness part, small, on Triton's interpreter")
    asked = parser.parse_args()
    if asked.model:
        model()
        return 0
    if asked.rehearse:
        if not triton.launching.INTERPRETED:
            parser.error("--rehearse needs TRITON_INTERPRET=1, set before Triton is imported")
        return 0 if all_is_right((kernels_are_right, products_are_right, heads_are_right)) else 1
    if not torch.cuda.is_available():
        print("no GPU is here: nothing was run and nothing measured (--model prints what was counted)", file=sys.stderr)
        return 1
    if triton.missing() is not None:
        print(triton.missing(), file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {triton.detail()}")
    parts = (kernels_are_right, products_are_right, heads_are_right, calls_never_wait, sanitizer_finds_nothing)
    if not all_is_right(parts[:1] if asked.small else parts):
        return 1
    if asked.small or asked.correctness:
        return 0
    copy = copy_bandwidth()
    print(f"a copy: {copy / 1e12:.2f} TB/s")
    results: dict[tuple[str, str], Timing] = {}
    sources = [*((dense_cases, case) for case in DENSE), *((head_cases, case) for case in HEADS)]
    for source, case in sources:
        for name, who, time in source(case):  # type: ignore[operator]
            results[name, who] = time
            print(f"{name:66} {who:28} {time.milliseconds:9.3f} ms {time.extra_bytes / 1e9:7.2f} GB", flush=True)
        torch.cuda.empty_cache()
    said = list(verdicts(results, copy))
    print("\n".join(said))
    if asked.json is not None:
        figures = [{"case": name, "who": who, **time._asdict()} for (name, who), time in results.items()]
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": copy}
        asked.json.write_text(json.dumps({**about, "figures": figures, "verdicts": said}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
