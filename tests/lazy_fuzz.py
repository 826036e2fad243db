"""Calls every function of torch on lazy logits and on the tensors they stand for, and compares what came of it.

`python tests/lazy_fuzz.py` is a server: it imports torch once and forks a child that calls the functions named on its
standard input, one after another, and says what it is about to do before it does it. A child that dies or says nothing
for `HANG_SECONDS` is laid to the call it had announced, and another goes on after that call. With names of functions
as arguments (`torch.Tensor.gather`) it prints what is wrong with these.

The tensors that logits stand for are arbitrary: a head whose weight is diagonal, of powers of two, and whose hidden
states are divided by them, gives them exactly. So the arguments of torch's own samples (`OpInfo.sample_inputs`) serve,
and functions that jump (`floor`, `sign`, `==`) must agree to the last bit.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import operator
import os
import random
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import logitless as ll
from lazy_recipes import NOT_CALLED, ONLY_BY_RECIPE, OPAQUE, RECIPES, SETTINGS, by_name, by_type
from logitless.lazy import proxy
from logitless.lazy.log_probs import LazyLogProbs
from logitless.lazy.logits import LazyLogits

HANG_SECONDS = 120.0
KINDS = ("logits", "log-probabilities")
# From the best to the worst: what a function makes of lazy logits, by the arguments that serve it best.
OUTCOMES = ("lazy", "efficient", "computes", "raises")
SPACES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch.Tensor": Tensor,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
    "torch.nn.init": torch.nn.init,
}
# An error that tells a user what to do is of one of these; others are slips of ours.
MEANT_ERRORS = (TypeError, RuntimeError, ValueError, NotImplementedError, IndexError, BufferError, MemoryError)


class Arguments(NamedTuple):
    """What a function is called with; every tensor in it is replaced before each call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DifferentError(Exception):
    """Lazy logits gave something else than the tensor they stand for, and said nothing."""


def functions() -> list[str]:
    """Name every function of the namespaces, by their own lists."""
    names = []
    for space, owner in SPACES.items():
        for name in dir(owner):
            found = inspect.getattr_static(owner, name)
            if space != "torch.Tensor" and (not callable(found) or isinstance(found, type)):
                continue
            whole = f"{space}.{name}"
            if whole not in NOT_CALLED and not whole.startswith(SETTINGS) and not _is_borrowed(space, name):
                names.append(whole)
    return names


def _is_borrowed(space: str, name: str) -> bool:
    """Tell whether a module only imports the name: typing helpers, and other modules' functions."""
    if space == "torch.Tensor":
        return False
    found = getattr(SPACES[space], name)
    module = getattr(found, "__module__", None) or ""
    return name.startswith("__") or module.startswith(("typing", "math", "builtins", "torch._jit_internal", "copyreg"))


# --- arguments


def samples(name: str) -> Iterator[Arguments]:
    """Give arguments for a function: by hand, of torch's own samples, then by its schema or its signature."""
    space, _, short = name.rpartition(".")
    for args, kwargs in (
        RECIPES.get(name, RECIPES.get(short, [])) if space != "torch.nn.init" else RECIPES.get(name, [])
    ):
        yield Arguments(args, kwargs)
    if short in ONLY_BY_RECIPE:
        return
    yield from _of_opinfo(short, space)
    yield from _of_schema(short)
    yield from _of_signature(name)


@functools.cache
def _opinfos() -> dict[str, list[Any]]:
    from torch.testing._internal.common_methods_invocations import op_db

    named: dict[str, list[Any]] = {}
    for op in op_db:
        for known in (op.name, *(alias.name for alias in op.aliases)):
            named.setdefault(known, []).append(op)
            if "." in known:
                named.setdefault(known.rpartition(".")[2], []).append(op)
    return named


def _infos(short: str, space: str) -> list[Any]:
    named = _opinfos()
    prefix = {"torch.nn.functional": "nn.functional.", "torch.Tensor": "", "torch": ""}.get(space, f"{space[6:]}.")
    bare = short.strip("_") if short.startswith("__") and not short.startswith("__r") else short
    for known in (prefix + short, short, prefix + bare.rstrip("_"), bare.rstrip("_"), bare.removeprefix("i") + ""):
        if known in named:
            return named[known][:2]
    return []


def _dtype_of(op: Any) -> torch.dtype | None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if op.supports_dtype(dtype, "cpu"):
            return dtype
    return None


