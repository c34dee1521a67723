"""Recall documents of `lm_eval_kvpress.recall` as lm-eval documents, and accuracy overall, by kind and by distance.

The four choices share one context, so a model that shares contexts prefills and compresses it once. `word` answers
are one token of the built-in tokenizer, `number` answers several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.recall import recall_documents

DISTANCES = (100, 400, 800, 1200, 1500)  # the YAML files name a metric for each
KINDS = ("word", "number")

Item = tuple[float, bool]  # a document's score, and whether the metric is about this document


def load(*, recall_seed: int, recall_per_cell: int, **metadata: Any) -> dict[str, datasets.Dataset]:
    """`recall_per_cell` documents for each distance and kind, the distances in turn, so that a few have them all.

    The names are long because lm-eval merges the model's arguments into a task's metadata: a press's `seed` must not
    choose the documents.

    Raises:
        UsageError: for a number of documents below one, or a seed that is no whole number.
    """
    _check("recall_per_cell", recall_per_cell, 1)
    _check("recall_seed", recall_seed, 0)
    cells = [
        [
            {
                "prompt": document.context + document.question,
                "choices": list(document.choices),
                "answer": document.answer,
                "value": document.choices[document.answer].strip(),
                "kind": document.kind,
                "distance": distance,
            }
            for document in recall_documents(recall_seed, per_cell=recall_per_cell, distances=[distance], kinds=[kind])
        ]
        for kind in KINDS
        for distance in DISTANCES
    ]
    return {"test": datasets.Dataset.from_list([row for rows in zip(*cells, strict=True) for row in rows])}


def _check(name: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise UsageError(f"{name}={value!r} must be a whole number of at least {lowest}")


def process_choice(document: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The choice with the highest log-likelihood is the model's."""
    chosen = max(range(len(results)), key=lambda index: results[index][0])
    return _by_cell("acc", float(chosen == document["answer"]), document)


def process_generation(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    (text,) = results
    return _by_cell("exact_match", float(text.strip() == document["value"]), document)


def _by_cell(metric: str, score: float, document: dict[str, Any]) -> dict[str, Any]:
    """The score under every name: lm-eval warns of metrics that are missing from some documents."""
    figures: dict[str, Any] = {metric: score}
    figures |= {f"{metric}_{kind}": (score, kind == document["kind"]) for kind in KINDS}
    figures |= {f"{metric}_at_{distance}": (score, distance == document["distance"]) for distance in DISTANCES}
    return figures


def share(items: Sequence[Item]) -> float | None:
    """The mean over the documents that the metric is about; None, shown as missing, where `--limit` left none."""
    scores = [score for score, is_about in items if is_about]
    return sum(scores) / len(scores) if scores else None
