"""Every press runs and keeps what its formula says, budgets are exact, and a spec says what the press needs."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import kvpress
import pytest
import torch
from press_cases import (
    NUM_LAYERS,
    PRESSES,
    RATIOS,
    exact,
    fitting,
    one_of_each,
    run,
    spec_for,
    takes_ratio,
    tokens,
)

from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.build import build_press
from lm_eval_kvpress.presses.names import parse_name
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import ratio_that_keeps

# -------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("name", PRESSES)
def test_every_press_keeps_what_its_formula_says(models: dict[str, PressableModel], name: str) -> None:
    arguments, formula = PRESSES[name]
    ratios = RATIOS if takes_ratio(name) else (None,)
    for turn, (ratio, length) in enumerate(itertools.product(ratios, (47, 100))):
        spec = spec_for(name, **({} if ratio is None else {"compression_ratio": ratio}))
        for model_name, model in one_of_each(models, spec, turn // 2 + turn):
            (kept,) = run(model, spec, tokens(1, length)).kept()
            label = (model_name, ratio, length)
            if formula is None:
                assert all(1 <= count <= length for count in kept), (label, kept)
                assert min(kept) < length, (label, "nothing was removed")
            else:
                assert kept == formula(length, ratio or 0.0, spec.arguments), label


def test_chunkkv_keeps_whole_chunks(models: dict[str, PressableModel]) -> None:
    spec = parse_press("chunkkv", {"window_size": 8, "chunk_length": 20, "compression_ratio": 0.5})
    (kept,) = run(models["neox sdpa"], spec, tokens(1, 107)).kept()  # five chunks and seven tokens, of which three
    assert set(kept) <= {60, 47}


@pytest.mark.parametrize("name", [name for name in PRESSES if takes_ratio(name)])
def test_ratio_zero_builds_a_press_that_keeps_everything(models: dict[str, PressableModel], name: str) -> None:
    spec = spec_for(name, compression_ratio=0)
    assert isinstance(spec.build(60), kvpress.BasePress)
    assert not spec.is_none
    for _, model in one_of_each(models, spec, len(name)):
        assert run(model, spec, tokens(1, 60)).kept() == [[60] * NUM_LAYERS]


def test_none_builds_nothing() -> None:
    for name in (None, "none", "None", "no_press"):  # lm-eval turns the word none into None
        spec = parse_press(name)
        assert spec.is_none and spec.build(10) is None and spec.notes(10, 3) == []
        assert (spec.compression_ratio, spec.kv_budget, spec.attn_implementation) == (0.0, None, None)


@pytest.mark.parametrize("name", PRESSES)
def test_min_context_is_the_least_on_which_the_press_runs_and_acts(
    models: dict[str, PressableModel], name: str
) -> None:
    spec = spec_for(name)
    least = spec.min_context()
    for model_name, model in one_of_each(models, spec, len(name)):
        run(model, spec, tokens(1, least))
        if least == 1:
            continue
        with pytest.raises(ValueError, match=f"at least {least} tokens"):
            spec.build(least - 1)
        unchecked = build_press(parse_name(spec.name), spec.own_arguments(), spec.ratio_for(least - 1))
        try:
            (kept,) = prefill(model, tokens(1, least - 1), unchecked).kept()
        except (AssertionError, IndexError, RuntimeError, ValueError):
            continue
        assert kept == [least - 1] * NUM_LAYERS, (model_name, "one token less still runs and removes", kept)


@pytest.mark.parametrize("share", [0, 0.25, 0.5])
@pytest.mark.parametrize("name", ["think", "composed:snapkv+think"])
def test_a_press_that_removes_nothing_says_what_it_changes(
    models: dict[str, PressableModel], name: str, share: float
) -> None:
    of_think = {"key_channel_compression_ratio": share, "window_size": 8}
    given = of_think if name == "think" else {f"think.{key}": value for key, value in of_think.items()}
    spec = parse_press(name, given if name == "think" else {**given, "snapkv.window_size": 8, "compression_ratio": 0})
    (layer, *_) = run(models["neox sdpa"], spec, tokens(1, 60)).layers
    assert (layer.keys == 0).all(dim=2).float().mean() == share
    says = spec.describe()["changes_entries"]
    assert says is None if share == 0 else f"{share:.0%} of the key channels" in says
    assert parse_press("knorm").changes_entries is None


# -------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("budget", [1, 2, 63, 64, 100, 256, 777, 1000, 2048, 4095])
def test_budgets_are_kept_exactly_at_every_length(budget: int) -> None:
    spec = parse_press("knorm", {"kv_budget": budget})
    for length in range(2, 4097):
        press = spec.build(length)
        assert isinstance(press, kvpress.KnormPress)
        kept = int(length * (1 - press.compression_ratio))
        assert kept == min(budget, length), length
        if budget >= length:
            assert press.compression_ratio == 0


def test_rounding_to_the_nearest_keeps_the_budget_too() -> None:
    """PyramidKV's fall-back rounds where the others round down."""
    for length in range(2, 700):
        for budget in range(1, length):
            assert round(length * (1 - ratio_that_keeps(budget, length))) == budget


@pytest.mark.parametrize(
    "name", [name for name, (_, formula) in PRESSES.items() if formula is exact and takes_ratio(name)]
)
def test_a_budget_is_what_is_left_in_the_cache(models: dict[str, PressableModel], name: str) -> None:
    spec = spec_for(name, kv_budget=29)
    assert (spec.compression_ratio, spec.kv_budget) == (None, 29)
    _, model = next(fitting(models, spec))
    for length in (29, 30, 83):
        assert run(model, spec, tokens(1, length)).kept() == [[29] * NUM_LAYERS], length
    assert run(model, spec, tokens(1, 21)).kept() == [[21] * NUM_LAYERS]


