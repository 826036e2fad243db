"""What user code does with logits: each case on lazy ones and on the tensor they stand for; run by `forked.py`."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import logitless as ll

CLASSES, WIDTH = 65, 8
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Take a function for a case; its name is the case's."""

    def quiet() -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of computing all logits, mostly: what is asked here is what comes of it
            function()

    CASES[function.__name__] = quiet
    return function


def parts(bias: bool = True, dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (2, 7)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(*rows, WIDTH), (CLASSES, WIDTH), *([(CLASSES,)] if bias else [])]
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def targets(rows: tuple[int, ...] = (2, 7)) -> Tensor:
    found = torch.randint(0, CLASSES, rows, generator=torch.Generator().manual_seed(2))
    found.view(-1)[0] = -100
    return found


def loss_of(logits: Any, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, CLASSES), target.reshape(-1), **options)


def close(got: Any, wanted: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, equal_nan=True)


def number(value: Any) -> Tensor:
    """Give the numbers of what may be lazy."""
    return value.materialize() if hasattr(value, "materialize") else value


def both(function: Callable[[Any, Tensor], Any], bias: bool = True, *, backward: bool = False, **limits: float) -> None:
    """Hold value and gradients of a function of the logits to the dense ones, at an upstream gradient of its own.

    `backward` asks for the gradients by `.backward()`, which is all that a reentrant checkpoint allows.
    """
    results = []
    for linear in (F.linear, ll.linear):
        leaves = parts(bias)
        out = number(function(linear(*leaves), targets()))
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if backward:
            out.backward(upstream.to(out.dtype))
            results.append([out.detach(), *(p.grad for p in leaves)])
        else:
            results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    for mine, true in zip(results[1], results[0], strict=True):
        close(mine, true, **limits)


def detached() -> tuple[Any, Tensor]:
    leaves = [p.detach() for p in parts()]
    return ll.linear(*leaves), F.linear(*leaves)


class TinyModel(nn.Module):
    """An embedding, one layer and a head; its forward gives logits, or a loss and the logits."""

    def __init__(self, bias: bool = True, tied: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(CLASSES, WIDTH, dtype=dtype)
        self.body = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.lm_head = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
        self.unused = nn.Linear(2, 2, dtype=dtype)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(torch.tanh(self.body(self.embed(ids))))
        if labels is None:
            return logits
        return loss_of(logits[..., :-1, :], labels[..., 1:]), logits


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, CLASSES, (rows, 7), generator=draw)
    labels = torch.randint(0, CLASSES, (rows, 7), generator=draw)
    labels[0, :3] = -100
    return ids, labels


def models(prepare: Callable[[TinyModel], Any] = lambda m: None, **options: Any) -> tuple[TinyModel, TinyModel]:
    """Give a dense model and the same with a lazy head, both prepared."""
    dense, lazy = TinyModel(**options), TinyModel(**options)
    prepare(dense)
    ll.lazy_head(lazy)
    prepare(lazy)
    return dense, lazy


def same_gradients(mine: nn.Module, true: nn.Module) -> None:
    for (name, p), (_, q) in zip(mine.named_parameters(), true.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(p.grad, q.grad)


# --- 1. what ended the process


@case
def where_of_log_softmax() -> None:
    both(lambda z, t: torch.where(t.unsqueeze(-1) >= 0, z.log_softmax(-1), 0.0))


@case
def where_of_logits() -> None:
    both(lambda z, t: torch.where(t.unsqueeze(-1) >= 0, z, -float("inf")).logsumexp(-1)[t >= 0])


@case
def nested_tensor() -> None:
    z, d = detached()
    for mine, true in zip(torch.nested.nested_tensor([z, z]).unbind(), (d, d), strict=True):
        close(number(mine), true)


@case
def nested_tensor_jagged() -> None:
    z, d = detached()
    for make in (
        lambda x: torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged),
        lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        lambda x: torch.nested.nested_tensor_from_jagged(x[0], torch.tensor([0, 3, 7])),
    ):
        with pytest.raises(TypeError, match="materialize"):
            make(z)
        make(d)


@case
def as_tensor_and_tensor() -> None:
    z, d = detached()
    close(number(torch.as_tensor(z)), d)
    close(number(torch.tensor(z)), d)
    close(number(torch.asarray(z)), d)
    close(number(torch.as_tensor(z, dtype=torch.float32)), d.float(), 1e-5, 1e-5)


@case
def dlpack() -> None:
    z, d = detached()
    for exchange in (torch.from_dlpack, lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)), np.from_dlpack):
        try:
            close(torch.as_tensor(exchange(z)), d)
        except (TypeError, RuntimeError, BufferError):
            continue


@case
def addresses() -> None:
    z, _ = detached()
    for read in (lambda: z.data_ptr(), lambda: z.untyped_storage().data_ptr(), lambda: z.const_data_ptr()):
        try:
            assert read() == 0
        except (TypeError, RuntimeError):
            continue


def _reads() -> dict[str, Callable[[Tensor], Any]]:
    """Give ways to read a tensor's memory: kernels, copies, views, and what leaves torch."""
    return {
        "add": lambda x: x + 1,
        "matmul": lambda x: x @ x.mT,
        "clone": lambda x: x.clone(),
        "copy": lambda x: torch.zeros_like(detached()[1]).copy_(x),
        "float": lambda x: x.float(),
        "tensor": lambda x: torch.tensor(x),
        "cat": lambda x: torch.cat([detached()[1], x]),
        "view": lambda x: x.view(-1)[:3] * 2,
        "item": lambda x: x[0, 0, 0].item(),
        "list": lambda x: x.tolist(),
        "numpy": lambda x: x.numpy(),
        "repr": lambda x: repr(x),
        "deepcopy": lambda x: copy.deepcopy(x),
        "save": lambda x: torch.save(x, io.BytesIO()),
        "write": lambda x: x.zero_(),
        "loss": lambda x: loss_of(x, targets()),
        "step": lambda x: torch._fused_sgd_(
            [x],
            [detached()[1]],
            [],
            weight_decay=0,
            momentum=0,
            lr=1,
            dampening=0,
            nesterov=False,
            maximize=False,
            is_first_step=True,
        ),
    }


