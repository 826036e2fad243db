"""What to call torch's functions with where torch's samples say nothing: by function, an argument's name, its type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw numbers between 0.1 and 0.9, inside the domain of most functions."""
    return torch.rand(shape, dtype=torch.float64).mul(0.8).add(0.1).to(dtype)


def places(*shape: int, below: int = 2) -> Tensor:
    """Draw indices."""
    return torch.randint(0, below, shape)


# Calls that end, change or wait for the process, ask for a device that is not there, or make what no user makes.
NOT_CALLED = {
    *(f"torch.{name}" for name in ("compile", "fork", "wait", "load", "_foobar", "_import_device_backends")),
    *(f"torch.{name}" for name in ("prepare_multiprocessing_environment", "_initExtension", "_preload_cuda_deps")),
    *(f"torch.{name}" for name in ("set_num_threads", "set_num_interop_threads", "set_default_device", "save")),
    *(f"torch.{name}" for name in ("seed", "manual_seed", "set_rng_state", "from_file", "_load_global_deps")),
    # What reads memory that nobody wrote, of arguments as good as any; functorch's and torch's own tests' internals.
    *(f"torch.{name}" for name in ("_weight_norm", "_weight_norm_interface", "_compute_linear_combination")),
    *(f"torch.{name}" for name in ("_reshape_alias_copy", "_add_batch_dim", "_test_parallel_materialize")),
    # Seconds a call.
    *(f"torch.{name}" for name in ("lobpcg", "quantized_lstm")),
    *(f"torch.Tensor.{name}" for name in ("__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__")),
    *(f"torch.Tensor.{name}" for name in ("__dict__", "__doc__", "__module__", "__weakref__", "__annotations__")),
    *(
        f"torch.Tensor.{name}"
        for name in ("__torch_function__", "__torch_dispatch__", "_make_subclass", "_fix_weakref")
    ),
    *(f"torch.Tensor.{name}" for name in ("_make_wrapper_subclass", "_dtensor__new__", "__getattribute__")),
    *(f"torch.Tensor.{name}" for name in ("__delattr__", "__array_priority__", "__dir__", "__sizeof__")),
}

# Torch's own code reads or writes past the end of what it is given here, unless all sizes fit: called by recipe alone.
ONLY_BY_RECIPE = {
    *("_cummax_helper", "_cummin_helper", "_native_batch_norm_legit", "native_batch_norm"),
    *("_pad_packed_sequence", "_transform_bias_rescale_qkv"),
}

# They change how torch computes from then on, and take no tensor.
SETTINGS = (
    "torch.set_",
    "torch.use_",
    "torch.autocast_",
    "torch.clear_",
    "torch._set_",
    "torch._enable",
    "torch._disable",
)

# What names one object, or writes it out: two tensors of the same numbers differ in it as well.
OPAQUE = {
    *(
        "__repr__",
        "__str__",
        "__format__",
        "__hash__",
        "__reduce__",
        "__reduce_ex__",
        "_reduce_ex_internal",
        "__getstate__",
    ),
    *(
        "data_ptr",
        "const_data_ptr",
        "_cdata",
        "grad_fn",
        "_grad_fn",
        "_version",
        "_base",
        "_is_view",
        "name",
        "typename",
    ),
    *("_use_count", "_typed_storage", "storage", "untyped_storage", "register_hook", "_backward_hooks"),
    *(
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "new",
        "empty",
        "empty_strided",
        "empty_permuted",
        "_print",
        "is_same",
    ),
    *("__dlpack__", "to_dlpack", "_python_dispatch", "output_nr", "_debug_has_internal_overlap", "resize_"),
}

_ROWS = (3, 4)
_SPLIT = {"split_size": [2], "split_size_or_sections": [2, [1, 3]], "split_sizes": [[1, 2]], "sections": [2]}

