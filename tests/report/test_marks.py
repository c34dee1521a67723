"""Rows that must not be taken at face value are marked, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_files import NUM_DOCUMENTS, amend, unmeasured, without_prefill_press, write_results, write_stream

from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.contents import ReportRow
from lm_eval_kvpress.report.marks import Mark


def rows(folder: Path) -> dict[str, ReportRow]:
    """The rows of the only table by their press; `missing` is a baseline that nobody ran."""
    (table,) = build_report([folder]).tables
    return {row.press if row.cell else "missing": row for row in table.rows}


def marks(folder: Path) -> dict[str, list[Mark]]:
    return {press: list(row.marks) for press, row in rows(folder).items()}


def labels(folder: Path) -> dict[str, list[str]]:
    return {press: [mark.label for mark in row_marks] for press, row_marks in marks(folder).items()}


def test_a_baseline_that_nobody_ran_is_said(tmp_path: Path) -> None:
    write_results(tmp_path, "snapkv", 0.5)
    assert labels(tmp_path) == {"missing": ["not run"], "snapkv": []}


def test_that_a_stream_has_no_baseline_is_said_where_one_would_stand(tmp_path: Path) -> None:
    write_stream(tmp_path, "snapkv")
    (mark,) = marks(tmp_path)["missing"]
    assert mark.label == "not run" and mark.text.startswith("A stream always has a press")


@pytest.mark.parametrize(
    "facts, label",
    [
        ({"acc": 0.4, "kept": 1.0}, "kept everything"),
        ({"acc": 0.5}, "same figures"),
        ({"acc": 0.4, "notes": {"pyramidkv fell back to snapkv": 4}}, "fell back"),
        ({"acc": 0.4, "version": "0.5.4"}, "versions"),
    ],
)
def test_rows_that_cannot_be_trusted_are_marked(tmp_path: Path, facts: dict[str, Any], label: str) -> None:
    write_results(tmp_path, "none", 0.0)
    write_results(tmp_path, "snapkv", 0.5, **facts)
    assert labels(tmp_path)["snapkv"] == [label]


def test_a_press_that_keeps_and_changes_every_entry_has_acted(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    file = write_results(tmp_path, "think", 0.0, acc=0.4, kept=1.0)
    changes = parse_press("think").describe()["changes_entries"]
    amend(file, lambda content: content["config"]["kvpress"]["press"].update(changes_entries=changes))
    (mark,) = marks(tmp_path)["think"]
    assert (mark.label, mark.is_void) == ("changed entries", False) and "50% of the key channels" in mark.text


def test_runs_of_fewer_documents_are_marked_in_their_own_table(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    write_results(tmp_path, "snapkv", 0.5, acc=0.4, num_documents=3)
    found = {row.press: row.marks for table in build_report([tmp_path]).tables for row in table.rows if row.cell}
    assert {press: [mark.label for mark in row_marks] for press, row_marks in found.items()} == {
        "none": [],
        "snapkv": ["fewer documents"],
    }


# ------------------------------------------------------------------------------- presses that act while decoding


def test_a_press_that_acts_while_text_is_generated_ran_if_it_compressed_then(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=23)
    without_prefill_press(tmp_path, "decoding:tova")
    without_prefill_press(tmp_path, "prefill_decoding:snapkv+knorm", num_compressions=1, num_short=4)
    without_prefill_press(tmp_path, "prefill_decoding:snapkv+tova", num_short=4)
    assert labels(tmp_path) == {
        "none": [],
        "decoding:knorm": [],
        "decoding:tova": ["never ran"],
        "prefill_decoding:snapkv+knorm": [],
        "prefill_decoding:snapkv+tova": ["never ran"],
    }
    texts = {press: row_marks[0].text for press, row_marks in marks(tmp_path).items() if row_marks}
    assert texts["decoding:tova"].startswith("No answer grew long enough for the press to act")
    assert texts["prefill_decoding:snapkv+tova"].endswith("all were too short for it.")


def test_texts_on_which_a_press_did_not_act_are_counted(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=23, num_texts=8, num_texts_compressed=2)
    without_prefill_press(tmp_path, "decoding:tova", num_compressions=23, num_texts=8, num_texts_compressed=8)
    without_prefill_press(tmp_path, "decoding:keydiff", num_texts=8)
    of_both = write_results(tmp_path, "prefill_decoding:snapkv+knorm", 0.5, acc=0.4)
    amend(of_both, lambda content: content["config"]["kvpress"]["tasks"]["recall"].update(texts_generated=8))
    found = marks(tmp_path)
    assert {press: [(mark.label, mark.is_void) for mark in row_marks] for press, row_marks in found.items()} == {
        "none": [],
        "decoding:knorm": [("short texts", False)],
        "decoding:tova": [],
        "decoding:keydiff": [("never ran", True)],
        "prefill_decoding:snapkv+knorm": [("prefill only", True)],
    }
    assert found["decoding:knorm"][0].text.startswith("The press acted on 2 of 8 texts")


# ------------------------------------------------------------------------------------------ the baseline's answers

RIGHT = [1] * NUM_DOCUMENTS


def of_answers(folder: Path, **facts: Any) -> list[tuple[str, bool]]:
    """The marks of a press, and whether they void it, beside a baseline that is right everywhere."""
    write_results(folder, "none", 0.0, scores=RIGHT)
    write_results(folder, "keydiff", 0.5, **{"scores": RIGHT} | facts)
    return [(mark.label, mark.is_void) for mark in marks(folder)["keydiff"]]


def test_a_press_that_evicted_entries_and_changed_no_answer_is_lossless(tmp_path: Path) -> None:
    assert of_answers(tmp_path, kept=0.5) == [("lossless on these documents", False)]


def test_a_press_that_evicted_nothing_and_changed_no_answer_is_identical(tmp_path: Path) -> None:
    assert of_answers(tmp_path, kept=1.0) == [("kept everything", True), ("identical", True)]


def test_a_press_that_changed_entries_and_no_answer_is_lossless(tmp_path: Path) -> None:
    of_answers(tmp_path, kept=1.0)
    for file in tmp_path.glob("keydiff-*/results_*.json"):
        amend(file, lambda content: content["config"]["kvpress"]["press"].update(changes_entries="zeroed channels"))
    assert labels(tmp_path)["keydiff"] == ["changed entries", "lossless on these documents"]


def test_a_press_of_which_nothing_was_measured_and_no_answer_changed_is_identical(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, scores=RIGHT)
    unmeasured(tmp_path, "keydiff", scores=RIGHT)
    assert labels(tmp_path)["keydiff"] == ["identical", "not measured"]


def other_answers(folder: Path, press: str) -> None:
    """Change every logged log-likelihood, and no figure."""
    (file,) = folder.glob(f"{press}-*/samples_*")
    file.write_text(file.read_text().replace('"resps": [[["-1"', '"resps": [[["-1.25"'))


def test_the_same_figures_of_other_log_likelihoods_have_no_mark(tmp_path: Path) -> None:
    assert of_answers(tmp_path, kept=0.5) != []
    other_answers(tmp_path, "keydiff")
    assert labels(tmp_path)["keydiff"] == []


def test_the_same_answers_to_other_documents_have_no_mark(tmp_path: Path) -> None:
    assert of_answers(tmp_path, kept=0.5) != []
    (file,) = tmp_path.glob("keydiff-*/samples_*")
    file.write_text(file.read_text().replace('"doc_hash": "hash', '"doc_hash": "other'))
    assert labels(tmp_path)["keydiff"] == []


def test_where_no_figure_was_compared_nothing_is_identical(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, scores=RIGHT)
    write_results(tmp_path, "keydiff", 0.5, scores=RIGHT)
    for file in tmp_path.rglob("results_*.json"):
        amend(file, lambda content: content["results"].update(recall={"acc,none": "N/A"}))
    assert labels(tmp_path)["keydiff"] == []


def test_equal_figures_without_samples_are_no_equal_answers(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=3, acc=0.5)
    row = rows(tmp_path)["decoding:knorm"]
    (mark,) = row.marks
    assert mark.label == "same figures" and not row.is_void
    assert mark.text.endswith("is not known without samples (--log_samples).")


def test_contexts_are_called_too_short_only_where_they_were(tmp_path: Path) -> None:
    without_prefill_press(tmp_path, "snapkv")
    (mark,) = marks(tmp_path)["snapkv"]
    assert (mark.label, mark.text) == ("never ran", "No context went through the press.")


@pytest.mark.parametrize(
    "fact, label, query_aware, words",
    [
        ("num_cut_contexts", "cut prompts", False, "lost their beginning (3 of recall)"),
        ("num_prompts_without_question", "no question", False, "(3 of recall): they were compressed with all"),
        ("num_prompts_without_question", "no question", True, "(3 of recall): nothing of them was compressed"),
        ("num_prompts_without_context", "no context", False, "(3 of recall): nothing of them was compressed"),
    ],
)
def test_prompts_that_were_cut_or_could_not_be_divided_are_counted_beside_the_figure(
    tmp_path: Path, fact: str, label: str, query_aware: bool, words: str
) -> None:
    """On the baseline too. The run's own warning is gone when somebody reads the table."""
    for press, acc, count in (("none", 0.5, 3), ("snapkv", 0.4, 3), ("knorm", 0.4, 0)):

        def change(content: dict[str, Any], count: int = count) -> None:
            facts = content["config"]["kvpress"]
            facts["protocol"]["query_aware"] = query_aware
            facts["tasks"]["recall"][fact] = count

        amend(write_results(tmp_path, press, 0.0 if press == "none" else 0.5, acc=acc), change)
    assert labels(tmp_path) == {"none": [label], "snapkv": [label], "knorm": []}
    (mark,) = marks(tmp_path)["snapkv"]
    assert words in mark.text and not mark.is_void


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


