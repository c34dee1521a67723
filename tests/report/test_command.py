"""The report: tables never mix, differences are paired and equal scipy's, marks say what cannot be trusted."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_files import NUM_DOCUMENTS, amend, predict_only, sample_line, write_results, write_stream
from scipy.stats import bootstrap

from lm_eval_kvpress import cli
from lm_eval_kvpress.report.bootstrap import NUM_RESAMPLES, intervals
from lm_eval_kvpress.report.columns import arguments, kept_share, press_name
from lm_eval_kvpress.report.command import make_report
from lm_eval_kvpress.report.figures import write_figures
from lm_eval_kvpress.report.html import html
from lm_eval_kvpress.report.latex import latex
from lm_eval_kvpress.report.markdown import as_csv, as_json, markdown
from lm_eval_kvpress.report.samples import _parse, read_samples

EVIL = "<script>alert(1)</script>|{{ x }}"


def labels(folder: Path) -> dict[str, list[str]]:
    rows = [row for table in make_report([folder]).tables for row in table.rows]
    return {row.cell.press.name if row.cell else "missing": [mark.label for mark in row.marks] for row in rows}


def test_interval_equals_scipys_paired_bootstrap() -> None:
    draws = np.random.default_rng(0)
    base, other = draws.random(60), draws.random(60)
    ours = intervals(np.stack([base, other], 1), np.ones((60, 2)), 0, lambda ratio: ratio)
    theirs = bootstrap(
        (other, base),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20 * NUM_RESAMPLES,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[0][1] - theirs.low) < 0.06 * width and abs(ours[1][1] - theirs.high) < 0.06 * width
    assert ours[0][0] == ours[1][0] == 0


def test_a_sample_is_the_same_with_and_without_its_texts() -> None:
    line = sample_line(3, 1.0)
    key, short = _parse(line.encode())
    whole = json.loads(line)
    assert key == (whole["doc_id"], whole["doc_hash"])
    assert short == {name: value for name, value in whole.items() if name not in ("doc_id", "doc")}


def test_a_metric_about_some_documents_is_a_share_of_these(tmp_path: Path) -> None:
    file = write_results(tmp_path, "none", 0.0, scores=[1, 0, 0, 1])
    scores = read_samples(file.with_name("samples_recall_2026.jsonl"))["none"].scores["acc_at_100"]
    assert scores.numerators.tolist() == [1, 0, 0, 0] and scores.denominators.tolist() == [1, 0, 1, 0]


def test_difference_is_to_the_baseline_of_the_same_table(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    write_results(tmp_path, "snapkv", 0.5, scores=[1, 0] * (NUM_DOCUMENTS // 2))
    (table,) = make_report([tmp_path]).tables
    difference = table.rows[1].difference(table.metrics[0])
    assert table.rows[0].is_baseline and difference is not None and difference.value == -0.5
    assert difference.low is not None and difference.low < -0.5 < (difference.high or 0)


def test_protocols_checkpoints_and_documents_are_never_mixed(tmp_path: Path) -> None:
    for index, facts in enumerate(
        [{}, {"query_tokens": 0}, {"checkpoint": "other"}, {"num_documents": 3}, {"stock": True}]
    ):
        write_results(tmp_path, "none", 0.0, name=str(index), **facts)
    assert [len(table.rows) for table in make_report([tmp_path]).tables] == [1] * 5


def book(folder: Path, name: str, fingerprint: str | None = None, **metadata: Any) -> None:
    """A run of a text that its task loaded; `metadata` is what the task's configuration says of it."""
    file = write_results(folder, "none" if name == "0" else f"press{name}", 0.5, name=name)

    def change(content: dict[str, Any]) -> None:
        content["configs"] = {"recall": {"metadata": {"version": 1.0, **metadata}}}
        content["task_hashes"] = {} if fingerprint is None else {"recall": fingerprint}

    amend(file, change)


CHAIN, FERRY = {"titles": ["The Chain"]}, {"titles": ["The Ferry"]}


