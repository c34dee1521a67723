"""The one JSON of a machine, to which `evaluation` and `decoding` add and from which `performance_table` reads.

    machine, dtype         what all of it was measured on (`scripts.machine`)
    evaluation.rows        a row per model, workload, press and other side
    decoding.MODEL         a report per model

Rows and reports hold their own commit and date, since a document may be filled by several runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scripts.machine import commit, machine

FILE = "performance.json"


def read(folder: Path, dtype: str) -> dict[str, Any]:
    """The folder's document, or an empty one of this machine.

    Raises:
        ValueError: if it is of another machine, dtype or version, beside whose figures none of now may stand.
    """
    path = folder / FILE
    now: dict[str, Any] = {**machine(), "dtype": dtype}
    if not path.exists():
        return {"machine": machine(), "dtype": dtype}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = {**document["machine"], "dtype": document["dtype"]}
    other = [name for name, value in now.items() if before[name] != value]
    if other:
        raise ValueError(f"{path} holds figures measured with another {', '.join(other)}: choose another --output")
    return document


def write(document: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def stamp() -> dict[str, str | None]:
    """When a figure was measured, and of which commit."""
    return {"commit": commit(), "date": datetime.now(timezone.utc).date().isoformat()}
