"""Scores and tokens through packed caches are those of transformers' forwards over entries that a reference rounded.

Models are in float64 here: an entry that lies between two codes would otherwise fall on either side by rounding, and
move a score by more than the limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from quantized_reference import stored
from references import (
    PRESSES,
    REROTATES,
    clear_masks,
    distinct_tokens,
    largest_difference,
    press_run,
    step_logits,
)
from transformers import DynamicCache, LogitsProcessorList

from lm_eval_kvpress.cache import packed
from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.cache.packed import pack
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine import decoding, scoring
from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.engine.scoring import Pack
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.records.clock import Clock

TOKENS = distinct_tokens(64, 211, 3)
CONTEXT, CONTINUATION = TOKENS[:52], TOKENS[52:]
RULES = {
    "int8": Quantization("int8", group=16),
    "int4": Quantization("int4", group=16),
    "int2": Quantization("int2", group=16),
    "int4 by token": Quantization("int4", group=16, layout="token"),
    "int4 in floats": Quantization("int4", group=16, scales="float"),
    "int2 and the newest": Quantization("int2", group=8, residual=11),
    "fp8 and the newest": Quantization("fp8", residual=11),
}
NAMED = ["none", "snapkv", "pyramidkv", "key_rerotation:streaming_llm"]
GREEDY = Sampler(LogitsProcessorList())


@pytest.fixture(scope="module", params=["neox", "llama"])
def model(
    request: pytest.FixtureRequest,
    make_pressable: Callable[..., PressableModel],
    make_pressable_llama: Callable[..., PressableModel],
) -> PressableModel:
    make = make_pressable if request.param == "neox" else make_pressable_llama
    return make(dtype=torch.float64)


def cached(model: PressableModel, tokens: Sequence[int], name: str, rule: Quantization) -> CompressedCache:
    return pack(prefill(model, torch.tensor([list(tokens)]), PRESSES[name](), rerotates=name in REROTATES), rule)


def reference_cache(model: PressableModel, tokens: Sequence[int], name: str, rule: Quantization) -> DynamicCache:
    """What kvpress's own way leaves, each group moved to its grid."""
    cache = press_run(model, tokens, PRESSES[name]())
    clear_masks(model)
    rest: dict[str, Any] = {"group": rule.group, "scales": rule.scales}
    for layer in cache.layers:
        residual = min(rule.residual, layer.keys.shape[2])
        layer.keys = stored(layer.keys, rule.name, by_channel=rule.layout == "kivi", residual=residual, **rest)
        layer.values = stored(layer.values, rule.name, by_channel=False, residual=residual, **rest)
    return cache


def reference_steps(model: PressableModel, name: str, rule: Quantization, new: Sequence[int]) -> list[torch.Tensor]:
    """Logits after the last token of the context and after each of ``new``."""
    cache = reference_cache(model, CONTEXT[:-1], name, rule)
    first = cache.layers[0].keys.shape[2] if name in REROTATES else len(CONTEXT) - 1
    with torch.no_grad():
        return [step_logits(model, cache, token, first + place) for place, token in enumerate([CONTEXT[-1], *new])]


def reference_scores(model: PressableModel, name: str, rule: Quantization) -> list[float]:
    steps = reference_steps(model, name, rule, CONTINUATION[:-1])
    return [logits.log_softmax(-1)[token].item() for logits, token in zip(steps, CONTINUATION, strict=True)]


def scores(model: PressableModel, name: str, rule: Quantization) -> list[float]:
    cache = cached(model, CONTEXT[:-1], name, rule)
    ((branch,),) = scoring.score(model, cache, [Pack((CONTEXT[-1],), (tuple(CONTINUATION),))])
    return list(branch.logprobs)


@pytest.mark.parametrize(
    ("name", "how"), [*itertools.product(["none", "snapkv"], RULES), *((name, "int4") for name in NAMED[2:])]
)
def test_scores_are_those_of_rounded_entries(model: PressableModel, name: str, how: str) -> None:
    rule = RULES[how]
    assert largest_difference(scores(model, name, rule), reference_scores(model, name, rule)) < 1e-5


@pytest.mark.parametrize("name", NAMED[:2])
def test_fewer_bits_move_scores_more(model: PressableModel, name: str) -> None:
    cache = prefill(model, torch.tensor([CONTEXT[:-1]]), PRESSES[name](), rerotates=name in REROTATES)
    ((branch,),) = scoring.score(model, cache, [Pack((CONTEXT[-1],), (tuple(CONTINUATION),))])
    distances = [largest_difference(scores(model, name, RULES[bits]), branch.logprobs) for bits in RULES][:3]
    assert 1e-4 < distances[0] < distances[1] < distances[2], distances


def decoded(
    model: PressableModel, contexts: Sequence[Sequence[int]], caches: Sequence[CompressedCache], count: int = 14
) -> list[list[int]]:
    return decoding.decode(
        model,
        stack(caches),
        contexts,
        num_held_back=[1] * len(contexts),
        max_new_tokens=count,
        sampler=GREEDY,
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
    )


@pytest.mark.parametrize(("name", "how"), [("none", "int2 and the newest"), *((name, "int4") for name in NAMED)])
def test_greedy_tokens_are_those_of_rounded_entries(model: PressableModel, name: str, how: str) -> None:
    rule = RULES[how]
    (found,) = decoded(model, [CONTEXT], [cached(model, CONTEXT[:-1], name, rule)])
    steps = reference_steps(model, name, rule, found[:-1])
    assert found == [int(logits.argmax()) for logits in steps]


