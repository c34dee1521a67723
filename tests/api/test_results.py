"""Results as DataFrames: every figure of the report, in full precision, and a sweep that ends in one."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import write_results
from sweep_runs import manager, write_tasks

from lm_eval_kvpress import UsageError, read_results, run_sweep
from lm_eval_kvpress.sweep import run


def test_results_are_the_rows_of_the_report_without_empty_columns(tmp_path: Path) -> None:
    for press, ratio, acc in (("none", 0.0, 1.0), ("knorm", 0.5, 0.123456789), ("snapkv", 0.5, 0.5)):
        write_results(tmp_path, press, ratio, acc=acc)
    rows = read_results(tmp_path, sort=["recall.acc"])
    assert rows["press"].tolist() == ["none", "snapkv", "knorm"] and rows["recall.acc"][2] == 0.123456789
    assert not rows.isna().all().any()
    assert list(read_results(tmp_path, columns=["recall.acc", "press"]).columns) == ["recall.acc", "press"]
    with pytest.raises(UsageError, match=r"columns: recal.acc: no such column; did you mean 'recall.acc'"):
        read_results(tmp_path, columns=["recal.acc"])


def test_a_sweep_returns_what_its_folder_holds(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked for")
    (tmp_path / "tasks").mkdir()
    found = run_sweep(
        model_args={"pretrained": str(checkpoint_dir)},
        tasks=["sweep_choice"],
        presses=["none", "knorm"],
        ratios=[0.5],
        device="cpu",
        include_path=str(write_tasks(tmp_path / "tasks")),
        output_path=str(tmp_path / "runs"),
    )
    assert found["press"].tolist() == ["none", "knorm"] and found["kept_share"][1] == pytest.approx(0.5, abs=0.01)
    assert found.equals(read_results(tmp_path / "runs"))
    with pytest.raises(UsageError, match="unknown setting 'preses': did you mean 'presses'"):
        run_sweep(tasks=["sweep_choice"], preses=["none"], output_path=str(tmp_path / "other"))
