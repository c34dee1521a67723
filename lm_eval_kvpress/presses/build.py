"""A fresh kvpress press from a parsed name and its arguments, with smaller windows and sinks on short contexts.

Knows kvpress's constructors through the rows of `catalog`. Does not know how arguments are typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpress import BasePress

from lm_eval_kvpress.presses.arguments import RANGES, RATIO
from lm_eval_kvpress.presses.catalog import Row
from lm_eval_kvpress.presses.names import ParsedName
from lm_eval_kvpress.presses.silenced import silenced

SHRUNK_SHARE = 4  # windows and sinks that are shrunk take at most a quarter of the context


def build_press(name: ParsedName, arguments: Mapping[str, Mapping[str, Any]], ratio: float | None) -> BasePress:
    """Construct a press and all that it wraps.

    Args:
        arguments: press -> its own arguments.
        ratio: the fraction to remove, given to the press that takes one; None leaves kvpress's default.

    Raises:
        AssertionError: kvpress's own check of a constructor's arguments.
    """
    # per_layer warns that kvpress's decoding has one mask for all layers; here each layer has its own
    with silenced("kvpress.presses.per_layer_compression_press"):
        return _build(name, arguments, ratio)


def _build(name: ParsedName, arguments: Mapping[str, Mapping[str, Any]], ratio: float | None) -> BasePress:
    given = dict(arguments[name.row.name])
    if name.row.name == "composed":
        given["presses"] = [_build(inner, arguments, ratio) for inner in name.inner]
    elif name.inner:
        given["press"] = _build(name.inner[0], arguments, ratio)
    elif name.row.takes_ratio and ratio is not None:
        given[RATIO] = ratio
    return name.row.factory(**given)


def min_context(row: Row, arguments: Mapping[str, Any]) -> int:
    """Return the least number of context tokens on which a press runs and can remove one."""
    return max(row.min_context, 1 + sum(arguments[name] for name in row.protects))


def shrink(row: Row, arguments: Mapping[str, Any], context_tokens: int) -> dict[str, Any]:
    """Return the arguments with window and sinks shrunk in proportion, if the context is too short for them."""
    sizes = {name: arguments[name] for name in row.protects}
    total, allowed = sum(sizes.values()), context_tokens // SHRUNK_SHARE
    if row.no_ratio or context_tokens >= min_context(row, arguments) or not total:
        return dict(arguments)
    return {**arguments, **{name: max(int(RANGES[name].low), size * allowed // total) for name, size in sizes.items()}}
