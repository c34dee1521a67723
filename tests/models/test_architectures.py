"""Every architecture that is named: presses keep what kvpress by itself keeps, and scores are those of a dense mask.

The dense reference is the untouched model, run by transformers with attention and mask written out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import kvpress
import pytest
import torch
from conftest import WordTokenizer
from kvpress.presses import kvzip_press
from press_cases import PRESSES, run, spec_for, tokens
from small_models import TWINS, pressable, tiny, twin
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.scoring import Pack, score
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models import partial_rope
from lm_eval_kvpress.models.architectures import ARCHITECTURES, check_config, present
from lm_eval_kvpress.models.positions import Positions
from lm_eval_kvpress.presses.kvcompose import ReplayedKVComposePress, UnstructuredKVComposePress
from lm_eval_kvpress.presses.kvgrad import ReplayedKVgradPress
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.replay import ReplayedKVzipPress
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.verify import press_formulas
from lm_eval_kvpress.verify.dense_reference import attended, log_probabilities
from lm_eval_kvpress.verify.kept import evicted_entries, full_cache

LENGTH = 97


REPLAYS: dict[type, type[kvpress.BasePress]] = {
    ReplayedKVzipPress: kvpress.KVzipPress,
    ReplayedKVgradPress: kvpress.KVgradPress,
    ReplayedKVComposePress: kvpress.KVComposePress,
    UnstructuredKVComposePress: kvpress.KVComposePress,
}


def kvpress_own(press: Any) -> Any:
    """kvpress's class in place of ours, where ours finds tokenizer and cache by another way."""
    if type(press) not in REPLAYS:
        return press
    given = {field.name: getattr(press, field.name) for field in dataclasses.fields(press) if field.init}
    return REPLAYS[type(press)](**given)


def by_kvpress(model: PreTrainedModel, spec: PressSpec, context: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Keys and values of every layer, and the marks of a press that masks, after kvpress's own hooks on a forward.

    kvpress leaves the replay of ``kvcompose_unstructured`` in the cache; those entries are cut off here.
    """
    cache, press = DynamicCache(), kvpress_own(spec.build(context.shape[1]))
    model.config.head_dim = model.model.layers[0].self_attn.head_dim  # kvpress reads it, Qwen2 and Phi-3 lack it
    with torch.random.fork_rng([]), torch.inference_mode(), press(model):
        torch.manual_seed(7)
        model.model(input_ids=context, past_key_values=cache, use_cache=True)
    marks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return [(layer.keys[:, :, :LENGTH], layer.values[:, :, :LENGTH]) for layer in cache.layers], marks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_press_keeps_what_kvpress_keeps_by_itself(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All on a Llama, a third on each other. kvpress alone cannot run GPTNeoX: other tests say what is kept there."""
    monkeypatch.setattr(kvzip_press.AutoTokenizer, "from_pretrained", lambda name: WordTokenizer())
    context, shape = tokens(1, LENGTH), TWINS.get(architecture, {})
    models = {attention: pressable(tiny(architecture, attention, **shape)) for attention in ("sdpa", "eager")}
    untouched = {attention: twin(architecture, attention) for attention in models}
    turn = list(ARCHITECTURES).index(architecture) % 3
    names = list(PRESSES) if architecture == "llama" else list(PRESSES)[turn::3]
    for spec in [*map(spec_for, names), parse_press("kvzip_plus", {"chunk_size": 40, "layerwise": True})]:
        if spec.statistics is not None:  # of models of another shape
            continue
        attention = spec.attn_implementation or ("eager" if spec.name.startswith("kvcompose") else "sdpa")
        cache, alone = run(models[attention], spec, context), untouched[attention]
        if alone is not None:
            compare(cache, *by_kvpress(alone, spec, context), spec.name)
        assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in cache.layers), spec.name


