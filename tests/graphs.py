"""The graphs that torch.compile makes of a function, and the operators that are in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func


class Graphs:
    """A compiler backend that keeps the names of the operators of the graphs that it is given, forward and backward."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []

    def _keep(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.operators.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)
        return torch.compile(function, backend=backend, fullgraph=True, **options)

    @property
    def kernels(self) -> list[list[str]]:
        """Of each graph, in order, our operators alone."""
        ours = "logitless."
        return [
            [n.removeprefix(ours).removesuffix(".default") for n in g if n.startswith(ours)] for g in self.operators
        ]


def plain_graph(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call a function compiled, and see that the kernels are not in its graph."""
    graphs = Graphs()
    out: Tensor = graphs.compile(function)(*args)
    assert graphs.operators
    assert not any(graphs.kernels)
    return out
