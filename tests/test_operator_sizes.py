"""The operators that anyone can call: what does not fit the logits raises, and is not read past its end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF

operators = torch.ops.logitless
Z = torch.linspace(-2, 2, 35).view(5, 7)
Y = Z.flip(0)
H, W = Z[:, :3].contiguous(), Z.T[:, :3].contiguous()
T = torch.tensor([0, 6, 3, 2, 1])
D = torch.float64
FAMILY = ("weighted_js", 0.25)
UPSTREAM = ("kl", "reverse_kl", "js", "cross_entropy", "entropy_p", "entropy_q", "nll_p", "nll_q", "divergence_grad")
MEASURES = ("kl", "divergence", "nll_p", "nll_q")


def row_stats(**given: Any) -> Any:
    told = {"target": T, "class_weight": None, "dense_target": None, **given}
    return operators.row_stats(Z, *told.values(), 1, -100, "a", True, True, True, True, False)


def row_grad(**given: Any) -> Any:
    rows = {"row_max": Z.amax(1), "log_sum": torch.zeros(5, dtype=D), "target": T, "class_weight": None}
    rows |= {"dense_target": None, "a": torch.ones(5), "b": None, "c": None, "e": None, "f": None}
    return operators.row_grad(Z, *(rows | given).values(), 1, -100)


def pair_stats(**given: Any) -> Any:
    told = {"second": Y, "target": T, **given}
    return operators.pair_row_stats(Z, *told.values(), 1, -100, "a", True, True, True, True, True, *FAMILY)


def pair_grad(**given: Any) -> Any:
    saved = pair_stats()[-1]
    told = {"second": Y, "saved": saved, "target": T}
    told |= dict.fromkeys(UPSTREAM, torch.ones(5)) | given
    return operators.pair_row_grad(Z, *told.values(), *FAMILY, 1, -100, True, True)


def elementwise(**given: Any) -> Any:
    told = {"target": Y, "weight": None, "pos_weight": None, **given}
    return operators.elementwise(Z, *told.values(), "binary_cross_entropy_with_logits", torch.float32)


def elementwise_grad(**given: Any) -> Any:
    told = {"upstream": Z, "input": Z, "target": Y, "weight": None, "pos_weight": None, **given}
    return operators.elementwise_grad(*told.values(), "binary_cross_entropy_with_logits", False)


def cosine_grad(**given: Any) -> Any:
    told = {"upstream": torch.ones(5), "x1": Z, "x2": Y, "target": None, "saved": torch.ones(3, 5, dtype=D), **given}
    return operators.cosine_grad(*told.values(), 1, 1e-8, 0.0, False, True, True)


def head_told(**given: Any) -> list[Any]:
    told = {"hidden": H, "weight": W, "bias": None, "factor": None, "scale": 1.0, "softcap": None, "target": T}
    told |= {"probabilities": None, "class_weight": None, **given}
    return [*told.values(), -100, 0.0, torch.float32, None, "a"]


def head_loss(**given: Any) -> Any:
    return operators.head_loss(
        *head_told(**given), None, None, None, "mean", "nan", torch.float32, True, True, False, False
    )


def head_rows_grad(**given: Any) -> Any:
    logits = H @ W.T
    saved = {"row_max": logits.amax(1), "log_sum": torch.zeros(5, dtype=D), "dense_mass": torch.empty(0)}
    saved |= {"grad": torch.ones(5)}
    mine = {name: given.pop(name, value) for name, value in saved.items()}
    return operators.head_rows_grad(*head_told(**given), *mine.values(), True, True, False, False)


def measures_told(**given: Any) -> list[Any]:
    told = {"p_logits": H, "p_weight": W, "p_bias": None, "p_factor": None}
    told |= {"q_logits": Z, "q_weight": None, "q_bias": None, "q_factor": None}
    settings = [1.0, None, torch.float32] * 2
    target = given.pop("target", T)
    return [*(told | given).values(), *settings, target, -100, ",".join(MEASURES), "a", *FAMILY, 0]


def head_measures(**given: Any) -> Any:
    return operators.head_measures(*measures_told(**given), False)


def head_measures_grad(**given: Any) -> Any:
    saved = given.pop("saved", operators.head_measures(*measures_told(), True)[-1])
    upstream = {f"grad_{at}": torch.ones(5) if at < len(MEASURES) else None for at in range(9)}
    mine = {name: given.pop(name, value) for name, value in upstream.items()}
    needed = [True, True, False, False, True, False, False, False]
    return operators.head_measures_grad(*measures_told(**given), saved, *mine.values(), *needed)


def token_told(logits: Tensor, weight: Tensor | None, target: Tensor) -> list[Any]:
    settings = [1.0, None, torch.float32] * 2
    names = "nll,lse,entropy,argmax,rank,top_log_probs,top_classes"
    return [logits, weight, *[None] * 6, *settings, target, -100, names, "a", None, 0.0, 3]


def token_measures(**given: Any) -> Any:
    """Of dense logits, and of the three largest classes."""
    told = {"p_logits": Z, "p_weight": None, "target": T, **given}
    return operators.head_measures(*token_told(*told.values()), False)


def token_measures_grad(**given: Any) -> Any:
    told = {"p_logits": H, "p_weight": W, "target": T}
    saved = given.pop("saved", operators.head_measures(*token_told(*told.values()), True)[-1])
    upstream = {f"grad_{at}": torch.ones(5) if at < 3 else None for at in range(9)}
    mine = {name: given.pop(name, value) for name, value in upstream.items()}
    needed = [True, True, *[False] * 6]
    return operators.head_measures_grad(*token_told(*(told | given).values()), saved, *mine.values(), *needed)


SHORT = torch.zeros(3, dtype=torch.int64)
# Each a call and what does not fit: a tensor that is too short, or of another shape.
WRONG: dict[Callable[..., Any], dict[str, Tensor]] = {
    row_stats: {"target": SHORT, "class_weight": torch.ones(2), "dense_target": torch.ones(5, 2)},
    row_grad: {
        **{name: torch.ones(2) for name in "abcef"},
        "row_max": torch.ones(2),
        "log_sum": torch.ones(4, dtype=D),
        "target": SHORT,
        "class_weight": torch.ones(6),
        "dense_target": torch.ones(4, 7),
    },
    pair_stats: {"second": Y[:2], "target": SHORT},
    pair_grad: {
        **{name: torch.ones(1) for name in UPSTREAM},
        "second": Y[:2],
        "saved": torch.zeros(5, 1, dtype=D),
        "target": SHORT,
    },
    elementwise: {"target": Y[:1], "weight": torch.ones(6), "pos_weight": torch.ones(4, 1)},
    elementwise_grad: {"target": Y[:2], "upstream": Z[:1], "input": Z[:1]},
    cosine_grad: {"saved": torch.ones(3, 4, dtype=D), "upstream": torch.ones(3), "x1": Z[:3]},
    head_loss: {
        "hidden": H[:, :2],
        "weight": W[:, :1],
        "bias": torch.ones(2),
        "target": SHORT,
        "class_weight": torch.ones(2),
        "probabilities": torch.ones(5, 2),
    },
    head_rows_grad: {"row_max": torch.ones(2), "log_sum": torch.ones(2, dtype=D), "grad": torch.ones(1)},
    head_measures: {"p_weight": W[:2], "q_logits": Z[:2], "target": SHORT, "p_logits": H[:, :2]},
    head_measures_grad: {
        **{f"grad_{at}": torch.ones(4) for at in range(len(MEASURES))},
        "saved": torch.zeros(5, 1, dtype=D),
        "target": SHORT,
        "q_logits": Z[:2],
    },
    token_measures: {"p_logits": Z[:2], "target": SHORT},
    token_measures_grad: {
        **{f"grad_{at}": torch.ones(4) for at in range(3)},
        "saved": torch.zeros(3, 4, dtype=D),
        "target": SHORT,
        "p_weight": W[:, :2],
    },
}


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, wrong in WRONG.items() for name in wrong])
def test_raises(call: Callable[..., Any], name: str) -> None:
    call()
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size|broadcast"):
        call(**{name: WRONG[call][name]})


def test_dtypes_are_converted() -> None:
    expected = row_grad()
    assert torch.equal(row_grad(row_max=Z.amax(1).double(), log_sum=torch.zeros(5)), expected)
    assert torch.equal(row_grad(target=T.int()), expected)


def test_other_dtype_of_probabilities_raises() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        row_stats(target=None, dense_target=Z.softmax(1).double())


def test_class_dimension_that_is_none() -> None:
    with pytest.raises(IndexError, match="class_dim=2"):
        operators.row_stats(Z, T, None, None, 2, -100, "a", False, False, False, False, False)


def test_graphs_still_run() -> None:
    graph = torch.compile(
        lambda z, h, t: LF.cross_entropy(z, t, label_smoothing=0.1) + LF.cross_entropy(ll.linear(h, W), t),
        backend="aot_eager",
        fullgraph=True,
    )
    z, h = Z.clone().requires_grad_(), H.clone().requires_grad_()
    graph(z, h, T).backward()
    assert z.grad is not None
    assert h.grad is not None