def _of_opinfo(short: str, space: str) -> Iterator[Arguments]:
    for op in _infos(short, space):
        dtype = _dtype_of(op)
        if dtype is None:
            continue
        seen = set()
        for sample in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 16):
            given = Arguments((sample.input, *sample.args), dict(sample.kwargs))
            leaves = tree_flatten(given)[0]
            if not _places(given) or any(isinstance(leaf, Tensor) and leaf.numel() > 2000 for leaf in leaves):
                continue
            looks = tuple((x.ndim, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves), tuple(sample.kwargs)
            if looks not in seen:
                seen.add(looks)
                yield given


def wrong_samples(name: str) -> Iterator[Arguments]:
    """Give arguments that the dense function refuses, by torch's own lists and by hand."""
    space, _, short = name.rpartition(".")
    for op in _infos(short, space):
        if op.error_inputs_func is None:
            continue
        for error in itertools.islice(op.error_inputs("cpu"), 12):
            sample = error.sample_input
            yield Arguments((sample.input, *sample.args), dict(sample.kwargs))


SHAPES = ((3, 4), (2, 3, 4), (4, 4), (2, 3, 4, 4), (4,), (2, 2, 3, 4, 4))


def _of_schema(short: str) -> Iterator[Arguments]:
    packet = getattr(torch.ops.aten, short.strip("_") if short.startswith("__") else short, None)
    packet = packet or getattr(torch.ops.aten, f"{short.rstrip('_')}", None)
    if packet is None or not hasattr(packet, "overloads"):
        return
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        required = [a for a in schema.arguments if not a.has_default_value() and not a.is_out]
        if any("Dimname" in str(a.type) or "Storage" in str(a.type) for a in required):
            continue
        for shape in SHAPES:
            choices = [by_type(str(a.type), a.name, shape, place) for place, a in enumerate(required)]
            for values in itertools.islice(itertools.product(*choices), 12):
                positional = [v for a, v in zip(required, values, strict=True) if not a.kwarg_only]
                named = {a.name: v for a, v in zip(required, values, strict=True) if a.kwarg_only}
                yield Arguments(tuple(positional), named)


@functools.cache
def _stand_ins() -> dict[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(torch.overrides.get_testing_overrides())


def _of_signature(name: str) -> Iterator[Arguments]:
    space, _, short = name.rpartition(".")
    found = getattr(SPACES[space], short, None)
    try:
        signature = inspect.signature(_stand_ins().get(found, found))
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in signature.parameters.values() if p.kind in kinds and p.default is p.empty]
    for shape in SHAPES:
        choices = [by_name(p.name, shape, place) for place, p in enumerate(required)]
        for values in itertools.islice(itertools.product(*choices), 12):
            yield Arguments(values, {})


def _places(given: Arguments) -> list[int]:
    """Tell which of the tensors can be lazy logits."""
    found = []
    for place, leaf in enumerate(tree_flatten(given)[0]):
        if (
            type(leaf) is Tensor
            and leaf.dtype.is_floating_point
            and leaf.layout is torch.strided
            and not leaf.is_nested
        ):
            ordinary = leaf.dim() >= 1 and 0 < leaf.numel() <= 2000 and leaf.device.type == "cpu"
            if (
                ordinary
                and leaf.shape[-1] <= 64
                and leaf.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.half)
            ):
                found.append(place)
    return found


# --- one call


class Call(NamedTuple):
    """Arguments made anew, with the leaves that gradients are taken of and the tensors that were replaced."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Tensor]
    chosen: list[Any]


def make(given: Arguments, places: list[int], kind: str, *, lazy: bool, grad: str) -> Call:
    """Make arguments for one call; `grad` says what wants a gradient: "all", "chosen" or "nothing"."""
    values, tree = tree_flatten(given)
    leaves, chosen = [], []
    for place, value in enumerate(values):
        if place in places:
            powers = 2.0 ** (torch.arange(value.shape[-1]) % 3 - 1)
            parts = [value.detach().double() / powers, torch.diag(powers), torch.zeros(value.shape[-1])]
            parts = [p.to(value.dtype).requires_grad_(grad != "nothing") for p in parts]
            leaves += parts
            logits = ll.linear(*parts) if lazy else F.linear(*parts)
            chosen.append(logits if kind == "logits" else logits.log_softmax(-1))
            values[place] = chosen[-1]
        elif isinstance(value, Tensor):
            own = value.detach().clone()
            if grad == "all" and own.dtype.is_floating_point and type(own) is Tensor:
                leaves.append(own.requires_grad_())
            values[place] = own
    args, kwargs = tree_unflatten(values, tree)
    return Call(tuple(args), dict(kwargs), leaves, chosen)


def invoke(name: str, call: Call) -> Any:
    """Call the function as a user would: a method by its name on its first argument."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    space, _, short = name.rpartition(".")
    if space != "torch.Tensor":
        return getattr(SPACES[space], short)(*call.args, **call.kwargs)
    owner, *rest = call.args
    found = inspect.getattr_static(Tensor, short)
    if short in _OPERATORS:  # as the language calls them
        return _OPERATORS[short](owner, *rest)
    value = getattr(owner, short)
    if callable(value) and not hasattr(found, "__set__"):
        return value(*rest, **call.kwargs)
    if rest:
        setattr(owner, short, rest[0])
    return value


_OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in dir(operator)
        if name.startswith("__") and callable(getattr(operator, name))
    },
    **{
        f"__r{name}__": lambda x, y, name=name: getattr(operator, f"__{name}__")(y, x)
        for name in (
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "matmul",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
        )
    },
    "__len__": len,
    "__bool__": bool,
    "__float__": float,
    "__int__": int,
    "__complex__": complex,
    "__iter__": iter,
    "__reversed__": reversed,
    "__deepcopy__": copy.deepcopy,
    "__array__": np.asarray,
}


def is_lazy(value: Any) -> bool:
    return type(value).__module__.startswith("logitless.lazy") and hasattr(value, "materialize")


def read(value: Any) -> Any:
    """Give the numbers that a lazy tensor stands for."""
    return value.materialize() if is_lazy(value) else value


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}.get(dtype, 3e-2)


def _same(got: Any, wanted: Any, what: str, least: float = 0.0) -> None:
    """Hold one to the other, to its dtype's precision, or to `least` where what led there was less precise."""
    if isinstance(wanted, Tensor):
        if not (isinstance(got, Tensor) or is_lazy(got)):
            raise DifferentError(f"{what}: {type(got).__name__}, not a tensor")
        if wanted.is_nested:
            return _same(list(got.unbind()), list(wanted.unbind()), what)
        for trait in ("shape", "dtype", "device", "layout", "requires_grad"):
            if getattr(got, trait) != getattr(wanted, trait):
                raise DifferentError(f"{what}: {trait} is {getattr(got, trait)}, not {getattr(wanted, trait)}")
        if wanted.device.type == "meta" or wanted.is_quantized:
            return
        with torch.no_grad():
            mine, true = (read(x).detach() for x in (got, wanted))
            if true.layout is not torch.strided:
                try:
                    true = true.to_dense()
                except Exception:  # a sparse tensor of nonsense
                    return
                mine = mine.to_dense()
            limit = max(_tolerance(true.dtype), least)
            inexact = true.dtype.is_floating_point or true.dtype.is_complex
            if not (torch.allclose(mine, true, limit, limit, equal_nan=True) if inexact else torch.equal(mine, true)):
                raise DifferentError(f"{what}: {mine.flatten()[:4].tolist()}, not {true.flatten()[:4].tolist()}")
    elif isinstance(wanted, (list, tuple)):
        if len(got) != len(wanted):
            raise DifferentError(f"{what}: {len(got)} results, not {len(wanted)}")
        for place, pair in enumerate(zip(got, wanted, strict=True)):
            _same(*pair, f"{what}[{place}]")
    elif isinstance(wanted, (int, float, complex, str, bool, torch.dtype, torch.device, torch.layout, type(None))):
        close = isinstance(wanted, float) and isinstance(got, float) and abs(got - wanted) <= 1e-9 * abs(wanted)
        if got != wanted and not close and not (wanted != wanted and got != got):
            raise DifferentError(f"{what}: {got!r}, not {wanted!r}")
    elif type(wanted).__module__ == "numpy":
        _same(torch.from_numpy(got.copy()), torch.from_numpy(wanted.copy()), what)
    elif inspect.isgenerator(wanted) or type(wanted).__name__.endswith("iterator"):
        _same(list(got), list(wanted), what)
    elif type(got) is not type(wanted) and not is_lazy(got):
        raise DifferentError(f"{what}: {type(got).__name__}, not {type(wanted).__name__}")


