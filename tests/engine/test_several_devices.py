"""Caches of a model that is spread over several devices. Tensors on "meta", which have shapes alone, do not mix with
those on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.cache.stream_layer import StreamLayer
from lm_eval_kvpress.cache.window_layer import WindowLayer, window_places
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.presses.decoding import DecodingSizes, DecodingSpec, parse_decoding
from lm_eval_kvpress.presses.parse import parse_press

FIRST, SECOND = "cpu", "meta"
BUDGET, CHUNK, DIM = 8, 4, 16


def entries(num: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 2, num, DIM, device=SECOND)


class Rotations:
    """Angles on the first device, as accelerate's hooks leave them."""

    def __call__(self, like: torch.Tensor, positions: torch.Tensor) -> Sequence[torch.Tensor]:
        assert positions.device == like.device
        return tuple(torch.ones(*positions.shape, DIM, device=FIRST) for _ in range(2))


class Norms:
    """Scores entries as a press does that rotates queries."""

    def score(self, module: Any, hidden: torch.Tensor, keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        cos, _ = rest[-1]["position_embeddings"]
        return keys.norm(dim=-1) + (hidden[..., :DIM] * cos).sum(dim=(1, 2))[:, None, None]

    def post_init_from_model(self, model: Any) -> None: ...


def test_mixing_devices_is_seen_here() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=FIRST) + torch.ones(2, device=SECOND)


def test_a_decoding_press_compresses_layers_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodingSpec, "build", lambda *_: Norms())
    model: Any = SimpleNamespace(
        device=torch.device(FIRST),
        attentions=[None],
        num_key_value_heads=2,
        presented=nullcontext,
        model=SimpleNamespace(base_model=SimpleNamespace(rotary_emb=Rotations())),
    )
    keeper = BudgetKeeper(model, parse_decoding(parse_press("none"), "knorm", {}, DecodingSizes(BUDGET, 4)))
    keeper._watch.hidden[0] = torch.randn(2, 3, 32, device=FIRST)
    cache = CompressedCache((LayerKV(entries(20, rows=2), entries(20, rows=2)),), (20, 20), (24, 24))
    (layer,) = keeper.compress(cache).layers
    assert layer.keys.shape == (2, 2, BUDGET, DIM) and layer.keys.device == torch.device(SECOND)


@pytest.mark.parametrize("layer_class", [StreamLayer, WindowLayer])
def test_streams_rotate_keys_of_another_device(layer_class: type[Any]) -> None:
    angles = torch.randn(2, 1, window_places(BUDGET, CHUNK), DIM, device=FIRST)
    if layer_class is StreamLayer:
        layer: Any = StreamLayer(rotate=True)
    else:
        layer = WindowLayer(2, BUDGET, CHUNK, (angles[0][None], angles[1][None]))
    for _ in range(16):
        new, rotation = entries(CHUNK), torch.randn(1, CHUNK, DIM, device=SECOND)
        if layer_class is StreamLayer:
            num = layer.keys.shape[2] if layer.is_initialized else 0
            layer.set_rotations(angles[0][:, :num], angles[1][:, :num])
        layer.update(new, new, {"cos": rotation, "sin": rotation})
        if layer_class is WindowLayer:
            layer.evict()
        elif layer.keys.shape[2] > BUDGET:
            layer.keep(torch.arange(BUDGET, device=SECOND).expand(1, 2, -1))
    assert layer.keys.device == torch.device(SECOND)
