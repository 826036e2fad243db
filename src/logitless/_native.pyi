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
def pool_tensor(dtype: int, shape: list[int], /) -> Tensor: ...
def pool_clear() -> None: ...
def native_info() -> NativeInfo: ...
