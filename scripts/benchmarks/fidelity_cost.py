"""What fidelity costs a sweep: the same cells with and without it, in pairs whose order alternates; and a run's memory.

Both sides are whole processes of the command line. Their metrics must be the same: fidelity changes no answer. Memory
is the peak of one batch of eight contexts under a single press, in a fresh process for each side.

    python -m scripts.benchmarks.fidelity_cost                      six presses x four ratios on kvpress_demo, two pairs
    python -m scripts.benchmarks.fidelity_cost --limit 2 --pairs 1

The last line of stdout is one JSON document; it is written to --output as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.recall import recall_documents
from scripts.benchmarks import sweep
from scripts.benchmarks.peak_memory import peak_extra_bytes
from scripts.machine import commit, machine

SIDES = ("with", "without")


def main() -> None:
    args = _parser().parse_args()
    if args.peak:
        print(json.dumps(_measure_peak(args.peak, args.model_args)))
        return
    output = Path(args.output)
    shutil.rmtree(output, ignore_errors=True)
    pairs = [_pair(args, output / f"pair{number}", fidelity_first=bool(number % 2)) for number in range(args.pairs)]
    bytes_by_side = {side: _peak_bytes(side, args.model_args) for side in SIDES}
    sides = [output / "pair0" / side / "cells" for side in SIDES]
    cells = sorted(cell.name for cell in sides[0].iterdir())
    record = {
        "num_cells": len(cells),
        "seconds": pairs,
        "ratio_wall": median(pair["with"].wall / pair["without"].wall for pair in pairs),
        "ratio_cpu": median(pair["with"].cpu / pair["without"].cpu for pair in pairs),
        "peak_bytes": bytes_by_side,
        "worst_relative_difference": max(
            sweep.largest_difference(*(sweep.results(side / cell) for side in sides)) for cell in cells
        ),
        "settings": vars(args),
        "machine": machine(),
        "commit": commit(),
    }
    (output / "fidelity_cost.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(record))


class Seconds(NamedTuple):
    """Of a process: on the clock, and of all processors together, which other work on the machine changes less."""

    wall: float
    cpu: float


def _pair(args: argparse.Namespace, folder: Path, *, fidelity_first: bool) -> dict[str, Seconds]:
    """Seconds of a sweep with fidelity and of one without it."""
    given = [f"--{name}={getattr(args, name)}" for name in ("model_args", "presses", "ratios", "tasks", "batch_size")]
    if args.limit:
        given.append(f"--limit={args.limit}")
    seconds = {}
    for side in SIDES if fidelity_first else reversed(SIDES):
        options = [*given, f"--output_path={folder / side}", *(["--fidelity"] if side == "with" else [])]
        before = _cpu_sec_of_children()
        wall = sweep.timed(["lm-eval-kvpress", "sweep", *options])
        seconds[side] = Seconds(wall, _cpu_sec_of_children() - before)
    return seconds


def _cpu_sec_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_bytes(side: str, model_args: str) -> dict[str, int]:
    command = [sys.executable, "-m", "scripts.benchmarks.fidelity_cost", "--peak", side, "--model_args", model_args]
    measured: dict[str, int] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return measured


def _measure_peak(side: str, model_args: str) -> dict[str, int]:
    """Bytes of a batch above what the loaded model takes, and those of its full cache."""
    arguments = simple_parse_args_string(model_args)
    settings = {"press": "snapkv", "compression_ratio": 0.75, "batch_size": 8, "fidelity": side == "with"}
    lm = KVPress(**arguments, **settings)
    documents = recall_documents(1, per_cell=8, distances=[1_600], kinds=["word"])
    requests = [
        Instance("loglikelihood", {}, (document.context + document.question, choice), index, ("recall", number, 1))
        for number, document in enumerate(documents)
        for index, choice in enumerate(document.choices)
    ]
    lm.loglikelihood(requests[:4], disable_tqdm=True)
    before = lm.describe()["tasks"]["recall"]["contexts_pressed"]["kv_bytes_before"]
    peak = peak_extra_bytes(lambda: lm.loglikelihood(requests, disable_tqdm=True))
    cache = lm.describe()["tasks"]["recall"]["contexts_pressed"]["kv_bytes_before"] - before
    return {"batch": peak, "full_cache": cache}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_args", default="pretrained=builtin,dtype=float32")
    parser.add_argument("--presses", default=sweep.PRESSES)
    parser.add_argument("--ratios", default="0.25,0.5,0.75,0.9")
    parser.add_argument("--tasks", default="kvpress_demo")
    parser.add_argument("--batch_size", default="8")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--peak", choices=SIDES, help="measure the memory of this side alone")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--output", default="runs/benchmarks/fidelity_cost")
    return parser


if __name__ == "__main__":
    main()
