"""The seam: any backend fits it, and none is waited for.

A backend that no file of the package knows, made of the reference's kernels and counting its calls, serves losses and
measures eagerly, in compiled graphs and through lazy heads. It reads no value on the host, as a device's would not.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
import logitless.functional as LF
from logitless._heads.work import ClassLists
from logitless._rules import dispatch
from logitless.kernels import reference

KERNELS = (
    *("row_stats", "row_grad", "pair_row_stats", "pair_row_grad", "elements", "elements_sum", "elements_grad"),
    *("cosine_similarity", "cosine_similarity_grad", "cosine_embedding", "cosine_embedding_grad"),
)
ROWS, CLASSES, WIDTH = 7, 65, 5


class Counting:
    """The reference's arithmetic as the kernels of a device that is never waited for."""

    NAME = "counting"
    DEVICE_TYPES = frozenset(("cpu", "meta"))
    PLAIN = False
    READS_VALUES = False

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        value = getattr(reference, name)
        if name not in KERNELS:
            return value

        def counted(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return value(*args, **options)

        return counted

    def served(self) -> str:
        return "a test asks for it"


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    backend = Counting()
    monkeypatch.setitem(dispatch.BACKENDS, backend.NAME, backend)
    monkeypatch.setenv("LOGITLESS_BACKEND", backend.NAME)
    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


def drawn() -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    target = torch.randint(0, CLASSES, (ROWS,), generator=make)
    target[2] = -100
    return {
        "z": 3 * normal(ROWS, CLASSES),
        "y": 3 * normal(ROWS, CLASSES),
        "hidden": normal(ROWS, WIDTH),
        "head": normal(CLASSES, WIDTH),
        "bias": normal(CLASSES),
        "scale": torch.tensor(1.25),
        "target": target,
        "soft": normal(ROWS, CLASSES).softmax(1),
        "weight": normal(CLASSES).abs(),
    }


def lazy(d: dict[str, Tensor], **options: Any) -> ll.LazyLogits:
    return ll.linear(d["hidden"], d["head"], d["bias"], scale=d["scale"], **options)


# Each a loss of the drawn tensors, one value or more, and the kernels it must reach.
CALLS: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], tuple[str, ...]]] = {
    "cross_entropy": (lambda d: LF.cross_entropy(d["z"], d["target"]), ("row_stats", "row_grad")),
    "weighted and smooth": (
        lambda d: LF.cross_entropy(d["z"], d["target"], d["weight"], label_smoothing=0.1),
        ("row_stats", "row_grad"),
    ),
    "probabilities, a row": (
        lambda d: LF.cross_entropy(d["z"], d["soft"], d["weight"], reduction="none"),
        ("row_stats", "row_grad"),
    ),
    "nothing is zero": (
        lambda d: LF.cross_entropy(d["z"], torch.full((ROWS,), -100), empty="zero"),
        ("row_stats", "row_grad"),
    ),
    "nll_loss": (lambda d: LF.nll_loss(d["z"].log_softmax(1), d["target"]), ()),
    "entropy": (lambda d: ll.entropy(d["z"]), ("row_stats", "row_grad")),
    "token_stats": (lambda d: sum(ll.token_stats(d["z"], d["target"])[:3]), ("row_stats", "row_grad")),
    "kl": (lambda d: ll.kl(d["z"], d["y"]), ("pair_row_stats", "pair_row_grad")),
    "js": (lambda d: ll.js(d["z"], d["y"], reduction="mean"), ("pair_row_stats", "pair_row_grad")),
    "js of another weight": (lambda d: ll.js(d["z"], d["y"], beta=0.9), ("pair_row_stats", "pair_row_grad")),
    "skewed kl": (lambda d: ll.kl(d["z"], d["y"], skew=0.1), ("pair_row_stats", "pair_row_grad")),
    "tv": (lambda d: ll.tv(d["z"], d["y"], reduction="mean"), ("pair_row_stats", "pair_row_grad")),
    "pair_stats": (
        lambda d: sum(v for v in ll.pair_stats(d["z"], d["y"], d["target"]) if v.is_floating_point()),
        ("pair_row_stats", "pair_row_grad"),
    ),
    "kl_div": (
        lambda d: LF.kl_div(d["z"].log_softmax(1), d["soft"], reduction="batchmean"),
        ("elements_sum", "elements_grad"),
    ),
    "binary": (
        lambda d: LF.binary_cross_entropy(d["z"].sigmoid(), d["soft"], d["weight"], reduction="none"),
        ("elements", "elements_grad"),
    ),
    "binary with logits": (
        lambda d: LF.binary_cross_entropy_with_logits(d["z"], d["soft"], d["weight"], normalizer="weights"),
        ("elements_sum", "elements_grad"),
    ),
    "cosine": (lambda d: LF.cosine_similarity(d["z"], d["y"]), ("cosine_similarity", "cosine_similarity_grad")),
    "cosine embedding": (
        lambda d: LF.cosine_embedding_loss(d["z"], d["y"], d["target"] % 2 * 2 - 1, 0.1),
        ("cosine_embedding", "cosine_embedding_grad"),
    ),
    "lazy": (lambda d: LF.cross_entropy(lazy(d), d["target"]), ("row_stats", "row_grad")),
    "lazy, softcap, weighted": (
        lambda d: LF.cross_entropy(lazy(d, softcap=3.0), d["target"], d["weight"], label_smoothing=0.1),
        ("row_stats", "row_grad"),
    ),
    "lazy in cut tiles": (
        lambda d: LF.linear_cross_entropy(
            d["hidden"], d["head"], d["target"], linear_bias=d["bias"], weight=d["weight"], max_bytes=500
        ),
        ("row_stats", "row_grad"),
    ),
    "lazy in cut tiles, smooth": (
        lambda d: LF.linear_cross_entropy(d["hidden"], d["head"], d["target"], label_smoothing=0.1, max_bytes=200),
        ("row_stats", "row_grad"),
    ),
    "lazy, summed": (lambda d: LF.cross_entropy(lazy(d), d["target"], reduction="sum"), ("row_stats", "row_grad")),
    "lazy, over a number": (
        lambda d: LF.cross_entropy(lazy(d), d["target"], normalizer=7.0, empty="zero"),
        ("row_stats", "row_grad"),
    ),
    "lazy, a row": (lambda d: LF.cross_entropy(lazy(d), d["target"], reduction="none"), ("row_stats", "row_grad")),
    "lazy probabilities": (lambda d: LF.cross_entropy(lazy(d), d["soft"]), ("row_stats", "row_grad")),
    "lazy entropy": (lambda d: ll.entropy(lazy(d), reduction="mean"), ("row_stats", "row_grad")),
    "lazy token_stats": (lambda d: sum(ll.token_stats(lazy(d), d["target"])[:3]), ("row_stats", "row_grad")),
    "lazy kl": (lambda d: ll.kl(lazy(d), d["y"], reduction="sum"), ("pair_row_stats", "pair_row_grad")),
    "lazy js, a row": (lambda d: ll.js(d["y"], lazy(d)), ("pair_row_stats", "pair_row_grad")),
    "log_probs": (lambda d: ll.log_probs(d["z"], d["target"]), ("row_stats", "row_grad")),
    "log_probs at a temperature": (
        lambda d: ll.log_probs(d["z"], d["target"], temperature=0.7),
        ("row_stats", "row_grad"),
    ),
    "lazy log_probs": (lambda d: ll.log_probs(lazy(d), d["target"]), ("row_stats", "row_grad")),
    "js at a temperature": (
        lambda d: ll.js(d["z"], d["y"], beta=0.9, temperature=0.7),
        ("pair_row_stats", "pair_row_grad"),
    ),
    "lazy tv": (lambda d: ll.tv(lazy(d), d["y"], reduction="sum"), ("pair_row_stats", "pair_row_grad")),
    "lazy binary": (
        lambda d: LF.binary_cross_entropy_with_logits(lazy(d), d["soft"], pos_weight=d["weight"]),
        ("elements_sum", "elements_grad"),
    ),
    "lazy binary, sparse": (
        lambda d: LF.binary_cross_entropy_with_logits(lazy(d), (d["soft"] * (d["soft"] > 0.05)).to_sparse().coalesce()),
        ("elements_sum", "elements_grad"),
    ),
}
NOT_IN_GRAPHS = ("nll_loss", "lazy binary", "lazy binary, sparse", "nothing is zero")
READS = ("lazy binary, sparse",)  # the target is made sparse in the call itself
every_call = pytest.mark.parametrize("name", CALLS)