@pytest.mark.parametrize(
    "other, num_tables",
    [
        ({"loaded": CHAIN | {"source": "elsewhere/test.jsonl"}, "max_tokens": 9, "press": "x", "data_dir": "y"}, 1),
        ({"loaded": FERRY, "max_tokens": 9}, 2),
        ({"loaded": CHAIN, "max_tokens": 8}, 2),
        ({"loaded": CHAIN | {"tokenizer": "another"}, "max_tokens": 9}, 2),
        ({}, 1),
    ],
)
def test_texts_that_a_task_loaded_are_never_mixed(tmp_path: Path, other: dict[str, Any], num_tables: int) -> None:
    book(tmp_path, "0", loaded=CHAIN | {"source": "here/test.jsonl"}, max_tokens=9)
    book(tmp_path, "1", **other)
    assert len(make_report([tmp_path]).tables) == num_tables


def test_lm_evals_hash_of_the_documents_counts_more_than_what_was_loaded(tmp_path: Path) -> None:
    """--limit 1 of two books scores the same text as one book."""
    book(tmp_path, "0", "same", loaded=CHAIN)
    book(tmp_path, "1", "same", loaded={"titles": ["The Chain", "The Ferry"]})
    book(tmp_path, "2", "other", loaded=CHAIN)
    assert sorted(len(table.rows) for table in make_report([tmp_path]).tables) == [2, 2]


def test_a_configuration_of_another_shape_says_nothing_of_the_documents(tmp_path: Path) -> None:
    book(tmp_path, "0", loaded=CHAIN)
    file = write_results(tmp_path, "snapkv", 0.5)
    amend(file, lambda content: content.update(configs={"recall": {"metadata": [{"version": 1.0}]}}))
    assert len(make_report([tmp_path]).tables) == 1


def test_what_one_run_says_of_its_documents_is_held_against_all_others_of_the_table(tmp_path: Path) -> None:
    book(tmp_path, "0", "same")
    book(tmp_path, "1", loaded=CHAIN)
    book(tmp_path, "2", loaded=FERRY)
    assert sorted(len(table.rows) for table in make_report([tmp_path]).tables) == [2, 2]


def test_a_baseline_that_nobody_ran_is_a_row_that_says_so(tmp_path: Path) -> None:
    write_results(tmp_path, "snapkv", 0.5)
    assert labels(tmp_path) == {"missing": ["not run"], "snapkv": []}


@pytest.mark.parametrize(
    "facts, label",
    [
        ({"acc": 0.4, "kept": 1.0}, "kept everything"),
        ({"acc": 0.5}, "identical"),
        ({"acc": 0.4, "notes": {"pyramidkv fell back to snapkv": 4}}, "fell back"),
        ({"acc": 0.4, "version": "0.5.4"}, "versions"),
        ({"acc": 0.4, "num_documents": 3}, "fewer documents"),
    ],
)
def test_rows_that_cannot_be_trusted_are_marked(tmp_path: Path, facts: dict[str, object], label: str) -> None:
    write_results(tmp_path, "none", 0.0)
    write_results(tmp_path, "snapkv", 0.5, **facts)
    assert labels(tmp_path)["snapkv"] == [label]


def without_prefill_press(
    folder: Path,
    press: str,
    *,
    num_compressions: int = 0,
    num_short: int = 0,
    num_texts: int = 0,
    num_texts_compressed: int = 0,
    acc: float = 0.4,
    rolling: str = "prefix",
) -> Path:
    """A run whose press saw no context of the prefill."""
    file = write_results(folder, press, 0.0, acc=acc)

    def change(content: dict[str, Any]) -> None:
        facts = content["config"]["kvpress"]
        task = facts["tasks"]["recall"]
        facts["protocol"] |= {"rolling": rolling, "press_acts_on_rolling": False}
        task |= {"num_decode_compressions": num_compressions, "num_short_contexts": num_short}
        task |= {"texts_generated": num_texts, "texts_compressed_while_decoding": num_texts_compressed}
        task["contexts_unpressed"], task["contexts_pressed"] = task["contexts_pressed"], task["contexts_unpressed"]

    return amend(file, change)


