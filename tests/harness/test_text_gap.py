"""Texts that part at a tie do not differ, whatever made the tie; texts that part elsewhere do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_requests import ours

from lm_eval_kvpress.harness.text_gap import text_gap

UNTIL: dict[str, Any] = {"until": [], "max_gen_toks": 8}


@torch.no_grad()
def test_a_tie_between_going_on_and_ending_is_no_difference(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir)
    head, prompt, text = lm.model.get_output_embeddings().weight, "the cold river", " ran past"
    longer = text + " an old mill"
    (following,) = lm.tok_encode(longer, add_special_tokens=False)[len(lm.tok_encode(text)) :][:1]
    head[lm.eot_token_id] = head[following]
    assert text_gap(lm, prompt, text, longer, UNTIL) == pytest.approx(0, abs=1e-5)
    assert text_gap(lm, prompt, longer, text, UNTIL) == pytest.approx(0, abs=1e-5)
    head[lm.eot_token_id] *= -1
    assert 0.01 < text_gap(lm, prompt, text, longer, UNTIL) < float("inf")


@torch.no_grad()
def test_a_tie_under_a_repetition_penalty_is_no_difference(checkpoint_dir: Path) -> None:
    """Of two tokens whose penalized scores tie, one stands in the prompt; a banned token is no tie."""
    lm, penalty = ours(checkpoint_dir), 1.3
    head = lm.model.get_output_embeddings().weight
    prompt, texts = "the cold river ran past an old mill", [" ran past old", " ran past geese"]
    repeated, new = (lm.tok_encode(text, add_special_tokens=False)[-1] for text in texts)
    context = lm.tok_encode(prompt + " ran past")
    assert repeated in context and new not in context
    logit = lm.model(torch.tensor([context])).logits[0, -1, new]
    head[repeated] = head[new] * (penalty if logit > 0 else 1 / penalty)
    assert text_gap(lm, prompt, *texts, UNTIL) > 0.001
    lm.model.generation_config.repetition_penalty = penalty
    assert text_gap(lm, prompt, *texts, UNTIL) == pytest.approx(0, abs=1e-5)
    lm.model.generation_config.suppress_tokens = [new]
    assert text_gap(lm, prompt, *texts, UNTIL) == float("inf")
