"""``batch_size=auto``: sized by the compressed cache, and it changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.batch_size import CPU_TOKENS, SHARE_OF_FREE, free_bytes, kept_share, tokens_per_batch
from lm_eval_kvpress.engine.footprint import PACKED_FORWARD_TOKENS, Footprint
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press

GIB = 2**30


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


def footprint(model: PressableModel, name: str, quantization: Quantization | None = None, **given: Any) -> Footprint:
    config = model.model.config
    share = kept_share(parse_press(name, given), config)
    return Footprint.of(config, torch.float32, share=share, quantization=quantization)


def test_the_estimate_is_of_the_compressed_cache(model: PressableModel) -> None:
    config = model.model.config
    for name, arguments, kept in [
        ("none", {}, 1.0),
        ("knorm", {"compression_ratio": 0.75}, 0.25),
        ("knorm", {"kv_budget": config.max_position_embeddings // 8}, 0.125),
        ("adakv:knorm", {"compression_ratio": 0.75}, 1.0),
    ]:
        full = 2 * config.num_hidden_layers * config.hidden_size * 4
        prefill = full * kept + full * (1 - kept) / config.num_hidden_layers + 40 * config.hidden_size * 4
        for copies in (1, 2):  # what was kept is copied into the buffers that grow
            tokens = tokens_per_batch(footprint(model, name, **arguments), GIB, num_copies=copies)
            per_token = max(prefill, full * kept * copies)
            assert tokens * per_token == pytest.approx(SHARE_OF_FREE * GIB, rel=1e-3), name


def test_packed_entries_are_held_in_their_bits_and_beside_the_others_while_a_forward_lasts(
    model: PressableModel,
) -> None:
    plain, packed = footprint(model, "none"), footprint(model, "none", Quantization("int4"))
    assert packed.held_bytes == pytest.approx(plain.held_bytes * 4.375 / 32)
    assert packed.prefill_bytes - plain.prefill_bytes == pytest.approx(packed.held_bytes)
    assert packed.read_bytes(2) < plain.read_bytes(2)


def test_what_is_packed_before_the_next_is_prefilled_needs_room_for_one_forward_only(model: PressableModel) -> None:
    packed = footprint(model, "none", Quantization("int4"))
    tokens = tokens_per_batch(packed, GIB, num_copies=2)
    room = SHARE_OF_FREE * GIB
    assert packed.batch_bytes(tokens, 2) <= room < packed.batch_bytes(tokens + 1, 2)
    forward = PACKED_FORWARD_TOKENS * packed.prefill_bytes + (tokens - PACKED_FORWARD_TOKENS) * packed.held_bytes
    joining = tokens * packed.held_bytes * (1 + 1 / model.model.config.num_hidden_layers)
    assert packed.batch_bytes(tokens, 2) == max(forward, joining, tokens * packed.read_bytes(2))
    assert tokens > 1.5 * tokens_per_batch(footprint(model, "none"), GIB, num_copies=2)


def test_a_stronger_press_allows_larger_batches(model: PressableModel) -> None:
    prints = [footprint(model, "knorm", compression_ratio=ratio) for ratio in (0, 0.5, 0.9)]
    sizes = [tokens_per_batch(one, GIB, num_copies=2) for one in prints]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert tokens_per_batch(prints[0], 1, num_copies=1) == 1


def test_without_a_cuda_device_the_size_is_fixed(model: PressableModel) -> None:
    assert free_bytes(torch.device("cpu")) is None
    assert tokens_per_batch(footprint(model, "none"), None, num_copies=1) == CPU_TOKENS
