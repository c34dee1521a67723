"""Where kvpress silently runs another method than the one asked for: PyramidKV as SnapKV, LagKV as sinks and newest.

Each function repeats the condition of kvpress's own code, on the same numbers. Does not know names or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def pyramidkv(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    """PyramidKV falls back to SnapKV: the condition of ``PyramidKVPress.get_layer_budget``, in its own arithmetic."""
    window = arguments["window_size"]
    kept = window + context_tokens * (1 - ratio) - window
    smallest = kept / arguments["beta"]
    largest = kept * 2 - smallest
    if largest >= context_tokens - window:
        largest = context_tokens - window
        smallest = kept * 2 - largest
    if ratio == 0:
        return
    if context_tokens >= largest >= smallest >= window:
        if num_layers == 1 and largest > smallest:
            yield "pyramidkv gave the only layer its largest budget, which is more than was asked"
    elif smallest < window:
        yield f"pyramidkv fell back to snapkv: its smallest layer budget is below its window_size of {window}"
    else:
        yield f"pyramidkv fell back to snapkv: fewer tokens are removed than its window_size of {window}"


def lagkv(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    """LagKV keeps sinks and newest tokens of a context with fewer than two partitions: ``LagKVPress.score``."""
    n_sink, lag_size = arguments["n_sink"], arguments["lag_size"]
    if ratio == 0:
        return
    if context_tokens < n_sink + 2 * lag_size:
        yield f"lagkv fell back to sinks and most recent tokens: the context is below {n_sink + 2 * lag_size} tokens"
    elif int(context_tokens * (1 - ratio)) < n_sink + lag_size + (context_tokens - n_sink) % lag_size:
        yield "lagkv keeps fewer tokens than its sinks and last partitions: which of these is arbitrary"
