"""Whether results of a sweep are still what the sweep wrote: its manifest has the hash of every file.

A samples file that lost its end reads well, and what is left of it would be paired. A file that is gone is no damage:
the report says what it cannot show without it. Knows files, and the manifest's format.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lm_eval_kvpress.errors import UsageError

FORMAT = "lm-eval-kvpress manifest 1"


def refuse_damage(file: Path) -> None:
    """Compare a results file and what belongs to it with the manifest beside its folder, if there is one of ours.

    Raises:
        UsageError: naming the first file that differs.
    """
    manifest = file.parent.parent / "manifest.json"
    for name, expected in _hashes(manifest).items():
        other = manifest.parent / name
        if other.is_file() and hashlib.sha256(other.read_bytes()).hexdigest() != expected:
            raise UsageError(
                f"{other} is not what its sweep wrote, such as after a power cut: the sweep's command makes the cell "
                f"again; to report it as it is, delete {manifest}"
            )


def _hashes(manifest: Path) -> dict[str, str]:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        files = content["files"] if content["format"] == FORMAT else {}
        return {name: entry["sha256"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # of somebody else, or damaged itself: the sweep's command tells