# ------------------------------------------------------------------------------------------ other tasks, no tasks


def with_tasks(folder: Path, press: str, *tasks: str) -> Path:
    """Write a run of several tasks, all with the figures of `recall`."""

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
    found = marks(tmp_path)
    assert found["none"] == found["knorm"] == []
    ((snapkv,), (tova,)) = (found[name] for name in ("snapkv", "tova"))
    assert (snapkv.label, snapkv.is_void) == ("other tasks", False)
    listed = "(without story; also extra): kept, KV bytes and speeds are means over its own."
    assert snapkv.text == f"Ran other tasks than the baseline {listed}"
    assert "(also task0, task1, task2, task3, task4 and 4 more)" in tova.text


def test_without_a_baseline_tasks_are_those_of_the_row_with_most(tmp_path: Path) -> None:
    with_tasks(tmp_path, "knorm", "recall")
    with_tasks(tmp_path, "snapkv", "recall", "story")
    with_tasks(tmp_path, "tova", "story", "recall")
    found = marks(tmp_path)
    assert found["snapkv"] == found["tova"] == []
    assert found["knorm"][0].text.startswith("Ran other tasks than the row with most (without story): ")


def test_a_run_whose_answers_came_from_a_cache_is_marked_and_not_void(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    unmeasured(tmp_path, "snapkv", acc=0.4)
    (mark,) = marks(tmp_path)["snapkv"]
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


def test_a_run_whose_batches_all_ran_on_another_machine_is_measured(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        facts = content["config"]["kvpress"]
        facts |= {"throughput": {"num_batches": 0}, "answered_before": {"batches_on_other_machines": 3}}

    write_results(tmp_path, "none", 0.0)
    amend(write_results(tmp_path, "snapkv", 0.5, acc=0.4), change)
    assert "not measured" not in labels(tmp_path)["snapkv"]


def test_of_several_tasks_those_are_named_that_came_from_a_cache(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        facts = content["config"]["kvpress"]
        del facts["tasks"]["recall"]
        facts["throughput"]["num_batches"] = 3

    with_tasks(tmp_path, "none", "recall", "story")
    amend(with_tasks(tmp_path, "snapkv", "recall", "story"), change)
    (mark,) = marks(tmp_path)["snapkv"]
    assert mark.label == "not measured" and "measured of recall:" in mark.text
