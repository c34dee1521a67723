"""What was logged about each document (`samples_*.jsonl`) -> arrays that a bootstrap can resample.

Every aggregation that is resampled here is a function of a ratio of two sums over documents: a mean, a mean over the
documents that a metric is about, or a perplexity. Which one is never guessed from a name: it has to reproduce the
figure in the results file, and a metric that none reproduces has no interval.

A line repeats a document's prompt for every request, thousands of characters that are not needed. Only the line's end
is parsed: the key `"resps"` cannot occur inside a JSON string, where quotes are escaped, and what follows it is short.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import refuse_special
from lm_eval_kvpress.report.metric_values import NOT_RUN

Array = npt.NDArray[np.float64]
Aggregation = Callable[[Array], Array]
DocumentKey = tuple[int, str]  # lm-eval's doc_id and its hash of the document
Answer = int | str | None  # the most likely of several options, or a text
Sample = Mapping[str, Any]

DOC_ID = re.compile(rb'^\{"doc_id": (\d+), ')
ANSWERS = b', "resps": '
TOLERANCE = 1e-6


def _mean(ratio: Array) -> Array:
    return ratio


def _perplexity(ratio: Array) -> Array:
    return np.exp(-ratio)


def _bits(ratio: Array) -> Array:
    return -ratio / math.log(2)


AGGREGATIONS: tuple[Aggregation, ...] = (_mean, _perplexity, _bits)


@dataclass(frozen=True)
class Scores:
    """One metric of one run, a numerator and a denominator per document."""

    numerators: Array  # (documents,)
    denominators: Array  # (documents,)


@dataclass(frozen=True)
class Samples:
    """One task of one run under one filter.

    Attributes:
        documents: in the order of the arrays, each once.
        scores: by metric name.
        answers: the option or text that answers each.
        checksum: of all that the model answered.
    """

    documents: tuple[DocumentKey, ...]
    scores: dict[str, Scores]
    answers: tuple[Answer, ...]
    checksum: int


def read_samples(file: Path) -> dict[str, Samples]:
    """The samples of one file by filter.

    Raises:
        UsageError: if a line is not a whole sample.
    """
    refuse_special(file)
    by_filter: dict[str, dict[DocumentKey, Sample]] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line:
            try:
                key, sample = parse_sample(line)
                by_filter.setdefault(str(sample["filter"]), {})[key] = sample
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise UsageError(f"{file}, line {number}, is not a whole sample: run that evaluation again") from error
    try:
        return {filter: _samples(by_document) for filter, by_document in by_filter.items()}
    except (OverflowError, TypeError) as error:
        raise UsageError(f"{file} holds scores that are no numbers ({error}): run that evaluation again") from error


def parse_sample(line: bytes) -> tuple[DocumentKey, Sample]:
    """One line: its document and its sample, without the texts if the line is laid out as lm-eval does.

    Raises:
        KeyError, TypeError, ValueError: if it is not a whole sample.
    """
    start, end = DOC_ID.match(line), line.rfind(ANSWERS)
    is_laid_out = start is not None and end >= 0
    sample = json.loads(b"{" + line[end + 2 :] if is_laid_out else line)
    key = (int(start.group(1)) if start is not None and is_laid_out else sample["doc_id"], sample["doc_hash"])
    types = (int, str, list, list)
    if any(not isinstance(*one) for one in zip((*key, sample["resps"], sample.get("metrics", [])), types, strict=True)):
        raise TypeError("a part of the sample is of another type")
    if not all(isinstance(name, str) for name in sample.get("metrics", [])):
        raise TypeError("a metric has no name")
    return key, sample


def aggregation(scores: Scores, reported: float | None) -> Aggregation | None:
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


def _samples(by_document: Mapping[DocumentKey, Sample]) -> Samples:
    documents = tuple(sorted(by_document))
    samples = [by_document[key] for key in documents]
    names = dict.fromkeys(name for sample in samples for name in sample.get("metrics", ()))
    scores = {name: _scores(name, samples) for name in names}
    known = {name: one for name, one in scores.items() if one is not None}
    answers = tuple(map(_answer, samples))
    return Samples(documents, known, answers, _checksum([sample["resps"] for sample in samples]))


def _answer(sample: Sample) -> Answer:
    """The first of the most likely options, as lm-eval's ``acc`` takes it, or the text; None for other answers."""
    responses = [request[0] for request in sample["resps"] if isinstance(request, list) and request]
    if len(responses) == 1 and isinstance(responses[0], str):
        return responses[0]
    if "acc_mutual_info" in sample:  # the options once more, without their context
        responses = responses[: len(responses) // 2]
    try:
        likelihoods = [float(response[0]) for response in responses]
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return likelihoods.index(max(likelihoods)) if len(likelihoods) > 1 else None


def _scores(name: str, samples: Sequence[Sample]) -> Scores | None:
    """The scores of all documents; None for metrics of another kind, such as the lists of a corpus BLEU.

    A document that lacks the metric counts for nothing, as in lm-eval; nor does one of another length in RULER.
    """
    ratios = [_ratio(sample[name]) if name in sample else (0.0, 0.0) for sample in samples]
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios):
        return None
    both = np.asarray(known, dtype=np.float64)  # (documents, 2)
    if name.isdecimal():
        both[both[:, 0] == NOT_RUN] = 0
    return Scores(both[:, 0], both[:, 1])


def _ratio(value: Any) -> tuple[float, float] | None:
    """A document's numerator and denominator."""
    match value:
        case bool() | int() | float():
            return float(value), 1.0
        case [int() | float() as score, bool() as is_about]:
            return (float(score), 1.0) if is_about else (0.0, 0.0)
        case [int() | float() as total, int() | float() as weight]:
            return float(total), float(weight)
        case _:
            return None


def _checksum(answers: Sequence[Any]) -> int:
    return zlib.crc32(repr([zlib.crc32(json.dumps(answer).encode()) for answer in answers]).encode())