# By name; `numbers` are what lazy logits may stand for, wherever they are.
RECIPES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "__setitem__": [
        ((numbers(*_ROWS), 0, 0.5), {}),
        ((numbers(*_ROWS), (..., 1), -1.0), {}),
        ((numbers(*_ROWS), numbers(*_ROWS) > 0.5, 0.0), {}),
        ((numbers(*_ROWS), 1, numbers(4)), {}),
    ],
    "__getitem__": [
        ((numbers(*_ROWS), 0), {}),
        ((numbers(*_ROWS), (slice(None), 2)), {}),
        ((numbers(*_ROWS), (..., [1, 3])), {}),
        ((numbers(*_ROWS), (slice(None, None, 2), slice(1, 3))), {}),
        ((numbers(2, 3, 4), (slice(None), slice(None), 3)), {}),
        ((numbers(2, 3, 4), None), {}),
    ],
    "__contains__": [((numbers(*_ROWS), 0.5), {})],
    "__len__": [((numbers(*_ROWS),), {})],
    "__bool__": [((numbers(1, 1),), {})],
    "__nonzero__": [((numbers(1, 1),), {})],
    "is_nonzero": [((numbers(1, 1),), {})],
    "item": [((numbers(1, 1),), {})],
    "__float__": [((numbers(1, 1),), {})],
    "__int__": [((numbers(1, 1),), {})],
    "__complex__": [((numbers(1, 1),), {})],
    "__pow__": [((numbers(*_ROWS), 2), {}), ((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "__ipow__": [((numbers(*_ROWS), 2), {})],
    "__format__": [((numbers(1, 1), ""), {})],
    "__deepcopy__": [((numbers(*_ROWS),), {})],
    "__reduce_ex__": [((numbers(*_ROWS), 2), {})],
    "__array__": [((numbers(*_ROWS),), {})],
    "_cast_Half": [((numbers(*_ROWS),), {})],
    "apply_": [((numbers(*_ROWS), lambda x: x + 1), {})],
    "map_": [((numbers(*_ROWS), numbers(*_ROWS), lambda x, y: x + y), {})],
    "as_subclass": [((numbers(*_ROWS), Tensor), {})],
    "data": [((numbers(*_ROWS),), {}), ((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "requires_grad": [((numbers(*_ROWS),), {}), ((numbers(*_ROWS), True), {})],
    "backward": [((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "type": [
        ((numbers(*_ROWS),), {}),
        ((numbers(*_ROWS), torch.float32), {}),
        ((numbers(*_ROWS), "torch.FloatTensor"), {}),
    ],
    "type_as": [((numbers(*_ROWS), numbers(1, dtype=torch.float32)), {}), ((numbers(*_ROWS), places(2)), {})],
    "to": [
        ((numbers(*_ROWS), torch.float32), {}),
        ((numbers(*_ROWS), "cpu"), {}),
        ((numbers(*_ROWS), torch.int64), {}),
        ((numbers(*_ROWS), "meta"), {}),
        ((numbers(*_ROWS),), {"dtype": torch.float32, "copy": True}),
    ],
    "expand_as": [((numbers(1, 4), numbers(3, 4)), {})],
    "view_as": [((numbers(2, 3, 4), numbers(6, 4)), {})],
    "set_": [((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "copy_": [((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "resize_": [((numbers(*_ROWS), (3, 4)), {})],
    "resize_as_": [((numbers(*_ROWS), numbers(3, 4)), {})],
    "swapaxes": [((numbers(2, 3, 4), 0, 1), {}), ((numbers(2, 3, 4), 1, 2), {})],
    "new_tensor": [((numbers(*_ROWS), [1.0]), {})],
    "new": [((numbers(*_ROWS),), {})],
    "index": [((numbers(*_ROWS), places(2)), {})],
    "register_hook": [((numbers(*_ROWS), lambda g: g), {})],
    "module_load": [((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "share_memory_": [((numbers(*_ROWS),), {})],
    "storage": [((numbers(*_ROWS),), {})],
    "as_tensor": [((numbers(*_ROWS),), {}), ((numbers(*_ROWS),), {"dtype": torch.float32})],
    "asarray": [((numbers(*_ROWS),), {})],
    "tensor": [((numbers(*_ROWS),), {}), (([numbers(1, 1), 2.0],), {})],
    "from_dlpack": [((numbers(*_ROWS),), {})],
    "to_dlpack": [((numbers(*_ROWS),), {})],
    "where": [
        ((numbers(*_ROWS) > 0.5, numbers(*_ROWS), 0.0), {}),
        ((numbers(*_ROWS) > 0.5, 0.0, numbers(*_ROWS)), {}),
        ((numbers(*_ROWS) > 0.5, numbers(*_ROWS), numbers(*_ROWS)), {}),
    ],
    "add": [
        ((numbers(*_ROWS), numbers(*_ROWS)), {"alpha": 2}),
        ((numbers(*_ROWS), numbers(4)), {}),
        ((numbers(*_ROWS), 0.5), {}),
        ((numbers(4), numbers(*_ROWS)), {"alpha": 2}),
    ],
    "sub": [((numbers(*_ROWS), numbers(*_ROWS)), {"alpha": 2}), ((numbers(4), numbers(*_ROWS)), {"alpha": 2})],
    "rsub": [((numbers(*_ROWS), numbers(*_ROWS)), {"alpha": 2}), ((numbers(*_ROWS), 0.5), {})],
    "mul": [((numbers(*_ROWS), 0.5), {}), ((numbers(*_ROWS), numbers(*_ROWS)), {}), ((0.5, numbers(*_ROWS)), {})],
    "mul_": [((numbers(*_ROWS), 0.5), {}), ((numbers(*_ROWS), numbers(*_ROWS)), {})],
    "div": [((numbers(*_ROWS), 2.0), {}), ((numbers(*_ROWS), numbers(*_ROWS)), {"rounding_mode": "floor"})],
    "div_": [((numbers(*_ROWS), 2.0), {}), ((numbers(*_ROWS), 0.5), {"rounding_mode": "floor"})],
    "masked_fill_": [
        ((numbers(*_ROWS), numbers(4) > 0.5, -float("inf")), {}),
        ((numbers(*_ROWS), numbers(*_ROWS) > 0.5, 0.0), {}),
    ],
    "masked_fill": [
        ((numbers(*_ROWS), numbers(4) > 0.5, -float("inf")), {}),
        ((numbers(*_ROWS), numbers(*_ROWS) > 0.5, 0.0), {}),
    ],
    "gather": [
        ((numbers(*_ROWS), -1, places(3, 1)), {}),
        ((numbers(*_ROWS), 0, places(1, 4)), {}),
        ((numbers(*_ROWS), 1, places(3, 2)), {"sparse_grad": False}),
    ],
    "_cummax_helper": [((numbers(*_ROWS), numbers(*_ROWS), places(*_ROWS), 1), {})],
    "_cummin_helper": [((numbers(*_ROWS), numbers(*_ROWS), places(*_ROWS), 1), {})],
    **{
        name: [
            ((numbers(3, 4), *(numbers(4) for _ in range(4)), training, 0.1, 1e-5), {}) for training in (True, False)
        ]
        for name in ("_native_batch_norm_legit", "native_batch_norm")
    },
    "_pad_packed_sequence": [((numbers(5, 4), torch.tensor([2, 2, 1]), False, 0.0, 3), {})],
    "_transform_bias_rescale_qkv": [((numbers(2, 3, 12), numbers(12), 2), {})],
    # Over the classes, where torch's samples are over the rows.
    **{
        name: [((numbers(*_ROWS), -1), {}), ((numbers(*_ROWS), 1, True), {})]
        for name in ("argmax", "max", "sum", "mean")
    },
    "gumbel_softmax": [((numbers(*_ROWS),), {}), ((numbers(*_ROWS),), {"hard": True})],
    "nested_tensor": [(([numbers(*_ROWS), numbers(*_ROWS)],), {})],
    "xavier_uniform_": [((numbers(*_ROWS),), {})],
    "torch.nn.init.uniform_": [((numbers(*_ROWS),), {})],
    "torch.nn.init.normal_": [((numbers(*_ROWS),), {})],
    "torch.nn.init.zeros_": [((numbers(*_ROWS),), {})],
    "torch.nn.init.constant_": [((numbers(*_ROWS), 0.5), {})],
    "lstm_cell": [((numbers(3, 4), (numbers(3, 4), numbers(3, 4)), numbers(16, 4), numbers(16, 4)), {})],
    "embedding": [((places(5), numbers(3, 4)), {})],
    "embedding_bag": [((numbers(3, 4), places(5), places(1, below=1)), {})],
    "bilinear": [((numbers(3, 4), numbers(3, 4), numbers(2, 4, 4)), {})],
    "batch_norm": [((numbers(3, 4), None, None), {"training": True})],
    "instance_norm": [((numbers(2, 3, 4),), {})],
    "cosine_embedding_loss": [((numbers(3, 4), numbers(3, 4), torch.tensor([1, -1, 1])), {})],
    "ctc_loss": [((numbers(5, 2, 4), torch.tensor([[1, 2], [2, 3]]), torch.tensor([5, 5]), torch.tensor([2, 2])), {})],
    "kl_div": [
        ((numbers(3, 4), numbers(3, 4)), {"reduction": "sum"}),
        ((numbers(3, 4), numbers(3, 4)), {"log_target": True, "reduction": "batchmean"}),
    ],
    "cross_entropy": [
        ((numbers(3, 4), torch.tensor([1, -100, 2])), {"label_smoothing": 0.1}),
        ((numbers(2, 4, 3), places(2, 3, below=4)), {"reduction": "none"}),
    ],
    "nll_loss": [((numbers(3, 4), torch.tensor([1, -100, 2])), {"reduction": "sum"})],
    "split": [((numbers(3, 4), 2), {}), ((numbers(3, 4), [1, 3], -1), {})],
    "tensor_split": [((numbers(3, 4), 2), {}), ((numbers(3, 4), 3, -1), {})],
    "argsort": [((numbers(3, 4),), {})],
    "unflatten": [((numbers(3, 4), -1, (2, 2)), {}), ((numbers(6, 4), 0, (2, 3)), {})],
    "as_strided": [((numbers(3, 4), (2, 2), (4, 1)), {})],
    "as_strided_": [((numbers(3, 4), (2, 2), (4, 1)), {})],
    "segment_reduce": [((numbers(3, 4), "sum"), {"lengths": torch.tensor([1, 2])})],
    "torch.kl_div": [((numbers(3, 4), numbers(3, 4)), {"reduction": 1})],
    "torch.instance_norm": [((numbers(2, 3, 4), None, None, None, None, True, 0.1, 1e-5, False), {})],
    "torch.batch_norm": [((numbers(3, 4), None, None, None, None, True, 0.1, 1e-5, False), {})],
    "torch.ctc_loss": [
        ((numbers(5, 2, 4), torch.tensor([[1, 2], [2, 3]]), torch.tensor([5, 5]), torch.tensor([2, 2])), {})
    ],
    "torch.cosine_embedding_loss": [((numbers(3, 4), numbers(3, 4), torch.tensor([1, -1, 1])), {})],
    "torch.quantize_per_tensor": [((numbers(3, 4, dtype=torch.float32), 0.1, 10, torch.quint8), {})],
    "torch.quantize_per_channel": [
        ((numbers(3, 4, dtype=torch.float32), torch.tensor([0.1] * 3), torch.zeros(3), 0, torch.quint8), {})
    ],
    "torch.quantize_per_tensor_dynamic": [((numbers(3, 4, dtype=torch.float32), torch.quint8, False), {})],
    "torch.chain_matmul": [((numbers(3, 4), numbers(4, 5), numbers(5, 2)), {})],
    "torch.gru_cell": [((numbers(3, 4), numbers(3, 4), numbers(12, 4), numbers(12, 4)), {})],
    "torch.rnn_tanh_cell": [((numbers(3, 4), numbers(3, 4), numbers(4, 4), numbers(4, 4)), {})],
    "torch.rnn_relu_cell": [((numbers(3, 4), numbers(3, 4), numbers(4, 4), numbers(4, 4)), {})],
    "torch.rnn_tanh": [
        ((numbers(2, 3, 4), numbers(1, 3, 4), [numbers(4, 4), numbers(4, 4)], False, 1, 0.0, True, False, False), {})
    ],
    "torch.gru": [
        ((numbers(2, 3, 4), numbers(1, 3, 4), [numbers(12, 4), numbers(12, 4)], False, 1, 0.0, True, False, False), {})
    ],
    "torch.lstm": [
        (
            (
                numbers(2, 3, 4),
                [numbers(1, 3, 4), numbers(1, 3, 4)],
                [numbers(16, 4), numbers(16, 4)],
                *(False, 1, 0.0, True, False, False),
            ),
            {},
        )
    ],
    "torch.result_type": [((numbers(3, 4), numbers(3, 4, dtype=torch.float32)), {})],
    "torch.is_tensor": [((numbers(3, 4),), {})],
    "torch.is_storage": [((numbers(3, 4),), {})],
    "torch.numel": [((numbers(3, 4),), {})],
    "torch.is_floating_point": [((numbers(3, 4),), {})],
    "torch.affine_grid_generator": [((numbers(2, 2, 3), (2, 1, 3, 3), True), {})],
    "affine_grid": [((numbers(2, 2, 3), (2, 1, 3, 3)), {})],
}

_INDICES = ("index", "indices", "target", "labels", "ids", "offsets", "index1", "tensor_indices_or_sections")
_MASKS = ("mask", "condition", "where", "key_padding_mask")


def by_name(name: str, shape: tuple[int, ...], place: int) -> list[Any]:
    """Give values for a required argument of this name, in a call whose first tensor has this shape."""
    if name in (
        "tensors",
        "tensor_list",
        "tensor_lists",
        "matrices",
        "self",
        "input",
        "x",
        "a",
        "tensor",
        "A",
        "arrays",
    ):
        many = name in ("tensors", "tensor_list", "matrices", "arrays")
        return [[numbers(*shape), numbers(*shape)]] if many else [numbers(*shape)]
    if name in _INDICES:
        return [places(*shape), places(shape[0]), torch.full(shape, 1)]
    if name in _MASKS:
        return [numbers(*shape) > 0.5]
    if name in _SPLIT:
        return _SPLIT[name]
    if name in ("dim", "axis", "dim0", "axis0", "source", "start_dim"):
        return [-1, 0]
    if name in ("dim1", "axis1", "destination", "end_dim"):
        return [0, 1]
    if name in ("dims", "axes", "shifts", "repeats", "reps", "pad", "padding", "size", "shape", "sizes", "output_size"):
        return [shape, (0,), (1,) * len(shape), (1, 0), (2,), (2, 2)]
    if name in ("kernel_size", "stride", "dilation", "output_ratio"):
        return [2, (2, 2), 1]
    if name in ("n", "k", "p", "num_samples", "diagonal", "groups", "upscale_factor", "downscale_factor", "offset"):
        return [1, 2]
    if name in ("length", "step", "start", "end"):
        return [1]
    if name in ("dtype",):
        return [torch.float32]
    if name in ("func", "hook", "callable"):
        return [lambda x: x]
    if name in ("reduce", "mode", "reduction"):
        return ["sum", "mean"]
    if name in ("training", "train", "inplace", "unbiased", "keepdim", "largest", "sorted"):
        return [False]
    if place == 0:
        return [numbers(*shape)]
    return [numbers(*shape), 0.5, 1, numbers(shape[-1])]


def by_type(kind: str, name: str, shape: tuple[int, ...], place: int) -> list[Any]:
    """Give values for a required argument of this type of a schema."""
    if kind.startswith("Optional"):
        return [None]
    if kind == "Tensor":
        if name in _INDICES + _MASKS:
            return by_name(name, shape, place)
        return [numbers(*shape)] if place == 0 else [numbers(*shape), numbers(shape[-1]), places(*shape)]
    if kind == "List[Tensor]":
        if name == "indices":
            return [[places(3)]]
        return [[numbers(*shape), numbers(*shape)]]
    if kind == "List[Optional[Tensor]]":
        return [[places(3)]]
    if kind in ("int", "SymInt"):
        return by_name(name, shape, place) if name in ("dim", "dim0", "dim1", "start_dim", "end_dim") else [1, 0]
    if kind in ("List[int]", "List[SymInt]"):
        if name in ("dim", "dims"):
            return [[-1], [0], list(range(len(shape)))]
        return [list(shape), [2, 2], [1, 1], [1] * len(shape), [1]]
    if kind in ("float", "number", "Scalar"):
        return [0.5, 1]
    if kind == "bool":
        return [False]
    if kind == "str":
        return ["sum", "none"]
    if kind in ("ScalarType",):
        return [torch.float32]
    return [None]
