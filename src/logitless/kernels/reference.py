"""The reference as a backend: the definitions, on any device, and each kernel's formula in plain torch operations.

Torch differentiates it (`PLAIN`), so a call that it serves is its definition and none of the functions below runs. They
are what another backend's kernels are held to: the same names, written to be read, of arithmetic in float64 that is
rounded once. See `interface` for what each promises.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from logitless.kernels import definitions, interface
from logitless.kernels.interface import (
    ClassTarget,
    CosineRows,
    Divergence,
    ElementLoss,
    PairRowStats,
    RowStats,
    TileRules,
    times_zero_safe,
)

NAME = "reference"
DEVICE_TYPES: frozenset[str] = frozenset()  # any, without a kernel
PLAIN = True
READS_VALUES = True
# `pair_row_grad` makes everything again.
PAIR_SAVED = 1
PRODUCT_DTYPES: frozenset[torch.dtype] = frozenset()
MEASURED_PRODUCTS: frozenset[torch.dtype] = frozenset()
FIXED_PRODUCTS: frozenset[torch.dtype] = frozenset()
PRODUCTS_ARE_FIXED = False
PRODUCT_BITS_STAND = False
NARROWS = False


def missing() -> None:
    """Return None: torch is there."""


def lacks() -> None:
    """Return None: it runs anywhere."""


def detail() -> str:
    """Return what it is."""
    return "plain torch operations on any device: the definition"


def served() -> str:
    """Return why a call goes to it."""
    return "no other backend is here"


def obstacle(tensors: Sequence[Tensor | None]) -> None:
    """Return None: it takes whatever torch takes."""


def tile_rules() -> TileRules:
    """Return tiles that hold few rows: every operation makes a tensor of a tile's size."""
    return TileRules(
        default_bytes=interface.DEFAULT_MAX_BYTES,
        gradient_share=0.1,
        value_share=0.1,
        least_rows=1,
        cut_rows=64,
        least_classes=64,
        round_rows=1,
        class_major=False,
        line=1,
    )


def workspace_bytes() -> int:
    """Return 0: torch's products hold what they hold."""
    return 0


def product_facts() -> str:
    """Return nothing: there is no product to be timed."""
    return ""


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that is not initialised."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(tensor: Tensor) -> Tensor:
    """Return memory that is not initialised."""
    return torch.empty_like(tensor)


def scalar(value: Tensor) -> Tensor:
    """Return the number where it is."""
    return value


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor, class_dim: int) -> Tensor:
    """Return logits, or what has their shape, as float64 [..., classes]."""
    return tensor.movedim(class_dim, -1).double()


def _row_target(target: Tensor | None, classes: int, ignore_index: int) -> ClassTarget | None:
    """Return indices that are safe to gather with; what they name is never read on the host."""
    if target is None:
        return None
    ignored = target == ignore_index
    impossible = ((target < 0) | (target >= classes)) & ~ignored
    return ClassTarget(-1, classes, ignore_index, target.masked_fill(ignored | impossible, 0), ignored, impossible)


