"""Groups of tasks: lm-eval's averages, and RULER's by length, over the tasks that ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_files import amend, write_results

from lm_eval_kvpress.report.averages import group_members
from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.contents import ReportTable
from lm_eval_kvpress.report.markdown import markdown
from lm_eval_kvpress.report.result_files import read_cell

Scores = dict[int, Sequence[float]]  # of each length, one per document


def write_tasks(folder: Path, press: str, figures: dict[str, dict[str, Any]], **content: Any) -> Path:
    """Write a run of these tasks and groups."""

    def change(written: dict[str, Any]) -> None:
        facts = written["config"]["kvpress"]["tasks"]
        written["results"] = {name: {"alias": name, **figures[name]} for name in figures}
        written["n-samples"] = {name: {"original": 4, "effective": 4} for name in figures if name not in content}
        written["config"]["kvpress"]["tasks"] = {name: facts["recall"] for name in figures}
        written |= {"higher_is_better": {}, "versions": {}, "n-shot": {}, **content}

    return amend(write_results(folder, press, 0.5), change)


def write_ruler(folder: Path, press: str, tasks: dict[str, Scores], **content: Any) -> Path:
    """Write a run of RULER's tasks as lm-eval 0.4.13 does: with -1 for 4,096, and for a document's other lengths."""
    figures = {
        name: {"4096,none": -1, **{f"{length},none": sum(one) / len(one) for length, one in scores.items()}}
        for name, scores in tasks.items()
    }
    names = [*figures, *content.get("group_subtasks", {})]
    figures |= {name: {"4096,none": -1.0} for name in content.get("group_subtasks", {})}
    declared = {name: {"4096": True, "8192": True} for name in names}
    file = write_tasks(folder, press, figures, **{"higher_is_better": declared} | content)
    for name, scores in tasks.items():
        pairs = [(length, score) for length, one in scores.items() for score in one]
        lines = [json.dumps(_sample(index, length, score)) for index, (length, score) in enumerate(pairs)]
        file.with_name(f"samples_{name}_2026.jsonl").write_text("\n".join(lines) + "\n")
    return file


def _sample(index: int, length: int, score: float) -> dict[str, Any]:
    return {
        "doc_id": index,
        "resps": [[f"answer worth {score}"]],
        "filter": "none",
        "metrics": ["4096", str(length)],
        "doc_hash": f"hash{index}",
        "4096": -1.0,
        str(length): score,
    }


def table(folder: Path) -> ReportTable:
    (found,) = build_report([folder]).tables
    return found


def texts(found: ReportTable, column: str) -> dict[str, str]:
    return {row.press: row.entries[column].text for row in found.rows}


def test_ruler_at_one_length_has_that_column_alone_and_no_mark_where_answers_differ(tmp_path: Path) -> None:
    """Answers right in 100, 100, 50 and 0 %: the placeholder -1 for 4,096 made all four rows "identical"."""
    right = {"none": [1, 1, 1, 1], "keydiff": [1.0, 1, 1, 1], "streaming_llm": [1, 0, 1, 0], "snapkv": [0, 0, 0, 0]}
    for press, scores in right.items():
        write_ruler(tmp_path, press, {"niah_single_1": {1024: scores}})
    found = table(tmp_path)
    assert texts(found, "niah_single_1.1024") == {
        "none": "100.0 %",
        "keydiff": "100.0 %",
        "streaming_llm": "50.0 %",
        "snapkv": "0.0 %",
    }
    assert [column.key for column in found.columns if column.metric] == ["niah_single_1.1024"]
    assert not any(row.marks for row in found.rows), "keydiff's answers are right in other words"
    text = markdown(build_report([tmp_path]))
    assert "4096" not in text and "-1.000" not in text
    snapkv = next(row for row in found.rows if row.press == "snapkv").entries["niah_single_1.1024"]
    assert (snapkv.difference_text, snapkv.interval_text) == ("−100.0 pp", "")


def test_ruler_has_a_column_per_length_and_averages_over_tasks_and_lengths(tmp_path: Path) -> None:
    write_ruler(
        tmp_path, "none", {"niah_single_1": {1024: [1, 1], 2048: [1, 0]}, "ruler_cwe": {1024: [0, 0], 2048: [0, 0]}}
    )
    write_ruler(
        tmp_path, "knorm", {"niah_single_1": {1024: [1, 0], 2048: [0, 0]}, "ruler_cwe": {1024: [0, 0], 2048: [0, 0]}}
    )
    found = table(tmp_path)
    assert [column.key for column in found.shown_columns if column.metric] == [
        *("ruler.1024", "ruler.2048", "ruler.all_lengths"),
        *("niah_single_1.1024", "niah_single_1.2048", "niah_single_1.all_lengths"),
        *("ruler_cwe.1024", "ruler_cwe.2048", "ruler_cwe.all_lengths"),
    ]
    assert texts(found, "ruler.1024") == {"none": "50.0 %", "knorm": "25.0 %"}
    assert texts(found, "ruler.all_lengths") == {"none": "37.5 %", "knorm": "12.5 %"}
    assert texts(found, "niah_single_1.all_lengths") == {"none": "75.0 %", "knorm": "25.0 %"}
    assert "ruler: average over 2 tasks that ran (niah_single_1, ruler_cwe)." in found.notices
    difference = found.rows[1].entries["ruler.all_lengths"].difference
    assert difference is not None and difference.num_documents == 8
    assert difference.low is not None and difference.low < -0.25 < (difference.high or 0.0) + 1e-9


def test_the_average_of_a_length_is_made_where_lm_eval_made_none(tmp_path: Path) -> None:
    subtasks = {"ruler": ["niah_single_1", "niah_single_2", "ruler_vt"]}
    tasks = {"niah_single_1": {1024: [1.0]}, "ruler_vt": {1024: [0.5]}}
    cell = read_cell(write_ruler(tmp_path, "none", tasks, group_subtasks=subtasks))
    (group,) = cell.groups
    assert (group.name, group.members) == ("ruler", ("niah_single_1", "ruler_vt")), "the tasks that ran"
    assert [(metric.name, metric.value, metric.higher_is_better) for metric in group.metrics] == [("1024", 0.75, True)]
    assert [task.name for task in cell.tasks] == ["niah_single_1", "ruler_vt"]


@pytest.mark.parametrize(
    "group, metric", [("longbench", "score"), ("longbench2", "acc"), ("mmlu_stem", "acc"), ("leaderboard", "acc_norm")]
)
def test_lm_evals_own_averages_are_columns(tmp_path: Path, group: str, metric: str) -> None:
    figures = {"one": {f"{metric},none": 0.2}, "two": {f"{metric},none": 0.4}, "three": {"other,none": 1.0}}
    subtasks = {group: ["part", "three"], "part": ["one", "two"]}
    file = write_tasks(
        tmp_path, "none", {group: {f"{metric},none": 0.3}, **figures, "part": {}}, group_subtasks=subtasks
    )
    (found,) = read_cell(file).groups
    assert (found.name, found.members, found.metrics[0].value) == (group, ("one", "two"), 0.3)
    shown = table(tmp_path)
    assert texts(shown, f"{group}.{metric}") == {"none": "0.300"}
    assert f"{group}: average over 2 tasks that ran (one, two)." in shown.notices
    assert group not in shown.documents


def test_a_group_whose_author_gave_no_average_has_none(tmp_path: Path) -> None:
    figures = {"a": {"word_perplexity,none": 9.0}, "b": {"word_perplexity,none": 11.0}, "kvpress_ppl": {}}
    assert read_cell(write_tasks(tmp_path, "none", figures, group_subtasks={"kvpress_ppl": ["a", "b"]})).groups == ()


def test_tasks_of_longbench_that_were_named_one_by_one_have_their_groups_average(tmp_path: Path) -> None:
    """The English tasks, those of equal lengths and the second LongBench are groups of their own."""
    figures = {
        "longbench_qasper": {"score,none": 0.2},
        "longbench_repobench-p": {"score,none": 0.6},
        "longbench_qasper_e": {"score,none": 0.1},
        "longbench_lcc_e": {"score,none": 0.3},
        "longbench2_graph": {"acc,none": 0.5, "acc_norm,none": 0.9},
        "longbench2_table": {"acc,none": 0.0, "acc_norm,none": 0.9},
        "longbench_odd": {"other,none": 9.0},
    }
    cell = read_cell(write_tasks(tmp_path, "none", figures))
    found = {
        (group.name, group.members, metric.name): metric.value for group in cell.groups for metric in group.metrics
    }
    assert found == {
        ("longbench", ("longbench_qasper", "longbench_repobench-p"), "score"): pytest.approx(0.4),
        ("longbench_e", ("longbench_lcc_e", "longbench_qasper_e"), "score"): pytest.approx(0.2),
        ("longbench2", ("longbench2_graph", "longbench2_table"), "acc"): pytest.approx(0.25),
    }
    assert texts(table(tmp_path), "longbench.score") == {"none": "0.400"}


def test_one_task_is_no_average(tmp_path: Path) -> None:
    assert read_cell(write_tasks(tmp_path, "none", {"longbench_qasper": {"score,none": 0.2}})).groups == ()


@pytest.mark.parametrize("is_said", [True, False], ids=["metadata", "metrics alone"])
def test_texts_of_other_lengths_are_never_compared(tmp_path: Path, is_said: bool) -> None:
    """Without samples nothing else tells the documents apart. 1,024 and 2,048, and then 1,024 and 8,192."""

    def write(folder: Path, press: str, **scores: Sequence[float]) -> None:
        lengths = {int(name[1:]): one for name, one in scores.items()}
        said = {"metadata": {"max_seq_lengths": list(lengths)}} if is_said else {}
        write_ruler(folder, press, {"niah_single_1": lengths}, configs={"niah_single_1": said})

    for press in ("none", "snapkv"):
        write(tmp_path / "short", press, n1024=[1, 1])
        write(tmp_path / "long", press, n2048=[0, 1])
    write(tmp_path / "both", "none", n1024=[1, 1], n2048=[1, 1])
    write(tmp_path / "far", "snapkv", n1024=[1, 1], n8192=[0, 0])
    for file in tmp_path.rglob("samples_*"):
        file.unlink()
    tables = build_report([tmp_path]).tables
    found = {
        tuple(column.key.split(".")[1] for column in one.columns if column.metric): [row.press for row in one.rows]
        for one in tables
    }
    assert found == {
        ("1024",): ["none", "snapkv"],
        ("2048",): ["none", "snapkv"],
        ("1024", "2048", "all_lengths"): ["none"],
        ("1024", "8192", "all_lengths"): ["none", "snapkv"],
    }, "the last has no baseline of its own"
    assert not any("newest file counts" in notice for one in tables for notice in one.notices)


def test_lengths_in_words_are_lengths_too(tmp_path: Path) -> None:
    """BABILong's metric is the same at 1k and at 4k."""
    for press, length, acc in (("none", "1k", 0.9), ("snapkv", "4k", 0.2), ("knorm", "1k", 0.8)):
        about = {"babilong_qa1": {"metadata": {"max_seq_lengths": length}}}
        write_tasks(tmp_path, press, {"babilong_qa1": {"acc,none": acc}}, configs=about)
    tables = build_report([tmp_path]).tables
    assert sorted([row.press for row in one.rows if row.cell] for one in tables) == [["none", "knorm"], ["snapkv"]]


