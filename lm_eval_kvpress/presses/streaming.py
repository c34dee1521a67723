"""Which presses can compress a stream's cache again and again, and what they see of it (``rolling=stream``).

A stream asks its press at every step which entries of the cache to keep. Their tokens were fed long ago; hidden states
are known of the newest tokens only. That is defined for presses that score single entries by their keys, their place,
or the newest queries. It is not defined for presses that need every token's query or attention (the prefill presses),
that decide over layers or heads together, or that change keys.

Knows press names. Does not know models or text.
"""

from __future__ import annotations

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.decodable import check_lags
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec

SEES_CHUNK, SEES_CACHE = "chunk", "cache"

STREAM_PRESSES = {
    "streaming_llm": SEES_CHUNK,
    "snapkv": SEES_CHUNK,  # the chunk is its observation window
    "tova": SEES_CHUNK,
    "knorm": SEES_CHUNK,
    "keydiff": SEES_CHUNK,
    "lagkv": SEES_CHUNK,
    "random": SEES_CHUNK,
    "expected_attention": SEES_CACHE,  # statistics over the queries of as many tokens as the cache holds
}
"""Press -> whose hidden states it sees: those of the newest chunk, or of as many newest tokens as the cache holds."""


def for_stream(press: PressSpec, budget: int, chunk: int) -> PressSpec:
    """Set a press to keep ``budget`` entries whatever the length, with the chunk as its window if it has one.

    Raises:
        UsageError: if the press cannot compress one cache again and again, draws the same numbers at every step, or
            always keeps as much as the budget, so that nothing is chosen.
    """
    if press.name not in STREAM_PRESSES:
        raise UsageError(
            f"press={press.name} cannot compress one cache again and again, as rolling=stream does: use one of "
            f"{', '.join(STREAM_PRESSES)}"
        )
    if press.name == "random" and press.arguments["seed"] is not None:
        raise UsageError(
            f"press=random,seed={press.arguments['seed']} would evict the same places of the cache at every step of a "
            "stream: leave seed out, and lm-eval's own seed decides"
        )
    arguments = {name: value for name, value in press.arguments.items() if name != RATIO}
    if "window_size" in arguments:
        arguments["window_size"] = chunk
    sinks = arguments.get("n_sink", 0)
    if budget < sinks + chunk:
        raise UsageError(
            f"stream_budget={budget} is below what press={press.name} must keep: {sinks} sinks and the newest chunk of "
            f"{chunk} tokens; raise it, or lower stream_chunk"
        )
    if "window_size" in arguments and budget == chunk:
        raise UsageError(
            f"stream_budget={budget} is all that press={press.name} always keeps, the newest chunk of {chunk} tokens: "
            "raise it, or lower stream_chunk"
        )
    if press.name == "lagkv":
        check_lags(press, "stream_budget", budget, "lag_size")
    return parse_press(press.name, {**arguments, BUDGET: budget})


def num_sinks(press: PressSpec) -> int | None:
    """Return how many first entries the press keeps, if all others that it keeps are the newest; None if it scores."""
    return int(press.arguments["n_sink"]) if press.name == "streaming_llm" else None
