"""A budget held while decoding: the tokens of kvpress's own DecodingPress, in any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kvpress
import pytest
import torch
from decode_references import Mended, MendedRatio, Ratio, base_press, by_kvpress
from decode_runs import INTERVAL, NUM_NEW, TARGET, decoded, spec_of
from references import distinct_tokens
from rotation import in_turn
from statistics_files import NEOX, statistics_file

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.decoding import DecodingSpec

CONTEXTS = [distinct_tokens(length, 211, length + place) for place, length in enumerate((50, 29, 64, 29, 12))]
AS_IN_KVPRESS: dict[str, dict[str, Any]] = {
    "knorm": {},
    "keydiff": {},
    "tova": {},
    "qfilter": {"statistics": statistics_file("qfilter", NEOX)},
}
"""Presses that go by neither the place of an entry nor a position: kvpress's own hook is the reference as it is."""

BY_PLACE: dict[str, dict[str, Any]] = {
    "streaming_llm": {},
    "snapkv": {"window_size": 4},
    "expected_attention": {"n_future_positions": 40, "n_sink": 2},
    "expected_attention_stats": {"statistics": statistics_file("expected_attention_stats", NEOX)},
    "lagkv": {"lag_size": 6, "n_sink": 2},
    "cap": {"n_sink": 2},
    "cur": {"local_window_size": 4},
    "rkv": {"window_size": 4},
    "criticalkv:snapkv": {"window_size": 4},
    "criticalkv:streaming_llm": {},
    "criticalkv:expected_attention": {"n_future_positions": 40, "n_sink": 2},
    "criticalkv:lagkv": {"lag_size": 6, "n_sink": 2},
    "criticalkv:cap": {"n_sink": 2},
    "criticalkv:cur": {"local_window_size": 4},
}
"""Those that do: the reference is kvpress's hook with entries in order and queries at their positions (`Mended`)."""


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


@pytest.mark.parametrize(("name", "held"), in_turn(AS_IN_KVPRESS, [0, 1]))
def test_tokens_are_those_of_kvpress_one_by_one(model: PressableModel, name: str, held: int) -> None:
    def press() -> Any:
        return kvpress.DecodingPress(base_press(model, name, AS_IN_KVPRESS[name]), INTERVAL, TARGET)

    expected = [by_kvpress(model, press(), context, held, NUM_NEW)[0] for context in CONTEXTS]
    found, keeper = decoded(model, CONTEXTS, spec_of(name, AS_IN_KVPRESS[name]), held)
    assert found == expected
    assert not any(attention._forward_pre_hooks or attention._forward_hooks for attention in model.attentions)
    assert len(keeper.compressions) == (NUM_NEW - 1 - (held == 0)) // INTERVAL


@pytest.mark.parametrize("name", BY_PLACE)
def test_tokens_are_those_of_kvpress_with_entries_in_order(model: PressableModel, name: str) -> None:
    def press() -> Any:
        return Mended(base_press(model, name, BY_PLACE[name]), INTERVAL, TARGET)

    contexts = CONTEXTS[:2] if ":" in name else CONTEXTS[::2]  # the kinds of length: above the budget, and below
    expected = [by_kvpress(model, press(), context, 1, NUM_NEW)[0] for context in contexts]
    assert decoded(model, contexts, spec_of(name, BY_PLACE[name]), 1)[0] == expected


@pytest.mark.parametrize("name", ["knorm", "streaming_llm", "snapkv"])
def test_a_share_of_what_was_seen_is_that_of_kvpress(model: PressableModel, name: str) -> None:
    arguments = {**AS_IN_KVPRESS, **BY_PLACE}[name]

    def press() -> Any:
        kind = Ratio if name in AS_IN_KVPRESS else MendedRatio
        return kind(base_press(model, name, arguments), INTERVAL, target_compression_ratio=0.6)

    spec = spec_of(f"compression_ratio_decoding:{name}", arguments, target_compression_ratio=0.6)
    expected = [by_kvpress(model, press(), context, 1, NUM_NEW)[0] for context in CONTEXTS]
    found, keeper = decoded(model, CONTEXTS, spec, 1)
    assert found == expected
    seen = [len(context) + 36 for context in CONTEXTS]  # 36 forwards before the last compression, one of the context's
    assert spec.num_kept(seen[0]) == int(0.4 * seen[0]) and len(keeper.compressions) == 6


class EvenDraws:
    """Takes what is more likely than not, so that two sides draw alike."""

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        return (probabilities > 0.5).to(probabilities.dtype)


