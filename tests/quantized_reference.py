"""Keys and values as quantization should leave them, one group at a time in float64, written apart from the package.

A group's numbers move to the nearest point of its grid. Blocks are counted from the newest packed entry backwards, so
that the oldest block may be short.
"""

from __future__ import annotations

import numpy as np
import torch

COMPACT_SCALES = 2.0 ** (np.arange(255) / 8 - 18)
BITS = {"int8": 8, "int4": 4, "int2": 2}


def grid(numbers: np.ndarray, bits: int, scales: str) -> np.ndarray:
    """The points that a group's numbers can take."""
    low, high, steps = numbers.min(), numbers.max(), 2**bits - 1
    if scales == "float":
        return low + (high - low) / steps * np.arange(steps + 1)
    farthest = 127 if bits == 2 else 32_767
    scale = COMPACT_SCALES[max((high - low) / steps, abs(low) / farthest) <= COMPACT_SCALES][0]
    return (np.rint(low / scale) + np.arange(steps + 1)) * scale


def on_grid(numbers: np.ndarray, bits: int, scales: str) -> np.ndarray:
    points = grid(numbers, bits, scales)
    return points[np.abs(numbers[:, None] - points[None]).argmin(axis=1)]


def as_fp8(numbers: np.ndarray) -> np.ndarray:
    """The nearest E4M3 numbers: three bits after the point, exponents from -6, at most 448."""
    exponents = np.floor(np.log2(np.maximum(np.abs(numbers), 2.0**-6)))
    steps = 2.0 ** (np.maximum(exponents, -6) - 3)
    return np.clip(np.rint(numbers / steps) * steps, -448, 448)


def head_entries(
    entries: np.ndarray, name: str, group: int, by_channel: bool, scales: str, residual: int
) -> np.ndarray:
    """``(T, D)`` of one row and head, packed and unpacked."""
    found = entries.copy()
    if name == "fp8":
        found[: len(entries) - residual] = as_fp8(entries[: len(entries) - residual])
        return found
    for end in range(len(entries) - residual, 0, -group):
        block = found[max(0, end - group) : end]  # a view
        if by_channel:
            for channel in range(block.shape[1]):
                block[:, channel] = on_grid(block[:, channel], BITS[name], scales)
        else:
            flat = block.reshape(-1)  # also a view; its last group is whole
            for last in range(len(flat), 0, -group):
                part = slice(max(0, last - group), last)
                flat[part] = on_grid(flat[part], BITS[name], scales)
    return found


def stored(
    entries: torch.Tensor,
    name: str,
    *,
    by_channel: bool,
    group: int = 64,
    scales: str = "compact",
    residual: int = 0,
) -> torch.Tensor:
    """``(B, H, T, D)``, packed and unpacked, in float64."""
    rows = entries.double().flatten(0, 1).numpy()
    found = [head_entries(np.ascontiguousarray(row), name, group, by_channel, scales, residual) for row in rows]
    return torch.from_numpy(np.stack(found)).view(entries.shape)
