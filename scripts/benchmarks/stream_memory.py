"""Cache bytes over the longest PG-19 book, streamed whole in a fixed cache. The last line is one JSON document.

KVPRESS_DATA_DIR=FOLDER python -m scripts.benchmarks.stream_memory     # FOLDER/pg19/test.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from typing import Any

import torch

from lm_eval_kvpress.harness.model import KVPress
from scripts.benchmarks.streams import CHUNK, SETTINGS, Setting, read_books, steps_of


def measure(lm: KVPress, setting: Setting, tokens: list[int]) -> dict[str, Any]:
    cache_bytes, total, begun = {}, [], time.perf_counter()
    peak_kib = {}
    for step in steps_of(lm, setting, [tokens]):
        total += step.losses[0]
        cache_bytes[step.start] = step.cache_bytes
        peak_kib[step.start] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.perf_counter() - begun
    whole_chunks = [start for start in cache_bytes if 1000 <= start <= len(tokens) - CHUNK]
    later = [cache_bytes[start] for start in whole_chunks]
    return {
        "setting": setting.name,
        "tokens": len(total),
        "cache_bytes_at_token_1000": later[0],
        "cache_bytes_min_after": min(later),
        "cache_bytes_max_after": max(later),
        "cache_bytes_at_end": later[-1],
        "peak_rss_growth_bytes": 1024 * (peak_kib[whole_chunks[-1]] - peak_kib[whole_chunks[0]]),
        "perplexity": round(math.exp(math.fsum(total) / len(total)), 3),
        "tokens_per_sec": round(len(total) / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--settings", default="sinks_512,tova_512")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = KVPress(pretrained=arguments.pretrained, device="cpu", dtype="float32")
    book = max(read_books(), key=lambda record: len(record["text"]))
    tokens = lm.tok_encode(book["text"])
    rows = [measure(lm, SETTINGS[name], tokens) for name in arguments.settings.split(",")]
    print(json.dumps({"book": book["short_book_title"], "chunk": CHUNK, "rows": rows}))


if __name__ == "__main__":
    main()
