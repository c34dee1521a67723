"""The columns of what became of answers beside the baseline's, over all tasks whose samples both runs logged."""

from __future__ import annotations

from collections.abc import Callable

from lm_eval_kvpress.bootstrap import share_interval
from lm_eval_kvpress.report.changes import Changes
from lm_eval_kvpress.report.column import Column
from lm_eval_kvpress.report.fidelity import Bounds
from lm_eval_kvpress.report.formatting import Kind, Value
from lm_eval_kvpress.report.rows import Row

ANSWERS = "Answers"
Count = Callable[[Changes], int]


def _share(key: str, title: str, part: Count, whole: Count, text: str, *, higher_is_better: bool) -> Column:
    def value(row: Row) -> Value:
        total = whole(row.changes)
        return part(row.changes) / total if total else None

    def bounds(row: Row) -> Bounds | None:
        total = whole(row.changes)
        return share_interval(part(row.changes), total) if total > 1 else None

    return Column(key, title, ANSWERS, Kind.SHARE, value, text, higher_is_better, is_main=False, bounds=bounds)


def _mean(key: str, title: str, part: Count, whole: Count, text: str, better: bool | None) -> Column:
    def value(row: Row) -> Value:
        total = whole(row.changes)
        return part(row.changes) / total if total else None

    return Column(key, title, ANSWERS, Kind.METRIC, value, text, better, is_main=False)


CHANGES = (
    _share(
        "right_to_wrong",
        "Right → wrong",
        lambda changes: changes.num_lost,
        lambda changes: changes.num_judged,
        "Share of documents that the baseline answers right and this run wrong, by the leading metric.",
        higher_is_better=False,
    ),
    _share(
        "wrong_to_right",
        "Wrong → right",
        lambda changes: changes.num_won,
        lambda changes: changes.num_judged,
        "Share of documents that the baseline answers wrong and this run right.",
        higher_is_better=True,
    ),
    _share(
        "option_changed",
        "Other option",
        lambda changes: changes.num_moved,
        lambda changes: changes.num_choices,
        "Share of documents with several options of which another one than the baseline's is most likely.",
        higher_is_better=False,
    ),
    _share(
        "texts_identical",
        "Same text",
        lambda changes: changes.num_same_texts,
        lambda changes: changes.num_texts,
        "Share of generated texts that are the baseline's own.",
        higher_is_better=True,
    ),
    _mean(
        "words_before_change",
        "Words before change",
        lambda changes: changes.num_words_before,
        lambda changes: changes.num_texts - changes.num_same_texts,
        "Words before the first difference from the baseline's text, mean over texts that differ.",
        True,
    ),
    _mean(
        "words_added",
        "Words added",
        lambda changes: changes.num_words_added,
        lambda changes: changes.num_texts,
        "Words of a generated text less those of the baseline's, mean.",
        None,
    ),
)
