"""`lm-eval-kvpress report DIR...`: a leaderboard from result files, as a page, a text, or data.

Thin: reads arguments, builds the contents and writes files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import make_folder, refuse_special, write_errors, write_whole
from lm_eval_kvpress.report.build import TITLE, build_report
from lm_eval_kvpress.report.contents import Report
from lm_eval_kvpress.report.data_files import as_csv, as_json
from lm_eval_kvpress.report.figures import write_figures
from lm_eval_kvpress.report.gate import failures, parse_condition
from lm_eval_kvpress.report.html import html
from lm_eval_kvpress.report.latex import latex
from lm_eval_kvpress.report.markdown import markdown
from lm_eval_kvpress.report.result_files import PATTERN, holds_shards, unfinished_cells

FAILED = 3  # a row met a condition of --fail-if
ELSEWHERE = "make room or name another place"
WRITERS: dict[str, Callable[[Report], str]] = {
    ".md": markdown,
    ".html": html,
    ".tex": latex,
    ".csv": as_csv,
    ".json": as_json,
}


def main(argv: Sequence[str]) -> int:
    """Writes what was asked for; without ``-o`` the Markdown goes to the screen."""
    args = _parser().parse_args(argv)
    places = [_path("report", name) for name in args.results]
    outputs = [_output_file(name) for name in args.output or ()]
    figures = None if args.figures is None else _figures_folder(args.figures)
    conditions = [parse_condition(text) for text in args.fail_if or ()]
    columns = [name.strip() for name in (args.columns or "").split(",") if name.strip()]
    report = build_report(places, sort=args.sort or [], title=args.title, all_metrics=args.all_metrics, columns=columns)
    for output in outputs:
        _write(report, output)
    if figures is not None:
        with write_errors(f"--figures {figures}", ELSEWHERE):
            files = write_figures(report, figures)
        print(f"{figures}: {len(files)} files")
    if not outputs and figures is None:
        sys.stdout.write(markdown(report))
    unfinished = unfinished_cells(places)
    for folder, cells in unfinished.items():
        shards = "; the sweep's command with --merge joins its shards" if holds_shards(folder) else ""
        print(f"{folder}: {len(cells)} cells are unfinished and left out: {', '.join(cells)}{shards}", file=sys.stderr)
    lines = failures(report, conditions)
    for line in lines:
        print(line, file=sys.stderr)
    return FAILED if lines or (conditions and unfinished) else 0


def _write(report: Report, file: Path) -> None:
    text = WRITERS[file.suffix](report)
    make_folder(file.parent)
    write_whole(file.resolve(), text, ELSEWHERE, what=f"-o {file}")  # what a link leads to
    num_rows, num_tables = sum(len(table.rows) for table in report.tables), len(report.tables)
    print(f"{file}: {num_rows} rows in {num_tables} table{'s' if num_tables > 1 else ''}")


def _path(option: str, name: str) -> Path:
    """The path, unless the name is empty, as of a shell variable that is not set: that would be the current folder."""
    if not name:
        raise UsageError(f"{option} '': the name is empty; write . for this folder")
    return Path(name)


def _output_file(name: str) -> Path:
    file = _path("-o", name)
    if os.path.isdir(file):
        raise UsageError(f"-o {file} is a folder: name a file in it, such as {file / 'report.md'}")
    if file.suffix not in WRITERS:
        raise UsageError(f"-o {file}: the ending must be one of {', '.join(WRITERS)}")
    if file.match(PATTERN):
        raise UsageError(f"-o {file}: {PATTERN} are results, which reports read and never write: name another file")
    refuse_special(file, f"-o {file}")
    _check_writable("-o", file)
    return file


def _figures_folder(name: str) -> Path:
    folder = _path("--figures", name)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UsageError(f"--figures {folder} is a file: name a folder")
    _check_writable("--figures", folder)
    return folder


def _check_writable(option: str, path: Path) -> None:
    """Before the work, as far as can be known: the nearest parent that exists must be a folder that can be written to.

    Uses `os.path`, because pathlib raises for a folder that may not be looked into.
    """
    existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    if existing != path and not os.path.isdir(existing):
        raise UsageError(f"{option} {path}: {existing} is a file and cannot hold it: name another place")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{option} {path}: {existing} may not be written to: name another place")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lm-eval-kvpress report", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", metavar="DIR", help="folders with results_*.json, or such files")
    parser.add_argument("-o", "--output", action="append", metavar="FILE", help="; ".join(WRITERS))
    parser.add_argument(
        "--sort", action="append", metavar="COLUMN", help="rank by a column, best first; --sort=-COLUMN: worst first"
    )
    parser.add_argument(
        "--columns", metavar="NAMES", help="of Markdown, LaTeX and what the page opens with: press,kept_share,..."
    )
    parser.add_argument("--figures", metavar="DIR", help="folder for PNG and SVG figures")
    parser.add_argument(
        "--fail-if",
        action="append",
        metavar="CONDITION",
        help="exit with 3 and name the rows for which it holds, such as 'kl_mean>0.05'; columns as for --sort",
    )
    parser.add_argument("--title", default=TITLE, help="of the page (default: %(default)s)")
    parser.add_argument(
        "--all-metrics", action="store_true", help="every metric of each task, not the leading one only"
    )
    return parser
