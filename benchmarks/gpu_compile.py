"""Compile every variant of the GPU kernels for three targets, without a GPU, and read back what came out.

    python benchmarks/gpu_compile.py [--only REGEX] [--target sm_80 sm_90 gfx942]

For each variant it prints registers a thread, bytes spilled, and the widest load from and store to global memory, and
in the end a line for each target. It fails where registers are spilled, where they leave no room for two blocks on a
multiprocessor, or where a variant whose strides allow it does not load 16 bytes at a time.
Needs Triton alone (3.9, as the dev group pins it).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from logitless.kernels.interface import Divergence, ElementLoss
from logitless.kernels.triton import cosines, element_losses, pairs, rows
from logitless.kernels.triton.launching import COMPILED, warps_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers of a multiprocessor (NVIDIA), of a lane's share of a SIMD (AMD), which two blocks must find room in.
REGISTERS = {"cuda": 65536, "hip": 512}
LANGUAGE = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    """What the package would have launched."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class Built(NamedTuple):
    """What a compiler made of a launch."""

    registers: int
    spilled: int  # to memory: bytes, or on AMD registers
    widest_load: int  # bytes
    widest_store: int
    warps: int
    lanes: int

    def blocks(self, kind: str) -> int:
        """Return how many blocks' registers a multiprocessor has room for."""
        if kind == "cuda":
            return REGISTERS[kind] // (self.registers * self.warps * self.lanes)
        return REGISTERS[kind] * 4 // (self.registers * max(4, self.warps))


class Variant(NamedTuple):
    name: str
    call: Callable[[], object]
    vector: bool  # whether every access may move 16 bytes


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
LONG, SHORT = 49152, 1000


def variants() -> Iterator[Variant]:
    """Every way in which the package launches a kernel, at sizes that are typical of it."""
    for dtype in NAMES:
        yield from variants_of(dtype)
    for name, z in {"one row": meta(1, LONG), "one class": meta(4096, 1), "one number": meta(1, 1)}.items():
        yield from variants_of_few(name, z)
    tile = meta(1024, LONG)
    narrow = tile.view(torch.bfloat16)[:, :LONG]
    yield Variant(
        "gradient in the logits' bytes",
        lambda: rows.row_grad(
            tile,
            meta(1024),
            meta(1024, dtype=torch.float64),
            meta(1024, dtype=torch.int64),
            a_scale=1.0,
            c_scale=-1.0,
            out=narrow,
        ),
        False,
    )
    yield Variant(
        "gradients of kl in the logits' bytes",
        lambda: pairs.pair_row_grad(
            tile, tile, meta(1024, pairs.PAIR_SAVED, dtype=torch.float64), kl=meta(1024), out=(narrow, narrow)
        ),
        False,
    )


def variants_of_few(name: str, z: Tensor) -> Iterator[Variant]:
    """The kernels of a size of which Triton makes a constant, since it is 1."""
    of_rows, wide = meta(z.shape[0]), meta(z.shape[0], dtype=torch.float64)
    index = meta(z.shape[0], dtype=torch.int64)
    every = {"lse": True, "entropy": True, "argmax": True, "rank": True}
    saved = meta(z.shape[0], pairs.PAIR_SAVED, dtype=torch.float64)
    yield Variant(name, lambda: rows.row_stats(z, index, **every), False)
    yield Variant(
        f"gradient of {name}", lambda: rows.row_grad(z, of_rows, wide, index, a_scale=1.0, c_scale=-1.0), False
    )
    yield Variant(f"pair of {name}", lambda: pairs.pair_row_stats(z, z, index, js=True, entropy=True), False)
    yield Variant(f"gradient of pair of {name}", lambda: pairs.pair_row_grad(z, z, saved, index, nll_p=of_rows), False)
    loss: ElementLoss = "binary_cross_entropy_with_logits"
    yield Variant(f"elements of {name}", lambda: element_losses.elements_sum(loss, z, z, of_rows.unsqueeze(1)), False)
    yield Variant(f"cosine of {name}", lambda: cosines.cosine_similarity(z, z, save=True), False)


