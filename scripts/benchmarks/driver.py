"""How many answers a sweep's driver takes per second from workers that only sleep, and where its time goes.

Jobs are made, sent, answered and stored by the code of a sweep, with a folder on disk; only the model's work is missing
(`sleeping`). Jobs take so little time that the driver is always behind, so what is measured is the most it can do.

    python -m scripts.benchmarks.driver                           1, 10, 100 and 1,000 workers by both transports
    python -m scripts.benchmarks.driver --workers 1000 --transport ray

A message is what one cell answers of one batch, and is one transaction on disk. All workers sleep within few processes,
each behind a pipe or a stream of its own, so a thousand of them fit here. The last line of stdout is one JSON document;
it is written to --output as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.likelihood_batches import LikelihoodBatches
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.sweep.answering import CellAnswering
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cell_store import CellStore
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.model import SweepModel, load_model
from lm_eval_kvpress.sweep.settings import parse_settings
from lm_eval_kvpress.sweep.workers.crew import Crew, Pool
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.measuring import counts, write
from scripts.benchmarks.sleeping import SleepingActors, SleepingProcesses
from scripts.machine import commit, machine

TRANSPORTS: Mapping[str, Callable[[int, float], Pool]] = {"processes": SleepingProcesses, "ray": SleepingActors}
PRESSES = ("none", "knorm")


def main() -> None:
    args = _parser().parse_args()
    shutil.rmtree(args.output / "cells", ignore_errors=True)
    settings = parse_settings(
        {"presses": list(PRESSES), "ratios": [0.5], "tasks": "t", "output_path": str(args.output), "device": "cpu"}
        | {"model_args": "pretrained=builtin"}
    )
    model, found = load_model(settings), list[dict[str, Any]]()
    for transport in args.transport:
        for num_workers in args.workers:
            folder = args.output / "cells" / f"{transport}-{num_workers}"
            runs = [model.open(cell, CellStore(folder / cell.folder)) for cell in cells_of(settings)]
            found.append(_measure(args, transport, num_workers, model, runs))
            print(json.dumps(found[-1]), flush=True)
            for run in runs:
                run.log.close()
    report = {"measured": found, "settings": vars(args), "machine": machine(), "commit": commit()}
    write(json.loads(json.dumps(report, default=str)), markdown(found), args.output, "driver")
    print(json.dumps(report, default=str))


def _measure(
    args: argparse.Namespace, transport: str, num_workers: int, model: SweepModel, runs: Sequence[CellRun]
) -> dict[str, Any]:
    """Have all runs answered, and say how long what took."""
    num_jobs = num_workers + args.jobs
    requests = _requests(num_jobs * args.batch_size, args.num_tokens)
    pool = TRANSPORTS[transport](num_workers, args.sleep)
    crew = Crew(pool, lambda facts: None)
    with closing(crew), tqdm(total=requests.progress_total, mininterval=1) as bar, ExitStack() as timed:
        parts = {name: timed.enter_context(_seconds_in(*method)) for name, method in _parts(pool).items()}
        answering = CellAnswering(runs[0], runs, lambda *_: (args.batch_size, None), crew)
        start, cpu = time.perf_counter(), time.process_time()
        answering._run_all(requests, [str(item) for item in range(requests.progress_total)], bar)
        seconds, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    num_messages = num_jobs * len(runs)
    return {
        "transport": transport,
        "num_workers": num_workers,
        "num_messages": num_messages,
        "seconds": seconds,
        "messages_per_sec": num_messages / seconds,
        "answers_per_sec": num_messages * args.batch_size / seconds,
        "cpu_ms_per_message": 1000 * cpu_sec / num_messages,
        **{f"{name}_ms_per_message": 1000 * total[0] / num_messages for name, total in parts.items()},
        "asleep_sec": args.sleep * num_jobs / num_workers,
    }


def _parts(pool: Pool) -> dict[str, tuple[type, str]]:
    """What of the driver's work is timed; receiving includes waiting."""
    return {
        "storing": (CellRun, "store_answers"),
        "sending": (type(pool), "send"),
        "receiving": (type(pool), "next_event"),
    }


def _requests(num_items: int, num_tokens: int) -> LikelihoodBatches:
    """A continuation of four tokens for each of so many contexts."""
    others = tuple(range(1, num_tokens))
    pairs = [(Context((item, *others), 1), (1, 2, 3, 4)) for item in range(num_items)]
    return LikelihoodBatches(pairs, [RequestId("t", item, 0) for item in range(num_items)])


@contextmanager
def _seconds_in(owner: type, name: str) -> Iterator[list[float]]:
    """Add up the seconds within a method."""
    method: Callable[..., Any] = getattr(owner, name)
    total = [0.0]

    @functools.wraps(method)
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            total[0] += time.perf_counter() - start

    with mock.patch.object(owner, name, timed):
        yield total


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A row per transport and number of workers."""
    names = [f"{name}_ms_per_message" for name in ("cpu", "storing", "receiving", "sending")]
    rows = [
        [
            *(one["transport"], f"{one['num_workers']:,}"),
            *(f"{one[name]:,.0f}" for name in ("answers_per_sec", "messages_per_sec")),
            *(f"{one[name]:.2f}" for name in names),
        ]
        for one in found
    ]
    columns = ["transport", "workers", "answers/s", "messages/s", "processor time", "storing", "receiving", "sending"]
    return markdown_table(columns, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=counts, default=[1, 10, 100, 1000])
    parser.add_argument("--transport", type=lambda text: text.split(","), default=list(TRANSPORTS))
    parser.add_argument("--jobs", type=int, default=100, help="besides one per worker (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_tokens", type=int, default=1000, help="of a context")
    parser.add_argument("--sleep", type=float, default=0.01, help="seconds of a job")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/driver"))
    return parser


if __name__ == "__main__":
    main()
