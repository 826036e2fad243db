"""torch's OpInfo samples: values, gradients, layouts, gradcheck and gradgradcheck of every loss, in four dtypes."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from subject import IS_TORCH, OPS, function_of, op_samples
from torch import Tensor
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_flatten, tree_unflatten

from oracles import assert_no_worse, nudge, seeded_upstream

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)

# torch's chunked linear_cross_entropy has no second derivative and no forward mode; the plain one on the same
# samples has, so its entries are checked to that order wherever ours are.
ORDER_TWO = [name for name in OPS if "chunked" not in name]

# Samples that torch itself answers with a defect, and what is checked instead. Each is listed in docs/numerics.md.
TORCH_CRASHES_ON_NONCONTIGUOUS = {
    # A23 (#175084): "grad_input must be contiguous" in NLL's backward; our gradient is held to the contiguous truth.
    "nll_loss",
    "cross_entropy",
}


def numbered(names: list[str], dtypes: tuple[torch.dtype, ...]) -> Iterator[Any]:
    for name in names:
        for dtype in dtypes:
            for index in range(len(op_samples(name, dtype))):
                yield pytest.param(name, dtype, index, id=f"{name}-{str(dtype).removeprefix('torch.')}-{index}")


def flat(sample: Any) -> tuple[list[Any], Any]:
    return tree_flatten((sample.input, sample.args, sample.kwargs))


def call(function: Callable[..., Any], spec: Any, parts: list[Any]) -> Any:
    first, args, kwargs = tree_unflatten(parts, spec)
    with warnings.catch_warnings():
        # The default reduction of kl_div warns in torch and here; so do chunking options that do not apply.
        warnings.filterwarnings("ignore", message="reduction: 'mean' divides the total loss", category=UserWarning)
        warnings.filterwarnings("ignore", message="linear_cross_entropy: ", category=UserWarning)
        return function(first, *args, **kwargs)


def is_float(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def differentiable(name: str, parts: list[Any], spec: Any) -> list[int]:
    """The positions of the tensors that torch differentiates: class weights, weight and pos_weight are not."""
    tree = tree_unflatten(list(range(len(parts))), spec)
    skipped = {tree_flatten(v)[0][0] for k, v in tree[2].items() if k in ("weight", "pos_weight")}
    if name == "binary_cross_entropy":
        skipped.update(tree[1][1:])
    return [i for i, part in enumerate(parts) if is_float(part) and i not in skipped]


def value_and_gradients(
    function: Callable[..., Tensor], spec: Any, parts: list[Any], positions: list[int]
) -> tuple[Tensor, list[Tensor]]:
    parts = list(parts)
    for i in positions:
        parts[i] = parts[i].detach().requires_grad_()
    out = call(function, spec, parts)
    if not out.requires_grad:
        raise AssertionError("the output does not ask for a gradient")
    inputs = [parts[i] for i in positions]
    found = torch.autograd.grad(out, inputs, seeded_upstream(3)(0, out), allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def as_float64(parts: list[Any]) -> list[Any]:
    """The truth is computed whole: chunking options would also fix the dtype it accumulates in."""
    whole = [None if isinstance(p, torch.nn.LinearCrossEntropyOptions) else p for p in parts]
    return [p.double() if is_float(p) else p for p in whole]


def check(name: str, parts: list[Any], spec: Any, arrange: Callable[[Any], Any]) -> None:
    """Value and gradients, in one layout, are as near to torch's in float64 as torch's own are."""
    positions = differentiable(name, parts, spec)
    dtype = parts[0].dtype
    whole = as_float64(parts)
    nudged = [nudge(p, dtype) if i in positions else p for i, p in enumerate(whole)]
    reference = OPS[name].op
    upstream = float(seeded_upstream(3)(0, call(reference, spec, whole)).norm())
    true, true_grads = value_and_gradients(reference, spec, whole, positions)
    moved, moved_grads = value_and_gradients(reference, spec, nudged, positions)
    naive, naive_grads = value_and_gradients(reference, spec, parts, positions)
    out, grads = value_and_gradients(function_of(name), spec, [arrange(p) for p in parts], positions)
    assert out.dtype == naive.dtype
    assert_no_worse(out, true, naive, "value", moved)
    for i, grad, *truths in zip(positions, grads, true_grads, naive_grads, moved_grads, strict=True):
        assert grad.dtype == truths[1].dtype
        floor = upstream * size_of_terms(name, whole, i)
        assert_no_worse(grad, truths[0], truths[1], f"gradient of argument {i}", truths[2], floor)


def size_of_terms(name: str, parts: list[Any], i: int) -> float:
    """The size of the terms of a gradient whose exact sum may be 0."""
    if name == "cosine_similarity":  # the difference of two vectors of length 1 / |x|, equal in one dimension
        length = float(parts[i].norm())
        return 1 / length if length else 0.0
    if (
        name.startswith("linear") and i == 0
    ):  # (p - onehot) @ weight, with p's sum 1: 0 where all rows of the weight are equal
        return float(parts[1].norm()) if is_expanded(parts[1]) else 0.0
    return 0.0


def is_expanded(tensor: Tensor) -> bool:
    return bool((tensor == tensor[:1]).all())


def judge(name: str, dtype: torch.dtype, index: int, layout: Callable[[Tensor], Tensor]) -> None:
    parts, spec = flat(op_samples(name, dtype)[index])
    check(name, parts, spec, lambda p: layout(p) if isinstance(p, Tensor) else p)


@pytest.mark.parametrize(("name", "dtype", "index"), list(numbered(list(OPS), DTYPES)))
def test_values_and_gradients_on_torchs_samples(name: str, dtype: torch.dtype, index: int) -> None:
    judge(name, dtype, index, lambda t: t)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else transposed(t)


def offset(t: Tensor) -> Tensor:
    """The same numbers one element into a larger buffer."""
    buffer = torch.zeros(t.numel() + 3, dtype=t.dtype)
    buffer[1 : 1 + t.numel()] = t.flatten()
    return buffer[1 : 1 + t.numel()].view(t.shape)


LAYOUTS = {"strided": noncontiguous_like, "transposed": transposed, "channels_last": channels_last, "offset": offset}


def arranged() -> Iterator[Any]:
    """Every sample in every layout; the many samples of linear_cross_entropy take the layouts in turn."""
    for case in numbered(list(OPS), (torch.float64,)):
        name, _, index = case.values
        names = list(LAYOUTS)
        for layout in [names[index % len(names)]] if name.startswith("linear") else names:
            yield pytest.param(*case.values, layout, id=f"{case.id}-{layout}")


@pytest.mark.parametrize(("name", "dtype", "index", "layout"), list(arranged()))
def test_the_layout_changes_nothing(name: str, dtype: torch.dtype, index: int, layout: str) -> None:
    if IS_TORCH and name in TORCH_CRASHES_ON_NONCONTIGUOUS:
        try:
            judge(name, dtype, index, LAYOUTS[layout])
        except RuntimeError as error:
            assert "must be contiguous" in str(error)  # noqa: PT017 (the defect may or may not show by sample)
        return
    judge(name, dtype, index, LAYOUTS[layout])


@pytest.mark.parametrize(("name", "dtype", "index"), list(numbered(list(OPS), (torch.float64,))))
def test_expanded_inputs(name: str, dtype: torch.dtype, index: int) -> None:
    """Stride 0: each tensor's first slice, expanded, against the same numbers laid out in full."""
    parts, spec = flat(op_samples(name, dtype)[index])

    def expand(t: Any) -> Any:
        return t[:1].expand_as(t) if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] > 0 else t

    full = [p.contiguous() if isinstance(p, Tensor) else p for p in map(expand, parts)]
    check(name, full, spec, expand)