@case
def data_of_a_dense_tensor() -> None:
    """A tensor whose `.data` became lazy logits has no memory: whatever reads it raises."""
    for of_leaf in (False, True):
        for lazy in (
            lambda: detached()[0],
            lambda: detached()[0].log_softmax(-1),
            lambda: detached()[0].as_strided((2, 7, 65), (455, 65, 1)),
        ):
            for name, read in _reads().items():
                x = torch.rand(2, 7, CLASSES, dtype=torch.float64, requires_grad=of_leaf)
                try:
                    x.data = lazy()
                    with torch.no_grad():
                        read(x)
                except (RuntimeError, TypeError):
                    continue
                raise AssertionError(f"{name} read memory that is not there")
    x = torch.rand(2, 7, CLASSES, dtype=torch.float64)
    x.data = detached()[0]
    with pytest.raises(RuntimeError, match=r"lazy_cases.py.*give \.data = z\.materialize\(\)"):
        x + 1


@case
def tensors_of_the_same_backend() -> None:
    z, d = detached()
    for lazy, dense in ((z, d), (z.log_softmax(-1), d.log_softmax(-1)), (z.diagonal(), d.diagonal())):
        for make in (
            lambda x: x.new_tensor([1.0, 2.0]),
            lambda x: x.new_tensor(3, dtype=torch.int64),
            lambda x: Tensor.new_tensor(x, [2.5]),
            lambda x: x.new([1.0, 2.0]),
            lambda x: x.new_full((2,), 0.5),
            lambda x: x.new_zeros(3),
            lambda x: torch.zeros(3).new_tensor(x),
            lambda x: torch.tensor(x, dtype=torch.float32),
        ):
            close(number(make(lazy)), make(dense), 1e-6, 1e-6)
        assert lazy.new(3, 2).shape == (3, 2)
    with pytest.raises(RuntimeError, match=r"torch\.stack of a list"):
        torch.tensor([z.detach()[0][0, 0], z.detach()[0][0, 1]])


@case
def storages() -> None:
    z, _ = detached()
    for lazy in (z, z.log_softmax(-1), z.diagonal()):
        for read in (
            lambda x: x.untyped_storage().share_memory_(),
            lambda x: torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, x.shape) + 1,
            lambda x: torch.empty(0, dtype=x.dtype).set_(x.storage(), 0, x.shape) + 1,
            lambda x: x.share_memory_(),
            lambda x: x.storage().tolist(),
        ):
            with pytest.raises(TypeError, match="have no memory"):
                read(lazy)


class SavesIts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        ctx.save_for_backward(z)
        return (z * 1.0).exp().sum()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * ctx.saved_tensors[0].exp()


class GivesBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * 2


@case
def functions_of_users() -> None:
    both(lambda z, t: SavesIts.apply(z))
    both(lambda z, t: loss_of(GivesBack.apply(z), t))


@case
def grad_outputs_is_lazy() -> None:
    z, d = detached()
    found = []
    for upstream in (z, d):
        hidden, weight, bias = parts()
        found.append(torch.autograd.grad(F.linear(hidden, weight, bias), (hidden, weight, bias), grad_outputs=upstream))
    for mine, true in zip(*found, strict=True):
        close(mine, true)


@case
def gather_of_data_parallel() -> None:
    from torch.nn.parallel.scatter_gather import gather

    z, _ = detached()
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        gather([z, z], "cpu")  # torch's own refusal of the CPU


@case
def data_parallel_on_the_cpu() -> None:
    dense, lazy = models()
    for model in (dense, lazy):
        nn.DataParallel(model)(*batch())[0].backward()
    same_gradients(lazy, dense)


@case
def replicas_of_data_parallel() -> None:
    """A replica's head is lazy and reads the weight that was sent to its device, here a copy in place of it."""
    module = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of that name
    sent: list[list[Tensor]] = []

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        sent.extend([t * (place + 2) for t in tensors] for place in range(len(devices)))
        return sent

    kept, module._broadcast_coalesced_reshape = module._broadcast_coalesced_reshape, broadcast
    try:
        dense, lazy = models()
        made = [module.replicate(model, [0, 1]) for model in (dense, lazy) if not sent.clear()]
    finally:
        module._broadcast_coalesced_reshape = kept
    for model in range(2):
        for place, replica in enumerate(made[model]):
            z = replica(batch()[0])
            assert type(z) is (ll.LazyLogits if model else Tensor)
            (loss_of(z, batch()[1]) * (place + 1)).backward()
    same_gradients(lazy, dense)
    for mine, true in zip(made[1], made[0], strict=True):
        close(number(mine(batch()[0])), true(batch()[0]))


@case
def multiprocessing_and_sharing() -> None:
    from multiprocessing.reduction import ForkingPickler

    z, d = detached()
    try:
        again = pickle.loads(bytes(ForkingPickler.dumps(z)))
    except (TypeError, RuntimeError):
        return
    close(number(again), d)


# --- hooks, checkpoints, saved tensors


def _hooked(register: Callable[[TinyModel, list[Any]], Any], **options: Any) -> None:
    seen: list[list[Any]] = []

    def prepare(model: TinyModel) -> None:
        seen.append([])
        register(model, seen[-1])

    for outside in (False, True):
        seen.clear()
        dense, lazy = models(prepare, **options)
        for model in (dense, lazy):
            ids, labels = batch()
            (loss_of(model(ids), labels) if outside else model(ids, labels)[0] * 3).backward()
        same_gradients(lazy, dense)
        assert seen[0], "the hook of the dense head did not run"
        assert seen[0] == seen[1]


@case
def full_backward_hooks() -> None:
    for bias in (True, False):
        _hooked(
            lambda m, seen: m.lm_head.register_full_backward_hook(
                lambda module, into, out: seen.append((into[0].shape, out[0].shape))
            ),
            bias=bias,
        )


@case
def full_backward_hook_changes() -> None:
    _hooked(
        lambda m, seen: m.lm_head.register_full_backward_hook(
            lambda module, into, out: seen.append(1) or (into[0] * 3,)
        )
    )


@case
def full_backward_pre_hooks() -> None:
    _hooked(
        lambda m, seen: m.lm_head.register_full_backward_pre_hook(lambda module, out: seen.append(1) or (out[0] * 2,))
    )


@case
def forward_hooks() -> None:
    _hooked(lambda m, seen: m.lm_head.register_forward_hook(lambda module, given, out: seen.append(1) or out * 0.5))
    _hooked(
        lambda m, seen: m.lm_head.register_forward_pre_hook(lambda module, given: seen.append(1) or (given[0] * 2,))
    )


@case
def global_hooks() -> None:
    seen: list[int] = []
    dense, lazy = models()
    with nn.modules.module.register_module_full_backward_hook(lambda m, i, o: seen.append(1)):
        for model in (dense, lazy):
            model(*batch())[0].backward()
            seen.append(-1)
    same_gradients(lazy, dense)
    middle = seen.index(-1)
    assert seen[:middle] == seen[middle + 1 : -1] != []


