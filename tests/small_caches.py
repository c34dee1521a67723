"""Compressed caches of random entries, for tests that need no model."""

from __future__ import annotations

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV

HEADS, DIM = 4, 8


def layer(batch: int, entries: int, seed: int, hidden_heads: int | None = None) -> LayerKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, entries, DIM, generator=generator)
    if hidden_heads is None:
        return LayerKV(keys, values)
    return LayerKV(keys, values, torch.rand(batch, hidden_heads, entries, generator=generator) < 0.4)


def one_row(entries: tuple[int, ...], seed: int, hidden_heads: int | None = None, seen: int = 50) -> CompressedCache:
    layers = tuple(layer(1, count, 10 * seed + index, hidden_heads) for index, count in enumerate(entries))
    return CompressedCache(layers, (seen,), (seen,), torch.full((1, 3), float(seed)))
