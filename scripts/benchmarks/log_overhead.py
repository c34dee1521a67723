"""What measuring costs: the same requests with the throughput log, without it, and without any clock.

Each round runs the three in shuffled order in one process; the figures are medians over the rounds of the ratios within
a round, with 95 % bootstrap intervals, in wall-clock and in CPU time. The last line of stdout is one JSON document.

    python -m scripts.benchmarks.log_overhead                  seven rounds on the built-in checkpoint: two minutes
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.meter import Meter
from scripts.benchmarks.presses import estimate

STORIES = Path(__file__).resolve().parents[2] / "tasks" / "demo" / "stories"
KINDS = ("with log", "without log", "without clock")


class NoClock(Clock):
    """Times nothing."""

    @contextmanager
    def phase(self, name: str, *, num_tokens: int = 0) -> Iterator[Counter[str]]:
        yield Counter(tokens=num_tokens)

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return hook


class NoMeter(Meter):
    """Books nothing."""

    def start(self) -> None: ...

    def batch(self, *_: Any, **__: Any) -> None: ...

    def finish(self, request_type: str) -> None: ...


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = _models(args, Path(folder))
        requests = _requests(args.num_requests)
        for lm in models.values():
            _run(lm, requests)  # warm-up
        rounds = [_round(models, requests, seed) for seed in range(args.rounds)]
    record: dict[str, Any] = {"rounds": args.rounds, "num_requests": args.num_requests, "press": args.press}
    record["threads"] = torch.get_num_threads()
    for what, index in (("wall", 0), ("cpu", 1)):
        for kind in KINDS[1:]:
            ratios = [times["with log"][index] / times[kind][index] for times in rounds]
            found = estimate(ratios)
            record[f"{what}: with log / {kind}"] = {"median": found.median, "low": found.low, "high": found.high}
            print(f"{what:4}  with log / {kind:14} {found.median:.4f}  [{found.low:.4f}, {found.high:.4f}]")
    record["seconds_per_run"] = estimate([times["with log"][0] for times in rounds]).median
    print(json.dumps(record))


def _models(args: argparse.Namespace, folder: Path) -> dict[str, KVPress]:
    shared = {"press": args.press, "batch_size": args.batch_size, "device": "cpu", "dtype": "float32"}
    models = {
        "with log": KVPress(args.pretrained, throughput_log=str(folder / "log.jsonl"), **shared),
        "without log": KVPress(args.pretrained, **shared),
        "without clock": KVPress(args.pretrained, **shared),
    }
    runner = models["without clock"]._runner
    runner.clock = runner.compressor._clock = NoClock(torch.device("cpu"))
    runner.meter = NoMeter(runner.clock, {})
    return models


def _requests(number: int) -> list[list[Instance]]:
    """Choices, documents and prompts, as many of each."""
    text = " ".join(file.read_text() for file in sorted(STORIES.glob("*.txt"))).split()

    def words(start: int, count: int) -> str:
        return " ".join(text[start % 2_000 :][:count])

    choices = [
        Instance("loglikelihood", {}, (words(37 * index, 500), f" {words(91 * choice, 8)}"), choice, ("c", index, 1))
        for index in range(number)
        for choice in range(4)
    ]
    documents = [
        Instance("loglikelihood_rolling", {}, (words(53 * index, 1_200),), 0, ("r", index, 1))
        for index in range(number // 4)
    ]
    options = {"until": [], "max_gen_toks": 24}
    prompts = [
        Instance("generate_until", {}, (words(71 * index, 400), options), 0, ("g", index, 1)) for index in range(number)
    ]
    return [choices, documents, prompts]


def _round(models: dict[str, KVPress], requests: Sequence[list[Instance]], seed: int) -> dict[str, tuple[float, float]]:
    order = list(models)
    random.Random(seed).shuffle(order)
    times = {kind: _run(models[kind], requests) for kind in order}
    print("  ".join(f"{kind} {times[kind][0]:.2f} s" for kind in models), file=sys.stderr, flush=True)
    return times


def _run(lm: KVPress, requests: Sequence[list[Instance]]) -> tuple[float, float]:
    """Seconds of wall clock and of CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    for of_type in requests:
        getattr(lm, of_type[0].request_type)(of_type, disable_tqdm=True)
    return time.perf_counter() - start, time.process_time() - cpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--press", default="snapkv")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    return parser


if __name__ == "__main__":
    main()
