"""Percentile bootstrap: the one bootstrap of records, reports, benchmarks and studies; and the interval of a share.

Differences to a baseline are paired over documents. Both runs answered the same documents, so a resample draws
documents and takes both runs' answers to each. A document that is hard is hard for both, which cancels. The intervals
are those of ``scipy.stats.bootstrap(paired=True, method="percentile")``, for all runs of a table at once: one matrix of
resample counts times their scores.

Knows arrays only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
TAILS = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
SEED = 20260
NORMAL_95 = 1.959964  # standard errors to either side
MAX_COUNTS = 4_000_000  # held at once


def paired_intervals(
    numerators: Array, denominators: Array, baseline: int, aggregate: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """95 % intervals of ``aggregate(run) - aggregate(baseline)`` for every run.

    Args:
        numerators, denominators: (documents, runs); a run's figure is ``aggregate(sum / sum)``.
        baseline: the column of the run that the others are compared with.
        aggregate: elementwise, from a ratio to the figure.

    Returns:
        Lower and upper bounds, (runs,); NaN where no resample has a document that the metric is about.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        blocks = [
            aggregate((counts @ numerators) / (counts @ denominators))
            for counts in _resamples(len(numerators))  # (resamples, documents)
        ]
        figures = np.concatenate(blocks)
        differences = figures - figures[:, baseline : baseline + 1]  # (resamples, runs)
    if np.isnan(differences).any():
        low, high = (_nan_quantile(differences, tail) for tail in TAILS)
    else:
        low, high = np.quantile(differences, TAILS, axis=0)
    return low, high


def share_interval(num: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of documents (Wilson, J. Am. Stat. Assoc. 22, 1927).

    A bootstrap of 0 of 30 documents says 0 to 0, however many of the others have the property.
    """
    square = NORMAL_95**2
    middle = (num + square / 2) / (total + square)
    reach = math.sqrt(square * num * (total - num) / total + square**2 / 4) / (total + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def interval(
    values: Array, statistic: Callable[..., Array], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a statistic of one sample.

    Args:
        values: (n,).
        statistic: such as ``np.median``; takes (resamples, n) and ``axis=1``.
    """
    drawn = np.random.default_rng(seed).choice(values, size=(num_resamples, len(values)))
    low, high = np.quantile(statistic(drawn, axis=1), TAILS)
    return float(low), float(high)


def _resamples(num_documents: int) -> Iterator[Array]:
    """How often each resample draws each document, a block of resamples at a time: (resamples, documents).

    The seed is fixed, so that every metric is resampled over the same draws and a report can be repeated.
    """
    draws = np.random.default_rng(SEED)
    shares = np.full(num_documents, 1 / num_documents)
    block = max(1, MAX_COUNTS // num_documents)
    for start in range(0, NUM_RESAMPLES, block):
        size = min(block, NUM_RESAMPLES - start)
        yield draws.multinomial(num_documents, shares, size=size).astype(np.float64)


def _nan_quantile(differences: Array, tail: float) -> Array:
    """A quantile per run, over the resamples that have a figure."""
    columns = [column[~np.isnan(column)] for column in differences.T]
    return np.array([np.quantile(column, tail) if len(column) else np.nan for column in columns])
