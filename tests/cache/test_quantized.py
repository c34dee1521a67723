"""Packed numbers are those of a reference that moves each group to the nearest points of its grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from quantized_reference import stored
from torch import Tensor

from lm_eval_kvpress.cache.group_scales import floats
from lm_eval_kvpress.cache.quantized import Blocks, Quantization, pack

NAMES = ["int8", "int4", "int2"]


def entries(num_entries: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Channels with outliers: another size and another mean in each."""
    generator = torch.Generator().manual_seed(seed)
    sizes, means = torch.rand(2, 1, 2, 1, dim, generator=generator, dtype=torch.float64)
    numbers = torch.randn(2, 2, num_entries, dim, generator=generator, dtype=torch.float64)
    return (numbers * sizes + 20 * (means - 0.5)).to(dtype)


def packed(numbers: Tensor, name: str, *, by_channel: bool = False, ignored: Tensor | None = None) -> Blocks:
    return pack(numbers, Quantization(name), by_channel=by_channel, ignored=ignored)


@pytest.mark.parametrize(("name", "by_channel"), itertools.product(NAMES, [True, False]))
@pytest.mark.parametrize("scales", ["compact", "float"])
@pytest.mark.parametrize("dim", [16, 80])
def test_unpacked_numbers_are_the_references(name: str, by_channel: bool, scales: str, dim: int) -> None:
    given, group = entries(48, dim), 16
    found = pack(given, Quantization(name, group, scales=scales), by_channel=by_channel, ignored=None).unpack()
    expected = stored(given, name, by_channel=by_channel, group=group, scales=scales)
    assert (given - expected).abs().max() > 1e-3, "the reference must round"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "most"), [("int8", 128), ("int4", 2_184), ("int2", 42)])
def test_steps_of_compact_scales_are_hardly_coarser_than_of_floats_far_from_zero(name: str, most: int) -> None:
    """Keys with a bias have channels whose numbers are all far from zero, on either side."""
    given = torch.rand(1, 1, 64, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given -= given.amin(dim=2, keepdim=True)
    given /= given.amax(dim=2, keepdim=True)  # ranges of one
    given += torch.cat([torch.linspace(-most, -1, 20), torch.linspace(0, most, 20)])
    steps = {}
    for scales in ("compact", "float"):
        found = pack(given, Quantization(name, scales=scales), by_channel=True)
        steps[scales], _ = floats(found.scales, found.zeros, torch.float64)
        error = (found.unpack() - given).abs().amax(dim=2)
        assert (error <= steps[scales][:, :, 0] / 2 + 1e-9).all()
    coarser = (steps["compact"] / steps["float"]).max().item()
    assert 1 < coarser <= 2 ** (1 / 8) * 1.001, coarser


@pytest.mark.parametrize(("group", "dim"), [(16, 16), (8, 24)])
def test_entries_with_groups_of_their_own_stay_as_they_are_when_others_leave(group: int, dim: int) -> None:
    given, rule = entries(7, dim), Quantization("int4", group, layout="token")
    whole = pack(given[:, :, :5], rule).followed_by(pack(given[:, :, 5:], rule))
    torch.testing.assert_close(whole.unpack(), stored(given, "int4", by_channel=False, group=group), rtol=0, atol=1e-9)
    places = torch.tensor([[[0, 3, 6], [1, 2, 5]], [[4, 5, 6], [0, 1, 2]]])
    kept = whole.at(places)
    assert kept.num_entries == 3 and kept.num_bytes == whole.num_bytes * 3 // 7
    for row in range(2):
        for head in range(2):
            assert torch.equal(kept.unpack()[row, head], whole.unpack()[row, head, places[row, head]])


def test_floats_of_8_bits_are_the_nearest_ones_and_saturate() -> None:
    given = torch.cat([entries(40, 16), 500 * entries(8, 16), torch.zeros(2, 2, 1, 16)], dim=2)
    for layout in ("kivi", "token"):
        found = pack(given, Quantization("fp8", layout=layout), by_channel=layout == "kivi")
        assert torch.equal(found.unpack(), stored(given, "fp8", by_channel=False))
        assert found.num_bytes == given.numel() and found.rule.bits_per_number(given.dtype) == 8
    assert found.unpack().abs().max() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_come_back_in_their_dtype_and_near_the_references(dtype: torch.dtype) -> None:
    given = entries(64, 64, dtype)
    found = packed(given, "int8").unpack()
    assert found.dtype == dtype
    # one step is 20 / 255; 16 bits round to 2 ** -8 of 10 at most
    assert (found.double() - stored(given, "int8", by_channel=False)).abs().max() < 0.08


@pytest.mark.parametrize(("name", "most"), [("int8", 0.53), ("int4", 0.28), ("int2", 0.15)])
@pytest.mark.parametrize("by_channel", [True, False])
def test_bytes_that_are_held(name: str, most: float, by_channel: bool) -> None:
    given = entries(256, 128, torch.bfloat16)
    found = packed(given, name, by_channel=by_channel)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (found.codes, found.scales, found.zeros))
    assert found.num_bytes == held
    assert held / (given.numel() * 2) <= most
    assert 8 * held / given.numel() == found.rule.bits_per_number(given.dtype)


def test_what_is_not_finite_stays_visible() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for scales in ("compact", "float"):
            given = entries(64, 64)
            given[0, 1, 7, 3] = bad
            found = pack(given, Quantization("int4", scales=scales), by_channel=True, ignored=None).unpack()
            assert not found[0, 1, 7, 3].isfinite()
            assert found[1].isfinite().all()
        found = pack(given, Quantization("fp8")).unpack()
        assert not found[0, 1, 7, 3].isfinite() and found.isfinite().sum() == given.numel() - 1


def test_ignored_entries_move_no_scale() -> None:
    given, ignored = entries(64, 16), torch.zeros(2, 1, 64, dtype=torch.bool)
    ignored[:, :, :10] = True
    wild = given.clone()
    wild[:, :, :10] = 1e6
    for by_channel in (True, False):
        one, other = (packed(x, "int4", by_channel=by_channel, ignored=ignored).unpack() for x in (given, wild))
        assert torch.equal(one[:, :, 10:], other[:, :, 10:])
    everything = packed(wild, "int4", by_channel=True, ignored=torch.ones_like(ignored)).unpack()
    assert everything.isfinite().all()


def test_constant_groups_come_back() -> None:
    for value in (0.0, 5.0, -0.01):
        for name in NAMES:
            found = packed(torch.full((1, 1, 64, 4), value), name).unpack()
            assert (found - value).abs().max() <= abs(value) / 250
