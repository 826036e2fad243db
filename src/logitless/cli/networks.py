"""The one way into transformers: offline, without its bars and reports, which are checked here instead."""

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may touch the network

import torch
from torch import Tensor

from logitless.cli.errors import InputError, first_line

# By name: its annotations call for types that its own loaders do not return.
transformers: Any = importlib.import_module("transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars, reports and warnings off the screen; what matters in them is checked here."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def build_network(kind: Any, config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """Return a model of a class and configuration with these weights, and what did not fit; refuse impossible sizes."""
    try:
        with quiet():
            network, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    # transformers and torch raise any of a dozen types for sizes that make no model.
    except Exception as error:
        raise InputError(f"the configuration makes no {kind.__name__}: {first_line(error)}") from error
    return network.eval(), report
