"""The stories beside this file as documents of a perplexity task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import Task

STORIES = Path(__file__).resolve().parent / "stories"


def load(**metadata: Any) -> dict[str, datasets.Dataset]:
    """All stories in the order of their names, with what `tasks/kvpress_ppl/rolling.py` divides by."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(STORIES.glob("*.txt"))}
    assert texts, f"no story in {STORIES}"
    rows = [
        {"title": title, "text": text, "num_words": Task.count_words(text), "num_bytes": Task.count_bytes(text)}
        for title, text in texts.items()
    ]
    return {"test": datasets.Dataset.from_list(rows)}
