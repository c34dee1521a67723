"""Which sweeps are run, when something is killed, and what counts as equal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.studies import spread_sweeps


def test_every_kill_is_planned_once() -> None:
    args = spread_sweeps._parser().parse_args(["--worker_kills=12", "--kills_per_sweep=5", "--driver_kills=3"])
    found = list[dict[str, Any]]()
    while (planned := spread_sweeps.next_sweep(args, found)) is not None:
        name, steps = planned
        kills = sum(step.kills for step in steps)
        found.append({"name": name, "kills": kills - (name == "Ray, workers 1 to 5 killed")})  # one ended too early
    kills = {one["name"]: one["kills"] for one in found if one["name"].startswith("Ray, ")}
    assert list(kills.values()) == [4, 5, 3, 3] and list(kills)[1] == "Ray, workers 5 to 9 killed"
    assert len({one["name"] for one in found}) == len(found) == 9


def write_cell(folder: Path, *, acc: float = 0.5, num_tokens: int = 7, answer: str = "-1.5") -> Path:
    results = folder / "cells/knorm/results/builtin"
    results.mkdir(parents=True)
    facts = {"press": {"name": "knorm"}, "protocol": {}, "tasks": {"t": {"num_tokens": num_tokens}}}
    facts["throughput"] = {"num_batches": 2, "seconds_total": random.random()}
    document = {"results": {"t": {"acc,none": acc, "acc_stderr,none": float("nan")}}, "config": {"kvpress": facts}}
    (results / "results_2026-11-28T20-15-08.335836.json").write_text(json.dumps(document))
    (results / "samples_t_2026-11-28T20-15-08.335836.jsonl").write_text(json.dumps({"resps": [[answer]]}) + "\n")
    return folder


@pytest.mark.parametrize(
    ("other", "path"),
    [
        ({}, None),
        ({"acc": 0.5000001}, ("knorm", "metrics", "t", "acc,none")),
        ({"num_tokens": 8}, ("knorm", "counts", "tasks", "t", "num_tokens")),
        ({"answer": "-1.50001"}, ("knorm", "samples", "t", "0")),
    ],
)
def test_a_metric_a_count_or_a_sample_is_enough_to_differ(
    other: dict[str, Any], path: tuple[str, ...] | None, tmp_path: Path
) -> None:
    one = spread_sweeps.content(write_cell(tmp_path / "one"))
    two = spread_sweeps.content(write_cell(tmp_path / "two", **other))
    assert one.keys() == two.keys() and {key for key in one if one[key] != two[key]} == ({path} if path else set())


def test_a_command_is_killed_once_the_logs_are_long_enough_and_a_failure_ends_the_study(tmp_path: Path) -> None:
    writing = "import pathlib, time; pathlib.Path(r'{}').write_text('a line\\n' * 3); time.sleep(60 * {})"
    log, line = tmp_path / "log", writing.format(tmp_path / "throughput.jsonl", 1)

    def watch(code: str, moments: list[int]) -> tuple[bool, list[int]]:
        command = [sys.executable, "-c", code]
        return spread_sweeps.watch(command, log, tmp_path, moments, random.Random(0), of_workers=False)

    assert watch(line, [2, 5]) == (False, [5])
    assert watch(writing.format(tmp_path / "throughput.jsonl", 0), [5]) == (True, [5])
    with pytest.raises(RuntimeError, match="exit status 3"):
        watch("raise SystemExit(3)", [])


def test_workers_are_told_by_the_name_that_ray_gives_them() -> None:
    with subprocess.Popen(["bash", "-c", "exec -a 'ray::_Actor.do' sleep 60"]) as child:
        try:
            while Path(f"/proc/{child.pid}/cmdline").read_bytes().startswith(b"bash"):
                pass
            assert spread_sweeps.workers() == [child.pid]
            assert os.getpid() in list(spread_sweeps._ancestors(child.pid))
        finally:
            child.kill()