def test_a_press_that_acts_while_text_is_generated_ran_if_it_compressed_then(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=23)
    without_prefill_press(tmp_path, "decoding:tova")
    without_prefill_press(tmp_path, "prefill_decoding:snapkv+knorm", num_compressions=1, num_short=4)
    without_prefill_press(tmp_path, "prefill_decoding:snapkv+tova", num_short=4)
    rows = {row.cell.press.name: row for row in make_report([tmp_path]).tables[0].rows if row.cell}
    assert {name: [mark.label for mark in row.marks] for name, row in rows.items()} == {
        "none": [],
        "decoding:knorm": [],
        "decoding:tova": ["never ran"],
        "prefill_decoding:snapkv+knorm": [],
        "prefill_decoding:snapkv+tova": ["never ran"],
    }
    texts = {name: row.marks[0].text for name, row in rows.items() if row.marks}
    assert texts["decoding:tova"].startswith("No answer grew long enough for the press to act")
    assert texts["prefill_decoding:snapkv+tova"].endswith("all were too short for it.")


def test_texts_on_which_a_press_did_not_act_are_told(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=23, num_texts=8, num_texts_compressed=2)
    without_prefill_press(tmp_path, "decoding:tova", num_compressions=23, num_texts=8, num_texts_compressed=8)
    without_prefill_press(tmp_path, "decoding:keydiff", num_texts=8)
    of_both = write_results(tmp_path, "prefill_decoding:snapkv+knorm", 0.5, acc=0.4)
    amend(of_both, lambda content: content["config"]["kvpress"]["tasks"]["recall"].update(texts_generated=8))
    rows = {row.cell.press.name: row for row in make_report([tmp_path]).tables[0].rows if row.cell}
    assert {name: [(mark.label, mark.is_void) for mark in row.marks] for name, row in rows.items()} == {
        "none": [],
        "decoding:knorm": [("short texts", False)],
        "decoding:tova": [],
        "decoding:keydiff": [("never ran", True)],
        "prefill_decoding:snapkv+knorm": [("prefill only", True)],
    }
    assert rows["decoding:knorm"].marks[0].text.startswith("The press acted on 2 of 8 texts")


def test_the_same_figures_do_not_void_a_press_that_is_known_to_have_acted(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=3, acc=0.5)
    row = make_report([tmp_path]).tables[0].rows[1]
    (mark,) = row.marks
    assert mark.label == "identical" and mark.text.endswith("the task does not resolve it.") and not row.is_void


def test_what_a_press_of_generated_text_removes_from_contexts_is_missing_and_not_zero(tmp_path: Path) -> None:
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=23)
    without_prefill_press(tmp_path, "prefill_decoding:snapkv+knorm", num_compressions=23)
    rows = {row["press"]: row for row in json.loads(as_json(make_report([tmp_path])))["rows"]}
    names = ("removed_asked", "kept_share", "num_uncompressed")
    assert [rows["decoding:knorm"][name] for name in names] == [None, None, None]
    assert [rows["prefill_decoding:snapkv+knorm"][name] for name in names] == [0.0, None, 4]


def test_contexts_are_called_too_short_only_where_they_were(tmp_path: Path) -> None:
    without_prefill_press(tmp_path, "snapkv")
    (mark,) = make_report([tmp_path]).tables[0].rows[1].marks
    assert (mark.label, mark.text) == ("never ran", "No context went through the press.")


@pytest.mark.parametrize(
    "rolling, output_type, expected",
    [
        ("one_pass", "loglikelihood_rolling", ["one pass"]),
        ("one_pass", "multiple_choice", []),
        ("prefix", "loglikelihood_rolling", []),
    ],
)
def test_one_pass_is_marked_where_a_text_was_scored_in_one(
    tmp_path: Path, rolling: str, output_type: str, expected: list[str]
) -> None:
    file = without_prefill_press(tmp_path, "decoding:knorm", num_compressions=1, rolling=rolling)
    amend(file, lambda content: content.update(configs={"recall": {"output_type": output_type}}))
    assert labels(tmp_path)["decoding:knorm"] == expected


