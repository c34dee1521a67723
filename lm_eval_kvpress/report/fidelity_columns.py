"""The columns of a table whose runs measured how far they are from the full cache's predictions."""

from __future__ import annotations

from collections.abc import Callable

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.column import Column
from lm_eval_kvpress.report.fidelity import Bounds, Figure
from lm_eval_kvpress.report.formatting import Kind, Value
from lm_eval_kvpress.report.rows import Row

Reader = Callable[[Cell], Figure | None]


def _mean(read: Reader) -> Callable[[Row], Value]:
    def value(row: Row) -> Value:
        figure = None if row.cell is None else read(row.cell)
        return None if figure is None else figure.mean

    return value


def _bounds(read: Reader) -> Callable[[Row], Bounds | None]:
    def bounds(row: Row) -> Bounds | None:
        figure = None if row.cell is None else read(row.cell)
        return None if figure is None else figure.bounds

    return bounds


def _column(key: str, title: str, kind: Kind, read: Reader, text: str, *, higher_is_better: bool) -> Column:
    return Column(
        key, title, "Fidelity", kind, _mean(read), text, higher_is_better, bounds=_bounds(read), is_plotted=True
    )


FIDELITY = (
    _column(
        "kl_mean",
        "KL",
        Kind.METRIC,
        lambda cell: cell.kl,
        "KL(full cache, compressed cache) in nats, mean over the tokens scored under the press, and its 95 % interval.",
        higher_is_better=False,
    ),
    _column(
        "top1_agreement",
        "Same top token",
        Kind.SHARE,
        lambda cell: cell.agreement,
        "Share of these tokens for which both caches have the same most likely one, and its 95 % interval.",
        higher_is_better=True,
    ),
)