def variants_of(dtype: torch.dtype) -> Iterator[Variant]:
    every = {"lse": True, "entropy": True, "argmax": True, "rank": True}
    short_name = NAMES[dtype]
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def logits(rows: int, classes: int, dtype: torch.dtype = dtype) -> Tensor:
        return meta(rows, classes, dtype=dtype)

    def of_rows(rows: int, dtype: torch.dtype = real) -> Tensor:
        return meta(rows, dtype=dtype)

    index, n = torch.int64, 4096
    z, weight, wide = logits(n, LONG), meta(LONG, dtype=real), torch.float64
    told = (z, of_rows(n), of_rows(n, wide))
    yield Variant(f"nll {short_name}", lambda z=z: rows.row_stats(z, of_rows(n, index)), True)
    yield Variant(f"every statistic {short_name}", lambda z=z: rows.row_stats(z, of_rows(n, index), **every), True)
    yield Variant(
        f"smoothing, weights {short_name}",
        lambda z=z, w=weight: rows.row_stats(z, of_rows(n, index), class_weight=w, smooth=True),
        True,
    )
    yield Variant(
        f"probabilities {short_name}",
        lambda z=z, w=weight: rows.row_stats(z, dense_target=z, class_weight=w, smooth=True),
        True,
    )
    yield Variant(f"parts {short_name}", lambda: rows.row_stats(logits(n, 131072), of_rows(n, index), **every), True)
    yield Variant(f"short rows {short_name}", lambda: rows.row_stats(logits(n, SHORT), of_rows(n, index)), False)
    yield Variant(
        f"images {short_name}",
        lambda: rows.row_stats(meta(16, 21, 256, 256, dtype=dtype), meta(16, 256, 256, dtype=index), class_dim=1),
        False,
    )
    yield Variant(
        f"gradient of nll {short_name}",
        lambda t=told: rows.row_grad(*t, of_rows(n, index), upstream=of_rows(n), a_scale=1.0, c_scale=-1.0),
        True,
    )
    yield Variant(
        f"gradient of everything {short_name}",
        lambda t=told, w=weight: rows.row_grad(
            *t,
            of_rows(n, index),
            dense_target=t[0],
            class_weight=w,
            upstream=of_rows(n),
            a=of_rows(n),
            b=of_rows(n),
            c=of_rows(n),
            e=of_rows(n),
            f=of_rows(n),
            **dict.fromkeys(("a_scale", "b_scale", "c_scale", "e_scale", "f_scale"), 0.5),
        ),
        True,
    )
    measures = {"kl": {"kl": True}, "js": {"kl": False, "js": True}}
    measures["every measure"] = dict.fromkeys(("kl", "reverse_kl", "js", "cross_entropy", "entropy"), True)
    saved = meta(n, pairs.PAIR_SAVED, dtype=wide)
    for name, asked in measures.items():
        vector = dtype.itemsize >= 4 or name == "kl"  # a thread has four numbers of a mixture's
        yield Variant(f"{name} {short_name}", lambda z=z, a=asked: pairs.pair_row_stats(z, z, **a), vector)
        given = dict.fromkeys((key for key, want in asked.items() if want and key != "entropy"), of_rows(n))
        yield Variant(
            f"gradient of {name} {short_name}",
            lambda z=z, s=saved, g=given: pairs.pair_row_grad(z, z, s, **g),
            True,
        )
    for family in ("skewed_kl", "weighted_js", "total_variation"):
        asked_for = Divergence(family, 0.3)
        yield Variant(
            f"{family} {short_name}",
            lambda z=z, d=asked_for: pairs.pair_row_stats(z, z, kl=False, divergence=d),
            dtype.itemsize >= 4 or family == "total_variation",
        )
        yield Variant(
            f"gradient of {family} {short_name}",
            lambda z=z, s=saved, d=asked_for: pairs.pair_row_grad(z, z, s, divergence=d, divergence_grad=of_rows(n)),
            True,
        )
    yield Variant(
        f"parts of pairs {short_name}",
        lambda: pairs.pair_row_stats(logits(n, 131072), logits(n, 131072), of_rows(n, index)),
        True,
    )
    for loss in ("binary_cross_entropy_with_logits", "binary_cross_entropy", "kl_div", "kl_div_log_target"):
        yield Variant(f"{loss} {short_name}", lambda z=z, k=loss: element_losses.elements(k, z, z), True)
        yield Variant(f"sum of {loss} {short_name}", lambda z=z, k=loss: element_losses.elements_sum(k, z, z), True)
        yield Variant(
            f"gradient of {loss} {short_name}",
            lambda z=z, k=loss: element_losses.elements_grad(k, z, z, upstream=z),
            True,
        )
    yield Variant(
        f"weighted labels {short_name}",
        lambda z=z, w=weight: element_losses.elements("binary_cross_entropy_with_logits", z, z, w, w),
        False,
    )
    x = logits(n, 4096)
    yield Variant(f"cosine {short_name}", lambda x=x: cosines.cosine_similarity(x, x, save=True), True)
    yield Variant(
        f"gradient of cosine {short_name}",
        lambda x=x: cosines.cosine_similarity_grad(x, x, meta(3, n, dtype=wide), upstream=of_rows(n)),
        True,
    )
    yield Variant(f"cosine embedding {short_name}", lambda x=x: cosines.cosine_embedding(x, x, of_rows(n, index)), True)


