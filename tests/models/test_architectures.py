"""Every press on every architecture that is named keeps what kvpress by itself keeps on the untouched model."""

from __future__ import annotations

from typing import Any

import kvpress
import pytest
import torch
from conftest import WordTokenizer
from kvpress.presses import kvzip_press
from press_cases import NUM_LAYERS, PRESSES, run, spec_for, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.harness.tokenization import lend_tokenizer
from lm_eval_kvpress.models.architectures import ARCHITECTURES, present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.replay import ReplayedKVzipPress
from lm_eval_kvpress.presses.spec import PressSpec

LENGTH = 97


def tiny(architecture: str, attention: str) -> PreTrainedModel:
    """A model with random weights; the same arguments give the same ones, and no two share a config."""
    config = AutoConfig.for_model(
        architecture,
        vocab_size=211,
        hidden_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **({"head_dim": 8} if architecture == "qwen3" else {}),  # 128 by default, and the others derive it
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def presented(model: PreTrainedModel) -> PressableModel:
    return lend_tokenizer(present(model, fast=False), WordTokenizer())


def by_kvpress(model: PreTrainedModel, spec: PressSpec, context: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Keys and values of every layer, and the marks of a press that masks, after kvpress's own hooks on a forward."""
    cache, press = DynamicCache(), spec.build(context.shape[1])
    if isinstance(press, ReplayedKVzipPress):
        press = kvpress.KVzipPress(
            *(press.compression_ratio, press.layerwise, press.n_sink, press.kvzip_plus_normalization, press.chunk_size)
        )
    model.config.head_dim = model.model.layers[0].self_attn.head_dim  # kvpress reads it, Qwen2 and Phi-3 lack it
    with torch.random.fork_rng([]), torch.inference_mode(), press(model):
        torch.manual_seed(7)
        model.model(input_ids=context, past_key_values=cache, use_cache=True)
    marks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return [(layer.keys, layer.values) for layer in cache.layers], marks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_press_keeps_what_kvpress_keeps_by_itself(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kvpress alone cannot run GPTNeoX: there every press runs, and other tests say what it keeps."""
    monkeypatch.setattr(kvzip_press.AutoTokenizer, "from_pretrained", lambda name: WordTokenizer())
    context = tokens(1, LENGTH)
    models = {attention: presented(tiny(architecture, attention)) for attention in ("sdpa", "eager")}
    untouched = {attention: tiny(architecture, attention) for attention in models}
    for spec in [*map(spec_for, PRESSES), parse_press("kvzip_plus", {"chunk_size": 40, "layerwise": True})]:
        if spec.statistics is not None:  # of models of another shape
            continue
        attention = spec.attn_implementation or "sdpa"
        cache = run(models[attention], spec, context)
        if architecture != "gpt_neox":
            compare(cache, *by_kvpress(untouched[attention], spec, context), spec.name)
        assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in cache.layers), spec.name


def compare(cache: CompressedCache, states: list[Any], marks: list[Any], name: str) -> None:
    for layer, (keys, values), marked in zip(cache.layers, states, marks, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values), name
        hidden = torch.zeros(keys.shape[:3], dtype=torch.bool)
        if marked is not None:
            hidden[tuple(marked)] = True
        assert torch.equal(torch.zeros_like(hidden) if layer.hidden is None else layer.hidden, hidden), name
