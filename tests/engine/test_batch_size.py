"""``batch_size=auto``: sized by the compressed cache, and it changes no result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lm_eval_kvpress.engine.batch_size import (
    ACTIVATIONS_PER_TOKEN,
    CPU_TOKENS,
    SHARE_OF_FREE,
    free_bytes,
    kept_share,
    tokens_per_batch,
)
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press

GIB = 2**30


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


def test_the_estimate_is_of_the_compressed_cache(model: PressableModel) -> None:
    config = model.model.config
    for name, arguments, kept in [
        ("none", {}, 1.0),
        ("knorm", {"compression_ratio": 0.75}, 0.25),
        ("knorm", {"kv_budget": config.max_position_embeddings // 8}, 0.125),
        ("adakv:knorm", {"compression_ratio": 0.75}, 1.0),
    ]:
        cache = 2 * config.num_hidden_layers * config.hidden_size * 4 * kept
        share = kept_share(parse_press(name, arguments), config)
        for decodes in (False, True):  # what was kept is copied into the buffers that grow
            tokens = tokens_per_batch(model, GIB, share=share, num_copies=1 + decodes)
            per_token = cache * (1 + decodes) + ACTIVATIONS_PER_TOKEN * config.hidden_size * 4
            assert tokens * per_token == pytest.approx(SHARE_OF_FREE * GIB, rel=1e-3), name


def test_a_stronger_press_allows_larger_batches(model: PressableModel) -> None:
    presses = [parse_press("knorm", {"compression_ratio": ratio}) for ratio in (0, 0.5, 0.9)]
    shares = [kept_share(press, model.model.config) for press in presses]
    sizes = [tokens_per_batch(model, GIB, share=share, num_copies=2) for share in shares]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert tokens_per_batch(model, 1, share=1.0, num_copies=1) == 1


def test_without_a_cuda_device_the_size_is_fixed(model: PressableModel) -> None:
    assert free_bytes(torch.device("cpu")) is None
    assert tokens_per_batch(model, None, share=1.0, num_copies=1) == CPU_TOKENS
