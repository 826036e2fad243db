"""The compiled kernels on tensors of the CPU, as a backend: see `interface`.

Allocate the outputs, pass addresses and strides, nothing else: no autograd, and no check of a target's values but by
the kernel, which reports the first bad row. `float32` is the compute type of float16 and bfloat16 logits.
"""

import os
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from logitless.kernels import interface
from logitless.kernels.cpu.elementwise import (
    cosine_embedding,
    cosine_embedding_grad,
    cosine_similarity,
    cosine_similarity_grad,
    elements,
    elements_grad,
    elements_sum,
)
from logitless.kernels.cpu.memory import POOLED_BYTES, empty_like_pooled, empty_pooled, native_info, pool_clear
from logitless.kernels.cpu.pairs import pair_row_grad, pair_row_stats
from logitless.kernels.cpu.products import product
from logitless.kernels.cpu.rows import cross_entropy, cross_entropy_grad, row_grad, row_stats
from logitless.kernels.cpu.search import search, search_ranks
from logitless.kernels.interface import TileRules
from logitless.kernels.native import DTYPES, MISSING
from logitless.kernels.native import extension as _native

__all__ = [
    "DEVICE_TYPES",
    "DTYPES",
    "FIXED_PRODUCTS",
    "MEASURED_PRODUCTS",
    "NAME",
    "NARROWS",
    "PAIR_SAVED",
    "PLAIN",
    "POOLED_BYTES",
    "PRODUCTS_ARE_FIXED",
    "PRODUCT_BITS_STAND",
    "PRODUCT_DTYPES",
    "READS_VALUES",
    "cosine_embedding",
    "cosine_embedding_grad",
    "cosine_similarity",
    "cosine_similarity_grad",
    "cross_entropy",
    "cross_entropy_grad",
    "detail",
    "elements",
    "elements_grad",
    "elements_sum",
    "empty",
    "empty_like",
    "empty_like_pooled",
    "empty_pooled",
    "lacks",
    "missing",
    "native_info",
    "obstacle",
    "pair_row_grad",
    "pair_row_stats",
    "pool_clear",
    "product",
    "product_facts",
    "row_grad",
    "row_stats",
    "scalar",
    "search",
    "search_ranks",
    "served",
    "tile_rules",
    "workspace_bytes",
]

NAME = "cpu"
DEVICE_TYPES = frozenset(("cpu",))
PLAIN = False
READS_VALUES = True
PRODUCT_BITS_STAND = True
NARROWS = False
PAIR_SAVED: int = _native.PAIR_SAVED if _native else 0


# Of which the kernel has a product, on the instruction set chosen at the start.
FIXED_PRODUCTS = frozenset(dtype for dtype, code in DTYPES.items() if _native and _native.product_serves(code))


def _products() -> tuple[frozenset[torch.dtype], frozenset[torch.dtype]]:
    """Return the dtypes whose products are the kernel's, and those of them that torch may multiply faster.

    LOGITLESS_PRODUCT says which without measuring: "native" wherever the kernel serves, for sums whose order depends on
    the depth alone; "torch" nowhere. A half precision is never measured: the kernel does not round it, and torch does.
    """
    asked = os.environ.get("LOGITLESS_PRODUCT", "")
    if asked not in ("", "native", "torch"):
        raise ValueError(f"LOGITLESS_PRODUCT: expected native or torch, got {asked!r}")
    if _native is None or asked == "torch":
        return frozenset(), frozenset()
    if asked == "native":
        return FIXED_PRODUCTS, frozenset()
    measured = FIXED_PRODUCTS & {torch.float32, torch.float64}
    return measured | {d for d in FIXED_PRODUCTS if _native.product_is_faster(DTYPES[d])}, measured


# Sets that are known from the start: a graph that is being compiled can ask them, and not the extension.
PRODUCT_DTYPES, MEASURED_PRODUCTS = _products()
PRODUCTS_ARE_FIXED = False

# What a thread's share of a product packs its operands into, measured.
_WORKSPACE_BYTES = 3 * 10**6
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)

empty_like = empty_like_pooled


def missing() -> str | None:
    """Return why the compiled kernels are not there, or None if they are."""
    return MISSING


lacks = missing


def detail() -> str:
    """Return what the kernels were built for and found here."""
    facts = ", ".join(f"{name} {value}" for name, value in native_info().items())
    return f"compiled kernels for tensors on the CPU: {facts}"


def served() -> str:
    """Return why a call goes to the kernels."""
    return "the tensors are on the CPU"


def obstacle(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the kernels cannot take these tensors, or None if they can."""
    compiling = torch.compiler.is_compiling()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.layout != torch.strided or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
            return f"no kernel for {tensor.dtype} in layout {tensor.layout}"
        if not compiling and tensor.is_neg():  # an operator gets such a tensor written out
            return "a tensor's memory holds its negative; resolve_neg() writes it out"
    return None


def tile_rules() -> TileRules:
    """Return the tiles of a head, measured: rows of 49152 classes enough for products at full speed."""
    return TileRules(
        default_bytes=interface.DEFAULT_MAX_BYTES,
        gradient_share=0.7,
        value_share=0.47,
        least_rows=32,
        cut_rows=256,
        least_classes=64,
        round_rows=32,  # the columns of a tile of a product
        class_major=True,  # the product then reads the weight in the order in which it lies
        line=8,  # half a vector of the widest: lie_in_lanes in csrc/rows/lane_fold.h
    )


def workspace_bytes() -> int:
    """Return what the products of all threads pack their factors into."""
    return _WORKSPACE_BYTES * torch.get_num_threads()


def product_facts() -> str:
    """Return the instruction set and the version of the kernels."""
    return f"logitless {version('logitless')} {native_info()['isa']}"


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that is not initialised, from the pool where it is large."""
    return empty_pooled(shape, dtype)


def scalar(value: Tensor) -> float:
    """Return the number: nothing waits for it here."""
    return value.item()
