"""One line for any model: its output head gives LazyLogits, and its own loss code is left as it is."""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from contextlib import nullcontext
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from logitless._heads.window import Window
from logitless.lazy.logits import HeadLogits, LazyLogits, head_logits, linear
from logitless.lazy.proxy import MaterializeWarning
from logitless.lazy.sharding import window_of


class LazyHead:
    """What `lazy_head` changed, and the way back: `.remove()`, or leaving its `with` block."""

    def __init__(self, watch: _Watch) -> None:
        """Hold what watches the model."""
        self._watch = watch
        watch.handle = weakref.ref(self)

    def remove(self) -> None:
        """Give the head its own forward back; a second call does nothing."""
        self._watch.leave()

    def __enter__(self) -> LazyHead:
        """Return the handle."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.remove()


_watches: weakref.WeakSet[_Watch] = weakref.WeakSet()


def _tell_of_replacement(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Let a watch follow a module that is put in place of a head, before a compiled forward asks for it."""
    old = parent._modules.get(name)
    if old is None or new is old:
        return
    for watch in list(_watches):
        if watch.is_head_of(old):
            parent._modules[name] = new  # as torch does next
            watch.follow()


@functools.cache
def _hook_of_replacements() -> None:
    register_module_module_registration_hook(_tell_of_replacement)


class _Watch:
    """Follows a model's head: hooks where it is replaced, before its forward and its body's, and after both.

    The lazy layers are the head's as it is when the model runs, whatever was resized, replaced or adapted since. The
    first forward in which none of them ran warns. A copy of a model is watched by a copy of this.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.handle: Any = lambda: None
        self._model: Any = (lambda: None) if model is None else weakref.ref(model)
        self._layers: list[nn.Linear] = []
        self._hooked: list[nn.Module] = []
        self._head: nn.Module | None = None
        self._begun: set[int] = set()  # parts of the body that ran since the head last did
        self._told = False
        self.ran = False
        self._window: tuple[Any, Window | None] = (lambda: None, None)
        _hook_of_replacements()
        _watches.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        model = self._model()
        copied = None if model is None else memo.get(id(model))
        twin = _Watch(copied)
        memo[id(self)] = twin
        if copied is None:  # the head's layer alone is copied, by an adapter
            return twin
        twin._layers = copy.deepcopy(self._layers, memo)
        twin._hooked = copy.deepcopy(self._hooked, memo)
        twin._head = copy.deepcopy(self._head, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as something of Python's own that does nothing when it is called: a pickled model is not lazy."""
        return getattr, (nullcontext(), "__exit__")

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        """Be a hook before and after a module's forward."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return  # a recomputed forward may stop before the head
        model = self._model()
        if output:
            if module is self._head and not isinstance(output[0], HeadLogits):
                self._tell(f"the head, a {type(module).__name__}, computed its logits itself")
            elif module is model and not self.ran:
                self._tell(self._why())
            return
        if module is model:
            self.ran = False
        elif id(module) in self._begun:
            self._tell(self._why())
        else:
            self._begun.add(id(module))
        self.follow()

    def enter(self, head: nn.Module) -> None:
        """Begin to watch."""
        model = self._model()
        for module in (model, *_body(model, head)):
            module.register_forward_pre_hook(self)
            self._hooked.append(module)
        model.register_forward_hook(self)
        self.follow()

    def follow(self) -> None:
        """Make the layers of the model's head lazy, as it is now."""
        model = self._model()
        head = None if model is None else model.get_output_embeddings()
        layers = _linears_to_classes(head) if isinstance(head, nn.Module) else []
        if head is self._head and len(layers) == len(self._layers) and all(map(_is, layers, self._layers)):
            return
        self._release()
        self._head = head if isinstance(head, nn.Module) else None
        self._layers = [layer for layer in layers if _replaced_by(layer) is None]
        for layer in self._layers:
            setattr(layer, _forward_name(layer), MethodType(_lazy_forward, layer))
            layer._replicate_for_data_parallel = MethodType(_replica, layer)  # type: ignore[method-assign] # as forward
            layer._lazy_watch = self  # type: ignore[assignment] # any attribute
        if self._head is not None and not any(layer is self._head for layer in self._layers):
            self._head.register_forward_hook(self)

    def _release(self) -> None:
        for layer in self._layers:
            name = _forward_name(layer)
            if name == "forward":
                vars(layer).pop("forward", None)
            else:
                setattr(layer, name, MethodType(type(layer).forward, layer))
            vars(layer).pop("_lazy_watch", None)
            vars(layer).pop("_replicate_for_data_parallel", None)
        if self._head is not None:
            self._unhook(self._head)

    def _unhook(self, module: nn.Module) -> None:
        for hooks in (
            (module._forward_hooks,) if module is self._head else (module._forward_pre_hooks, module._forward_hooks)
        ):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]

    def leave(self) -> None:
        """Give every module its own forward back."""
        self._release()
        self._head, self._layers = None, []
        for module in self._hooked:
            self._unhook(module)
        self._hooked = []

    def watches(self, model: Any) -> bool:
        """Say whether it follows this model's head."""
        return self._model() is model

    def is_head_of(self, module: nn.Module) -> bool:
        """Say whether a module is the head that is followed, or holds it."""
        return self._head is not None and any(part is self._head for part in module.modules())

    def note_run(self) -> None:
        """Note that a layer of the head ran lazily."""
        self.ran = True
        self._begun.clear()

    def window(self, layer: nn.Linear) -> Window | None:
        """Return how to gather a layer's parameters again; found anew only where a wrapper put other ones there."""
        weight, window = self._window
        if weight() is not layer.weight:
            model = self._model()
            window = window_of(layer, layer if model is None else model)
            self._window = (weakref.ref(layer.weight), window)
        return window

    def _why(self) -> str:
        head = self._head
        if head is None:
            return "its get_output_embeddings() gives no module"
        if not self._layers:
            replaced = [_replaced_by(layer) for layer in _linears_to_classes(head)]
            by = f": its forward is replaced by {replaced[0]!r}" if replaced else " with no plain nn.Linear in it"
            return f"the head is a {type(head).__name__}{by}"
        if not any(layer is head for layer in self._layers):
            return f"the head, a {type(head).__name__}, computed its logits without calling its nn.Linear"
        return (
            f"the head, a {type(head).__name__}, was not called: the model, or what trains it, reads its weight itself"
        )

    def _tell(self, why: str) -> None:
        if self._told:
            return
        self._told = True
        model = self._model()
        warnings.warn(
            f"lazy_head: a forward of {type(model).__name__} ran without lazy logits, as {why}; its results are right, "
            "and its logits are built. Give hidden states and weight to logitless.linear there, or remove the handle",
            MaterializeWarning,
            stacklevel=4,
        )


