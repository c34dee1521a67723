"""Marks: which rows must not be taken at face value, and why, in words for the reader.

Every mark names a mistake that was seen in published figures. Knows tables; not how they look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lm_eval_kvpress.report.cell import Cell, Kept, Task
from lm_eval_kvpress.report.formatting import first_names
from lm_eval_kvpress.report.rows import Row
from lm_eval_kvpress.report.tables import Table


@dataclass(frozen=True)
class Mark:
    """Why a row needs care; ``is_void`` where its figures are not those of the press that it names."""

    code: str
    label: str
    text: str
    is_void: bool = False


def row_marks(row: Row, table: Table, tables: Sequence[Table]) -> tuple[Mark, ...]:
    """The marks of a row of a table, which is one of the tables of the report."""
    if row.cell is None:
        return (_missing_baseline(table, tables),)
    return tuple(_cell_marks(row, row.cell, table, tables))


def _missing_baseline(table: Table, tables: Sequence[Table]) -> Mark:
    if any(cell.is_stream for cell in table.cells):
        return Mark("baseline", "not run", "A stream always has a press: compare its budgets with each other.")
    text = "Nobody ran press=none in this setting, so there is nothing to compare with."
    if any(
        other is not table and other.setting.checkpoint == table.setting.checkpoint and other.baseline.cell
        for other in tables
    ):
        text += (
            " The baseline of another table was run under another protocol, on other documents or with other arguments."
        )
    return Mark("baseline", "not run", text)


def _cell_marks(row: Row, cell: Cell, table: Table, tables: Sequence[Table]) -> Iterator[Mark]:
    if not cell.press.is_none:
        yield from _press_marks(row, cell)
    baseline = table.baseline.cell
    if baseline is not None and cell is not baseline:
        yield from _other_machine(cell, baseline)
    if cell.parity is False:
        yield Mark("parity", "parity off", "At ratio 0 this run does not give what stock lm-eval gives.", True)
    if cell.unmeasured_tasks:
        text = (
            f"Nothing was measured of {first_names(cell.unmeasured_tasks)}: answers came from a cache or an earlier "
            "run, whose file says what was kept and how fast it was, or there was nothing to score."
        )
        yield Mark("unmeasured", "not measured", text)
    yield from _prompts(cell)
    yield from _other_tasks(cell, table)
    yield from _fewer_documents(cell, table, tables)


def _prompts(cell: Cell) -> Iterator[Mark]:
    """Prompts that did not fit, and those that could not be divided into context and question."""
    if cut := _listed((task.num_cut, task) for task in cell.tasks):
        text = f"Prompts that did not fit lost their beginning ({cut}), and perhaps what was asked for."
        yield Mark("cut", "cut prompts", text)
    if missing := _listed((task.num_without_question, task) for task in cell.tasks):
        done = (
            "nothing of them was compressed" if cell.is_query_aware else "they were compressed with all of their text"
        )
        yield Mark("question", "no question", f"No question was found in prompts ({missing}): {done}.")
    if bare := _listed((task.num_without_context, task) for task in cell.tasks):
        text = f"Nothing stands before the question of prompts ({bare}): nothing of them was compressed."
        yield Mark("context", "no context", text)


def _listed(counts: Iterable[tuple[int, Task]]) -> str:
    return ", ".join(f"{count} of {task.name}" for count, task in counts if count)


# ---------------------------------------------------------------------------------------------- what the press did


def _press_marks(row: Row, cell: Cell) -> Iterator[Mark]:
    yield from _one_pass(cell)
    yield from _inert(cell)
    yield from _not_read(cell)
    yield from _while_decoding(cell)
    yield from _same_as_baseline(row, cell)
    yield from _short_contexts(cell)
    yield from _press_notes(cell)


def _one_pass(cell: Cell) -> Iterator[Mark]:
    if cell.rolling == "one_pass" and any(task.is_rolling for task in cell.tasks):
        text = (
            "rolling=one_pass scores each window in one forward, which no press can act on: perplexities are those "
            "of the full cache."
        )
        yield Mark("one_pass", "one pass", text, True)


def _inert(cell: Cell) -> Iterator[Mark]:
    """Whether the press acted on nothing. Where nothing was measured, nothing can be said."""
    if not cell.kept or any(kept.num_decode_compressions for kept in cell.kept):
        return
    if cell.press.has_stream_budget:
        if not any(kept.num_tokens_scored_pressed for kept in cell.kept):
            text = "No document outgrew the stream's budget: nothing was evicted."
            yield Mark("inert", "kept everything", text, True)
    elif not cell.press.evicts:
        return
    elif not cell.press.acts_on_prefill:
        text = "No answer grew long enough for the press to act, which it does only while text is generated."
        yield Mark("inert", "never ran", text, True)
    elif not _num_pressed(cell.kept):
        yield Mark("inert", "never ran", f"No context went through the press{_because_short(cell.kept)}.", True)
    elif cell.press.changes_entries:
        yield Mark("changed", "changed entries", f"What the press did to entries: {cell.press.changes_entries}.")
    elif all(kept.share == 1 for kept in cell.kept if kept.num_contexts_pressed) and not cell.press.packed_as:
        yield Mark("inert", "kept everything", "The press kept every entry of every context.", True)


def _not_read(cell: Cell) -> Iterator[Mark]:
    """Entries were removed or packed and no prediction moved: the scores are those of the full cache."""
    if not cell.press.acts_on_prefill and not cell.press.packed_as:
        return
    names = [
        task.name
        for task in cell.tasks
        if task.fidelity is not None
        and task.fidelity.kl.mean == task.fidelity.kl_max == 0
        and task.kept is not None
        and (cell.press.packed_as or (task.kept.share is not None and task.kept.share < 1))
    ]
    if names:
        done = "packed" if cell.press.packed_as else "removed"
        text = f"KL is exactly 0 where entries were {done} ({first_names(names)}): the compressed cache was not read."
        yield Mark("not_read", "not read", text, True)


def _because_short(kept_by_task: Sequence[Kept]) -> str:
    num_unpressed = sum(kept.num_contexts_unpressed for kept in kept_by_task)
    are_short = 0 < num_unpressed == sum(kept.num_short_contexts for kept in kept_by_task)
    return ": all were too short for it" if are_short else ""


def _while_decoding(cell: Cell) -> Iterator[Mark]:
    """How many texts a decoding press acted on. If it acted on none, and no other press acted, `_inert` says so."""
    num_texts = sum(kept.num_texts for kept in cell.kept)
    num_compressed = sum(kept.num_texts_compressed for kept in cell.kept)
    if not cell.press.acts_on_decoding or num_compressed == num_texts:
        return
    if num_compressed:
        text = f"The press acted on {num_compressed} of {num_texts} texts; the others ended before."
        yield Mark("short", "short texts", text)
    elif _num_pressed(cell.kept):
        text = "No text grew long enough for the decoding press: this is its press of the prefill alone."
        yield Mark("inert", "prefill only", text, True)


def _same_as_baseline(row: Row, cell: Cell) -> Iterator[Mark]:
    """Answers that are the baseline's, sample by sample. Equal figures alone say less, and other answers say nothing.

    Without a figure that both runs have, nothing was compared.
    """
    is_same = bool(row.differences) and all(difference.value == 0 for difference in row.differences.values())
    if not is_same or row.has_same_answers is False:
        return
    if row.has_same_answers is None:
        text = "All figures equal the baseline's. Whether the answers do is not known without samples (--log_samples)."
        yield Mark("same_figures", "same figures", text)
    elif _acted(cell):
        text = "Every logged answer equals the baseline's, although the press acted: lossless on these documents."
        yield Mark("lossless", "lossless on these documents", text)
    else:
        text = "Every logged answer equals the baseline's, and nothing shows that the press acted."
        yield Mark("identical", "identical", text, True)


def _acted(cell: Cell) -> bool:
    """Whether the press is known to have evicted entries, or changed them."""
    pressed = [kept for kept in cell.kept if kept.num_contexts_pressed]
    evicted = any(kept.share is not None and kept.share < 1 for kept in pressed)
    if cell.press.packed_as:
        return any(kept.bytes_unpacked and kept.bytes_allocated < kept.bytes_unpacked for kept in cell.kept)
    return evicted or bool(pressed and cell.press.changes_entries) or any(k.num_decode_compressions for k in cell.kept)


def _short_contexts(cell: Cell) -> Iterator[Mark]:
    num_pressed = _num_pressed(cell.kept)
    num_contexts = num_pressed + sum(kept.num_contexts_unpressed for kept in cell.kept)
    num_short = sum(kept.num_short_contexts for kept in cell.kept)
    if num_short and num_pressed:
        text = f"{num_short} of {num_contexts} contexts were too short for the press and stayed uncompressed."
        yield Mark("short", "short contexts", text)


def _press_notes(cell: Cell) -> Iterator[Mark]:
    """What the press itself reported, such as PyramidKV that became SnapKV."""
    num_pressed = _num_pressed(cell.kept)
    notes: Counter[str] = Counter()
    for task in cell.tasks:
        notes.update(dict(task.notes))
    for note, count in notes.items():
        fell_back = "fell back" in note
        text = f"{note[:1].upper()}{note[1:]} ({count} of {num_pressed} contexts)."
        yield Mark("note", "fell back" if fell_back else "press note", text, fell_back and count >= num_pressed)


def _num_pressed(kept_by_task: Sequence[Kept]) -> int:
    return sum(kept.num_contexts_pressed for kept in kept_by_task)


# ------------------------------------------------------------------------------------------- what the others ran


def _other_machine(cell: Cell, baseline: Cell) -> Iterator[Mark]:
    own, other = dict(cell.versions), dict(baseline.versions)
    changed = [
        f"{name} {own[name]} (baseline {other[name]})" for name in own if other.get(name, own[name]) != own[name]
    ]
    if changed:
        yield Mark("versions", "versions", f"Run with other versions than the baseline: {', '.join(changed)}.")
    own_place, other_place = ((one.speed.machine or one.device, one.batch_size) for one in (cell, baseline))
    if own_place != other_place or cell.device != baseline.device:
        text = (
            f"Run on {own_place[0]} ({cell.device}) in batches of {own_place[1]}, the baseline on {other_place[0]} "
            f"({baseline.device}) in batches of {other_place[1]}: speeds do not compare."
        )
        yield Mark("speed", "other speed", text)


def _other_tasks(cell: Cell, table: Table) -> Iterator[Mark]:
    """Figures are compared task by task, but what was kept and how fast are means over all tasks of a run."""
    reference = table.baseline.cell or max(table.cells, key=lambda other: len(other.tasks))
    missing = [task.name for task in reference.tasks if cell.task(task.name) is None]
    added = [task.name for task in cell.tasks if reference.task(task.name) is None]
    if missing or added:
        listed = [f"{word} {first_names(names)}" for word, names in (("without", missing), ("also", added)) if names]
        text = (
            f"Ran other tasks than {'the baseline' if table.baseline.cell else 'the row with most'} "
            f"({'; '.join(listed)}): kept, KV bytes and speeds are means over its own."
        )
        yield Mark("tasks", "other tasks", text)


def _fewer_documents(cell: Cell, table: Table, tables: Sequence[Table]) -> Iterator[Mark]:
    most = dict(table.documents)
    for other in tables:
        if other.setting == table.setting:
            for name, count in other.documents:
                if name in most and count is not None:
                    most[name] = max(most[name] or 0, count)
    fewer = [
        f"{task.num_documents} of {task.name}, where another table has {most[task.name]}"
        for task in cell.tasks
        if task.num_documents is not None and task.num_documents < (most[task.name] or 0)
    ]
    if fewer:
        yield Mark("documents", "fewer documents", f"Fewer documents: {'; '.join(fewer)}.")
