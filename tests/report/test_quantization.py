"""Runs that pack their entries: rows of their own, beside evicting ones on one axis, and never the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_files import NUM_DOCUMENTS, amend, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.contents import ReportRow
from lm_eval_kvpress.report.figures import write_figures

INT4 = {"kv_quant": "int4", "kv_group": 64, "kv_residual": 0, "kv_layout": "kivi", "kv_scales": "compact"}


def packed(folder: Path, press: str, ratio: float, share: float, *, name: str, facts: Any = INT4, **given: Any) -> Path:
    """A run whose entries take ``share`` of their bytes in float32."""

    def change(content: dict[str, Any]) -> None:
        content["config"]["kvpress"]["quantization"] = facts
        for of_task in content["config"]["kvpress"]["tasks"].values():
            for contexts in (of_task["contexts_pressed"], of_task["contexts_unpressed"]):
                contexts["kv_bytes_unpacked"] = contexts["kv_bytes_allocated"]
                contexts["kv_bytes_allocated"] = round(share * contexts["kv_bytes_unpacked"])

    return amend(write_results(folder, press, ratio, name=name, **given), change)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    write_results(tmp_path, "snapkv", 0.75, acc=0.4)
    packed(tmp_path, "none", 0.0, 0.25, name="int4", acc=0.45)
    packed(tmp_path, "snapkv", 0.5, 0.25, name="both", acc=0.3, facts={**INT4, "kv_group": 32})
    return tmp_path


def rows(folder: Path) -> dict[str, ReportRow]:
    (table,) = build_report([folder]).tables
    return {f"{row.press} {row.arguments.removesuffix('window_size=64')}".strip(" ,"): row for row in table.rows}


def test_quantization_is_a_row_of_its_own_and_no_baseline(folder: Path) -> None:
    found = rows(folder)
    assert set(found) == {"none", "none kv_quant=int4", "snapkv kv_group=32, kv_quant=int4", "snapkv"}
    assert [name for name, row in found.items() if row.is_baseline] == ["none"]
    assert found["none kv_quant=int4"].entries["recall.acc"].difference is not None
    assert [row.marks for row in found.values()] == [()] * 4


def test_cache_sizes_and_bits(folder: Path) -> None:
    sizes = {name: row.number("cache_size") for name, row in rows(folder).items()}
    assert sorted(sizes.values(), key=float) == pytest.approx([0.125, 0.25, 0.25, 1.0])  # type: ignore[arg-type]
    bits = {name: row.number("bits_per_number") for name, row in rows(folder).items()}
    assert bits["none kv_quant=int4"] == pytest.approx(8) and bits["none"] is None
    write_results(folder / "other", "none", 0.0, checkpoint="another")
    other = next(table for table in build_report([folder]).tables if len(table.rows) == 1)
    assert not {"cache_size", "bits_per_number"} & {column.key for column in other.columns}


def test_one_figure_has_eviction_and_quantization_on_one_axis(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    files = write_figures(build_report([folder]), folder / "f")
    assert "table1_recall.acc_size.svg" in {file.name for file in files}
    (axes,) = [one.axes[0] for one in drawn if one.axes[0].get_xlabel().startswith("cache size")]
    points = sorted(xy for line in axes.containers for xy in line.lines[0].get_xydata().tolist())
    assert points == [[0.125, 0.3], [0.25, 0.4], [0.25, 0.45], [1.0, 1.0]]
    for figure in drawn:
        figure.clear()


def test_a_packed_cache_that_was_not_read_is_void(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        facts = {"num_tokens": 9, "kl_mean": 0.0, "kl_max": 0.0, "top1_agreement": 1.0}
        content["config"]["kvpress"]["tasks"]["recall"]["fidelity"] = facts

    amend(folder / "int4" / "results_2026.json", change)
    (mark,) = rows(folder)["none kv_quant=int4"].marks
    assert mark.label == "not read" and mark.is_void and "packed" in mark.text
