"""Fidelity of several tasks is the mean over their tokens, with the interval of independent documents."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from report_files import with_fidelity, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.data_files import as_json
from lm_eval_kvpress.report.fidelity import Fidelity, Figure, Place, pooled, pooled_places
from lm_eval_kvpress.report.figures import write_figures
from lm_eval_kvpress.report.html import html


def test_one_task_keeps_its_interval() -> None:
    found = pooled([10], [Figure(0.2, (0.1, 0.4))])
    assert found is not None and found.mean == 0.2 and found.bounds == pytest.approx((0.1, 0.4))
    assert pooled([], []) is None and pooled([4, 4], [Figure(0.2), Figure(0.4, (0, 1))]) == Figure(pytest.approx(0.3))


def test_documents_that_all_agree_give_no_interval() -> None:
    """Those of a second task do."""
    alike, other = Figure(1.0, (1.0, 1.0)), Figure(0.5, (0.4, 0.6))
    assert pooled([10], [alike]) == Figure(1.0)
    assert pooled([10, 10], [alike, other]) == Figure(0.75, pytest.approx((0.7, 0.8)))


def test_two_tasks_have_the_interval_of_their_sum() -> None:
    """Against means that are drawn: normal, independent, of other widths."""
    draws = np.random.default_rng(0)
    one, other = draws.normal(0.2, 0.02, 200_000), draws.normal(0.5, 0.05, 200_000)
    figures = [Figure(values.mean(), tuple(np.quantile(values, [0.025, 0.975]))) for values in (one, other)]
    found = pooled([300, 100], figures)
    assert found is not None and found.bounds == pytest.approx(
        np.quantile((300 * one + 100 * other) / 400, [0.025, 0.975]), abs=1e-3
    )


def test_places_are_joined_over_tasks() -> None:
    figure = Figure(0.1)
    tasks = [
        Fidelity(30, figure, 1, figure, (Place(1, 10, 0.3), Place(2, 20, 0.1))),
        Fidelity(10, figure, 1, figure, (Place(1, 30, 0.1),)),
    ]
    assert pooled_places(tasks) == (Place(1, 40, pytest.approx(0.15)), Place(2, 20, 0.1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for press, kl in (("none", 0.0), ("knorm", 0.25)):
        with_fidelity(write_results(tmp_path, press, 0.5, acc=0.5), kl)
    return tmp_path


def test_intervals_and_places_are_in_the_data(folder: Path) -> None:
    (row,) = [row for row in json.loads(as_json(build_report([folder])))["rows"] if row["press"] == "knorm"]
    assert (row["kl_mean"], row["kl_mean_low"], row["kl_mean_high"]) == (0.25, 0.125, 0.5)
    assert row["top1_agreement_low"] is None
    assert row["kl_places"] == [{"last": 1, "num_tokens": 10, "kl_mean": 0.25}]


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_kl_that_is_no_number_is_written_as_what_it_is(folder: Path, kl: float) -> None:
    """And drawn nowhere: JSON and the page's script have no such numbers."""
    pytest.importorskip("plotly")
    with_fidelity(write_results(folder, "tova", 0.5, acc=0.4), kl)
    report = build_report([folder])
    (row,) = [row for row in json.loads(as_json(report))["rows"] if row["press"] == "tova"]
    assert row["kl_mean"] == row["kl_places"][0]["kl_mean"] == str(kl)
    (points,) = re.findall(r'id="points">(.*?)</script>', html(report))
    (point,) = [point for point in json.loads(points)[0]["rows"] if point["press"] == "tova"]
    assert point["places"] == [] and set(point["bounds"]) == {None}


def test_kl_is_drawn_against_bytes_and_places(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {file.name for file in write_figures(build_report([folder]), folder / "f")}
    assert {"table1_kl_mean_bytes.png", "table1_kl_mean_kept.png", "table1_kl_place.svg"} <= names