def with_tasks(folder: Path, press: str, *tasks: str) -> Path:
    """A run of several tasks, all with the figures of `recall`."""

    def change(content: dict[str, Any]) -> None:
        for key in ("results", "higher_is_better", "n-samples", "versions", "n-shot"):
            content[key] = dict.fromkeys(tasks, content[key]["recall"])
        facts = content["config"]["kvpress"]
        facts["tasks"] = dict.fromkeys(tasks, facts["tasks"]["recall"])

    return amend(write_results(folder, press, 0.5, acc=0.5 if press == "none" else 0.4), change)


def test_rows_of_other_tasks_than_the_baselines_are_marked_and_not_void(tmp_path: Path) -> None:
    with_tasks(tmp_path, "none", "recall", "story")
    with_tasks(tmp_path, "knorm", "story", "recall")
    with_tasks(tmp_path, "snapkv", "recall", "extra")
    with_tasks(tmp_path, "tova", *(f"task{index}" for index in range(9)), "recall", "story")
    (table,) = make_report([tmp_path]).tables
    marks = {row.cell.press.name: row.marks for row in table.rows if row.cell}
    assert marks["none"] == marks["knorm"] == ()
    ((snapkv,), (tova,)) = (marks[name] for name in ("snapkv", "tova"))
    assert (snapkv.label, snapkv.is_void) == ("other tasks", False)
    told = "(without story; also extra): kept, KV bytes and speeds are means over its own."
    assert snapkv.text == f"Ran other tasks than the baseline {told}"
    assert "(also task0, task1, task2, task3, task4 and 4 more)" in tova.text


def test_without_a_baseline_tasks_are_those_of_the_row_with_most(tmp_path: Path) -> None:
    with_tasks(tmp_path, "knorm", "recall")
    with_tasks(tmp_path, "snapkv", "recall", "story")
    with_tasks(tmp_path, "tova", "story", "recall")
    (table,) = make_report([tmp_path]).tables
    marks = {row.cell.press.name: [mark.text for mark in row.marks] for row in table.rows if row.cell}
    assert marks["snapkv"] == marks["tova"] == []
    assert marks["knorm"][0].startswith("Ran other tasks than the row with most (without story): ")


def test_the_newest_of_several_files_of_one_setting_counts(tmp_path: Path) -> None:
    for date, acc in ((1.0, 0.1), (3.0, 0.3), (2.0, 0.2)):
        write_results(tmp_path, "none", 0.0, name=str(date), date=date, acc=acc)
    report = make_report([tmp_path])
    (row,) = report.tables[0].rows
    assert row.cell is not None and row.cell.date == 3.0
    assert any("2 older results" in notice for notice in report.notices[0])


def unmeasured(folder: Path, press: str, *, name: str = "", **facts: Any) -> Path:
    """A run whose answers all came from a cache, as our models record it."""

    def change(content: dict[str, Any]) -> None:
        content["config"]["kvpress"] |= {"tasks": {}, "throughput": {"num_batches": 0, "ttft_sec": None}}

    return amend(write_results(folder, press, 0.5, name=name, **facts), change)


