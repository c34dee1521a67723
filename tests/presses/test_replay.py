"""KVzip keeps what the attention of an untouched model says, in one pass over context and replay."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from conftest import WordTokenizer, tiny_llama, tiny_neox
from press_cases import tokens
from transformers import PreTrainedModel

from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.tokenization import lend_tokenizer
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.replay import ReplayedKVzipPress
from lm_eval_kvpress.records.clock import Clock

PROMPT, LATER_PROMPT = (
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with",
)


def attention_of_replays(model: PreTrainedModel, context: list[int], chunk: int) -> torch.Tensor:
    """By the untouched model, eager: the most that any query of a chunk's replay gives each entry, ``(L, K, T)``.

    The weights are those among sinks, the chunk, and the replay itself.
    """
    encode, num_kv_heads = WordTokenizer().encode, getattr(model.config, "num_key_value_heads", 4)
    scores = torch.zeros(model.config.num_hidden_layers, num_kv_heads, len(context))
    for start in range(0, len(context), chunk):
        part, before = context[start : start + chunk], context[max(0, start - 8) : start]
        prompt = [*encode(PROMPT if start == 0 else LATER_PROMPT)[0].tolist(), *(before if start else [])]
        replay = [*prompt, *encode("\n")[0].tolist(), *part]
        with torch.inference_mode():
            found = model(torch.tensor([[*context, *replay]]), output_attentions=True).attentions
        own = torch.arange(len(context), len(context) + len(replay))
        chunk_places = torch.arange(start, start + len(part))
        seen = torch.cat([torch.arange(min(4, start)), chunk_places, own])
        for layer, weights in enumerate(found):
            among = weights[0][:, own][..., seen]
            among = among / among.sum(dim=-1, keepdim=True)
            first = min(4, start)
            by_head = among[..., first : first + len(part)].amax(dim=1)  # (H, chunk)
            scores[layer, :, chunk_places] = by_head.unflatten(0, (num_kv_heads, -1)).amax(dim=1)
    return scores


@pytest.mark.parametrize("chunk", [2048, 25])
@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("layerwise", [False, True])
def test_kvzip_hides_what_a_replay_attends_to_least(
    make: Callable[..., PreTrainedModel], chunk: int, layerwise: bool
) -> None:
    context = tokens(1, 61)
    scores = attention_of_replays(make("eager"), context[0].tolist(), chunk)
    scores[..., :4] = torch.inf
    model = lend_tokenizer(present(make()), WordTokenizer())
    spec = parse_press("kvzip", {"compression_ratio": 0.6, "chunk_size": chunk, "layerwise": layerwise})
    hidden = torch.cat([layer.hidden for layer in prefill(model, context, spec.build(61)).layers])  # (L, K, T)
    for group, hidden_group in zip(scores, hidden, strict=True) if layerwise else [(scores, hidden)]:
        num_hidden = int(group.numel() * 0.6)
        expected = torch.zeros(group.numel(), dtype=torch.bool)
        expected[group.flatten().argsort()[:num_hidden]] = True
        assert torch.equal(hidden_group.flatten(), expected)


@pytest.mark.parametrize("press", ["kvzip", "kvgrad", "kvcompose", "kvcompose_unstructured"])
def test_a_replay_beyond_the_trained_positions_is_refused_in_one_line(
    make_pressable: Callable[..., PressableModel], press: str
) -> None:
    model = make_pressable(max_positions=128)
    prefill(model, tokens(1, 40), parse_press(press).build(40))
    says = f"press={press.partition('_')[0]} replays .* positions, and the model has 128 for it: lower max_length"
    with pytest.raises(UsageError, match=says) as caught:
        prefill(model, tokens(1, 80), parse_press(press).build(80))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("press", ["kvgrad", "kvcompose", "kvcompose_unstructured"])
def test_a_replay_leaves_the_model_as_it_was(make_pressable: Callable[..., PressableModel], press: str) -> None:
    model = make_pressable()
    before = [(parameter.requires_grad, parameter.grad, parameter.clone()) for parameter in model.model.parameters()]
    attention = model.model.config._attn_implementation
    cache = prefill(model, tokens(1, 40), parse_press(press, {"compression_ratio": 0.4}).build(40))
    assert model.model.config._attn_implementation == attention
    assert all(layer.keys.shape[2] <= 40 and not layer.keys.requires_grad for layer in cache.layers)
    assert sum(cache.kept()[0]) == pytest.approx(0.6 * 40 * 3, abs=1)
    for parameter, (requires_grad, grad, weights) in zip(model.model.parameters(), before, strict=True):
        assert parameter.requires_grad == requires_grad and parameter.grad is grad
        assert torch.equal(parameter, weights)


def test_the_time_of_a_replay_is_booked_as_press(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = ReplayedKVzipPress.replay

    def slow_replay(press: ReplayedKVzipPress, model: PreTrainedModel) -> None:
        time.sleep(0.3)
        replay(press, model)

    monkeypatch.setattr(ReplayedKVzipPress, "replay", slow_replay)
    model, clock = make_pressable(), Clock(torch.device("cpu"))
    compressor = Compressor(model, parse_press("kvzip"), short_context="keep", clock=clock)
    compressor.compress([Context(tuple(tokens(1, 40)[0].tolist()), 1)])
    seconds = {timing.phase: timing.seconds for timing in clock.take()}
    assert seconds["press"] >= 0.3 > seconds["prefill"]
