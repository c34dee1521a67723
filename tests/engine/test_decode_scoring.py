"""Continuations scored while the cache is compressed under them, against one token at a time over the whole cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_references import Choose, DenseDecoder, all_heads, each_head, knorm, observed, snapkv
from decode_runs import INTERVAL, TARGET, decoded, spec_of
from references import distinct_tokens, largest_difference

from lm_eval_kvpress.cache.compressed import stack
from lm_eval_kvpress.engine import prefill as engine_prefill
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_scoring import predict_while_compressing
from lm_eval_kvpress.engine.scoring import BranchScore, Pack, score
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.decoding import DecodingSpec

TEXTS = [distinct_tokens(sum(lengths), 211, sum(lengths)) for lengths in ((37, 29), (24, 1), (15, 17))]
CONTEXTS = [text[:length] for text, length in zip(TEXTS, (37, 24, 15), strict=True)]
CONTINUATIONS = [text[length:] for text, length in zip(TEXTS, (37, 24, 15), strict=True)]
CASES: dict[str, tuple[dict[str, Any], Choose]] = {
    "knorm": ({}, each_head(knorm, TARGET)),
    "snapkv": ({"window_size": 4}, each_head(snapkv(4, 5), TARGET)),
    "observed_attention": ({}, each_head(observed, TARGET)),
    "adakv:knorm": ({}, all_heads(knorm, TARGET, 0.2)),
}


def scored(
    model: PressableModel, spec: DecodingSpec, contexts: list[list[int]], continuations: list[list[int]], held: int
) -> tuple[list[BranchScore], BudgetKeeper]:
    keeper = BudgetKeeper(model, spec, range(9))
    caches = [engine_prefill.prefill(model, torch.tensor([one[: len(one) - held]]), None) for one in contexts]
    pairs = zip(contexts, continuations, strict=True)
    packs = [Pack(tuple(one[len(one) - held :]), (tuple(other),)) for one, other in pairs]
    found = predict_while_compressing(model, stack(caches), packs, keeper).scores(model)
    return [row[0] for row in found], keeper


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_whole_cache_under_a_mask(
    make_pressable: Callable[..., PressableModel], name: str, held: int
) -> None:
    model, (arguments, choose) = make_pressable("eager"), CASES[name]
    expected = [
        DenseDecoder(model, choose, INTERVAL).logprobs(context, held, continuation)
        for context, continuation in zip(CONTEXTS, CONTINUATIONS, strict=True)
    ]
    found, keeper = scored(model, spec_of(name, arguments), CONTEXTS, CONTINUATIONS, held)
    for ours, reference in zip(found, expected, strict=True):
        assert largest_difference(ours.logprobs, reference) < 2e-5
    assert len(keeper.compressions) == (29 - 1 - (held == 0)) // INTERVAL
    assert keeper.counts(1, 1) == (0, 0) and keeper.num_before(1, 1) == 1
    assert keeper.num_before(0, 29) == INTERVAL + (held == 0)


@pytest.mark.parametrize("name", ["knorm", "lagkv", "random", "compression_ratio_decoding:tova", "adakv:snapkv"])
def test_a_text_is_scored_as_it_was_generated(make_pressable: Callable[..., PressableModel], name: str) -> None:
    """Every token of a greedy text is the most likely one when the text is scored, in a batch and alone."""
    arguments = {"lagkv": {"lag_size": 6, "n_sink": 2}, "adakv:snapkv": {"window_size": 4}}.get(name, {})
    spec = spec_of(name, arguments)
    model = make_pressable()
    texts, generated = decoded(model, CONTEXTS, spec, 2, distinct=False)
    found, keeper = scored(model, spec, CONTEXTS, texts, 2)
    assert all(branch.is_greedy for branch in found)
    assert keeper.compressions == generated.compressions
    alone, _ = scored(model, spec, CONTEXTS[:1], texts[:1], 2)
    assert largest_difference(alone[0].logprobs, found[0].logprobs) < 2e-5


def test_without_an_eviction_scores_are_those_over_the_cache(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    found, keeper = scored(model, spec_of("knorm", {}, target_size=200), CONTEXTS, CONTINUATIONS, 1)
    caches = [engine_prefill.prefill(model, torch.tensor([context[:-1]]), None) for context in CONTEXTS]
    packs = [Pack((one[-1],), (tuple(other),)) for one, other in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    for ours, (reference,) in zip(found, score(model, stack(caches), packs), strict=True):
        assert largest_difference(ours.logprobs, reference.logprobs) < 2e-5
    assert not any(any(entries) for _, entries in keeper.compressions)
