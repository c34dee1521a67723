"""Losses by token position, as `stream_output` wrote them -> perplexity over the position, a curve per run and task.

A folder of losses belongs to a run if everything that both record agrees: checkpoint, revision, dtype, attention,
press, protocol and versions. Nothing is guessed from names; of several such folders the one nearest to the results
counts. Bins grow with the position, because the question of a stream is what happens at 10x its budget.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import checksum, file_name, refuse_special
from lm_eval_kvpress.report.cell import Cell, Identity
from lm_eval_kvpress.report.parsing import identity

FIRST_BIN = 16  # tokens; each further bin ends sqrt(2) times as far as the one before it
BINS_PER_OCTAVE = 2
SETTINGS = "settings.json"
HEADER = "position,loss_nats"


@dataclass(frozen=True)
class Curve:
    """Perplexity over the position in one task's documents: each bin's last position, perplexity and documents."""

    task: str
    ends: tuple[int, ...]
    perplexities: tuple[float, ...]
    num_documents: tuple[int, ...]


@dataclass(frozen=True)
class LossFolder:
    """A folder of losses; ``seed`` is torch's, None where it is not recorded."""

    path: Path
    seed: str | None


class LossFolders:
    """Folders of losses by what ran."""

    def __init__(self, folders: Mapping[Identity, Sequence[LossFolder]]):
        self._folders = folders

    @classmethod
    def find(cls, cells: Sequence[Cell], places: Sequence[Path]) -> LossFolders:
        """The folders below the places, and those beside the results of a sweep; none if no cell is a stream."""
        folders: dict[Identity, list[LossFolder]] = defaultdict(list)
        for file in _settings_files(cells, places) if any(cell.is_stream for cell in cells) else ():
            settings = _settings(file)
            if "protocol" in settings:
                seed = settings.get("seed")
                folder = LossFolder(file.parent, None if seed is None else str(seed))
                folders[identity(settings, settings.get("revision"))].append(folder)
        return cls(folders)

    def curves(self, cell: Cell) -> tuple[Curve, ...]:
        """The curves of the cell's tasks. None for a task whose losses are another run's ``--limit``, or unfinished.

        Raises:
            UsageError: if a file of losses cannot be read.
        """
        folder = self._folder(cell)
        return () if folder is None else tuple(_curves(cell, folder))

    def _folder(self, cell: Cell) -> Path | None:
        """The folder of the cell's losses, the nearest of several. One that does not say its seed may be of any."""
        if cell.identity is None:
            return None
        seed = dict(cell.seeds).get("torch_seed")
        folders = self._folders.get(cell.identity, ())
        paths = [folder.path for folder in folders if folder.seed == seed or None in (folder.seed, seed)]
        return max(paths, key=lambda path: _num_shared_parents(path, cell.file), default=None)


def curve(task: str, documents: Sequence[npt.NDArray[np.float64]]) -> Curve:
    """Perplexity over the position: ``exp`` of the mean loss of all tokens of all documents in a bin.

    Args:
        task: its name.
        documents: the losses of each in nats, by position: (tokens,).
    """
    bins_by_document = [_bins(len(losses)) for losses in documents]
    bins = np.concatenate(bins_by_document)
    sums, num_tokens = np.bincount(bins, np.concatenate(documents)), np.bincount(bins)
    num_documents = np.bincount(np.concatenate([np.unique(one) for one in bins_by_document]))
    ends = FIRST_BIN * 2 ** (np.arange(len(num_tokens)) / BINS_PER_OCTAVE)
    longest = max(map(len, documents))
    used = np.flatnonzero(num_tokens)
    with np.errstate(over="ignore"):
        perplexities = np.exp(sums[used] / num_tokens[used])
    return Curve(
        task,
        tuple(min(math.floor(end), longest) for end in ends[used]),
        tuple(perplexities.tolist()),
        tuple(num_documents[used].tolist()),
    )


def _bins(num_tokens: int) -> npt.NDArray[np.int64]:
    """The bin of each position; bin 0 has the first tokens, bin k those before ``FIRST_BIN * 2**(k/2)``."""
    position = np.arange(num_tokens) + 1.0
    exponents = BINS_PER_OCTAVE * np.log2(np.maximum(position / FIRST_BIN, 1.0))
    return np.ceil(exponents).astype(np.int64)


def _curves(cell: Cell, folder: Path) -> Iterator[Curve]:
    for task in cell.tasks:
        files = sorted((folder / file_name(task.name)).glob("*.csv"))
        if files and len(files) == task.num_documents:
            yield curve(task.name, [_losses(file) for file in files])


def _num_shared_parents(one: Path, other: Path) -> int:
    """How many folders both paths begin with."""
    pairs = zip(one.resolve().parts, other.resolve().parts, strict=False)
    return next((index for index, (part, other_part) in enumerate(pairs) if part != other_part), 0)


def _settings_files(cells: Iterable[Cell], places: Iterable[Path]) -> list[Path]:
    """A sweep has the losses of a cell in ``stream`` beside its ``results``."""
    beside = [folder / "stream" / SETTINGS for cell in cells for folder in cell.file.parents[:3]]
    below = [file for place in places if place.is_dir() for file in place.rglob(SETTINGS)]
    return sorted({file.resolve() for file in [*below, *beside] if file.is_file()})


def _settings(file: Path) -> dict[str, Any]:
    """Settings of a folder of losses; empty if the file is somebody else's, or torn, which a notice tells."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _undamaged(file: Path) -> str:
    """The text of a file of losses, which must match the checksum in the file beside it.

    Raises:
        UsageError: if it does not. Older versions wrote no checksum.
    """
    refuse_special(file)
    beside = file.with_suffix(".json")
    try:
        about = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        text = file.read_text(encoding="utf-8")
        if "sha256" not in about or about["sha256"] == checksum(text, json.dumps(about["counts"], sort_keys=True)):
            return text
    except (KeyError, TypeError, ValueError):
        pass
    raise UsageError(f"{file} or the .json beside it is damaged: the command that wrote it computes it again")


def _losses(file: Path) -> npt.NDArray[np.float64]:
    """The losses of one document, by position: (tokens,)."""
    header, *lines = _undamaged(file).splitlines() or [""]
    try:
        table = np.loadtxt(lines, delimiter=",", ndmin=2) if header == HEADER else np.empty((0, 0))
    except ValueError as error:
        raise UsageError(f"{file} is not a table of {HEADER}: {error}") from error
    if table.shape[1] != 2 or not np.array_equal(table[:, 0], np.arange(len(table))):
        raise UsageError(f"{file} is not a table of {HEADER}, position by position: delete it and run again")
    return table[:, 1]
