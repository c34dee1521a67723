"""Sampling draws each token in its proportion; arguments that cannot be sampled by are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import probabilities
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lm_eval_kvpress.engine.sampling import Sampler, sampler_for
from lm_eval_kvpress.errors import UsageError

WARPERS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 2.5}, [TemperatureLogitsWarper(2.5)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "all": (
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
    ),
}


@pytest.mark.parametrize("case", WARPERS)
def test_evenly_spread_uniforms_draw_each_token_in_its_proportion(case: str) -> None:
    """Inverse transform of an even grid: every count is right to one, no statistics needed."""
    options, processors = WARPERS[case]
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(5))
    num_draws = 20_000
    uniforms = ((torch.arange(num_draws) + 0.5) / num_draws)[torch.randperm(num_draws)]
    sampler = Sampler(LogitsProcessorList(processors), uniforms[:, None])
    ids = torch.zeros(num_draws, 1, dtype=torch.long)
    counts = sampler.choose(ids, logits.repeat(num_draws, 1), 0).bincount(minlength=30).tolist()
    for count, probability in zip(counts, probabilities(logits, **options), strict=True):
        assert count == 0 if probability == 0 else abs(count - num_draws * probability) < 1.5


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible(uniform: float) -> None:
    """The sum of fp32 probabilities can exceed 1: the last draw must not fall on a token that was filtered out."""
    logits = torch.randn(20_000, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(LogitsProcessorList([TopKLogitsWarper(9)]), torch.full((20_000, 1), uniform))
    chosen = sampler.choose(torch.zeros(20_000, 1, dtype=torch.long), logits, 0)
    allowed = TopKLogitsWarper(9)(torch.zeros(20_000, 1, dtype=torch.long), logits).isfinite()
    assert allowed.gather(1, chosen[:, None]).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"do_sample": True, "temperature": 0.0}, "temperature > 0"),
        ({"typical_p": 0.9}, "not supported: typical_p"),
    ],
)
def test_arguments_that_are_not_supported_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        sampler_for(options, [0], 1)


def test_greedy_decoding_ignores_what_only_sampling_reads() -> None:
    sampler = sampler_for({"do_sample": False, "temperature": 0.7, "top_k": 3}, [0], 1)
    assert sampler.uniforms is None and len(sampler.processors) == 0
