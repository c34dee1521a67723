"""Tables never mix checkpoints, protocols or documents, and each has its baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_files import NUM_DOCUMENTS, amend, predict_only, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.report.tables import Table, build_tables


def tables(folder: Path) -> list[Table]:
    return build_tables(read_results([folder]))


def test_protocols_checkpoints_and_documents_are_never_mixed(tmp_path: Path) -> None:
    for index, facts in enumerate(
        [{}, {"query_tokens": 0}, {"checkpoint": "other"}, {"num_documents": 3}, {"stock": True}]
    ):
        write_results(tmp_path, "none", 0.0, name=str(index), **facts)
    assert [len(table.rows) for table in tables(tmp_path)] == [1] * 5


def test_difference_is_to_the_baseline_of_the_same_table(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    write_results(tmp_path, "none", 0.0, scores=[0] * NUM_DOCUMENTS, name="other", query_tokens=0)
    write_results(tmp_path, "snapkv", 0.5, scores=[1, 0] * (NUM_DOCUMENTS // 2))
    table = next(table for table in tables(tmp_path) if len(table.rows) == 2)
    difference = table.rows[1].difference(table.metrics[0])
    assert table.rows[0].is_baseline and difference is not None and difference.value == -0.5


def text_run(folder: Path, name: str, fingerprint: str | None = None, **metadata: Any) -> None:
    """Write a run of a text that its task loaded; `metadata` is what the task's configuration says of it."""
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
    text_run(tmp_path, "0", loaded=CHAIN | {"source": "here/test.jsonl"}, max_tokens=9)
    text_run(tmp_path, "1", **other)
    assert len(tables(tmp_path)) == num_tables


def test_lm_evals_hash_of_the_documents_counts_more_than_what_was_loaded(tmp_path: Path) -> None:
    """--limit 1 of two books scores the same text as one book."""
    text_run(tmp_path, "0", "same", loaded=CHAIN)
    text_run(tmp_path, "1", "same", loaded={"titles": ["The Chain", "The Ferry"]})
    text_run(tmp_path, "2", "other", loaded=CHAIN)
    assert sorted(len(table.rows) for table in tables(tmp_path)) == [2, 2]


@pytest.mark.parametrize(
    "limit, fingerprints, num_tables",
    [
        (3, (None, None), 1),
        (None, (None, None), 2),
        (None, ("a", "a"), 1),
        (None, ("a", "b"), 2),
        (None, ("a", None), 2),
    ],
)
def test_documents_that_samples_chose_are_compared_only_where_they_are_known_to_be_the_same(
    tmp_path: Path, limit: int | None, fingerprints: tuple[str | None, str | None], num_tables: int
) -> None:
    for press, fingerprint in zip(("none", "snapkv"), fingerprints, strict=True):
        file = write_results(tmp_path, press, 0.5, acc=0.4, num_documents=3)
        amend(file, lambda content: content["config"].update(limit=limit))
        amend(file, lambda content, known=fingerprint: content.update(task_hashes={"recall": known} if known else {}))
    report = build_report([tmp_path])
    assert len(report.tables) == num_tables
    said = [notice for table in report.tables for notice in table.notices if "is not known" in notice]
    assert len(said) == (fingerprints.count(None) if limit is None else 0)
    differences = [row.entries["recall.acc"].difference for table in report.tables for row in table.rows]
    assert sum(difference is not None for difference in differences) == (num_tables == 1)


def test_a_configuration_of_another_shape_says_nothing_of_the_documents(tmp_path: Path) -> None:
    text_run(tmp_path, "0", loaded=CHAIN)
    file = write_results(tmp_path, "snapkv", 0.5)
    amend(file, lambda content: content.update(configs={"recall": {"metadata": [{"version": 1.0}]}}))
    assert len(tables(tmp_path)) == 1


def test_what_one_run_says_of_its_documents_is_held_against_all_others_of_the_table(tmp_path: Path) -> None:
    text_run(tmp_path, "0", "same")
    text_run(tmp_path, "1", loaded=CHAIN)
    text_run(tmp_path, "2", loaded=FERRY)
    assert sorted(len(table.rows) for table in tables(tmp_path)) == [2, 2]


