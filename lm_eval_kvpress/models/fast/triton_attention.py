"""Attention of one token per row to buffers of keys and values that are not full yet, in Triton.

PyTorch's attention runs one block per row and head, which leaves a GPU idle at few rows, and reads the whole buffer.
Here the entries of a head, up to the newest one, are cut into spans; a block attends to each span, and a second kernel
merges them (flash decoding, Dao et al. 2023, over the online softmax of Milakov and Gimelshein, arXiv:1805.02867). On
an H200, 1,900 entries take 12.6 us instead of 85 for one row and 173 instead of 489 for 32 rows; where four query heads
share a key-value head, 8 instead of 87 and 69 instead of 133 (docs/experiments/shared_kv_heads.md).

Knows Triton and tensors. Does not know models, presses or text. All tensors are contiguous and on one device.

Letters in shape comments: B rows, H query heads, G query heads per key-value head, D head_dim, C capacity of the
buffers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 32
QUERY_ROWS = 16
"""Rows of a query tile, the least that a tensor core multiplies; each query of a key-value head fills one."""
WANTED_BLOCKS = 512
LEAST_SPANS = 4
"""Spans of a head, at least: shorter blocks end closer together. With this and 512 wanted blocks (512 to 8,192 were
tried) 1, 8 and 32 rows were each within 2 % of their best time."""


@triton.jit(do_not_specialize=["capacity", "span", "mask_row", "mask_head"])
def _attend_to_spans(
    query_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    place_ptr,
    mixed_ptr,
    highest_ptr,
    total_ptr,
    scale,
    capacity,
    span,
    mask_row,
    mask_head,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
):
    index, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_all = (row * tl.num_programs(1) + head).to(tl.int64)
    dim, token, lane = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_TOKENS), tl.arange(0, QUERY_ROWS)
    inside, is_query = dim < DIM, lane < GROUP
    queries, is_number = of_all * GROUP + lane, is_query[:, None] & inside[None, :]
    query = tl.load(query_ptr + queries[:, None] * DIM + dim[None, :], mask=is_number, other=0.0)
    start = index * span
    end = tl.minimum(start + span, tl.load(place_ptr).to(tl.int32) + 1)
    highest = tl.full([QUERY_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_ROWS], tl.float32)
    mixed = tl.zeros([QUERY_ROWS, BLOCK_DIM], tl.float32)
    head_at = of_all * capacity * DIM
    mask_at = mask_ptr + row.to(tl.int64) * mask_row + head * GROUP * mask_head
    for first in tl.range(start, end, BLOCK_TOKENS):
        at = first + token
        there = at < end
        keys = tl.load(
            keys_ptr + head_at + at[None, :] * DIM + dim[:, None], mask=there[None, :] & inside[:, None], other=0.0
        )
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        if MASK_PER_QUERY:
            masks_at = mask_at + lane[:, None] * mask_head + at[None, :]
            scores += tl.load(masks_at, mask=is_query[:, None] & there[None, :], other=0.0).to(tl.float32)
        else:  # which takes two thirds of the time and less
            scores += tl.load(mask_at + at, mask=there, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        shares, shrunk = tl.exp(scores - risen[:, None]), tl.exp(highest - risen)
        values = tl.load(
            values_ptr + head_at + at[:, None] * DIM + dim[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        mixed = mixed * shrunk[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        total = total * shrunk + tl.sum(shares, 1)
        highest = risen
    out = queries * tl.num_programs(0) + index
    tl.store(mixed_ptr + out[:, None] * DIM + dim[None, :], mixed, mask=is_number)
    tl.store(highest_ptr + out, highest, mask=is_query)
    tl.store(total_ptr + out, total, mask=is_query)


@triton.jit(do_not_specialize=["num_spans"])
def _merge_spans(
    mixed_ptr,
    highest_ptr,
    total_ptr,
    out_ptr,
    num_spans,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
):
    of_all = tl.program_id(0).to(tl.int64)
    dim, span = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_SPANS)
    inside, there = dim < DIM, span < num_spans
    at = of_all * num_spans + span
    highest = tl.load(highest_ptr + at, mask=there, other=float("-inf"))
    share = tl.exp(highest - tl.max(highest, 0))
    total = tl.sum(share * tl.load(total_ptr + at, mask=there, other=0.0), 0)
    mixed = tl.load(mixed_ptr + at[:, None] * DIM + dim[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    merged = tl.sum(mixed * share[:, None], 0) / total
    tl.store(out_ptr + of_all * DIM + dim, merged.to(out_ptr.dtype.element_ty), mask=inside)


class Attention:
    """Attend from one token per row to the written entries of the buffers, the one at ``place`` included.

    Args:
        rows, heads, dim: shape of the queries, ``(B, H, D)``.
        capacity: the largest C.
        like: has the dtype and device of the result.
        per_key_head: G.
    """

    def __init__(
        self, rows: int, heads: int, dim: int, capacity: int, like: torch.Tensor, *, per_key_head: int = 1
    ) -> None:
        num_blocks = -(-capacity // BLOCK_TOKENS)
        num_spans = min(num_blocks, max(LEAST_SPANS, WANTED_BLOCKS * per_key_head // (rows * heads)))
        self._span = -(-num_blocks // num_spans) * BLOCK_TOKENS
        parts = (rows, heads, -(-capacity // self._span))
        self.block_spans = triton.next_power_of_2(parts[2])
        """The number of spans that the merging kernel is compiled for."""
        self._mixed = like.new_empty(*parts, dim, dtype=torch.float32)
        self._highest, self._total = (like.new_empty(parts, dtype=torch.float32) for _ in range(2))
        self._out = like.new_empty(rows, heads * dim)
        self._sizes = {"DIM": dim, "BLOCK_DIM": max(16, triton.next_power_of_2(dim))}  # 16: the least of a tensor core
        query_rows = max(QUERY_ROWS, triton.next_power_of_2(per_key_head))
        self._group = {"GROUP": per_key_head, "QUERY_ROWS": query_rows}
        num_stages = 3 if like.element_size() == 2 and dim < 128 else 2
        self._launch = {"num_warps": 1 if dim <= 128 else 2, "num_stages": num_stages}

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        place: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """``(B, H * D)``, in a buffer that the next call overwrites.

        Args:
            query: ``(B, H, D)``.
            keys, values: ``(B, H / G, C, D)``, of which entries up to ``place``, ``(1,)``, are written.
            mask: ``(1 or B, 1 or H, 1, C)``; is added to the scores.
        """
        rows, heads, num_spans, _ = self._mixed.shape
        parts = (self._mixed, self._highest, self._total)
        _attend_to_spans[(num_spans, keys.shape[1], rows)](
            query,
            keys,
            values,
            mask,
            place,
            *parts,
            scale,
            keys.shape[2],
            self._span,
            _stride(mask, 0),
            _stride(mask, 1),
            **self._sizes,
            BLOCK_TOKENS=BLOCK_TOKENS,
            **self._group,
            MASK_PER_QUERY=self._group["GROUP"] > 1 and mask.shape[1] > 1,
            **self._launch,
        )
        spans = {"BLOCK_SPANS": self.block_spans}
        _merge_spans[(rows * heads,)](*parts, self._out, num_spans, **self._sizes, **spans, num_warps=2)
        return self._out


def _stride(mask: torch.Tensor, dim: int) -> int:
    """A mask's stride; 0 where one mask serves all rows, or all heads."""
    return mask.stride(dim) if mask.shape[dim] > 1 else 0
