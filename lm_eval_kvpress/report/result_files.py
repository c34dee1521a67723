"""Finds results files and reads them: folders of `lm_eval --output_path` or of a sweep -> cells.

A file that is not what lm-eval writes is refused in one line that names it. Knows no tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import refuse_special
from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.manifests import refuse_damage
from lm_eval_kvpress.report.parsing import parse_cell
from lm_eval_kvpress.report.results_schema import read_content

PATTERN, SHARDS = "results_*.json", "shards"
GOES_ON = "its command goes on where it stopped"
UNFINISHED = "results.part"  # the folder of results that a sweep has not sealed


def read_results(places: Sequence[Path]) -> list[Cell]:
    """The cells of all results files below the folders, or of the files named, in the order of their paths.

    Raises:
        UsageError: if a place has no results, or one of them cannot be read.
    """
    found = sorted({file for place in places for file in _results_files(place)})
    files = {file.resolve(): file for file in reversed(found)}  # one file may be reached by several paths
    return [read_cell(file) for file in sorted(files.values())]


def read_cell(file: Path) -> Cell:
    """The cell of one results file.

    Raises:
        UsageError: if the file cannot be read, is not whole JSON, or is not what lm-eval writes.
    """
    content = read_content(file)
    refuse_damage(file)
    return parse_cell(file, content)


def unfinished_cells(places: Sequence[Path]) -> dict[Path, list[str]]:
    """Folders of sweeps among the places and below them, and the names of their cells that have no results yet."""
    folders = sorted(
        {_sweep_of(file.parent) for place in places if place.is_dir() for file in place.rglob("sweep.json")}
    )
    cells = {folder: _unfinished(folder) for folder in folders}
    return {folder: names for folder, names in cells.items() if names}


def holds_shards(folder: Path) -> bool:
    """Whether shares of a sweep's answers are in folders of their own, from which they may have to be joined."""
    return any((folder / SHARDS).glob("*-of-*"))


def _sweep_of(folder: Path) -> Path:
    """The folder of the sweep of which this one may be a shard."""
    return folder.parent.parent if folder.parent.name == SHARDS and "-of-" in folder.name else folder


def _unfinished(sweep: Path) -> list[str]:
    names = {cell.name for cells in ("cells/*", f"{SHARDS}/*/cells/*") for cell in sweep.glob(cells)}
    return sorted(name for name in names if not any((sweep / "cells" / name / "results").rglob(PATTERN)))


def _results_files(place: Path) -> set[Path]:
    if not place.exists():
        raise UsageError(f"{place} does not exist")
    if not place.is_dir():
        refuse_special(place)
        return {place}
    files = {file for file in place.rglob(PATTERN) if UNFINISHED not in file.parts and file.is_file()}
    if not files and place in unfinished_cells([place]):
        goes_on = "its command with --merge joins its shards" if holds_shards(place) else GOES_ON
        raise UsageError(f"no cell of the sweep in {place} is finished: {goes_on}")
    if not files:
        raise UsageError(f"no {PATTERN} below {place}: pass the --output_path of lm_eval or of a sweep")
    return files
