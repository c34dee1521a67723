"""What a run says of itself: facts for lm-eval's results file, and lines on the screen.

Knows settings and sums. Does not know models, requests or lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lm_eval_kvpress.harness.arguments import Settings
from lm_eval_kvpress.harness.ranks import RankFacts
from lm_eval_kvpress.records.totals import TaskTotals

logger = logging.getLogger("lm_eval_kvpress")


def asked(settings: Settings, max_length: int) -> dict[str, Any]:
    """Press and protocol."""
    context, score_tokens = settings.rolling_window(max_length) if settings.rolling == "prefix" else (None, None)
    of_streams = ("stream_budget", "stream_chunk", "stream_positions") if settings.rolling == "stream" else ()
    return {
        "press": settings.describe_press(),
        "protocol": {
            "query_tokens": settings.query_tokens,
            "rolling": settings.rolling,
            "rolling_context": context,
            "rolling_score": score_tokens,
            "short_context": settings.short_context,
            **{name: getattr(settings, name) for name in of_streams},
            "max_length": max_length,
            "press_acts_on_rolling": settings.rolling != "one_pass" and not settings.press.is_none,
        },
    }


def measured(facts: RankFacts) -> dict[str, Any]:
    """What was kept, scored and timed, by how many processes."""
    return {
        "num_ranks": facts.num_ranks,
        "decoding_steps": facts.records.decoding_steps() or None,
        "tasks": {task: totals.summary() for task, totals in facts.totals.items()},
        "throughput": facts.records.summary(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "kvpress", "lm_eval")}


def tell(settings: Settings, tasks: Mapping[str, TaskTotals]) -> None:
    """Says on the screen what was kept, and warns where the press acted on nothing."""
    name, decoding = settings.press_name, settings.decoding
    for task, totals in tasks.items():
        pressed, unpressed = totals.pressed.summary(), totals.unpressed.num_contexts
        if pressed["num_contexts"]:
            logger.info(
                "%s: press=%s kept %.1f %% of %d tokens in %d contexts (layers %.1f to %.1f %%); %d contexts "
                "were left uncompressed",
                *(task, name, 100 * pressed["kept_share"], pressed["num_tokens"], pressed["num_contexts"]),
                *(100 * pressed["kept_share_min_layer"], 100 * pressed["kept_share_max_layer"], unpressed),
            )
        elif settings.rolling == "stream" and totals.num_tokens_pressed:
            logger.info(
                "%s: press=%s held every layer to %d entries; %d of %d tokens were scored after an eviction",
                *(task, name, settings.stream_budget, totals.num_tokens_pressed, totals.num_tokens),
            )
        elif not totals.num_texts_compressed and (decoding is not None or not settings.press.is_none):
            logger.warning("%s: press=%s compressed nothing; its figures are the uncompressed ones", task, name)
        if totals.num_short_contexts and pressed["num_contexts"]:
            logger.warning(
                "%s: %d of %d contexts were too short for press=%s and stayed uncompressed; figures are of both",
                *(task, totals.num_short_contexts, pressed["num_contexts"] + unpressed, name),
            )
        if decoding is not None and totals.num_texts_compressed:
            logger.info(
                "%s: press=%s compressed %d of %d texts while decoding, %d times, to %d entries a layer of at most %d",
                *(task, name, totals.num_texts_compressed, totals.num_texts, totals.num_decode_compressions),
                *(decoding.target_size, totals.max_decode_entries),
            )
        elif decoding is not None and pressed["num_contexts"] and totals.num_texts:
            logger.warning(
                "%s: press=%s compressed none of %d texts while decoding (to %d entries every %d tokens); its figures "
                "are those of its press of the prefill",
                *(task, name, totals.num_texts, decoding.target_size, decoding.interval),
            )
        for note, count in totals.notes.items():
            logger.warning("%s: %s (in %d of %d contexts)", task, note, count, pressed["num_contexts"])


def speak_as(other: str) -> None:
    """Has another package's handlers, if it has any, print this one's messages, from its level on, warnings always:
    lm-eval's command sets up its own logger alone, and what another package says below a warning is lost."""
    theirs = logging.getLogger(other)
    for handler in theirs.handlers:
        logger.addHandler(handler)  # one that is there already stays there once
        logger.setLevel(min(theirs.level, logging.WARNING))
