"""Losses by token position, as `stream_output` wrote them -> perplexity over the position, a curve per run and task.

A folder of losses belongs to a run if all that both record agrees: checkpoint, revision, dtype, attention, press,
protocol and versions. Nothing is guessed from names; of several such folders the one nearest to the results counts.
Bins grow with the position, because a stream's question is what happens at 10x its budget, not at one token more.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_eval_kvpress.report.result_files import Identity, ResultsError, identity
from lm_eval_kvpress.report.rows import Curve, Row, Table

FIRST_BIN = 16  # tokens; each further bin ends sqrt(2) times as far as the one before it
BINS_PER_OCTAVE = 2
Folders = dict[Identity, list[tuple[Path, str | None]]]  # each with torch's seed, where it is known
SETTINGS = "settings.json"
HEADER = "position,loss_nats"


def with_curves(tables: Sequence[Table], places: Sequence[Path]) -> list[Table]:
    """The tables, their rows with the curves of the losses below the places or beside the results.

    Raises:
        ResultsError: for a file of losses that cannot be read.
    """
    folders = _folders(tables, places)
    return [
        replace(table, rows=tuple(replace(row, curves=tuple(_curves(row, folders))) for row in table.rows))
        for table in tables
    ]


def curve(task: str, documents: Sequence[npt.NDArray[np.float64]]) -> Curve:
    """Perplexity over the position: ``exp`` of the mean loss of all tokens of all documents in a bin.

    Args:
        task: its name.
        documents: the losses of each in nats, by position.
    """
    numbers = [_bins(len(losses)) for losses in documents]
    bins = np.concatenate(numbers)
    sums, counts = np.bincount(bins, np.concatenate(documents)), np.bincount(bins)
    holders = np.bincount(np.concatenate([np.unique(one) for one in numbers]))
    ends = FIRST_BIN * 2 ** (np.arange(len(counts)) / BINS_PER_OCTAVE)
    longest = max(map(len, documents))
    used = np.flatnonzero(counts)
    with np.errstate(over="ignore"):
        perplexities = np.exp(sums[used] / counts[used])
    return Curve(
        task,
        tuple(min(math.floor(end), longest) for end in ends[used]),
        tuple(perplexities.tolist()),
        tuple(holders[used].tolist()),
    )


def _bins(num_tokens: int) -> npt.NDArray[np.int64]:
    """The bin of each position; bin 0 has the first tokens, bin k those before ``FIRST_BIN * 2**(k/2)``."""
    position = np.arange(num_tokens) + 1.0
    exponents = BINS_PER_OCTAVE * np.log2(np.maximum(position / FIRST_BIN, 1.0))
    return np.ceil(exponents).astype(np.int64)


def _curves(row: Row, folders: Folders) -> Iterator[Curve]:
    """Of the tasks whose losses are whole: a folder may hold another run's ``--limit``, or an unfinished run."""
    cell = row.cell
    if cell is None or cell.identity is None:
        return
    seed = dict(cell.seeds).get("torch_seed")
    found = [folder for folder, known in folders.get(cell.identity, ()) if None in (known, seed) or known == seed]
    if not found:
        return
    folder = max(found, key=lambda one: _nearness(one, cell.file))
    for task in cell.tasks:
        files = sorted((folder / task.name).glob("*.csv"))
        if files and len(files) == task.num_documents:
            yield curve(task.name, [_losses(file) for file in files])


def _nearness(folder: Path, file: Path) -> int:
    """Folders that both paths begin with."""
    pairs = zip(folder.resolve().parts, file.resolve().parts, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), 0)


def _folders(tables: Sequence[Table], places: Sequence[Path]) -> Folders:
    """By what ran. A sweep's cell has its losses in ``stream`` beside its ``results``."""
    rows = [row.cell for table in tables for row in table.rows if row.cell is not None]
    if not any(cell.is_stream for cell in rows):
        return {}
    beside = [cell.file.parents[index] / "stream" / SETTINGS for cell in rows for index in range(3)]
    below = [file for place in places if place.is_dir() for file in place.rglob(SETTINGS)]
    folders: Folders = defaultdict(list)
    for file in sorted({one.resolve() for one in [*below, *beside] if one.is_file()}):
        settings = _settings(file)
        found = identity(settings, settings.get("revision")) if "protocol" in settings else None
        if found is not None:
            seed = settings.get("seed")
            folders[found].append((file.parent, None if seed is None else str(seed)))
    return folders


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{file} is not whole JSON: delete that folder of losses and run it again") from error
    return settings if isinstance(settings, dict) else {}


def _losses(file: Path) -> npt.NDArray[np.float64]:
    """The losses of one document; they are written whole, position by position."""
    with file.open(encoding="utf-8") as lines:
        header = lines.readline().strip()
        try:
            table = np.loadtxt(lines, delimiter=",", ndmin=2) if header == HEADER else np.empty((0, 0))
        except ValueError as error:
            raise ResultsError(f"{file} is not a table of {HEADER}: {error}") from error
    if table.shape[1] != 2 or not np.array_equal(table[:, 0], np.arange(len(table))):
        raise ResultsError(f"{file} is not a table of {HEADER}, position by position: delete it and run again")
    return table[:, 1]