@pytest.mark.parametrize("name", ["keydiff", "tova"])
def test_cam_merges_as_kvpress_does(
    make_pressable: Callable[..., PressableModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts above the budget: below it kvpress waits for the first token above, here all wait for the interval."""
    model, contexts = make_pressable("eager"), CONTEXTS[:4]
    monkeypatch.setattr(torch, "bernoulli", EvenDraws())

    def press() -> Any:
        return MendedCam(base_press(model, name, {}), INTERVAL, TARGET, merge_budget=3)

    spec = spec_of(f"cam:{name}", {}, merge_budget=3)
    expected = [by_kvpress(model, press(), context, 1, NUM_NEW)[0] for context in contexts]
    found, _ = decoded(model, contexts, spec, 1)
    assert found == expected
    assert found != decoded(model, contexts, spec_of(name, {}), 1)[0], "merging must show"


class MendedCam(kvpress.CAMPress):
    """kvpress's hook; the position is not asked for."""

    next_position = 0


@pytest.mark.parametrize(
    ("name", "prefill"),
    in_turn(["knorm", "lagkv", "cap", "adakv:knorm", "compression_ratio_decoding:tova"], ["pyramidkv", "snapkv"]),
)
def test_a_batch_equals_batches_of_one(model: PressableModel, name: str, prefill: str) -> None:
    contexts, arguments = CONTEXTS[:4], {**AS_IN_KVPRESS, **BY_PLACE}.get(name, {})
    spec = spec_of(name, arguments)
    found, _ = decoded(model, contexts, spec, 2, prefill)
    assert found == [decoded(model, [context], spec, 2, prefill)[0][0] for context in contexts]


@pytest.mark.parametrize("name", ["random", "cam:knorm", "observed_attention", "adakv:random"])
def test_random_draws_and_received_attention_are_those_of_the_row_alone(
    make_pressable: Callable[..., PressableModel], name: str
) -> None:
    model, contexts, spec = make_pressable("eager"), CONTEXTS[:3], spec_of(name, {})
    found, _ = decoded(model, contexts, spec, 2)
    assert found == [decoded(model, [one], spec, 2, seeds=[seed])[0][0] for seed, one in enumerate(contexts)]
    if name == "random":
        assert found != decoded(model, contexts, spec, 2, seeds=[7] * 3)[0]


class Tied:
    """Scores that differ by rounding alone, as norms of a repeated token's keys do in another batch."""

    def score(self, module: Any, hidden: torch.Tensor, keys: torch.Tensor, *_: Any) -> torch.Tensor:
        return 1 + 1e-7 * torch.rand(keys.shape[:3])

    def post_init_from_model(self, model: Any) -> None: ...


@pytest.mark.parametrize("name", ["knorm", "adakv:knorm"])
def test_of_equal_scores_the_newest_entries_stay(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    compress, num_acts = BudgetKeeper.compress, 0

    def checked(self: BudgetKeeper, cache: CompressedCache) -> CompressedCache:
        nonlocal num_acts
        kept, num_acts = compress(self, cache), num_acts + 1
        for before, after in zip(cache.layers, kept.layers, strict=True):
            assert torch.equal(after.keys, before.keys[:, :, -TARGET:])
        return kept

    monkeypatch.setattr(DecodingSpec, "build", lambda *_: Tied())
    monkeypatch.setattr(BudgetKeeper, "compress", checked)
    decoded(model, CONTEXTS[:1], spec_of(name, {}), 1)
    assert num_acts == (NUM_NEW - 1) // INTERVAL


@pytest.mark.parametrize("held", [0, 1])
def test_what_came_after_a_rows_last_token_is_not_counted(model: PressableModel, held: int) -> None:
    _, keeper = decoded(model, CONTEXTS[:1], spec_of("knorm", {}), held)
    before_the_first = INTERVAL + (held == 0)  # without held-back tokens the first one takes no forward
    assert keeper.counts(0, before_the_first) == (0, 0)
    assert keeper.counts(0, before_the_first + 1)[0] == 1
    assert keeper.num_before(0, NUM_NEW) == before_the_first


@pytest.mark.parametrize("name", ["knorm", "adakv:knorm"])
def test_the_budget_is_held_and_changes_the_tokens(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sizes: list[float] = []
    compress, spec = BudgetKeeper.compress, spec_of(name, {})

    def measured(self: BudgetKeeper, cache: CompressedCache) -> CompressedCache:
        kept = compress(self, cache)
        sizes.extend(count for row in kept.kept() for count in row)
        return kept

    monkeypatch.setattr(BudgetKeeper, "compress", measured)
    found, _ = decoded(model, CONTEXTS[:4], spec, 1)
    assert sizes and set(sizes) == {TARGET}
    monkeypatch.setattr(BudgetKeeper, "is_due", lambda *_: False)
    monkeypatch.setattr(BudgetKeeper, "most_fed", NUM_NEW)
    assert decoded(model, CONTEXTS[:4], spec, 1)[0] != found


def test_a_text_whose_share_would_all_be_protected_is_left_alone(model: PressableModel) -> None:
    spec = replace(spec_of("streaming_llm", {}), target_size=None, share_evicted=0.9)
    assert spec.num_kept(40) == 40
    assert spec.num_kept(65) == int(65 * (1 - 0.9)) == 6, "rounded as kvpress does"
