"""Of several files of one setting one counts, and seeds tell runs apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_files import NUM_DOCUMENTS, amend, predict_only, unmeasured, write_results

from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.report.rows import Row, build_rows


def rows(folder: Path, press: str) -> list[Row]:
    return [row for row in build_rows(read_results([folder])) if row.press == press]


def test_the_newest_of_several_files_of_one_setting_counts(tmp_path: Path) -> None:
    for date, acc in ((1.0, 0.1), (3.0, 0.3), (2.0, 0.2)):
        write_results(tmp_path, "none", 0.0, name=str(date), date=date, acc=acc)
    (row,) = rows(tmp_path, "none")
    assert row.cell is not None and row.cell.date == 3.0
    assert (row.num_older, row.num_newer) == (2, 0)


@pytest.mark.parametrize(
    "newer, date, left_out",
    [
        ({"acc": 0.4}, 1.0, (0, 1)),
        ({"acc": 0.3}, 3.0, (1, 0)),
        ({"scores": [0, 0, 1, 1, 0] * (NUM_DOCUMENTS // 5)}, 3.0, (1, 0)),
    ],
)
def test_a_cached_answer_does_not_replace_what_was_measured_unless_it_says_more(
    tmp_path: Path, newer: dict[str, Any], date: float, left_out: tuple[int, int]
) -> None:
    write_results(tmp_path, "snapkv", 0.5, name="a", acc=0.4, date=1.0)
    unmeasured(tmp_path, "snapkv", name="b", date=3.0, **newer)
    (row,) = rows(tmp_path, "snapkv")
    assert row.cell is not None and row.cell.date == date
    assert (row.num_older, row.num_newer) == left_out


def test_a_newer_run_without_figures_does_not_replace_one_with_figures(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.5, name="a", acc=0.4, date=1.0)
    predict_only(tmp_path, "none", name="b", date=2.0)
    (row,) = rows(tmp_path, "none")
    assert row.cell is not None and row.cell.date == 1.0 and row.num_newer == 1


def with_seeds(folder: Path, press: str, random: int | None, torch: int | None) -> None:
    """Write a run under seeds as lm-eval 0.4.13 does."""
    seeds = {"random_seed": random, "numpy_seed": 1234, "torch_seed": torch, "fewshot_seed": 1234}
    file = write_results(folder, press, 0.5, name=f"{press}-{random}-{torch}", acc=0.4)
    amend(file, lambda content: content["config"].update(seeds))


def arguments(folder: Path) -> list[tuple[str, str]]:
    return [(row.press, row.arguments) for row in build_rows(read_results([folder]))]


@pytest.mark.parametrize("press", ["none", "random", "decoding:knorm"])
def test_runs_of_other_seeds_are_rows_of_their_own_and_told_apart(tmp_path: Path, press: str) -> None:
    with_seeds(tmp_path, press, 0, 1)
    with_seeds(tmp_path, press, 0, 2)
    assert arguments(tmp_path) == [(press, f"window_size=64, torch_seed={seed}") for seed in (1, 2)]
    assert not any(row.num_older for row in rows(tmp_path, press))


def test_several_seeds_are_named_as_lm_eval_takes_them(tmp_path: Path) -> None:
    with_seeds(tmp_path, "none", 0, 1234)
    with_seeds(tmp_path, "random", 1234, 1234)
    with_seeds(tmp_path, "random", None, 2)
    assert arguments(tmp_path) == [
        ("none", "window_size=64, seeds=0,1234,1234,1234"),
        ("random", "window_size=64, seeds=1234"),
        ("random", "window_size=64, seeds=None,1234,2,1234"),
    ]


def test_a_file_without_seeds_is_told_from_a_later_run_of_its_press(tmp_path: Path) -> None:
    with_seeds(tmp_path, "random", 0, 7)
    write_results(tmp_path, "random", 0.5, acc=0.3)
    assert [text for _, text in arguments(tmp_path)] == ["window_size=64, seeds=unknown", "window_size=64"]


def test_seeds_that_all_runs_share_are_not_named_and_make_no_row(tmp_path: Path) -> None:
    with_seeds(tmp_path, "none", 0, 7)
    with_seeds(tmp_path, "random", 0, 7)
    write_results(tmp_path, "tova", 0.5, acc=0.3)  # a file without seeds
    assert [text for _, text in arguments(tmp_path)] == ["window_size=64"] * 3


def test_a_series_joins_the_budgets_of_a_press(tmp_path: Path) -> None:
    for budget in (64, 128):
        file = write_results(tmp_path, "snapkv", 0.5, name=str(budget))
        amend(file, lambda content, budget=budget: content["config"]["kvpress"]["press"].update(kv_budget=budget))
    assert {row.series for row in rows(tmp_path, "snapkv")} == {"snapkv"}
    assert [(row.arguments, row.own_arguments) for row in rows(tmp_path, "snapkv")] == [
        (f"kv_budget={budget}, window_size=64", f"kv_budget={budget}") for budget in (64, 128)
    ]


def test_an_argument_in_which_rows_of_a_press_differ_stays_in_their_names(tmp_path: Path) -> None:
    for window in (32, 64):
        file = write_results(tmp_path, "snapkv", 0.5, name=str(window))
        given = {"kernel_size": 5, "window_size": window}
        amend(file, lambda content, given=given: content["config"]["kvpress"]["press"].update(arguments=given))
    found = rows(tmp_path, "snapkv")
    assert [row.own_arguments for row in found] == ["window_size=32", "window_size=64"]
    assert {row.shared_arguments for row in found} == {(("kernel_size", "5"),)}
    assert [row.series for row in found] == ["snapkv window_size=32", "snapkv window_size=64"]
