"""Triton kernels for one decoding step of GPTNeoX, except its attention (`triton_attention`).

A step reads every weight once and computes little. Of the 5.7 ms of Pythia-2.8B on an H200, 1.1 ms went to small
kernels between its products (docs/experiments/h200_decoding_step.md). Here the operations between two products of a
layer are one kernel, and for a single row a product is one kernel as well, with GELU at its end.

Knows Triton and tensors. Does not know models, presses or text. All tensors are contiguous and on one device. Sums are
fp32, and each result is rounded once. With ``TRITON_INTERPRET=1`` the kernels run on a CPU, where they are tested.

Letters in shape comments: B rows, E hidden size, H heads, D head_dim, C capacity of the buffers, W width of the
rotation, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

MOST_COLUMNS = 1_024
"""Columns of a weight's row that a warp reads at a time: enough to keep a multiprocessor's memory requests busy."""
MOST_PIECES = 32
"""Pieces of a row, at most. The loop over them is unrolled: with hundreds, as for a width that no large power of two
divides, Triton compiles for minutes."""


@triton.jit
def _add_and_norm(
    x_ptr,
    attended_ptr,
    fed_ptr,
    first_weight_ptr,
    first_bias_ptr,
    second_weight_ptr,
    second_bias_ptr,
    first_ptr,
    second_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    TWICE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(attended_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(fed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / SIZE, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + eps)
    weight = tl.load(first_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(first_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_ptr + place, (normed * weight + bias).to(first_ptr.dtype.element_ty), mask=inside)
    if TWICE:
        weight = tl.load(second_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(second_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(second_ptr + place, (normed * weight + bias).to(second_ptr.dtype.element_ty), mask=inside)


def add_and_norm(
    x: torch.Tensor,
    added: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[nn.LayerNorm, ...],
    out: tuple[torch.Tensor, ...],
) -> None:
    """Add a layer's outputs to the residual stream, in place, and normalise the sum by one or two layer norms.

    Args:
        x: ``(B, E)``, the residual stream.
        added: outputs of attention and feed-forward, ``(B, E)`` each; None before the first layer.
        norms: one or two, with the same eps.
        out: ``(B, E)`` for each norm; is written.
    """
    first, second = norms[0], norms[-1]
    attended, fed = added or (x, x)
    _add_and_norm[(x.shape[0],)](
        x,
        attended,
        fed,
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        out[0],
        out[-1],
        first.eps,
        SIZE=x.shape[1],
        BLOCK=triton.next_power_of_2(x.shape[1]),
        ADDS=added is not None,
        TWICE=len(norms) == 2,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["capacity"])
def _rotate_and_store(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    place_ptr,
    capacity,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1)
    of_all = (row * tl.num_programs(0) + head).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    inside = dim < DIM
    HALF: tl.constexpr = WIDTH // 2
    is_low, is_high = dim < PAIRS, (dim >= HALF) & (dim < HALF + PAIRS)
    pair = tl.where(is_high, dim - HALF, dim)
    partner = tl.where(is_low, dim + HALF, pair)
    turns = is_low | is_high
    cos = tl.load(cos_ptr + row * WIDTH + pair, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * WIDTH + pair, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(is_low, -sin, sin)
    query, key, value = qkv_ptr + of_all * 3 * DIM, qkv_ptr + (of_all * 3 + 1) * DIM, qkv_ptr + (of_all * 3 + 2) * DIM
    place = of_all * capacity * DIM + tl.load(place_ptr) * DIM + dim
    turned = tl.load(query + dim, mask=inside, other=0.0).to(tl.float32) * cos
    turned += tl.load(query + partner, mask=inside, other=0.0).to(tl.float32) * sin
    tl.store(query_ptr + of_all * DIM + dim, turned.to(query_ptr.dtype.element_ty), mask=inside)
    turned = tl.load(key + dim, mask=inside, other=0.0).to(tl.float32) * cos
    turned += tl.load(key + partner, mask=inside, other=0.0).to(tl.float32) * sin
    tl.store(keys_ptr + place, turned.to(keys_ptr.dtype.element_ty), mask=inside)
    tl.store(values_ptr + place, tl.load(value + dim, mask=inside), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    num_pairs: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    place: torch.Tensor,
) -> None:
    """Rotate queries and keys, and write keys and values into the buffers.

    Args:
        qkv: ``(B, H * 3 * D)``, head by head query, key and value.
        angles: cosines and sines, ``(B, 1, W)`` each.
        num_pairs: dim ``i`` below it turns with dim ``i + W / 2``, all others stay.
        query: ``(B, H, D)``; is written.
        keys, values: ``(B, H, C, D)``; the entry at ``place`` is written.
        place: ``(1,)``.
    """
    rows, heads, dim = query.shape
    _rotate_and_store[(heads, rows)](
        qkv,
        *angles,
        query,
        keys,
        values,
        place,
        keys.shape[2],
        DIM=dim,
        BLOCK_DIM=triton.next_power_of_2(dim),
        PAIRS=num_pairs,
        WIDTH=angles[0].shape[-1],
        num_warps=1,
    )


@triton.jit
def _vector_product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, SIZE, BLOCK):
        x = tl.load(x_ptr + first + column).to(tl.float32)
        products += tl.load(weight_ptr + row.to(tl.int64) * SIZE + first + column).to(tl.float32) * x
    out = tl.sum(products, 0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + row).to(tl.float32)
    if GELU:
        out = out.to(out_ptr.dtype.element_ty).to(tl.float32)
        out = 0.5 * out * (1.0 + tl.erf(out * 0.7071067811865476))
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))


def _block(size: int) -> int:
    return min(MOST_COLUMNS, size & -size)  # the largest power of two that divides it


def can_multiply(layer: nn.Linear) -> bool:
    """Whether `vector_product` can serve a layer of this width."""
    return layer.in_features // _block(layer.in_features) <= MOST_PIECES


def vector_product(x: torch.Tensor, layer: nn.Linear, out: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """Multiply a single row by a linear layer, one warp per output; ``out`` is written and returned.

    Args:
        x: ``(1, I)``.
        out: ``(1, O)``.
        gelu: whether GELU follows.
    """
    _vector_product[(layer.out_features,)](
        x,
        layer.weight,
        layer.bias,
        out,
        SIZE=layer.in_features,
        BLOCK=_block(layer.in_features),
        HAS_BIAS=layer.bias is not None,
        GELU=gelu,
        num_warps=1,
    )
    return out
