"""Runs whose answers may differ are told apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoTokenizer, GPTNeoXForCausalLM

from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from lm_eval_kvpress.harness.identity import arguments_of_answers, weights_fingerprint


def test_any_weight_that_differs_is_another_checkpoint(make_neox: Callable[..., GPTNeoXForCausalLM]) -> None:
    """An adapter, or training with a frozen head, leaves the head as it was."""
    model = make_neox()
    seen = {weights_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.reshape(-1)[parameter.numel() // 2 + 1] += 0.01  # a single number
        seen.add(weights_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_rows_and_columns_that_change_places_are_another_checkpoint(
    make_neox: Callable[..., GPTNeoXForCausalLM],
) -> None:
    model = make_neox()
    before, weight = weights_fingerprint(model), model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    for dim in (0, 1):
        whole = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(whole.roll(1, dim))
        assert weights_fingerprint(model) != before
        with torch.no_grad():
            weight.copy_(whole)
    assert weights_fingerprint(model) == before


def test_arguments_that_change_no_answer_are_left_out() -> None:
    given = {"batch_size": 4, "device": "cpu", "dtype": "auto", "peft": "some/adapter", "add_bos_token": True}
    by_default = {"backend": "default", "use_fast_tokenizer": True, "enable_thinking": None, "logits_cache": False}
    assert arguments_of_answers({**given, **by_default}) == {"add_bos_token": "True", "peft": "some/adapter"}


def test_a_tokenizer_is_the_same_before_and_after_it_was_given_a_padding_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_pretrained("builtin"))
    before = arguments_of_answers({"tokenizer": tokenizer})
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert arguments_of_answers({"tokenizer": tokenizer}) == before
