"""What measuring costs: the same requests with the throughput log, without it, and without any clock.

Each round runs the three in shuffled order in one process; the figures are medians over the rounds of the ratios within
a round, with 95 % bootstrap intervals, in wall-clock and in CPU time. The last line of stdout is one JSON document.

    python -m scripts.benchmarks.log_overhead                  seven rounds on the built-in checkpoint: two minutes
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval.api.instance import Instance

from lm_eval_kvpress.harness import session
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.meter import Meter
from scripts.benchmarks.measuring import estimate, rounds
from scripts.benchmarks.texts import story_text

KINDS = ("with log", "without log", "without clock")


class NoClock(Clock):
    """A clock that times nothing."""

    @contextmanager
    def phase(self, name: str, *, num_tokens: int = 0) -> Iterator[Counter[str]]:
        yield Counter(tokens=num_tokens)

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return hook


class NoMeter(Meter):
    """A meter that records nothing."""

    def start(self) -> None: ...

    def batch(self, *_: Any, **__: Any) -> None: ...

    def finish(self, request_type: str) -> None: ...


@dataclass(frozen=True)
class Taken:
    """Seconds of one run."""

    wall: float
    cpu: float


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models, requests = _models(args, Path(folder)), _requests(args.num_requests)
        found = rounds(KINDS, lambda kind: _run(models[kind], requests), args.rounds)
    print(json.dumps({**vars(args), "threads": torch.get_num_threads(), **figures(found)}))


def figures(found: Sequence[Mapping[str, Taken]]) -> dict[str, Any]:
    """Ratios within a round, of wall-clock and of CPU time; each is printed."""
    ratios: dict[str, Any] = {"seconds_per_run": estimate([one["with log"].wall for one in found]).median}
    for clock in ("wall", "cpu"):
        for kind in KINDS[1:]:
            name = f"{clock}: with log / {kind}"
            ratio = estimate([getattr(one["with log"], clock) / getattr(one[kind], clock) for one in found])
            ratios[name] = asdict(ratio)
            print(f"{name:30} {ratio.median:.4f}  [{ratio.low:.4f}, {ratio.high:.4f}]")
    return ratios


def _models(args: argparse.Namespace, folder: Path) -> dict[str, KVPress]:
    shared = {"press": args.press, "batch_size": args.batch_size, "device": "cpu", "dtype": "float32"}
    models = {
        "with log": KVPress(args.pretrained, throughput_log=str(folder / "log.jsonl"), **shared),
        "without log": KVPress(args.pretrained, **shared),
    }
    with mock.patch.multiple(session, Clock=NoClock, Meter=NoMeter):
        models["without clock"] = KVPress(args.pretrained, **shared)
    return models


def _requests(number: int) -> list[list[Instance]]:
    """Choices, documents and prompts, as many of each."""
    text = story_text().split()

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


def _run(lm: KVPress, requests: Sequence[list[Instance]]) -> Taken:
    start, cpu = time.perf_counter(), time.process_time()
    for of_type in requests:
        getattr(lm, of_type[0].request_type)(of_type, disable_tqdm=True)
    return Taken(time.perf_counter() - start, time.process_time() - cpu)


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
