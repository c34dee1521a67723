"""How fast one commit answers lm-eval's requests, next to another: two checkouts in turns, on the same weights.

    git worktree add /tmp/before COMMIT
    python -m scripts.benchmarks.compare_commits --before /tmp/before --after .

Each side is a process with its checkout first on the path; both run with this Python and its libraries, so that nothing
but the package differs. They answer in turns (A B, B A, A B, ...), after a warm-up that is not counted. Two processes
of the same code differ by some per cent for as long as they live, so new ones are started --processes times; a figure
is the median over them of each pair of processes' median ratio, with the 95 % bootstrap interval over them.

The last line of stdout is one JSON document; it and a Markdown table are written to --output as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks import compare_worker
from scripts.benchmarks.measuring import Estimate, count, estimate, write
from scripts.benchmarks.models import BUILTIN, DTYPES, PYTHIA_SHAPES, builtin_tokenizer, random_model
from scripts.benchmarks.pairs import agreement
from scripts.benchmarks.sides import RATIO
from scripts.benchmarks.texts import Text
from scripts.benchmarks.workloads import WORKLOADS, Workload
from scripts.machine import commit, described, machine

KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""As the Makefile sets it, unless the environment does: glibc keeps freed memory. Versions that set this themselves and
those that leave it to the environment then compare."""


@dataclass(frozen=True)
class Row:
    """A workload under a press, at the batch size that suits it."""

    workload: str
    press: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.workload}/{self.press}"

    @property
    def model_args(self) -> dict[str, Any]:
        ratio = {} if self.press == "none" else {"compression_ratio": RATIO}
        rolling = {"rolling": "one_pass"} if self.workload.endswith("rolling") else {}
        return {"press": self.press, "batch_size": self.batch_size, **ratio, **rolling}


ROWS = (
    Row("choice-800", "none", 16),
    Row("choice-800", "snapkv", 16),
    Row("rolling", "none", 1),
    Row("generate-64x16", "snapkv", 16),
    Row("tiny-choice", "snapkv", 2),
    Row("tiny-rolling", "none", 1),
    Row("tiny-generate", "snapkv", 2),
)
"""``tiny-*`` only show that it runs."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    sides = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    rows = [row for row in ROWS if any(fnmatch(row.name, pattern) for pattern in arguments.rows.split(","))]
    try:
        if not rows:
            raise ValueError(f"no row matches {arguments.rows}; there are {', '.join(row.name for row in ROWS)}")
        for side, checkout in sides.items():
            if not (checkout / "lm_eval_kvpress").is_dir():
                raise ValueError(f"--{side} {checkout} is no checkout: it has no lm_eval_kvpress")
        found = [one for name in arguments.models.split(",") for one in compared(name, sides, rows, arguments)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    commits = {side: commit(checkout) for side, checkout in sides.items()}
    report = {"benchmark": "commits", "machine": machine(), "dtype": arguments.dtype, **commits, "rows": found}
    write(report, markdown(report), arguments.output, "commits")
    print(markdown(report))
    print(json.dumps(report))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="PATH", help="a checkout")
    parser.add_argument("--after", type=Path, required=True, metavar="PATH", help="another one")
    models = f"of builtin, {', '.join(PYTHIA_SHAPES)} (default: %(default)s)"
    parser.add_argument("--models", default="builtin,pythia-70m", help=models)
    default = "choice-*,rolling/*,generate-*"
    parser.add_argument("--rows", default=default, help=f"patterns of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--processes", type=count, default=4, help="pairs of processes (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=3, help="pairs of answers in each (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the two files")
    return parser


# -------------------------------------------------------------------------------------------------------- measuring


def compared(
    model: str, sides: Mapping[str, Path], rows: Sequence[Row], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure all rows of one model."""
    text = Text(builtin_tokenizer())
    workloads = {row: WORKLOADS[row.workload](text) for row in rows}
    found: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    with checkpoint(model, arguments.dtype) as pretrained:
        for number in range(arguments.processes):
            with ExitStack() as running:
                workers = {
                    side: running.enter_context(worker(folder, arguments.threads)) for side, folder in sides.items()
                }
                for one in workers.values():
                    one.load(pretrained, arguments.dtype)
                for row, workload in workloads.items():
                    found[row].append(in_turns(workers, row, workload, arguments.repeats))
                    print(f"{model} {row.name}, processes {number + 1}: {found[row][-1]}", file=sys.stderr, flush=True)
    return [{"model": model, "workload": row.workload, "press": row.press, **summary(found[row])} for row in rows]


