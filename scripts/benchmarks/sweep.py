"""A sweep against the runs of its cells one by one: the same figures, and in which share of the time.

Both sides are whole processes of the command line, imports and model loading included. A part of the single runs
stands before the sweep and a part behind it, so that a machine that slows down slows both sides down.

    python -m scripts.benchmarks.sweep        six presses x four ratios on kvpress_demo: a quarter of an hour
    python -m scripts.benchmarks.sweep --ratios 0.5 --presses knorm --tasks kvpress_story

The last line of stdout is one JSON document; it is written to --output as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_kvpress.sweep.cells import Cell, cells_of
from lm_eval_kvpress.sweep.command import settings_from
from lm_eval_kvpress.sweep.settings import SweepSettings
from scripts.machine import commit, machine

PRESSES = "snapkv,streaming_llm,pyramidkv,tova,knorm,random"


def main() -> None:
    args = cells_parser(__doc__, "runs/benchmarks/sweep").parse_args()
    output = args.output
    shutil.rmtree(output, ignore_errors=True)
    given = [f"--{name}={getattr(args, name)}" for name in ("model_args", "presses", "ratios", "tasks", "batch_size")]
    if args.limit:
        given.append(f"--limit={args.limit}")
    settings = settings_from([*given, f"--output_path={output / 'sweep'}"])
    cells = cells_of(settings)
    half = len(cells) // 2
    seconds_alone = [_run_alone(settings, cell, output) for cell in cells[:half]]
    seconds_sweep = timed(["lm-eval-kvpress", "sweep", *given, f"--output_path={output / 'sweep'}"])
    seconds_alone += [_run_alone(settings, cell, output) for cell in cells[half:]]
    worst = max(
        largest_difference(results(output / "sweep/cells" / cell.name), results(output / cell.name)) for cell in cells
    )
    summary = json.loads((output / "sweep/summary.json").read_text())
    prefilled_alone = sum(_num_prefilled(results(output / cell.name)) for cell in cells)
    record = {
        "num_cells": len(cells),
        "seconds_sweep": seconds_sweep,
        "seconds_alone": sum(seconds_alone),
        "ratio": seconds_sweep / sum(seconds_alone),
        "worst_relative_difference": worst,
        "num_tokens_prefilled_sweep": summary["num_tokens_prefilled"],
        "num_tokens_prefilled_alone": prefilled_alone,
        "settings": settings.as_typed(),
        "machine": machine(),
        "commit": commit(),
    }
    (output / "sweep.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(record))


def _run_alone(settings: SweepSettings, cell: Cell, output: Path) -> float:
    arguments = ",".join(f"{name}={value}" for name, value in {**settings.model_args, **cell.arguments}.items())
    command = ["lm_eval", "--model", settings.model, "--model_args", arguments, "--tasks", ",".join(settings.tasks)]
    command += ["--batch_size", str(settings.batch_size), "--log_samples", "--output_path", str(output / cell.name)]
    if settings.limit:
        command += ["--limit", f"{settings.limit:g}"]
    return timed(command)


def timed(command: Sequence[str]) -> float:
    """Seconds of a command of this environment; its output is shown if it fails."""
    start = time.perf_counter()
    program = str(Path(sys.executable).parent / command[0])
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    print(f"{seconds:6.1f} s  {' '.join(command)[:150]}", file=sys.stderr, flush=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    return seconds


def results(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def _num_prefilled(results: Mapping[str, Any]) -> int:
    tasks = results["config"]["kvpress"]["tasks"].values()
    return sum(task[kind]["num_tokens"] for task in tasks for kind in ("contexts_pressed", "contexts_unpressed"))


def largest_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative difference of any metric of any task."""
    differences = [0.0]
    for task, metrics in one["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                expected = other["results"][task][metric]
                differences.append(abs(value - expected) / max(abs(expected), 1e-12))
    return max(differences)


def cells_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """Arguments of a script that runs one sweep in several ways: its cells, and the folder of what was measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_args", default="pretrained=builtin,dtype=float32")
    parser.add_argument("--presses", default=PRESSES)
    parser.add_argument("--ratios", default="0.25,0.5,0.75,0.9")
    parser.add_argument("--tasks", default="kvpress_demo")
    parser.add_argument("--batch_size", default="8")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


if __name__ == "__main__":
    main()
