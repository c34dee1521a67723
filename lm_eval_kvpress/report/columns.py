"""The columns of a table: what each takes from a row, in which unit, and how a person reads it.

Missing is ``-`` and NaN is ``NaN``, never an empty cell and never 0. Shares are fractions in data files and per cent
where a person reads them; bytes are per context, because sums over a task grow with its documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from lm_eval_kvpress.report.result_files import Kept, ResultsError
from lm_eval_kvpress.report.rows import Difference, MetricKey, Row, Table

MISSING = "-"
Value = float | str | None


class Kind(Enum):
    TEXT = "text"
    SHARE = "share"
    BYTES = "bytes"
    RATE = "rate"
    SECONDS = "seconds"
    COUNT = "count"
    METRIC = "metric"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in data files and for ``--sort``.
        title: its heading, with ``group`` above it.
        help: what it holds, in a sentence.
        higher_is_better: None where neither is.
        metric: of metric columns, whose difference stands in the same cell.
    """

    key: str
    title: str
    group: str
    kind: Kind
    value: Callable[[Row], Value]
    help: str
    higher_is_better: bool | None = None
    metric: MetricKey | None = None
    is_main: bool = True


def columns(table: Table, *, all_metrics: bool = False) -> list[Column]:
    """The table's columns in order; without ``all_metrics`` only the leading metric of each task."""
    metrics = [_metric_column(key) for key in table.metrics if all_metrics or key.is_main]
    return [*_PRESS, *metrics, *_SPEED, *_TRUST]