def test_a_pyramid_keeps_its_budget_on_the_mean(models: dict[str, PressableModel]) -> None:
    spec = spec_for("pyramidkv", kv_budget=60)
    (kept,) = run(models["neox sdpa"], spec, tokens(1, 150)).kept()
    assert len(set(kept)) == NUM_LAYERS
    assert sum(kept) == 60 * NUM_LAYERS


# ------------------------------------------------------------------------------------------------------ state and draws


def test_a_seed_repeats_the_random_press(models: dict[str, PressableModel]) -> None:
    model, context = models["neox sdpa"], tokens(1, 50)
    for name in ("random", "adakv:random"):
        spec = parse_press(name, {"seed": 3})
        keys = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            cache = prefill(model, context, spec.build(50))
            keys.append(cache.layers[1].keys if cache.layers[1].hidden is None else cache.layers[1].hidden)
        torch.testing.assert_close(keys[0], keys[1], rtol=0, atol=0)
    torch.manual_seed(1)
    other = prefill(model, context, parse_press("random").build(50)).layers[1].keys
    assert not torch.equal(other, keys[0])


@pytest.mark.parametrize("name", PRESSES)
def test_every_press_leaves_the_same_cache_where_a_prefill_ends_with_it(
    models: dict[str, PressableModel], name: str
) -> None:
    spec, context = spec_for(name), tokens(1, 97)
    for model_name, model in one_of_each(models, spec, len(name)):
        caches = []
        for for_cache_only in (False, True):
            torch.manual_seed(7)
            lean = {"for_cache_only": for_cache_only, "reads_outputs": spec.reads_outputs}
            caches.append(prefill(model, context, spec.build(97), rerotates=spec.rerotates, **lean))
        assert caches[0].next_position == caches[1].next_position
        for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values), model_name
            assert (one.hidden is None) == (other.hidden is None)
            assert one.hidden is None or torch.equal(one.hidden, other.hidden)


def test_who_may_read_what_an_attention_returns() -> None:
    """All that have a hook of their own, and those that ask for the attention weights."""
    readers = {name for name in PRESSES if spec_for(name).reads_outputs}
    assert {name.partition(":")[0] for name in readers if "observed_attention" not in name} == {
        "per_layer",
        "kvzip",
        "kvgrad",
        "kvcompose",
        "kvcompose_unstructured",
        "dms",
        "composed",
    }
    assert not parse_press("none").reads_outputs
    for name in set(PRESSES) - readers:
        source = "".join(inspect.getsource(row.factory) for row in spec_for(name).rows)
        assert "output[0]" not in source and "def forward_hook" not in source


@pytest.mark.parametrize("name", [name for name in PRESSES if spec_for(name).batches])
def test_rows_of_a_batch_do_not_mix_where_the_press_says_so(models: dict[str, PressableModel], name: str) -> None:
    spec = spec_for(name)
    context = tokens(3, 60)
    for model_name, model in one_of_each(models, spec, len(name)):
        together = run(model, spec, context)
        for row in range(3):
            alone = run(model, spec, context[row : row + 1])
            for both, one in zip(together.layers, alone.layers, strict=True):
                left, right = sorted_entries(both, row), sorted_entries(one, 0)
                torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4, msg=f"{model_name}, row {row}")


def sorted_entries(layer: Any, row: int) -> torch.Tensor:
    """The entries that can be attended, in an order that does not depend on how they were picked."""
    entries = torch.cat([layer.values[row], layer.keys[row]], dim=-1)  # (H, T, 2 D)
    if layer.hidden is not None:
        entries = torch.where(layer.hidden[row][..., None], torch.zeros_like(entries), entries)
    return entries.gather(1, entries[..., :1].argsort(dim=1).expand_as(entries))


def test_presses_that_draw_or_look_at_the_whole_batch_are_run_alone() -> None:
    assert not parse_press("random", {"seed": 1}).batches
    assert parse_press("cur").batches
    assert not parse_press("cur", {"use_random_leverage": True}).batches
    assert not parse_press("key_rerotation:leverage").batches


# ------------------------------------------------------------------------------------------------- needs of a press


def test_ratios_per_layer_must_fit_the_model(models: dict[str, PressableModel]) -> None:
    spec = parse_press("per_layer:knorm", {"compression_ratios": "0.1+0.5"})
    assert spec.compression_ratio == pytest.approx(0.3)
    spec.check_layers(2)
    for num_layers in (1, 3):
        with pytest.raises(ValueError, match=f"2 values for {num_layers} layers"):
            spec.check_layers(num_layers)
    with pytest.raises(ValueError, match="2 values for 3 layers"):
        run(models["neox sdpa"], spec, tokens(1, 20))


def test_wrappers_inherit_what_their_parts_need() -> None:
    assert parse_press("observed_attention").attn_implementation == "eager"
    assert parse_press("key_rerotation:criticalkv:observed_attention").attn_implementation == "eager"
    assert parse_press("adakv:snapkv").attn_implementation == "sdpa"
    assert parse_press("snapkv").attn_implementation is None
    assert parse_press("key_rerotation:snapkv").rerotates and not parse_press("snapkv").rerotates
    assert parse_press("adakv:snapkv").masks and not parse_press("chunkkv:snapkv").masks
