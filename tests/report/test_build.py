"""The contents of a report, from results files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_files import NUM_DOCUMENTS, amend, predict_only, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.data_files import as_csv, as_json
from lm_eval_kvpress.report.html import html
from lm_eval_kvpress.report.latex import latex
from lm_eval_kvpress.report.markdown import markdown


def test_tables_for_people_have_the_leading_metric_unless_all_are_asked_for(leaderboard: Path) -> None:
    table = build_report([leaderboard]).tables[0]
    assert [column.key for column in table.shown_columns if column.metric] == ["recall.acc"]
    assert len([column for column in table.columns if column.metric]) == 3
    table = build_report([leaderboard], all_metrics=True).tables[0]
    assert [column for column in table.shown_columns if column.metric] == [one for one in table.columns if one.metric]


def test_tables_for_people_have_no_column_of_which_no_run_says_anything(leaderboard: Path) -> None:
    for table in build_report([leaderboard]).tables:
        said = {
            column.key
            for row in table.rows
            for column in table.columns
            if column.is_main and row.entries[column.key].value is not None
        }
        shown = {column.key for column in table.shown_columns if not column.metric}
        assert shown == said - {column.key for column in table.columns if column.metric}


def test_no_two_tables_have_one_heading(leaderboard: Path) -> None:
    headings = [table.heading for table in build_report([leaderboard]).tables]
    assert len(set(headings)) == len(headings) > 1
    assert sum(heading.startswith("tiny · float32 · table ") for heading in headings) == 3


def test_each_mark_of_a_table_has_one_number(leaderboard: Path) -> None:
    for table in build_report([leaderboard]).tables:
        assert len(set(table.marks)) == len(table.marks)
        for row in table.rows:
            assert [table.marks[number - 1] for number in table.mark_numbers(row)] == list(row.marks)


def test_every_writer_takes_results_without_figures_and_shows_no_placeholder(tmp_path: Path) -> None:
    predict_only(tmp_path, "none")
    predict_only(tmp_path, "snapkv", kept=0.4)
    report = build_report([tmp_path])
    (table,) = report.tables
    assert not any(column.metric for column in table.columns) and table.num_documents == {"recall": NUM_DOCUMENTS}
    assert [row.number("kept_share") for row in table.rows] == [1.0, 0.4]
    assert html(report)
    for text in (markdown(report), latex(report), as_csv(report), as_json(report)):
        assert "bypass" not in text


def test_runs_that_hold_the_question_back_say_how_much_and_are_never_mixed_with_others(tmp_path: Path) -> None:
    """A file that does not say whether the press saw the question is of a version in which it always did."""

    def run(press: str, name: str, **protocol: Any) -> None:
        def change(content: dict[str, Any]) -> None:
            content["config"]["kvpress"]["protocol"] |= protocol
            content["config"]["kvpress"]["tasks"]["recall"]["tokens_held_back"] = {
                "least": 9,
                "median": 11.5,
                "most": 14,
            }

        amend(write_results(tmp_path, press, 0.5 if press == "knorm" else 0.0, name=name), change)

    run("none", "old")
    run("knorm", "aware", query_aware=True)
    for press in ("none", "knorm"):
        run(press, "agnostic", query_aware=False, question_pattern="Question:")
    report = build_report([tmp_path])
    assert [len(table.rows) for table in report.tables] == [2, 2]
    protocols = sorted(table.protocol for table in report.tables)
    assert "query_tokens" not in protocols[0] and protocols[0].startswith(
        "query_aware=false, question_pattern=Question:, recall: 9 to 14 tokens held back (median 11.5)"
    )
    assert protocols[1].startswith("query_tokens=1")


def test_generated_texts_have_columns_of_their_length(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["config"]["kvpress"]["tasks"]["recall"] |= {
            "texts_generated": 4,
            "tokens_generated": 50,
            "texts_at_limit": 1,
        }

    write_results(tmp_path, "none", 0.0)
    assert not any(column.group == "Output" for column in build_report([tmp_path]).tables[0].columns)
    amend(write_results(tmp_path, "knorm", 0.5), change)
    (table,) = build_report([tmp_path]).tables
    found = [[row.entries[key].text for key in ("tokens_per_text", "share_at_limit")] for row in table.rows]
    assert found == [["-", "-"], ["12.5", "25.0 %"]]