def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    dense_target: Tensor | None = None,
    lse: bool = False,
    entropy: bool = False,
    argmax: bool = False,
    rank: bool = False,
    smooth: bool = False,
) -> RowStats:
    """Return `Backend.row_stats`: a surprise is `lse - z_j`, formed as `(top - z_j) + log_sum`."""
    real, z = _real(logits.dtype), _rows(logits, class_dim)
    meaning = _row_target(target, z.shape[-1], ignore_index)
    if meaning is not None and meaning.ignored is not None:
        z = z.masked_fill(meaning.ignored.unsqueeze(-1), 0)
    top, log_sum = definitions.log_sum_exp(z, -1)
    gap = top - z
    surprise = gap + log_sum
    weight = torch.ones((), dtype=z.dtype, device=z.device) if class_weight is None else class_weight.double()
    nll = at_target = dense_sum = dense_mass = smooth_sum = None
    if meaning is not None and meaning.indices is not None:
        at_target = z.gather(-1, meaning.indices.unsqueeze(-1))
        nll = ((top - at_target) + log_sum).squeeze(-1)
        if meaning.impossible is not None:
            nll = nll.masked_fill(meaning.impossible, torch.nan)
    if dense_target is not None:
        mass = _rows(dense_target, class_dim) * weight
        dense_sum, dense_mass = times_zero_safe(mass, surprise).sum(-1), mass.sum(-1)
    if smooth:
        smooth_sum = times_zero_safe(weight.expand_as(surprise), surprise).sum(-1)
    spread = definitions.entropy(z, -1) if entropy else None

    def kept(value: Tensor | None, dtype: torch.dtype, fill: int = 0) -> Tensor | None:
        if value is None:
            return None
        if meaning is not None and meaning.ignored is not None:
            value = value.masked_fill(meaning.ignored, fill)
        return value.to(dtype)

    best = z.argmax(-1) if argmax else None
    above = (z > at_target).sum(-1) if rank and at_target is not None else None
    row_max, row_log_sum = kept(top.squeeze(-1), real), kept(log_sum.squeeze(-1), torch.float64)
    assert row_max is not None
    assert row_log_sum is not None
    return RowStats(
        row_max,
        row_log_sum,
        kept(nll, real),
        kept((top + log_sum).squeeze(-1), real) if lse else None,
        kept(spread, real),
        kept(best, torch.int64, -1),
        kept(above, torch.int64, -1),
        kept(smooth_sum, real),
        kept(dense_sum, real),
        kept(dense_mass, real),
        -1,
    )


