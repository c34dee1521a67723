"""Streams against an independent loop: keys cached before rotation, rotated by their place in the cache each step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decode_references import DenseDecoder, Layer, each_head, expected_attention
from kvpress import (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from quantized_reference import stored as as_packed
from rotation import in_turn
from transformers import GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine import online_softmax
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import stream
from lm_eval_kvpress.models.pressable import PressableModel

BUDGET = 20


def streaming_llm(num_entries: int, budget: int = BUDGET) -> StreamingLLMPress:
    return StreamingLLMPress(1 - (budget + 0.5) / num_entries, n_sink=4)


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 211, (length,), generator=generator).tolist() for length in lengths]


def losses(
    model: PressableModel,
    texts: Sequence[list[int]],
    chunk: int,
    press_for: Callable[[int], Any],
    rotate: bool = True,
    **plan: Any,
) -> list[list[float]]:
    out: list[list[float]] = [[] for _ in texts]
    for step in stream(model, texts, 0, StreamPlan(BUDGET, chunk, rotate, **plan), press_for):
        assert step.num_entries <= BUDGET
        for index, row in zip(step.documents, step.losses, strict=True):
            out[index] += row
    return out


def reference(
    model: GPTNeoXForCausalLM, text: list[int], stored: Callable[[torch.Tensor], torch.Tensor] = lambda part: part
) -> list[float]:
    """One token at a time on the untouched model, with parallel residual; sinks and the newest tokens stay.

    Args:
        stored: what is left of the key and the value of a token, ``(heads, 16)``, once it has been scored.
    """
    base, caches = model.gpt_neox, [[] for _ in model.gpt_neox.layers]  # type: ignore[var-annotated]
    out = []
    with torch.no_grad():
        for token, target in zip([0, *text], text, strict=False):
            hidden = base.embed_in(torch.tensor([[token]]))
            for layer, cache in zip(base.layers, caches, strict=True):
                attention = layer.attention
                heads = attention.query_key_value(layer.input_layernorm(hidden)).view(4, 3, 16)
                cache.append((heads[:, 1], heads[:, 2]))
                keys = torch.stack([key for key, _ in cache], dim=1)[None]  # (1, H, T, D), not rotated
                values = torch.stack([value for _, value in cache], dim=1)
                cos, sin = base.rotary_emb(hidden, torch.arange(len(cache))[None])
                queries = heads[:, 0][None, :, None].expand_as(keys)
                queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
                weights = torch.softmax((keys[0] @ queries[0, :, -1, :, None])[..., 0] * attention.scaling, dim=-1)
                mixed = (weights[:, None] @ values)[:, 0].reshape(1, 1, -1)
                cache[-1] = stored(heads[:, 1]), stored(heads[:, 2])
                hidden = hidden + attention.dense(mixed) + layer.mlp(layer.post_attention_layernorm(hidden))
                if len(cache) > BUDGET:
                    del cache[4]
            logits = model.embed_out(base.final_layer_norm(hidden))[0, 0]
            out.append(-logits.log_softmax(-1)[target].item())
    return out


@pytest.mark.parametrize("num_sinks", [None, 4], ids=["press", "in place"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_chunk_one_equals_the_reference_token_by_token(
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
    attn: str,
    num_sinks: int | None,
) -> None:
    texts = documents(90, 60, 61)
    untouched = make_neox(attn)
    expected = [reference(untouched, text) for text in texts]
    found = losses(make_pressable(attn), texts, 1, streaming_llm, num_sinks=num_sinks)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


class OneByOne(DenseDecoder):
    """Chunk 1 at original positions: evicted from after every token, with the newest hidden states known."""

    def prefill(self, tokens: Sequence[int]) -> None:
        assert not tokens
        heads = self.model.num_key_value_heads
        none = torch.zeros(heads, 0)
        self.layers = [Layer(none.bool(), none, torch.zeros(0)) for _ in self.model.attentions]
        self.position = 0

    def compress_if_due(self) -> None:
        for index, layer in enumerate(self.layers):
            del layer.hidden[: -BUDGET - 1]
            for head, places in enumerate(self.choose(self, index)):
                layer.seen[head] = False
                layer.seen[head, places] = True


def expecting(_: int) -> ExpectedAttentionPress:
    return ExpectedAttentionPress(0.5, n_future_positions=8)


def test_expected_attention_expects_queries_behind_the_newest_token(
    make_pressable: Callable[..., PressableModel],
) -> None:
    """At original positions, which are far beyond the number of cached entries; queries of a few tokens to come."""
    model, (text,) = make_pressable("eager"), documents(36)
    choose = each_head(expected_attention(8, 4), BUDGET)
    expected = [-logprob for logprob in OneByOne(model, choose, 1).logprobs([0], 1, text)]
    (found,) = losses(model, [text], 1, expecting, rotate=False, num_hidden=BUDGET + 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rotate", [True, False])
def test_queries_are_expected_from_the_next_position_on(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch, rotate: bool
) -> None:
    asked, average = list[int](), ExpectedAttentionPress.apply_avg_rope

    def spy(press: Any, module: Any, mu: Any, cov: Any, q_len: int) -> Any:
        asked.append(q_len)
        return average(press, module, mu, cov, q_len)

    monkeypatch.setattr(ExpectedAttentionPress, "apply_avg_rope", spy)
    model, (text,) = make_pressable("sdpa"), documents(56)
    losses(model, [text], 7, expecting, rotate=rotate, num_hidden=BUDGET + 7)
    in_cache = [21, *[BUDGET + 7] * 4]
    assert asked[:: len(model.attentions)] == (in_cache if rotate else [21, 28, 35, 42, 49])


BY_TOKEN = {
    "int4": Quantization("int4", group=16, layout="token"),
    "int2": Quantization("int2", group=8, layout="token", scales="float"),
    "fp8": Quantization("fp8"),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_packed_entries_are_rounded_once_as_the_references(
    make_neox: Callable[..., GPTNeoXForCausalLM], make_pressable: Callable[..., PressableModel], name: str
) -> None:
    """In float64, where an entry between two codes falls on the same side; a token is scored before it is packed.

    With full RoPE, under which the dims of a key, and so its groups, have the order of the checkpoint.
    """
    (text,), rule = documents(40), BY_TOKEN[name]

    def stored(part: torch.Tensor) -> torch.Tensor:
        one_entry = part[None, :, None]
        return as_packed(one_entry, name, by_channel=False, group=rule.group, scales=rule.scales)[0, :, 0]

    model = make_pressable(dtype=torch.float64, rotary_pct=1.0)
    expected = reference(make_neox(dtype=torch.float64, rotary_pct=1.0), text, stored)
    (found,) = losses(model, [text], 1, streaming_llm, quantization=rule)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    (plain,) = losses(model, [text], 1, streaming_llm)
    assert max(abs(one - other) for one, other in zip(found, plain, strict=True)) > 1e-3, "packing must show"


@pytest.mark.parametrize(("chunk", "rotate"), [(1, True), (7, False)])
def test_packed_documents_side_by_side_equal_one_by_one(
    make_pressable: Callable[..., PressableModel], chunk: int, rotate: bool
) -> None:
    model, texts = make_pressable("sdpa", dtype=torch.float64), documents(50, 1, 36)
    how = {"press_for": lambda _: KnormPress(0.5), "rotate": rotate, "quantization": BY_TOKEN["int4"]}
    together = losses(model, texts, chunk, **how)
    for text, found in zip(texts, together, strict=True):
        torch.testing.assert_close(found, losses(model, [text], chunk, **how)[0], atol=1e-6, rtol=0)


def test_bytes_of_a_packed_stream_are_those_of_its_codes_and_scales(
    make_pressable: Callable[..., PressableModel],
) -> None:
    model, texts = make_pressable("sdpa"), documents(70)
    plan = StreamPlan(BUDGET, 7, quantization=BY_TOKEN["int4"])
    steps = list(stream(model, texts, 0, plan, streaming_llm))
    numbers = BUDGET * 2 * 3 * 4 * 16  # keys and values, layers, heads, dims
    assert [step.cache_bytes for step in steps[3:-1]] == [numbers // 2 + numbers // 16 * 3] * (len(steps) - 4)
    assert max(step.num_entries for step in steps) == BUDGET


@pytest.mark.parametrize(
    ("chunk", "num_sinks", "rotate"),
    [(3, 4, True), (7, 4, False), (16, 4, True), (16, 4, False), (7, 0, True), (20, 0, False)],
)
def test_the_window_in_place_is_what_the_press_keeps(
    make_pressable: Callable[..., PressableModel], chunk: int, num_sinks: int, rotate: bool
) -> None:
    """Documents many times the buffer, so that the window is moved to its front again and again."""
    model, texts = make_pressable("sdpa"), documents(300, 1, 130, 19)

    def press_for(num_entries: int) -> StreamingLLMPress:
        return StreamingLLMPress(1 - (BUDGET + 0.5) / num_entries, n_sink=num_sinks)

    expected = losses(model, texts, chunk, press_for, rotate)
    found = losses(model, texts, chunk, lambda _: pytest.fail("asked the press"), rotate, num_sinks=num_sinks)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


def test_logits_of_many_documents_are_made_a_tile_at_a_time(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts, sizes = make_pressable(), documents(70, 61, 70, 44), list[int]()
    whole, logits = losses(model, texts, 16, streaming_llm), PressableModel.logits

    def counted(self: PressableModel, hidden: torch.Tensor, *columns: Any) -> torch.Tensor:
        sizes.append(len(hidden))
        return logits(self, hidden, *columns)

    monkeypatch.setattr(PressableModel, "logits", counted)
    monkeypatch.setattr(online_softmax, "TILE_BYTES", {"cpu": 10 * 4 * model.num_logits, "cuda": 0})
    found = losses(model, texts, 16, streaming_llm)
    assert max(sizes) == 10, "four documents have 64 tokens a step"
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "chunk"), in_turn(["streaming_llm", "snapkv", "tova", "keydiff", "lagkv"], [7, 1]))
def test_side_by_side_equals_one_by_one(make_pressable: Callable[..., PressableModel], name: str, chunk: int) -> None:
    presses: dict[str, Callable[[int], Any]] = {
        "streaming_llm": streaming_llm,
        "snapkv": lambda _: SnapKVPress(0.5, window_size=chunk),
        "tova": lambda _: TOVAPress(0.5),
        "keydiff": lambda _: KeyDiffPress(0.5),
        "lagkv": lambda _: LagKVPress(0.5, lag_size=5),
    }
    model, texts = make_pressable("sdpa"), documents(70, 1, 55, 56)
    together = losses(model, texts, chunk, presses[name])
    for text, found in zip(texts, together, strict=True):
        assert len(found) == len(text)
        torch.testing.assert_close(found, losses(model, [text], chunk, presses[name])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_sinks", [None, 4], ids=["press", "in place"])
@pytest.mark.parametrize("first_changed", [49, 130, 133])
def test_a_later_chunk_never_changes_an_earlier_loss(
    make_pressable: Callable[..., PressableModel], num_sinks: int | None, first_changed: int
) -> None:
    """Far enough for the window in place to be moved to its front before and after the change."""
    model, (text,) = make_pressable("sdpa"), documents(210)
    changed = copy.copy(text)
    changed[first_changed:] = reversed(changed[first_changed:])
    one, other = (losses(model, [tokens], 7, streaming_llm, num_sinks=num_sinks)[0] for tokens in (text, changed))
    assert one[:first_changed] == other[:first_changed]
    assert max(abs(a - b) for a, b in zip(one[first_changed:], other[first_changed:], strict=True)) > 1e-2