def compare(cache: CompressedCache, states: list[Any], marks: list[Any], name: str) -> None:
    for layer, (keys, values), marked in zip(cache.layers, states, marks, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values), name
        hidden = torch.zeros(keys.shape[:3], dtype=torch.bool)
        if marked is not None:
            hidden[tuple(marked)] = True
        assert torch.equal(torch.zeros_like(hidden) if layer.hidden is None else layer.hidden, hidden), name


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{architecture: (architecture, {}) for architecture in ARCHITECTURES},
    "gpt_neox that rotates all": ("gpt_neox", {"rotary_pct": 1.0}),
    "phi without norms": ("phi", {"qk_layernorm": False, "partial_rotary_factor": 0.25}),
    "stablelm in sequence": ("stablelm", {"qk_layernorm": False, "use_parallel_residual": False}),
    "qwen3_moe with dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}),
}
LAWS: dict[str, dict[str, Any]] = {
    "none": {},
    "snapkv": {"compression_ratio": 0.6, "window_size": 8},
    "pyramidkv": {"compression_ratio": 0.5, "window_size": 4},
    "knorm": {"compression_ratio": 0.0},
    "adakv:snapkv": {"compression_ratio": 0.5, "window_size": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_a_dense_mask_and_snapkv_keeps_what_the_attention_says(variant: str) -> None:
    architecture, shape = VARIANTS[variant]
    untouched, model = tiny(architecture, **shape), pressable(tiny(architecture, **shape))
    ids = tokens(1, 80)[0].tolist()
    context, query, branches = ids[:60], tuple(ids[60:63]), (tuple(ids[63:75]), tuple(ids[70:80]))
    full, inside = full_cache(model.model, context), attended(untouched, context)
    tolerance = 1e-5 * untouched(torch.tensor([ids])).logits.abs().max().item()
    for name, arguments in LAWS.items():
        spec = parse_press(name, arguments)
        cache = prefill(model, torch.tensor([context]), spec.build(len(context)))
        evicted = [
            evicted_entries(layer, entries.keys[0], entries.values[0])
            for layer, entries in zip(cache.layers, full.layers, strict=True)
        ]
        assert name == "knorm" or bool(sum(map(torch.sum, evicted))) == (name != "none"), name
        if name == "snapkv":
            wanted = [press_formulas.scores(name, spec.arguments, layer.weights, layer.keys) for layer in inside]
            assert max(map(press_formulas.regret, wanted, evicted)) < 1e-3
        for branch, found in zip(branches, score(model, cache, [Pack(query, branches)])[0], strict=True):
            expected = log_probabilities(untouched, [*context, *query, *branch], evicted)[-len(branch) :]
            difference = (torch.tensor(found.logprobs) - expected).abs().max().item()
            assert difference < tolerance, (name, difference, tolerance)


@pytest.mark.parametrize("architecture", ["phi", "stablelm"])
def test_a_change_of_basis_changes_no_logit_and_is_undone_to_the_bit(architecture: str) -> None:
    model, ids = tiny(architecture), tokens(2, 50)
    weights, before = {name: weight.clone() for name, weight in model.state_dict().items()}, model(ids).logits
    own = "model.layers.1.self_attn.q_proj.weight"
    held = present(model, for_good=False)
    with held.in_use():
        assert not torch.equal(model.get_parameter(own), weights[own])
        torch.testing.assert_close(model(ids).logits, before, atol=2e-5, rtol=0)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)
    for _ in range(2):
        partial_rope.present(model)
        torch.testing.assert_close(model(ids).logits, before, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["olmo2", "phi", "qwen3_moe", "stablelm"])
def test_a_presented_model_computes_what_it_did_and_nothing_is_left_on_it(architecture: str) -> None:
    model, ids = tiny(architecture), tokens(1, 50)
    held = present(model)
    before, own = model(ids).logits, [set(attention.__dict__) for attention in held.attentions]
    with held.presented():
        torch.testing.assert_close(model(ids).logits, before, atol=2e-5, rtol=0)
    assert [set(attention.__dict__) for attention in held.attentions] == own


def test_an_architecture_that_could_not_be_exact_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="'gemma3_text' is refused: .*window of the newest tokens") as caught:
        check_config(AutoConfig.for_model("gemma3_text"), Positions(512))
    assert "\n" not in str(caught.value)
