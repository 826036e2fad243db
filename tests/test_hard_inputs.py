"""Hard inputs, for every function: see `hard_inputs`. `fuzz_losses.py` draws a hundred thousand of them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fuzz_losses
import logitless as ll
import logitless.functional as LF
from hard_inputs import FUNCTIONS, Case, WrongError, draw


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of small tensors two threads take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(name: str) -> st.SearchStrategy[Case]:
    """Return hard inputs of a function; hypothesis shrinks each choice towards the first of its options."""
    return st.composite(lambda pick: draw(lambda options: pick(st.sampled_from(options)), name))()


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_is_torch_in_float64(name: str, data: st.DataObject) -> None:
    data.draw(cases(name)).check()


def test_a_wrong_value_and_a_wrong_gradient_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """What the comparison lets pass would make it worthless."""
    z = torch.linspace(-1, 1, 12).view(3, 4)

    def case(ours: Callable[[Tensor], Tensor], way: str = "gradient") -> Case:
        return Case("entropy", "", (z,), ours, lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1), way, 2e-5)

    case(ll.entropy).check()
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "value": lambda z: ll.entropy(z) * 1.0001,
        "gradient": lambda z: ll.entropy(z) + 1e-3 * (z - z.detach()).sum(-1),
        "shape": lambda z: ll.entropy(z).unsqueeze(0),
        "NaN": lambda z: ll.entropy(z) * torch.tensor([1.0, torch.nan, 1.0]),
    }
    for ours in wrong.values():
        for way in ("gradient", "batched", "graph"):
            with pytest.raises(WrongError):
                case(ours, way).check()
    for way in ("make_fx", "no gradient"):
        with pytest.raises(WrongError):
            case(wrong["value"], way).check()
    assert fuzz_losses.main(40, 1) == 0
    assert "wrong, seed 1" in capsys.readouterr().out


NESTED = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged)
TARGET = torch.tensor([0, 1])
CALLS: dict[str, Callable[[Any], Any]] = {
    "cross_entropy": lambda x: LF.cross_entropy(x, TARGET),
    "nll_loss": lambda x: LF.nll_loss(x, TARGET),
    "kl_div": lambda x: LF.kl_div(x, x, reduction="sum"),
    "binary_cross_entropy": lambda x: LF.binary_cross_entropy(x, x),
    "binary_cross_entropy_with_logits": lambda x: LF.binary_cross_entropy_with_logits(x, x),
    "cosine_similarity": lambda x: LF.cosine_similarity(x, x),
    "cosine_embedding_loss": lambda x: LF.cosine_embedding_loss(x, x, TARGET),
    "linear": lambda x: ll.linear(x, torch.ones(3, 4)),
    "token_stats": lambda x: ll.token_stats(x, TARGET),
    "pair_stats": lambda x: ll.pair_stats(x, x),
    "entropy": ll.entropy,
    "kl": lambda x: ll.kl(x, x),
    "js": lambda x: ll.js(x, x),
    "tv": lambda x: ll.tv(x, x),
    "log_probs": lambda x: ll.log_probs(x, TARGET),
    "pairwise_cosine": lambda x: ll.pairwise_cosine(x, x),
    "info_nce": lambda x: ll.info_nce(x, x, temperature=0.5),
    "clip_loss": lambda x: ll.clip_loss(x, x, 2.0),
    "siglip_loss": lambda x: ll.siglip_loss(x, x, 2.0),
    "supcon_loss": lambda x: ll.supcon_loss(x, TARGET),
    "cosent_loss": lambda x: ll.cosent_loss((x, x), TARGET),
    "batch_triplet_loss": lambda x: ll.batch_triplet_loss(x, TARGET),
}


@pytest.mark.parametrize("name", CALLS)
def test_nested_and_masked_tensors_are_refused_in_one_way(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: argument '\w+' must not be a nested tensor"):
        CALLS[name](NESTED)
    with pytest.warns(UserWarning, match="prototype"):
        masked = torch.masked.masked_tensor(torch.ones(2, 4), torch.eye(2, 4).bool())
    with pytest.raises(TypeError, match=rf"{name}: argument '\w+' must not be a MaskedTensor"):
        CALLS[name](masked)


def test_a_head_on_two_devices() -> None:
    hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
    with pytest.raises(RuntimeError, match=r"hidden on cpu and weight on meta; use weight.to\(hidden.device\)"):
        LF.linear_cross_entropy(hidden, weight.to("meta"), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="hidden on cpu and bias on meta"):
        ll.linear(hidden, weight, torch.ones(5, device="meta"))


def test_one_number_as_a_bias() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    for bias in (torch.tensor(2.0), torch.tensor([2.0])):
        given_bias = bias.requires_grad_()
        logits = ll.linear(hidden, weight, given_bias)
        torch.testing.assert_close(logits.materialize(), torch.nn.functional.linear(hidden, weight, bias))
        (grad,) = torch.autograd.grad(logits.logsumexp(-1).sum(), given_bias)
        torch.testing.assert_close(grad, torch.full_like(bias, 3.0))
    with pytest.raises(TypeError, match="bias must be Tensor or None, not float"):
        ll.linear(hidden, weight, 2.0)  # type: ignore[arg-type]


def test_lazy_logits_of_one_row() -> None:
    hidden, weight = torch.randn(4), torch.randn(5, 4)
    dense, lazy = weight @ hidden, ll.linear(hidden, weight)
    for dim in (0, -1):
        for found, expected in zip(lazy.max(dim), dense.max(dim), strict=True):
            torch.testing.assert_close(found, expected)
        assert lazy.argmax(dim) == dense.argmax(dim)
        torch.testing.assert_close(lazy.logsumexp(dim), dense.logsumexp(dim))


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of forward mode
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_targets_under_transforms(layout: torch.layout) -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    target = torch.eye(4, 5)
    sparse = target.to_sparse(layout=layout)

    def loss(hidden: Tensor) -> Tensor:
        return LF.binary_cross_entropy_with_logits(ll.linear(hidden, weight), sparse)

    def dense(hidden: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(hidden @ weight.T, target)

    torch.testing.assert_close(torch.func.grad(loss)(hidden), torch.func.grad(dense)(hidden))
    torch.testing.assert_close(torch.func.hessian(loss)(hidden), torch.func.hessian(dense)(hidden))
    for mine, expected in zip(
        torch.func.jvp(loss, (hidden,), (hidden,)), torch.func.jvp(dense, (hidden,), (hidden,)), strict=True
    ):
        torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(torch.vmap(loss)(hidden.expand(2, 4, 3)), dense(hidden).expand(2))


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_one_row_with_a_weight_in_a_graph(name: str) -> None:
    call = getattr(LF, name)
    graph = torch.compile(call, backend="aot_eager", fullgraph=True)
    given = torch.randn(7), torch.tensor(2), torch.rand(7) + 0.1
    for options in ({}, {"reduction": "none"}, {"reduction": "sum"}):
        torch.testing.assert_close(graph(*given, **options), call(*given, **options))
