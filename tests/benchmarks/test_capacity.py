"""What fits, by reckoning: budgets are filled and not exceeded, and prefilling in turn makes room."""

from __future__ import annotations

import argparse

import pytest
import torch

from scripts.benchmarks.capacity import _bytes, main
from scripts.benchmarks.capacity_cases import Case, Room, cases_of, config_of, weight_bytes
from scripts.benchmarks.capacity_measured import Batch, measured

GIB = 2**30


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config = config_of("pythia-2.8b")
    for case in cases_of(["none", "snapkv"], [0.75], ["none", "int4"]):
        footprint = case.footprint(config, torch.float16, "cuda")
        for in_turn in (False, True):
            room = Room(2 * GIB, 128, in_turn)
            rows, tokens = room.largest_batch(footprint, 2_048), room.longest_context(footprint, 1)
            assert room.takes(footprint, rows, 2_048) and not room.takes(footprint, rows + 1, 2_048)
            assert room.takes(footprint, 1, tokens) and not room.takes(footprint, 1, tokens + 1)


def test_quantization_fits_more_contexts_that_are_prefilled_in_turn() -> None:
    config = config_of("pythia-2.8b")
    plain, packed = (Case("none", 0.0, name).footprint(config, torch.float16, "cuda") for name in ("none", "int4"))
    at_once, in_turn = Room(8 * GIB, 0), Room(8 * GIB, 0, in_turn=True)
    assert at_once.largest_batch(packed, 2_048) <= at_once.largest_batch(plain, 2_048), (
        "the prefill's peak is the limit"
    )
    assert in_turn.largest_batch(packed, 2_048) > 2 * in_turn.largest_batch(plain, 2_048)


def test_pythias_cache_and_weights_are_those_of_its_shape() -> None:
    config = config_of("pythia-2.8b")
    assert Case("none", 0.0, "none").footprint(config, torch.float16, "cuda").held_bytes == 327_680
    assert weight_bytes(config, torch.float16) / GIB == pytest.approx(5.2, abs=0.1)


def test_budgets_are_read_with_their_unit() -> None:
    assert (_bytes("24GiB"), _bytes("1.5 MB"), _bytes("7")) == (24 * GIB, 1_500_000, 7)
    for text in ("GiB", "3 apples", "-1GiB"):
        with pytest.raises(argparse.ArgumentTypeError, match="24GiB"):
            _bytes(text)


def test_the_table_has_a_row_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["--shape", "builtin", "--budget", "1GiB", "--kv_quant", "none,int4", "--ratios", "0.5", "--device", "cpu"]
        )
        == 0
    )
    table, document = capsys.readouterr().out.rsplit("\n{", 1)
    assert table.count("\n| snapkv | 0.5 |") == 2 and '"largest_batch_in_turn"' in document


def test_what_a_batch_holds_is_as_reckoned_and_it_is_decoded() -> None:
    found = measured("builtin", "float32", Case("knorm", 0.5, "int4"), Batch(3, 128, 4, in_turn=True))
    assert found["held_bytes"] == found["held_bytes_reckoned"]
    assert min(found["prefill_tokens_per_sec"], found["decode_tokens_per_sec"]) > 0
