"""``generate_until``: prompts to continue, all with the same generation arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval_kvpress.engine.contexts import Context, in_order, is_first
from lm_eval_kvpress.engine.outcomes import Generated, GenerationSettings, Prompt
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.records.totals import TaskTotals, TotalsByTask

Tokens = tuple[int, ...]


class GenerationBatches:
    """One item per prompt (see `request_batches.RequestBatches`).

    Args:
        prompts: prompt by request.
        settings: how all of them are continued.
        to_text: makes the answer of the new token ids.
        found: what was counted while the requests were made, by task; part of the totals once they are answered.
    """

    request_type, splits_requests = "generate_until", False
    is_cached_whole, num_cache_copies = False, 2  # the compressed cache is copied into buffers that grow

    def __init__(
        self,
        prompts: Mapping[int, Prompt],
        settings: GenerationSettings,
        to_text: Callable[[Sequence[int]], str],
        found: Mapping[str, TaskTotals] | None = None,
    ) -> None:
        members = list(prompts)
        self._members = [members[index] for index in in_order([prompts[member].context for member in members])]
        self._prompts, self._settings, self._to_text = prompts, settings, to_text
        self._found = found or {}
        self.progress_total = len(self._members)
        self.requests: Sequence[int] = list(prompts)
        self.longest = max((len(prompt.context) for prompt in prompts.values()), default=0)

    @property
    def max_new_tokens(self) -> int:
        """New tokens per prompt, at most."""
        return self._settings.max_new_tokens

    def _prompt(self, item: int) -> Prompt:
        return self._prompts[self._members[item]]

    def segments(self) -> Iterator[list[int]]:
        yield list(range(len(self._members)))

    def length(self, item: int) -> int:
        return len(self._prompt(item).context) + self._settings.max_new_tokens

    def identity(self, item: int) -> Any:
        settings = self._settings
        how = sorted(settings.options.items()), settings.max_new_tokens, sorted(settings.stop_ids), settings.until
        return self._prompt(item), how, self._members[item]

    def contexts(self, items: Sequence[int]) -> list[Context]:
        return [self._prompt(item).context for item in items]

    def part(self, items: Sequence[int]) -> GenerationBatches:
        prompts = {self._members[item]: self._prompt(item) for item in items}
        part = GenerationBatches(prompts, self._settings, _no_text)
        part._members = list(prompts)
        return part

    def run(self, runner: Runner, items: Sequence[int], advance: Callable[[int], object]) -> list[Generated]:
        outcomes = runner.generate([self._prompt(item) for item in items], self._settings)
        advance(len(items))
        return outcomes

    def answers(self, outcomes: Mapping[int, Generated]) -> dict[int, str]:
        return {self._members[item]: self._to_text(outcome.ids) for item, outcome in outcomes.items()}

    def record_totals(self, outcomes: Mapping[int, Generated], totals: TotalsByTask) -> None:
        for task, counts in self._found.items():
            totals[task].merge(counts)
        seen = set[tuple[str, Tokens]]()
        for item in range(len(self._members)):
            prompt, outcome = self._prompt(item), outcomes[item]
            of_task = totals[prompt.id.task]
            of_task.add_split(prompt.context.num_held_back, prompt.context.num_question)
            if is_first(prompt.context, prompt.id.task, seen):
                of_task.add_context(outcome.context)
            of_task.num_tokens_generated += len(outcome.ids)
            of_task.num_texts += 1
            of_task.num_texts_at_limit += self._settings.hits_limit(outcome.ids)
            of_task.num_texts_compressed += outcome.num_compressions > 0
            of_task.num_decode_compressions += outcome.num_compressions
            if outcome.fidelity is not None and not outcome.context.is_short:
                of_task.text_fidelity.add(outcome.fidelity)
            of_task.max_decode_entries = max(of_task.max_decode_entries, outcome.max_entries)


def _no_text(ids: Sequence[int]) -> str:
    raise AssertionError("texts are made where the requests came from")
