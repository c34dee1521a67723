"""How fast this model answers lm-eval's requests, next to stock HFLM, kvpress's pipeline and plain generate.

Both sides of a row have the same weights, the same requests as text, and each the batch size that suits it best among
--batch-sizes. They are timed in turns (A B, B A, A B, ...), so that a machine that slows down slows both down; a row is
the median of the ratios of the pairs, with the 95 % bootstrap interval. Where both sides compute the same numbers they
are compared, and a difference ends the run. Against "products" stands our own side's arithmetic alone, so "times as
fast" is the share of our time that these products and attentions take when called one after the other.

    python -m scripts.benchmarks.evaluation                        two CPU cores: about 25 minutes
    python -m scripts.benchmarks.evaluation --models pythia-70m --rows 'choice-800*' --repeats 9
    python -m scripts.benchmarks.evaluation --models pythia-2.8b --dtype bfloat16     on a GPU

On a CPU set MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=33554432, as the Makefile does: both sides of a
row are then spared the zeroing of pages that they have just freed.

The last line of stdout is one JSON document: that of --output (`document`), where a Markdown table is written as well,
both after each row. Rows of an earlier run that were not measured again stay in both.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks import document
from scripts.benchmarks.comparisons import COMPARISONS, Comparison, chosen
from scripts.benchmarks.measuring import Estimate, count, counts
from scripts.benchmarks.models import DTYPES, PYTHIA_SHAPES
from scripts.benchmarks.pairs import measure_pairs
from scripts.benchmarks.peak_memory import peak_extra_bytes
from scripts.benchmarks.sides import RATIO, Models
from scripts.benchmarks.texts import Text
from scripts.benchmarks.workloads import WORKLOADS
from scripts.machine import ROOT

MODELS = ("builtin", *PYTHIA_SHAPES)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.disable(logging.WARNING)  # that a model was passed in, that generation settings are not used
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the lm_eval command sets it
    try:
        comparisons = chosen(arguments.rows.split(","), quick=arguments.quick)
        if arguments.peak:
            print_peak(comparisons[0], arguments)
            return 0
        found = run(comparisons, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    print(json.dumps(found))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = f"of {', '.join(MODELS)} (default: %(default)s)"
    parser.add_argument("--models", type=models_named, default="builtin,pythia-70m,pythia-160m", help=models)
    parser.add_argument("--rows", default="*", help="comma-separated patterns of names WORKLOAD/PRESS/AGAINST")
    parser.add_argument("--repeats", type=count, default=5, help="pairs per row (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=counts, default=[1, 4, 16], help="to choose from (default: 1,4,16)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny workloads: shows that it runs, measures nothing")
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the two files")
    return parser


def models_named(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(MODELS):
        raise argparse.ArgumentTypeError(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    return names


# -------------------------------------------------------------------------------------------------------- measuring


def run(comparisons: Sequence[Comparison], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows of all models. The document is on disk after each: a stopped run loses the row it was at."""
    found = document.read(arguments.output, arguments.dtype)
    for name in arguments.models:
        models = Models.load(name, arguments.dtype)
        text = Text(models.tokenizer)
        for comparison in comparisons:
            row = measured(comparison, name, models, text, arguments)
            print(" | ".join([*cells(row), comparison.name]), flush=True)
            earlier = found.get("evaluation", {}).get("rows", [])
            found["evaluation"] = {"compression_ratio": RATIO, "rows": merged(earlier, row)}
            document.write(found, arguments.output)
            (arguments.output / "evaluation.md").write_text(markdown(found), encoding="utf-8")
    return found


def measured(
    comparison: Comparison, model: str, models: Models, text: Text, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure one row.

    Raises:
        ValueError: if two sides that compute the same numbers differ.
    """
    workload = WORKLOADS[comparison.workload](text)
    result = measure_pairs(
        lambda size: comparison.ours(models, size),
        lambda size: comparison.theirs(models, size),
        workload,
        sizes=arguments.batch_sizes,
        their_sizes=arguments.batch_sizes if comparison.against in ("stock", "products") else [1],
        num_pairs=arguments.repeats,
    )
    if comparison.agrees and arguments.dtype == "float32" and result["scaled_difference"] > 1e-3:
        raise ValueError(f"{model} {comparison.name}: the two sides differ by {result['largest_difference']:.2g} nats")
    if comparison.memory:
        result |= peaks(comparison, model, arguments)
    return {
        "model": model,
        "row": comparison.name,
        "workload": comparison.task,
        "press": comparison.press,
        "against": comparison.against,
        "num_requests": len(workload.instances),
        "num_prompts": workload.num_prompts,
        "repeats": arguments.repeats,
        "target": comparison.target.get(model),
        **result,
        **document.stamp(),
    }


def peaks(comparison: Comparison, model: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Peak bytes above the loaded model with one context or request at a time, each side in a process of its own."""
    settings = ["--models", model, "--rows", comparison.name, "--dtype", arguments.dtype]
    settings += ["--threads", str(arguments.threads), "--batch-sizes", "1", *(["--quick"] if arguments.quick else [])]
    found = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "scripts.benchmarks.evaluation", "--peak", side, *settings]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found[side] = int(done.stdout.splitlines()[-1])
    return {"peak_extra_bytes": found["ours"], "their_peak_extra_bytes": found["theirs"]}


def print_peak(comparison: Comparison, arguments: argparse.Namespace) -> None:
    """Print the peak of one side, in a process of its own."""
    models = Models.load(arguments.models[0], arguments.dtype)
    make = comparison.ours if arguments.peak == "ours" else comparison.theirs
    side, workload = make(models, arguments.batch_sizes[0]), WORKLOADS[comparison.workload](Text(models.tokenizer))
    print(peak_extra_bytes(lambda: side(workload)))


# ---------------------------------------------------------------------------------------------------------- figures


def merged(earlier: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The earlier rows with one more, or one replaced, in the order of `COMPARISONS`."""
    by_key = {(one["model"], one["row"]): one for one in [*earlier, row]}
    order = [comparison.name for comparison in COMPARISONS]
    return sorted(by_key.values(), key=lambda one: (MODELS.index(one["model"]), order.index(one["row"])))


def markdown(found: Mapping[str, Any]) -> str:
    headings = ("model", "workload", "press", "against", "batch", "s", "their s", "times as fast", "target", "memory")
    return markdown_table(headings, [cells(row) for row in found["evaluation"]["rows"]]) + "\n"


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    ratio, target = Estimate(**row["times_as_fast"]), row["target"]
    memory = "-"
    if "peak_extra_bytes" in row:
        mine, theirs = (row[key] / 2**20 for key in ("peak_extra_bytes", "their_peak_extra_bytes"))
        memory = f"{mine:,.0f} / {theirs:,.0f} MiB"
    return [
        *(row[key] for key in ("model", "workload", "press", "against")),
        f"{row['batch_size']} / {row['their_batch_size']}",
        *(f"{row[key]['median']:.2f}" for key in ("seconds", "their_seconds")),
        str(ratio),
        "-" if target is None else f"{target:.2f} {'met' if ratio.median >= target else 'MISSED'}",
        memory,
    ]


if __name__ == "__main__":
    sys.exit(main())
