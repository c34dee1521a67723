"""How long a report of many cells takes: made-up results with logged samples, then every text format and the page.

python -m scripts.benchmarks.report [--cells 500] [--documents 60]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.command import WRITERS

PROMPT = "The trade of Rachel is farmer. " * 40


def write_cells(folder: Path, num_cells: int, num_documents: int) -> None:
    """One baseline and presses at many ratios, on the same documents."""
    draws = random.Random(0)
    for index in range(num_cells):
        scores = [float(draws.random() > 0.3) for _ in range(num_documents)]
        press = "none" if index == 0 else f"press{index % 20}"
        place = folder / str(index)
        place.mkdir()
        (place / "results_x.json").write_text(json.dumps(_results(press, index / num_cells, scores)))
        lines = (json.dumps(_sample(document, score)) + "\n" for document, score in enumerate(scores))
        (place / "samples_recall_x.jsonl").write_text("".join(lines))


def _results(press: str, ratio: float, scores: list[float]) -> dict[str, object]:
    facts = {
        "pretrained": "tiny",
        "dtype": "float32",
        "press": {"name": press, "arguments": {"compression_ratio": ratio}, "compression_ratio": ratio},
        "protocol": {"rolling": "prefix", "query_tokens": 1},
    }
    return {
        "results": {"recall": {"acc,none": sum(scores) / len(scores)}},
        "higher_is_better": {"recall": {"acc": True}},
        "n-samples": {"recall": {"original": len(scores), "effective": len(scores)}},
        "config": {"model": "kvpress", "kvpress": facts},
    }


def _sample(document: int, score: float) -> dict[str, object]:
    return {
        "doc_id": document,
        "doc": {"prompt": PROMPT},
        "arguments": {f"gen_args_{choice}": {"arg_0": PROMPT, "arg_1": " x"} for choice in range(4)},
        "resps": [[["-1.0", "False"]]] * 4,
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": str(document),
        "acc": score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--documents", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_cells(Path(folder), args.cells, args.documents)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.jsonl"))
        start = time.perf_counter()
        report = build_report([Path(folder)])
        seconds = {"read_and_compare": time.perf_counter() - start}
        for ending, writer in WRITERS.items():
            start = time.perf_counter()
            writer(report)
            seconds[ending] = time.perf_counter() - start
    rounded = {name: round(value, 2) for name, value in seconds.items()}
    print(json.dumps({"num_cells": args.cells, "samples_bytes": size, "seconds": rounded}))


if __name__ == "__main__":
    main()