@contextmanager
def checkpoint(model: str, dtype: str) -> Iterator[str]:
    """What both sides load: the built-in, or random weights in a folder."""
    if model == "builtin":
        yield str(BUILTIN)
        return
    with tempfile.TemporaryDirectory() as folder:
        random_model(model, dtype).save_pretrained(folder)
        builtin_tokenizer().save_pretrained(folder)
        yield folder


class Worker:
    """The process of one side."""

    def __init__(self, process: subprocess.Popen[str], checkout: Path) -> None:
        self._process, self._checkout = process, checkout

    def load(self, pretrained: str, dtype: str) -> None:
        package = self.ask({"load": {"pretrained": pretrained, "dtype": dtype}})["package"]
        if Path(package).resolve().parent != self._checkout:
            raise ValueError(f"{package} was imported, which is not of {self._checkout}")

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one command.

        Raises:
            ValueError: if the process ended; what it said stands on stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self._checkout} ended; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def worker(checkout: Path, threads: int) -> Iterator[Worker]:
    """Start a process with a checkout's package, and end it on exit."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**KEPT_MEMORY, **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", Path(compare_worker.__file__).read_text(encoding="utf-8")],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Worker(process, checkout)
    finally:
        process.kill()
        process.communicate()


def in_turns(workers: Mapping[str, Worker], row: Row, workload: Workload, repeats: int) -> dict[str, Any]:
    """Time both sides in pairs; seconds by pair, and how far their answers agree."""
    requests = [instance.args for instance in workload.instances]
    command = {"set": row.model_args, "request_type": workload.request_type, "requests": requests}
    answers = {}
    for side, one in workers.items():
        one.ask(command)
        answers[side] = one.ask({"run": True})["answers"]  # the warm-up
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    for pair in range(repeats):
        for side in list(workers) if pair % 2 else reversed(list(workers)):
            seconds[side].append(workers[side].ask({"run": True})["seconds"])
    return {**seconds, **agreement(answers["after"], answers["before"])}


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the processes of each pair of processes' medians."""
    medians = [
        statistics.median(before / after for before, after in zip(one["before"], one["after"], strict=True))
        for one in found
    ]
    return {
        **{side: asdict(estimate([statistics.median(one[side]) for one in found])) for side in ("before", "after")},
        "times_as_fast": asdict(estimate(medians)),
        "num_processes": len(found),
        "num_pairs": sum(len(one["after"]) for one in found),
        **{key: value for key, value in found[0].items() if key not in ("before", "after")},
    }


# ---------------------------------------------------------------------------------------------------------- showing


def markdown(report: Mapping[str, Any]) -> str:
    """The heading and one row per model, workload and press."""
    headings = ["model", "workload", "press", "before, s", "after, s", "times as fast", "answers"]
    heading = f"{report['before']} to {report['after']}: {described(report['machine'])}; {report['dtype']}."
    return f"{heading}\n\n{markdown_table(headings, [_cells(row) for row in report['rows']])}\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "share_of_equal_texts" in row:
        answers = f"{row['share_of_equal_texts']:.0%} of texts equal"
    else:
        answers = f"differ by {row['largest_difference']:.1g} nats"
    return [
        *(row[key] for key in ("model", "workload", "press")),
        *(f"{row[side]['median']:.3f}" for side in ("before", "after")),
        str(Estimate(**row["times_as_fast"])),
        answers,
    ]


if __name__ == "__main__":
    sys.exit(main())
