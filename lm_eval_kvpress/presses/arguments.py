"""The arguments of a press: names, types and defaults, read off the fields of its class, and their ranges.

Knows the rows of `catalog`. Does not know press names or how presses of one name share arguments.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from lm_eval_kvpress.presses.catalog import REQUIRED, Row
from lm_eval_kvpress.presses.values import ANY_NUMBER, Range, parse_value

RATIO, BUDGET = "compression_ratio", "kv_budget"
"""The two arguments that say how much is kept: the fraction of tokens removed, or the number of tokens kept."""

RATIOS = "compression_ratios"
"""The argument of ``per_layer``: one fraction removed for each layer."""

DEFAULT_RATIO = 0.5
"""kvpress's own default, 0, does nothing."""

_NOT_NEGATIVE, _POSITIVE = Range(low=0), Range(low=1)
_FRACTION, _BELOW_ONE = Range(low=0, high=1), Range(low=0, high=1, excludes_high=True)
_REMOVED = Range(low=0, high=1, excludes_high=True, meaning=": it is the fraction removed, not kept")

RANGES: Mapping[str, Range] = types.MappingProxyType(
    {
        **dict.fromkeys((RATIO, RATIOS), _REMOVED),
        BUDGET: _POSITIVE,
        **dict.fromkeys(("n_sink", "num_sinks", "sink_size_start", "sink_size_end", "n_initial"), _NOT_NEGATIVE),
        **dict.fromkeys(("sink", "window", "sink_size", "keep_token_lower_bound"), _NOT_NEGATIVE),
        **dict.fromkeys(("epsilon", "tau"), _NOT_NEGATIVE),
        "seed": Range(low=0, high=2**32 - 1),
        **dict.fromkeys(("window_size", "local_window_size", "sliding_window_size", "n_last"), _POSITIVE),
        "recent_size": _POSITIVE,  # kvpress cuts them off by a negative slice, which at 0 would spare every entry
        **dict.fromkeys(("chunk_size", "chunk_length", "low_entropy_chunk_length", "block_size"), _POSITIVE),
        **dict.fromkeys(("beta", "n_future_positions", "sketch_dimension"), _POSITIVE),
        "lag_size": Range(low=2),  # a partition of one token has no range to compare with
        "kernel_size": Range(low=1, is_odd=True),  # the pooling pads by half a kernel: an even one adds a score
        "head_compression_ratio": _FRACTION,
        **dict.fromkeys(("alpha_safeguard", "first_stage_ratio", "similarity_threshold", "mix_lambda"), _FRACTION),
        "redundancy_threshold": Range(low=-1, high=1),
        "merge_fraction": Range(low=0, high=1, excludes_low=True),
        **dict.fromkeys(("key_channel_compression_ratio", "lazy_threshold"), _BELOW_ONE),
    }
)
"""The range of each argument. kvpress asserts some of these at construction; a number outside the others would fail,
or silently do something else, in the middle of a run."""


@dataclass(frozen=True)
class Argument:
    """An argument of a press: its name, type and default (`REQUIRED` if it has none)."""

    name: str
    type: Any
    default: Any

    def parse(self, value: Any) -> Any:
        """Convert and check a value. A list is typed as ``0.1+0.5+0.9``, because lm-eval splits arguments at commas.

        Raises:
            UsageError: one line, starting with ``name=value``.
        """
        return parse_value(self.name, self.type, value, RANGES.get(self.name, ANY_NUMBER))


@functools.cache
def arguments_of(row: Row) -> dict[str, Argument]:
    """Read a press's arguments off the signature of its class, less the presses that it wraps and the ratio."""
    hints = get_type_hints(row.factory.__init__)
    found = {}
    for name, parameter in inspect.signature(row.factory).parameters.items():
        if name in ("press", "presses", RATIO, *row.hidden) or name.startswith("_"):
            continue
        default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        found[name] = Argument(name, hints[name], row.defaults.get(name, default))
    return found
