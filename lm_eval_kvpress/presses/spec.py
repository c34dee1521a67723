"""A press with all its arguments as a value: what it needs, what it does at a given length, and fresh presses from it.

``compression_ratio`` is, as in kvpress, the fraction of tokens **removed**. Does not know models or text. `parse` makes
specs from what the user types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvpress import BasePress

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses import build, notes
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO, RATIOS, arguments_of
from lm_eval_kvpress.presses.catalog import Row
from lm_eval_kvpress.presses.names import NONE, parse_name
from lm_eval_kvpress.presses.per_layer import PerLayerPress, check_number_of_ratios
from lm_eval_kvpress.presses.statistics import STATISTICS, Statistics, read_statistics


@dataclass(frozen=True)
class PressSpec:
    """A press with all its arguments, from which any number of fresh presses can be built.

    ``parse_press(spec.name, spec.arguments)`` is the spec again.

    Attributes:
        name: in full, aliases resolved, such as ``adakv:snapkv``.
        arguments: every argument with its value, defaults included, ``compression_ratio`` or ``kv_budget`` first; JSON
            can hold it.
        question_tokens: tokens of the question at the end of the context at hand, for a press that reads it; 0 of the
            press as such.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    question_tokens: int = 0

    @property
    def compression_ratio(self) -> float | None:
        """The fraction of tokens removed, over all layers; None with a budget, or where the text decides."""
        ratios = self.arguments.get(RATIOS)
        if ratios is not None:
            return sum(ratios) / len(ratios)
        if self.is_none or not any(row.removes_tokens for row in self.rows):
            return 0.0
        return self.arguments.get(RATIO)

    @property
    def kv_budget(self) -> int | None:
        """Tokens kept of each context, in each layer (PyramidKV: on the average of the layers); None with a ratio."""
        return self.arguments.get(BUDGET)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the catalog for the presses of its name, outermost first; empty for ``none``."""
        return () if self.is_none else parse_name(self.name).rows

    @property
    def is_none(self) -> bool:
        """Whether there is no press at all; a press at ratio 0 is built and run like any other."""
        return self.name == NONE

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation that the press needs, or None if any will do."""
        return next((row.attention for row in self.rows if row.attention), None)

    @property
    def masks(self) -> bool:
        """Whether the press hides entries head by head instead of shrinking the cache; its bytes do not fall then."""
        return any(row.masks for row in self.rows)

    @property
    def rerotates(self) -> bool:
        """Whether kept keys move to positions ``0..kept-1``, so that queries continue at the kept length."""
        return any(row.rerotates and self.arguments.get(row.rerotates_if, True) for row in self.rows)

    @property
    def reads_question(self) -> bool:
        """Whether it scores a context by the question behind it, so that it must be told where the question begins."""
        return any(row.reads_question for row in self.rows)

    @property
    def batches(self) -> bool:
        """Whether contexts of equal length may share a prefill: what is kept of one does not depend on the others."""
        return all(row.batches and not self.arguments.get(row.batches_unless) for row in self.rows)

    @property
    def shares_prefill(self) -> bool:
        """Whether the press is nothing but a hook after each layer's attention, so that one forward serves many."""
        return all(row.is_hook for row in self.rows) and self.attn_implementation != "eager"

    @property
    def reads_outputs(self) -> bool:
        """Whether the press may read what an attention returns.

        kvpress's own hook reads the cache, the inputs of the attention, and, under eager attention, its weights.
        """
        has_that_hook = all(row.factory.forward_hook is BasePress.forward_hook for row in self.rows)
        return not (self.shares_prefill and has_that_hook)

    @property
    def changes_entries(self) -> str | None:
        """What it does to entries that it does not remove, where it removes none; None otherwise."""
        own = self.own_arguments()
        changes = [row.changes(own[row.name]) for row in self.rows if row.changes is not None]
        return "; ".join(filter(None, changes)) or None

    @property
    def statistics(self) -> Statistics | None:
        """The statistics of the model that it reads from a file, or None.

        Raises:
            UsageError: if the file is gone.
        """
        for row in self.rows:
            if STATISTICS in arguments_of(row):
                return read_statistics(row.name, self.own_arguments()[row.name][STATISTICS])
        return None

    def for_question(self, num_tokens: int) -> PressSpec:
        """The press for contexts that end with a question of so many tokens; itself if it does not read questions."""
        return replace(self, question_tokens=num_tokens) if self.reads_question else self

    def min_context(self, shrunk_to: int | None = None) -> int:
        """Return the least number of context tokens on which the press runs and can remove something.

        It is the same at every ratio, so that a baseline at ratio 0 counts the same contexts.

        Args:
            shrunk_to: with windows and sinks shrunk to a context of so many tokens. The press runs on that one if what
                is returned is no more: not on one token, nor on any that ``simlayerkv`` and ``dms``, whose windows
                do not shrink, keep whole.
        """
        own = self.own_arguments(shrunk_to)
        return max((build.min_context(row, own[row.name]) for row in self.rows), default=1)

    def check_layers(self, num_layers: int) -> None:
        """Refuse a press that is made for another number of layers.

        Raises:
            UsageError: one line; also raised when such a press is first run.
        """
        if RATIOS in self.arguments:
            check_number_of_ratios(self.arguments[RATIOS], num_layers)

    def ratio_for(self, context_tokens: int) -> float | None:
        """Return the ratio for a context: the one asked for, or the one that leaves ``kv_budget`` tokens."""
        if self.kv_budget is None:
            return self.compression_ratio
        return ratio_that_keeps(self.kv_budget, context_tokens)

    def own_arguments(self, context_tokens: int | None = None) -> dict[str, dict[str, Any]]:
        """Return each press's own arguments, under the names of its class.

        Args:
            context_tokens: shrink windows and sinks to a context of that length, if it is too short for them.
        """
        if self.is_none:
            return {}
        written, own = parse_name(self.name).argument_names, {}
        for row in self.rows:
            values = {key: self.arguments[written[row.name, key]] for key in arguments_of(row)}
            if row.reads_question:
                values["window_size"] = self.question_tokens
            own[row.name] = values if context_tokens is None else build.shrink(row, values, context_tokens)
        return own

    def build(self, context_tokens: int, *, shrink: bool = False) -> BasePress | None:
        """Build a fresh press for a context, or None for ``none``.

        Args:
            context_tokens: tokens prefilled under the press.
            shrink: on contexts shorter than `min_context`, window and sink sizes shrink in proportion until they
                take at most a quarter of the context, so that the press runs. None is returned for a context of one
                token, of which nothing can be removed. ``simlayerkv`` and ``dms`` need not shrink: by their own rule
                they keep all of a short context.

        Raises:
            UsageError: if the context is too short and ``shrink`` is false.
        """
        if self.is_none:
            return None
        is_short = context_tokens < self.min_context()
        if is_short and not shrink:
            raise UsageError(
                f"press={self.name} needs a context of at least {self.min_context()} tokens, not {context_tokens}"
            )
        if is_short and context_tokens < 2:
            return None
        assert self.question_tokens or not self.reads_question, f"press={self.name} was told of no question"
        own = self.own_arguments(context_tokens)
        return build.build_press(parse_name(self.name), own, self.ratio_for(context_tokens))

    def describe(self) -> dict[str, Any]:
        """Return what was asked for, for the record; JSON can hold it. What was kept must be measured."""
        ratio, statistics = self.compression_ratio, self.statistics
        return {
            "name": self.name,
            "arguments": dict(self.arguments),
            RATIO: ratio,
            "kept_share_asked": None if ratio is None else 1 - ratio,
            BUDGET: self.kv_budget,
            "classes": [row.factory.__name__ for row in self.rows],
            "papers": [row.paper for row in self.rows if row.paper],
            "masks": self.masks,
            "rerotates": self.rerotates,
            "changes_entries": self.changes_entries,
            "min_context": self.min_context(),
            **({} if statistics is None else {STATISTICS: statistics.describe()}),
        }

    def notes(self, context_tokens: int, num_layers: int) -> list[str]:
        """Return what a reader of the figures must know about the press at this length, such as a fall-back that
        kvpress does not report. The wording does not depend on the length."""
        if self.is_none:
            return []
        ratio = self.ratio_for(context_tokens) or 0.0
        largest = max(self.arguments.get(RATIOS, [ratio]))  # per_layer: of the layer that loses most
        num_kept = max(1, int(context_tokens * (1 - largest)))
        own = self.own_arguments(context_tokens)
        found = list(notes.budget(self.kv_budget, context_tokens))
        for row in self.rows:
            if row.notes is not None:
                found += row.notes(own[row.name], ratio, context_tokens, num_layers)
            if largest > 0 and self._keeps_a_known_number:
                found += notes.protected(row.name, own[row.name], row.protects, num_kept, context_tokens)
        return found

    @property
    def _keeps_a_known_number(self) -> bool:
        """Whether the ratio alone says how many tokens each layer keeps."""
        sizing = [row for row in parse_name(self.name).sizing_rows if row.factory is not PerLayerPress]
        return not any(row.no_ratio or row.no_budget for row in sizing)


def ratio_that_keeps(num_tokens: int, context_tokens: int) -> float:
    """Return the ratio at which kvpress's ``int(context_tokens * (1 - ratio))`` is ``num_tokens``.

    It is 0 if the context has no more tokens. The plain ``1 - num_tokens / context_tokens`` loses a token to rounding
    at one length in ten or so. The slack of a thousandth of a token is far above rounding errors and far below a token.
    """
    if num_tokens >= context_tokens:
        return 0.0
    return 1 - (num_tokens + 1e-3) / context_tokens
