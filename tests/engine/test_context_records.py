"""A record says what a compressed context takes, and whether a press ran on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from press_cases import PRESSES, fitting, spec_for, tokens

from lm_eval_kvpress.cache.compressed import CachedLayer
from lm_eval_kvpress.cache.packed import PackedKV
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.compression import CompressedBatch, Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.clock import Clock


def compressed(
    model: PressableModel,
    press: PressSpec,
    num_tokens: int,
    *,
    short_context: str = "keep",
    quantization: Quantization | None = None,
) -> CompressedBatch:
    """One context of so many prefilled tokens, the last eight of which are a question where the press reads one."""
    context = Context((*tokens(1, num_tokens)[0].tolist(), 7), 1, num_question=8 if press.reads_question else 0)
    clock = Clock(torch.device("cpu"))
    compressor = Compressor(model, press, short_context=short_context, clock=clock, quantization=quantization)
    return compressor.compress([context])


def entries_of(layer: CachedLayer) -> Iterator[torch.Tensor]:
    """What holds a layer's keys and values."""
    if not isinstance(layer, PackedKV):
        yield from (layer.keys, layer.values)
        return
    yield from (layer.newest.keys, layer.newest.values)
    for blocks in (layer.packed_keys, layer.packed_values):
        yield from (blocks.codes, blocks.scales, blocks.zeros)


@pytest.mark.parametrize("quantization", [None, Quantization("int4", group=16)], ids=["full", "int4"])
@pytest.mark.parametrize("name", [*PRESSES, "kvzip_plus"])
def test_the_record_says_what_the_storages_of_the_tensors_take(
    models: dict[str, PressableModel], name: str, quantization: Quantization | None
) -> None:
    """A tensor that is a part of another one holds all of it."""
    press = spec_for(name) if name in PRESSES else parse_press(name)
    _, model = next(fitting(models, press))
    batch = compressed(model, press, 100, quantization=quantization)
    storages = [tensor.untyped_storage() for layer in batch.cache.layers for tensor in entries_of(layer)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    (record,) = batch.records
    assert record.pressed and record.bytes_allocated == held


@pytest.mark.parametrize(
    ("press", "arguments", "num_tokens", "runs"),
    [
        ("snapkv", {}, 30, True),
        ("snapkv", {}, 2, True),
        ("snapkv", {}, 1, False),
        ("knorm", {}, 1, False),
        ("adakv:snapkv", {}, 30, True),
        ("dms:knorm", {"threshold": -1e9}, 100, False),
        ("dms:snapkv", {"threshold": -1e9, "sliding_window_size": 20}, 21, True),
        ("dms:snapkv", {"threshold": -1e9, "sliding_window_size": 20}, 20, False),
        ("simlayerkv", {"lazy_threshold": 0}, 100, False),
    ],
)
def test_a_context_is_shrunk_only_if_a_press_ran_that_was_shrunk_to_fit(
    models: dict[str, PressableModel], press: str, arguments: dict[str, float], num_tokens: int, runs: bool
) -> None:
    spec, model = parse_press(press, arguments), models["neox sdpa"]
    assert num_tokens < spec.min_context()
    batch = compressed(model, spec, num_tokens, short_context="shrink")
    (record,) = batch.records
    assert [record.pressed, record.is_shrunk, *batch.pressed] == [runs] * 3 and record.is_short is not runs
    if not runs:
        assert record.kept_per_layer == (num_tokens,) * 3
    (kept,) = compressed(model, spec, num_tokens).records
    assert kept.is_short and not kept.pressed and not kept.is_shrunk
