"""What was kept of contexts and scored of tokens, summed over the outcomes of each task.

Knows plain values. Does not know lm-eval, presses, models or tensors. Totals are made of finished outcomes only, so a
batch that failed and was run again counts once.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval_kvpress.records.fidelity import Fidelity, FidelityTotals, TextFidelityTotals


@dataclass(frozen=True)
class ContextRecord:
    """One prefilled context.

    Attributes:
        num_tokens: tokens prefilled.
        kept_per_layer: entries that can be attended afterwards; the mean over heads if they keep different entries.
        bytes_before: bytes of its keys and values without a press.
        bytes_allocated: bytes they take afterwards. A masking press leaves them all allocated; of packed entries, what
            is held, scales included.
        pressed: whether a press ran over this context.
        is_short: whether it was left uncompressed because it is shorter than the press needs.
        is_shrunk: whether the press ran with a window shrunk to fit.
        notes: what the press did at this length that a reader must know (`PressSpec.notes`).
        bytes_unpacked: bytes that the entries which stay would take in the dtype of the model.
    """

    num_tokens: int
    kept_per_layer: tuple[float, ...]
    bytes_before: int
    bytes_allocated: int
    pressed: bool
    is_short: bool = False
    is_shrunk: bool = False
    notes: tuple[str, ...] = ()
    bytes_unpacked: int = 0

    @property
    def packed_share(self) -> float:
        """Bytes that the entries which stay take, as a fraction of those in the dtype of the model."""
        return packed_share(self.bytes_allocated, self.bytes_unpacked)


@dataclass
class KeptTotals:
    """Sums over many contexts."""

    num_contexts: int = 0
    num_tokens: int = 0
    kept_per_layer: list[float] = field(default_factory=list)
    bytes_before: int = 0
    bytes_allocated: int = 0
    bytes_unpacked: int = 0

    def add(self, record: ContextRecord) -> None:
        """Add one context."""
        kept = list(record.kept_per_layer)
        sizes = record.bytes_before, record.bytes_allocated, record.bytes_unpacked
        self.merge(KeptTotals(1, record.num_tokens, kept, *sizes))

    def merge(self, other: KeptTotals) -> None:
        """Add the sums over other contexts."""
        if not other.num_contexts:
            return
        before = self.kept_per_layer or [0.0] * len(other.kept_per_layer)
        self.num_contexts += other.num_contexts
        self.num_tokens += other.num_tokens
        self.kept_per_layer = [a + b for a, b in zip(before, other.kept_per_layer, strict=True)]
        self.bytes_before += other.bytes_before
        self.bytes_allocated += other.bytes_allocated
        self.bytes_unpacked += other.bytes_unpacked

    def summary(self) -> dict[str, Any]:
        """Counts, kept shares (fractions of the prefilled tokens) and bytes, ready for JSON."""
        shares = [kept / self.num_tokens for kept in self.kept_per_layer] if self.num_tokens else []
        share = sum(shares) / len(shares) if shares else None
        packed = packed_share(self.bytes_allocated, self.bytes_unpacked)
        return {
            "num_contexts": self.num_contexts,
            "num_tokens": self.num_tokens,
            "kept_tokens_per_layer": [round(kept, 3) for kept in self.kept_per_layer],
            "kept_share": share,
            "kept_share_min_layer": min(shares, default=None),
            "kept_share_max_layer": max(shares, default=None),
            "kv_bytes_before": self.bytes_before,
            "kv_bytes_allocated": self.bytes_allocated,
            "kv_bytes_unpacked": self.bytes_unpacked,
            "kv_bytes_effective": None if share is None else round(self.bytes_before * share * packed),
        }


@dataclass
class TaskTotals:
    """Sums over the outcomes of one task's requests.

    Attributes:
        pressed, unpressed: contexts that went through a press, and those that did not.
        num_short_contexts: contexts left uncompressed because they are shorter than the press needs.
        num_shrunk_contexts: contexts pressed with a window shrunk to fit.
        num_held_back: how many contexts and prompts had so many of their tokens fed after compression.
        num_question_tokens: how many contexts and prompts had a question of so many tokens in what was compressed,
            under a press that reads it there.
        num_prompts_without_question, num_prompts_without_context: where questions are looked for, prompts in which
            none was found, and those with nothing before it.
        num_questions_inside_tokens: questions that begin inside a token, which is held back with them: the context
            alone would have other tokens.
        num_cut_contexts: contexts and prompts that lost their beginning because they did not fit into ``max_length``.
        num_tokens, loglikelihood: scored tokens and their log-likelihood in nats.
        num_tokens_pressed, loglikelihood_pressed: of these, what was scored over a compressed cache.
        num_tokens_generated: tokens produced by ``generate_until``.
        num_texts, num_texts_at_limit: texts produced, and those that ended only because they had as many tokens as were
            allowed.
        num_texts_compressed: texts from whose cache a decoding press evicted entries
            before their end.
        num_decode_compressions, max_decode_entries: how often a decoding press evicted, and the most entries per layer
            that it found.
        num_continuations_compressed, num_tokens_after_eviction: continuations from whose cache a decoding press evicted
            entries before their end, and their tokens that were predicted afterwards.
        max_stream_entries, max_stream_bytes: under ``rolling=stream``, the most entries per layer that a chunk was
            scored over, and the most bytes that keys and values of all rows took.
        num_documents_resumed: documents whose losses an earlier run left on disk; not part of the summary, which is
            that of a run without interruption, as the next two.
        num_documents_timed: of these, those whose times are on disk too.
        num_documents_left: documents that were not finished then.
        fidelity: how far the tokens scored over compressed caches are from the full caches' predictions.
        text_fidelity: how far texts are from the full cache's, those of contexts too short for the press left out.
        notes: what a reader must know of the press, and for how many contexts.
    """

    pressed: KeptTotals = field(default_factory=KeptTotals)
    unpressed: KeptTotals = field(default_factory=KeptTotals)
    num_short_contexts: int = 0
    num_shrunk_contexts: int = 0
    num_held_back: Counter[int] = field(default_factory=Counter)
    num_question_tokens: Counter[int] = field(default_factory=Counter)
    num_prompts_without_question: int = 0
    num_prompts_without_context: int = 0
    num_questions_inside_tokens: int = 0
    num_cut_contexts: int = 0
    num_tokens: int = 0
    num_tokens_pressed: int = 0
    loglikelihood: float = 0.0
    loglikelihood_pressed: float = 0.0
    num_tokens_generated: int = 0
    num_texts: int = 0
    num_texts_at_limit: int = 0
    num_texts_compressed: int = 0
    num_decode_compressions: int = 0
    max_decode_entries: int = 0
    num_continuations_compressed: int = 0
    num_tokens_after_eviction: int = 0
    max_stream_entries: int = 0
    max_stream_bytes: int = 0
    num_documents_resumed: int = 0
    num_documents_timed: int = 0
    num_documents_left: int = 0
    fidelity: FidelityTotals = field(default_factory=FidelityTotals)
    text_fidelity: TextFidelityTotals = field(default_factory=TextFidelityTotals)
    notes: Counter[str] = field(default_factory=Counter)

    def add_context(self, record: ContextRecord) -> None:
        """Add one prefilled context."""
        (self.pressed if record.pressed else self.unpressed).add(record)
        self.num_short_contexts += record.is_short
        self.num_shrunk_contexts += record.is_shrunk
        self.notes.update(record.notes)

    def add_split(self, num_held_back: int, num_question: int) -> None:
        """Add how many tokens of a context or prompt are fed after compression, and are a question before that."""
        self.num_held_back[num_held_back] += 1
        if num_question:
            self.num_question_tokens[num_question] += 1

    def add_scores(
        self,
        logprobs: Sequence[float],
        *,
        pressed: bool,
        fidelity: Fidelity | None = None,
        doc_id: int | None = None,
        first_place: int = 0,
    ) -> None:
        """Add the log-probabilities of scored tokens, in nats; their fidelity counts where a press acted.

        Args:
            doc_id: lm-eval's number of their document.
            first_place: how many tokens stand before the first one of ``fidelity``, after the context.
        """
        total = math.fsum(logprobs)
        self.num_tokens += len(logprobs)
        self.loglikelihood += total
        if pressed:
            self.num_tokens_pressed += len(logprobs)
            self.loglikelihood_pressed += total
            if fidelity is not None:
                self.fidelity.add(fidelity, doc_id, first_place)

    def add_held(self, num_compressions: int, max_entries: int, num_tokens_after: int) -> None:
        """Add what a decoding press did while a continuation was scored, of which so many tokens came afterwards."""
        self.num_decode_compressions += num_compressions
        self.max_decode_entries = max(self.max_decode_entries, max_entries)
        self.num_continuations_compressed += num_compressions > 0
        self.num_tokens_after_eviction += num_tokens_after

    def merge(self, other: TaskTotals) -> None:
        """Add the totals of other requests of the task."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(own, KeptTotals | FidelityTotals | TextFidelityTotals):
                own.merge(value)
            elif isinstance(own, Counter):
                own.update(value)
            else:
                setattr(self, name, max(own, value) if name.startswith("max_") else own + value)

    def _perplexity_under_press(self) -> float | None:
        """None if contexts with tokens were too short for the press: the baseline counts their tokens, so this figure
        would cover other tokens than the baseline's."""
        if self.num_short_contexts and self.unpressed.num_tokens:
            return None
        return perplexity(self.loglikelihood_pressed, self.num_tokens_pressed)

    def summary(self) -> dict[str, Any]:
        """All totals and the token perplexities, ready for JSON; None where nothing was measured."""
        return {
            "contexts_pressed": self.pressed.summary(),
            "contexts_unpressed": self.unpressed.summary(),
            "num_short_contexts": self.num_short_contexts,
            "num_shrunk_contexts": self.num_shrunk_contexts,
            "num_cut_contexts": self.num_cut_contexts,
            "tokens_held_back": _spread(self.num_held_back),
            "tokens_of_question": _spread(self.num_question_tokens),
            "num_prompts_without_question": self.num_prompts_without_question,
            "num_prompts_without_context": self.num_prompts_without_context,
            "num_questions_inside_tokens": self.num_questions_inside_tokens,
            "tokens_scored": self.num_tokens,
            "tokens_scored_under_press": self.num_tokens_pressed,
            "token_perplexity": perplexity(self.loglikelihood, self.num_tokens),
            "token_perplexity_under_press": self._perplexity_under_press(),
            "tokens_generated": self.num_tokens_generated,
            "texts_generated": self.num_texts,
            "texts_at_limit": self.num_texts_at_limit,
            "texts_compressed_while_decoding": self.num_texts_compressed,
            "num_decode_compressions": self.num_decode_compressions,
            "max_decode_entries": self.max_decode_entries,
            "continuations_compressed_while_scored": self.num_continuations_compressed,
            "tokens_scored_after_eviction": self.num_tokens_after_eviction,
            "max_stream_entries": self.max_stream_entries,
            "max_stream_bytes": self.max_stream_bytes,
            "fidelity": self.fidelity.summary(),
            "text_fidelity": self.text_fidelity.summary(),
            "notes": dict(self.notes),
        }


def packed_share(bytes_allocated: int, bytes_unpacked: int) -> float:
    """The fraction of both; 1 without any entry."""
    return bytes_allocated / bytes_unpacked if bytes_unpacked else 1.0


def _spread(counts: Counter[int]) -> dict[str, float] | None:
    """The least, the median and the most of numbers, given how often each occurs; None without any."""
    if not counts:
        return None
    numbers = list(counts.elements())
    return {"least": min(numbers), "median": statistics.median(numbers), "most": max(numbers)}


def perplexity(loglikelihood: float, num_tokens: int) -> float | None:
    """``exp`` of the mean negative log-likelihood; None without tokens, infinite if that overflows a float."""
    if num_tokens == 0:
        return None
    try:
        return math.exp(-loglikelihood / num_tokens)
    except OverflowError:
        return math.inf


TotalsByTask = defaultdict[str, TaskTotals]


def new_totals() -> TotalsByTask:
    """Totals of no request yet, by task."""
    return defaultdict(TaskTotals)
