"""Which metrics a table has and which one leads."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import amend, write_results

from lm_eval_kvpress.report.metrics import metric_keys
from lm_eval_kvpress.report.result_files import read_cell


@pytest.mark.parametrize(
    "names, main",
    [
        (["acc", "acc_norm"], "acc_norm"),
        (["words", "f1"], "f1"),
        (["words"], "words"),
        (["f1", "em"], "f1"),
    ],
)
def test_the_leading_metric_is_a_known_one_or_the_first_with_a_direction(
    tmp_path: Path, names: list[str], main: str
) -> None:
    file = write_results(tmp_path, "none", 0.0)
    better = {name: None if name == "words" else True for name in names}
    amend(
        file,
        lambda content: content.update(
            results={"recall": {f"{name},none": 0.5 for name in names}}, higher_is_better={"recall": better}
        ),
    )
    keys = metric_keys("recall", [read_cell(file)])
    assert [key.name for key in keys] == names and [key.name for key in keys if key.is_main] == [main]


def test_a_metric_names_its_task_its_filter_and_its_distance(tmp_path: Path) -> None:
    file = write_results(tmp_path, "none", 0.0)
    figures = {"acc_at_800,none": 0.5, "em,strict": 0.5, "pass_at_1,none": 0.5}  # the last is mbpp's
    amend(file, lambda content: content.update(results={"recall": figures}))
    keys = metric_keys("recall", [read_cell(file)])
    assert [(key.full_name, key.distance) for key in keys] == [
        *(("recall.acc_at_800", 800), ("recall.em,strict", None), ("recall.pass_at_1", None))
    ]
