"""The arguments of a press: their names, types and defaults, read off its class, and the check of a value.

Knows the rows of `press_catalog`. Does not know press names or how arguments are shared between presses.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.catalog import REQUIRED, Row

# Least and greatest values, both allowed unless OPEN_BELOW or OPEN_ABOVE has the name. kvpress asserts some of
# these at construction; the rest would fail, or silently do something else, in the middle of a run.
BOUNDS: Mapping[str, tuple[float, float]] = types.MappingProxyType(
    {
        **dict.fromkeys(("n_sink", "num_sinks", "sink_size_start", "sink_size_end"), (0, math.inf)),
        **dict.fromkeys(("n_initial", "seed"), (0, math.inf)),
        **dict.fromkeys(("window_size", "kernel_size", "beta", "n_future_positions"), (1, math.inf)),
        **dict.fromkeys(("sketch_dimension", "chunk_size", "local_window_size", "n_last"), (1, math.inf)),
        **dict.fromkeys(("chunk_length", "low_entropy_chunk_length", "block_size"), (1, math.inf)),
        **dict.fromkeys(("sliding_window_size", "kv_budget"), (1, math.inf)),
        "lag_size": (2, math.inf),  # a partition of one token has no range to compare with
        **dict.fromkeys(("epsilon", "tau"), (0, math.inf)),
        **dict.fromkeys(("alpha_safeguard", "first_stage_ratio", "similarity_threshold", "merge_fraction"), (0, 1)),
        **dict.fromkeys(("compression_ratio", "compression_ratios"), (0, 1)),
        **dict.fromkeys(("key_channel_compression_ratio", "lazy_threshold"), (0, 1)),
    }
)
OPEN_BELOW = frozenset({"merge_fraction"})
OPEN_ABOVE = frozenset({"compression_ratio", "compression_ratios", "key_channel_compression_ratio", "lazy_threshold"})
ODD = frozenset({"kernel_size"})  # the pooling pads by half a kernel: an even one returns one score too many


@dataclass(frozen=True)
class Argument:
    """An argument of a press: its name, type and default (`REQUIRED` if it has none)."""

    name: str
    type: Any
    default: Any

    def parse(self, value: Any) -> Any:
        """The value, converted and checked.

        Raises:
            UsageError: one line, starting with ``name=value``.
        """
        return _parse(self.name, self.type, value)


@functools.cache
def arguments_of(row: Row) -> dict[str, Argument]:
    """A row's arguments, read off the signature of its class, less what it wraps and the ratio."""
    hints = get_type_hints(row.factory.__init__)
    found = {}
    for name, parameter in inspect.signature(row.factory).parameters.items():
        if name in ("press", "presses", "compression_ratio", *row.hidden) or name.startswith("_"):
            continue
        default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        found[name] = Argument(name, hints[name], row.defaults.get(name, default))
    return found


def _parse(name: str, kind: Any, value: Any) -> Any:
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        if value is None or value == "None":
            return None
        return _parse(name, next(option for option in options if option is not type(None)), value)
    if get_origin(kind) is Literal:
        if value not in options:
            raise UsageError(f"{name}={value} is not known: choose one of {', '.join(map(str, options))}")
        return value
    if get_origin(kind) is list:
        return _parse_list(name, options[0], value)
    if kind is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{name}={value} must be true or false")
        return value
    return parse_number(name, kind, value)


def _parse_list(name: str, kind: Any, value: Any) -> tuple[Any, ...]:
    """``0.1+0.5+0.9``, since lm-eval splits its arguments at commas; a single number; or a list given in Python."""
    items = value.split("+") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not items:
        raise UsageError(f"{name} must be at least one number")
    return tuple(_parse(name, kind, item) for item in items)


def parse_number(name: str, kind: type, value: Any) -> Any:
    """A finite int or float within its `BOUNDS`.

    Raises:
        UsageError: one line.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (kind is int and number != int(number)):
        raise UsageError(f"{name}={value} must be {'a whole number' if kind is int else 'a number'}")
    if name in ODD and number % 2 == 0:
        raise UsageError(f"{name}={value} must be odd")
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    too_low = number <= low if name in OPEN_BELOW else number < low
    too_high = number >= high if name in OPEN_ABOVE else number > high
    if too_low or too_high:
        lower = f"{'above' if name in OPEN_BELOW else 'at least'} {low:g}"
        upper = f" and {'below' if name in OPEN_ABOVE else 'at most'} {high:g}" if high < math.inf else ""
        meaning = ": it is the fraction removed, not kept" if name.startswith("compression_ratio") else ""
        raise UsageError(f"{name}={value} must be {lower}{upper}{meaning}")
    return kind(number)