def _tensors(value: Any) -> list[Any]:
    if inspect.isgenerator(value):
        return []
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor) or is_lazy(leaf)]


def _gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    wanted = [
        out
        for out in _tensors(outputs)
        if out.requires_grad and not out.is_nested and (out.is_floating_point() or out.is_complex())
    ]
    draw = torch.Generator().manual_seed(7)
    upstream = [torch.randn(o.shape, dtype=torch.float64, generator=draw).to(o.dtype) for o in wanted]
    wanted = [out.to_dense() if out.layout is not torch.strided else out for out in wanted]
    return list(torch.autograd.grad(wanted, leaves, upstream, allow_unused=True)) if wanted else []


def attempt(name: str, given: Arguments, places: list[int], kind: str, say: Callable[[str], None]) -> str | None:
    """Call the function on dense and on lazy logits and give the outcome, or None where dense ones are refused."""
    short = name.rpartition(".")[2]
    for grad in ("all", "chosen", "nothing"):
        say("dense")
        try:
            dense = make(given, places, kind, lazy=False, grad=grad)
            wanted = invoke(name, dense)
        except Exception:
            continue
        try:
            slopes = _gradients(wanted, dense.leaves)
        except Exception:
            slopes = None
        break
    else:
        return None
    say("lazy")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lazy = make(given, places, kind, lazy=True, grad=grad)
        before = len(seen)
        _most_computed[0] = 0
        try:
            got = invoke(name, lazy)
        except MEANT_ERRORS as error:
            _refused(error)
            _unharmed(lazy, given, places, kind, grad)
            return "raises"
        all_computed = _most_computed[0] >= min(logits.shape.numel() for logits in lazy.chosen)
        outcome = "computes" if all_computed else _outcome(got, seen[before:])
        if short not in OPAQUE:
            _compare(got, wanted, lazy, dense, slopes)
            _writes_through(name, given, places, kind)
    return outcome


# How many values the largest tensor has that lazy logits were computed to since this was set to 0.
_most_computed = [0]


def _count_computed(kind: Any) -> None:
    """Let a kind of lazy tensors note how many of its values are computed at once."""
    compute = kind.dense_values.__func__

    def dense_values(cls: Any, parts: Any, settings: Any) -> Tensor:
        _most_computed[0] = max(_most_computed[0], cls.form_of_parts(parts, settings).shape.numel())
        return compute(cls, parts, settings)

    kind.dense_values = classmethod(dense_values)


def _outcome(got: Any, seen: list[Any]) -> str:
    if any(issubclass(w.category, ll.MaterializeWarning) for w in seen):
        return "computes"
    made = [type(out).__name__ for out in _tensors(got) if is_lazy(out)]
    if "LazyView" in made:
        return "computes"  # when it is read
    return "lazy" if made else "efficient"


def _refused(error: Exception) -> None:
    if (
        isinstance(error, (AttributeError, AssertionError, KeyError, UnboundLocalError, RecursionError))
        or (type(error) is TypeError and ("positional argument" in str(error) or "invalid combination" in str(error)))
        or "INTERNAL ASSERT" in str(error)
        or "DispatchKey" in str(error)
    ):
        raise DifferentError(f"an error that was not meant: {type(error).__name__}: {error}")


def _unharmed(lazy: Call, given: Arguments, places: list[int], kind: str, grad: str) -> None:
    """What refused a write has not written, or says so when it is read."""
    before = make(given, places, kind, lazy=False, grad=grad)
    for place, (mine, true) in enumerate(zip(lazy.chosen, before.chosen, strict=True)):
        try:
            mine.materialize()
        except RuntimeError:
            continue
        _same(mine, true, f"the lazy argument {place} after the error")


def _refuses_reading(tensor: Tensor) -> bool:
    """Tell whether a dense tensor says that it was given lazy logits for its memory."""
    try:
        tensor.detach().clone()
    except RuntimeError as error:
        return "z.materialize()" in str(error)
    return False


