"""One line for any model: its output head gives LazyLogits, and its own loss code is left as it is."""

from __future__ import annotations

from types import MethodType, TracebackType
from typing import Any

from torch import Tensor, nn

from logitless.lazy.logits import LazyLogits, linear


class LazyHead:
    """What `lazy_head` changed, and the way back: `.remove()`, or leaving its `with` block."""

    def __init__(self, modules: list[nn.Linear]) -> None:
        """Make each module's forward lazy."""
        self._modules = modules
        for module in modules:
            setattr(module, _forward_name(module), MethodType(_lazy_forward, module))

    def remove(self) -> None:
        """Give the head its own forward back; a second call does nothing."""
        for module in self._modules:
            name = _forward_name(module)
            if name == "forward":
                del module.forward
            else:
                setattr(module, name, MethodType(type(module).forward, module))
        self._modules = []

    def __enter__(self) -> LazyHead:
        """Return the handle."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.remove()


def lazy_head(model: Any) -> LazyHead:
    """Make a model's output head return LazyLogits from now on, and return the handle that undoes it.

    Equals the model as it was: `model(input_ids, labels=labels).loss` and its gradients are the same, by the
    model's own code, without the logits. For every Hugging Face model whose `get_output_embeddings()` is an
    `nn.Linear`, also under PEFT (LoRA on the head, a trainable copy of it), and for any module of yours with that
    method.

    Args:
        model: what has `get_output_embeddings()`. Apply it before wrapping the model for several processes.

    Returns:
        LazyHead, with `.remove()`, for use in `with` too. A copy of the model is lazy as well; a pickled one loads
        with its own head, as the change is no part of the weights.

    Raises:
        ValueError: the model has no such head, or its forward is replaced already.

    Source: the head of every causal language model in transformers 5; see docs/recipes.md. In training the logits,
    their float32 copy and their gradient, the largest tensors of a step, are gone; nothing else changes.

    >>> import torch, logitless as ll
    >>> class Tiny(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = torch.nn.Linear(4, 1000)
    ...     def get_output_embeddings(self):
    ...         return self.head
    >>> model = Tiny()
    >>> with ll.lazy_head(model):
    ...     model.head(torch.zeros(2, 4)).shape
    torch.Size([2, 1000])
    """
    find = getattr(model, "get_output_embeddings", None)
    if find is None:
        fix = "pass the model inside it, model.module" if hasattr(model, "module") else "define it to return the head"
        raise ValueError(f"lazy_head: {type(model).__name__} has no get_output_embeddings(): {fix}")
    head = find()
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"lazy_head: {type(model).__name__}.get_output_embeddings() is {head!r}: a model with a language-modelling "
            "head is needed, such as AutoModelForCausalLM makes; or give the hidden states to logitless.linear"
        )
    modules = _linears_to_classes(head)
    if not modules:
        raise ValueError(
            f"lazy_head: the head is a {type(head).__name__} with no plain nn.Linear in it: give the hidden states "
            "and the head's weight to logitless.linear"
        )
    for module in modules:
        if _forward_name(module) in vars(module) and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"lazy_head: the forward of the head ({type(module).__name__}) is already replaced by "
                f"{module.forward!r}; remove that first"
            )
    return LazyHead(modules)


def _linears_to_classes(head: nn.Module) -> list[nn.Linear]:
    """Return the head, or inside a wrapper (an adapter) every layer whose outputs are the classes."""
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear) and _is_plain(layer)]
    classes = max((layer.out_features for layer in layers), default=0)
    return [layer for layer in layers if layer.out_features == classes]


def _is_plain(layer: nn.Linear) -> bool:
    return type(layer).forward is nn.Linear.forward


def _forward_name(module: nn.Module) -> str:
    """Return where the forward is: accelerate's hooks replace it and call the one they keep."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _lazy_forward(self: nn.Linear, input: Tensor) -> LazyLogits:
    return linear(input, self.weight, self.bias)


# A bound method pickles as its object and this name, so a pickled model loads with the class's own forward.
_lazy_forward.__name__ = "forward"
