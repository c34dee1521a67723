"""N questions on one context: asked together, with one compressed cache, against each with a prefill of its own.

    python -m scripts.benchmarks.shared_context --threads 1

Under ``query_aware=false``, greedy answers of a fixed length. Together is one call of ``generate_until``; apart is a
call per question, which shares nothing. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from lm_eval.api.instance import Instance

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.measuring import count, counts, rounds, seconds
from scripts.benchmarks.texts import Text
from scripts.machine import described, machine

Way = tuple[int, bool]
"""The number of questions, and whether they are asked together."""

NUM_QUESTION_TOKENS = 12


def requests(lm: KVPress, num_questions: int, context_tokens: int, new_tokens: int) -> list[Instance]:
    """Questions of one length on one context."""
    text = Text(lm.tokenizer)
    context = text.piece(0, context_tokens)
    asked = [f"{context}\nQuestion:{text.piece(1 + index, NUM_QUESTION_TOKENS)}" for index in range(num_questions)]
    options = {"until": [], "max_gen_toks": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return [Instance("generate_until", {}, (one, options), 0, ("t", index, 1)) for index, one in enumerate(asked)]


def measure(lm: KVPress, asked: list[Instance], together: bool) -> tuple[float, int, list[str]]:
    """Seconds, tokens prefilled under the press, and the answers."""
    lm.use(lm.open_session(lm.session.settings))  # the latest shared cache would serve the next call
    calls = [asked] if together else [[one] for one in asked]
    time, answers = seconds(lambda: [text for call in calls for text in lm.generate_until(call, disable_tqdm=True)])
    return time, sum(batch.num_prefill_tokens for batch in lm.session.runner.meter.records.batches), answers


def rows(lm: KVPress, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of questions; medians over repeats."""
    asked = {number: requests(lm, number, args.context, args.new_tokens) for number in args.questions}
    ways: list[Way] = [(number, together) for number in args.questions for together in (True, False)]
    found = rounds(ways, lambda way: measure(lm, asked[way[0]], way[1]), args.repeats)
    result = []
    for number in args.questions:
        times = {way: [one[number, way][0] for one in found] for way in (True, False)}
        assert all(one[number, True][2] == one[number, False][2] for one in found), "other answers"
        result.append(
            {
                "num_questions": number,
                "prefill_tokens_together": found[0][number, True][1],
                "prefill_tokens_apart": found[0][number, False][1],
                "together_sec": statistics.median(times[True]),
                "apart_sec": statistics.median(times[False]),
                "ratio": statistics.median(a / b for a, b in zip(times[False], times[True], strict=True)),
            }
        )
    return result


def markdown(found: list[dict[str, Any]]) -> str:
    head = ["questions", "prefilled together", "apart", "seconds together", "apart", "apart / together"]
    return markdown_table(
        head,
        [
            [
                str(row["num_questions"]),
                *(f"{row[f'prefill_tokens_{way}']:,}" for way in ("together", "apart")),
                *(f"{row[f'{way}_sec']:.2f}" for way in ("together", "apart")),
                f"{row['ratio']:.1f}",
            ]
            for row in found
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--press", default="snapkv")
    parser.add_argument("--questions", type=counts, default=[1, 4, 16], help="numbers of questions")
    parser.add_argument("--context", type=count, default=1024, help="tokens of the context")
    parser.add_argument("--new_tokens", type=count, default=16, help="tokens of each answer")
    parser.add_argument("--batch_size", type=count, default=16)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--threads", type=count, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    protocol = {"query_aware": False, "question_pattern": "Question:", "press": args.press}
    lm = KVPress(args.pretrained, batch_size=args.batch_size, device="cpu", dtype="float32", **protocol)
    found = rows(lm, args)
    print(f"{markdown(found)}\n\n{described(machine())}")
    print(json.dumps({"rows": found, "context": args.context, "press": args.press, "machine": machine()}))


if __name__ == "__main__":
    main()
