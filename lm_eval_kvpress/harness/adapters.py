"""Adapters of ``peft`` on top of a model: merged for good into a checkpoint that was read here, or for a while.

The rows of an adapter would not follow a model's change of basis, so they become part of its weights first. Knows
adapters by what they can do, without ``peft``, which need not be installed. Does not know lm-eval or presses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel


def is_adapted(model: Any) -> bool:
    """Whether a model is one of ``peft``'s."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def check_mergeable(model: Any) -> None:
    """Refuse adapters that are no part of the weights, such as prompt tuning: they would be left out in silence.

    Raises:
        UsageError: in one line.
    """
    if is_adapted(model) and not hasattr(model, "merge_and_unload"):
        raise UsageError(
            "this kind of adapter cannot be merged into the model's weights, and presses would not see it: take one "
            "that can be, such as LoRA"
        )


@contextmanager
def merged(base: PreTrainedModel) -> Iterator[None]:
    """Merge the adapters of a model's layers for the length of a ``with`` block; its weights come back to the bit.

    Takes the memory of the layers that have adapters, since subtracting what was added would leave rounding.
    """
    with ExitStack() as undo:
        for layer in _adapted_layers(base):
            if not layer.merged:
                own = [(weight, weight.detach().clone()) for weight in layer.get_base_layer().parameters()]
                undo.callback(_take_off, layer, own)
                layer.merge()
        yield


def merged_in_use(model: PressableModel) -> PressableModel:
    """A model whose adapters are merged while it is in use, before its weights change their basis."""

    @contextmanager
    def merged_first() -> Iterator[None]:
        with merged(model.model), model.basis():
            yield

    return replace(model, basis=merged_first)


def _adapted_layers(base: PreTrainedModel) -> list[Any]:
    needed = ("merge", "unmerge", "get_base_layer", "merged")
    return [module for module in base.modules() if all(hasattr(module, name) for name in needed)]


@torch.no_grad()
def _take_off(layer: Any, own: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if layer.merged:
        layer.unmerge()
    for weight, before in own:
        weight.data.copy_(before)
