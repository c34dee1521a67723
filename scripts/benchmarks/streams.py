"""Streams to measure: what stays in the cache, the books that are streamed, and the stream itself.

Needs the books of PG-19's test split in KVPRESS_DATA_DIR/pg19/test.jsonl (tasks/kvpress_ppl/README.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import ChunkLosses, stream
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.streaming import for_stream

CHUNK = 64


@dataclass(frozen=True)
class Setting:
    """What stays in the cache of a stream.

    Attributes:
        press: chooses what stays; None recomputes everything from a window of ``budget`` tokens.
        num_sinks: first entries that stay beside the last ones; None has ``press`` choose.
        rotate: whether keys are rotated by their place in the cache, not by their place in the document.
    """

    name: str
    label: str
    budget: int
    press: str | None = "streaming_llm"
    num_sinks: int | None = None
    rotate: bool = True


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("recomputation_512", "sliding recomputation", 512, press=None),
        Setting("window_512", "window only", 512, num_sinks=0),
        Setting("sinks_512", "4 sinks + window, rotated", 512, num_sinks=4),
        Setting("sinks_original_512", "4 sinks + window, original positions", 512, num_sinks=4, rotate=False),
        Setting("sinks64_512", "64 sinks + window, rotated", 512, num_sinks=64),
        Setting("sinks64_original_512", "64 sinks + window, original positions", 512, num_sinks=64, rotate=False),
        Setting("tova_512", "tova, rotated", 512, press="tova"),
        Setting("tova_original_512", "tova, original positions", 512, press="tova", rotate=False),
        Setting("sinks_1024", "4 sinks + window, rotated", 1024, num_sinks=4),
        Setting("sinks_original_1024", "4 sinks + window, original positions", 1024, num_sinks=4, rotate=False),
    )
}


def read_books() -> list[dict[str, str]]:
    """PG-19's test split, or the part of it that is there."""
    file = Path(os.environ.get("KVPRESS_DATA_DIR") or "") / "pg19" / "test.jsonl"
    if not file.is_file():
        raise SystemExit(f"no {file}: set KVPRESS_DATA_DIR to the folder of the books (tasks/kvpress_ppl/README.md)")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def first_books(lm: KVPress, num_books: int, num_tokens: int) -> dict[str, list[int]]:
    """The first books that are long enough, cut to as many tokens."""
    chosen: dict[str, list[int]] = {}
    for record in read_books():
        tokens = lm.tok_encode(record["text"][: 12 * num_tokens])[:num_tokens]  # no token is as long on average
        if len(tokens) == num_tokens:
            chosen[record["short_book_title"]] = tokens
        if len(chosen) == num_books:
            return chosen
    raise SystemExit(f"only {len(chosen)} books of {num_tokens} tokens: lower --books or --tokens")


def steps_of(lm: KVPress, setting: Setting, texts: Sequence[list[int]]) -> Iterator[ChunkLosses]:
    """Stream texts side by side."""
    assert setting.press is not None
    press = for_stream(parse_press(setting.press, {}), setting.budget, CHUNK)
    plan = StreamPlan(setting.budget, CHUNK, setting.rotate, num_sinks=setting.num_sinks)
    return stream(lm.press_model, texts, lm.prefix_token_id, plan, press.build)