@case
def tensor_hooks() -> None:
    def doubled(z: Any, t: Tensor) -> Tensor:
        z.register_hook(lambda g: g * 2)
        return loss_of(z, t)

    def dense_one(z: Any, t: Tensor) -> Tensor:
        z.register_hook(lambda g: torch.ones(g.shape, dtype=g.dtype))
        return loss_of(z, t)

    both(doubled)
    both(dense_one)


@case
def checkpoints() -> None:
    for reentrant in (False, True):
        for inner in (
            loss_of,
            lambda z, t: loss_of(z, t, reduction="none"),
            lambda z, t: z.softmax(-1)[..., :3],
            lambda z, t: z.logsumexp(-1),
        ):
            both(lambda z, t, r=reentrant, f=inner: checkpoint(f, z, t, use_reentrant=r) * 1.0, backward=True)


@case
def checkpoint_of_the_model() -> None:
    for reentrant in (False, True):
        dense, lazy = models()
        for model in (dense, lazy):
            hidden = model.embed(batch()[0])
            loss = checkpoint(lambda x, m=model: loss_of(m.lm_head(x), batch()[1]), hidden, use_reentrant=reentrant)
            (loss * 3).backward()
        same_gradients(lazy, dense)


@case
def selective_checkpoint() -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    dense, lazy = models()
    for model in (dense, lazy):
        checkpoint(lambda m=model: m(*batch())[0], use_reentrant=False, context_fn=contexts).backward()
    same_gradients(lazy, dense)


@case
def saved_tensor_hooks() -> None:
    packed: list[int] = []

    def copied(x: Tensor) -> Tensor:
        packed.append(x.numel())
        return x.clone()

    for reduction in ("mean", "none", "sum"):
        leaves = parts()
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(copied, lambda x: x):
            loss = loss_of(ll.linear(*leaves), targets(), reduction=reduction)
        assert packed
        assert max(packed) < 14 * CLASSES, f"a tensor of the logits' size is kept: {packed}"
        found = torch.autograd.grad(loss.sum() * 3, leaves)
        own = parts()
        true = torch.autograd.grad(loss_of(F.linear(*own), targets(), reduction=reduction).sum() * 3, own)
        for pair in zip(found, true, strict=True):
            close(*pair)


@case
def what_is_saved_passes_the_hooks() -> None:
    """Between forward and backward only what saved-tensor hooks gave keeps memory alive: offloading moves all of it."""
    import gc
    import weakref

    for reduction in ("mean", "none"):
        leaves = parts(rows=(3, 9))
        seen = []

        def away(x: Tensor, seen: list[Any] = seen) -> int:
            seen.append(x.detach().clone())
            return len(seen) - 1

        with torch.autograd.graph.saved_tensors_hooks(away, lambda i, seen=seen: seen[i]):
            z = ll.linear(*leaves)
            alive = [weakref.ref(x) for x in (z,)]
            loss = loss_of(z, targets((3, 9)), reduction=reduction)
        del z
        gc.collect()
        assert alive[0]() is None
        mine = torch.autograd.grad(loss.sum(), leaves)
        kept = sum(x.numel() for x in seen)
        assert kept >= CLASSES * WIDTH, "the weight's gradient, or the weight, is not among what the hooks saw"
        own = parts(rows=(3, 9))
        true = torch.autograd.grad(loss_of(F.linear(*own), targets((3, 9)), reduction=reduction).sum(), own)
        for pair in zip(mine, true, strict=True):
            close(*pair)


@case
def save_on_cpu() -> None:
    def moved(z: Any, t: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss_of(z, t) + z.logsumexp(-1).mean()

    both(moved)


# --- 3. training that was destroyed


@case
def no_supervised_token() -> None:
    """Nothing supervised, divided by nothing: every gradient is exactly 0, as with a tensor."""
    for divisor in (0, torch.tensor(0), torch.tensor(0.0)):
        for of_logits in (lambda z: z, lambda z: z.float(), lambda z: z / 0.7, lambda z: torch.tanh(z / 5) * 5):
            results = []
            for linear in (F.linear, ll.linear):
                leaves = parts()
                target = torch.full((14,), -100)
                loss = F.cross_entropy(of_logits(linear(*leaves)).view(-1, CLASSES), target, reduction="sum")
                loss = loss / (divisor if isinstance(divisor, Tensor) else torch.tensor(divisor))
                results.append(torch.autograd.grad(loss, leaves))
            for mine, true in zip(results[1], results[0], strict=True):
                assert torch.equal(true, torch.zeros_like(true)), "the dense gradient is not 0"
                assert torch.equal(mine, true)


@case
def infinite_upstream_gradients() -> None:
    """A factor of inf, NaN, 0 or one that overflows meets the gradients as it meets the dense ones."""
    for factor in (0.0, float("inf"), float("nan"), 1e300, 1e-300):
        for reduction in ("sum", "mean"):
            results = []
            for linear in (F.linear, ll.linear):
                leaves = parts()
                loss = loss_of(linear(*leaves), targets(), reduction=reduction)
                results.append(torch.autograd.grad(loss * factor, leaves))
            for mine, true in zip(results[1], results[0], strict=True):
                assert torch.equal(mine.isfinite(), true.isfinite()), (factor, reduction)
                finite = true.isfinite()
                close(mine[finite], true[finite], 1e-9, 1e-12 * min(abs(factor), 1.0) if factor == factor else 0)


def _errors(
    dtype: torch.dtype, scale: float, reduction: str, divisor: float, rows: int = 512
) -> tuple[float, float, float, float]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 16, generator=draw).to(dtype)
    weight = (torch.randn(1000, 16, generator=draw) * 0.3).to(dtype)
    target = torch.randint(0, 1000, (rows,), generator=draw)
    found = []
    for linear, kind in ((F.linear, torch.float64), (F.linear, dtype), (ll.linear, dtype)):
        leaves = [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]
        logits = linear(*leaves)
        logits = logits if kind is torch.float64 else logits.float()
        loss = F.cross_entropy(logits, target, reduction=reduction) / divisor
        (loss.sum() * scale).backward()
        found.append([x.grad.double() for x in leaves])

    def error(mine: Tensor, true: Tensor) -> float:
        return float((mine - true).norm() / true.norm())

    return (
        *(error(x, y) for x, y in zip(found[1], found[0], strict=True)),
        *(error(x, y) for x, y in zip(found[2], found[0], strict=True)),
    )


@case
def loss_scaling_in_float16() -> None:
    """GradScaler's factor arrives in the backward: what is made before it is not rounded to float16."""
    for dtype in (torch.float16, torch.bfloat16):
        for scale in (65536.0, 1.0, 2.0**-10):
            for reduction, divisor in (("mean", 1.0), ("sum", 4096.0), ("none", 512.0)):
                *dense, hidden, weight = _errors(dtype, scale, reduction, divisor)
                for mine, true in zip((hidden, weight), dense, strict=True):
                    assert mine <= 1.05 * true + 1e-6, (dtype, scale, reduction, mine, true)


