"""What a press looks at besides the cache while text is generated: newest hidden states, and attention received.

Hooks on the attention modules; nothing is changed. Knows tensors. Does not know presses or when caches are compressed.

Letters in shape comments: B rows, Q tokens of a forward, H key-value heads, T cached entries, W newest tokens, E hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Watch:
    """Sees the forwards of one batch.

    Args:
        num_hidden: W, hidden states of the newest tokens that are kept.
        adds_up_attention: whether attention weights are added up; the model must then return them.
        num_heads: H.

    Attributes:
        num_new: the last tokens of the next forward that count; those before them may be padding.
        hidden: by layer, the newest hidden states that entered its attention, ``(B, W, E)``.
        received: by layer, ``(B, H, T, 2)``: the attention that each entry received, added up over queries and averaged
            over the query heads that share it, and the number of queries that saw it.
    """

    def __init__(self, num_hidden: int, adds_up_attention: bool, num_heads: int) -> None:
        self._num_hidden, self._adds_up, self._num_heads = num_hidden, adds_up_attention, num_heads
        self.num_new = 1
        self.hidden: dict[int, torch.Tensor] = {}
        self.received: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self, attentions: Sequence[nn.Module]) -> Iterator[None]:
        """A context in which forwards are seen."""
        with ExitStack() as hooks:
            for index, attention in enumerate(attentions):
                before, after = self._before(index), self._after(index)
                hooks.callback(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
                if self._adds_up:
                    hooks.callback(attention.register_forward_hook(after).remove)
            yield

    def _before(self, index: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            newest = (args[0] if args else kwargs["hidden_states"])[:, -self.num_new :]
            before = [self.hidden[index]] if index in self.hidden else []
            self.hidden[index] = torch.cat([*before, newest], dim=1)[:, -self._num_hidden :]

        return keep

    def _after(self, index: int) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            weights = output[1]
            assert weights is not None, "this attention returns no weights"
            found = _received(weights[:, :, -self.num_new :], self._num_heads)
            before = self.received.get(index)
            if before is not None:
                found += functional.pad(before, (0, 0, 0, found.shape[2] - before.shape[2]))
            self.received[index] = found

        return add


def _received(weights: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What entries receive from the last queries, ``(B, query heads, Q, T)``, as `Watch.received` has it."""
    num_queries, num_entries = weights.shape[2:]
    sums = weights.float().sum(dim=2).unflatten(1, (num_heads, -1)).mean(dim=2)  # (B, H, T)
    newer = torch.arange(num_entries, 0, -1, device=weights.device)  # queries from an entry's own token on
    return torch.stack([sums, newer.clamp(max=num_queries).expand_as(sums).float()], dim=-1)
