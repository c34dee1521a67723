"""`lm-eval-kvpress report DIR...`: a leaderboard from result files, as a page, a text, or data.

Thin: reads arguments, calls the rooms in order and writes files. Needs neither torch nor lm-eval.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from lm_eval_kvpress import __version__
from lm_eval_kvpress.report.columns import find, ranked
from lm_eval_kvpress.report.figures import write_figures
from lm_eval_kvpress.report.html import html
from lm_eval_kvpress.report.latex import latex
from lm_eval_kvpress.report.loss_curves import with_curves
from lm_eval_kvpress.report.markdown import Report, as_csv, as_json, markdown
from lm_eval_kvpress.report.marks import mark, notices
from lm_eval_kvpress.report.result_files import ResultsError, read_results, unfinished_cells
from lm_eval_kvpress.report.rows import build_tables

TITLE = "KV-cache compression"


def main(argv: Sequence[str]) -> int:
    """Writes what was asked for; without ``-o`` the Markdown goes to the screen."""
    args = _parser().parse_args(argv)
    places = [_named("report", name) for name in args.results]
    outputs = [_output(name) for name in args.output or ()]
    figures = None if args.figures is None else _figures_folder(args.figures)
    report = make_report(places, sort=args.sort or [], title=args.title, all_metrics=args.all_metrics)
    for output in outputs:
        text = WRITERS[output.suffix](report)
        with _writing("-o", output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        num_rows, num_tables = sum(len(table.rows) for table in report.tables), len(report.tables)
        print(f"{output}: {num_rows} rows in {num_tables} table{'s' if num_tables > 1 else ''}")
    if figures is not None:
        with _writing("--figures", figures):
            files = write_figures(report, figures)
        print(f"{figures}: {len(files)} files")
    if not outputs and figures is None:
        sys.stdout.write(markdown(report))
    for folder, cells in unfinished_cells(places).items():
        print(f"{folder}: {len(cells)} cells are unfinished and left out: {', '.join(cells)}", file=sys.stderr)
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


def _named(option: str, name: str) -> Path:
    """An empty name, as of a shell variable that is not set, would be the folder one stands in."""
    if not name:
        raise ResultsError(f"{option} '': the name is empty; write . for this folder")
    return Path(name)


def _output(name: str) -> Path:
    place = _named("-o", name)
    if os.path.isdir(place):
        raise ResultsError(f"-o {place} is a folder: name a file in it, such as {place / 'report.md'}")
    if place.suffix not in WRITERS:
        raise ResultsError(f"-o {place}: the ending must be one of {', '.join(WRITERS)}")
    _refuse_unwritable("-o", place)
    return place


def _figures_folder(name: str) -> Path:
    place = _named("--figures", name)
    if os.path.exists(place) and not os.path.isdir(place):
        raise ResultsError(f"--figures {place} is a file: name a folder")
    _refuse_unwritable("--figures", place)
    return place


def _refuse_unwritable(option: str, place: Path) -> None:
    """As far as it can be known before the work: what is there already must be a folder that may be written to.

    `os.path`, because pathlib raises for a folder that may not be looked into.
    """
    there = next(one for one in (place, *place.parents) if os.path.exists(one))
    if there != place and not os.path.isdir(there):
        raise ResultsError(f"{option} {place}: {there} is a file and cannot hold it: name another place")
    if not os.access(there, os.W_OK):
        raise ResultsError(f"{option} {place}: {there} may not be written to: name another place")


@contextmanager
def _writing(option: str, place: Path) -> Iterator[None]:
    """What cannot be known before: a full disk, a name that is too long."""
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"{option} {place} cannot be written ({error.strerror or error}): make room or name another place"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lm-eval-kvpress report", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", metavar="DIR", help="folders with results_*.json, or such files")
    parser.add_argument("-o", "--output", action="append", metavar="FILE", help="; ".join(WRITERS))
    parser.add_argument(
        "--sort", action="append", metavar="COLUMN", help="rank by a column, best first; --sort=-COLUMN: worst first"
    )
    parser.add_argument("--figures", metavar="DIR", help="folder for PNG and SVG figures")
    parser.add_argument("--title", default=TITLE, help="of the page (default: %(default)s)")
    parser.add_argument(
        "--all-metrics", action="store_true", help="every metric of each task, not the leading one only"
    )
    return parser
