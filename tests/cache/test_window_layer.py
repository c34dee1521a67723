"""A window that slides and is moved to the front holds the sinks and the newest entries, each rotated by its place."""

from __future__ import annotations

import pytest
import torch

from lm_eval_kvpress.cache.window_layer import WindowLayer, window_places

BUDGET, CHUNK, DIM = 12, 3, 8


def angles(places: torch.Tensor) -> torch.Tensor:
    return places[:, None] * 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))


def turned(keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotate keys ``(T, D)``, pairs of dims as complex numbers."""
    pairs = torch.complex(*keys.chunk(2, dim=-1)) * torch.exp(1j * angles(places))
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("num_sinks", [0, 4])
@pytest.mark.parametrize("rotates", [True, False])
def test_sinks_and_newest_entries_stay_at_their_places_over_many_moves(num_sinks: int, rotates: bool) -> None:
    table = angles(torch.arange(window_places(BUDGET, CHUNK)).float()).repeat(1, 2)[None, None]
    layer = WindowLayer(num_sinks, BUDGET, CHUNK, (table.cos(), table.sin()) if rotates else None)
    keys, values = torch.randn(2, 90, DIM, generator=torch.Generator().manual_seed(1))
    stay, begins = list[int](), list[int]()
    for start in range(0, 90, CHUNK):
        new = list(range(start, start + CHUNK))
        places = layer.begin + len(stay) + torch.arange(CHUNK) if rotates else torch.tensor(new)
        rotated = turned(keys[new], places.float())
        found, seen = layer.update(rotated[None, None], values[new][None, None])
        stay += new
        where = layer.begin + torch.arange(len(stay)) if rotates else torch.tensor(stay)
        torch.testing.assert_close(found[0, 0], turned(keys[stay], where.float()), atol=1e-4, rtol=0)
        assert torch.equal(seen[0, 0], values[stay])
        layer.evict()
        stay = stay if len(stay) <= BUDGET else stay[:num_sinks] + stay[len(stay) - BUDGET + num_sinks :]
        begins.append(layer.begin)
    assert sum(after < before for before, after in zip(begins, begins[1:], strict=False)) >= 3, "it was moved"
