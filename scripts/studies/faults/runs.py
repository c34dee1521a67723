"""The three kinds of run that go on after a fault, and whether one ended as it does undisturbed.

Each writes into one folder and is started again by the same command. Two folders are the same if their figures, answers
and losses are; seconds and dates differ.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "pretrained=builtin,dtype=float32"
LIMIT = "4"
TIMED = "requests that were timed"
COUNTS = ("press", "protocol", "tasks")
"""Of the record: what was asked, and what was kept and scored. A run whose answers come from a cache measures nothing
for them, so it is compared by its figures and samples."""


@dataclass(frozen=True)
class Run:
    """A command that can be started again in the same folder.

    Attributes:
        name: of the kind.
        command: for a folder.
        contents: all that must be the same for a folder; raises if something is missing or cannot be read.
        trusted: patterns of the files that it goes on from, or that a report reads.
        may_lose: keys of the contents that a damaged file may take along, if the file is named.
    """

    name: str
    command: Callable[[Path], list[str]]
    contents: Callable[[Path], dict[str, Any]]
    trusted: tuple[str, ...]
    may_lose: frozenset[str] = frozenset()


def _sweep_command(folder: Path) -> list[str]:
    return [
        *("lm-eval-kvpress", "sweep", "--model_args", MODEL, "--presses", "none,knorm,streaming_llm"),
        *("--ratios", "0.5", "--tasks", "kvpress_recall,kvpress_recall_gen", "--limit", LIMIT),
        *("--batch_size", "2", "--output_path", str(folder)),
    ]


def _sweep_contents(folder: Path) -> dict[str, Any]:
    return {cell.name: _results(cell / "results", COUNTS) for cell in sorted((folder / "cells").iterdir())}


def _stream_command(folder: Path) -> list[str]:
    arguments = (
        f"{MODEL},press=knorm,rolling=stream,stream_budget=256,stream_chunk=128,stream_output={folder / 'losses'}"
    )
    return [
        *("lm_eval", "--model", "pythia-kvpress", "--model_args", arguments, "--tasks", "kvpress_story"),
        *("--limit", LIMIT, "--batch_size", "1", "--output_path", str(folder / "results")),
    ]


def _stream_contents(folder: Path) -> dict[str, Any]:
    losses = {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.glob("losses/*/*"))}
    return {"losses": losses, "results": _results(folder / "results", COUNTS)}


def _logged_command(folder: Path) -> list[str]:
    arguments = f"{MODEL},press=knorm,compression_ratio=0.5,throughput_log={folder / 'log.csv'}"
    return [
        *("lm_eval", "--model", "pythia-kvpress", "--model_args", arguments, "--tasks", "kvpress_recall"),
        *("--limit", LIMIT, "--batch_size", "1", "--use_cache", str(folder / "cache")),
        *("--output_path", str(folder / "results"), "--log_samples"),
    ]


def _logged_contents(folder: Path) -> dict[str, Any]:
    with (folder / "log.csv").open(newline="") as lines:
        records = list(csv.DictReader(lines, strict=True))
    for record in records:
        if None in record or None in record.values() or float(record["seconds"]) < 0:
            raise ValueError(f"log.csv: a line is no record: {record}")
    requests = {(record["task"], record["doc_id"], record["idx"]) for record in records}
    return {
        TIMED: sorted(requests),
        "results": _results(folder / "results", ("press", "protocol")),
    }


def _results(folder: Path, of_record: tuple[str, ...]) -> dict[str, Any]:
    """Figures, samples and parts of the record, of the newest results; the names of files hold the date."""
    files = sorted(folder.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no results in {folder}")
    content = json.loads(files[-1].read_text())
    stamp = files[-1].stem.removeprefix("results_")
    samples = {
        task: [json.loads(line) for line in file.read_text().splitlines()]
        for task in content["configs"]
        if (file := files[-1].with_name(f"samples_{task}_{stamp}.jsonl")).exists()
    }
    record = {key: content["config"]["kvpress"][key] for key in of_record}
    return {"figures": content["results"], "n-samples": content["n-samples"], "samples": samples, "record": record}


RUNS = (
    Run("sweep", _sweep_command, _sweep_contents, ("sweep.json", "weights", "cells/**/*")),
    Run("stream", _stream_command, _stream_contents, ("losses/**/*",)),
    Run("logged run", _logged_command, _logged_contents, ("log.csv",), frozenset({TIMED})),
)