def test_a_run_whose_answers_came_from_a_cache_is_marked_and_not_void(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    unmeasured(tmp_path, "snapkv", acc=0.4)
    row = make_report([tmp_path]).tables[0].rows[1]
    (mark,) = row.marks
    assert (mark.label, mark.is_void) == ("not measured", False)
    assert mark.text.startswith(
        "Nothing was measured of recall: answers came from a cache or an earlier run, whose file"
    )
    assert mark.text.endswith("or there was nothing to score."), "a checkpoint that reads every text as no token"


def test_a_stream_that_was_finished_before_is_marked(tmp_path: Path) -> None:
    """What was scored is known from its losses; what the caches took is not."""

    def change(content: dict[str, Any]) -> None:
        facts = content["config"]["kvpress"]
        facts["tasks"]["recall"] |= {"contexts_pressed": facts["tasks"]["recall"]["contexts_unpressed"]}
        facts["throughput"] = {"num_batches": 0}

    amend(write_stream(tmp_path, "snapkv"), change)
    assert labels(tmp_path)["snapkv"] == ["not measured"]


def test_of_several_tasks_those_are_named_that_came_from_a_cache(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        facts = content["config"]["kvpress"]
        del facts["tasks"]["recall"]
        facts["throughput"]["num_batches"] = 3

    with_tasks(tmp_path, "none", "recall", "story")
    amend(with_tasks(tmp_path, "snapkv", "recall", "story"), change)
    (mark,) = make_report([tmp_path]).tables[0].rows[1].marks
    assert mark.label == "not measured" and "measured of recall:" in mark.text


@pytest.mark.parametrize(
    "newer, date, notice",
    [
        ({"acc": 0.4}, 1.0, "1 newer result is left out"),
        ({"acc": 0.3}, 3.0, "1 older result "),
        ({"scores": [0, 0, 1, 1, 0] * (NUM_DOCUMENTS // 5)}, 3.0, "1 older result "),
    ],
)
def test_a_cached_answer_does_not_replace_what_was_measured_unless_it_says_more(
    tmp_path: Path, newer: dict[str, Any], date: float, notice: str
) -> None:
    write_results(tmp_path, "none", 0.0, acc=0.9)
    write_results(tmp_path, "snapkv", 0.5, name="a", acc=0.4, date=1.0)
    unmeasured(tmp_path, "snapkv", name="b", date=3.0, **newer)
    report = make_report([tmp_path])
    row = report.tables[0].rows[1]
    assert row.cell is not None and row.cell.date == date
    assert any(notice in one for one in report.notices[0]), report.notices[0]


def test_the_placeholder_of_predict_only_is_no_figure(tmp_path: Path) -> None:
    predict_only(tmp_path, "none")
    predict_only(tmp_path, "snapkv", kept=0.4)
    report = make_report([tmp_path])
    (table,) = report.tables
    assert table.metrics == () and table.documents == (("recall", NUM_DOCUMENTS),)
    assert [kept_share(row) for row in table.rows] == [1.0, 0.4]
    assert any(notice.startswith("No figures of recall: ") for notice in report.notices[0]), report.notices[0]
    assert html(report)
    for text in (markdown(report), latex(report), as_csv(report), as_json(report)):
        assert "bypass" not in text
    assert len(write_figures(report, tmp_path / "f")) == 0


def test_a_task_that_was_scored_in_another_row_keeps_its_column(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    predict_only(tmp_path, "snapkv")
    report = make_report([tmp_path])
    assert [key.name for key in report.tables[0].metrics] == ["acc", "acc_at_100", "acc_at_800"]
    assert not any(notice.startswith("No figures") for notice in report.notices[0])


def test_a_newer_run_without_figures_does_not_replace_one_with_figures(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.5, name="a", acc=0.4, date=1.0)
    predict_only(tmp_path, "none", name="b", date=2.0)
    report = make_report([tmp_path])
    assert report.tables[0].baseline.cell is not None and report.tables[0].baseline.cell.date == 1.0
    assert any(notice.startswith("1 newer result is left out") for notice in report.notices[0])


def with_seeds(folder: Path, press: str, random: int | None, torch: int | None, acc: float = 0.4) -> None:
    """A run under seeds as lm-eval 0.4.13 writes them."""
    seeds = {"random_seed": random, "numpy_seed": 1234, "torch_seed": torch, "fewshot_seed": 1234}
    file = write_results(folder, press, 0.5, name=f"{press}-{random}-{torch}", acc=acc)
    amend(file, lambda content: content["config"].update(seeds))


def arguments_shown(folder: Path) -> list[tuple[str, str]]:
    (table,) = make_report([folder]).tables
    return [(press_name(row), arguments(row)) for row in table.rows]


@pytest.mark.parametrize("press", ["none", "random", "decoding:knorm"])
def test_runs_of_other_seeds_are_rows_of_their_own_and_told_apart(tmp_path: Path, press: str) -> None:
    with_seeds(tmp_path, press, 0, 1)
    with_seeds(tmp_path, press, 0, 2)
    rows = [pair for pair in arguments_shown(tmp_path) if pair[1]]
    assert rows == [(press, f"window_size=64, torch_seed={seed}") for seed in (1, 2)]
    assert not any("older" in notice for notice in make_report([tmp_path]).notices[0])


def test_several_seeds_are_named_as_lm_eval_takes_them(tmp_path: Path) -> None:
    with_seeds(tmp_path, "none", 0, 1234)
    with_seeds(tmp_path, "random", 1234, 1234)
    with_seeds(tmp_path, "random", None, 2)
    assert arguments_shown(tmp_path) == [
        ("none", "window_size=64, seeds=0,1234,1234,1234"),
        ("random", "window_size=64, seeds=1234"),
        ("random", "window_size=64, seeds=None,1234,2,1234"),
    ]


def test_a_file_without_seeds_is_told_from_a_later_run_of_its_press(tmp_path: Path) -> None:
    with_seeds(tmp_path, "random", 0, 7)
    write_results(tmp_path, "random", 0.5, acc=0.3)
    shown = [text for _, text in arguments_shown(tmp_path) if text]
    assert shown == ["window_size=64, seeds=unknown", "window_size=64"]


def test_seeds_that_all_runs_share_are_not_named_and_make_no_row(tmp_path: Path) -> None:
    with_seeds(tmp_path, "none", 0, 7)
    with_seeds(tmp_path, "random", 0, 7)
    write_results(tmp_path, "tova", 0.5, acc=0.3)  # a file without seeds
    assert [text for _, text in arguments_shown(tmp_path)] == ["window_size=64"] * 3


def test_ranking_keeps_the_baseline_on_top_and_the_missing_last(tmp_path: Path) -> None:
    for press, acc in (("none", 0.9), ("a", 0.2), ("b", None), ("c", 0.7)):
        write_results(tmp_path, press, 0.5, acc=acc)
    (table,) = make_report([tmp_path], sort=["recall.acc"]).tables
    assert [row.cell.press.name for row in table.rows if row.cell] == ["none", "c", "a", "b"]
    with pytest.raises(ValueError, match=r"did you mean 'recall\.acc'"):
        make_report([tmp_path], sort=["recall.ac"])


def test_missing_and_nan_are_shown_as_such(tmp_path: Path) -> None:
    for press, acc in (("none", 0.5), ("a", float("nan")), ("b", None)):
        write_results(tmp_path, press, 0.5, acc=acc)
    report = make_report([tmp_path])
    rows = {row["press"]: row for row in csv.DictReader(io.StringIO(as_csv(report)))}
    assert (rows["a"]["recall.acc"], rows["b"]["recall.acc"]) == ("NaN", "")
    parsed = {row["press"]: row["recall.acc"] for row in json.loads(as_json(report))["rows"]}
    assert parsed == {"none": 0.5, "a": "nan", "b": None}
    assert "| NaN |" in markdown(report)


def test_markdown_holds_no_markup_from_a_file(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, checkpoint=EVIL)
    text = markdown(make_report([tmp_path]))
    body = text.split("---\n", 2)[2]
    assert "<script" not in body and "{{" not in body and "alert(1)" in body


def test_latex_and_figures_are_written_with_names_escaped(tmp_path: Path) -> None:
    for press, acc in (("none", 0.9), ("a_$b", 0.2)):
        write_results(tmp_path, press, 0.5, acc=acc)
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "t.tex"), "--figures", str(tmp_path / "f")]) == 0
    assert r"a\_\$b (window\_size=64) &" in (tmp_path / "t.tex").read_text()
    assert {file.suffix for file in (tmp_path / "f").iterdir()} == {".png", ".svg"}


def test_figures_have_points_at_the_measured_share_their_intervals_and_hollow_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    write_results(tmp_path, "snapkv", 0.5, scores=[0, 1, 1, 1] * (NUM_DOCUMENTS // 4), kept=0.6)
    write_results(tmp_path, "inert", 0.5, acc=0.4, kept=1.0)
    report = make_report([tmp_path])
    write_figures(report, tmp_path / "f")
    (kept,) = [one.axes[0] for one in drawn if one.axes[0].get_xlabel() == "measured kept share"]
    bars = {one.get_label(): one for one in kept.containers}
    assert bars["snapkv"].lines[0].get_xydata().tolist() == [[pytest.approx(0.6), 0.75]]
    found = next(row for row in report.tables[0].rows if row.cell and row.cell.press.name == "snapkv")
    difference = found.difference(report.tables[0].metrics[0])
    assert difference is not None
    (segment,) = bars["snapkv"].lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([1 + (difference.low or 0), 1 + (difference.high or 0)])
    hollow = [line.get_xydata().tolist() for line in kept.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[[1.0, 0.4]]]
    for figure in drawn:
        figure.clear()


def test_500_rows_are_in_every_format(tmp_path: Path) -> None:
    for index in range(500):
        write_results(tmp_path, f"press{index}" if index else "none", 0.5, acc=index / 500, name=str(index))
    report = make_report([tmp_path], sort=["recall.acc"])
    assert [len(table.rows) for table in report.tables] == [500]
    assert markdown(report).count("\n| press") == latex(report).count("\npress") == 499
    assert len(list(csv.DictReader(io.StringIO(as_csv(report))))) == 500
    assert len(json.loads(as_json(report))["rows"]) == 500


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("-o", "folder.md"), "is a folder: name a file in it, such as"),
        (("-o", "folder"), "is a folder: name a file in it, such as"),
        (("-o", "file.md/page.html"), "file.md is a file and cannot hold it: name another place"),
        (("-o", "file.md/deep/page.html"), "file.md is a file and cannot hold it: name another place"),
        (("--figures", "file.md"), "is a file: name a folder"),
        (("--figures", "file.md/f"), "file.md is a file and cannot hold it: name another place"),
        (("-o", "locked/page.html"), "locked may not be written to: name another place"),
        (("-o", "locked/deep/page.html"), "locked may not be written to: name another place"),
        (("-o", "locked.md"), "locked.md may not be written to: name another place"),
        (("--figures", "locked"), "locked may not be written to: name another place"),
        (("-o", ""), "-o '': the name is empty"),
        (("--figures", ""), "--figures '': the name is empty"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_read(
    tmp_path: Path,
    arguments: tuple[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may = os.access  # root may write everywhere, so who may not is made up
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in Path(path).name and may(path, mode))
    monkeypatch.setattr("lm_eval_kvpress.report.command.make_report", lambda *_, **__: pytest.fail("results were read"))
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.md", "folder", "locked"):
        Path(folder).mkdir()
    for file in ("file.md", "locked.md"):
        Path(file).touch()
    assert cli.main(["report", ".", *arguments]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option, name", [("-o", "t.md"), ("--figures", "f")])
def test_what_goes_wrong_in_writing_is_one_line(
    tmp_path: Path, option: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_results(tmp_path, "none", 0.0)
    write_results(tmp_path, "snapkv", 0.5)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert cli.main(["report", str(tmp_path), option, str(tmp_path / name)]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert f"{option} {tmp_path / name} cannot be written (No space left on device)" in error
    assert len(error.strip().splitlines()) == 1


def test_an_empty_name_is_not_the_folder_one_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, "none", 0.0)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", ""]) == cli.BAD_INPUT
    assert "report '': the name is empty" in capsys.readouterr().err


def test_the_help_says_what_ranks_worst_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for press, acc in (("none", 0.9), ("a", 0.2), ("b", 0.7)):
        write_results(tmp_path, press, 0.5, acc=acc)
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert "--sort=-COLUMN" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--sort=-recall.acc"]) == 0
    text = capsys.readouterr().out
    assert text.index("| none (") < text.index("| a (") < text.index("| b (")


@pytest.mark.parametrize("text", [None, '{"results": {'])
def test_bad_input_is_one_line_and_not_a_page(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "results_x.json").write_text(text)
    assert cli.main(["report", str(tmp_path)]) != 0
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