@pytest.mark.parametrize(("name", "dtype", "index"), list(numbered(["cosine_embedding_loss"], INTEGERS)))
def test_integer_samples(name: str, dtype: torch.dtype, index: int) -> None:
    """torch takes whole numbers for the cosine embedding loss."""
    parts, spec = flat(op_samples(name, dtype)[index])
    expected = call(OPS[name].op, spec, parts)
    torch.testing.assert_close(call(function_of(name), spec, parts), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("name", "dtype", "index"), list(numbered(list(OPS), (torch.float64,))))
def test_gradcheck(name: str, dtype: torch.dtype, index: int) -> None:
    """Reverse mode, batched over upstream gradients, and for the plain losses forward mode too."""
    fn, inputs = scalar_problem(name, dtype, index)
    second = name in ORDER_TWO
    with warnings.catch_warnings():
        ignore_torchs_own_noise()
        assert torch.autograd.gradcheck(
            fn,
            inputs,
            check_forward_ad=second,
            check_batched_grad=second,
            check_batched_forward_grad=second,
            check_undefined_grad=True,
        )


@pytest.mark.parametrize(("name", "dtype", "index"), list(numbered(ORDER_TWO, (torch.float64,))))
def test_gradgradcheck(name: str, dtype: torch.dtype, index: int) -> None:
    """Second order, reverse over reverse and forward over reverse."""
    fn, inputs = scalar_problem(name, dtype, index)
    with warnings.catch_warnings():
        ignore_torchs_own_noise()
        assert torch.autograd.gradgradcheck(
            fn,
            inputs,
            gen_non_contig_grad_outputs=True,
            check_fwd_over_rev=True,
            fast_mode=sum(t.numel() for t in inputs) > 60,
        )


def scalar_problem(name: str, dtype: torch.dtype, index: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    parts, spec = flat(op_samples(name, dtype)[index])
    positions = differentiable(name, parts, spec)

    def fn(*inputs: Tensor) -> Tensor:
        filled = list(parts)
        for i, tensor in zip(positions, inputs, strict=True):
            filled[i] = tensor
        return call(function_of(name), spec, filled)

    return fn, tuple(parts[i].detach().clone().requires_grad_() for i in positions)


def ignore_torchs_own_noise() -> None:
    """vmap's fallback says it is slow; forward mode loads decompositions that torch still scripts."""
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="reduction: 'mean' divides the total loss", category=UserWarning)
    warnings.filterwarnings("ignore", message="linear_cross_entropy: ", category=UserWarning)


ERRORS = [
    pytest.param(name, index, id=f"{name}-{index}")
    for name, op in OPS.items()
    if op.error_inputs_func is not None
    for index in range(len(list(op.error_inputs("cpu"))))
]


@pytest.mark.parametrize(("name", "index"), ERRORS)
def test_error_inputs(name: str, index: int) -> None:
    error = list(OPS[name].error_inputs("cpu"))[index]
    sample = error.sample_input
    with pytest.raises(error.error_type, match=error.error_regex):
        function_of(name)(sample.input, *sample.args, **sample.kwargs)
