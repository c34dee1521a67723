"""The columns that a table has.

Shares are fractions here and in data files. Bytes are per context, because sums over a task grow with its documents.
"""

from __future__ import annotations

from dataclasses import replace

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.change_columns import CHANGES
from lm_eval_kvpress.report.column import Column, of_cell
from lm_eval_kvpress.report.fidelity_columns import FIDELITY
from lm_eval_kvpress.report.formatting import Kind, Value, first_names
from lm_eval_kvpress.report.metrics import MetricKey
from lm_eval_kvpress.report.rows import Row
from lm_eval_kvpress.report.tables import Table


def table_columns(table: Table) -> list[Column]:
    """The columns of a table in order, with every metric: what was run, what came of it, and what it cost."""
    output = _OUTPUT if any(cell.tokens_per_text is not None for cell in table.cells) else ()
    fidelity = FIDELITY if any(cell.fidelities for cell in table.cells) else ()
    metrics = [_metric_column(key, table) for key in table.metrics]
    changes = [column for column in CHANGES if any(column.value(row) is not None for row in table.rows)]
    return [*_RUN, *metrics, *fidelity, *_sizes(table), *changes, *output, *_SPEED, *_TRUST]


def _sizes(table: Table) -> list[Column]:
    """How large the cache is. People see one: the kept share, the share of bytes where entries are packed, or the bytes
    where no press says a share, as in streams."""
    hidden = replace(_KEPT, is_main=False)
    if any(cell.press.packed_as for cell in table.cells):
        return [_CACHE_SIZE, hidden, _BITS, *_BYTES]
    pressed = [cell for cell in table.cells if not cell.press.is_none]
    if pressed and all(cell.kept_share is None for cell in pressed):
        allocated, *others = _BYTES
        return [replace(allocated, is_main=True), hidden, *others]
    return [_KEPT, *_BYTES]


# ------------------------------------------------------------------------------------------------------ the columns


def _parity(cell: Cell) -> str | None:
    return None if cell.parity is None else "passed" if cell.parity else "off"


def _metric_column(key: MetricKey, table: Table) -> Column:
    def value(row: Row) -> Value:
        metric = row.metric(key)
        return None if metric is None else metric.value

    average = f" The average over {first_names(key.members)}." if key.members else ""
    better = {True: "Higher is better.", False: "Lower is better.", None: "No direction is known to be better."}
    return Column(
        key.full_name,
        "all lengths" if key.averaged else key.name,
        key.task,
        _metric_kind(key, table),
        value,
        f"{key.full_name}.{average} {better[key.higher_is_better]} "
        "Below it: the difference to the baseline and its 95 % interval.",
        key.higher_is_better,
        key,
        key.is_main,
    )


def _metric_kind(key: MetricKey, table: Table) -> Kind:
    """Shares of right answers by length, as RULER's leaderboards print them; figures as they stand for all others."""
    values = [metric.value for metric in map(key.find, table.cells) if metric is not None]
    are_shares = key.is_length and all(value is None or 0 <= value <= 1 for value in values)
    return Kind.SHARE if are_shares else Kind.METRIC


_RUN = (
    Column(
        "press", "Press", "Cache", Kind.TEXT, lambda row: row.press, "What compressed the cache, and its arguments."
    ),
    Column(
        "removed_asked",
        "Removed",
        "Cache",
        Kind.SHARE,
        of_cell(lambda cell: cell.press.removed_asked),
        "The fraction that compression_ratio asked to remove.",
    ),
)
_KEPT = Column(
    "kept_share",
    "Kept",
    "Cache",
    Kind.SHARE,
    of_cell(lambda cell: cell.kept_share),
    "Measured: entries that could still be attended.",
)
_BYTES = (
    Column(
        "kv_bytes_allocated",
        "KV allocated",
        "Cache",
        Kind.BYTES,
        of_cell(lambda cell: cell.bytes_allocated),
        "Bytes of keys and values that stay allocated, mean per context; of a stream, the most at once.",
        False,
        is_main=False,
    ),
    Column(
        "kv_bytes_effective",
        "KV effective",
        "Cache",
        Kind.BYTES,
        of_cell(lambda cell: cell.bytes_effective),
        "Bytes of the entries that can be attended, mean per context. Less than allocated under a masking press.",
        False,
        is_main=False,
    ),
)
_CACHE_SIZE = Column(
    "cache_size",
    "Cache size",
    "Cache",
    Kind.SHARE,
    of_cell(lambda cell: cell.cache_size),
    "Bytes of keys and values that are held, scales included, of those of the full cache.",
    False,
)
_BITS = Column(
    "bits_per_number",
    "Bits",
    "Cache",
    Kind.RATE,
    of_cell(lambda cell: cell.bits_per_number),
    "Bits that a stored number of keys and values takes, scales and filled-up blocks included.",
    False,
    is_main=False,
)
_OUTPUT = (
    Column(
        "tokens_per_text",
        "Tokens per text",
        "Output",
        Kind.RATE,
        of_cell(lambda cell: cell.tokens_per_text),
        "Mean length of generated texts, which compression often makes longer.",
    ),
    Column(
        "share_at_limit",
        "At the limit",
        "Output",
        Kind.SHARE,
        of_cell(lambda cell: cell.share_at_limit),
        "Share of generated texts that nothing but the allowed number of tokens ended.",
        False,
    ),
)
_SPEED = (
    Column(
        "prefill_tokens_per_sec",
        "Prefill tok/s",
        "Speed",
        Kind.RATE,
        of_cell(lambda cell: cell.speed.prefill_tokens_per_sec),
        "Prompt tokens prefilled per second, per device, without the time that the press took.",
        True,
    ),
    Column(
        "decode_tokens_per_sec",
        "Decode tok/s",
        "Speed",
        Kind.RATE,
        of_cell(lambda cell: cell.speed.decode_tokens_per_sec),
        "Tokens decoded per second, per device.",
        True,
    ),
    Column(
        "ttft_sec",
        "TTFT",
        "Speed",
        Kind.SECONDS,
        of_cell(lambda cell: cell.speed.ttft_sec),
        "Time to the first token, median.",
        False,
    ),
    Column(
        "tpot_sec",
        "TPOT",
        "Speed",
        Kind.SECONDS,
        of_cell(lambda cell: cell.speed.tpot_sec),
        "Time per output token after the first, median.",
        False,
    ),
    Column(
        "peak_memory_bytes",
        "Peak memory",
        "Speed",
        Kind.BYTES,
        of_cell(lambda cell: cell.speed.peak_memory_bytes),
        "The most that was allocated on the CUDA device.",
        False,
    ),
)
_TRUST = (
    Column(
        "num_uncompressed",
        "Left whole",
        "Trust",
        Kind.COUNT,
        of_cell(lambda cell: cell.num_uncompressed),
        "Contexts that were left uncompressed, being shorter than the press needs.",
    ),
    Column(
        "parity",
        "Parity",
        "Trust",
        Kind.TEXT,
        of_cell(_parity),
        "Whether ratio 0 gave stock lm-eval's answers (parity=true).",
    ),
)
