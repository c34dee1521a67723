"""What a run logs when it ends: how much the press kept of each task's contexts, and where it acted on nothing.

Knows settings and sums. Does not know models, requests or lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from lm_eval_kvpress.harness.ranks import RankFacts
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.records.totals import TaskTotals

logger = logging.getLogger("lm_eval_kvpress")

Message = tuple[int, str]  # a level of `logging` and the text


def log_kept_shares(settings: Settings, totals: Mapping[str, TaskTotals]) -> None:
    """Log what the press did to each task; a warning where it did less than its name promises."""
    for task, of_task in totals.items():
        for level, text in _messages(settings, of_task):
            logger.log(level, "%s: %s", task, text)


def log_records(settings: Settings, facts: RankFacts) -> None:
    """Log where the records of a run are, and how many requests they tell of."""
    if settings.throughput_log is not None:
        ranks = "" if facts.num_ranks == 1 else f", with a file .rankN beside it for each of {facts.num_ranks} ranks"
        num_requests = len(facts.records.requests)
        logger.info("throughput_log=%s tells of %d requests%s", settings.throughput_log, num_requests, ranks)


def _messages(settings: Settings, totals: TaskTotals) -> Iterator[Message]:
    yield from _on_prefill(settings, totals)
    yield from _on_packing(settings, totals)
    yield from _on_short_contexts(settings, totals)
    if settings.decoding is not None:
        yield from _on_decoding(settings, totals)
    for note, count in totals.notes.items():
        yield logging.WARNING, f"{note} (in {count} of {totals.pressed.num_contexts} contexts)"


def _on_prefill(settings: Settings, totals: TaskTotals) -> Iterator[Message]:
    press, pressed = settings.press_name, totals.pressed.summary()
    if pressed["num_contexts"]:
        lowest, highest = (100 * pressed[f"kept_share_{end}_layer"] for end in ("min", "max"))
        yield (
            logging.INFO,
            f"press={press} kept {100 * pressed['kept_share']:.1f} % of {pressed['num_tokens']} tokens in "
            f"{pressed['num_contexts']} contexts (layers {lowest:.1f} to {highest:.1f} %); "
            f"{totals.unpressed.num_contexts} contexts were left uncompressed",
        )
    elif settings.rolling == "stream" and totals.num_tokens_pressed:
        yield (
            logging.INFO,
            f"press={press} held every layer to {settings.stream_budget} entries; {totals.num_tokens_pressed} of "
            f"{totals.num_tokens} tokens were scored after an eviction",
        )
    elif not totals.num_texts_compressed and (settings.decoding is not None or not settings.press.is_none):
        figures = (
            "uncompressed ones" if settings.quantization is None else f"ones of kv_quant={settings.kv_quant} alone"
        )
        yield logging.WARNING, f"press={press} compressed nothing; its figures are the {figures}"


def _on_packing(settings: Settings, totals: TaskTotals) -> Iterator[Message]:
    allocated, unpacked, before = (
        getattr(totals.pressed, name) + getattr(totals.unpressed, name)
        for name in ("bytes_allocated", "bytes_unpacked", "bytes_before")
    )
    if settings.quantization is not None and unpacked:
        yield (
            logging.INFO,
            f"kv_quant={settings.kv_quant} stores entries in {100 * allocated / unpacked:.1f} % of their bytes, and "
            f"caches in {100 * allocated / before:.1f} % of those of the full ones",
        )


def _on_short_contexts(settings: Settings, totals: TaskTotals) -> Iterator[Message]:
    num_contexts = totals.pressed.num_contexts + totals.unpressed.num_contexts
    if totals.num_short_contexts and totals.pressed.num_contexts:
        yield (
            logging.WARNING,
            f"{totals.num_short_contexts} of {num_contexts} contexts were too short for press={settings.press_name} "
            "and stayed uncompressed; figures are of both",
        )


def _on_decoding(settings: Settings, totals: TaskTotals) -> Iterator[Message]:
    press, decoding = settings.press_name, settings.decoding
    assert decoding is not None
    if totals.num_texts_compressed:
        yield (
            logging.INFO,
            f"press={press} compressed {totals.num_texts_compressed} of {totals.num_texts} texts while decoding, "
            f"{totals.num_decode_compressions} times, to {decoding.target_size} entries a layer of at most "
            f"{totals.max_decode_entries}",
        )
    elif totals.pressed.num_contexts and totals.num_texts:
        yield (
            logging.WARNING,
            f"press={press} compressed none of {totals.num_texts} texts while decoding (to {decoding.target_size} "
            f"entries every {decoding.interval} tokens); its figures are those of its press of the prefill",
        )
