"""The checks of answers pass on sound checkpoints of every kind, and a tie is no difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lm_eval_kvpress.verify import dense_reference
from lm_eval_kvpress.verify.answers import _sure_tokens, check_records, check_refusals
from lm_eval_kvpress.verify.check import Check
from lm_eval_kvpress.verify.presentation import check_projections, check_rotation
from lm_eval_kvpress.verify.subject import Subject

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def llama(**config: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    given = {"intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.2, **sizes, **config}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=512, bos_token_id=0, eos_token_id=0, **given)).eval()


def subject_of(model: LlamaForCausalLM, folder: Path) -> Subject:
    tokenizer = tiny_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return Subject.load({"pretrained": str(folder), "device": "cpu"})


def failed(check: Check) -> list[str]:
    return [f"{part.what}: {part.measured}" for part in check.parts if not part.passed]


@pytest.mark.parametrize("check", [check_projections, check_rotation])
def test_rope_that_scales_its_first_position_is_no_fault(tmp_path: Path, check: Callable[[Subject], Check]) -> None:
    subject = subject_of(llama(rope_parameters=YARN), tmp_path)
    assert subject.lm.model.base_model.rotary_emb.attention_scaling > 1.1
    assert not failed(check(subject))


@torch.inference_mode()
def test_an_answer_whose_second_token_ends_it_is_no_fault(tmp_path: Path) -> None:
    subject = subject_of(llama(), tmp_path)
    model, ends_second = subject.untouched, 0
    ids = [subject.lm.tok_encode(subject.text(24, seed=seed)) for seed in range(4)]
    last = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    for row in (0, 1, 2, 3):
        first = int(model.lm_head(last[row]).argmax())
        after = model.model(torch.tensor([[*ids[row], first]])).last_hidden_state[0, -1]
        basis = torch.linalg.qr(torch.stack(last, dim=1)).Q  # the first tokens stay
        ending = after - basis @ (basis.T @ after)
        model.lm_head.weight[0] += 60 * ending / ending.norm() / 4
        ends_second += int(model.lm_head(after).argmax()) == 0
    assert ends_second
    check = check_records(subject_of(model, tmp_path / "ends"))
    assert not failed(check)


GENERATION: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3},
    {"suppress_tokens": list(range(40, 300))},
    {"max_new_tokens": 5},
    {"no_repeat_ngram_size": 1, "begin_suppress_tokens": [5, 6]},
)


@pytest.mark.parametrize("generation", GENERATION, ids=lambda one: next(iter(one)))
def test_what_generation_config_says_is_no_fault(tmp_path: Path, generation: dict[str, Any]) -> None:
    model = llama()
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    subject = subject_of(model, tmp_path)
    assert not failed(check_records(subject))
    text = subject.text(24, seed=1)
    plain = [int(dense_reference.logits(subject.untouched, subject.lm.tok_encode(text))[-1].argmax())]
    assert len(_sure_tokens(subject, text)) > 1 or _sure_tokens(subject, text)[:1] == plain


def test_contexts_of_the_batches_check_repeat_no_token(tmp_path: Path) -> None:
    """Repeated tokens tie under knorm in the first layer, and rounding decides."""
    subject = subject_of(llama(), tmp_path)
    tokens = subject.different_tokens(subject.max_length // 2, seed=3)
    assert len(set(tokens)) == len(tokens) == 256
    assert tokens != subject.different_tokens(subject.max_length // 2, seed=4)


def test_a_checkpoint_of_a_million_positions_refuses_one_more(tmp_path: Path) -> None:
    assert not failed(check_refusals(subject_of(llama(max_position_embeddings=2**20), tmp_path)))
