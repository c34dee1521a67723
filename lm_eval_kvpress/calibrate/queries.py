"""Moments of a model's queries over texts: how many, their sums, and the sums of their products.

All that the calibrated presses need of queries can be computed from these, so that no query is kept. Knows a presented
model. Does not know text, files or presses.

Letters in shape comments: L layers, H query heads, D head_dim, T tokens of a window, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import nn

from lm_eval_kvpress.models.pressable import PressableModel


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over queries in float64, in the basis of the presented model.

    Attributes:
        num_queries: of every head.
        sums: ``(L, H, D)``.
        products: sums of ``q_i * q_j``, ``(L, H, D, D)``.
    """

    num_queries: int
    sums: torch.Tensor
    products: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Mean query, ``(L, H, D)``."""
        return self.sums / self.num_queries

    @property
    def covariance(self) -> torch.Tensor:
        """Sample covariance, ``(L, H, D, D)``."""
        mean = self.mean
        centred = self.products - self.num_queries * mean[..., :, None] * mean[..., None, :]
        return centred / (self.num_queries - 1)


@torch.inference_mode()
def query_moments(
    model: PressableModel, windows: Iterable[Sequence[int]], *, rotated: bool, num_skipped: int
) -> Moments:
    """Run windows of tokens through the model, one by one, and sum up its queries.

    Args:
        windows: token ids, each window longer than ``num_skipped``.
        rotated: queries after RoPE, at their own positions, or before it.
        num_skipped: first tokens of each window that do not count: queries of attention sinks are outliers.
    """
    sums: list[torch.Tensor | float] = [0.0] * len(model.attentions)
    products: list[torch.Tensor | float] = [0.0] * len(model.attentions)

    def hook_for(layer: int) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            queries = queries_of(module, kwargs, rotated=rotated)[:, num_skipped:].double()  # (H, T, D)
            sums[layer] = sums[layer] + queries.sum(dim=1)
            products[layer] = products[layer] + queries.transpose(1, 2) @ queries

        return add

    num_queries = 0
    with model.in_use(), model.presented(), ExitStack() as hooks:
        for layer, attention in enumerate(model.attentions):
            hooks.callback(attention.register_forward_pre_hook(hook_for(layer), with_kwargs=True).remove)
        for window in windows:
            model.hidden_states(torch.tensor([list(window)], device=model.device), use_cache=False)
            num_queries += len(window) - num_skipped
    return Moments(num_queries, _on_cpu(sums), _on_cpu(products))


def queries_of(module: nn.Module, kwargs: dict[str, Any], *, rotated: bool) -> torch.Tensor:
    """The queries of one window, ``(H, T, D)``, from the arguments of an attention."""
    queries = get_prerope_query_states(module, kwargs["hidden_states"])
    if rotated:
        cos, sin = kwargs["position_embeddings"]  # (1, T, D) each
        first, second = queries.chunk(2, dim=-1)
        queries = queries * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return queries[0]


def _on_cpu(layers: Sequence[torch.Tensor | float]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(layer).cpu() for layer in layers])
