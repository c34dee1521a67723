"""Keys and values as integers of 8, 4 or 2 bits, packed into bytes, with a scale and a zero for each group of them.

Entries are packed in blocks of ``group`` entries of one row and head, a group of ``group`` numbers for each of its D
channels: *by channel*, a group is one channel of the block's entries; *by token*, it is ``group`` numbers in the order
of the tokens, one token's where D is ``group`` or a multiple of it. KIVI (https://arxiv.org/abs/2402.02750) packs keys
by channel, in which they have outliers, and values by token; transformers' ``QuantizedCache`` packs both by token.

A number is ``code * scale + offset``. ``scales=float`` stores scale and offset as KIVI, quanto and HQQ do: the group's
lowest number and the step, in the dtype of the model, 32 bits per group in 16 bit. ``scales=compact`` stores 16 bits
(24 beside 8-bit codes): the scale is a power of ``2 ** (1/8)``, rounded up, so at most 9 % coarser, and the offset a
whole number of scales. Either way an entry is wrong by half a step at most.

Why these are our own lines: transformers' ``QuantizedCache`` packs a whole batch as one opaque tensor, so rows cannot
be taken or joined (its row operations act on the unpacked rest alone, transformers pull request 45510), and every
update packs anew what was packed before. Of its backends, quanto has had no release since 2025-03 and no 8 bits with
groups, and HQQ moves its tensors to CUDA. torchao's affine primitives leave codes unpacked and are private for scales
beside the default. Ragged batches of rows are what this package scores.

Knows tensors only. Letters in shape comments: B rows, H key-value heads, N blocks, G entries of a block, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

BITS = {"int8": 8, "int4": 4, "int2": 2}

STEPS_PER_OCTAVE = 8
SMALLEST_EXPONENT = -18
NOT_FINITE = 255
"""Compact scales are ``2 ** (code / 8 - 18)``: from 4e-6 to 2e4 (codes below 255). The last code stands for a group
that holds NaN or infinity, which must stay visible in the scores."""


@dataclass(frozen=True)
class Quantization:
    """How kept entries are stored.

    Attributes:
        name: ``int8``, ``int4`` or ``int2``.
        group: numbers that share a scale, and entries of a block; a multiple of 8.
        residual: newest entries of a context that stay in full precision.
        layout: ``kivi`` packs keys by channel and values by token, ``token`` both by token.
        scales: ``compact`` or ``float``.
    """

    name: str
    group: int = 64
    residual: int = 0
    layout: str = "kivi"
    scales: str = "compact"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.name]

    def bits_per_number(self, dtype: torch.dtype) -> float:
        """Bits that a packed number takes with its part of scale and zero, for entries of a dtype."""
        compact = 8 + 8 * _zeros_dtype(self.bits).itemsize
        return self.bits + (compact if self.scales == "compact" else 16 * dtype.itemsize) / self.group

    def describe(self) -> dict[str, Any]:
        """The arguments by which they are typed, ready for JSON."""
        return {
            "kv_quant": self.name,
            "kv_group": self.group,
            "kv_residual": self.residual,
            "kv_layout": self.layout,
            "kv_scales": self.scales,
        }


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed keys or values of some rows.

    Attributes:
        codes: ``(B, H, N, D, G * bits / 8)``, uint8; a byte holds the codes of places ``i``, ``i + G * bits / 8``, ...
            of a group, the first in its lowest bits.
        scales, zeros: ``(B, H, N, D)``, of each group.
        rule: how they were packed.
        by_channel: whether a group is a channel of a block.
        dtype: of the numbers that were packed.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    rule: Quantization
    by_channel: bool
    dtype: torch.dtype

    @property
    def num_entries(self) -> int:
        """N * G, places of entries."""
        return self.codes.shape[2] * self.rule.group

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Blocks:
        """The blocks with the same change, over the dims B, H and N, made to all tensors."""
        return replace(self, codes=change(self.codes), scales=change(self.scales), zeros=change(self.zeros))

    def unpack(self) -> torch.Tensor:
        """``(B, H, N * G, D)``, in the dtype of what was packed."""
        bits, wide = self.rule.bits, _computed_in(self.dtype)
        parts = [(self.codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        scale, offset = _floats(self.scales, self.zeros, wide)
        numbers = torch.cat(parts, dim=-1).to(wide)  # (B, H, N, D, G)
        numbers = numbers.mul_(scale[..., None]).add_(offset[..., None]).to(self.dtype)
        if self.by_channel:
            numbers = numbers.transpose(-1, -2)
        batch, heads, num_blocks, dim = self.scales.shape
        return numbers.reshape(batch, heads, num_blocks * self.rule.group, dim)


def pack(entries: torch.Tensor, rule: Quantization, *, by_channel: bool, ignored: torch.Tensor | None) -> Blocks:
    """Pack keys or values.

    Args:
        entries: ``(B, H, N * G, D)``.
        ignored: ``(B, 1 or H, N * G)``, True for entries that no scale must depend on because nothing reads them.
    """
    numbers = _grouped(entries, rule.group, by_channel).to(_computed_in(entries.dtype))  # (B, H, N, D, G)
    out = None if ignored is None else _grouped(ignored[..., None].expand_as(entries), rule.group, by_channel)
    low, high = _ranges(numbers, out)
    scales, zeros = _compact(low, high, rule.bits) if rule.scales == "compact" else _as_floats(low, high, rule, entries)
    scale, offset = _floats(scales, zeros, numbers.dtype)
    codes = numbers.sub(offset[..., None]).div_(scale[..., None]).round_().nan_to_num_().clamp_(0, 2**rule.bits - 1)
    return Blocks(_packed(codes.to(torch.uint8), rule.bits), scales, zeros, rule, by_channel, entries.dtype)


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(entries: torch.Tensor, group: int, by_channel: bool) -> torch.Tensor:
    """``(B, H, N * G, D)`` to ``(B, H, N, D, G)``: one group per row of the last dim."""
    batch, heads, num_entries, dim = entries.shape
    num_blocks = num_entries // group
    if by_channel:
        return entries.reshape(batch, heads, num_blocks, group, dim).transpose(-1, -2)
    return entries.reshape(batch, heads, num_blocks, dim, group)


def _ranges(numbers: torch.Tensor, ignored: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest number of each group, ``(B, H, N, D)``; 0 where all of them are ignored."""
    if ignored is None:
        return numbers.amin(dim=-1), numbers.amax(dim=-1)
    low = numbers.masked_fill(ignored, torch.inf).amin(dim=-1)
    high = numbers.masked_fill(ignored, -torch.inf).amax(dim=-1)
    is_empty = ignored.all(dim=-1)
    return low.masked_fill_(is_empty, 0), high.masked_fill_(is_empty, 0)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``(..., G)`` to ``(..., G * bits / 8)``."""
    first, *others = codes.chunk(8 // bits, dim=-1)
    first = first.clone()
    for place, part in enumerate(others, start=1):
        first |= part << (place * bits)
    return first


# ------------------------------------------------------------------------------------------------ scales and zeros


def _compact(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A code for the smallest scale that reaches from the lowest to the highest number, and the lowest in scales."""
    stored = _zeros_dtype(bits)
    farthest = torch.iinfo(stored).max
    needed = torch.maximum((high - low) / (2**bits - 1), low.abs() / farthest)
    codes = (needed.log2() * STEPS_PER_OCTAVE).ceil() - SMALLEST_EXPONENT * STEPS_PER_OCTAVE
    codes = codes.nan_to_num(nan=NOT_FINITE).clamp_(0, NOT_FINITE - 1)
    codes = codes.masked_fill_(~(low.isfinite() & high.isfinite()), NOT_FINITE).to(torch.uint8)
    zeros = (low / _scale_of(codes, low.dtype)).round().nan_to_num(0.0).clamp_(-farthest, farthest)
    return codes, zeros.to(stored)


def _zeros_dtype(bits: int) -> torch.dtype:
    return torch.int16 if bits == 8 else torch.int8


def _as_floats(
    low: torch.Tensor, high: torch.Tensor, rule: Quantization, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and the lowest number, in the dtype of the entries; a step of one where all numbers are the same."""
    step = ((high - low) / (2**rule.bits - 1)).to(like.dtype)
    return step.masked_fill_(step == 0, 1), low.to(like.dtype)


def _floats(scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
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
