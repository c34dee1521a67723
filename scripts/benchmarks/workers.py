"""What several workers gain and cost: one sweep by one process, and by two and four workers, of one thread each.

Each side is a whole command, and every side must give the same metrics, samples and counts. The speed-up is that of the
sweep's own seconds, loading the model and starting workers included. What the driver and the launcher cost is the time
in which workers did no job, `seconds * workers - seconds_busy`, as a share of `seconds_busy`. More workers than cores
share them, and their busy seconds are then seconds of waiting too.

    python -m scripts.benchmarks.workers              24 cells: 20 minutes of a quiet machine of two cores
    python -m scripts.benchmarks.workers --limit 2

A side that is done stays in `sides.jsonl` below --output; the same command goes on from there. The last line of stdout
is one JSON document; it is written to --output as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.measuring import write
from scripts.benchmarks.sweep import cells_parser
from scripts.machine import commit, machine
from scripts.studies.spread_sweeps import content

ALONE = "one process"
SIDES: Mapping[str, tuple[int, Sequence[str]]] = {
    ALONE: (1, ()),
    "two processes": (2, ("--workers=2",)),
    "two actors of Ray": (2, ("--workers=2", "--launcher=ray", "--gpus_per_worker=0")),
    "four processes": (4, ("--workers=4",)),
}
"""Side to its number of threads in all, and its arguments."""


def main() -> None:
    args = cells_parser(__doc__, "runs/benchmarks/workers").parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    done = args.output / "sides.jsonl"
    runs = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    for side in SIDES:
        if any(run["side"] == side for run in runs):
            continue
        runs.append(_run(args, side))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        with done.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(runs[-1]) + "\n")
    report = {"sides": figures(runs), "settings": vars(args), "machine": machine(), "commit": commit()}
    report = json.loads(json.dumps(report, default=str))
    write(report, markdown(report["sides"]), args.output, "workers")
    print(json.dumps(report))


def _run(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """Run one side in a new folder."""
    num_threads, more = SIDES[side]
    folder, alone = args.output / side.replace(" ", "_"), args.output / ALONE.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    names = ("model_args", "presses", "ratios", "tasks", "batch_size")
    given = [f"--{name}={getattr(args, name)}" for name in names] + ([f"--limit={args.limit}"] if args.limit else [])
    command = [sys.executable, "-m", "lm_eval_kvpress", "sweep", *given, f"--output_path={folder}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if ended.returncode:
        sys.exit(ended.stderr.decode(errors="replace")[-3000:])
    summary = json.loads((folder / "summary.json").read_text())
    own, expected = content(folder), content(alone)
    return {
        "side": side,
        **{name: summary[name] for name in ("num_cells", "num_workers", "seconds", "seconds_busy")},
        "num_values": len(own),
        "num_differences": sum(own.get(path) != expected.get(path) for path in own.keys() | expected.keys()),
    }


def figures(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each side with its speed-up, and the share of what driver and launcher cost."""
    (alone,) = [run for run in runs if run["side"] == ALONE]
    return [{**run, "speedup": alone["seconds"] / run["seconds"], "overhead": overhead(run)} for run in runs]


def overhead(run: Mapping[str, Any]) -> float:
    """Time in which workers did no job, as a share of that in which they did."""
    return float(run["seconds"] * run["num_workers"] / run["seconds_busy"] - 1)


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """A row per side."""
    rows = [
        [
            *(one["side"], f"{one['seconds']:.0f}", f"{one['seconds_busy']:.0f}"),
            *(f"{one['speedup']:.2f}", f"{100 * one['overhead']:.1f} %"),
            f"{one['num_differences']} of {one['num_values']:,}",
        ]
        for one in found
    ]
    columns = ["side", "seconds", "of jobs, all workers", "times as fast", "driver and launcher", "values that differ"]
    return markdown_table(columns, rows)


if __name__ == "__main__":
    main()