def results(loss: Callable[[dict[str, Tensor]], Tensor], d: dict[str, Tensor]) -> list[Tensor | None]:
    """A loss, and its gradients with random upstream gradients."""
    leaves = {k: v.clone().requires_grad_(k in ("z", "y", "hidden", "head", "bias", "scale")) for k, v in d.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    out = loss(leaves)
    upstream = torch.linspace(0.5, 2.0, max(1, out.numel()), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream, allow_unused=True)]


def assert_close(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert [value is None for value in got] == [value is None for value in expected]
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            size = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(one, other, rtol=2e-6, atol=4e-6 * size)


@every_call
def test_another_backend_serves_eager_calls(name: str, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, kernels = CALLS[name]
    d = drawn()
    got = results(loss, d)
    assert set(counting.calls) == set(kernels)
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    assert_close(got, results(loss, d))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NOT_IN_GRAPHS])
def test_another_backend_serves_compiled_graphs(name: str, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, kernels = CALLS[name]
    d = drawn()
    got = results(torch.compile(loss, fullgraph=True, backend="aot_eager"), d)
    assert set(counting.calls) == set(kernels)
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    assert_close(got, results(loss, d))


def test_a_lazy_head_takes_it(counting: Counting) -> None:
    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(WIDTH, CLASSES)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, hidden: Tensor) -> Tensor:
            return self.head(hidden)

    model, d = Tiny(), drawn()
    expected = torch.nn.functional.cross_entropy(model(d["hidden"]), d["target"])
    with ll.lazy_head(model):
        loss = torch.nn.functional.cross_entropy(model(d["hidden"]), d["target"])
        loss.backward()
    torch.testing.assert_close(loss, expected)
    assert counting.calls["row_stats"] == counting.calls["row_grad"] == 1


