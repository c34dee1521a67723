"""Perplexity of the same presses by one forward per window and through the cache: a table of a sweep's results.

    lm-eval-kvpress sweep --config scripts/studies/one_pass_table.yaml --output_path runs/one_pass \\
        --metadata '{"data_dir": "FOLDER", "max_tokens": 5000}'
    python -m scripts.studies.one_pass_table runs/one_pass

Under `one_pass` perplexity is per token of all, under `prefix` of those that follow a pressed context: columns compare,
rows across protocols do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.tables import markdown_table
from scripts.studies.cells import SCORED_UNDER_PRESS, fell_back, metric, read_cells, removed

SETTINGS = Path(__file__).with_suffix(".yaml")
TASKS = {"wikitext_kvpress": "WikiText-2", "pg19_kvpress": "PG19"}
METRICS = {"one_pass": "token_perplexity", "prefix": SCORED_UNDER_PRESS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="--output_path of the sweep")
    print(markdown(read_cells(parser.parse_args().sweep, SETTINGS)))


def markdown(cells: Sequence[Cell]) -> str:
    """One row per press and ratio, those of one ratio together."""
    by_place = {(removed(cell), cell.press.name, cell.rolling): cell for cell in cells}
    headings = [f"{title}, {protocol}" for title in TASKS.values() for protocol in METRICS]
    places = sorted(dict.fromkeys(place[:2] for place in by_place), key=lambda place: place[0])
    rows = [_row({protocol: by_place[(*place, protocol)] for protocol in METRICS}) for place in places]
    return markdown_table(["press", "removed", *headings], rows)


def _row(cells: Mapping[str, Cell]) -> list[str]:
    """One press at one ratio, from its cell of each protocol."""
    cell = cells["prefix"]
    mark = " (fell back to snapkv)" if fell_back(cell) == 1 else ""
    figures = [metric(cells[protocol], task, METRICS[protocol]) for task in TASKS for protocol in METRICS]
    return [f"{cell.press.name}{mark}", f"{removed(cell):.1f}", *(f"{figure:.3f}" for figure in figures)]


if __name__ == "__main__":
    main()
