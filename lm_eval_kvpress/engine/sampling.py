"""How the next token is chosen: greedily, or by drawing from the processed logits.

Knows transformers' logits processors. Does not know models, caches or text.

Letters in shape comments: B rows, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessorList

from lm_eval_kvpress.engine.logits_processors import looks_at_rows, processors_for
from lm_eval_kvpress.errors import UsageError


@dataclass(frozen=True)
class RowProcessors:
    """The processors of one row, which see its own tokens alone.

    Attributes:
        processors: transformers' logits processors, applied in order.
        num_context: tokens of the row's context.
    """

    processors: LogitsProcessorList
    num_context: int


@dataclass(frozen=True, eq=False)
class Sampler:
    """How the next token is chosen.

    Attributes:
        processors: transformers' logits processors for all rows at once, applied in order. They may ask which ids
            there are, and nothing else of them.
        uniforms: ``(B, tokens)`` numbers in [0, 1), one row per request, for sampling by inverse transform, so that a
            request draws the same tokens in every batch; None for greedy decoding.
        rows: instead of ``processors``, those of each row; empty where none looks at the order of tokens.
    """

    processors: LogitsProcessorList
    uniforms: torch.Tensor | None = None
    rows: tuple[RowProcessors, ...] = ()

    @property
    def is_repeatable(self) -> bool:
        """Whether a step that was captured once may be replayed: processors of rows count tokens on the host."""
        return not self.rows

    def on(self, device: torch.device) -> Sampler:
        """The sampler with its numbers on a device."""
        return self if self.uniforms is None else replace(self, uniforms=self.uniforms.to(device))

    def choose(self, ids: torch.Tensor, logits: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
        """The next token per row, ``(B,)``.

        Args:
            ids: ``(B, N)``, contexts up to a common column and new tokens behind it; empty places hold an id of the
                same row.
            logits: ``(B, V)``.
            step: tokens chosen before; ``(1,)``, on the device, in a step that a graph repeats.
        """
        scores = self._scores_by_row(ids, logits, step) if self.rows else self.processors(ids, logits)
        if self.uniforms is None:
            return scores.argmax(dim=-1)
        probabilities, tokens = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        cumulative = probabilities.cumsum(dim=-1)
        uniforms = self.uniforms[:, step, None] if isinstance(step, int) else self.uniforms.index_select(1, step)
        drawn = uniforms.to(cumulative) * cumulative[:, -1:]
        return tokens.gather(1, torch.searchsorted(cumulative, drawn, right=True).clamp(max=tokens.shape[1] - 1))[:, 0]

    def _scores_by_row(self, ids: torch.Tensor, logits: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
        """Processed logits, ``(B, V)``, each row's made of its own tokens without padding."""
        assert isinstance(step, int), "rows are counted on the host"
        longest = max(row.num_context for row in self.rows)
        return torch.cat(
            [
                row.processors(ids[place : place + 1, longest - row.num_context : longest + step], logits[place, None])
                for place, row in enumerate(self.rows)
            ]
        )


def sampler_for(
    options: Mapping[str, Any],
    contexts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    device: torch.device,
) -> Sampler:
    """Make the sampler of one batch.

    Args:
        options: by transformers' names; those without a processor but ``do_sample`` and ``eos_token_id`` are ignored.
        contexts: token ids of each row's prompt.
        seeds: one per row; a row's tokens depend on its own seed only.
        device: of logits and ids.

    Raises:
        UsageError: for a value that transformers refuses.
    """
    uniforms = _uniforms(seeds, max_new_tokens) if options.get("do_sample") else None
    if not looks_at_rows(options):
        return Sampler(processors_for(options, contexts[0], max_new_tokens, device), uniforms)
    rows = [
        RowProcessors(processors_for(options, context, max_new_tokens, device), len(context)) for context in contexts
    ]
    return Sampler(LogitsProcessorList(), uniforms, tuple(rows))


def check_options(options: Mapping[str, Any], num_logits: int) -> None:
    """Choose one token of even logits: a wrong value, or an id beyond the vocabulary, is found before any work.

    Raises:
        UsageError: in one line.
    """
    sampler = sampler_for(options, [[0]], [0], 1, torch.device("cpu"))
    try:
        sampler.choose(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, num_logits), 0)
    except (ValueError, IndexError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise UsageError(f"generation arguments ({given}) do not fit: {' '.join(str(error).split())}") from error


def _uniforms(seeds: Sequence[int], max_new_tokens: int) -> torch.Tensor:
    return torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
