"""How documents are streamed through a cache of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.cache.window_layer import window_places


@dataclass(frozen=True)
class StreamPlan:
    """The budget of a stream and how its press acts.

    Attributes:
        budget: entries that every layer holds at most before a chunk is scored.
        chunk: tokens scored per step; 1 is the strict protocol of the papers.
        rotate: whether keys are rotated by their place in the cache, instead of their place in the document.
        num_hidden: hidden states of the newest tokens that the press sees: the chunk and one before it, or
            ``budget + chunk`` for a press that takes statistics over them.
        num_sinks: how many first entries the press keeps if all others it keeps are the newest, whatever they hold;
            the cache then does that in place (`cache.window_layer`). None asks the press.
        quantization: how entries are packed between two steps; None for full precision. The press is asked then, also
            about what it could do in place.
        row_by_row: whether the press must choose for each document by itself, because it draws random numbers.
    """

    budget: int
    chunk: int
    rotate: bool = True
    num_hidden: int = 0
    num_sinks: int | None = None
    row_by_row: bool = False
    quantization: Quantization | None = None

    @property
    def first_pressed(self) -> int:
        """Place of the first token that is scored after an eviction: that of the first chunk beyond the budget.

        The prefix token takes an entry, so after ``n`` tokens the cache has seen ``n`` entries, and evicts above
        ``budget``.
        """
        return -(-(self.budget + 1) // self.chunk) * self.chunk

    def num_entries(self, num_tokens: int) -> int:
        """Entries that a document of so many tokens takes in each layer, a chunk being scored included."""
        if self.num_sinks is not None:
            return window_places(self.budget, self.chunk)
        return min(num_tokens, self.budget + self.chunk)
