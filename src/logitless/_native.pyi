"""The compiled kernels; see csrc/module.cpp. Tensors are addresses, so only `logitless.kernels.cpu` may call these."""

from typing import TypedDict

from torch import Tensor

class NativeInfo(TypedDict):
    isa: str
    compiled: list[str]
    supported: list[str]
    openmp: bool
    pool_limit_bytes: int
    pool_free_bytes: int
    pool_used_bytes: int
    pool_blocks: int

def row_stats(
    dtype: int,
    threads: int,
    logits: int,
    outer: int,
    classes: int,
    inner: int,
    outer_stride: int,
    class_stride: int,
    inner_stride: int,
    target: int,
    ignore_index: int,
    class_weight: int,
    dense_target: int,
    dense_outer_stride: int,
    dense_class_stride: int,
    dense_inner_stride: int,
    nll: int,
    lse: int,
    row_max: int,
    log_sum: int,
    entropy: int,
    argmax: int,
    rank: int,
    smooth_sum: int,
    dense_sum: int,
    dense_mass: int,
    /,
) -> int: ...
def row_grad(
    dtype: int,
    threads: int,
    logits: int,
    outer: int,
    classes: int,
    inner: int,
    outer_stride: int,
    class_stride: int,
    inner_stride: int,
    grad: int,
    grad_outer_stride: int,
    grad_class_stride: int,
    grad_inner_stride: int,
    target: int,
    ignore_index: int,
    class_weight: int,
    index_weight: int,
    dense_target: int,
    dense_outer_stride: int,
    dense_class_stride: int,
    dense_inner_stride: int,
    row_max: int,
    log_sum: int,
    upstream: int,
    upstream_stride: int,
    a_scale: float,
    b_scale: float,
    c_scale: float,
    e_scale: float,
    f_scale: float,
    a_extra: float,
    a: int,
    b: int,
    c: int,
    e: int,
    f: int,
    /,
) -> None: ...

PAIR_SAVED: int

def pair_row_stats(
    dtype: int,
    threads: int,
    logits: int,
    outer: int,
    classes: int,
    inner: int,
    outer_stride: int,
    class_stride: int,
    inner_stride: int,
    other: int,
    other_outer_stride: int,
    other_class_stride: int,
    other_inner_stride: int,
    target: int,
    ignore_index: int,
    kl: int,
    reverse_kl: int,
    js: int,
    cross_entropy: int,
    entropy_p: int,
    entropy_q: int,
    nll_p: int,
    nll_q: int,
    same_top: int,
    saved: int,
    /,
) -> int: ...
def pair_row_grad(
    dtype: int,
    threads: int,
    logits: int,
    outer: int,
    classes: int,
    inner: int,
    outer_stride: int,
    class_stride: int,
    inner_stride: int,
    other: int,
    other_outer_stride: int,
    other_class_stride: int,
    other_inner_stride: int,
    target: int,
    ignore_index: int,
    saved: int,
    kl: int,
    reverse_kl: int,
    js: int,
    cross_entropy: int,
    entropy_p: int,
    entropy_q: int,
    nll_p: int,
    nll_q: int,
    grad: int,
    grad_outer_stride: int,
    grad_class_stride: int,
    grad_inner_stride: int,
    other_grad: int,
    other_grad_outer_stride: int,
    other_grad_class_stride: int,
    other_grad_inner_stride: int,
    /,
) -> None: ...
def pool_tensor(dtype: int, shape: list[int], /) -> Tensor: ...
def pool_clear() -> None: ...
def select_isa(name: str, /) -> None: ...
def native_info() -> NativeInfo: ...
def sum_cross_entropy(
    dtype: int, logits: int, rows: int, classes: int, target: int, ignore_index: int, grad: int, mean: bool, /
) -> tuple[int, float, int]: ...

_Operand = tuple[int, int, tuple[int, ...]] | None  # address, storage, strides

def elementwise(
    op: int,
    wide: bool,
    threads: int,
    shape: tuple[int, ...],
    input: _Operand,
    target: _Operand,
    weight: _Operand,
    pos_weight: _Operand,
    upstream: _Operand,
    scale: float,
    out: _Operand,
) -> tuple[float, int]: ...
def cosine(
    storage: int,
    threads: int,
    shape: tuple[int, ...],
    dim: int,
    x1: _Operand,
    x2: _Operand,
    embedding: bool,
    eps: float,
    margin: float,
    target: int,
    out: int,
    saved: int,
) -> None: ...
def cosine_grad(
    storage: int,
    threads: int,
    shape: tuple[int, ...],
    dim: int,
    x1: _Operand,
    x2: _Operand,
    embedding: bool,
    eps: float,
    margin: float,
    target: int,
    saved: int,
    upstream: int,
    upstream_stride: int,
    upstream_scale: float,
    grad1: _Operand,
    grad2: _Operand,
) -> None: ...
