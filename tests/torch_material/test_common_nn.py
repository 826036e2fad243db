"""torch's older tables, common_nn's criterion_tests and new module tests, run by torch's own runners on our names."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subject import FUNCTIONS, MODULES, F, nn
from torch.testing._internal import common_nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
    # torch's NLL reference function converts its own losses one by one.
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
    # BCEWithLogitsLoss_legacy_enum is the sample for the deprecated spelling.
    pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning"),
]


class Runner(common_nn.NNTestCase):
    """What torch's test_nn.py supplies to the tables."""

    def runTest(self) -> None: ...

    def _forward(self, module: Any, input: Any) -> Any:
        return module(*input) if isinstance(input, tuple) else module(input)

    def _forward_criterion(self, criterion: Any, input: Any, target: Any, extra_args: Any = None) -> Any:
        inputs = input if isinstance(input, tuple) else (input,)
        return criterion(*inputs, target, *(extra_args or ()))

    def _backward(self, module: Any, input: Any, output: Any, grad_output: Any, create_graph: bool = False) -> Any:
        output.backward(grad_output, retain_graph=True, create_graph=create_graph)
        return tuple(i.grad for i in input) if isinstance(input, tuple) else input.grad

    def _zero_grad_parameters(self, module: Any) -> None:
        for parameter in module.parameters():
            parameter.grad = None

    def _get_parameters(self, module: Any) -> Any:
        return list(module.parameters()), [p.grad for p in module.parameters()]


class Overlay:
    """torch's namespace with our losses in place of torch's."""

    def __init__(self, theirs: Any, ours: Any, names: tuple[str, ...]) -> None:
        self._theirs = theirs
        self._ours = SimpleNamespace(**{name: getattr(ours, name) for name in names})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ours, name, None) or getattr(self._theirs, name)


def named(table: list[dict[str, Any]]) -> list[Any]:
    kept = [
        row
        for row in table
        if str(row.get("fullname", "")).split("_")[0].removesuffix("2d").removesuffix("Nd") in MODULES
    ]
    return [pytest.param(row, id=row["fullname"]) for row in kept]


@pytest.fixture(autouse=True)
def our_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_nn, "nn", Overlay(torch.nn, nn, MODULES))
    monkeypatch.setattr(common_nn, "F", Overlay(torch.nn.functional, F, FUNCTIONS))


@pytest.mark.parametrize("row", named(common_nn.criterion_tests))
def test_criterion(row: dict[str, Any]) -> None:
    common_nn.CriterionTest(**row)(Runner())


@pytest.mark.parametrize("row", named(common_nn.get_new_module_tests()))
def test_new_module(row: dict[str, Any]) -> None:
    with common_nn.set_default_dtype(torch.double):
        common_nn.NewModuleTest(**row)(Runner())


def test_the_tables_hold_what_is_expected() -> None:
    """A later torch that renames its entries must not empty the tests above."""
    assert len(named(common_nn.criterion_tests)) == 15
    assert len(named(common_nn.get_new_module_tests())) == 24