def launches(call: Callable[[], object]) -> list[Launch]:
    """Return what a call would launch."""
    seen: list[Launch] = []

    def record(kernel: Any, grid: Any, tensors: Any, *args: Any, **options: Any) -> None:
        seen.append(Launch(kernel, args, options))

    with ExitStack() as patches:
        for module in (rows, pairs, element_losses, cosines):
            patches.enter_context(patch.object(module, "launch", record))
        call()
    return seen


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """Return the kernel as Triton would specialise it for these arguments, and the compiler's options."""
    names = set(launch.kernel.arg_names)
    told = {name: value for name, value in launch.options.items() if name not in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    for position, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], aligned = f"*{LANGUAGE[value.dtype]}", True
        elif isinstance(value, float):
            signature[parameter.name] = "fp64"
        elif value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes), told


def built(launch: Launch, target: GPUTarget) -> Built:
    source, options = source_of(launch)
    warps = options["num_warps"] = warps_of(options["num_warps"], lanes=target.warp_size)
    compiled = triton.compile(source, target=target, options=options | COMPILED)
    if target.backend == "hip":
        return _built_for_amd(compiled.asm["amdgcn"], warps)
    return _built_for_nvidia(compiled.asm["ptx"], warps)


def _widest(found: list[tuple[str, str]]) -> int:
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def _built_for_nvidia(ptx: str, warps: int) -> Built:
    assembler = get_ptxas(int(re.findall(r"^\.target sm_(\d+)", ptx, re.MULTILINE)[0])).path  # that Triton itself takes
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        (name,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
        done = subprocess.run(
            [assembler, "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"ptxas: {done.stderr}")
        told = done.stderr
    registers = int(re.findall(r"Used (\d+) registers", told)[0])
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", told))
    pattern = r"\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)"
    return Built(
        registers,
        spilled,
        _widest(re.findall(r"ld" + pattern, ptx)),
        _widest(re.findall(r"st" + pattern, ptx)),
        warps,
        32,
    )


def _built_for_amd(asm: str, warps: int) -> Built:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", asm)[0])

    def widest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{kind}_(dwordx?\d?|short|ushort|byte|ubyte)", asm)
        sizes = {"dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
        return max((sizes.get(each) or 4 * int(each[-1]) for each in found), default=0)

    # A scalar register is spilled to a lane of a vector register, and not to memory.
    return Built(number("vgpr_count"), number("vgpr_spill_count"), widest("load"), widest("store"), warps, 64)


def faults(variant: Variant, launch: Launch, made: Built, kind: str) -> list[str]:
    """Return what is wrong with a kernel, if anything."""
    wrong = []
    if made.spilled:
        wrong.append(f"{made.spilled} spilled")
    if made.blocks(kind) < 2:
        wrong.append(f"{made.registers} registers leave no room for two blocks")
    joins = "join" in launch.kernel.__name__
    if variant.vector and not joins and made.widest_load < 16:
        wrong.append(f"loads of {made.widest_load} bytes")
    return wrong


class Row(NamedTuple):
    """A kernel of a variant, compiled for a target."""

    target: str
    variant: Variant
    made: Built
    joins: bool


def summary(rows: list[Row]) -> Iterator[str]:
    """Of each target: kernels, most registers a thread, fewest blocks on a multiprocessor, spills, widths of loads."""
    for target in dict.fromkeys(row.target for row in rows):
        kernels = [row for row in rows if row.target == target]
        kind = TARGETS[target].backend
        wide = [row.made.widest_load for row in kernels if row.variant.vector and not row.joins]
        yield (
            f"{target}: {len(kernels)} kernels, at most {max(row.made.registers for row in kernels)} registers, "
            f"at least {min(row.made.blocks(kind) for row in kernels)} blocks, "
            f"{sum(row.made.spilled > 0 for row in kernels)} with spills, "
            f"loads of {min(wide, default=0)} bytes or more in all {len(wide)} whose strides allow it"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression of variants' names")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    asked = parser.parse_args()
    rows: list[Row] = []
    failed = 0
    print(f"{'variant':44} {'kernel':18} {'target':7} {'warps':>5} {'regs':>5} {'spill':>5} {'load':>4} {'store':>5}")
    for variant in variants():
        if not re.search(asked.only, variant.name):
            continue
        for launch in launches(variant.call):
            for name in asked.target:
                made = built(launch, TARGETS[name])
                wrong = faults(variant, launch, made, TARGETS[name].backend)
                failed += bool(wrong)
                rows.append(Row(name, variant, made, "join" in launch.kernel.__name__))
                print(
                    f"{variant.name:44} {launch.kernel.__name__:18} {name:7} {made.warps:5} {made.registers:5} "
                    f"{made.spilled:5} {made.widest_load:4} {made.widest_store:5}  {'; '.join(wrong)}",
                    flush=True,
                )
    for line in summary(rows):
        print(line)
    print(f"{len(rows)} kernels compiled, {failed} with a fault")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
