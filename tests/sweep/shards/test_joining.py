"""What shards answered is joined once, and never with what is of another sweep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lm_eval_kvpress.engine.outcomes import Generated
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord
from lm_eval_kvpress.sweep.shards.joining import (
    join_shards,
    joined_records,
    refuse_unmerged,
    siblings,
)
from lm_eval_kvpress.sweep.shards.record import note_cells, note_workers
from lm_eval_kvpress.sweep.shards.shard import Shard
from lm_eval_kvpress.sweep.store import SweepStore
from lm_eval_kvpress.sweep.workers.jobs import WorkerFacts

TASKS, CHECKPOINT = {"t": {"documents": "1"}}, {"weights": "1"}
SHARED: dict[str, Any] = {"tasks": ["t"], "batch_size": None}
OF_SHARDS = SHARED | {"batch_size": 2}


def batch(number: int) -> BatchRecord:
    labels = dict.fromkeys(("run", "model", "press", "arguments", "protocol", "device", "dtype", "machine"), "x")
    times = dict.fromkeys(("seconds", "prefill_sec", "press_sec", "score_sec", "decode_sec"), 1.0)
    others = dict.fromkeys(BatchRecord.__dataclass_fields__.keys() - {*labels, *times}, 1)
    return BatchRecord(**{**others, **labels, **times, "record": "batch", "batch": number})  # type: ignore[arg-type]


def request(doc_id: int, **values: Any) -> RequestRecord:
    fields = dict.fromkeys(RequestRecord.__dataclass_fields__, 1)
    others: dict[str, Any] = {"record": "request", "doc_id": doc_id, "ttft_sec": None, "is_warmup": False, "run": "x"}
    return RequestRecord(**{**fields, **others, "machine": "A", **values})


def answer(output_path: Path, shard: Shard, **other: Any) -> SweepStore:
    """A shard that has answered one item of one cell, and is not closed yet."""
    settings = {"settings": OF_SHARDS, "tasks": TASKS, "checkpoint": CHECKPOINT, **other}
    store = SweepStore(shard.folder(output_path), settings["settings"])
    store.begin(settings["tasks"], settings["checkpoint"])
    note_workers(store.folder, [WorkerFacts(f"node{shard.number}", {}, {}, None, {"device": "cuda:0"})])
    cell = store.cell("a")
    cell.folder.mkdir(parents=True)
    log = ThroughputLog(cell.throughput)
    log.add(batch(0))
    log.add(request(shard.number))
    log.close()
    cell.answers.add({f"item {shard.number}": Generated((shard.number,), None)})
    note_cells(store.folder, ["a", "nothing yet"], are_answered=True)
    return store


def join(output_path: Path) -> tuple[Any, list[str]]:
    with closing(SweepStore(output_path, SHARED)) as store:
        store.begin(TASKS, CHECKPOINT)
        return join_shards(store, OF_SHARDS, ["a", "nothing yet"], TASKS, CHECKPOINT)


def test_answers_records_and_processes_of_all_shards_are_joined_also_twice(tmp_path: Path) -> None:
    for number in (2, 1):
        answer(tmp_path, Shard(number, 2)).close()
    for _ in range(2):
        workers, lines = join(tmp_path)
        assert [facts.host for facts in workers.facts] == ["node1", "node2"] and not lines
        cell = SweepStore(tmp_path, SHARED, is_written=False).cell("a")
        assert cell.answers.outcomes() == {f"item {number}": Generated((number,), None) for number in (1, 2)}
        assert not cell.answers.damage()
        log = ThroughputLog(cell.throughput)
        kinds = [(record.record, getattr(record, "doc_id", None)) for record in log.records()]
        log.close()
        assert kinds == [("batch", None), ("batch", None), ("request", 1), ("request", 2)]


def test_records_beyond_a_shards_answers_are_left_out(tmp_path: Path) -> None:
    """Those of a batch before whose answers it was killed, and which it makes again."""
    shard = answer(tmp_path, Shard(1, 1))
    log = ThroughputLog(shard.cell("a").throughput)
    log.add(batch(1))
    log.close()
    shard.close()
    join(tmp_path)
    assert (tmp_path / "cells" / "a" / "throughput.jsonl").read_text().count("\n") == 2


def test_damage_of_one_shard_is_named_and_its_answers_are_missing(tmp_path: Path) -> None:
    for number in (1, 2):
        answer(tmp_path, Shard(number, 2)).close()
    file = Shard(2, 2).folder(tmp_path) / "cells" / "a" / "answers.sqlite"
    file.write_bytes(b"\0" * 5000)
    _, (line,) = join(tmp_path)
    assert line.startswith(f"{file} is damaged") and line.endswith("its answers are made again")
    with closing(SweepStore(tmp_path, SHARED)) as store:
        assert store.cell("a").answers.keys() == {"item 1"}


def test_windows_of_a_document_in_two_shards_are_one_request() -> None:
    one = request(1, num_prompt_tokens=5, seconds=0.5, num_contexts=2, kept_tokens_max=7, is_warmup=True)
    other = request(1, num_prompt_tokens=6, seconds=0.25, num_contexts=0, kept_tokens_max=None)
    (joined,) = joined_records([one, other])
    assert isinstance(joined, RequestRecord)
    assert (joined.num_prompt_tokens, joined.seconds, joined.num_contexts, joined.num_batches) == (11, 0.75, 2, 2)
    assert joined.is_warmup and joined.kept_tokens_max == 7
    assert len(joined_records([one, request(2), request(1, task="u")])) == 3
    (joined,) = joined_records([one, request(1, machine="B")])
    assert joined.machine == "A and B", "its seconds are those of no machine"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"settings": OF_SHARDS | {"batch_size": 4}}, "it had batch_size=4"),
        ({"tasks": {"t": {"documents": "2"}}}, r"since then changed: t \(documents\)"),
        ({"checkpoint": {"weights": "2"}}, r"of another checkpoint \(weights differ\)"),
    ],
)
def test_a_shard_of_another_sweep_is_refused(other: dict[str, Any], says: str, tmp_path: Path) -> None:
    answer(tmp_path, Shard(1, 2)).close()
    answer(tmp_path, Shard(2, 2), **other).close()
    with pytest.raises(UsageError, match=f"2-of-2 holds a sweep .*{says}"):
        join(tmp_path)
    with pytest.raises(UsageError, match=says):
        for sibling in siblings(tmp_path, Shard(1, 2), SHARED, OF_SHARDS):
            sibling.check_tasks(TASKS)
            sibling.check_checkpoint(CHECKPOINT)


def nothing(output_path: Path) -> None: ...


def two_counts(output_path: Path) -> None:
    for shard in (Shard(1, 2), Shard(1, 3)):
        answer(output_path, shard).close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (nothing, "there is nothing to merge: .* holds no shards"),
        (two_counts, "holds shards of 2 and 3: a sweep has shards of one count"),
    ],
)
def test_what_cannot_be_joined_is_one_line(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UsageError, match=says):
        join(tmp_path)


def test_a_shard_that_runs_is_neither_joined_nor_started_again(tmp_path: Path) -> None:
    with closing(answer(tmp_path, Shard(1, 1))):
        with pytest.raises(UsageError, match="1-of-1 is being written by another sweep"):
            join(tmp_path)
        with pytest.raises(UsageError, match="1-of-1 is being written by another sweep"):
            SweepStore(Shard(1, 1).folder(tmp_path), OF_SHARDS)


def test_answers_that_no_shard_has_are_never_dropped(tmp_path: Path) -> None:
    answer(tmp_path, Shard(1, 1)).close()
    with closing(SweepStore(tmp_path, SHARED)) as store:
        store.begin(TASKS, CHECKPOINT)
        store.cell("a").answers.add({"another": Generated((3,), None)})
    with pytest.raises(UsageError, match="has answers that no shard has"):
        join(tmp_path)


def test_a_shard_that_is_not_done_is_named(tmp_path: Path) -> None:
    """It was never run, was killed, or has not answered the cells that were added since."""
    for number in (1, 3, 4):
        answer(tmp_path, Shard(number, 4)).close()
    note_cells(Shard(3, 4).folder(tmp_path), ["a"], are_answered=False)
    with pytest.raises(UsageError, match="2 of 4 shards are not done: run .* --shard 2/4 and 3/4, then --merge again"):
        join(tmp_path)


def test_a_shard_of_another_count_is_refused_before_it_answers(tmp_path: Path) -> None:
    answer(tmp_path, Shard(1, 2)).close()
    with pytest.raises(UsageError, match="holds shards of 2 and 3"):
        siblings(tmp_path, Shard(3, 3), SHARED, OF_SHARDS)


def test_a_whole_sweep_does_not_start_over_unmerged_shards(tmp_path: Path) -> None:
    refuse_unmerged(tmp_path)
    answer(tmp_path, Shard(1, 2)).close()
    with pytest.raises(UsageError, match="holds shards of a sweep: --shard I/N goes on with one, and --merge joins"):
        refuse_unmerged(tmp_path)