@case
def grad_scaler() -> None:
    results = []
    for linear, dtype in ((F.linear, torch.float64), (F.linear, torch.float16), (ll.linear, torch.float16)):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        masters = [p.detach().half().to(wide).requires_grad_() for p in parts()]
        leaves, weight = [p.to(dtype) for p in masters], masters[1]
        step = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=dtype is torch.float16)
        logits = linear(*leaves)
        loss = loss_of(logits if dtype is torch.float64 else logits.float(), targets()) / 64
        scaler.scale(loss).backward()
        scaler.unscale_(step)
        results.append(weight.grad.double())
    truth, *others = results
    dense, lazy = (float((x - truth).norm() / truth.norm()) for x in others)
    assert lazy <= 1.05 * dense, (lazy, dense)


# --- 4. numbers that were wrong


def _refused_as_dense(function: Callable[[Any], Any], what: str) -> None:
    z, d = detached()
    for logits in (d, z):
        try:
            number(function(logits))
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue
        raise AssertionError(f"{what}: {type(logits).__name__} does not refuse it")


@case
def negative_and_far_indices() -> None:
    labels = targets().unsqueeze(-1)  # holds -100
    for what, index in (("-100", labels), ("far", labels.abs() + CLASSES), ("negative", -1 - labels.abs())):
        for name, make in {
            "logits": lambda z: z,
            "log_softmax": lambda z: z.log_softmax(-1),
            "softcap": lambda z: torch.tanh(z),
            "flat": lambda z: z.view(-1, CLASSES),
            "cut": lambda z: z[..., 5:],
        }.items():
            shaped = index.view(-1, 1) if name == "flat" else index
            _refused_as_dense(lambda z, m=make, i=shaped: m(z).gather(-1, i), f"gather of {name} at {what}")
    for index in (-CLASSES - 1, CLASSES):
        _refused_as_dense(lambda z, i=index: z[..., i], f"class {index}")
        _refused_as_dense(lambda z, i=index: z[..., [0, i]], f"classes 0 and {index}")
        _refused_as_dense(lambda z, i=index: z.select(-1, i), f"select of class {index}")
        _refused_as_dense(lambda z, i=index: z[i], f"row {index}")
        _refused_as_dense(lambda z, i=index: z[[0, i]], f"rows 0 and {index}")
    for dim, index in ((-1, -1), (-1, CLASSES), (0, -1), (0, 2)):
        _refused_as_dense(lambda z, d=dim, i=index: z.index_select(d, torch.tensor([i])), f"index_select {dim} {index}")
    for target in (torch.full((14,), CLASSES), torch.full((14,), -1)):
        _refused_as_dense(lambda z, t=target: loss_of(z, t), f"cross_entropy of {int(target[0])}")
        _refused_as_dense(
            lambda z, t=target: F.nll_loss(z.view(-1, CLASSES).log_softmax(-1), t), f"nll_loss of {int(target[0])}"
        )


@case
def no_classes_and_no_rows() -> None:
    for cut in (lambda z: z[..., 3:3], lambda z: z.narrow(-1, 1, 0), lambda z: z[:, :0], lambda z: z[:0]):
        both(lambda z, t, cut=cut: cut(z))
        both(lambda z, t, cut=cut: cut(z).logsumexp(-1))
        both(lambda z, t, cut=cut: cut(z).log_softmax(-1).sum(-1))
        both(lambda z, t, cut=cut: cut(z).exp().sum() * 2)
    for of_none in (lambda z: z[..., :0].argmax(-1), lambda z: z[..., :0].max(-1), lambda z: z[..., :0].topk(1)):
        for z in detached():
            with pytest.raises((IndexError, RuntimeError)):
                of_none(z)
    for rows in ((), (0,), (3,)):
        leaves = [p.detach() for p in parts(rows=rows)]
        z, d = ll.linear(*leaves), F.linear(*leaves)
        for read in (lambda x: x.argmax(-1), lambda x: x.max(-1)[0], lambda x: x.logsumexp(-1), lambda x: x.topk(2)[0]):
            close(read(z), read(d))


@case
def dims_out_of_range() -> None:
    for dim in (3, -4, 17):
        for function in (
            lambda z, d: z.gather(d, torch.zeros(2, 7, 1, dtype=torch.int64)),
            lambda z, d: z.argmax(d),
            lambda z, d: z.max(d),
            lambda z, d: z.topk(1, d),
            lambda z, d: z.logsumexp(d),
            lambda z, d: z.log_softmax(d),
            lambda z, d: F.log_softmax(z, d),
            lambda z, d: z.softmax(d),
            lambda z, d: z.transpose(0, d),
            lambda z, d: z.movedim(0, d),
            lambda z, d: z.select(d, 0),
            lambda z, d: z.narrow(d, 0, 1),
            lambda z, d: z.split(1, d),
            lambda z, d: z.chunk(2, d),
            lambda z, d: z.unbind(d),
            lambda z, d: z.flatten(0, d),
            lambda z, d: z.size(d),
            lambda z, d: z.sum(d),
            lambda z, d: z.log_softmax(-1).sum(d),
            lambda z, d: z.log_softmax(-1).mean(d),
            lambda z, d: z.log_softmax(-1).gather(d, torch.zeros(2, 7, 1, dtype=torch.int64)),
            lambda z, d: z.index_select(d, torch.tensor([0])),
            lambda z, d: torch.cat([z, z], d),
            lambda z, d: z.squeeze(d),
            lambda z, d: z.unsqueeze(d + 1 if d > 0 else d - 1),
        ):
            what = f"dim {dim} of line {function.__code__.co_firstlineno}"
            _refused_as_dense(lambda z, f=function, d=dim: f(z, d), what)


@case
def scales_the_operand_that_is_meant() -> None:
    other = torch.linspace(-1, 1, CLASSES, dtype=torch.float64)
    both(lambda z, t: torch.add(other, z, alpha=2))
    both(lambda z, t: torch.add(z, other, alpha=2))
    both(lambda z, t: torch.sub(other, z, alpha=3))
    both(lambda z, t: torch.sub(z, z * 0.5, alpha=3))
    both(lambda z, t: torch.add(z, z * 0.5, alpha=-2).log_softmax(-1))
    both(lambda z, t: torch.rsub(z, other, alpha=2))
    both(lambda z, t: other.add(z, alpha=2))
    both(lambda z, t: 1 - z)
    both(lambda z, t: other / z)


