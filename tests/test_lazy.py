"""LazyLogits do what the tensor they stand for does, and are not computed where they need not be."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import logitless as ll
from logitless.kernels import interface
from logitless.lazy.gradient import LazyGradient
from logitless.lazy.log_probs import LazyLogProbs
from logitless.lazy.tensor import LazyTensor, LazyView

BATCH, TIME, CLASSES, WIDTH = 3, 5, 7, 3


class NoTensorOf(TorchDispatchMode):
    """Fails when an operation makes a tensor of `limit` elements or more: autograd's own operations included.

    A lazy tensor has no elements in memory.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            in_memory = isinstance(leaf, Tensor) and not isinstance(leaf, (LazyTensor, LazyGradient))
            if in_memory and leaf.numel() >= self.limit:
                raise AssertionError(f"{func} made {tuple(leaf.shape)}, {self.limit} elements or more")
        return out


@pytest.fixture(autouse=True)
def nothing_is_computed_unseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here every logit is large, and a warning is an error."""
    monkeypatch.setattr("logitless.lazy.proxy._SMALL_BYTES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((BATCH, TIME, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return hidden, weight, bias


MASK = torch.tensor([[True, False, True, True, False]] * BATCH)
TEMPERATURE = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
ADDED = torch.linspace(-1, 1, CLASSES, dtype=torch.float64)

STAY_LAZY: dict[str, Callable[[Any], Any]] = {
    "view": lambda z: z.view(-1, CLASSES),
    "view of two": lambda z: z.view(TIME, BATCH, CLASSES),
    "view, inferred classes": lambda z: z.view(BATCH * TIME, -1),
    "reshape by a list": lambda z: z.reshape([TIME, -1, CLASSES]),
    "torch.reshape": lambda z: torch.reshape(z, (-1, CLASSES)),
    "torch.reshape by name": lambda z: torch.reshape(input=z, shape=(-1, CLASSES)),
    "flatten": lambda z: z.flatten(0, 1),
    "torch.flatten": lambda z: torch.flatten(z, 0, -2),
    "contiguous": lambda z: z[..., :-1, :].contiguous(),
    "shift": lambda z: z[..., :-1, :],
    "shift by name": lambda z: z[:, 1:],
    "first row": lambda z: z[0],
    "last positions": lambda z: z[:, -2:, :],
    "mask": lambda z: z[MASK],
    "mask, all classes": lambda z: z[MASK, :],
    "index tensors": lambda z: z[torch.tensor([2, 0]), torch.tensor([1, 4])],
    "new axis": lambda z: z[:, None],
    "some classes": lambda z: z[..., 2:6],
    "every second class": lambda z: z[..., ::2],
    "some classes by a list": lambda z: z[..., [5, 0, 3]],
    "some classes by a mask": lambda z: z[:, 1:, torch.arange(CLASSES) > 3],
    "some classes, of index_select": lambda z: z.index_select(-1, torch.tensor([6, 6, 1])),
    "all classes": lambda z: z[..., :CLASSES],
    "select": lambda z: z.select(0, -1),
    "narrow": lambda z: z.narrow(1, 1, 3),
    "index_select": lambda z: torch.index_select(z, 0, torch.tensor([2, 2, 0])),
    "unbind": lambda z: z.unbind(1)[2],
    "iterate": lambda z: list(z)[1],
    "split": lambda z: z.split(2, 1)[1],
    "split by sizes": lambda z: torch.split(z, [1, 4], 1)[1],
    "chunk": lambda z: torch.chunk(z, 2, dim=0)[0],
    "cat": lambda z: torch.cat([z, z], 1),
    "concatenate of a slice": lambda z: torch.concat([z[:1], z[2:]]),
    "unsqueeze and squeeze": lambda z: z.unsqueeze(0).squeeze(0),
    "squeeze all": lambda z: z[:1].squeeze(),
    "transpose leading": lambda z: z.transpose(0, 1),
    "permute leading": lambda z: z.permute(1, 0, 2),
    "classes second": lambda z: z.transpose(1, 2),
    "classes first, and back": lambda z: z.movedim(-1, 0).movedim(0, -1),
    "mT": lambda z: z.mT,
    "torch.permute": lambda z: torch.permute(z, (0, 2, 1)),
    "float": lambda z: z.float(),
    "double": lambda z: z.double(),
    "to": lambda z: z.to(torch.float32),
    "to by name": lambda z: z.to(device="cpu", dtype=torch.float32),
    "to a tensor's": lambda z: z.to(torch.zeros(1)),
    "type_as": lambda z: z.type_as(torch.zeros(1)),
    "cpu": lambda z: z.cpu(),
    "detach": lambda z: z.detach(),
    "times a number": lambda z: z * 3,
    "a number times": lambda z: 0.25 * z,
    "divided": lambda z: z / 2,
    "numpy number": lambda z: z * np.float32(0.5),
    "torch.mul": lambda z: torch.mul(z, 0.5),
    "torch.div": lambda z: torch.div(z, 3.0),
    "a temperature": lambda z: z / TEMPERATURE,
    "a scale": lambda z: z * TEMPERATURE,
    "a scale first": lambda z: TEMPERATURE * z,
    "a scale of one element": lambda z: z * TEMPERATURE.reshape(1),
    "negative": lambda z: -z,
    "softcap": lambda z: torch.tanh(z / 1.5) * 1.5,
    "softcap, scaled": lambda z: (z * 3 / 1.5).tanh() * 0.7 / 2 * 3,
    "softcap, negative": lambda z: -2 * torch.tanh(z),
    "softcap, zero": lambda z: 0 * torch.tanh(z),
    "plus one number a class": lambda z: z + ADDED,
    "one number a class plus": lambda z: ADDED.view(1, 1, -1) + z,
    "a sum of heads": lambda z: z + z * 0.5,
    "a difference of heads": lambda z: 1.5 * z - 0.5 * z,
    "model code": lambda z: z[..., :-1, :].float().contiguous().view(-1, CLASSES) / 0.7,
}


def made(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[ll.LazyLogits, Tensor, list[Tensor]]:
    hidden, weight, offset = parts(dtype)
    lazy = ll.linear(hidden, weight, offset if bias else None)
    return lazy, F.linear(hidden, weight, offset if bias else None), [hidden, weight, *([offset] if bias else [])]


# Of what reaches a gradient by way of float32, whose terms cancel, an absolute error is allowed.
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-12 if got.dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", STAY_LAZY)
def test_stays_lazy_and_is_what_the_tensor_becomes(name: str, bias: bool) -> None:
    lazy, dense, leaves = made(bias)
    got, expected = STAY_LAZY[name](lazy), STAY_LAZY[name](dense)
    assert type(got) is ll.LazyLogits
    assert (got.shape, got.dtype, got.dim(), got.requires_grad) == (
        expected.shape,
        expected.dtype,
        expected.dim(),
        expected.requires_grad,
    )
    torch.testing.assert_close(got.materialize(), expected, **TOLERANCE[got.dtype])
    if not expected.requires_grad:
        return
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    leaves = [*leaves, TEMPERATURE]
    ours = torch.autograd.grad(got.materialize(), leaves, upstream, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, **TOLERANCE[got.dtype])


@pytest.mark.parametrize("name", STAY_LAZY)
def test_the_loss_of_what_stays_lazy_is_the_tensors(name: str) -> None:
    lazy, dense, leaves = made()
    got, expected = STAY_LAZY[name](lazy), STAY_LAZY[name](dense)
    classes = 1 if name in ("classes second", "mT", "torch.permute") else -1
    target = torch.zeros(expected.movedim(classes, -1).shape[:-1], dtype=torch.int64).reshape(-1)
    target[1::2] = 2
    target[0] = -100
    target = target.view(expected.movedim(classes, -1).shape[:-1])
    flat = expected.movedim(classes, -1).flatten(0, -2)
    truth = F.cross_entropy(flat, target.view(-1))
    loss = ll.functional.cross_entropy(got, target, class_dim=classes)
    torch.testing.assert_close(loss, truth, rtol=1e-6 if got.dtype == torch.float32 else 1e-12, atol=0)
    if truth.requires_grad:
        ours, theirs = (torch.autograd.grad(value, leaves) for value in (loss, truth))
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5 if got.dtype == torch.float32 else 1e-10, atol=1e-12)


INDEX = torch.tensor([[[1], [0], [6], [2], [2]]] * BATCH)

WITHOUT_THE_LOGITS: dict[str, Callable[[Any], Tensor]] = {
    "last position": lambda z: z[:, -1, :],
    "select a position": lambda z: z.select(1, 2),
    "one class": lambda z: z[..., 3],
    "the last class, selected": lambda z: z.select(-1, -1),
    "argmax": lambda z: z.argmax(-1),
    "torch.argmax": lambda z: torch.argmax(z, dim=-1),
    "argmax, kept": lambda z: z.argmax(dim=2, keepdim=True),
    "argmax of classes second": lambda z: z.transpose(1, 2).argmax(1),
    "max": lambda z: z.max(-1).values,
    "max's class": lambda z: torch.max(z, dim=-1, keepdim=True).indices,
    "topk": lambda z: z.topk(3).values,
    "topk's classes": lambda z: torch.topk(z, 2, dim=-1).indices,
    "logsumexp": lambda z: z.logsumexp(-1),
    "logsumexp, kept": lambda z: torch.logsumexp(z, dim=(2,), keepdim=True),
    "gather": lambda z: z.gather(-1, INDEX),
    "gather of many": lambda z: z.gather(-1, INDEX.repeat(1, 1, 5)),
    "gather, softcapped": lambda z: torch.gather(torch.tanh(z) * 2, 2, INDEX),
    "log_softmax, one": lambda z: z.log_softmax(-1).gather(-1, INDEX).squeeze(-1),
    "gather and logsumexp, as TRL's selective_log_softmax": lambda z: (
        torch.gather(z, dim=-1, index=INDEX).squeeze(-1) - torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    ),
    "log_softmax, two": lambda z: F.log_softmax(z, dim=-1).gather(2, INDEX.repeat(1, 1, 2)),
    "log_softmax, wider": lambda z: torch.log_softmax(z, -1, dtype=torch.float64).gather(-1, INDEX),
    "minus log_softmax": lambda z: (-F.log_softmax(z, dim=-1)).gather(-1, INDEX),
    "sum of log_softmax": lambda z: (-z.log_softmax(-1)).sum(-1, keepdim=True),
    "mean of log_softmax": lambda z: torch.mean(z.log_softmax(-1), dim=-1),
    "argmax of log_softmax": lambda z: z.log_softmax(-1).argmax(-1),
    "moved log_softmax": lambda z: (
        z.log_softmax(-1)[:, 1:].reshape(-1, CLASSES).gather(-1, INDEX[:, 1:].reshape(-1, 1))
    ),
    "nll_loss": lambda z: F.nll_loss(F.log_softmax(z.view(-1, CLASSES), -1), INDEX.view(-1)),
    "cross_entropy": lambda z: F.cross_entropy(z.view(-1, CLASSES), INDEX.view(-1), label_smoothing=0.1),
    "cross_entropy, classes second": lambda z: F.cross_entropy(z.transpose(1, 2), INDEX.squeeze(-1), reduction="none"),
    "CrossEntropyLoss": lambda z: torch.nn.CrossEntropyLoss(ignore_index=2)(z.view(-1, CLASSES), INDEX.view(-1)),
    "soft targets, classes second": lambda z: F.cross_entropy(
        z.mT, torch.arange(1.0, BATCH * CLASSES * TIME + 1, dtype=torch.float64).view(BATCH, CLASSES, TIME).log()
    ),
    "binary_cross_entropy_with_logits": lambda z: F.binary_cross_entropy_with_logits(
        z, torch.linspace(0, 1, BATCH * TIME * CLASSES, dtype=torch.float64).view(BATCH, TIME, CLASSES)
    ),
}


@pytest.mark.parametrize("name", WITHOUT_THE_LOGITS)
def test_is_computed_without_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, dense, leaves = made()
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 1)  # a row is a tile
    expected = WITHOUT_THE_LOGITS[name](dense)
    limit = dense.numel() + ("soft" in name or "binary" in name) * 1  # their targets are of the logits' size
    with NoTensorOf(limit):
        got = WITHOUT_THE_LOGITS[name](lazy)
        assert isinstance(got, Tensor)
        if expected.is_floating_point():
            upstream = torch.randn(expected.shape, dtype=expected.dtype)
            ours = torch.autograd.grad(got, leaves, upstream)
    assert type(got) is Tensor
    assert_same(got, expected)
    if expected.is_floating_point():
        for mine, wanted in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


COMPUTED: dict[str, Callable[[Any], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "F.softmax": lambda z: F.softmax(z, dim=-1),
    "log_softmax over time": lambda z: z.log_softmax(1),
    "sum": lambda z: z.sum(),
    "exp": lambda z: torch.exp(z),
    "plus a number": lambda z: z + 1,
    "minus": lambda z: 1 - z,
    "power": lambda z: z**2,
    "a number over": lambda z: 2.0 / (z + 3),
    "comparison": lambda z: z > 0,
    "equality": lambda z: z == z.detach(),
    "where": lambda z: torch.where(MASK.unsqueeze(-1), z, 0.0),
    "masked_fill": lambda z: z.masked_fill(MASK.unsqueeze(-1), -1.0),
    "matmul": lambda z: z @ torch.ones(CLASSES, 2, dtype=torch.float64),
    "times a matrix": lambda z: z * torch.ones(TIME, CLASSES, dtype=torch.float64),
    "stack": lambda z: torch.stack([z, z]),
    "tanh of tanh": lambda z: torch.tanh(torch.tanh(z)),
    "argmax of all": lambda z: z.argmax(),
    "max of all": lambda z: z.max(),
    "max over time": lambda z: z.max(1).values,
    "logsumexp of two": lambda z: z.logsumexp((1, 2)),
    "to an integer": lambda z: z.to(torch.int64),
    "T of log-probabilities": lambda z: z.log_softmax(-1).exp(),
    "log-probabilities times": lambda z: z.log_softmax(-1) * 2,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_anything_else_computes_the_logits_and_says_so(name: str) -> None:
    lazy, dense, leaves = made()
    with pytest.warns(
        ll.MaterializeWarning, match=r"computes all of Lazy.* with 7 classes; call .materialize()"
    ) as seen:
        got = COMPUTED[name](lazy)
    assert {record.filename for record in seen} == {__file__}
    expected = COMPUTED[name](dense)
    assert type(got) is Tensor
    assert_same(got, expected)
    if expected.requires_grad:
        upstream = torch.randn(expected.shape, dtype=expected.dtype)
        for mine, wanted in zip(
            torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "reshape across classes": lambda z: z.reshape(-1),
    "flatten all": lambda z: z.flatten(),
    "unsqueeze last": lambda z: z.unsqueeze(-1),
    "diagonal": lambda z: z.diagonal(dim1=0, dim2=1),
    "unfold": lambda z: z.unfold(1, 3, 2),
    "pieces of the classes": lambda z: z.tensor_split(3, -1)[1],
    "expand": lambda z: z.expand(2, BATCH, TIME, CLASSES),
    "as_strided": lambda z: z.as_strided((2, 3), (1, 2)),
    "unflatten": lambda z: z.unflatten(-1, (7, 1)),
    "a view of a view": lambda z: z.diagonal()[1:, ::2],
    "rows of classes second": lambda z: z.transpose(1, 2)[1],
    "classes first, flattened": lambda z: z.permute(2, 0, 1).reshape(CLASSES, -1),
    "log-probabilities of some classes": lambda z: z.log_softmax(-1)[..., 2:5],
}


@pytest.mark.parametrize("name", VIEWS)
def test_other_views_are_computed_when_read_and_are_not_written(name: str) -> None:
    lazy, dense, leaves = made()
    got, expected = VIEWS[name](lazy), VIEWS[name](dense)
    assert type(got) is LazyView
    assert (got.shape, got.dtype, got.requires_grad) == (expected.shape, expected.dtype, expected.requires_grad)
    flat = got.detach()
    for write in (lambda: flat.zero_(), lambda: flat.add_(1), lambda: torch.neg(flat, out=flat)):
        with pytest.raises(TypeError, match=r"lazy logits have no memory to write to, at .*test_lazy\.py"):
            write()
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    with pytest.warns(ll.MaterializeWarning, match="mul computes all of LazyView"):
        read = got * 1
    torch.testing.assert_close(read, expected, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(
        torch.autograd.grad(read, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


def test_the_warning_comes_once_a_place() -> None:
    lazy, _, _ = made()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            lazy.softmax(-1)
        lazy.exp()
    assert [str(record.message).split()[0] for record in seen] == ["softmax", "exp"]


def test_small_logits_and_one_row_a_sequence_need_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, dense, _ = made()
    assert_same(lazy[:, -1:, :].softmax(-1), dense[:, -1:, :].softmax(-1))
    monkeypatch.setattr("logitless.lazy.proxy._SMALL_BYTES", dense.numel() * 8)
    assert_same(lazy.softmax(-1), dense.softmax(-1))
    monkeypatch.setattr("logitless.lazy.proxy._SMALL_BYTES", dense.numel() * 8 - 1)
    with pytest.warns(ll.MaterializeWarning):
        lazy.softmax(-1)


def test_says_what_it_would_be() -> None:
    lazy, dense, _ = made()
    for z in (lazy, lazy[0], lazy.float(), lazy.transpose(1, 2)):
        tensor = z.materialize()
        assert (z.shape, z.size(), z.size(-1), z.size(0)) == (
            tensor.shape,
            tensor.size(),
            tensor.size(-1),
            tensor.size(0),
        )
        assert (z.dim(), z.ndim, z.numel(), len(z)) == (tensor.dim(), tensor.ndim, tensor.numel(), len(tensor))
        assert (z.dtype, z.device, z.nbytes, z.element_size()) == (
            tensor.dtype,
            tensor.device,
            tensor.nbytes,
            tensor.element_size(),
        )
        assert (z.is_cuda, z.is_sparse, z.is_nested, z.layout) == (False, False, False, torch.strided)
        assert torch.numel(z) == tensor.numel()
        assert z.is_floating_point()
        assert torch.is_floating_point(z)
    assert isinstance(lazy, Tensor)
    assert torch.is_tensor(lazy)
    assert lazy.requires_grad
    assert not lazy.is_leaf
    assert lazy.new_zeros(2).dtype == dense.dtype
    assert repr(lazy) == (
        "LazyLogits(shape=(3, 5, 7), dtype=torch.float64, hidden=(3, 5, 3), weight=(7, 3), bias=True, "
        "requires_grad=True)"
    )
    assert repr(ll.linear(torch.ones(2, 3), torch.ones(4, 3), scale=2.0, softcap=30.0)) == (
        "LazyLogits(shape=(2, 4), dtype=torch.float32, hidden=(2, 3), weight=(4, 3), scale=2.0, softcap=30.0)"
    )
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = lazy.no_such


def test_what_cannot_be_held_is_not_written() -> None:
    lazy, _, _ = made()
    with pytest.raises(TypeError, match=r"LazyLogits cannot be written into but by a constant .* at .*test_lazy\.py"):
        lazy[0] = 1.0
    with pytest.raises(TypeError, match="mul_: LazyLogits can be scaled in place by one number only"):
        lazy.mul_(torch.ones(TIME, CLASSES, dtype=torch.float64))
    with pytest.raises(AttributeError):
        lazy.softcap = 1.0  # type: ignore[misc] # that it cannot be is what is tested


WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda z: z.mul_(0.5),
    "times": lambda z: z.__imul__(3),
    "divided": lambda z: z.__itruediv__(TEMPERATURE),
    "torch.Tensor.div_": lambda z: Tensor.div_(z, 2),
    "one number a class": lambda z: z.add_(ADDED),
    "plus itself": lambda z: z.__iadd__(0.5 * z),
    "a class by number": lambda z: z.__setitem__((..., 3), -1.5),
    "classes by a list": lambda z: z.__setitem__((slice(None), slice(None), [1, 4]), float("-inf")),
    "classes by a range": lambda z: z.__setitem__((..., slice(2, None, 2)), torch.finfo(z.dtype).min),
    "classes by a tensor": lambda z: z.__setitem__((..., torch.tensor([0, 6])), torch.tensor(2.5, dtype=torch.float64)),
    "masked_fill_": lambda z: z.masked_fill_(torch.arange(CLASSES) > 4, 0.0),
    "masked_fill_ of one row": lambda z: z.masked_fill_((torch.arange(CLASSES) > 4).view(1, 1, -1), -math.inf),
    "index_fill_": lambda z: z.index_fill_(-1, torch.tensor([5]), 1.0),
    "two": lambda z: z.mul_(2).index_fill_(2, torch.tensor([5]), -math.inf),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_what_is_held_is_written(name: str, bias: bool) -> None:
    lazy, dense, leaves = made(bias)
    before = lazy[1:]
    dense = dense * 1  # so that torch writes to what is no leaf's
    WRITES[name](lazy), WRITES[name](dense)
    assert type(lazy) is ll.LazyLogits
    torch.testing.assert_close(lazy.materialize(), dense, **TOLERANCE[torch.float64])
    loss, expected = (F.cross_entropy(z.view(-1, CLASSES), torch.ones(15).long()) for z in (lazy, dense))
    for z in (loss, expected) if name not in ("classes by a list",) else ():
        assert z.isfinite()
    target = torch.arange(CLASSES)[:1].repeat(15)
    rows, expected = (F.cross_entropy(z.view(-1, CLASSES), target, reduction="none")[::2] for z in (lazy, dense))
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    for mine, wanted in zip(
        torch.autograd.grad(rows, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="written into through another view"):
        before.materialize()


def test_copies_and_pickles_as_its_parts() -> None:
    lazy, dense, _ = made()
    lazy = (lazy.detach() * 2).transpose(0, 1)
    for twin in (copy.copy(lazy), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert type(twin) is ll.LazyLogits
        assert_same(twin.materialize(), 2 * dense.detach().transpose(0, 1))
    assert copy.deepcopy(lazy).weight is not lazy.weight
    twin = pickle.loads(pickle.dumps(lazy.transpose(0, 1).log_softmax(-1)))
    assert type(twin) is LazyLogProbs
    assert_same(twin.materialize(), (2 * dense.detach()).log_softmax(-1))


def test_made_under_no_grad_it_has_no_graph() -> None:
    hidden, weight, bias = parts()
    with torch.no_grad():
        lazy = ll.linear(hidden, weight, bias)
    assert not lazy.requires_grad
    assert not (lazy * 2).requires_grad
    assert not F.cross_entropy(lazy.view(-1, CLASSES), INDEX.view(-1)).requires_grad
    with torch.inference_mode():
        inside = ll.linear(hidden, weight, bias)
    assert not F.cross_entropy(inside.view(-1, CLASSES), INDEX.view(-1)).requires_grad
    with torch.no_grad():
        assert not ll.linear(hidden, weight, bias).float().requires_grad


@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_a_head_changed_since_is_refused(part: str) -> None:
    hidden, weight, bias = (tensor.detach().clone() for tensor in parts())
    lazy = ll.linear(hidden, weight, bias)
    {"hidden": hidden, "weight": weight, "bias": bias}[part].add_(1)
    for use in (lambda: lazy.materialize(), lambda: lazy * 2, lambda: F.cross_entropy(lazy[0], INDEX[0].view(-1))):
        with pytest.raises(RuntimeError, match="modified in place since these logits were made"):
            use()


def test_measures_refuse_classes_that_are_not_last() -> None:
    lazy, _, _ = made()
    with pytest.raises(ValueError, match="classes in dimension 1, not last"):
        ll.entropy(lazy.transpose(1, 2))


def test_measures_take_lazy_log_probabilities_computed() -> None:
    lazy, dense, _ = made()
    with pytest.warns(ll.MaterializeWarning, match="a measure computes all of LazyLogProbs"):
        got = ll.token_stats(lazy.log_softmax(-1), INDEX.squeeze(-1))
    assert_same(got.nll, ll.token_stats(dense, INDEX.squeeze(-1)).nll)
    assert float(got.lse.detach().abs().max()) < 1e-14
    with pytest.raises(TypeError, match="hidden must be Tensor, not LazyLogits"):
        ll.linear(lazy, torch.ones(2, CLASSES, dtype=torch.float64))


def test_reshape_to_another_size_is_an_error() -> None:
    lazy, _, _ = made()
    with pytest.raises(RuntimeError, match="invalid for LazyLogits"):
        lazy.view(4, 4, CLASSES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_round_as_the_tensor_does(dtype: torch.dtype) -> None:
    lazy, dense, _ = made(dtype=dtype)
    assert torch.equal(lazy.materialize(), dense)
    assert torch.equal(lazy.argmax(-1), dense.argmax(-1))
    # Cast to a wider dtype they are what the losses read: the products before they are rounded.
    wide = lazy.float().materialize()
    assert torch.equal(wide.to(dtype), dense)
    truth = F.linear(lazy.hidden.double(), lazy.weight.double(), None if lazy.bias is None else lazy.bias.double())
    assert (wide - truth).abs().max() <= (dense.float() - truth).abs().max()
    rank = (wide > wide.gather(-1, INDEX)).sum(-1)
    assert torch.equal(rank, ll.token_stats(lazy, INDEX.squeeze(-1)).rank)
    torch.testing.assert_close(lazy.gather(-1, INDEX), dense.gather(-1, INDEX))


def test_numpy_takes_it() -> None:
    lazy, dense, _ = made()
    with pytest.warns(ll.MaterializeWarning):
        np.testing.assert_allclose(np.asarray(lazy.detach()), dense.detach().numpy(), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # on importing dynamo
def test_model_code_compiles_to_one_graph() -> None:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = ll.linear(hidden, weight)[:, :-1].float() / 2
        return F.cross_entropy(logits.view(-1, CLASSES), target)

    hidden, weight, _ = parts()
    target = INDEX[:, 1:].reshape(-1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = compiled(hidden, weight, target), loss(hidden, weight, target)
    torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])  # the dtype of the logits
    for mine, wanted in zip(
        torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(mine, wanted, **TOLERANCE[torch.float32])


def test_made_outside_a_transform_it_serves_inside() -> None:
    lazy, dense, _ = made()
    target = INDEX.view(-1)

    def loss(temperature: Tensor) -> Tensor:
        return ll.functional.cross_entropy((lazy.detach() / temperature).view(-1, CLASSES), target)

    slope = torch.func.grad(loss)(torch.tensor(2.0, dtype=torch.float64))
    step = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy((dense.detach() / step).view(-1, CLASSES), target)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, step)[0], rtol=1e-10, atol=0)


def test_serves_under_transforms() -> None:
    hidden, weight, _ = parts()
    target = INDEX.view(-1)

    def loss(w: Tensor) -> Tensor:
        return ll.functional.cross_entropy((ll.linear(hidden, w) / 2).view(-1, CLASSES), target)

    torch.testing.assert_close(
        torch.func.grad(loss)(weight), torch.autograd.grad(loss(weight), weight)[0], rtol=1e-10, atol=1e-12
    )


def test_a_class_that_does_not_exist_is_gathered_as_torch_gathers_it() -> None:
    lazy, dense, _ = made()
    for wrong in (-100, -1, CLASSES):
        index = torch.full((BATCH, TIME, 1), wrong)
        for z in (lazy, dense, lazy.log_softmax(-1)):
            with pytest.raises(
                RuntimeError, match=f"index {wrong} is out of bounds for dimension 2 with size {CLASSES}"
            ):
                z.gather(-1, index)
    for z in (lazy, dense):
        with pytest.raises(
            IndexError, match=r"Dimension out of range \(expected to be in range of \[-3, 2\], but got 3\)"
        ):
            z.argmax(3)


def test_what_is_no_sum_of_one_head_is_as_torch_has_it() -> None:
    lazy, dense, _ = made()
    hidden, weight, _ = parts()
    other = ll.linear(hidden, weight * 2)
    with pytest.warns(ll.MaterializeWarning):
        assert_same(torch.add(ADDED, lazy, alpha=2), torch.add(ADDED, dense, alpha=2))
    with pytest.warns(ll.MaterializeWarning):
        joined = torch.cat([lazy, other])
    assert_same(joined, torch.cat([dense, F.linear(hidden, weight * 2)]))


def test_the_classes_of_permuted_logits_are_found_after_another_move() -> None:
    lazy, dense, _ = made()
    for move in (lambda z: z.permute(1, 0, 2).unsqueeze(0), lambda z: z.permute(0, 2, 1).permute(0, 2, 1)[None, :, 1:]):
        got, expected = move(lazy), move(dense)
        assert type(got) is ll.LazyLogits
        torch.testing.assert_close(got.materialize(), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("fused", [True, False])
def test_logits_made_before_an_optimisers_step_are_refused(fused: bool) -> None:
    hidden, weight, _ = (tensor.detach().clone() for tensor in parts())
    weight.requires_grad_().grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=fused)
    lazy = ll.linear(hidden, weight)
    others = [lazy, lazy[1:], lazy.log_softmax(-1), lazy.diagonal()]
    lazy.argmax(-1)
    optimizer.step()
    for z in others:
        with pytest.raises(RuntimeError, match="modified in place since these logits were made"):
            z.materialize()


def test_logits_of_inference_mode_are_refused_after_a_write() -> None:
    with torch.inference_mode():
        for place in (0, 1):
            tensors = [torch.randn(5, 3), torch.randn(7, 3)]
            lazy = ll.linear(*tensors)
            assert lazy.materialize().shape == (5, 7)
            tensors[place][2, 1] += 1
            with pytest.raises(RuntimeError, match="modified in place since these logits were made"):
                lazy.materialize()


def test_a_write_to_what_was_computed_of_logits_is_a_write_to_them() -> None:
    lazy, _, _ = made()
    lazy = lazy.detach()
    position = lazy[:, -1]
    with pytest.raises(TypeError, match="of which a class or a position was computed are written into"):
        lazy.mul_(2)
    position.zero_()
    with pytest.raises(RuntimeError, match="written into through another view"):
        lazy.materialize()


def test_an_alias_is_not_left_behind_by_a_write() -> None:
    lazy, _, _ = made()
    for z in (lazy, lazy.log_softmax(-1), lazy.diagonal()):
        for name in ("__isub__", "__ipow__", "__ifloordiv__", "__imod__", "__itruediv__", "__imul__", "__iadd__"):
            with pytest.raises(TypeError, match=r"at .*test_lazy\.py"):
                getattr(z, name)(torch.ones(TIME, 1, dtype=torch.float64))
    with pytest.raises(TypeError, match="kron: lazy logits have no memory"):
        torch.kron(torch.ones(BATCH, 1, 1), torch.ones(1, TIME, CLASSES), out=lazy.detach())


def test_their_gradient_is_passed_on_and_has_no_values() -> None:
    lazy, dense, leaves = made()
    loss, expected = (F.cross_entropy(z.view(-1, CLASSES), INDEX.view(-1)) for z in (lazy, dense))
    (gradient,) = torch.autograd.grad(loss, lazy, retain_graph=True)
    with pytest.raises(TypeError, match="differentiate with respect to"):
        gradient.norm()
    wanted = torch.autograd.grad(3 * expected, leaves)
    for mine, theirs in zip(torch.autograd.grad(lazy, leaves, 3 * gradient), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_saved_row_takes_no_head_with_it() -> None:
    lazy = ll.linear(torch.ones(4, 64), torch.ones(1000, 64))
    stored = io.BytesIO()
    torch.save(lazy[:1], stored)
    assert stored.tell() < 8000
    stored.seek(0)
    torch.testing.assert_close(torch.load(stored), lazy[:1].materialize())


def test_arrays_of_them_cannot_be_written_to() -> None:
    lazy, _, _ = made()
    with pytest.warns(ll.MaterializeWarning):
        array = lazy.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(TypeError, match="no memory to share by dlpack"):
        torch.from_dlpack(lazy.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_a_head_without_classes(reduction: str) -> None:
    """As torch: the mean of no row that counts is NaN, all else 0."""
    hidden, weight, target = torch.randn(3, 4), torch.randn(0, 4).requires_grad_(), torch.full((3,), -100)
    hidden.requires_grad_()
    for logits in (hidden @ weight.T, ll.linear(hidden, weight)):
        loss = F.cross_entropy(logits, target, reduction=reduction)
        assert bool(loss.isnan().all()) if reduction == "mean" else bool((loss == 0).all())
        grads = torch.autograd.grad(loss.sum(), [hidden, weight])
        assert [tuple(grad.shape) for grad in grads] == [(3, 4), (0, 4)]
        with pytest.raises(IndexError):
            F.cross_entropy(logits, target * 0, reduction=reduction)
