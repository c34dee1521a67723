"""A budget held while decoding: the tokens of kvpress's own DecodingPress, in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import kvpress
import pytest
import torch
from references import PRESSES, distinct_tokens
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.engine import decoding
from lm_eval_kvpress.engine import prefill as engine_prefill
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper, DecodingPlan
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import ratio_that_keeps

CONTEXTS = [distinct_tokens(length, 211, length + place) for place, length in enumerate((50, 29, 64, 29, 12))]
NUM_NEW, INTERVAL, TARGET = 40, 6, 20
BASES: dict[str, Callable[[float], Any]] = {
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "tova": kvpress.TOVAPress,
}
"""Presses that do not go by the place of an entry, in which kvpress's own cache is out of order."""


class Distinct(LogitsProcessor):
    """No token comes twice. Keys of one token have one norm, up to rounding: which of them a press evicts is chance."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return scores.scatter(1, input_ids, -torch.inf)


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


def decoded(
    model: PressableModel, contexts: Sequence[Sequence[int]], base: str, held: int, prefill: str = "none"
) -> tuple[list[list[int]], BudgetKeeper]:
    plan = DecodingPlan(INTERVAL, TARGET, 8, lambda length: BASES[base](ratio_that_keeps(TARGET, length)))
    keeper = BudgetKeeper(model, plan)
    caches = [engine_prefill.prefill(model, torch.tensor([c[: len(c) - held]]), PRESSES[prefill]()) for c in contexts]
    rows = decoding.decode(
        model,
        stack(caches),
        contexts,
        num_held_back=[held] * len(contexts),
        max_new_tokens=NUM_NEW,
        sampler=Sampler(LogitsProcessorList([Distinct()])),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
        keeper=keeper,
    )
    return rows, keeper


@torch.inference_mode()
def by_kvpress(model: PressableModel, context: Sequence[int], base: str, held: int) -> list[int]:
    """kvpress's hook, token by token, batch 1."""
    press = kvpress.DecodingPress(BASES[base](0.0), INTERVAL, TARGET)
    cache, ids = DynamicCache(), list(context)

    def append(logits: torch.Tensor) -> None:
        ids.append(int(Distinct()(torch.tensor([ids]), logits[:, -1]).argmax()))

    with model.presented(), press(model.model):
        out = model.model(torch.tensor([ids[: len(ids) - held]]), past_key_values=cache)
        place = len(ids) - held
        if held == 0:
            append(out.logits)
        while len(ids) < len(context) + NUM_NEW:
            out = model.model(
                torch.tensor([[ids[place]]]),
                past_key_values=cache,
                position_ids=torch.tensor([[place]]),
                cache_position=torch.tensor([place]),
                attention_mask=None,  # a single token sees all
            )
            place += 1
            append(out.logits)
    return ids[len(context) :]


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("base", BASES)
def test_tokens_are_those_of_kvpress_one_by_one(model: PressableModel, base: str, held: int) -> None:
    expected = [by_kvpress(model, context, base, held) for context in CONTEXTS]
    found, keeper = decoded(model, CONTEXTS, base, held)
    assert found == expected
    assert not any(attention._forward_pre_hooks for attention in model.attentions)
    assert len(keeper.compressions) == (NUM_NEW - 1 - (held == 0)) // INTERVAL


@pytest.mark.parametrize("prefill", ["snapkv", "pyramidkv"])
def test_a_batch_equals_batches_of_one(model: PressableModel, prefill: str) -> None:
    contexts = CONTEXTS[:4]
    found, _ = decoded(model, contexts, "knorm", 2, prefill)
    assert found == [decoded(model, [context], "knorm", 2, prefill)[0][0] for context in contexts]


class Tied:
    """Scores that differ by rounding alone, as norms of a repeated token's keys do in another batch."""

    def __init__(self, ratio: float) -> None: ...

    def score(self, module: Any, hidden: torch.Tensor, keys: torch.Tensor, *_: Any) -> torch.Tensor:
        return 1 + 1e-7 * torch.rand(keys.shape[:3])


def test_of_equal_scores_the_newest_entries_stay(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compress, num_acts = BudgetKeeper.compress, 0

    def checked(self: BudgetKeeper, cache: CompressedCache) -> CompressedCache:
        nonlocal num_acts
        kept, num_acts = compress(self, cache), num_acts + 1
        for before, after in zip(cache.layers, kept.layers, strict=True):
            assert torch.equal(after.keys, before.keys[:, :, -TARGET:])
        return kept

    monkeypatch.setitem(BASES, "tied", Tied)
    monkeypatch.setattr(BudgetKeeper, "compress", checked)
    decoded(model, CONTEXTS[:1], "tied", 1)
    assert num_acts == (NUM_NEW - 1) // INTERVAL


@pytest.mark.parametrize("held", [0, 1])
def test_what_came_after_a_rows_last_token_is_not_counted(model: PressableModel, held: int) -> None:
    _, keeper = decoded(model, CONTEXTS[:1], "knorm", held)
    before_the_first = INTERVAL + (held == 0)  # without held-back tokens the first one takes no forward
    assert keeper.counts(0, before_the_first) == (0, 0)
    assert keeper.counts(0, before_the_first + 1)[0] == 1


def test_the_budget_is_held_and_changes_the_tokens(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []
    compress = BudgetKeeper.compress

    def measured(self: BudgetKeeper, cache: CompressedCache) -> CompressedCache:
        kept = compress(self, cache)
        sizes.extend(count for row in kept.kept() for count in row)
        return kept

    monkeypatch.setattr(BudgetKeeper, "compress", measured)
    found, _ = decoded(model, CONTEXTS[:4], "knorm", 1)
    assert sizes and set(sizes) == {TARGET}
    monkeypatch.setattr(BudgetKeeper, "is_due", lambda *_: False)
    assert decoded(model, CONTEXTS[:4], "knorm", 1)[0] != found
