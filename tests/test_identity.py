"""Runs whose answers may differ are told apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GPTNeoXForCausalLM

from lm_eval_kvpress.identity import arguments_of_answers, weights_fingerprint


def test_any_weight_that_differs_is_another_checkpoint(make_neox: Callable[..., GPTNeoXForCausalLM]) -> None:
    """An adapter, or training with a frozen head, leaves the head as it was."""
    model = make_neox()
    seen = {weights_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.01)
        seen.add(weights_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_arguments_that_change_no_answer_are_left_out() -> None:
    given = {"batch_size": 4, "device": "cpu", "dtype": "auto", "peft": "some/adapter", "add_bos_token": True}
    assert arguments_of_answers(given) == {"add_bos_token": "True", "peft": "some/adapter"}