def find(key: str, tables: Sequence[Table]) -> None:
    """Refuses a ``--sort`` that no table has."""
    known = sorted({column.key for table in tables for column in columns(table, all_metrics=True)})
    if key.lstrip("-+") not in known:
        near = get_close_matches(key.lstrip("-+"), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ResultsError(f"--sort {key}: no such column; {hint}columns: {', '.join(known)}")


def ranked(table: Table, key: str) -> list[Row]:
    """The rows by one column, best first (``-key`` turns it round), the baseline on top and what is missing last."""
    column = next((one for one in columns(table, all_metrics=True) if one.key == key.lstrip("-+")), None)
    if column is None:
        return list(table.rows)
    descending = bool(column.higher_is_better) != key.startswith("-")
    baseline, *others = table.rows
    known = [row for row in others if not _is_missing(column.value(row))]
    missing = [row for row in others if _is_missing(column.value(row))]
    return [baseline, *sorted(known, key=lambda row: column.value(row), reverse=descending), *missing]  # type: ignore[arg-type,return-value]


def _is_missing(value: Value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# ---------------------------------------------------------------------------------------------------------- words


def shown(value: Value, kind: Kind) -> str:
    """A value as a person reads it."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value or MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    match kind:
        case Kind.SHARE:
            return f"{100 * value:.1f} %"
        case Kind.BYTES:
            return _bytes(value)
        case Kind.SECONDS:
            return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
        case Kind.RATE:
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        case Kind.COUNT:
            return f"{value:,.0f}"
        case _:
            return figure(value)


def figure(value: float) -> str:
    """A metric with as many digits as a reader can use: accuracies to a thousandth, perplexities to four digits."""
    size = abs(value)
    return (
        f"{value:.3f}"
        if size < 10
        else f"{value:.2f}"
        if size < 1000
        else f"{value:,.0f}"
        if size < 1e6
        else f"{value:.2e}"
    )


def signed(value: float) -> str:
    """A difference; the minus sign is a minus sign."""
    text = figure(abs(value)) if math.isfinite(value) else shown(abs(value), Kind.METRIC)
    return text if value == 0 or text.strip("0.") == "" else ("+" if value > 0 else "−") + text


def interval(difference: Difference) -> str:
    """``[low, high]``, or nothing where there is none."""
    if difference.low is None or difference.high is None:
        return ""
    return f"[{signed(difference.low)}, {signed(difference.high)}]"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


# --------------------------------------------------------------------------------------------------------- values


def press_name(row: Row) -> str:
    return "none" if row.cell is None else row.cell.press.name


def arguments(row: Row) -> str:
    pairs = () if row.cell is None else row.cell.press.arguments
    return ", ".join(f"{name}={value}" for name, value in (*pairs, *row.seeds))


def series(row: Row) -> str:
    """What one line of a curve over the kept share joins: a press with its arguments but for how much it keeps."""
    budgets = ("kv_budget", "stream_budget")
    pairs = () if row.cell is None else row.cell.press.arguments
    rest = ", ".join(f"{name}={value}" for name, value in (*pairs, *row.seeds) if name not in budgets)
    return f"{press_name(row)} {rest}".strip()


def kept_share(row: Row) -> float | None:
    """Of the tokens that went through the press, over all tasks; everything where there was no press to go through."""
    kept = [one for one in _kept(row) if one.share is not None]
    tokens = sum(one.num_tokens for one in kept)
    if tokens:
        return sum(one.num_tokens * (one.share or 0.0) for one in kept) / tokens
    return 1.0 if row.cell is not None and row.cell.press.is_none and not _is_stream(row) else None


def bytes_per_context(row: Row, name: str) -> float | None:
    """Mean over all contexts, compressed or not. Of a stream: the most that its caches took at once."""
    kept = _kept(row)
    if _is_stream(row):
        return float(max((one.max_stream_bytes for one in kept), default=0)) or None
    contexts = sum(one.num_contexts_pressed + one.num_contexts_unpressed for one in kept)
    return sum(getattr(one, name) for one in kept) / contexts if contexts else None


def uncompressed(row: Row) -> float | None:
    if not _kept(row) or row.cell is None or not row.cell.press.acts_on_prefill:
        return None
    return float(sum(one.num_contexts_unpressed for one in _kept(row)))


def parity(row: Row) -> str | None:
    known = None if row.cell is None else row.cell.parity
    return None if known is None else "passed" if known else "off"


def _kept(row: Row) -> list[Kept]:
    return [] if row.cell is None else [task.kept for task in row.cell.tasks if task.kept is not None]


def _is_stream(row: Row) -> bool:
    return row.cell is not None and row.cell.is_stream


def _speed(name: str) -> Callable[[Row], Value]:
    return lambda row: None if row.cell is None else getattr(row.cell.speed, name)


def _metric_column(key: MetricKey) -> Column:
    name = f"{key.task}.{key.name}" + ("" if key.filter == "none" else f",{key.filter}")

    def value(row: Row) -> Value:
        metric = row.metric(key)
        return None if metric is None else metric.value

    better = {True: "Higher is better.", False: "Lower is better.", None: "A count."}[key.higher_is_better]
    help = f"{name}. {better} Below it: the difference to the baseline and its 95 % interval."
    kind = Kind.COUNT if key.higher_is_better is None else Kind.METRIC
    return Column(name, key.name, key.task, kind, value, help, key.higher_is_better, key, key.is_main)


def _press_columns() -> Iterator[Column]:
    yield Column("press", "Press", "Cache", Kind.TEXT, press_name, "What compressed the cache, and its arguments.")
    removed = "The fraction that compression_ratio asked to remove."
    yield Column(
        "removed_asked",
        "Removed",
        "Cache",
        Kind.SHARE,
        lambda row: None if row.cell is None else row.cell.press.removed_asked,
        removed,
    )
    yield Column(
        "kept_share", "Kept", "Cache", Kind.SHARE, kept_share, "Measured: entries that could still be attended."
    )
    yield Column(
        "kv_bytes_allocated",
        "KV allocated",
        "Cache",
        Kind.BYTES,
        lambda row: bytes_per_context(row, "bytes_allocated"),
        "Bytes of keys and values that stay allocated, mean per context; of a stream, the most at once.",
        False,
    )
    yield Column(
        "kv_bytes_effective",
        "KV effective",
        "Cache",
        Kind.BYTES,
        lambda row: bytes_per_context(row, "bytes_effective"),
        "Bytes of the entries that can be attended, mean per context. Less than allocated under a masking press.",
        False,
    )


def _speed_columns() -> Iterator[Column]:
    for name, title, kind, help, better in (
        ("prefill_tokens_per_sec", "Prefill tok/s", Kind.RATE, "Prompt tokens prefilled per second, per device.", True),
        ("decode_tokens_per_sec", "Decode tok/s", Kind.RATE, "Tokens decoded per second, per device.", True),
        ("ttft_sec", "TTFT", Kind.SECONDS, "Time to the first token, median.", False),
        ("tpot_sec", "TPOT", Kind.SECONDS, "Time per output token after the first, median.", False),
        ("peak_memory_bytes", "Peak memory", Kind.BYTES, "The most that was allocated on the CUDA device.", False),
    ):
        yield Column(name, title, "Speed", kind, _speed(name), help, better)


def _trust_columns() -> Iterator[Column]:
    yield Column(
        "num_uncompressed",
        "Left whole",
        "Trust",
        Kind.COUNT,
        uncompressed,
        "Contexts that were left uncompressed, being shorter than the press needs.",
    )
    yield Column(
        "parity", "Parity", "Trust", Kind.TEXT, parity, "Whether ratio 0 gave stock lm-eval's answers (parity=true)."
    )


_PRESS, _SPEED, _TRUST = tuple(_press_columns()), tuple(_speed_columns()), tuple(_trust_columns())