@case
def cat_of_other_weights() -> None:
    """Logits of two heads beside each other, and of one weight that is wrapped by two modules."""
    for join in (lambda a, b: torch.cat([a, b]), lambda a, b: torch.stack([a, b]), lambda a, b: torch.cat([a, b], -1)):
        results = []
        for linear in (F.linear, ll.linear):
            hidden, weight, bias = parts()
            other = (weight.detach() * 2 + 1).requires_grad_()
            out = number(join(linear(hidden, weight, bias), linear(hidden, other)))
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
            results.append([out.detach(), *torch.autograd.grad(out, (hidden, weight, bias, other), upstream)])
        for mine, true in zip(*results, strict=True):
            close(mine, true)


@case
def cat_of_views_of_one_storage() -> None:
    """Two weights that lie in one storage are two weights."""
    whole = torch.randn(2 * CLASSES, WIDTH, dtype=torch.float64)
    hidden = parts()[0].detach()
    first, second = whole[:CLASSES], whole[CLASSES:]
    joined = torch.cat([ll.linear(hidden, first), ll.linear(hidden, second)])
    close(number(joined), torch.cat([F.linear(hidden, first), F.linear(hidden, second)]))
    turned = whole[:CLASSES].flip(0)
    joined = torch.cat([ll.linear(hidden, first), ll.linear(hidden, turned)])
    close(number(joined), torch.cat([F.linear(hidden, first), F.linear(hidden, turned)]))


def _written_or_refused(write: Callable[[Any], Any]) -> None:
    """After a write, the logits read as a tensor's do, or the write or the reading raised."""
    z, d = detached()
    write(d)
    try:
        write(z)
    except (TypeError, RuntimeError, ValueError):
        close(number(z), detached()[1])
        return
    try:
        got = number(z)
    except RuntimeError:
        return
    close(got, d)


WRITES: dict[str, Callable[[Any], Any]] = {
    "relu": lambda z: F.relu(z, inplace=True),
    "relu_": lambda z: z.relu_(),
    "torch.relu_": lambda z: torch.relu_(z),
    "dropout": lambda z: F.dropout(z, 1.0, inplace=True),
    "hardtanh": lambda z: nn.Hardtanh(inplace=True)(z),
    "out=": lambda z: torch.mul(torch.ones_like(detached()[1]), 2.0, out=z),
    "out= of itself": lambda z: torch.exp(z, out=z),
    "data.mul_": lambda z: z.data.mul_(2),
    "data =": lambda z: setattr(z, "data", detached()[1] * 3),
    "detach().mul_": lambda z: z.detach().mul_(2),
    "mul_": lambda z: z.mul_(2),
    "div_": lambda z: z.div_(2),
    "mul_ of a tensor": lambda z: z.mul_(torch.arange(CLASSES)),
    "*=": lambda z: operator_alias(z, lambda x: x.__imul__(2)),
    "+=": lambda z: operator_alias(z, lambda x: x.__iadd__(1)),
    "clamp_": lambda z: z.clamp_(-1, 1),
    "fill_": lambda z: z.fill_(1),
    "zero_": lambda z: z.zero_(),
    "copy_": lambda z: z.copy_(detached()[1] * 3),
    "random_": lambda z: torch.manual_seed(0) and z.random_(),
    "masked_fill_ of classes": lambda z: z.masked_fill_(torch.arange(CLASSES) > 60, -float("inf")),
    "masked_fill_ of elements": lambda z: z.masked_fill_(detached()[1] > 1, 0.0),
    "masked_fill_ of rows": lambda z: z.masked_fill_(targets().unsqueeze(-1) < 0, 0.0),
    "z[..., k] =": lambda z: z.__setitem__((..., 3), -1.0),
    "z[..., [k]] =": lambda z: z.__setitem__((..., [3, 5]), -float("inf")),
    "z[:, :, k:] =": lambda z: z.__setitem__((slice(None), slice(None), slice(60, None)), -1e4),
    "z[0] =": lambda z: z.__setitem__(0, -1.0),
    "z[mask] =": lambda z: z.__setitem__(detached()[1] > 1, -1.0),
    "z[0] *=": lambda z: z[0].mul_(2),
    "row.fill_": lambda z: z[0].fill_(1),
    "class.fill_": lambda z: z[..., 3].fill_(1),
    "classes.fill_": lambda z: z[..., 3:9].fill_(1),
    "classes.mul_": lambda z: z[..., 3:9].mul_(2),
    "view.mul_": lambda z: z.view(-1, CLASSES).mul_(2),
    "transposed.mul_": lambda z: z.transpose(0, 1).mul_(2),
    "diagonal": lambda z: z.diagonal(dim1=0, dim2=1).zero_(),
    "unfold": lambda z: z.unfold(2, 3, 3).zero_(),
    "as_strided": lambda z: z.as_strided((2, 3), (1, 2)).zero_(),
    "unflatten": lambda z: z.unflatten(-1, (5, 13)).zero_(),
    "chunks of classes": lambda z: torch.tensor_split(z, 5, -1)[1].zero_(),
    "view of a view": lambda z: z.diagonal(dim1=0, dim2=1)[1:, ::2].fill_(2),
    "view(dtype)": lambda z: z.view(torch.int64).zero_(),
    "init": lambda z: nn.init.zeros_(z),
    "index_fill_": lambda z: z.index_fill_(2, torch.tensor([1]), 0.0),
    "index_copy_": lambda z: z.index_copy_(0, torch.tensor([1]), detached()[1][:1]),
    "scatter_": lambda z: z.scatter_(-1, targets().clamp(min=0).unsqueeze(-1), 0.0),
    "index_put_": lambda z: z.index_put_((torch.tensor([1]),), torch.tensor(0.5, dtype=torch.float64)),
    "_foreach_mul_": lambda z: torch._foreach_mul_([z], 2.0),
    "clamp out=": lambda z: torch.clamp(z, -1, 1, out=z),
    "numpy": lambda z: z.numpy().__setitem__(0, 1),
    "asarray": lambda z: np.asarray(z).__setitem__(0, 1),
    "np.add out=": lambda z: np.add(np.ones((2, 7, CLASSES)), 1, out=z.numpy()),
    "dlpack": lambda z: torch.from_dlpack(z).zero_(),
    "set_": lambda z: z.set_(detached()[1] * 2),
    "resize_": lambda z: z.resize_(2, 7, CLASSES).zero_(),
    "t_": lambda z: z.transpose_(0, 1),
    "squeeze_": lambda z: z.unsqueeze_(0),
    "storage": lambda z: z.untyped_storage().fill_(0),
    "swap_tensors": lambda z: torch.utils.swap_tensors(z, detached()[1] * 2),
    "masked_scatter_": lambda z: z.masked_scatter_(
        detached()[1] > 0, torch.zeros(2 * 7 * CLASSES, dtype=torch.float64)
    ),
    "neg_": lambda z: z.neg_(),
    "tanh_": lambda z: z.tanh_(),
    "add_ of classes": lambda z: z.add_(torch.linspace(-1, 1, CLASSES, dtype=torch.float64)),
    "sub_ of classes": lambda z: z.sub_(torch.linspace(-1, 1, CLASSES, dtype=torch.float64), alpha=2),
    "add_ of rows": lambda z: z.add_(detached()[1]),
    "requires_grad_ then mul_": lambda z: z.requires_grad_().detach().mul_(2),
    "torch.where out=": lambda z: torch.where(detached()[1] > 0, detached()[1], -detached()[1], out=z),
    "topk out=": lambda z: torch.sort(detached()[1], -1, out=(z, torch.empty(2, 7, CLASSES, dtype=torch.int64))),
    "log_softmax out=": lambda z: torch.log_softmax(detached()[1], -1, out=z),
}


