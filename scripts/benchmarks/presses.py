"""Speed and memory of generation under presses: presses x batch sizes x prompt lengths x new tokens.

Every setting is warmed up once; then all settings are repeated, in an order that is shuffled anew each time, so that a
machine that slows down slows all of them down. Figures are medians over the repeats with 95 % bootstrap intervals.
Exactly NEW tokens are decoded, greedily; an end-of-text token does not end a row here.

    python -m scripts.benchmarks.presses                         the built-in checkpoint, about a minute
    python -m scripts.benchmarks.presses --shape pythia-410m     random weights: speed and memory, no perplexity
    python -m scripts.benchmarks.presses --pretrained EleutherAI/pythia-2.8b --dtype float16

The last line of stdout is one JSON document; it and a Markdown table are written to --output as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.generation import Bench, Case, Measurement, random_prompts, story_prompts
from scripts.benchmarks.measuring import count, counts, estimate, rounds, write
from scripts.benchmarks.models import BUILTIN, DTYPES, SHAPES, random_model
from scripts.machine import ROOT, commit, machine

PRESSES = "none,snapkv,streaming_llm,pyramidkv"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        report = run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(report, markdown(report), arguments.output, "presses")
    print(markdown(report))
    print(json.dumps(report))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--pretrained", default="builtin", help="folder, hub name or builtin (default: builtin)")
    model.add_argument("--shape", choices=SHAPES, help="random weights of a shape")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--presses", default=PRESSES, help="comma-separated (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the cache that is removed (default: 0.5)")
    parser.add_argument("--batch-sizes", type=counts, default=[1, 4], help="comma-separated (default: 1,4)")
    parser.add_argument("--prompt-tokens", type=counts, default=[1800], help="comma-separated (default: 1800)")
    parser.add_argument("--new-tokens", type=counts, default=[30], help="comma-separated (default: 30)")
    parser.add_argument("--repeats", type=count, default=5, help="default: 5")
    parser.add_argument("--tasks", default="kvpress_story", help="for the perplexity columns; '' for none")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the two files")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    lm = load(arguments)
    presses = arguments.presses.split(",")
    tasks = [] if arguments.shape else [task for task in arguments.tasks.split(",") if task]
    grid = itertools.product(presses, arguments.batch_sizes, arguments.prompt_tokens, arguments.new_tokens)
    cases = [Case(*values) for values in grid]
    bench = Bench(lm, presses, arguments.ratio)
    runs = measured(bench, lm, cases, arguments.repeats, random=arguments.shape is not None)
    scores = {press: perplexities(lm, press, arguments.ratio, tasks) if tasks else {} for press in presses}
    return {
        "benchmark": "presses",
        "machine": machine(),
        "commit": commit(),
        "model": arguments.shape or arguments.pretrained,
        "random_weights": arguments.shape is not None,
        "device": lm.device.type,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "compression_ratio": arguments.ratio,
        "repeats": arguments.repeats,
        "tasks": tasks,
        "rows": [
            {**asdict(case), **summary(of_case), "token_perplexity": scores[case.press], "notes": bench.notes(case)}
            for case, of_case in runs.items()
        ],
    }


def load(arguments: argparse.Namespace) -> KVPress:
    if arguments.shape is None:
        return KVPress(pretrained=arguments.pretrained, dtype=arguments.dtype)
    return KVPress(pretrained=present(random_model(arguments.shape, arguments.dtype)).model, tokenizer=str(BUILTIN))


def measured(
    bench: Bench, lm: KVPress, cases: Sequence[Case], repeats: int, *, random: bool = False
) -> dict[Case, list[Measurement]]:
    """Every case's repeats."""
    for case in cases:
        bench.check(case)
    prompts = {case: (random_prompts if random else story_prompts)(lm, case) for case in cases}
    found = rounds(cases, lambda case: bench.measure(case, prompts[case]), repeats)
    return {case: [one[case] for one in found] for case in cases}


def summary(runs: Sequence[Measurement]) -> dict[str, Any]:
    """One `Estimate` per figure, as a dict; None where the machine or the case has no such figure."""
    columns: dict[str, Any] = {}
    for name in Measurement.__dataclass_fields__:
        values = [getattr(run, name) for run in runs]
        columns[name] = None if None in values else asdict(estimate(values))
    return columns


def perplexities(lm: KVPress, press: str, ratio: float, tasks: Sequence[str]) -> dict[str, float]:
    """Token perplexity, per task, of what is scored over the compressed cache: the same tokens for every press."""
    arguments = {} if press == "none" else {"compression_ratio": ratio}
    under_press = KVPress(pretrained=lm.model, tokenizer=lm.tokenizer, press=press, batch_size=8, **arguments)
    manager = TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False)
    lm_eval.simple_evaluate(model=under_press, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    facts = under_press.describe()["tasks"]
    return {task: facts[task]["token_perplexity_under_press"] for task in tasks}


def markdown(report: Mapping[str, Any]) -> str:
    tasks = report["tasks"]
    speeds = ["prefill tok/s", "press ms", "TTFT ms", "TPOT ms", "decode tok/s"]
    perplexity = [f"{task} ppl" for task in tasks]
    headings = ["press", "batch", "prompt", "new", "kept", *speeds, "KV MiB", "peak MiB", *perplexity]
    return markdown_table(headings, [cells(row, tasks) for row in report["rows"]]) + f"\n\n{legend(report)}\n"


def cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """One line of the table: medians, and half the interval's width where it is not fixed by the setting."""

    def shown(name: str, scale: float = 1, digits: int = 0) -> str:
        if row[name] is None:
            return "-"
        median, half = row[name]["median"] * scale, (row[name]["high"] - row[name]["low"]) / 2 * scale
        return f"{median:,.{digits}f} ±{half:,.{digits}f}"

    def mib(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]['median'] / 2**20:,.1f}"

    return [
        row["press"],
        *(str(row[name]) for name in ("batch_size", "num_prompt_tokens", "num_new_tokens")),
        f"{100 * row['kept_share']['median']:.1f} %",
        shown("prefill_tokens_per_sec"),
        shown("press_sec", 1000),
        shown("ttft_sec", 1000),
        shown("tpot_sec", 1000, 1),
        shown("decode_tokens_per_sec"),
        mib("kv_bytes_allocated"),
        mib("peak_memory_bytes"),
        *(f"{row['token_perplexity'][task]:.2f}" for task in tasks),
    ]


def legend(report: Mapping[str, Any]) -> str:
    shared = (
        f"{report['model']} in {report['dtype']} on {report['device']} with {report['machine']['num_threads']} "
        f"threads; compression_ratio {report['compression_ratio']} (removed); medians of {report['repeats']} repeats "
        "in shuffled order, ± half of the 95 % bootstrap interval. Prefill tok/s count the time in the press, which "
        "stands apart as press ms; TTFT includes both; KV is that of the whole batch after the press."
    )
    on_cpu = ["Peak memory is measured on CUDA devices only."] if report["device"] == "cpu" else []
    notes = dict.fromkeys(f"{row['press']}: {note}." for row in report["rows"] for note in row["notes"])
    return " ".join([shared, *on_cpu, *notes])


if __name__ == "__main__":
    sys.exit(main())
