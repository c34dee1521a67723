"""The inputs and outcomes of batches, as plain values; an outcome holds all that answers and totals are made of.

Knows token ids. Does not know text, lm-eval or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.records.fidelity import Fidelity, TextFidelity
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.records.totals import ContextRecord


@dataclass(frozen=True)
class Scored:
    """The outcome of a context with its continuations, or of a window.

    Attributes:
        branches: one score per continuation.
        pressed: whether they count as scored under the press (`compression.CompressedBatch`).
        context: what was kept of the context; None where nothing was prefilled.
    """

    branches: tuple[BranchScore, ...]
    pressed: bool
    context: ContextRecord | None


@dataclass(frozen=True)
class Generated:
    """The outcome of a prompt.

    Attributes:
        ids: the new token ids.
        context: what was kept of the prompt.
        num_compressions: how often a decoding press evicted entries before the last token.
        max_entries: the most entries per layer that the press found when it did.
        fidelity: beside the full cache's text, where that is measured.
    """

    ids: tuple[int, ...]
    context: ContextRecord
    num_compressions: int = 0
    max_entries: int = 0
    fidelity: TextFidelity | None = None


@dataclass(frozen=True)
class Streamed:
    """The outcome of a document that was streamed through a cache of fixed size.

    Attributes:
        losses: negative log-likelihoods in nats, by position.
        num_pressed: how many of them, counted from the end, were scored after the first eviction.
        max_entries: the most entries per layer that a chunk was scored over.
        max_bytes: the most bytes that keys and values of all rows of its batch took.
        first_pressed: place of the first token that may be scored after an eviction.
        fidelity: of the tokens from there on that fit into the model's window, where that is measured.
    """

    losses: tuple[float, ...]
    num_pressed: int = 0
    max_entries: int = 0
    max_bytes: int = 0
    first_pressed: int = 0
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Document:
    """A document to stream.

    Attributes:
        tokens: token ids.
        id: its request.
    """

    tokens: tuple[int, ...]
    id: RequestId


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        context: in its two parts.
        seed: of its random draws, where tokens are sampled.
        id: its request.
    """

    context: Context
    seed: int
    id: RequestId


@dataclass(frozen=True, eq=False)
class GenerationSettings:
    """How prompts are continued.

    Attributes:
        options: of `sampling.sampler_for`, those that act; JSON can hold them.
        max_new_tokens: tokens per prompt, at most.
        stop_ids: token ids that end a text.
        stopped: says from the new tokens, ``(B, n)``, which texts are complete.
        until: the strings that `stopped` looks for.
    """

    options: Mapping[str, Any]
    max_new_tokens: int
    stop_ids: frozenset[int]
    stopped: Callable[[torch.Tensor], Sequence[bool]]
    until: tuple[str, ...] = ()

    def hits_limit(self, ids: Sequence[int]) -> bool:
        """Whether nothing but ``max_new_tokens`` ended a text."""
        is_full = len(ids) == self.max_new_tokens and ids[-1] not in self.stop_ids
        return is_full and not self.stopped(torch.tensor([list(ids)]))[0]
