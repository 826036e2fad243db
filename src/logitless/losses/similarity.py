"""Cosine similarity, and the embedding loss made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless._autograd.elements import CosineCall, Reduction, cosine
from logitless._autograd.pairwise import PairwiseCall, pairwise
from logitless._heads.multiplier import multiplier
from logitless._rules import dispatch
from logitless._rules.precision import check_real, no_autocast, precision_of
from logitless._rules.reduction import count_of, reduce_rows, resolve_reduction
from logitless.kernels import definitions


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8, *, backend: str | None = None) -> Tensor:
    """Return the cosine of the angle between vectors along a dimension, within [-1, 1].

    Equals `torch.nn.functional.cosine_similarity(x1, x2, dim, eps)`:
    `(x1 * x2).sum(dim) / (x1.norm(dim=dim).clamp(min=eps) * x2.norm(dim=dim).clamp(min=eps))`.

    Args:
        x1, x2: floating, shapes that broadcast against each other.
        dim: the vectors' dimension in the broadcast shape.
        eps: the least norm, per vector; 0 is right for vectors of any length but 0.
        backend: force a backend; see `logitless.backends`.

    Returns:
        The broadcast shape without `dim`, in the promoted dtype. Never above 1 by rounding, never NaN for a zero
        vector, and right for vectors whose squares overflow or vanish. All pairs of many, (N, 1, D) with (1, M, D), are
        a matrix product.

    Raises:
        RuntimeError: an integer dtype, a negative eps, shapes that do not broadcast. TypeError: a complex dtype.
        IndexError: no such dimension.

    Source: `torch.nn.functional.cosine_similarity`. In training its gradient is orthogonal to each vector: it turns
    them and never changes their length to first order.

    >>> import torch, logitless.functional as F
    >>> F.cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    tensor([0.9600])
    """
    for name, tensor in (("x1", x1), ("x2", x2)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"cosine_similarity: argument '{name}' must be Tensor, not {type(tensor).__name__}")
    check_real("cosine_similarity", x1=x1, x2=x2)
    if not (x1.is_floating_point() or x2.is_floating_point()):
        raise RuntimeError(
            "cosine_similarity: expected common dtype to be floating point, yet common dtype is "
            f"{torch.promote_types(x1.dtype, x2.dtype)}"
        )
    if eps < 0:
        raise RuntimeError(f"cosine_similarity: eps must be non-negative, got: {eps}")
    sizes = x1.shape if x1.shape == x2.shape else torch.broadcast_shapes(x1.shape, x2.shape)
    dims = max(len(sizes), 1)
    if not -dims <= dim < dims:
        raise IndexError(
            "cosine_similarity: Dimension out of range (expected to be in range of "
            f"[{-dims}, {dims - 1}], but got {dim})"
        )
    # On CPU torch's autocast leaves this function alone; elsewhere it answers in float32.
    precision = precision_of(x1, x2, autocast=x1.device.type != "cpu")

    def definition(x1: Tensor, x2: Tensor) -> Tensor:
        with no_autocast(x1):
            first, second = torch.broadcast_tensors(x1.to(precision.compute), x2.to(precision.compute))
            return definitions.cosine_similarity(first, second, dim, eps).to(precision.result)

    obstacle = _obstacle(sizes)
    picked = dispatch.pick("cosine_similarity", (x1, x2), backend, obstacle=obstacle, compiles=True)
    if picked.PLAIN:
        return definition(x1, x2)
    call = CosineCall(picked, sizes, dim, eps, 0.0, Reduction("none", 1.0, precision.result), definition)
    return cosine(call, *_of_one_dtype(x1, x2))


def pairwise_cosine(
    x: Tensor, y: Tensor | None = None, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return the cosine of each vector of x with each of y, within [-1, 1]: a matrix product of unit vectors.

    Equals `F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1, eps=0)`, and 0 for a zero vector.

    Args:
        x: (N, D), floating.
        y: (M, D); x itself where not given.
        out: (N, M), floating: where to write the result, which has no gradient then.
        backend: force a backend; see `logitless.backends`.

    Returns:
        (N, M) in float32, or float64 where either is float64: in half precision different cosines would be ties. A zero
        vector has a gradient of zero.

    Raises:
        ValueError: shapes that do not fit. TypeError: vectors that are not floating. RuntimeError: `out` beside vectors
            that need a gradient.

    Source: Salton, 1975. In training its gradient is orthogonal to each vector: it turns them and never changes their
    length to first order.

    >>> import torch, logitless as ll
    >>> ll.pairwise_cosine(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[4.0, 3.0]]))
    tensor([[0.9600],
            [0.6000]])
    """
    other = x if y is None else y
    for name, tensor in (("x", x), ("y", other)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"pairwise_cosine: {name} must be a Tensor of a floating dtype, got {given}")
        check_real("pairwise_cosine", **{name: tensor})
    if x.dim() != 2 or other.dim() != 2 or x.shape[1] != other.shape[1]:
        raise ValueError(
            f"pairwise_cosine: x must be (N, D) and y (M, D), got {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if out is not None:
        if out.shape != (len(x), len(other)) or not out.is_floating_point():
            raise ValueError(
                f"pairwise_cosine: out must be floating ({len(x)}, {len(other)}), got {out.dtype} {tuple(out.shape)}"
            )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, other, out)):
            raise RuntimeError("pairwise_cosine: out takes no gradient; leave it out, or call it under torch.no_grad()")
    picked = dispatch.pick("pairwise_cosine", (x, other, out), backend)
    dtype = precision_of(x, other).compute
    with no_autocast(x):
        return pairwise(PairwiseCall(multiplier(picked, dtype, x.shape[1]), dtype), x, other, out)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `1 - cos` for similar pairs (target 1) and `max(0, cos - margin)` for others (target -1).

    Equals `torch.nn.functional.cosine_embedding_loss(input1, input2, target, margin, ...)`. Its cosine adds 1e-12 to
    each squared norm, as torch's does, where `cosine_similarity` has `eps`.

    Args:
        input1, input2: (N, D), or (D,) for one pair; floating.
        target: (N,), or () for one pair; 1 or -1. Any other value gives 0, as in torch: for labels 0 and 1 pass
            `2 * labels - 1`.
        margin: the cosine below which a dissimilar pair costs nothing, -1 to 1.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        reduction: "none", "mean" (over the pairs) or "sum".
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar, or with "none" (N,); in the inputs' promoted dtype (float32 under autocast).

    Raises:
        RuntimeError: shapes that do not fit, as torch raises. ValueError: an unknown reduction. TypeError: a complex
            dtype.

    Source: `torch.nn.functional.cosine_embedding_loss`. In training it turns similar pairs towards each other and
    others apart until their cosine is below the margin.

    >>> import torch, logitless.functional as F
    >>> F.cosine_embedding_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), torch.tensor([1]))
    tensor(0.0400)
    """
    reduction = resolve_reduction(reduction, size_average, reduce)
    for name, tensor in (("input1", input1), ("input2", input2), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"cosine_embedding_loss: argument '{name}' must be Tensor, not {type(tensor).__name__}")
    check_real("cosine_embedding_loss", input1=input1, input2=input2, target=target)
    shapes = f"input1 {tuple(input1.shape)}, input2 {tuple(input2.shape)}, target {tuple(target.shape)}"
    if target.dim() > 1:
        raise RuntimeError(
            f"cosine_embedding_loss: 0D or 1D target tensor expected, multi-target not supported; {shapes}"
        )
    if input1.dim() != target.dim() + 1 or input2.dim() != target.dim() + 1:
        raise RuntimeError(
            f"cosine_embedding_loss: {target.dim()}D target tensor expects {target.dim() + 1}D input tensors; {shapes}"
        )
    sizes = torch.broadcast_shapes(input1.shape, input2.shape, (*target.shape, 1))
    precision = precision_of(input1, input2)
    denominator = torch.sym_float(count_of(sizes[:-1]))

    def definition(input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        with no_autocast(input1):
            first, second = torch.broadcast_tensors(input1.to(precision.compute), input2.to(precision.compute))
            loss = definitions.cosine_embedding_loss(first, second, target, float(margin), target.dim())
        return reduce_rows(loss, reduction, denominator=denominator, dtype=precision.result)

    obstacle = _obstacle(sizes)
    tensors = (input1, input2, target)
    picked = dispatch.pick("cosine_embedding_loss", tensors, backend, obstacle=obstacle, compiles=True)
    if picked.PLAIN:
        return definition(input1, input2, target)
    call = CosineCall(
        picked, sizes, -1, 0.0, float(margin), Reduction(reduction, denominator, precision.result), definition
    )
    return cosine(call, *_of_one_dtype(input1, input2), target)


def _obstacle(sizes: torch.Size) -> str | None:
    """Return what about these vectors of broadcast shape `sizes` the compiled kernels do not do, if anything."""
    if not sizes or count_of(sizes) == 0:
        return "there are no vectors, or none with elements"
    return None


def _of_one_dtype(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors in their promoted floating dtype, which the kernels read in place."""
    if x1.dtype == x2.dtype and x1.is_floating_point():
        return x1, x2
    common = precision_of(x1, x2, autocast=False).result
    return x1.to(common), x2.to(common)
