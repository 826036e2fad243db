"""The compiled kernels; see csrc/binding. Only `logitless.kernels.cpu` may call these: tensors are addresses, but in
`cross_entropy` and its gradient.

tests/test_native_stub.py holds names, order and types of the parameters to the extension's own.
"""

from typing import TypedDict, type_check_only

@type_check_only
class NativeInfo(TypedDict):
    isa: str
    tiles: str
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
    divergence: int,
    weight: float,
    divergence_out: int,
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
    divergence: int,
    weight: float,
    divergence_grad: int,
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
def pool_block(dtype: int, shape: tuple[int, ...], /) -> object: ...  # a DLPack capsule
def pool_clear() -> None: ...
def select_isa(name: str, /) -> None: ...
def select_tiles(name: str, /) -> None: ...
def native_info() -> NativeInfo: ...
def cross_entropy(
    threads: int,
    logits: object,
    target: object,
    weight: object,
    ignore_index: int,
    smoothing: float,
    mean: bool,
    result: object,
    losses: object,
    save: bool,
    /,
) -> tuple[int, float, bytes] | None: ...
def cross_entropy_grad(
    threads: int,
    logits: object,
    target: object,
    weight: object,
    saved: bytes,
    upstream: object,
    grad: object,
    /,
) -> None: ...
def tensors_are(type: object, exchange: object, to_dlpack: object, /) -> None: ...
def backend_is_forced() -> bool: ...
def product_is_faster(dtype: int, /) -> bool: ...
def product_serves(dtype: int, /) -> bool: ...
def product(
    a_dtype: int,
    b_dtype: int,
    c_dtype: int,
    threads: int,
    rows: int,
    depth: int,
    columns: int,
    a: int,
    a_row_stride: int,
    a_depth_stride: int,
    b: int,
    b_depth_stride: int,
    b_column_stride: int,
    c: int,
    c_row_stride: int,
    accumulate: bool,
    /,
) -> None: ...
def search(
    dtype: int,
    threads: int,
    queries: int,
    depth: int,
    rows: int,
    query: int,
    corpus: int,
    row_stride: int,
    normalized: bool,
    k: int,
    first_id: int,
    allowed: int,
    allowed_stride: int,
    exclude_self: bool,
    self_id: int,
    scores: int,
    ids: int,
    /,
) -> None: ...
def search_ranks(
    dtype: int,
    threads: int,
    queries: int,
    depth: int,
    rows: int,
    query: int,
    corpus: int,
    row_stride: int,
    normalized: bool,
    first_query: int,
    ranks: int,
    /,
) -> None: ...

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
    /,
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
    /,
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
    /,
) -> None: ...
