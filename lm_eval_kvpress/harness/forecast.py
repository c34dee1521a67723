"""What can be said before the work: that a press will act on nothing of what was asked.

The figures of such a run are the uncompressed ones. `messages` says so when it has ended, which may be hours later.
Knows settings and the engine's request batches. Does not know lm-eval, models or text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lm_eval_kvpress.engine.generation_batches import GenerationBatches
from lm_eval_kvpress.engine.likelihood_batches import LikelihoodBatches
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.engine.rolling_batches import RollingBatches
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.harness.stream_settings import stream_plan


def idle_presses(settings: Settings, max_length: int, requests: RequestBatches[Any]) -> Iterator[str]:
    """Say which press will act on none of the requests, and which argument changes that.

    Args:
        max_length: tokens of a context with its continuation, at most.
    """
    press, longest = settings.press, requests.longest
    if not press.is_none and press.compression_ratio != 0 and longest:
        if requests.request_type != "loglikelihood_rolling":
            held_back = f"query_tokens={settings.query_tokens} are" if settings.query_aware else "the question is"
            num_prefilled = _longest_compressed(requests)
            shrinks = num_prefilled >= press.min_context(num_prefilled)
            remedy = "short_context=shrink shrinks its window" if shrinks else "no short_context changes that"
            yield from _on_contexts(settings, num_prefilled, held_back, remedy)
        elif settings.rolling == "stream":
            yield from _on_streams(settings, longest)
        elif settings.rolling == "prefix":
            yield from _on_documents(settings, settings.rolling_window(max_length)[0], longest)
    if isinstance(requests, LikelihoodBatches | RollingBatches) and longest:
        yield from _on_scored(settings, requests.longest_scored)
    if isinstance(requests, GenerationBatches) and longest:
        yield from _on_texts(settings, longest, requests.max_new_tokens)


def _longest_compressed(requests: RequestBatches[Any]) -> int:
    """Tokens of the longest part of a context that is compressed: without what is fed afterwards."""
    contexts = (context for items in requests.segments() for context in requests.contexts(items))
    return max(len(context) - context.num_held_back for context in contexts)


def _on_contexts(settings: Settings, num_prefilled: int, held_back: str, remedy: str) -> Iterator[str]:
    """What is compressed of the longest context is too short for the press, or within its budget."""
    press = settings.press
    needed = press.min_context(num_prefilled if settings.short_context == "shrink" else None)
    if num_prefilled < needed:
        yield (
            f"press={press.name} needs {needed} tokens to compress and the longest context has {num_prefilled} "
            f"({held_back} fed afterwards): it will act on nothing; {remedy}"
        )
    elif press.kv_budget is not None and num_prefilled <= press.kv_budget:
        yield (
            f"press={press.name} keeps kv_budget={press.kv_budget} tokens and the longest context has {num_prefilled} "
            f"to compress ({held_back} fed afterwards): it will act on nothing; lower kv_budget"
        )


def _on_documents(settings: Settings, rolling_context: int, longest: int) -> Iterator[str]:
    if longest <= rolling_context:
        yield (
            f"press={settings.press_name} acts after the first rolling_context={rolling_context} tokens of a document "
            f"and the longest has {longest}: it will act on nothing; set rolling_context={max(1, longest // 2)} or less"
        )
    else:
        num_last, remedy = settings.query_tokens, "raise rolling_context"
        yield from _on_contexts(settings, rolling_context - num_last, f"query_tokens={num_last} are", remedy)


def _on_streams(settings: Settings, longest: int) -> Iterator[str]:
    first = stream_plan(settings).first_pressed
    if longest <= first:
        yield (
            f"press={settings.press_name} acts after the first {first} tokens of a document and the longest has "
            f"{longest}: it will act on nothing; lower stream_budget={settings.stream_budget}"
        )


def _on_scored(settings: Settings, longest: int) -> Iterator[str]:
    if settings.decoding is not None and settings.decode_scoring and longest <= settings.num_before_decoding:
        yield (
            f"press={settings.press_name} acts after {settings.num_before_decoding} scored tokens and a continuation "
            f"has at most {longest}: it will not act while scoring; lower compression_interval"
        )


def _on_texts(settings: Settings, longest: int, max_new_tokens: int) -> Iterator[str]:
    decoding = settings.decoding
    if decoding is None:
        return
    if max_new_tokens <= settings.num_before_decoding:
        yield (
            f"press={settings.press_name} acts after {settings.num_before_decoding} new tokens and a text has at most "
            f"{max_new_tokens}: it will not act while decoding; lower compression_interval or raise max_gen_toks"
        )
        return
    since_last = (max_new_tokens - 1 - settings.num_before_decoding) % decoding.interval
    most = longest + max_new_tokens - 2 - since_last  # of the newest two tokens one is still to be fed, one to come
    if decoding.target_size is not None and most <= decoding.target_size:
        yield (
            f"press={settings.press_name} keeps {decoding.target_size} entries while decoding and a prompt with its "
            f"text has at most {most} when it acts: it will not act while decoding; lower target_size"
        )
