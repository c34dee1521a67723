"""Figures of a sweep's finished cells, for the scripts that draw or print them.

Reads results files through `lm_eval_kvpress.report`; knows no model and runs nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.result_files import read_results

SCORED_UNDER_PRESS = "pressed_token_perplexity"
"""Metric: per token, of what is scored over a compressed cache; for the baseline of the same tokens."""


def read_cells(sweep: Path, settings: Path) -> list[Cell]:
    """All finished cells of a sweep, in the order in which its settings list the presses, ratios ascending.

    Args:
        sweep: its `--output_path`.
        settings: its `--config`.

    Raises:
        ValueError: if there are none, or of presses that the settings do not list.
    """
    presses = yaml.safe_load(settings.read_text(encoding="utf-8"))["presses"]
    return sorted(read_results([sweep]), key=lambda cell: (presses.index(cell.press.name), removed(cell)))


def metric(cell: Cell, task: str, name: str) -> float:
    """One figure of one task.

    Raises:
        ValueError: if the cell has no such figure, as after a sweep of other tasks.
    """
    found = cell.task(task)
    for one in found.metrics if found else ():
        if one.name == name and one.value is not None:
            return one.value
    raise ValueError(f"{cell.file} has no {name} of {task}")


def removed(cell: Cell) -> float:
    """The fraction that the press was asked to remove."""
    return cell.press.removed_asked or 0.0


def kept_share(cell: Cell, *tasks: str) -> float | None:
    """Entries that could still be attended, of all prefilled in some tasks or in all; None where no press acted."""
    chosen = [task for task in cell.tasks if not tasks or task.name in tasks]
    kept = [task.kept for task in chosen if task.kept and task.kept.share is not None]
    num_tokens = sum(one.num_tokens for one in kept)
    return sum(one.num_tokens * (one.share or 0.0) for one in kept) / num_tokens if num_tokens else None


def notes(cell: Cell) -> dict[str, float]:
    """What the press said about itself, and in which share of the contexts that it compressed."""
    counts: Counter[str] = Counter()
    for task in cell.tasks:
        counts.update(dict(task.notes))
    total = sum(task.kept.num_contexts_pressed for task in cell.tasks if task.kept)
    return {note: count / total for note, count in counts.items()}


def fell_back(cell: Cell) -> float:
    """The share of the compressed contexts in which another press ran than the one named."""
    return sum(share for note, share in notes(cell).items() if "fell back" in note)
