"""A model that is passed in stays its owner's: evaluated in a training loop, and saved, as if nobody had looked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_requests import generation_requests, loglikelihood_requests, rolling_requests
from torch import nn
from transformers import AutoTokenizer, GPTNeoXForCausalLM, PreTrainedModel

from lm_eval_kvpress.harness.model import KVPress, PythiaKVPress

PRESS = {"press": "snapkv", "window_size": 8, "compression_ratio": 0.5}


def answers(lm: KVPress) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        lm.loglikelihood(loglikelihood_requests()[:8], disable_tqdm=True),
        lm.loglikelihood_rolling(rolling_requests()[1:3], disable_tqdm=True),
        lm.generate_until(generation_requests(until=[], max_gen_toks=5)[:2], disable_tqdm=True),
    )


def from_disk(model: PreTrainedModel, tokenizer: Path, folder: Path, **arguments: Any) -> KVPress:
    """The same weights saved, and read by name."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return KVPress(pretrained=str(folder), device="cpu", **arguments)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return own | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)


@pytest.fixture
def model(checkpoint_dir: Path) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM.from_pretrained(checkpoint_dir)


def step(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """One optimizer step, in training mode."""
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_two_evaluations_around_an_optimizer_step_are_of_the_weights_at_their_time(
    model: GPTNeoXForCausalLM, checkpoint_dir: Path, tmp_path: Path
) -> None:
    lm = PythiaKVPress(pretrained=model, tokenizer=str(checkpoint_dir), **PRESS)
    untrained = state(model)
    first = answers(lm)
    assert_same(state(model), untrained)
    assert first == answers(from_disk(model, checkpoint_dir, tmp_path / "first", **PRESS))
    step(model, torch.arange(1, 60)[None])
    trained = state(model)
    second = answers(lm)
    assert_same(state(model), trained)
    assert second == answers(from_disk(model, checkpoint_dir, tmp_path / "second", **PRESS))
    assert first[0] != second[0]


def test_gradients_are_those_of_a_model_that_nobody_evaluated(checkpoint_dir: Path) -> None:
    """Also of a forward that ran before the evaluation."""
    tokens, gradients = torch.arange(1, 60)[None], list[list[torch.Tensor]]()
    for evaluated in (False, True):
        model = GPTNeoXForCausalLM.from_pretrained(checkpoint_dir).train()
        loss = model(tokens, labels=tokens).loss
        if evaluated:
            answers(PythiaKVPress(pretrained=model, tokenizer=str(checkpoint_dir), **PRESS))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_dropout_is_off_while_it_answers_and_back_on_afterwards(
    model: GPTNeoXForCausalLM, checkpoint_dir: Path
) -> None:
    lm = PythiaKVPress(pretrained=model, tokenizer=str(checkpoint_dir), **PRESS)
    before = answers(lm)
    model.train()
    model.gpt_neox.emb_dropout.p = 0.5
    model.gpt_neox.layers[0].eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    assert answers(lm) == before
    assert [module.training for module in model.modules()] == modes


def test_a_failure_gives_the_weights_back(
    model: GPTNeoXForCausalLM, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, before = PythiaKVPress(pretrained=model, tokenizer=str(checkpoint_dir), **PRESS), state(model)

    def stumble(*_: Any, **__: Any) -> None:
        assert not torch.equal(model.gpt_neox.layers[0].attention.query_key_value.weight, first), "not in use"
        raise KeyboardInterrupt

    first = before["gpt_neox.layers.0.attention.query_key_value.weight"]
    monkeypatch.setattr(lm.answering, "answers", stumble)
    with pytest.raises(KeyboardInterrupt):
        answers(lm)
    assert_same(state(model), before)


def test_a_model_that_was_read_by_name_stays_prepared(checkpoint_dir: Path) -> None:
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", **PRESS)
    before = state(lm.model)
    answers(KVPress(pretrained=lm.model, tokenizer=str(checkpoint_dir), **PRESS))
    assert_same(state(lm.model), before)
    answers(lm)
    assert_same(state(lm.model), before)
