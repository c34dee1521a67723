"""Values as a person reads them. Missing is ``-`` and NaN is ``NaN``, never an empty cell and never 0.

What is not 0 or all does not look so: a KL of 0.0002 is no KL of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from lm_eval_kvpress.report.differences import Difference

MISSING = "-"
MAX_NAMES = 5
ROUNDING = 1e-6  # of shares: sums of floats are no nearer to 0 and 1
Value = float | str | None


class Kind(Enum):
    """What a column holds: shares are fractions, and bytes are per context."""

    TEXT = "text"
    SHARE = "share"
    BYTES = "bytes"
    RATE = "rate"
    SECONDS = "seconds"
    COUNT = "count"
    METRIC = "metric"


def format_value(value: Value, kind: Kind) -> str:
    """A value with its unit: shares in per cent, bytes in binary units, seconds below one in milliseconds."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value or MISSING
    text = _rounded(value, kind)
    if text in ("0.000", "-0.000") and value:
        return f"{value:.1e}"
    if kind is Kind.SHARE and text in ("0.0 %", "100.0 %") and (rest := min(value, 1 - value)) > ROUNDING:
        return f"{100 * value:.{-math.floor(math.log10(100 * rest))}f} %"
    return text


def _rounded(value: float, kind: Kind) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    match kind:
        case Kind.SHARE:
            return f"{100 * value:.1f} %"
        case Kind.BYTES:
            return format_bytes(value)
        case Kind.SECONDS:
            return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
        case Kind.RATE:
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        case Kind.COUNT:
            return f"{value:,.0f}"
        case _:
            return format_metric(value)


def format_metric(value: float) -> str:
    """A metric with as many digits as a reader can use: accuracies to a thousandth, perplexities to four digits."""
    size = abs(value)
    if size < 10:
        return f"{value:.3f}"
    if size < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if size < 1e6 else f"{value:.2e}"


def format_signed(value: float, kind: Kind = Kind.METRIC) -> str:
    """A difference of metrics, rounded, with its sign; minus is U+2212. Differences of shares are percentage points."""
    text = _rounded(abs(value), kind).replace("%", "pp")
    return text if value == 0 or text.strip("0. p") == "" else ("+" if value > 0 else "−") + text


def format_interval(difference: Difference, kind: Kind = Kind.METRIC) -> str:
    """``[low, high]``, or nothing where there is none."""
    if difference.low is None or difference.high is None:
        return ""
    return f"[{format_signed(difference.low, kind)}, {format_signed(difference.high, kind)}]"


def format_bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def first_names(names: Sequence[str]) -> str:
    """The first few names and how many more there are: benchmarks of many subjects have dozens of tasks."""
    num_more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {num_more} more" if num_more > 0 else "")
