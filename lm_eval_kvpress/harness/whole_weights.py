"""Weights are all of the checkpoint's, or none: transformers fills what it does not find with random numbers.

Knows transformers' loader and what it reports. Does not know settings, presses or lm-eval.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from lm_eval_kvpress.errors import UsageError

UNREADABLE = (OSError, SafetensorError, ImportError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError)
"""What loaders raise on a file that is torn, foreign or missing, or that needs a package which is not installed."""

LAYER = re.compile(r"\blayers\.(\d+)\.")


class WholeWeights:
    """An ``AutoModel`` class whose models have every weight from the checkpoint, in the shape of the config.

    Args:
        loader: transformers' class.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def from_pretrained(self, pretrained: str, **arguments: Any) -> Any:
        """As transformers does it.

        Raises:
            UsageError: naming the first weights that are missing, of another shape, or of layers beyond the config's.
        """
        wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # it reports their shapes
        model, found = self._loader.from_pretrained(pretrained, **{**arguments, **wanted})
        num_layers = model.config.num_hidden_layers
        check_found(pretrained, num_layers, found)
        return model


def check_found(pretrained: str, num_layers: int, found: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fit its config.

    Args:
        found: transformers' ``loading_info``.

    Raises:
        UsageError: in one line.
    """
    shapes = [f"{name} is {_shape(own)}, not {_shape(asked)}" for name, own, asked in sorted(found["mismatched_keys"])]
    beyond = [name for name in found["unexpected_keys"] if any(int(n) >= num_layers for n in LAYER.findall(name))]
    for what, names in (
        ("has no weights for what its config.json describes, which would be random numbers", found["missing_keys"]),
        ("has weights of other shapes than its config.json describes", shapes),
        (f"has weights of more layers than the {num_layers} of its config.json", beyond),
    ):
        if names:
            raise UsageError(f"pretrained={pretrained} {what}: {_first(names)}")


def _shape(size: Collection[int]) -> str:
    return "x".join(map(str, size))


def _first(names: Collection[str]) -> str:
    listed = sorted(names)[:3]
    return ", ".join(listed) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def unreadable_in_one_line(pretrained: str) -> Iterator[None]:
    """Turn what a loader raises on broken files, or on an adapter that lacks weights, into one line.

    Raises:
        UsageError: naming the checkpoint and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # peft goes on without them
            yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except (*UNREADABLE, UserWarning) as error:
        lines = (str(error) or repr(error)).strip().splitlines()
        raise UsageError(f"cannot read the weights of pretrained={pretrained}: {lines[0]}") from error