def _compare(got: Any, wanted: Any, lazy: Call, dense: Call, slopes: list[Tensor | None] | None) -> None:
    _same(got, wanted, "result")
    for place, pair in enumerate(zip(lazy.chosen, dense.chosen, strict=True)):
        try:
            read(pair[0])
        except RuntimeError:
            continue
        _same(*pair, f"the lazy argument {place} afterwards")
    for place, pair in enumerate(zip(_tensors(lazy[:2]), _tensors(dense[:2]), strict=True)):
        if not is_lazy(pair[0]) and not _refuses_reading(pair[0]):
            _same(*pair, f"the argument {place} afterwards")
    if not slopes:
        return
    try:
        found = _gradients(got, lazy.leaves)
    except MEANT_ERRORS as error:
        return _refused(error)
    for place, (mine, true) in enumerate(zip(found, slopes, strict=True)):
        if mine is None or true is None:
            one = mine if true is None else true
            if one is not None and bool((one != 0).any()):
                raise DifferentError(f"gradient {place} is {mine}, not {true}")
        else:
            by_way_of = [_tolerance(x.dtype) for x in _tensors(wanted) if x.dtype.is_floating_point]
            _same(mine.detach(), true.detach(), f"gradient {place}", max(by_way_of, default=0.0))


def _writes_through(name: str, given: Arguments, places: list[int], kind: str) -> None:
    """Where dense results share memory with an argument, a write to one shows in the other, or raises."""
    if len(places) != 1 or name.endswith("_"):
        return
    try:
        dense = make(given, places, kind, lazy=False, grad="nothing")
        outputs = _tensors(invoke(name, dense))
        memory = dense.chosen[0].untyped_storage().data_ptr()
        shared = [
            i for i, o in enumerate(outputs) if o.layout is torch.strided and o.untyped_storage().data_ptr() == memory
        ]
    except Exception:
        return
    if not shared or not shared[:1]:
        return
    for first in ("result", "argument"):
        dense, lazy = (make(given, places, kind, lazy=which, grad="nothing") for which in (False, True))
        outs = [_tensors(invoke(name, call))[shared[0]] for call in (dense, lazy)]
        try:
            for out, call in zip(outs, (dense, lazy), strict=True):
                (out if first == "result" else call.chosen[0]).mul_(0.25)
        except MEANT_ERRORS:
            continue
        for mine, true, what in (
            (outs[1], outs[0], "the result"),
            (lazy.chosen[0], dense.chosen[0], "the lazy argument"),
        ):
            try:
                read(mine)
            except MEANT_ERRORS:
                continue
            _same(mine, true, f"{what} after a write to the {first}")


def write_to_out(name: str, given: Arguments, kind: str, say: Callable[[str], None]) -> str | None:
    """Give a lazy tensor to `out=`: written, or refused."""
    say("dense")
    try:
        call = make(given, [], kind, lazy=False, grad="nothing")
        wanted = invoke(name, call)
        if not (type(wanted) is Tensor and wanted.dim() and wanted.numel() and wanted.is_floating_point()):
            return None
        empty = Arguments((torch.zeros(wanted.shape, dtype=wanted.dtype),), {})
        dense, lazy = (make(empty, [0], kind, lazy=which, grad="nothing").chosen[0] for which in (False, True))
        invoke(name, call._replace(kwargs={**call.kwargs, "out": dense}))
    except Exception:
        return None
    say("lazy")
    try:
        invoke(name, call._replace(kwargs={**call.kwargs, "out": lazy}))
    except MEANT_ERRORS as error:
        _refused(error)
        return "raises"
    _same(lazy, dense, "out")
    return "lazy"


# --- one function