# --------------------------------------------------------------------------------------- batches, shared prefills

LENGTHS = (90, 41, 41, 30, 41, 0, 41, 5, 30)
CONTEXTS = [tuple(distinct_tokens(length, 211, seed)) + (7,) for seed, length in enumerate(LENGTHS)]


def compressor(model: PressableModel, press: str, *, shared: bool = False) -> Compressor:
    prefills = SharedPrefills(model) if shared else None
    clock, rule = Clock(model.device), Quantization("int2", group=16, residual=3)
    return Compressor(model, parse_press(press), short_context="keep", clock=clock, shared=prefills, quantization=rule)


def answers(
    model: PressableModel, press: str, sizes: int, **how: Any
) -> tuple[list[float], list[Any], list[list[int]]]:
    """Scores, records and texts of all contexts, so many at a time."""
    found, records, texts = [], [], []
    for start in range(0, len(CONTEXTS), sizes):
        part = [Context(tokens, 1) for tokens in CONTEXTS[start : start + sizes]]
        batch = compressor(model, press, **how).compress(part)
        packs = [Pack(query, ((3, 4, 5), (6,))) for query in batch.queries]
        rows = scoring.score(model, batch.cache, packs)
        found += [value for row in rows for branch in row for value in branch.logprobs]
        records += batch.records
        texts += decoded(model, CONTEXTS[start : start + sizes], [batch.cache], 6)
    return found, records, texts


@pytest.mark.parametrize("press", ["none", "knorm", "adakv:snapkv"])
def test_neither_batches_nor_shared_prefills_change_anything(model: PressableModel, press: str) -> None:
    found, records, texts = answers(model, press, 1)
    for sizes, shared in ((9, False), (4, True)):
        others, other_records, other_texts = answers(model, press, sizes, shared=shared)
        assert largest_difference(found, others) < 1e-9
        assert (records, texts) == (other_records, other_texts)


def test_evicted_by_masking_is_not_read(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a masking press hides may hold anything."""
    tokens, packs = torch.tensor([CONTEXT[:-1]]), [Pack((CONTEXT[-1],), (tuple(CONTINUATION),))]
    cache = prefill(model, tokens, PRESSES["adakv:snapkv"]())
    for layer in cache.layers:
        assert layer.hidden is not None and layer.hidden.any()
    before = scoring.score(model, pack(cache, RULES["int2"]), packs)
    with torch.inference_mode():
        for layer in cache.layers:
            assert layer.hidden is not None
            layer.keys.masked_fill_(layer.hidden[..., None], 50.0)
            layer.values.masked_fill_(layer.hidden[..., None], -50.0)
    assert scoring.score(model, pack(cache, RULES["int2"]), packs) == before


@pytest.mark.parametrize("press", ["none", "knorm"])
def test_records_tell_what_is_held(model: PressableModel, press: str) -> None:
    batch = compressor(model, press).compress([Context(tokens, 1) for tokens in CONTEXTS])
    for context, record in zip(CONTEXTS, batch.records, strict=True):
        alone = compressor(model, press).compress([Context(context, 1)]).cache
        assert record.bytes_allocated == sum(layer.num_bytes for layer in alone.layers)
        assert record.bytes_unpacked == sum(layer.num_entries * layer.entry_bytes for layer in alone.layers)
        assert record.bytes_before == sum(layer.entry_bytes for layer in alone.layers) * (len(context) - 1)
    longest = batch.records[0]
    assert longest.bytes_allocated < 0.2 * longest.bytes_unpacked


# ----------------------------------------------------------------------------------------------- transformers' own


def test_greedy_tokens_are_those_of_transformers_quantized_cache(
    make_pressable_llama: Callable[..., PressableModel],
) -> None:
    """With quanto, which packs by token, stores floats, and leaves new entries as they are up to a residual length."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import QuantizedCache

    model, context = make_pressable_llama(), distinct_tokens(193, 211, 5)
    rule = Quantization("int4", group=64, layout="token", scales="float")
    theirs = QuantizedCache("quanto", model.model.config, nbits=4, q_group_size=64, residual_length=128)
    (found,) = decoded(model, [context], [cached(model, context[:-1], "none", rule)], 40)
    with torch.no_grad():
        model.model(torch.tensor([context[:-1]]), past_key_values=theirs)
        expected, token = [], context[-1]
        for place in range(40):
            token = int(step_logits(model, theirs, token, len(context) - 1 + place).argmax())  # type: ignore[arg-type]
            expected.append(token)
    assert found == expected
    plain = pack_nothing(model, context)
    assert plain != found, "quantization must show"


def pack_nothing(model: PressableModel, context: Sequence[int]) -> list[int]:
    (found,) = decoded(model, [context], [prefill(model, torch.tensor([context[:-1]]), None)], 40)
    return found


# -------------------------------------------------------------------------------------------------- faults are seen


def test_fault_groups_of_another_axis(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, right = reference_scores(model, "none", RULES["int4"]), packed.quantized.pack
    swapped = lambda *given, by_channel, ignored: right(*given, by_channel=not by_channel, ignored=ignored)  # noqa: E731
    monkeypatch.setattr(packed.quantized, "pack", swapped)
    assert largest_difference(scores(model, "none", RULES["int4"]), expected) > 1e-3
