"""How fast this model answers lm-eval's requests, next to stock HFLM, kvpress's pipeline and plain generate.

Both sides of a row have the same weights, the same requests as text, and each the batch size that suits it best among
--batch-sizes. They are timed in turns (A B, B A, A B, ...), so that a machine that slows down slows both down; a row is
the median of the ratios of the pairs, with the 95 % bootstrap interval. Where both sides compute the same numbers they
are compared, and a difference ends the run. Against "products" stands our own side's arithmetic alone, so "times as
fast" is the share of our time that these products and attentions take when called one after the other.

    python -m scripts.benchmarks.evaluation                                           two CPU cores: about 25 minutes
    python -m scripts.benchmarks.evaluation --models pythia-70m --rows 'choice-800*' --repeats 9
    python -m scripts.benchmarks.evaluation --models pythia-2.8b --dtype bfloat16     on a GPU

The last line of stdout is one JSON document. It is written to --output together with a Markdown table, after each row;
rows of an earlier run that were not measured again stay in both.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from scripts.benchmarks.peak_memory import peak_extra_bytes
from scripts.benchmarks.presses import SHAPES, count, counts, estimate
from scripts.benchmarks.sides import RATIO, Answers, Models, Side, ours, pipeline, plain_generate, products, stock
from scripts.benchmarks.workloads import WORKLOADS, Text, Workload

MODELS = "builtin,pythia-70m,pythia-160m"


@dataclass(frozen=True)
class Row:
    """What is measured against what.

    Attributes:
        press: of our side and of kvpress's loops; stock has none.
        rolling: our protocol of rolling perplexity; stock's is one_pass.
        against: ``stock``, ``pipeline``, ``pipeline-shared``, ``generate``, or ``products``, our arithmetic alone.
        agrees: whether both sides must give the same numbers.
        target: model to the least ratio that this project set itself.
        memory: whether the peak memory of both sides is measured.
    """

    workload: str
    press: str
    against: str
    rolling: str = "one_pass"
    agrees: bool = False
    target: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False

    @property
    def name(self) -> str:
        protocol = f"-{self.rolling}" if self.workload.endswith("rolling") else ""
        return f"{self.workload}{protocol}/{self.press}/{self.against}"

    def ours(self, models: Models, batch_size: int) -> Side:
        return ours(models, self.press, batch_size, self.rolling)

    def theirs(self, models: Models, batch_size: int) -> Side:
        if self.against == "stock":
            return stock(models, batch_size)
        if self.against == "products":
            return products(models, self.press, batch_size, self.rolling)
        if self.against == "generate":
            return plain_generate(models, self.press)
        return pipeline(models, self.press, shares_contexts=self.against == "pipeline-shared")


ROWS = (
    Row("choice-200", "none", "stock", agrees=True),
    Row("choice-800", "none", "stock", agrees=True, target={"pythia-70m": 9, "builtin": 4}, memory=True),
    Row("choice-1600", "none", "stock", agrees=True),
    *(Row(workload, "none", "products", agrees=True) for workload in ("choice-800", "rolling")),
    Row("choice-200", "snapkv", "stock"),
    Row("choice-800", "snapkv", "stock", target={"pythia-70m": 7.5, "builtin": 3.2}),
    Row("choice-1600", "snapkv", "stock"),
    Row("qa-short", "snapkv", "stock", agrees=True, target={"pythia-70m": 3}),
    Row("rolling", "none", "stock", agrees=True, target={"pythia-70m": 1.3}, memory=True),
    Row("rolling", "snapkv", "stock", rolling="prefix", target={"pythia-70m": 1 / 1.7, "builtin": 1 / 2.1}),
    Row("choice-800", "snapkv", "pipeline", agrees=True, target=dict.fromkeys(("builtin", "pythia-70m"), 8)),
    Row("choice-800", "snapkv", "pipeline-shared", agrees=True),
    *(Row(f"generate-64x{size}", "snapkv", "pipeline") for size in (1, 4, 8, 16)),
    Row("generate-128x16", "snapkv", "pipeline", target=dict.fromkeys(("builtin", "pythia-70m"), 4)),
    *(Row(f"generate-64x{size}", "snapkv", "generate") for size in (1, 16)),
    Row("tiny-choice", "none", "stock", agrees=True),
    Row("tiny-choice", "none", "products", agrees=True),
    Row("tiny-choice", "none", "pipeline", agrees=True),
    Row("tiny-choice", "none", "pipeline-shared", agrees=True),
    Row("tiny-rolling", "none", "stock", agrees=True, memory=True),
    Row("tiny-rolling", "snapkv", "stock", rolling="prefix"),
    Row("tiny-generate", "snapkv", "pipeline"),
    Row("tiny-generate", "snapkv", "generate"),
)


def seconds(side: Side, workload: Workload) -> tuple[float, Answers]:
    synchronize()
    start = time.perf_counter()
    answers = side(workload)
    synchronize()
    return time.perf_counter() - start, answers


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tried(make: Callable[[int], Side], workload: Workload, sizes: Sequence[int]) -> dict[int, tuple[float, Side]]:
    """Batch size to seconds and side, each the faster of two runs after a warm-up."""
    sides = {size: make(size) for size in sizes}
    sides[sizes[0]](workload)
    num_runs = 2 if len(sizes) > 1 else 0
    times = {size: [seconds(side, workload)[0] for _ in range(num_runs)] for size, side in sides.items()}
    return {size: (min(times[size], default=0.0), side) for size, side in sides.items()}


def measure(row: Row, models: Models, workload: Workload, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Both sides in turns."""
    our_times = tried(lambda size: row.ours(models, size), workload, sizes)
    their_sizes = sizes if row.against in ("stock", "products") else [1]
    their_times = tried(lambda size: row.theirs(models, size), workload, their_sizes)
    our_size, their_size = (min(tries, key=lambda size: tries[size][0]) for tries in (our_times, their_times))
    our_side, their_side = our_times[our_size][1], their_times[their_size][1]
    times: dict[Side, list[float]] = {our_side: [], their_side: []}
    answers: dict[Side, Answers] = {}
    for repeat in range(repeats):
        for side in (our_side, their_side) if repeat % 2 else (their_side, our_side):
            taken, answers[side] = seconds(side, workload)
            times[side].append(taken)
    ratios = [theirs / mine for mine, theirs in zip(times[our_side], times[their_side], strict=True)]
    return {
        "batch_size": our_size,
        "their_batch_size": their_size,
        "seconds_by_batch_size": {size: once[0] for size, once in our_times.items()},
        "their_seconds_by_batch_size": {size: once[0] for size, once in their_times.items()},
        "seconds": asdict(estimate(times[our_side])),
        "their_seconds": asdict(estimate(times[their_side])),
        "times_as_fast": asdict(estimate(ratios)),
        **agreement(answers[our_side], answers[their_side]),
    }


