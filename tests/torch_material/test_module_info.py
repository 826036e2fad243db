"""torch's ModuleInfo inputs: values against torch's modules and reference functions, gradients, errors, pickling."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from subject import MODULE_INFOS, module_samples, nn
from torch import Tensor
from torch.testing._internal.common_modules import ModuleErrorEnum
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_map

from oracles import assert_no_worse, nudge, seeded_upstream

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    # KLDivLoss's default reduction warns in torch and here; so do chunking options that do not apply to a sample.
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. :UserWarning"),
    # torch's own pattern for one message holds an unescaped bracket; its scalar reference converts tensors one by one.
    pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
    # Forward mode loads decompositions that torch still scripts; vmap says where it falls back to a loop.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
]


def numbered(
    dtypes: tuple[torch.dtype, ...], keep: Callable[[str, Any], bool] = lambda name, sample: True
) -> Iterator[Any]:
    for name in MODULE_INFOS:
        for dtype in dtypes:
            for index, sample in enumerate(module_samples(name, dtype)):
                if keep(name, sample):
                    yield pytest.param(name, dtype, index, id=f"{name}-{str(dtype).removeprefix('torch.')}-{index}")


def thinned(name: str, sample: Any) -> bool:
    """All samples but LinearCrossEntropyLoss's chunked and out-of-range ones, which multiply the same few paths."""
    given = sample.constructor_input.kwargs
    return name != "LinearCrossEntropyLoss" or (given["options"] is None and given["ignore_index"] in (None, 1))


