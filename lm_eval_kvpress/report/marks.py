"""Which rows must not be taken at face value, and why, in words for the reader.

Every mark names a mistake that was seen in published figures. Knows tables; not how they look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lm_eval_kvpress.report.result_files import Cell, Kept
from lm_eval_kvpress.report.rows import Mark, Row, Table

FEW_DOCUMENTS = 10
NAMES_TOLD = 5
SPEEDS = {"prefill": "prefill tok/s", "decode": "decode tok/s", "ttft_sec": "TTFT", "tpot_sec": "TPOT"}
"""As the record calls them, and in words."""


def mark(tables: Sequence[Table]) -> list[Table]:
    """The tables, their rows marked."""
    return [
        replace(table, rows=tuple(replace(row, marks=tuple(_marks(row, table, tables))) for row in table.rows))
        for table in tables
    ]


def notices(table: Table) -> list[str]:
    """What is to be said of a table as a whole."""
    cells = [row.cell for row in table.rows if row.cell is not None]
    found = []
    if table.setting.is_stock:
        found.append(
            "Stock lm-eval scores each window in one forward, in which no press can change a figure. This is another "
            "protocol than this package's: do not compare across tables."
        )
    limited = [
        f"{task.num_documents} of {task.num_documents_available} documents of {task.name}"
        for task in (cells[0].tasks if cells else ())
        if (task.num_documents or 0) < (task.num_documents_available or 0)
    ]
    if limited:
        found.append(f"Run with --limit: {', '.join(limited)}.")
    scored = {key.task for key in table.metrics}
    unscored = [name for name, _ in table.documents if name not in scored]
    if unscored:
        found.append(f"No figures of {_first_names(unscored)}: --predict_only logs answers and scores none.")
    few = [f"{name} ({count})" for name, count in table.documents if count is not None and count < FEW_DOCUMENTS]
    if few and len(cells) > 1:
        found.append(f"Few documents, so intervals are rough: {', '.join(few)}.")
    unlogged = sum(any(task.samples is None for task in cell.tasks if task.num_documents) for cell in cells)
    if unlogged:
        found.append(f"{unlogged} of {len(cells)} runs did not log samples (--log_samples): no intervals for them.")
    yet_cold = [name for name in SPEEDS if any(name in cell.speed.includes_warmup for cell in cells)]
    if yet_cold:
        num_cold = sum(any(name in cell.speed.includes_warmup for name in SPEEDS) for cell in cells)
        names = ", ".join(SPEEDS[name] for name in yet_cold)
        text = f"Too little was run to leave warm-up out of {names} in {num_cold} of {len(cells)} runs: do not compare "
        found.append(f"{text}these speeds.")
    streams = [row for row in table.rows if row.cell is not None and row.cell.is_stream]
    curveless = sum(not row.curves for row in streams)
    if curveless:
        found.append(
            f"No losses by position for {curveless} of {len(streams)} runs (stream_output): absent, unfinished, or of "
            "other documents or another setting than the results."
        )
    return [*found, *_of_left_out_files(table)]


def _of_left_out_files(table: Table) -> Iterator[str]:
    older, newer = sum(row.num_older for row in table.rows), sum(row.num_newer for row in table.rows)
    if older:
        yield f"{_results(older, 'older')} left out: the setting was run again, and the newest file counts."
    if newer:
        yield (
            f"{_results(newer, 'newer')} left out, with no other figures (from a cache, an earlier run or "
            "--predict_only): the file that says more counts."
        )


def _results(count: int, age: str) -> str:
    return f"1 {age} result is" if count == 1 else f"{count} {age} results are"


def _marks(row: Row, table: Table, tables: Sequence[Table]) -> Iterator[Mark]:
    cell, baseline = row.cell, table.baseline.cell
    if cell is None:
        yield _missing_baseline(table, tables)
        return
    if not cell.press.is_none:
        yield from _of_the_press(row, cell)
    if baseline is not None and cell is not baseline:
        yield from _against(cell, baseline)
    if cell.parity is False:
        yield Mark("parity", "parity off", "At ratio 0 this run does not give what stock lm-eval gives.", True)
    if cell.unmeasured_tasks:
        text = (
            f"Nothing was measured of {_first_names(cell.unmeasured_tasks)}: answers came from a cache or an earlier "
        )
        text += "run, whose file says what was kept and how fast it was, or there was nothing to score."
        yield Mark("unmeasured", "not measured", text)
    yield from _other_tasks(cell, table)
    yield from _fewer_documents(cell, table, tables)


def _missing_baseline(table: Table, tables: Sequence[Table]) -> Mark:
    if any(row.cell is not None and row.cell.is_stream for row in table.rows):
        return Mark("baseline", "not run", "A stream always has a press: compare its budgets with each other.")
    elsewhere = any(
        other is not table and other.setting.checkpoint == table.setting.checkpoint and other.baseline.cell
        for other in tables
    )
    text = "Nobody ran press=none in this setting, so there is nothing to compare with."
    if elsewhere:
        text += " The baseline of another table was run under another protocol or on other documents."
    return Mark("baseline", "not run", text)


def _of_the_press(row: Row, cell: Cell) -> Iterator[Mark]:
    kept = [task.kept for task in cell.tasks if task.kept is not None]
    num_pressed = sum(one.num_contexts_pressed for one in kept)
    num_contexts = num_pressed + sum(one.num_contexts_unpressed for one in kept)
    num_short = sum(one.num_short_contexts for one in kept)
    if cell.rolling == "one_pass" and any(task.is_rolling for task in cell.tasks):
        text = "rolling=one_pass scores each window in one forward, which no press can act on: perplexities are those "
        yield Mark("one_pass", "one pass", text + "of the full cache.", True)
    yield from _inert(cell, kept)
    yield from _while_decoding(cell, kept)
    yield from _identical(row, acted=any(one.num_decode_compressions for one in kept))
    if num_short and num_pressed:
        text = f"{num_short} of {num_contexts} contexts were too short for the press and stayed uncompressed."
        yield Mark("short", "short contexts", text)
    notes: Counter[str] = Counter()
    for task in cell.tasks:
        notes.update(dict(task.notes))
    for note, count in notes.items():
        fell_back = "fell back" in note
        label = "fell back" if fell_back else "press note"
        yield Mark(
            "note", label, f"{_capital(note)} ({count} of {num_pressed} contexts).", fell_back and count >= num_pressed
        )


def _inert(cell: Cell, kept: Sequence[Kept]) -> Iterator[Mark]:
    """That the press acted on nothing, if it did. Where nothing was measured, nothing can be said."""
    if not kept or any(one.num_decode_compressions for one in kept):
        return
    num_pressed, num_unpressed = (
        sum(getattr(one, name) for one in kept) for name in ("num_contexts_pressed", "num_contexts_unpressed")
    )
    if "stream_budget" in dict(cell.press.arguments):
        if not any(one.num_tokens_scored_pressed for one in kept):
            text = "No document outgrew the stream's budget: nothing was evicted."
            yield Mark("inert", "kept everything", text, True)
    elif not cell.press.acts_on_prefill:
        text = "No answer grew long enough for the press to act, which it does only while text is generated."
        yield Mark("inert", "never ran", text, True)
    elif not num_pressed:
        are_short = 0 < num_unpressed == sum(one.num_short_contexts for one in kept)
        text = "No context went through the press" + (": all were too short for it." if are_short else ".")
        yield Mark("inert", "never ran", text, True)
    elif all(one.share == 1 for one in kept if one.num_contexts_pressed):
        yield Mark("inert", "kept everything", "The press kept every entry of every context.", True)


def _while_decoding(cell: Cell, kept: Sequence[Kept]) -> Iterator[Mark]:
    """On how many texts a press acted that acts as they are generated. If on none and no other acted, `_inert` says."""
    num_texts = sum(one.num_texts for one in kept)
    num_compressed = sum(one.num_texts_compressed for one in kept)
    if not cell.press.acts_on_decoding or num_compressed == num_texts:
        return
    if num_compressed:
        text = f"The press acted on {num_compressed} of {num_texts} texts; the others ended before."
        yield Mark("short", "short texts", text)
    elif any(one.num_contexts_pressed for one in kept):
        text = "No text grew long enough for the decoding press: this is its press of the prefill alone."
        yield Mark("inert", "prefill only", text, True)


def _identical(row: Row, *, acted: bool) -> Iterator[Mark]:
    """``acted`` says that entries are known to have been evicted: then it is the task that shows nothing of it."""
    if not row.answers_are_the_baselines and not _figures_are_the_baselines(row):
        return
    what = "Every logged answer equals" if row.answers_are_the_baselines else "All figures equal"
    if acted:
        why = "the press evicted entries while text was generated, and the task does not resolve it."
    elif row.answers_are_the_baselines:
        why = "the press acted on nothing."
    else:
        why = "the press acted on nothing, or the task does not resolve it."
    yield Mark("identical", "identical", f"{what} the baseline's: {why}", not acted)


def _figures_are_the_baselines(row: Row) -> bool:
    return bool(row.differences) and all(difference.value == 0 for difference in row.differences.values())


def _against(cell: Cell, baseline: Cell) -> Iterator[Mark]:
    own, other = dict(cell.versions), dict(baseline.versions)
    changed = [
        f"{name} {own[name]} (baseline {other[name]})" for name in own if other.get(name, own[name]) != own[name]
    ]
    if changed:
        yield Mark("versions", "versions", f"Run with other versions than the baseline: {', '.join(changed)}.")
    if (cell.device, cell.batch_size) != (baseline.device, baseline.batch_size):
        text = f"Run on {cell.device} in batches of {cell.batch_size}, the baseline on {baseline.device} in batches of "
        yield Mark("speed", "other speed", f"{text}{baseline.batch_size}: speeds do not compare.")


def _other_tasks(cell: Cell, table: Table) -> Iterator[Mark]:
    """Figures of tasks are compared task by task, but what was kept and how fast are means over all that a run did."""
    most = table.baseline.cell or max((row.cell for row in table.rows if row.cell), key=lambda one: len(one.tasks))
    left_out = [task.name for task in most.tasks if cell.task(task.name) is None]
    added = [task.name for task in cell.tasks if most.task(task.name) is None]
    if left_out or added:
        told = [f"{word} {_first_names(names)}" for word, names in (("without", left_out), ("also", added)) if names]
        text = f"Ran other tasks than {'the baseline' if table.baseline.cell else 'the row with most'} "
        means = "kept, KV bytes and speeds are means over its own."
        yield Mark("tasks", "other tasks", f"{text}({'; '.join(told)}): {means}")


def _first_names(names: Sequence[str]) -> str:
    """Benchmarks of many subjects have dozens."""
    rest = len(names) - NAMES_TOLD
    return ", ".join(names[:NAMES_TOLD]) + (f" and {rest} more" if rest > 0 else "")


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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
