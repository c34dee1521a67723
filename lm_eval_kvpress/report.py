"""`lm-eval-kvpress report DIR...`: a leaderboard from result files, as a page, a text, or data.

Thin: reads arguments, calls the rooms in order and writes files. Needs neither torch nor lm-eval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from lm_eval_kvpress import __version__
from lm_eval_kvpress.report_columns import find, ranked
from lm_eval_kvpress.report_figures import write_figures
from lm_eval_kvpress.report_html import html
from lm_eval_kvpress.report_latex import latex
from lm_eval_kvpress.report_streams import with_curves
from lm_eval_kvpress.report_table import build_tables
from lm_eval_kvpress.report_text import Report, as_csv, as_json, markdown
from lm_eval_kvpress.report_trust import mark, notices
from lm_eval_kvpress.results import ResultsError, read_results

TITLE = "KV-cache compression"


def main(argv: Sequence[str]) -> int:
    """Writes what was asked for; without ``-o`` the Markdown goes to the screen."""
    args = _parser().parse_args(argv)
    outputs: list[Path] = args.output or []
    for output in outputs:
        if output.suffix not in WRITERS:
            raise ResultsError(f"-o {output}: the ending must be one of {', '.join(WRITERS)}")
    report = make_report(args.results, sort=args.sort or [], title=args.title, all_metrics=args.all_metrics)
    for output in outputs:
        text = WRITERS[output.suffix](report)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(f"{output}: {sum(len(table.rows) for table in report.tables)} rows in {len(report.tables)} tables")
    if args.figures is not None:
        print(f"{args.figures}: {len(write_figures(report, args.figures))} files")
    if not outputs and args.figures is None:
        sys.stdout.write(markdown(report))
    return 0


def make_report(
    places: Sequence[Path], *, sort: Sequence[str] = (), title: str = TITLE, all_metrics: bool = False
) -> Report:
    """The report of all results below the places.

    Args:
        places: folders, or results files.
        sort: columns to rank by, the most important first; ``-column`` puts the worst first.
        title: of the page.
        all_metrics: whether tables for people show every metric.

    Raises:
        ResultsError: for files that cannot be read and columns that do not exist.
    """
    tables = with_curves(mark(build_tables(read_results(places))), places)
    for key in reversed(sort):  # sorting is stable: the least important first
        find(key, tables)
        tables = [replace(table, rows=tuple(ranked(table, key))) for table in tables]
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    said = tuple(tuple(notices(table)) for table in tables)
    return Report(title, date, __version__, tuple(tables), said, all_metrics)


WRITERS: dict[str, Callable[[Report], str]] = {
    ".md": markdown,
    ".html": html,
    ".tex": latex,
    ".csv": as_csv,
    ".json": as_json,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lm-eval-kvpress report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="DIR", help="folders with results_*.json, or such files"
    )
    parser.add_argument("-o", "--output", action="append", type=Path, metavar="FILE", help="; ".join(WRITERS))
    parser.add_argument(
        "--sort", action="append", metavar="COLUMN", help="rank by a column, best first; -COLUMN: worst"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="folder for PNG and SVG figures")
    parser.add_argument("--title", default=TITLE, help="of the page (default: %(default)s)")
    parser.add_argument(
        "--all-metrics", action="store_true", help="every metric of each task, not the leading one only"
    )
    return parser