def build(namespace: Any, name: str, sample: Any, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The module with the sample's own parameters; in another dtype, everything is cast."""
    torch.manual_seed(11)
    given = sample.constructor_input
    module = getattr(namespace, name)(*given.args, **given.kwargs)
    return module if dtype is None else copy.deepcopy(module).to(dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, value)


def run(
    module: torch.nn.Module, inputs: tuple[Any, ...], layout: Callable[[Tensor], Tensor] = lambda t: t
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of every floating input but a target, and of every parameter."""
    arranged = [layout(t.detach()) for t in inputs]
    given = [
        t.detach().requires_grad_() if i < len(inputs) - 1 and t.is_floating_point() else t
        for i, t in enumerate(arranged)
    ]
    wanted = [t for t in given if t.requires_grad] + list(module.parameters())
    out = module(*given)
    grads = torch.autograd.grad(out, wanted, seeded_upstream(3)(0, out), allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


def judge(name: str, dtype: torch.dtype, index: int, layout: Callable[[Tensor], Tensor]) -> None:
    sample = module_samples(name, dtype)[index]
    inputs = sample.forward_input.args
    assert not sample.forward_input.kwargs
    whole = build(torch.nn, name, sample)
    if hasattr(whole, "options"):
        whole.options = None  # the truth is computed whole: chunking would fix the dtype it accumulates in
    whole, exact = whole.to(torch.float64), cast(inputs, torch.float64)
    true, true_grads = run(whole, exact)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(nudge(parameter, dtype))
    moved, moved_grads = run(whole, (*(nudge(t, dtype) for t in exact[:-1]), exact[-1]))
    naive, naive_grads = run(build(torch.nn, name, sample), inputs)
    out, grads = run(build(nn, name, sample), inputs, layout)
    assert out.dtype == naive.dtype
    assert_no_worse(out, true, naive, "value", moved)
    for i, (grad, *truths) in enumerate(zip(grads, true_grads, naive_grads, moved_grads, strict=True)):
        assert grad.dtype == truths[1].dtype
        assert_no_worse(grad, truths[0], truths[1], f"gradient {i}", truths[2])


def every_sample() -> Iterator[Any]:
    """Every sample in float64, and in the other dtypes all but the repetitive ones."""
    yield from numbered(DTYPES[:1])
    yield from numbered(DTYPES[1:], thinned)


@pytest.mark.parametrize(("name", "dtype", "index"), list(every_sample()))
def test_values_and_gradients_on_torchs_inputs(name: str, dtype: torch.dtype, index: int) -> None:
    judge(name, dtype, index, lambda t: t)


@pytest.mark.parametrize(
    ("name", "dtype", "index"),
    # torch's own NLL backward refuses these layouts (#175084), so the truth is the contiguous one
    list(numbered((torch.float64,), lambda name, sample: name != "LinearCrossEntropyLoss")),
)
def test_noncontiguous_inputs(name: str, dtype: torch.dtype, index: int) -> None:
    judge(name, dtype, index, noncontiguous_like)


@pytest.mark.parametrize(
    ("name", "dtype", "index"),
    list(
        numbered(
            (torch.float64, torch.float32),
            lambda name, sample: sample.reference_fn is not None and thinned(name, sample),
        )
    ),
)
def test_torchs_reference_functions(name: str, dtype: torch.dtype, index: int) -> None:
    sample = module_samples(name, dtype)[index]
    module = build(nn, name, sample)
    inputs = sample.forward_input.args
    with torch.no_grad():
        expected = sample.reference_fn(module, *inputs)
    rtol = {torch.float64: 1e-7, torch.float32: 1.3e-6}[dtype]
    # torch.testing's own tolerances for these dtypes, doubled for float32 as the reference is itself float32
    torch.testing.assert_close(
        module(*inputs),
        expected,
        rtol=2 * rtol,
        atol=2e-5 if dtype == torch.float32 else 1e-7,
        equal_nan=True,
        check_dtype=False,
    )


@pytest.mark.parametrize(("name", "dtype", "index"), list(numbered((torch.float64,), thinned)))
def test_gradcheck_and_gradgradcheck(name: str, dtype: torch.dtype, index: int) -> None:
    sample = module_samples(name, dtype)[index]
    module = build(nn, name, sample)
    inputs = sample.forward_input.args
    if name == "KLDivLoss":  # most of torch's samples are NaN, logarithms of negative numbers (#115588): no derivative
        positive = [t.nan_to_num(nan=-1.0).abs() + 0.1 for t in inputs]
        inputs = (positive[0].log(), positive[1].log() if module.log_target else positive[1])
    smooth = inputs[:-1]

    def fn(*tensors: Tensor) -> Tensor:
        parameters = dict(zip(dict(module.named_parameters()), tensors[len(smooth) :], strict=True))
        return torch.func.functional_call(module, parameters, (*tensors[: len(smooth)], inputs[-1]))

    given = tuple(t.detach().clone().requires_grad_() for t in (*smooth, *module.parameters()))
    large = sum(t.numel() for t in given) > 60
    assert torch.autograd.gradcheck(fn, given, check_forward_ad=True, fast_mode=large)
    assert torch.autograd.gradgradcheck(fn, given, check_fwd_over_rev=True, fast_mode=large)


ERRORS = [
    pytest.param(name, dtype, index, id=f"{name}-{str(dtype).removeprefix('torch.')}-{index}")
    for name, info in MODULE_INFOS.items()
    if info.module_error_inputs_func is not None
    for dtype in (torch.float64, torch.float32)
    for index in range(len(info.module_error_inputs_func(info, "cpu", dtype, False, True)))
]


@pytest.mark.parametrize(("name", "dtype", "index"), ERRORS)
def test_error_inputs(name: str, dtype: torch.dtype, index: int) -> None:
    """torch's own bad inputs raise torch's exception types with messages its own tests accept."""
    info = MODULE_INFOS[name]
    error = info.module_error_inputs_func(info, "cpu", dtype, False, True)[index]
    given, fed = error.module_error_input.constructor_input, error.module_error_input.forward_input
    make = getattr(nn, name)
    if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            make(*given.args, **given.kwargs)
        return
    module = make(*given.args, **given.kwargs)
    with pytest.raises(error.error_type, match=error.error_regex):
        module(*fed.args, **fed.kwargs)


@pytest.mark.parametrize("name", list(MODULE_INFOS))
def test_pickle_deepcopy_state_dict_and_repr(name: str) -> None:
    for sample in module_samples(name, torch.float32):
        ours, theirs = build(nn, name, sample), build(torch.nn, name, sample)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        inputs = sample.forward_input.args
        expected = ours(*inputs)
        restored = pickle.loads(pickle.dumps(ours))
        for other in (restored, copy.deepcopy(ours)):
            assert type(other) is type(ours)
            assert torch.equal(other(*inputs).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", list(MODULE_INFOS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(name: str, dtype: torch.dtype) -> None:
    sample = module_samples(name, torch.float32)[-1]
    ours, theirs = (build(namespace, name, sample).to(dtype) for namespace in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    inputs = cast(sample.forward_input.args, dtype)
    out, expected = ours(*inputs), theirs(*inputs)
    assert out.dtype == expected.dtype
    assert_no_worse(out, theirs.to(torch.float64)(*cast(inputs, torch.float64)), expected)
