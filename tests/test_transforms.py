"""Every function under torch.func, forward mode, compilers, autocast, inference mode and tensors without data.

Judged against torch's own function under the same transform; the measures, which torch lacks, against the formulas
in oracles.py under the same transform.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import logitless as ll
import logitless.functional as LF
import oracles
from oracles import assert_no_worse

pytestmark = [
    # Loading the decompositions of forward mode, torch still scripts them.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
    ),  # on importing inductor
    # vmap says which of torch's own operations it runs in a loop.
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]

ROWS, CLASSES, WIDTH = 4, 5, 3


class Problem(NamedTuple):
    """A function of floating tensors, ours and the one it must equal, and where to evaluate them."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    tensors: tuple[Tensor, ...]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2


INDEX = torch.tensor([0, 4, -100, 2])
BITS = (normal(ROWS, CLASSES) > 0).double()
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
LOGITS, SECOND = normal(ROWS, CLASSES), normal(CLASSES, ROWS).T.contiguous()
SOFT = SECOND.softmax(1)
CLASS_WEIGHT = normal(CLASSES).abs() + 0.5
HIDDEN, HEAD, BIAS = normal(ROWS, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES)


def named(name: str, *rest: Any, **kwargs: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Our function and torch's with everything but the differentiable arguments fixed."""

    def fix(namespace: Any) -> Callable[..., Any]:
        return lambda *tensors: getattr(namespace, name)(*tensors, *rest, **kwargs)

    return fix(LF), fix(F)


def stats(function: Callable[..., Any], *names: str) -> Callable[..., Tensor]:
    """The chosen outputs of a measure, side by side in one tensor."""

    def run(*tensors: Tensor) -> Tensor:
        found = function(*tensors)
        return torch.stack([found[n] if isinstance(found, dict) else getattr(found, n) for n in names], -1)

    return run


TOKEN = ("nll", "lse", "entropy")
PAIR = ("kl", "reverse_kl", "js", "cross_entropy", "entropy_p", "entropy_q")

PROBLEMS: dict[str, Problem] = {
    "cross_entropy": Problem(*named("cross_entropy", INDEX), (LOGITS,)),
    "cross_entropy-none": Problem(*named("cross_entropy", INDEX, reduction="none"), (LOGITS,)),
    "cross_entropy-weighted-smooth": Problem(
        *named("cross_entropy", INDEX, weight=CLASS_WEIGHT, label_smoothing=0.1), (LOGITS,)
    ),
    "cross_entropy-soft": Problem(*named("cross_entropy", label_smoothing=0.1), (LOGITS, SOFT)),
    "nll_loss": Problem(*named("nll_loss", INDEX, weight=CLASS_WEIGHT), (LOGITS.log_softmax(1),)),
    "kl_div": Problem(*named("kl_div", reduction="batchmean"), (LOGITS.log_softmax(1), SOFT)),
    "kl_div-log": Problem(*named("kl_div", reduction="none", log_target=True), (LOGITS, SOFT.log())),
    # torch's own second derivative divides by p (1 - p) + 1e-12, so the formula is what ours must equal
    "binary_cross_entropy": Problem(
        named("binary_cross_entropy", BITS, reduction="none")[0],
        lambda p: oracles.binary_cross_entropy(p, BITS, reduction="none"),
        (LOGITS.sigmoid(),),
    ),
    "binary_cross_entropy_with_logits": Problem(
        *named("binary_cross_entropy_with_logits", BITS, pos_weight=CLASS_WEIGHT), (LOGITS,)
    ),
    "cosine_embedding_loss": Problem(*named("cosine_embedding_loss", SIGNS, margin=-0.5), (LOGITS, SECOND)),
    "cosine_similarity": Problem(*named("cosine_similarity"), (LOGITS, SECOND)),
    "linear_cross_entropy": Problem(*named("linear_cross_entropy", INDEX), (HIDDEN, HEAD)),
    "lazy cross_entropy": Problem(
        lambda h, w, b: LF.cross_entropy(ll.linear(h, w, b, scale=0.5, softcap=4.0), INDEX),
        lambda h, w, b: F.cross_entropy(oracles.linear(h, w, b, 0.5, 4.0), INDEX),
        (HIDDEN, HEAD, BIAS),
    ),
    "entropy": Problem(ll.entropy, oracles.entropy, (LOGITS,)),
    "kl": Problem(ll.kl, oracles.kl, (LOGITS, SECOND)),
    "js": Problem(ll.js, oracles.js, (LOGITS, SECOND)),
    "token_stats": Problem(
        stats(lambda z: ll.token_stats(z, INDEX), *TOKEN),
        stats(lambda z: oracles.token_stats(z, INDEX), *TOKEN),
        (LOGITS,),
    ),
    "pair_stats": Problem(stats(ll.pair_stats, *PAIR), stats(oracles.pair_stats, *PAIR), (LOGITS, SECOND)),
    "lazy token_stats": Problem(
        stats(lambda h, w: ll.token_stats(ll.linear(h, w), INDEX), *TOKEN),
        stats(lambda h, w: oracles.token_stats(oracles.linear(h, w), INDEX), *TOKEN),
        (HIDDEN, HEAD),
    ),
    "lazy kl": Problem(
        lambda h, w, q: ll.kl(ll.linear(h, w), q),
        lambda h, w, q: oracles.kl(oracles.linear(h, w), q),
        (HIDDEN, HEAD, LOGITS),
    ),
}
# The formulas in oracles.py pick the rows that count, which vmap cannot; torch's losses stand in.
ROWWISE = {
    "token_stats": Problem(
        stats(lambda z: ll.token_stats(z, INDEX), *TOKEN),
        lambda z: torch.stack(
            [
                F.cross_entropy(z, INDEX, reduction="none"),
                *(torch.where(INDEX != -100, v, 0.0) for v in (z.logsumexp(-1), oracles.entropy(z))),
            ],
            -1,
        ),
        (LOGITS,),
    ),
    "lazy token_stats": Problem(
        stats(lambda h, w: ll.token_stats(ll.linear(h, w), INDEX), *TOKEN),
        lambda h, w: torch.stack(
            [
                F.cross_entropy(h @ w.T, INDEX, reduction="none"),
                *(torch.where(INDEX != -100, v, 0.0) for v in ((h @ w.T).logsumexp(-1), oracles.entropy(h @ w.T))),
            ],
            -1,
        ),
        (HIDDEN, HEAD),
    ),
}
TRANSFORMABLE = PROBLEMS | ROWWISE
every = pytest.mark.parametrize("name", PROBLEMS)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A weighted sum of the outputs, so that no direction is privileged."""

    def total(*tensors: Tensor) -> Tensor:
        out = function(*tensors)
        return (
            (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()
            if out.dim()
            else out * 1.5
        )

    return total


def assert_same(got: Any, expected: Any, what: str = "") -> None:
    first, second = (torch.utils._pytree.tree_flatten(x)[0] for x in (got, expected))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert_no_worse(a, b, what=what, floor=10.0)  # logits and their derivatives are of order 10


@every
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "vjp"])
def test_derivatives_by_torch_func(name: str, transform: str) -> None:
    ours, theirs, tensors = TRANSFORMABLE[name]
    argnums = tuple(range(len(tensors)))

    def apply(function: Callable[..., Tensor]) -> Any:
        if transform == "grad":
            return torch.func.grad(scalar(function), argnums)(*tensors)
        if transform == "vjp":
            out, pull = torch.func.vjp(function, *tensors)
            return pull(torch.ones_like(out) * 1.5)
        if transform == "hessian":
            return torch.func.hessian(scalar(function), argnums)(*tensors)
        return getattr(torch.func, transform)(function, argnums)(*tensors)

    assert_same(apply(ours), apply(theirs), transform)


@every
def test_forward_mode(name: str) -> None:
    ours, theirs, tensors = TRANSFORMABLE[name]
    tangents = tuple(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in tensors)
    assert_same(torch.func.jvp(ours, tensors, tangents), torch.func.jvp(theirs, tensors, tangents), "jvp")

    def dual(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            made = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
            value, tangent = forward_ad.unpack_dual(function(*made))
            assert tangent is not None
            return value, tangent

    assert_same(dual(ours), dual(theirs), "forward_ad")


@every
def test_vmap_and_per_sample_gradients(name: str) -> None:
    ours, theirs, tensors = TRANSFORMABLE[name]
    stacks = tuple(torch.stack([t, t * 0.5, t * 0.25]) for t in tensors)
    assert_same(torch.func.vmap(ours)(*stacks), torch.func.vmap(theirs)(*stacks), "vmap")
    argnums = tuple(range(len(tensors)))

    def per_sample(function: Callable[..., Tensor]) -> Any:
        return torch.func.vmap(torch.func.grad(scalar(function), argnums))(*stacks)

    assert_same(per_sample(ours), per_sample(theirs), "vmap of grad")

    def batched_backward(function: Callable[..., Tensor]) -> Any:
        own = oracles.leaves(tensors)
        out = function(*own)
        upstream = torch.stack([torch.full_like(out, 1.5), torch.full_like(out, -0.5)])
        return torch.autograd.grad(out, own, upstream, is_grads_batched=True)

    assert_same(batched_backward(ours), batched_backward(theirs), "batched backward")


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "nll_loss"])  # linear in its input: there is none
def test_second_order(name: str) -> None:
    """Backward through backward, with a scalar made of the first gradients, under a random upstream gradient."""
    ours, theirs, tensors = TRANSFORMABLE[name]

    def twice(function: Callable[..., Tensor]) -> Any:
        own = oracles.leaves(tensors)
        out = function(*own)
        first = torch.autograd.grad(out, own, oracles.seeded_upstream(2)(0, out), create_graph=True)
        norm = sum((g * g * torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).reshape(g.shape)).sum() for g in first)
        return torch.autograd.grad(norm, own)

    assert_same(twice(ours), twice(theirs), "second order")


@every
def test_inference_mode(name: str) -> None:
    ours, theirs, tensors = PROBLEMS[name]
    with torch.inference_mode():
        made = tuple(t.clone() for t in tensors)
        out = ours(*made)
        assert out.is_inference()
        assert_same(out, theirs(*made), "inference_mode")
    assert_same(ours(*tensors), theirs(*tensors), "outside again")


# --- compilers


@every
def test_compile_whole_graph(name: str) -> None:
    """fullgraph=True: one graph, no break, value and gradients of eager."""
    torch._dynamo.reset()
    ours, theirs, tensors = TRANSFORMABLE[name]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def run(function: Callable[..., Tensor]) -> Any:
        own = oracles.leaves(tensors)
        out = function(*own)
        return out, torch.autograd.grad(out, own, oracles.seeded_upstream(4)(0, out))

    assert_same(run(compiled), run(theirs), "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy-weighted-smooth", "lazy token_stats"])
def test_compile_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    ours, theirs, tensors = TRANSFORMABLE[name]
    compiled = torch.compile(ours, fullgraph=True)

    def run(function: Callable[..., Tensor]) -> Any:
        own = oracles.leaves(tensors)
        out = function(*own)
        return out, torch.autograd.grad(out, own, oracles.seeded_upstream(4)(0, out))

    assert_same(run(compiled), run(theirs), "inductor")


def test_compile_with_a_changing_number_of_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, t: LF.cross_entropy(z, t), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 9):
        logits, target = normal(rows, CLASSES), torch.arange(rows) % CLASSES
        assert_same(compiled(logits, target), F.cross_entropy(logits, target))


# --- autocast


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in PROBLEMS if not n.startswith("lazy") and hasattr(F, n.split("-")[0])])
def test_autocast(name: str, given: torch.dtype) -> None:
    """The dtype that comes out under CPU autocast is torch's; the value is at least as near to the truth."""
    ours, theirs, tensors = PROBLEMS[name]
    inputs = tuple(t.to(given) for t in tensors)
    own, other = oracles.leaves(inputs), oracles.leaves(inputs)
    ours, theirs = single(name)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(*own), theirs(*other)
    assert out.dtype == expected.dtype
    true = single(name, torch.float64)[1](*(t.double() for t in inputs))
    moved = single(name, torch.float64)[1](*(oracles.nudge(t.double(), torch.bfloat16) for t in inputs))
    autocast_product = name == "linear_cross_entropy"  # the matrix product runs in bfloat16, as in torch
    assert_no_worse(out, true, expected, name, moved if autocast_product else None)
    upstream = oracles.seeded_upstream(6)(0, expected.detach())
    for got, want in zip(
        torch.autograd.grad(out, own, upstream), torch.autograd.grad(expected, other, upstream), strict=True
    ):
        assert got.dtype == want.dtype
        assert (got - want).double().norm() <= 0.02 * want.double().norm()


def single(name: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions with their fixed tensors (targets, weights) in another dtype."""
    weight, bits, signs = CLASS_WEIGHT.to(dtype), BITS.to(dtype), SIGNS.to(dtype)
    return {
        "cross_entropy": named("cross_entropy", INDEX),
        "cross_entropy-none": named("cross_entropy", INDEX, reduction="none"),
        "cross_entropy-weighted-smooth": named("cross_entropy", INDEX, weight=weight, label_smoothing=0.1),
        "cross_entropy-soft": named("cross_entropy", label_smoothing=0.1),
        "nll_loss": named("nll_loss", INDEX, weight=weight),
        "kl_div": named("kl_div", reduction="batchmean"),
        "kl_div-log": named("kl_div", reduction="none", log_target=True),
        "binary_cross_entropy": named("binary_cross_entropy", bits, reduction="none"),
        "binary_cross_entropy_with_logits": named("binary_cross_entropy_with_logits", bits, pos_weight=weight),
        "cosine_embedding_loss": named("cosine_embedding_loss", signs, margin=-0.5),
        "cosine_similarity": named("cosine_similarity"),
        "linear_cross_entropy": named("linear_cross_entropy", INDEX),
    }[name]


# --- tensors without data


SHAPES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cross_entropy": (
        lambda z, t, w: LF.cross_entropy(z, t, w, reduction="none"),
        lambda z, t, w: F.cross_entropy(z, t, w, reduction="none"),
    ),
    "nll_loss": (lambda z, t, w: LF.nll_loss(z, t, w), lambda z, t, w: F.nll_loss(z, t, w)),
    "kl_div": (lambda z, t, w: LF.kl_div(z, z, reduction="sum"), lambda z, t, w: F.kl_div(z, z, reduction="sum")),
    "binary_cross_entropy": (
        lambda z, t, w: LF.binary_cross_entropy(z, z, reduction="none"),
        lambda z, t, w: F.binary_cross_entropy(z, z, reduction="none"),
    ),
    "binary_cross_entropy_with_logits": (
        lambda z, t, w: LF.binary_cross_entropy_with_logits(z, z, pos_weight=w),
        lambda z, t, w: F.binary_cross_entropy_with_logits(z, z, pos_weight=w),
    ),
    "cosine_embedding_loss": (
        lambda z, t, w: LF.cosine_embedding_loss(z, z, t, reduction="none"),
        lambda z, t, w: F.cosine_embedding_loss(z, z, t, reduction="none"),
    ),
    "cosine_similarity": (lambda z, t, w: LF.cosine_similarity(z, z), lambda z, t, w: F.cosine_similarity(z, z)),
    "linear_cross_entropy": (
        lambda z, t, w: LF.linear_cross_entropy(z, z, t),
        lambda z, t, w: F.linear_cross_entropy(z, z, t),
    ),
    "entropy": (lambda z, t, w: ll.entropy(z), lambda z, t, w: z.float().sum(-1)),
    "kl": (lambda z, t, w: ll.kl(z, z), lambda z, t, w: z.float().sum(-1)),
    "js": (lambda z, t, w: ll.js(z, z), lambda z, t, w: z.float().sum(-1)),
    "token_stats": (lambda z, t, w: ll.token_stats(z, t).nll, lambda z, t, w: z.float().sum(-1)),
    "pair_stats": (lambda z, t, w: ll.pair_stats(z, z).js, lambda z, t, w: z.float().sum(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_meta_and_fake_tensors(name: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes come out, nothing is computed; gradients have their inputs' shapes."""
    ours, theirs = SHAPES[name]

    def tensors(device: str) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.zeros(ROWS, CLASSES, dtype=dtype, device=device, requires_grad=True),
            torch.zeros(ROWS, dtype=torch.long, device=device),
            torch.zeros(CLASSES, dtype=dtype, device=device),
        )

    def compare(device: str) -> None:
        given = tensors(device)
        out, expected = ours(*given), theirs(*tensors(device))
        assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)
        (gradient,) = torch.autograd.grad(out.sum(), given[0])
        assert (gradient.shape, gradient.dtype) == (given[0].shape, given[0].dtype)

    compare("meta")
    with FakeTensorMode():
        compare("cpu")
