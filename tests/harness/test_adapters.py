"""Adapters are part of what is evaluated, and a model that was passed in keeps them apart from its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_requests import loglikelihood_requests
from transformers import AutoTokenizer, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress

peft = pytest.importorskip("peft")
PRESS = {"press": "snapkv", "window_size": 8, "compression_ratio": 0.5}


def llama(num_tokens: int) -> PreTrainedModel:
    torch.manual_seed(0)
    base = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    return LlamaForCausalLM(
        LlamaConfig(**base, vocab_size=num_tokens, max_position_embeddings=512, initializer_range=0.2)
    )


def adapted(model: PreTrainedModel) -> Any:
    targets = ["query_key_value", "dense_h_to_4h"] if model.config.model_type == "gpt_neox" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, lora_dropout=0.5)
    wrapped = peft.get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:  # zero before training
            torch.nn.init.normal_(weight, std=0.2)
    return wrapped


def scores(lm: KVPress) -> list[float]:
    return [score for score, _ in lm.loglikelihood(loglikelihood_requests()[:8], disable_tqdm=True)]


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_model_with_an_adapter_is_scored_as_merged_and_keeps_both_apart(
    checkpoint_dir: Path, tmp_path: Path, kind: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    base = GPTNeoXForCausalLM.from_pretrained(checkpoint_dir) if kind == "gpt_neox" else llama(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lm = KVPress(pretrained=model, tokenizer=tokenizer, **PRESS)
    model.train()
    found = scores(lm)
    assert scores(lm) == found
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    shared = {"pretrained": str(tmp_path / "base"), "tokenizer": tokenizer, "device": "cpu", **PRESS}
    by_name = KVPress(peft=str(tmp_path / "adapter"), **shared)
    torch.testing.assert_close(found, scores(by_name), atol=1e-4, rtol=0)
    assert max(abs(a - b) for a, b in zip(found, scores(KVPress(**shared)), strict=True)) > 0.1


def test_an_adapter_that_is_no_part_of_the_weights_is_refused(checkpoint_dir: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(GPTNeoXForCausalLM.from_pretrained(checkpoint_dir), config)
    with pytest.raises(UsageError, match="cannot be merged into the model's weights"):
        KVPress(pretrained=model, tokenizer=str(checkpoint_dir))
