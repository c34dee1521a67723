"""The scale and the zero of a group of numbers, from its lowest and its highest: compact, or as floats (`quantized`).

Knows tensors only.
"""

from __future__ import annotations

import functools

import torch

STEPS_PER_OCTAVE = 8
SMALLEST_EXPONENT = -18
NOT_FINITE = 255
"""Compact scales are ``2 ** (code / 8 - 18)``: from 4e-6 to 2e4 (codes below 255). The last code stands for a group
that holds NaN or infinity, which must stay visible in the scores."""


def compact(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A code for the smallest scale that reaches from the lowest to the highest number, and the lowest in scales."""
    stored = zeros_dtype(bits)
    farthest = torch.iinfo(stored).max
    needed = torch.maximum((high - low) / (2**bits - 1), low.abs() / farthest)
    codes = (needed.log2() * STEPS_PER_OCTAVE).ceil() - SMALLEST_EXPONENT * STEPS_PER_OCTAVE
    codes = codes.nan_to_num(nan=NOT_FINITE).clamp_(0, NOT_FINITE - 1)
    codes = codes.masked_fill_(~(low.isfinite() & high.isfinite()), NOT_FINITE).to(torch.uint8)
    zeros = (low / _scale_of(codes, low.dtype)).round().nan_to_num(0.0).clamp_(-farthest, farthest)
    return codes, zeros.to(stored)


def zeros_dtype(bits: int) -> torch.dtype:
    """Of compact zeros, beside codes of so many bits.

    A scale need not be coarser than its group's range asks for while the lowest number is at most 42 (int2), 2,184
    (int4) or 128 (int8) ranges from 0: so far the zero reaches. With 8 bits int4's would reach 8 ranges, beyond which
    keys with a bias may lie in channels that hardly rotate.
    """
    return torch.int8 if bits == 2 else torch.int16


def as_floats(
    low: torch.Tensor, high: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and the lowest number, in a dtype; a step of one where all numbers are the same."""
    step = ((high - low) / (2**bits - 1)).to(dtype)
    return step.masked_fill_(step == 0, 1), low.to(dtype)


def floats(scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of each group, as they are computed with."""
    if scales.dtype != torch.uint8:
        return scales.to(dtype), zeros.to(dtype)
    scale = _scale_of(scales, dtype)
    return scale, zeros.to(dtype) * scale


def _scale_of(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _scales(codes.device, dtype)[codes.int()]


@functools.lru_cache(maxsize=16)
def _scales(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The scale of every code, ``(256,)``."""
    exponents = torch.arange(256, dtype=torch.float64) / STEPS_PER_OCTAVE + SMALLEST_EXPONENT
    scales = exponents.exp2()
    scales[NOT_FINITE] = torch.nan
    return scales.to(device, dtype)