def _is(one: object, other: object) -> bool:
    return one is other


def _body(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """Return the modules beside the head, and beside what holds it, that have parts: what runs before the head."""
    beside: list[nn.Module] = []
    place: nn.Module | None = model
    while place is not None and place is not head:
        inner = None
        for child in place.children():
            if child is head or any(part is head for part in child.modules()):
                inner = child
            elif next(child.children(), None) is not None:
                beside.append(child)
        place = inner
    return beside


def lazy_head(model: Any) -> LazyHead:
    """Make a model's output head return LazyLogits from now on, and return the handle that undoes it.

    Equals the model as it was: `model(input_ids, labels=labels).loss` and its gradients are the same, by the
    model's own code, without the logits. For every Hugging Face model whose `get_output_embeddings()` is an
    `nn.Linear`, also under PEFT (LoRA on the head, a trainable copy of it), and for any module of yours with that
    method.

    Args:
        model: what has `get_output_embeddings()`. Apply it before wrapping the model for several processes.

    Returns:
        LazyHead, with `.remove()`, for use in `with` too. It follows the model's head when that is resized, replaced
        or adapted. A copy of the model is lazy as well, and `lazy_head(copy)` is its handle; a pickled one loads with
        its own head, as the change is no part of the weights.

    Warns:
        MaterializeWarning: once, in the first forward that ran without lazy logits, and why.

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
        watch = vars(module).get("_lazy_watch")
        if isinstance(watch, _Watch) and watch.handle() is None and watch.watches(model):
            return LazyHead(watch)
        if _replaced_by(module) is not None:
            raise ValueError(
                f"lazy_head: the forward of the head ({type(module).__name__}) is already replaced by "
                f"{module.forward!r}; remove that first"
            )
    watch = _Watch(model)
    watch.enter(head)
    return LazyHead(watch)


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


def _replaced_by(layer: nn.Linear) -> Any:
    """Return what stands in place of a layer's own forward; None where nothing does, or a hook of accelerate's."""
    given, watch = vars(layer).get(_forward_name(layer)), vars(layer).get("_lazy_watch")
    if isinstance(watch, _Watch) and watch.watches(None):  # a copy that an adapter made of a lazy layer
        return None
    return None if given is None or getattr(given, "__func__", None) is nn.Linear.forward else given


def _lazy_forward(self: nn.Linear, input: Tensor) -> LazyLogits:
    if torch.compiler.is_exporting():  # an exported program runs where logitless is not installed
        return nn.functional.linear(input, self.weight, self.bias)  # type: ignore[return-value] # the logits
    if torch.compiler.is_compiling():
        return linear(input, self.weight, self.bias)
    watch = vars(self).get("_lazy_watch")
    if not isinstance(watch, _Watch):
        return linear(input, self.weight, self.bias)
    watch.note_run()
    return head_logits(input, self.weight, self.bias, 1.0, None, watch.window(self))


def _replica(self: nn.Linear) -> nn.Linear:
    """Return what DataParallel runs on another device: lazy too, of its own weight."""
    replica: nn.Linear = type(self)._replicate_for_data_parallel(self)
    setattr(replica, _forward_name(self), MethodType(_lazy_forward, replica))
    return replica


# A bound method pickles as its object and this name, so a pickled model loads with the class's own forward.
_lazy_forward.__name__ = "forward"
_replica.__name__ = "_replicate_for_data_parallel"
