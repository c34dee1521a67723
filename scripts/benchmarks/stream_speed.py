"""Tokens per second of a stream: chunks of 1 and 64 tokens, one and four rows, interleaved.

    python -m scripts.benchmarks.stream_speed --threads 1

Rates by CPU time as well as by the wall clock, since a shared machine disturbs the second. Tokens are random, since the
time of a step does not depend on them. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import stream
from lm_eval_kvpress.harness.model import KVPress
from scripts.benchmarks.measuring import count, estimate, rounds
from scripts.machine import commit, machine

NUM_SINKS = 4


@dataclass(frozen=True)
class Case:
    chunk: int
    rows: int

    def __str__(self) -> str:
        return f"chunk {self.chunk}, rows {self.rows}"


@dataclass(frozen=True)
class Rate:
    """Tokens per second of all rows."""

    wall: float
    cpu: float


CASES = (Case(1, 1), Case(1, 4), Case(64, 1), Case(64, 4))

RATIOS = {
    "chunk 64 / chunk 1": (Case(64, 1), Case(1, 1)),
    "four rows / one, chunk 1": (Case(1, 4), Case(1, 1)),
    "four rows / one, chunk 64": (Case(64, 4), Case(64, 1)),
}


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    lm = KVPress(pretrained=arguments.pretrained, device="cpu")
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, lm.model.config.vocab_size, (4, 4 * arguments.tokens), generator=generator).tolist()

    def measure(case: Case) -> Rate:
        length = arguments.tokens * (1 if case.chunk == 1 else 4)
        return rate(lm, [text[:length] for text in texts[: case.rows]], case.chunk, arguments.budget)

    found = rounds(CASES, measure, arguments.repeats)
    settings = {"budget": arguments.budget, "repeats": arguments.repeats, "machine": machine(), "commit": commit()}
    print(json.dumps({**settings, **{clock: figures(found, clock) for clock in ("wall", "cpu")}}))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--budget", type=count, default=512)
    parser.add_argument("--tokens", type=count, default=1024, help="per row with chunk 1; four times as many with 64")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--threads", type=count, default=2)
    return parser


def rate(lm: KVPress, texts: Sequence[list[int]], chunk: int, budget: int) -> Rate:
    """How fast texts of one length are streamed side by side."""
    plan = StreamPlan(budget, chunk, num_sinks=NUM_SINKS)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in stream(lm.press_model, texts, 0, plan, lambda _: None):
        pass
    num_tokens = sum(map(len, texts))
    return Rate(num_tokens / (time.perf_counter() - wall), num_tokens / (time.process_time() - cpu))


def figures(found: Sequence[Mapping[Case, Rate]], clock: str) -> dict[str, Any]:
    """Rates, and ratios within a round, by one clock."""
    by_round = [{case: getattr(one[case], clock) for case in CASES} for one in found]
    ratios = {name: [one[a] / one[b] for one in by_round] for name, (a, b) in RATIOS.items()}
    return {
        "tokens_per_sec": {str(case): asdict(estimate([one[case] for one in by_round])) for case in CASES},
        "ratios": {name: asdict(estimate(values)) for name, values in ratios.items()},
    }


if __name__ == "__main__":
    main()