def test_explain_names_it_and_its_tile(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    d = drawn()
    choice = ll.explain(LF.cross_entropy, lazy(d), d["target"])
    assert (choice.backend, choice.reason) == ("counting", "a test asks for it")
    assert choice.tile == (ROWS, CLASSES)
    assert ll.backends()["counting"].available
    monkeypatch.delenv("LOGITLESS_BACKEND")
    assert ll.explain(LF.cross_entropy, lazy(d), d["target"]).backend == "cpu"
    assert ll.explain(LF.cross_entropy, d["z"], d["target"], backend="counting").backend == "counting"


class HostReadError(AssertionError):
    """A value was read on the host."""


class _NoHostCopies(TorchFunctionMode):
    """Raises where numbers of the host would be copied to a device: torch waits for that copy."""

    MAKERS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.MAKERS and made.device.type != "cpu":
            given = args[-1]
            if not isinstance(given, Tensor) or given.device != made.device:
                raise HostReadError(f"{func} copies to {made.device}")
        return made


class NoHostReads(TorchDispatchMode):
    """Raises where a device would be waited for."""

    FORBIDDEN = frozenset(
        (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.repeat_interleave.Tensor,
            torch.ops.aten._unique2.default,
            torch.ops.aten.unique_dim.default,
            torch.ops.aten.unique_consecutive.default,
            torch.ops.aten.bincount.default,
            torch.ops.aten._coalesce.default,
        )
    )

    INDEXED = frozenset(
        (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
    )

    TO_SPARSE = frozenset((torch.ops.aten._to_sparse, torch.ops.aten._to_sparse_csr))

    def __enter__(self) -> Self:
        self._copies = _NoHostCopies()
        self._copies.__enter__()
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._copies.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            raise HostReadError(f"{func} from {args[0].device} to {kwargs['device']}")
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            raise HostReadError(f"{func} from {args[1].device} to {args[0].device}")
        sized = func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        if func in self.FORBIDDEN and not sized:
            raise HostReadError(str(func))
        if func.overloadpacket in self.TO_SPARSE and args[0].layout == torch.strided:
            raise HostReadError(str(func))
        for index in args[1] if func.overloadpacket in self.INDEXED else ():
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                raise HostReadError(f"{func} with a mask")
            if isinstance(index, Tensor) and index.device != args[0].device:
                raise HostReadError(f"{func} on {args[0].device} with numbers of {index.device}")
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in READS])
def test_no_value_is_read_on_the_host(name: str, counting: Counting) -> None:
    d = drawn()
    with NoHostReads():
        got = results(CALLS[name][0], d)
    assert_close(got, results(CALLS[name][0], d))


def test_a_sparse_target_is_cut_without_reading_its_offsets() -> None:
    dense = drawn()["soft"]
    dense = dense * (dense > 0.05)
    lists = ClassLists.of(dense.to_sparse())
    places = ((0, ROWS, 0, CLASSES), (2, 5, 10, 40), (6, 7, 64, 65), (3, 3, 0, CLASSES))
    with NoHostReads():
        tiles = [lists.tile(*place, reads=False) for place in places]
    for tile, (start, stop, first, last) in zip(tiles, places, strict=True):
        assert torch.equal(tile, dense[start:stop, first:last])
        assert torch.equal(tile, lists.tile(start, stop, first, last))


@pytest.mark.parametrize("read", [Tensor.item, bool, float, int, lambda x: x.view(1).nonzero(), lambda x: x[x > 0]])
def test_the_mode_would_notice(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(HostReadError), NoHostReads():
        read(torch.ones(()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in READS])
def test_tensors_without_data_pass_through(name: str, device: str, counting: Counting) -> None:
    """Fake tensors, and tensors of another device that hold nothing: no value is asked for, and none is on the CPU."""
    d, loss = drawn(), CALLS[name][0]
    if name == "nothing is zero":
        loss = lambda d: LF.cross_entropy(d["z"], d["target"], empty="zero")  # noqa: E731 # on the tensors' own device
    expected = results(loss, d)
    with FakeTensorMode() if device == "cpu" else nullcontext():
        empty = {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in d.items()}
        got = results(loss, empty)
    assert [value is None for value in got] == [value is None for value in expected]
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, device)


def test_a_class_that_does_not_exist_makes_its_own_row_nan(counting: Counting) -> None:
    d = drawn()
    wrong = d["target"].clone()
    wrong[4] = CLASSES
    for logits in (d["z"], lazy(d)):
        got = LF.cross_entropy(logits, wrong, reduction="none")
        expected = LF.cross_entropy(logits, d["target"], reduction="none")
        assert got[4].isnan()
        assert torch.equal(got[[0, 1, 2, 3, 5, 6]], expected[[0, 1, 2, 3, 5, 6]])
