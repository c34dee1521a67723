"""Presses by name: bad input is one line, budgets are exact, and every press runs and keeps what its formula says."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
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
    run,
    spec_for,
    takes_ratio,
    tokens,
)
from repository import ROOT

from lm_eval_kvpress.models.pressable import PressableModel, prefill
from lm_eval_kvpress.presses.catalog import ROWS, UNSUPPORTED
from lm_eval_kvpress.presses.spec import (
    list_presses,
    parse_press,
    press_argument_names,
    ratio_that_keeps,
)

# -------------------------------------------------------------------------------------------------------- running


def test_the_table_covers_every_press_that_is_listed() -> None:
    heads = {name.partition(":")[0] for name in PRESSES} | {"none", "decoding", "prefill_decoding"}
    assert {press.name.partition(":")[0] for press in list_presses() if press.supported} == heads


@pytest.mark.parametrize("name", PRESSES)
def test_every_press_keeps_what_its_formula_says(models: dict[str, PressableModel], name: str) -> None:
    arguments, formula = PRESSES[name]
    ratios = RATIOS if takes_ratio(name) else (None,)
    for ratio in ratios:
        spec = spec_for(name, **({} if ratio is None else {"compression_ratio": ratio}))
        for length in (47, 100):
            for model_name, model in fitting(models, spec):
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
    for _, model in fitting(models, spec):
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
    for model_name, model in fitting(models, spec):
        run(model, spec, tokens(1, least))
        if least == 1:
            continue
        with pytest.raises(ValueError, match=f"at least {least} tokens"):
            spec.build(least - 1)
        unchecked = spec._construct(spec.ratio_for(least - 1))
        try:
            (kept,) = prefill(model, tokens(1, least - 1), unchecked).kept()
        except (AssertionError, IndexError, RuntimeError, ValueError):
            continue
        assert kept == [least - 1] * NUM_LAYERS, (model_name, "one token less still runs and removes", kept)


@pytest.mark.parametrize("name", PRESSES)
def test_shrunk_presses_run_on_every_short_context(models: dict[str, PressableModel], name: str) -> None:
    spec = spec_for(name)
    model_name, model = next(fitting(models, spec))
    for length in range(1, spec.min_context()):
        press = spec.build(length, shrink=True)
        (kept,) = run(model, spec, tokens(1, length), shrink=True).kept()
        assert all(1 <= count <= length for count in kept), (length, kept)
        if press is not None and spec.compression_ratio and length > 1 and not name.startswith(("chunk", "composed")):
            assert min(kept) < length, (length, kept)


def test_shrinking_leaves_room_beside_the_window() -> None:
    spec = parse_press("snapkv", {"window_size": 64})
    sizes = [spec.build(length, shrink=True).window_size for length in (2, 7, 8, 40, 64, 65, 100)]  # type: ignore[union-attr]
    assert sizes == [1, 1, 2, 10, 16, 64, 64]
    press = parse_press("compactor").build(12, shrink=True)
    assert (press.sink_size_start, press.sink_size_end) == (2, 1)  # type: ignore[union-attr]


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


def objects_within(press: Any) -> Iterator[Any]:
    yield press
    for value in vars(press).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, kvpress.BasePress):
                yield from objects_within(item)


@pytest.mark.parametrize("name", PRESSES)
def test_two_builds_share_no_state(name: str) -> None:
    spec = spec_for(name)
    first, second = spec.build(100), spec.build(100)
    assert not {id(item) for item in objects_within(first)} & {id(item) for item in objects_within(second)}
    mutable = [
        {id(value) for item in objects_within(press) for value in vars(item).values() if isinstance(value, list | dict)}
        for press in (first, second)
    ]
    assert not mutable[0] & mutable[1]


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
    for model_name, model in fitting(models, spec):
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
        "dms",
        "composed",
    }
    assert not parse_press("none").reads_outputs
    for name in set(PRESSES) - readers:
        source = "".join(inspect.getsource(row.factory) for row in spec_for(name)._rows)
        assert "output[0]" not in source and "def forward_hook" not in source


@pytest.mark.parametrize("name", [name for name in PRESSES if spec_for(name).batches])
def test_rows_of_a_batch_do_not_mix_where_the_press_says_so(models: dict[str, PressableModel], name: str) -> None:
    spec = spec_for(name)
    context = tokens(3, 60)
    for model_name, model in fitting(models, spec):
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


# ----------------------------------------------------------------------------------------------------------- notes


def test_the_pyramids_fall_back_is_reported_exactly_where_it_happens() -> None:
    reported = set()
    for window in (4, 8, 64):
        for beta in (2, 20):
            for length in (70, 100, 333, 2048):
                for percent in range(1, 100, 2):
                    arguments = {"window_size": window, "beta": beta, "compression_ratio": percent / 100}
                    spec = parse_press("pyramidkv", arguments)
                    press = spec.build(length)
                    budgets = [press.get_layer_budget(layer, length) for layer in layers(9)]  # type: ignore[union-attr]
                    notes = [note for note in spec.notes(length, 9) if "fell back to snapkv" in note]
                    fell_back = set(budgets) == {max(1, round(length * (1 - percent / 100)))}
                    assert bool(notes) == fell_back, (arguments, length, budgets, notes)
                    reported.update(notes)
    assert len(reported) >= 2, "both ways of falling back are met"


def layers(num_layers: int) -> list[Any]:
    config = SimpleNamespace(num_hidden_layers=num_layers)
    return [SimpleNamespace(layer_idx=layer, config=config) for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("name", "arguments", "length", "says"),
    [
        ("pyramidkv", {"compression_ratio": 0.51}, 2048, "pyramidkv fell back to snapkv"),
        ("pyramidkv", {"compression_ratio": 0.3, "window_size": 8}, 2048, None),
        ("lagkv", {}, 259, "lagkv fell back"),
        ("lagkv", {}, 516, None),
        ("lagkv", {"compression_ratio": 0.9}, 1024, "arbitrary"),
        ("snapkv", {"compression_ratio": 0.9}, 600, "arbitrary"),
        ("snapkv", {"compression_ratio": 0.9}, 650, "none was chosen by its score"),
        ("snapkv", {"compression_ratio": 0.9}, 660, None),
        ("snapkv", {"compression_ratio": 0.5}, 128, "none was chosen by its score"),
        ("per_layer:snapkv", {"compression_ratios": "0.1+0.9"}, 600, "arbitrary"),
        ("per_layer:snapkv", {"compression_ratios": "0.1+0.9"}, 660, None),
        ("snapkv", {"compression_ratio": 0}, 650, None),
        ("key_rerotation:streaming_llm", {"kv_budget": 3}, 650, "arbitrary"),
        ("knorm", {"kv_budget": 64}, 64, "covers the whole context"),
        ("knorm", {"kv_budget": 64}, 65, None),
        ("think", {}, 65, "keeps every token"),
        ("random", {"seed": 1}, 65, "same places"),
        ("random", {}, 65, None),
    ],
)
def test_notes_say_what_kvpress_does_silently(
    name: str, arguments: dict[str, Any], length: int, says: str | None
) -> None:
    notes = parse_press(name, arguments).notes(length, 12)
    assert (notes == []) if says is None else any(says in note for note in notes), notes


# ----------------------------------------------------------------------------------------------------- names and input

# The keys of ``PRESS_REGISTRY`` in kvpress's ``evaluation/evaluate_registry.py``: those that run, and the others.
EVALUATED = (
    *("adakv_snapkv", "block_keydiff", "chunkkv", "critical_adakv_expected_attention", "critical_adakv_snapkv"),
    *("critical_expected_attention", "critical_snapkv", "cur", "expected_attention", "keydiff", "lagkv", "knorm"),
    *("observed_attention", "pyramidkv", "random", "snap_think", "snapkv", "streaming_llm", "think", "tova"),
    *("compactor", "adakv_compactor", "no_press", "merging_knorm", "merging_snapkv", "merging_expected_attention"),
)
NOT_HERE = (
    *("duo_attention", "duo_attention_on_the_fly", "fastkvzip", "finch", "kvcompose", "kvcompose_unstructured"),
    *("kvzip", "kvzip_plus", "kvzap_linear", "kvzap_mlp", "kvzap_mlp_head", "kvzap_mlp_layer", "lukv", "qfilter"),
    *("RestoreKV", "RestoreKV_plus", "cam_streaming_llm", "cam_knorm", "cam_adakv_snapkv", "cam_tova"),
    *("decoding_knorm", "decoding_streaming_llm", "decoding_tova", "decoding_qfilter"),
    *("decoding_adakv_expected_attention_e2", "decoding_adakv_snapkv", "decoding_keydiff", "merging_kvzap_mlp"),
)


@pytest.mark.parametrize("name", EVALUATED)
def test_names_of_kvpress_evaluation_run(name: str) -> None:
    spec = parse_press(name)
    assert spec.is_none or isinstance(spec.build(400), kvpress.BasePress)


@pytest.mark.parametrize("name", NOT_HERE)
def test_names_of_kvpress_evaluation_that_cannot_run_say_why(name: str) -> None:
    with pytest.raises(ValueError, match="not supported: it ") as caught:
        parse_press(name)
    assert "\n" not in str(caught.value)


def test_aliases_bring_their_own_defaults() -> None:
    assert parse_press("merging_expected_attention").arguments["epsilon"] == 0.01
    assert parse_press("merging_expected_attention", {"epsilon": 0.5}).arguments["epsilon"] == 0.5
    assert parse_press("critical_expected_attention").arguments["use_vnorm"] is False
    assert parse_press("expected_attention").arguments["use_vnorm"] is True
    assert parse_press("chunkkv").name == "chunkkv:snapkv"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("snapvk", {}, "did you mean 'snapkv'"),
    ("", {}, "unknown press"),
    ("snapkv:knorm", {}, "wraps no other press"),
    ("snapkv+think", {}, "unknown press"),
    ("adakv", {}, "wraps another press"),
    ("adakv:", {}, "wraps another press"),
    ("adakv:snapvk", {}, "did you mean 'snapkv'"),
    ("adakv:none", {}, "none removes nothing"),
    ("adakv:think", {}, "score"),
    ("adakv:adakv:snapkv", {}, "adakv"),
    ("adakv:observed_attention", {}, "attention"),
    ("adakv:criticalkv:snapkv", {}, "critical_adakv"),
    ("adakv:qfilter", {}, "not supported"),
    ("key_rerotation:pyramidkv", {}, "wrap snapkv"),
    ("key_rerotation:adakv:snapkv", {}, "score"),
    ("criticalkv:knorm", {}, "negative"),
    ("block:snapkv", {}, "knorm"),
    ("chunk:expected_attention", {}, "knorm"),
    ("chunk:lagkv", {}, "chunk"),
    ("chunkkv:observed_attention", {}, "attention"),
    ("per_layer:criticalkv:snapkv", {"compression_ratios": 0.5}, "ratio"),
    ("dms:streaming_llm", {"threshold": 0}, "compression_ratio"),
    ("composed:", {}, "composed:snapkv+think"),
    ("composed:snapkv", {}, "composed:snapkv+think"),
    ("composed:snapkv+knorm", {}, "think"),
    ("composed:think+think", {}, "think"),
    ("composed:adakv:snapkv+think", {}, "adakv"),
    ("composed:key_rerotation:snapkv+think", {}, "key_rerotation"),
    ("qfilter", {}, "trained"),
    ("decoding:knorm", {}, "decoding"),
    ("snapkv", {"window_sizes": 8}, "did you mean 'window_size'"),
    ("streaming_llm", {"window_size": 8}, "n_sink"),
    ("compactor", {"_leverage_press": 8}, "unknown argument"),
    ("dms:knorm", {"threshold": 0, "decoding": True}, "unknown argument"),
    ("composed:snapkv+think", {"window_size": 8}, "snapkv.window_size or think.window_size"),
    ("snapkv", {"window_size": 8, "snapkv.window_size": 8}, "twice"),
    ("snapkv", {"compression_ratio": -0.1}, "at least 0 and below 1"),
    ("snapkv", {"compression_ratio": 1}, "at least 0 and below 1"),
    ("snapkv", {"compression_ratio": 50}, "fraction removed"),
    ("snapkv", {"compression_ratio": "half"}, "must be a number"),
    ("snapkv", {"compression_ratio": None}, "must be a number"),
    ("snapkv", {"compression_ratio": True}, "must be a number"),
    ("snapkv", {"compression_ratio": math.nan}, "must be a number"),
    ("snapkv", {"compression_ratio": math.inf}, "must be a number"),
    ("snapkv", {"compression_ratio": 0.5, "kv_budget": 64}, "give one of them"),
    ("snapkv", {"kv_budget": 0}, "at least 1"),
    ("snapkv", {"kv_budget": -3}, "at least 1"),
    ("snapkv", {"kv_budget": 1.5}, "whole number"),
    ("snapkv", {"kv_budget": "all"}, "whole number"),
    ("snapkv", {"window_size": 0}, "at least 1"),
    ("snapkv", {"window_size": "wide"}, "whole number"),
    ("snapkv", {"window_size": 8.5}, "whole number"),
    ("snapkv", {"kernel_size": 4}, "odd"),
    ("streaming_llm", {"n_sink": -1}, "at least 0"),
    ("pyramidkv", {"beta": 0}, "at least 1"),
    ("lagkv", {"cross_scoring": "yes"}, "true or false"),
    ("cur", {"leverage_type": "keys"}, "kv_product"),
    ("random", {"seed": "lucky"}, "whole number"),
    ("adakv:knorm", {"alpha_safeguard": 1.5}, "at most 1"),
    ("merging:knorm", {"merge_fraction": 0}, "above 0"),
    ("entropy_gated_chunkkv:knorm", {"chunk_length": 4}, "low_entropy_chunk_length"),
    ("chunk:knorm", {"chunk_length": 0}, "at least 1"),
    ("chunk:knorm", {"kv_budget": 64}, "use compression_ratio"),
    ("chunkkv:knorm", {"kv_budget": 64}, "use compression_ratio"),
    ("think", {"compression_ratio": 0.5}, "key_channel_compression_ratio"),
    ("think", {"kv_budget": 64}, "key_channel_compression_ratio"),
    ("think", {"key_channel_compression_ratio": 1}, "below 1"),
    ("simlayerkv", {}, "needs lazy_threshold"),
    ("simlayerkv", {"lazy_threshold": 1}, "below 1"),
    ("simlayerkv", {"lazy_threshold": 0.9, "compression_ratio": 0.5}, "lazy_threshold"),
    ("simlayerkv", {"lazy_threshold": 0.9, "n_last": 8, "n_recent": 8}, "n_last"),
    ("per_layer:knorm", {}, "needs compression_ratios"),
    ("per_layer:knorm", {"compression_ratios": "0.1+0.5+1"}, "below 1"),
    ("per_layer:knorm", {"compression_ratios": "0.1;0.5"}, "must be a number"),
    ("per_layer:knorm", {"compression_ratios": ""}, "must be a number"),
    ("per_layer:knorm", {"compression_ratios": []}, "number"),
    ("per_layer:knorm", {"compression_ratios": "0.1", "compression_ratio": 0.5}, "compression_ratios"),
    ("dms:knorm", {}, "needs threshold"),
    ("dms:knorm", {"threshold": 0, "compression_ratio": 0.5}, "threshold"),
    ("none", {"compression_ratio": 0.5}, "press=none removes nothing"),
    ("none", {"kv_budget": 64}, "press=none removes nothing"),
    ("none", {"window_size": 64}, "press=none takes none"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), BAD, ids=[f"{name} {given}" for name, given, _ in BAD])
def test_bad_input_is_one_line(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_press(name, arguments)
    message = str(caught.value)
    assert says in message and "\n" not in message, message


@pytest.mark.parametrize("name", PRESSES)
def test_a_spec_comes_back_from_its_name_and_arguments(name: str) -> None:
    spec = spec_for(name)
    assert parse_press(spec.name, spec.arguments) == spec
    through_json = json.loads(json.dumps(spec.describe()))
    assert parse_press(through_json["name"], through_json["arguments"]) == spec
    assert through_json["classes"] and set(spec.arguments) <= press_argument_names(name)


def test_arguments_are_those_of_the_class_with_its_defaults() -> None:
    spec = parse_press("snapkv", {"window_size": "32"})
    assert spec.arguments == {"compression_ratio": 0.5, "window_size": 32, "kernel_size": 5}
    assert parse_press("none", {"compression_ratio": 0}).arguments == {}
    assert parse_press("random", {"seed": None}).arguments["seed"] is None
    composed = parse_press("composed:snapkv+think", {"think.window_size": 16})
    assert composed.arguments["snapkv.window_size"] == 64
    assert composed.arguments["think.window_size"] == 16
    assert composed.build(100).presses[1].window_size == 16  # type: ignore[union-attr]


def test_argument_names_are_all_that_the_parser_has_something_to_say_about() -> None:
    size = {"compression_ratio", "kv_budget"}
    assert press_argument_names("none") == size
    assert {"window_size", "kernel_size", *size} <= press_argument_names("snapkv")
    assert {"window_size", "think.window_size"} <= press_argument_names("composed:snapkv+think")
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        press_argument_names("snapvk")


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


def test_every_press_of_kvpress_is_listed() -> None:
    names = [press.name for press in list_presses()]
    assert len(names) == len(set(names))
    listed = {base for row in ROWS.values() for base in row.factory.__mro__}
    listed |= {unsupported.factory for unsupported in UNSUPPORTED.values()}
    offered = {getattr(kvpress, name) for name in kvpress.__all__ if name.endswith("Press")}
    assert offered - listed == set()


# ----------------------------------------------------------------------------------------------------------- docs

DOCS = ROOT / "docs" / "presses.md"
BEGIN, END = "<!-- table: python tests/presses/test_spec.py rewrites it -->\n", "<!-- end of table -->\n"


def table() -> str:
    """The list of presses as the two tables of docs/presses.md."""
    rows = ["| `press=` | arguments and defaults | needs | paper |", "|---|---|---|---|"]
    rest = ["| not supported | because | paper |", "|---|---|---|"]
    for press in list_presses():
        paper = f"[{press.paper.split('/')[-1]}]({press.paper})" if press.paper else ""
        if not press.supported:
            rest.append(f"| `{press.name}` | {press.needs} | {paper} |")
            continue
        arguments = ", ".join(f"`{name}={default}`" for name, default in press.arguments.items())
        rows.append(f"| `{press.name}` | {arguments} | {press.needs} | {paper} |")
    return "\n".join([*rows, "", *rest]) + "\n"


def test_the_documentation_lists_the_presses() -> None:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    assert written == table(), "run: python tests/presses/test_spec.py"


if __name__ == "__main__":
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
