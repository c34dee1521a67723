"""A projection of queries or keys with its norm behind it, for presses that call the projection alone.

kvpress applies the norms of Qwen3 and Gemma3 by itself and knows no others: scores would come from queries that the
model never attends with. Here a press that calls ``q_proj`` gets normed queries, and the norm itself is lent as the
identity, so that the model's own forward computes what it did. Knows modules. Does not know architectures or presses.

Letters in shape comments: B rows, T tokens, H heads, D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lm_eval_kvpress.models.lend import lend


class NormedProjection:
    """Callable like the projection; it holds no weights of its own and cannot go stale.

    Args:
        projection: ``(..., E)`` to ``(..., H * D)``.
        norm: over the whole projection, or over each head.
        head_dim: D, for a norm over each head; None for one over the whole projection.
    """

    def __init__(self, projection: nn.Module, norm: nn.Module, head_dim: int | None) -> None:
        self._projection, self._norm, self._head_dim = projection, norm, head_dim

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(..., T, E)`` to ``(..., T, H * D)``, normed, before RoPE."""
        rows: torch.Tensor = self._projection(hidden_states)
        if self._head_dim is None:
            normed: torch.Tensor = self._norm(rows)
            return normed
        by_head = rows.view(-1, rows.shape[-2], rows.shape[-1] // self._head_dim, self._head_dim)  # (B, T, H, D)
        states: torch.Tensor = self._norm(by_head.transpose(1, 2))  # StableLM has a norm for each head, in dim 1
        return states.transpose(1, 2).reshape(rows.shape)


@contextmanager
def norms_lent(attention: Any, names: tuple[str, str], head_dim: int | None) -> Iterator[None]:
    """Lend an attention projections of queries and keys that have its norms behind them.

    Args:
        names: of the norms of queries and keys; nothing is lent to an attention without them.
        head_dim: as for `NormedProjection`.
    """
    with ExitStack() as loans:
        for projection, norm in zip(("q_proj", "k_proj"), names, strict=True):
            if isinstance(getattr(attention, norm, None), nn.Module):
                normed = NormedProjection(getattr(attention, projection), getattr(attention, norm), head_dim)
                loans.enter_context(lend(attention, **{projection: normed, norm: nn.Identity()}))
        yield
