"""Bad calls raise what torch raises, and name the value that is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional
from subject import IS_TORCH, F
from torch import Tensor

LOGITS = torch.linspace(-2, 2, 12).reshape(4, 3)
INDICES = torch.tensor([0, 2, 1, 0])
PROBS = torch.full((4, 3), 0.25)
SOFT = PROBS / PROBS.sum(1, keepdim=True)
BITS = torch.tensor([[1.0, 0.0, 1.0]]).expand(4, 3).contiguous()
SIGNS = torch.tensor([1, -1, 1, -1])
HIDDEN, HEAD = torch.ones(4, 2), torch.ones(3, 2)


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


# (function, arguments, keywords, what the message must contain besides torch's type)
BAD_CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "ce index too large": ("cross_entropy", (LOGITS, longs(0, 3, 1, 0)), {}, ("3", "-100")),
    "ce index negative": ("cross_entropy", (LOGITS, longs(0, -1, 1, 0)), {}, ("-1", "-100")),
    "ce index too large without reduction": (
        "cross_entropy",
        (LOGITS, longs(0, 7, 1, 0)),
        {"reduction": "none"},
        ("7",),
    ),
    "ce index too large in an image": (
        "cross_entropy",
        (torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 5)),
        {},
        ("5", "3 classes"),
    ),
    "ce batch sizes differ": ("cross_entropy", (LOGITS, longs(0, 1)), {}, ("4", "2")),
    "ce one column of indices": ("cross_entropy", (LOGITS, INDICES[:, None]), {}, ("[4, 1]",)),
    "ce spatial sizes differ": (
        "cross_entropy",
        (torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)),
        {},
        ("5", "4"),
    ),
    "ce bad reduction": ("cross_entropy", (LOGITS, INDICES), {"reduction": "average"}, ("average",)),
    "ce smoothing above 1": ("cross_entropy", (LOGITS, INDICES), {"label_smoothing": 1.5}, ("1.5",)),
    "ce weight too short": ("cross_entropy", (LOGITS, INDICES), {"weight": torch.ones(2)}, ("3", "2")),
    "ce weight two-dimensional": ("cross_entropy", (LOGITS, INDICES), {"weight": torch.ones(3, 1)}, ("[3, 1]",)),
    "ce soft target too wide": ("cross_entropy", (LOGITS, torch.ones(4, 5)), {}, ("5",)),
    "ce float indices": ("cross_entropy", (LOGITS, INDICES.float()), {}, ("Float",)),
    "ce whole-number probabilities": ("cross_entropy", (LOGITS, torch.ones(4, 3, dtype=torch.long)), {}, ("Long",)),
    "ce ignore_index with probabilities": ("cross_entropy", (LOGITS, SOFT), {"ignore_index": 1}, ("1",)),
    "ce target is a list": ("cross_entropy", (LOGITS, [0, 2, 1, 0]), {}, ("list",)),
    "ce input is a list": ("cross_entropy", ([[0.0, 1.0]], longs(0)), {}, ("list",)),
    "ce integer logits": ("cross_entropy", (LOGITS.long(), INDICES), {}, ("Long",)),
    "ce scalar input": ("cross_entropy", (torch.tensor(1.0), torch.tensor(0)), {}, ("()",)),
    "ce one row, two indices": ("cross_entropy", (LOGITS[0], longs(0, 1)), {}, ("2",)),
    "ce unknown keyword": ("cross_entropy", (LOGITS, INDICES), {"smoothing": 0.1}, ("smoothing",)),
    "nll index too large": ("nll_loss", (LOGITS, longs(0, 3, 1, 0)), {}, ("3",)),
    "nll batch sizes differ": ("nll_loss", (LOGITS, longs(0)), {}, ("4", "1")),
    "nll soft target": ("nll_loss", (LOGITS, SOFT), {}, ()),
    "nll bad reduction": ("nll_loss", (LOGITS, INDICES), {"reduction": "batchmean"}, ("batchmean",)),
    "nll weight too long": ("nll_loss", (LOGITS, INDICES), {"weight": torch.ones(4)}, ("3", "4")),
    "nll scalar input": ("nll_loss", (torch.tensor(1.0), torch.tensor(0)), {}, ()),
    "nll integer input": ("nll_loss", (LOGITS.long(), INDICES), {}, ("Long",)),
    "kl shapes do not broadcast": ("kl_div", (LOGITS, torch.ones(4, 2)), {}, ("3", "2")),
    "kl bad reduction": ("kl_div", (LOGITS, SOFT), {"reduction": "avg"}, ("avg",)),
    "kl target is a number": ("kl_div", (LOGITS, 0.5), {}, ()),
    "bce shapes differ": ("binary_cross_entropy", (PROBS, BITS[:, :2]), {}, ("[4, 3]", "[4, 2]")),
    "bce input above 1": ("binary_cross_entropy", (PROBS + 1, BITS), {}, ("1.25",)),
    "bce input below 0": ("binary_cross_entropy", (PROBS - 1, BITS), {}, ("-0.75",)),
    "bce input NaN": ("binary_cross_entropy", (PROBS * float("nan"), BITS), {}, ("NaN",)),
    "bce target above 1": ("binary_cross_entropy", (PROBS, BITS * 2), {}, ("2",)),
    "bce bad reduction": ("binary_cross_entropy", (PROBS, BITS), {"reduction": "rows"}, ("rows",)),
    "bce weight does not broadcast": ("binary_cross_entropy", (PROBS, BITS), {"weight": torch.ones(4)}, ("4",)),
    "bce integer input": ("binary_cross_entropy", (BITS.long(), BITS), {}, ()),
    "bcewl shapes differ": ("binary_cross_entropy_with_logits", (LOGITS, BITS[:2]), {}, ("[4, 3]", "[2, 3]")),
    "bcewl bad reduction": ("binary_cross_entropy_with_logits", (LOGITS, BITS), {"reduction": "x"}, ("x",)),
    "bcewl weight does not broadcast": (
        "binary_cross_entropy_with_logits",
        (LOGITS, BITS),
        {"weight": torch.ones(2)},
        ("2",),
    ),
    "bcewl pos_weight does not broadcast": (
        "binary_cross_entropy_with_logits",
        (LOGITS, BITS),
        {"pos_weight": torch.ones(5)},
        ("5",),
    ),
    "cosine widths differ": ("cosine_similarity", (LOGITS, LOGITS[:, :2]), {}, ("3", "2")),
    "cosine dimension out of range": ("cosine_similarity", (LOGITS, LOGITS), {"dim": 2}, ("2",)),
    "cosine of whole numbers": ("cosine_similarity", (LOGITS.long(), LOGITS.long()), {}, ()),
    "embedding target of another length": ("cosine_embedding_loss", (LOGITS, LOGITS, longs(1, -1)), {}, ("2",)),
    "embedding target column": ("cosine_embedding_loss", (LOGITS, LOGITS, SIGNS[:, None]), {}, ("[4, 1]",)),
    "embedding one-dimensional target for one vector": (
        "cosine_embedding_loss",
        (LOGITS[0], LOGITS[0], SIGNS[:1]),
        {},
        ("1",),
    ),
    "embedding three-dimensional input": ("cosine_embedding_loss", (LOGITS[None], LOGITS[None], SIGNS), {}, ()),
    "embedding bad reduction": ("cosine_embedding_loss", (LOGITS, LOGITS, SIGNS), {"reduction": "most"}, ("most",)),
    "embedding widths differ": ("cosine_embedding_loss", (LOGITS, LOGITS[:, :2], SIGNS), {}, ("3", "2")),
    "linear three-dimensional input": ("linear_cross_entropy", (HIDDEN[None], HEAD, INDICES), {}, ("3",)),
    "linear widths differ": ("linear_cross_entropy", (HIDDEN, HEAD[:, :1], INDICES), {}, ("2", "1")),
    "linear index too large": ("linear_cross_entropy", (HIDDEN, HEAD, longs(0, 3, 1, 0)), {}, ("3",)),
    "linear bias too long": (
        "linear_cross_entropy",
        (HIDDEN, HEAD, INDICES),
        {"linear_bias": torch.ones(4)},
        ("(3,)", "(4,)"),
    ),
    "linear one-dimensional weight": ("linear_cross_entropy", (HIDDEN, HEAD[0], INDICES), {}, ("1",)),
    "linear bad reduction": ("linear_cross_entropy", (HIDDEN, HEAD, INDICES), {"reduction": "batch"}, ("batch",)),
    "linear batch sizes differ": ("linear_cross_entropy", (HIDDEN, HEAD, longs(0, 1)), {}, ("4", "2")),
}


def raised(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception:
    try:
        function(*args, **kwargs)
    except Exception as error:  # the type is what is compared
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.filterwarnings("ignore:kl_div. input:UserWarning")  # unequal shapes warn before they raise
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_what_torch_raises(case: str) -> None:
    name, args, kwargs, needles = BAD_CALLS[case]
    theirs = raised(getattr(torch.nn.functional, name), args, kwargs)
    ours = raised(getattr(F, name), args, kwargs)
    assert isinstance(ours, type(theirs)), f"torch raises {theirs!r}, this raised {ours!r}"
    if IS_TORCH:
        return
    message = str(ours)
    for needle in needles:
        # dtype names may be torch's ("Long") or the dtype's own ("int64")
        alternatives = {"Long": ("Long", "int64"), "Float": ("Float", "float32")}.get(needle, (needle,))
        spelled = [a.replace("[", "(").replace("]", ")") for a in alternatives]
        assert any(a in message for a in (*alternatives, *spelled)), f"{needle!r} is not in {message!r}"


def test_an_out_of_range_index_is_named_in_full() -> None:
    """The value, its position, how many classes there are, and ignore_index."""
    if IS_TORCH:
        return
    target = torch.zeros(2, 5, dtype=torch.long)
    target[1, 3] = 9
    with pytest.raises(IndexError) as caught:
        F.cross_entropy(torch.zeros(2, 4, 5), target, ignore_index=-7)
    for part in ("9", "(1, 3)", "4 classes", "-7"):
        assert part in str(caught.value)


# What torch lets pass or refuses although it should not; ours differs on purpose (docs/numerics.md).
def test_negative_label_smoothing_is_refused() -> None:
    """A32: torch computes with it silently."""
    assert torch.nn.functional.cross_entropy(LOGITS, INDICES, label_smoothing=-0.1).isfinite()
    if not IS_TORCH:
        with pytest.raises(RuntimeError, match=r"-0\.1"):
            F.cross_entropy(LOGITS, INDICES, label_smoothing=-0.1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_every_integer_dtype_is_a_class_index(name: str, dtype: torch.dtype) -> None:
    """A20: torch refuses int32 ("expected target dtype to be Long or Byte, but got Int")."""
    function = getattr(torch.nn.functional, name)
    expected = function(LOGITS, INDICES)
    if dtype != torch.uint8:
        with pytest.raises(RuntimeError, match="Long or Byte"):
            function(LOGITS, INDICES.to(dtype))
    if not IS_TORCH:
        torch.testing.assert_close(getattr(F, name)(LOGITS, INDICES.to(dtype)), expected)
        ignored = INDICES.to(dtype).clone()
        ignored[0] = 100 if dtype == torch.uint8 else -100
        index = int(ignored[0])
        kept = function(LOGITS[1:], INDICES[1:])
        torch.testing.assert_close(getattr(F, name)(LOGITS, ignored, ignore_index=index), kept)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_binary_targets_of_whole_numbers(dtype: torch.dtype) -> None:
    """B10: torch's binary_cross_entropy refuses them."""
    with pytest.raises(RuntimeError):
        torch.nn.functional.binary_cross_entropy(PROBS, BITS.to(dtype))
    if not IS_TORCH:
        expected = torch.nn.functional.binary_cross_entropy(PROBS, BITS)
        torch.testing.assert_close(F.binary_cross_entropy(PROBS, BITS.to(dtype)), expected)
