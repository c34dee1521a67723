r"""The tables of docs/performance.md, one per machine, from the documents that `evaluation` and `decoding` wrote.

    python -m scripts.benchmarks.evaluation --models builtin,pythia-70m --output FOLDER --rows \
        'choice-800/*/stock,choice-800/*/pipeline,rolling/none/stock,generate-64x16/*/stock,generate-64x16/*/pipeline'
    python -m scripts.benchmarks.performance_table FOLDER                             prints one machine's table
    python -m scripts.benchmarks.performance_table ZEN3 ZEN4 H200 --into docs/performance.md

`--into` replaces what stands between the two `benchmarks:` marks of a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks import decoding
from scripts.benchmarks.document import FILE
from scripts.benchmarks.measuring import Estimate
from scripts.machine import described

WORKLOADS = (
    ("choice-800", "none"),
    ("choice-800", "snapkv"),
    ("qa-short", "snapkv"),
    ("rolling-one_pass", "none"),
    ("generate-64x16", "snapkv"),
)
"""Workload and press of our side; what was not measured is left out."""

BEGIN, END = "<!-- benchmarks: begin", "<!-- benchmarks: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        blocks = [block(read(folder)) for folder in arguments.folders]
        if arguments.into is None:
            print("\n\n".join(blocks))
        else:
            page = arguments.into.read_text(encoding="utf-8")
            arguments.into.write_text(replaced(page, "\n\n".join(blocks)), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--output of the two benchmarks")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="write the tables into a page")
    return parser


def read(folder: Path) -> dict[str, Any]:
    path = folder / FILE if folder.is_dir() else folder
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def replaced(page: str, text: str) -> str:
    """A page with other text between its marks, which stay.

    Raises:
        ValueError: if a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    mark, newline, _ = rest.partition("\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines '{BEGIN} ...' and '{END}'")
    return f"{before}{begin}{mark}{newline}\n{text}\n\n{end}{after}"


def block(document: Mapping[str, Any]) -> str:
    """A machine's heading and its one or two tables."""
    rows = document.get("evaluation", {}).get("rows", [])
    parts = [heading(document)]
    if rows:
        parts.append(requests_table(rows))
    if "decoding" in document:
        parts.append(decoding.markdown(document).rstrip())
    return "\n\n".join(parts)


def heading(document: Mapping[str, Any]) -> str:
    """Machine, versions, dtype, and the commits and dates of all figures."""
    figures = [*document.get("evaluation", {}).get("rows", []), *document.get("decoding", {}).values()]
    stamps = sorted({(one["date"], one["commit"] or "an unknown commit") for one in figures})
    measured = ", ".join(f"{date} at {commit}" for date, commit in stamps)
    return f"**{described(document['machine'])}**; {document['dtype']}; {measured}."


def requests_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row per model, workload and press, with stock and kvpress's pipeline beside our side.

    A ratio is the median of its own pairs. `ours` is of the pairs with stock, or where there are none of the others.
    """
    by_place = {(row["model"], row["workload"], row["press"], row["against"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for workload, press in WORKLOADS:
            stock, pipeline = (by_place.get((model, workload, press, side)) for side in ("stock", "pipeline"))
            if stock or pipeline:
                lines.append([model, workload, press, *figures(stock, pipeline)])
    sides = ["ours, s", "stock HFLM, s", "times as fast", "kvpress pipeline, s", "times as fast"]
    return markdown_table(["model", "workload", "press", *sides], lines)


def figures(stock: Mapping[str, Any] | None, pipeline: Mapping[str, Any] | None) -> list[str]:
    ours = stock or pipeline
    assert ours is not None
    cells = [f"{ours['seconds']['median']:.2f}"]
    for side in (stock, pipeline):
        if side is None:
            cells += ["-", "-"]
        else:
            cells += [f"{side['their_seconds']['median']:.2f}", str(Estimate(**side["times_as_fast"]))]
    return cells


if __name__ == "__main__":
    sys.exit(main())
