"""The writer loses nothing: after a kill, on a full disk, into a closed pipe, and never two runs in one file."""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.log_file import CSV_HEADER, LogError, ThroughputLog
from lm_eval_kvpress.records.meter import Meter
from lm_eval_kvpress.records.timings import RequestRecord, RunLabels


def request(idx: int = 0) -> RequestRecord:
    values: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(RequestRecord)}
    labels = {field.name: field.name for field in dataclasses.fields(RunLabels)}
    own = {"record": "request", "task": 'a "task", with commas', "doc_id": None, "idx": idx}
    return RequestRecord(**{**values, **labels, **own})


def write_until_stopped(path: Path, pipe: Connection, limit_bytes: int) -> None:
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    log = ThroughputLog(path)
    pipe.send("ready")
    try:
        for idx in itertools.count():
            log.add(request(idx))
    except LogError as error:
        pipe.send(str(error))


def start_writer(path: Path, *, limit_bytes: int = 0) -> tuple[BaseProcess, Connection]:
    """Another process that writes records until it is stopped; forked, because a fresh one imports torch."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=write_until_stopped, args=(path, theirs, limit_bytes), daemon=True)
    process.start()
    assert ours.poll(20) and ours.recv() == "ready"
    return process, ours


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_after_a_kill_every_line_is_complete_and_a_new_run_goes_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for milliseconds in random.Random(0).sample(range(60), 5):
        process, _ = start_writer(path)
        time.sleep(milliseconds / 1000)
        process.kill()
        process.join()
        log = ThroughputLog(path)
        log.add(request())
        log.close()
        if path.suffix == ".jsonl":
            assert all(len(json.loads(line)) == len(dataclasses.fields(RequestRecord)) for line in path.open())
        else:
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            assert {len(row) for row in rows} == {len(dataclasses.fields(RequestRecord))}
            assert sum(row == CSV_HEADER.split(",") for row in rows) == 1, "one header"


def written(path: Path, num_records: int) -> bytes:
    log = ThroughputLog(path)
    for idx in range(num_records):
        log.add(request(idx))
    log.close()
    return path.read_bytes()


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_a_torn_line_is_dropped_and_named_when_the_file_is_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = tmp_path / name
    complete = written(path, 2)
    torn = complete.splitlines(keepends=True)[-1]
    for length in (1, 10, len(torn) - 1):
        path.write_bytes(complete + torn[:length])
        caplog.clear()
        ThroughputLog(path).close()
        assert path.read_bytes() == complete
        assert caplog.messages == [f"{path}: dropped a torn last line; 2 records are kept"]


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_what_a_power_cut_damaged_is_named_and_the_sound_records_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A file is cut, emptied or zeroed in part; only a cut at a line's end cannot be told from a shorter log."""
    path, draw = tmp_path / name, random.Random(name)
    complete = written(path, 8)
    header = [CSV_HEADER.encode() + b"\n"] * (path.suffix == ".csv")
    ends = set(itertools.accumulate(map(len, complete.splitlines(keepends=True)), initial=0))
    for _ in range(60):
        start = draw.randrange(len(complete))
        end = draw.randrange(start + 1, len(complete) + 1)
        damaged = draw.choice([complete[:start], b"", complete[:start] + bytes(end - start) + complete[end:]])
        path.write_bytes(damaged)
        caplog.clear()
        intact = [line for line in damaged.splitlines(keepends=True) if line in complete.splitlines(keepends=True)]
        try:
            ThroughputLog(path).close()
        except LogError as error:
            assert intact == [] and "choose another file" in str(error) and path.read_bytes() == damaged
            continue
        assert path.read_bytes() == b"".join([*header, *[line for line in intact if line not in header]])
        assert len(caplog.messages) == (0 if len(damaged) in ends - {0} and b"\0" not in damaged else 1), damaged


def test_records_are_on_disk_within_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    log = ThroughputLog(tmp_path / "log.jsonl")
    monkeypatch.setattr(os, "fsync", noted)
    for idx in range(3):
        log.add(request(idx))
    assert len(synced) == 1, "the first one; the others follow within a second"
    monkeypatch.setattr(time, "monotonic", lambda monotonic=time.monotonic: monotonic() + 2)
    log.add(request(3))
    assert len(synced) == 2
    log.add(request(4))
    log.close()
    assert synced[-1] == (tmp_path / "log.jsonl").stat().st_size


def test_a_file_of_something_else_is_left_untouched(tmp_path: Path) -> None:
    for name in ("notes.csv", "notes.jsonl"):
        path = tmp_path / name
        path.write_text("my notes, without an end of line")
        with pytest.raises(LogError, match="no log of this version"):
            ThroughputLog(path)
        assert path.read_text() == "my notes, without an end of line"


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    process, _ = start_writer(path)
    with pytest.raises(LogError, match="another run"):
        ThroughputLog(path)
    process.kill()
    process.join()
    ThroughputLog(path).close()


