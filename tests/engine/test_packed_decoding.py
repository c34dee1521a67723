"""Decoding presses over packed caches: the tokens of kvpress's hook with entries rounded once, in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_references import Mended, base_press, by_kvpress
from decode_runs import INTERVAL, TARGET, decoded, spec_of
from quantized_reference import stored
from references import distinct_tokens, step_logits
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.cache.packed import PackedKV, pack
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine import decode_packing, decoding
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.pressable import PressableModel

CONTEXTS = [distinct_tokens(length, 211, length) for length in (50, 29, 12)]
NUM_NEW = 20
RULES = {"int4": Quantization("int4", group=16, layout="token", scales="float"), "fp8": Quantization("fp8")}
"""Of which a number that was rounded is rounded to itself, so that the reference may round all entries each time."""


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable(dtype=torch.float64)


class Packing(Mended):
    """kvpress's hook, after which everything that is left is rounded."""

    rule = ""

    def compress(self, *given: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().compress(*given)
        return rounded(keys, self.rule), rounded(values, self.rule)


def rounded(part: Tensor, name: str) -> Tensor:
    return stored(part, name, by_channel=False, group=16, scales="float")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("press", ["knorm", "snapkv"])
def test_tokens_are_those_of_kvpress_with_entries_rounded(model: PressableModel, press: str, name: str) -> None:
    arguments = {"window_size": 4} if press == "snapkv" else {}

    def prefilled(cache: DynamicCache) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = rounded(layer.keys, name), rounded(layer.values, name)

    def expected(context: list[int]) -> list[int]:
        hook = Packing(base_press(model, press, arguments), INTERVAL, TARGET)
        hook.rule = name
        return by_kvpress(model, hook, context, 1, NUM_NEW, prefilled)[0]

    found, _ = decoded(model, CONTEXTS, spec_of(press, arguments), 1, num_new=NUM_NEW, packing=RULES[name])
    assert found == [expected(context) for context in CONTEXTS]


@pytest.mark.parametrize("press", ["adakv:knorm", "keydiff"])
def test_a_packed_batch_equals_batches_of_one(model: PressableModel, press: str) -> None:
    spec, rule = spec_of(press, {}), Quantization("int2", group=8, layout="token")
    found, _ = decoded(model, CONTEXTS, spec, 2, "snapkv", num_new=NUM_NEW, packing=rule)
    for context, text in zip(CONTEXTS, found, strict=True):
        assert decoded(model, [context], spec, 2, "snapkv", num_new=NUM_NEW, packing=rule)[0] == [text]


def test_entries_that_stay_keep_their_codes_and_new_ones_are_packed(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, before, after = BudgetKeeper.compress, list[PackedKV](), list[PackedKV]()

    def watched(self: BudgetKeeper, cache: CompressedCache) -> CompressedCache:
        kept = compress(self, cache)
        for layers, seen in ((cache.layers, before), (kept.layers, after)):
            seen += [layer for layer in layers if isinstance(layer, PackedKV)]
        return kept

    monkeypatch.setattr(BudgetKeeper, "compress", watched)
    rule = Quantization("int4", group=16, layout="token")
    decoded(model, CONTEXTS[:1], spec_of("streaming_llm", {}), 1, num_new=NUM_NEW, packing=rule)
    assert len(before) == len(after) == 3 * 3, "three layers, three times"
    for one, other in zip(before, after, strict=True):
        assert (one.newest.num_entries, other.newest.num_entries) == (INTERVAL, 0)
        assert other.packed_keys.num_entries == TARGET
        assert torch.equal(other.packed_keys.codes[:, :, :4], one.packed_keys.codes[:, :, :4]), "the sinks stay"
        numbers = 2 * 4 * TARGET * 16  # keys and values, heads, entries, dims
        assert other.num_bytes == numbers // 2 + numbers // 16 * 3


# ---------------------------------------------------------------------------------------------- without such a press


def generated(
    model: PressableModel, contexts: Sequence[Sequence[int]], held: Sequence[int], rule: Quantization
) -> list[list[int]]:
    pairs = list(zip(contexts, held, strict=True))
    caches = [prefill(model, torch.tensor([context[: len(context) - num]]), None) for context, num in pairs]
    return decoding.decode(
        model,
        stack([pack(cache, rule) for cache in caches]),
        contexts,
        num_held_back=held,
        max_new_tokens=NUM_NEW,
        sampler=Sampler(LogitsProcessorList()),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("residual", [0, 3])
def test_new_tokens_are_packed_some_at_a_time_beyond_the_newest(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch, name: str, residual: int
) -> None:
    monkeypatch.setattr(decode_packing, "PACKED_TOGETHER", 4)
    context, cache = CONTEXTS[0], DynamicCache()
    (found,) = generated(model, [context], [1], replace(RULES[name], residual=residual))

    def packed_but(num_newest: int) -> None:
        for layer in cache.layers:
            end = layer.keys.shape[2] - num_newest
            layer.keys = torch.cat([rounded(layer.keys[:, :, :end], name), layer.keys[:, :, end:]], dim=2)
            layer.values = torch.cat([rounded(layer.values[:, :, :end], name), layer.values[:, :, end:]], dim=2)

    with torch.no_grad():
        model.model(torch.tensor([context[:-1]]), past_key_values=cache)
        packed_but(residual)
        for number, token in enumerate([context[-1], *found[:-1]]):
            if number - 1 - residual > 0 and (number - 1 - residual) % 4 == 0:
                packed_but(residual)
            logits = step_logits(model, cache, token, len(context) - 1 + number)
            assert found[number] == int(logits.argmax()), number


def test_what_is_packed_does_not_depend_on_what_neighbours_hold_back(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_packing, "PACKED_TOGETHER", 4)
    held, rule = [7, 1, 3], Quantization("int2", group=8, layout="token", residual=2)
    found = generated(model, CONTEXTS, held, rule)
    assert found == [generated(model, [one], [num], rule)[0] for one, num in zip(CONTEXTS, held, strict=True)]


def test_a_long_text_holds_few_entries_in_full_precision(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_packing, "PACKED_TOGETHER", 4)
    sizes, start = list[int](), DecodeState.__init__

    def watched(self: DecodeState, *given: Any) -> None:
        start(self, *given)
        sizes.append(self.layers[0]._new.capacity)

    monkeypatch.setattr(DecodeState, "__init__", watched)
    generated(model, CONTEXTS[:1], [1], RULES["fp8"])
    assert len(sizes) == 1 + (NUM_NEW - 2) // 4 and max(sizes) <= 16 < NUM_NEW