def test_a_row_that_ran_fewer_tasks_of_a_group_has_no_average(tmp_path: Path) -> None:
    names = ("niah_single_1", "ruler_cwe", "ruler_fwe")
    tasks: dict[str, Scores] = {name: {1024: [1, 1] if name == names[0] else [0, 0]} for name in names}
    write_ruler(tmp_path, "none", tasks)
    write_ruler(tmp_path, "knorm", {name: tasks[name] for name in names[:2]})
    assert texts(table(tmp_path), "ruler.1024") == {"none": "33.3 %", "knorm": "-"}


def test_groups_of_groups_have_the_tasks_below_them() -> None:
    subtasks = {"mmlu": ["stem", "law"], "stem": ["algebra", "physics"], "algebra": [], "loop": ["loop", "x"]}
    assert group_members({"group_subtasks": subtasks, "groups": {"mmlu": {}}}) == {
        "mmlu": {"algebra", "physics", "law"},
        "stem": {"algebra", "physics"},
        "loop": {"x"},
    }


def test_lengths_of_infinite_figures_of_both_signs_have_no_mean(tmp_path: Path) -> None:
    figures = {"niah_single_1": {"1024,none": float("inf"), "2048,none": float("-inf")}}
    (task,) = read_cell(write_tasks(tmp_path, "none", figures)).tasks
    assert str(task.metrics[-1].value) == "nan"
