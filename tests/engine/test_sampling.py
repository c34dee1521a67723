"""Sampling draws each token in its proportion; arguments that cannot be sampled by are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import probabilities
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lm_eval_kvpress.engine.sampling import Sampler, check_options, sampler_for
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


def test_greedy_decoding_ignores_what_only_sampling_reads() -> None:
    sampler = sampler_for({"do_sample": False, "temperature": 0.7, "top_k": 3}, [[0]], [0], 1, torch.device("cpu"))
    assert sampler.uniforms is None and len(sampler.processors) == 0 and sampler.is_repeatable


def test_each_row_is_processed_by_its_own_tokens_alone() -> None:
    """Rows of one batch have the same bigrams, but for padding and tokens to come."""
    contexts = [[5, 6, 7, 5], [9, 8, 9, 4, 9], [3]]
    sampler = sampler_for({"no_repeat_ngram_size": 2}, contexts, [0, 0, 0], 3, torch.device("cpu"))
    assert not sampler.is_repeatable
    ids = torch.tensor([[5, 5, 6, 7, 5, 6, 5, 5], [9, 8, 9, 4, 9, 1, 9, 9], [3, 3, 3, 3, 3, 3, 3, 3]])
    logits = torch.zeros(3, 10)
    logits[:, [3, 4, 6, 8]] = torch.tensor([2.0, 3.0, 5.0, 4.0])
    logits[2, 3] = 9
    assert sampler.choose(ids, logits, 0).tolist() == [8, 6, 3], "5 6; 9 8 and 9 4; nothing yet"
    assert sampler.choose(ids, logits, 1).tolist() == [6, 6, 6], "6 7; 1; 3 3"


@pytest.mark.parametrize("options", [{"bad_words_ids": [[90]]}, {"forced_eos_token_id": 90}])
def test_ids_beyond_the_vocabulary_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="do not fit: .*90"):
        check_options(options, 50)
    check_options(options, 91)