def operator_alias(z: Any, write: Callable[[Any], Any]) -> None:
    """Write by an operator to a second name; the first is what is looked at."""
    other = z
    write(other)


for _name, _write in WRITES.items():
    CASES[f"write: {_name}"] = case(lambda write=_write: _written_or_refused(write)) and CASES.pop("<lambda>")


@case
def writes_with_gradients() -> None:
    def scaled(z: Any, t: Tensor) -> Tensor:
        z.mul_(0.5)
        z /= 2
        return loss_of(z, t)

    def without_a_class(z: Any, t: Tensor) -> Tensor:
        z[..., 60:] = -float("inf")
        return z.logsumexp(-1)

    def banned(z: Any, t: Tensor) -> Tensor:
        z.masked_fill_(torch.arange(CLASSES) % 7 == 3, -float("inf"))
        return z.log_softmax(-1).gather(-1, torch.zeros(2, 7, 1, dtype=torch.int64))

    for function in (scaled, without_a_class, banned):
        both(function)


@case
def a_refused_write_names_the_caller_and_the_way_out() -> None:
    z, _ = detached()
    with pytest.raises(TypeError, match="materialize"):
        z.relu_()
    with pytest.raises(TypeError, match="materialize"):
        torch.exp(z, out=z)


@case
def one_way_to_compute_a_logit() -> None:
    """Values that are read in different ways agree bit for bit: no class beats itself, no log-probability exceeds 0."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        draw = torch.Generator().manual_seed(11)
        for rows, classes, width in ((200, 1000, 64), (7, 65, 33), (1, 49152, 16)):
            hidden = torch.randn(rows, width, generator=draw).to(dtype)
            weight = torch.randn(classes, width, generator=draw).to(dtype)
            bias = torch.randn(classes, generator=draw).to(dtype)
            target = torch.randint(0, classes, (rows, 1), generator=draw)
            for cap in (False, True):
                for offset in (None, bias):
                    z = ll.linear(hidden, weight, offset)
                    z = torch.tanh(z / 5) * 5 if cap else z
                    whole = z.materialize()
                    assert torch.equal(z.gather(-1, target), whole.gather(-1, target)), ("gather", dtype, rows, cap)
                    assert torch.equal(z.max(-1).values, whole.max(-1).values)
                    assert torch.equal(z.amax(-1), whole.amax(-1))
                    assert torch.equal(z.argmax(-1), whole.argmax(-1))
                    assert torch.equal(z.topk(min(5, classes), -1).values, whole.topk(min(5, classes), -1).values)
                    assert torch.equal(number(z[:3]), whole[:3])
                    assert torch.equal(number(z[..., 5]), whole[..., 5])
                    assert torch.equal(number(z[..., [5, 7]]), whole[..., [5, 7]])
                    assert torch.equal(number(z[..., 3:17]), whole[..., 3:17])
                    assert torch.equal((z > z.gather(-1, target)).sum(-1), (whole > whole.gather(-1, target)).sum(-1))
                    assert torch.equal(z == z.max(-1, keepdim=True).values, whole == whole.max(-1, keepdim=True).values)
                    assert bool((z.log_softmax(-1).gather(-1, z.argmax(-1, keepdim=True)) <= 0).all())
                    # What a loss reads of a half-precision head are its logits before they are rounded.
                    rank = ll.token_stats(z, target.squeeze(-1)).rank
                    wide = z.float().materialize() if dtype == torch.bfloat16 else whole
                    assert torch.equal(rank, ll.token_stats(wide, target.squeeze(-1)).rank), (dtype, rows, cap)


@case
def stale_logits_raise() -> None:
    """Logits whose weight was written since are refused, whoever wrote it."""

    def compiled() -> Any:
        torch.compiler.reset()
        return torch.compile(lambda m, ids: m(ids), backend="aot_eager")

    makers: dict[str, Callable[[nn.Module], Any]] = {
        "eager": lambda m: m(batch()[0]),
        "no_grad": torch.no_grad()(lambda m: m(batch()[0])),
        "inference": torch.inference_mode()(lambda m: m(batch()[0])),
        "compiled": lambda m: compiled()(m, batch()[0]),
        "slice": lambda m: m(batch()[0])[:, :-1],
        "log_softmax": lambda m: m(batch()[0]).log_softmax(-1),
        "detached": lambda m: m(batch()[0]).detach(),
    }

    def in_place(model: TinyModel) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)

    def step(kind: Any, **options: Any) -> Callable[[TinyModel], None]:
        def write(model: TinyModel) -> None:
            model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
            kind([model.lm_head.weight], lr=0.1, **options).step()

        return write

    writers = {
        "mul_": in_place,
        "SGD": step(torch.optim.SGD),
        "Adam foreach": step(torch.optim.Adam, foreach=True),
        "AdamW fused": step(torch.optim.AdamW, fused=True),
        "SGD fused": step(torch.optim.SGD, fused=True),
    }
    silent = []
    for how, make in makers.items():
        for who, write in writers.items():
            model = TinyModel()
            ll.lazy_head(model)
            z = make(model)
            write(model)
            try:
                number(z)
            except RuntimeError:
                continue
            silent.append((how, who))
    assert silent == [], f"read in silence: {silent}"


@case
def a_write_between_loss_and_backward_raises() -> None:
    for reduction in ("none", "mean"):
        hidden, weight, bias = parts()
        loss = loss_of(ll.linear(hidden, weight, bias), targets(), reduction=reduction).sum()
        with torch.no_grad():
            weight.mul_(2)
        own = parts()
        dense = loss_of(F.linear(*own), targets(), reduction=reduction).sum()
        with torch.no_grad():
            own[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            dense.backward()
        try:
            loss.backward()
        except RuntimeError:
            continue
        # Gradients that were made in the forward are those of the weight as it was.
        true = parts()
        loss_of(F.linear(*true), targets(), reduction=reduction).sum().backward()
        for mine, wanted in zip((hidden, weight, bias), true, strict=True):
            close(mine.grad, wanted.grad)


# --- 5. the gradient with respect to the logits


@case
def gradient_of_the_logits_goes_on() -> None:
    """d loss / d logits may not be read, but it leads to the parameters."""
    for scale in (1.0, 3.0):
        leaves = parts()
        z = ll.linear(*leaves)
        loss = loss_of(z, targets()) * scale
        (g,) = torch.autograd.grad(loss, z)
        assert g.shape == z.shape
        assert g.dtype == z.dtype
        mine = torch.autograd.grad(z, leaves, g)
        own = parts()
        for pair in zip(mine, torch.autograd.grad(loss_of(F.linear(*own), targets()) * scale, own), strict=True):
            close(*pair)


@case
def backward_with_inputs() -> None:
    leaves = parts()
    z = ll.linear(*leaves)
    z.retain_grad()
    loss_of(z, targets()).backward(inputs=[z])
    assert z.grad is not None
    assert all(p.grad is None for p in leaves)
    again = ll.linear(*leaves)
    torch.autograd.backward(again, z.grad * 2)
    own = parts()
    (loss_of(F.linear(*own), targets()) * 2).backward()
    for mine, true in zip(leaves, own, strict=True):
        close(mine.grad, true.grad)


@case
def logits_cut_from_the_head() -> None:
    """Split backward: two losses into a detached leaf's grad, passed on later."""
    leaves = parts()
    z = ll.linear(*leaves)
    leaf = z.detach().requires_grad_()
    loss_of(leaf, targets()).backward()
    leaf.logsumexp(-1).sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None for p in leaves)
    z.backward(leaf.grad)
    own = parts()
    d = F.linear(*own)
    (loss_of(d, targets()) + d.logsumexp(-1).sum()).backward()
    for mine, true in zip(leaves, own, strict=True):
        close(mine.grad, true.grad)


