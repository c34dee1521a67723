"""What was logged about each document (`samples_*.jsonl`) -> arrays that a bootstrap can resample.

Every aggregation that is resampled here is a function of a ratio of two sums over documents: a mean, a mean over the
documents that a metric is about, or a perplexity. Which one is never guessed from a name: it has to reproduce the
figure in the results file, and a metric that none reproduces has no interval.

A line repeats a document's prompt for every request, thousands of characters that are not needed. Only its end is
parsed: the key `"resps"` cannot occur inside a JSON string, where quotes are escaped, and what follows it is short.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_eval_kvpress.report.result_files import ResultsError

Array = npt.NDArray[np.float64]
DocumentKey = tuple[int, str]  # lm-eval's doc_id and its hash of the document

DOC_ID = re.compile(rb'^\{"doc_id": (\d+), ')
ANSWERS = b', "resps": '
TOLERANCE = 1e-6


def _mean(ratio: Array) -> Array:
    return ratio


def _perplexity(ratio: Array) -> Array:
    return np.exp(-ratio)


def _bits(ratio: Array) -> Array:
    return -ratio / math.log(2)


AGGREGATIONS: tuple[Callable[[Array], Array], ...] = (_mean, _perplexity, _bits)


@dataclass(frozen=True)
class Scores:
    """One metric of one run, a numerator and a denominator per document."""

    numerators: Array  # (documents,)
    denominators: Array  # (documents,)

    def take(self, indices: npt.NDArray[np.int64]) -> Scores:
        return Scores(self.numerators[indices], self.denominators[indices])


@dataclass(frozen=True)
class Samples:
    """One task of one run under one filter.

    Attributes:
        documents: in the order of the arrays, each once.
        scores: by metric name.
        answers: a checksum of what the model answered to all of them.
    """

    documents: tuple[DocumentKey, ...]
    scores: dict[str, Scores]
    answers: int


def read_samples(file: Path) -> dict[str, Samples]:
    """By filter.

    Raises:
        ResultsError: if a line is not whole JSON.
    """
    lines: dict[str, dict[DocumentKey, tuple[dict[str, Any], int]]] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line:
            try:
                key, sample = _parse(line)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ResultsError(
                    f"{file}, line {number}, is not a whole sample: run that evaluation again"
                ) from error
            answer = zlib.crc32(json.dumps(sample["resps"]).encode())
            lines.setdefault(str(sample["filter"]), {})[key] = (sample, answer)
    return {filter: _samples(by_document) for filter, by_document in lines.items()}


def _parse(line: bytes) -> tuple[DocumentKey, dict[str, Any]]:
    """A document's key and its sample, without the texts where the line is laid out as lm-eval does."""
    start, end = DOC_ID.match(line), line.rfind(ANSWERS)
    if start is None or end < 0:
        sample = json.loads(line)
        return (sample["doc_id"], sample["doc_hash"]), sample
    sample = json.loads(b"{" + line[end + 2 :])
    return (int(start.group(1)), sample["doc_hash"]), sample


def _samples(by_document: dict[DocumentKey, tuple[dict[str, Any], int]]) -> Samples:
    documents = tuple(sorted(by_document))
    samples = [by_document[key][0] for key in documents]
    checksum = zlib.crc32(repr([by_document[key][1] for key in documents]).encode())
    scores = {}
    for name in samples[0].get("metrics", ()):
        pairs = [_pair(sample.get(name)) for sample in samples]
        known = [pair for pair in pairs if pair is not None]
        if len(known) == len(pairs):
            both = np.asarray(known, dtype=np.float64)
            scores[name] = Scores(both[:, 0], both[:, 1])
    return Samples(documents, scores, checksum)


def _pair(value: Any) -> tuple[float, float] | None:
    """A document's numerator and denominator. None for metrics of another kind, such as the lists of a corpus BLEU."""
    match value:
        case bool() | int() | float():
            return float(value), 1.0
        case [int() | float() as score, bool() as is_about]:
            return (float(score), 1.0) if is_about else (0.0, 0.0)
        case [int() | float() as total, int() | float() as weight]:
            return float(total), float(weight)
        case _:
            return None


def aggregation(scores: Scores, reported: float | None) -> Callable[[Array], Array] | None:
    """The aggregation that makes the reported figure from these scores, or None."""
    weight = scores.denominators.sum()
    if reported is None or not math.isfinite(reported) or weight == 0:
        return None
    ratio = np.asarray(scores.numerators.sum() / weight)
    with np.errstate(over="ignore"):
        for aggregate in AGGREGATIONS:
            if math.isclose(float(aggregate(ratio)), reported, rel_tol=TOLERANCE, abs_tol=TOLERANCE**2):
                return aggregate
    return None
