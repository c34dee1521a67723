"""Sweeps, and results files, as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.data_files import record
from lm_eval_kvpress.report.ranking import check_column
from lm_eval_kvpress.sweep.command import run_sweep as run
from lm_eval_kvpress.sweep.settings import parse_settings


def run_sweep(**settings: Any) -> pandas.DataFrame:
    """Evaluate many presses and ratios in one resumable run; return its figures as `read_results` does.

    Args:
        **settings: as in a file for ``lm-eval-kvpress sweep --config``: ``tasks``, ``presses`` and ``output_path`` are
            needed. The sweep loads the model by the name in ``model_args``.

    Raises:
        UsageError: for a setting that does not exist or does not fit.
    """
    parsed = parse_settings(settings)
    run(parsed)
    return read_results(parsed.output_path)


def read_results(*places: str | Path, columns: Sequence[str] = (), sort: Sequence[str] = ()) -> pandas.DataFrame:
    """The rows of a report on results files as a DataFrame, the baseline first and every figure in full precision.

    Args:
        places: folders with ``results_*.json`` of ``lm_eval`` or of a sweep, or such files.
        columns: their names, in order; by default all in which any row has a value.
        sort: columns to rank by, best first; ``-COLUMN`` puts the worst first.

    Raises:
        UsageError: for files that cannot be read, and columns that do not exist.
    """
    report = build_report([Path(place) for place in places], sort=sort)
    rows = pandas.DataFrame([record(table, row) for table in report.tables for row in table.rows])
    if not columns:
        return rows.dropna(axis="columns", how="all")
    for name in columns:
        check_column(f"columns: {name}", name, list(rows.columns))
    return rows[list(columns)]