@case
def the_gradients_values_are_given_or_refused() -> None:
    leaves = parts()
    z = ll.linear(*leaves)
    (g,) = torch.autograd.grad(loss_of(z, targets()), z)
    own = F.linear(*parts())
    (true,) = torch.autograd.grad(loss_of(own, targets()), own)
    try:
        close(g.abs(), true.abs())
    except TypeError:
        with pytest.raises(TypeError, match="materialize"):
            g.abs()


@case
def grad_fn_and_graph() -> None:
    z = ll.linear(*parts())
    assert z.requires_grad
    assert z.grad_fn is not None
    assert not z.is_leaf
    reached, todo = set(), [z.grad_fn]
    while todo:
        node = todo.pop()
        reached.add(type(node).__name__)
        todo += [n for n, _ in node.next_functions if n is not None]
    assert "AccumulateGrad" in reached
    assert torch.autograd.graph.get_gradient_edge(z).node is not None
    assert z.detach().grad_fn is None
    with torch.no_grad():
        assert not ll.linear(*parts()).requires_grad
    for z in (ll.linear(*[p.detach() for p in parts()]),):
        assert z.grad_fn is None
        assert not z.requires_grad


@case
def double_backward() -> None:
    results = []
    for linear in (F.linear, ll.linear):
        leaves = parts()
        loss = loss_of(linear(*leaves) * 0.7, targets())
        (g,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        z = linear(*leaves)
        (of_logits,) = torch.autograd.grad(loss_of(z, targets()), z, create_graph=True)
        (gh,) = torch.autograd.grad(z, leaves[0], of_logits, create_graph=True)
        results.append(torch.autograd.grad((g**2).sum() + (gh**2).sum(), leaves))
    for pair in zip(*results, strict=True):
        close(*pair, 1e-8)


@case
def losses_share_logits() -> None:
    both(lambda z, t: loss_of(z, t) + 0.3 * loss_of(z[:, 1:], t[:, :-1]) + z.logsumexp(-1).pow(2).mean())
    both(lambda z, t: loss_of(z, t) + z.softmax(-1)[..., 3].sum())
    both(lambda z, t: (lambda loss: loss * loss + 2 * loss)(loss_of(z, t)))


@case
def retained_graphs() -> None:
    found = []
    for linear in (F.linear, ll.linear):
        leaves = parts()
        loss = loss_of(linear(*leaves), targets())
        loss.backward(retain_graph=True)
        loss.backward(torch.tensor(2.0, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        found.append([p.grad for p in leaves])
    for pair in zip(*found, strict=True):
        close(*pair)


@case
def anomaly_mode() -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        both(lambda z, t: loss_of(z, t))


# --- compile, export, transforms


@case
def compiled_model() -> None:
    for outside in (False, True):
        dense, lazy = models()
        for model in (dense, lazy):
            ids, labels = batch()
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if model is lazy else model
            (loss_of(run(ids), labels) if outside else run(ids, labels)[0]).backward()
        same_gradients(lazy, dense)


@case
def compiled_loss_of_real_logits() -> None:
    loss = torch.compile(lambda z, t: loss_of(z, t), backend="aot_eager")
    results = []
    for linear, function in ((F.linear, loss_of), (ll.linear, loss)):
        leaves = parts()
        results.append(torch.autograd.grad(function(linear(*leaves), targets()), leaves))
    for pair in zip(*results, strict=True):
        close(*pair)


@case
def compiled_whole_graph_of_real_logits() -> None:
    """Logits from outside are refused in one graph, with the way out; that way works."""
    leaves, own = parts(), parts()
    whole = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call logitless\.linear in it; or compile without fullgraph"):
        whole(ll.linear(*leaves), targets())

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, t: Tensor) -> Tensor:
        return loss_of(ll.linear(hidden, weight, bias), t)

    mine = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves, targets())
    wanted = torch.autograd.grad(loss_of(F.linear(*own), targets()), own)
    for pair in zip(torch.autograd.grad(mine, leaves), wanted, strict=True):
        close(*pair)


@case
def compiled_with_a_break() -> None:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = ll.linear(hidden, weight, bias)
        torch._dynamo.graph_break()
        return loss_of(z, targets())

    leaves, own = parts(), parts()
    mine = torch.autograd.grad(torch.compile(function, backend="aot_eager")(*leaves), leaves)
    for pair in zip(mine, torch.autograd.grad(loss_of(F.linear(*own), targets()), own), strict=True):
        close(*pair)


@case
def export() -> None:
    """An exported model computes what the model does, or the export says why it can't."""
    model = TinyModel()
    ids, labels = batch()
    wanted = model(ids, labels)[0].detach()
    ll.lazy_head(model)
    exported = torch.export.export(model, (ids, labels), strict=False)
    got = exported.module()(ids, labels)
    close(got[0].detach(), wanted)


@case
def export_of_the_logits() -> None:
    model = TinyModel()
    ids = batch()[0]
    wanted = model(ids).detach()
    ll.lazy_head(model)
    exported = torch.export.export(model, (ids,), strict=False)
    close(number(exported.module()(ids)).detach(), wanted)


@case
def function_transforms() -> None:
    hidden, weight, bias = (p.detach() for p in parts())
    target = targets().clamp(min=0)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        mine = transform(lambda w: loss_of(ll.linear(hidden, w, bias), target))(weight)
        close(mine, transform(lambda w: loss_of(F.linear(hidden, w, bias), target))(weight))
    mine = torch.func.vmap(lambda h, t: loss_of(ll.linear(h, weight, bias), t))(hidden, target)
    close(mine, torch.stack([loss_of(F.linear(h, weight, bias), t) for h, t in zip(hidden, target, strict=True)]))
    z, d = detached()
    scale = torch.tensor(2.0, dtype=torch.float64)
    close(*(torch.func.grad(lambda s, z=z: loss_of(z / s, target))(scale) for z in (z, d)))


# --- 8. small ones


@case
def copies() -> None:
    z, d = detached()
    for again in (copy.copy(z), copy.deepcopy(z), pickle.loads(pickle.dumps(z)), z.clone()):
        assert type(again) is type(z)
        close(number(again), d)
    stream = io.BytesIO()
    torch.save(z, stream)
    stream.seek(0)
    close(number(torch.load(stream, weights_only=False)), d)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(ll.linear(*parts()))


@case
def a_saved_row_is_small() -> None:
    weight = torch.randn(5000, 64)
    z = ll.linear(torch.randn(4, 64), weight)
    for saved in (z[0], z[:1], z[..., :10], z.log_softmax(-1)[0]):
        stream = io.BytesIO()
        torch.save(saved, stream)
        limit = saved.numel() * 4 + 16 * 1024
        assert stream.tell() <= max(limit, 64 * 4 * 16), (tuple(saved.shape), stream.tell())
        stream.seek(0)
        close(number(torch.load(stream, weights_only=False)), number(saved), 1e-5, 1e-5)


@case
def numpy_numbers() -> None:
    z, d = detached()
    for value in (np.float64(2), np.float32(0.5), np.int64(3)):
        for operation in (
            lambda a, b: a * b,
            lambda a, b: b * a,
            lambda a, b: a / b,
            lambda a, b: a + b,
            lambda a, b: b - a,
        ):
            got, wanted = operation(z, value), operation(d, value)
            assert type(number(got)) is type(wanted), (type(got), type(wanted))
            close(torch.as_tensor(number(got)), torch.as_tensor(wanted))
    assert isinstance(np.asarray(z), np.ndarray)
    close(torch.from_numpy(np.asarray(z).copy()), d)
    close(torch.from_numpy(np.exp(z.numpy())), d.exp())


@case
def deepcopy_of_a_model_keeps_the_handle() -> None:
    model = TinyModel()
    handle = ll.lazy_head(model)
    twin = copy.deepcopy(model)
    z = twin(batch()[0])
    assert type(z) is ll.LazyLogits
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert not torch.equal(number(twin(batch()[0])), number(model(batch()[0])))
    again = pickle.loads(pickle.dumps(model))
    assert type(again(batch()[0])) in (ll.LazyLogits, Tensor)
    close(number(again(batch()[0])), number(model(batch()[0])))
    handle.remove()
    assert type(model(batch()[0])) is Tensor


@case
def label_smoother() -> None:
    """The errors of transformers' LabelSmoother are those of a tensor."""
    from transformers.trainer_pt_utils import LabelSmoother

    smoother = LabelSmoother(0.1)
    both(lambda z, t: smoother({"logits": z}, t.clone()))
    both(lambda z, t: smoother({"logits": z}, t.clone(), shift_labels=True))
    z, d = detached()
    for labels in (torch.full((2, 7), CLASSES), torch.zeros(2, 6, dtype=torch.int64)):
        errors = []
        for logits in (d, z):
            with pytest.raises((RuntimeError, IndexError, ValueError)) as error:
                smoother({"logits": logits}, labels.clone())
            errors.append(error.type)
        assert errors[0] is errors[1], errors


@case
def honest_about_what_it_is() -> None:
    z, d = detached()
    assert isinstance(z, Tensor) == torch.is_tensor(z)
    if isinstance(z, Tensor):
        assert issubclass(type(z), Tensor)
    assert (z.layout, z.dim(), z.is_floating_point()) == (d.layout, d.dim(), d.is_floating_point())
    assert z.numel() == d.numel()
    assert repr(z)


@case
def inference_mode() -> None:
    with torch.inference_mode():
        z, d = detached()
        close(loss_of(z, targets()), loss_of(d, targets()))
        assert torch.equal(z.argmax(-1), d.argmax(-1))
    close(number(z), d.clone())


@case
def autocast() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        results = []
        for linear in (F.linear, ll.linear):
            leaves = parts(dtype=torch.float32)
            with torch.autocast("cpu", dtype=dtype):
                z = linear(*leaves)
                loss = loss_of(z, targets())
            assert z.dtype is dtype
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for mine, true in zip(results[1], results[0], strict=True):
            assert mine.dtype == true.dtype
            close(mine, true, 3e-2, 3e-3)


@case
def threads() -> None:
    """Backwards of one lazy tensor in two threads at once."""
    import threading

    leaves = parts()
    z = ll.linear(*leaves)
    losses = [loss_of(z, targets()) * k for k in (1.0, 2.0, 3.0, 4.0)]
    workers = [threading.Thread(target=lambda x=x: x.backward(retain_graph=True)) for x in losses]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    own = parts()
    (loss_of(F.linear(*own), targets()) * 10).backward()
    for mine, true in zip(leaves, own, strict=True):
        close(mine.grad, true.grad)


@case
def garbage() -> None:
    """A lazy tensor and what it was made of are freed without the garbage collector."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    leaves = parts()
    hidden = leaves[0] * 1.0
    watched = weakref.ref(hidden)
    loss = loss_of(ll.linear(hidden, *leaves[1:]), targets())
    loss.backward()
    del hidden, loss
    assert watched() is None


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CASES:
        CASES[chosen]()
