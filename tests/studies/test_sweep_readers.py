"""The scripts that read a sweep: every figure stands in its own row and column, and a lacking one is an error."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_files import results_file
from repository import ROOT

from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from
from scripts import demo
from scripts.studies import one_pass_table, recall_curves
from scripts.studies.cells import kept_share, notes, read_cells

Figures = Mapping[str, Mapping[str, float]]


def write_cell(folder: Path, press: str, ratio: float, tasks: Figures, **protocol: Any) -> None:
    content = results_file(press, ratio, notes=protocol.pop("notes", None))
    facts = content["config"]["kvpress"]
    facts["protocol"] |= protocol
    counts = facts["tasks"].pop("recall")
    for task, figures in tasks.items():
        content["results"][task] = {f"{name},none": value for name, value in figures.items()}
        facts["tasks"][task] = copy.deepcopy(counts)
    del content["results"]["recall"]
    name = "_".join([press, str(ratio), *map(str, protocol.values())])
    (folder / name).mkdir(parents=True)
    (folder / name / "results_2026.json").write_text(json.dumps(content))


@pytest.mark.parametrize("settings", [demo.SETTINGS, recall_curves.SETTINGS, one_pass_table.SETTINGS])
def test_settings_beside_a_script_are_a_sweeps(settings: Path, tmp_path: Path) -> None:
    cells = cells_of(settings_from(["--config", str(settings), "--output_path", str(tmp_path)]))
    presses = yaml.safe_load(settings.read_text())["presses"]
    assert {cell.arguments["press"] for cell in cells} == set(presses) and "none" in presses
    assert "python -m" not in settings.read_text() and (ROOT / "scripts") in settings.parents


def test_one_pass_table_has_a_row_per_press_and_ratio(tmp_path: Path) -> None:
    for press, ratio in (("snapkv", 0.9), ("pyramidkv", 0.9), ("none", 0.0)):
        for rolling, metric in one_pass_table.METRICS.items():
            figure = 10 * ratio + (1 if rolling == "prefix" else 0)
            tasks = {task: {metric: figure + place / 4} for place, task in enumerate(one_pass_table.TASKS)}
            noted = {"pyramidkv fell back to snapkv": 4} if press == "pyramidkv" else {}
            write_cell(tmp_path, press, ratio, tasks, rolling=rolling, notes=noted)
    table = one_pass_table.markdown(read_cells(tmp_path, one_pass_table.SETTINGS)).splitlines()
    assert table[0] == "| press | removed | WikiText-2, one_pass | WikiText-2, prefix | PG19, one_pass | PG19, prefix |"
    assert table[2:] == [
        "| none | 0.0 | 0.000 | 1.000 | 0.250 | 1.250 |",
        "| snapkv | 0.9 | 9.000 | 10.000 | 9.250 | 10.250 |",
        "| pyramidkv (fell back to snapkv) | 0.9 | 9.000 | 10.000 | 9.250 | 10.250 |",
    ]


def test_recall_curves_join_both_cells_of_a_press_and_ratio(tmp_path: Path) -> None:
    for press, ratio in (("none", 0.0), ("pyramidkv", 0.25), ("snapkv", 0.5), ("snapkv", 0.25)):
        for query_tokens, acc in ((1, 1 - ratio), (32, 0.5 - ratio)):
            tasks = {"kvpress_recall": {"acc": acc}, "kvpress_story": {"pressed_token_perplexity": 40 + ratio}}
            noted = {"pyramidkv fell back to snapkv": 2} if press == "pyramidkv" else {}
            write_cell(tmp_path, press, ratio, tasks, query_tokens=query_tokens, notes=noted)
    points = recall_curves.read_points(read_cells(tmp_path, recall_curves.SETTINGS))
    assert recall_curves.markdown(points).splitlines()[2:] == [
        "| none | 0.0 | 100 % | 50 % | 40.00 |",
        "| snapkv | 0.25 | 75 % | 25 % | 40.25 |",
        "| snapkv | 0.5 | 50 % | 0 % | 40.50 |",
        "| pyramidkv (50 % of contexts as snapkv) | 0.25 | 75 % | 25 % | 40.25 |",
    ]
    recall_curves.draw(points, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_demo_prints_what_was_kept_and_measured(tmp_path: Path) -> None:
    tasks = {
        "kvpress_story": {"pressed_token_perplexity": 45.584},
        "kvpress_recall": {"acc": 47 / 60},
        "kvpress_recall_gen": {"exact_match": 4 / 30},
    }
    write_cell(tmp_path, "snapkv", 0.5, tasks, notes={"a note": 3})
    write_cell(tmp_path, "none", 0.0, tasks)
    none, snapkv = read_cells(tmp_path, demo.SETTINGS)
    assert demo.row(none) == ["none", "100 %", "45.58", "78 %", "13 %"]
    assert demo.row(snapkv)[:2] == ["snapkv", "50.0 %"]
    assert demo.agreement(45.584, [none, snapkv]).startswith("lm-eval alone and the sweep agree on snapkv")
    assert kept_share(none) is None and notes(snapkv) == {"a note": 0.75}
    assert demo.noted([none, snapkv]) == ["snapkv: a note (in 75% of its contexts)"]


def test_the_demo_reads_the_bars_of_a_sweep() -> None:
    line = "loglikelihood (press=adakv:snapkv):  43%|####  | 104/240 [00:01<00:02, rolling=1]"
    assert demo.PROGRESS.findall(line) == [("loglikelihood", "43")]


def test_the_demo_says_what_to_look_at_and_holds_lm_eval_to_the_sweep(tmp_path: Path) -> None:
    tasks = {"kvpress_story": {"pressed_token_perplexity": 45.5}, "kvpress_recall": {"acc": 0.75}}
    for press in ("snapkv", "random"):
        write_cell(tmp_path, press, 0.5, {**tasks, "kvpress_recall_gen": {"exact_match": 0.5}})
    cells = read_cells(tmp_path, demo.SETTINGS)
    assert demo.agreement(45.6, cells).startswith("lm-eval alone and the sweep DISAGREE on snapkv")
    assert "snapkv answers 75% and random" in demo.advice(cells)


def test_a_figure_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_cell(tmp_path, "snapkv", 0.5, {"kvpress_recall": {"acc": 0.5}})
    (cell,) = read_results([tmp_path])
    with pytest.raises(ValueError, match="has no pressed_token_perplexity of kvpress_story"):
        demo.row(cell)
