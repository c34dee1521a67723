"""The processors are transformers' own, in its order; those that look at rows get rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPTNeoXForCausalLM

from lm_eval_kvpress.engine.logits_processors import OPTIONS, acting, looks_at_rows, processors_for
from lm_eval_kvpress.errors import UsageError

VALUES: dict[str, Any] = {
    "sequence_bias": [[[3], 1.0]],
    "encoder_repetition_penalty": 1.5,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[4]],
    "min_length": 9,
    "min_new_tokens": 3,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.1),
    "suppress_tokens": [7],
    "begin_suppress_tokens": [8],
    "temperature": 0.5,
    "top_k": 9,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("sampling", [True, False])
def test_processors_and_their_order_are_those_of_generate(make_neox: Any, sampling: bool) -> None:
    assert VALUES.keys() == OPTIONS.keys()
    model: GPTNeoXForCausalLM = make_neox()
    context = [11, 12, 13]
    config = GenerationConfig(**VALUES, do_sample=sampling, eos_token_id=2, max_length=len(context) + 6)
    config._eos_token_tensor = torch.tensor([2])
    ids = torch.tensor([context])
    expected = model._get_logits_processor(config, len(context), encoder_input_ids=ids, device="cpu")
    options = {**VALUES, "do_sample": sampling, "eos_token_id": [2]}
    found = processors_for(options, context, 6, torch.device("cpu"))
    assert [type(processor) for processor in found] == [type(processor) for processor in expected]
    logits = torch.randn(1, 211, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(ids, logits), expected(ids, logits), rtol=0, atol=0)


def test_a_neutral_value_and_none_make_no_processor() -> None:
    neutral = {name: option.neutral for name, option in OPTIONS.items()}
    for options in (neutral, dict.fromkeys(OPTIONS)):
        assert acting({**options, "do_sample": True, "eos_token_id": 2}) == {}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_processor_that_looks_beyond_which_ids_there_are_is_of_rows(name: str) -> None:
    """The others give the same whatever the order and number of a row's ids."""
    options = {name: VALUES[name], "do_sample": True, "eos_token_id": [2]}
    if looks_at_rows(options):
        return
    logits = torch.randn(1, 211, generator=torch.Generator().manual_seed(0))
    processors = processors_for(options, [11, 12, 13], 6, torch.device("cpu"))
    row, shuffled = torch.tensor([[11, 12, 13, 4]]), torch.tensor([[11, 11, 11, 13, 4, 12, 11]])
    assert torch.equal(processors(row, logits.clone()), processors(shuffled, logits.clone()))


def test_a_value_that_transformers_refuses_is_one_line() -> None:
    with pytest.raises(UsageError, match="top_p=2.0: "):
        processors_for({"do_sample": True, "top_p": 2.0}, [1], 1, torch.device("cpu"))
