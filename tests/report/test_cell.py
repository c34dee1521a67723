"""What follows from one results file."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import predict_only, unmeasured, without_prefill_press, write_results, write_stream

from lm_eval_kvpress.report.cell import Press
from lm_eval_kvpress.report.result_files import read_cell


@pytest.mark.parametrize(
    "name, on_prefill, on_decoding",
    [
        ("none", False, False),
        ("snapkv", True, False),
        ("decoding:knorm", False, True),
        ("prefill_decoding:snapkv+knorm", True, True),
    ],
)
def test_when_a_press_acts(name: str, on_prefill: bool, on_decoding: bool) -> None:
    press = Press(name)
    assert (press.acts_on_prefill, press.acts_on_decoding) == (on_prefill, on_decoding)


def test_the_kept_share_is_measured_and_everything_without_a_press(tmp_path: Path) -> None:
    assert read_cell(predict_only(tmp_path, "none")).kept_share == 1.0
    assert read_cell(predict_only(tmp_path, "snapkv", kept=0.4)).kept_share == 0.4
    assert read_cell(unmeasured(tmp_path, "tova")).kept_share is None


def test_bytes_are_means_per_context_and_of_a_stream_the_most_at_once(tmp_path: Path) -> None:
    cell = read_cell(write_results(tmp_path, "snapkv", 0.5))
    assert (cell.bytes_allocated, cell.bytes_effective) == (4096 * 8 * 0.5 / 4, 4096 * 8 * 0.5 / 4)
    assert read_cell(write_stream(tmp_path, "snapkv")).bytes_allocated is None, "this file does not say"


def test_contexts_left_whole_are_counted_where_a_press_acts_on_the_prefill(tmp_path: Path) -> None:
    assert read_cell(without_prefill_press(tmp_path, "snapkv")).num_uncompressed == 4
    assert read_cell(without_prefill_press(tmp_path, "decoding:knorm")).num_uncompressed is None


def test_tasks_whose_answers_came_from_a_cache_are_unmeasured(tmp_path: Path) -> None:
    assert read_cell(unmeasured(tmp_path, "snapkv")).unmeasured_tasks == ("recall",)
    assert read_cell(write_results(tmp_path, "none", 0.0, stock=True)).unmeasured_tasks == ()
