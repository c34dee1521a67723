"""The folders of shards within that of their sweep, and the joining of what they answered.

    DIR/shards/I-of-N/...         a sweep's folder (`store`), in which shard I of N answers every N-th block
    DIR/shards/I-of-N/shard.json  who answered, and which cells are done (`record`)

Shards need no coordinator: each asks lm-eval for the same requests and answers its own blocks of them. Whoever joins
them brings their answers and records to ``DIR/cells``, from where the sweep goes on. Knows stores. Does not know
models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import write_whole
from lm_eval_kvpress.records.log_file import parse_line
from lm_eval_kvpress.records.loss_files import join_losses
from lm_eval_kvpress.records.timings import PHASES, BatchRecord, RequestRecord, machines_of
from lm_eval_kvpress.sweep.cell_store import CellStore
from lm_eval_kvpress.sweep.shards.record import read_record
from lm_eval_kvpress.sweep.shards.shard import Shard
from lm_eval_kvpress.sweep.shards.share import Joined
from lm_eval_kvpress.sweep.store import MARK, SHARDS, SweepStore

SUMMED = (
    *("num_batches", "num_prompt_tokens", "num_output_tokens", "num_contexts", "num_context_tokens"),
    *("seconds", *(f"{phase}_sec" for phase in PHASES), "latency_sec"),
    *("kv_bytes_before", "kv_bytes_allocated", "kv_bytes_effective"),
)
"""Fields of a request's record that sum up its batches."""


def folders_of_shards(output_path: Path) -> list[Path]:
    """The folders of all shards that were begun, in the order of their numbers."""
    found = [path for path in (output_path / SHARDS).glob("*") if re.fullmatch(r"\d+-of-\d+", path.name)]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split("-of-")])


def count_of_shards(folders: Sequence[Path]) -> int:
    """Into how many shards a sweep is divided.

    Raises:
        UsageError: if some are of another count; they would share the requests out differently.
    """
    counts = {folder.name.partition("-of-")[2] for folder in folders}
    if len(counts) > 1:
        raise UsageError(
            f"{folders[0].parent} holds shards of {' and '.join(sorted(counts, key=int))}: a sweep has shards of one "
            "count; remove those of the others"
        )
    return int(counts.pop())


def siblings(
    output_path: Path, shard: Shard, shared: Mapping[str, Any], of_shards: Mapping[str, Any]
) -> list[SweepStore]:
    """Open, to compare settings with, the sweep's own folder and one other shard.

    Args:
        shared: settings that all cells of the sweep share.
        of_shards: the same of its shards.

    Raises:
        UsageError: if one is of other settings, or there are shards of another count.
    """
    folders = folders_of_shards(output_path)
    count_of_shards([*folders, shard.folder(output_path)])
    others = [folder for folder in folders if folder != shard.folder(output_path)][:1]
    return [
        SweepStore(output_path, shared, is_written=False),
        *(SweepStore(folder, of_shards, is_written=False) for folder in others),
    ]


def refuse_unmerged(output_path: Path) -> None:
    """Refuse to answer a whole sweep where shards have begun to, and were never joined.

    Raises:
        UsageError: saying what to do.
    """
    if folders_of_shards(output_path) and not (output_path / MARK).exists():
        raise UsageError(
            f"output_path={output_path} holds shards of a sweep: --shard I/N goes on with one, and --merge joins them "
            "once all are done"
        )


# -------------------------------------------------------------------------------------------------------------- joining


def join_shards(
    store: SweepStore,
    settings: Mapping[str, Any],
    cells: Sequence[str],
    tasks: Mapping[str, Mapping[str, str]],
    checkpoint: Mapping[str, str],
) -> tuple[Joined, list[str]]:
    """Bring what all shards answered to the folder of the sweep. The shards stay as they are.

    Args:
        store: of the sweep.
        settings: that all cells of the shards share; a shard of others is refused.
        cells: folders of the unfinished cells.
        tasks, checkpoint: as in `store.SweepRecord`.

    Returns:
        the workers of the joined sweep, and a line for each thing that was damaged.

    Raises:
        UsageError: if there are none, of two counts, of other settings, or one that is not done or still runs.
    """
    folders = folders_of_shards(store.folder)
    if not folders:
        raise UsageError(f"there is nothing to merge: {store.folder / SHARDS} holds no shards; --shard I/N makes one")
    count, lines = count_of_shards(folders), list[str]()
    _refuse_unfinished(store.folder, count, cells)
    with ExitStack() as opened:
        shards = [opened.enter_context(closing(SweepStore(folder, settings))) for folder in folders]
        for shard in shards:
            shard.check_tasks(tasks)
            shard.check_checkpoint(checkpoint)
        for name in cells:
            parts = [shard.cell(name) for shard in shards]
            lines += [line for part in parts for line in part.drop_damage()]
            _join_cell(store.cell(name), parts)
    return Joined(count, [facts for folder in folders for facts in read_record(folder).facts]), lines


def _refuse_unfinished(output_path: Path, count: int, cells: Sequence[str]) -> None:
    shards = [Shard(number, count) for number in range(1, count + 1)]
    left = [str(shard) for shard in shards if set(cells) - set(read_record(shard.folder(output_path)).cells)]
    if left:
        raise UsageError(
            f"{len(left)} of {count} shards are not done: run the same command with --shard {' and '.join(left)}, then "
            "--merge again"
        )


def _join_cell(cell: CellStore, parts: Sequence[CellStore]) -> None:
    outcomes = {key: outcome for part in parts for key, outcome in part.answers.outcomes().items()}
    if not cell.answers.keys() <= outcomes.keys():
        raise UsageError(
            f"{cell.folder} has answers that no shard has: finish the sweep without --merge, or move that folder away"
        )
    cell.answers.delete()
    streams = [part.stream for part in parts if part.stream.exists()]
    if not outcomes and not streams:
        return
    cell.folder.mkdir(parents=True, exist_ok=True)
    for stream in streams:
        join_losses(cell.stream, stream)
    records = [record for part in parts for record in _records(part)]
    write_whole(cell.throughput, "".join(f"{json.dumps(vars(record))}\n" for record in joined_records(records)))
    cell.answers.add(outcomes)


def _records(part: CellStore) -> list[BatchRecord | RequestRecord]:
    """The records that belong to a shard's answers."""
    if not part.answers.file.exists() or not part.throughput.exists():
        return []
    part.answers.take_back_log()
    return [parse_line(line) for line in part.throughput.read_text(encoding="utf-8").split("\n")[:-1]]


def joined_records(records: Iterable[BatchRecord | RequestRecord]) -> list[BatchRecord | RequestRecord]:
    """All batches, then each request once, also if several shards answered windows of its document."""
    batches, requests = list[BatchRecord](), dict[tuple[Any, ...], RequestRecord]()
    for record in records:
        if isinstance(record, BatchRecord):
            batches.append(record)
            continue
        key = (record.request_type, record.task, record.doc_id, record.idx, record.repeat)
        requests[key] = _sum(requests[key], record) if key in requests else record
    return [*batches, *requests.values()]


def _sum(one: RequestRecord, other: RequestRecord) -> RequestRecord:
    last = other if other.num_contexts else one
    kept = {name: getattr(last, name) for name in ("kept_tokens_min", "kept_tokens_mean", "kept_tokens_max")}
    sums = {name: getattr(one, name) + getattr(other, name) for name in SUMMED}
    is_warmup = one.is_warmup or other.is_warmup
    return replace(other, **sums, **kept, is_warmup=is_warmup, machine=machines_of([one, other]))
