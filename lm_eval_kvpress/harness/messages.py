"""What a run logs when it ends: how much the press kept, what was measured on that, and where it acted on nothing.

A line per task, or over all tasks where those would be more than a screen should hold (MMLU alone has 57).

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


MAX_LINES = 4
"""Lines about tasks; with that of the records a run ends in five of ours."""
NUM_NAMED = 3


def log_kept_shares(settings: Settings, totals: Mapping[str, TaskTotals]) -> None:
    """Log what the press did to each task; a warning where it did less than its name promises."""
    lines = [(level, f"{task}: {text}") for task, part in totals.items() for level, text in _messages(settings, part)]
    for level, text in lines if len(lines) <= MAX_LINES else _over_all(settings, totals):
        logger.log(level, "%s", text)


def _over_all(settings: Settings, totals: Mapping[str, TaskTotals]) -> list[Message]:
    """The lines of all tasks together, and which tasks the press left alone."""
    merged = TaskTotals()
    for of_task in totals.values():
        merged.merge(of_task)
    label = f"{len(totals)} tasks" if len(totals) > 1 else next(iter(totals))
    lines = [(level, f"{label}: {text}") for level, text in _messages(settings, merged)]
    idle = [task for task, of_task in totals.items() if _is_idle(settings, of_task)]
    if 0 < len(idle) < len(totals):
        named = ", ".join(idle[:NUM_NAMED]) + (", ..." if len(idle) > NUM_NAMED else "")
        lines.append((logging.WARNING, f"press={settings.press_name} compressed nothing in {len(idle)} tasks: {named}"))
    if len(lines) > MAX_LINES:
        rest = f"{len(lines) - MAX_LINES + 1} more lines stand in the results, under config.kvpress"
        lines = [*lines[: MAX_LINES - 1], (logging.WARNING, rest)]
    return lines


def _is_idle(settings: Settings, totals: TaskTotals) -> bool:
    """Whether the press compressed nothing of a task."""
    return any(text.startswith(_nothing(settings)) for _, text in _on_prefill(settings, totals))


def _nothing(settings: Settings) -> str:
    return f"press={settings.press_name} compressed nothing"


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
            f"{totals.unpressed.num_contexts} contexts were left uncompressed; {_measured(totals)}",
        )
    elif settings.rolling == "stream" and totals.num_tokens_pressed:
        yield (
            logging.INFO,
            f"press={press} held every layer to {settings.stream_budget} entries; {totals.num_tokens_pressed} of "
            f"{totals.num_tokens} tokens were scored after an eviction",
        )
    elif not totals.num_decode_compressions and (settings.decoding is not None or not settings.press.is_none):
        figures = (
            "uncompressed ones" if settings.quantization is None else f"ones of kv_quant={settings.kv_quant} alone"
        )
        yield logging.WARNING, f"{_nothing(settings)}; its figures are the {figures}"


def _measured(totals: TaskTotals) -> str:
    """What was measured over compressed caches."""
    parts = {"tokens were scored": totals.num_tokens_pressed, "texts were generated": totals.num_texts}
    found = " and ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    return f"{found or 'nothing was scored'} over what was kept"


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
    size = (
        f"{decoding.target_size} entries a layer"
        if decoding.share_evicted is None
        else f"{100 * (1 - decoding.share_evicted):g} % of the tokens seen"
    )
    if totals.num_continuations_compressed:
        yield (
            logging.INFO,
            f"press={press} compressed {totals.num_continuations_compressed} continuations while they were scored, to "
            f"{size}; {totals.num_tokens_after_eviction} of {totals.num_tokens} tokens were scored afterwards",
        )
    if totals.num_texts_compressed:
        yield (
            logging.INFO,
            f"press={press} compressed {totals.num_texts_compressed} of {totals.num_texts} texts while decoding, "
            f"{totals.num_decode_compressions} times, to {size} of at most {totals.max_decode_entries}",
        )
    elif totals.pressed.num_contexts and totals.num_texts:
        yield (
            logging.WARNING,
            f"press={press} compressed none of {totals.num_texts} texts while decoding (to {size} every "
            f"{decoding.interval} tokens); its figures are those of its press of the prefill",
        )