def agreement(mine: Answers, theirs: Answers) -> dict[str, float]:
    """Texts: the share that are equal. Numbers: the largest difference; that of long sums relative to 1e-6 of them."""
    if isinstance(mine[0], str):
        return {"share_of_equal_texts": sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)}
    pairs = [(a[0], b[0]) if isinstance(a, tuple) else (float(a), float(b)) for a, b in zip(mine, theirs, strict=True)]
    excess = max(abs(a - b) / max(1.0, 1e-3 * abs(b)) for a, b in pairs)
    return {"largest_difference": max(abs(a - b) for a, b in pairs), "scaled_difference": excess}


def measured(row: Row, model: str, models: Models, text: Text, arguments: argparse.Namespace) -> dict[str, Any]:
    workload = WORKLOADS[row.workload](text)
    result = measure(row, models, workload, arguments.batch_sizes, arguments.repeats)
    if row.agrees and arguments.dtype == "float32" and result["scaled_difference"] > 1e-3:
        raise ValueError(f"{model} {row.name}: the two sides differ by {result['largest_difference']:.2g} nats")
    if row.memory:
        result |= memory(row, model, arguments)
    return {
        "model": model,
        "row": row.name,
        "press": row.press,
        "against": row.against,
        "num_requests": len(workload.instances),
        "num_prompts": workload.num_prompts,
        "repeats": arguments.repeats,
        "target": row.target.get(model),
        **result,
    }


