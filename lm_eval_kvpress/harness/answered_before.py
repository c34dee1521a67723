"""Answers that an earlier run gave: how many of a run's figures they are in, and what is not known of them.

lm-eval's ``--use_cache`` hands out its answers without asking the model, which sees the other requests alone. Finished
documents of ``stream_output`` come with all that was counted of them, but not with their times. A sweep that goes on
on the same machine has the times of all batches, but of a document in windows only those since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval_kvpress.harness.ranks import RankFacts

OF_THE_CACHE = "what was kept for the {} requests answered from use_cache, and how long they took, is not known"
OF_THE_STREAM = "the {} documents that stream_output held are in every figure but the times"
OF_THE_SWEEP = (
    "{} windows were answered by an earlier call of the sweep: they are in every figure, but in no latency and no "
    "record of a document"
)
OF_OTHER_MACHINES = (
    "{} batches ran on other machines, or on ones that their records do not name: their answers are in every figure "
    "but the times, which are those of {}"
)
IN_OTHER_BATCHES = (
    "documents that were left may have met other neighbours in their batches: their losses then differ by rounding, up "
    "to 1e-5 nats, from those of a run without interruption, and max_stream_bytes is of other batches (batch_size=1: "
    "no difference)"
)


def on_each_read(cache: Any, count: Callable[[], None]) -> None:
    """Have ``count`` called for every answer that lm-eval takes from its cache, a ``SqliteDict``."""
    decode = cache.decode

    def decode_and_count(value: Any) -> Any:
        count()
        return decode(value)

    cache.decode = decode_and_count


def answered_before(facts: RankFacts, machine: str, *, is_batched: bool) -> dict[str, Any]:
    """How many requests were answered by an earlier run or elsewhere, and what that means for the record.

    Args:
        machine: whose times the record has.
        is_batched: whether documents may have been streamed side by side.
    """
    num_cached = facts.num_from_cache
    totals = facts.totals.values()
    num_resumed = sum(of_task.num_documents_resumed for of_task in totals)
    num_untimed = num_resumed - sum(of_task.num_documents_timed for of_task in totals)
    num_left = sum(of_task.num_documents_left for of_task in totals)
    notes = []
    if num_cached:
        notes.append(OF_THE_CACHE.format(num_cached))
    if num_untimed:
        notes.append(OF_THE_STREAM.format(num_untimed))
    if num_resumed and num_left and is_batched:
        notes.append(IN_OTHER_BATCHES)
    if facts.num_untimed_windows:
        notes.append(OF_THE_SWEEP.format(facts.num_untimed_windows))
    num_elsewhere = len(facts.records.batches) - len(facts.records.on(machine).batches)
    if num_elsewhere:
        notes.append(OF_OTHER_MACHINES.format(num_elsewhere, machine))
    return {
        "requests_from_use_cache": num_cached,
        "documents_from_stream_output": num_untimed,
        "windows_from_earlier_calls": facts.num_untimed_windows,
        "batches_on_other_machines": num_elsewhere,
        "notes": notes,
    }
