"""Kernels of a decoding step against PyTorch's and transformers' modules; on a CPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")

from lm_eval_kvpress.models.fast import triton_ops as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(size: int, seed: int, dtype: torch.dtype) -> nn.LayerNorm:
    norm = nn.LayerNorm(size, eps=1e-3, device=DEVICE, dtype=dtype)
    norm.weight.data, norm.bias.data = (random(size, seed=seed + part, dtype=dtype) for part in (0, 1))
    return norm


@DTYPES
@pytest.mark.parametrize("num_norms", [1, 2])
@pytest.mark.parametrize("adds", [False, True])
@torch.inference_mode()
def test_adds_and_norms_as_the_modules_do(dtype: torch.dtype, num_norms: int, adds: bool) -> None:
    x, attended, fed = (random(3, 80, seed=seed, dtype=dtype) for seed in range(3))
    norms = tuple(norm_of(80, 10 + 2 * place, dtype) for place in range(num_norms))
    out = tuple(torch.full_like(x, torch.nan) for _ in norms)
    summed = (x.float() + attended.float() + fed.float()).to(dtype) if adds else x.clone()
    expected = [norm(summed) for norm in norms]
    kernels.add_and_norm(x, (attended, fed) if adds else None, norms, out)
    torch.testing.assert_close(x, summed, atol=0, rtol=torch.finfo(dtype).eps)  # interpreted, bfloat16 is cut
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize("full_width", [False, True], ids=["as trained", "full width"])
@torch.inference_mode()
def test_rotates_as_transformers_does_and_writes_one_entry(dtype: torch.dtype, full_width: bool) -> None:
    rows, heads, dim, capacity, place, num_pairs = 2, 3, 20, 16, 5, 3
    width = dim if full_width else 2 * num_pairs
    angles = random(rows, 1, width // 2, seed=0)
    angles[..., num_pairs:] = 0  # as `pad_frequencies` does
    cos, sin = (torch.cat([turn(angles)] * 2, dim=-1).to(dtype) for turn in (torch.cos, torch.sin))
    qkv = random(rows, heads * 3 * dim, seed=1, dtype=dtype)
    query, key, value = qkv.view(rows, 1, heads, 3, dim).transpose(1, 2).unbind(dim=3)  # (B, H, 1, D) each
    wanted_query, wanted_key = apply_rotary_pos_emb(query.float(), key.float(), cos.float(), sin.float())

    found_query = torch.full((rows, heads, dim), torch.nan, device=DEVICE, dtype=dtype)
    keys, values = (random(rows, heads, capacity, dim, seed=seed, dtype=dtype) for seed in (2, 3))
    before = keys.clone(), values.clone()
    kernels.rotate_and_store(
        qkv, (cos, sin), num_pairs, found_query, keys, values, torch.tensor([place], device=DEVICE)
    )
    close = {"atol": CLOSE[dtype], "rtol": CLOSE[dtype]}
    torch.testing.assert_close(found_query.float(), wanted_query[:, :, 0], **close)
    torch.testing.assert_close(keys[:, :, place].float(), wanted_key[:, :, 0], **close)
    assert torch.equal(values[:, :, place], value[:, :, 0])
    others = [entry for entry in range(capacity) if entry != place]
    for found, old in zip((keys, values), before, strict=True):
        assert torch.equal(found[:, :, others], old[:, :, others])


def test_a_width_that_would_be_compiled_in_hundreds_of_pieces_is_left_to_the_library() -> None:
    widths = {512: True, 768: True, 2560: True, 10240: True, 20480: True, 2562: False, 1100: False}
    assert {width: kernels.can_multiply(nn.Linear(width, 1)) for width in widths} == widths


@DTYPES
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(80, 7), (64, 12), (3072, 5)])
@torch.inference_mode()
def test_a_product_of_one_row_is_that_of_the_layer(
    dtype: torch.dtype, gelu: bool, bias: bool, inputs: int, outputs: int
) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias, device=DEVICE, dtype=dtype)
    layer.weight.data = random(outputs, inputs, seed=1, dtype=dtype) / inputs**0.5
    if bias:
        layer.bias.data = random(outputs, seed=2, dtype=dtype)
    x = random(1, inputs, seed=0, dtype=dtype)
    out = torch.full((1, outputs), torch.nan, device=DEVICE, dtype=dtype)
    wanted = layer(x)
    found = kernels.vector_product(x, layer, out, gelu=gelu)
    assert found is out
    torch.testing.assert_close(
        found, nn.functional.gelu(wanted) if gelu else wanted, atol=CLOSE[dtype], rtol=CLOSE[dtype]
    )