def test_the_lock_needs_no_fcntl() -> None:
    """Windows has none."""
    code = "import sys; sys.modules['fcntl'] = None; import lm_eval_kvpress.records.log_file"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_is_one_clear_error_and_the_lines_so_far_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    _, pipe = start_writer(path, limit_bytes=10_000)
    assert pipe.poll(20)
    message = pipe.recv()
    records = [json.loads(line) for line in path.open()]
    assert len(records) > 5
    assert f"cannot be written after {len(records)} lines" in message
    assert "\n" not in message


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    os.mkfifo(path)
    with pytest.raises(UsageError, match=f"throughput_log={path} is a pipe or a device"):
        ThroughputLog(path)


@pytest.mark.parametrize("name", ["log.txt", "log"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LogError, match=r"\.jsonl or \.csv"):
        ThroughputLog(tmp_path / name)


def test_a_log_that_cannot_be_opened_is_a_usage_error_of_one_line(checkpoint_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        KVPress(pretrained=str(checkpoint_dir), device="cpu", throughput_log=str(tmp_path / "file" / "log.jsonl"))


def test_csv_holds_the_requests_of_jsonl(tmp_path: Path) -> None:
    logs = [ThroughputLog(tmp_path / name) for name in ("log.jsonl", "log.csv")]
    for log in logs:
        for idx in range(3):
            log.add(request(idx))
    expected = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: str(v) if v is not None else "" for k, v in record.items()} for record in expected] == rows


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_two_runs_in_one_file_can_be_told_apart(checkpoint_dir: Path, tmp_path: Path, name: str) -> None:
    path, expected = tmp_path / name, {}
    requests = [Instance("loglikelihood", {}, ("seven grey geese " * 9, " slept"), 0, ("t", i, 1)) for i in range(2)]
    for press, size in (("snapkv", {"window_size": 8}), ("knorm", {})):
        arguments = {"compression_ratio": 0.75, **size}
        lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", press=press, throughput_log=str(path), **arguments)
        lm.loglikelihood(requests, disable_tqdm=True)
        all_of_them = lm.describe()["press"]["arguments"]
        typed = " ".join(f"{key}={value}" for key, value in all_of_them.items())
        expected[lm.describe()["run"]] = (str(checkpoint_dir), press, typed, "cpu", "float32")
        assert arguments.items() <= all_of_them.items()
        lm.session.runner.meter._recorders[0].close()
    with path.open(newline="") as file:
        records = [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))
    found = {}
    for record in records:
        assert {"query_tokens=1", "rolling=prefix", "max_length=512"} <= set(record["protocol"].split())
        labels = (record["model"], record["press"], record["arguments"], record["device"], record["dtype"])
        assert found.setdefault(record["run"], labels) == labels
    assert found == expected and len(expected) == 2
    kinds = collections.Counter((record["run"], record["record"]) for record in records)
    assert all(kinds[run, "request"] == 2 for run in expected)


def test_records_come_back_from_the_file_and_into_a_meter(checkpoint_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", throughput_log=str(path))
    requests = [Instance("loglikelihood", {}, ("seven grey geese " * 9, " slept"), 0, ("t", i, 1)) for i in range(3)]
    lm.loglikelihood(requests, disable_tqdm=True)
    (log,) = lm.session.runner.meter._recorders
    assert isinstance(log, ThroughputLog)
    records = list(log.records())
    assert records == [*lm.session.runner.meter.records.batches, *lm.session.runner.meter.records.requests]
    restored = Meter(Clock(torch.device("cpu")), lm.session.runner.meter.labels)
    restored.restore(records)
    assert restored.records.summary() == lm.session.runner.meter.records.summary()


def test_a_meter_that_went_on_does_not_take_the_last_part_for_the_whole(checkpoint_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", throughput_log=str(path))
    options = {"until": [], "max_gen_toks": 3}
    requests = [Instance("generate_until", {}, ("seven grey geese " * 9, options), 0, ("t", i, 0)) for i in range(3)]
    lm.generate_until(requests, disable_tqdm=True)
    (log,) = lm.session.runner.meter._recorders
    assert isinstance(log, ThroughputLog)
    assert lm.session.runner.meter.records.summary()["itl_sec"] is not None
    lm.session.runner.meter = Meter(lm.session.runner.clock, lm.session.runner.meter.labels)
    lm.session.runner.meter.restore(log.records())
    lm.generate_until(requests, disable_tqdm=True)
    summary = lm.session.runner.meter.records.summary()
    assert summary["itl_sec"] is None and summary["tpot_sec"] is not None


def test_a_line_without_a_machine_is_a_record_of_none(tmp_path: Path) -> None:
    """As the logs of sweeps that were begun before lines named it; a line that lacks anything else is damaged."""
    path, values = tmp_path / "log.jsonl", vars(request())
    lines = [{name: value for name, value in values.items() if name != left_out} for left_out in ("machine", "device")]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    log = ThroughputLog(path)
    log.add(request(1))
    assert [(record.machine, getattr(record, "idx", None)) for record in log.records()] == [("", 0), ("machine", 1)]
    log.close()
