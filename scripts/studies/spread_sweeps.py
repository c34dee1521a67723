"""Sweeps of several processes, some killed on the way, against the same sweep of one process.

    python -m scripts.studies.spread_sweeps              two workers, four shards, submitit, Ray; 20 + 5 kills under Ray
    python -m scripts.studies.spread_sweeps --worker_kills 1 --driver_kills 1 --presses knorm --ratios 0.5

Every process has one thread. Ray is a cluster of two nodes, each with room for one worker. A kill is a SIGKILL once the
folder's throughput logs have a random number of lines, and up to a second later; a command that was killed is started
again. A sweep is equal if all its metrics, samples and counts are, to the last digit.

A sweep that is done stays in `sweeps.jsonl` below --output; the same command goes on from there. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.measuring import write
from scripts.benchmarks.sweep import PRESSES
from scripts.machine import commit, described, machine

DOCUMENTS = {"kvpress_recall": list(range(8)), "kvpress_recall_gen": list(range(4))}
RAY = ("--launcher", "ray", "--workers", "2", "--gpus_per_worker", "0", "--ray_address", "auto")
ACTOR = b"ray::_Actor"
"""What Ray calls the process of a worker."""


@dataclass(frozen=True)
class Step:
    """A command, and what is killed meanwhile.

    Attributes:
        arguments: besides those that all steps share.
        kills: number of kills.
        of_workers: whether Ray's workers are killed, or the command itself, which is then started again.
        share: of all answers that this command makes.
    """

    arguments: Sequence[str] = ()
    kills: int = 0
    of_workers: bool = False
    share: float = 1.0


BEFORE_KILLS: Mapping[str, Sequence[Step]] = {"one process": [Step()], "Ray": [Step(RAY)]}
AFTER_KILLS: Mapping[str, Sequence[Step]] = {
    "`--workers 2`": [Step(("--workers", "2"))],
    "four shards, the third killed twice": [
        *(Step(("--shard", f"{number}/4"), kills=2 * (number == 3), share=0.25) for number in (3, 1, 4, 2)),
        Step(("--merge",)),
    ],
    "submitit's local executor": [Step(("--launcher", "submitit", "--workers", "2", "--slurm", "cluster=local"))],
}


def main() -> int:
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, _end)
    args.output.mkdir(parents=True, exist_ok=True)
    done = args.output / "sweeps.jsonl"
    found = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    with ExitStack() as nodes:
        while (planned := next_sweep(args, found)) is not None:
            if planned[0].startswith("Ray") and "RAY_ADDRESS" not in os.environ:
                nodes.enter_context(two_nodes())
            found.append(sweep(args, *planned))
            print(json.dumps(found[-1]), flush=True)
            with done.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(found[-1]) + "\n")
    facts = {"commit": commit(), "machine": described(machine()), "settings": vars(args)}
    write(json.loads(json.dumps({"sweeps": found, **facts}, default=str)), markdown(found), args.output, "sweeps")
    print(markdown(found))
    return sum(bool(one["differences"]) for one in found)


def _end(*_: Any) -> None:
    """End what was started as well."""
    sys.exit(1)


def next_sweep(args: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> tuple[str, Sequence[Step]] | None:
    """The name and the steps of the first sweep that is not done; kills that a sweep did not come to are made up."""
    done = {one["name"] for one in found}
    for name, steps in BEFORE_KILLS.items():
        if name not in done:
            return name, steps
    for of_workers, planned in ((True, args.worker_kills), (False, args.driver_kills)):
        victims = "workers" if of_workers else "drivers"
        made = sum(one["kills"] for one in found if victims in one["name"])
        if made < planned:
            kills = min(args.kills_per_sweep, planned - made)
            return f"Ray, {victims} {made + 1} to {made + kills} killed", [Step(RAY, kills, of_workers)]
    for name, steps in AFTER_KILLS.items():
        if name not in done:
            return name, steps
    return None


def sweep(args: argparse.Namespace, name: str, steps: Sequence[Step]) -> dict[str, Any]:
    """Run one sweep to its end; what became of it, and in what it differs from that of one process."""
    folder, reference = (args.output / one.replace("`", "").replace(" ", "_") for one in (name, "one process"))
    shutil.rmtree(folder, ignore_errors=True)
    log, draw, start = folder.with_suffix(".log"), random.Random(name), time.perf_counter()
    num_commands, num_kills = 0, 0
    for step in steps:
        num_lines = _num_lines(reference) * step.share if step.kills else 0
        moments = sorted(draw.sample(range(int(0.95 * num_lines)), step.kills)) if step.kills else []
        command = [sys.executable, "-m", "lm_eval_kvpress", "sweep", *_settings(args), f"--output_path={folder}"]
        ended = False
        while not ended:
            ended, left = watch([*command, *step.arguments], log, folder, moments, draw, of_workers=step.of_workers)
            num_commands, num_kills, moments = num_commands + 1, num_kills + len(moments) - len(left), left
    own, expected = content(folder), content(reference)
    return {
        "name": name,
        "commands": num_commands,
        "kills": num_kills,
        "lost_workers": log.read_text(errors="replace").count("was lost"),
        "seconds": round(time.perf_counter() - start),
        "cells": len({path[0] for path in own}),
        **{kind: sum(path[1] == kind for path in own) for kind in ("metrics", "samples", "counts")},
        "differences": sorted(
            "/".join(path) for path in own.keys() | expected.keys() if own.get(path) != expected.get(path)
        ),
    }


def watch(
    command: Sequence[str],
    log: Path,
    folder: Path,
    moments: Sequence[int],
    draw: random.Random,
    *,
    of_workers: bool,
) -> tuple[bool, list[int]]:
    """Start a command, and kill it, or workers, once the folder's logs have so many lines.

    Returns:
        whether it ended by itself, and the moments that were not reached.

    Raises:
        RuntimeError: if it fails by itself.
    """
    left = list(moments)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while process.poll() is None:
            time.sleep(0.1)
            if not left or _num_lines(folder) < left[0]:
                continue
            time.sleep(draw.random())
            if not of_workers and process.poll() is None:
                process.kill()
                process.wait()
                return False, left[1:]
            if victims := workers():  # else both are being started, and the next moment is soon
                os.kill(draw.choice(victims), signal.SIGKILL)
                left.pop(0)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: see {log}")
    return True, left


def _num_lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob("throughput.jsonl"))


def workers() -> list[int]:
    """The processes of Ray's actors that this process's nodes have started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().startswith(ACTOR) and os.getpid() in _ancestors(int(file.parent.name)):
                found.append(int(file.parent.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


@contextmanager
def two_nodes() -> Iterator[None]:
    """A cluster on this machine, whose nodes have room for a worker each; commands find it as `auto`."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else all other programs of the machine come first
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 2**27}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = str(cluster.address)
        signal.signal(signal.SIGTERM, _end)  # in place of Ray's own, which would leave the driver
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
        cluster.shutdown()


def content(folder: Path) -> dict[tuple[str, ...], str]:
    """All that a sweep's cells found, by cell, kind and path: metrics, samples, and counts of what was kept and run."""
    found = dict[tuple[str, ...], str]()
    for file in sorted(folder.glob("cells/*/results/*/results_*.json")):
        cell, results = file.relative_to(folder).parts[1], json.loads(file.read_text(encoding="utf-8"))
        facts = results["config"]["kvpress"]
        counts = {name: facts[name] for name in ("press", "protocol", "tasks")}
        counts["num_batches"] = facts["throughput"]["num_batches"]
        found.update(_leaves((cell, "metrics"), results["results"]))
        found.update(_leaves((cell, "counts"), counts))
        for samples in sorted(file.parent.glob("samples_*.jsonl")):
            task = samples.name.removeprefix("samples_").rpartition("_")[0]
            lines = samples.read_text(encoding="utf-8").splitlines()
            found.update(((cell, "samples", task, str(place)), line) for place, line in enumerate(lines))
    return found


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """As JSON texts, of which two that are not numbers are equal."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, json.dumps(value)
        return
    for name, inner in items:
        yield from _leaves((*path, str(name)), inner)


def _settings(args: argparse.Namespace) -> list[str]:
    names = ("model_args", "presses", "ratios", "tasks", "samples")
    return ["--batch_size=1", *(f"--{name}={getattr(args, name)}" for name in names)]


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """A row per sweep."""
    names = ("commands", "kills", "lost_workers", "cells", "metrics", "samples", "counts")
    rows = [[one["name"], *(f"{one[name]:,}" for name in names), str(len(one["differences"]))] for one in found]
    headings = ["sweep", "commands", "kills", "workers lost", "cells", "metrics", "samples", "counts", "of them differ"]
    return markdown_table(headings, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_args", default="pretrained=builtin,dtype=float32")
    parser.add_argument("--presses", default=PRESSES)
    parser.add_argument("--ratios", default="0.25,0.5,0.75,0.9")
    parser.add_argument("--tasks", default=",".join(DOCUMENTS))
    parser.add_argument(
        "--samples", default=json.dumps(DOCUMENTS), help="documents of each task (default: %(default)s)"
    )
    parser.add_argument("--worker_kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--driver_kills", type=int, default=5, help="in all (default: %(default)s)")
    parser.add_argument("--kills_per_sweep", type=int, default=10, help="at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/spread_sweeps"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
