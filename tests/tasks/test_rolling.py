"""Aggregations of rolling log-likelihoods: lm-eval's own figures, and no exception when all is scored."""

from __future__ import annotations

import importlib.util
import math
from types import ModuleType

import pytest
from lm_eval.api import metrics
from repository import ROOT

Items = list[tuple[float, int]]


@pytest.fixture(scope="module")
def rolling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rolling", ROOT / "tasks" / "kvpress_ppl" / "rolling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("items", [[(-30.0, 7), (-12.5, 3)], [(-1.0, 1)], [(0.0, 0), (-4.5, 2)]])
def test_the_figures_are_lm_evals(rolling: ModuleType, items: Items) -> None:
    assert rolling.perplexity(items) == metrics.weighted_perplexity(items)
    assert rolling.bits_per_byte(items) == metrics.bits_per_byte(items)


@pytest.mark.parametrize(
    "items, perplexity, bits",
    [
        ([(-9000.0, 1)], math.inf, 9000 / math.log(2)),
        ([(0.0, 0)], None, None),
        ([(-math.inf, 5)], math.inf, math.inf),
        ([(-math.inf, 5), (-3.0, 2)], math.inf, math.inf),
    ],
)
def test_what_overflows_is_infinite_and_what_has_no_weight_is_none(
    rolling: ModuleType, items: Items, perplexity: float | None, bits: float | None
) -> None:
    assert (rolling.perplexity(items), rolling.bits_per_byte(items)) == (perplexity, bits)
