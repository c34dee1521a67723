"""Make faults and see what becomes of them: kills, damaged files, full disks, bad inputs.

    python -m scripts.studies.faults                  # all of them, about 25 minutes on two cores
    python -m scripts.studies.faults --few            # two of each, to try it

Three kinds of run that are resumed by their command (a sweep, a stream, a run with a throughput log and --use_cache)
are killed, their files are cut, emptied or zeroed, and their disk is made too small; each time the same command follows
and must end as a run that nothing happened to. Commands with a wrong argument or file must say so in one line.

A trial that is done stays in `trials.jsonl` below --output; the same command goes on from there. With --page the table
is written into the documentation. Full disks are small file systems where the user may mount them (as root), else files
that may not grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from scripts.machine import commit, described, machine
from scripts.studies.faults import page
from scripts.studies.faults.inputs import read_inputs
from scripts.studies.faults.process import run
from scripts.studies.faults.runs import RUNS
from scripts.studies.faults.trials import Trials, bad_inputs, damages, full_disks, kills, undisturbed
from scripts.studies.faults.verdicts import Trial

COUNTS = {"killed": 20, "damaged file": 40, "full disk": 20, "bad input": 1000}
"""Of each kind; kills are of each kind of run, and there are as many bad inputs as the table has rows."""
FEW = {"killed": 1, "damaged file": 7, "full disk": 3, "bad input": 6}


def main() -> int:
    args = _parser().parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    store = Store(args.output / "trials.jsonl")
    counts = {kind: num for kind, num in (FEW if args.few else COUNTS).items() if args.only in (None, kind)}
    trials = _trials(args.output / "folders", counts)
    todo = [(name, make) for name, make in trials if name not in store.done]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), desc="trials") as bar:
        for ended in as_completed(pool.submit(make) for _, make in todo):
            store.add(ended.result())
            bar.update()
    text = page.written(list(store.done.values()), {"commit": commit() or "", "machine": described(machine())})
    (args.output / "faults.md").write_text(text, encoding="utf-8")
    print(text)
    if args.page:
        page.update(text)
    return page.num_bad(store.done.values())


class Store:
    """Trials that are done, one per line of a file."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.done = {trial.name: trial for trial in (Trial(**json.loads(line)) for line in lines)}

    def add(self, trial: Trial) -> None:
        self.done[trial.name] = trial
        with self._lock, self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")


def _trials(folder: Path, counts: Mapping[str, int]) -> Iterator[tuple[str, Callable[[], Trial]]]:
    """All trials; those that an earlier call broke off begin in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    run(["lm-eval-kvpress", "presses"], folder / "start")  # of the server, whose seconds are no run's
    references = {
        kind.name: undisturbed(kind, folder / "undisturbed") for kind in RUNS if counts.keys() - {"bad input"}
    }
    generators: Mapping[str, Callable[[int], Trials]] = {
        "killed": lambda num: kills(references, folder / "killed", num),
        "damaged file": lambda num: damages(references, folder / "damaged", num),
        "full disk": lambda num: full_disks(references, folder / "full", num),
        "bad input": lambda num: bad_inputs(read_inputs()[:num], folder / "inputs"),
    }
    return itertools.chain.from_iterable(generators[kind](num) for kind, num in counts.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/faults"), help="default: %(default)s")
    parser.add_argument("--only", choices=list(COUNTS), help="one kind of fault")
    parser.add_argument("--few", action="store_true", help="some of each")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help=f"write the tables into {page.PAGE}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
