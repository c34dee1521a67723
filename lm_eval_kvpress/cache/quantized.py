"""Keys and values as integers of 8, 4 or 2 bits, packed into bytes, with a scale and a zero for each group of them.

Entries are packed in blocks of ``group`` entries of one row and head, a group of ``group`` numbers for each of its D
channels: *by channel*, a group is one channel of the block's entries; *by token*, it is ``group`` numbers in the order
of the tokens, one token's where D is ``group`` or a multiple of it. If both keys and values are packed by such tokens,
a block is one entry, and entries can be evicted one by one. KIVI (https://arxiv.org/abs/2402.02750) packs keys
by channel, in which they have outliers, and values by token; transformers' ``QuantizedCache`` packs both by token.

A number is ``code * scale + offset``. ``scales=float`` stores scale and offset as KIVI, quanto and HQQ do: the group's
lowest number and the step, in the dtype of the model, 32 bits per group in 16 bit. ``scales=compact`` stores 24 bits
(16 beside 2-bit codes): the scale is a power of ``2 ** (1/8)``, rounded up, so at most 9 % coarser, and the offset a
whole number of scales. Either way an entry is wrong by half a step at most.

Why these are our own lines: transformers' ``QuantizedCache`` packs a whole batch as one opaque tensor, so rows cannot
be taken or joined (its row operations act on the unpacked rest alone, transformers pull request 45510), and every
update packs anew what was packed before. Of its backends, quanto has had no release since 2025-03 and no 8 bits with
groups, and HQQ moves its tensors to CUDA. torchao's affine primitives leave codes unpacked and are private for scales
beside the default. Ragged batches of rows are what this package scores.

``fp8`` has no groups: an entry's numbers are cast (`fp8`).

Knows tensors only. Letters in shape comments: B rows, H key-value heads, N blocks, E entries and K groups of a block, G
numbers of a group, D head_dim; a block has E * D = K * G numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm_eval_kvpress.cache import fp8, group_scales

BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}


@dataclass(frozen=True)
class Quantization:
    """How kept entries are stored.

    Attributes:
        name: ``int8``, ``int4``, ``int2`` or ``fp8``, which the last three do not concern.
        residual: newest entries of a context that stay in full precision.
        group: numbers that share a scale; a multiple of 8.
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

    @property
    def is_float(self) -> bool:
        """Whether numbers are cast, without groups."""
        return self.name == "fp8"

    def block_entries(self, dim: int) -> int:
        """E, of heads of so many dims: 1 if no group is shared by several entries."""
        return 1 if self.is_float or (self.layout == "token" and dim % self.group == 0) else self.group

    def bits_per_number(self, dtype: torch.dtype) -> float:
        """Bits that a packed number takes with its part of scale and zero, for entries of a dtype."""
        if self.is_float:
            return self.bits
        compact = 8 + 8 * group_scales.zeros_dtype(self.bits).itemsize
        return self.bits + (compact if self.scales == "compact" else 16 * dtype.itemsize) / self.group

    def describe(self) -> dict[str, Any]:
        """The arguments by which they are typed, ready for JSON."""
        facts = {"kv_quant": self.name, "kv_residual": self.residual}
        groups = {"kv_group": self.group, "kv_layout": self.layout, "kv_scales": self.scales}
        return facts if self.is_float else facts | groups


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed keys or values of some rows.

    Attributes:
        codes: ``(B, H, N, K, G * bits / 8)``, uint8; a byte holds the codes of places ``i``, ``i + G * bits / 8``, ...
            of a group, the first in its lowest bits. With ``fp8``, ``(B, H, N, 1, D)``, the bytes of the numbers.
        scales, zeros: ``(B, H, N, K)``, of each group; of no group with ``fp8``.
        rule: how they were packed.
        by_channel: whether a group is a channel of a block.
        dtype: of the numbers that were packed.
        block_entries: E.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    rule: Quantization
    by_channel: bool
    dtype: torch.dtype
    block_entries: int

    @property
    def num_entries(self) -> int:
        """N * E, places of entries."""
        return self.codes.shape[2] * self.block_entries

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Blocks:
        """The blocks with the same change, over the dims B, H and N, made to all tensors."""
        return replace(self, codes=change(self.codes), scales=change(self.scales), zeros=change(self.zeros))

    def at(self, places: torch.Tensor) -> Blocks:
        """The entries of each head at the given places, ``(B, H, T)``, where a block is one entry."""
        assert self.block_entries == 1, f"blocks of {self.block_entries} entries share scales"

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            beyond = tensor.shape[3:]
            index = places.reshape(*places.shape, *[1] * len(beyond)).expand(*places.shape, *beyond)
            return tensor.gather(2, index)

        return self.map(taken)

    def followed_by(self, newer: Blocks) -> Blocks:
        """These blocks and newer ones of the same rows behind them."""
        pairs = ((getattr(self, name), getattr(newer, name)) for name in ("codes", "scales", "zeros"))
        codes, scales, zeros = (torch.cat(pair, dim=2) for pair in pairs)
        return replace(self, codes=codes, scales=scales, zeros=zeros)

    def unpack(self) -> torch.Tensor:
        """``(B, H, N * E, D)``, in the dtype of what was packed."""
        if self.rule.is_float:
            return fp8.numbers_of(self.codes, self.dtype).flatten(2, 3)
        bits, wide = self.rule.bits, _computed_in(self.dtype)
        parts = [(self.codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        scale, offset = group_scales.floats(self.scales, self.zeros, wide)
        numbers = torch.cat(parts, dim=-1).to(wide)  # (B, H, N, K, G)
        numbers = numbers.mul_(scale[..., None]).add_(offset[..., None]).to(self.dtype)
        if self.by_channel:
            numbers = numbers.transpose(-1, -2)
        batch, heads, _, num_groups = self.scales.shape
        dim = num_groups * self.rule.group // self.block_entries
        return numbers.reshape(batch, heads, self.num_entries, dim)


def pack(
    entries: torch.Tensor, rule: Quantization, *, by_channel: bool = False, ignored: torch.Tensor | None = None
) -> Blocks:
    """Pack keys or values.

    Args:
        entries: ``(B, H, N * E, D)``.
        ignored: ``(B, 1 or H, N * E)``, True for entries that no scale must depend on because nothing reads them.
    """
    block = rule.block_entries(entries.shape[3])
    if rule.is_float:
        codes = fp8.bytes_of(entries)[..., None, :]
        nothing = codes.new_empty(*codes.shape[:3], 0)
        return Blocks(codes, nothing, nothing, rule, False, entries.dtype, block)
    numbers = _grouped(entries, rule.group, block, by_channel).to(_computed_in(entries.dtype))  # (B, H, N, K, G)
    out = None if ignored is None else _grouped(ignored[..., None].expand_as(entries), rule.group, block, by_channel)
    low, high = _ranges(numbers, out)
    if rule.scales == "compact":
        scales, zeros = group_scales.compact(low, high, rule.bits)
    else:
        scales, zeros = group_scales.as_floats(low, high, rule.bits, entries.dtype)
    scale, offset = group_scales.floats(scales, zeros, numbers.dtype)
    codes = numbers.sub(offset[..., None]).div_(scale[..., None]).round_().nan_to_num_().clamp_(0, 2**rule.bits - 1)
    packed = _packed(codes.to(torch.uint8), rule.bits)
    return Blocks(packed, scales, zeros, rule, by_channel, entries.dtype, block)


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(entries: torch.Tensor, group: int, block_entries: int, by_channel: bool) -> torch.Tensor:
    """``(B, H, N * E, D)`` to ``(B, H, N, K, G)``: one group per row of the last dim."""
    batch, heads, num_entries, dim = entries.shape
    num_blocks = num_entries // block_entries
    if by_channel:
        return entries.reshape(batch, heads, num_blocks, group, dim).transpose(-1, -2)
    return entries.reshape(batch, heads, num_blocks, block_entries * dim // group, group)


def _ranges(numbers: torch.Tensor, ignored: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest number of each group, ``(B, H, N, K)``; 0 where all of them are ignored."""
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
