"""The Triton kernels on tensors of a GPU (CUDA, ROCm), as a backend: see `interface`.

Files named `_kernels` hold the kernels, each under its formula; the others allocate the outputs and launch them.
Nothing waits for the device: no value is read on the host, but where LOGITLESS_CHECK=1 asks for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from logitless.kernels.interface import TileRules
from logitless.kernels.reference import search, search_ranks  # sorted by torch, on the device
from logitless.kernels.triton.cosines import (
    cosine_embedding,
    cosine_embedding_grad,
    cosine_similarity,
    cosine_similarity_grad,
)
from logitless.kernels.triton.element_losses import elements, elements_grad, elements_sum
from logitless.kernels.triton.launching import DTYPES, INTERPRETED, MISSING
from logitless.kernels.triton.pairs import PAIR_SAVED, pair_row_grad, pair_row_stats
from logitless.kernels.triton.products import adds_wide, product
from logitless.kernels.triton.rows import row_grad, row_stats

__all__ = [
    "DEVICE_TYPES",
    "FIXED_PRODUCTS",
    "MEASURED_PRODUCTS",
    "NAME",
    "NARROWS",
    "PAIR_SAVED",
    "PLAIN",
    "PRODUCTS_ARE_FIXED",
    "PRODUCT_BITS_STAND",
    "PRODUCT_DTYPES",
    "READS_VALUES",
    "cosine_embedding",
    "cosine_embedding_grad",
    "cosine_similarity",
    "cosine_similarity_grad",
    "detail",
    "elements",
    "elements_grad",
    "elements_sum",
    "empty",
    "empty_like",
    "lacks",
    "missing",
    "obstacle",
    "pair_row_grad",
    "pair_row_stats",
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

NAME = "triton"
DEVICE_TYPES = frozenset(("cuda",))  # which is ROCm's name in torch too
PLAIN = False
READS_VALUES = False
PRODUCT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
# The libraries choose another order of sums for other shapes.
PRODUCT_BITS_STAND = False
MEASURED_PRODUCTS: frozenset[torch.dtype] = frozenset()
FIXED_PRODUCTS: frozenset[torch.dtype] = frozenset()
PRODUCTS_ARE_FIXED = False
NARROWS = True

LEAST_CAPABILITY = (8, 0)

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)


def missing() -> str | None:
    """Return why the kernels are not there, or None if they are."""
    return MISSING


def lacks() -> str | None:
    """Return what this machine lacks for them to run."""
    if MISSING is not None or INTERPRETED or torch.cuda.is_available():
        return MISSING
    return f"Triton {_version()} is installed, but torch finds no GPU here"


def _version() -> str:
    return importlib.metadata.version("triton")


def detail() -> str:
    """Return what runs the kernels."""
    if not torch.cuda.is_available():
        return f"Triton {_version()}, whose interpreter runs the kernels on the CPU (TRITON_INTERPRET=1): slow"
    return f"Triton {_version()} kernels for tensors on a GPU: {torch.cuda.get_device_name()}"


def served() -> str:
    """Return why a call goes to the kernels."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1: the kernels are interpreted"
    return "the tensors are on a GPU"


def obstacle(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the kernels cannot take these tensors, or None if they can."""
    compiling = torch.compiler.is_compiling()
    devices = DEVICE_TYPES | {"cpu"} if INTERPRETED else DEVICE_TYPES
    place = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.device.type not in devices:
            return f"a tensor is on {tensor.device}"
        if place is None:
            place = tensor.device
            there = place.type == "cuda" and not compiling and not isinstance(tensor, FakeTensor)
            if there and (reason := _too_old(place)) is not None:
                return reason
        elif tensor.device != place:  # a kernel would read another device's addresses
            return f"tensors are on {place} and on {tensor.device}"
        if tensor.layout != torch.strided or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
            return f"no kernel for {tensor.dtype} in layout {tensor.layout}"
        if not compiling and tensor.is_neg():
            return "a tensor's memory holds its negative; resolve_neg() writes it out"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Return why Triton has no code for a GPU: what came before Ampere it no longer compiles for."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    least, has = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, capability))
    return f"Triton compiles for compute capability {least} and later; {device} has {has}"


def tile_rules() -> TileRules:
    """Return the tiles of a head: rows enough for products at full speed, of all classes."""
    return TileRules(
        default_bytes=512 * 2**20,
        gradient_share=1.0,
        value_share=1.0,
        least_rows=1024,
        cut_rows=1024,
        least_classes=4096,
        round_rows=128,
        class_major=False,
        line=1,
        default_rows=1024,
        keeps_logits=True,
    )


def workspace_bytes() -> int:
    """Return what the libraries' products hold: cuBLAS keeps 32 MB, on every GPU since Hopper."""
    return 32 * 2**20


def product_facts() -> str:
    """Return how torch makes them; nothing is timed beside it."""
    if torch.version.hip is not None or INTERPRETED:
        return "half-precision factors by way of float32 copies, a part at a time"
    if not adds_wide():
        return "half-precision factors with sums and results in float32, which are added a part at a time"
    return "half-precision factors with sums and results in float32"


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that is not initialised, of torch's own caching allocator."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(tensor: Tensor) -> Tensor:
    """Return memory that is not initialised."""
    return torch.empty_like(tensor)


def scalar(value: Tensor) -> Tensor:
    """Return the number where it is: to read it would wait."""
    return value