def examine(name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Call one function with a few sorts of arguments; give the outcomes of each kind and what differed."""
    torch.default_generator.manual_seed(20240229)
    random.seed(5)
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    found["problems"] = []

    def record(kind: str, call: Callable[[], str | None], what: str) -> bool:
        try:
            outcome = call()
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            frames = traceback.extract_tb(error.__traceback__)
            where = ", ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames[-3:])
            kind_of = "" if isinstance(error, DifferentError) else f"{type(error).__name__} at {where}: "
            if sum(f"of {kind}" in problem for problem in found["problems"]) > 1:
                return True
            found["problems"].append(f"{name} of {kind}, {what}: {kind_of}{text}")
            return True
        if outcome is not None:
            found[kind][outcome] = found[kind].get(outcome, 0) + 1
        return outcome is not None

    used, tried, outs = 0, 0, 0
    for given in samples(name):
        places = _places(given)
        if not places:
            continue
        tried += 1
        choices = [[place] for place in places[:3]] if used < 2 else [places[:1]]
        if len(places) > 1 and used < 1:
            choices.append(places)
        worked = False
        for chosen in choices:
            for kind in KINDS if used < 3 else KINDS[:1]:
                what = f"lazy {chosen} of {describe(given)}"
                worked |= record(kind, functools.partial(attempt, name, given, chosen, kind, say), what)
        used += worked
        if worked and outs < 1 and name.startswith(("torch.", "torch.linalg.")) and "Tensor" not in name:
            outs += record(KINDS[0], functools.partial(write_to_out, name, given, KINDS[0], say), "out=")
        if used >= 5 or tried >= 60 + 40 * used:
            break
    if used:
        for given in itertools.islice(wrong_samples(name), 8):
            record(KINDS[0], functools.partial(_wrong, name, given, say), f"refused dense {describe(given)}")
    return found


def _wrong(name: str, given: Arguments, say: Callable[[str], None]) -> None:
    """What dense logits are refused, lazy ones are refused as well."""
    places = _places(given)[:1]
    if not places or "out" in given.kwargs:
        return
    say("dense")
    try:
        invoke(name, make(given, places, KINDS[0], lazy=False, grad="nothing"))
    except Exception as error:
        refusal = error
    else:
        return
    say("lazy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = make(given, places, KINDS[0], lazy=True, grad="nothing")
        try:
            got = invoke(name, call)
            for out in _tensors(got):
                read(out)
        except Exception as error:
            if isinstance(error, (AttributeError, AssertionError, KeyError, UnboundLocalError, RecursionError)):
                raise DifferentError(f"an error that was not meant: {type(error).__name__}: {error}") from error
            return
    raise DifferentError(f"gives {type(got).__name__} where dense logits raise {type(refusal).__name__}: {refusal}")


def describe(given: Arguments) -> str:
    """Say in a line what a function was called with."""

    def short(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype)[6:]}{list(value.shape)}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(short, value))}]"
        return repr(value)[:30]

    return ", ".join([*map(short, given.args), *(f"{k}={short(v)}" for k, v in given.kwargs.items())])[:160]


# --- the server


def child(names: list[str], out: int) -> None:
    """Examine functions one after another; what is about to happen is said before it does."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # torch's own seeds every accelerator there might be, and formats the stack for each.
    torch.manual_seed = torch.default_generator.manual_seed
    proxy._are_few = lambda shape, dtype: False  # so that every computation of all logits warns
    for kind in (LazyLogits, LazyLogProbs):
        _count_computed(kind)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    def tell(**line: Any) -> None:
        os.write(out, (json.dumps(line) + "\n").encode())

    for name in names:
        started = time.process_time()
        tell(start=name)
        found = examine(name, lambda phase, name=name: tell(phase=phase, name=name))
        tell(done=name, seconds=time.process_time() - started, **found)
    os._exit(0)


def serve(names: list[str], heard: Callable[[str, Any], None] = lambda name, found: None) -> dict[str, dict[str, Any]]:
    """Examine functions in children; a crash or a hang is the last announced function's. `heard` follows it."""
    results: dict[str, dict[str, Any]] = {}
    rest = list(names)
    while rest:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                child(rest, writer)
            finally:
                os._exit(70)
        os.close(writer)
        phase, current, buffer, hung = "", rest[0], b"", False
        while True:
            ready, _, _ = select.select([reader], [], [], HANG_SECONDS)
            if not ready:
                hung = True
                os.kill(pid, signal.SIGKILL)
                break
            data = os.read(reader, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in map(json.loads, lines):
                current = line.get("start", current)
                phase = line.get("phase", phase)
                if "done" in line:
                    name = line.pop("done")
                    results[name] = line
                    heard(name, line)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        rest = [name for name in rest if name not in results]
        if rest:
            how = "hangs" if hung else f"ends the process ({os.waitstatus_to_exitcode(status)})"
            lost = {kind: {} for kind in KINDS}
            results[current] = {**lost, "problems": [f"{current} {how} in a call on {phase or 'no'} logits"]}
            rest.remove(current)
    return results


def warm_up() -> None:
    """Import and make what every child needs, before there are any."""
    _opinfos()
    _stand_ins()


if __name__ == "__main__":
    warm_up()
    if sys.argv[1:]:
        for problems in (found["problems"] for found in serve(sys.argv[1:]).values()):
            sys.stdout.writelines(problem + "\n" for problem in problems)
    for line in sys.stdin if not sys.argv[1:] else ():
        sys.stdout.write(json.dumps(serve(json.loads(line))) + "\n")
        sys.stdout.flush()