def row_grad(
    logits: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    index_weight: bool = False,
    dense_target: Tensor | None = None,
    upstream: Tensor | None = None,
    a_scale: float = 0.0,
    b_scale: float = 0.0,
    c_scale: float = 0.0,
    e_scale: float = 0.0,
    f_scale: float = 0.0,
    a_extra: Tensor | float = 0.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    e: Tensor | None = None,
    f: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `Backend.row_grad`: p_j (A + B (z_j - lse)) + C [j = target] + E t_j w_j + F w_j."""
    z = _rows(logits, class_dim)
    meaning = _row_target(target, z.shape[-1], ignore_index)
    if meaning is not None and meaning.ignored is not None:
        z = z.masked_fill(meaning.ignored.unsqueeze(-1), 0)
    one = torch.ones((), dtype=torch.float64, device=z.device)
    given = one if upstream is None else upstream.double()
    weight = one if class_weight is None else class_weight.double()
    picked = one
    if index_weight and class_weight is not None and meaning is not None and meaning.indices is not None:
        picked = weight[meaning.indices]

    def row(coefficient: Tensor | None, scale: float) -> Tensor:
        return (given * scale * (one if coefficient is None else coefficient.double())).unsqueeze(-1)

    below = (z - row_max.double().unsqueeze(-1)) - log_sum.unsqueeze(-1)  # z_j - lse
    p = torch.exp(below)
    gradient = p * (row(a, a_scale) * picked.unsqueeze(-1) + (given * a_extra).unsqueeze(-1))
    if b_scale:
        gradient = gradient + times_zero_safe(p, below) * row(b, b_scale)
    if c_scale and target is not None:
        hit = torch.arange(z.shape[-1], device=z.device) == target.unsqueeze(-1)  # none where the class lies elsewhere
        gradient = torch.where(hit, gradient + row(c, c_scale) * picked.unsqueeze(-1), gradient)
    if e_scale and dense_target is not None:
        gradient = gradient + row(e, e_scale) * (_rows(dense_target, class_dim) * weight)
    if f_scale:
        gradient = gradient + row(f, f_scale) * weight
    if meaning is not None and meaning.ignored is not None:
        gradient = gradient.masked_fill(meaning.ignored.unsqueeze(-1), 0)
    made = torch.empty_like(logits) if out is None else out
    return made.copy_(gradient.movedim(-1, class_dim))


def pair_row_stats(
    first: Tensor,
    second: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: bool = True,
    reverse_kl: bool = False,
    js: bool = False,
    cross_entropy: bool = False,
    entropy: bool = False,
    divergence: Divergence | None = None,
    same_top: bool = True,
) -> PairRowStats:
    """Return `Backend.pair_row_stats`: the definitions of all, of which those that are asked for are given."""
    real, p, q = _real(first.dtype), _rows(first, class_dim), _rows(second, class_dim)
    alone = None if divergence is None else definitions.divergence(p, q, divergence).to(real)
    values = _pair_values(p, q, _row_target(target, p.shape[-1], ignore_index))
    asked = (kl, reverse_kl, js, cross_entropy, entropy, entropy, target is not None, target is not None)
    given = [value.to(real) if want else None for value, want in zip(values, asked, strict=True)]
    same = p.argmax(-1) == q.argmax(-1) if same_top else None
    saved = torch.zeros((*p.shape[:-1], PAIR_SAVED), dtype=torch.float64, device=p.device)
    return PairRowStats._make([*given, alone, same, saved, -1])


def _pair_values(p: Tensor, q: Tensor, target: ClassTarget | None) -> list[Tensor]:
    """Return the eight measures that have a gradient, of which the last two are 0 without a target."""
    values = list(definitions.pair_stats(p, q, target))
    del values[6]  # same_top
    return values if target is not None else [*values, *[torch.zeros_like(values[0])] * 2]


def pair_row_grad(
    first: Tensor,
    second: Tensor,
    saved: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: Tensor | None = None,
    reverse_kl: Tensor | None = None,
    js: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    entropy_p: Tensor | None = None,
    entropy_q: Tensor | None = None,
    nll_p: Tensor | None = None,
    nll_q: Tensor | None = None,
    divergence: Divergence | None = None,
    divergence_grad: Tensor | None = None,
    need_first: bool = True,
    need_second: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Backend.pair_row_grad`.

    With d_j = log q_j - log p_j and m = (p + q) / 2, of p's logits:
    dKL = p_j (-d_j - KL), dreverse = p_j - q_j, dJS = p_j (log p_j / m_j - KL(p || m)) / 2,
    dCE = p_j (-log q_j - CE), dH(p) = p_j (-log p_j - H(p)), dnll_p = p_j - [j = target];
    of q's logits the same with p and q exchanged, where KL is reverse_kl's part and CE gives q_j - p_j.
    """
    p_logits, q_logits = _rows(first, class_dim), _rows(second, class_dim)
    meaning = _row_target(target, p_logits.shape[-1], ignore_index)
    pair = definitions.pair_of(p_logits, q_logits)
    turned = definitions.pair_of(q_logits, p_logits)
    grads = (
        _one_side(pair, (kl, reverse_kl, js, cross_entropy, entropy_p, nll_p), meaning),
        _one_side(turned, (reverse_kl, kl, js, None, entropy_q, nll_q), meaning),
    )
    if cross_entropy is not None:
        grads = grads[0], grads[1] + cross_entropy.double().unsqueeze(-1) * (pair.q - pair.p)
    if divergence is not None and divergence_grad is not None:
        alone = _divergence_grads(pair, divergence)
        grads = (
            grads[0] + divergence_grad.double().unsqueeze(-1) * alone[0],
            grads[1] + divergence_grad.double().unsqueeze(-1) * alone[1],
        )
    places = out or (torch.empty_like(first), torch.empty_like(second))
    made_first, made_second = (
        place.copy_(grad.movedim(-1, class_dim)) if need else None
        for place, grad, need in zip(places, grads, (need_first, need_second), strict=True)
    )
    return made_first, made_second


def _about_its_mean(p: Tensor, values: Tensor) -> Tensor:
    """Return p_j (v_j - sum_k p_k v_k): what a mean of v under p changes by with p's logits."""
    weighted = times_zero_safe(p, values)
    return weighted - times_zero_safe(p, weighted.sum(-1, keepdim=True))


def _divergence_grads(pair: definitions.Pair, asked: Divergence) -> tuple[Tensor, Tensor]:
    """Return the gradients of a divergence for p's and q's logits.

    With m = w p + (1 - w) q, r = 1 - p / m, R = sum p r and s the sign of p - q:
    skewed KL p_j (log p_j / m_j - KL + w (r_j - R)) and q_j ((1 - w) r_j + w R); weighted JS
    w p_j (log p_j / m_j - KL(p || m)) and its mirror image; variation p_j (s_j - sum p s) / 2 and minus the same of q.
    """
    w = asked.weight
    if asked.family == "total_variation":
        sign = -torch.sign(pair.log_ratio)
        return _about_its_mean(pair.p, sign) / 2, -_about_its_mean(pair.q, sign) / 2
    log_m_p, log_m_q = definitions.log_mixture_ratios(pair.log_ratio, w)
    if asked.family == "weighted_js":
        return w * _about_its_mean(pair.p, -log_m_p), (1 - w) * _about_its_mean(pair.q, -log_m_q)
    share = -torch.expm1(-log_m_p)
    mean_share = (pair.p * share).sum(-1, keepdim=True)
    grad_p = _about_its_mean(pair.p, -log_m_p) + w * pair.p * (share - mean_share)
    return grad_p, pair.q * ((1 - w) * share + w * mean_share)


def _one_side(pair: definitions.Pair, upstream: tuple[Tensor | None, ...], target: ClassTarget | None) -> Tensor:
    """Return the gradient for p's logits of KL(p || q), KL(q || p), JS, CE(p, q), H(p) and the nll of p."""
    kl, reverse_kl, js, cross_entropy, entropy, nll = (
        None if grad is None else grad.double().unsqueeze(-1) for grad in upstream
    )
    total = torch.zeros_like(pair.p)

    if kl is not None:
        total = total + kl * _about_its_mean(pair.p, -pair.log_ratio)
    if reverse_kl is not None:
        total = total + reverse_kl * (pair.p - pair.q)
    if js is not None:
        # log p / m = log 2 - log(1 + q / p), by which a class that p excludes stays out.
        to_mixture = -torch.nn.functional.softplus(pair.log_ratio)
        total = total + js * _about_its_mean(pair.p, to_mixture) / 2
    if cross_entropy is not None:
        total = total + cross_entropy * _about_its_mean(pair.p, pair.surprise_q)
    if entropy is not None:
        total = total + entropy * _about_its_mean(pair.p, pair.surprise_p)
    if nll is not None and target is not None and target.indices is not None:
        hit = torch.arange(pair.p.shape[-1], device=pair.p.device) == target.indices.unsqueeze(-1)
        to_target = nll * (pair.p - hit.double())
        if target.ignored is not None and target.impossible is not None:
            to_target = to_target.masked_fill(target.impossible.unsqueeze(-1), torch.nan)
            to_target = to_target.masked_fill(target.ignored.unsqueeze(-1), 0)
        total = total + to_target
    return total


def _elements(
    loss: ElementLoss, input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    target = target.double()
    if loss == "binary_cross_entropy":
        values = definitions.binary_cross_entropy(input, target)
    elif loss == "binary_cross_entropy_with_logits":
        positive = None if pos_weight is None else pos_weight.double()
        values = definitions.binary_cross_entropy_with_logits(input, target, positive)
    else:
        values = definitions.kl_div(input, target, loss == "kl_div_log_target")
    return values if weight is None else times_zero_safe(weight.double(), values)


def elements(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, bool]:
    """Return `Backend.elements`; what lies outside a range is not looked for."""
    values = _elements(loss, input.double(), target, weight, pos_weight)
    return torch.empty_like(input, dtype=dtype or input.dtype).copy_(values), False


def elements_sum(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """Return `Backend.elements_sum`."""
    return _elements(loss, input.double(), target, weight, pos_weight).sum(), False


def elements_grad(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return `Backend.elements_grad`.

    (p - t) / max(p (1 - p), 1e-12) of probabilities, (1 - t) sigmoid(x) - pos_weight t sigmoid(-x) of logits, -t of a
    divergence, each times the weight.
    """
    x, t = input.double(), target.double()
    if loss == "binary_cross_entropy":
        grad = (x - t) / (x * (1 - x)).clamp(min=1e-12)
    elif loss == "binary_cross_entropy_with_logits":
        positive = t if pos_weight is None else t * pos_weight.double()
        grad = (1 - t) * torch.sigmoid(x) - positive * torch.sigmoid(-x)
    else:
        grad = -torch.exp(t) if loss == "kl_div_log_target" else -t
    if weight is not None:
        grad = grad * weight.double()
    if upstream is not None:
        grad = times_zero_safe(grad, upstream.double())
    return (torch.empty_like(input) if out is None else out).copy_(grad * scale)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8, *, save: bool = False) -> CosineRows:
    """Return `Backend.cosine_similarity`."""
    return _cosine_rows(x1, definitions.cosine_similarity(*_wide_vectors(x1, x2), dim, eps), save)


def cosine_embedding(x1: Tensor, x2: Tensor, target: Tensor, margin: float = 0.0, *, save: bool = False) -> CosineRows:
    """Return `Backend.cosine_embedding`."""
    return _cosine_rows(x1, definitions.cosine_embedding_loss(*_wide_vectors(x1, x2), target, margin, -1), save)


def _wide_vectors(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.broadcast_tensors(x1.double(), x2.double())
    return first, second


def _cosine_rows(x1: Tensor, values: Tensor, save: bool) -> CosineRows:
    saved = torch.zeros((3, *values.shape), dtype=torch.float64, device=values.device) if save else None
    return CosineRows(values.to(_real(x1.dtype)), saved)


def cosine_similarity_grad(
    x1: Tensor,
    x2: Tensor,
    saved: Tensor,
    dim: int = 1,
    eps: float = 1e-8,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Backend.cosine_similarity_grad`: (x2 / |x2| - cos x1 / |x1|) / |x1|, and its mirror image.

    A norm raised to eps is a constant; one that equals eps pulls halfway, as `torch.maximum`.
    """
    first, second = x1.double().movedim(dim, -1), x2.double().movedim(dim, -1)
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (first, second)]
    free = [torch.where(norm > eps, 1.0, torch.where(norm == eps, 0.5, 0.0)) for norm in norms]
    norms = [norm.clamp(min=eps) for norm in norms]
    grads = _turned_towards(first, second, norms, free, None if upstream is None else upstream.double(), scale)
    return _placed(grads, (x1, x2), dim, wanted)


def cosine_embedding_grad(
    x1: Tensor,
    x2: Tensor,
    target: Tensor,
    saved: Tensor,
    margin: float = 0.0,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Backend.cosine_embedding_grad`: minus the cosine's for 1, the cosine's above the margin for -1."""
    first, second = x1.double(), x2.double()
    norms = [torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12) for x in (first, second)]
    cosine = (first * second).sum(-1) / (norms[0] * norms[1]).squeeze(-1)
    sign = torch.where(target == 1, -1.0, torch.where((target == -1) & (cosine > margin), 1.0, 0.0))
    above = sign if upstream is None else times_zero_safe(sign, upstream.double())
    one = torch.ones((), dtype=torch.float64, device=x1.device)
    grads = _turned_towards(first, second, norms, [one, one], above, scale)
    return _placed(grads, (x1, x2), -1, wanted)


def _turned_towards(
    first: Tensor,
    second: Tensor,
    norms: Sequence[Tensor],
    free: Sequence[Tensor],
    upstream: Tensor | None,
    scale: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of upstream times the cosine of vectors that lie last, of these norms.

    `free` says how much of a norm changes with its vector.
    """
    units = first / norms[0], second / norms[1]
    cosine = (units[0] * units[1]).sum(-1, keepdim=True)
    above = (torch.ones_like(cosine) if upstream is None else upstream.unsqueeze(-1)) * scale
    to_first = times_zero_safe(above, (units[1] - free[0] * cosine * units[0]) / norms[0])
    to_second = times_zero_safe(above, (units[0] - free[1] * cosine * units[1]) / norms[1])
    return to_first, to_second


def _placed(
    grads: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], dim: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    first, second = (
        torch.empty_like(x).copy_(grad.movedim(-1, dim)) if want else None
        for x, grad, want in zip(vectors, grads, wanted, strict=True)
    )
    return first, second


def product(first: Tensor, second: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Refuse: it has no product of its own (PRODUCT_DTYPES is empty), so torch's serves."""
    raise RuntimeError(f"the reference multiplies nothing: {tuple(first.shape)} @ {tuple(second.shape)} is torch's")
