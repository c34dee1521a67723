"""Attention over spans of unfilled buffers against PyTorch's over what is written of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")

from lm_eval_kvpress.models.fast import triton_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS, DIM = 3, 20


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def difference(
    rows: int,
    capacity: int,
    place: int,
    *,
    hidden: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    group: int = 1,
) -> float:
    """The largest, from PyTorch's in fp32. What is not written is NaN: whoever reads it is found out."""
    heads = HEADS * group
    query = 2 * random(rows, heads, DIM, seed=0, dtype=dtype)
    keys, values = (random(rows, HEADS, capacity, DIM, seed=seed, dtype=dtype) for seed in (1, 2))
    keys[:, :, place + 1 :] = values[:, :, place + 1 :] = torch.nan
    mask = torch.zeros(1, 1, 1, capacity, dtype=dtype, device=DEVICE)
    if hidden is not None:
        mask = mask.masked_fill(hidden[:, :, None].to(DEVICE), torch.finfo(dtype).min)
    attend = triton_attention.Attention(rows, heads, DIM, capacity, query, per_key_head=group)
    found = attend(query, keys, values, mask, torch.tensor([place], device=DEVICE), DIM**-0.5)
    written = slice(0, place + 1)
    wanted = nn.functional.scaled_dot_product_attention(
        query[:, :, None].float(),
        keys[:, :, written].float(),
        values[:, :, written].float(),
        attn_mask=mask[..., written].float(),
        enable_gqa=True,
    )
    return (found.float() - wanted[:, :, 0].reshape(rows, -1)).abs().max().item()


@pytest.mark.parametrize("wanted_blocks", [1, 8, 1_000], ids="{} blocks".format)
@pytest.mark.parametrize(
    ("rows", "capacity", "place"), [(1, 16, 0), (1, 160, 159), (2, 96, 31), (2, 96, 32), (2, 176, 100)]
)
def test_attends_to_what_is_written(
    rows: int, capacity: int, place: int, wanted_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "WANTED_BLOCKS", wanted_blocks)
    monkeypatch.setattr(triton_attention, "LEAST_SPANS", 1)
    assert difference(rows, capacity, place) < CLOSE[torch.float32]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_in_each_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU: Triton's interpreter multiplies no matrices of bfloat16")
    assert difference(2, 96, 70, dtype=dtype) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, HEADS])
def test_hides_what_the_mask_hides_whole_spans_too(heads: int, dtype: torch.dtype) -> None:
    hidden = torch.rand(2, heads, 144, generator=torch.Generator().manual_seed(4)) < 0.5
    hidden[0, :, :70] = True  # more than the first spans
    hidden[:, :, 120] = False
    assert difference(2, 144, 120, hidden=hidden, dtype=dtype) < CLOSE[dtype]
    assert difference(2, 144, 120, dtype=dtype) < CLOSE[dtype]


@pytest.mark.parametrize("group", [2, 5, 20])
def test_heads_of_a_group_share_keys_and_have_masks_of_their_own(group: int) -> None:
    hidden = torch.rand(2, HEADS * group, 80, generator=torch.Generator().manual_seed(5)) < 0.5
    hidden[:, :, 60] = False
    assert difference(2, 80, 60, group=group) < CLOSE[torch.float32]
    assert difference(2, 80, 60, group=group, hidden=hidden) < CLOSE[torch.float32]
    assert difference(2, 80, 60, group=group, hidden=hidden[:, :1]) < CLOSE[torch.float32]
