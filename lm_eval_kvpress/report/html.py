"""A report as one self-contained page: opens from disk, asks for nothing from a network.

The sortable tables are DataTables and the plots are Plotly, both taken from the wheels of `itables` and `plotly` when
the page is made, so no minified code lies in this repository. Text from files is escaped by Jinja; what goes into a
script element is JSON without ``<``, ``>``, ``&`` and the line separators that JavaScript once refused.
"""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import asdict
from importlib import resources
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.press_list import infos_of
from lm_eval_kvpress.report.column import Column
from lm_eval_kvpress.report.contents import Report, ReportRow, ReportTable
from lm_eval_kvpress.report.data_files import as_csv
from lm_eval_kvpress.report.loss_curves import Curve
from lm_eval_kvpress.report.palette import as_data, styles
from lm_eval_kvpress.report.templates import render_html

# The plots: name in the script, title, horizontal axis.
PLOTS = (
    ("bytes", "Quality against KV bytes", "KV allocated per context in MiB"),
    ("decode", "Quality against decode speed", "decode tokens per second"),
    ("kept", "Quality over the kept share", "measured kept share"),
    ("distance", "Recall over the distance", "distance in tokens"),
    ("position", "Perplexity over the position in the stream", "position in tokens"),
    ("place", "KL from the full cache over the place after the context", "tokens after the context"),
)
SCRIPTS = ("plots.js", "page.js")
UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def html(report: Report) -> str:
    """The page.

    Raises:
        UsageError: if the libraries of the `report` extra are not installed.
    """
    try:
        import itables  # noqa: F401 (its wheel holds DataTables)
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError(f"a page needs {error.name}: pip install 'lm-eval-kvpress[report]'") from error
    assets = resources.files("lm_eval_kvpress.report") / "assets"
    datatables = resources.files("itables") / "html" / "dt_bundle.js"
    return render_html(
        "page.html",
        report=report,
        plots=PLOTS,
        presses=list(dict.fromkeys(row.press for table in report.tables for row in table.rows)),
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script="\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS),
        styles=safe_json(as_data(styles(report))),
        csv=base64.b64encode(as_csv(report).encode()).decode(),
        linked=linked,
        plotly=get_plotlyjs(),
        datatables=base64.b64encode(datatables.read_bytes()).decode(),
        points=safe_json([_plot_data(table, report.opens_with) for table in report.tables]),
    )


def linked(press: str) -> list[tuple[str, str]]:
    """The parts of a press's name, each with the address of its paper, which is empty for signs and unknown names."""
    papers = {info.own_name: info.paper for info in infos_of(press)}
    return [(part, papers.get(part, "")) for part in re.split(r"([:+])", press)]


def safe_json(value: Any) -> str:
    """JSON that stays inside its script element whatever the strings hold."""
    return json.dumps(value, allow_nan=False).translate(UNSAFE)


def _plot_data(table: ReportTable, opens_with: str) -> dict[str, Any]:
    """What the plots of a table show: what they open with, then its metrics, the leading ones first, and fidelity."""
    metrics = sorted(
        table.plotted_columns,
        key=lambda column: (column.key != opens_with, column.metric is None, not column.is_main),
    )
    return {
        "metrics": [
            {
                "name": column.key,
                "task": column.group,
                "better": column.higher_is_better,
                "own": column.metric is None,  # an interval of its own, and not of the difference
                "distance": column.metric and column.metric.distance,
            }
            for column in metrics
        ],
        "rows": [_point(row, metrics, table.rows[0]) for row in table.rows if row.cell is not None],
    }


def _point(row: ReportRow, metrics: list[Column], baseline: ReportRow) -> dict[str, Any]:
    """A run, with the figures and intervals of the metrics in their order."""
    return {
        "press": row.press,
        "arguments": row.arguments,
        "series": row.series,
        "amount": row.amount,
        "is_baseline": row.is_baseline,
        "void": ", ".join(mark.label for mark in row.marks if mark.is_void),
        "removed": row.number("removed_asked"),
        "kept": row.number("kept_share"),
        "bytes": row.number("kv_bytes_allocated"),
        "decode": row.number("decode_tokens_per_sec"),
        "values": [row.number(column.key) for column in metrics],
        "bounds": [_bounds(row, column.key, baseline) for column in metrics],
        "places": [] if row.cell is None else [asdict(one) for one in row.cell.kl_places if math.isfinite(one.kl_mean)],
        "curves": {curve.task: _curve_points(curve) for curve in row.curves},
    }


def _bounds(row: ReportRow, key: str, baseline: ReportRow) -> tuple[float, float] | None:
    """The interval of the difference to the baseline; a figure that has an interval of its own has this one less the
    baseline's figure."""
    entry = row.entries[key]
    if entry.difference is not None:
        return entry.difference.bounds
    if entry.bounds is None or not math.isfinite(sum(entry.bounds)):
        return None
    base = baseline.number(key) or 0.0
    return entry.bounds[0] - base, entry.bounds[1] - base


def _curve_points(curve: Curve) -> list[dict[str, float | None]]:
    bins = zip(curve.ends, curve.perplexities, curve.num_documents, strict=True)
    return [
        {
            "position": end,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "num_documents": num_documents,
        }
        for end, perplexity, num_documents in bins
    ]