def asked(file: Path, num_fewshot: int, **config: Any) -> None:
    """Say of a run how many examples it had, what drew them, and what its task gave to generation."""

    def change(content: dict[str, Any]) -> None:
        content["n-shot"]["recall"] = num_fewshot
        content["configs"] = {"recall": {"generation_kwargs": config.pop("generation_kwargs", None)}}
        content["task_hashes"] = config.pop("task_hashes", {})
        content["fewshot_as_multiturn"] = config.pop("in_turns", False)
        content["chat_template_sha"] = "a template"
        content["config"] |= config

    amend(file, change)


@pytest.mark.parametrize(
    "num_fewshot, one, other, num_tables",
    [
        (5, {"fewshot_seed": 1}, {"fewshot_seed": 1}, 1),
        (5, {"fewshot_seed": 1}, {"fewshot_seed": 2}, 2),
        (0, {"fewshot_seed": 1}, {"fewshot_seed": 2}, 1),
        (5, {"fewshot_seed": 1}, {}, 1),
        (5, {"fewshot_seed": 1, "in_turns": True}, {"fewshot_seed": 1}, 2),
        (
            5,
            {"fewshot_seed": 1, "task_hashes": {"recall": "a"}},
            {"fewshot_seed": 2, "task_hashes": {"recall": "a"}},
            1,
        ),
    ],
)
def test_examples_that_another_seed_drew_are_never_mixed(
    tmp_path: Path, num_fewshot: int, one: dict[str, Any], other: dict[str, Any], num_tables: int
) -> None:
    """Unless lm-eval's hash, which holds the prompts, says that they are the same."""
    asked(write_results(tmp_path, "none", 0.0, acc=0.9), num_fewshot, **one)
    asked(write_results(tmp_path, "snapkv", 0.5, acc=0.4), num_fewshot, **other)
    assert len(tables(tmp_path)) == num_tables


@pytest.mark.parametrize("most, num_tables", [(32, 1), (128, 2), (None, 1)])
def test_texts_of_other_arguments_of_generation_are_never_mixed(
    tmp_path: Path, most: int | None, num_tables: int
) -> None:
    """The hash holds no such argument: a task that was edited has the same one."""
    known = {"task_hashes": {"recall": "same"}}
    asked(write_results(tmp_path, "none", 0.0), 0, generation_kwargs={"max_gen_toks": 32, "until": []}, **known)
    given = None if most is None else {"until": [], "max_gen_toks": most}
    asked(write_results(tmp_path, "snapkv", 0.5), 0, generation_kwargs=given, **known)
    assert len(tables(tmp_path)) == num_tables


@pytest.mark.parametrize("changed", [{"max_length": 512}, {"config": {"model": "vllm"}}])
def test_stock_runs_of_other_lengths_or_engines_are_never_mixed(tmp_path: Path, changed: dict[str, Any]) -> None:
    """The older one was left out as if the setting had been run again."""
    for name, said in (("a", {"max_length": 2048}), ("b", {"max_length": 2048} | changed)):
        file = write_results(tmp_path, "none", 0.0, name=name, stock=True)
        amend(file, lambda content, said=said: content["config"].update(said.get("config", {})))
        amend(file, lambda content, said=said: content.update(max_length=said["max_length"]))
    report = build_report([tmp_path])
    assert [len(table.rows) for table in report.tables] == [1, 1]
    (name, value), *_ = ({"model": "vllm"} if "config" in changed else changed).items()
    assert any(f"{name}={value}" in table.protocol for table in report.tables)


def test_a_baseline_that_nobody_ran_is_a_row_without_a_cell(tmp_path: Path) -> None:
    write_results(tmp_path, "snapkv", 0.5)
    (table,) = tables(tmp_path)
    assert [row.press for row in table.rows] == ["none", "snapkv"] and table.baseline.cell is None
    assert len(table.cells) == 1


def test_a_task_that_was_scored_in_another_row_keeps_its_column(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    predict_only(tmp_path, "snapkv")
    assert [key.name for key in tables(tmp_path)[0].metrics] == ["acc", "acc_at_100", "acc_at_800"]