def memory(row: Row, model: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Peak bytes above the loaded model with one context or request at a time, each side in a process of its own."""
    settings = ["--models", model, "--rows", row.name, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    quick = ["--quick"] if arguments.quick else []
    peaks = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", __spec__.name, "--peak", side, "--batch-sizes", "1", *settings, *quick]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[side] = int(done.stdout.splitlines()[-1])
    return {"peak_extra_bytes": peaks["ours"], "their_peak_extra_bytes": peaks["theirs"]}


def print_peak(row: Row, side: str, models: Models, text: Text, batch_size: int) -> None:
    make = row.ours if side == "ours" else row.theirs
    run, workload = make(models, batch_size), WORKLOADS[row.workload](text)
    print(peak_extra_bytes(lambda: run(workload)))


def machine(threads: int) -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "num_threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "kvpress", "lm_eval")},
        },
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def check_same_setting(arguments: argparse.Namespace) -> None:
    """Refuses to put rows beside those of another machine, dtype or version."""
    path = arguments.output / "evaluation.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    now = {**machine(arguments.threads), "dtype": arguments.dtype}
    other = [name for name, value in now.items() if before is not None and before[name] != value]
    if other:
        raise ValueError(f"{path} holds rows measured with another {', '.join(other)}: choose another --output")


def merged(rows: Sequence[dict[str, Any]], earlier: Path) -> list[dict[str, Any]]:
    """The rows, and those of an earlier run that were not measured again, in the order of `ROWS`."""
    before = json.loads(earlier.read_text(encoding="utf-8"))["rows"] if earlier.exists() else []
    by_key = {(row["model"], row["row"]): row for row in [*before, *rows]}
    models, order = ["builtin", *SHAPES], [row.name for row in ROWS]
    return sorted(by_key.values(), key=lambda row: (models.index(row["model"]), order.index(row["row"])))


def markdown(report: Mapping[str, Any]) -> str:
    headings = ("model", "workload", "press", "against", "batch", "s", "their s", "times as fast", "target", "memory")
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in report["rows"]), ""])


def cells(row: Mapping[str, Any]) -> list[str]:
    ratio, target = row["times_as_fast"], row["target"]
    memory = "-"
    if "peak_extra_bytes" in row:
        mine, theirs = (row[key] / 2**20 for key in ("peak_extra_bytes", "their_peak_extra_bytes"))
        memory = f"{mine:,.0f} / {theirs:,.0f} MiB"
    return [
        row["model"],
        row["row"].split("/")[0],
        row["press"],
        row["against"],
        f"{row['batch_size']} / {row['their_batch_size']}",
        *(f"{row[key]['median']:.2f}" for key in ("seconds", "their_seconds")),
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        "-" if target is None else f"{target:.2f} {'met' if ratio['median'] >= target else 'MISSED'}",
        memory,
    ]


def chosen_rows(patterns: Sequence[str], *, quick: bool) -> list[Row]:
    rows = [row for row in ROWS if row.workload.startswith("tiny-") == quick]
    chosen = [row for row in rows if any(fnmatch(row.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"no row matches {','.join(patterns)}; there are {', '.join(row.name for row in rows)}")
    return chosen


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    torch.set_num_threads(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the lm_eval command sets it
    names = arguments.models.split(",")
    if unknown := set(names) - {"builtin", *SHAPES}:
        raise ValueError(f"no model {', '.join(sorted(unknown))}; there are builtin, {', '.join(SHAPES)}")
    rows = chosen_rows(arguments.rows.split(","), quick=arguments.quick)
    if not arguments.peak:
        check_same_setting(arguments)
    results: list[dict[str, Any]] = []
    report = None
    for name in names:
        models = Models.load(name, arguments.dtype)
        text = Text(models.tokenizer)
        for row in rows:
            if arguments.peak:
                print_peak(row, arguments.peak, models, text, arguments.batch_sizes[0])
                return None
            results.append(measured(row, name, models, text, arguments))
            print(" | ".join([*cells(results[-1]), row.name]), flush=True)
            report = written(results, arguments)
    return report


def written(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The report so far, which is on disk: a run that is stopped loses the row that it was at."""
    report = {
        "benchmark": "evaluation_speed",
        **machine(arguments.threads),
        "dtype": arguments.dtype,
        "compression_ratio": RATIO,
        "rows": merged(results, arguments.output / "evaluation.json"),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "evaluation.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (arguments.output / "evaluation.md").write_text(markdown(report), encoding="utf-8")
    return report


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help=f"of builtin and {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--rows", default="*", help="comma-separated patterns of names WORKLOAD/PRESS/AGAINST")
    parser.add_argument("--repeats", type=count, default=5, help="pairs per row (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=counts, default=[1, 4, 16], help="to choose from (default: 1,4,16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny workloads: shows that it runs, measures nothing")
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the two files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.disable(logging.WARNING)  # that a model was passed in, that generation settings are not used
    transformers_logging.disable_progress_bar()
    try:
        report = run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    if report is None:
        return 0
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
