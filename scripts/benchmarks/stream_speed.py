"""Tokens per second of a stream: chunk 1 and 64, one and four rows, interleaved. The last line is one JSON document.

Rates by CPU time as well as by the wall, since a shared machine disturbs the second. Tokens are random: the time of a
step does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

CELLS = ((1, 1), (1, 4), (64, 1), (64, 4))  # chunk, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="per row with chunk 1; four times as many with 64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from lm_eval_kvpress.engine.stream_plan import StreamPlan
    from lm_eval_kvpress.engine.streaming import stream
    from lm_eval_kvpress.harness.model import KVPress

    lm = KVPress(pretrained=arguments.pretrained, device="cpu")
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, lm.model.config.vocab_size, (4, 4 * arguments.tokens), generator=generator).tolist()

    def rates(chunk: int, rows: int) -> dict[str, float]:
        length = arguments.tokens * (1 if chunk == 1 else 4)
        plan = StreamPlan(arguments.budget, chunk, num_sinks=4)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in stream(lm.press_model, [row[:length] for row in text[:rows]], 0, plan, lambda _: None):
            pass
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": rows * length / wall, "cpu": rows * length / cpu}

    rounds = [{cell: rates(*cell) for cell in CELLS} for _ in range(arguments.repeats + 1)][1:]  # the first warms up
    report: dict[str, object] = {"threads": arguments.threads, "budget": arguments.budget, "repeats": len(rounds)}
    for clock in ("wall", "cpu"):
        ratios = {
            "chunk 64 / chunk 1": [one[64, 1][clock] / one[1, 1][clock] for one in rounds],
            "four rows / one, chunk 1": [one[1, 4][clock] / one[1, 1][clock] for one in rounds],
            "four rows / one, chunk 64": [one[64, 4][clock] / one[64, 1][clock] for one in rounds],
        }
        report[clock] = {
            "tokens_per_sec": {
                f"chunk {chunk}, rows {rows}": round(statistics.median(one[chunk, rows][clock] for one in rounds))
                for chunk, rows in CELLS
            },
            "median_ratios": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
